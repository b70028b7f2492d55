"""labels.db as checkpoint (R1): what was asked and answered once is never paid for again, whatever happened since.

That nothing is lost, doubled or paid twice is checked after every test by its bill (tests/bill.py).
"""

import re
import sqlite3
from collections.abc import Callable
from contextlib import closing
from dataclasses import replace
from pathlib import Path

import pytest

from tests.conftest import Desk, Done, numbered
from tests.gateway import Fault, Gateway, ends, off_list
from tests.helpers import QUICK, brisk, run_here, until

FIVE = numbered(5)
QWEN = "qwen2.5-72b-instruct"


async def resume(desk: Desk, *arguments: str, script: object = QUICK) -> tuple[Done, list[str]]:
    """Runs the program, and tells which texts it sent."""
    async with Gateway(script) as gateway:
        done = await desk.run(gateway, *arguments, within_s=30)
    return done, sorted(gateway.billed)


@pytest.fixture
async def done_desk(desk: Desk) -> Desk:
    """A desk where FIVE have been labelled by an earlier run."""
    brisk(desk)
    desk.write(FIVE)
    done, _ = await resume(desk)
    assert done.status == 0
    return desk


# ---- Running again


async def test_each_request_is_a_row_that_says_what_was_asked_and_what_came_of_it(desk: Desk):
    brisk(desk, LOGPROBS=True)
    desk.write({"a": "My invoice is wrong", "b": "odd", "c": "poison"})
    faults = (Fault(off_list("hm"), matching="odd"), Fault("status_400", matching="poison"))
    done, _ = await resume(desk, script=replace(QUICK, faults=faults))
    assert done.status == 1
    rows = {(row["id"], row["kind"]): row for row in done.ledger}
    assert rows.keys() == {("a", "labelled"), ("b", "no label"), ("b", "labelled"), ("c", "rejected")}
    assert [rows[key]["label"] for key in rows] == [
        {"a": "billing", "b": "other", "c": None}[id_] if kind == "labelled" else None for id_, kind in rows
    ]
    assert rows["b", "no label"]["reply"] == "hm"
    assert rows["c", "rejected"]["error"].startswith("400 invalid_request")
    assert 0 < rows["a", "labelled"]["confidence"] < 1
    assert {row["model"] for row in done.ledger} == {"deepseek-chat"}
    assert len({row["digest"] for row in done.ledger}) == 3


# What changes, and which of FIVE are asked anew then.
CHANGES: dict[str, tuple[dict, dict, list[str]]] = {
    "a ticket": ({}, {"t3": "Now the app has a bug"}, ["Now the app has a bug"]),
    "a ticket equal to another": ({}, {"new": FIVE["t2"]}, []),
    "an id": ({}, {"t3": FIVE["t4"], "t4": FIVE["t3"]}, []),
    "the prompt": ({"SYSTEM_PROMPT": "Sort it."}, {}, sorted(FIVE.values())),
    "the body": ({"EXTRA_BODY": {"top_p": 0.5}}, {}, sorted(FIVE.values())),
    "the model": ({"MODEL": QWEN}, {}, sorted(FIVE.values())),
    "the limits": ({"RPM": 6000, "CONCURRENCY": 2, "BUDGET_USD": 7.5, "MAX_RETRIES": 1}, {}, []),
}


@pytest.mark.parametrize(("constants", "tickets", "sent"), CHANGES.values(), ids=CHANGES)
async def test_only_what_a_model_was_not_asked_yet_is_sent_and_a_change_back_costs_nothing(
    done_desk: Desk, constants: dict, tickets: dict, sent: list[str]
):
    before = done_desk.output.read_bytes()
    brisk(done_desk, **constants)
    done_desk.write(FIVE | tickets)
    done, was_sent = await resume(done_desk)
    assert (done.status, was_sent) == (0, sent)
    assert f"{len(sent)} to send" in done.stderr
    brisk(done_desk)
    done_desk.write(FIVE)
    done, was_sent = await resume(done_desk)
    assert (done.status, was_sent, done_desk.output.read_bytes()) == (0, [], before)
    assert "0 to send to deepseek-chat" in done.stderr


async def test_the_order_of_the_fields_of_the_body_does_not_matter(desk: Desk):
    brisk(desk, EXTRA_BODY={"top_p": 0.5, "thinking": {"type": "disabled", "level": 0}})
    desk.write(FIVE)
    await resume(desk)
    brisk(desk, EXTRA_BODY={"thinking": {"level": 0, "type": "disabled"}, "top_p": 0.5})
    assert (await resume(desk))[1] == []


