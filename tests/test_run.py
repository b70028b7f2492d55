"""A run from end to end: what is sent, what comes of it, what stops it, and how it ends."""

import asyncio
import json
import shutil
import sys
from dataclasses import replace
from pathlib import Path

import pytest

from classify import FALLBACK, SYSTEM_PROMPT
from tests.conftest import KEY, Desk, numbered
from tests.forks import clean_environment
from tests.gateway import Fault, Gateway, says
from tests.helpers import QUICK, Witness, brisk, run_here, summary, until

QWEN = "qwen2.5-72b-instruct"
MIXED = {
    "a": "My invoice is wrong",
    "b": "The app has a bug",
    "c": "How do I log in?",
    "d": "Please add dark mode, I wish I had it",
    "e": "Hello there",
    "f": "如何申请退款？发票在哪里？",
}
IMPOSSIBLE = Fault("status_400", matching="impossible")


def texts(gateway: Witness) -> list[str]:
    """Of the tickets that were sent, in their order."""
    return [body["messages"][1]["content"] for body in gateway.bodies]


# ---- What is sent, and what comes back


@pytest.mark.parametrize("fresh", [True, False], ids=["in a fresh interpreter", "in a fork"])
async def test_every_ticket_gets_the_label_that_the_gateway_gave_it(desk: Desk, fresh):
    desk.fresh = fresh
    brisk(desk)
    tickets = MIXED | numbered(30) | {f"u{n}": f"a bug, {n}" for n in range(30)}
    desk.write(tickets)
    async with Gateway(QUICK) as gateway:
        done = await desk.run(gateway)
    assert done.status == 0
    assert done.labels == {id_: gateway.replies[body] for id_, body in tickets.items()}
    assert set(done.labels.values()) == {"billing", "bug", "how-to", "feature-request", "other"}


async def test_the_system_prompt_stands_first_and_is_the_same_bytes_for_every_ticket(desk: Desk):
    brisk(desk)
    desk.write(MIXED)
    async with Witness() as gateway:
        await desk.run(gateway)
    system = {"role": "system", "content": SYSTEM_PROMPT}
    expected = [[system, {"role": "user", "content": body}] for body in MIXED.values()]
    assert sorted(texts(gateway)) == sorted(MIXED.values())
    assert all(body["messages"] in expected for body in gateway.bodies)


async def test_a_request_carries_the_model_the_settings_and_the_key(desk: Desk):
    brisk(desk, MAX_TOKENS=7, EXTRA_BODY={"thinking": {"type": "disabled"}})
    desk.write({"a": "Hello"})
    async with Witness() as gateway:
        await desk.run(gateway)
    [body], [headers] = gateway.bodies, gateway.headers
    del body["messages"]
    assert body == {"model": "deepseek-chat", "max_tokens": 7, "temperature": 0, "thinking": {"type": "disabled"}}
    assert headers["Authorization"] == f"Bearer {KEY}"
    assert headers["Content-Type"] == "application/json"


@pytest.mark.parametrize(("arguments", "most"), [((), 3), (("--concurrency", "1"), 1)], ids=str)
async def test_no_more_than_concurrency_are_in_flight_and_an_option_wins_for_one_run(desk: Desk, arguments, most):
    brisk(desk, CONCURRENCY=3)
    desk.write(numbered(20))
    async with Gateway(replace(QUICK, latency_s=0.05)) as gateway:
        await desk.run(gateway, *arguments)
    assert gateway.max_in_flight == most


def test_an_empty_body_is_the_fallback_without_a_call(desk: Desk):
    desk.write({"a": "", "b": " \n\t"})
    done = run_here(desk)
    assert (done.status, done.labels) == (0, {"a": FALLBACK, "b": FALLBACK})
    assert summary(done) == ["Classified 2 tickets", "Tokens: 0 in / 0 out", "Cost  : $0.0000"]


async def test_a_long_body_is_cut_and_the_cuts_are_counted(desk: Desk):
    brisk(desk, MAX_CHARS=20)
    desk.write({"a": "Hello " * 10, "b": "Hello", "c": "y" * 21, "d": "z" * 20})
    async with Gateway(QUICK) as gateway:
        done = await desk.run(gateway)
    assert set(gateway.replies) == {("Hello " * 10)[:20], "Hello", "y" * 20, "z" * 20}
    assert "2 tickets cut at 20 characters (MAX_CHARS)" in done.stderr.splitlines()


