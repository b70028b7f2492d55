"""The budget holds by the gateway's own bill, whatever the tickets, the runs and the failures."""

import random
import re
from dataclasses import replace

import pytest

from classify import PRICES, cost_usd
from tests.conftest import Desk, numbered
from tests.gateway import Fault, Gateway
from tests.helpers import QUICK, brisk, summary

CHEAP = replace(QUICK, latency_s=0.02, jitter=0.5)


def bill_usd(gateway: Gateway) -> float:
    """What the gateway would charge."""
    price_in, price_out, _ = PRICES["deepseek-chat"]
    return (gateway.tokens_in * price_in + gateway.tokens_out * price_out) / 1e6


def uneven(count: int) -> dict[str, str]:
    """Tickets of a few characters, and of some thousands."""
    dice = random.Random(1)
    lengths = [int(10 ** dice.uniform(0.5, 3.8)) for _ in range(count)]
    return {f"t{n}": f"{n} " + ("my invoice, 发票 " * length)[:length] for n, length in enumerate(lengths)}


async def test_the_budget_is_not_passed_over_several_runs_with_forty_in_flight(desk: Desk):
    brisk(desk, CONCURRENCY=40, BUDGET_USD=0.02)
    desk.write(uneven(200))
    async with Gateway(CHEAP) as gateway:
        statuses = [(await desk.run(gateway, within_s=30)).status for _ in range(3)]
    assert statuses == [1, 1, 1]
    assert gateway.max_in_flight > 4
    assert 0.01 < bill_usd(gateway) <= 0.02


@pytest.mark.parametrize("more", [{"max_tokens": 2000}, {"max_tokens": None, "max_completion_tokens": 2000}])
async def test_the_budget_knows_of_more_tokens_that_the_extra_body_asks_for(desk: Desk, more):
    brisk(desk, CONCURRENCY=40, BUDGET_USD=0.02, EXTRA_BODY=more)
    desk.write(numbered(100))
    async with Gateway(replace(CHEAP, tokens=(312, 2000))) as gateway:
        await desk.run(gateway, within_s=30)
    assert 0.002 < bill_usd(gateway) <= 0.02


async def test_a_spent_budget_stops_the_run_and_says_so(desk: Desk):
    brisk(desk)
    desk.write(numbered(50))
    async with Gateway(QUICK) as gateway:
        done = await desk.run(gateway, "--budget", "0.001", within_s=30)
    assert done.status == 1
    assert 0 < len(done.labels) < 50
    assert bill_usd(gateway) <= 0.001
    [line] = [line for line in done.stderr.splitlines() if line.startswith("stopped: ")]
    assert "budget" in line


async def test_a_larger_budget_goes_on_where_the_smaller_one_ended(desk: Desk):
    brisk(desk)
    desk.write(numbered(50))
    async with Gateway(QUICK) as gateway:
        await desk.run(gateway, "--budget", "0.001", within_s=30)
        done = await desk.run(gateway, "--budget", "1")
    assert (done.status, len(done.labels), gateway.billed_twice()) == (0, 50, 0)


@pytest.mark.parametrize(("budget", "length", "least"), [(0.02, 200, 0.97), (0.50, 12_000, 0.95)])
async def test_nearly_all_of_the_budget_is_spent_and_never_more(desk: Desk, budget: float, length: int, least: float):
    brisk(desk, CONCURRENCY=40)
    desk.write({f"t{n}": f"{n} my invoice is wrong ".ljust(length, "x") for n in range(1000)})
    async with Gateway(CHEAP) as gateway:
        done = await desk.run(gateway, "--budget", str(budget), "--rpm", "0")
        assert done.status == 1
        assert least * budget < bill_usd(gateway) <= budget
        assert "no room for another ticket" in done.stderr
        before = gateway.requests
        await desk.run(gateway, "--budget", str(budget), "--rpm", "0")
        assert gateway.requests <= before + 40
        assert bill_usd(gateway) <= budget


async def test_a_504_is_booked_as_perhaps_billed_and_a_connection_that_never_opened_is_not(desk: Desk):
    brisk(desk, MAX_RETRIES=1)
    desk.write(numbered(1))
    async with Gateway(replace(QUICK, faults=(Fault("billed_504"),))) as gateway:
        done = await desk.run(gateway)
    assert "Estimated: 2 requests" in done.stdout
    booked = summary(done)
    done = await desk.run(None, TOKENHUB_URL=f"http://127.0.0.1:{gateway.port}/v1")
    assert done.status == 1
    assert "no connection" in done.stderr
    assert summary(done) == booked


