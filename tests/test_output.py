"""The output as a view of the ledger (R2): what stands in a line, and never over what somebody else wrote.

That each label is what a reply named, each id there once and in order, is checked after every test (tests/bill.py);
an output as CSV is a matter of test_spreadsheet.
"""

import json
import stat
import sys
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest

from tests.conftest import Desk, Done, numbered
from tests.gateway import Fault, Gateway, off_list
from tests.helpers import QUICK, brisk, summary, until

FIVE = numbered(5)


async def run(desk: Desk, script: object = QUICK, **constants: object) -> Done:
    """Runs the program with a gateway of its own."""
    brisk(desk, **constants)
    async with Gateway(script) as gateway:
        return await desk.run(gateway, within_s=30)


def ids(path: Path) -> list[str]:
    """Of the lines of a file like labels.jsonl."""
    return [json.loads(line)["id"] for line in path.read_bytes().splitlines()]


# ---- What stands in it


async def test_a_line_says_label_model_tokens_and_cost_and_nothing_that_does_not_apply(desk: Desk):
    desk.write({"a": "My invoice is wrong", "b": "odd", "c": "My invoice is wrong", "d": " -- "})
    faults = (Fault(off_list("hm", "It is OTHER."), matching="odd"),)
    done = await run(desk, script=replace(QUICK, tokens=(300, 2), cached_tokens=100, faults=faults))
    a, b, c, d = done.lines
    nothing = {"tokens_in": 0, "tokens_out": 0, "cost_usd": 0}
    digest = {row["id"]: row["digest"] for row in done.ledger}
    cost = (200 * 0.27 + 100 * 0.07 + 2 * 1.10) / 1e6
    assert a == {
        "id": "a", "label": "billing", "model": "deepseek-chat", "digest": digest["a"], "tokens_in": 300,
        "tokens_out": 2, "tokens_cached": 100, "cost_usd": pytest.approx(cost),
    }  # fmt: skip
    assert (b["label"], b["reply"]) == ("other", "It is OTHER.")
    assert (b["tokens_in"], b["cost_usd"]) == (600, pytest.approx(2 * cost)), "it was asked once more"
    assert c == {"id": "c"} | {key: a[key] for key in ("label", "model", "digest")} | nothing
    assert d == {"id": "d", "label": "other", "model": None} | nothing


# ---- An editor at it


def replaced(output: Path) -> None:
    """As most editors save: a file of their own, renamed."""
    copy = output.with_name("edited")
    copy.write_bytes(b"mine\n")
    copy.replace(output)


def corrected(output: Path) -> None:
    lines = output.read_bytes().splitlines(keepends=True) if output.exists() else []
    output.write_bytes(b"".join(lines).replace(b"billing", b"bug", 1) + b"\n")


def cut_short(output: Path) -> None:
    output.write_bytes(output.read_bytes()[:100] if output.exists() else b"")


# What the bill says of an output that is somebody else's.
OTHER_OUTPUT = pytest.mark.breaks(
    "output-whole", "csv-order", "label-true", "fallback-true", "answer-used", "report-true", "exit-true"
)
EDITS: dict[str, tuple[Callable[[Path], object], bool]] = {  # and whether there was an output before
    "replaced in the first run": (replaced, False),
    "replaced": (replaced, True),
    "corrected": (corrected, True),
    "cut short": (cut_short, True),
    "deleted": (lambda output: output.unlink(missing_ok=True), True),
}


@pytest.mark.parametrize(("edit", "is_there"), EDITS.values(), ids=EDITS)
@OTHER_OUTPUT
async def test_an_editor_at_the_output_at_any_moment_of_a_run_costs_nothing(
    desk: Desk, edit: Callable[[Path], object], is_there: bool
):
    tickets = numbered(60)
    if is_there:
        desk.write(numbered(10))
        await run(desk)
    desk.write(tickets)
    brisk(desk, CONCURRENCY=4)
    async with Gateway(replace(QUICK, latency_s=0.01)) as gateway:
        process = await desk.start(gateway)
        for moment in (10, 20, 30):
            await until(lambda moment=moment: gateway.answered >= moment)
            edit(desk.output)
        theirs = desk.output.read_bytes() if desk.output.exists() else None
        done = await desk.finish(process)
        newest = desk.folder / ("labels.new.jsonl" if theirs is not None else "labels.jsonl")
        assert (done.status, ids(newest)) == (0, list(tickets))
        assert theirs in (None, desk.output.read_bytes()), "what somebody wrote is as it was"
        said = "Labels: labels.new.jsonl (labels.jsonl was changed since it was written"
        assert (said in done.stdout) == (theirs is not None)
        asked = gateway.requests
        desk.output.unlink(missing_ok=True)
        again = await desk.run(gateway)
    assert (again.status, gateway.requests) == (0, asked)
    assert summary(again) == summary(done), "the budget forgets nothing"


