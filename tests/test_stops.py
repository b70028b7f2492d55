"""What stops a run, and what does not: patience with each kind, tickets refused in a row, too few labels (R5)."""

import socket
import time
from dataclasses import replace

import pytest

from tests.conftest import Desk, numbered
from tests.gateway import Fault, Gateway, Handler
from tests.helpers import brisk, side_by_side, summary
from tests.replies import NEVER, PLAIN, QUICK_PACE, answers, error, in_turn, message, sends
from tests.test_kinds import FAIL_A_TICKET, LIMITS, QUOTAS

# ---- Patience (section 3; R5) --------------------------------------------------------------------------

PATIENCE = QUICK_PACE | {"GRACE_S": 1, "QUOTA_S": 2, "STUCK_S": 3, "MAX_RETRIES": 1000}
WRONG_KEYS = [sends(401, error("invalid_api_key")), sends(401), sends(401, {"detail": "?"})]
FOR_EVER = {  # what comes after so many good answers: for so many seconds, and what the last line says then
    "a wrong key at once": (0, in_turn(WRONG_KEYS), 1, "Stopped: 401, the key is refused. Set TOKENHUB_KEY"),
    "a wrong key": (5, in_turn(WRONG_KEYS), 1, "Stopped: 401, the key is refused. Set TOKENHUB_KEY"),
    "a quota at once": (0, in_turn(sends(*case) for case in QUOTAS), 2, "nothing better for 2 s. See the plan and the"),
    "a quota": (5, in_turn(sends(*case) for case in QUOTAS), 2, "nothing better for 2 s. See the plan and the"),
    "limits": (0, in_turn(sends(429, case[1]) for case in LIMITS if case[0] == 429), 3, "better for 3 s. Lower RPM"),
    "Retry-After": (5, in_turn(sends(*case[:2], Retry_After="0") for case in LIMITS), 3, "better for 3 s. Lower RPM"),
    "what may pass": (5, in_turn(sends(*case) for case in FAIL_A_TICKET["server error"]), 3, "better for 3 s. Wait"),
    "a wrong key, and what may pass": (5, in_turn([sends(401), sends(503)]), 3, "Stopped: "),
    "a wrong key, and limits": (5, in_turn([sends(401), sends(429)]), 3, "Stopped: "),
    "a quota, and limits": (0, in_turn([sends(*QUOTAS[0]), sends(429)]), 3, "Stopped: 429"),
    "lost connections": (5, "cut_before", 3, "connection lost"),
}


async def test_a_run_bears_nothing_better_for_as_long_as_the_kind_says(desk: Desk):
    brisk(desk, **PATIENCE | {"BACKOFF_S": 0.05})
    desk.write(numbered(12))

    async def one(twin: Desk, good: int, handler: Handler | str, patience_s: int, words: str) -> None:
        async with Gateway(replace(PLAIN, faults=(Fault(handler, first=good + 1),))) as gateway:
            before = time.monotonic()
            done = await twin.run(gateway, "--concurrency", "4", within_s=15)
            took_s = time.monotonic() - before
        assert words in done.stdout.splitlines()[-1]
        # The clock ticks once a second.
        assert patience_s - 1 < took_s < patience_s + 4, words
        assert done.status == 1, words
        assert gateway.requests > 2 * patience_s, words

    await side_by_side(desk, FOR_EVER.values(), one)


async def test_any_answer_sets_patience_back(desk: Desk):
    brisk(desk, **PATIENCE | {"BACKOFF_S": 0.05, "GRACE_S": 2})
    desk.write(numbered(10))
    bad = [sends(401), sends(*QUOTAS[0]), sends(404)]
    mixed = in_turn([*bad, *bad, answers()])
    async with Gateway(replace(PLAIN, faults=(Fault(mixed, first=2),))) as gateway:
        done = await desk.run(gateway, "--concurrency", "1", within_s=30)
    assert done.status == 0


