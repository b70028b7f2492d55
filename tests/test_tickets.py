"""How tickets.csv is read, in whatever way a spreadsheet wrote it, and what is said about one that cannot be."""

import csv
import io
import re
import tracemalloc
from pathlib import Path

import pytest
from hypothesis import HealthCheck, example, given, settings
from hypothesis import strategies as st

from classify import InputError, load_tickets
from tests.conftest import Desk
from tests.gateway import Gateway
from tests.helpers import QUICK, run_here


def read(folder: Path, content: bytes) -> list[tuple[str, str]]:
    """Id and body of each ticket in a file with this content."""
    path = folder / "tickets.csv"
    path.write_bytes(content)
    return [(ticket.id, ticket.text) for ticket in load_tickets(path)]


@pytest.mark.parametrize(
    ("content", "tickets"),
    [
        ("id,body\na,Hello\nb,Bye\n", [("a", "Hello"), ("b", "Bye")]),
        ("id,body\na,Hello", [("a", "Hello")]),
        ("\ufeffid,body\na,Hello\n", [("a", "Hello")]),
        ('\ufeff"id","body"\n"a","Hello"\n', [("a", "Hello")]),
        ("id,body\r\na,Hello\r\n", [("a", "Hello")]),
        ('id,body\na,"one\ntwo\r\nthree\rfour"\nb,Bye\n', [("a", "one\ntwo\r\nthree\rfour"), ("b", "Bye")]),
        ('id,body\na,"say ""hi"", please"\n', [("a", 'say "hi", please')]),
        ("id;body\r\na;Hello, world; \r\n".replace("; \r", "\r"), [("a", "Hello, world")]),
        ('id\tbody\r\na\t"Hello,\tworld; you"\r\n', [("a", "Hello,\tworld; you")]),
        ('"id";"body"\n"a";"Hello; world"\n', [("a", "Hello; world")]),
        ("when,id,who,body,note\n1,a,me,Hello,x\n", [("a", "Hello")]),
        ("Body, ID\nHello,a\n", [("a", "Hello")]),
        ("id,body\n\na,Hello\n\n\n", [("a", "Hello")]),
        ("id,body\na,\n", [("a", "")]),
        ("id,body,note\na,Hello\n", [("a", "Hello")]),
        ("id,body,\na,Hello,x\n", [("a", "Hello")]),
        ("id,body\na,Hello,,\n", [("a", "Hello")]),
        ("id,body\n1,发票 🙂\n", [("1", "发票 🙂")]),
        ("id,body\n", []),
        ("id,body\n,\na,Hello\n , \n,\n", [("a", "Hello")]),
        ("id,body\ra,Hello\rb,Bye\r", [("a", "Hello"), ("b", "Bye")]),
        ("id,body,note,note\na,Hello,x,y\n", [("a", "Hello")]),
    ],
    ids=[
        "plain", "no newline at the end", "BOM", "BOM and quotes", "CRLF", "line ends in quotes", "doubled quotes",
        "semicolons as Excel", "tabs as Excel", "semicolons as LibreOffice", "more columns", "order and case",
        "blank lines", "empty body", "short row", "column without a name", "trailing commas", "any script",
        "header alone", "rows of separators", "line ends of old Macs", "two other columns of one name",
    ],
)  # fmt: skip
def test_tickets_are_read_as_spreadsheets_write_them(tmp_path, content, tickets):
    assert read(tmp_path, content.encode()) == tickets


def test_a_body_of_megabytes_is_one_ticket_cut_at_the_most_that_is_sent(tmp_path):
    body = "A long story, with commas.\n" * 200_000
    assert read(tmp_path, f'id,body\na,"{body}"\n'.encode()) == [("a", body[:12_000])]


def test_a_gold_label_is_read_where_there_is_one(tmp_path):
    (tmp_path / "t.csv").write_text("id,body,label\na,x,bug\nb,y,\n")
    assert [ticket.gold for ticket in load_tickets(tmp_path / "t.csv")] == ["bug", ""]


def test_the_first_ticket_of_a_huge_file_comes_without_reading_the_rest(tmp_path):
    path = tmp_path / "tickets.csv"
    path.write_bytes(b"id,body\na,Hello\n")
    with open(path, "r+b") as file:
        file.truncate(200_000_000)  # a sparse file: zeros that take no room
    tracemalloc.start()
    try:
        first = next(load_tickets(path))
        _, peak = tracemalloc.get_traced_memory()
    finally:
        tracemalloc.stop()
    assert (first.id, first.text) == ("a", "Hello")
    assert peak < 1_000_000


def test_memory_stays_flat_over_many_tickets(tmp_path):
    path = tmp_path / "tickets.csv"
    path.write_text("id,body\n" + "".join(f"t{n},{'x' * 500}\n" for n in range(20_000)))
    tracemalloc.start()
    try:
        assert sum(1 for _ in load_tickets(path)) == 20_000
        _, peak = tracemalloc.get_traced_memory()
    finally:
        tracemalloc.stop()
    assert peak < 1_000_000


class Semicolons(csv.excel):
    """As Excel and LibreOffice write CSV where the comma is the decimal sign."""

    delimiter = ";"


