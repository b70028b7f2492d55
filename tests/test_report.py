"""What is known before a run, and what is told after it: cost, quality, confidence, and what needs a look."""

import math
import re
from dataclasses import replace

import pytest

from classify import wilson
from tests.conftest import Desk, Done, numbered
from tests.gateway import Fault, Gateway
from tests.helpers import QUICK, brisk, run_here, summary

QWEN = "qwen2.5-72b-instruct"


def notes(done: Done) -> list[str]:
    """The lines of the report behind the table of labels."""
    lines = done.stdout.splitlines()
    return lines[next(n for n, line in enumerate(lines) if line.startswith("Labels: ")) :]


def note(done: Done, start: str) -> str:
    """The one line of them that begins so."""
    [line] = [line for line in notes(done) if line.startswith(start)]
    return line


# ---- Before: the plan


def test_a_dry_run_sends_nothing_needs_no_key_and_writes_no_file(desk: Desk):
    desk.write(numbered(3))
    before = sorted(desk.folder.iterdir())
    done = run_here(desk, "--dry-run", TOKENHUB_KEY="")
    assert (done.status, done.stderr) == (0, "")
    assert sorted(desk.folder.iterdir()) == before


async def test_the_plan_counts_the_tickets_by_what_becomes_of_them(desk: Desk):
    brisk(desk)
    desk.write(numbered(4))
    async with Gateway(QUICK) as gateway:
        await desk.run(gateway)
    new = {"new": "Hello", "same": "Hello", "as before": numbered(4)["t1"]}
    desk.write(numbered(4) | {"t2": "changed"} | new | {"empty": "", "blank": " ", "long": "y" * 12_001})
    shown = run_here(desk, "--dry-run").stdout
    assert shown.startswith("10 tickets in tickets.csv: 3 to send to deepseek-chat at 127.0.0.1:")
    for count in ("4 done already", "1 equal to another", "2 without text", "1 ticket cut at 12,000 characters"):
        assert re.search(rf"(?<!\d){count}", shown), count


def test_the_plan_names_the_gateway_as_people_write_it(desk: Desk):
    desk.write({"a": "Hello"})
    shown = run_here(desk, "--dry-run", TOKENHUB_URL="https://api.sandboxclaw.com/v1").stdout
    assert shown.startswith("1 ticket in tickets.csv: 1 to send to deepseek-chat at api.sandboxclaw.com;")


async def test_the_plan_estimates_the_cost_by_each_models_price(desk: Desk):
    brisk(desk, CHINESE_MODEL=QWEN)
    chinese = {f"c{n}": f"我的发票金额不对，请尽快帮我处理一下，谢谢。{n}" for n in range(20)}
    desk.write(numbered(50) | chinese | {f"empty {n}": "" for n in range(50)})
    async with Gateway(QUICK) as gateway:
        shown = (await desk.run(gateway, "--dry-run")).stdout
        assert gateway.requests == 0
        done = await desk.run(gateway)
    assert done.stderr == shown, "a run begins with the same plan"
    assert f"70 to send to deepseek-chat and {QWEN} at" in shown
    [usd] = re.findall(r"^about \$(\d+\.\d+) of the \$2\.00 budget", shown, re.M)
    assert float(usd) == pytest.approx(sum(line["cost_usd"] for line in done.lines), rel=0.1)


def test_the_plan_tells_the_least_time_and_at_which_pace(desk: Desk):
    desk.write(numbered(90))
    for rpm, least in (("60", "1 min 30 s"), ("90", "1 min")):
        shown = run_here(desk, "--dry-run", "--rpm", rpm).stdout
        assert f"at least {least} at {rpm} requests a minute" in shown


