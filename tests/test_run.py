"""A run from end to end: what is sent, what comes of each answer, what stops it, and how it ends."""

import asyncio
import json
import sys
from dataclasses import replace
from pathlib import Path

import pytest

from classify import FALLBACK, SYSTEM_PROMPT
from tests.conftest import KEY, Desk, clean_environment, numbered
from tests.gateway import Fault, Gateway
from tests.helpers import QUICK, Witness, brisk, run_here, summary, until

QWEN = "qwen2.5-72b-instruct"
MIXED = {
    "a": "My invoice is wrong",
    "b": "The app has a bug",
    "c": "How do I log in?",
    "d": "Please add dark mode, I wish I had it",
    "e": "Hello there",
    "f": "如何申请退款？发票在哪里？",
}


# ---- What is sent, and what comes back


@pytest.mark.parametrize("fresh", [True, False], ids=["in a fresh interpreter", "in a fork"])
async def test_every_ticket_gets_the_label_that_the_gateway_gave_it(desk: Desk, fresh):
    desk.fresh = fresh
    brisk(desk)
    tickets = MIXED | numbered(30) | {f"u{n}": f"a bug, {n}" for n in range(30)}
    desk.write(tickets)
    async with Gateway(QUICK) as gateway:
        done = await desk.run(gateway)
    assert done.status == 0
    assert done.labels == {id_: gateway.replies[body] for id_, body in tickets.items()}
    assert set(done.labels.values()) == {"billing", "bug", "how-to", "feature-request", "other"}


async def test_the_report_begins_with_the_count_the_tokens_and_the_cost(desk: Desk):
    brisk(desk)
    desk.write(numbered(10))
    async with Gateway(replace(QUICK, tokens=(312, 3))) as gateway:
        done = await desk.run(gateway)
    assert summary(done) == ["Classified 10 tickets", "Tokens: 3,120 in / 30 out", "Cost  : $0.0009"]


async def test_a_line_tells_the_label_the_model_the_tokens_and_the_cost(desk: Desk):
    brisk(desk)
    desk.write({"a": "My invoice is wrong"})
    async with Gateway(replace(QUICK, tokens=(312, 3))) as gateway:
        [line] = (await desk.run(gateway)).lines
    assert line.pop("digest")
    assert line.pop("cost_usd") == pytest.approx((312 * 0.27 + 3 * 1.10) / 1e6)
    assert line == {"id": "a", "label": "billing", "model": "deepseek-chat", "tokens_in": 312, "tokens_out": 3}


async def test_the_system_prompt_stands_first_and_is_the_same_bytes_for_every_ticket(desk: Desk):
    brisk(desk)
    desk.write(MIXED)
    async with Witness() as gateway:
        await desk.run(gateway)
    system = {"role": "system", "content": SYSTEM_PROMPT}
    expected = [[system, {"role": "user", "content": body}] for body in MIXED.values()]
    assert sorted(body["messages"][1]["content"] for body in gateway.bodies) == sorted(MIXED.values())
    assert all(body["messages"] in expected for body in gateway.bodies)


async def test_a_request_carries_the_model_the_settings_and_the_key(desk: Desk):
    brisk(desk, MAX_TOKENS=7, EXTRA_BODY={"thinking": {"type": "disabled"}})
    desk.write({"a": "Hello"})
    async with Witness() as gateway:
        await desk.run(gateway)
    [body], [headers] = gateway.bodies, gateway.headers
    del body["messages"]
    assert body == {"model": "deepseek-chat", "max_tokens": 7, "temperature": 0, "thinking": {"type": "disabled"}}
    assert headers["Authorization"] == f"Bearer {KEY}"
    assert headers["Content-Type"] == "application/json"


async def test_no_more_than_concurrency_are_in_flight(desk: Desk):
    brisk(desk, CONCURRENCY=3)
    desk.write(numbered(30))
    async with Gateway(replace(QUICK, latency_s=0.05)) as gateway:
        await desk.run(gateway)
    assert 1 < gateway.max_in_flight <= 3


async def test_an_option_overrides_its_constant_for_one_run(desk: Desk):
    brisk(desk, CONCURRENCY=30)
    desk.write(numbered(10))
    async with Gateway(QUICK) as gateway:
        done = await desk.run(gateway, "--concurrency", "1", "-o", "other.jsonl")
    assert gateway.max_in_flight == 1
    assert not done.output.exists()
    assert len((desk.folder / "other.jsonl").read_bytes().splitlines()) == 10


