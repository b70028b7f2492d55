"""What counts as a label, by kind of reply. The names of the kinds are the claims."""

import itertools
import json
import time

import pytest
from hypothesis import example, given
from hypothesis import strategies as st

import classify
from classify import LABELS, named_label

NAMES_BUG = {
    "case and plural": ["Bug", "BUG", "bugs", "\u3000ＢＵＧ。"],
    "markdown": [
        "**Bug**", "`bug`", "# bug", "> bug", "- bug", "1. bug", "1) bug", "***bug.***", "|label|\n|---|\n|bug|",
    ],
    "quotes and brackets": [
        '"bug"', "„bug“", "「bug」", "【bug】", "[[bug]]", "(bug)", "<bug>", "[bug] The app crashes",
    ],
    "signs and emojis": ["bug!", "bug…", "🐛 bug", "🏷️ bug ✅", "=> bug", "→ bug", "\ufeffbug", "---\nbug"],
    "LaTeX": ["\\boxed{bug}", "$\\boxed{\\text{bug}}$", "The answer is $\\boxed{bug}$."],
    "a ticked box": [
        "[x] bug", "[ ] billing\n[x] bug", "- [ ] billing\n- [x] bug",
        "( ) billing\n(x) bug", "☐ billing\n☑ bug",
    ],
    "a fence": [
        "```\nbug\n```", "```text\nLabel: bug\n```", '```json\n{"label": "bug"}\n```', "Here you go:\n```\nbug\n```",
    ],
    "a noun behind it": ["bug report", "bug label", "bug enquiry", "Bug inquiries",
        "bug-report", "bug_report", "Bug issue", "bug reports"],
    "a name before it": [
        "Label: bug", "label=bug", "Category - bug", "label → bug", "Tag: bug", "FINAL ANSWER: Bug",
        "Ticket type: bug", "Label: <bug>", '{"name": "bug"}',
    ],
    "a name of the answer, with another label in prose": [
        "Label: bug\n\nIt mentions billing.", "It is about billing.\nFinal answer: bug",
        "Issue type: bug\n\nNo billing.",
        "Eine Frage zu billing?\nKategorie: bug", "它提到 billing。\n标签：bug",
        '{"why": "no billing", "category": "bug"}',
    ],
    "a name in any language": [
        "类别：bug。", "ラベル：bug", "바그: bug", "Категория: bug", "Étiquette : bug", "ป้ายกำกับ: bug",
        "Thema: bug\n\nIt worked the other day.", "Thema: bug\n\nRebillings are fine.",
    ],
    "a name in the line above": [
        "Label\nbug", "**Label:**\n\nbug", "The label is:\n\n`bug`", "Sure! Here is the label:\nbug",
    ],
    "an explanation behind it": [
        "bug: crash on start", "bug - not a billing matter", "bug — the app crashes", "bug (crash)",
        "bug. The app crashes.", "bug: no billing involved",
        "bug. Confidence: 95%", "bug, reason: crash", "bug：应用崩溃", "Label: bug (possible billing)",
    ],
    "an explanation with a word for no": [
        "bug: not able to log in", "bug - nothing happens when clicking Save", "bug (no workaround known)",
        "bug. Never loads at all.", "bug: doesn't load", "bug: kein Login möglich", "bug: не открывается приложение",
        "bug - it does not start", "bug：无法登录系统",
    ],
    "a lead-in": [
        "The label is: bug", "Sure! Here is the label: bug", "Label for this ticket: **bug**", "Das Label lautet: bug",
        "Based on the text, the best category for this ticket should be: bug",
    ],
    "an explanation in other lines": [
        "bug\n\nThe customer asks about billing.", "bug\nExplanation: not billing.",
        "Final answer: bug\nThe app crashes.", "Label: bug\nConfidence: 0.9", "bug\nSub-label: crash",
        "Reason: a problem with billing\nLabel: bug", "The user writes about billing.\n\nbug",
        "bug.\n\nIs anything else needed?", "Not a billing matter.\n\nbug", "It does not start, so the label is:\nbug",
    ],
    "JSON": [
        '{"label": "Bug"}', '{"result": {"label": "bug"}}', '["bug", "bug"]', '{"labels": ["bug"]}',
        "{'label': 'bug'}", 'Sure:\n{"label": "bug"}', 'Answer: {"label": "bug"}', '{"label": "bug", "score": 1}',
        '{"is_billing": false, "label": "bug"}', '{"reason": "It is \\"billing\\", they say", "label": "bug"}',
        '{"label": "bug"}\n\nThey say "billing".', '{"label": "bug", "reason": "it cra', '"label": "bug"}',
        '{"label": "bug", "conf', '{"label": "bug", "confidence"', '{"reason": "it does not start", "label": "bug"}',
    ],
    "tags": [
        "<answer>bug</answer>", "<result>\n  Bug\n</result>", '<label value="x">bug</label>',
        "<strong>Label:</strong> bug", "<response><label>bug</label></response>",
        "<label>bug</label><reason>It is no billing</reason>", "Sure! <answer>bug</answer>",
        "bug<br>Reason: billing", "<label>bug</label>It crashes.", "<answer><bug></answer>",
    ],
    "marks of a chat": [
        "bug</s>", "bug<|im_end|>", "<s> bug", "[/INST] bug", "bug<|endoftext|>Human: how-to cook",
        "assistant\n\nbug", "<|start_header_id|>assistant<|end_header_id|>\n\nbug",
        "<|channel|>analysis<|message|>Is it billing?<|end|><|channel|>final<|message|>bug",
    ],
    "thoughts before it": [
        "<think>billing</think>bug", "<THINK>\nbilling\n</THINK>\n\nbug", "[THINK]billing[/THINK]bug",
        "<seed:think>billing</seed:think>bug", "◁think▷billing◁/think▷bug",
        "<reasoning>billing</reasoning><answer>bug</answer>", "<|START_THINKING|>billing<|END_THINKING|>bug",
        "<|begin_of_thought|>billing<|end_of_thought|>bug", "<think></think>bug",
        '<think type="x">billing</think>bug', "<think>a</think><think>billing</think>bug",
    ],
    "thoughts that began before the reply": ["billing</think>bug", "billing\n</think>\n\nbug"],
    "thoughts behind it": ["bug\n<reasoning>billing</reasoning>", 'bug\n<reason lang="en">billing</reason>'],
    "certainty beside it": [
        "<label>bug</label><confidence>billing</confidence>", "Confidence: billing\nLabel: bug",
    ],
    "thoughts and the ticket by name": [
        "**Thinking:** billing\n**Label:** bug", "Ticket: billing\nLabel: bug", "Reason: billing\nbug",
    ],
    "a cut reply": ["**Bug", '"bug', "bug\n\nThe cust", "Label: bug\nRea"],
}  # fmt: skip

