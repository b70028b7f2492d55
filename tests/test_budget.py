"""The budget holds by the gateway's own bill, whatever the tickets, the runs and the failures (R6).

That it is never passed, and that the ledger is never below the bill, is checked after every test (tests/bill.py).
"""

import random
import re
from dataclasses import replace

import pytest

from classify import PRICES, Usage, cost_usd
from tests.conftest import Desk, Done, numbered
from tests.gateway import Fault, Gateway
from tests.helpers import QUICK, brisk, side_by_side, summary

CHEAP = replace(QUICK, latency_s=0.02, jitter=0.5)


def bill_usd(gateway: Gateway) -> float:
    """What the gateway would charge."""
    price_in, price_out, _ = PRICES["deepseek-chat"]
    return (gateway.tokens_in * price_in + gateway.tokens_out * price_out) / 1e6


def booked_usd(done: Done) -> float:
    """What the ledger has."""
    return sum(row["cost_usd"] for row in done.ledger)


def uneven(count: int) -> dict[str, str]:
    """Tickets of a few characters, and of some thousands."""
    dice = random.Random(1)
    lengths = [int(10 ** dice.uniform(0.5, 3.8)) for _ in range(count)]
    return {f"t{n}": f"{n} " + ("my invoice, 发票 " * length)[:length] for n, length in enumerate(lengths)}


# ---- How far it goes


async def test_the_budget_is_for_all_runs_together_with_forty_in_flight(desk: Desk):
    brisk(desk, CONCURRENCY=40, BUDGET_USD=0.02)
    desk.write(uneven(200))
    async with Gateway(CHEAP) as gateway:
        statuses = [(await desk.run(gateway, within_s=30)).status for _ in range(3)]
    assert statuses == [1, 1, 1]
    assert gateway.max_in_flight > 4
    assert bill_usd(gateway) > 0.01


@pytest.mark.parametrize("more", [{"max_tokens": 2000}, {"max_tokens": None, "max_completion_tokens": 2000}])
async def test_the_budget_knows_of_more_tokens_that_the_extra_body_asks_for(desk: Desk, more: dict):
    brisk(desk, CONCURRENCY=40, BUDGET_USD=0.02, EXTRA_BODY=more)
    desk.write(numbered(100))
    async with Gateway(replace(CHEAP, tokens=(312, 2000))) as gateway:
        await desk.run(gateway, within_s=30)
    assert bill_usd(gateway) > 0.002


async def test_nearly_all_of_the_budget_is_spent(desk: Desk):
    brisk(desk, CONCURRENCY=40)
    desk.write({f"t{n}": f"{n} my invoice is wrong ".ljust(200, "x") for n in range(500)})
    async with Gateway(CHEAP) as gateway:
        for _ in range(2):
            done = await desk.run(gateway, "--budget", "0.02", "--rpm", "0")
            assert done.status == 1
            assert bill_usd(gateway) > 0.97 * 0.02


async def test_a_larger_budget_goes_on_where_the_smaller_one_ended_and_0_is_no_limit(desk: Desk):
    brisk(desk)
    desk.write(numbered(50))
    labelled = 0
    async with Gateway(QUICK) as gateway:
        for budget in ("0.001", "0.002"):
            done = await desk.run(gateway, "--budget", budget)
            assert (done.status, len(done.labels) > labelled) == (1, True)
            labelled = len(done.labels)
            assert done.stdout.splitlines()[-1] == (
                f"Stopped: the budget of ${budget} has no room for another ticket: ${booked_usd(done):.4f} is spent. "
                f"Raise BUDGET_USD or --budget, then run the same command: {50 - labelled} tickets are left."
            )
        assert (await desk.run(gateway, "--budget", "0")).status == 0


