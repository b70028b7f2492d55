"""labels.jsonl as checkpoint: nothing lost, nothing doubled, nothing paid twice, whatever happened in between."""

import asyncio
import json
import os
import random
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import pytest
from hypothesis import HealthCheck, example, given, settings
from hypothesis import strategies as st

from classify import line_of, parse_line
from tests.conftest import Desk, Done, numbered
from tests.gateway import Fault, Gateway
from tests.helpers import QUICK, brisk, run_here, summary, until

FIVE = numbered(5)


@pytest.fixture(scope="module")
def five_labels(tmp_path_factory: pytest.TempPathFactory) -> bytes:
    """What labels.jsonl holds after a run over FIVE."""

    async def label_them() -> bytes:
        desk = Desk(tmp_path_factory.mktemp("five"))
        brisk(desk)
        desk.write(FIVE)
        async with Gateway(replace(QUICK, tokens=(312, 3))) as gateway:
            done = await desk.run(gateway)
        return b"".join(sorted(done.output.read_bytes().splitlines(keepends=True)))

    return asyncio.run(label_them())


@pytest.fixture
def done_desk(desk: Desk, five_labels: bytes) -> Desk:
    """A desk where FIVE have been labelled by an earlier run."""
    brisk(desk)
    desk.write(FIVE)
    desk.output.write_bytes(five_labels)
    return desk


async def resume(desk: Desk, *arguments: str) -> tuple[Done, list[str]]:
    """Runs the program, and tells which texts it sent."""
    async with Gateway(QUICK) as gateway:
        done = await desk.run(gateway, *arguments, within_s=30)
    assert gateway.billed_twice() == 0
    return done, sorted(gateway.billed)


def bak(desk: Desk) -> list[str]:
    """The ids of the lines in labels.jsonl.bak."""
    path = desk.folder / "labels.jsonl.bak"
    return [json.loads(line)["id"] for line in path.read_bytes().splitlines() if line.strip()] if path.exists() else []


# ---- Running again


async def test_a_second_run_sends_nothing_and_prints_the_same_totals(desk: Desk):
    brisk(desk)
    desk.write(numbered(20) | {"empty": ""})
    async with Gateway(QUICK) as gateway:
        first = await desk.run(gateway)
        content = desk.output.read_bytes()
        second = await desk.run(gateway)
    assert (first.status, second.status, gateway.requests) == (0, 0, 20)
    assert summary(second) == summary(first)
    assert desk.output.read_bytes() == content


async def test_after_a_kill_no_ticket_is_missing_or_doubled_and_only_those_in_flight_are_paid_twice(desk: Desk):
    desk.fresh = True  # tests/test_crash.py kills forks, and far more of them
    brisk(desk, CONCURRENCY=8)
    tickets = numbered(150)
    desk.write(tickets)
    kills = sorted(random.Random(1).sample(range(1, 140), 2))
    async with Gateway(replace(QUICK, latency_s=0.05, jitter=0.5)) as gateway:
        for moment in kills:
            process = await desk.start(gateway)
            await until(lambda moment=moment: gateway.answered >= moment)
            process.kill()
            await process.communicate()
            await until(lambda: gateway.in_flight == 0)
        done = await desk.run(gateway)
    assert done.status == 0
    assert done.labels == dict.fromkeys(tickets, "billing")
    assert sum(gateway.billed.values()) - len(tickets) <= 8 * len(kills)


async def test_a_changed_ticket_is_sent_anew_and_its_old_line_is_kept_aside(done_desk: Desk):
    done_desk.write(FIVE | {"t3": "Now the app has a bug"})
    done, sent = await resume(done_desk)
    assert (done.status, sent) == (0, ["Now the app has a bug"])
    assert done.labels == dict.fromkeys(FIVE, "billing") | {"t3": "bug"}
    assert bak(done_desk) == ["t3"]


@pytest.mark.parametrize(
    "constants", [{"SYSTEM_PROMPT": "Sort it."}, {"LABELS": {"billing": "money", "bug": "errors", "other": "the rest"}}]
)
async def test_a_changed_prompt_or_label_list_labels_every_ticket_anew(done_desk: Desk, constants):
    brisk(done_desk, **constants)
    done, sent = await resume(done_desk)
    assert (done.status, sent, len(done.labels)) == (0, sorted(FIVE.values()), 5)
    assert bak(done_desk) == list(FIVE)


