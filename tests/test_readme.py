"""The README's own words, run as they stand."""

import ast
import math
import re
import shutil
import sqlite3
from contextlib import closing
from dataclasses import replace
from pathlib import Path

import classify
from tests.gateway import Gateway
from tests.helpers import QUICK, brisk

ROOT = Path(__file__).parent.parent
README = (ROOT / "README.md").read_text(encoding="utf-8")
PROGRAM = (ROOT / "classify.py").read_text(encoding="utf-8")
TREE = ast.parse(PROGRAM)


def blocks(language: str) -> list[str]:
    fenced = re.findall(r"^ *```(\w*)\n(.*?)^ *```$", README, re.M | re.S)
    return [block for name, block in fenced if name == language]


def table(title: str) -> list[list[str]]:
    """The rows of the table below the line that begins with this title, without its head."""
    rows = re.search(rf"^(?:#+ )?{title}.*?\n\n((?:\|[^\n]*\n)+)", README, re.M | re.S)[1]
    return [[cell.strip() for cell in row.strip("|").split("|")] for row in rows.splitlines()[2:]]


async def test_its_queries_answer_what_it_says_after_two_models_and_with_confidence(desk):
    brisk(desk, LOGPROBS=True)
    rows = [(f"t{n}", f"ticket number {n}", "bug") for n in range(6)]
    desk.write(rows, header=("id", "body", "label"))
    async with Gateway(replace(QUICK, reply=lambda text: "bug")) as gateway:
        await desk.run(gateway, "--model", "deepseek-chat")
    async with Gateway(replace(QUICK, reply=lambda text: "other" if "number 3" in text else "bug")) as gateway:
        await desk.run(gateway, "--model", "qwen2.5-72b-instruct")
    [two_models, least_sure] = blocks("sql")
    with closing(sqlite3.connect(desk.ledger)) as db:
        # As ".import --csv" does.
        db.execute("CREATE TEMP TABLE tickets (id TEXT, body TEXT, label TEXT)")
        db.executemany("INSERT INTO tickets VALUES (?, ?, ?)", rows)
        assert db.execute(two_models).fetchall() == [("t3", "bug", "other", "bug", "ticket number 3")]
        answers = db.execute(least_sure).fetchall()
    confidences = [confidence for *_, confidence in answers]
    assert len(answers) == 12
    assert confidences == sorted(confidences)
    assert all(0.9 < confidence < 1 for confidence in confidences)


def test_every_setting_that_it_names_exists():
    names = set(re.findall(r"`([A-Z_]{3,})\b", README))
    names -= {"TOKENHUB_KEY", "HTTPS_PROXY", "NO_PROXY", "SSL_CERT_FILE", "SIGTERM", "SIGHUP", "ATTACH"}
    assert len(names) > 10
    assert {name for name in names if not hasattr(classify, name)} == set()


async def test_its_demo_shows_what_it_says(desk):
    brisk(desk)
    shutil.copy(ROOT / "tickets.csv", desk.tickets)
    async with Gateway(QUICK) as gateway:
        done = await desk.run(gateway, "-o", "demo.jsonl")
    [shown] = [block for block in blocks("") if block.startswith("Classified ")]
    wanted = [re.escape(line).replace(r"6\ s", r"\d+\ s") for line in shown.splitlines() if line and line != "..."]
    lines = done.stdout.splitlines()
    assert [line for line in wanted if not any(re.fullmatch(line, one) for one in lines)] == []


def test_its_table_of_outcomes_is_the_programs_list_of_kinds():
    kinds = [kind for kind in vars(classify).values() if isinstance(kind, classify.Kind)]
    rows = table("Every outcome")
    assert [row[0].strip("`") for row in rows] == [kind.name for kind in dict.fromkeys(kinds)]
    for kind, (_, _, _, patience, billed) in zip(dict.fromkeys(kinds), rows, strict=True):
        assert (billed != "no") == kind.is_billed, kind.name
        told = {"": math.inf, "5 min": 300, "90 s": 90, "5 s": 5, "none": 0}.get(patience, 5)
        assert told == kind.patience_s, kind.name


def test_what_it_says_of_a_run_that_stops_are_the_programs_own_words():
    said = [text for row in table("If it stops") for text in re.findall("`([^`]+)`", row[0])]
    kinds = {kind.name for kind in vars(classify).values() if isinstance(kind, classify.Kind)}
    named = [text for text in said if text.partition(", ")[2] in kinds]
    assert named == ["401, the key is refused", "404, no such address or model"]
    budget = classify.no_room(classify.Budget(2.0, 1.99)).why
    few = classify.too_few("M", 0, 20, classify.NO_LABEL).why
    patience = f"nothing better for {classify.duration(classify.STUCK_S)}"
    for text in said:
        start = text.removeprefix("... ")
        assert text in named or any(start in own for own in (budget, few, patience, *kinds)), text


def test_its_demo_writes_an_output_of_its_own():
    [demo] = re.findall(r"^.*python -m tests\.gateway -- (.*)$", README, re.M)
    assert demo == "python classify.py -o demo.jsonl"


def test_it_begins_with_uv_as_the_program_says_what_it_needs():
    assert "uv run classify.py" in README.partition("## Your own tickets")[0]
    needed = re.findall(r"^# dependencies = (\[.*\])$", PROGRAM, re.M)
    assert [ast.literal_eval(line) for line in needed] == [(ROOT / "requirements.txt").read_text().split()]


def test_every_option_that_it_names_exists():
    named = set(re.findall(r"classify\.py[^\n`|]*? (--[a-z-]+)", README))
    assert named
    assert {option for option in named if f'"{option}"' not in PROGRAM} == set()


def test_the_program_keeps_to_what_a_readable_file_is():
    assert max(map(len, PROGRAM.splitlines())) <= 100
    functions = [n for n in ast.walk(TREE) if isinstance(n, ast.FunctionDef | ast.AsyncFunctionDef)]
    assert [n.name for n in functions if n.end_lineno - n.lineno + 1 > 40] == []
    classes = [n for n in ast.walk(TREE) if isinstance(n, ast.ClassDef)]
    assert {n.name: attributes_of(n) for n in classes if len(attributes_of(n)) > 11} == {}


def attributes_of(class_: ast.ClassDef) -> set[str]:
    """The names that are assigned on self."""
    return {
        node.attr
        for node in ast.walk(class_)
        if isinstance(node, ast.Attribute) and isinstance(node.ctx, ast.Store) and ast.unparse(node.value) == "self"
    }


def test_the_map_in_the_docstring_names_what_there_is():
    names = re.findall(r"^    (\w+) {2,}\S", classify.__doc__, re.M)
    assert len(names) >= 6
    for name in names:
        assert hasattr(classify, name), name
    for name in re.findall(r"\b[A-Z][a-z]+\.[a-z]+\b", classify.__doc__):
        class_, _, method = name.partition(".")
        assert hasattr(getattr(classify, class_), method), name


def test_its_sections_stand_in_the_order_of_the_design():
    sections = re.findall(r"^# ---- (.*) ----$", PROGRAM, re.M)
    order = ["settings", "what is shown", "tickets", "labels", "money", "one call", "pacing", "ledger", "run", "report"]
    assert [name for name in sections if name in order] == order
