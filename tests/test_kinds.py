"""What comes back from a gateway, and what becomes of it: a table for each kind of answer, error and wait.

One run holds a whole table: each ticket is a row, and what the gateway sends it is that row's own.
"""

import itertools
import time
from collections import defaultdict
from collections.abc import Callable, Iterable
from dataclasses import replace
from email.utils import formatdate

import pytest
from multidict import CIMultiDict

from classify import retry_after_s
from tests.conftest import Desk, Done, numbered
from tests.gateway import FAULTS, Fault, Gateway, Handler, off_list
from tests.helpers import Witness, brisk, side_by_side
from tests.replies import (
    NEVER,
    PLAIN,
    QUICK_PACE,
    answers,
    at_first,
    choice,
    error,
    half_a_character,
    message,
    sends,
    usage,
)

# ---- A run with a row in each ticket -------------------------------------------------------------------


def row_faults(rows: dict[str, Handler]) -> tuple[Fault, ...]:
    return tuple(Fault(handler, matching=f"[{row}]") for row, handler in rows.items())


async def run_table(desk: Desk, rows: dict[str, Handler], **more: object) -> tuple[Done, dict[str, list[dict]]]:
    """Runs it, with a ticket for each row and before it one that gets a plain answer; and the ledger by ticket."""
    desk.write({id_: f"[{id_}] My app." for row in rows for id_ in (f"{row}, good", row)})
    async with Gateway(replace(PLAIN, faults=row_faults(rows))) as gateway:
        done = await desk.run(gateway, "--concurrency", "8", **more)
    by_ticket = defaultdict(list)
    for row in done.ledger:
        by_ticket[row["id"]].append(row)
    assert all(done.labels.get(f"{row}, good") == "bug" for row in rows), done.stderr
    return done, by_ticket


def kinds(by_ticket: dict[str, list[dict]], rows: Iterable[str]) -> dict[str, list[str]]:
    return {row: [request["kind"] for request in by_ticket[row]] for row in rows}


# ---- What a 200 brings ---------------------------------------------------------------------------------