@OTHER_OUTPUT
async def test_labels_corrected_by_hand_are_safe_and_so_is_a_corrected_new_file(desk: Desk):
    desk.write(FIVE)
    await run(desk)
    corrected(desk.output)
    mine = desk.output.read_bytes()
    new, part = desk.folder / "labels.new.jsonl", desk.folder / "labels.jsonl.part"
    for _ in range(2):  # and the second time it takes the place of the first
        done = await run(desk)
        assert (done.status, ids(new), desk.output.read_bytes()) == (0, list(FIVE), mine)
    corrected(new)
    mine_too = new.read_bytes()
    for _ in range(2):
        done = await run(desk)
        assert (done.status, ids(part)) == (1, list(FIVE))
        assert "Labels: labels.jsonl.part (labels.jsonl was changed since it was written" in done.stdout
        assert (desk.output.read_bytes(), new.read_bytes()) == (mine, mine_too)
    desk.output.unlink()
    done = await run(desk)
    assert (done.status, ids(desk.output), new.read_bytes()) == (0, list(FIVE), mine_too)


async def test_an_old_output_of_ours_that_was_put_back_is_ours(desk: Desk):
    desk.write(numbered(3))
    await run(desk)
    old = desk.output.read_bytes()
    desk.write(FIVE)
    await run(desk)
    desk.output.write_bytes(old)
    done = await run(desk)
    assert (done.status, ids(desk.output)) == (0, list(FIVE))


async def test_a_file_where_a_new_output_would_go_is_not_touched_where_none_is_needed(desk: Desk):
    theirs = desk.folder / "labels.new.jsonl"
    theirs.write_bytes(b"mine\n")
    desk.write(FIVE)
    done = await run(desk)
    assert (done.status, theirs.read_bytes()) == (0, b"mine\n")


# ---- What a run that came to nothing leaves


@pytest.mark.breaks("report-true", "label-true", "answer-used")
async def test_a_changed_prompt_and_a_run_without_an_answer_leave_the_output_as_it_was(desk: Desk):
    desk.write(FIVE | {"odd": "odd"})
    good = replace(QUICK, faults=(Fault(off_list("hm", "hm, hm"), matching="odd"),))
    await run(desk, script=good, LOGPROBS=True)
    before = desk.output.read_bytes()
    done = await run(desk, script=replace(QUICK, key="another"), LOGPROBS=True, SYSTEM_PROMPT="Sort it.", GRACE_S=0.1)
    assert done.status == 1
    assert "401" in done.stdout
    assert desk.output.read_bytes() == before
    done = await run(desk, LOGPROBS=True)
    assert (done.status, desk.output.read_bytes()) == (0, before)
    assert done.lines[0]["confidence"] > 0
    assert done.lines[5]["reply"] == "hm, hm"


async def test_a_final_write_that_fails_still_gives_the_report(desk: Desk):
    desk.write(FIVE)
    brisk(desk)
    desk.insert("def write_output(*_): raise OSError(28, 'No space left on device')")
    async with Gateway(QUICK) as gateway:
        done = await desk.run(gateway)
        assert (done.status, summary(done)[0], desk.output.exists()) == (1, "Classified 5 tickets", False)
        assert "NOT WRITTEN: labels.jsonl: [Errno 28] No space left on device. All answers are safe" in done.stdout
        brisk(desk)
        again = await desk.run(gateway)
    assert (again.status, gateway.requests) == (0, 5)


# ---- Where it is


async def test_a_symlink_at_the_output_is_kept_and_its_target_written_and_the_ledger_stands_beside_that(desk: Desk):
    target = desk.folder / "elsewhere" / "real.jsonl"
    target.parent.mkdir()
    desk.output.symlink_to(target)
    for tickets in (FIVE, FIVE | {"new": "Hello"}):
        desk.write(tickets)
        done = await run(desk)
        assert (done.status, ids(target)) == (0, list(tickets))
        assert desk.output.is_symlink()
        assert not target.is_symlink()
    assert {path.name for path in target.parent.iterdir()} == {"real.jsonl", "real.db"}


@pytest.mark.skipif(sys.platform == "win32", reason="permissions are Unix's")
async def test_permissions_are_kept(desk: Desk):
    desk.write(numbered(3))
    await run(desk)
    desk.output.chmod(0o640)
    desk.write(FIVE)
    await run(desk)
    assert stat.S_IMODE(desk.output.stat().st_mode) == 0o640


async def test_a_link_that_somebody_put_at_the_private_file_is_not_followed(desk: Desk):
    secret = desk.folder / "secret"
    secret.write_bytes(b"mine")
    (desk.folder / "labels.jsonl.part").symlink_to(secret)
    desk.write(FIVE)
    done = await run(desk)
    assert (done.status, secret.read_bytes(), ids(desk.output)) == (0, b"mine", list(FIVE))


# ---- On the disk


STEPS = """
import builtins
real_open, fsync, replace_ = builtins.open, os.fsync, os.replace
def log(*words): print(*words, file=real_open("steps", "a"))
def fsync_(fd): log("sync", os.path.basename(os.readlink(f"/proc/self/fd/{fd}"))); fsync(fd)
def replaced(a, b): log("replace", os.path.basename(a), os.path.basename(b)); replace_(a, b)
os.fsync, os.replace = fsync_, replaced
"""


@pytest.mark.skipif(sys.platform != "linux", reason="elsewhere an open file has no name")
async def test_the_new_output_and_its_hash_are_on_the_disk_before_it_takes_its_place(desk: Desk):
    desk.write(FIVE)
    brisk(desk)
    desk.insert(STEPS)
    async with Gateway(QUICK) as gateway:
        await desk.run(gateway)
    steps = (desk.folder / "steps").read_text().splitlines()
    last = ["sync labels.jsonl.part", "sync labels.db-wal", "replace labels.jsonl.part labels.jsonl"]
    assert [step for step in steps if step in last][-3:] == last