async def test_chinese_tickets_go_to_the_chinese_model(desk: Desk):
    brisk(desk, CHINESE_MODEL=QWEN)
    desk.write(MIXED)
    async with Witness() as gateway:
        done = await desk.run(gateway)
    asked = dict(zip(texts(gateway), (body["model"] for body in gateway.bodies), strict=True))
    assert {body for body, model in asked.items() if model == QWEN} == {MIXED["f"]}
    assert {line["id"]: line["model"] for line in done.lines} == {id_: asked[body] for id_, body in MIXED.items()}


async def test_a_model_on_the_command_line_is_asked_for_every_ticket(desk: Desk):
    brisk(desk, CHINESE_MODEL="deepseek-chat")
    desk.write(MIXED)
    async with Witness() as gateway:
        await desk.run(gateway, "--model", QWEN)
    assert [body["model"] for body in gateway.bodies] == [QWEN] * len(MIXED)


async def test_without_a_limit_on_the_pace_every_ticket_is_labelled(desk: Desk):
    desk.write(numbered(40))
    async with Gateway(QUICK) as gateway:
        done = await desk.run(gateway, "--rpm", "0")
    assert (done.status, len(done.labels), gateway.refused) == (0, 40, 0)


async def test_the_address_may_end_before_the_endpoint(desk: Desk):
    brisk(desk)
    desk.write({"a": "Hello"})
    async with Gateway(QUICK) as gateway:
        done = await desk.run(gateway, TOKENHUB_URL=gateway.url.removesuffix("/chat/completions"))
    assert (done.status, gateway.answered) == (0, 1)


# ---- A sample, and outputs of their own


async def test_a_sample_is_the_same_each_time_not_the_first_rows_and_continued_by_the_full_run(desk: Desk):
    brisk(desk)
    desk.write(numbered(60))
    async with Gateway(QUICK) as gateway:
        done = await desk.run(gateway, "--sample", "10")
        sample = set(done.labels)
        assert (done.status, len(sample), gateway.requests) == (0, 10, 10)
        assert summary(done)[0] == "Classified 10 tickets"
        assert done.stderr.startswith("10 tickets in tickets.csv (the sample): 10 to send to ")
        # Other rows before them, and in another order, choose no other tickets.
        desk.write(dict(reversed(numbered(60).items())))
        again = await desk.run(gateway, "--sample", "10")
        assert (set(again.labels), gateway.requests) == (sample, 10)
        larger = await desk.run(gateway, "--sample", "20")
        assert set(larger.labels) > sample
        done = await desk.run(gateway)
        assert (done.status, len(done.labels), gateway.requests) == (0, 60, 60)
    numbers = sorted(int(id_[1:]) for id_ in sample)
    assert numbers[0] < 30 <= numbers[-1]


@pytest.mark.parametrize("sample", ["4", "9" * 30], ids=["one more", "any number"])
async def test_a_sample_of_more_than_there_are_takes_them_all(desk: Desk, sample):
    brisk(desk)
    desk.write(numbered(3))
    async with Gateway(QUICK) as gateway:
        done = await desk.run(gateway, "--sample", sample)
    assert (done.status, len(done.labels)) == (0, 3)


async def test_the_demo_in_an_output_of_its_own_leaves_all_tickets_to_the_real_key(desk: Desk):
    brisk(desk)
    desk.write(numbered(5))
    async with Gateway(QUICK) as stand_in, Gateway(QUICK) as real:
        demo = await desk.run(stand_in, "-o", "demo.jsonl")
        assert "Labels: demo.jsonl. " in demo.stdout
        assert not desk.output.exists()
        done = await desk.run(real)
    assert done.stderr.startswith("5 tickets in tickets.csv: 5 to send to ")
    assert (real.requests, len(done.labels)) == (5, 5)


# ---- What is refused before anything is sent