TEXT, THOUGHT = {"type": "text", "text": "bug"}, {"type": "thinking", "thinking": [{"type": "text", "text": "billing"}]}
COMPLETE = {
    **{f"finish {reason}": choice(finish_reason=reason) for reason in ("eos", "eos_token", "COMPLETE", "normal")},
    **{f"finish {reason}": choice(finish_reason=reason) for reason in (None, "", "no_such_reason", "429")},
    # Nor is it taken for a failure of our own.
    **{f"finish {reason}": choice(finish_reason=reason) for reason in ("timed out", "no connection", "labelled")},
    "no finish": answers(lambda answer: answer | {"choices": [{"message": answer["choices"][0]["message"]}]}),
    "cut after the label": message("bug\n\nThe custo", "length"),
    "cut, the label whole": message("bug", "length"),
    "cut, the label dressed": message("**Bug", "MAX_TOKENS"),
    "a list of one part": message([TEXT]),
    "thoughts, then a part": message([THOUGHT, TEXT]),
    "thoughts that are a text, then a part": message([{"type": "reasoning", "text": "billing"}, TEXT]),
    "two parts": message([{"type": "text", "text": "bu"}, {"type": "text", "text": "g"}]),
    "a part without a type": message([{"text": "bug"}]),
    "a part named as in OpenAI's other interface": message([{"type": "output_text", "text": "bug"}]),
    "parts that are texts": message(["bu", "g"]),
    "a part without a list": message(TEXT),
    "thoughts in the text": message("<think>billing?</think>bug"),
    "thoughts in a field": message("bug", reasoning_content="billing, I think"),
    "a refusal that is null": message("bug", refusal=None),
    "an error of empty values": answers(lambda answer: answer | {"error": {"code": None, "message": "", "type": []}}),
    "an error that is null": answers(lambda answer: answer | {"error": None}),
    "an error that is empty in its choice": choice(error={}),
    "a mark before it": answers(start=b"\xef\xbb\xbf"),
    "blank lines before it": answers(start=b"\n\n\n"),
    "plain text by its header": answers(mime="text/plain"),
    "half a character at its end": half_a_character,
}
TWICE_PAID = {
    "cut off": {
        "nothing, at length": message("", "length"),
        "null, at length": message(None, "length"),
        "prose": message("The customer mentions a bug, but the real", "length"),
        "half a label": message("bil", "model_length"),
        "thoughts": message("[THINK]\nOkay, the user has a billing", "max_tokens"),
        "two labels": message("billing or bug", "length"),
        **{
            f"prose, {reason}": message("The customer", reason)
            for reason in ("FinishReason.MAX_TOKENS", "max_new_tokens")
        },
        "prose, a full window": message("The customer", "model_context_window_exceeded"),
    },
    "empty": {
        "no text": message(""),
        "blanks": message(" \n "),
        "null": message(None),
        "no parts": message([]),
        "parts of thoughts": message([THOUGHT]),
        "thoughts elsewhere": message("", reasoning_content="bug"),
        "no content": choice(message={"role": "assistant"}),
        "content that is a number": message(3),
    },
    "unreadable": {
        "no choices": answers(lambda answer: answer | {"choices": []}),
        "choices null": answers(lambda answer: answer | {"choices": None}),
        "message null": choice(message=None),
        "a completion of old": choice(message=None, text="bug"),
        "another envelope": answers(lambda answer: {"output": answer}),
        "an empty object": answers(lambda answer: {}),
        "an empty list": answers(lambda answer: []),
        "a list around it": answers(lambda answer: [answer]),
        "a text": answers(lambda answer: "bug"),
        "a number": answers(lambda answer: 1e999),
        "words of its own": answers(lambda answer: {"message": "No wind today", "usage": answer["usage"]}),
    },
    # So often as MAX_RETRIES = 1 says.
    "broken off": {
        f"ended by {reason}": message("bug", reason)
        for reason in ("error", "abort", "cancelled", "network_error", "insufficient_system_resource", "ERROR")
    },
    "torn": {
        "half an answer": answers(end=60),
        "no body": answers(end=0),
        "blank lines alone": answers(start=b"\n" * 20, end=0),
        "a page": answers(start=b"<html><style>p {}</style><p>Hello from nginx</p></html>", end=0, mime="text/html"),
        "a stream": answers(start=b'data: {"choices": [{"delta": {"content": "bug"}}]}\n\ndata: [DONE]\n', end=0),
        "brackets": answers(start=b"[" * 100_000, end=0),
        "no UTF-8": answers(start=b"\xff\xfe", end=20),
    },
}
WITHHELD = {
    "ended by content_filter": message("bug", "content_filter"),
    "ended with a cause": message("bug", "content_filter: SAFETY"),
    **{f"ended by {reason}": message("bug", reason) for reason in ("SAFETY", "sensitive", "refusal", "contentFilter")},
    **{f"ended by {reason}": message("bug", reason) for reason in ("FinishReason.IMAGE_SAFETY", "content-policy")},
    **{f"ended by {reason}": message("bug", reason) for reason in ("tool_calls", "function_call", "tool_use")},
    "words of a refusal": message(None, "content_filter", refusal="I cannot help with that"),
}


async def test_an_answer_is_complete_whatever_its_end_is_called_and_in_whatever_parts_it_comes(desk: Desk):
    brisk(desk)
    done, by_ticket = await run_table(desk, COMPLETE)
    assert kinds(by_ticket, COMPLETE) == {row: ["labelled"] for row in COMPLETE}
    assert done.status == 0


BEGINNINGS = {  # of what cannot be used; it is shown and kept
    "another envelope": '{"output": {"id": "chatcmpl-',
    "a text": ": bug",
    "words of its own": ": No wind today",
    "a page": "Hello from nginx",
    "half an answer": '{"id": "chatcmpl-',
    "prose": "The customer mentions a bug, but the real",
}


@pytest.mark.parametrize("kind", TWICE_PAID)
async def test_an_answer_that_is_none_is_asked_for_again_and_both_are_booked(desk: Desk, kind: str):
    brisk(desk, MAX_RETRIES=1, FIRST=NEVER, RECENT=NEVER)
    rows = TWICE_PAID[kind]
    done, by_ticket = await run_table(desk, rows)
    assert kinds(by_ticket, rows) == {row: [kind, kind] for row in rows}
    assert not done.labels.keys() & rows.keys()
    assert all(request["tokens_in"] >= 300 and request["cost_usd"] for row in rows for request in by_ticket[row])
    assert "failed: " in done.stderr
    for row in BEGINNINGS.keys() & rows.keys():
        assert BEGINNINGS[row] in by_ticket[row][-1]["error"]