def test_a_removed_ticket_keeps_its_line(done_desk: Desk, five_labels):
    done_desk.write({"t1": FIVE["t1"]})
    done = run_here(done_desk)
    assert (done.status, done.output.read_bytes()) == (0, five_labels)
    assert summary(done)[0] == "Classified 1 tickets"


def test_the_order_of_the_tickets_does_not_matter(done_desk: Desk, five_labels):
    done_desk.write(dict(reversed(FIVE.items())))
    done = run_here(done_desk)
    assert (done.status, done.output.read_bytes()) == (0, five_labels)


# ---- Identical tickets


async def test_equal_tickets_are_asked_once_and_the_copies_cost_nothing(desk: Desk):
    brisk(desk)
    desk.write({f"{copy}{n}": f"My invoice {n} is wrong" for copy in "abc" for n in range(4)})
    async with Gateway(replace(QUICK, latency_s=0.05)) as gateway:
        done = await desk.run(gateway)
    assert (done.status, gateway.requests, len(done.labels)) == (0, 4, 12)
    assert sum(line["tokens_in"] for line in done.lines) == gateway.tokens_in
    assert sum(line["cost_usd"] == line["tokens_in"] == 0 for line in done.lines) == 8


def test_a_ticket_equal_to_one_of_an_earlier_run_is_not_asked_again(done_desk: Desk):
    done_desk.write(FIVE | {"new": FIVE["t2"]})
    done = run_here(done_desk)
    assert (done.status, done.labels["new"]) == (0, "billing")
    assert summary(done)[1] == "Tokens: 1,560 in / 15 out"


# ---- Asked before, in whatever run


async def test_a_prompt_that_is_changed_and_changed_back_is_not_paid_again(done_desk: Desk, five_labels):
    brisk(done_desk, SYSTEM_PROMPT="Sort it.")
    await resume(done_desk)
    brisk(done_desk)
    done, sent = await resume(done_desk)
    assert (done.status, sent) == (0, [])
    before = [json.loads(line) for line in five_labels.splitlines()]
    assert done.labels == {line["id"]: line["label"] for line in before}
    assert {line["digest"] for line in done.lines} == {line["digest"] for line in before}
    assert sum(line["cost_usd"] for line in done.lines) == 0
    brisk(done_desk, SYSTEM_PROMPT="Sort it.")
    again, sent = await resume(done_desk)
    assert (again.status, sent) == (0, [])
    lines = (done_desk.folder / "labels.jsonl.bak").read_bytes().splitlines()
    paid = [line for line in map(json.loads, filter(None, lines)) if line["tokens_in"]]
    assert len(paid) == len({(line["id"], line["digest"]) for line in paid}) == 10, (
        "each that was paid stands there once"
    )
    assert summary(again)[1:] == summary(done)[1:], "what was paid, and counted once"


@pytest.mark.parametrize("change", [{"EXTRA_BODY": {"top_p": 0.5}}, {"MODEL": "qwen2.5-72b-instruct"}], ids=str)
async def test_another_model_or_request_labels_every_ticket_anew_and_says_so_first(done_desk: Desk, change):
    brisk(done_desk, **change)
    done, sent = await resume(done_desk)
    assert (done.status, sent) == (0, sorted(FIVE.values()))
    assert "; replaces 5 lines" in done.stderr.splitlines()[0]
    brisk(done_desk)
    assert (await resume(done_desk))[1] == []


async def test_a_model_that_was_tried_and_left_again_is_not_paid_again(done_desk: Desk):
    _, sent = await resume(done_desk, "--model", "qwen2.5-72b-instruct")
    assert sent == sorted(FIVE.values())
    for arguments in ((), ("--model", "qwen2.5-72b-instruct"), ()):
        done, sent = await resume(done_desk, *arguments)
        assert (done.status, sent, len(done.labels)) == (0, [], 5)


async def test_a_limit_after_a_change_touches_so_many_lines_only(done_desk: Desk, five_labels):
    brisk(done_desk, SYSTEM_PROMPT="Sort it.")
    done, sent = await resume(done_desk, "--limit", "1")
    assert (done.status, sent, bak(done_desk)) == (0, [FIVE["t0"]], ["t0"])
    assert done.output.read_bytes().startswith(b"".join(five_labels.splitlines(keepends=True)[1:]))


