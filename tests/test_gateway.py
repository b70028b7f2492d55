"""The stand-in itself, asked by plain requests: its faults, its bill, its queue, and the rules of each real server."""

import asyncio
import json
from contextlib import suppress
from dataclasses import replace
from itertools import pairwise

import aiohttp
import pytest

from tests.gateway import FAULTS, SERVERS, Fault, Gateway, Script, parse_arguments
from tests.helpers import QUICK, until

LABELS = ["billing", "bug", "how-to", "feature-request", "other"]
TICKETS = [f"Hello, {about}, see {n}." for n in range(30) for about in ("my invoice is wrong", "please add dark")]
SCHEMA = {
    "type": "object",
    "properties": {"label": {"type": "string", "enum": LABELS}},
    "required": ["label"],
    "additionalProperties": False,
}
GRAMMAR = "root ::= " + " | ".join(f'"{label}"' for label in LABELS)


def formatted(name: str = "label", **changes: object) -> dict:
    """The response_format with another name or schema."""
    return {"type": "json_schema", "json_schema": {"name": name, "strict": True, "schema": SCHEMA | changes}}


FORMAT = formatted()
CAPPED = {"max_tokens": 10, "temperature": 0}  # as classify.py asks where it is told nothing


async def ask(gateway: Gateway, text: str = TICKETS[0], **body: object) -> tuple[int, dict | str]:
    """Status and JSON, or the text of what is none."""
    messages = [{"role": "system", "content": "Label it."}, {"role": "user", "content": text}]
    body |= {"model": "m", "messages": messages}
    async with aiohttp.ClientSession() as session, session.post(gateway.url, json=body) as response:
        raw = await response.text()
        return response.status, json.loads(raw) if "json" in response.content_type else raw


async def choices_of(server: str, **body: object) -> list[dict]:
    """The first choice of each answer that this server gives to the tickets."""
    async with Gateway(replace(QUICK, server=server, latency_s=0)) as gateway:
        answers = await asyncio.gather(*(ask(gateway, text, **body) for text in TICKETS))
    assert {status for status, _ in answers} == {200}, answers[0]
    return [answer["choices"][0] for _, answer in answers]


async def refusal(server: str, **body: object) -> tuple[int, dict]:
    async with Gateway(replace(QUICK, server=server)) as gateway:
        status, answer = await ask(gateway, **body)
        assert not gateway.billed, "billed what it refused"
    return status, answer["error"]


def contents(choices: list[dict]) -> set[str | None]:
    return {choice["message"]["content"] for choice in choices}


def ends(choices: list[dict]) -> set[str]:
    return {choice["finish_reason"] for choice in choices}


# ---- Faults and their bill -----------------------------------------------------------------------------


async def test_a_share_of_the_requests_fails_at_random_the_same_ones_for_the_same_seed():
    async def statuses(seed: int) -> list[int]:
        async with Gateway(replace(QUICK, latency_s=0, seed=seed, faults=(Fault("status_503", share=0.1),))) as gateway:
            return [(await ask(gateway))[0] for _ in range(300)]

    once, again, other = [await statuses(seed) for seed in (1, 1, 2)]
    assert once == again != other
    assert 12 <= once.count(503) <= 48  # 30 expected; outside of this once in 1,000
    places = [number for number, status in enumerate(once) if status == 503]
    assert len({later - place for place, later in pairwise(places)}) > 3, "as regular as `every`"


async def test_noise_comes_after_the_limit_and_is_counted_apart():
    noise = Fault("status_429_retry", share=0.5)
    async with Gateway(Script(rpm=60, burst=20, latency_s=0, refusal_s=0, faults=(noise,))) as gateway:
        for _ in range(40):
            await ask(gateway)
        assert gateway.refused >= 19
        assert 0 < gateway.faulted < 20
        assert gateway.answered + gateway.faulted + gateway.refused == 40


ODD = {"hang", "absurd_usage", "nested_json", *(fault for fault in FAULTS if fault.startswith("status_"))}


async def test_the_bill_of_every_fault_is_what_its_usage_says():
    async def one(fault: str) -> None:
        async with Gateway(replace(QUICK, latency_s=0, faults=(Fault(fault),))) as gateway:
            answer = None
            with suppress(aiohttp.ClientError, ValueError):
                _, answer = await ask(gateway, **CAPPED)
            await until(lambda: not gateway.in_flight)
        if isinstance(answer, dict) and answer.get("usage"):
            usage = answer["usage"]
            told = (usage["prompt_tokens"], usage["completion_tokens"])
            assert (gateway.tokens_in, gateway.tokens_out) == told, fault
            assert gateway.billed.total() == 1, fault
        elif isinstance(answer, dict) and "error" in answer and fault != "billed_504":
            assert not gateway.billed, fault
        assert bool(gateway.tokens_out) == bool(gateway.billed), fault

    for fault in FAULTS.keys() - ODD:
        await one(fault)