async def test_over_the_budget_names_the_sum_that_is_enough(desk: Desk):
    brisk(desk)
    desk.write(numbered(2000))
    shown = run_here(desk, "--dry-run", "--budget", "0.05").stdout
    [enough] = re.findall(r"OVER THE BUDGET: --budget (\d+\.\d\d) is needed", shown)
    assert "OVER" not in run_here(desk, "--dry-run", "--budget", enough).stdout
    desk.write(numbered(60))
    shown = run_here(desk, "--dry-run", "--budget", "0.001").stdout
    [enough] = re.findall(r"--budget (\d+\.\d\d) is needed", shown)
    async with Gateway(QUICK) as gateway:
        done = await desk.run(gateway, "--budget", enough)
    assert done.status == 0


async def test_a_model_without_a_price_says_so_in_plan_and_report(desk: Desk):
    brisk(desk)
    desk.write(numbered(3))
    async with Gateway(QUICK) as gateway:
        done = await desk.run(gateway, "--model", "gpt-9", "--budget", "0")
    assert done.stderr.splitlines()[1].partition(";")[0] == "no price for gpt-9"
    assert summary(done)[2] == "Cost  : unpriced (no price for gpt-9)"
    assert note(done, "Labels: ").endswith(", unpriced")


# ---- After: what one can mail to one's boss


async def test_a_good_run_ends_with_its_labels_its_file_and_what_it_did(desk: Desk):
    brisk(desk)
    bodies = {"billing": "my invoice", "bug": "a crash", "how-to": "how do I"}
    desk.write({f"{label}{n}": f"{body} {n}" for label, body in bodies.items() for n in range(4)} | {"x": "Hello"})
    async with Gateway(replace(QUICK, tokens=(312, 3))) as gateway:
        done = await desk.run(gateway)
    assert done.status == 0
    *report, last = done.stdout.splitlines()
    assert report == [
        "Classified 13 tickets",
        "Tokens: 4,056 in / 39 out",
        "Cost  : $0.0011",
        "",
        "billing                  4   30.8%",
        "bug                      4   30.8%",
        "how-to                   4   30.8%",
        "feature-request          0    0.0%",
        "other                    1    7.7%",
        "",
    ]
    assert re.fullmatch(r"Labels: labels\.jsonl\. This run: 13 labelled, 0 failed, \d s, \$0\.0011", last)


async def test_the_report_says_what_this_run_did_and_what_is_left(desk: Desk):
    brisk(desk)
    desk.write(numbered(10))
    async with Gateway(replace(QUICK, tokens=(312, 3))) as gateway:
        await desk.run(gateway, "--sample", "4")
        left = sorted(set(numbered(10)) - {line["id"] for line in (await desk.run(gateway, "--sample", "4")).lines})
        failing = numbered(10)[left[0]].removeprefix("Hello, my invoice is wrong, see ")
        gateway.script = replace(gateway.script, faults=(Fault("status_400", matching=failing),))
        done = await desk.run(gateway)
    assert " This run: 5 labelled, 1 failed, " in note(done, "Labels: ")
    assert note(done, "Labels: ").endswith(" s, $0.0004")
    assert f"1 ticket ({left[0]}): 400 invalid_request" in done.stdout
    assert notes(done)[-1].startswith("Not labelled: 1 ticket is left. Run the same command")


async def test_counts_tokens_and_cost_are_of_the_same_tickets_and_all_runs_stand_in_a_line_of_their_own(desk: Desk):
    brisk(desk)
    desk.write(numbered(40))
    async with Gateway(replace(QUICK, tokens=(100_000, 3))) as gateway:
        full = await desk.run(gateway)
        sample = await desk.run(gateway, "--sample", "10")
    each = (100_000 * 0.27 + 3 * 1.10) / 1e6
    assert summary(full) == ["Classified 40 tickets", "Tokens: 4,000,000 in / 120 out", f"Cost  : ${40 * each:.4f}"]
    assert summary(sample) == ["Classified 10 tickets", "Tokens: 1,000,000 in / 30 out", f"Cost  : ${10 * each:.4f}"]
    assert "All runs" not in full.stdout
    assert note(sample, "All runs with labels.db: ").startswith(f"All runs with labels.db: ${40 * each:.2f}, $0.81 of ")


