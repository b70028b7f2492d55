"""Starts the program a thousand times.

Start-up is 0.4 s, nearly all of it imports. So they are done once, in a server, and each start is a fork of it that
executes the desk's own classify.py as __main__, with its own folder, arguments, environment, stdout and stderr. A
process stands between the two, which waits for the end and tells of it.
"""

import asyncio
import functools
import json
import os
import signal
import socket
import subprocess
import sys
from contextlib import suppress
from pathlib import Path

PROGRAM = Path(__file__).parent.parent / "classify.py"
CAN_FORK = hasattr(os, "fork") and hasattr(socket, "send_fds")
FORK_SERVER = """
import contextlib, gc, json, os, resource, runpy, signal, socket, sys, types

with contextlib.suppress(Exception):  # it may be edited right now
    runpy.run_path(sys.argv[1])
gc.freeze()
control = socket.socket(fileno=int(sys.argv[2]))
codes = {}


def run(code, job, out, err):
    for fd, to in ((os.open(os.devnull, os.O_RDONLY), 0), (out, 1), (err, 2)):
        os.dup2(fd, to)
        os.close(fd)
    sys.stdout = open(1, "w", closefd=False)
    sys.stderr = open(2, "w", closefd=False, buffering=1, errors="backslashreplace")
    os.environ.clear()
    os.environ.update(job["environment"])
    sys.argv = ["classify.py", *job["arguments"]]
    sys.path[0] = job["folder"]
    most = job["die_at_byte"] or job["full_at_byte"]
    if most:
        signal.signal(signal.SIGXFSZ, signal.SIG_DFL if job["die_at_byte"] else signal.SIG_IGN)
        resource.setrlimit(resource.RLIMIT_FSIZE, (most, most))
    sys.modules["__main__"] = module = types.ModuleType("__main__")
    module.__file__ = "classify.py"
    exec(code, vars(module))
    sys.exit()  # and so, or by what the program raised, the interpreter ends as any other does


def serve():
    while True:
        head, fds, _, _ = socket.recv_fds(control, 4, 3)
        if not head:
            return
        job = json.loads(control.recv(int.from_bytes(head, "big"), socket.MSG_WAITALL))
        out, err, told = fds
        os.chdir(job["folder"])
        source = open("classify.py", encoding="utf-8").read()
        if source not in codes:
            try:
                codes[source] = compile(source, "classify.py", "exec")
            except SyntaxError as error:
                codes[source] = compile(f"raise SyntaxError({str(error)!r})", "classify.py", "exec")
        if not os.fork():
            signal.signal(signal.SIGCHLD, signal.SIG_DFL)
            control.close()
            pid = os.fork()
            if not pid:
                os.close(told)
                run(codes[source], job, out, err)
            os.close(out)
            os.close(err)
            signal.signal(signal.SIGINT, signal.SIG_IGN)
            os.write(told, b"%d\\n" % pid)
            _, status, used = os.wait4(pid, 0)
            os.write(told, b"%d %d\\n" % (os.waitstatus_to_exitcode(status), used.ru_maxrss))
            os._exit(0)
        for fd in fds:
            os.close(fd)


signal.signal(signal.SIGCHLD, signal.SIG_IGN)  # nobody has to wait for those in between
serve()
"""


def clean_environment() -> dict[str, str]:
    """This process's environment without what would send the program elsewhere."""
    ours = {name: value for name, value in os.environ.items() if not name.startswith("TOKENHUB")}
    return {name: value for name, value in ours.items() if not name.upper().endswith("_PROXY")}


@functools.cache
def fork_server() -> socket.socket:
    """The end of a socket at which jobs are taken; the server ends with this process."""
    ours, its = socket.socketpair()
    with its:
        command = (sys.executable, "-c", FORK_SERVER, str(PROGRAM), str(its.fileno()))
        devnull = subprocess.DEVNULL
        subprocess.Popen(
            command, env=clean_environment(), pass_fds=[its.fileno()], stdin=devnull, stdout=devnull
        )  # fmt: skip
    return ours


async def reader_of(fd: int) -> asyncio.StreamReader:
    reader = asyncio.StreamReader()
    protocol = asyncio.StreamReaderProtocol(reader)
    await asyncio.get_running_loop().connect_read_pipe(lambda: protocol, os.fdopen(fd, "rb", 0))
    return reader


class Forked:
    """The program in a fork of the server, with what the tests need of asyncio's own Process."""

    output: Path  # where it writes its labels
    returncode: int | None = None
    peak_kb = 0  # in bytes on macOS

    @classmethod
    async def start(cls, **job: object) -> "Forked":
        message = json.dumps(job).encode()
        reading, writing = zip(*(os.pipe() for _ in range(3)), strict=True)
        socket.send_fds(fork_server(), [len(message).to_bytes(4, "big")], writing)
        fork_server().sendall(message)
        for fd in writing:
            os.close(fd)
        self = cls()
        self.stdout, self.stderr, self._told = [await reader_of(fd) for fd in reading]
        self.pid = int(await self._told.readline())
        self._ended = asyncio.ensure_future(self._end())
        return self

    async def _end(self) -> None:
        status, self.peak_kb = map(int, (await self._told.readline()).split())
        self.returncode = status

    async def wait(self) -> int:
        await asyncio.shield(self._ended)
        return self.returncode

    async def communicate(self) -> tuple[bytes, bytes]:
        out, err, _ = await asyncio.gather(self.stdout.read(), self.stderr.read(), self.wait())
        return out, err

    def send_signal(self, number: int) -> None:
        if self.returncode is None:
            with suppress(ProcessLookupError):
                os.kill(self.pid, number)

    def kill(self) -> None:
        self.send_signal(signal.SIGKILL)
