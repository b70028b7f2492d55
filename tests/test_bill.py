"""The bill itself: a night in which every promise is kept, by hand, and each promise broken once."""

import asyncio
import json
import math
import sqlite3
from collections.abc import Callable
from copy import deepcopy
from dataclasses import dataclass, field, replace
from pathlib import Path
from types import SimpleNamespace

import aiohttp
import pytest
from hypothesis import given
from hypothesis import strategies as st

from tests.bill import PROMISES, Audit, broken_promises
from tests.conftest import Done
from tests.gateway import (
    ANSWERED,
    CUT,
    HUNG,
    REFUSED,
    Bucket,
    Fault,
    FixedWindow,
    Gateway,
    Item,
    SlidingWindow,
    off_list,
    parse_arguments,
    serves,
)
from tests.helpers import QUICK

LABELS = ["billing", "bug", "how-to", "feature-request", "other"]
PRICES = {"m": (1.0, 2.0, 0.1)}
COLUMNS = (
    "number INTEGER PRIMARY KEY, digest TEXT, id TEXT, model TEXT, label TEXT, reply TEXT, error TEXT, kind TEXT, "
    "confidence REAL, tokens_in INTEGER, tokens_out INTEGER, tokens_cached INTEGER, estimated INTEGER, cost_usd REAL, "
    "at TEXT"
)


def named_label(reply: str) -> str | None:
    """As much of R3 as these replies need."""
    return reply if reply in LABELS else None


def row(id_: str, label: str | None, reply: str | None, kind: str, tokens_in: int = 100, **more: object) -> dict:
    """One row of the ledger, whose cost is that of its tokens."""
    tokens_out = 0 if not tokens_in else 3
    cost = (tokens_in + 2 * tokens_out) / 1e6
    fields = {"digest": f"d-{id_}", "model": "m", "tokens_in": tokens_in, "tokens_out": tokens_out, "cost_usd": cost}
    return fields | {"id": id_, "label": label, "reply": reply, "kind": kind, "estimated": 0} | more


def line(id_: str, label: str, **more: object) -> dict:
    """One line of the output."""
    return {"id": id_, "label": label, "model": "m", "digest": f"d-{id_}"} | more


def answered(number: int, id_: str, reply: str, turn: int = 1, **more: object) -> Item:
    """One request that was answered in whole, a second after the one before."""
    about = {"asked": f"{id_}-{turn}", "prompt": "p", "text": f"text of {id_}", "turn": turn, "model": "m"}
    told = {"tokens_in": 100 if turn == 1 else 120, "tokens_out": 3, "was_told": True, "finish_reason": "stop"}
    return Item(number, ANSWERED, asked_at=number, ended_at=number + 0.5, reply=reply, **about | told | more)


@dataclass
class Night:
    """What the bill, the ledger, the output and the report say; each may be spoilt before it is judged."""

    folder: Path
    tickets: dict[str, str] = field(
        default_factory=lambda: {
            "t1": "text of t1",
            "t2": "text of t2",
            "t3": "text of t3",
            "t4": " - ",
            "t5": "text of t1",
            "t6": "text of t6",
            "t7": "text of t7",
        }
    )
    items: list[Item] = field(
        default_factory=lambda: [
            answered(1, "t1", "billing"),
            answered(2, "t2", "bug"),
            answered(3, "t3", "hello"),
            answered(4, "t3", "hello again", turn=2),
            answered(5, "t6", "well"),
            answered(6, "t6", "how-to", turn=2),
            Item(7, REFUSED, text="text of t7", asked="t7-1", prompt="p", turn=1, model="m", asked_at=7, ended_at=7),
        ]
    )
    rows: list[dict] = field(
        default_factory=lambda: [
            row("t1", "billing", None, "answered"),
            row("t2", "bug", "bug", "answered"),
            row("t3", None, "hello", "no label"),
            row("t3", None, "hello again", "no label", 120),
            row("t6", None, "well", "no label"),
            row("t6", "how-to", None, "answered", 120),
            row("t7", None, None, "rejected", 0),
        ]
    )
    lines: list[dict] = field(
        default_factory=lambda: [
            line("t1", "billing"),
            line("t2", "bug"),
            line("t3", "other", reply="hello again"),
            {"id": "t4", "label": "other", "model": None},
            line("t5", "billing", digest="d-t1"),
            line("t6", "how-to"),
        ]
    )
    report: str = "Classified 6 tickets\nTokens: 640 in / 18 out\nCost  : $0.0007\n\nbilling 2\n"
    status: int = 1
    disregarded: list[str] = field(default_factory=list)

    def broken(self, **more: object) -> set[str]:
        """The names of the broken promises."""
        output = self.folder / "labels.jsonl"
        output.write_text("".join(json.dumps(line) + "\n" for line in self.lines))
        write_ledger(output.with_suffix(".db"), self.rows, self.disregarded)
        return self.broken_by(Done(self.status, self.report, "", output), **more)

    def broken_by(self, done: Done, **more: object) -> set[str]:
        """The same, of what a run left, as it stands."""
        facts = {"budget_usd": 1.0, "tickets": [self.tickets], "prices": PRICES, "named_label": named_label} | more
        return {how.partition(":")[0] for how in broken_promises(self.items, done, **facts)}