async def test_an_answer_with_more_tokens_than_were_asked_for_is_told_and_one_of_a_thing_is_singular(desk: Desk):
    brisk(desk)
    desk.write(numbered(1))
    async with Gateway(replace(QUICK, tokens=(312, 11))) as gateway:
        one = await desk.run(gateway)
        gateway.script = replace(QUICK, tokens=(312, 10))
        desk.write(numbered(2))
        two = await desk.run(gateway)
    assert [summary(done)[0] for done in (one, two)] == ["Classified 1 ticket", "Classified 2 tickets"]
    for done in (one, two):
        assert note(done, "Longer than MAX_TOKENS: ").startswith("Longer than MAX_TOKENS: 1 answer: ")


async def test_what_was_paid_without_an_answer_is_told_with_its_cost(desk: Desk):
    brisk(desk)
    desk.write(numbered(6))
    faults = (Fault("length", first=2, last=3), Fault("null_usage", first=5, last=5))
    async with Gateway(replace(QUICK, tokens=(10_000, 3), faults=faults)) as gateway:
        done = await desk.run(gateway)
    assert note(done, "In vain: ") == "In vain: 2 requests without an answer, at most $0.0054"
    assert note(done, "Estimated: ") == "Estimated: the tokens of 1 request without `usage`"


async def test_what_this_run_failed_is_as_many_as_the_reasons_name(desk: Desk):
    brisk(desk)
    desk.write(numbered(100))
    async with Gateway(replace(QUICK, faults=(Fault("length"),))) as gateway:
        done = await desk.run(gateway)
    [failed] = re.findall(r" This run: 0 labelled, (\d+) failed, ", done.stdout)
    assert re.findall(r"^Failed: (\d+) tickets ", done.stdout, re.M) == [failed]


async def test_why_tickets_failed_is_told_with_those_equal_to_them_and_without_their_words(desk: Desk):
    brisk(desk)
    private = "my account number is 4711 and my dog is Rex"
    desk.write(numbered(3) | {"private": private, "same": private})
    async with Gateway(replace(QUICK, faults=(Fault("echo_400", matching="4711"),))) as gateway:
        done = await desk.run(gateway)
    assert " This run: 3 labelled, 2 failed, " in note(done, "Labels: ")
    assert note(done, "Failed: ") == "Failed: 2 tickets (private, same): 400 invalid_request invalid_request_error"
    assert "4711" not in done.stdout + done.stderr


async def test_a_limit_that_was_found_is_named_as_the_rpm_to_set(desk: Desk):
    desk.edit(BACKOFF_S=0.01)
    desk.write(numbered(60))
    async with Gateway(replace(QUICK, rpm=1200, retry_after="float")) as gateway:
        done = await desk.run(gateway, "--rpm", "6000")
    told = re.fullmatch(r"Limit: (\d+) requests refused; set RPM to about (\d+)", note(done, "Limit: "))
    assert int(told[1]) == gateway.refused
    assert 1000 <= int(told[2]) <= 2400


# ---- After: how the labels compare with those that people gave


async def evaluated(desk: Desk, gold: list[str], given: list[str], *arguments: str) -> Done:
    """The report where people gave these labels, and the gateway those."""
    bodies = [f"ticket {n}" for n in range(len(gold))]
    desk.write([(f"t{n}", body, gold[n]) for n, body in enumerate(bodies)], header=("id", "body", "label"))
    answers = dict(zip(bodies, given, strict=True))
    async with Gateway(replace(QUICK, reply=answers.__getitem__)) as gateway:
        done = await desk.run(gateway, *arguments)
    assert done.status == 0
    return done


def test_the_interval_of_an_accuracy_is_what_scipy_says():
    from scipy.stats import binomtest  # slow to import, and wanted here only

    for right, of in ((12, 12), (0, 9), (13, 40), (104, 150), (1, 1)):
        interval = binomtest(right, of).proportion_ci(method="wilson")
        told = f"{right / of:.3f} (95%: {interval.low:.2f} to {interval.high:.2f}) of {of}"
        assert wilson(right, of) == told


