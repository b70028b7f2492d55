"""The harness: the real program as its user runs it, against the real stand-in over a socket."""

import ast
import asyncio
import csv
import json
import os
import sys
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path

import pytest

from tests.gateway import Gateway

PROGRAM = Path(__file__).parent.parent / "classify.py"
KEY = "sk-test-0123456789abcdef"


@dataclass(frozen=True)
class Done:
    """What a run left behind."""

    status: int
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


class Desk:
    """A folder with a copy of classify.py, its constants edited as a user would, and a tickets.csv."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.output = folder / "labels.jsonl"
        self.tickets = folder / "tickets.csv"
        self.edit()

    def edit(self, **constants: object) -> None:
        """Writes classify.py anew, with these constants in place of its own."""
        source = PROGRAM.read_text(encoding="utf-8")
        lines = source.splitlines()
        for node in ast.parse(source).body:
            target = node.targets[0] if isinstance(node, ast.Assign) else None
            if isinstance(target, ast.Name) and target.id in constants:
                lines[node.lineno - 1] = f"{target.id} = {constants.pop(target.id)!r}"
                lines[node.lineno : node.end_lineno] = [""] * (node.end_lineno - node.lineno)
        assert not constants, f"classify.py has no setting {sorted(constants)}"
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

    async def start(self, gateway: Gateway | None, *arguments: str, **environment: str) -> asyncio.subprocess.Process:
        """Starts the program in its folder; an empty environment value removes the variable."""
        clean = {
            k: v for k, v in os.environ.items() if not k.upper().endswith("_PROXY") and not k.startswith("TOKENHUB")
        }
        ours = {"TOKENHUB_KEY": KEY} | ({"TOKENHUB_URL": gateway.url} if gateway else {}) | environment
        return await asyncio.create_subprocess_exec(
            sys.executable, "classify.py", *arguments, cwd=self.folder,
            env=clean | {name: value for name, value in ours.items() if value},
            stdin=asyncio.subprocess.DEVNULL, stdout=asyncio.subprocess.PIPE, stderr=asyncio.subprocess.PIPE,
        )  # fmt: skip

    async def finish(self, process: asyncio.subprocess.Process) -> Done:
        """Waits for the program; no run, however bad its luck, may end in a traceback or show its key."""
        out, err = await asyncio.wait_for(process.communicate(), 60)
        done = Done(process.returncode, out.decode(), err.decode(), self.output)
        assert "Traceback" not in done.stderr, done.stderr
        assert KEY not in done.stdout + done.stderr
        return done

    async def run(self, gateway: Gateway | None, *arguments: str, **environment: str) -> Done:
        """Runs the program to its end."""
        return await self.finish(await self.start(gateway, *arguments, **environment))


@pytest.fixture
def desk(tmp_path: Path) -> Desk:
    return Desk(tmp_path)


def numbered(count: int, about: str = "my invoice is wrong") -> dict[str, str]:
    """So many tickets, no two alike."""
    return {f"t{n}": f"Hello, {about}, see number {n}. Thanks!" for n in range(count)}
