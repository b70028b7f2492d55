"""What is known before a run, and what is told after it: cost, quality, confidence, what a cache saved."""

import math
import random
import re
from dataclasses import replace
from unittest import mock

import pytest

from classify import LABELS
from tests.conftest import Desk, Done, numbered
from tests.gateway import Gateway
from tests.helpers import QUICK, brisk, run_here, summary

# ---- Before: --dry-run


def test_a_dry_run_sends_nothing_needs_no_key_and_writes_no_file(desk: Desk):
    desk.write(numbered(3))
    before = sorted(desk.folder.iterdir())
    done = run_here(desk, "--dry-run", TOKENHUB_KEY="")
    assert (done.status, done.stderr) == (0, "")
    assert sorted(desk.folder.iterdir()) == before


async def test_a_dry_run_counts_the_tickets_by_what_becomes_of_them(desk: Desk):
    brisk(desk)
    desk.write(numbered(4))
    async with Gateway(QUICK) as gateway:
        await desk.run(gateway)
    new = {"new": "Hello", "same": "Hello", "as before": numbered(4)["t1"]}
    desk.write(numbered(4) | {"t2": "changed"} | new | {"empty": "", "blank": " ", "long": "y" * 12_001})
    shown = run_here(desk, "--dry-run").stdout
    for count in ("3 of 10 tickets to send", "3 are done", "replaces 1 lines", "1 are cut"):
        assert re.search(rf"(?<!\d){count}", shown), count


async def test_a_dry_run_estimates_the_cost_by_each_models_price(desk: Desk):
    brisk(desk, CHINESE_MODEL="qwen2.5-72b-instruct")
    desk.write(numbered(50) | {f"c{n}": f"我的发票金额不对，请尽快帮我处理一下，谢谢。{n}" for n in range(20)})
    async with Gateway(QUICK) as gateway:
        shown = (await desk.run(gateway, "--dry-run")).stdout
        assert gateway.requests == 0
        done = await desk.run(gateway)
    assert done.status == 0
    [usd] = re.findall(r"70 of 70 tickets to send: about \$(\d+\.\d+)", shown)
    assert float(usd) == pytest.approx(sum(x["cost_usd"] for x in done.lines), rel=0.1)


def test_empty_tickets_make_the_others_no_cheaper(desk: Desk):
    few = numbered(20)
    desk.write(few)
    cost = re.search(r"\$[\d.]+", run_here(desk, "--dry-run").stdout)[0]
    desk.write(few | {f"empty {n}": "" for n in range(180)})
    shown = run_here(desk, "--dry-run").stdout
    assert f"20 of 200 tickets to send: about {cost}" in shown


def test_a_dry_run_tells_the_least_time_and_whether_the_budget_will_hold(desk: Desk):
    desk.write(numbered(90))
    shown = run_here(desk, "--dry-run", "--rpm", "60", "--budget", "0.0001").stdout
    assert re.search(r"\b(1\.5 min|0?1:30)\b", shown)
    assert "BUDGET" in shown
    assert "BUDGET" not in run_here(desk, "--dry-run", "--budget", "1").stdout


async def test_a_run_begins_with_the_estimate_in_one_line(desk: Desk):
    brisk(desk)
    desk.write(numbered(3))
    async with Gateway(QUICK) as gateway:
        done = await desk.run(gateway)
    assert done.stderr.startswith("3 of 3 tickets to send: about $0.000")


# ---- After: how the labels compare with those that people gave


def accuracy(done: Done) -> list[float]:
    """Accuracy, the two ends of its interval, and of how many."""
    [line] = [line for line in done.stdout.splitlines() if line.startswith("Accuracy")]
    return [float(number) for number in (*re.findall(r"\d\.\d+", line), *re.findall(r"of (\d+)", line))]


async def evaluated(desk: Desk, gold: list[str], given: list[str], *arguments: str) -> Done:
    """The report where people gave these labels, and the gateway those."""
    bodies = [f"ticket {n}" for n in range(len(gold))]
    desk.write([(f"t{n}", body, gold[n]) for n, body in enumerate(bodies)], header=("id", "body", "label"))
    answers = dict(zip(bodies, given, strict=True))
    async with Gateway(replace(QUICK, reply=answers.__getitem__)) as gateway:
        done = await desk.run(gateway, *arguments)
    assert done.status == 0
    return done


def random_case(seed: int, count: int, labels: list[str], right: float) -> tuple[list[str], list[str]]:
    """Labels of people, unevenly spread, and of a model that is right so often."""
    dice = random.Random(seed)
    gold = [labels[min(int(dice.expovariate(0.8)), len(labels) - 1)] for _ in range(count)]
    return gold, [label if dice.random() < right else dice.choice(list(LABELS)) for label in gold]


