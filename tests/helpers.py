"""What several test files need beside the harness: waiting for a moment, a run in this process, bodies of requests."""

import asyncio
import contextlib
import io
import os
import socket
import sys
from collections.abc import Callable
from unittest import mock

import pytest

import classify
from tests.conftest import KEY, Desk, Done, clean_environment
from tests.gateway import JSON, Call, Gateway, Script

QUICK = Script(rpm=0, latency_s=0.01, refusal_s=0.0)  # no limit, and hardly any waiting


def brisk(desk: Desk, **constants: object) -> None:
    """Edits the program so that its waits are short, and as the test wants it."""
    scaled = {"RPM": 60_000, "BACKOFF_S": 0.01, "BACKOFF_MAX_S": 0.05, "TIMEOUT": 20.0}
    desk.edit(**scaled | constants)


def summary(done: Done) -> list[str]:
    """The three fixed lines of the report."""
    return done.stdout.splitlines()[:3]


class Witness(Gateway):
    """A gateway that remembers the requests that it answered, not only the last one."""

    def __init__(self, script: Script = QUICK) -> None:
        super().__init__(script)
        self.bodies: list[dict] = []
        self.headers: list[dict[str, str]] = []

    def deliver(self, call: Call, answer: dict, mime: str = JSON) -> object:
        self.bodies.append(call.body)
        self.headers.append(dict(call.request.headers))
        return super().deliver(call, answer, mime)


async def until(happened: Callable[[], object], limit_s: float = 20.0) -> None:
    """Waits for a moment in the gateway's life."""
    async with asyncio.timeout(limit_s):
        while not happened():  # noqa: ASYNC110 - the gateway has no event for most of its moments
            await asyncio.sleep(0.005)


def run_here(desk: Desk, *arguments: str, **environment: str) -> Done:
    """Runs the program in this process, which is ten times faster, where it must send nothing; fails where it does."""
    out, err = (io.TextIOWrapper(io.BytesIO(), encoding="utf-8", newline="") for _ in range(2))
    with socket.create_server(("127.0.0.1", 0)) as nobody, contextlib.ExitStack() as stack:
        nobody.setblocking(False)
        ours = {"TOKENHUB_URL": f"http://127.0.0.1:{nobody.getsockname()[1]}/v1", "TOKENHUB_KEY": KEY} | environment
        given = {name: value for name, value in ours.items() if value}
        stack.enter_context(mock.patch.dict(os.environ, clean_environment() | given, clear=True))
        stack.enter_context(mock.patch.object(sys, "argv", ["classify.py", *arguments]))
        stack.enter_context(mock.patch.multiple(classify, TIMEOUT=1.0, MAX_RETRIES=0, RPM=60_000))
        stack.enter_context(contextlib.chdir(desk.folder))
        stack.enter_context(contextlib.redirect_stdout(out))
        stack.enter_context(contextlib.redirect_stderr(err))
        try:
            status = classify.main()
        except SystemExit as exit_:
            status = exit_.code
        with pytest.raises(BlockingIOError):
            nobody.accept()
    out.flush()
    err.flush()
    return Done(status, out.buffer.getvalue().decode(), err.buffer.getvalue().decode(), desk.output)
