"""The harness: the real program as its user runs it, against the real stand-in over a socket.

After each test that passed, the stand-in's bill is compared with what the program left (tests/bill.py). A test that
breaks one of those promises on purpose says which: @pytest.mark.breaks("answer-kept"), or desk.breaks("answer-kept").
"""

import argparse
import ast
import asyncio
import csv
import functools
import json
import os
import shutil
import sqlite3
import sys
import textwrap
from collections.abc import Generator, Iterable, Iterator, Mapping
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

import pytest

import classify
from tests.bill import PROMISES, Audit, csv_rows, ledger_rows, parse_arguments
from tests.forks import CAN_FORK, PROGRAM, Forked, clean_environment
from tests.gateway import Gateway

KEY = "sk-test-0123456789abcdef"
MEMORY = Path("/dev/shm")
MAIN = 'if __name__ == "__main__":\n'

Process = asyncio.subprocess.Process | Forked


@dataclass(frozen=True)
class Done:
    """What a run left behind; the files are read when they are asked for."""

    status: int | None  # None: it was killed
    stdout: str
    stderr: str
    output: Path
    error: str = ""  # what it raised in virtual time, which it never may

    @property
    def lines(self) -> list[dict]:
        """The lines of labels.jsonl, or the rows of labels.csv by the names of its columns."""
        if self.output.suffix == ".csv":
            return csv_rows(self.output)
        return [json.loads(line) for line in self.output.read_bytes().splitlines() if line.strip()]

    @property
    def labels(self) -> dict[str, str]:
        """Label by ticket id; fails the test where an id has two lines."""
        ids = [line["id"] for line in self.lines]
        assert len(ids) == len(set(ids)), "an id has two lines"
        label = "model_label" if self.output.suffix == ".csv" else "label"
        return {line["id"]: line[label] for line in self.lines}

    @property
    def ledger(self) -> list[dict]:
        """The rows of labels.db, a request each, also where a run is still at it or was killed."""
        return rows_of(self.output.resolve().with_suffix(".db"))


