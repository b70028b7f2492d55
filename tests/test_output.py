"""The output as a view of the ledger (R2): whole, in the order of the CSV, and never over what somebody else wrote.

That each label is what a reply named, each id there once and in order, is checked after every test (tests/bill.py).
"""

import csv
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


async def run(desk: Desk, *arguments: str, script: object = QUICK, **constants: object) -> Done:
    """Runs the program with a gateway of its own."""
    brisk(desk, **constants)
    async with Gateway(script) as gateway:
        return await desk.run(gateway, *arguments, within_s=30)


def beside(desk: Desk) -> set[str]:
    """What stands beside the program and its tickets."""
    return {path.name for path in desk.folder.iterdir()} - {"classify.py", "tickets.csv"}


def ids(path: Path) -> list[str]:
    """Of the lines of a file like labels.jsonl."""
    return [json.loads(line)["id"] for line in path.read_bytes().splitlines()]


def table_of(path: Path, delimiter: str = ",") -> list[list[str]]:
    """The cells of a CSV as they are."""
    with open(path, encoding="utf-8-sig", newline="") as file:
        return list(csv.reader(file, delimiter=delimiter))


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


async def test_it_is_in_the_order_of_the_csv_whatever_the_order_of_the_answers(desk: Desk):
    tickets = numbered(40)
    for order in (tickets, dict(reversed(tickets.items()))):
        desk.write(order)
        done = await run(desk, script=replace(QUICK, latency_s=0.03, jitter=1.0), CONCURRENCY=20)
        assert [line["id"] for line in done.lines] == list(order)


async def test_texts_of_any_kind_come_through(desk: Desk):
    reply = 'Ticket "é 发票 🐞\u2028"\nLabel: billing'
    desk.write({'ä,\n"b"': "My invoice", "退款": "Refund"})
    for name in ("labels.jsonl", "labels.csv"):
        done = await run(desk, "-o", name, script=replace(QUICK, reply=lambda text: reply))
        assert done.labels == dict.fromkeys(['ä,\n"b"', "退款"], "billing")
        assert {line["reply"] for line in done.lines} == {reply}


# ---- As CSV


async def test_a_csv_has_the_columns_of_the_tickets_and_then_the_label(desk: Desk):
    header = ("id", "Betreff", "body", "label")
    rows = [("1", "a", "My invoice; wrong", "bug"), ("2", "b", "poison", ""), ("3", "=SUM(A1)", "hm", "x")]
    desk.write(rows, header)
    faults = (Fault("status_400", matching="poison"), Fault(off_list("dunno", "dunno\nreally"), matching="hm"))
    done = await run(desk, "-o", "labels.csv", script=replace(QUICK, faults=faults), LOGPROBS=True)
    assert done.status == 1
    raw = (desk.folder / "labels.csv").read_bytes()
    assert raw.startswith(b"\xef\xbb\xbfid,Betreff,body,label,model_label,confidence,reply\r\n")
    _, first, third = table_of(done.output)
    assert first[:5] == [*rows[0], "billing"]
    assert 0 < float(first[5]) < 1
    assert third == ["3", "'=SUM(A1)", "hm", "x", "other", "", "dunno\nreally"]
    assert beside(desk) == {"labels.csv", "labels.db"}


@pytest.mark.parametrize("start", ["=", "+", "-", "@", "\t", "=cmd|'/c calc'!A0"])
async def test_no_cell_is_a_formula_for_a_spreadsheet(desk: Desk, start: str):
    desk.write([(f"{start}1", f"{start} my invoice", f"{start}2")], ("id", "body", f"{start}more"))
    done = await run(desk, "-o", "labels.csv", script=replace(QUICK, reply=lambda text: f"{start} billing"))
    cells = [cell for row in table_of(done.output) for cell in row]
    assert not [cell for cell in cells if cell.startswith(("=", "+", "-", "@", "\t", "\r"))]
    assert {f"'{start}1", f"'{start} my invoice", f"'{start}2", f"'{start}more"} <= set(cells)


@pytest.mark.parametrize("delimiter", [";", "\t", "|"])
async def test_a_csv_keeps_the_delimiter_of_the_tickets_and_short_rows_fit_the_header(desk: Desk, delimiter: str):
    rows = [["id", "body", "more"], ["1", "My invoice, and more", "x"], ["2", "A bug"]]
    desk.tickets.write_text("\n".join(map(delimiter.join, rows)) + "\n")
    done = await run(desk, "-o", "labels.csv")
    table = [row[:4] for row in table_of(done.output, delimiter)]
    assert table == [["id", "body", "more", "model_label"], [*rows[1], "billing"], ["2", "A bug", "", "bug"]]