async def test_what_is_withheld_fails_its_ticket_at_once(desk: Desk):
    brisk(desk, FIRST=NEVER, RECENT=NEVER)
    done, by_ticket = await run_table(desk, WITHHELD)
    assert kinds(by_ticket, WITHHELD) == {row: ["withheld"] for row in WITHHELD}
    assert "failed: 200 withheld, finish_reason content_filter" in done.stderr
    assert by_ticket["words of a refusal"][0]["error"].endswith(": I cannot help with that")
    assert "finish_reason content_filter: SAFETY" in by_ticket["ended with a cause"][0]["error"]


INNER = {"message": "the upstream fell over"}
ERRORS_IN_200 = {  # what stands in it: how it ends
    "no code": ({"error": INNER}, "server error"),
    "a text": ({"error": "the upstream fell over"}, "server error"),
    "in the choice": ({"choices": [{"error": INNER, "message": {"content": "bug"}}]}, "server error"),
    "beside an answer": ({"error": INNER, "choices": [{"message": {"content": "bug"}}]}, "server error"),
    "a code of words": ({"error": INNER | {"code": "overloaded"}}, "server error"),
    "code 400": ({"error": INNER | {"code": 400}}, "rejected"),
    "code 422 in text": ({"error": INNER | {"code": "422"}}, "rejected"),
    "code 504": ({"error": INNER | {"code": 504}}, "gateway timed out"),
    "code 9": ({"error": INNER | {"code": 9}}, "server error"),
    "status 422": ({"error": INNER | {"status": 422}}, "rejected"),
    "the code of a bad request": ({"error": INNER | {"type": "invalid_request_error"}}, "rejected"),
    "a list": ({"error": [INNER | {"code": 422}]}, "rejected"),
}


async def test_an_error_within_a_200_is_an_error_its_own_code_decides_and_it_is_free(desk: Desk):
    brisk(desk, MAX_RETRIES=0, FIRST=NEVER, RECENT=NEVER)
    rows = {row: sends(200, body) for row, (body, _) in ERRORS_IN_200.items()}
    done, by_ticket = await run_table(desk, rows)
    assert kinds(by_ticket, rows) == {row: [kind] for row, (_, kind) in ERRORS_IN_200.items()}
    free = [row for row, (_, kind) in ERRORS_IN_200.items() if kind != "gateway timed out"]
    assert {by_ticket[row][0]["tokens_in"] for row in free} == {0}
    assert all("the upstream fell over" in by_ticket[row][0]["error"] for row in rows)
    assert "the upstream fell over" in done.stderr


TOKENS = {  # what usage says: tokens in, out and cached; None where they are estimated
    "as it is": (usage(), (300, 2, 0)),
    "thoughts in the total alone": (usage(completion_tokens=2, total_tokens=450), (300, 150, 0)),
    "no total": (usage(total_tokens=None), (300, 2, 0)),
    "none out but in the total": (usage(completion_tokens=None, total_tokens=330), (300, 30, 0)),
    "none out at all": (usage(completion_tokens=None, total_tokens=None), None),
    "a total that is too small": (usage(total_tokens=17), (300, 2, 0)),
    "cached, DeepSeek": (usage(prompt_cache_hit_tokens=256), (300, 2, 256)),
    "cached, OpenAI": (usage(prompt_tokens_details={"cached_tokens": 128}), (300, 2, 128)),
    "cached of nothing": (usage(prompt_tokens_details=None), (300, 2, 0)),
    "more cached than there are": (usage(prompt_cache_hit_tokens=301), None),
    "no usage": (answers(lambda answer: {k: v for k, v in answer.items() if k != "usage"}), None),
    "null": (answers(lambda answer: answer | {"usage": None}), None),
    "empty": (answers(lambda answer: answer | {"usage": {}}), None),
    "all zero": (usage(prompt_tokens=0, completion_tokens=0, total_tokens=0), None),
    "no tokens in": (usage(prompt_tokens=0), None),
    "a negative number": (usage(prompt_tokens=-5), None),
    "in text": (usage(prompt_tokens="300"), None),
    "absurdly many": (usage(completion_tokens=10**30), None),
}


async def test_tokens_are_what_usage_says_or_estimated_where_it_makes_no_sense(desk: Desk):
    brisk(desk)
    done, by_ticket = await run_table(desk, {row: handler for row, (handler, _) in TOKENS.items()})
    assert done.status == 0
    for row, (_, told) in TOKENS.items():
        [request] = by_ticket[row]
        counted = tuple(request[name] for name in ("tokens_in", "tokens_out", "tokens_cached"))
        assert request["estimated"] == (told is None), row
        assert counted == told if told else 50 < counted[0] < 300, row
        assert request["cost_usd"] > 0, row
    estimated = sum(told is None for _, told in TOKENS.values())
    assert f"Estimated: the tokens of {estimated} requests without `usage`" in done.stdout