def write_ledger(path: Path, rows: list[dict] | None, disregarded: list[str] = ()) -> None:
    """A ledger by hand; None: there is none."""
    path.unlink(missing_ok=True)
    if rows is None:
        return
    db = sqlite3.connect(path)
    db.execute(f"CREATE TABLE requests({COLUMNS})")
    for row in rows:
        marks = ", ".join(f":{name}" for name in row)
        db.execute(f"INSERT INTO requests({', '.join(row)}) VALUES({marks})", row)
    db.execute("CREATE TABLE disregarded(prompt TEXT, reply TEXT)")
    db.executemany("INSERT INTO disregarded VALUES('p', ?)", [(reply,) for reply in disregarded])
    db.commit()
    db.close()


@pytest.fixture
def night(tmp_path: Path) -> Night:
    return Night(tmp_path)


def test_a_night_in_which_all_is_well_breaks_no_promise(night: Night):
    assert night.broken() == set()


# ---- Each promise, broken ------------------------------------------------------------------------------


def again(night: Night, number: int, **changes: object) -> None:
    """The request of this number is sent once more, later."""
    item = next(item for item in night.items if item.number == number)
    night.items.append(replace(item, number=9, asked_at=9.0, ended_at=9.5, **changes))


def spoil_row(number: int, **fields: object) -> Callable[[Night], None]:
    return lambda night: night.rows[number].update(fields)


def spoil_line(number: int, **fields: object) -> Callable[[Night], None]:
    return lambda night: night.lines[number].update(fields)


def spoil_report(old: str, new: str) -> Callable[[Night], None]:
    return lambda night: setattr(night, "report", night.report.replace(old, new))


def add_line(id_: str, label: str) -> Callable[[Night], None]:
    return lambda night: night.lines.append(line(id_, label))


def keep_twice(night: Night) -> None:
    night.rows.append(night.rows[0])


def invent_tokens(night: Night) -> None:
    night.rows.append(row("t7", None, None, "cut"))


def send_again(night: Night) -> None:
    again(night, 1, ended=CUT, reply=None)


def send_again_without_label(night: Night) -> None:
    again(night, 3, ended=CUT, reply=None)


def ask_both_at_once(night: Night) -> None:
    night.items.append(replace(night.items[1], number=9, asked_at=2.1, ended_at=2.4))
    night.rows.append(night.rows[1])


def ask_needlessly(night: Night) -> None:
    night.items.append(answered(9, "t2", "bug", turn=2))
    night.rows.append(row("t2", "bug", "bug", "answered", 120))


def ask_a_third_time(night: Night) -> None:
    night.items.append(replace(night.items[3], number=9, turn=3, asked="t3-3", asked_at=9.0, ended_at=9.5))
    night.rows.append(night.rows[3])


