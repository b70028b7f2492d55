"""What an audit found: odd gateways, odd keys and odd files, each of which once cost money, a secret or the run."""

import itertools
import json
import time
from collections.abc import Callable

import pytest
from aiohttp import web

import classify
from tests.conftest import Desk, numbered
from tests.helpers import brisk, run_here
from tests.test_trust import served

NO_LIMIT = ("--rpm", "0", "--budget", "0")


def answer(content: object = "billing", finish: str = "stop", **more: object) -> dict:
    choice = {"message": {"content": content}, "finish_reason": finish} | more
    return {"choices": [choice], "usage": {"prompt_tokens": 300, "completion_tokens": 2}}


class Answers:
    """A gateway that answers its n-th request by this function of n: an answer, bytes, or a status."""

    def __init__(self, make: Callable[[int], object], headers: dict[str, str] | None = None) -> None:
        self.make, self.headers, self.requests = make, headers, 0

    async def __call__(self, request: web.BaseRequest) -> web.StreamResponse:
        await request.read()
        self.requests += 1
        made = self.make(self.requests)
        if isinstance(made, int):
            return web.json_response({"error": {"message": "no"}}, status=made, headers=self.headers)
        if isinstance(made, bytes):
            return web.Response(status=400, body=made)
        return web.json_response(made)


@pytest.mark.parametrize("other", [429, 503])
async def test_a_refused_key_behind_a_gateway_that_also_says_otherwise_ends_the_run(desk: Desk, other: int):
    brisk(desk, MAX_STUCK_S=2.0, KEY_GRACE_S=1.0, MAX_RETRIES=1000)
    desk.write(numbered(30))
    async with served(Answers(lambda n: 401 if n % 2 else other)) as url:
        done = await desk.run(None, *NO_LIMIT, TOKENHUB_URL=url, within_s=20)
    assert (done.status, "nothing better for 2 s" in done.stderr) == (1, True)


async def test_each_kind_of_failure_has_its_own_retries(desk: Desk):
    brisk(desk)
    desk.write(numbered(1))
    replies = [503, 503, answer("bi", "length"), answer()]
    async with served(Answers(lambda n: replies[n - 1])) as url:
        done = await desk.run(None, *NO_LIMIT, TOKENHUB_URL=url)
    assert (done.status, done.labels) == (0, {"t0": "billing"})


async def test_each_retry_waits_longer(desk: Desk):
    brisk(desk, BACKOFF_S=0.1, BACKOFF_MAX_S=1.0)
    desk.write(numbered(1))
    at: list[float] = []

    def late(n: int) -> object:
        at.append(time.monotonic())
        return 503 if n < 4 else answer()

    async with served(Answers(late)) as url:
        done = await desk.run(None, *NO_LIMIT, TOKENHUB_URL=url)
    assert done.status == 0
    waits = [later - earlier for earlier, later in itertools.pairwise(at)]
    assert all(wait >= least for wait, least in zip(waits, (0.19, 0.39, 0.79), strict=True))


KEYS = ("sk-ab/cdEFGH/123456", "sk+ab<cdEFGH&123456")


@pytest.mark.parametrize("key", KEYS)
async def test_a_key_that_comes_back_in_escapes_is_written_nowhere(desk: Desk, key: str):
    brisk(desk)
    desk.write(numbered(2))

    def escaped(data: dict) -> bytes:
        text = json.dumps(data)
        for letter in "/+<&":
            text = text.replace(letter, "\\/" if letter == "/" else f"\\u{ord(letter):04x}")
        return text.encode()

    async with served(Answers(lambda n: escaped({"error": {"message": f"no such key: {key}"}}))) as url:
        done = await desk.run(None, *NO_LIMIT, TOKENHUB_URL=url, TOKENHUB_KEY=key)
    assert "no such key: ***" in done.stderr
    assert key not in done.stderr
    assert all(key.encode() not in path.read_bytes() for path in desk.folder.iterdir())


async def test_a_key_in_a_redirect_or_a_reply_is_written_nowhere(desk: Desk):
    brisk(desk)
    key = KEYS[0]
    desk.write(numbered(1))
    async with served(Answers(lambda n: 302, {"Location": f"https://x.test/login/{key}"})) as url:
        done = await desk.run(None, *NO_LIMIT, TOKENHUB_URL=url, TOKENHUB_KEY=key)
    assert key not in done.stderr
    async with served(Answers(lambda n: answer(f"the key is {key}"))) as url:
        done = await desk.run(None, *NO_LIMIT, TOKENHUB_URL=url, TOKENHUB_KEY=key)
    assert done.lines[0]["reply"] == "the key is ***"


async def test_a_finish_reason_that_repeats_the_ticket_is_not_shown(desk: Desk):
    brisk(desk)
    desk.write({"t1": "hello there my secret friend"})
    async with served(Answers(lambda n: answer("bi", "refused: hello there my secret friend"))) as url:
        done = await desk.run(None, *NO_LIMIT, TOKENHUB_URL=url)
    assert "ticket t1 failed: 200 without a complete answer" in done.stderr
    assert "secret" not in done.stderr