ODD_LOGPROBS = [float("nan"), -float("inf"), -(10**400), 0.5, "-0.1", None, {"a": 0}]
NO_CONFIDENCE = {
    **{f"{str(odd)[:9]}": choice(logprobs={"content": [{"logprob": -0.1}, {"logprob": odd}]}) for odd in ODD_LOGPROBS},
    "no tokens": choice(logprobs={"content": []}),
    "no logprobs": choice(logprobs=None),
}


async def test_a_logprob_that_makes_no_sense_gives_no_confidence_and_costs_no_label(desk: Desk):
    brisk(desk, LOGPROBS=True)
    done, _ = await run_table(desk, NO_CONFIDENCE)
    assert done.status == 0
    without = {line["id"] for line in done.lines if line.get("confidence") is None}
    assert without == NO_CONFIDENCE.keys()
    assert f"Without confidence: {len(without)} labels, " in done.stdout


# ---- Which error is of which kind ----------------------------------------------------------------------


# Each by itself: the ticket fails after MAX_RETRIES (0 here), and the others go on.
FAIL_A_TICKET = {  # kind: status and body
    "rejected": [
        *((status, error()) for status in (400, 403, 406, 412, 413, 418, 422, 451)),
        (403, error("unsupported_country_region_territory", "request_forbidden")),
        (400, error("content_filter")),
        (400, error("model_decommissioned")),
        (400, error("billing_hard_limit_reached", "billing_limit_user_error")),
        (403, error("insufficient_user_quota")),
        # Words decide nothing.
        (400, error(message="insufficient balance, says the ticket")),
        (400, error(message="Unsupported parameter: 'max_tokens'")),
        (400, error("content_filter", message="unsupported_parameter, model_not_found")),
        (400, error("billing_address", message="rate limit exceeded, try again in 2 s")),
        (403, b"<html><body>503 Service Unavailable</body></html>"),
    ],
    "server error": [
        *((status, error()) for status in (408, 409, 424, 425, 499, 500, 502, 503, 507, 520, 522, 523, 529, 530, 599)),
        (700, error()),
        (498, error("capacity_exceeded", "service_unavailable")),
        (500, error(500)),
        (500, error("")),
        (500, error("insufficient_balance")),
        (500, b""),
        (502, b"<html><h1>Bad Gateway</h1></html>"),
        (503, error(message="401 wrong API key, insufficient_quota")),
    ],
    "gateway timed out": [(504, error()), (524, b"A timeout occurred")],
}
LIMITS = [  # status, body, Retry-After: a wait, however often
    (429, error("rate_limit_exceeded"), {}),
    (429, error(429, "RESOURCE_EXHAUSTED", "You exceeded your current quota"), {}),
    (429, error("1300", "rate_limited"), {}),
    (429, error(None, "model_rate_limit"), {}),
    (429, [error(429)], {}),
    (429, b"", {}),
    (429, {"message": "insufficient balance"}, {}),
    (200, error(429), {}),
    (200, error("rate_limit_exceeded"), {}),
    (200, error(None, "rate_limit_error"), {}),
    *((status, error(), {"Retry_After": "0"}) for status in (400, 401, 403, 404, 408, 500, 503, 529)),
    (503, error(), {"Retry_After_Ms": "20"}),
]
QUOTAS = [
    (429, error("insufficient_quota", "insufficient_quota")),
    (429, error(429, "insufficient_quota")),
    (429, error("quota_exceeded")),
    (429, error("insufficient_balance")),
    (429, error("credit_limit_reached")),
    (429, {"code": "BILLING_HARD_LIMIT"}),
    (200, error(429, "insufficient_quota")),
    (200, error("insufficient_quota")),
]
AWAY = "https://elsewhere.test/v1"
STOP_AT_ONCE = [  # what the last line says
    (402, error(), "Stopped: 402, payment is required. Top up your account"),
    (402, error("insufficient_balance"), "Stopped: 402, payment is required. Top up your account"),
    (200, error("402"), "Stopped: 402, payment is required. Top up your account"),
    (404, error("model_not_found"), "Stopped: 404, no such address or model. Check TOKENHUB_URL and MODEL"),
    (404, {"detail": "Not Found"}, "Stopped: 404, no such address or model. Check TOKENHUB_URL and MODEL"),
    (405, b"", "Stopped: 405, no such address or model. Check TOKENHUB_URL and MODEL"),
    (503, error("model_not_found"), "Stopped: 503, no such address or model. Check TOKENHUB_URL and MODEL"),
    *(
        (
            status,
            b"",
            f"Stopped: {status}, the address redirects, where the key is not sent. Set TOKENHUB_URL to the "
            "address itself",
        )
        for status in (300, 301, 302, 307, 308, 399)
    ),
    *(
        (400, error(code), "Stopped: 400, a field of the request is not known there. Mend EXTRA_BODY")
        for code in ("unsupported_parameter", "unsupported_value", "unknown_parameter")
    ),
]