async def test_a_ticket_that_left_the_csv_leaves_the_output_and_its_answer_stays_in_the_ledger(done_desk: Desk):
    done_desk.write({"t1": FIVE["t1"]})
    done, sent = await resume(done_desk)
    assert (sent, list(done.labels), len(done.ledger)) == ([], ["t1"], 5)
    assert "of it for tickets, texts, prompts or models that are not asked about now" in done.stdout
    done_desk.write(FIVE)
    done, sent = await resume(done_desk)
    assert (done.status, sent) == (0, [])


async def test_a_label_that_is_not_in_the_list_any_more_is_asked_anew(desk: Desk):
    desk.breaks("answer-kept", "row-true", "asked-once-more")  # which know the new labels only
    prompt = {"SYSTEM_PROMPT": "Sort it."}
    brisk(desk, **prompt)
    desk.write(FIVE | {"b": "The app has a bug"})
    await resume(desk)
    brisk(desk, LABELS={"invoices": "", "bug": "", "other": ""}, **prompt)
    done, sent = await resume(desk, script=replace(QUICK, reply=lambda text: "invoices"))
    assert (done.status, sent) == (0, sorted(FIVE.values()))
    assert done.labels == dict.fromkeys(FIVE, "invoices") | {"b": "bug"}


# ---- Equal tickets


async def test_equal_tickets_are_asked_once_of_each_model_and_the_copies_cost_nothing(desk: Desk):
    brisk(desk)
    desk.write({f"{copy}{n}": f"My invoice {n} is wrong" for copy in "abc" for n in range(4)})
    for arguments in ((), ("--model", QWEN)):
        async with Gateway(replace(QUICK, latency_s=0.05)) as gateway:
            done = await desk.run(gateway, *arguments)
        assert (done.status, gateway.requests) == (0, 4)
        assert sum(line["tokens_in"] for line in done.lines) == gateway.tokens_in
        assert sum(line["cost_usd"] == line["tokens_in"] == 0 for line in done.lines) == 8


# ---- What failed


async def test_what_failed_is_sent_again_and_last_what_failed_more_often_behind_it(desk: Desk):
    brisk(desk, CONCURRENCY=1)
    desk.write({"a": "poison", "b": "fine"})
    script = replace(QUICK, faults=(Fault("status_400", matching="poison"),))
    await resume(desk, script=script)
    desk.write({"a": "poison", "poison too": "other poison", "c": "new", "d": "newer"})
    async with Gateway(script) as gateway:
        await desk.run(gateway)
    desk.write({"a": "poison", "poison too": "other poison", "e": "newest"})
    async with Gateway(QUICK) as gateway_3:
        done = await desk.run(gateway_3)
    orders = [[item.text for item in served.bill] for served in (gateway, gateway_3)]
    assert orders == [["other poison", "new", "newer", "poison"], ["newest", "other poison", "poison"]]
    assert done.status == 0


@pytest.mark.breaks("asked-once-more")  # they are asked again, from the first question on
async def test_replies_that_name_nothing_and_stopped_the_run_are_asked_again_when_the_model_is_well(desk: Desk):
    tickets = numbered(100)
    brisk(desk, CONCURRENCY=1)
    desk.write(tickets)
    async with Gateway(replace(QUICK, faults=(Fault(ends("Rate limit exceeded"), last=60),))) as gateway:
        done = await desk.run(gateway)
        assert (done.status, gateway.requests) == (1, 40)
        assert "named a label for 0 of the last 20 tickets" in done.stdout
        for _ in range(3):
            done = await desk.run(gateway)
    assert done.labels == dict.fromkeys(tickets, "billing")


# ---- Files that are no ledger, or another run's


def of_another_program(*statements: str) -> Callable[[Path], None]:
    """Puts a database with these in the ledger's place."""

    def change(path: Path) -> None:
        path.unlink()
        with closing(sqlite3.connect(path)) as database, database:
            for statement in statements:
                database.execute(statement)

    return change


FOREIGN = "is another program's database: move it away, or choose another -o"
NO_LEDGER = "not a ledger of classify.py. Move it away, or choose another -o"
NO_LEDGERS: dict[str, tuple[Callable[[Path], object], str]] = {
    "without an owner": (of_another_program("CREATE TABLE requests (number)"), FOREIGN),
    "an application's": (of_another_program("CREATE TABLE a (b)", "PRAGMA application_id = 252006674"), FOREIGN),
    "text": (lambda path: path.write_text("id,label\n" * 200), NO_LEDGER),
    "short": (lambda path: path.write_bytes(b"id,label\n" * 8), NO_LEDGER),
    "torn": (lambda path: path.write_bytes(path.read_bytes()[:5000]), "Put back a copy, or move it away"),
    "a folder": (lambda path: (path.unlink(), path.mkdir()), "mend the folder's rights, or choose another -o"),
}