def swap_lines(night: Night) -> None:
    night.lines[0], night.lines[1] = night.lines[1], night.lines[0]


def repeat_line(night: Night) -> None:
    night.lines.insert(0, night.lines[0])


LOST = {"label": None, "reply": None, "tokens_in": 0, "tokens_out": 0, "cost_usd": 0.0, "kind": "timed out"}
SPOILT = {
    "the ledger is lost": (lambda night: setattr(night, "rows", None), {"ledger-readable", "report-true"}),
    "an answer is lost": (spoil_row(1, **LOST), {"answer-kept", "cost-covered", "label-true", "report-true"}),
    "told tokens are estimated": (spoil_row(1, estimated=1), {"answer-kept", "row-true"}),
    "another label is kept": (spoil_row(1, label="how-to", reply=None), {"answer-kept", "row-true", "label-true"}),
    "an answer is kept for another ticket": (spoil_row(1, id="t7"), {"answer-kept", "row-true"}),
    "no reply is kept": (spoil_row(3, reply=None), {"answer-kept", "row-true"}),
    "an answer is kept twice": (keep_twice, {"row-true", "report-true"}),
    "tokens are invented": (invent_tokens, {"row-true", "report-true"}),
    "less is booked": (spoil_row(1, cost_usd=0.0), {"cost-covered", "cost-true", "report-true"}),
    "more is booked": (spoil_row(1, cost_usd=0.01), {"cost-true", "report-true"}),
    "what has a label is sent again": (send_again, {"answered-once"}),
    "the same is asked twice at once": (ask_both_at_once, {"answered-once", "report-true"}),
    "what has no label is sent again": (send_again_without_label, {"asked-once-more"}),
    "what has a label is asked once more": (ask_needlessly, {"asked-once-more", "report-true"}),
    "a ticket is asked a third time": (ask_a_third_time, {"asked-once-more", "report-true"}),
    "the lines are in another order": (swap_lines, {"csv-order"}),
    "a line stands there twice": (repeat_line, {"csv-order", "report-true"}),
    "a line is of no ticket": (add_line("t9", "bug"), {"csv-order", "label-true", "report-true"}),
    "a label is wrong": (spoil_line(1, label="billing"), {"label-true"}),
    "a label has no answer": (add_line("t7", "bug"), {"label-true", "report-true", "exit-true"}),
    "FALLBACK has no answer": (add_line("t7", "other"), {"fallback-true", "report-true", "exit-true"}),
    "FALLBACK has no reply": (spoil_line(2, reply=None), {"fallback-true"}),
    "FALLBACK stands for a label": (spoil_line(5, label="other", reply="well"), {"fallback-true"}),
    "a label is left out": (lambda night: night.lines.pop(1), {"answer-used", "report-true"}),
    "the report says another count": (spoil_report("6 tickets", "7 tickets"), {"report-true"}),
    "the report says other tokens": (spoil_report("640", "641"), {"report-true"}),
    "the report says another cost": (spoil_report("$0.0007", "$0.0008"), {"report-true"}),
    "there is no report": (lambda night: setattr(night, "report", "Stopped.\n"), {"report-true"}),
    "the exit status is 0": (lambda night: setattr(night, "status", 0), {"exit-true"}),
    "the exit status is 1": (lambda night: night.tickets.pop("t7"), {"exit-true"}),
}


@pytest.mark.parametrize(("spoil", "broken"), SPOILT.values(), ids=SPOILT)
def test_each_broken_promise_is_noticed_and_named(night: Night, spoil: Callable[[Night], object], broken: set[str]):
    spoil(night)
    assert night.broken() == broken
    assert night.broken(except_for=broken) == set()


def test_a_bill_above_the_budget_is_noticed_also_for_work_that_nobody_took(night: Night):
    assert night.broken(budget_usd=0.0005) == {"within-budget"}
    assert night.broken(budget_usd=0.0007) == set()
    night.items.append(replace(answered(8, "t7", "bug"), ended=CUT, reply=None, tokens_in=1000))
    assert night.broken(budget_usd=0.0007) == {"within-budget"}
    assert night.broken(budget_usd=0.0) == set(), "no limit"


