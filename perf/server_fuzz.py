"""Requests that nobody would think of: schemathesis makes them of the server's OpenAPI document.

    python perf/server_fuzz.py engine --requests 10000

Fails at the first reply that is a 5xx, takes longer than ``HANG_S``, or is none that the document promises. Writes what
the server said, and its memory as it went on, to ``perf/results/server-fuzz.json``.
"""

from __future__ import annotations

import argparse
import json
import time
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

from flabc.errors import require
from flabc.perf.serving import Server, environment_of

RESULT = Path(__file__).resolve().parent / "results" / "server-fuzz.json"

#: A reply that takes longer is none.
HANG_S = 60.0

#: How often memory is read.
STEPS = 20

#: How often requests of which nothing is new are sent in the end, a tenth as many: what grows then is lost.
AGAIN = 4

#: Tokens that a generated request may ask for: enough to run beside others.
MAX_TOKENS = 8


def main() -> None:
    """Ask, count, and write."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("engine", type=Path)
    parser.add_argument("--requests", type=int, default=10_000)
    asked = parser.parse_args()
    # A cache of prefixes that is soon full: what grows by design has grown then.
    with Server(asked.engine, "--max-batch", "8", "--max-length", "512", "--prefix-cache", "1MB") as server:
        memory, begun = {0: server.rss_mib()}, time.monotonic()

        def watch(sent: int) -> None:
            if sent % max(1, asked.requests // STEPS) == 0:
                memory[sent] = server.rss_mib()

        statuses, seconds = fuzz(server.url, server.model, asked.requests, watch), time.monotonic() - begun
        again = [server.rss_mib()]
        for _ in range(AGAIN):
            fuzz(server.url, server.model, asked.requests // 10)
            again.append(server.rss_mib())
        found = {
            "environment": environment_of(asked.engine),
            "requests": sum(statuses.values()),
            "seconds": round(seconds, 1),
            "statuses": dict(sorted(statuses.items())),
            "rss_mib": {str(sent): mib for sent, mib in memory.items()},
            "rss_mib_again": again,
        }
    RESULT.write_text(json.dumps(found, indent=1) + "\n")
    print(json.dumps(found, indent=1))


def fuzz(url: str, model: str, count: int, sent: Callable[[int], None] = lambda _: None) -> Counter[int]:
    """Send so many generated requests, right and wrong ones, to all operations; how often each status came back.

    Args:
        url: the server's.
        model: what it serves.
        count: how many requests.
        sent: is told, after each reply, how many there were.

    Raises:
        MissingExtraError: if schemathesis is not installed.
        AssertionError: if a reply breaks a promise, with the request as a curl line.
    """
    schemathesis: Any = require("schemathesis", "dev")
    hypothesis: Any = require("hypothesis", "dev")
    checks: Any = require("schemathesis.checks", "dev")
    conformance: Any = require("schemathesis.specs.openapi.checks", "dev")
    promised = [
        checks.not_a_server_error,
        conformance.status_code_conformance,
        conformance.content_type_conformance,
        conformance.response_schema_conformance,
    ]
    document = schemathesis.openapi.from_url(f"{url}/openapi.json")
    modes = (schemathesis.GenerationMode.POSITIVE, schemathesis.GenerationMode.NEGATIVE)
    requests = [each.ok().as_strategy(generation_mode=mode) for each in document.get_all_operations() for mode in modes]
    statuses: Counter[int] = Counter()

    def ask(case: Any) -> None:
        _aim(case, model)
        reply = case.call_and_validate(checks=promised, timeout=HANG_S)
        statuses[reply.status_code] += 1
        sent(statuses.total())

    settings = hypothesis.settings(
        max_examples=count,
        database=None,
        deadline=None,
        derandomize=True,
        phases=[hypothesis.Phase.generate],
        suppress_health_check=list(hypothesis.HealthCheck),
    )
    settings(hypothesis.given(case=hypothesis.strategies.one_of(requests))(ask))()
    return statuses


def _aim(case: Any, model: str) -> None:
    """Let most requests name the model that is served, and ask for few tokens."""
    body = case.body
    if isinstance(body, dict) and isinstance(body.get("model"), str) and len(body["model"]) != 1:
        body["model"] = model
        for name in ("max_tokens", "max_completion_tokens"):
            if isinstance(body.get(name), int | float):  # 60.0 is a whole number too
                body[name] = min(body[name], MAX_TOKENS)
        if "messages" in body and body.get("max_completion_tokens") is None and body.get("max_tokens") is None:
            body["max_tokens"] = MAX_TOKENS  # a chat's answer else takes all the room there is


if __name__ == "__main__":
    main()
