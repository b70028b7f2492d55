"""The pattern that everybody writes: a semaphore, gather, three retries, and the file at the end."""

import asyncio
import csv
import json
import os

import aiohttp

URL, KEY = os.environ["TOKENHUB_URL"], os.environ["TOKENHUB_KEY"]
LABELS = {"billing", "bug", "how-to", "feature-request", "other"}
PROMPT = os.environ.get("SYSTEM_PROMPT", f"Classify the support ticket. Answer with one of: {', '.join(LABELS)}.")
CONCURRENCY = int(os.environ.get("CONCURRENCY", 40))
MAX_RETRIES = 3
TIMEOUT_S = float(os.environ.get("TIMEOUT_S", 60))


async def classify(session: aiohttp.ClientSession, semaphore: asyncio.Semaphore, ticket: dict) -> dict:
    messages = [{"role": "system", "content": PROMPT}, {"role": "user", "content": ticket["body"]}]
    payload = {"model": "deepseek-chat", "messages": messages, "max_tokens": 10, "temperature": 0}
    label = "other"
    async with semaphore:
        for attempt in range(MAX_RETRIES + 1):
            try:
                async with session.post(URL, json=payload) as response:
                    if response.status == 429 or response.status >= 500:
                        await asyncio.sleep(float(response.headers.get("Retry-After", 2**attempt)))
                        continue
                    response.raise_for_status()
                    data = await response.json()
                reply = data["choices"][0]["message"]["content"].strip().lower()
                label = reply if reply in LABELS else "other"
                break
            except (aiohttp.ClientError, TimeoutError):
                await asyncio.sleep(2**attempt)
    return {"id": ticket["id"], "label": label}


async def classify_all(tickets: list[dict]) -> list[dict]:
    semaphore = asyncio.Semaphore(CONCURRENCY)
    timeout = aiohttp.ClientTimeout(total=TIMEOUT_S)
    async with aiohttp.ClientSession(headers={"Authorization": f"Bearer {KEY}"}, timeout=timeout) as session:
        return await asyncio.gather(*(classify(session, semaphore, ticket) for ticket in tickets))


with open("tickets.csv", newline="", encoding="utf-8") as file:
    results = asyncio.run(classify_all(list(csv.DictReader(file))))
with open("labels.jsonl", "w", encoding="utf-8") as file:
    file.writelines(json.dumps(result) + "\n" for result in results)
