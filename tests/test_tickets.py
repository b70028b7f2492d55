"""How tickets.csv is read, in whatever way a spreadsheet wrote it; what is refused, and what is said about it."""

import codecs
import csv
import io
import itertools
import os
import re
import time
import tracemalloc
from contextlib import suppress

import pytest
from hypothesis import HealthCheck, example, given, settings
from hypothesis import strategies as st

import classify
from classify import InputError, Ticket, is_chinese, load_tickets
from tests.conftest import Desk
from tests.helpers import run_here


@pytest.fixture
def read(tmp_path, monkeypatch):
    """Reads a file with this content under these settings; returns its tickets. `read.file` is what was opened."""

    def read(content: str | bytes, **constants):
        for name, value in constants.items():
            monkeypatch.setattr(classify, name, value)
        path = tmp_path / "tickets.csv"
        path.write_bytes(content.encode() if isinstance(content, str) else content)
        read.file = load_tickets(str(path))
        return list(read.file)

    return read


def pairs(tickets: list[Ticket]) -> list[tuple[str, str]]:
    return [(ticket.id, ticket.text) for ticket in tickets]


def refusal(read, content, **constants) -> list[str]:
    """The lines of the error, without the folder."""
    with pytest.raises(InputError) as error:
        read(content, **constants)
    return [line.rpartition("/")[2] if "/tickets.csv" in line else line for line in str(error.value).split("\n")]


ONE = [("1", "a crash, now")]


@pytest.mark.parametrize("delimiter", [",", ";", "\t", "|"])
def test_the_delimiter_is_the_one_under_which_the_columns_are_found(read, delimiter):
    names = ['"a, b; c | d"', "ＩＤ\xa0", " Bo\u200bdy "]  # another name is full of the other delimiters
    rows = delimiter.join(names) + "\r\n" + delimiter.join(["x", "1", '"a crash, now"'])
    marks = ("", "\ufeff", "\ufeff\u200b")
    hints = ("", "Sep={}\r\n", '"sep={}"\r\n', "\r\n")
    for mark, hint in itertools.product(marks, hints):
        assert pairs(read(mark + hint.format(delimiter) + rows)) == ONE, (mark, hint)


@pytest.mark.parametrize(
    ("mark", "encoding", "setting"),
    [
        (b"", "utf-8", "utf-8-sig"),
        (codecs.BOM_UTF8, "utf-8", "cp1252"),
        (codecs.BOM_UTF16_LE, "utf-16-le", "cp1252"),
        (codecs.BOM_UTF16_BE, "utf-16-be", "utf-8-sig"),
        (codecs.BOM_UTF32_LE, "utf-32-le", "utf-8-sig"),
        (b"", "utf-16-le", "utf-16-le"),
        (b"", "cp1252", "cp1252"),
    ],
)
def test_a_byte_order_mark_is_believed_and_else_the_setting(read, mark, encoding, setting):
    tickets = read(mark + 'ID;Größe\n1;"a crash, now"\n'.encode(encoding), ENCODING=setting, TEXT_COLUMNS=("größe",))
    assert pairs(tickets) == ONE
    assert read.file.layout.header == ["ID", "Größe"]


def test_line_numbers_are_those_of_an_editor(read):
    tickets = read('sep=,\n\nid,body\n1,"one\ntwo"\n\n , \n2,"x\r\n"\r\n3,y')
    assert [(t.id, t.line) for t in tickets] == [("1", 4), ("2", 8), ("3", 10)]


