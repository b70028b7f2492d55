"""What is wrong in the settings, the options and the environment is one clear line, before anything is sent."""

import os
import sys
from dataclasses import replace

import pytest

import classify
from tests.conftest import Desk, numbered
from tests.gateway import Call, Gateway
from tests.helpers import QUICK, Witness, brisk, run_here

NAN = float("nan")


def refusal(desk: Desk, *arguments: str, **environment: str) -> str:
    """The one line with which a run is refused, which leaves nothing behind."""
    before = sorted(desk.folder.iterdir())
    done = run_here(desk, *arguments, **environment)
    assert (done.status, done.stdout) == (2, "")
    assert sorted(desk.folder.iterdir()) == before
    [line] = done.stderr.splitlines()
    return line


# ---- Settings ------------------------------------------------------------------------------------------

NUMBERS = ["CONCURRENCY", "RPM", "TIMEOUT", "MAX_RETRIES", "MAX_TOKENS", "MAX_CHARS", "BUDGET_USD"]
WRONG = [  # the settings, and what the line has to say
    *(({"MAX_TOKENS": value}, "MAX_TOKENS must be a number") for value in (None, [], "many", NAN, 1j)),
    ({"CONCURRENCY": 4.5}, "CONCURRENCY must be a whole number"),
    ({"MAX_CHARS": 1e4}, "MAX_CHARS must be a whole number"),
    ({"MAX_CHARS": 0}, "MAX_CHARS must be more than 0"),
    ({"TIMEOUT": 0}, "TIMEOUT must be more than 0"),
    *(({"EXTRA_BODY": body}, "EXTRA_BODY") for body in ([], {"a": {1}}, {"a": NAN}, {"max_tokens": "200"})),
    *(
        ({"PRICES": {"x": (1, 1, 1), "deepseek-chat": price}}, "PRICES: deepseek-chat needs three numbers")
        for price in ((0.27, 1.10), (0.27, 1.10, "free"), 3)
    ),
    *(({"TEXT_COLUMNS": names}, "TEXT_COLUMNS must be ") for names in ((), ("body", None), None)),
    ({"ID_COLUMN": ("id",)}, "ID_COLUMN must be "),
    ({"GOLD_COLUMN": 5}, "GOLD_COLUMN must be "),
    ({"FALLBACK": "misc"}, "FALLBACK must be one of LABELS or None, not 'misc'"),
    *(
        ({"LABELS": dict.fromkeys(names, "")}, "LABELS: ")
        for names in (("bug", "Bug", "other"), ("how-to", "how to", "other"), ("", "other"), ())
    ),
]


@pytest.mark.parametrize(("constants", "said"), WRONG, ids=str)
def test_a_setting_that_is_wrong_is_named(monkeypatch: pytest.MonkeyPatch, constants, said):
    for name, value in constants.items():
        monkeypatch.setattr(classify, name, value)
    assert next(classify.wrong_settings()).startswith(said)


@pytest.mark.parametrize("name", NUMBERS)
async def test_a_number_that_is_negative_is_refused_by_the_command(desk: Desk, name: str):
    desk.edit(**{name: -1})
    desk.write(numbered(1))
    done = await desk.run(None, TOKENHUB_URL="http://127.0.0.1:9/v1")
    assert (done.status, done.stdout) == (2, "")
    assert done.stderr == f"classify.py: {name} must be a number, not negative\n"


@pytest.mark.parametrize(
    ("constants", "said"),
    [({"MODEL": None}, "MODEL is missing"), ({"CHINESE_MODEL": "gpt-9"}, "no price for gpt-9")],
    ids=str,
)
def test_a_model_that_cannot_be_asked_is_refused(desk: Desk, monkeypatch: pytest.MonkeyPatch, constants, said):
    desk.write(numbered(1))
    for name, value in constants.items():
        monkeypatch.setattr(classify, name, value)
    assert refusal(desk).startswith(f"classify.py: {said}")


def test_prices_labels_and_fallbacks_that_are_right_are_let_through(desk: Desk, monkeypatch: pytest.MonkeyPatch):
    desk.write(numbered(1))
    right = {"LABELS": {"C": "", "C++": "", "C#": "", "👍": "", "R&D": "", "R+D": ""}, "FALLBACK": None}
    right |= {"PRICES": {"deepseek-chat": (0, 0, 0), "x": [1, 1, 1]}, "EXTRA_BODY": {"max_tokens": None}}
    right |= {"TEXT_COLUMNS": ["body"], "ID_COLUMN": None, "GOLD_COLUMN": None}
    for name, value in right.items():
        monkeypatch.setattr(classify, name, value)
    assert list(classify.wrong_settings()) == []
    assert run_here(desk, "--dry-run").status == 0


async def test_long_labels_get_the_tokens_that_they_need(desk: Desk):
    labels = {f"{'a rather long label with many words in it ' * 2}{n}": "" for n in range(3)} | {"other": ""}
    brisk(desk, LABELS=labels)
    desk.write(numbered(3))
    longest = max(labels, key=len)
    async with Witness(replace(QUICK, reply=lambda text: longest)) as gateway:
        done = await desk.run(gateway)
    assert (done.status, set(done.labels.values())) == (0, {longest})
    assert gateway.bodies[0]["max_tokens"] >= len(longest) / 2


