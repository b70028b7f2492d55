"""The README's own words, run as they stand."""

import ast
import asyncio
import re
import sys
from pathlib import Path

import classify
from tests.conftest import numbered
from tests.gateway import Gateway, Script

ROOT = Path(__file__).parent.parent
README = (ROOT / "README.md").read_text(encoding="utf-8")


def blocks(language: str) -> list[str]:
    return re.findall(rf"^```{language}\n(.*?)^```$", README, re.M | re.S)


async def test_its_snippet_compares_two_models(desk):
    desk.write(numbered(5) | numbered(8, "please add dark mode"))
    async with Gateway(Script(rpm=0, latency_s=0)) as gateway:
        await desk.run(gateway, "-o", "deepseek.jsonl", "--model", "deepseek-chat")
    async with Gateway(
        Script(rpm=0, latency_s=0, reply=lambda text: "bug" if "number 3" in text else "other")
    ) as gateway:
        await desk.run(gateway, "-o", "qwen.jsonl", "--model", "qwen2.5-72b-instruct")
    [snippet] = [block for block in blocks("python") if "duckdb" in block]
    process = await asyncio.create_subprocess_exec(
        sys.executable, "-c", snippet, cwd=desk.folder, stdout=asyncio.subprocess.PIPE
    )
    shown, _ = await process.communicate()
    assert process.returncode == 0
    assert re.search(r"│ +8 │ +[0-9.]+ │ +[0-9.]+ │ +[0-9.]+ │", shown.decode())
    assert re.search(r"│ t3 +│ \S+ +│ bug +│", shown.decode())


def test_every_setting_that_it_names_exists():
    names = set(re.findall(r"`([A-Z_]{3,})\b", README)) - {"TOKENHUB_KEY"}
    assert names
    assert {name for name in names if not hasattr(classify, name)} == set()


def test_it_and_the_program_keep_to_their_size():
    """Size is a feature: a file that nobody reads is trusted by nobody."""
    source = (ROOT / "classify.py").read_text(encoding="utf-8")
    assert len(README) <= 9_000
    assert len(source) <= 50_000
    assert max(map(len, source.splitlines())) <= 100
    functions = [n for n in ast.walk(ast.parse(source)) if isinstance(n, ast.FunctionDef | ast.AsyncFunctionDef)]
    assert [n.name for n in functions if n.end_lineno - n.lineno + 1 > 30] == []


def test_the_map_in_the_docstring_names_what_there_is():
    names = re.findall(r"^    (\w+(?:\.\w+)?)  ", classify.__doc__, re.M)
    assert len(names) == 6
    for name in names:
        first, _, second = name.partition(".")
        assert hasattr(getattr(classify, first), second or "__doc__")