@pytest.mark.parametrize(
    ("content", "constants", "tickets"),
    [
        ("id,body\na,one\n", {"TEXT_COLUMNS": "body"}, [("a", "one")]),
        ("text,n\none,5\n,\ntwo,6\n", {"ID_COLUMN": None, "TEXT_COLUMNS": "TEXT"}, [("1", "one"), ("2", "two")]),
        ("body\none\ntwo\n", {"ID_COLUMN": None}, [("1", "one"), ("2", "two")]),
        ("id,s,body\na,Hi,there\nb,,you\nc,-- ,?\n", {"TEXT_COLUMNS": ("s", "body")},
         [("a", "Hi\n\nthere"), ("b", "you"), ("c", "")]),
        ('"My\nID",body\n1,x\n', {"ID_COLUMN": "my\nid"}, [("1", "x")]),
        ("id,body\n007,x\n7,y\n1.0,z\n", {}, [("007", "x"), ("7", "y"), ("1.0", "z")]),
        ("id,body\ra,one\rb,two\r", {}, [("a", "one"), ("b", "two")]),
        ("id,body\n1,a\0b\n", {}, [("1", "a\0b")]),
        ("id,body,\na,x,note\nb,y,,\n", {}, [("a", "x"), ("b", "y")]),
        ("id,body,n,n\na,x,1,2\n", {}, [("a", "x")]),
        ("a;b;c;d,id,body\nx,1,y\n", {}, [("1", "y")]),
        ("id,body\n", {}, []),
        ("id,body\r\n\r\n,\r\na,Hello\r\n , \r\n\r\n", {}, [("a", "Hello")]),
        ("Body, ID,note\nHello,a\n", {}, [("a", "Hello")]),
    ],
    ids=[
        "one column as a string", "rows numbered", "one column in all", "several columns, blank ones left out",
        "a line break in a name", "ids as they are", "line ends of old Macs", "NUL in a text", "trailing commas",
        "other columns of one name", "finer under a wrong delimiter", "a header alone", "rows of separators",
        "another order and a short row",
    ],
)  # fmt: skip
def test_what_is_read(read, content, constants, tickets):
    assert pairs(read(content, **constants)) == tickets


@pytest.mark.parametrize(
    ("content", "constants", "gold"),
    [
        ("id,body,Label\n1,x, Bug \n2,y\n", {}, ["Bug", ""]),
        ("id,body,label,label\n1,x,a,b\n", {"GOLD_COLUMN": None}, [""]),
        ("id,body,truth\n1,x,bug\n", {"GOLD_COLUMN": "Truth"}, ["bug"]),
    ],
    ids=["as it is", "ignored", "by another name"],
)
def test_a_gold_label_is_the_cell_as_it_is(read, content, constants, gold):
    assert [ticket.gold for ticket in read(content, **constants)] == gold


# ---- What is sent of a text --------------------------------------------------------------------------

B64 = "iVBORw0KGgo" * 1300
SENT = [  # a cell, and what is sent of it
    ("\xa0\r\n" * 9_000 + "a crash\n\n", "a crash"),
    (f"<style>{'.x{}' * 5_000}</style>a crash", "a crash"),
    (f"<STYLE type='a'>{'<!-- .x{} -->' * 2_000}</Style\n>a crash", "a crash"),
    (f"<script src=x>{'if (a<b) c()' * 2_000}</script>a crash<style>x</style>", "a crash"),
    ("a<style>x</style>crash", "a crash"),
    (f"<!--[if gte mso 9]><xml>{'<a/>' * 5_000}</xml><![endif]-->a <!-- -x --y- -->crash", "a  crash"),
    (f"<svg viewBox='0 0'><path d='{'M1 2 L3 4 ' * 2_000}'/></svg>a crash", "a crash"),
    ("it says <!-- and crashes", "it says <!-- and crashes"),
    ("the <style> tag crashes", "the <style> tag crashes"),
    ("the <style> tag </b> crashes", "the <style> tag </b> crashes"),
    ("<styled>a</styled> <b>crash</b>", "<styled>a</styled> <b>crash</b>"),
    (f"<img src='data:image/png;base64,{B64}'>a crash", "<img src=''>a crash"),
    (f"![](data:image/svg+xml;charset=utf-8;base64,{B64}==)a crash", "![]()a crash"),
    (f"data:;base64,{B64} a crash", "a crash"),
    (f"&lt;img src=&quot;data:image/png;base64,{B64}&quot;&gt;a crash", "&lt;img src=&quot;&quot;&gt;a crash"),
    ("data:image/png;base64," + "\r\n".join(["A" * 76] * 300) + "\r\na crash", "a crash"),
    (f"data:image/png;base64,{B64}。应用崩溃", "。应用崩溃"),
    ("data:export, please; data: a/b, c", "data:export, please; data: a/b, c"),
    ("metadata:a/b,c crashes", "metadata:a/b,c crashes"),
    ("... -- !!", ""),
    ("👍", ""),
    ("<style>.x{}</style>", ""),
]