NAMES_NONE = {
    "nothing": ["", " \n\t\n", "...", "**", "{}", "[]", "```\n```"],
    "other words": [
        "debug", "bugfix", "bug-fix", "bug-free", "nobug", "another", "mother", "thank-you", "Feature", "spam", "错误",
        "N/A", "none", "Label: debugging", "billing-related", "anti-spam",
    ],
    "prose": [
        "This is not about billing.", "Is it a bug?", "The user asks how to get a refund", "The system has no bugs",
        "This is a bug.", "这是一个bug。", "the ticket is about billing.",
    ],
    "a lead-in that says no, or with another label in prose": [
        "No good label is: bug", "It is about billing. A second label could be: bug", "Not the right label: bug",
    ],
    "negations of any language": [
        "not bug", "not-a-bug", "no_bug", "pas un bug", "nenhum bug", "не bug", "非bug", "bug ではない", "ไม่ใช่ bug",
        "Label: not bug", "no-other", "No, billing", "No. Bug",
    ],
    "negations by a sign": ["❌ bug", "bug ❌", "label != bug", "!= bug", "≠ bug"],
    "a negation in dress": [
        "not **bug**", "not [bug]", "not <b>bug</b>", "is <b>not</b> bug", "不是<b>bug</b>", "not \\boxed{bug}",
        "not `bug`", "not <strong>bug</strong>",
    ],
    "a word for no is no name": [
        "Not: bug", "No: bug", "非：bug", "Neither: bug", "Nicht: bug", "Rejected: bug", "Ruled out: bug", "Kein: bug",
        "pas: bug", "Ingen: bug", "Unclear: bug", "排除：bug", "非该类：bug", "не: bug", "δεν: bug", "不是：bug",
        "以外: bug", "아님: bug", "नहीं: bug", "ไม่: bug",
        "Not label: bug", '{"not_label": "bug"}', '{"rejected": "bug"}',
    ],
    "a word for no in the line above": [
        "Not:\nbug", "**Not:**\nbug", "Not a\nbug", "Definitely not\nbug", "It is not:\n\nbug", "It isn't\nbug",
        "None of these apply:\nbug", "Keine:\nbug", "这不是：\nbug", "This is not <label>bug</label>",
    ],
    "an explanation that takes it back": [
        "bug: not applicable", "bug (no)", "bug (not relevant)", "bug. No. It asks for an invoice.", "bug - none found",
        "bug: no bug in sight", "bug - does not apply", "bug: no real sign of it", "bug：没有提到错误",
        "bug (or billing)", "bug (or so)",
    ],
    "a second choice by name": [
        "The label is billing.\nAlternative: bug", "I take billing.\n\nRunner-up: bug",
        "billing, I think\nConsidered: bug",
        "I would say **billing**.\nSecondary label: bug", '{"answer": "billing dispute", "alternative": "bug"}',
        '{"selected": null, "candidates": ["bug"]}',
    ],
    "an empty box": ["[ ] bug", "- [ ] bug", "( ) bug", "☐ bug", "○ bug", "❎ bug"],
    "a label that is struck out": ["~~bug~~", "~bug~"],
    "half a word": ["bug-", "-bug"],
    "a sentence over two lines": ["This is not a\nbug", "This is not a\r\nbug", "I cannot tell\nbug"],
    "several": [
        "billing, bug, how-to", "billing or bug", "bug/how-to", "bug\tbilling", "billing_bug", "bug\nbilling",
        "1. bug 2. billing", "1. bug\n2. billing", "bug|billing", "[bug] [billing]", "Not:\nbilling\nbug",
        "bug (billing)", "bug: billing", "bug: no, billing", "bug. Actually, billing.", "bug. billing. other",
        "bug - billing issue", "Label: bug\nSecondary: billing", "bug\n\nTicket: the next one\nLabel: billing",
        '["bug", "billing"]', '{"label": "bug", "second": "billing"}', "\n".join(LABELS), ", ".join(LABELS),
    ],
    "the beginning of a list": [
        "- billing: charges, refunds, inv", "1. billing: charges and refunds", "The labels are:\n- billing",
        "Labels:\n1. bug",
    ],
    "judgements of labels": [
        "- bug: no", "billing -> no\nbug -> yes", "billing – no money is meant\nbug – the app is down",
        "bug: no", "bug: 0.1", "bug: n/a", "- billing: no\n- bug: no", '{"bug": true}',
        '{"bug": true, "billing": false}', '{"bug": 0.9}', '{"bug": "no, not at all"}', "bug\nbug: no",
        '["bug"] is not it',
    ],
    "another label, and a hint": [
        "Label: none\nClosest: bug", '{"label": "unclear", "closest": "bug"}', '{"label": null, "closest": "bug"}',
    ],
    "thoughts without an end": [
        "<think>", "<think>\nbug", "[THINK]bug", "<think>a</think><think>bug", "<|START_THINKING|>\nbug",
        "◁think▷bug", "<|channel|>analysis<|message|>bug",
    ],
    "thoughts alone": [
        "<think>bug</think>", "Reason: bug", "Thoughts: bug", '{"reasoning": "bug"}', "<ticket>bug</ticket>",
        "bug</think>",
    ],
    "a cut reply": [
        "The customer mentions a bug, but the real", "This ticket is about billing rather than", "billing or", "bug/",
        "bug &", "Reason: Billing", '{"reason": "Billing', '{"reason": "Billing issue',
        '{"note": "They say \'bug\' and', "[THINK]\nOkay, the user has a billing", "Label: bil", "Neither bug nor",
        'He wrote "x", "bug"', '["billing", "bug"', '{"labels": ["billing", "bug"',
    ],
}  # fmt: skip