async def test_equal_tickets_are_asked_of_each_model_once(done_desk: Desk):
    done_desk.write({f"{copy}{id_}": body for id_, body in FIVE.items() for copy in "ab"})
    done, sent = await resume(done_desk, "--model", "qwen2.5-72b-instruct")
    assert (done.status, len(sent), len(done.labels)) == (0, 5, 10 + 5)


async def test_a_changed_fallback_holds_for_what_is_asked_from_then_on(desk: Desk):
    brisk(desk)
    desk.write({"empty": "", "a": "first"})
    async with Gateway(replace(QUICK, reply=lambda text: "hm")) as gateway:
        await desk.run(gateway)
        brisk(desk, FALLBACK="bug")
        desk.write({"empty": "", "a": "first", "b": "second", "empty too": ""})
        done = await desk.run(gateway)
    assert done.labels == {"empty": "other", "a": "other", "b": "bug", "empty too": "bug"}
    assert (gateway.requests, bak(desk)) == (2, [])


# ---- Files of the user's own


@pytest.mark.parametrize("name", ["labels.jsonl.new", "labels.jsonl.tmp", "labels.jsonl~", ".labels.jsonl.swp"])
async def test_no_other_file_beside_the_output_is_touched_or_believed(done_desk: Desk, name: str):
    theirs = done_desk.folder / name
    theirs.write_bytes(b'{"id": "t1", "label": "bug"}\n')
    done_desk.write(FIVE | {"t3": "Now the app has a bug"})
    done, sent = await resume(done_desk)
    assert (done.status, sent) == (0, ["Now the app has a bug"])
    assert done.labels["t1"] == "billing"
    assert theirs.read_bytes() == b'{"id": "t1", "label": "bug"}\n'
    names = {"classify.py", "tickets.csv", "labels.jsonl", "labels.jsonl.bak", "labels.jsonl.lock", name}
    assert {path.name for path in done_desk.folder.iterdir()} == names


def test_a_copy_that_the_user_made_as_bak_does_not_double_the_cost(done_desk: Desk, five_labels):
    (done_desk.folder / "labels.jsonl.bak").write_bytes(five_labels)
    done = run_here(done_desk)
    assert summary(done) == ["Classified 5 tickets", "Tokens: 1,560 in / 15 out", "Cost  : $0.0004"]


def by_an_editor(output: Path) -> None:
    """Writes a file of its own and renames it, as most editors do."""
    copy = output.with_name("edited")
    copy.write_bytes(output.read_bytes())
    copy.replace(output)


def in_place(output: Path) -> None:
    with open(output, "ab") as file:
        file.write(b"\n")


CHANGES = {
    "replaced": by_an_editor,
    "changed in place": in_place,
    "cut short": lambda output: os.truncate(output, 300),
    "deleted": Path.unlink,
}


@pytest.mark.parametrize("change", CHANGES.values(), ids=CHANGES)
async def test_an_output_that_is_changed_during_the_run_stops_it_and_no_answer_is_lost(desk: Desk, change):
    brisk(desk, CONCURRENCY=4)
    desk.write(numbered(60))
    async with Gateway(replace(QUICK, latency_s=0.05)) as gateway:
        process = await desk.start(gateway)
        await until(lambda: gateway.answered >= 20 and desk.output.stat().st_size > 1000)
        change(desk.output)
        left = desk.output.read_bytes() if desk.output.exists() else b""
        done = await desk.finish(process)
        assert done.status == 1
        assert "stopped: " in done.stderr
        assert ".bak" in done.stderr
        assert 20 <= gateway.requests <= 32
        now = desk.output.read_bytes() if desk.output.exists() else b""
        assert now.startswith(left)
        late = now.count(b"\n") - left.count(b"\n")  # one may fall between the look at the file and the write
        assert late <= 1
        desk.output.write_bytes(b"".join(left.splitlines(keepends=True)[:1]))  # the rest was lost by the editor
        again = await desk.run(gateway)
    assert (again.status, len(again.labels)) == (0, 60)


async def test_a_deleted_lock_stops_the_run_after_a_second_at_most_and_every_answer_keeps_its_line(desk: Desk):
    brisk(desk, CONCURRENCY=4)
    desk.write(numbered(600))
    async with Gateway(replace(QUICK, latency_s=0.05)) as gateway:
        process = await desk.start(gateway)
        await until(lambda: gateway.answered >= 20)
        desk.output.with_name("labels.jsonl.lock").unlink()
        done = await desk.finish(process)
        assert done.status == 1
        assert "stopped: " in done.stderr
        assert "labels.jsonl.lock" in done.stderr
        assert len(done.labels) == gateway.requests < 300
        again = await desk.run(gateway)
    assert (again.status, len(again.labels), gateway.requests) == (0, 600, 600)


