"""Every fault of the gateway, once in five requests and for ever: what must happen is a table, and it happens.

`python -m tests.test_faults` runs the same matrix and prints it in Markdown.
"""

import asyncio
import json
import re
import shutil
import socket
import tempfile
import time
from collections.abc import Iterable, Iterator
from copy import copy
from dataclasses import dataclass
from email.utils import formatdate
from itertools import groupby
from pathlib import Path

import pytest
from multidict import CIMultiDict

import classify
from classify import retry_after_s
from tests.conftest import KEY, Desk, Done
from tests.gateway import ERRORS, FAULTS, Fault, Gateway, Script
from tests.helpers import until

# ---- The table -----------------------------------------------------------------------------------------

LABELLED, FAILS, STOPS = "labelled", "fails", "stops"
MAY_PASS = {408, 409, 425, 500, 502, 503, 504, 520, 529}
THIS_TICKET = {400, 413, 422, 451}
EXPECTED = {  # fault: what must happen when it hits one request in five, and when it hits every one
    **{f"status_{status}": (LABELLED, FAILS + STOPS) for status in MAY_PASS},
    **{f"status_{status}": (FAILS, FAILS) for status in THIS_TICKET},
    **{f"status_{status}": (STOPS, STOPS) for status in set(ERRORS) - MAY_PASS - THIS_TICKET - {429}},
    "status_429": (LABELLED, STOPS),
    **dict.fromkeys(("int_code_500", "empty_code_500", "string_error_500"), (LABELLED, FAILS + STOPS)),
    **dict.fromkeys(("empty_500", "html_502"), (LABELLED, FAILS + STOPS)),
    **dict.fromkeys(("quota_429", "quota_error_200", "redirect", "redirect_307"), (STOPS, STOPS)),
    **dict.fromkeys(("echo_400", "control_400", "content_filter"), (FAILS, FAILS)),
    **dict.fromkeys(("error_200", "string_error_200", "html_200", "empty_200", "blank_200"), (LABELLED, FAILS + STOPS)),
    **dict.fromkeys(("not_json_200", "nested_json", "big_200", "no_choices", "truncated_json"), (LABELLED, FAILS)),
    **dict.fromkeys(("truncated", "cut_inside", "cut_before"), (LABELLED, FAILS + STOPS)),
    **dict.fromkeys(("text_plain", "slow", "blank_lines", "cut_after"), (LABELLED, LABELLED)),
    **dict.fromkeys(("null_usage", "absurd_usage", "no_usage"), (LABELLED, LABELLED)),
    **dict.fromkeys(("no_finish", "null_finish", "think", "think_open", "length_label"), (LABELLED, LABELLED)),
    "usage_too_large": (LABELLED, LABELLED),
    # one retry, which the fault may hit again
    **dict.fromkeys(("null_content", "length", "length_unclear", "length_two"), (LABELLED + FAILS, FAILS)),
    "think_cut": (LABELLED + FAILS, FAILS),
    **dict.fromkeys(("insufficient_system_resource", "error_finish"), (LABELLED, FAILS)),
    **dict.fromkeys(("unknown_finish", "tool_calls", "firewall_403", "forbidden_403"), (FAILS, FAILS)),
    "status_401": (LABELLED, STOPS),  # each answer ends a spell of them
    "unsupported_parameter_400": (STOPS, STOPS),
    "billed_504": (LABELLED, FAILS + STOPS),
    "off_list": (LABELLED, LABELLED),
    "hang": (LABELLED, FAILS + STOPS),  # time-outs alone are nothing but refusals, in the end
}
AT_ONCE = {fault for fault, ends in EXPECTED.items() if ends == (STOPS, STOPS)}
BILLED_IN_VAIN = {"big_200", "no_choices", "truncated_json", "truncated", "cut_inside"}  # the answer cannot be read
BILLED_IN_VAIN |= {"null_content", "length", "length_unclear", "length_two", "think_cut", "billed_504"}  # or is none
BILLED_IN_VAIN |= {"insufficient_system_resource", "error_finish", "unknown_finish", "tool_calls"}

# A wait, garbage, and a wait that nobody sits out. "" stands for the empty header, None for no header.
WAITS = ("seconds", "float", "ms", "date")
GARBAGE = ("soon", "-5", "nan", "1e999", "")
TOO_LONG = ("99999", "Fri, 31 Dec 9999 23:59:59 GMT")