async def test_a_new_key_that_is_refused_at_first_costs_nothing(desk: Desk):
    brisk(desk, BACKOFF_S=0.2, BACKOFF_MAX_S=0.4)
    desk.write(numbered(12))
    async with Gateway(replace(PLAIN, faults=(Fault("status_401", until_s=1.5),))) as gateway:
        done = await desk.run(gateway)
    assert done.status == 0
    assert gateway.faulted > 2


@pytest.mark.parametrize("status", [404, 302])
async def test_a_wrong_address_is_certain_before_the_first_answer_and_may_pass_after_it(desk: Desk, status: int):
    brisk(desk, **PATIENCE)
    desk.write(numbered(12))
    faults = (Fault(sends(status), first=4, last=9),)
    async with Gateway(replace(PLAIN, faults=faults)) as gateway:
        done = await desk.run(gateway, "--concurrency", "2")
        assert done.status == 0
        gateway.script = replace(PLAIN, faults=(Fault(sends(status), first=gateway.requests + 3),))
        desk.write({f"u{n}": f"Another matter, {n}." for n in range(12)})
        done = await desk.run(gateway, "--concurrency", "2")
        assert done.status == 1
        assert done.stdout.splitlines()[-1].startswith(f"Stopped: {status}, ")


async def test_a_port_where_nobody_listens_is_tried_for_as_long_as_what_may_pass(desk: Desk):
    brisk(desk, **PATIENCE)
    desk.write(numbered(5))
    with socket.create_server(("127.0.0.1", 0)) as free:
        url = f"http://127.0.0.1:{free.getsockname()[1]}/v1"
    done = await desk.run(None, TOKENHUB_URL=url, within_s=10)
    assert done.status == 1
    assert summary(done) == ["Classified 0 tickets", "Tokens: 0 in / 0 out", "Cost  : $0.0000"]
    assert "0.0%" not in done.stdout, "a table of zeros"
    last = done.stdout.splitlines()[-1]
    assert last.startswith("Stopped: no connection to 127.0.0.1:")
    assert "nothing better for 3 s. Check TOKENHUB_URL and the network" in last


# ---- Five in a row, then alone (section 3; R5) ---------------------------------------------------------

EVERY_TICKET = [  # none of which is about a ticket
    (400, error("billing_hard_limit_reached", message="The hard limit has been reached")),
    (403, {"message": "The balance of the account is too low"}),
    (412, b"Precondition of the account"),
    (400, [{"error": {"code": 400, "status": "INVALID_ARGUMENT", "message": "This API key is not valid"}}]),
    (422, error("unknown_field", message="Unknown field: thinking")),
    (403, b"<html><h1>You have been blocked</h1></html>"),
]


async def check_five_in_a_row(desk: Desk, good: int, status: int, body: object) -> None:
    """After so many good answers all tickets are refused alike; then all is well again."""
    faults = (Fault(sends(status, body), first=good + 1),)
    async with Gateway(replace(PLAIN, latency_s=0.02, refusal_s=0.2, faults=faults)) as gateway:
        done = await desk.run(gateway)
        last = done.stdout.splitlines()[-1]
        assert last.startswith(f"Stopped: every ticket is refused alike: {status}")
        assert ". Mend what it says: the account, TOKENHUB_KEY, MODEL or EXTRA_BODY, then run" in last
        assert done.status == 1
        assert 6 <= gateway.faulted <= (6 + 40 if good else 6)
        gateway.script = PLAIN
        assert (await desk.run(gateway)).status == 0


async def test_five_tickets_in_a_row_and_one_alone_refused_alike_stop_the_run_and_are_sent_again(desk: Desk):
    brisk(desk)
    desk.write(numbered(150))
    await side_by_side(desk, [(0, *case) for case in EVERY_TICKET], check_five_in_a_row)


async def test_so_they_do_where_the_account_gets_empty_amid_the_run(desk: Desk):
    brisk(desk)
    desk.write(numbered(150))
    await check_five_in_a_row(desk, 60, *EVERY_TICKET[0])


