"""A computer for runs of classify.py in this process: a clock that jumps, calls that fail, a plug.

    machine = Machine(folder, server)
    machine.fails_at(7, "EIO")                  # the 7th call to a file or the database
    done = machine.run(["--rpm", "0"])          # the real main(), against the server

No thread, no socket and no wall clock is used: what happens follows from the arguments alone.
Only `new_session` is replaced, so that the program's own `post` reads what the server sends.
"""

import asyncio
import contextlib
import email.utils
import errno
import io
import math
import os
import selectors
import shutil
import signal
import sqlite3
import sys
import time
from collections.abc import Callable
from contextlib import ExitStack
from pathlib import Path
from types import SimpleNamespace
from unittest import mock

import classify
from tests.conftest import Done

EPOCH = 1_800_000_000  # when the clock begins: 2027-01-15 08:00 UTC
KEY = "sk-simulated-0123456789abcdef"


class Killed(KeyboardInterrupt):
    """The process ends here. The event loop lets a KeyboardInterrupt through at once."""


# ---- time ----


class Clock:
    """Virtual time; it goes on from run to run."""

    now = 0.0

    def date(self, later_s: float = 0.0) -> str:
        """As HTTP writes it."""
        return email.utils.formatdate(EPOCH + self.now + later_s, usegmt=True)


class VirtualTime(selectors.SelectSelector):
    """Moves the clock to the next timer instead of waiting for it."""

    def __init__(self, machine: "Machine"):
        super().__init__()
        self.machine = machine

    def select(self, timeout: float | None = None) -> list:
        self.machine.wait(timeout)
        return []


class VirtualLoop(asyncio.SelectorEventLoop):
    def __init__(self, machine: "Machine"):
        self.machine = machine
        super().__init__(VirtualTime(machine))

    def time(self) -> float:
        return self.machine.clock.now


# ---- calls that fail ----

FAILURES = {  # name: of a file, and of the database
    "ENOSPC": (errno.ENOSPC, "SQLITE_FULL", "database or disk is full"),
    "EIO": (errno.EIO, "SQLITE_IOERR", "disk I/O error"),
    "EACCES": (errno.EACCES, "SQLITE_READONLY", "attempt to write a readonly database"),
    "locked": (errno.EACCES, "SQLITE_BUSY", "database is locked"),
}


def failure(kind: str, name: str, path: object) -> Exception:
    """What a call raises that fails so."""
    number, errorname, message = FAILURES[kind]
    if name.startswith("sql"):
        error = sqlite3.OperationalError(message)
        error.sqlite_errorname = errorname
        return error
    return OSError(number, os.strerror(number), *([str(path)] if path is not None else []))


class CountedFile(io.FileIO):
    """A file whose reads and writes are calls of the machine."""

    def __init__(self, machine: "Machine", path: object, mode: str):
        self.machine = machine
        self.path = path
        machine.call("open", path)
        super().__init__(path, mode)

    def readinto(self, buffer: object) -> int:
        self.machine.call("read", None)
        return super().readinto(buffer)

    def write(self, data: bytes) -> int:
        self.machine.call("write", None)
        return super().write(data)


class CountedConnection(sqlite3.Connection):
    """A connection whose statements are calls of the machine."""

    machine: "Machine"

    def execute(self, *given: object) -> sqlite3.Cursor:
        is_answer = given[0].startswith("INSERT INTO requests")
        try:
            self.machine.call("sql", given[0])
            cursor = super().execute(*given)
        finally:
            if is_answer:
                self.machine.server.is_booked(sys.exc_info()[0] is None)
        if given[0] == "PRAGMA journal_mode = DELETE":
            # SQLite has brought all to the disk.
            self.machine.remember()
        return cursor

    def executemany(self, *given: object) -> sqlite3.Cursor:
        self.machine.call("sql many", given[0])
        return super().executemany(*given)

    def executescript(self, script: str) -> sqlite3.Cursor:
        self.machine.call("sql script", script)
        return super().executescript(script)

    def __exit__(self, *error: object) -> bool:
        self.machine.call("sql commit", None)
        return super().__exit__(*error)


# ---- the machine ----