@pytest.mark.parametrize(
    ("arguments", "environment", "what", "step"),
    [
        ((), {"TOKENHUB_KEY": ""}, "TOKENHUB_KEY is not set", "export TOKENHUB_KEY="),
        ((), {"TOKENHUB_KEY": " \n"}, "TOKENHUB_KEY is not set", "any word where the server needs none"),
        ((), {"TOKENHUB_URL": "http://example.com/v1"}, "http://example.com/v1", "https://"),
        (("--model", "gpt-9"), {}, "no price for gpt-9", "--budget 0"),
        (("--model", "gpt-9", "--budget", "0.5"), {}, "no price for gpt-9", "add it to PRICES"),
        (("--concurrency", "0"), {}, "--concurrency", "1"),
        (("--sample", "0"), {}, "--sample", "1"),
        (("--sample", "-3"), {}, "--sample", "1"),
        (("--rpm", "-1"), {}, "--rpm", "0.01"),
        (("--rpm", "nan"), {}, "--rpm", "0.01"),
        (("--rpm", "1e-300"), {}, "--rpm", "0.01"),
        (("--budget", "-1"), {}, "--budget", "0 for no limit"),
        (("--budget", "nan"), {}, "--budget", "0 for no limit"),
        (("-o", "nowhere/labels.jsonl"), {}, "no folder", "make it"),
        (("-o", "labels.xlsx"), {}, "-o", ".csv"),
        (("-o", "tickets.csv"), {}, "tickets.csv is the CSV itself", "choose another"),
        (("absent.csv",), {}, "absent.csv: No such file", "Name a CSV that can be read"),
    ],
    ids=str,
)
def test_what_makes_no_sense_is_refused_in_one_line_with_the_next_step(desk: Desk, arguments, environment, what, step):
    desk.write({"a": "Hello"})
    before = sorted(desk.folder.iterdir())
    done = run_here(desk, *arguments, **environment)
    assert (done.status, done.stdout) == (2, "")
    [line] = done.stderr.splitlines()
    assert line.startswith("classify.py: ")
    assert what in line
    assert step in line
    assert sorted(desk.folder.iterdir()) == before


async def test_a_second_run_meanwhile_is_told_what_is_there_and_what_to_do(desk: Desk):
    brisk(desk)
    desk.write(numbered(2))
    async with Gateway(replace(QUICK, latency_s=0.6)) as gateway:
        first = await desk.start(gateway)
        await until(lambda: gateway.requests == 2)
        second = await desk.run(gateway)
        done = await desk.finish(first)
    assert (done.status, second.status, second.stdout, gateway.requests) == (0, 2, "", 2)
    [line] = second.stderr.splitlines()
    assert "labels.db: in use by another run. Wait for it, or give this one another output (-o)" in line


async def run_bare(python: object, *arguments: str, cwd: Path) -> tuple[int, str]:
    """The exit status and all that the program says, in another Python."""
    process = await asyncio.create_subprocess_exec(
        str(python), *arguments, cwd=cwd, env=clean_environment(),
        stdout=asyncio.subprocess.PIPE, stderr=asyncio.subprocess.STDOUT,
    )  # fmt: skip
    said, _ = await process.communicate()
    return process.returncode, said.decode()


OLD_PYTHONS = Path.home() / ".pyenv" / "versions"


@pytest.mark.parametrize("version", ["3.9", "3.10"])
async def test_an_older_python_says_in_one_line_what_it_needs(desk: Desk, version):
    pythons = list(OLD_PYTHONS.glob(f"{version}.*/bin/python"))
    if not pythons:
        pytest.skip(f"there is no Python {version} in {OLD_PYTHONS}")
    said = await run_bare(pythons[0], "classify.py", cwd=desk.folder)
    assert said == (2, "classify.py: needs Python 3.11 or later. With uv: uv run classify.py\n")


async def test_without_aiohttp_one_line_says_how_to_install_it(desk: Desk):
    status, said = await run_bare(sys.executable, "-S", "classify.py", cwd=desk.folder)
    [line] = said.splitlines()
    assert status == 2
    assert "No module named 'aiohttp'" in line
    assert "pip install" in line
    assert "uv run classify.py" in line


async def test_uv_runs_it_without_an_environment(desk: Desk):
    uv = shutil.which("uv", path=f"{Path(sys.executable).parent}:/usr/local/bin:/usr/bin")
    if not uv:
        pytest.skip("there is no uv")
    desk.write(numbered(3))
    status, said = await run_bare(uv, "run", "--quiet", "classify.py", "--dry-run", cwd=desk.folder)
    if "error sending request" in said or "Failed to fetch" in said:
        pytest.skip("uv has no network")
    assert status == 0, said
    assert said.startswith("3 tickets in tickets.csv: 3 to send to deepseek-chat at ")


