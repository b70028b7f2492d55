"""A run from end to end: what is sent, which tickets, in which Python, and how it ends."""

import asyncio
import shutil
import sys
from dataclasses import replace
from pathlib import Path

import pytest

from classify import SYSTEM_PROMPT
from tests.conftest import KEY, Desk, numbered
from tests.forks import clean_environment
from tests.gateway import Fault, Gateway
from tests.helpers import QUICK, Witness, brisk, summary, until

QWEN = "qwen2.5-72b-instruct"
MIXED = {
    "a": "My invoice is wrong",
    "b": "The app has a bug",
    "c": "How do I log in?",
    "d": "Please add dark mode, I wish I had it",
    "e": "Hello there",
    "f": "如何申请退款？发票在哪里？",
}


# ---- What is sent, and what comes back


async def test_every_ticket_gets_the_label_that_the_gateway_gave_it(desk: Desk):
    desk.fresh = True
    brisk(desk)
    tickets = MIXED | numbered(30) | {f"u{n}": f"a bug, {n}" for n in range(30)}
    desk.write(tickets)
    async with Gateway(QUICK) as gateway:
        done = await desk.run(gateway)
    assert done.status == 0
    assert done.labels == {id_: gateway.replies[body] for id_, body in tickets.items()}


async def test_a_request_carries_the_prompt_the_ticket_the_settings_and_the_key(desk: Desk):
    brisk(desk, MAX_TOKENS=7, EXTRA_BODY={"thinking": {"type": "disabled"}})
    desk.write({"a": "Hello"})
    async with Witness() as gateway:
        await desk.run(gateway)
    [body], [headers] = gateway.bodies, gateway.headers
    assert body == {
        "model": "deepseek-chat",
        "messages": [{"role": "system", "content": SYSTEM_PROMPT}, {"role": "user", "content": "Hello"}],
        "max_tokens": 7,
        "temperature": 0,
        "thinking": {"type": "disabled"},
    }
    assert headers["Authorization"] == f"Bearer {KEY}"
    assert headers["Content-Type"] == "application/json"


@pytest.mark.parametrize(("arguments", "most"), [((), 3), (("--concurrency", "1"), 1)], ids=str)
async def test_no_more_than_concurrency_are_in_flight_and_an_option_wins_for_one_run(desk: Desk, arguments, most):
    brisk(desk, CONCURRENCY=3)
    desk.write(numbered(20))
    async with Gateway(replace(QUICK, latency_s=0.05)) as gateway:
        await desk.run(gateway, *arguments)
    assert gateway.max_in_flight == most


async def test_chinese_tickets_go_to_the_chinese_model_unless_one_model_is_given_for_all(desk: Desk):
    brisk(desk, CHINESE_MODEL=QWEN)
    desk.write(MIXED)
    async with Gateway(QUICK) as gateway:
        await desk.run(gateway)
        await desk.run(gateway, "--model", "deepseek-chat")
    assert [item.model for item in gateway.bill if item.text == MIXED["f"]] == [QWEN, "deepseek-chat"]
    assert {item.model for item in gateway.bill if item.text != MIXED["f"]} == {"deepseek-chat"}


# ---- A sample


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
        assert (done.status, gateway.requests) == (0, 60)
    numbers = sorted(int(id_[1:]) for id_ in sample)
    assert numbers[0] < 30 <= numbers[-1]


async def test_a_sample_of_more_than_there_are_takes_them_all(desk: Desk):
    brisk(desk)
    desk.write(numbered(3))
    async with Gateway(QUICK) as gateway:
        done = await desk.run(gateway, "--sample", "9" * 30)
    assert (done.status, len(done.labels)) == (0, 3)


# ---- Which Python it needs, and what else


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


# ---- How it ends


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


# ---- Where nobody listens


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="needs a device that is always full")
@pytest.mark.parametrize("streams", ["1>&-", "2>&-", "1>/dev/full", "2>/dev/full"])
async def test_a_stream_that_is_closed_or_takes_nothing_ends_no_run(desk: Desk, streams: str):
    brisk(desk)
    desk.write(numbered(5) | {"bad": "impossible"})
    async with Gateway(replace(QUICK, faults=(Fault("status_400", matching="impossible"),))) as gateway:
        process = await asyncio.create_subprocess_shell(
            f"{sys.executable} classify.py {streams}", cwd=desk.folder,
            env=clean_environment() | {"TOKENHUB_URL": gateway.url, "TOKENHUB_KEY": KEY},
            stdout=asyncio.subprocess.PIPE, stderr=asyncio.subprocess.PIPE,
        )  # fmt: skip
        out, err = await process.communicate()
    assert process.returncode == 1
    assert len(desk.output.read_bytes().splitlines()) == 5
    assert b"Traceback" not in err
    assert (b"Classified 5" in out) == streams.startswith("2")