def test_an_empty_body_is_the_fallback_without_a_call(desk: Desk):
    desk.write({"a": "", "b": " \n\t"})
    done = run_here(desk)
    assert (done.status, done.labels) == (0, {"a": FALLBACK, "b": FALLBACK})
    assert summary(done) == ["Classified 2 tickets", "Tokens: 0 in / 0 out", "Cost  : $0.0000"]


async def test_a_long_body_is_cut_and_the_cuts_are_counted(desk: Desk):
    brisk(desk, MAX_CHARS=20)
    desk.write({"a": "Hello " * 10, "b": "Hello", "c": "y" * 21, "d": "z" * 20})
    async with Gateway(QUICK) as gateway:
        done = await desk.run(gateway)
    assert set(gateway.replies) == {("Hello " * 10)[:20], "Hello", "y" * 20, "z" * 20}
    assert "; 2 are cut at 20 characters" in done.stderr.splitlines()[0]


async def test_a_reply_off_the_list_is_the_fallback_with_the_reply_kept_and_counted(desk: Desk):
    brisk(desk)
    desk.write(numbered(10))
    async with Gateway(replace(QUICK, reply=lambda text: "thank-you" if "number 3." in text else "Bug.")) as gateway:
        done = await desk.run(gateway)
    assert done.status == 0
    assert [line["id"] for line in done.lines if line["label"] == FALLBACK] == ["t3"]
    assert {line["id"]: line["reply"] for line in done.lines}.items() >= {("t3", "thank-you"), ("t4", "Bug.")}
    assert "1 tickets became 'other'" in done.stdout


async def test_chinese_tickets_go_to_the_chinese_model(desk: Desk):
    brisk(desk, CHINESE_MODEL=QWEN)
    desk.write(MIXED)
    async with Witness() as gateway:
        done = await desk.run(gateway)
    asked = {body["messages"][1]["content"]: body["model"] for body in gateway.bodies}
    assert {body for body, model in asked.items() if model == QWEN} == {MIXED["f"]}
    assert {line["id"]: line["model"] for line in done.lines} == {id_: asked[body] for id_, body in MIXED.items()}


async def test_a_model_on_the_command_line_is_asked_for_every_ticket(desk: Desk):
    brisk(desk, CHINESE_MODEL="deepseek-chat")
    desk.write(MIXED)
    async with Witness() as gateway:
        await desk.run(gateway, "--model", QWEN)
    assert [body["model"] for body in gateway.bodies] == [QWEN] * len(MIXED)


async def test_a_limit_takes_the_first_tickets_only(desk: Desk):
    brisk(desk)
    desk.write(numbered(10))
    async with Gateway(QUICK) as gateway:
        done = await desk.run(gateway, "--limit", "3")
    assert (done.status, set(done.labels)) == (0, {"t0", "t1", "t2"})
    assert summary(done)[0] == "Classified 3 tickets"


async def test_a_limit_above_any_number_of_tickets_takes_them_all(desk: Desk):
    brisk(desk)
    desk.write(numbered(3))
    async with Gateway(QUICK) as gateway:
        done = await desk.run(gateway, "--limit", "9" * 30)
    assert (done.status, len(done.labels)) == (0, 3)


async def test_without_a_limit_on_the_pace_every_ticket_is_labelled(desk: Desk):
    desk.write(numbered(40))
    async with Gateway(QUICK) as gateway:
        done = await desk.run(gateway, "--rpm", "0")
    assert (done.status, len(done.labels), gateway.refused) == (0, 40, 0)


async def test_the_address_may_end_before_the_endpoint(desk: Desk):
    brisk(desk)
    desk.write({"a": "Hello"})
    async with Gateway(QUICK) as gateway:
        done = await desk.run(gateway, TOKENHUB_URL=gateway.url.removesuffix("/chat/completions"))
    assert (done.status, gateway.answered) == (0, 1)


# ---- What is refused before anything is sent


@pytest.mark.parametrize(
    ("arguments", "environment", "why"),
    [
        ((), {"TOKENHUB_KEY": ""}, "TOKENHUB_KEY"),
        ((), {"TOKENHUB_KEY": " \n"}, "TOKENHUB_KEY"),
        (("--model", "gpt-9"), {}, "gpt-9.*--budget 0"),
        (("--model", "gpt-9", "--budget", "0.5"), {}, "gpt-9.*--budget 0"),
        (("--concurrency", "0"), {}, "--concurrency"),
        (("--limit", "0"), {}, "--limit"),
        (("--limit", "-3"), {}, "--limit"),
        (("--rpm", "-1"), {}, "--rpm"),
        (("--rpm", "nan"), {}, "--rpm"),
        (("--rpm", "1e-300"), {}, "--rpm"),
        (("--budget", "-1"), {}, "--budget"),
        (("--budget", "nan"), {}, "--budget"),
        (("-o", "nowhere/labels.jsonl"), {}, "nowhere"),
    ],
    ids=str,
)
def test_what_makes_no_sense_is_refused_in_one_line_before_anything_is_sent(desk: Desk, arguments, environment, why):
    desk.write({"a": "Hello"})
    done = run_here(desk, *arguments, **environment)
    assert (done.status, done.stdout) == (2, "")
    [line] = done.stderr.splitlines()
    assert all(part in line for part in why.split(".*"))
    assert not desk.output.exists()