ABOUT = ("my invoice is wrong", "the app has a bug", "how do I log in", "please add dark mode", "well")
TICKETS = {f"t{n}": f"Hello, {about}. See number {n}, thanks!" for n, about in enumerate(3 * ABOUT)}
CONCURRENCY = 8
SETTINGS = {
    "TIMEOUT": 8, "MAX_RETRIES": 6, "BACKOFF_S": 0.02, "BACKOFF_MAX_S": 0.1,
    "KEY_GRACE_S": 0.3, "MAX_HOLD_S": 60.0, "MAX_STUCK_S": 4.0,
}  # fmt: skip


@dataclass(frozen=True)
class Case:
    """One fault, how often it hits, and with what Retry-After."""

    fault: str
    header: str | None
    every: int

    def __str__(self) -> str:
        header = "" if self.header is None else f", Retry-After {self.header!r}"
        return f"{self.fault}{header}, {'for ever' if self.every == 1 else 'once in five'}"

    @property
    def expected(self) -> str:
        """What must happen, or the two things of which either may."""
        once, ever = EXPECTED[self.fault]
        if self.fault.removeprefix("status_") in map(str, {429, *MAY_PASS}):
            if self.header in TOO_LONG:
                return STOPS
            if self.header in WAITS:  # to be told to wait again and again is to be refused
                ever += STOPS
        return ever if self.every == 1 else once

    @property
    def settings(self) -> dict[str, object]:
        """The settings, with fewer retries where they would only take time."""
        few = {"MAX_RETRIES": 2, "MAX_STUCK_S": 1.5} if self.every == 1 and self.expected != LABELLED else {}
        return SETTINGS | few | ({"TIMEOUT": 1.0} if self.fault == "hang" else {})

    @property
    def script(self) -> Script:
        fault = Fault(self.fault if self.header is None else f"{self.fault}_retry", every=self.every)
        latency_s = 0.02 if self.fault == "slow" else 0.0
        return Script(rpm=0, latency_s=latency_s, refusal_s=0, retry_after=self.header or "", faults=(fault,))


def headers_with(fault: str) -> tuple[str | None, ...]:
    """Every form where it is one status that waits and one that backs off; what a form means is the parser's matter."""
    if fault in ("status_429", "status_503"):
        return (None, *WAITS, *GARBAGE, *TOO_LONG)
    return (None, "seconds") if fault.startswith("status_") else (None,)


CASES = [
    Case(fault, header, every)
    for fault in FAULTS
    if not fault.endswith("_retry")
    for header in headers_with(fault)
    for every in (5, 1)
]


# ---- Running it ----------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Outcome:
    """A run of the program, and the gateway that it ran against."""

    done: Done
    gateway: Gateway
    tickets: dict[str, str]

    @property
    def failed(self) -> list[str]:
        return re.findall(r"^ticket (\S+) failed: ", self.done.stderr, re.M)

    @property
    def end(self) -> str:
        if self.done.status is None:
            return "runs on"
        if "\nstopped: " in self.done.stderr:
            return STOPS
        return FAILS if self.failed else LABELLED

    @property
    def in_vain(self) -> list[dict]:
        """The lines of the .bak: requests that were paid, or may have been, without bringing an answer."""
        backup = self.done.output.with_name("labels.jsonl.bak")
        lines = backup.read_bytes().splitlines() if backup.exists() else ()
        return [json.loads(line) for line in lines if line.strip()]


def check(outcome: Outcome, unreadable: bool = False) -> None:
    """What holds for every run, whatever went wrong; `unreadable`: so did answers that were billed."""
    done, gateway, tickets = outcome.done, outcome.gateway, outcome.tickets
    assert "Traceback" not in done.stderr, done.stderr
    assert KEY not in done.stdout + done.stderr
    texts = {text: id_ for id_, text in tickets.items()}
    for line in done.lines:
        reply = gateway.replies.get(tickets[line["id"]], "")
        given = (reply, None) if reply in ("billing", "bug", "how-to", "feature-request", "other") else ("other", reply)
        assert (line["label"], line.get("reply")) == given, "a label that the gateway did not give"
    assert set(outcome.failed).isdisjoint(done.labels), "failed, and labelled all the same"
    assert len(outcome.failed) == len(set(outcome.failed)), "failed twice"
    lost = set() if unreadable else {texts[text] for text in gateway.replies} - set(done.labels)
    assert not lost, f"answered, paid, and lost: {lost}"
    assert unreadable or set(gateway.billed.values()) <= {1}, "billed twice"
    assert gateway.billed.total() <= len(done.lines) + len(outcome.in_vain), "paid, but on no record"
    missing = len(tickets) - len(done.labels)
    assert done.stdout.startswith(f"Classified {len(done.labels)} tickets\n")
    assert (f"\nNot labelled: {missing} tickets" in done.stdout) == (missing > 0)
    assert done.status == (1 if missing else 0)