@pytest.mark.parametrize("kind", NAMES_BUG)
def test_the_label_is_seen_through(kind):
    assert {reply: named_label(reply) for reply in NAMES_BUG[kind]} == dict.fromkeys(NAMES_BUG[kind], "bug")


@pytest.mark.parametrize("kind", NAMES_NONE)
def test_no_label_is_taken_from(kind):
    assert {reply: named_label(reply) for reply in NAMES_NONE[kind]} == dict.fromkeys(NAMES_NONE[kind])


LABEL = st.sampled_from(list(LABELS))
CASES = [str.lower, str.upper, str.capitalize, str.title]
GAPS = ["-", " ", "_", "\u2010", "\u2011", "\u2013", ""]
QUOTES = ['""', "''", "“”", "‘’", "「」", "«»", "()", "[]", "**", "__", "``"]
ENDINGS = [".", "!", ",", ":", ";", "?", "...", "。", "！", "…"]
BEGINNINGS = ["Label: ", "label:", "Category = ", "Answer - ", "标签：", "# ", "### ", "- ", "* ", "> ", "1. ", ""]
BLANKS = [" ", "\t", "\n", "\r\n", "\n \n", "\u00a0", "\u3000"]


@given(
    LABEL,
    st.sampled_from(CASES),
    st.sampled_from(GAPS),
    st.lists(st.sampled_from(QUOTES + ENDINGS), max_size=4),
    st.sampled_from(BEGINNINGS),
    st.sampled_from(BLANKS),
)
def test_a_label_is_seen_through_many_disguises_at_once(label, case, gap, several, beginning, blank):
    text = case(label.replace("-", gap))
    for signs in several:
        text = text + signs if signs in ENDINGS else signs[0] + text + signs[1]
    assert named_label(blank + beginning + text + blank) == label
    assert named_label(json.dumps({"label": text}, ensure_ascii=False)) == label