def test_a_torn_output_is_noticed(night: Night):
    night.broken()
    output = night.folder / "labels.jsonl"
    output.write_bytes(output.read_bytes()[:-9])
    assert night.broken_by(Done(-9, "", "", output), killed=True, in_flight=9) == {"output-whole"}


def test_every_promise_is_broken_in_some_test_here():
    assert set().union(*(broken for _, broken in SPOILT.values())) | {"within-budget", "output-whole"} == set(PROMISES)


def test_an_exception_from_a_promise_that_does_not_exist_is_refused(night: Night):
    with pytest.raises(ValueError, match="answer-kept"):
        night.broken(except_for={"answers-kept"})


# ---- What is allowed -----------------------------------------------------------------------------------


def test_a_kill_may_lose_as_many_answers_as_were_in_flight_and_no_more(night: Night):
    night.status, night.report = -9, ""
    del night.rows[1:3]
    night.lines = []
    assert night.broken(killed=True, in_flight=2) == set()
    assert night.broken(killed=True, in_flight=1) == {"answer-kept", "cost-covered"}
    again(night, 2)
    assert night.broken(killed=True, in_flight=3) == set()


def test_an_answer_that_was_cut_may_be_asked_again_but_its_tokens_are_kept(night: Night):
    cut = {"finish_reason": "length", "reply": "I think", "asked": "t7-1", "prompt": "p"}
    night.items += [answered(8, "t7", **cut), answered(9, "t7", **cut)]
    assert night.broken() == {"answer-kept", "cost-covered"}
    night.rows += [row("t7", None, None, "cut"), row("t7", None, None, "cut")]
    night.report = night.report.replace("640 in / 18", "840 in / 24").replace("0.0007", "0.0009")
    assert night.broken() == set()


def test_a_cut_reply_that_names_its_label_may_count_and_need_not(night: Night):
    night.items.append(answered(8, "t7", "bug", finish_reason="length"))
    night.report = night.report.replace("640 in / 18", "740 in / 21").replace("0.0007", "0.0008")
    night.rows.append(row("t7", None, None, "cut"))
    assert night.broken() == set()
    night.rows[-1] |= {"label": "bug"}
    assert night.broken() == set()
    night.items[-1] = replace(night.items[-1], finish_reason="content_filter")
    assert night.broken() == {"answer-kept", "row-true"}


def test_replies_without_a_label_that_the_ledger_disregards_may_be_asked_for_again(night: Night):
    send_again_without_label(night)
    assert night.broken() == {"asked-once-more"}
    night.disregarded = [row["reply"] for row in night.rows if row["kind"] == "no label"]
    assert night.broken() == set()


def test_a_question_that_the_client_gave_up_may_be_in_flight_when_its_answer_comes(night: Night):
    night.items.append(replace(night.items[1], number=9, ended=CUT, reply=None, asked_at=1.9, ended_at=9.0))
    assert night.broken() == set()


def test_tokens_that_were_told_without_an_answer_may_stand_in_a_row_once(night: Night):
    night.items.append(replace(answered(8, "t7", "bug"), ended=CUT, reply=None))
    night.rows.append(row("t7", None, None, "unreadable"))
    night.report = night.report.replace("640 in / 18", "740 in / 21").replace("0.0007", "0.0008")
    assert night.broken() == set()
    night.rows[-1] |= {"label": "bug"}
    assert night.broken() == {"row-true"}


def test_cached_tokens_are_tokens_of_the_bill_and_cost_less(night: Night):
    night.items[1] = replace(night.items[1], tokens_cached=60)
    assert night.broken() == {"answer-kept", "row-true"}
    night.rows[1] |= {"tokens_cached": 60, "cost_usd": 52e-6}
    assert night.broken(budget_usd=0.000622) == {"report-true"}, "it costs less now"
    assert night.broken(budget_usd=0.000621) == {"report-true", "within-budget"}