def by_name(cases: list[tuple]) -> dict[str, tuple]:
    return {f"{number}: {case[0]} {str(case[1])[:60]}": case for number, case in enumerate(cases)}


@pytest.mark.parametrize("kind", FAIL_A_TICKET)
async def test_an_error_by_its_status_and_its_code_and_never_by_its_words_fails_a_ticket(desk: Desk, kind: str):
    brisk(desk, MAX_RETRIES=0, FIRST=NEVER, RECENT=NEVER, IN_A_ROW=NEVER, OUTAGE=NEVER)
    cases = by_name(FAIL_A_TICKET[kind])
    done, by_ticket = await run_table(desk, {row: sends(*case) for row, case in cases.items()})
    assert kinds(by_ticket, cases) == {row: [kind] for row in cases}
    assert f"Not labelled: {len(cases)} tickets are left. Run the same command" in done.stdout.splitlines()[-1]


async def test_a_limit_or_a_retry_after_of_any_status_waits_however_often(desk: Desk):
    brisk(desk, MAX_RETRIES=0, **QUICK_PACE)
    cases = by_name(LIMITS) | by_name([(*case, {}) for case in QUOTAS])
    once = {row: sends(status, body, **headers) for row, (status, body, headers) in cases.items()}
    rows = {row: at_first(handler, handler, handler) for row, handler in once.items()}
    done, by_ticket = await run_table(desk, rows)
    assert kinds(by_ticket, rows) == {row: ["labelled"] for row in rows}
    assert done.status == 0
    assert "refused" in done.stdout


async def test_what_no_waiting_mends_stops_the_run_at_once(desk: Desk):
    brisk(desk)
    desk.write(numbered(20))

    async def one(twin: Desk, status: int, body: object, last_line: str) -> None:
        async with Gateway(replace(PLAIN, faults=(Fault(sends(status, body, Location=AWAY)),))) as gateway:
            done = await twin.run(gateway)
        assert done.stdout.splitlines()[-1].startswith(last_line)
        assert done.stdout.endswith("then run the same command: 20 tickets are left.\n"), last_line
        assert gateway.requests <= 5, last_line
        if 300 <= status < 400:
            assert f"{status}: {AWAY}" in done.stderr, "where it leads"

    await side_by_side(desk, STOP_AT_ONCE, one)


def openrouter(raw: str) -> dict:
    """An error of the provider behind it."""
    return {"error": {"message": "No wind", "code": 428, "metadata": {"raw": raw, "provider_name": "Calm"}}}


WORDS = {  # status, one for each, so that each is shown: body, and what must be shown of it
    400: (error(message="Wind from the north"), "Wind from the north"),
    402 + 1: ({"message": "Wind from the south"}, "Wind from the south"),
    406: ({"detail": "Wind from the east"}, "Wind from the east"),
    410: ({"msg": "Wind from the west"}, "Wind from the west"),
    411: ({"title": "Wind from above"}, "Wind from above"),
    412: ({"detail": [{"loc": ["body"], "msg": "Wind from below"}]}, "Wind from below"),
    413: ([{"error": {"message": "Wind in a list"}}], "Wind in a list"),
    414: ({"error": "Wind in a text"}, "Wind in a text"),
    415: ({"error": {"error": {"message": "Wind in the wind"}}}, "Wind in the wind"),
    416: ({"errors": [{"message": "Wind of many"}]}, "Wind of many"),
    417: ({"reason": "Wind by reason"}, "Wind by reason"),
    418: (b"<html><style>b {}</style><script>1</script><b>Wind &amp; <i>rain</i></b></html>", "Wind & rain"),
    421: (b"Wind in plain words", "Wind in plain words"),
    422: ({"wind": "elsewhere"}, '{"wind": "elsewhere"}'),
    423: (b"", "Locked"),
    426: ({"error": "no_wind", "error_description": "Wind of long ago"}, "Wind of long ago"),
    428: (openrouter('{"error": {"message": "Wind behind"}}'), "No wind: Wind behind"),
    430: (openrouter("Wind behind the wind"), "No wind: Wind behind the wind"),
    431: ({"error": {"code": 7, "message": ""}}, '{"error": {"code": 7, "message": ""}}'),
    451: (error("policy_violation", "content_error", "Wind"), "Wind"),
    460: (b"", "no words came with it"),
    # As it is: nothing but what cannot be printed is escaped.
    462: (error(message="The wind's \"n\" isn't \\\\x"), "The wind's \"n\" isn't \\\\x"),
    461: (error(message="Wind\n\x1b[31m" + "x" * 500), r"Wind \x1b[31mxxx"),
}