@pytest.mark.parametrize(
    "case",
    [
        random_case(1, 150, list(LABELS), 0.7),
        random_case(2, 40, ["bug", "other", "billing"], 0.3),  # some labels without a ticket, or never given
        (["bug"] * 12, ["bug"] * 12),
        (["bug"] * 9, ["billing"] * 9),
    ],
    ids=["usual", "odd", "all right", "all wrong"],
)
async def test_the_accuracy_and_its_interval_are_what_scipy_says(desk: Desk, case):
    from scipy.stats import binomtest  # slow to import, and wanted here only

    gold, given = case
    brisk(desk)
    done = await evaluated(desk, gold, given)
    right, of = sum(map(str.__eq__, gold, given)), len(gold)
    interval = binomtest(right, of).proportion_ci(method="wilson")
    assert accuracy(done) == pytest.approx([right / of, interval.low, interval.high, of], abs=6e-4)


async def test_rows_without_a_label_of_their_own_do_not_count(desk: Desk):
    brisk(desk)
    done = await evaluated(desk, ["bug", "", "bug", "", "other"], ["bug", "bug", "other", "other", "other"])
    assert accuracy(done)[0::3] == [0.667, 3]


async def test_without_labels_of_people_there_is_no_evaluation(desk: Desk):
    brisk(desk)
    done = await evaluated(desk, [""] * 3, ["bug"] * 3)
    assert not re.search("accuracy|precision", done.stdout, re.I)


# ---- After: confidence


async def test_with_logprobs_each_line_has_its_confidence(desk: Desk):
    brisk(desk, LOGPROBS=True)
    desk.write({"a": "My invoice is wrong", "b": "Please add dark mode", "c": "I wish for more", "empty": ""})
    async with Gateway(QUICK) as gateway:
        done = await desk.run(gateway)
    sure = {"billing": math.exp(-0.01), "feature-request": math.exp(-0.03)}  # one token, and three
    lines = [line for line in done.lines if line["id"] != "empty"]
    assert [line["confidence"] for line in lines] == pytest.approx([sure[x["label"]] for x in lines], abs=1e-4)


async def test_without_logprobs_asked_for_no_line_has_a_confidence(desk: Desk):
    brisk(desk)
    desk.write(numbered(3))
    async with Gateway(QUICK) as gateway:
        done = await desk.run(gateway)
    assert "logprobs" not in gateway.seen_body
    assert not any("confidence" in line for line in done.lines)


async def test_a_gateway_that_refuses_logprobs_says_so_in_its_own_words(desk: Desk):
    brisk(desk, LOGPROBS=True)
    desk.write(numbered(60))
    async with Gateway(replace(QUICK, logprobs="refuse")) as gateway:
        done = await desk.run(gateway)
    assert (done.status, done.labels) == (1, {})
    assert gateway.requests < 60
    [stopped] = [line for line in done.stderr.splitlines() if line.startswith("stopped: ")]
    assert "logprobs is not supported" in stopped


async def test_a_gateway_that_ignores_logprobs_gives_labels_without_confidence(desk: Desk):
    brisk(desk, LOGPROBS=True)
    desk.write(numbered(30))
    async with Gateway(replace(QUICK, logprobs="ignore")) as gateway:
        done = await desk.run(gateway)
    assert (done.status, len(done.labels)) == (0, 30)
    assert not any("confidence" in line for line in done.lines)


@pytest.mark.parametrize("logprob", [-(10**400), math.nan, "much", None, {}])
async def test_a_nonsensical_logprob_costs_no_ticket(desk: Desk, logprob):
    brisk(desk, LOGPROBS=True)
    desk.write(numbered(3))
    nonsense = {"content": [{"token": "billing", "logprob": logprob}]}
    with mock.patch("tests.gateway.logprobs_of", return_value=nonsense):
        async with Gateway(QUICK) as gateway:
            done = await desk.run(gateway)
    assert (done.status, done.labels) == (0, dict.fromkeys(numbered(3), "billing"))
    assert gateway.billed_twice() == 0


# ---- After: what the provider's cache saved


@pytest.mark.parametrize("style", ["deepseek", "openai"])
async def test_cached_tokens_are_priced_as_such(desk: Desk, style):
    brisk(desk)
    desk.write(numbered(20))
    async with Gateway(replace(QUICK, tokens=(10_000, 3), cached_tokens=8_000, cached_style=style)) as gateway:
        done = await desk.run(gateway)
    usd = 20 * (2_000 * 0.27 + 8_000 * 0.07 + 3 * 1.10) / 1e6
    assert summary(done) == ["Classified 20 tickets", "Tokens: 200,000 in / 60 out", f"Cost  : ${usd:.4f}"]
    assert all(line["tokens_cached"] == 8_000 for line in done.lines)


@pytest.mark.parametrize(("tokens_out", "said"), [(10, False), (11, True)])
async def test_a_reply_longer_than_was_asked_for_is_said(desk: Desk, tokens_out: int, said: bool):
    brisk(desk)
    desk.write(numbered(2))
    async with Gateway(replace(QUICK, tokens=(312, tokens_out))) as gateway:
        done = await desk.run(gateway)
    assert ("Note: 2 replies were longer than the tokens asked for" in done.stdout) == said
