"""The README's recipes, each followed as a user would against the stand-in as that very server.

Each row's code is put into a copy of classify.py as it stands; what stands in several rows goes into one dictionary, as
the README says. Of a server that has no stand-in only this is shown: that its row is taken, and sent as it stands.
"""

import json
import re
from dataclasses import dataclass, replace
from pathlib import Path

import pytest

import classify
from tests.conftest import Desk, Done, numbered, settings_in
from tests.gateway import SERVERS, Gateway, keyword_label
from tests.helpers import QUICK, Witness, brisk

README = Path(classify.__file__).with_name("README.md").read_text(encoding="utf-8")
ABOUT = ("my invoice is wrong", "the app has a bug", "how do I log in", "please add dark mode", "well")
TICKETS = {f"t{n}": f"Hello, {about}. See number {n}, thanks!" for n, about in enumerate(8 * ABOUT)}


@dataclass(frozen=True)
class Recipe:
    """What to set: the Python of EXTRA_BODY, and that of other constants."""

    extra_body: str = "{}"
    constants: tuple[tuple[str, str], ...] = ()
    name: str = ""

    def __or__(self, other: "Recipe") -> "Recipe":
        extra_body, constants = f"{self.extra_body} | {other.extra_body}", self.constants + other.constants
        return Recipe(extra_body, constants, f"{self} + {other}")

    def __str__(self) -> str:
        return self.name or self.extra_body


def recipes(text: str) -> dict[str, Recipe]:
    """The rows of the table that have an EXTRA_BODY, by their first cell."""
    found = {}
    table = text[text.index("\n| server |") :].strip().split("\n\n")[0]
    for row in table.split("\n")[2:]:
        _, server, code, *_ = re.split(r"(?<!\\)\| ?", row)  # \| is a | inside of a table, even in code
        spans = re.findall(r"`(.*?)`", code.replace(r"\|", "|"))
        constants = tuple(tuple(span.split(" = ", 1)) for span in spans if re.match(r"[A-Z_]+ = ", span))
        if bodies := [span for span in spans if span.startswith("{")]:
            found[server.strip()] = Recipe(bodies[0], constants, server.strip())
    return found


ROWS = recipes(README)
GPT_5, DEEPSEEK, OLLAMA, NO_THOUGHTS = (
    ROWS[name] for name in ("OpenAI GPT-5", "DeepSeek V4", "Ollama, Qwen3", "vLLM, llama.cpp, Qwen3")
)
CHOICE, GRAMMAR, SCHEMA = (ROWS[name] for name in ("vLLM", "llama.cpp", "OpenAI, Ollama"))
GPT_5_1 = Recipe(GPT_5.extra_body.replace('"minimal"', '"none"'), GPT_5.constants, "OpenAI GPT-5.1")
WITHOUT_STAND_IN = {"Gemini", "Qwen at Alibaba", "OpenRouter"}
DONE_RIGHT = [  # server, recipe, whether it holds the answer to the list
    ("deepseek-v4", DEEPSEEK, False),
    ("openai-gpt-5", GPT_5, False),
    ("openai-gpt-5", GPT_5 | SCHEMA, True),
    ("openai-gpt-5.1", GPT_5_1, False),
    ("openai-gpt-5.1", GPT_5_1 | SCHEMA, True),
    ("ollama-qwen3", OLLAMA, False),
    ("ollama-qwen3", OLLAMA | SCHEMA, True),
    ("vllm", CHOICE, True),
    ("vllm", SCHEMA, True),
    ("vllm-qwen3", CHOICE | NO_THOUGHTS, True),
    ("llama.cpp", GRAMMAR, True),
    ("llama.cpp", SCHEMA, True),
    ("llama.cpp-qwen3", GRAMMAR | NO_THOUGHTS, True),
]
DONE_WRONG = [  # what the README warns of
    *((server, Recipe()) for server in ("vllm", "llama.cpp", "llama.cpp-qwen3")),
    ("deepseek-v4", DEEPSEEK | SCHEMA),
    ("openai-gpt-5", GPT_5 | Recipe('{"max_completion_tokens": 10}')),
    ("openai-gpt-5.1", GPT_5),
    ("ollama-qwen3", OLLAMA | replace(SCHEMA, constants=(), name="a schema without more MAX_TOKENS")),
    ("vllm-qwen3", CHOICE),
    ("llama.cpp-qwen3", GRAMMAR),
]


