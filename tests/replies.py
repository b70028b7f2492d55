"""What a test lets its gateway send: responses of any shape, the right answer with changes, one after the other."""

import itertools
import json
from collections import defaultdict
from collections.abc import Callable, Iterable
from dataclasses import replace

from aiohttp import web

from tests.gateway import JSON, Call, Gateway, Handler, pause
from tests.helpers import QUICK

# A plain answer has 300 tokens in, 2 out, and says "bug".
PLAIN = replace(QUICK, latency_s=0.0, tokens=(300, 2), reply=lambda text: "bug")
NEVER = 1_000_000  # a number that is not reached
# Refusals hold nobody but their own ticket, and that shortly.
QUICK_PACE = {"HOLD_S": 0.05, "OUTAGE": NEVER, "ALARM": NEVER}

# ---- Responses -----------------------------------------------------------------------------------------


def sends(status: int = 200, body: object = b"", *, mime: str = JSON, **headers: str) -> Handler:
    """This very response, without any work; what is no bytes is sent as JSON."""
    raw = body if isinstance(body, bytes) else json.dumps(body).encode()
    named = {name.replace("_", "-"): value for name, value in headers.items()}

    async def handler(gateway: Gateway, call: Call) -> web.Response:
        await pause(gateway.script.refusal_s)
        return web.Response(status=status, body=raw, content_type=mime, headers=named)

    return handler


def answers(
    change: Callable[[dict], object] = dict, *, start: bytes = b"", end: int | None = None, mime: str = JSON
) -> Handler:
    """The right answer, which is billed, after this change; `start` stands before its JSON, which may end too early."""

    async def handler(gateway: Gateway, call: Call) -> web.Response:
        raw = json.dumps(change(await gateway.work(call))).encode()[:end]
        return web.Response(body=start + raw, content_type=mime)

    return handler


async def half_a_character(gateway: Gateway, call: Call) -> web.Response:
    """A reply that was cut by tokens: the last letter of "bug\n\n错" is there by half."""
    raw = json.dumps(await gateway.work(call)).encode()
    return web.Response(body=raw.replace(b'"bug"', b'"bug\\n\\n\xe9\x94"'), content_type=JSON)


def choice(**fields: object) -> Handler:
    """The right answer, with other fields in its first choice; those that are None are null."""
    return answers(lambda answer: answer | {"choices": [answer["choices"][0] | fields]})


def message(content: object, finish_reason: str | None = "stop", **fields: object) -> Handler:
    return choice(message={"role": "assistant", "content": content} | fields, finish_reason=finish_reason)


def usage(**fields: object) -> Handler:
    """The right answer, with other tokens."""
    return answers(lambda answer: answer | {"usage": answer["usage"] | fields})


def in_turn(handlers: Iterable[Handler]) -> Handler:
    """One after the other, and then anew."""
    cycle = itertools.cycle(handlers)
    return lambda gateway, call: next(cycle)(gateway, call)


def at_first(*handlers: Handler) -> Handler:
    """These, one for each request about a ticket, and then the plain answer."""
    seen = defaultdict(lambda: iter(handlers))
    plain = answers()
    return lambda gateway, call: next(seen[call.text], plain)(gateway, call)


def error(code: object = None, type_: object = None, message: str = "no") -> dict:
    return {"error": {"message": message, "type": type_, "code": code}}