def test_the_words_are_sent_not_what_is_around_them(read):
    text = io.StringIO()
    csv.writer(text).writerows([("id", "body"), *((n, cell) for n, (cell, _) in enumerate(SENT))])
    for ticket, (cell, sent) in zip(read(text.getvalue()), SENT, strict=True):
        assert (ticket.text, ticket.is_cut) == (sent, False), cell[:80]


def test_a_text_is_cut_at_12000_characters(read):
    tickets = read(f"id,body\n1,{'x' * 12_000}\n2,{'x' * 12_001}\n")
    assert [(len(ticket.text), ticket.is_cut) for ticket in tickets] == [(12_000, False), (12_000, True)]


PIECES = [
    "<!--",
    "<!-- -",
    "-->",
    "<style>",
    "<style></script>",
    "</",
    "<style </",
    "</style",
    "<script <",
    " ",
    "-",
    "\n1,",
    "\n1,x",
]
PIECES += ["data:", "data:a/", "data:;", "data:a/b;c=", "data:a/b,\n", "data:a/b," + "A" * 40 + " "]


def test_no_cell_takes_long(read):
    for piece in PIECES:
        began = time.process_time()
        for end in ("", "</style>", '</style>""'):
            read(f'id,body\n1,"{piece * (2_000_000 // len(piece))}{end}"\n')
        assert time.process_time() - began < 4, f"{piece!r}: linear is less than a second"


# ---- What is Chinese ---------------------------------------------------------------------------------

CHINESE = ("发票", "Please help: 发票 123", "𠮷", "x" * 99 + "票", "约翰・史密斯的发票", "。退款！")
JAPANESE = ("請求書を送ってください", "エラー発生", "請求書ﾃｽﾄ", "領収書の再発行", "ｱ发")
NEITHER = ("", "Hello", "Ünïcödé", "한국어 문의", "Привет", "🙂", "ｆｕｌｌ", "。，！")


def test_chinese_is_text_with_characters_of_the_han_script_and_no_kana():
    assert [text for text in (*CHINESE, *JAPANESE, *NEITHER) if is_chinese(text)] == list(CHINESE)


# ---- What is counted ---------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("content", "short", "swallowed"),
    [
        ("id,body,note\n1,x,y\n2,x\n3,x\n", (2, 3), (0, None)),
        ('id,body\n1,x\n2,"one\n3,two\n4,three"\n5,y\n', (0, None), (1, 3)),
        ('id;body;state\r\n1;"one;open\r\n2;two;open\r\n3;three";open\r\n', (0, None), (1, 2)),
        (
            'id,body\n1,"Hello,\nWe have 1,000 users\nI have 1,000 users, and so on,\n,\n\nBye, then"\n',
            (0, None),
            (0, None),
        ),
        ('id,body,label\n1,"one,\n2,two,\n3,three",\n', (0, None), (1, 2)),
        ('Summary,id,body\nLogin,1,"one\nLogin broken,2,two\nOther thing,3,three"\n', (0, None), (1, 2)),
        ('id;body;n\r1;"one;a\r2;two;a\r3;three";a\r', (0, None), (1, 2)),
        ('body\n"one\ntwo"\n', (0, None), (0, None)),
        ('id,body,note\n\n1,"Hello,\nit costs 1,50, or 2,50, a day"\n', (1, 3), (0, None)),
    ],
    ids=[
        *("short rows", "a stray quotation mark", "three columns", "prose", "an empty last column"),
        *("blanks in the first column", "line ends of an old Mac", "one column", "prose in a short row"),
    ],
)
def test_oddities_are_counted_with_the_first_line(read, content, short, swallowed):
    read(content, **({"ID_COLUMN": None} if content.startswith("body") else {}))

    def counted(findings):
        return findings.count, findings.first[0][0] if findings.first else None

    assert (counted(read.file.short_rows), counted(read.file.swallowed)) == (short, swallowed)
    list(read.file)
    assert (counted(read.file.short_rows), counted(read.file.swallowed)) == (short, swallowed), "a second time"