async def test_the_words_of_an_error_are_shown_wherever_they_stand(desk: Desk):
    brisk(desk, FIRST=NEVER, RECENT=NEVER, IN_A_ROW=NEVER)
    rows = {f"status {status}": sends(status, body) for status, (body, _) in WORDS.items()}
    done, _ = await run_table(desk, rows)
    for status, (_, words) in WORDS.items():
        [line] = [line for line in done.stderr.splitlines() if line.startswith(f"ticket status {status} failed: ")]
        assert f": {words}" in line
        assert len(line) < 400
    assert "failed: 451 policy_violation content_error: Wind" in done.stderr


# ---- Retry-After ---------------------------------------------------------------------------------------

NOW, LATER = "Wed, 21 Oct 2026 07:28:00 GMT", "Wed, 21 Oct 2026 07:28:30 GMT"
FAR = "Fri, 31 Dec 9999 23:59:59 GMT"
GARBAGE = ("soon", "-5", "nan", "1e999", "", "-0.1", "inf", "-inf", "1,5", "1.2.3", "s", "2 min", "9" * 5000)
FORMS = [
    ({"Retry-After": "7"}, 7),
    ({"Retry-After": "0"}, 0),
    ({"Retry-After": " 2 "}, 2),
    ({"Retry-After": "0.25"}, 0.25),
    ({"Retry-After": "12.345678091049194"}, 12.345678091049194),  # str() of a float
    ({"Retry-After": "2s"}, 2),
    ({"Retry-After": "1.5 s"}, 1.5),
    ({"Retry-After": "2 seconds"}, 2),
    ({"Retry-After": "1 second"}, 1),
    ({"retry-after": "99999"}, 99999),
    ({"retry-after-ms": "1500"}, 1.5),
    ({"Retry-After-Ms": "0"}, 0),
    ({"Retry-After": "1", "retry-after-ms": "120"}, 1),  # the longer one, for this rounds up
    ({"retry-after-ms": "soon"}, None),
    ({"Retry-After": LATER, "Date": NOW}, 30),  # whatever the clock of this machine says
    ({"Retry-After": "Wednesday, 21-Oct-26 07:28:30 GMT", "Date": NOW}, 30),
    ({"Retry-After": "Wed Oct 21 07:28:30 2026 +0000", "Date": NOW}, 30),
    ({"Retry-After": NOW, "Date": LATER}, 0),
    ({"Retry-After": "Fri, 31 Dec 1999 23:59:59 GMT"}, 0),
    ({}, None),
    *(({"Retry-After": garbage}, None) for garbage in GARBAGE),
    ({"Retry-After": "Fri, 31 Dec 99999999999999999999 23:59:59 GMT"}, None),
    ({"Retry-After": "Fri, 31 Dec 1999 23:59:59 -0000"}, None),
    ({"Retry-After": "Fri, 99 Foo 1999 99:99:99 +9999999"}, None),
    ({"Retry-After": LATER, "Date": "today"}, None),
]


def test_each_form_of_retry_after_is_a_wait_and_garbage_is_none():
    for headers, wait_s in FORMS:
        assert retry_after_s(CIMultiDict(headers)) == wait_s, f"{headers}"[:100]


def test_a_date_without_the_gateways_own_clock_counts_from_ours():
    assert 28 < retry_after_s(CIMultiDict({"Retry-After": formatdate(time.time() + 30, usegmt=True)})) <= 30
    assert retry_after_s(CIMultiDict({"Retry-After": FAR})) > 1e11