def test_a_ticket_without_text_may_have_a_row_that_costs_nothing(night: Night):
    night.rows.append(row("t4", "other", None, "empty", 0))
    assert night.broken() == set()
    night.rows[-1] |= {"id": "t2"}
    assert night.broken() == {"row-true"}


def test_an_answer_of_another_model_is_another_answer(night: Night):
    night.rows[1] |= {"model": "n"}  # which has no price
    assert night.broken() == {"answer-kept", "row-true", "cost-true"}
    night.rows[1] |= {"model": "m"}
    night.lines[1] |= {"model": "n"}
    assert night.broken() == {"label-true"}


def test_answers_to_a_former_prompt_need_not_stand_in_the_output(night: Night):
    night.items[1] = replace(night.items[1], prompt="former")
    del night.lines[1]
    night.report = night.report.replace("6 tickets", "5 tickets")
    assert night.broken() == set()
    night.items[1] = replace(night.items[1], prompt="p")
    assert night.broken() == {"answer-used"}


def test_what_may_have_been_billed_is_booked_as_estimated_without_an_answer(night: Night):
    night.items.append(Item(8, HUNG, text="text of t7", turn=1, model="m"))
    night.rows.append(row("t7", None, None, "timed out", 500, estimated=1))
    night.report = night.report.replace("640 in / 18", "1,140 in / 21").replace("0.0007", "0.0012")
    assert night.broken() == set()
    night.rows[-1] |= {"label": "bug"}
    assert night.broken() == {"row-true"}


def test_an_answer_without_usage_needs_a_row_that_says_estimated(night: Night):
    night.items[1] = replace(night.items[1], was_told=False)
    assert night.broken() == {"answer-kept", "row-true"}
    night.rows[1] |= {"estimated": 1}
    assert night.broken() == set()


def test_rows_of_former_texts_stay_and_the_output_follows_the_text_of_today(night: Night):
    before = night.tickets
    night.tickets = before | {"t2": "another text"}
    assert night.broken(tickets=[before, night.tickets]) == {"label-true"}
    del night.lines[1]
    night.report = night.report.replace("6 tickets", "5 tickets")
    assert night.broken(tickets=[before, night.tickets]) == set()


def test_an_output_of_a_run_that_could_send_nothing_is_of_the_day_before(night: Night):
    before, now = night.tickets, night.tickets | {"t2": "another text"}
    night.status, night.report = 2, ""
    assert night.broken(tickets=[before, now]) == set()


def test_a_sample_needs_no_labels_but_its_own(night: Night):
    night.status = 0
    assert night.broken(is_sample=True) == set()
    night.lines = []
    assert night.broken(is_sample=True) == {"exit-true"}


def test_a_csv_output_is_read_as_a_spreadsheet_writes_it(night: Night):
    night.broken()
    output = night.folder / "labels.csv"
    rows = "ID,body,model_label,confidence,reply\n'-t1,x,billing,,\n'-t3,x,other,,hello again\n"
    output.write_text(f"\ufeff{rows}", encoding="utf-8")
    tickets = {f"-{id_}": text for id_, text in night.tickets.items()}
    broken = night.broken_by(Done(1, "", "", output), tickets=[night.tickets, tickets])
    assert broken == {"answer-used", "report-true"}


def test_a_ledger_that_a_kill_left_behind_is_read_and_not_touched(night: Night):
    night.broken()
    path = night.folder / "labels.db"
    db = sqlite3.connect(path)
    db.execute("PRAGMA journal_mode=WAL")
    db.execute("UPDATE requests SET label = 'how-to' WHERE id = 't2'")
    db.commit()
    wal = path.with_name("labels.db-wal")
    before = path.read_bytes(), wal.read_bytes()
    broken = night.broken_by(Done(-9, "", "", night.folder / "labels.jsonl"))
    assert broken == {"answer-kept", "row-true", "label-true"}
    assert (path.read_bytes(), wal.read_bytes()) == before
    db.close()


# ---- The stand-in's items ------------------------------------------------------------------------------