async def test_without_a_key_the_program_says_so_and_exits_2(desk: Desk):
    desk.fresh = True
    desk.write({"a": "Hello"})
    async with Gateway(QUICK) as gateway:
        done = await desk.run(gateway, TOKENHUB_KEY="")
    assert (done.status, gateway.requests) == (2, 0)
    assert "TOKENHUB_KEY" in done.stderr


async def test_a_model_without_a_price_works_without_a_budget_and_is_unpriced(desk: Desk):
    brisk(desk)
    desk.write(numbered(3))
    async with Gateway(QUICK) as gateway:
        done = await desk.run(gateway, "--model", "gpt-9", "--budget", "0")
    assert done.status == 0
    assert summary(done)[2] == "Cost  : unpriced"


# ---- Failures: of a ticket, of the moment, of the run


async def test_refusals_for_the_pace_wait_and_use_no_retry(desk: Desk):
    brisk(desk, MAX_RETRIES=0)
    desk.write(numbered(25))
    async with Gateway(replace(QUICK, rpm=1200, burst=2, retry_after="float")) as gateway:
        done = await desk.run(gateway, within_s=30)
    assert gateway.refused > 0
    assert (done.status, len(done.labels)) == (0, 25)
    assert gateway.billed_twice() == 0


async def test_a_failure_that_may_pass_is_tried_again_so_many_times(desk: Desk):
    brisk(desk, MAX_RETRIES=3)
    desk.write(numbered(2))
    async with Gateway(replace(QUICK, faults=(Fault("status_503", matching="number 0."),))) as gateway:
        done = await desk.run(gateway)
    assert (done.status, set(done.labels), gateway.requests) == (1, {"t1"}, 1 + 4)
    assert "t0" in done.stderr
    assert "503" in done.stderr


async def test_a_bad_request_fails_its_ticket_alone_with_what_the_gateway_said(desk: Desk):
    brisk(desk)
    desk.write(numbered(10))
    async with Gateway(replace(QUICK, faults=(Fault("status_400", matching="number 3."),))) as gateway:
        done = await desk.run(gateway)
    assert (done.status, set(done.labels)) == (1, set(numbered(10)) - {"t3"})
    assert gateway.requests == 10
    [line] = [line for line in done.stderr.splitlines() if "t3" in line]
    assert "invalid_request" in line


async def test_the_report_says_what_this_run_did(desk: Desk):
    brisk(desk)
    desk.write(numbered(10))
    async with Gateway(replace(QUICK, tokens=(312, 3))) as gateway:
        await desk.run(gateway, "--limit", "4")
        gateway.script = replace(gateway.script, faults=(Fault("status_400", matching="number 7."),))
        done = await desk.run(gateway)
    assert "\nThis run: 5 tickets labelled, 1 failed, $0.0004\n" in done.stdout
    assert "\nNot labelled: 1 tickets" in done.stdout
    counts = [line.split() for line in done.stdout.splitlines()[4:9]]
    assert counts == [["billing", "9"], ["bug", "0"], ["how-to", "0"], ["feature-request", "0"], ["other", "0"]]


async def test_a_failed_ticket_gets_no_line_and_is_sent_alone_the_next_time(desk: Desk):
    brisk(desk)
    desk.write(numbered(10))
    async with Gateway(replace(QUICK, faults=(Fault("status_400", matching="number 3."),))) as gateway:
        await desk.run(gateway)
        gateway.script = QUICK
        done = await desk.run(gateway)
    assert (done.status, set(done.labels)) == (0, set(numbered(10)))
    assert gateway.requests == 11


async def test_a_key_that_works_only_after_a_moment_is_forgiven(desk: Desk):
    brisk(desk)
    desk.write(numbered(60))
    async with Gateway(replace(QUICK, key="not this one, yet")) as gateway:
        process = await desk.start(gateway)
        await until(lambda: gateway.requests)
        gateway.script = QUICK
        done = await desk.finish(process)
    assert (done.status, len(done.labels)) == (0, 60)