# ---- What is refused ---------------------------------------------------------------------------------

REMEDY = 'Set ENCODING at the top of classify.py to what it is, such as "cp1252", or save it as "CSV UTF-8" in Excel'
SET = "Set ID_COLUMN and TEXT_COLUMNS at the top of classify.py"


@pytest.mark.parametrize(
    ("content", "constants", "said"),
    [
        ("Ticket ID,body\n1,x\n", {}, [f'tickets.csv has no column "id". It has: Ticket ID, body. {SET}']),
        ("a;b;c\n1;2;3\n", {}, [f'tickets.csv has no column "body" or "id". It has: a, b, c. {SET}']),
        ("secret\x1b[31m" + "y" * 99 + ",x\n", {"ID_COLUMN": None},
         [f'tickets.csv has no column "body". It has: secret\\x1b[31m{"y" * 29}, x. {SET}']),
        ("id,body,BODY\n1,x,y\n", {}, ['several columns "body"']),
        ("id,body,label,Label\n1,x,y,z\n", {}, ['several columns "label"', "GOLD_COLUMN"]),
        ("", {}, ["tickets.csv is empty"]),
        ("\ufeff\r\n,,\r\n", {}, ["tickets.csv is empty"]),
        (b"PK\x03\x04\x14\0", {}, ["tickets.csv is a workbook", "CSV UTF-8"]),
        (b"\xd0\xcf\x11\xe0\xa1\xb1", {}, ["tickets.csv is a workbook"]),
        ('{"id": 1, "body": "hunter2"}\n', {}, ["tickets.csv is JSON"]),
        (codecs.BOM_UTF8 + b'\n [{"id":1,"body":"hunter2"}]\n', {}, ["tickets.csv is JSON"]),
        ('{"id":1,"body":"hunter2"}\n'.encode("utf-16"), {}, ["tickets.csv is JSON"]),
        ('[ {"id": 1, "body": "hunter2"} ]', {}, ["tickets.csv is JSON"]),
        ('[\r\n  {\r\n    "id": 1, "body": "hunter2"}]', {}, ["tickets.csv is JSON"]),
        ('[\n  ["id", "body"],\n  ["1", "hunter2"]\n]', {}, ["tickets.csv is JSON"]),
        ('["id", "body"]\n["1", "hunter2"]\n', {}, ["tickets.csv is JSON"]),
        ("[a],[b]\n1,x\n", {}, ["It has: [a], [b]."]),
        ("<table><tr><td>1</td><td>hunter2</td></tr></table>\n", {}, ["tickets.csv is HTML or XML"]),
        (b"\x1f\x8b\x08\0", {}, ["tickets.csv is a gzip archive"]),
        ("id,body\n1,x\n".encode("utf-16-be"), {}, ['ENCODING = "utf-16-be"']),
        ("id,body\n1,x\n".encode("utf-16-le"), {}, ["UTF-16", 'ENCODING = "utf-16-le"']),
        ("id,body\n1,x\n".encode("utf-16-le"), {"ENCODING": "utf-16"}, ["utf-16"]),
        ('"Größe","id"\n1,x\n'.encode("utf-16-le"), {}, ['ENCODING = "utf-16-le"']),
        ("ключ,id\n1,x\n".encode("utf-16-be"), {}, ['ENCODING = "utf-16-be"']),
        ("id,body\n1,x\n", {"ENCODING": "utf-99"}, ["ENCODING = 'utf-99'", "unknown"]),
        ('"id,body\n1,x\n', {}, ["tickets.csv:1: a quotation mark is not closed"]),
        (b"N\xfc,T\xe4\n1,x\n2,\xe9\n", {}, ["tickets.csv:1: not UTF-8", "tickets.csv:3: not UTF-8", REMEDY]),
        (b'id,body\n1,"a\nb\nc\xe9"\n' + b"2,\xe9\n" * 9, {}, ["tickets.csv:4: not UTF-8", "and 5 more", REMEDY]),
        (b"\xff\xfe" + "id,body\n1,x\n2,".encode("utf-16-le") + b"\x00\xd8A\x00", {}, ["tickets.csv:3: not UTF-16"]),
    ],
)  # fmt: skip
def test_a_file_that_cannot_be_read_is_refused_with_the_remedy(read, content, constants, said):
    lines = "\n".join(refusal(read, content, **constants))
    assert all(words in lines for words in said), lines
    assert "hunter2" not in lines
    assert lines.replace("\n", "").isprintable()


