"""What counts as a label, what as Chinese, and which model a ticket goes to."""

import json
import re
from argparse import Namespace

import pytest
from hypothesis import example, given
from hypothesis import strategies as st

from classify import LABELS, is_chinese, load_tickets, normalize_label, pick_model

LABEL = st.sampled_from(list(LABELS))


@pytest.mark.parametrize(
    ("reply", "label"),
    [
        ("Billing", "billing"),
        ("**bug**.", "bug"),
        ("Billing: billing", "billing"),
        ("billing issue", "billing"),
        ("How-to - Adding a second administrator", "how-to"),
        (" other\n\nTicket: I have a ticket for the", "other"),
        ('{"label": "bug"}', "bug"),
        ("Feature-request", "feature-request"),
        ("billing, bug, how-to", None),
        ("thank-you", None),
        ("no-other", None),
        ("", None),
        (" \n\t\n", None),
        ("debug", None),
        ("Label: debugging", None),
        ("bugs", None),
        ("another", None),
        ("the ticket is about billing.", "billing"),
        ("\n\n bug\nbilling", "bug"),
        ("I cannot tell\nbilling", None),
        ("这是一个bug。", "bug"),
        ("<think>", None),
    ],
)
def test_a_reply_is_the_one_label_that_it_names_or_none(reply, label):
    assert normalize_label(reply) == label


def gapped(label: str, gap: str) -> str:
    return label.replace("-", gap)


def wide(text: str) -> str:
    """In the full-width forms of East Asian keyboards, which ASCII alone has."""
    return "".join("\u3000" if c == " " else chr(ord(c) + 0xFEE0) if "!" <= c <= "~" else c for c in text)


CASES = [str.lower, str.upper, str.capitalize, str.title]
GAPS = [lambda text, gap=gap: gapped(text, gap) for gap in "- _\u2010\u2011\u2013"]
QUOTES = [
    lambda text, pair=pair: pair[0] + text + pair[1] for pair in ('""', "''", "“”", "‘’", "「」", "«»", "()", "[]")
]
MARKDOWN = [lambda text, mark=mark: mark + text + mark for mark in ("*", "**", "_", "__", "`", "***")] + [
    lambda text, mark=mark: mark + text for mark in ("# ", "### ", "- ", "* ", "> ", "1. ")
]
ENDINGS = [lambda text, mark=mark: text + mark for mark in (".", "!", ",", ":", ";", "?", "...", "。", "！", "…")]
BLANKS = [
    lambda text, blank=blank: blank + text + blank for blank in (" ", "\t", "\n", "\r\n", "\n \n", "\u00a0", "\u3000")
]
NAMES = [lambda text, name=name: name + text for name in ("Label: ", "label:", "Category = ", "Answer - ", "标签：")]
JSONS = [
    lambda text: json.dumps({"label": text}, ensure_ascii=False),
    lambda text: json.dumps({"category": text}, ensure_ascii=False, separators=(",", ":")),
]


@pytest.mark.parametrize("label", LABELS)
@pytest.mark.parametrize(
    "disguises",
    [CASES, GAPS, QUOTES, MARKDOWN, ENDINGS, BLANKS, NAMES, JSONS, [wide]],
    ids=["case", "gaps", "quotes", "markdown", "punctuation", "blanks", "names", "json", "full-width"],
)
def test_a_label_is_seen_through_each_mild_disguise(label, disguises):
    assert [normalize_label(disguise(label)) for disguise in disguises] == [label] * len(disguises)


@given(
    LABEL,
    st.sampled_from(CASES),
    st.sampled_from(GAPS),
    st.lists(st.sampled_from(QUOTES + MARKDOWN[:6] + ENDINGS), max_size=4),
    st.sampled_from([*NAMES, *MARKDOWN[6:], JSONS[1], wide, str]),
    st.sampled_from(BLANKS),
)
def test_a_label_is_seen_through_many_disguises_at_once(label, case, gap, several, name, blank):
    text = gap(case(label))
    for disguise in several:
        text = disguise(text)
    assert normalize_label(blank(name(text))) == label


WORDS = st.sampled_from(
    [*LABELS, "how to", "feature", "request", "de", "no", "not", "-", "_", " ", "\n", ".", "\u3000"]
)