async def test_a_wrong_key_stops_the_run_after_a_few_requests(desk: Desk):
    brisk(desk, KEY_GRACE_S=0.5, CONCURRENCY=5)
    desk.write(numbered(100))
    async with Gateway(replace(QUICK, key="another")) as gateway:
        done = await desk.run(gateway, within_s=30)
    assert (done.status, done.labels) == (1, {})
    assert gateway.requests <= 20
    assert "401" in done.stderr
    assert "TOKENHUB_KEY" in done.stderr


@pytest.mark.parametrize(
    ("fault", "why"),
    [
        ("status_402", "insufficient_balance"),
        ("status_403", "insufficient_user_quota"),
        ("status_404", "not_found"),
        ("quota_429", "insufficient_quota"),
        ("quota_error_200", "insufficient_quota"),
        ("redirect_307", "/elsewhere"),
    ],
)
async def test_what_no_retry_can_mend_stops_the_run_at_once(desk: Desk, fault, why):
    brisk(desk, CONCURRENCY=2)
    desk.write(numbered(50))
    async with Gateway(replace(QUICK, faults=(Fault(fault, first=11),))) as gateway:
        done = await desk.run(gateway, within_s=30)
    assert (done.status, len(done.labels)) == (1, gateway.answered)
    assert 10 <= gateway.answered < gateway.requests <= 14
    assert "stopped: " in done.stderr
    assert why in done.stderr


async def test_a_model_that_names_no_label_for_its_first_twenty_tickets_stops_the_run(desk: Desk):
    brisk(desk)
    desk.write(numbered(100))
    async with Gateway(replace(QUICK, reply=lambda text: "I think that")) as gateway:
        done = await desk.run(gateway)
    assert done.status == 1
    assert 20 <= gateway.requests < 20 + 40
    assert done.labels == dict.fromkeys(done.labels, FALLBACK)
    assert {line["reply"] for line in done.lines} == {"I think that"}
    assert "I think that" not in done.stdout + done.stderr, "a reply may repeat its ticket"
    assert "0 of the last 20 tickets; see each `reply`" in done.stderr


async def test_a_lucky_first_reply_does_not_switch_the_check_off(desk: Desk):
    brisk(desk, CONCURRENCY=1)
    desk.write({"a": "My invoice is wrong"} | numbered(100))
    async with Gateway(replace(QUICK, reply=lambda text: "bug" if text.startswith("My") else "hm")) as gateway:
        done = await desk.run(gateway)
    assert (done.status, gateway.requests) == (1, 50)
    assert "1 of the last 50 tickets" in done.stderr


async def test_replies_that_name_no_label_from_the_500th_ticket_on_stop_the_run(desk: Desk):
    brisk(desk, CONCURRENCY=4)
    desk.write(numbered(700))
    served = iter(range(10_000))
    script = replace(QUICK, latency_s=0, reply=lambda text: "bug" if next(served) < 500 else "hm")
    async with Gateway(script) as gateway:
        done = await desk.run(gateway)
    assert done.status == 1
    assert 526 <= gateway.requests <= 530
    assert "24 of the last 50 tickets" in done.stderr


async def test_the_chinese_model_is_judged_by_its_own_tickets(desk: Desk):
    brisk(desk, CHINESE_MODEL=QWEN, CONCURRENCY=1)
    tickets = numbered(200)
    desk.write({id_: f"发票 {body}" if n % 5 == 0 else body for n, (id_, body) in enumerate(tickets.items())})
    async with Gateway(replace(QUICK, reply=lambda text: "hm" if text.startswith("发票") else "bug")) as gateway:
        done = await desk.run(gateway)
    assert (done.status, gateway.requests) == (1, 96)  # of which 20 are Chinese
    assert f"{QWEN} named a label for 0 of the last 20 tickets" in done.stderr


async def test_half_of_the_tickets_may_fail_for_ever(desk: Desk):
    brisk(desk, CONCURRENCY=1)
    desk.write(numbered(120))
    async with Gateway(replace(QUICK, faults=(Fault("status_400", every=2),))) as gateway:
        done = await desk.run(gateway)
    assert (done.status, len(done.labels), gateway.requests) == (1, 60, 120)


async def test_failures_from_some_ticket_on_stop_the_run_with_the_last_reason(desk: Desk):
    brisk(desk, CONCURRENCY=1)
    desk.write(numbered(100))
    async with Gateway(replace(QUICK, faults=(Fault("status_400", first=5),))) as gateway:
        done = await desk.run(gateway)
    assert (done.status, len(done.labels), gateway.requests) == (1, 4, 50)
    assert "4 of the last 50 tickets; 400 invalid_request" in done.stderr


