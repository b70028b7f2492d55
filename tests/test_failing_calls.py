"""Every call to the file system and the database fails: the 1st, the 2nd, ... until a run has no more.

`python -m tests.test_failing_calls` tries all of them, with each error, once and for ever, and with a
kill and a power cut in their place; the tests try some. A call that fails leads to one line that says
what and where, nothing is lost but what was in flight, and the next run completes.
"""

import sys
import tempfile
from collections.abc import Callable, Iterator
from concurrent.futures import ProcessPoolExecutor
from functools import cache
from itertools import count
from pathlib import Path

import pytest

from tests.machine import FAILURES
from tests.simulate import MEMORY, Fault, Night, World

TICKETS = {
    "t1": "It does not work",
    "t2": "Please refund me",
    "t3": "poison off list: asked once more",
    "t4": "",
    "t5": "It does not work",
    "t6": "poison no usage: estimated",
    "t7": "=cmd",
}


class SmallNight(Night):
    """A few tickets, and a server that does nothing odd but with some of them."""

    def draw_world(self) -> World:
        return World(told_rpm=0, concurrency=2)

    def draw_tickets(self) -> dict[str, str]:
        return TICKETS


def a_first_run(night: Night):
    """Nothing is there."""


def a_run_continued(night: Night):
    """Some tickets have their label, and the output is there."""
    night.tickets = {id_: TICKETS[id_] for id_ in ("t1", "t2", "t4")}
    night.machine.new_run()
    night.run()
    night.tickets = TICKETS


def a_run_after_a_kill(night: Night):
    """The ledger has a -wal."""
    night.machine.new_run()
    night.machine.on_wait = lambda number: number == 12 and night.machine.die()
    night.run()


def an_edited_output(night: Night):
    """The labels go beside it."""
    a_run_continued(night)
    night.edit("changed")


def a_model_that_names_nothing(night: Night):
    """Its replies are disregarded."""
    night.tickets = {f"t{n}": f"poison never on the list: {n}" for n in range(1, 23)}


SCENES: list[Callable[[Night], None]] = [
    a_first_run,
    a_run_continued,
    a_run_after_a_kill,
    an_edited_output,
    a_model_that_names_nothing,
]
WHAT = ("No space", "Input/output", "Permission denied", "is full", "I/O error", "readonly", "locked")
WHAT += ("in use by another run",)
WHERE = ("labels.", "tickets.csv", " in /", "'/")


@cache
def usual_status(scene: Callable[[Night], None]) -> int:
    """The exit status where no call fails."""
    with tempfile.TemporaryDirectory(dir=MEMORY) as folder:
        return started(scene, Path(folder)).run().status


def started(scene: Callable[[Night], None], folder: Path) -> Night:
    """A night as it is before the run in question."""
    night = SmallNight(0, folder)
    night.suffix = ".csv" if scene is a_run_continued else ".jsonl"
    scene(night)
    night.server.faults = [Fault("503, 1 s", share=0.2)]
    night.machine.new_run()
    return night


def tried(scene: Callable[[Night], None], number: int, how: str) -> tuple[bool, list[str]]:
    """One failing call: whether the run came so far, and which promises were broken."""
    with tempfile.TemporaryDirectory(dir=MEMORY) as folder:
        night = started(scene, Path(folder))
        machine = night.machine
        names = []
        if how in ("kill", "power"):
            machine.dies_at(number, by_power=how == "power")
        else:
            kind, _, for_ever = how.partition(" ")
            machine.fails_at(number, kind, for_ever=bool(for_ever))
        fail = machine.on_call

        def on_call(call: int, name: str, path: object):
            if call == number:
                names.append(f"{name} {path if name != 'sql script' else ''}"[:80])
            fail(call, name, path)

        machine.on_call = on_call
        done = night.run()
        if machine.calls < number:
            return False, []
        if names[0].startswith("sql many"):
            # The verdict on a bad run itself could not be written.
            night.disregarded.clear()
        if not machine.is_dead:
            text = f"{done.stderr}\n{done.stdout}"
            lines = [line for line in text.splitlines() if any(word in line for word in WHAT)]
            if done.status != usual_status(scene) and not any(word in line for line in lines for word in WHERE):
                night.fail(f"exit {done.status} without what and where: {lines or text}")
            if done.status == 0 == usual_status(scene) and lines:
                night.fail(f"exit status 0, but {lines}")
            if len(lines) > 2:
                night.fail(f"said {len(lines)} times: {lines}")
        night.settle()
        return True, [f"{scene.__name__}, {number} ({names[0]}), {how}: {b}" for b in night.broken]


HOWS = [f"{kind}{ever}" for kind in FAILURES for ever in ("", " for ever")] + ["kill", "power"]


def all_of(scene: Callable[[Night], None], how: str, stride: int = 1) -> tuple[int, list[str]]:
    """How many calls were tried, and the broken promises."""
    broken = []
    for tries in count():
        was_reached, more = tried(scene, 1 + tries * stride, how)
        if not was_reached:
            return tries, broken
        broken += more


@pytest.mark.parametrize("scene", SCENES, ids=lambda scene: scene.__name__)
def test_whichever_call_fails_one_line_says_so_and_the_next_run_completes(scene):
    for how in HOWS:
        number, broken = all_of(scene, how, stride=23)
        assert number > 3
        assert broken == []


def jobs() -> Iterator[tuple[Callable[[Night], None], str]]:
    for scene in SCENES:
        for how in HOWS:
            yield scene, how


def main() -> int:
    calls, broken = 0, []
    with ProcessPoolExecutor() as pool:
        for number, more in pool.map(all_of, *zip(*jobs(), strict=True)):
            calls += number
            broken += more
            print(*more, sep="\n", end="\n" if more else "", flush=True)
    print(f"{calls:,} failing calls, {len(broken)} promises broken")
    return bool(broken)


if __name__ == "__main__":
    sys.exit(main())
