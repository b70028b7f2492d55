"""Every fault of the gateway, once in five requests and for ever: what must happen is a table, and it happens.

Whatever went wrong, the bill must hold.
"""

import asyncio
import re
import tempfile
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path

import pytest

from tests.conftest import KEY, Desk, Done
from tests.gateway import FAULTS, Fault, Gateway, Script
from tests.helpers import side_by_side, until

# ---- The table -----------------------------------------------------------------------------------------

LABELLED, FAILS, STOPS = "labelled", "fails", "stops"
MAY_PASS = {408, 409, 425, 500, 502, 503, 504, 520, 529}
THIS_TICKET = {400, 403, 413, 422, 451}
AFTER_A_WHILE = {401, 404, 405, 429}
EXPECTED = {  # fault: what must happen when it hits one request in five, and when it hits every one
    **{f"status_{status}": (LABELLED, FAILS + STOPS) for status in MAY_PASS},
    **{f"status_{status}": (FAILS, STOPS) for status in THIS_TICKET},  # a sixth alike is not about the tickets
    **{f"status_{status}": (LABELLED, STOPS) for status in AFTER_A_WHILE},  # each answer ends a spell of them
    **dict.fromkeys(("quota_429", "quota_error_200", "redirect", "redirect_307"), (LABELLED, STOPS)),
    **dict.fromkeys(("status_402", "unsupported_parameter_400"), (STOPS, STOPS)),
    **dict.fromkeys(("int_code_500", "empty_code_500", "string_error_500"), (LABELLED, FAILS + STOPS)),
    **dict.fromkeys(("empty_500", "html_502"), (LABELLED, FAILS + STOPS)),
    **dict.fromkeys(("error_200", "string_error_200", "billed_504"), (LABELLED, FAILS + STOPS)),
    **dict.fromkeys(("truncated", "cut_inside", "cut_before", "hang"), (LABELLED, FAILS + STOPS)),
    **dict.fromkeys(("echo_400", "control_400", "firewall_403", "forbidden_403"), (FAILS, STOPS)),
    **dict.fromkeys(("content_filter", "tool_calls"), (FAILS, FAILS)),
    **dict.fromkeys(("html_200", "empty_200", "blank_200", "not_json_200"), (LABELLED, FAILS)),
    **dict.fromkeys(("nested_json", "big_200", "truncated_json"), (LABELLED, FAILS)),
    **dict.fromkeys(("insufficient_system_resource", "error_finish"), (LABELLED, FAILS)),
    **dict.fromkeys(("text_plain", "slow", "blank_lines", "cut_after"), (LABELLED, LABELLED)),
    **dict.fromkeys(("null_usage", "absurd_usage", "no_usage", "usage_too_large"), (LABELLED, LABELLED)),
    **dict.fromkeys(("no_finish", "null_finish", "unknown_finish", "length_label"), (LABELLED, LABELLED)),
    **dict.fromkeys(("think", "think_open", "off_list"), (LABELLED, LABELLED)),
    # one retry, which the fault may hit again
    **dict.fromkeys(("null_content", "length", "length_unclear", "length_two"), (LABELLED + FAILS, FAILS)),
    **dict.fromkeys(("think_cut", "no_choices"), (LABELLED + FAILS, FAILS)),
}
AT_ONCE = {fault for fault, ends in EXPECTED.items() if ends == (STOPS, STOPS)}
# Before the first answer there is no patience with them.
AT_ONCE_FOR_EVER = {"status_404", "status_405", "redirect", "redirect_307"}

# Forms of Retry-After: a wait, none, and one that nobody sits out. What else it may be is a claim of test_kinds.
WAIT, GARBAGE, TOO_LONG = "seconds", "soon", "99999"

