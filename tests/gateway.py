"""A scriptable stand-in for token-hub, which answers by keywords: it is no model, and it costs nothing.

In a test, against the real client over a real socket:

    async with Gateway(Script(rpm=6000, faults=(Fault("status_503", every=5),))) as gateway:
        ...  # point the client at gateway.url, then look at gateway.requests, .billed, .replies

In a shell, from the root of the repository, for any command that reads TOKENHUB_URL and TOKENHUB_KEY:

    python -m tests.gateway --rpm 600 --fault status_503:20 --fault status_429_retry:3% -- python classify.py

It can also be one of the real servers, with its rules and its model's manners: --server llama.cpp.
"""

from __future__ import annotations

import argparse
import asyncio
import codecs
import hashlib
import json
import math
import os
import random
import re
import signal
import sys
import time
import zlib
from collections import Counter, deque
from collections.abc import Awaitable, Callable
from contextlib import suppress
from dataclasses import dataclass, field
from email.utils import formatdate

from aiohttp import web

PATH = "/v1/chat/completions"
JSON = "application/json"

# ---- The answer: a label by keywords, and what it costs ------------------------------------------------

KEYWORDS = {
    "billing": "invoice|charge|refund|payment|billing|subscription|发票|退款|扣款|付款|账单",
    "bug": "crash|error|bug|broken|fail|freeze|not work|doesn't work|崩溃|错误|报错|闪退|失败",
    "how-to": "how do|how to|how can|where do|where can|is there a way|如何|怎么|怎样|哪里",
    "feature-request": "feature|please add|would be great|could you add|i wish|suggest|希望|建议|新功能",
}
CHINESE = re.compile(r"[\u3400-\u9fff\uf900-\ufaff]")


def keyword_label(text: str) -> str:
    """Label with the most keywords in the text, else "other"; this is no model and says nothing about one."""
    text = text.lower()
    hits = {label: sum([word in text for word in words.split("|")]) for label, words in KEYWORDS.items()}
    label = max(hits, key=hits.__getitem__)
    return label if hits[label] else "other"


def tokens_of(messages: list[dict]) -> int:
    """Roughly what a tokenizer would count, so that bills have the right size."""
    text = "".join(message["content"] for message in messages)
    chinese = 0 if text.isascii() else len(CHINESE.findall(text))  # the common case is fast
    return round(10 + 0.3 * (len(text) - chinese) + 0.6 * chinese)


def tokens_out_of(content: str) -> int:
    """As tokens_of, of an answer."""
    return max(1, math.ceil(len(content) / 4))


def logprobs_of(content: str) -> dict:
    """The shape of OpenAI's logprobs; the numbers are made up."""
    tokens = ({"token": token, "bytes": list(token.encode())} for token in re.findall(r"\w+|\W+", content))
    return {"content": [token | {"logprob": -0.01, "top_logprobs": []} for token in tokens]}


# ---- The script: what the gateway does, and what goes wrong with it ------------------------------------


@dataclass(frozen=True)
class Fault:
    """Something that goes wrong with some requests: those that meet every condition here."""

    name: str | Handler  # a key of FAULTS, or a handler of one's own, such as says(...) or off_list(...)
    every: int = 1  # 5 = each fifth request, counted from 1
    share: float = 1.0  # 0.03 = 3% of the requests, at random
    first: int = 0  # the first and the last request, by number
    last: float = math.inf
    until_s: float = math.inf  # an outage that ends so long after the gateway's start
    matching: str = ""  # only tickets whose text contains this

    def __post_init__(self) -> None:
        """Refuse a misspelt name at once, since a fault that never happens makes a test pass for nothing."""
        if isinstance(self.name, str) and self.name not in FAULTS:
            raise ValueError(f"no fault is named {self.name!r}; there are: {', '.join(sorted(FAULTS))}")
        if self.every < 1 or not 0 < self.share <= 1:
            raise ValueError("a fault hits every 1st, 2nd, ... request, or a share of more than 0% and at most 100%")

    @property
    def handler(self) -> Handler:
        """What happens instead of the plain answer."""
        return FAULTS[self.name] if isinstance(self.name, str) else self.name

    def hits(self, call: Call, now: float, dice: random.Random) -> bool:
        """Whether it happens to this request."""
        return (
            call.number % self.every == 0
            and self.first <= call.number <= self.last
            and now < self.until_s
            and self.matching in call.text
            and (self.share == 1 or dice.random() < self.share)
        )


@dataclass(frozen=True)
class Script:
    """What the stand-in does; the defaults are token-hub's."""

    rpm: float = 600  # the true limit, requests a minute; 0 = none
    limiter: str = "bucket"  # "bucket", "sliding" or "fixed"
    burst: int = 10  # size of the bucket
    window_s: float = 60.0  # of the other two, which allow rpm * window_s / 60 requests in each window
    counts_refused: bool = False  # True: requests refused by the limiter count against it too, as OpenAI documents
    max_in_flight: int = 0  # above it 429, as DeepSeek does; 0 = no such limit
    servers: int = 0  # requests worked on at once while others queue, as a small local server; 0 = no queue
    frees_aborted: bool = False  # True: who goes away leaves queue and work, and is not billed; else the work goes on

    latency_s: float = 0.4  # to an answer
    jitter: float = 0.0  # 0.3 = latency drawn evenly from 30% below to 30% above
    tail: float = 0.0  # share of answers that take 5 times as long
    refusal_s: float = 0.05  # to a 429 or any other error

    retry_after: str = "seconds"  # "seconds", "float", "ms", "date", "none"; else the header's very value
    tokens: tuple[int, int] | None = None  # billed in and out for each ticket; None = counted from the text
    cached_tokens: int = 0  # of the tokens in
    faults: tuple[Fault, ...] = ()  # the first one that hits is what happens
    key: str | None = None  # any other key gets 401; None = every key is good
    reply: Callable[[str], str] = keyword_label  # text of the ticket -> content of the answer
    server: str = ""  # a key of SERVERS, whose rules are enforced; "" = token-hub, which takes everything
    seed: int = 1

    def __post_init__(self) -> None:
        """Refuse a misspelt server at once, as Fault does."""
        if self.server and self.server not in SERVERS:
            raise ValueError(f"no server is named {self.server!r}; there are: {', '.join(SERVERS)}")


TOKEN_HUB = Script()

# ---- The limiters: each says how long until one more request would be let through ----------------------

# Zero: this one is let through. What they say holds if nobody else asks meanwhile. With `counts_refused` a request that
# is refused counts as one that was let through: who goes on asking faster than the limit is never let in again.


@dataclass
class Bucket:
    """Token bucket: a full one lets a burst through, then requests at the rate at which it fills.

    A refused request that counts takes a token that is not there. The debt is one bucket at most, so that nobody waits
    longer than it takes to pay that back and to earn one token: (size + 1) / per_s.
    """

    per_s: float
    size: int
    counts_refused: bool = False
    level: float = field(init=False)
    filled_at: float = 0.0

    def __post_init__(self) -> None:
        self.level = self.size

    def wait_s(self, now: float) -> float:
        self.level = min(self.size, self.level + (now - self.filled_at) * self.per_s)
        self.filled_at = now
        if self.level < 1 - 1e-9:  # whoever waits exactly as long as told must not fail by a rounding error
            if self.counts_refused:
                self.level = max(-self.size, self.level - 1)
            return (1 - self.level) / self.per_s
        self.level -= 1
        return 0.0


