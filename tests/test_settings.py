"""What is wrong in the settings, the options and the environment is one clear line, before anything is sent."""

import os
import sys
from dataclasses import replace

import pytest

from tests.conftest import Desk, numbered
from tests.gateway import Gateway
from tests.helpers import QUICK, Witness, brisk

NOWHERE = "http://127.0.0.1:9/v1"


async def refusal(desk: Desk, *arguments: str, **environment: str) -> str:
    """The one line with which a run is refused."""
    done = await desk.run(None, *arguments, **{"TOKENHUB_URL": NOWHERE} | environment)
    assert (done.status, done.stdout) == (2, "")
    assert not desk.output.exists()
    [line] = done.stderr.splitlines()
    return line


NUMBERS = ["CONCURRENCY", "RPM", "TIMEOUT", "MAX_RETRIES", "MAX_TOKENS", "MAX_CHARS", "BUDGET_USD"]


@pytest.mark.parametrize("name", NUMBERS)
@pytest.mark.parametrize("value", [None, "many", -1, float("nan")], ids=str)
async def test_a_number_among_the_settings_that_is_none_is_named(desk: Desk, name: str, value: object):
    if value == "many" and name in ("CONCURRENCY", "RPM", "BUDGET_USD"):
        pytest.skip("is the default of an option, and argparse names that")
    desk.write(numbered(1))
    source = (desk.folder / "classify.py").read_text(encoding="utf-8")
    desk.edit(**{name: value if value == value else 0})
    if value != value:
        text = (desk.folder / "classify.py").read_text(encoding="utf-8")
        assert source != text
        (desk.folder / "classify.py").write_text(text.replace(f"\n{name} = 0\n", f"\n{name} = float('nan')\n"))
    assert f"{name} must be a number" in await refusal(desk)


@pytest.mark.parametrize(
    "body", ["{1, 2}", "[]", "None", "{'a': {1}}", "{'a': object()}", "{'a': float('nan')}", "{(1, 2): 3}"]
)
async def test_an_extra_body_that_is_no_json_object_is_named(desk: Desk, body: str):
    desk.write(numbered(1))
    program = desk.folder / "classify.py"
    lines = program.read_text(encoding="utf-8").splitlines()
    [place] = [number for number, line in enumerate(lines) if line.startswith("EXTRA_BODY = ")]
    lines[place] = f"EXTRA_BODY = {body}"
    program.write_text("\n".join(lines) + "\n", encoding="utf-8")
    assert "EXTRA_BODY" in await refusal(desk)


ODD_PRICES = [(0.27, 1.10), (0.27, 1.10, None), (0.27, 1.10, "free"), (-1, 1, 1), 3, None]


@pytest.mark.parametrize("price", ODD_PRICES, ids=str)
async def test_a_price_that_is_not_three_numbers_is_named(desk: Desk, price: object):
    desk.edit(PRICES={"deepseek-chat": price})
    desk.write(numbered(1))
    line = await refusal(desk)
    assert "PRICES" in line
    assert "deepseek-chat" in line


@pytest.mark.parametrize(
    ("constants", "word"),
    [
        ({"FALLBACK": "misc"}, "FALLBACK"),
        ({"LABELS": {"bug": "", "Bug": "", "other": ""}}, "LABELS"),
        ({"LABELS": {"how-to": "", "how to": "", "other": ""}}, "LABELS"),
        ({"LABELS": {"": "", "other": ""}}, "LABELS"),
        ({"LABELS": {}}, "LABELS"),
        ({"MODEL": None}, "MODEL"),
        ({"MODEL": "gpt-9"}, "PRICES"),
        ({"CHINESE_MODEL": "gpt-9"}, "PRICES"),
    ],
    ids=str,
)
async def test_what_does_not_fit_together_is_named(desk: Desk, constants, word):
    desk.edit(**constants)
    desk.write(numbered(1))
    assert word in await refusal(desk)


@pytest.mark.skipif(sys.platform != "linux", reason="elsewhere arguments and file names are text")
async def test_a_model_whose_name_is_not_utf8_is_refused(desk: Desk):
    desk.write(numbered(1))
    assert "not UTF-8" in await refusal(desk, "--budget", "0", "--model", os.fsdecode(b"qwen\xff"))


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
    assert "No such file" in await refusal(desk, missing)


async def test_the_query_of_the_address_is_kept(desk: Desk):
    brisk(desk)
    desk.write(numbered(2))

    class Azure(Witness):
        async def _screen(self, request, number):
            self.query = request.path_qs.partition("?")[2]
            return await super()._screen(request, number)

    async with Azure() as gateway:
        base = gateway.url.removesuffix("/chat/completions")
        for url in (f"{gateway.url}?api-version=2026-10-01", f"{base}?api-version=2026-10-01"):
            done = await desk.run(gateway, TOKENHUB_URL=url)
            assert (done.status, gateway.query) == (0, "api-version=2026-10-01")
            gateway.query = ""
            desk.output.unlink()


async def test_an_infinite_budget_is_no_budget(desk: Desk):
    brisk(desk, BUDGET_USD=0.0000001)
    desk.write(numbered(20))
    async with Gateway(QUICK) as gateway:
        done = await desk.run(gateway, "--budget", "inf", "--model", "gpt-9")
    assert (done.status, len(done.labels)) == (0, 20)
    assert "unpriced" in done.stderr.splitlines()[0]


def long_labels(count: int) -> dict[str, str]:
    return {f"{'a rather long label with many words in it ' * 2}{n}": "" for n in range(count)} | {"other": ""}


async def test_long_labels_get_the_tokens_that_they_need(desk: Desk):
    labels = long_labels(3)
    brisk(desk, LABELS=labels)
    desk.write(numbered(3))
    longest = max(labels, key=len)
    async with Witness(replace(QUICK, reply=lambda text: longest)) as gateway:
        done = await desk.run(gateway)
    assert (done.status, set(done.labels.values())) == (0, {longest})
    assert gateway.bodies[0]["max_tokens"] >= len(longest) / 2
