"""The floor: forty workers that post with aiohttp in a loop and throw the answers away. It labels nothing."""

import asyncio
import csv
import os
from collections.abc import Iterator

import aiohttp

URL, KEY = os.environ["TOKENHUB_URL"], os.environ["TOKENHUB_KEY"]
PROMPT = os.environ.get("SYSTEM_PROMPT", "Classify the support ticket.")
WORKERS = 40


async def work(session: aiohttp.ClientSession, tickets: Iterator[dict]) -> None:
    for ticket in tickets:
        messages = [{"role": "system", "content": PROMPT}, {"role": "user", "content": ticket["body"]}]
        payload = {"model": "deepseek-chat", "messages": messages, "max_tokens": 10, "temperature": 0}
        async with session.post(URL, json=payload) as response:
            await response.json()


async def post_all(tickets: Iterator[dict]) -> None:
    async with aiohttp.ClientSession(headers={"Authorization": f"Bearer {KEY}"}) as session:
        await asyncio.gather(*(work(session, tickets) for _ in range(WORKERS)))


with open("tickets.csv", newline="", encoding="utf-8") as file:
    asyncio.run(post_all(csv.DictReader(file)))