@pytest.mark.parametrize(("of_ten", "refusal_s"), [(1, 0.2), (5, 0.0)])
async def test_tickets_that_are_refused_alike_do_not_stop_a_run_while_others_are_answered(
    desk: Desk, of_ten: int, refusal_s: float
):
    brisk(desk)
    poisoned = {f"t{n}": f"poison number {n}" for n in range(200) if 7 * n % 10 < of_ten}
    desk.write({f"t{n}": f"good number {n}" for n in range(200)} | poisoned)
    script = replace(PLAIN, latency_s=0.2, refusal_s=refusal_s, faults=(Fault("status_400", matching="poison"),))
    async with Gateway(script) as gateway:
        done = await desk.run(gateway)
    assert done.status == 1
    assert gateway.faulted == len(poisoned) == 20 * of_ten
    assert done.stdout.splitlines()[-1].startswith(f"Not labelled: {len(poisoned)} tickets are left.")


async def test_refusals_that_are_not_alike_are_of_the_tickets(desk: Desk):
    brisk(desk, FIRST=NEVER)
    desk.write(numbered(20))
    alike = in_turn([sends(400), sends(400, error("other"))])
    async with Gateway(replace(PLAIN, faults=(Fault(alike),))) as gateway:
        done = await desk.run(gateway, "--concurrency", "1")
    assert done.status == 1
    assert gateway.requests == 20
    assert "Not labelled: 20 tickets are left" in done.stdout


# ---- Too few labels (R5) -------------------------------------------------------------------------------


async def test_a_model_that_labels_none_of_its_first_20_tickets_stops_the_run_and_they_are_sent_again(desk: Desk):
    brisk(desk)
    desk.write(numbered(60))
    async with Gateway(replace(PLAIN, reply=lambda text: "no idea")) as gateway:
        done = await desk.run(gateway, "--concurrency", "4")
        assert (done.status, done.lines) == (1, [])
        assert "Stopped: deepseek-chat named a label for 0 of the last 20 tickets" in done.stdout.splitlines()[-1]
        assert "SYSTEM_PROMPT" in done.stdout.splitlines()[-1]
        assert 40 <= gateway.requests <= 48
        gateway.script = PLAIN
        again = await desk.run(gateway)
    assert (again.status, set(again.labels.values())) == (0, {"bug"})


async def test_a_model_that_labels_fewer_than_half_of_its_last_50_tickets_stops_the_run(desk: Desk):
    brisk(desk)
    desk.write(numbered(120))
    async with Gateway(replace(PLAIN, faults=(Fault(message("no idea"), first=41),))) as gateway:
        done = await desk.run(gateway, "--concurrency", "1")
        assert (done.status, len(done.labels)) == (1, 40)
        assert "named a label for 24 of the last 50 tickets" in done.stdout.splitlines()[-1]
        assert gateway.requests == 40 + 2 * 26
        gateway.script = PLAIN
        again = await desk.run(gateway)
    assert (again.status, set(again.labels.values())) == (0, {"bug"})


async def test_half_of_the_tickets_without_a_label_is_not_too_few(desk: Desk):
    brisk(desk)
    desk.write(numbered(120))
    every_second = {f"see number {n}.": n for n in range(0, 120, 2)}
    faults = tuple(Fault(message("no idea"), matching=text) for text in every_second)
    async with Gateway(replace(PLAIN, faults=faults)) as gateway:
        done = await desk.run(gateway, "--concurrency", "1")
    assert done.status == 0


async def test_twenty_first_tickets_that_fail_after_their_retries_stop_the_run(desk: Desk):
    brisk(desk, MAX_RETRIES=1, OUTAGE=NEVER, IN_A_ROW=NEVER)
    desk.write(numbered(60))

    async def one(twin: Desk, fault: str) -> None:
        async with Gateway(replace(PLAIN, faults=(Fault(fault),))) as gateway:
            done = await twin.run(gateway, "--concurrency", "4")
        assert done.status == 1, fault
        assert "Stopped: deepseek-chat named a label for 0 of the last 20 tickets" in done.stdout, fault
        assert 20 <= len({row["id"] for row in done.ledger}) <= 20 + 4, fault

    faults = ("status_503", "empty_200", "cut_before", "length", "status_451", "no_choices", "content_filter")
    await side_by_side(desk, [(fault,) for fault in faults], one)