@dataclass
class SlidingWindow:
    """Log of the requests that count: one is let through where fewer than `allowed` did in the last `window_s`.

    Only the last `allowed` of them matter: one more is let through as soon as the oldest of those has left the window.
    """

    allowed: int
    window_s: float
    counts_refused: bool = False
    log: deque[float] = field(default_factory=deque)

    def wait_s(self, now: float) -> float:
        while self.log and self.log[0] + self.window_s <= now:
            self.log.popleft()
        if len(self.log) >= self.allowed:
            if self.counts_refused:
                self.log.popleft()
                self.log.append(now)
            return self.log[0] + self.window_s - now
        self.log.append(now)
        return 0.0


@dataclass
class FixedWindow:
    """Counter that starts anew with each window, so that two bursts can meet at its edge.

    Refused requests that count make it no stricter: a window that is used up lets nobody in anyway, and the next one
    starts at nothing.
    """

    allowed: float
    window_s: float
    counts_refused: bool = False
    window: float = 0
    used: int = 0

    def wait_s(self, now: float) -> float:
        window, elapsed = divmod(now, self.window_s)
        if window != self.window:
            self.window, self.used = window, 0
        is_full = self.used >= self.allowed
        if not is_full or self.counts_refused:
            self.used += 1
        return self.window_s - elapsed if is_full else 0.0


def limiter_for(script: Script) -> Bucket | SlidingWindow | FixedWindow:
    """The script's limiter, unused."""
    if not script.rpm:
        return FixedWindow(math.inf, script.window_s)
    if script.limiter == "bucket":
        return Bucket(script.rpm / 60, script.burst, script.counts_refused)
    allowed = max(1, int(script.rpm * script.window_s / 60 + 1e-9))
    kind = {"sliding": SlidingWindow, "fixed": FixedWindow}[script.limiter]
    return kind(allowed, script.window_s, script.counts_refused)


# ---- The errors ----------------------------------------------------------------------------------------

ERRORS = {  # status: type, code
    400: ("invalid_request_error", "invalid_request"),
    401: ("authentication_error", "invalid_api_key"),
    402: ("billing_error", "insufficient_balance"),
    403: ("permission_error", "insufficient_user_quota"),
    404: ("invalid_request_error", "not_found"),
    405: ("invalid_request_error", "method_not_allowed"),
    408: ("timeout_error", "request_timeout"),
    409: ("conflict_error", "conflict"),
    413: ("invalid_request_error", "request_too_large"),
    422: ("invalid_request_error", "unprocessable_entity"),
    425: ("server_error", "too_early"),
    429: ("rate_limit_error", "rate_limit_exceeded"),
    451: ("content_policy_error", "content_policy_violation"),
    500: ("server_error", "internal_error"),
    502: ("server_error", "upstream_error"),
    503: ("server_error", "service_unavailable"),
    504: ("server_error", "upstream_timeout"),
    520: ("server_error", "unknown_error"),
    529: ("overloaded_error", "overloaded"),
}


def error(status: int, message: str = "", code: str | int | None = None) -> bytes:
    """The body of an error as token-hub words it; a code other than the status's own makes an odd one."""
    kind, usual = ERRORS[status]
    code = usual if code is None else code
    body = {"type": kind, "code": code, "message": message or f"{kind}: {code}"}
    return json.dumps({"error": body}).encode()


def retry_after(form: str, wait_s: float) -> dict[str, str]:
    """The header in any of the forms seen, never shorter than the true wait."""
    if form == "ms":
        return {"retry-after-ms": str(math.ceil(wait_s * 1000))}
    forms = {
        "seconds": str(math.ceil(wait_s)),
        "float": str(math.ceil(wait_s * 1000) / 1000),
        "date": formatdate(math.ceil(time.time() + wait_s), usegmt=True),
    }
    return {} if form == "none" else {"Retry-After": forms.get(form, form)}


async def pause(seconds: float) -> None:
    """Sleep, but not for nothing: a sleep of zero costs a turn of the loop."""
    if seconds > 0:
        await asyncio.sleep(seconds)


async def refuse(
    script: Script, status: int, body: bytes, wait_s: float = 0.0, mime: str = JSON, location: str = ""
) -> web.Response:
    """Answer without working on the request; a wait makes it carry the script's Retry-After."""
    await pause(script.refusal_s)
    headers = retry_after(script.retry_after, wait_s) if wait_s else {}
    if location:
        headers["Location"] = location
    return web.Response(status=status, body=body, content_type=mime, headers=headers)


# ---- The servers: what each real one refuses, when its model thinks, what it holds answers to ----------

# From their source, their documentation, their users' reports, and a run of llama.cpp. The model behind each is
# still keyword_label, with a real one's manners.

THOUGHTS = "Okay, the user sent a ticket about something. Let me see which of the labels fits best. " * 20
THOUGHT_TOKENS = 400


def luck(text: str) -> int:
    """From 0 to 7, always the same for a text."""
    return zlib.crc32(text.encode(errors="replace")) % 8


def answers_of_schema(schema: dict, pretty: bool = True) -> list[str] | None:
    """The answers that a JSON schema leaves: one for each value of its enum; None where it has no such list."""
    layout = {"indent": 2} if pretty else {"separators": (",", ":")}
    match schema:
        case {"enum": list(values)}:
            return [json.dumps(value) for value in values]
        case {"type": "object", "properties": dict(properties)} if len(properties) == 1:
            [(name, inner)] = properties.items()
            return [json.dumps({name: value}, **layout) for value in inner["enum"]] if "enum" in inner else None
    return None


class Refused(Exception):
    """What a server answers instead of working on a request."""

    def __init__(self, status: int, **fields: object) -> None:
        super().__init__(fields["message"])
        self.status, self.body = status, json.dumps({"error": fields}).encode()


def invalid_request(message: str, param: str | None = None, code: str | None = None) -> Refused:
    """A 400 as OpenAI words it, and those who copied it."""
    return Refused(400, message=message, type="invalid_request_error", param=param, code=code)


def unsupported_value(param: str, problem: str) -> Refused:
    """OpenAI's refusal of a field that it knows, but not so."""
    return invalid_request(f"Unsupported value: {problem}", param, "unsupported_value")


NO_MAX_TOKENS = (
    "Unsupported parameter: 'max_tokens' is not supported with this model. Use 'max_completion_tokens' instead.",
    "max_tokens",
    "unsupported_parameter",
)