async def test_jsonl_and_csv_beside_each_other_have_one_ledger(desk: Desk):
    desk.write(FIVE)
    await run(desk)
    brisk(desk)
    async with Gateway(QUICK) as gateway:
        done = await desk.run(gateway, "-o", "labels.csv")
        again = await desk.run(gateway)
    assert (done.status, again.status, gateway.requests) == (0, 0, 0)
    assert done.labels == again.labels
    assert beside(desk) == {"labels.csv", "labels.jsonl", "labels.db"}


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
EDITS: dict[str, Callable[[Path], object]] = {
    "replaced": replaced,
    "corrected": corrected,
    "cut short": cut_short,
    "deleted": lambda output: output.unlink(missing_ok=True),
}


@pytest.mark.parametrize("is_there", [False, True], ids=["first run", "later run"])
@pytest.mark.parametrize("edit", EDITS.values(), ids=EDITS)
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
    assert (again.status, gateway.requests, list(again.labels)) == (0, asked, list(tickets))
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


@pytest.mark.parametrize("name", ["labels.new.jsonl", "labels.jsonl.tmp", "labels.jsonl~", ".labels.jsonl.swp"])
async def test_no_other_file_beside_the_output_is_touched_or_believed(desk: Desk, name: str):
    theirs = desk.folder / name
    theirs.write_bytes(b'{"id": "t1", "label": "bug"}\n')
    desk.write(FIVE)
    done = await run(desk)
    assert (done.status, done.labels) == (0, dict.fromkeys(FIVE, "billing"))
    assert theirs.read_bytes() == b'{"id": "t1", "label": "bug"}\n'
    assert beside(desk) == {"labels.jsonl", "labels.db", name}


async def test_an_output_that_was_there_before_the_ledger_is_refused_before_anything_is_sent(desk: Desk):
    desk.write(FIVE)
    desk.output.write_bytes(b"mine\n")
    brisk(desk)
    async with Gateway(QUICK) as gateway:
        for option in ((), ("--dry-run",)):
            done = await desk.run(gateway, *option)
            assert (done.status, done.stdout, gateway.requests) == (2, "", 0)
            assert "labels.jsonl is there, but was not written from labels.db: move it away" in done.stderr
    assert (desk.output.read_bytes(), beside(desk)) == (b"mine\n", {"labels.jsonl"})


# ---- What a run that came to nothing leaves


NO_ANSWER = {
    "a wrong key": (("--budget", "1"), replace(QUICK, key="another"), "401"),
    "no budget": (("--budget", "0.0000001"), QUICK, "budget"),
}


@pytest.mark.breaks("report-true", "label-true", "answer-used")
@pytest.mark.parametrize(("arguments", "script", "why"), NO_ANSWER.values(), ids=NO_ANSWER)
async def test_a_changed_prompt_and_a_run_without_an_answer_leave_the_output_as_it_was(
    desk: Desk, arguments: tuple[str, ...], script: object, why: str
):
    desk.write(FIVE | {"odd": "odd"})
    good = replace(QUICK, faults=(Fault(off_list("hm", "hm, hm"), matching="odd"),))
    await run(desk, script=good, LOGPROBS=True)
    before = desk.output.read_bytes()
    done = await run(desk, *arguments, script=script, LOGPROBS=True, SYSTEM_PROMPT="Sort it.", GRACE_S=0.1)
    assert done.status == 1
    assert why in done.stdout
    assert desk.output.read_bytes() == before
    done = await run(desk, LOGPROBS=True)
    assert (done.status, desk.output.read_bytes()) == (0, before)
    assert done.lines[0]["confidence"] > 0
    assert done.lines[5]["reply"] == "hm, hm"


async def test_a_run_that_is_stopped_writes_what_it_has(desk: Desk):
    desk.write(numbered(20))
    done = await run(desk, script=replace(QUICK, faults=(Fault("status_402", first=11),)), CONCURRENCY=1)
    assert (done.status, list(done.labels)) == (1, list(numbered(10)))


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
    assert (again.status, gateway.requests, len(again.labels)) == (0, 5, 5)


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


WHERE = {
    "no such folder": ("away/labels.jsonl", "there is no folder", "make it, or choose another -o"),
    "a folder": ("there.jsonl", "there.jsonl", "choose another -o"),
    "the tickets": ("tickets.csv", "is the CSV itself", "choose another"),
    "the tickets by another path": ("./x/../tickets.csv", "is the CSV itself", "choose another"),
    "a link to the tickets": ("link.csv", "is the CSV itself", "choose another"),
    "another ending": ("labels.txt", "-o must end in .jsonl or .csv", ""),
}


@pytest.mark.parametrize(("output", "why", "remedy"), WHERE.values(), ids=WHERE)
async def test_an_output_that_cannot_be_is_refused_in_one_line(desk: Desk, output: str, why: str, remedy: str):
    desk.write(FIVE)
    (desk.folder / "x").mkdir()
    (desk.folder / "there.jsonl").mkdir()
    (desk.folder / "link.csv").symlink_to(desk.tickets)
    before = desk.tickets.read_bytes()
    done = await run(desk, "-o", output)
    assert (done.status, done.stdout, desk.tickets.read_bytes()) == (2, "", before)
    assert done.stderr.count("\n") == 1
    assert why in done.stderr
    assert remedy in done.stderr


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