@given(st.text() | st.lists(WORDS, max_size=8).map("".join))
@example("ｂｕｇ")
@example("ﬁ\u0130\u2028bug")
def test_any_text_gives_a_label_or_none_and_a_label_gives_itself(text):
    label = normalize_label(text)
    assert label is None or (label in LABELS and normalize_label(label) == label)


@given(st.text(alphabet=st.characters(blacklist_categories=["L"])), st.text(alphabet="acdfjkmnqsvwxyz "))
def test_text_without_the_letters_of_a_label_names_none(signs, letters):
    assert normalize_label(signs + letters) is None


@given(
    st.lists(LABEL, min_size=2, max_size=3, unique=True),
    st.sampled_from([", ", " or ", " / ", "|", " and ", "; ", "\t", ": ", " - ", "，", "和"]),
)
def test_two_labels_in_one_line_name_none(labels, between):
    assert normalize_label(between.join(labels)) is None


@pytest.mark.parametrize("text", ["发票", "發票", "Hello 你好", "refund 退款 please", "𠀀", "发票、账单：请退款！"])
def test_text_with_chinese_characters_is_chinese(text):
    assert is_chinese(text)


@pytest.mark.parametrize("text", ["", "Hello", "Ünïcödé", "한국어 문의", "Привет", "🙂", "ｆｕｌｌ", "。，！"])
def test_text_without_chinese_characters_is_not_chinese(text):
    assert not is_chinese(text)


@pytest.mark.parametrize("text", ["請求書を送ってください", "エラー発生", "請求書ﾃｽﾄ", "領収書の再発行"])
def test_japanese_with_kana_is_not_chinese(text):
    assert not is_chinese(text)


def test_a_dot_between_the_parts_of_a_foreign_name_does_not_make_chinese_japanese():
    assert is_chinese("约翰・史密斯的发票")


@given(st.text())
def test_no_text_is_chinese_without_a_character_of_the_han_script(text):
    if not re.search("[\u2e80-\u9fff\uf900-\ufaff\U00020000-\U0003ffff]", text):
        assert not is_chinese(text)


@pytest.mark.parametrize(
    ("body", "chinese_model", "model"),
    [
        ("Hello", "qwen", "deepseek"),
        ("我的发票", "qwen", "qwen"),
        ("我的发票", None, "deepseek"),
        ("請求書を", "qwen", "deepseek"),
    ],
)
def test_chinese_tickets_go_to_the_chinese_model_where_there_is_one(tmp_path, body, chinese_model, model):
    (tmp_path / "tickets.csv").write_text(f"id,body\nt1,{body}\n", encoding="utf-8")
    [ticket] = load_tickets(tmp_path / "tickets.csv")
    assert pick_model(ticket.text, Namespace(model="deepseek", chinese_model=chinese_model)) == model


SETS = [
    ("spam", "not spam"),
    ("urgent", "not-urgent"),
    ("yes", "no"),
    ("bug", "bug report", "no bug"),
    ("C", "C++", "C#"),
    ("账单", "其他"),
    ("Rechnung", "Störung", "Wie geht das?"),
    ("p1", "p2", "p10"),
    ("not", "never", "nor"),
    ("👍", "👎"),
]


@pytest.mark.parametrize("labels", SETS, ids=str)
def test_any_set_of_distinct_labels_works(labels, monkeypatch):
    monkeypatch.setattr("classify.LABELS", dict.fromkeys(labels, ""))
    assert [normalize_label(label) for label in labels] == list(labels)
    assert [normalize_label(f" {label}\n") for label in labels] == list(labels)


@pytest.mark.parametrize("labels", SETS[:4] + SETS[5:9], ids=str)
def test_and_is_seen_through_a_mild_disguise(labels, monkeypatch):
    monkeypatch.setattr("classify.LABELS", dict.fromkeys(labels, ""))
    assert [normalize_label(f"**{label.upper()}**.") for label in labels] == list(labels)
    assert [normalize_label(f"Label: {label}") for label in labels] == list(labels)
    assert normalize_label(f"{labels[0]}, {labels[1]}") is None


def test_a_not_before_a_label_is_no_label_unless_it_belongs_to_it(monkeypatch):
    monkeypatch.setattr("classify.LABELS", {"spam": "", "not spam": "", "urgent": ""})
    assert [normalize_label(text) for text in ("not spam", "this is not spam.", "not urgent", "never spam")] == [
        "not spam", "not spam", None, None,
    ]  # fmt: skip