async def follow(desk: Desk, gateway: Gateway, recipe: Recipe, tickets: dict[str, str] = TICKETS) -> Done:
    """Puts the recipe into the program, word for word, and runs it against this gateway."""
    brisk(desk, MAX_RETRIES=1)
    program = desk.folder / "classify.py"
    source = program.read_text(encoding="utf-8")
    lines, places = source.splitlines(), settings_in(source)
    for name, value in (("EXTRA_BODY", recipe.extra_body), *recipe.constants):
        first, last = places[name]
        lines[first - 1 : last] = [f"{name} = {value}", *[""] * (last - first)]
    program.write_text("\n".join(lines) + "\n", encoding="utf-8")
    desk.write(tickets)
    return await desk.run(gateway, "--rpm", "0", "--concurrency", "8")


async def follow_at(desk: Desk, server: str, recipe: Recipe) -> tuple[Done, Gateway]:
    """The same against the stand-in as that server."""
    async with Gateway(replace(QUICK, server=server)) as gateway:
        return await follow(desk, gateway, recipe), gateway


def off_list(done: Done) -> list[dict]:
    """The lines of which the label is not the model's."""
    return [line for line in done.lines if classify.named_label(line.get("reply", line["label"])) is None]


def test_every_row_is_tried_or_has_no_stand_in():
    tried = " ".join(recipe.extra_body for _, recipe, _ in DONE_RIGHT)
    untried = {name for name, recipe in ROWS.items() if recipe.extra_body not in tried}
    assert untried <= WITHOUT_STAND_IN
    assert {server for server, _, _ in DONE_RIGHT} == set(SERVERS)


@pytest.mark.parametrize("name", sorted(WITHOUT_STAND_IN))
async def test_a_row_without_a_stand_in_is_sent_as_it_stands(name: str, desk: Desk):
    row = ROWS[name]
    async with Witness() as gateway:
        await follow(desk, gateway, row, numbered(1))
    [body] = gateway.bodies
    assert body | eval(row.extra_body) == body


def test_the_prices_that_the_readme_gives_are_prices(monkeypatch: pytest.MonkeyPatch):
    given = re.findall(r'PRICES\["(.*?)"\] = (\(.*?\))', README)
    assert given
    for model, price in given:
        monkeypatch.setitem(classify.PRICES, model, eval(price))
    assert list(classify.wrong_settings()) == []


def test_a_grammar_of_labels_with_quotes_and_other_scripts_is_still_one():
    labels = ['say "no"', "账单", "a|b"]
    body = eval(GRAMMAR.extra_body, {"LABELS": dict.fromkeys(labels), "json": json})
    assert SERVERS["llama.cpp"].allowed(body) == labels


@pytest.mark.parametrize(("server", "recipe", "held"), DONE_RIGHT, ids=str)
async def test_the_recipe_labels_every_ticket(server: str, recipe: Recipe, held: bool, desk: Desk):
    done, gateway = await follow_at(desk, server, recipe)
    assert done.status == 0, done.stderr
    unnamed = {row["id"] for row in done.ledger if row["kind"] == "no label"}
    assert bool(unnamed) == (not held)
    assert gateway.requests == gateway.billed.total() == len(TICKETS) + len(unnamed)
    right = {id_ for id_, label in done.labels.items() if label == keyword_label(TICKETS[id_])}
    assert right == TICKETS.keys() - {line["id"] for line in off_list(done)}


@pytest.mark.parametrize(("server", "recipe"), DONE_WRONG, ids=str)
async def test_without_it_or_with_the_wrong_one_tickets_go_unlabelled_or_off_the_list(
    server: str, recipe: Recipe, desk: Desk
):
    done, _ = await follow_at(desk, server, recipe)
    assert done.status == 1 or off_list(done), "it works, so that the recipe is not needed"


@pytest.mark.parametrize("recipe", [Recipe(), DEEPSEEK, GPT_5_1], ids=str)
async def test_a_parameter_that_is_refused_stops_the_run_at_the_first_answer(recipe: Recipe, desk: Desk):
    done, gateway = await follow_at(desk, "openai-gpt-5", recipe)
    assert done.lines == []
    assert gateway.requests <= 8, "sent on after every request was sure to fail"
    assert re.search("un(supported|recognized) (parameter|value|request)", done.stderr, re.I)
    assert "EXTRA_BODY" in done.stdout.splitlines()[-1]


@pytest.mark.parametrize("server", ["deepseek-v4", "ollama-qwen3", "vllm-qwen3"])
async def test_a_model_that_thinks_all_its_tokens_away_is_told_of_as_such(server: str, desk: Desk):
    done, gateway = await follow_at(desk, server, Recipe())
    assert done.lines == [], "labels that no model gave"
    assert gateway.requests < 2 * 20 + 2 * 8, "paid on and on for nothing"
    assert "MAX_TOKENS" in done.stderr