async def test_a_ticket_waits_as_long_as_it_is_told_in_any_form_and_with_any_status(desk: Desk):
    brisk(desk, **QUICK_PACE)
    told = {
        "429 in seconds": (429, "Retry_After", "1"),
        "429 as a float": (429, "Retry_After", "0.9"),
        "429 with its unit": (429, "Retry_After", "0.9s"),
        "429 in thousandths": (429, "Retry_After_Ms", "900"),
        "429 as a date": (429, "Retry_After", formatdate(time.time() + 2, usegmt=True)),
        **{f"{status}": (status, "Retry_After", "0.9") for status in (200, 400, 401, 403, 500, 503)},
    }
    rows = {row: at_first(sends(status, error(), **{name: value})) for row, (status, name, value) in told.items()}
    # A window that has grown, so that all are refused at once.
    desk.write(numbered(30) | {row: f"[{row}] My app." for row in rows})
    async with Gateway(replace(PLAIN, faults=row_faults(rows))) as gateway:
        done = await desk.run(gateway)
    assert done.status == 0
    for row in rows:
        refused, labelled = sorted(item.asked_at for item in gateway.bill if f"[{row}]" in item.text)
        assert 0.89 < labelled - refused < 3, row


@pytest.mark.parametrize(("status", "header"), [(429, FAR), (403, "601")])
async def test_a_wait_of_more_than_ten_minutes_ends_the_run_and_says_so(desk: Desk, status: int, header: str):
    brisk(desk)
    desk.write(numbered(10))
    handler = sends(status, error("monthly", message="Come back later"), Retry_After=header)
    async with Gateway(replace(PLAIN, faults=(Fault(handler, first=4),))) as gateway:
        done = await desk.run(gateway, "--concurrency", "1")
    assert (len(done.labels), gateway.requests) == (3, 4)
    assert "Come back later; it asks to wait for " in done.stdout.splitlines()[-1]


# ---- Asked once more -----------------------------------------------------------------------------------


async def test_a_reply_that_names_no_label_is_asked_about_once_more_in_the_same_conversation(desk: Desk):
    brisk(desk)
    desk.write({"t1": "My app."})
    async with Witness(replace(PLAIN, faults=(Fault(off_list("This is about a crash.", "LABEL")),))) as gateway:
        done = await desk.run(gateway)
    assert [(row["kind"], row["label"], row["reply"], row["tokens_in"]) for row in done.ledger] == [
        ("no label", None, "This is about a crash.", 300),
        ("labelled", "bug", "bug", 300),
    ]
    [line] = done.lines
    assert (line["label"], line["tokens_in"], line["tokens_out"], "reply" in line) == ("bug", 600, 4, False)
    first, second = (body["messages"] for body in gateway.bodies)
    assert second[:2] == first
    assert [message["role"] for message in second] == ["system", "user", "assistant", "user"]
    assert second[2]["content"] == "This is about a crash."
    assert second[3]["content"] == "Answer with exactly one of: billing, bug, how-to, feature-request, other"
    assert len(gateway.bodies) == 2
    assert "became" not in done.stdout


ABOUT = ("sea", "sea", "sea", "sky", "sky", "hill", "moor", "fog")
UNNAMED = {f"t{n}": f"Number {n}, about the {word}." for n, word in enumerate(ABOUT)}


def echoes(text: str) -> str:
    """Names what a ticket is about, and no label."""
    return f"nature: {text.split()[-1]}"


async def test_two_replies_without_a_label_give_the_fallback_with_the_last_beside_it(desk: Desk):
    brisk(desk)
    good = {f"g{n}": f"My app {n}." for n in range(3)}
    desk.write(UNNAMED | good | {"empty": "-"})
    async with Gateway(replace(PLAIN, faults=(Fault(at_turn(1, "no idea", echoes), matching="about the"),))) as gateway:
        for fallback in ("other", "bug", None):
            desk.edit(FALLBACK=fallback)
            done = await desk.run(gateway)
            assert gateway.requests == 2 * 8 + 3, "a changed FALLBACK costs nothing"
            unnamed = {id_: (fallback, echoes(text)) for id_, text in UNNAMED.items()} | {"empty": (fallback, None)}
            expected = dict.fromkeys(good, ("bug", None)) | (unnamed if fallback else {})
            assert {line["id"]: (line["label"], line.get("reply")) for line in done.lines} == expected
            assert done.status == (0 if fallback else 1)
            became = f"became {fallback!r}" if fallback else "got no label"
            told = f"8 tickets {became}, as two replies named no label: 'nature: sea.' (3), 'nature: sky.' (2), "
            assert told + "'nature: fog.' (1)\n" in done.stdout
    assert done.stdout.splitlines()[-1] == "Without a label: 9 tickets, as FALLBACK is None"