@pytest.mark.parametrize(
    ("content", "line", "why"),
    [
        ("id,body\n1,x\n2,hunter2, and more\n", 3, "more cells than columns"),
        ('id,body\n1,"\n\n"\n ,hunter2\n', 5, 'no "id"'),
        ("id,body\n1,x\n\nhunter2\n", 4, "ends before its text"),
        ("note,id,body\nx\n", 2, 'no "id"'),
        ('\ufeff"id","body"\n1,"a\nb"\n\ufeff"id","body"\n2,x\n', 4, "the header again"),
        ("id,body\n1,x\nID,Body\n", 3, "the header again"),
        ("id,body\n1,x\nbody,id\n2,hunter2\n", 3, "the header again"),
        ("id,body\n1,x\n\uff29\uff24,body\n2,y\n", 3, "the header again"),
        ("id,body\n--,----\n1,x\n", 2, 'no "id"'),
        ("note,id,body\nn,\u200b,x\n", 2, 'no "id"'),
        ('id,body\n1,x\n2,"hunter2\n3,y\n', 3, "quotation mark"),
        ('id,body\n1,x\n2,"hunter2" and\n', 3, "quotation mark"),
        ('id,body\n1,x\n2,"' + "x" * 17_000_000 + '"\n', 3, "larger than field limit"),
    ],
    ids=["a comma", "no id", "a footer", "a short row before the id", "two files",
         "another case", "another order", "another width", "dashes", "an id that cannot be seen",
         "not closed", "not doubled", "17 MB"],
)  # fmt: skip
def test_a_row_that_is_no_ticket_is_refused_with_its_line_and_without_its_text(read, content, line, why):
    [said] = refusal(read, content)
    assert said.startswith(f"tickets.csv:{line}: ")
    assert why in said
    assert "hunter2" not in said


def test_a_second_header_is_known_without_ids_too(read):
    [said] = refusal(read, "body,x\na,b\nbody,x\n", ID_COLUMN=None)
    assert said.startswith("tickets.csv:3: the header again")


def test_all_problems_are_told_in_one_go_in_the_order_of_their_lines(tmp_path):
    path = tmp_path / "tickets.csv"
    path.write_text("id,body\n" + "1,x\n" + ",x\n" * 3 + "1,x\n" + "2\n" * 4)
    file = load_tickets(str(path))

    def check():
        seen = set()
        for ticket in file:
            if ticket.id in seen:
                file.problems.add(ticket.line, "a second ticket")
                file.problems.add(2, "whose first was here")
            seen.add(ticket.id)

    with pytest.raises(InputError) as error:
        check()
    lines = str(error.value).splitlines()
    assert [line.split(":")[1] for line in lines[:5]] == ["2", "3", "4", "5", "6"]
    assert lines[4].endswith(":6: a second ticket")
    assert lines[5:] == ["and 4 more"]


@pytest.mark.parametrize("there", ["nothing", "a folder", "a pipe"])
def test_a_path_that_is_no_file_is_named_in_one_line(tmp_path, there):
    path = tmp_path / "tickets.csv"
    if there == "a folder":
        path.mkdir()
    if there == "a pipe":
        os.mkfifo(path)  # nobody writes to it, so that who opens it waits
    with pytest.raises(InputError) as error:
        load_tickets(str(path))
    why = {"nothing": ": No such file", "a folder": ": Is a directory", "a pipe": " is a pipe"}[there]
    assert f"{path}{why}" in str(error.value)
    assert "\n" not in str(error.value)


# ---- Files of any size, and any bytes ----------------------------------------------------------------


def test_a_file_of_any_size_is_streamed(tmp_path):
    path = tmp_path / "tickets.csv"
    path.write_text("id,body\n" + "".join(f"t{n},{'x' * 500}\n" for n in range(20_000)))
    with open(path, "r+b") as file:
        file.truncate(400_000_000)  # a sparse file: zeros that take no room
    tracemalloc.start()
    try:
        tickets = iter(load_tickets(str(path)))
        assert sum(1 for _, ticket in zip(range(19_999), tickets, strict=False)) == 19_999
        _, peak = tracemalloc.get_traced_memory()
    finally:
        tracemalloc.stop()
    assert peak < 1_000_000