async def ask(gateway: Gateway, text: str, *turns: str) -> int:
    """The status of one request; `turns` continue the conversation."""
    messages = [{"role": "system", "content": "Label it."}, {"role": "user", "content": text}]
    messages += [{"role": role, "content": turn} for role, turn in zip(("assistant", "user"), turns, strict=False)]
    async with (
        aiohttp.ClientSession() as session,
        session.post(gateway.url, json={"model": "m", "messages": messages}) as response,
    ):
        await response.read()
        return response.status


@pytest.mark.parametrize(
    ("fault", "ended", "is_billed", "was_told"),
    [
        ("blank_lines", ANSWERED, True, True),
        ("no_usage", ANSWERED, True, False),
        ("absurd_usage", ANSWERED, True, False),
        ("cut_after", ANSWERED, True, True),
        ("null_content", ANSWERED, True, True),
        ("cut_before", CUT, False, False),
        ("cut_inside", CUT, True, False),
        ("truncated_json", CUT, True, False),
        ("billed_504", CUT, True, False),
        ("big_200", CUT, True, False),
        ("status_429_retry", REFUSED, False, False),
        ("html_200", REFUSED, False, False),
        ("error_200", REFUSED, False, False),
    ],
)
async def test_an_item_says_how_the_request_ended(fault: str, ended: str, is_billed: bool, was_told: bool):
    async with Gateway(replace(QUICK, faults=(Fault(fault),))) as gateway:
        try:
            await ask(gateway, "My invoice is wrong.")
        except aiohttp.ClientError:
            assert ended == CUT
    [item] = gateway.bill
    assert (item.ended, bool(item.tokens_in), item.was_told) == (ended, is_billed, was_told)
    assert (item.text, item.model, item.turn) == ("My invoice is wrong.", "m", 1)
    assert (item.tokens_in, item.tokens_out) == (gateway.tokens_in, gateway.tokens_out)
    assert item.is_complete == (ended == ANSWERED and fault != "null_content")


async def test_who_hangs_or_leaves_is_on_the_bill_too():
    async with Gateway(replace(QUICK, latency_s=0.1, faults=(Fault("hang", matching="never"),))) as gateway:
        for text in ("never", "too late"):
            with pytest.raises(TimeoutError):
                await asyncio.wait_for(ask(gateway, text), 0.05)
        await ask(gateway, "in time")
    ended = {item.text: item.ended for item in gateway.bill}
    assert ended == {"never": HUNG, "too late": CUT, "in time": ANSWERED}


async def test_a_ticket_asked_once_more_is_one_conversation():
    async with Gateway(replace(QUICK, faults=(Fault(off_list("hm")),))) as gateway:
        await ask(gateway, "My invoice is wrong.")
        await ask(gateway, "My invoice is wrong.", "hm", "Answer with exactly one of the labels.")
    first, second = gateway.bill
    assert (first.turn, first.reply, second.turn, second.reply) == (1, "hm", 2, "billing")
    assert first.text == second.text
    assert first.prompt == second.prompt
    assert first.asked != second.asked
    assert second.tokens_in > first.tokens_in


async def test_a_body_of_any_kind_is_on_the_bill_as_a_client_reads_it():
    said = [{"type": "text", "text": text} for text in ("bill", "ing")]
    parts = [{"type": "thinking", "thinking": "bug?"}, *said]
    usage = {"prompt_tokens": 7, "completion_tokens": 1, "total_tokens": 12}
    body = {"choices": [{"message": {"content": parts}, "finish_reason": "eos"}], "usage": usage}
    failed = {"choices": [{"message": {"content": ""}, "error": {"code": 502}}], "usage": usage}
    faults = [Fault(serves(json.dumps(given).encode()), last=n) for n, given in enumerate((body, failed), 1)]
    async with Gateway(replace(QUICK, faults=tuple(faults))) as gateway:
        await ask(gateway, "one")
        await ask(gateway, "two")
    whole, broken = gateway.bill
    assert (whole.reply, whole.tokens_in, whole.tokens_out, whole.is_complete) == ("billing", 7, 5, True)
    assert (broken.ended, broken.reply) == (CUT, None)


