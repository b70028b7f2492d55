"""async-batch-llm, told the limit, with its other settings as they come, and these:

- `concurrency` 40, `attempt_timeout` as everybody's.
- `max_requests_per_minute`: what classify.py is told. `quota_burst_seconds` 1, as its own bucket holds a whole minute's
  requests by default, and the stand-in's holds one second's.
- `cooldown_seconds` 1, the stand-in's Retry-After: the default after a refusal is 300 s, in which nobody would be done.

Its defaults: three attempts, 20 more after refusals, a slow start after each cooldown.
"""

import asyncio
import csv
import json
import os

from async_batch_llm import ProcessorConfig, RateLimitConfig, llm, process_stream

LABELS = {"billing", "bug", "how-to", "feature-request", "other"}


def label_of(reply: str) -> str:
    label = (reply or "").strip().lower()
    return label if label in LABELS else "other"


async def classify_all(tickets: list[dict]) -> list[dict]:
    strategy = llm(
        "openai-compatible:deepseek-chat",
        base_url=os.environ["TOKENHUB_URL"].removesuffix("/chat/completions"),
        api_key=os.environ["TOKENHUB_KEY"],
        system_instruction=os.environ["SYSTEM_PROMPT"],
        temperature=0,
        generation_config={"max_tokens": 10},
    )
    config = ProcessorConfig(
        concurrency=40,
        attempt_timeout=float(os.environ["TIMEOUT_S"]),
        max_requests_per_minute=float(os.environ["RPM"]) or None,
        quota_burst_seconds=1,
        rate_limit=RateLimitConfig(cooldown_seconds=1),
    )
    prompts = [(ticket["id"], ticket["body"]) for ticket in tickets]
    results = []
    async for result in process_stream(strategy, prompts, config=config):
        if result.success:
            results.append({"id": result.item_id, "label": label_of(result.output)})
        else:
            print(f"ticket {result.item_id} failed: {result.error}")
    return results


with open("tickets.csv", newline="", encoding="utf-8") as file:
    results = asyncio.run(classify_all(list(csv.DictReader(file))))
with open("labels.jsonl", "w", encoding="utf-8") as file:
    file.writelines(json.dumps(result) + "\n" for result in results)