@pytest.mark.parametrize(("change", "said"), NO_LEDGERS.values(), ids=NO_LEDGERS)
async def test_what_is_no_ledger_is_refused_in_one_line_and_left_alone(
    done_desk: Desk, change: Callable[[Path], object], said: str
):
    done_desk.breaks("ledger-readable", "answer-kept", "cost-covered", "label-true", "report-true")
    change(done_desk.ledger)
    output = done_desk.output.read_bytes()
    there = done_desk.ledger.is_file() and done_desk.ledger.read_bytes()[100:]  # without SQLite's own header
    for option in ((), ("--dry-run",)):
        done, sent = await resume(done_desk, *option)
        assert (done.status, done.stdout, sent) == (2, "", [])
        [line] = done.stderr.splitlines()
        assert "labels.db" in line
        assert said in line
    assert done_desk.output.read_bytes() == output
    assert (done_desk.ledger.is_file() and done_desk.ledger.read_bytes()[100:]) == there


async def test_an_empty_file_is_a_new_ledger(desk: Desk):
    brisk(desk)
    desk.write(FIVE)
    desk.ledger.touch()
    assert (await resume(desk))[0].status == 0


async def test_to_begin_anew_one_deletes_the_ledger_and_an_output_without_one_is_refused(done_desk: Desk):
    done_desk.breaks("answered-once", "answer-kept", "cost-covered")
    done_desk.ledger.unlink()
    content = done_desk.output.read_bytes()
    done, sent = await resume(done_desk)
    assert (done.status, done.stdout, sent, done_desk.output.read_bytes()) == (2, "", [], content)
    assert "labels.jsonl is there, but was not written from labels.db" in done.stderr
    assert not done_desk.ledger.exists()
    done_desk.output.unlink()
    done, sent = await resume(done_desk)
    assert (done.status, len(sent), len(done.ledger)) == (0, 5, 5)


async def test_a_second_run_on_the_same_ledger_at_the_same_time_is_refused(desk: Desk):
    brisk(desk)
    desk.write(numbered(3))
    async with Gateway(replace(QUICK, latency_s=0.3)) as gateway:
        process = await desk.start(gateway)
        await until(lambda: gateway.in_flight == 3)
        others = [run_here(desk, *option) for option in ((), ("--dry-run",), ("-o", "labels.csv"))]
        first = await desk.finish(process)
    for other in others:
        assert (other.status, other.stdout) == (2, "")
        assert "in use by another run. Wait for it" in other.stderr
    assert (first.status, gateway.requests) == (0, 3)


async def test_one_plain_file_is_left_after_a_run_and_none_after_a_dry_one(desk: Desk):
    brisk(desk)
    desk.write(FIVE)
    assert (await resume(desk, "--dry-run"))[0].status == 0
    assert {path.name for path in desk.folder.iterdir()} == {"classify.py", "tickets.csv"}
    await resume(desk)
    names = {"classify.py", "tickets.csv", "labels.jsonl", "labels.db"}
    assert desk.ledger.read_bytes()[18:20] == b"\1\1", "no write-ahead log is needed to read it"
    assert {path.name for path in desk.folder.iterdir()} == names
    assert (await resume(desk, "--dry-run"))[0].status == 0
    assert {path.name for path in desk.folder.iterdir()} == names


async def test_the_csv_may_be_changed_or_deleted_while_the_run_is_at_it(desk: Desk):
    brisk(desk, CONCURRENCY=2)
    desk.write(numbered(300))
    async with Gateway(replace(QUICK, latency_s=0.005)) as gateway:
        process = await desk.start(gateway)
        await until(lambda: gateway.answered >= 3)
        desk.write(numbered(300, "my invoice is fine!"))
        await until(lambda: gateway.answered >= 100)
        desk.tickets.unlink()
        done = await desk.finish(process)
    assert done.status == 0


async def test_a_ledger_that_somebody_deletes_stops_the_run_within_a_second_and_is_there_again(desk: Desk):
    tickets = numbered(300)
    brisk(desk, CONCURRENCY=4)
    desk.write(tickets)
    async with Gateway(replace(QUICK, latency_s=0.05)) as gateway:
        process = await desk.start(gateway)
        await until(lambda: gateway.answered >= 20)
        desk.ledger.unlink()
        done = await desk.finish(process)
        assert (done.status, len(done.ledger)) == (1, gateway.answered)
        assert 20 <= gateway.answered < 200
        assert re.search(r"^Stopped: .*labels.db: was deleted or moved", done.stdout, re.M)
        again = await desk.run(gateway)
    assert again.status == 0