# ---- The stand-in's limits: what they say is true -----------------------------------------------------

LIMITERS = {  # two requests a second
    "bucket": lambda counts: Bucket(2.0, 3, counts),
    "sliding": lambda counts: SlidingWindow(4, 2.0, counts),
    "fixed": lambda counts: FixedWindow(4, 2.0, counts),
}


@pytest.mark.parametrize("kind", LIMITERS)
@given(counts=st.booleans(), pauses_s=st.lists(st.floats(0, 3), max_size=60))
def test_who_waits_as_long_as_told_is_let_in_and_who_comes_earlier_is_not(
    kind: str, counts: bool, pauses_s: list[float]
):
    limiter, now = LIMITERS[kind](counts), 0.0
    for pause_s in pauses_s:
        now += pause_s
        if wait_s := limiter.wait_s(now):
            assert wait_s <= 2.0 + 1e-9, "a window, or (size + 1) / per_s"
            assert deepcopy(limiter).wait_s(now + 0.99 * wait_s - 1e-6) > 0
            assert deepcopy(limiter).wait_s(now + wait_s + 1e-6) == 0


@pytest.mark.parametrize(("kind", "let_in"), [("bucket", 3), ("sliding", 4), ("fixed", 80)])
def test_refused_requests_that_count_keep_out_only_who_asks_faster_than_the_limit(kind: str, let_in: int):
    def many(counts: bool, pause_s: float) -> int:
        limiter = LIMITERS[kind](counts)
        return sum(limiter.wait_s(n * pause_s) == 0 for n in range(400))

    assert 80 <= many(False, pause_s=0.1) <= 84, "two a second are let in, for 40 s"
    assert many(True, pause_s=0.1) == let_in
    assert many(True, pause_s=0.501) == 400


async def test_the_stand_in_counts_refused_requests_where_its_script_says_so():
    script, _ = parse_arguments(["--limiter", "sliding", "--rpm", "60", "--window", "2", "--counts-refused"])
    assert script.counts_refused
    for counts, second_wait_s in ((False, 1), (True, 2)):
        async with Gateway(replace(script, counts_refused=counts, latency_s=0, refusal_s=0)) as gateway:
            assert [await ask(gateway, "a") for _ in range(2)] == [200, 200]
            await asyncio.sleep(1.2)
            assert [await ask(gateway, "a") for _ in range(2)] == [429, 429]
            assert math.ceil(gateway._limiter.wait_s(gateway.now())) == second_wait_s


# ---- The audit -----------------------------------------------------------------------------------------

PROGRAM = """
import csv
from types import SimpleNamespace
class InputError(Exception):
    pass
BUDGET_USD, CONCURRENCY, FALLBACK, ID_COLUMN, PRICES = 1.0, 40, "other", "id", {"m": (1.0, 2.0, 0.1)}
def load_tickets(path):
    with open(path) as file:
        if not file.readline().startswith("id,"):
            raise InputError
        file.seek(0)
        return [SimpleNamespace(id=row["id"], text=row["body"]) for row in csv.DictReader(file)]
def named_label(reply):
    return reply if reply in ("billing", "bug") else None
"""


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """What an audit finds: a program, and its tickets."""
    (tmp_path / "classify.py").write_text(PROGRAM)
    (tmp_path / "tickets.csv").write_text("id,body\nt1,My invoice is wrong.\nt2,text of t2\n")
    return tmp_path


async def test_an_audit_compares_each_output_with_the_requests_of_its_own_runs(folder: Path):
    audit = Audit()
    async with Gateway(replace(QUICK, tokens=(100, 3))) as gateway:
        for name in ("labels", "other"):
            process = SimpleNamespace()
            audit.begins(folder, gateway, ["-o", f"{name}.jsonl"]).process = process
            await ask(gateway, "My invoice is wrong.")
            write_ledger(folder / f"{name}.db", [row("t1", "billing", None, "answered")])
            (folder / f"{name}.jsonl").write_text(json.dumps(line("t1", "billing")))
            report = "Classified 1 tickets\nTokens: 100 in / 3 out\nCost  : $0.0001\n"
            audit.ends(process, Done(1, report, "", folder / "labels.jsonl"))
    assert audit.broken() == []
    write_ledger(folder / "other.db", None)
    assert [how.partition(":")[0] for how in audit.broken()] == ["ledger-readable", "report-true"]
    audit.except_for = {"ledger-readable", "report-true"}
    assert audit.broken() == []


