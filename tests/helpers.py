"""What several test files need beside the harness: waiting for a moment, a run in this process, bodies of requests."""

import asyncio
import contextlib
import fcntl
import io
import os
import pty
import re
import shutil
import signal
import socket
import struct
import sys
import tempfile
import termios
from collections.abc import Awaitable, Callable, Iterable
from dataclasses import dataclass
from pathlib import Path
from unittest import mock

import pytest

import classify
from tests.conftest import KEY, Desk, Done
from tests.forks import clean_environment
from tests.gateway import JSON, Call, Gateway, Script

QUICK = Script(rpm=0, latency_s=0.01, refusal_s=0.0)  # no limit, and hardly any waiting


def brisk(desk: Desk, **constants: object) -> None:
    """Edits the program so that its waits are short, and as the test wants it."""
    scaled = {"RPM": 60_000, "BACKOFF_S": 0.01, "BACKOFF_MAX_S": 0.05, "TIMEOUT": 20.0}
    desk.edit(**scaled | constants)


def summary(done: Done) -> list[str]:
    """The three fixed lines of the report."""
    return done.stdout.splitlines()[:3]


class Witness(Gateway):
    """A gateway that remembers the requests that it answered, not only the last one."""

    def __init__(self, script: Script = QUICK) -> None:
        super().__init__(script)
        self.bodies: list[dict] = []
        self.headers: list[dict[str, str]] = []

    def deliver(self, call: Call, answer: dict, mime: str = JSON) -> object:
        self.bodies.append(call.body)
        self.headers.append(dict(call.request.headers))
        return super().deliver(call, answer, mime)


async def until(happened: Callable[[], object], limit_s: float = 20.0) -> None:
    """Waits for a moment in the gateway's life."""
    async with asyncio.timeout(limit_s):
        while not happened():  # noqa: ASYNC110 - the gateway has no event for most of its moments
            await asyncio.sleep(0.005)


def run_here(desk: Desk, *arguments: str, **environment: str) -> Done:
    """Runs the program in this process, which is ten times faster, where it must send nothing; fails where it does."""
    out, err = (io.TextIOWrapper(io.BytesIO(), encoding="utf-8", newline="") for _ in range(2))
    ran = desk.audit.begins(desk.folder, None, arguments)
    ran.process = ran
    with socket.create_server(("127.0.0.1", 0)) as nobody, contextlib.ExitStack() as stack:
        nobody.setblocking(False)
        ours = {"TOKENHUB_URL": f"http://127.0.0.1:{nobody.getsockname()[1]}/v1", "TOKENHUB_KEY": KEY} | environment
        given = {name: value for name, value in ours.items() if value}
        stack.enter_context(mock.patch.dict(os.environ, clean_environment() | given, clear=True))
        stack.enter_context(mock.patch.object(sys, "argv", ["classify.py", *arguments]))
        stack.enter_context(mock.patch.multiple(classify, TIMEOUT=1.0, MAX_RETRIES=0, RPM=60_000))
        stack.enter_context(contextlib.chdir(desk.folder))
        stack.enter_context(contextlib.redirect_stdout(out))
        stack.enter_context(contextlib.redirect_stderr(err))
        for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):
            stack.callback(signal.signal, number, signal.getsignal(number))
        try:
            status = classify.main()
        except SystemExit as exit_:
            status = exit_.code
        with pytest.raises(BlockingIOError):
            nobody.accept()
    out.flush()
    err.flush()
    output = desk.output_of(arguments)
    done = Done(status, out.buffer.getvalue().decode(), err.buffer.getvalue().decode(), output)
    desk.audit.ends(ran, done)
    return done


# ---- A terminal ----------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Drawn:
    """What a terminal was sent, and how the run ended."""

    status: int
    text: str
    columns: int

    @property
    def frames(self) -> list[str]:
        """All that stood in a line at some time, in the order in which it was drawn."""
        return [frame.rstrip() for frame in re.split(r"[\r\n]+", self.text) if frame.strip()]

    @property
    def screen(self) -> list[str]:
        """The lines that the user sees in the end; what is wider than the terminal goes on in the next one."""
        lines, row, column = [[]], 0, 0
        for sign in re.findall(r"\x1b\[A|.", self.text, re.S):
            match sign:
                case "\r":
                    column = 0
                case "\x1b[A":
                    row -= 1
                case "\n":
                    row, column = row + 1, 0
                case _:
                    row, column = row + column // self.columns, column % self.columns
            lines += [[] for _ in range(row + 1 - len(lines))]
            if sign.isprintable():
                lines[row][column : column + 1] = sign
                column += 1
        return ["".join(line).rstrip() for line in lines]


async def on_terminal(
    desk: Desk,
    gateway: Gateway | None,
    *arguments: str,
    columns: int = 80,
    interrupt_at: str = "",
    **environment: str,
) -> Drawn:
    """Runs the program as somebody does who looks on; Ctrl-C once what is drawn matches `interrupt_at`."""
    ours, its = pty.openpty()
    fcntl.ioctl(its, termios.TIOCSWINSZ, struct.pack("4H", 24, columns, 0, 0))
    env = clean_environment() | {"TOKENHUB_KEY": KEY} | ({"TOKENHUB_URL": gateway.url} if gateway else {})
    ran = desk.audit.begins(desk.folder, gateway, arguments)
    ran.process = process = await asyncio.create_subprocess_exec(
        sys.executable, "classify.py", *arguments, cwd=desk.folder, env=env | environment,
        stdin=asyncio.subprocess.DEVNULL, stdout=its, stderr=its,
    )  # fmt: skip
    os.close(its)
    too_late = asyncio.get_running_loop().call_later(30, process.kill)
    text = await asyncio.to_thread(read_terminal, ours, process.pid, interrupt_at)
    status = await process.wait()
    too_late.cancel()
    assert "Traceback" not in text
    assert KEY not in text
    report = text[text.find("Classified ") :]
    desk.audit.ends(process, Done(status, report, "", desk.output_of(arguments)))
    return Drawn(status, text, columns)


def read_terminal(terminal: int, pid: int, interrupt_at: str) -> str:
    """All that is drawn until nobody draws any more; its newlines are plain ones."""
    drawn = b""
    # Linux ends a terminal that nobody has open any more with an error.
    with open(terminal, "rb", buffering=0) as file, contextlib.suppress(OSError):
        while piece := file.read(65_536):
            drawn += piece
            if interrupt_at and re.search(interrupt_at, drawn.decode(errors="replace")):
                os.kill(pid, signal.SIGINT)
                interrupt_at = ""
    return drawn.decode().replace("\r\n", "\n")


async def side_by_side(desk: Desk, cases: Iterable[tuple], one: Callable[..., Awaitable[None]]) -> None:
    """Runs each case on a desk of its own, which has the same program and tickets, as most of the time is waiting."""

    async def run(case: tuple) -> None:
        twin = Desk(Path(tempfile.mkdtemp(dir=desk.folder)))
        shutil.copy(desk.program, twin.program)
        shutil.copy(desk.tickets, twin.tickets)
        await one(twin, *case)
        assert not twin.audit.broken(), case

    await asyncio.gather(*map(run, cases))