IMPOSSIBLE = Fault("status_400", matching="impossible")


async def test_impossible_tickets_keep_no_other_from_being_labelled_in_any_run(desk: Desk):
    brisk(desk)
    tickets = {f"t{n}": f"{'impossible' if n % 11 == 0 and n < 495 else 'possible'} {n}" for n in range(800)}
    possible = {id_ for id_, body in tickets.items() if body.startswith("possible")}
    assert len(tickets) - len(possible) == 45
    async with Gateway(replace(QUICK, latency_s=0, faults=(IMPOSSIBLE,))) as gateway:
        for count in (500, 500, 800):
            desk.write(dict(list(tickets.items())[:count]))
            done = await desk.run(gateway)
            assert done.status == 1
            assert set(done.labels) == possible & set(list(tickets)[:count])
    assert gateway.billed_twice() == 0


async def test_what_failed_before_is_sent_last_and_what_failed_least_before_what_failed_most(desk: Desk):
    brisk(desk, CONCURRENCY=1)
    desk.write({"a": "impossible a", "b": "impossible b", "c": "Hello c"})
    async with Witness(replace(QUICK, faults=(IMPOSSIBLE,))) as gateway:
        await desk.run(gateway)
    desk.write({"a": "impossible a", "d": "impossible d"})
    async with Gateway(replace(QUICK, faults=(IMPOSSIBLE,))) as gateway:
        await desk.run(gateway)
    desk.write({"a": "impossible a", "b": "impossible b", "c": "Hello c", "d": "impossible d", "e": "Hello e"})
    async with Witness(QUICK) as gateway:
        done = await desk.run(gateway)
    assert [body["messages"][1]["content"] for body in gateway.bodies] == [
        "Hello e", "impossible b", "impossible d", "impossible a",
    ]  # fmt: skip
    assert (done.status, len(done.labels)) == (0, 5)


async def test_one_403_for_one_tickets_text_does_not_end_the_run(desk: Desk):
    brisk(desk)
    desk.write(numbered(30))
    async with Gateway(replace(QUICK, faults=(Fault("firewall_403", matching="number 3."),))) as gateway:
        done = await desk.run(gateway)
    assert (done.status, set(done.labels)) == (1, set(numbered(30)) - {"t3"})


# ---- What is shown, and where the key goes


async def test_a_log_file_gets_no_carriage_returns(desk: Desk):
    brisk(desk, MAX_RETRIES=0)
    desk.write(numbered(30))
    async with Gateway(replace(QUICK, faults=(Fault("status_400", every=3),))) as gateway:
        done = await desk.run(gateway)
    assert "\r" not in done.stderr
    assert "\x1b" not in done.stderr


@pytest.mark.parametrize("number", [1, 2])
async def test_a_closed_stdout_or_stderr_ends_no_run(desk: Desk, number: int):
    brisk(desk)
    desk.write(numbered(5) | {"bad": "impossible"})
    async with Gateway(replace(QUICK, faults=(IMPOSSIBLE,))) as gateway:
        url = gateway.url
        command = f"TOKENHUB_URL={url} TOKENHUB_KEY={KEY} {sys.executable} classify.py {number}>&-"
        process = await asyncio.create_subprocess_shell(
            command, cwd=desk.folder, env=clean_environment(),
            stdout=asyncio.subprocess.PIPE, stderr=asyncio.subprocess.PIPE,
        )  # fmt: skip
        out, err = await process.communicate()
    assert process.returncode == 1
    assert len([json.loads(line) for line in desk.output.read_bytes().splitlines()]) == 5
    assert b"Traceback" not in err
    assert b"Classified 5" in out or number == 1


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="needs a device that is always full")
@pytest.mark.parametrize("stream", ["stdout", "stderr"])
async def test_a_stream_that_takes_nothing_ends_no_run(desk: Desk, stream: str):
    brisk(desk)
    desk.write(numbered(5))
    async with Gateway(QUICK) as gateway:
        with Path("/dev/full").open("w") as full:  # noqa: ASYNC230
            streams = {"stdout": asyncio.subprocess.PIPE, "stderr": asyncio.subprocess.PIPE} | {stream: full}
            env = clean_environment() | {"TOKENHUB_URL": gateway.url, "TOKENHUB_KEY": KEY}
            process = await asyncio.create_subprocess_exec(
                sys.executable, "classify.py", cwd=desk.folder, env=env, **streams
            )
            _, err = await process.communicate()
    assert process.returncode == 0
    assert b"Traceback" not in (err or b"")
    assert len(desk.output.read_bytes().splitlines()) == 5
