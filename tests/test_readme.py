"""The README's own words, run as they stand."""

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
    [snippet] = blocks("python")
    process = await asyncio.create_subprocess_exec(
        sys.executable, "-c", snippet, cwd=desk.folder, stdout=asyncio.subprocess.PIPE
    )
    shown, _ = await process.communicate()
    assert process.returncode == 0
    assert re.search(r"│ +8 │ +[0-9.]+ │ +[0-9.]+ │ +[0-9.]+ │", shown.decode())
    assert re.search(r"│ t3 +│ \S+ +│ bug +│", shown.decode())


def test_every_setting_that_it_names_exists():
    table = README[README.index("## Settings") : README.index("Other servers")]
    names = set(re.findall(r"`([A-Z_]{3,})`", table))
    assert names
    assert {name for name in names if not hasattr(classify, name)} == set()