# ---- What a crash or an editor leaves in labels.jsonl


@pytest.mark.skipif(sys.platform != "linux", reason="elsewhere an open file has no name")
def test_a_rewrite_is_on_the_disk_before_it_takes_the_place_of_the_output(done_desk: Desk, five_labels, monkeypatch):
    done_desk.output.write_bytes(five_labels + b'{"id": "t')
    steps, fsync, replace_ = [], os.fsync, os.replace

    def synced(fd: int) -> None:
        steps.append(Path(os.readlink(f"/proc/self/fd/{fd}")).name)
        fsync(fd)

    def replaced(source: str, target: Path) -> None:
        steps.append("replaced")
        replace_(source, target)

    monkeypatch.setattr(os, "fsync", synced)
    monkeypatch.setattr(os, "replace", replaced)
    assert run_here(done_desk).status == 0
    assert steps[:3] == ["labels.jsonl.bak", "new", "replaced"]


@pytest.mark.parametrize("left", [1, 60, -2])
async def test_a_torn_last_line_is_cut_off_and_its_ticket_sent_again(done_desk: Desk, five_labels, left):
    *whole, last = five_labels.splitlines(keepends=True)
    done_desk.output.write_bytes(b"".join(whole) + last[:left])
    done, sent = await resume(done_desk)
    assert (done.status, sent) == (0, [FIVE["t4"]])
    assert done.labels == dict.fromkeys(FIVE, "billing")
    assert done.output.read_bytes().startswith(b"".join(whole))


async def test_a_last_line_without_its_newline_is_kept(done_desk: Desk, five_labels):
    done_desk.write(FIVE | {"new": "The app has a bug", "newer": "The app has an error"})
    done_desk.output.write_bytes(five_labels.rstrip(b"\n"))
    done, sent = await resume(done_desk)
    assert (done.status, sent) == (0, ["The app has a bug", "The app has an error"])
    assert done.output.read_bytes().startswith(five_labels)
    assert done.labels == dict.fromkeys(FIVE, "billing") | {"new": "bug", "newer": "bug"}
    assert b"\n\n" not in done.output.read_bytes()


def test_an_output_that_an_editor_saved_with_a_bom_is_understood(done_desk: Desk, five_labels):
    done_desk.output.write_bytes(b"\xef\xbb\xbf" + five_labels)
    done = run_here(done_desk)
    assert (done.status, done.output.read_bytes()) == (0, b"\xef\xbb\xbf" + five_labels)


def test_blank_lines_and_windows_line_ends_are_understood(done_desk: Desk, five_labels):
    content = b"\n" + five_labels.replace(b"\n", b"\r\n\r\n") + b"  \n"
    done_desk.output.write_bytes(content)
    done = run_here(done_desk)
    assert (done.status, done.output.read_bytes()) == (0, content)


@pytest.mark.parametrize(
    "change",
    [
        lambda line: line[:40],
        lambda line: b'{"foreign": true}',
        lambda line: b"[1, 2]",
        lambda line: b"Hello",
        lambda line: b"\xff\xfe\x00",
        lambda line: b"[" * 100_000,
        lambda line: line.replace(b'"t1"', b'"t0"'),
        lambda line: line.replace(b"312", b"-312"),
        lambda line: line.replace(b"312", b'"many"'),
        lambda line: line.replace(b'"id": "t1", ', b""),
    ],
    ids=[
        "torn", "foreign", "array", "text", "binary", "nested", "id twice", "negative",
        "number as text", "no id",
    ],
)  # fmt: skip
def test_a_line_that_is_not_understood_is_refused_with_its_number_and_the_file_left_alone(
    done_desk: Desk, five_labels, change
):
    lines = five_labels.splitlines()
    lines[1] = change(lines[1])
    content = b"\n".join(lines) + b"\n"
    done_desk.output.write_bytes(content)
    done = run_here(done_desk)
    assert (done.status, done.stdout, done.output.read_bytes()) == (2, "", content)
    assert "labels.jsonl:2:" in done.stderr
    assert done.stderr.count("\n") == 1