ENDS = {  # of a fault: its finish_reason and content, and whether that counts as an answer
    "no_finish": ("missing", "billing", True),
    "null_finish": (None, "billing", True),
    "unknown_finish": ("no_such_reason", "billing", True),
    "think": ("stop", "<think>\nThe user asks about billing. Or is it a bug?\n</think>\n\nbilling", True),
    "think_open": ("stop", "The user asks about billing. Or is it a bug?\n</think>\n\nbilling", True),
    "length_label": ("length", " other\n\nTicket: I have a ticket for the", True),
    "off_list": ("stop", "thank-you", True),
    "length": ("length", "", False),
    "length_unclear": ("length", "This ticket is from a customer who wants to", False),
    "length_two": ("length", "billing or bug", False),
    "think_cut": ("length", "<think>\nOkay, this is about billing", False),
    "insufficient_system_resource": ("insufficient_system_resource", "billing", False),
    "error_finish": ("error", "billing", False),
    "tool_calls": ("tool_calls", None, False),
}


async def test_an_answer_counts_where_it_is_complete():
    for fault, (finish_reason, content, counts) in ENDS.items():
        async with Gateway(replace(QUICK, faults=(Fault(fault),))) as gateway:
            _, answer = await ask(gateway)
        [choice] = answer["choices"]
        assert (choice.get("finish_reason", "missing"), choice["message"]["content"]) == (finish_reason, content)
        assert gateway.billed.total() == 1, fault
        replies = [content.rpartition("</think>")[2].strip()] if counts else []
        assert list(gateway.replies.values()) == replies, fault


async def test_a_403_may_be_a_firewalls_and_a_400_may_be_about_every_request():
    faults = (Fault("firewall_403", last=1), Fault("forbidden_403", last=2), Fault("unsupported_parameter_400"))
    async with Gateway(replace(QUICK, faults=faults)) as gateway:
        assert (await ask(gateway))[1].startswith("<html>")
        status, answer = await ask(gateway)
        assert (status, answer["error"]["code"]) == (403, "permission_denied")
        status, answer = await ask(gateway)
        assert (status, answer["error"]["code"]) == (400, "unsupported_parameter")


# ---- The queue -----------------------------------------------------------------------------------------


@pytest.mark.parametrize("frees", [False, True])
async def test_the_work_of_a_client_that_went_away_goes_on_or_is_freed(frees: bool):
    async with Gateway(replace(QUICK, servers=1, latency_s=0.15, frees_aborted=frees)) as gateway:
        worked_on = asyncio.create_task(ask(gateway, "worked on"))
        await until(lambda: gateway.in_flight == 1)
        queued = asyncio.create_task(ask(gateway, "queued"))
        await until(lambda: gateway.in_flight == 2)
        worked_on.cancel()
        queued.cancel()
        await asyncio.gather(worked_on, queued, return_exceptions=True)
        status, _ = await ask(gateway, "patient")
        assert status == 200
        assert set(gateway.billed) == ({"patient"} if frees else {"worked on", "queued", "patient"})
        assert gateway.in_flight == 0


# ---- The servers ---------------------------------------------------------------------------------------


async def test_deepseek_v4_thinks_unless_told_not_to_and_takes_no_schema():
    thinking = await choices_of("deepseek-v4", **CAPPED)
    assert (contents(thinking), ends(thinking)) == ({""}, {"length"})
    assert thinking[0]["message"]["reasoning_content"]
    told = await choices_of("deepseek-v4", **CAPPED, thinking={"type": "disabled"})
    assert {"billing", "thank-you"} <= contents(told)
    assert ends(told) == {"stop"}
    status, error = await refusal("deepseek-v4", thinking={"type": "disabled"}, response_format=FORMAT)
    assert (status, error["message"]) == (400, "This response_format type is unavailable now")


GPT_5 = {"max_completion_tokens": 200, "reasoning_effort": "minimal"}


REFUSED_BY_GPT_5 = [  # what is changed, and the parameter and the code of the error
    ({"max_tokens": 10}, "max_tokens", "unsupported_parameter"),
    ({"temperature": 0}, "temperature", "unsupported_value"),
    ({"reasoning_effort": "none"}, "reasoning_effort", "unsupported_value"),
    ({"thinking": {"type": "disabled"}}, None, None),
    ({"response_format": formatted("")}, "response_format.json_schema.name", "missing_required_parameter"),
    ({"response_format": formatted(type="string")}, "response_format", None),
    ({"response_format": formatted(additionalProperties=True)}, "response_format", None),
    ({"response_format": formatted(required=[])}, "response_format", None),
    ({"response_format": formatted(properties={"label": {"enum": LABELS}})}, "response_format", None),
]


async def test_gpt_5_refuses_by_name_what_it_does_not_take():
    for changes, param, code in REFUSED_BY_GPT_5:
        status, error = await refusal("openai-gpt-5", **GPT_5 | changes)
        told = (status, error["type"], error["param"], error["code"])
        assert told == (400, "invalid_request_error", param, code), changes


