"""A run from end to end: what is sent, what comes of each answer, what stops it, and how it ends."""

import asyncio
import io
import json
import sys
from dataclasses import replace
from types import SimpleNamespace

import pytest

import classify
from classify import FALLBACK, SYSTEM_PROMPT
from tests.conftest import KEY, Desk, numbered
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
    assert "2 tickets were cut" in done.stdout


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


async def test_a_model_without_a_price_works_without_a_budget_and_its_cost_is_unknown(desk: Desk):
    brisk(desk)
    desk.write(numbered(3))
    async with Gateway(QUICK) as gateway:
        done = await desk.run(gateway, "--model", "gpt-9", "--budget", "0")
    assert done.status == 0
    assert summary(done)[2].startswith("Cost  : unknown")


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


async def test_twenty_failures_in_a_row_stop_the_run(desk: Desk):
    brisk(desk, CONCURRENCY=1)
    desk.write(numbered(60))
    async with Gateway(replace(QUICK, faults=(Fault("status_400", first=5),))) as gateway:
        done = await desk.run(gateway)
    assert (done.status, len(done.labels)) == (1, 4)
    assert gateway.requests == 4 + 20
    assert "20 tickets in a row" in done.stderr


async def test_twenty_failures_between_successes_do_not_stop_the_run(desk: Desk):
    brisk(desk, CONCURRENCY=1)
    desk.write(numbered(60))
    async with Gateway(replace(QUICK, faults=(Fault("status_400", every=2),))) as gateway:
        done = await desk.run(gateway)
    assert (done.status, len(done.labels), gateway.requests) == (1, 30, 60)


async def test_twenty_first_replies_that_name_no_label_stop_the_run_and_label_nothing(desk: Desk):
    brisk(desk)
    desk.write(numbered(100))
    async with Gateway(replace(QUICK, reply=lambda text: "I think that")) as gateway:
        done = await desk.run(gateway)
        assert (done.status, done.labels) == (1, {})
        assert gateway.requests < 100
        assert "I think that" not in done.stdout + done.stderr, "a reply may repeat its ticket"
        assert "`reply` in labels.jsonl.bak" in done.stderr
        backup = desk.output.with_name("labels.jsonl.bak").read_bytes()
        kept = [json.loads(line)["reply"] for line in backup.splitlines() if line.strip()]
        assert kept == ["I think that"] * gateway.billed.total()
        gateway.script = QUICK
        again = await desk.run(gateway)
    assert again.status == 0
    assert again.labels == dict.fromkeys(numbered(100), "billing")


async def test_nor_do_such_replies_label_the_copies_of_their_tickets(desk: Desk):
    brisk(desk, CONCURRENCY=2)
    twice = [(f"{copy}{id_}", body) for id_, body in numbered(50).items() for copy in "ab"]
    desk.write([*twice, ("empty", "")])
    async with Gateway(replace(QUICK, reply=lambda text: "")) as gateway:
        done = await desk.run(gateway)
    assert (done.status, done.labels) == (1, {})


async def test_twenty_replies_off_the_list_after_a_good_one_do_not_stop_the_run(desk: Desk):
    brisk(desk, CONCURRENCY=1)
    desk.write({"a": "My invoice is wrong"} | numbered(30))
    async with Gateway(replace(QUICK, reply=lambda text: "bug" if text.startswith("My") else "hm")) as gateway:
        done = await desk.run(gateway)
    assert (done.status, len(done.labels)) == (0, 31)


# ---- Signals


# ---- What is shown, and where the key goes


async def test_a_log_file_gets_no_carriage_returns(desk: Desk):
    brisk(desk, MAX_RETRIES=0)
    desk.write(numbered(30))
    async with Gateway(replace(QUICK, faults=(Fault("status_400", every=3),))) as gateway:
        done = await desk.run(gateway)
    assert "\r" not in done.stderr
    assert "\x1b" not in done.stderr


async def test_a_terminal_that_has_gone_does_not_end_the_run(monkeypatch):
    class Gone(io.StringIO):
        def isatty(self) -> bool:
            return True

    def refuse(*_: object) -> None:
        raise OSError("Input/output error")

    monkeypatch.setattr(sys, "stderr", Gone())
    bar = SimpleNamespace(set_postfix_str=lambda *_, **__: None, refresh=refuse)
    this = SimpleNamespace(gateway=SimpleNamespace(pacer=classify.Pacer(600), spent_usd=0.0), failed=0)
    with pytest.raises(TimeoutError):  # it goes on redrawing, each second
        await asyncio.wait_for(classify.show_progress(this, bar), 1.5)