def rows_of(ledger: Path) -> list[dict]:
    """The rows of a ledger; none where there is none, or none yet."""
    if not ledger.exists():
        return []
    try:
        return [vars(row) for row in ledger_rows(ledger)]
    except sqlite3.OperationalError as error:
        if "no such table" in str(error):  # killed before it had them
            return []
        raise


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
        self.output = folder / "labels.jsonl"  # of a run without -o
        self.tickets = folder / "tickets.csv"
        self.started: list[Process] = []
        self.audit = Audit()
        self.edit()

    @property
    def program(self) -> Path:
        """This desk's copy of classify.py."""
        return self.folder / "classify.py"

    @property
    def ledger(self) -> Path:
        """The database beside the output."""
        return self.output.resolve().with_suffix(".db")

    def edit(self, **constants: object) -> None:
        """Writes classify.py anew, with these constants in place of its own."""
        source = PROGRAM.read_text(encoding="utf-8")
        lines, places = source.splitlines(), settings_in(source)
        assert constants.keys() <= places.keys(), f"classify.py has no setting {sorted(constants.keys() - places)}"
        for name, value in constants.items():
            first, last = places[name]
            lines[first - 1 : last] = [f"{name} = {value!r}", *[""] * (last - first)]
        self.program.write_text("\n".join(lines) + "\n", encoding="utf-8")

    def insert(self, code: str) -> None:
        """Lets this copy of classify.py do something more before it begins; `edit` takes it out again."""
        source = self.program.read_text(encoding="utf-8")
        assert source.count(MAIN) == 1
        # Below that line, as the audit executes what stands above it in this process.
        more = MAIN + textwrap.indent(code.strip("\n"), "    ") + "\n"
        self.program.write_text(source.replace(MAIN, more), encoding="utf-8")

    def write(
        self, tickets: Mapping[str, str] | Iterable[tuple[str, ...]], header: tuple[str, ...] = ("id", "body")
    ) -> None:
        """Writes tickets.csv: id to body, or whole rows."""
        rows = tickets.items() if isinstance(tickets, Mapping) else tickets
        with open(self.tickets, "w", newline="", encoding="utf-8") as file:
            writer = csv.writer(file)
            writer.writerow(header)
            writer.writerows(rows)

    def breaks(self, *promises: str) -> None:
        """Says that this test breaks promises of tests/bill.py on purpose."""
        assert set(promises) <= PROMISES.keys(), f"the promises are: {', '.join(PROMISES)}"
        self.audit.except_for |= set(promises)

    def loses(self, answers: int) -> None:
        """Says that so many answers may be lost beside those that a kill loses, such as by a full disk."""
        self.audit.lost += answers

    async def start(
        self,
        gateway: Gateway | None,
        *arguments: str,
        die_at_byte: int | None = None,
        full_at_byte: int | None = None,
        **environment: str,
    ) -> Process:
        """Starts the program in its folder; an empty environment value removes the variable.

        A file that grows to `die_at_byte` kills it in the middle of its write; at `full_at_byte` the write fails.
        """
        ours = {"TOKENHUB_KEY": KEY} | ({"TOKENHUB_URL": gateway.url} if gateway else {}) | environment
        env = clean_environment() | {name: value for name, value in ours.items() if value}
        ran = self.audit.begins(self.folder, gateway, arguments)
        if CAN_FORK and not self.fresh:
            ran.process = await Forked.start(
                folder=str(self.folder),
                arguments=arguments,
                environment=env,
                die_at_byte=die_at_byte,
                full_at_byte=full_at_byte,
            )
            self.started.append(ran.process)
        else:
            assert die_at_byte is full_at_byte is None, "a fresh interpreter gets no limit"
            ran.process = await asyncio.create_subprocess_exec(
                sys.executable, "classify.py", *arguments, cwd=self.folder, env=env,
                stdin=asyncio.subprocess.DEVNULL, stdout=asyncio.subprocess.PIPE, stderr=asyncio.subprocess.PIPE,
            )  # fmt: skip
        ran.process.output = self.output_of(arguments)
        return ran.process

    def output_of(self, arguments: Iterable[str]) -> Path:
        """Where a run with these arguments writes its labels."""
        with suppress(argparse.ArgumentError):
            if {"-o", "--output"}.intersection(arguments):
                return self.folder / parse_arguments(arguments).output
        return self.output

    async def collect(self, process: Process, within_s: float = 60) -> Done:
        """What the program left behind; status None where it took too long and had to be killed."""
        left = asyncio.ensure_future(process.communicate())
        in_time, _ = await asyncio.wait([left], timeout=within_s)
        if not in_time:
            process.kill()
        out, err = await left
        status = process.returncode if in_time else None
        done = Done(status, out.decode(), err.decode(), process.output)
        self.audit.ends(process, done)
        return done

    async def finish(self, process: Process, within_s: float = 60) -> Done:
        """Waits for the program; no run, however bad its luck, may hang, end in a traceback or show its key."""
        done = await self.collect(process, within_s)
        assert done.status is not None, f"the program was still at it after {within_s} s"
        assert "Traceback" not in done.stderr, done.stderr
        assert KEY not in done.stdout + done.stderr
        return done

    async def run(self, gateway: Gateway | None, *arguments: str, within_s: float = 60, **more: object) -> Done:
        """Runs the program to its end; `more` is for `start`."""
        return await self.finish(await self.start(gateway, *arguments, **more), within_s)

    def end(self) -> None:
        """Ends what a test did not wait for."""
        for process in self.started:
            process.kill()


def forget_settings() -> None:
    """Forgets what the program has made of its settings, as a process of its own would not know it."""
    for made in vars(classify).values():
        if hasattr(made, "cache_clear"):
            made.cache_clear()


@pytest.fixture(autouse=True)
def fresh_caches() -> Iterator[None]:
    """A test that changes settings in this process leaves nothing that was made of them to the next."""
    yield
    forget_settings()


@pytest.fixture
def desk(tmp_path: Path, request: pytest.FixtureRequest) -> Iterator[Desk]:
    desk = Desk(tmp_path)
    for mark in request.node.iter_markers("breaks"):
        desk.breaks(*mark.args)
    yield desk
    desk.end()


def pytest_configure(config: pytest.Config) -> None:
    # A run of the program syncs eight files, which takes a third of its time on a disk and none in memory.
    if MEMORY.is_dir() and os.access(MEMORY, os.W_OK) and shutil.disk_usage(MEMORY).free > 2**31:
        os.environ.setdefault("PYTEST_DEBUG_TEMPROOT", str(MEMORY))
    config.addinivalue_line("markers", "breaks(*promises): promises of tests/bill.py that a test breaks on purpose")


@pytest.hookimpl(wrapper=True)
def pytest_pyfunc_call(pyfuncitem: pytest.Function) -> Generator[None, object, object]:
    """Checks the bill as the last thing that a test does, when its gateways are closed."""
    result = yield
    desk = pyfuncitem.funcargs.get("desk")
    if isinstance(desk, Desk):
        desk.end()
        if broken := desk.audit.broken():
            pytest.fail("broken promises:\n" + "\n".join(broken), pytrace=False)
    return result


def numbered(count: int, about: str = "my invoice is wrong") -> dict[str, str]:
    """So many tickets, no two alike."""
    return {f"t{n}": f"Hello, {about}, see number {n}. Thanks!" for n in range(count)}