ABOUT = ("my invoice is wrong", "the app has a bug", "how do I log in", "please add dark mode", "well")
TICKETS = {f"t{n}": f"Hello, {about}. See number {n}, thanks!" for n, about in enumerate(3 * ABOUT)}
CONCURRENCY = 8
SETTINGS = {
    "TIMEOUT": 8, "MAX_RETRIES": 6, "BACKOFF_S": 0.02, "BACKOFF_MAX_S": 0.1, "RPM": 60_000,
    "GRACE_S": 3, "QUOTA_S": 4, "STUCK_S": 5,
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
        if self.header == TOO_LONG:
            return STOPS
        if self.header == WAIT:  # to be told to wait again and again is to be refused
            once, ever = LABELLED, STOPS
        return ever if self.every == 1 else once

    @property
    def settings(self) -> dict[str, object]:
        """The settings, with fewer retries where they would only take time."""
        is_hopeless = self.every == 1 and self.expected != LABELLED
        few = {"MAX_RETRIES": 2, "GRACE_S": 1, "QUOTA_S": 1, "STUCK_S": 2} if is_hopeless else {}
        return SETTINGS | few | ({"TIMEOUT": 1.0} if self.fault == "hang" else {})

    @property
    def script(self) -> Script:
        fault = Fault(self.fault if self.header is None else f"{self.fault}_retry", every=self.every)
        latency_s = 0.02 if self.fault == "slow" else 0.0
        return Script(rpm=0, latency_s=latency_s, refusal_s=0, retry_after=self.header or "", faults=(fault,))


def headers_with(fault: str) -> tuple[str | None, ...]:
    """Every form where it is one status that waits and one that backs off."""
    if fault in ("status_429", "status_503"):
        return (None, WAIT, GARBAGE, TOO_LONG)
    return (None, WAIT) if fault in ("status_400", "status_401", "status_404", "status_500") else (None,)


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
    """A run of the program, the gateway that it ran against, and the promises of tests/bill.py that it broke."""

    done: Done
    gateway: Gateway
    broken: list[str]

    @property
    def failed(self) -> int:
        """How many tickets failed for good."""
        told = re.search(r" (\d+) failed, ", self.done.stdout)
        return int(told[1]) if told else 0

    @property
    def end(self) -> str:
        if self.done.status is None:
            return "runs on"
        if "\nStopped: " in self.done.stdout:
            return STOPS
        return FAILS if self.failed else LABELLED


async def run_matrix(cases: Iterable[Case], folder: Path, at_once: int = 12) -> dict[Case, Outcome]:
    """All cases to their end, so many at once: most of their time is waiting."""
    outcomes: dict[Case, Outcome] = {}
    waiting = iter(cases)

    async def work() -> None:
        for case in waiting:
            desk = Desk(Path(tempfile.mkdtemp(dir=folder)))
            desk.edit(**case.settings)
            desk.write(TICKETS)
            async with Gateway(case.script) as gateway:
                process = await desk.start(gateway, "--concurrency", str(CONCURRENCY))
                done = await desk.collect(process, within_s=15)
            outcomes[case] = Outcome(done, gateway, desk.audit.broken())

    await asyncio.gather(*(work() for _ in range(at_once)))
    return outcomes


@pytest.fixture(scope="module")
def matrix(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> dict[Case, Outcome]:
    """The outcome of every case of the faults that were selected."""
    specs = [item.callspec.params for item in request.session.items if hasattr(item, "callspec")]
    faults = {spec.get("fault") for spec in specs}
    cases = [case for case in CASES if case.fault in faults]
    return asyncio.run(run_matrix(cases, tmp_path_factory.mktemp("matrix")))


# ---- What must hold ------------------------------------------------------------------------------------


def test_the_table_names_every_fault() -> None:
    assert set(EXPECTED) == {fault for fault in FAULTS if not fault.endswith("_retry")}


@pytest.mark.parametrize("fault", EXPECTED)
def test_every_fault_ends_as_the_table_says(fault: str, matrix: dict[Case, Outcome]) -> None:
    for case, outcome in matrix.items():
        if case.fault == fault:
            check(case, outcome)


def check(case: Case, outcome: Outcome) -> None:
    """What holds beside the bill, whatever went wrong, and what the table says."""
    done, gateway = outcome.done, outcome.gateway
    assert not outcome.broken, case
    assert gateway.faulted, f"{case}: never happened"
    assert outcome.end in case.expected, f"{case}\n{done.stderr}{done.stdout}"
    assert "Traceback" not in done.stderr, f"{case}\n{done.stderr}"
    assert KEY not in done.stdout + done.stderr, case
    left = len(TICKETS) - len(done.labels)
    assert done.status == (1 if left else 0), case
    assert (f"{left} ticket{'s are' if left > 1 else ' is'} left" in done.stdout.splitlines()[-1]) == (left > 0), case
    if outcome.end == FAILS:
        assert left == outcome.failed, case
        # A request that is refused for good is sent once: each fault is one ticket.
        assert EXPECTED[case.fault][0] != FAILS or outcome.failed == gateway.faulted, case
    if case.every == 1 and EXPECTED[case.fault][1] != LABELLED:
        assert not done.labels, case
    is_certain = case.fault in AT_ONCE or (case.every == 1 and case.fault in AT_ONCE_FOR_EVER)
    if case.header == TOO_LONG or (is_certain and case.header != WAIT):
        assert gateway.requests <= case.every + CONCURRENCY, f"{case}: went on after what must stop it"


PATIENT = SETTINGS | {"MAX_RETRIES": 25, "BACKOFF_S": 0.1, "BACKOFF_MAX_S": 0.3, "STUCK_S": 30, "TIMEOUT": 0.5}


async def test_an_outage_of_everything_for_a_while_costs_no_ticket(desk: Desk) -> None:
    desk.edit(**PATIENT)
    desk.write(TICKETS)

    async def one(twin: Desk, fault: str) -> None:
        async with Gateway(Script(rpm=0, latency_s=0, refusal_s=0, faults=(Fault(fault, until_s=0.8),))) as gateway:
            done = await twin.run(gateway)
        assert gateway.faulted, fault
        assert done.status == 0, fault

    faults = ("status_503", "status_429_retry", "quota_429", "cut_before", "hang")
    await side_by_side(desk, [(fault,) for fault in faults], one)


async def test_a_gateway_that_dies_and_comes_back_costs_no_ticket(desk: Desk) -> None:
    desk.edit(**PATIENT)
    desk.write(TICKETS)
    async with Gateway(Script(rpm=0, latency_s=0.05)) as first:
        process = await desk.start(first, "--concurrency", "2")
        await until(lambda: first.answered >= 5)
    await asyncio.sleep(0.5)
    second = Gateway(Script(rpm=0, latency_s=0), first.port)
    desk.audit.gateways.append(second)
    async with second:
        done = await desk.finish(process)
    assert done.status == 0