def at_turn(turn: int, first: str, again: Callable[[str], str]) -> Handler:
    """One reply to the first question, another to the second."""
    return lambda gateway, call: message(first if call.turn == turn else again(call.text))(gateway, call)


async def test_a_run_that_ended_between_the_two_questions_goes_on_with_the_second(desk: Desk):
    brisk(desk)
    desk.write({"t1": "My app."})
    wait = sends(429, Retry_After="99999")
    faults = (Fault(lambda gateway, call: (message("no idea") if call.turn == 1 else wait)(gateway, call)),)
    async with Witness(replace(PLAIN, faults=faults)) as gateway:
        first = await desk.run(gateway)
        assert (first.status, [row["kind"] for row in first.ledger]) == (1, ["no label"])
        gateway.script = PLAIN
        gateway.bodies.clear()
        second = await desk.run(gateway)
    assert second.status == 0
    [body] = gateway.bodies
    assert [message["content"] for message in body["messages"][1:3]] == ["My app.", "no idea"]
    assert [row["kind"] for row in second.ledger] == ["no label", "labelled"]


# ---- Failures are counted by kind ----------------------------------------------------------------------


async def test_each_kind_of_failure_has_its_own_retries(desk: Desk):
    brisk(desk, MAX_RETRIES=1, HOLD_S=0.01)
    rows = {
        "a 500, then cut off": at_first(sends(500), message("", "length")),
        "cut off, then a 500": at_first(message("", "length"), sends(500)),
        "one of each": at_first(
            sends(503), answers(end=9), message("", "length"), message(""), message("bug", "error"), sends(504),
            sends(429), sends(429), sends(429), answers(lambda answer: {}), message("no idea"),
        ),
    }  # fmt: skip
    done, by_ticket = await run_table(desk, rows)
    assert done.status == 0
    assert [request["kind"] for request in by_ticket["one of each"]] == [
        "torn", "cut off", "empty", "broken off", "gateway timed out", "unreadable", "no label", "labelled",
    ]  # fmt: skip


async def test_each_retry_waits_twice_as_long_up_to_a_limit(desk: Desk):
    brisk(desk, BACKOFF_S=0.1, BACKOFF_MAX_S=0.5)
    desk.write(numbered(1))
    async with Gateway(replace(PLAIN, faults=(Fault("status_503", last=4),))) as gateway:
        done = await desk.run(gateway)
    assert done.status == 0
    asked = [item.asked_at for item in gateway.bill]
    waits = [later - earlier for earlier, later in itertools.pairwise(asked)]
    assert all(least <= wait < least + 0.35 for wait, least in zip(waits, (0.1, 0.2, 0.4, 0.5), strict=True)), waits


# ---- What is not told by a response --------------------------------------------------------------------


async def test_a_port_that_speaks_plain_http_stops_the_run_and_says_so(desk: Desk):
    brisk(desk)
    desk.write(numbered(5))
    async with Gateway(PLAIN) as gateway:
        url = gateway.url.replace("http:", "https:")
        done = await desk.run(None, TOKENHUB_URL=url, within_s=5)
    last = done.stdout.splitlines()[-1]
    assert last.startswith("Stopped: no secure connection to ")
    assert "that port speaks http" in last


async def test_a_hanging_answer_times_out_is_tried_again_and_booked_at_its_worst(desk: Desk):
    brisk(desk, TIMEOUT=0.5, MAX_RETRIES=1)
    desk.write({"t1": "My app hangs.", "t2": "My app hangs twice.", "t3": "My app."})
    faults = (Fault("hang", matching="twice"), Fault(at_first(FAULTS["hang"]), matching="hangs."))
    async with Gateway(replace(PLAIN, faults=faults)) as gateway:
        done = await desk.run(gateway)
    rows = [(row["id"], row["kind"]) for row in done.ledger]
    assert sorted(rows) == [("t1", "labelled"), ("t1", "timed out"), *[("t2", "timed out")] * 2, ("t3", "labelled")]
    in_vain = [row for row in done.ledger if row["kind"] == "timed out"]
    assert all(row["estimated"] and row["tokens_in"] > 600 and row["tokens_out"] == 10 for row in in_vain)
    assert "ticket t2 failed: no answer within 0.5 s; raise TIMEOUT, or lower CONCURRENCY" in done.stderr
    assert "In vain: 3 requests without an answer, at most $" in done.stdout