class Machine:
    """Runs the program in a folder; counts its calls and its waits, and fails or dies at one."""

    def __init__(self, folder: Path, server: object, clock: Clock | None = None):
        self.folder = folder
        self.server = server
        self.clock = clock or Clock()
        self.new_run()

    def new_run(self):
        """Forgets the faults and the counts of the last one."""
        self.calls = 0
        self.calls_in_loop = math.inf  # known once it has ended
        self.waits = 0
        self.is_dead = False
        self.heir: Path | None = None
        self.connections: list[sqlite3.Connection] = []
        self.is_paused = False  # the harness itself is at the files
        self.stuck = ""
        self.on_call: Callable[[int, str, object], None] = lambda number, name, path: None
        self.on_wait: Callable[[int], None] = lambda number: None
        self.at_s: list[tuple[float, Callable[[], None]]] = []  # seconds after the loop's start
        self.page_limit: int | None = None  # of the database: pages that it may yet grow by
        self.fsync_s = 0.0
        self.is_power_watched = False
        self.on_disk: dict[str, bytes] = {}  # the ledger as a power cut would leave it
        self.synced_at = self.clock.now
        self.handlers: dict[int, Callable] = {}
        self.began_at = self.clock.now
        self.limit_s = 4 * 3600.0

    def fails_at(self, number: int, kind: str, for_ever: bool = False):
        """Lets one call fail, or that and all that follow."""

        def on_call(call: int, name: str, path: object):
            if call == number or (for_ever and call > number):
                raise failure(kind, name, path)

        self.on_call = on_call

    def dies_at(self, number: int, by_power: bool = False):
        """Kills the run at a call; its files go on in another folder."""
        self.is_power_watched = by_power

        def on_call(call: int, name: str, path: object):
            if call == number:
                self.die(by_power)

        self.on_call = on_call

    def call(self, name: str, path: object):
        """Is told of each call before it is made."""
        if self.is_paused:
            return
        if self.is_dead:
            raise Killed
        self.calls += 1
        self.on_call(self.calls, name, path)

    def wait(self, timeout: float | None):
        """Is told of each wait of the loop, which is each await of the program that is one."""
        if not self.is_dead:
            self.waits += 1
            self.on_wait(self.waits)
        self.clock.now += max(timeout or 0, 0)
        if timeout is None:
            self.stuck = "everybody waits for ever"
        elif self.clock.now - self.began_at > self.limit_s and not self.is_dead:
            self.stuck = f"no end after {self.limit_s:.0f} s"
        if self.stuck:
            self.is_dead = True
            raise Killed

    def die(self, by_power: bool = False):
        """Takes the files as they are to another folder, and ends the run."""
        self.is_paused = True
        heir = self.heir = self.folder.with_name(f"{int(self.folder.name) + 1}")
        shutil.copytree(self.folder, heir)
        if by_power:
            for name in ("labels.db", "labels.db-wal"):
                (heir / name).unlink(missing_ok=True)
            for name, content in self.on_disk.items():
                (heir / name).write_bytes(content)
        self.is_paused = False
        self.is_dead = True
        self.server.client_dies(by_power)
        raise Killed

    def remember(self):
        """What stands in the ledger now would survive a power cut."""
        self.synced_at = self.clock.now
        self.server.is_synced()
        if self.is_power_watched:
            self.is_paused = True
            self.on_disk = {}
            for name in ("labels.db", "labels.db-wal"):
                with contextlib.suppress(FileNotFoundError):
                    self.on_disk[name] = (self.folder / name).read_bytes()
            self.is_paused = False

    # ---- what the program gets instead of the real thing ----

    def open(self, path: object, mode: str = "r", **given: object) -> object:
        """As the built-in one."""
        kind = mode.replace("b", "").replace("t", "")
        raw = CountedFile(self, path, kind)
        is_read = kind == "r"
        buffered = (io.BufferedReader if is_read else io.BufferedWriter)(raw)
        if "b" in mode:
            return buffered
        return io.TextIOWrapper(buffered, **given)

    def connect(self, path: object, **given: object) -> sqlite3.Connection:
        self.call("sql connect", path)
        factory = type("Connection", (CountedConnection,), {"machine": self})
        db = REAL_CONNECT(path, factory=factory, **given)
        self.connections.append(db)
        if self.page_limit is not None:
            [pages] = sqlite3.Connection.execute(db, "PRAGMA page_count").fetchone()
            limit = f"PRAGMA max_page_count = {pages + self.page_limit}"
            sqlite3.Connection.execute(db, limit)
        return db

    async def to_thread(self, function: Callable, *given: object) -> object:
        """Without a thread: the work takes a while, and is done amid it."""
        await asyncio.sleep(self.fsync_s / 2)
        result = function(*given)
        await asyncio.sleep(self.fsync_s / 2)
        return result

    def run_loop(self, coroutine: object) -> object:
        """As asyncio.run."""
        with asyncio.Runner(loop_factory=lambda: VirtualLoop(self)) as runner:
            loop = runner.get_loop()
            loop.set_exception_handler(self.hear_loop)
            for seconds, event in self.at_s:
                loop.call_later(seconds, event)
            try:
                return runner.run(coroutine)
            finally:
                self.calls_in_loop = self.calls

    def hear_loop(self, loop: asyncio.AbstractEventLoop, context: dict):
        """What the loop cannot tell anybody; of a dead process it is nothing."""
        if not self.is_dead and not loop.is_closed():
            self.stuck = self.stuck or f"the loop says: {context}"

    def send_signal(self, number: int):
        """As a terminal or an operator does, if the program listens."""
        if handler := self.handlers.get(number):
            handler(number, None)

    def counted(self, name: str, real: Callable) -> Callable:
        """A function of `os` that is a call, where it is about our folder."""
        root = str(self.folder)

        def call(path: object, *given: object, **named: object) -> object:
            if isinstance(path, int) or str(path).startswith(root):
                self.call(name, None if isinstance(path, int) else path)
            return real(path, *given, **named)

        return call

    def fsync(self, number: int):
        self.call("fsync", None)
        self.remember()

    def patches(self) -> ExitStack:
        """Puts all this in the place of the real thing."""
        stack = ExitStack()

        def put(where: object, **what: object):
            stack.enter_context(mock.patch.multiple(where, **what))

        functions = {name: self.counted(name, real) for name, real in REAL.items()}
        put(os, fsync=self.fsync, _exit=self.end_at_once, **functions)
        put(asyncio, run=self.run_loop, to_thread=self.to_thread)
        put(sqlite3, connect=self.connect)
        put(signal, signal=lambda number, handler: self.handlers.__setitem__(number, handler))
        clock = SimpleNamespace(
            monotonic=lambda: self.clock.now,
            gmtime=lambda: time.gmtime(EPOCH + self.clock.now),
            strftime=lambda form, at=None: time.strftime(form, at or time.gmtime(EPOCH + self.clock.now)),
        )
        stack.enter_context(mock.patch.object(classify, "open", self.open, create=True))
        put(
            classify,
            time=clock,
            formatdate=lambda usegmt: self.clock.date(),
            new_session=lambda job: self.server.session(job),
        )
        return stack

    def end_at_once(self, status: int):
        """As os._exit after a second Ctrl-C."""
        self.die()

    def run(self, arguments: list[str]) -> Done:
        """One run of main(), whatever becomes of it."""
        out, err = (io.TextIOWrapper(io.BytesIO(), encoding="utf-8") for _ in range(2))
        environment = {"TOKENHUB_URL": "http://localhost/v1", "TOKENHUB_KEY": KEY}
        self.began_at = self.clock.now
        status, raised = None, ""
        with ExitStack() as stack:
            stack.enter_context(mock.patch.dict(os.environ, environment))
            stack.enter_context(mock.patch.object(sys, "argv", ["classify.py", *arguments]))
            stack.enter_context(contextlib.redirect_stdout(out))
            stack.enter_context(contextlib.redirect_stderr(err))
            stack.enter_context(self.patches())
            self.remember()
            try:
                status = classify.main()
            except Killed:
                pass
            except BaseException as error:
                raised = told(error)
        if self.is_dead:
            status = None
        # The process is over, and its locks.
        for db in self.connections:
            db.close()
        # A new process would see the files as the dead one left them.
        self.folder = self.heir or self.folder
        texts = []
        for stream in (out, err):
            stream.flush()
            texts.append(stream.buffer.getvalue().decode())
        return Done(status, *texts, self.folder / "labels.jsonl", raised or self.stuck)


def told(error: BaseException) -> str:
    """An exception with the lines of the program that it came through."""
    if isinstance(error, BaseExceptionGroup):
        return "; ".join(map(told, error.exceptions))
    trace, lines = error.__traceback__, []
    while trace:
        code = trace.tb_frame.f_code
        if code.co_filename.endswith("classify.py"):
            lines.append(f"{code.co_name}:{trace.tb_lineno}")
        trace = trace.tb_next
    return f"{type(error).__name__}: {error} in {' > '.join(lines)}"


REAL = {name: getattr(os, name) for name in ("open", "stat", "unlink", "replace", "chmod", "close")}
REAL_CONNECT = sqlite3.connect
