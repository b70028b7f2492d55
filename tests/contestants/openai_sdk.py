"""The OpenAI SDK, a semaphore, gather, and the file at the end; with a time-out, and more than its two retries."""

import asyncio
import csv
import json
import os

from openai import AsyncOpenAI, OpenAIError

LABELS = {"billing", "bug", "how-to", "feature-request", "other"}
PROMPT = os.environ.get("SYSTEM_PROMPT", f"Classify the support ticket. Answer with one of: {', '.join(LABELS)}.")
CONCURRENCY = int(os.environ.get("CONCURRENCY", 40))
MAX_RETRIES = 5  # as the SDK's README sets it
TIMEOUT_S = float(os.environ.get("TIMEOUT_S", 60))  # the SDK's own is ten minutes


async def classify(client: AsyncOpenAI, semaphore: asyncio.Semaphore, ticket: dict) -> dict:
    async with semaphore:
        completion = await client.chat.completions.create(
            model="deepseek-chat",
            messages=[{"role": "system", "content": PROMPT}, {"role": "user", "content": ticket["body"]}],
            max_tokens=10,
            temperature=0,
        )
    reply = (completion.choices[0].message.content or "").strip().lower()
    return {"id": ticket["id"], "label": reply if reply in LABELS else "other"}


async def classify_all(tickets: list[dict]) -> list[dict | BaseException]:
    semaphore = asyncio.Semaphore(CONCURRENCY)
    base_url = os.environ["TOKENHUB_URL"].removesuffix("/chat/completions")
    api_key = os.environ["TOKENHUB_KEY"]
    async with AsyncOpenAI(base_url=base_url, api_key=api_key, timeout=TIMEOUT_S, max_retries=MAX_RETRIES) as client:
        calls = (classify(client, semaphore, ticket) for ticket in tickets)
        return await asyncio.gather(*calls, return_exceptions=True)


with open("tickets.csv", newline="", encoding="utf-8") as file:
    tickets = list(csv.DictReader(file))
results = asyncio.run(classify_all(tickets))
with open("labels.jsonl", "w", encoding="utf-8") as file:
    for ticket, result in zip(tickets, results, strict=True):
        if isinstance(result, OpenAIError):
            print(f"ticket {ticket['id']} failed: {result}")
        elif isinstance(result, BaseException):
            raise result
        else:
            file.write(json.dumps(result) + "\n")
