"""curator (PyPI: bespokelabs-curator), told the limit, with its other settings as they come, and these:

- `max_requests_per_minute`: what classify.py is told.
- `max_tokens_per_minute` without effect, as the stand-in counts no tokens.
- `max_concurrent_requests` not set, its default: the pace keeps few in flight. If set, each turn of its loop of retries
  takes one of these places, and gives it back only where there was a request to send.
- `require_all_responses` off, so that it writes what it has.
- `request_timeout` as everybody's, in whole seconds; retries 10 and "length" refused, its defaults.

Its telemetry is off, litellm's prices and tiktoken's tokens come from the package: nothing leaves the machine.
"""

import csv
import json
import os

os.environ |= {"TELEMETRY_ENABLED": "false", "LITELLM_LOCAL_MODEL_COST_MAP": "True", "HF_HUB_OFFLINE": "1"}
os.environ |= {"HTTPS_PROXY": "http://127.0.0.1:9", "CURATOR_CACHE_DIR": "curator"}

import litellm.litellm_core_utils.default_encoding  # noqa: F401 - it shows tiktoken the tokens that litellm brings
from bespokelabs import curator

LABELS = {"billing", "bug", "how-to", "feature-request", "other"}
RPM = float(os.environ["RPM"]) or 1e6


class Classifier(curator.LLM):
    def prompt(self, ticket: dict) -> str:
        return ticket["body"]

    def parse(self, ticket: dict, reply: str) -> dict:
        label = (reply or "").strip().lower()
        return {"id": ticket["id"], "label": label if label in LABELS else "other"}


with open("tickets.csv", newline="", encoding="utf-8") as file:
    tickets = list(csv.DictReader(file))
classifier = Classifier(
    model_name="stand-in",  # litellm knows a "deepseek-chat" of which curator then cannot tell the price, and fails
    backend="openai",
    system_prompt=os.environ["SYSTEM_PROMPT"],
    generation_params={"max_tokens": 10, "temperature": 0},
    backend_params={
        "base_url": os.environ["TOKENHUB_URL"].removesuffix("/chat/completions"),
        "api_key": os.environ["TOKENHUB_KEY"],
        "max_requests_per_minute": int(RPM),
        "max_tokens_per_minute": 10**9,
        "request_timeout": max(1, int(float(os.environ["TIMEOUT_S"]))),
        "require_all_responses": False,
    },
)
results = classifier(tickets).dataset
with open("labels.jsonl", "w", encoding="utf-8") as file:
    file.writelines(json.dumps({"id": row["id"], "label": row["label"]}) + "\n" for row in results)