def desks_for(cases: Iterable[Case], folder: Path) -> Iterator[tuple[Case, Desk]]:
    """Each case with its own desk, copied from one with the same settings: editing takes longer than a run."""
    models: dict[str, Desk] = {}
    for number, case in enumerate(cases):
        if (settings := repr(case.settings)) not in models:
            models[settings] = model = Desk(Path(tempfile.mkdtemp(dir=folder)))
            model.edit(**case.settings)
            model.write(TICKETS)
        desk = copy(models[settings])
        desk.folder = folder / str(number)
        desk.output, desk.tickets = desk.folder / "labels.jsonl", desk.folder / "tickets.csv"
        shutil.copytree(models[settings].folder, desk.folder)
        yield case, desk


async def run_matrix(cases: Iterable[Case], folder: Path, at_once: int = 12) -> dict[Case, Outcome]:
    """All cases to their end, so many at once: most of their time is waiting."""
    outcomes: dict[Case, Outcome] = {}
    waiting = desks_for(cases, folder)

    async def work() -> None:
        for case, desk in waiting:
            async with Gateway(case.script) as gateway:
                process = await desk.start(gateway, "--rpm", "0", "--concurrency", str(CONCURRENCY))
                outcomes[case] = Outcome(await desk.collect(process, within_s=15), gateway, TICKETS)

    await asyncio.gather(*(work() for _ in range(at_once)))
    return outcomes