class Semicolons(csv.excel):
    """As Excel and LibreOffice write CSV where the comma is the decimal sign."""

    delimiter = ";"


TEXT = st.text(st.characters(blacklist_categories=["Cs"]))
NO_MARKS = dict.fromkeys([0xFEFF, 0x200B])
AWKWARD = st.lists(st.sampled_from([*'",;\t\r\n', '""', "\r\n", "x", "票", "\0", "\u2028"])).map("".join)
ID = TEXT.filter(
    lambda id_: (
        any(map(str.isalnum, id_))
        and id_ == id_.translate(NO_MARKS)
        and classify.plain_name(id_) not in ("id", "body", "sep=")
    )
)


@given(
    st.lists(st.tuples(ID, TEXT | AWKWARD), max_size=5),
    st.sampled_from([csv.excel, csv.excel_tab, csv.unix_dialect, Semicolons]),
    st.sampled_from([csv.QUOTE_MINIMAL, csv.QUOTE_ALL]),
    st.sampled_from(["utf-8", "utf-8-sig", "utf-16"]),
)
@example([("a", "one\rtwo"), ("b", "\ufeff")], csv.excel, csv.QUOTE_MINIMAL, "utf-8")
@settings(suppress_health_check=[HealthCheck.function_scoped_fixture], deadline=None)
def test_what_pythons_csv_writer_wrote_is_read_back(read, rows, dialect, quoting, encoding):
    if dialect is csv.unix_dialect:
        quoting = csv.QUOTE_ALL  # its own; without, Python before 3.13 writes a lone \r as the end of a row
    text = io.StringIO(newline="")
    csv.writer(text, dialect, quoting=quoting).writerows([("id", "body"), *rows])
    tickets = read(text.getvalue().encode(encoding))
    assert [ticket.id for ticket in tickets] == [id_ for id_, _ in rows]
    for ticket, (_, body) in zip(tickets, rows, strict=True):
        assert ticket.row[1].translate(NO_MARKS) == body.translate(NO_MARKS)
        assert ticket.text in ("", body.translate(NO_MARKS).strip())


@given(st.binary(max_size=200) | st.binary(max_size=60).map(lambda tail: b"id,body\n1,x\n" + tail))
@settings(suppress_health_check=[HealthCheck.function_scoped_fixture], deadline=None)
def test_any_bytes_are_read_or_refused(read, content):
    with suppress(InputError):
        read(content)


# ---- What a run says of it ---------------------------------------------------------------------------


def test_a_run_with_a_wrong_file_says_all_that_is_wrong_and_sends_nothing(desk: Desk):
    good = "".join(f"t{n},Hello\n" for n in range(5000))
    desk.tickets.write_text("id,body\na,hunter2\n,two\na,three\nb\n" + good + ",hunter2\n" * 4)
    done = run_here(desk)
    assert (done.status, done.stdout) == (2, "")
    assert [path.name for path in desk.folder.glob("labels*")] == []
    assert done.stderr.splitlines() == [
        'classify.py: tickets.csv:3: no "id"',
        "tickets.csv:4: the id a stands in line 2 already (ID_COLUMN = None numbers the rows)",
        "tickets.csv:5: ends before its text; is it a footer, or an unquoted line break?",
        'tickets.csv:5006: no "id"',
        'tickets.csv:5007: no "id"',
        "and 2 more",
    ]


ODD_ROWS = """id,body,note
1,x
2,"one
3,two,z
4,three"
5,y,z
"""


def test_the_plan_says_what_is_odd_about_a_file_that_can_be_read(desk: Desk):
    desk.tickets.write_text(ODD_ROWS)
    done = run_here(desk, "--dry-run")
    assert done.status == 0
    assert re.search(r"^2 rows shorter than the header.* line 2$", done.stdout, re.M)
    assert re.search(r"^1 row with lines that look like rows.* line 3$", done.stdout, re.M)