def test_a_second_line_for_one_ticket_is_named_by_its_place_in_the_file(done_desk: Desk, five_labels):
    first, second, *rest = five_labels.splitlines(keepends=True)
    done_desk.output.write_bytes(b"".join((first, b"\n\n", second, first, *rest)))
    done = run_here(done_desk)
    assert (done.status, "labels.jsonl:5:" in done.stderr) == (2, True)


async def test_the_report_counts_what_stands_in_the_bak_old_lines_and_failures_of_this_run_too(done_desk: Desk):
    brisk(done_desk, SYSTEM_PROMPT="Sort it.")
    done, _ = await resume(done_desk)
    assert "Old or in vain: 5 requests" in done.stdout
    brisk(done_desk, SYSTEM_PROMPT="Sort it.")
    done_desk.write(FIVE | {"bad": "refused"})
    async with Gateway(replace(QUICK, faults=(Fault("status_400", matching="refused"),))) as gateway:
        done = await done_desk.run(gateway)
    assert (done.status, "Old or in vain: 6 requests" in done.stdout) == (1, True)


async def test_a_label_that_is_not_in_the_list_is_asked_anew(done_desk: Desk, five_labels):
    done_desk.output.write_bytes(five_labels.replace(b'"t0", "label": "billing"', b'"t0", "label": "invoices"'))
    done, sent = await resume(done_desk)
    assert (done.status, sent, bak(done_desk)) == (0, [FIVE["t0"]], ["t0"])
    assert "; replaces 1 lines" in done.stderr


def test_an_unknown_label_on_the_line_of_a_removed_ticket_is_no_obstacle(done_desk: Desk, five_labels):
    done_desk.output.write_bytes(five_labels.replace(b'"t0", "label": "billing"', b'"old", "label": "invoices"'))
    done_desk.write({id_: body for id_, body in FIVE.items() if id_ != "t0"})
    assert run_here(done_desk).status == 0


JSON_VALUES = st.one_of(
    st.none(), st.booleans(), st.integers(), st.floats(), st.text(), st.sampled_from(["bug", "other", "t1", "\ud800"]),
    st.lists(st.integers(), max_size=2), st.integers(0, 1000),
)  # fmt: skip
FIELDS = {
    "id": st.text(), "label": st.sampled_from(["bug", "other", None]), "model": st.sampled_from(["x", None]),
    "tokens_in": st.integers(0, 1000), "tokens_out": st.integers(0, 10), "digest": st.text(),
    "cost_usd": st.floats(0, 1) | st.none(), "reply": st.text() | st.none(), "copy_of": st.text() | st.none(),
}  # fmt: skip
NEAR_LINES = st.builds(
    lambda record, odd: json.dumps(record | odd).encode(),
    st.fixed_dictionaries(FIELDS),
    st.dictionaries(
        st.sampled_from([*FIELDS, "confidence", "estimated", "tokens_cached", "x"]), JSON_VALUES, max_size=2
    ),
)


@given(st.binary() | NEAR_LINES | st.tuples(NEAR_LINES, st.integers(0, 300)).map(lambda cut: cut[0][: cut[1]]))
@example(b"[" * 100_000)
@example(b'{"id": NaN}')
def test_any_bytes_are_no_result_or_one_that_is_written_as_it_was_read(line):
    try:
        result = parse_line(line)
    except ValueError:
        return
    again = line_of(result)
    assert b"\n" not in again
    assert line_of(parse_line(again)) == again
    assert all(parse_line(again)[name] == result.get(name) for name in FIELDS.keys() - {"copy_of"})


@given(st.lists(st.binary(max_size=30) | NEAR_LINES | st.just(b""), max_size=4), st.sampled_from([b"\n", b"\r\n"]))
@settings(suppress_health_check=[HealthCheck.function_scoped_fixture], deadline=None, max_examples=40)
def test_any_bytes_in_labels_jsonl_are_whole_records_or_an_error_with_a_line_number(done_desk: Desk, lines, end):
    done_desk.output.write_bytes(content := end.join(lines))
    done = run_here(done_desk, "--dry-run")
    assert done.status in (0, 2)
    assert done.status == 0 or "labels.jsonl:" in done.stderr
    assert done.output.read_bytes() == content


# ---- Where the output is


async def test_a_second_run_on_the_same_output_at_the_same_time_is_refused(desk: Desk):
    brisk(desk)
    desk.write(numbered(3))
    async with Gateway(replace(QUICK, latency_s=0.3)) as gateway:
        process = await desk.start(gateway)
        await until(lambda: gateway.in_flight == 3)
        second = run_here(desk)  # the gateway, in this process too, answers the first run only afterwards
        first = await desk.finish(process)
    assert (second.status, second.stdout) == (2, "")
    assert "another run" in second.stderr
    assert (first.status, len(first.labels), gateway.requests) == (0, 3, 3)