async def test_tokens_far_above_max_tokens_are_booked_and_named(desk: Desk):
    brisk(desk)
    desk.write(numbered(10))
    async with Gateway(replace(QUICK, faults=(Fault("usage_too_large"),))) as gateway:
        done = await desk.run(gateway)
    assert summary(done)[1] == f"Tokens: {gateway.tokens_in:,} in / 50,000 out"
    assert summary(done)[2] == f"Cost  : ${bill_usd(gateway):.4f}"
    assert "10 replies were longer than" in done.stdout


async def test_a_budget_of_nothing_is_no_budget(desk: Desk):
    brisk(desk, BUDGET_USD=0.0000001)
    desk.write(numbered(20))
    async with Gateway(QUICK) as gateway:
        done = await desk.run(gateway, "--budget", "0")
    assert (done.status, len(done.labels)) == (0, 20)


@pytest.mark.parametrize("fault", ["no_usage", "null_usage", "absurd_usage"])
async def test_where_the_gateway_tells_no_usage_it_is_estimated_and_the_report_says_so(desk: Desk, fault):
    brisk(desk)
    tickets = numbered(8)
    desk.write(tickets)
    async with Gateway(replace(QUICK, faults=(Fault(fault, every=2),))) as gateway:
        done = await desk.run(gateway)
    assert (done.status, sum(line.get("estimated", False) for line in done.lines)) == (0, 4)
    assert re.search(r"^Estimated: .*\b4\b", done.stdout, re.M)
    assert sum(line["tokens_in"] for line in done.lines) == pytest.approx(gateway.tokens_in, rel=0.1)


async def test_the_budget_holds_where_the_gateway_tells_no_usage(desk: Desk):
    brisk(desk, BUDGET_USD=0.004)
    desk.write(numbered(100))
    async with Gateway(replace(CHEAP, faults=(Fault("no_usage"),))) as gateway:
        for _ in range(2):
            done = await desk.run(gateway, within_s=30)
    assert (done.status, sum(line["cost_usd"] for line in done.lines) <= 0.004) == (1, True)
    assert 0 < bill_usd(gateway) <= 0.004


@pytest.mark.parametrize("fault", ["content_filter", "no_choices"])
async def test_calls_that_were_billed_in_vain_count(desk: Desk, fault):
    brisk(desk, MAX_RETRIES=1)
    desk.write(numbered(20))
    async with Gateway(replace(QUICK, faults=(Fault(fault, every=3),))) as gateway:
        await desk.run(gateway)
        done = await desk.run(gateway)
    assert summary(done)[1] == f"Tokens: {gateway.tokens_in:,} in / {gateway.tokens_out:,} out"
    assert summary(done)[2] == f"Cost  : ${bill_usd(gateway):.4f}"


@pytest.mark.parametrize("fault", ["content_filter", "no_choices"])
async def test_the_budget_holds_over_calls_that_were_billed_in_vain(desk: Desk, fault):
    brisk(desk, MAX_RETRIES=2, BUDGET_USD=0.003)
    desk.write(numbered(60))
    async with Gateway(replace(CHEAP, faults=(Fault(fault, every=2),))) as gateway:
        for _ in range(2):
            done = await desk.run(gateway, within_s=30)
    assert done.status == 1
    assert 0.001 < bill_usd(gateway) <= 0.003


async def test_equal_tickets_get_the_label_that_was_paid_though_the_budget_is_spent(desk: Desk):
    text = "There is a charge on my invoice"
    desk.write({"a": text, "b": "x" * 12_000, "c": text, "d": text})
    async with Gateway(QUICK) as gateway:
        done = await desk.run(gateway, "--budget", "0.0005", "--concurrency", "1")
    assert (done.status, gateway.requests) == (1, 1)
    assert sorted(done.labels) == ["a", "c", "d"]


def test_the_cost_of_one_token_keeps_its_digits(monkeypatch):
    monkeypatch.setitem(PRICES, "cheap", (0.0375, 0.1, 0.0))
    assert cost_usd("cheap", {"tokens_in": 1, "tokens_out": 0}) == 3.75e-08
    assert cost_usd("cheap", {"tokens_in": 1, "tokens_out": 2}) == 2.375e-07  # not 2.3750000000000003e-07