async def test_the_plan_sums_what_is_really_to_be_sent(desk: Desk):
    brisk(desk)
    texts = {f"long {n}": f"{n} my invoice " + "x" * 6000 for n in range(4)}
    desk.write(numbered(4) | texts)
    async with Gateway(replace(QUICK, faults=(Fault("status_400", matching="xxx"),))) as gateway:
        await desk.run(gateway)
        plan = (await desk.run(gateway, "--dry-run")).stdout
        assert "8 tickets in tickets.csv: 4 to send" in plan
        said = float(re.search(r"about \$([\d.]+) of", plan)[1])
        before = bill_usd(gateway)
        gateway.script = QUICK
        done = await desk.run(gateway)
    assert done.status == 0
    assert said == pytest.approx(bill_usd(gateway) - before, rel=0.1), "not four times the average"


# ---- What was perhaps billed


async def test_what_hangs_is_booked_at_what_was_reserved_for_it(desk: Desk):
    brisk(desk, TIMEOUT=0.3, MAX_RETRIES=2, STUCK_S=30, BUDGET_USD=0.02, EXTRA_BODY={"max_tokens": 2000})
    desk.write(numbered(20))
    async with Gateway(replace(QUICK, faults=(Fault("hang"),))) as gateway:
        done = await desk.run(gateway, within_s=30)
    worst_usd = 2000 * 1.10 / 1e6
    assert done.status == 1
    assert {row["kind"] for row in done.ledger} == {"timed out"}
    assert len(done.ledger) == gateway.requests
    assert min(row["cost_usd"] for row in done.ledger) > worst_usd
    assert 0.02 - 1.1 * worst_usd < booked_usd(done) <= 0.02
    assert f"In vain: {gateway.requests} requests without an answer, at most $" in done.stdout


async def test_a_504_is_booked_as_perhaps_billed_and_a_connection_that_never_opened_is_not(desk: Desk):
    brisk(desk, MAX_RETRIES=1)
    desk.write(numbered(1))
    async with Gateway(replace(QUICK, faults=(Fault("billed_504"),))) as gateway:
        done = await desk.run(gateway)
    assert "In vain: 2 requests without an answer, at most $0.0" in done.stdout
    booked = summary(done)
    assert booked_usd(done) > bill_usd(gateway)
    done = await desk.run(None, TOKENHUB_URL=f"http://127.0.0.1:{gateway.port}/v1")
    assert done.status == 1
    assert "no connection" in done.stderr
    assert summary(done) == booked


async def test_the_budget_holds_over_answers_that_were_of_no_use(desk: Desk):
    brisk(desk, MAX_RETRIES=2, BUDGET_USD=0.003, CONCURRENCY=4)
    desk.write(numbered(60))

    async def one(twin: Desk, fault: str) -> None:
        async with Gateway(replace(CHEAP, faults=(Fault(fault, every=2),))) as gateway:
            for _ in range(2):
                done = await twin.run(gateway, within_s=30)
        assert done.status == 1, fault
        assert bill_usd(gateway) > 0.001, fault
        assert booked_usd(done) <= 0.003, fault

    faults = ("content_filter", "no_choices", "cut_inside", "no_usage", "off_list")
    await side_by_side(desk, [(fault,) for fault in faults], one)


# ---- What the gateway tells of tokens


async def test_where_the_gateway_tells_no_usage_the_line_says_that_it_is_estimated(desk: Desk):
    brisk(desk)
    desk.write(numbered(8))
    async with Gateway(replace(QUICK, faults=(Fault("no_usage", every=2),))) as gateway:
        done = await desk.run(gateway)
    assert sum(line.get("estimated", False) for line in done.lines) == 4
    assert sum(line["tokens_in"] for line in done.lines) == pytest.approx(gateway.tokens_in, rel=0.1)


def test_the_cost_of_one_token_keeps_its_digits(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setitem(PRICES, "cheap", (0.0375, 0.1, 0.0))
    assert cost_usd("cheap", Usage(1, 0)) == 3.75e-08
    assert cost_usd("cheap", Usage(1, 2)) == 2.375e-07  # not 2.3750000000000003e-07