async def test_an_audit_cannot_say_whose_a_request_is_where_two_outputs_are_written_at_once(folder: Path):
    audit = Audit()
    first, second = SimpleNamespace(), SimpleNamespace()
    async with Gateway(QUICK) as gateway:
        audit.begins(folder, gateway, []).process = first
        await ask(gateway, "My invoice is wrong.")
        audit.begins(folder, gateway, ["-o", "other.jsonl"]).process = second
        for process in (first, second):
            audit.ends(process, Done(1, "", "", folder / "labels.jsonl"))
    assert audit.broken() == []
    del audit.runs[1]
    assert [how.partition(":")[0] for how in audit.broken()] == ["ledger-readable", "report-true"]


async def test_a_csv_that_the_program_refuses_has_no_tickets(folder: Path):
    (folder / "tickets.csv").write_text("a workbook")
    assert Audit().begins(folder, None, []).tickets() == {}


async def test_an_audit_takes_over_the_bill_behind_a_ledger_that_was_copied(folder: Path):
    rows = [row("t1", "billing", None, "answered"), row("t2", "bug", None, "answered")]
    write_ledger(folder / "labels.db", rows)
    (folder / "labels.jsonl").write_text("\n".join(json.dumps(line(row["id"], row["label"])) for row in rows))
    audit, process = Audit(), SimpleNamespace()
    async with Gateway(replace(QUICK, tokens=(100, 3))) as gateway:
        audit.begins(folder, gateway, []).process = process
        await ask(gateway, "My invoice is wrong.")
        report = "Classified 2 tickets\nTokens: 200 in / 6 out\nCost  : $0.0002\n"
        audit.ends(process, Done(0, report, "", folder / "labels.jsonl"))
    assert {how.partition(":")[0] for how in audit.broken()} == {"row-true", "label-true"}
    audit.earlier = [answered(1, "t2", "bug")]
    assert audit.broken() == []


@pytest.mark.parametrize(
    ("budgets", "broken"), [(["0.0001", "0.0003"], False), (["0.0001", "0"], False), (["0.0001", "0.0001"], True)]
)
async def test_the_largest_budget_of_all_runs_holds(folder: Path, budgets: list[str], broken: bool):
    audit = Audit()
    async with Gateway(replace(QUICK, tokens=(100, 3))) as gateway:
        for budget in budgets:
            process = SimpleNamespace()
            audit.begins(folder, gateway, ["--budget", budget]).process = process
            await ask(gateway, "My invoice is wrong.")
            audit.ends(process, Done(1, "", "", folder / "labels.jsonl"))
    assert any(how.startswith("within-budget") for how in audit.broken()) == broken


async def test_an_audit_forgives_a_killed_run_what_was_in_flight(folder: Path):
    audit = Audit()
    async with Gateway(QUICK) as gateway:
        audit.begins(folder, gateway, ["--concurrency", "1"])
        await ask(gateway, "My invoice is wrong.")
        assert audit.broken() == [], "one was in flight"
        await ask(gateway, "text of t2")
        assert [how.partition(":")[0] for how in audit.broken()] == ["ledger-readable"]


async def test_an_audit_has_nothing_to_say_where_no_program_ran_or_nothing_was_asked(folder: Path):
    audit = Audit()
    async with Gateway(QUICK) as gateway:
        await ask(gateway, "My invoice is wrong.")
        audit.begins(folder, gateway, ["none.csv"])
        audit.begins(folder, gateway, ["--budget", "much"])
    assert audit.broken() == []