TEXT = st.text(st.characters(blacklist_categories=["Cs"]))
AWKWARD = st.lists(st.sampled_from([*'",;\t\r\n', '""', "\r\n", "x", "票", "\0", "\ufeff", "\u2028"])).map("".join)
ROWS = st.lists(st.tuples(TEXT.filter(str.strip), TEXT | AWKWARD), max_size=5, unique_by=lambda row: row[0])


@given(
    ROWS,
    st.sampled_from([csv.excel, csv.excel_tab, csv.unix_dialect, Semicolons]),
    st.sampled_from([csv.QUOTE_MINIMAL, csv.QUOTE_ALL]),
    st.sampled_from(["utf-8", "utf-8-sig"]),
)
@example([("a", "one\rtwo"), ("\ufeff", "\ufeff")], csv.excel, csv.QUOTE_MINIMAL, "utf-8")
@settings(suppress_health_check=[HealthCheck.function_scoped_fixture], deadline=None)
def test_what_pythons_csv_writer_wrote_is_read_back(tmp_path, rows, dialect, quoting, encoding):
    if dialect is csv.unix_dialect:
        quoting = csv.QUOTE_ALL  # its own; without, Python before 3.13 writes a lone \r as the end of a row
    text = io.StringIO(newline="")
    csv.writer(text, dialect, quoting=quoting).writerows([("id", "body"), *rows])
    expected = [(id_, body if body.strip() else "") for id_, body in rows]  # a body of blanks is an empty one
    assert read(tmp_path, text.getvalue().encode(encoding)) == expected


WRONG = {
    "no body column": (b"id,text\na,Hello\n", 1, "body"),
    "no id column": (b"number,body\na,Hello\n", 1, "id"),
    "an empty file": (b"", 1, "column id, not 0"),
    "the same id twice": (b"id,body\na,one\nb,two\na,three\n", 4, "a second ticket with the id.*a"),
    "not UTF-8": ("id,body\na,one\nb,Stra\xdfe\n".encode("latin-1"), 3, "UTF-8"),
    "not UTF-8, after a ticket of several lines": (b'id,body\na,"one\ntwo\nthree"\nb,\xff\n', 5, "UTF-8"),
    "not UTF-8, within a ticket of several lines": (b'id,body\na,"one\ntwo\xff\nthree"\n', 2, "UTF-8"),
    "UTF-16, Excel's Unicode text": ("id\tbody\na\tHello\n".encode("utf-16"), 1, "UTF-8"),
    "not UTF-8, after blank lines": (b"id,body\n\n\na,\xff\n", 4, "UTF-8"),
    "an empty id, after blank lines and ones in quotes": (b'id,body\n\na,"\n\n"\n\n,two\n', 7, "id"),
    "an empty id": (b"id,body\na,one\n,two\n", 3, "id"),
    "a blank id": (b"id,body\na,one\n  ,two\n", 3, "id"),
    "no body in a row": (b"id,body\na,one\nb\n", 3, "body"),
    "too many fields": (b"id,body\na,Hello, world\n", 2, "fields"),
    "a quote that never closes": (b'id,body\na,one\nb,"two\nc,three\n', 3, "unexpected end of data"),
    "text after a quote": (b'id,body\na,one\nb,"two" three\n', 3, "expected after"),
    "a gold label that is none": (b"id,body,label\na,one,bug\nb,two,Bugs\n", 3, "label.*billing"),
    "two columns of one name": (b"id,body,Body\na,one,two\n", 1, "one column body, not 2"),
    "two columns of ids": (b"id,ID,body\na,b,one\n", 1, "one column id, not 2"),
}


@pytest.mark.parametrize(("content", "line", "why"), WRONG.values(), ids=WRONG)
def test_a_wrong_file_is_refused_with_its_line_and_nothing_is_sent(desk: Desk, content, line, why):
    desk.tickets.write_bytes(content)
    done = run_here(desk)
    assert done.status == 2
    assert re.search(rf"(:|line ){line}\b.*{why}", done.stderr)
    assert done.stderr.count("\n") == 1
    assert not desk.output.exists()


@pytest.mark.parametrize("there", ["nothing", "a folder"])
def test_a_file_that_cannot_be_read_is_named(desk: Desk, there):
    if there == "a folder":
        desk.tickets.mkdir()
    done = run_here(desk)
    assert (done.status, done.stdout) == (2, "")
    assert "tickets.csv" in done.stderr
    assert done.stderr.count("\n") == 1


def test_an_error_after_many_good_tickets_is_found_before_anything_is_sent(desk: Desk):
    desk.tickets.write_bytes(b"id,body\n" + b"".join(b"t%d,Hello\n" % n for n in range(5000)) + b"t5000,\xff\n")
    done = run_here(desk)
    assert done.status == 2
    assert ":5002:" in done.stderr


async def test_the_command_line_says_what_is_wrong_with_the_file_and_exits_2(desk: Desk):
    desk.write([("a", "Hello")], header=("id", "text"))
    async with Gateway(QUICK) as gateway:
        done = await desk.run(gateway)
    assert (done.status, done.stdout, gateway.requests) == (2, "", 0)
    assert "tickets.csv:1:" in done.stderr


def test_the_text_of_a_ticket_is_not_shown_in_an_error_about_it(tmp_path):
    with pytest.raises(InputError) as error:
        read(tmp_path, b"id,body\na,my password is hunter2, thanks\n")
    assert "hunter2" not in str(error.value)