# ---- Failures: of a ticket, of the moment, of the run


async def test_refusals_for_the_pace_wait_and_use_no_retry(desk: Desk):
    brisk(desk, MAX_RETRIES=0)
    desk.write(numbered(25))
    async with Gateway(replace(QUICK, rpm=1200, burst=2, retry_after="float")) as gateway:
        done = await desk.run(gateway, within_s=30)
    assert gateway.refused > 0
    assert (done.status, len(done.labels)) == (0, 25)


async def test_a_failure_that_may_pass_is_tried_again_so_many_times(desk: Desk):
    brisk(desk, MAX_RETRIES=3)
    desk.write(numbered(2))
    async with Gateway(replace(QUICK, faults=(Fault("status_503", matching="number 0."),))) as gateway:
        done = await desk.run(gateway)
    assert (done.status, set(done.labels), gateway.requests) == (1, {"t1"}, 1 + 4)
    assert "\nticket t0 failed: 503 " in done.stderr


async def test_a_bad_request_fails_its_ticket_alone_and_is_sent_alone_the_next_time(desk: Desk):
    brisk(desk)
    desk.write(numbered(10))
    async with Gateway(replace(QUICK, faults=(Fault("status_400", matching="number 3."),))) as gateway:
        done = await desk.run(gateway)
        assert (done.status, set(done.labels), gateway.requests) == (1, set(numbered(10)) - {"t3"}, 10)
        [line] = [line for line in done.stderr.splitlines() if "t3" in line]
        assert "400 invalid_request" in line
        assert done.stdout.splitlines()[-1].startswith("Not labelled: 1 ticket is left. Run the same command")
        gateway.script = QUICK
        done = await desk.run(gateway)
    assert (done.status, set(done.labels), gateway.requests) == (0, set(numbered(10)), 11)


async def test_a_key_that_works_only_after_a_moment_is_forgiven(desk: Desk):
    brisk(desk)
    desk.write(numbered(60))
    async with Gateway(replace(QUICK, key="not this one, yet")) as gateway:
        process = await desk.start(gateway)
        await until(lambda: gateway.requests)
        gateway.script = QUICK
        done = await desk.finish(process)
    assert (done.status, len(done.labels)) == (0, 60)


def page(status: int) -> Fault:
    """A firewall's."""
    body = b"<html><style>p {}</style><title>Attention Required!</title><p>You have been blocked</html>"
    return Fault(says(status, body, mime="text/html"))


@pytest.mark.parametrize(
    ("fault", "most", "why", "step"),
    [
        (Fault("status_401"), 20, "Stopped: 401, the key is refused. Set TOKENHUB_KEY", "20 tickets are left."),
        (Fault("status_402"), 3, "Stopped: 402, payment is required. Top up", "then run the same command"),
        (Fault("status_404"), 3, "Stopped: 404, no such address or model. Check TOKENHUB_URL and MODEL", ""),
        (Fault("redirect_307"), 3, "Stopped: 307, the address redirects", "Set TOKENHUB_URL to the address itself"),
        (Fault("quota_429"), 60, "Stopped: 429 insufficient_quota", "See the plan and the balance of your account"),
        (page(403), 9, "Stopped: every ticket is refused alike: 403: Attention Required! You have been blocked", ""),
    ],
    ids=["wrong key", "402", "404", "redirect", "quota", "a firewall's page"],
)
async def test_what_no_retry_can_mend_stops_the_run_with_the_reason_and_the_next_step_as_its_last_line(
    desk: Desk, fault, most, why, step
):
    brisk(desk, CONCURRENCY=2, GRACE_S=1, QUOTA_S=2, BACKOFF_MAX_S=0.3)
    desk.write(numbered(20))
    async with Gateway(replace(QUICK, refusal_s=0.05, faults=(fault,))) as gateway:
        done = await desk.run(gateway, within_s=30)
    assert (done.status, gateway.answered) == (1, 0)
    assert gateway.requests <= most
    assert summary(done) == ["Classified 0 tickets", "Tokens: 0 in / 0 out", "Cost  : $0.0000"]
    assert "0.0%" not in done.stdout, "a table of zeros"
    last = done.stdout.splitlines()[-1]
    assert last.startswith(why)
    assert step in last
    assert last.endswith("then run the same command: 20 tickets are left.")