async def test_gpt_5_spends_its_tokens_on_thoughts_and_shows_nothing_of_what_is_cut():
    assert contents(await choices_of("openai-gpt-5", max_completion_tokens=200)) == {""}
    assert contents(await choices_of("openai-gpt-5", **GPT_5 | {"max_completion_tokens": 10})) >= {"", "billing"}
    enough = await choices_of("openai-gpt-5", **GPT_5)
    assert ends(enough) == {"stop"}
    assert contents(await choices_of("openai-gpt-5.1", max_completion_tokens=10, temperature=0)) >= {"billing"}
    held = await choices_of("openai-gpt-5", **GPT_5, response_format=FORMAT)
    assert contents(held) <= {f'{{"label":"{label}"}}' for label in LABELS}


async def test_ollama_thinks_unless_told_so_in_its_own_words():
    for ignored in ({}, {"think": False}, {"thinking": {"type": "disabled"}}, {"reasoning_effort": "minimal"}):
        choices = await choices_of("ollama-qwen3", **CAPPED, **ignored)
        assert (contents(choices), ends(choices)) == ({""}, {"length"})
        assert choices[0]["message"]["reasoning"]
    assert ends(await choices_of("ollama-qwen3", **CAPPED, reasoning_effort="none")) == {"stop"}
    status, error = await refusal("ollama-qwen3", reasoning_effort="off")
    assert (status, error["type"], error["code"]) == (400, "invalid_request_error", None)
    held = {"reasoning_effort": "none", "response_format": FORMAT}
    assert ends(await choices_of("ollama-qwen3", **held, max_tokens=20)) == {"length"}
    whole = contents(await choices_of("ollama-qwen3", **held, max_tokens=40))
    assert {json.loads(content)["label"] for content in whole} <= set(LABELS)


async def test_vllm_ignores_what_it_does_not_know_any_more():
    assert "thank-you" in contents(await choices_of("vllm", **CAPPED, guided_choice=LABELS))
    held = {"structured_outputs": {"choice": LABELS}}
    assert contents(await choices_of("vllm", **CAPPED, **held)) <= set(LABELS)
    thinking = await choices_of("vllm-qwen3", **CAPPED, **held)
    assert (contents(thinking), ends(thinking)) == ({None}, {"length"})
    told = {"chat_template_kwargs": {"enable_thinking": False}}
    assert contents(await choices_of("vllm-qwen3", **CAPPED, **held, **told)) <= set(LABELS)


async def test_llama_cpp_holds_the_answer_to_a_grammar_and_the_thoughts_as_well():
    assert "thank-you" in contents(await choices_of("llama.cpp", **CAPPED, structured_outputs={"choice": LABELS}))
    assert contents(await choices_of("llama.cpp", **CAPPED, grammar=GRAMMAR)) <= set(LABELS)
    quoted = {f'"{label}"' for label in LABELS}
    assert contents(await choices_of("llama.cpp", max_tokens=20, json_schema={"enum": LABELS})) <= quoted
    assert contents(await choices_of("llama.cpp", max_tokens=2, grammar='root ::= "feature-request"')) == {"feature"}
    thinking = await choices_of("llama.cpp-qwen3", **CAPPED, grammar=GRAMMAR)
    assert (contents(thinking), ends(thinking)) == ({""}, {"stop"})
    told = {"chat_template_kwargs": {"enable_thinking": False}}
    assert contents(await choices_of("llama.cpp-qwen3", **CAPPED, grammar=GRAMMAR, **told)) <= set(LABELS)
    for status, wrong in (
        (400, {"grammar": "root = ("}),
        (400, {"response_format": {"type": "xml"}}),
        (500, {"grammar": GRAMMAR, "json_schema": SCHEMA}),
    ):
        assert (await refusal("llama.cpp", **wrong))[1]["code"] == status


async def test_what_a_server_bills_is_thoughts_and_answer_up_to_the_limit():
    for server in SERVERS:
        body = GPT_5 if server.startswith("openai-gpt-5") else CAPPED
        body = body | {"reasoning_effort": "low"} if server == "openai-gpt-5.1" else body
        async with Gateway(replace(QUICK, server=server)) as gateway:
            _, answer = await ask(gateway, **body)
            usage = answer["usage"]
            assert usage["completion_tokens"] == gateway.tokens_out <= body.get("max_tokens", 200)
            thoughts = usage.get("completion_tokens_details", {}).get("reasoning_tokens", 0)
            assert thoughts <= usage["completion_tokens"]
            assert bool(gateway.replies) == (answer["choices"][0]["finish_reason"] == "stop")


# ---- Misspelt names ------------------------------------------------------------------------------------


def test_a_misspelt_fault_or_server_or_share_is_refused_at_once():
    for wrong in ({"name": "status_599"}, {"name": "hang", "share": 1.5}, {"name": "hang", "every": 0}):
        with pytest.raises(ValueError, match="fault"):
            Fault(**wrong)
    with pytest.raises(ValueError, match=r"llama\.cpp"):
        Script(server="llama")


def test_the_command_line_takes_shares_servers_and_what_becomes_of_aborted_work():
    options = ["--fault", "status_429_retry:3%", "--fault", "hang:200", "--server", "vllm", "--frees-aborted"]
    script, _ = parse_arguments(options)
    assert script.faults == (Fault("status_429_retry", share=0.03), Fault("hang", every=200))
    assert (script.server, script.frees_aborted) == ("vllm", True)