async def test_the_pairs_most_often_confused_are_named_with_tickets_to_look_at(desk: Desk):
    brisk(desk)
    gold = ["billing"] * 5 + ["bug", "bug", "how-to", "other", "bug", "other"]
    given = ["bug"] * 5 + ["billing", "billing", "bug", "how-to", "bug", "other"]
    line = note(await evaluated(desk, gold, given), "Accuracy: ")
    confused = line.partition("; most often confused: ")[2]
    assert line.startswith("Accuracy: 0.182 (95%: ")
    assert " of 11 labels by people; " in line
    assert confused.split("; ") == [
        "billing taken for bug 5 times (t0, t1, t2, ...)",
        "bug taken for billing 2 times (t5, t6)",
        "how-to taken for bug 1 time (t7)",
    ]


async def test_a_gold_label_is_compared_as_a_reply_is_what_is_none_is_counted_and_all_can_be_ignored(desk: Desk):
    brisk(desk)
    done = await evaluated(desk, ["Bug", "", "bugs", "Refunds", "other"], ["bug", "bug", "other", "other", "other"])
    assert re.match(r"Accuracy: 0\.667 .* of 3 labels by people", note(done, "Accuracy: "))
    assert "1 label by people" in note(done, "Left out of the accuracy: ")
    brisk(desk, GOLD_COLUMN=None)
    async with Gateway(QUICK) as gateway:
        ignoring = await desk.run(gateway)
    assert ignoring.status == 0
    assert "ccuracy" not in ignoring.stdout


async def test_with_two_models_cost_and_accuracy_stand_by_model(desk: Desk):
    brisk(desk, CHINESE_MODEL=QWEN)
    rows = [(f"e{n}", f"my invoice {n}", "billing") for n in range(6)]
    rows += [(f"c{n}", f"退款 {n}", "billing" if n else "bug") for n in range(4)]
    desk.write(rows, header=("id", "body", "label"))
    async with Gateway(replace(QUICK, tokens=(100_000, 3))) as gateway:
        done = await desk.run(gateway)
    assert done.status == 0
    assert note(done, "deepseek-chat: ") == ("deepseek-chat: 6 tickets, $0.16, accuracy 1.000 (95%: 0.61 to 1.00) of 6")
    assert note(done, f"{QWEN}: ") == f"{QWEN}: 4 tickets, $0.22, accuracy 0.750 (95%: 0.30 to 0.95) of 4"
    assert re.match(r"Accuracy: 0\.900 .* of 10 labels", note(done, "Accuracy: "))


# ---- After: confidence


async def test_with_logprobs_each_line_has_its_confidence(desk: Desk):
    brisk(desk, LOGPROBS=True)
    desk.write({"a": "My invoice is wrong", "b": "Please add dark mode", "c": "I wish for more", "empty": ""})
    async with Gateway(QUICK) as gateway:
        done = await desk.run(gateway)
    sure = {"billing": math.exp(-0.01), "feature-request": math.exp(-0.03)}  # one token, and three
    lines = [line for line in done.lines if line["id"] != "empty"]
    assert [line["confidence"] for line in lines] == pytest.approx([sure[line["label"]] for line in lines], abs=1e-4)
    assert "Without confidence" not in done.stdout


async def test_logprobs_switched_on_afterwards_says_how_many_lines_have_none(desk: Desk):
    brisk(desk)
    desk.write(numbered(3))
    async with Gateway(QUICK) as gateway:
        await desk.run(gateway)
        desk.write(numbered(5))
        brisk(desk, LOGPROBS=True)
        done = await desk.run(gateway)
    assert note(done, "Without confidence: ").startswith("Without confidence: 3 labels")
    assert sum("confidence" in line for line in done.lines) == 2