@given(
    st.lists(LABEL, min_size=2, max_size=3, unique=True),
    st.sampled_from(
        [", ", " or ", " / ", "|", " and ", "; ", "\t", ": ", " - ", "，", "和", "\n", ". ", " (", " = ", "</s>"]
    ),
)
def test_two_labels_name_none(labels, between):
    assert named_label(between.join(labels)) is None


WORDS = [*LABELS, "how to", "feature", "de", "no", "not", "-", "_", " ", "\n", ".", ":", "(", '{"', '"']
WORDS += ["<think>", "</", ">", "label"]


@given(st.text() | st.lists(st.sampled_from(WORDS), max_size=9).map("".join))
@example("how _ to")
@example("ﬁ\u0130\u2028bug")
def test_any_text_gives_a_label_or_none(text):
    assert named_label(text) in {None, *LABELS}


@given(st.text(st.characters(exclude_categories=["L"])), st.text("acdfjkmnqsvwxyz "))
def test_text_without_the_letters_of_a_label_names_none(signs, letters):
    assert named_label(signs + letters) is None


SETS = [
    ("spam", "not spam", "other"),
    ("urgent", "not-urgent"),
    ("yes", "no"),
    ("bug", "bug report", "no bug", "not a bug"),
    ("C", "C++", "C#"),
    ("A", "A+", "A-"),
    ("-1", "0", "1", "10"),
    ("<100", ">100"),
    ("type: bug", "kind/feature", "Question", "N/A", "Refund & Returns", "Login / Account", "Bug 🐞"),
    ("card_arrival", "reverted_card_payment?", "Refund_not_showing_up"),
    ("Credit card", "Credit card or prepaid card", "Account - Login", "Account"),
    ("账单", "其他问题", "问题"),
    ("Rechnung", "Störung", "Größe", "Wie geht das?"),
    ("not", "never", "nor"),
    ("p1", "p2", "p10"),
    ("बिल", "बल"),
    ("R&D", "R+D"),
]
DRESSES = ["{}", " {}\n", "Label: {}", "**{}**", "**{}**.", '{{"label": "{}"}}', "<answer>{}</answer>"]
DRESSES += ["{}\n\nIt says so."]