async def test_ctrl_c_during_an_outage_reports_the_last_error(desk: Desk):
    brisk(desk)
    desk.write(numbered(20))
    async with Gateway(replace(QUICK, faults=(Fault("status_503"),))) as gateway:
        process = await desk.start(gateway)
        await until(lambda: gateway.requests > 3)
        process.send_signal(2)
        done = await desk.finish(process)
    assert done.status == 130
    *_, error, last = done.stdout.splitlines()
    assert error == "Last error: 503 service_unavailable server_error: server_error: service_unavailable"
    assert last == "Interrupted. Run the same command again: 20 tickets are left."


async def test_the_chinese_model_is_judged_by_its_own_tickets(desk: Desk):
    brisk(desk, CHINESE_MODEL=QWEN, CONCURRENCY=1)
    tickets = numbered(150)
    desk.write({id_: f"发票 {body}" if n % 5 == 0 else body for n, (id_, body) in enumerate(tickets.items())})
    async with Gateway(replace(QUICK, reply=lambda text: "hm" if text.startswith("发票") else "bug")) as gateway:
        done = await desk.run(gateway)
    # 96 tickets, of which 20 are Chinese and were asked about twice.
    assert (done.status, gateway.requests) == (1, 96 + 20)
    assert f"Stopped: {QWEN} named a label for 0 of the last 20 tickets." in done.stdout


async def test_impossible_tickets_keep_no_other_from_being_labelled_in_any_run(desk: Desk):
    brisk(desk)
    tickets = {f"t{n}": f"{'impossible' if n % 3 == 0 and n < 135 else 'possible'} {n}" for n in range(200)}
    possible = {id_ for id_, body in tickets.items() if body.startswith("possible")}
    assert len(tickets) - len(possible) == 45
    async with Gateway(replace(QUICK, latency_s=0, faults=(IMPOSSIBLE,))) as gateway:
        for count in (140, 140, 200):
            desk.write(dict(list(tickets.items())[:count]))
            done = await desk.run(gateway)
            assert done.status == 1
            assert set(done.labels) == possible & set(list(tickets)[:count])


async def test_one_403_for_one_tickets_text_does_not_end_the_run(desk: Desk):
    brisk(desk)
    desk.write(numbered(30))
    async with Gateway(replace(QUICK, faults=(Fault("firewall_403", matching="number 3."),))) as gateway:
        done = await desk.run(gateway)
    assert (done.status, set(done.labels)) == (1, set(numbered(30)) - {"t3"})


# ---- Where nobody listens


@pytest.mark.parametrize("number", [1, 2])
async def test_a_closed_stdout_or_stderr_ends_no_run(desk: Desk, number: int):
    brisk(desk)
    desk.write(numbered(5) | {"bad": "impossible"})
    async with Gateway(replace(QUICK, faults=(IMPOSSIBLE,))) as gateway:
        url = gateway.url
        command = f"TOKENHUB_URL={url} TOKENHUB_KEY={KEY} {sys.executable} classify.py {number}>&-"
        process = await asyncio.create_subprocess_shell(
            command, cwd=desk.folder, env=clean_environment(),
            stdout=asyncio.subprocess.PIPE, stderr=asyncio.subprocess.PIPE,
        )  # fmt: skip
        out, err = await process.communicate()
    assert process.returncode == 1
    assert len([json.loads(line) for line in desk.output.read_bytes().splitlines()]) == 5
    assert b"Traceback" not in err
    assert b"Classified 5" in out or number == 1


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="needs a device that is always full")
@pytest.mark.parametrize("stream", ["stdout", "stderr"])
async def test_a_stream_that_takes_nothing_ends_no_run(desk: Desk, stream: str):
    brisk(desk)
    desk.write(numbered(5))
    async with Gateway(QUICK) as gateway:
        with Path("/dev/full").open("w") as full:  # noqa: ASYNC230
            streams = {"stdout": asyncio.subprocess.PIPE, "stderr": asyncio.subprocess.PIPE} | {stream: full}
            env = clean_environment() | {"TOKENHUB_URL": gateway.url, "TOKENHUB_KEY": KEY}
            process = await asyncio.create_subprocess_exec(
                sys.executable, "classify.py", cwd=desk.folder, env=env, **streams
            )
            _, err = await process.communicate()
    assert process.returncode == 0
    assert b"Traceback" not in (err or b"")
    assert len(desk.output.read_bytes().splitlines()) == 5