class Server:
    """A server that takes everything, whose model does not think and is held to nothing."""

    limits: tuple[str, ...] = ("max_tokens",)  # the fields that it reads
    cached_style = ""  # of its usage
    thoughts = ""  # the field of the message in which it shows them
    nothing: str | None = ""  # the content where the thoughts took all tokens
    shows_cut = True  # whether an answer that was cut off is shown as far as it came

    def allowed(self, body: dict) -> list[str] | None:
        """The answers to which the request holds the model, None where to none; raises Refused."""
        schema = self.schema(body)
        return answers_of_schema(schema) if schema else None

    def schema(self, body: dict) -> dict | None:
        """That of `response_format`."""
        match body.get("response_format"):
            case {"type": "json_schema", "json_schema": {"schema": dict(schema)}}:
                return schema
        return None

    def thought_tokens(self, body: dict, text: str) -> int:
        """How long the model thinks before it answers."""
        return 0

    def answer(self, body: dict, text: str, label: str) -> tuple[dict, str, int, int]:
        """The message, its finish_reason, the tokens of it all, and those of the thoughts."""
        allowed = self.allowed(body)
        if allowed is None:  # then a real model says now and then what it likes, though seldom when asked once more
            prose = label if turn_of(body["messages"]) > 1 else f"I think this is about {label}"
            content = {0: prose, 1: "thank-you"}.get(luck(text), label)
        else:
            content = min((answer for answer in allowed if label in answer), key=len, default=allowed[0])
        thought, spoken = self.thought_tokens(body, text), tokens_out_of(content)
        if content.startswith(("{", '"')):  # a small model of llama.cpp wrote 33 characters of JSON with 30 tokens
            spoken = len(content) + 1
        most = min((body[name] for name in self.limits if body.get(name) is not None), default=math.inf)
        finish_reason = "stop" if thought + spoken <= most else "length"
        if finish_reason == "length":
            if thought >= most or not self.shows_cut:
                content, thought, spoken = self.nothing, most, 0
            else:
                room = most - thought
                content, spoken = content[: len(content) * room // spoken], room
        message = {"role": "assistant", "content": content}
        if thought and self.thoughts:
            message[self.thoughts] = THOUGHTS[: 4 * thought]
        return message, finish_reason, thought + spoken, thought


class DeepSeekV4(Server):
    """api.deepseek.com: thinks unless told not to, and has no json_schema."""

    cached_style = "deepseek"
    thoughts = "reasoning_content"

    def allowed(self, body: dict) -> list[str] | None:
        if self.schema(body):
            raise invalid_request("This response_format type is unavailable now", code="invalid_request_error")
        return None

    def thought_tokens(self, body: dict, text: str) -> int:
        return 0 if body.get("thinking") == {"type": "disabled"} else THOUGHT_TOKENS


class OpenAIReasoning(Server):
    """api.openai.com with a model that reasons: refuses by name what it does not know; what is cut off is not shown."""

    limits = ("max_completion_tokens",)
    cached_style = "openai"
    shows_cut = False
    fields = (
        "audio|frequency_penalty|logit_bias|logprobs|max_completion_tokens|max_tokens|messages|metadata|modalities|"
        "model|n|parallel_tool_calls|prediction|presence_penalty|prompt_cache_key|reasoning_effort|response_format|"
        "safety_identifier|seed|service_tier|stop|store|stream|stream_options|temperature|tool_choice|tools|"
        "top_logprobs|top_p|user|verbosity|web_search_options"
    )

    def __init__(self, efforts: tuple[str, ...], default: str) -> None:
        self.efforts, self.default = efforts, default

    def allowed(self, body: dict) -> list[str] | None:
        effort, heat = body.get("reasoning_effort", self.default), body.get("temperature", 1)
        if unknown := sorted(body.keys() - set(self.fields.split("|"))):
            raise invalid_request(f"Unrecognized request argument supplied: {unknown[0]}")
        if "max_tokens" in body:
            raise invalid_request(*NO_MAX_TOKENS)
        if effort not in self.efforts:
            *most, last = (f"'{name}'" for name in self.efforts)
            problem = f"'reasoning_effort' does not support '{effort}' with this model. Supported values are: "
            raise unsupported_value("reasoning_effort", f"{problem}{', '.join(most)}, and {last}.")
        if effort != "none" and heat != 1:
            problem = f"'temperature' does not support {heat} with this model. Only the default (1) value is supported."
            raise unsupported_value("temperature", problem)
        schema = self.schema(body)
        return self.allowed_by(**body["response_format"]["json_schema"]) if schema is not None else None

    def allowed_by(self, schema: dict, name: str = "", strict: bool = False, **_: object) -> list[str] | None:
        """The answers that a schema leaves, where it keeps to the rules; only a strict one holds the model."""
        problem = ""
        if not name:
            where = "response_format.json_schema.name"
            raise invalid_request(f"Missing required parameter: '{where}'.", where, "missing_required_parameter")
        if schema.get("type") != "object":
            problem = f"schema must be a JSON Schema of 'type: \"object\"', got 'type: \"{schema.get('type')}\"'."
        elif strict and schema.get("additionalProperties") is not False:
            problem = "In context=(), 'additionalProperties' is required to be supplied and to be false."
        elif strict and set(schema.get("required", ())) != set(schema["properties"]):
            rule = "is required to be supplied and to be an array including every key in properties."
            problem = f"In context=(), 'required' {rule}"
        elif strict and (untyped := [name for name, inner in schema["properties"].items() if "type" not in inner]):
            problem = f"In context=('properties', '{untyped[0]}'), schema must have a 'type' key."
        if problem:
            raise invalid_request(f"Invalid schema for response_format '{name}': {problem}", "response_format")
        return answers_of_schema(schema, pretty=False) if strict else None

    def thought_tokens(self, body: dict, text: str) -> int:
        match body.get("reasoning_effort", self.default):
            case "none":
                return 0
            case "minimal":  # few or none, and always a multiple of 64
                return {0: 128, 1: 64, 2: 64}.get(luck(text), 0)
        return 7 * 64


class OllamaQwen3(Server):
    """Ollama's /v1 with a model that can think: it does unless told not to; unknown fields are ignored."""

    thoughts = "reasoning"

    def effort(self, body: dict) -> str:
        """As asked for; `think`, which its own API reads, is not read here."""
        effort = (body.get("reasoning") or {}).get("effort") or body.get("reasoning_effort") or ""
        if effort not in ("", "minimal", "low", "medium", "high", "xhigh", "ultra", "max", "none"):
            raise invalid_request(
                f'invalid reasoning value: "{effort}" (must be "minimal", "low", "medium", "high", "xhigh", "ultra", '
                '"max", or "none")'
            )
        return effort

    def allowed(self, body: dict) -> list[str] | None:
        self.effort(body)
        return super().allowed(body)

    def thought_tokens(self, body: dict, text: str) -> int:
        return 0 if self.effort(body) == "none" else THOUGHT_TOKENS


class SelfHosted(Server):
    """What vLLM and llama.cpp have in common: unknown fields are ignored, the chat template says whether to think."""

    limits = ("max_completion_tokens", "max_tokens")

    def __init__(self, can_think: bool = False) -> None:
        self.can_think = can_think

    def thought_tokens(self, body: dict, text: str) -> int:
        told = (body.get("chat_template_kwargs") or {}).get("enable_thinking", True)
        return THOUGHT_TOKENS if self.can_think and told else 0


class VLLM(SelfHosted):
    """vLLM since 0.12; a model that can think stands behind a reasoning parser."""

    thoughts = "reasoning"
    nothing = None

    def allowed(self, body: dict) -> list[str] | None:
        choice = (body.get("structured_outputs") or {}).get("choice")  # `guided_choice` is no field of it any more
        if choice == []:
            raise Refused(400, message="Choice '[]' cannot be empty", type="BadRequestError", param=None, code=400)
        return choice or super().allowed(body)


class LlamaCpp(SelfHosted):
    """llama-server; it takes a grammar to the thoughts as well."""

    thoughts = "reasoning_content"
    string = r'"(?:[^"\\]|\\.)+"'

    def allowed(self, body: dict) -> list[str] | None:
        grammar, form = body.get("grammar"), body.get("response_format") or {}
        if grammar and body.get("json_schema"):
            raise Refused(500, code=500, message="Cannot use both json_schema and grammar", type="server_error")
        if (kind := form.get("type", "text")) not in ("text", "json_object", "json_schema"):
            message = f'response_format type must be one of "text" or "json_object", but got: {kind}'
            raise Refused(400, code=400, message=message, type="invalid_request_error")
        if schema := body.get("json_schema") or self.schema(body):
            return answers_of_schema(schema)
        if not grammar:
            return None
        if not re.fullmatch(rf"root ::= {self.string}( \| {self.string})*", grammar):  # as far as it is understood here
            message = "Failed to initialize samplers: failed to parse grammar"
            raise Refused(400, code=400, message=message, type="invalid_request_error")
        return [json.loads(string) for string in re.findall(self.string, grammar)]

    def answer(self, body: dict, text: str, label: str) -> tuple[dict, str, int, int]:
        message, *rest = super().answer(body, text, label)
        if self.allowed(body) and (thought := self.thought_tokens(body, text)):
            told = body | {"chat_template_kwargs": {"enable_thinking": False}}
            message, finish_reason, tokens, _ = super().answer(told, text, label)
            message |= {"content": "", self.thoughts: message["content"]}
            return message, finish_reason, tokens, min(tokens, thought)
        return message, *rest


SERVERS: dict[str, Server] = {
    "deepseek-v4": DeepSeekV4(),
    "openai-gpt-5": OpenAIReasoning(("minimal", "low", "medium", "high"), "medium"),
    "openai-gpt-5.1": OpenAIReasoning(("none", "low", "medium", "high"), "none"),
    "ollama-qwen3": OllamaQwen3(),
    "vllm": VLLM(),
    "vllm-qwen3": VLLM(can_think=True),
    "llama.cpp": LlamaCpp(),
    "llama.cpp-qwen3": LlamaCpp(can_think=True),
}

# ---- One request ---------------------------------------------------------------------------------------


@dataclass
class Call:
    """One request, and what is known of it: nothing at first, then what it asks, then what came of it."""

    request: web.BaseRequest
    number: int
    asked_at: float = 0.0
    body: dict = field(default_factory=dict)
    text: str = ""  # the ticket's
    turn: int = 0  # 1 where the ticket is asked for the first time, 2 where it is asked once more
    work: dict | None = None  # usage of the work that was done
    sent: bytearray = field(default_factory=bytearray)  # what was written piece by piece


def ticket_of(body: object) -> str:
    """Text of the first message of the user; ValueError where the real one would not understand the request.

    A ticket that is asked once more stands in a longer conversation: system, the ticket, the model's reply, one line.
    """
    match body:
        case {"model": str(model), "messages": [*others, {"role": "user", "content": str()} as last]} if model:
            if all(isinstance(other, dict) and isinstance(other.get("content"), str) for other in others):
                return next(message for message in [*others, last] if message.get("role") == "user")["content"]
    raise ValueError("the request needs a model, and messages of which the last is the user's")


def turn_of(messages: list[dict]) -> int:
    """How many messages are the user's."""
    return sum(message.get("role") == "user" for message in messages)


def is_connected(request: web.BaseRequest) -> bool:
    """Whether the client is still there."""
    return request.transport is not None and not request.transport.is_closing()


async def hand_over(call: Call, response: web.StreamResponse) -> bool:
    """Write the response to its end; whether the client was there to take all of it."""
    with suppress(ConnectionError):
        await response.prepare(call.request)
        await response.write_eof()
    # What does not fit into the socket waits in the transport until the client reads on, or leaves.
    while is_connected(call.request) and call.request.transport.get_write_buffer_size():  # noqa: ASYNC110 - it tells nobody
        await asyncio.sleep(0.001)
    return is_connected(call.request)


# ---- The bill ------------------------------------------------------------------------------------------

MOST_READ = 1 << 20  # bytes of a response; a client need not read on


@dataclass(frozen=True)
class Item:
    """One request on the bill: what it asked, what it cost, what was sent, and how it ended."""

    number: int  # of the request, from 1
    ended: str  # one of ANSWERED, CUT, REFUSED, HUNG
    asked: str = ""  # hash of the whole request; "" where nobody looked into it
    prompt: str = ""  # hash of all of it but the ticket and what follows that
    text: str = ""  # the ticket's
    turn: int = 0  # 2 where the ticket was asked once more
    model: str = ""
    tokens_in: int = 0  # of the work that was done, as the client was told or would have been
    tokens_out: int = 0
    tokens_cached: int = 0  # of those in
    was_told: bool = False  # whether the client could read these tokens in its answer
    reply: str | None = None  # the content of the answer, thoughts and all
    finish_reason: str | None = None
    asked_at: float = 0.0  # time.monotonic
    ended_at: float = 0.0

    @property
    def is_complete(self) -> bool:
        """Whether it is an answer that the client could use: it arrived in whole, says something and was not cut."""
        says_something = bool(self.reply and self.reply.strip())
        return self.ended == ANSWERED and says_something and self.end not in CUT_SHORT | UNFINISHED

    @property
    def end(self) -> str:
        """The finish_reason as it is compared: in capitals, by its class, with a cause behind a colon."""
        name = (self.finish_reason or "").casefold().partition(":")[0]
        return re.sub(r"[^a-z0-9]", "", name).removeprefix("finishreason")


ANSWERED = "answered"  # in whole: a complete response with a choice in it, taken by a client that was still there
CUT = "cut"  # the client left, the connection was lost, or after the work came something that nobody can read
REFUSED = "refused"  # a response without any work
HUNG = "hung"  # no response until the gateway's end
CUT_SHORT = frozenset({"length", "maxtokens", "modellength", "maxnewtokens", "modelcontextwindowexceeded"})
FILTERED = frozenset({"contentfilter", "contentpolicy", "sensitive", "safety", "imagesafety", "recitation", "refusal"})
CALLED_A_TOOL = frozenset({"toolcalls", "tooluse", "functioncall"})
BROKE_OFF = frozenset({"error", "abort", "cancelled", "networkerror", "insufficientsystemresource"})
UNFINISHED = FILTERED | CALLED_A_TOOL | BROKE_OFF
MOST_TOKENS = 10**9  # nobody believes more


def hash_of(value: object) -> str:
    """Stands for a JSON value; the order of its keys does not matter."""
    return hashlib.blake2b(json.dumps(value, sort_keys=True).encode(), digest_size=12).hexdigest()


def asked_of(body: dict) -> dict[str, object]:
    """What a request asks, as an Item has it."""
    messages = body["messages"]
    roles = [message.get("role") for message in messages]
    prompt = body | {"messages": messages[: roles.index("user")]}
    return {"asked": hash_of(body), "prompt": hash_of(prompt), "model": body["model"]}


def tokens_told(usage: object) -> dict[str, int] | None:
    """The tokens of a `usage`; None where it makes no sense. Thoughts may be counted apart, in the total alone."""
    match usage:
        # Nothing but what the total says.
        case {"total_tokens": int(), "completion_tokens": None}:
            return tokens_told(usage | {"completion_tokens": 0})
        case {"prompt_tokens": int(tokens_in), "completion_tokens": int(tokens_out)} if (
            tokens_in > 0 <= tokens_out < MOST_TOKENS
        ):
            total = usage.get("total_tokens")
            tokens_out = max(tokens_out, total - tokens_in if isinstance(total, int) else 0)
            details = usage.get("prompt_tokens_details") or {}
            cached = usage.get("prompt_cache_hit_tokens") or details.get("cached_tokens") or 0
            if isinstance(cached, int) and 0 <= cached <= tokens_in:
                return {"tokens_in": tokens_in, "tokens_out": tokens_out, "tokens_cached": cached}
    return None


def text_of(content: object) -> str | None:
    """The content of a message; where it is a list of parts, the text of those that are text, and no thoughts."""
    match content:
        case str():
            return content
        case {"text": str(text)} if content.get("type", "text") in ("text", "output_text"):
            return text
        case [*parts]:
            return "".join(text_of(part) or "" for part in parts)
    return None


def says_something(value: object) -> bool:
    """Whether anything in it is not empty: some proxies add an `error` of nothing."""
    if isinstance(value, dict | list):
        return any(map(says_something, value.values() if isinstance(value, dict) else value))
    return bool(value)


def answer_in(body: bytes) -> tuple[dict, dict] | None:
    """The answer that a client can read in a response's body, and its first choice; None where there is none."""
    try:
        # A cut within a character costs no more than that character.
        text = body.removeprefix(codecs.BOM_UTF8).decode(errors="replace")
        answer = json.loads(text) if len(body) <= MOST_READ else None
    except (ValueError, RecursionError):
        return None
    match answer:
        case {"choices": [{"message": dict()} as choice, *_]}:
            is_error = says_something(answer.get("error")) or says_something(choice.get("error"))
            return None if is_error else (answer, choice)
    return None


def item_of(call: Call, response: web.StreamResponse | None, was_taken: bool) -> Item:
    """What a request leaves on the bill, by what was really sent: handlers may send what they like."""
    fields = {"number": call.number, "asked_at": call.asked_at, "ended_at": time.monotonic()}
    fields |= {"text": call.text, "turn": call.turn} | (asked_of(call.body) if call.turn else {})
    fields |= tokens_told(call.work) or {}
    if response is None:
        return Item(ended=HUNG, **fields)
    if not was_taken:
        return Item(ended=CUT, **fields)
    body = response.body if isinstance(response, web.Response) else bytes(call.sent)
    read = answer_in(body or b"") if response.status == 200 else None
    if read is None:
        return Item(ended=CUT if call.work else REFUSED, **fields)
    answer, choice = read
    if told := tokens_told(answer.get("usage")):
        fields |= told | {"was_told": True}
    reply, finish_reason = text_of(choice["message"].get("content")), choice.get("finish_reason")
    return Item(ended=ANSWERED, reply=reply, finish_reason=finish_reason, **fields)


# ---- The gateway ---------------------------------------------------------------------------------------


class Gateway:
    """The stand-in, on a loopback port, with a record of what it did; attributes may be read at any time."""

    def __init__(self, script: Script = TOKEN_HUB, port: int = 0) -> None:
        self.port = port
        self.url = self.redirect_to = ""  # both known once it serves; a test may set the second
        self.requests = self.answered = self.refused = self.faulted = 0
        self.in_flight = self.max_in_flight = 0  # requests that have no response yet, now and at most
        self.tokens_in = self.tokens_out = 0
        self.billed: Counter[str] = Counter()
        self.replies: dict[str, str] = {}
        self.events: list[tuple[float, int]] = []  # status 0: nobody was there to take it, or it was cut
        self.bill: list[Item] = []  # in the order in which they ended
        self._script = script
        self._limiter = limiter_for(script)
        self._servers = asyncio.Semaphore(script.servers or sys.maxsize)
        self._random = random.Random(script.seed)
        self._dice = random.Random(script.seed)  # of the faults, which shall not depend on the latency's
        self._admitted = 0
        self._working: set[asyncio.Task] = set()
        self._started = time.perf_counter()

    @property
    def script(self) -> Script:
        """What it does now; may be replaced at any time, and a limit that stays the same keeps its count."""
        return self._script

    @script.setter
    def script(self, new: Script) -> None:
        old, self._script = self._script, new
        names = ("rpm", "limiter", "burst", "window_s", "counts_refused")
        if any(getattr(new, name) != getattr(old, name) for name in names):
            self._limiter = limiter_for(new)
        if new.servers != old.servers:
            self._servers = asyncio.Semaphore(new.servers or sys.maxsize)

    async def __aenter__(self) -> Gateway:
        # A client that goes away does not stop the work, unless the script says so: handler_cancellation stays off.
        self._runner = web.ServerRunner(web.Server(self._handle, access_log=None), shutdown_timeout=0.1)
        await self._runner.setup()
        await web.TCPSite(self._runner, "127.0.0.1", self.port, backlog=1024).start()
        self.port = self._runner.addresses[0][1]
        self.url = f"http://127.0.0.1:{self.port}{PATH}"
        self.redirect_to = self.redirect_to or f"http://127.0.0.1:{self.port}/elsewhere"
        self._started = time.perf_counter()
        return self

    async def __aexit__(self, *_: object) -> None:
        # Requests that hang, or that nobody waits for any more, must not hold up the end.
        for task in self._working:
            task.cancel()
        await asyncio.gather(*self._working, return_exceptions=True)
        await self._runner.cleanup()

    def now(self) -> float:
        """Seconds since the start, the only clock here."""
        return time.perf_counter() - self._started

    async def _handle(self, request: web.BaseRequest) -> web.StreamResponse:
        """Count a request in and out, and put it on the bill."""
        self.requests += 1
        self.in_flight += 1
        self.max_in_flight = max(self.max_in_flight, self.in_flight)
        call = Call(request, self.requests, time.monotonic())
        response, was_taken = None, False
        task = asyncio.current_task()
        self._working.add(task)
        try:
            response = await self._screen(call)
            was_taken = await hand_over(call, response)
        except ConnectionError:  # the client left in the middle of its request, or of the work
            response = web.Response(status=400)
        finally:
            self.in_flight -= 1
            self._working.discard(task)
            self.bill.append(item_of(call, response, was_taken))
        self.events.append((self.now(), response.status if was_taken else 0))
        return response

    async def _screen(self, call: Call) -> web.StreamResponse:
        """Path, key and limits, in the order in which a gateway looks at them."""
        script, request = self._script, call.request
        raw = await request.content.read()
        if (request.method, request.path) != ("POST", PATH):
            return await refuse(script, 404, error(404, f"there is no {request.method} {request.path}"))
        if script.key is not None and request.headers.get("Authorization") != f"Bearer {script.key}":
            return await refuse(script, 401, error(401, "incorrect API key provided"))
        if script.max_in_flight and self._admitted >= script.max_in_flight:
            # Nobody knows when a place gets free: no Retry-After.
            self.refused += 1
            return await refuse(script, 429, error(429, f"more than {script.max_in_flight} at once"))
        if wait_s := self._limiter.wait_s(self.now()):
            self.refused += 1
            return await refuse(script, 429, error(429, f"more than {script.rpm:g} a minute"), wait_s)
        self._admitted += 1
        try:
            return await self._admit(call, raw)
        finally:
            self._admitted -= 1

    async def _admit(self, call: Call, raw: bytes) -> web.StreamResponse:
        """Understand the request, and refuse it or play a fault or answer it."""
        script = self._script
        try:
            body = json.loads(raw)
            call.text = ticket_of(body)
            call.body, call.turn = body, turn_of(body["messages"])
            if script.server:
                SERVERS[script.server].allowed(body)
        except (ValueError, RecursionError) as problem:
            return await refuse(script, 400, error(400, str(problem)))
        except Refused as no:
            return await refuse(script, no.status, no.body)
        now = self.now()
        fault = next((fault for fault in script.faults if fault.hits(call, now, self._dice)), None)
        if fault is None:
            return self.deliver(call, await self.work(call))
        self.faulted += 1
        return await fault.handler(self, call)

    async def work(self, call: Call, slower: float = 1, tokens_out: int | None = None) -> dict:
        """Take the time that an answer takes, bill it, and give its JSON; from here on it is paid for."""
        script = self._script
        await self._take_time(call, slower)
        label = script.reply(call.text)
        if script.server:
            message, finish_reason, tokens, thought = SERVERS[script.server].answer(call.body, call.text, label)
        else:
            message = {"role": "assistant", "content": label}
            finish_reason, tokens, thought = "stop", tokens_out_of(label), 0
        choice = {"index": 0, "message": message, "finish_reason": finish_reason}
        if call.body.get("logprobs"):
            choice["logprobs"] = logprobs_of(message["content"] or "")
        usage = self._bill(call, tokens_out or (script.tokens[1] if script.tokens else tokens))
        if thought:
            usage["completion_tokens_details"] = {"reasoning_tokens": thought}
        return {
            "id": f"chatcmpl-{call.number}",
            "object": "chat.completion",
            "created": int(time.time()),
            "model": call.body["model"],
            "choices": [choice],
            "usage": usage,
        }

    async def _take_time(self, call: Call, slower: float) -> None:
        """Queue for a server, and be worked on; where the script frees what was aborted, ConnectionResetError then."""

        async def queue_and_work() -> None:
            async with self._servers:
                await pause(self._latency(self._script) * slower)

        if not self._script.frees_aborted:
            return await queue_and_work()
        work = asyncio.ensure_future(queue_and_work())
        try:
            while not (await asyncio.wait([work], timeout=0.01))[0]:
                if call.request.transport is None:
                    raise ConnectionResetError("the client has gone")
        finally:
            work.cancel()

    def _latency(self, script: Script) -> float:
        """Time to one answer."""
        slow = 5 if script.tail and self._random.random() < script.tail else 1
        return script.latency_s * slow * (1 + script.jitter * self._random.uniform(-1, 1))

    def _bill(self, call: Call, tokens_out: int) -> dict:
        """Put one answer on the bill, and say so as the provider does."""
        script = self._script
        tokens_in = script.tokens[0] if script.tokens else tokens_of(call.body["messages"])
        self.billed[call.text] += 1
        self.tokens_in += tokens_in
        self.tokens_out += tokens_out
        usage = {"prompt_tokens": tokens_in, "completion_tokens": tokens_out, "total_tokens": tokens_in + tokens_out}
        cached = min(script.cached_tokens, tokens_in)
        match SERVERS[script.server].cached_style if script.server else "deepseek":
            case "openai":
                usage["prompt_tokens_details"] = {"cached_tokens": cached}
            case "deepseek":
                usage |= {"prompt_cache_hit_tokens": cached, "prompt_cache_miss_tokens": tokens_in - cached}
        call.work = usage
        return usage

    def deliver(self, call: Call, answer: dict, mime: str = JSON) -> web.Response:
        """A 200 with this answer in it."""
        self.record(call, answer)
        return web.Response(body=json.dumps(answer).encode(), content_type=mime)

    def record(self, call: Call, answer: dict) -> None:
        """Remember a complete answer, without thoughts, so that a test can compare it with what the client wrote."""
        for choice in answer["choices"]:
            content = text_of((choice.get("message") or {}).get("content"))
            if content and choice.get("finish_reason") in (None, "stop"):
                self.answered += 1
                self.replies[call.text] = content.rpartition("</think>\n\n")[2]

    def billed_twice(self) -> int:
        """How many texts were paid for more than once."""
        return sum(times > 1 for times in self.billed.values())

    def summary(self) -> str:
        """What was served and billed, and what the labels are worth."""
        return (
            f"Served: {self.requests:,} requests, at most {self.max_in_flight} at once\n"
            f"Gave  : {self.answered:,} answers, {self.refused:,} refusals, {self.faulted:,} faults; "
            f"{self.in_flight} unfinished\n"
            f"Billed: {self.tokens_in:,} tokens in / {self.tokens_out:,} out\n"
            f"Texts : {len(self.billed):,} billed, {self.billed_twice():,} of them more than once\n"
            "This stand-in goes by keywords: its labels, and their accuracy, mean nothing."
        )


# ---- The faults: name -> what happens instead of the plain answer --------------------------------------

Handler = Callable[[Gateway, Call], Awaitable[web.StreamResponse]]


def says(status: int, body: bytes, wait_s: float = 0.0, mime: str = JSON) -> Handler:
    """A fixed answer that was never worked on, hence is not billed."""
    return lambda gateway, call: refuse(gateway.script, status, body, wait_s, mime)


def redirects(status: int) -> Handler:
    """A redirect to gateway.redirect_to, where a client must not carry its key."""
    page = b"<html><title>Moved</title><center>nginx</center></html>"
    return lambda gateway, call: refuse(gateway.script, status, page, location=gateway.redirect_to)


def complains(message: Callable[[Call], str]) -> Handler:
    """A 400 that speaks of the request."""
    return lambda gateway, call: refuse(gateway.script, 400, error(400, message(call)))


def answers(changes: dict | None = None, mime: str = JSON, slower: float = 1, tokens_out: int | None = None) -> Handler:
    """The right answer, billed, with some of its fields replaced."""

    async def handler(gateway: Gateway, call: Call) -> web.StreamResponse:
        return gateway.deliver(call, await gateway.work(call, slower, tokens_out) | (changes or {}), mime)

    return handler


NO_REASON = "no finish_reason at all"


def ends(content: str | None, finish_reason: str | None = "stop", counts: bool = False, **more: object) -> Handler:
    """Billed, and says this, with LABEL in place of the label; `counts`: it is an answer though it was cut off."""

    async def handler(gateway: Gateway, call: Call) -> web.StreamResponse:
        answer = await gateway.work(call)
        said = content and content.replace("LABEL", gateway.script.reply(call.text))
        choice = {"index": 0, "message": {"role": "assistant", "content": said}, "finish_reason": finish_reason}
        choice["message"] |= more
        if finish_reason == NO_REASON:
            del choice["finish_reason"]
        if counts:
            gateway.answered += 1
            gateway.replies[call.text] = said.strip()
        return gateway.deliver(call, answer | {"choices": [choice]})

    return handler


def off_list(first: str, again: str = "LABEL") -> Handler:
    """Billed, and says `first`; where the ticket is asked once more, `again`, with LABEL in place of the label."""
    return lambda gateway, call: ends(first if call.turn == 1 else again)(gateway, call)


def serves(body: bytes, status: int = 200, mime: str = JSON) -> Handler:
    """The work is done and billed, and then this very body is sent, whatever it says."""

    async def handler(gateway: Gateway, call: Call) -> web.StreamResponse:
        await gateway.work(call)
        return web.Response(status=status, body=body, content_type=mime)

    return handler


async def send(call: Call, response: web.StreamResponse, data: bytes) -> None:
    """Write without minding that the client has gone: the work goes on, and is billed, all the same."""
    call.sent += data
    with suppress(ConnectionError):
        await response.prepare(call.request)
        await response.write(data)


def cut(call: Call) -> None:
    """Close the connection under the client, if it is still there."""
    if call.request.transport is not None:
        call.request.transport.close()


def breaks_off(chunked: bool) -> Handler:
    """Half an answer, then a closed connection."""

    async def handler(gateway: Gateway, call: Call) -> web.StreamResponse:
        data = json.dumps(await gateway.work(call)).encode()
        response = web.StreamResponse(headers={"Content-Type": JSON})
        response.content_length = None if chunked else len(data)
        await send(call, response, data[: len(data) // 2])
        cut(call)
        return response

    return handler


async def cut_before(gateway: Gateway, call: Call) -> web.StreamResponse:
    """No answer at all, and no work done."""
    await pause(gateway.script.refusal_s)
    cut(call)
    return web.Response(status=500)


async def cut_after(gateway: Gateway, call: Call) -> web.StreamResponse:
    """The right answer on a connection said to stay open, and closed: the next request may hit that."""
    response = gateway.deliver(call, await gateway.work(call))
    response.headers["Connection"] = "keep-alive"
    asyncio.get_running_loop().call_soon(cut, call)  # the answer is written before the loop's next turn
    return response


async def truncated_json(gateway: Gateway, call: Call) -> web.StreamResponse:
    """A whole response that holds half an answer."""
    data = json.dumps(await gateway.work(call)).encode()
    return web.Response(body=data[: len(data) // 2], content_type=JSON)


async def no_usage(gateway: Gateway, call: Call) -> web.StreamResponse:
    """The right answer, without the bill."""
    answer = await gateway.work(call)
    del answer["usage"]
    return gateway.deliver(call, answer)


async def blank_lines(gateway: Gateway, call: Call) -> web.StreamResponse:
    """DeepSeek under load: a second of blank lines, then the right answer."""
    response = web.StreamResponse(headers={"Content-Type": JSON})
    for _ in range(10):
        await send(call, response, b"\n")
        await asyncio.sleep(0.1)
    answer = await gateway.work(call)
    gateway.record(call, answer)
    await send(call, response, json.dumps(answer).encode())
    return response


async def billed_504(gateway: Gateway, call: Call) -> web.StreamResponse:
    """The work is done, and billed, but the answer came too late for somebody on the way."""
    await gateway.work(call)
    return await refuse(gateway.script, 504, error(504))


async def hang(gateway: Gateway, call: Call) -> web.StreamResponse:
    """Never answers; the gateway's end cancels it."""
    await asyncio.Event().wait()
    raise AssertionError("nobody sets this event")


PAGE = b"<html><head><title>Bad Gateway</title></head><body><h1>nginx</h1></body></html>"
FIREWALL = b"<html><head><title>Attention Required!</title></head><body><h1>You have been blocked</h1></body></html>"
RUDE = "\x1b[31mred\x1b[0m \x1b]0;title\x07 over\rwritten \ud800 line\nline"
TOOL_CALL = {"id": "call_1", "type": "function", "function": {"name": "label", "arguments": '{"label": "billing"}'}}
ABSURD = {"prompt_tokens": -5, "completion_tokens": "many", "prompt_cache_hit_tokens": 10**30}

FAULTS: dict[str, Handler] = {
    # Errors, and the same with a Retry-After of one second.
    **{f"status_{status}": says(status, error(status)) for status in ERRORS},
    **{f"status_{status}_retry": says(status, error(status), 1.0) for status in ERRORS},
    "quota_429": says(429, error(429, code="insufficient_quota")),
    "int_code_500": says(500, error(500, code=500)),
    "empty_code_500": says(500, error(500, code="")),
    "string_error_500": says(500, b'{"error": "upstream failed"}'),
    "empty_500": says(500, b""),
    "html_502": says(502, PAGE, mime="text/html"),
    "echo_400": complains(lambda call: f"bad: {call.text} {call.request.headers.get('Authorization')}"),
    "control_400": complains(lambda call: RUDE),
    "firewall_403": says(403, FIREWALL, mime="text/html"),  # says nothing about the key
    "forbidden_403": says(403, error(403, code="permission_denied")),
    "unsupported_parameter_400": says(400, invalid_request(*NO_MAX_TOKENS).body),
    "redirect": redirects(302),
    "redirect_307": redirects(307),
    # 200s without an answer in them.
    "error_200": says(200, error(500)),
    "string_error_200": says(200, b'{"error": "upstream failed"}'),
    "quota_error_200": says(200, error(429, code="insufficient_quota")),
    "html_200": says(200, PAGE, mime="text/html"),
    "empty_200": says(200, b""),
    "blank_200": says(200, b"\n" * 20),
    "not_json_200": says(200, b"billing"),
    "nested_json": says(200, b"[" * 1_000_000),
    # Billed answers that are odd, or of no use.
    "text_plain": answers(mime="text/plain"),
    "slow": answers(slower=10),
    "big_200": answers({"padding": "x" * 2_000_000}),
    "null_usage": answers({"usage": None}),
    "absurd_usage": answers({"usage": ABSURD}),
    "usage_too_large": answers(tokens_out=5000),  # whatever max_tokens was; billed so
    "no_choices": answers({"choices": []}),
    "no_usage": no_usage,
    "billed_504": billed_504,
    "truncated_json": truncated_json,
    "blank_lines": blank_lines,
    # Billed answers that are whole.
    "off_list": ends("thank-you"),
    "no_finish": ends("LABEL", NO_REASON),
    "null_finish": ends("LABEL", None),
    "think": ends("<think>\nThe user asks about billing. Or is it a bug?\n</think>\n\nLABEL"),
    "think_open": ends("The user asks about billing. Or is it a bug?\n</think>\n\nLABEL"),
    "unknown_finish": ends("LABEL", "no_such_reason", counts=True),
    "length_label": ends(" other\n\nTicket: I have a ticket for the", "length", counts=True),
    # Billed answers that are none.
    "null_content": ends(None),
    "length": ends("", "length"),
    "length_unclear": ends("This ticket is from a customer who wants to", "length"),
    "length_two": ends("billing or bug", "length"),
    "think_cut": ends("<think>\nOkay, this is about billing", "length"),
    "content_filter": ends("", "content_filter"),
    "insufficient_system_resource": ends("LABEL", "insufficient_system_resource"),
    "error_finish": ends("LABEL", "error"),
    "tool_calls": ends(None, "tool_calls", tool_calls=[TOOL_CALL]),
    # The connection.
    "truncated": breaks_off(chunked=False),
    "cut_inside": breaks_off(chunked=True),
    "cut_before": cut_before,
    "cut_after": cut_after,
    "hang": hang,
}

# ---- The command line ----------------------------------------------------------------------------------


def two_integers(text: str) -> tuple[int, int]:
    """The value of --tokens."""
    first, second = text.split(",")
    return int(first), int(second)


def fault(text: str) -> Fault:
    """The value of --fault; a wrong name is answered with the right ones."""
    name, _, how_often = text.partition(":")
    try:
        if how_often.endswith("%"):
            return Fault(name, share=float(how_often[:-1]) / 100)
        return Fault(name, every=int(how_often or 1))
    except ValueError as problem:
        raise argparse.ArgumentTypeError(str(problem)) from None


OPTIONS = {  # field of Script: option, type, how its value is shown, help
    "rpm": ("--rpm", float, "N", "requests a minute; 0 = no limit"),
    "burst": ("--burst", int, "N", "size of the bucket"),
    "window_s": ("--window", float, "S", "length of a sliding or fixed window"),
    "max_in_flight": ("--max-in-flight", int, "N", "429 above so many requests at once; 0 = no such limit"),
    "servers": ("--servers", int, "N", "requests worked on at once, the others queue; 0 = no queue"),
    "latency_s": ("--latency", float, "S", "seconds to an answer"),
    "jitter": ("--jitter", float, "X", "0.3 = latency varies by 30%% either way"),
    "tail": ("--tail", float, "X", "share of answers that take 5 times as long"),
    "retry_after": ("--retry-after", str, "FORM", "seconds, float, ms, date, none, or the header's value"),
    "tokens": ("--tokens", two_integers, "IN,OUT", "billed for each ticket, instead of counting"),
    "seed": ("--seed", int, "N", "of the jitter, the tail and the share of faults"),
}


def parse_arguments(arguments: list[str]) -> tuple[Script, int]:
    """The script and the port that the options ask for."""
    parser = argparse.ArgumentParser(
        prog="python -m tests.gateway",
        usage="%(prog)s [OPTIONS] [-- COMMAND ...]",
        description="A stand-in for token-hub that answers by keywords (it is no model): runs COMMAND with "
        "TOKENHUB_URL and TOKENHUB_KEY set, then prints what it served and billed.",
    )
    for name, (option, kind, metavar, about) in OPTIONS.items():
        default = getattr(TOKEN_HUB, name)
        parser.add_argument(option, dest=name, type=kind, metavar=metavar, default=default, help=about)
    parser.add_argument("--limiter", choices=["bucket", "sliding", "fixed"], default=TOKEN_HUB.limiter)
    parser.add_argument("--server", choices=SERVERS, default="", help="a real one, whose rules it keeps")
    parser.add_argument("--counts-refused", action="store_true", help="refused requests count against the limit too")
    parser.add_argument("--frees-aborted", action="store_true", help="who goes away leaves the queue, unbilled")
    parser.add_argument(
        "--fault", dest="faults", type=fault, metavar="NAME[:EVERY|:N%]", action="append", default=[],
        help="something that goes wrong, with each EVERYth request or N%% of them; may be repeated",
    )  # fmt: skip
    parser.add_argument("--port", type=int, metavar="N", default=0, help="0 = a free one")
    settings = vars(parser.parse_args(arguments))
    port = settings.pop("port")
    return Script(**settings | {"faults": tuple(settings["faults"])}), port


async def run_command(gateway: Gateway, command: list[str]) -> int:
    """Serve while the command runs; its exit status is the result, 128+n for signal n."""
    # Both are overridden, so that no real key comes here and no real service is called.
    environment = os.environ | {"TOKENHUB_URL": gateway.url, "TOKENHUB_KEY": "stand-in-key"}
    try:
        process = await asyncio.create_subprocess_exec(*command, env=environment)
    except OSError as problem:
        print(f"tests.gateway: cannot run {command[0]}: {problem}", file=sys.stderr)
        return 127

    def pass_on(*_: object) -> None:
        with suppress(ProcessLookupError):
            process.terminate()

    signal.signal(signal.SIGTERM, pass_on)
    status = await process.wait()
    return status if status >= 0 else 128 - status


async def serve(script: Script, port: int, command: list[str]) -> int:
    """Serve the command, or else whoever comes until interrupted; say what was served."""
    async with Gateway(script, port) as gateway:
        try:
            if command:
                return await run_command(gateway, command)
            print(f"TOKENHUB_URL={gateway.url} TOKENHUB_KEY=stand-in-key", flush=True)
            return await asyncio.Event().wait()
        finally:
            print(gateway.summary(), file=sys.stderr)


def main(arguments: list[str]) -> int:
    """What follows the first -- is the command, whatever it looks like."""
    end = arguments.index("--") if "--" in arguments else len(arguments)
    script, port = parse_arguments(arguments[:end])
    command = arguments[end + 1 :]
    if command:
        # Ctrl-C is the command's to handle. It would inherit SIG_IGN; a Python handler it does not.
        signal.signal(signal.SIGINT, lambda *_: None)
    try:
        return asyncio.run(serve(script, port, command))
    except KeyboardInterrupt:
        return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