@pytest.fixture(scope="module")
def matrix(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> dict[Case, Outcome]:
    """The outcome of every case that was selected."""
    specs = [item.callspec for item in request.session.items if hasattr(item, "callspec")]
    cases = [spec.params["case"] for spec in specs if isinstance(spec.params.get("case"), Case)]
    return asyncio.run(run_matrix(cases, tmp_path_factory.mktemp("matrix")))


# ---- What must hold ------------------------------------------------------------------------------------


def test_the_table_names_every_fault() -> None:
    assert set(EXPECTED) == {fault for fault in FAULTS if not fault.endswith("_retry")}


@pytest.mark.parametrize("case", CASES, ids=str)
def test_every_fault_ends_as_the_table_says(case: Case, matrix: dict[Case, Outcome]) -> None:
    outcome = matrix[case]
    check(outcome, unreadable=case.fault in BILLED_IN_VAIN)
    assert outcome.end in case.expected, outcome.done.stderr
    done, gateway = outcome.done, outcome.gateway
    assert gateway.faulted, "the fault never happened"
    assert {TICKETS[id_] for id_ in done.labels} <= set(gateway.replies)
    if outcome.end == LABELLED:
        assert set(done.labels) == set(TICKETS)
    if outcome.end == FAILS:
        assert set(done.labels) | set(outcome.failed) == set(TICKETS), "neither labelled nor named on stderr"
        # a request that is refused for good is sent once: each fault is one ticket
        assert EXPECTED[case.fault][0] != FAILS or len(outcome.failed) == gateway.faulted
    if case.every == 1 and EXPECTED[case.fault][1] != LABELLED:
        assert not done.labels
    if case.fault in AT_ONCE or case.expected == STOPS != EXPECTED[case.fault][1]:
        assert gateway.requests <= case.every + CONCURRENCY, "went on after what must stop it"


@pytest.mark.parametrize("fault", ["status_503", "empty_200", "cut_before", "length", "status_451"])
async def test_twenty_first_tickets_that_fail_after_their_retries_stop_the_run(fault: str, desk: Desk) -> None:
    desk.edit(**SETTINGS | {"MAX_RETRIES": 1, "MAX_STUCK_S": 60.0, "HOLD_MAX_S": 0.05})
    desk.write(tickets := {f"t{n}": f"Ticket {n}" for n in range(60)})
    async with Gateway(Script(rpm=0, latency_s=0, refusal_s=0, faults=(Fault(fault),))) as gateway:
        outcome = Outcome(await desk.run(gateway, "--rpm", "0", "--concurrency", "4"), gateway, tickets)
    check(outcome, unreadable=True)
    assert outcome.end == STOPS
    assert 20 <= len(outcome.failed) < 20 + 4


async def test_a_port_that_refuses_for_a_while_costs_no_ticket(desk: Desk) -> None:
    desk.edit(**SETTINGS | {"MAX_RETRIES": 25, "BACKOFF_S": 0.1, "BACKOFF_MAX_S": 0.3, "MAX_STUCK_S": 30.0})
    desk.write(TICKETS)
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    gateway = Gateway(Script(rpm=0, latency_s=0), port)
    process = await desk.start(None, "--rpm", "0", TOKENHUB_URL=f"http://127.0.0.1:{port}/v1")
    await asyncio.sleep(0.8)
    assert process.returncode is None
    async with gateway:
        outcome = Outcome(await desk.finish(process), gateway, TICKETS)
    check(outcome)
    assert outcome.end == LABELLED
    assert not outcome.in_vain, "what was never sent costs nothing"


@pytest.mark.parametrize("fault", ["status_503", "status_429_retry", "html_502", "cut_before", "hang"])
async def test_an_outage_of_everything_for_a_while_costs_no_ticket(fault: str, desk: Desk) -> None:
    quick = {"MAX_RETRIES": 25, "BACKOFF_S": 0.1, "BACKOFF_MAX_S": 0.3, "MAX_STUCK_S": 30.0, "TIMEOUT": 0.5}
    desk.edit(**SETTINGS | quick)
    desk.write(TICKETS)
    async with Gateway(Script(rpm=0, latency_s=0, refusal_s=0, faults=(Fault(fault, until_s=0.8),))) as gateway:
        outcome = Outcome(await desk.run(gateway, "--rpm", "0"), gateway, TICKETS)
    check(outcome)
    assert gateway.faulted
    assert outcome.end == LABELLED


async def test_a_gateway_that_dies_and_comes_back_costs_no_ticket(desk: Desk) -> None:
    desk.edit(**SETTINGS | {"MAX_RETRIES": 25, "BACKOFF_S": 0.1, "BACKOFF_MAX_S": 0.3, "MAX_STUCK_S": 30.0})
    desk.write(TICKETS)
    async with Gateway(Script(rpm=0, latency_s=0.05)) as first:
        process = await desk.start(first, "--rpm", "0", "--concurrency", "2")
        await until(lambda: first.answered >= 5)
    await asyncio.sleep(0.5)
    async with Gateway(Script(rpm=0, latency_s=0), first.port) as second:
        done = await desk.finish(process)
    assert done.status == 0
    assert set(done.labels) == set(TICKETS)
    assert sum((first.billed + second.billed).values()) <= len(TICKETS) + 2, "more was paid twice than was in flight"


# ---- Retry-After, form by form -------------------------------------------------------------------------

NOW, LATER = "Wed, 21 Oct 2026 07:28:00 GMT", "Wed, 21 Oct 2026 07:28:30 GMT"
FORMS = [
    ({"Retry-After": "7"}, 7),
    ({"Retry-After": "0"}, 0),
    ({"Retry-After": " 2 "}, 2),
    ({"Retry-After": "0.25"}, 0.25),
    ({"Retry-After": "12.345678091049194"}, 12.345678091049194),  # str() of a float
    ({"retry-after": "99999"}, 99999),
    ({"Retry-After": LATER, "Date": NOW}, 30),  # whatever the clock of this machine says
    ({"Retry-After": "Wednesday, 21-Oct-26 07:28:30 GMT", "Date": NOW}, 30),
    ({"Retry-After": "Wed Oct 21 07:28:30 2026 +0000", "Date": NOW}, 30),
    ({"Retry-After": NOW, "Date": LATER}, 0),
    ({"Retry-After": "Fri, 31 Dec 1999 23:59:59 GMT"}, 0),
    ({}, None),
    *(({"Retry-After": garbage}, None) for garbage in (*GARBAGE, "-0.1", "inf", "-inf", "5 s", "1,5", "9" * 5000)),
    ({"Retry-After": "Fri, 31 Dec 99999999999999999999 23:59:59 GMT"}, None),
    ({"Retry-After": "Fri, 31 Dec 1999 23:59:59 -0000"}, None),
    ({"Retry-After": "Fri, 99 Foo 1999 99:99:99 +9999999"}, None),
    ({"Retry-After": LATER, "Date": "today"}, None),
]


@pytest.mark.parametrize(("headers", "wait_s"), FORMS, ids=lambda value: str(value)[:60])
def test_each_form_of_retry_after_is_a_wait_and_garbage_is_none(headers: dict[str, str], wait_s: float | None) -> None:
    assert retry_after_s(CIMultiDict(headers)) == wait_s


def test_a_date_without_the_gateways_own_clock_counts_from_ours() -> None:
    assert 28 < retry_after_s(CIMultiDict({"Retry-After": formatdate(time.time() + 30, usegmt=True)})) <= 30
    assert retry_after_s(CIMultiDict({"Retry-After": TOO_LONG[1]})) > 1e11


# ---- The matrix as a table -----------------------------------------------------------------------------


def spread(numbers: Iterable[int]) -> str:
    low, *_, high = sorted([*(numbers := list(numbers)), *numbers])
    return str(low) if low == high else f"{low}-{high}"


def cells(outcomes: list[Outcome]) -> Iterator[str]:
    """The end; labelled, failed and neither; and the texts that were billed twice."""
    labelled = [len(outcome.done.labels) for outcome in outcomes]
    failed = [len(outcome.failed) for outcome in outcomes]
    neither = [len(TICKETS) - a - b for a, b in zip(labelled, failed, strict=True)]
    yield " or ".join(sorted({outcome.end for outcome in outcomes}))
    yield "/".join(map(spread, (labelled, failed, neither)))
    yield spread(outcome.gateway.billed_twice() for outcome in outcomes)


def family(case: Case) -> tuple[str, str]:
    """Cases that stand in one row: the forms of a header that mean the same."""
    headers = {None: "none", **dict.fromkeys(WAITS, "1 s"), **dict.fromkeys(GARBAGE, "garbage")}
    return case.fault, headers.get(case.header, "too long") if case.fault.startswith("status_") else ""


def markdown(outcomes: dict[Case, Outcome]) -> Iterator[str]:
    """The matrix, the forms of Retry-After that mean the same in one row."""
    yield f"{len(outcomes)} runs of {len(TICKETS)} tickets, {CONCURRENCY} in flight; l/f/n: labelled, failed, not sent"
    yield ""
    yield "| fault | Retry-After | once in five | l/f/n | billed twice | for ever | l/f/n | billed twice |"
    yield "|---|---|---|---|---|---|---|---|"
    for name, group in groupby(CASES, key=family):
        cases = list(group)
        once = cells([outcomes[case] for case in cases if case.every == 5])
        ever = cells([outcomes[case] for case in cases if case.every == 1])
        yield f"| {' | '.join([*name, *once, *ever])} |"


if __name__ == "__main__":
    with tempfile.TemporaryDirectory() as temporary:
        print("\n".join(markdown(asyncio.run(run_matrix(CASES, Path(temporary))))))


@pytest.mark.parametrize(
    ("status", "error", "kind"),
    [
        (429, {"type": "insufficient_quota", "code": 429}, 402),
        (429, {"type": "rate_limit_error", "code": "insufficient_quota"}, 402),
        (429, {"message": "You exceeded your current quota"}, 402),
        (429, {"type": "rate_limit_error", "code": 429}, 429),
        (403, {"type": "rate_limit_error", "code": "insufficient_quota"}, 402),
        (403, {"code": "permission_denied"}, 400),
        (200, {"code": "401"}, 401),
        (200, {"code": "402"}, 402),
        (200, {"code": 9}, 500),
        (400, {"message": "insufficient balance, says the ticket"}, 400),
        (400, {"message": "Unsupported parameter: 'max_tokens'"}, "parameter"),
        (400, {"code": "unsupported_value"}, "parameter"),
        (400, {"message": "the ticket says: unsupported parameter"}, 400),
        (500, {"code": "insufficient_balance"}, 500),
        (599, {}, 500),
        (300, {}, 300),
        (399, {}, 300),
        (700, {}, 500),
    ],
)
def test_an_error_is_known_by_its_status_then_its_code_or_type_then_its_text(status, error, kind):
    got = classify.outcome_of(status, {}, {"error": error})
    assert got.means == classify.OUTCOMES[kind]