@pytest.mark.parametrize("finish", ["timed out", "no connection", "parameter", "429"])
async def test_a_finish_reason_is_never_taken_for_a_failure_of_our_own(desk: Desk, finish: str):
    brisk(desk)
    desk.write(numbered(2))
    gateway = Answers(lambda n: answer("billing", finish))
    async with served(gateway) as url:
        done = await desk.run(None, *NO_LIMIT, TOKENHUB_URL=url)
    assert (gateway.requests, done.stderr.count(" failed: ")) == (2, 2)


async def test_more_cached_tokens_than_tokens_are_no_usage(desk: Desk):
    brisk(desk)
    desk.write(numbered(3))
    odd = answer() | {"usage": {"prompt_tokens": 10, "completion_tokens": 2, "prompt_cache_hit_tokens": 300}}
    async with served(Answers(lambda n: odd)) as url:
        first = await desk.run(None, "--rpm", "0", TOKENHUB_URL=url)
        second = await desk.run(None, "--rpm", "0", TOKENHUB_URL=url)
    assert (first.status, second.status) == (0, 0)
    assert all(line["estimated"] and line["cost_usd"] > 0 for line in second.lines)


async def test_a_logprob_that_is_no_number_costs_no_line(desk: Desk):
    brisk(desk, LOGPROBS=True)
    desk.write(numbered(2))
    odd = answer(logprobs={"content": [{"logprob": -0.1}, {"logprob": float("nan")}]})
    async with served(Answers(lambda n: odd)) as url:
        statuses = [(await desk.run(None, *NO_LIMIT, TOKENHUB_URL=url)).status for _ in range(2)]
    assert statuses == [0, 0]


async def test_a_line_that_lacks_what_it_may_lack_is_read(desk: Desk):
    desk.write(numbered(1))
    desk.output.write_text('{"id": "t9", "digest": "x", "label": "bug"}\n')
    done = await desk.run(None, "--dry-run")
    assert (done.status, done.stderr) == (0, "")


def test_an_output_that_changes_while_known_answers_are_written_stops_that_too(desk: Desk, monkeypatch):
    desk.write(tickets := numbered(3000))
    known = {"label": "billing", "model": "deepseek-chat", "tokens_in": 1, "tokens_out": 1, "cost_usd": 0.0}
    digests = {id_: classify.request_digest("deepseek-chat", text) for id_, text in tickets.items()}
    backup = desk.output.with_name("labels.jsonl.bak")
    backup.write_text("".join(json.dumps({"id": i, "digest": d} | known) + "\n" for i, d in digests.items()))
    identity, asked = classify.identity, itertools.count()
    monkeypatch.setattr(classify, "identity", lambda path: identity(path) if next(asked) < 100 else (0, 0))
    done = run_here(desk)
    assert (done.status, 0 < len(done.lines) < 100) == (1, True)
    assert "changed; see the .bak" in done.stderr
    assert len(backup.read_text().split("\n{")) == 3001, "the one line that met the change, and no more"


def test_a_very_long_error_is_cut_before_it_is_looked_at():
    said = classify.outcome_of(400, {}, {"error": {"message": "the error is that " * 50_000}}).said
    assert max(map(len, said)) < 5000, "to compare a megabyte with its ticket took seconds"


def test_an_error_that_stands_in_a_list_is_read():
    got = classify.outcome_of(400, {}, [{"error": {"code": 400, "message": "API key not valid"}}])
    assert got.said[0] == "400 400: API key not valid"


@pytest.mark.parametrize(
    ("code", "message"), [("x", "billing_address wrong in ticket"), ("content_filter", "unsupported_file it says")]
)
def test_words_of_a_message_are_no_code(code: str, message: str):
    assert classify.outcome_of(400, {}, {"error": {"code": code, "message": message}}).means.patience_s > 0


@pytest.mark.parametrize(
    "constants", [{"EXTRA_BODY": {"max_tokens": "200"}}, {"CONCURRENCY": 4.5}, {"MAX_CHARS": 1e4}], ids=str
)
async def test_a_number_of_the_wrong_kind_is_one_line_before_anything_is_sent(desk: Desk, constants):
    desk.edit(**constants)
    desk.write(numbered(1))
    done = await desk.run(None, TOKENHUB_URL="http://127.0.0.1:9/v1")
    assert done.status == 2
    assert next(iter(constants)) in done.stderr
    assert done.stderr.count("\n") == 1


@pytest.mark.parametrize(
    ("reply", "label"),
    [
        ("bug-free", None),
        ("anti-spam", None),
        ("billing-related", None),
        ("No, billing", "billing"),
        ("No. Bug", "bug"),
    ],
)
def test_a_hyphen_joins_and_a_comma_parts(reply: str, label: str | None):
    assert classify.normalize_label(reply) == label


@pytest.mark.parametrize("labels", [("C", "C++", "C#"), ("👍", "👎"), ("बिल", "बल"), ("R&D", "R+D")], ids=str)
def test_labels_that_differ_in_signs_alone_are_distinct(labels: tuple[str, ...]):
    assert len(classify.label_finder(labels)[1]) == len(labels)