# ---- Options -------------------------------------------------------------------------------------------

WRONG_OPTIONS = [
    (("--concurrency", "0"), "--concurrency begins at 1"),
    (("--sample", "0"), "--sample begins at 1"),
    (("--rpm", "0.001"), "--rpm must be 0 or at least 0.01"),
    (("--rpm", "nan"), "--rpm must be"),
    (("--rpm", "inf"), "--rpm must be"),
    (("--budget", "-1"), "--budget must be a number of dollars, 0 for no limit"),
    (("--budget", "nan"), "--budget must be"),
    (("--budget", "inf"), "--budget must be"),
    (("--model", "gpt-9"), "no price for gpt-9: add it to PRICES, or use --budget 0"),
    (("--model", "a\x1b[2Jb", "--budget", "0"), "MODEL is missing, or not UTF-8"),
    (("-o", "labels.txt"), "-o must end in .jsonl or .csv"),
    (("-o", "tickets.csv"), "-o tickets.csv is the CSV itself: choose another"),
    (("-o", "./x/../tickets.csv"), "-o ./x/../tickets.csv is the CSV itself"),
    (("-o", "link.csv"), "-o link.csv is the CSV itself"),
    (("link.csv", "-o", "tickets.csv"), "-o tickets.csv is the CSV itself"),
    (("-o", "x.jsonl"), "x.jsonl is there, but was not written from x.db: move it away, or choose another -o"),
    (("-o", "nowhere/labels.jsonl"), "there is no folder "),
]


@pytest.mark.parametrize(("arguments", "said"), WRONG_OPTIONS, ids=str)
def test_an_option_that_is_wrong_is_named(desk: Desk, arguments, said):
    desk.write(numbered(1))
    (desk.folder / "x").mkdir()
    (desk.folder / "x.jsonl").mkdir()
    (desk.folder / "link.csv").symlink_to(desk.tickets)
    assert refusal(desk, *arguments).startswith(f"classify.py: {said}")


@pytest.mark.skipif(sys.platform != "linux", reason="elsewhere arguments and file names are text")
async def test_file_names_that_are_not_utf8_work(desk: Desk):
    brisk(desk)
    desk.write(numbered(3))
    name = os.fsdecode(b"t\xffckets.csv")
    desk.tickets.rename(desk.folder / name)
    output = os.fsdecode(b"l\xffbels.jsonl")
    async with Gateway(QUICK) as gateway:
        first = await desk.run(gateway, name, "-o", output)
        second = await desk.run(gateway, name, "-o", output)
    assert (first.status, second.status, gateway.requests) == (0, 0, 3)
    assert len((desk.folder / output).read_bytes().splitlines()) == 3
    missing = os.fsdecode(b"n\xffbody.csv")
    assert "No such file" in refusal(desk, missing)


# ---- Environment ---------------------------------------------------------------------------------------


PROXY = {"TOKENHUB_URL": "https://gateway.test/v1"}
WRONG_ENVIRONMENT = [
    *(({"TOKENHUB_KEY": key}, "TOKENHUB_KEY is not set: export TOKENHUB_KEY=..., any word") for key in ("", " \n")),
    *(
        ({"TOKENHUB_KEY": key}, f"TOKENHUB_KEY has {sign} in it, which no key has: copy it once more")
        for key, sign in {
            "Bearer hunter2": "a space",
            "hunter2\u00a0b": "a space",
            "hunter2\r\nX-Other: 1": "a space",
            "hunter2-\u00e9": "the sign 'é'",
            "hunter2\u200bb": r"the sign '\u200b'",
            '"hunter2"': "the sign '\"'",
            "'hunter2'": 'the sign "\'"',
        }.items()
    ),
    (
        {"TOKENHUB_URL": "http://example.com/v1"},
        "TOKENHUB_URL 'http://example.com/v1' may not have the key: give https://",
    ),
    *(
        (PROXY | {"HTTPS_PROXY": proxy}, "HTTPS_PROXY is no address of a proxy: give http://HOST:PORT")
        for proxy in ("socks5://hunter2@127.0.0.1:9", "http://", "http://x:port")
    ),
]


@pytest.mark.parametrize(("environment", "said"), WRONG_ENVIRONMENT, ids=str)
def test_an_environment_that_is_wrong_is_named_and_no_secret_shown(desk: Desk, environment: dict[str, str], said: str):
    desk.write(numbered(1))
    line = refusal(desk, **environment)
    assert line.startswith(f"classify.py: {said}")
    assert "hunter2" not in line


class Azure(Witness):
    """Remembers the path and the query of the last request."""

    def deliver(self, call: Call, *more: object) -> object:
        self.asked = call.request.path_qs
        return super().deliver(call, *more)


async def test_an_address_is_completed_and_its_query_kept(desk: Desk):
    brisk(desk)
    desk.write(numbered(2))
    async with Azure() as gateway:
        url = f"{gateway.url.removesuffix('/chat/completions')}?api-version=1"
        done = await desk.run(gateway, TOKENHUB_URL=url)
    assert (done.status, gateway.asked) == (0, "/v1/chat/completions?api-version=1")