async def test_a_symlink_at_the_output_is_kept_and_its_target_written(done_desk: Desk, five_labels):
    target = done_desk.folder / "elsewhere" / "real.jsonl"
    target.parent.mkdir()
    target.write_bytes(five_labels)
    done_desk.output.unlink()
    done_desk.output.symlink_to(target)
    done_desk.write(FIVE | {"t3": "Now the app has a bug", "new": "Hello"})
    done, _ = await resume(done_desk)
    assert (done.status, len(done.labels)) == (0, 6)
    assert done_desk.output.is_symlink()
    assert not target.is_symlink()


def test_a_folder_at_the_output_is_refused(desk: Desk):
    desk.write(FIVE)
    desk.output.mkdir()
    done = run_here(desk)
    assert (done.status, done.stdout) == (2, "")
    assert "labels.jsonl" in done.stderr
    assert done.stderr.count("\n") == 1


# ---- A disk that takes no more


def assert_whole_lines(path: Path) -> int:
    """How many lines the file holds, each of them whole."""
    content = path.read_bytes()
    assert content.endswith(b"\n")
    return len([json.loads(line) for line in content.splitlines()])


async def test_a_write_that_fails_stops_the_run_and_the_next_completes_it(desk: Desk):
    resource = pytest.importorskip("resource")
    desk.fresh = True  # which inherits the limit
    brisk(desk, CONCURRENCY=4)
    tickets = numbered(100)
    desk.write(tickets)
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    async with Gateway(QUICK) as gateway:
        try:
            resource.setrlimit(resource.RLIMIT_FSIZE, (4000, hard))  # bytes a file; the program inherits it
            process = await desk.start(gateway)
        finally:
            resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
        full = await desk.finish(process)
        assert full.status == 1
        assert "cannot write" in full.stderr
        written = assert_whole_lines(desk.output)
        assert 0 < written < gateway.answered <= written + 4
        again = await desk.run(gateway)
    assert (again.status, set(again.labels)) == (0, set(tickets))
    assert gateway.billed_twice() <= 4


@pytest.fixture
def small_disk(desk: Desk) -> Iterator[Path]:
    """A disk of 64 kB, in the desk's folder."""
    disk = desk.folder / "disk"
    disk.mkdir()
    mounted = subprocess.run(
        ["mount", "-t", "tmpfs", "-o", "size=64k", "tmpfs", disk], check=False, capture_output=True
    )
    if mounted.returncode:
        pytest.skip("this machine mounts no tmpfs")
    yield disk
    subprocess.run(["umount", "-l", disk], check=True)


@pytest.mark.skipif(sys.platform != "linux" or os.geteuid() != 0, reason="only root can mount a small disk")
async def test_a_full_disk_stops_the_run_and_leaves_whole_lines_and_the_next_run_completes_it(desk: Desk, small_disk):
    brisk(desk, CONCURRENCY=4)
    desk.write(numbered(500))
    desk.output = small_disk / "labels.jsonl"
    ballast = small_disk / "ballast"
    ballast.write_bytes(b"x" * 24_000)
    async with Gateway(replace(QUICK, latency_s=0.0)) as gateway:
        full = await desk.run(gateway, "-o", "disk/labels.jsonl")
        assert full.status == 1
        assert "No space left" in full.stderr
        written = assert_whole_lines(desk.output)
        assert 0 < written < gateway.answered <= written + 4
        ballast.unlink()
        again = await desk.run(gateway, "-o", "disk/labels.jsonl", "--limit", str(written + 20))
    assert (again.status, len(again.labels)) == (0, written + 20)
    assert gateway.billed_twice() <= 4


async def test_tickets_that_change_after_the_check_stop_the_run(desk: Desk):
    brisk(desk, CONCURRENCY=1)
    desk.write(numbered(2000))
    async with Gateway(replace(QUICK, latency_s=0.05)) as gateway:
        process = await desk.start(gateway)
        await until(lambda: gateway.answered >= 3)
        desk.write(numbered(2000, "my invoice is fine!"))  # as long as it was
        done = await desk.finish(process)
    assert done.status == 1
    assert "changed since it was checked" in done.stderr
    assert set(done.labels.values()) == {"billing"}
