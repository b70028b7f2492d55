"""The harness: the real program as its user runs it, against the real stand-in over a socket."""

import ast
import asyncio
import csv
import functools
import json
import os
import signal
import socket
import subprocess
import sys
from collections.abc import Iterable, Iterator, Mapping
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

import pytest

from tests.gateway import Gateway

PROGRAM = Path(__file__).parent.parent / "classify.py"
KEY = "sk-test-0123456789abcdef"


@dataclass(frozen=True)
class Done:
    """What a run left behind."""

    status: int | None
    stdout: str
    stderr: str
    output: Path

    @property
    def lines(self) -> list[dict]:
        """The lines of labels.jsonl."""
        return [json.loads(line) for line in self.output.read_bytes().splitlines() if line.strip()]

    @property
    def labels(self) -> dict[str, str]:
        """Label by ticket id; fails the test where an id has two lines."""
        ids = [line["id"] for line in self.lines]
        assert len(ids) == len(set(ids)), "an id has two lines"
        return {line["id"]: line["label"] for line in self.lines}


# ---- Starting the program a thousand times -------------------------------------------------------------

# Start-up is 0.4 s, nearly all of it imports. So they are done once, in a server, and each start is a fork of it that
# executes the desk's own classify.py as __main__, with its own folder, arguments, environment, stdout and stderr. A
# process stands between the two, which waits for the end and tells of it.
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
    if job["die_at_byte"] is not None:
        signal.signal(signal.SIGXFSZ, signal.SIG_DFL)
        resource.setrlimit(resource.RLIMIT_FSIZE, (job["die_at_byte"],) * 2)
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
    return {k: v for k, v in os.environ.items() if not k.upper().endswith("_PROXY") and not k.startswith("TOKENHUB")}


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


# ---- The desk ------------------------------------------------------------------------------------------


@functools.cache
def settings_in(source: str) -> dict[str, tuple[int, int]]:
    """The first and the last line of each constant."""
    return {
        target.id: (node.lineno, node.end_lineno)
        for node in ast.parse(source).body
        if isinstance(node, ast.Assign)
        for target in node.targets
        if isinstance(target, ast.Name)
    }


class Desk:
    """A folder with a copy of classify.py, its constants edited as a user would, and a tickets.csv."""

    fresh = False  # True: each start is a new interpreter even where a fork would be quicker

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.output = folder / "labels.jsonl"
        self.tickets = folder / "tickets.csv"
        self.started: list[Forked] = []
        self.edit()

    def edit(self, **constants: object) -> None:
        """Writes classify.py anew, with these constants in place of its own."""
        source = PROGRAM.read_text(encoding="utf-8")
        lines, places = source.splitlines(), settings_in(source)
        assert constants.keys() <= places.keys(), f"classify.py has no setting {sorted(constants.keys() - places)}"
        for name, value in constants.items():
            first, last = places[name]
            lines[first - 1 : last] = [f"{name} = {value!r}", *[""] * (last - first)]
        (self.folder / "classify.py").write_text("\n".join(lines) + "\n", encoding="utf-8")

    def write(
        self, tickets: Mapping[str, str] | Iterable[tuple[str, ...]], header: tuple[str, ...] = ("id", "body")
    ) -> None:
        """Writes tickets.csv: id to body, or whole rows."""
        rows = tickets.items() if isinstance(tickets, Mapping) else tickets
        with open(self.tickets, "w", newline="", encoding="utf-8") as file:
            writer = csv.writer(file)
            writer.writerow(header)
            writer.writerows(rows)

    async def start(
        self, gateway: Gateway | None, *arguments: str, die_at_byte: int | None = None, **environment: str
    ) -> "asyncio.subprocess.Process | Forked":
        """Starts the program in its folder; an empty environment value removes the variable.

        A file that grows to `die_at_byte` kills it in the middle of its write.
        """
        ours = {"TOKENHUB_KEY": KEY} | ({"TOKENHUB_URL": gateway.url} if gateway else {}) | environment
        env = clean_environment() | {name: value for name, value in ours.items() if value}
        if CAN_FORK and not self.fresh:
            process = await Forked.start(
                folder=str(self.folder), arguments=arguments, environment=env, die_at_byte=die_at_byte
            )
            self.started.append(process)
            return process
        assert die_at_byte is None, "a fresh interpreter gets no limit"
        return await asyncio.create_subprocess_exec(
            sys.executable, "classify.py", *arguments, cwd=self.folder, env=env,
            stdin=asyncio.subprocess.DEVNULL, stdout=asyncio.subprocess.PIPE, stderr=asyncio.subprocess.PIPE,
        )  # fmt: skip

    async def collect(self, process: "asyncio.subprocess.Process | Forked", within_s: float = 60) -> Done:
        """What the program left behind; status None where it took too long and had to be killed."""
        left = asyncio.ensure_future(process.communicate())
        in_time, _ = await asyncio.wait([left], timeout=within_s)
        if not in_time:
            process.kill()
        out, err = await left
        return Done(process.returncode if in_time else None, out.decode(), err.decode(), self.output)

    async def finish(self, process: "asyncio.subprocess.Process | Forked", within_s: float = 60) -> Done:
        """Waits for the program; no run, however bad its luck, may hang, end in a traceback or show its key."""
        done = await self.collect(process, within_s)
        assert done.status is not None, f"the program was still at it after {within_s} s"
        assert "Traceback" not in done.stderr, done.stderr
        assert KEY not in done.stdout + done.stderr
        return done

    async def run(self, gateway: Gateway | None, *arguments: str, within_s: float = 60, **more: object) -> Done:
        """Runs the program to its end; `more` is for `start`."""
        return await self.finish(await self.start(gateway, *arguments, **more), within_s)


@pytest.fixture
def desk(tmp_path: Path) -> Iterator[Desk]:
    desk = Desk(tmp_path)
    yield desk
    for process in desk.started:
        process.kill()  # where a test failed before it could wait for it


def numbered(count: int, about: str = "my invoice is wrong") -> dict[str, str]:
    """So many tickets, no two alike."""
    return {f"t{n}": f"Hello, {about}, see number {n}. Thanks!" for n in range(count)}