@pytest.mark.parametrize("labels", SETS, ids=str)
def test_any_list_of_labels_works_and_two_of_it_name_none(labels, monkeypatch):
    monkeypatch.setattr(classify, "LABELS", dict.fromkeys(labels, ""))
    for dress in DRESSES:
        assert [named_label(dress.format(label)) for label in labels] == list(labels), dress
        assert [named_label(dress.format(label.upper())) for label in labels] == list(labels), dress
    first, second, *_ = labels
    for between in (", ", " or ", "\n", " / "):
        assert named_label(f"{first}{between}{second}") is None, between


OTHER_LISTS = [  # of labels, with a reply and the label that it names
    (("spam", "not spam"), {"not-spam.": "not spam", "no spam": None, "this is not spam.": None, "never spam": None}),
    (("spam", "not spam", "urgent"), {"not urgent": None}),
    (("bug", "other"), {"other: none of the above": "other", "other (no other label fits)": "other"}),
    (("General inquiry", "other"), {"General inquiries": "General inquiry"}),
    (("bug", "Autre", "none"), {"Autre : aucune autre ne convient": "Autre", "Thema: bug. Un autre jour": "bug"}),
    (("C++", "other"), {"C": None}),
    (("C", "other"), {"C#": None}),
    (("1", "2", "10"), {"12": None, "2) 1": "1", "-1": None, "2 tickets": None, "$1": None}),
    (("1", "2", "10"), {'{"label": 10}': "10", '{"label": "2", "score": 1}': None}),
    (("Account", "Account - Login"), {"Account - Login: cannot log in": "Account - Login"}),
    (("Credit card", "other"), {"Credit card or mortgage": None}),
    (("reverted_card_payment?", "other"), {"Reverted card payment": "reverted_card_payment?"}),
    (("Bug 🐞", "other"), {"bug": "Bug 🐞"}),
    (("👍", "👎"), {"👍": "👍", "Label: 👎": "👎", "👍, 👎": None, "**👍**": None}),
    (("问题", "其他问题"), {"没有问题": None}),
    (("Größe", "other"), {"GRÖSSE": "Größe"}),
    (("Störung", "other"), {"Sto\u0308rung": "Störung"}),
    (("बिल", "other"), {"बिली": None}),
]


def test_lists_of_labels_with_signs_and_other_scripts(monkeypatch):
    for labels, named in OTHER_LISTS:
        monkeypatch.setattr(classify, "LABELS", dict.fromkeys(labels, ""))
        assert {reply: named_label(reply) for reply in named} == named, labels


SIGNS = ["bug", "a ", "_", " ", "\n", ":", "(", '"', '{"', "\\", "<", "<a>", "<think>", "</think>", "🐛", "是", "1."]
SIGNS += ["|", ". "]


def test_a_long_reply_takes_no_time():
    for sign, around in itertools.product(SIGNS, ("{}", "bug{}x", "bug: {}", "Label{}bug", "x{}", '{{"a": "{}')):
        before = time.process_time()
        named_label(around.format(sign * (4000 // len(sign))))
        assert time.process_time() - before < 0.25, (sign, around)
