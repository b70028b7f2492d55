"""One fixed answer to every request, as fast as plain Python can: for measuring clients, not their behaviour."""

from __future__ import annotations

import asyncio
import json
import re

ANSWER = json.dumps(
    {
        "id": "chatcmpl-1",
        "object": "chat.completion",
        "created": 1_800_000_000,
        "model": "deepseek-chat",
        "choices": [{"index": 0, "message": {"role": "assistant", "content": "billing"}, "finish_reason": "stop"}],
        "usage": {"prompt_tokens": 312, "completion_tokens": 3, "total_tokens": 315},
    }
).encode()
HEAD = f"HTTP/1.1 200 OK\r\nContent-Type: application/json\r\nContent-Length: {len(ANSWER)}\r\n\r\n"
RESPONSE = HEAD.encode() + ANSWER
CONTENT_LENGTH = re.compile(rb"\r\ncontent-length: *(\d+)", re.I)


class LeanProtocol(asyncio.Protocol):
    """Just enough of HTTP/1.1: keep-alive, pipelining, bodies with a Content-Length."""

    def __init__(self, gateway: LeanGateway) -> None:
        self.gateway = gateway
        self.waiting = b""

    def connection_made(self, transport: asyncio.Transport) -> None:
        self.transport = transport

    def data_received(self, data: bytes) -> None:
        """Answers every request that is complete."""
        data = self.waiting + data
        start = answers = 0
        while (end := data.find(b"\r\n\r\n", start)) >= 0:
            length = CONTENT_LENGTH.search(data, start, end)
            end += 4 + (int(length[1]) if length else 0)
            if end > len(data):
                break
            start, answers = end, answers + 1
        self.waiting = data[start:]
        if answers:
            self.gateway.requests += answers
            self.transport.write(RESPONSE * answers)


class LeanGateway:
    """Serves on a free loopback port between `async with` and its end."""

    def __init__(self) -> None:
        self.requests = 0

    async def __aenter__(self) -> LeanGateway:
        loop = asyncio.get_running_loop()
        self.server = await loop.create_server(lambda: LeanProtocol(self), "127.0.0.1", 0, backlog=1024)
        self.url = f"http://127.0.0.1:{self.server.sockets[0].getsockname()[1]}/v1/chat/completions"
        return self

    async def __aexit__(self, *_: object) -> None:
        self.server.close()
