"""What serving an engine gives and takes: one client and sixteen, a soak, the first token, Python's share of a step,
and whether a request is answered beside others as alone.

    python perf/serving.py throughput engine
    python perf/serving.py soak engine --minutes 10
    python perf/serving.py first-token engine
    python perf/serving.py overhead engine
    python perf/serving.py mixed engine

Each writes ``perf/results/serving-<what>.json``, or of another ``--name``.
"""

from __future__ import annotations

import argparse
import http.client
import json
import random
import re
import subprocess
import sys
import threading
import time
import urllib.request
from collections import Counter
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import psutil

from flabc.errors import require
from flabc.runtime.measure.environment import environment

RESULTS = Path(__file__).resolve().parent / "results"

#: What prompts are cut from.
TEXT = '"""Numbers."""\n\n\ndef fibonacci(n: int) -> int:\n    """The n-th."""\n    return n if n < 2 else '

CLIENTS = 16

#: Requests of all kinds.
MIXED = 200

#: Overload: so many times the clients that fill the batch.
SOAKING = 2


class Server:
    """``flabc serve`` in a process of its own, on a free port."""

    def __init__(self, engine: Path, *options: str) -> None:
        command = [sys.executable, "-m", "flabc", "serve", str(engine), "--port", "0", "--json"]
        self.process = subprocess.Popen([*command, *options], stdout=subprocess.PIPE, stderr=subprocess.DEVNULL)
        assert self.process.stdout is not None
        said = json.loads(self.process.stdout.readline())
        self.url, self.model = str(said["url"]), str(said["model"])

    def __enter__(self) -> Server:
        return self

    def __exit__(self, *_: object) -> None:
        self.process.terminate()
        self.process.wait()
        assert self.process.stdout is not None
        self.process.stdout.close()

    def rss_mib(self) -> float:
        """Resident memory."""
        return round(psutil.Process(self.process.pid).memory_info().rss / 2**20, 1)

    def complete(self, connection: http.client.HTTPConnection, **body: Any) -> tuple[int, dict[str, Any]]:
        """One completion over a connection that stays open: the status and the body."""
        asked = json.dumps({"model": self.model, "temperature": 0, **body})
        connection.request("POST", "/v1/completions", asked, {"Content-Type": "application/json"})
        reply = connection.getresponse()
        return reply.status, json.loads(reply.read())

    def connect(self) -> http.client.HTTPConnection:
        """A connection of a client's own."""
        return http.client.HTTPConnection(self.url.removeprefix("http://"), timeout=600)

    def metric(self, name: str) -> float:
        """A metric's value, summed over its labels."""
        with urllib.request.urlopen(f"{self.url}/metrics") as reply:
            text = reply.read().decode()
        return sum(float(value) for value in re.findall(rf"^flabc:{name}(?:{{.*}})? (\S+)$", text, re.M))


def environment_of(engine: Path) -> dict[str, Any]:
    """The machine, and the engine's name."""
    return {**environment(), "engine": engine.resolve().name}


def main() -> None:
    """Measure one of them."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("what", choices=sorted(MEASURES))
    parser.add_argument("engine", type=Path)
    parser.add_argument("--minutes", type=float, default=10.0, help="of the soak")
    parser.add_argument("--rounds", type=int, default=3, help="of everything else")
    parser.add_argument("--name", help="of the result; by default what is measured")
    parser.add_argument("--tokens", type=int, default=64, help="of an answer")
    asked = parser.parse_args()
    found = {"environment": environment_of(asked.engine), **MEASURES[asked.what](asked)}
    (RESULTS / f"serving-{asked.name or asked.what}.json").write_text(json.dumps(found, indent=1) + "\n")
    print(json.dumps(found, indent=1))


def throughput(asked: argparse.Namespace) -> dict[str, Any]:
    """Tokens per second of one client and of sixteen, in turns on one server; prompts have nothing in common."""
    rates: dict[int, list[float]] = {1: [], CLIENTS: []}
    with Server(asked.engine, "--max-batch", str(CLIENTS), "--prefix-cache", "0") as server:
        _rate(server, CLIENTS, 1, asked.tokens)
        for turn in range(asked.rounds):
            for clients, found in rates.items():
                found.append(_rate(server, clients, 1 + turn, asked.tokens))
    medians = {clients: sorted(found)[len(found) // 2] for clients, found in rates.items()}
    return {
        "output_tokens": asked.tokens,
        "tokens_per_s": {str(clients): [round(rate, 2) for rate in found] for clients, found in rates.items()},
        "ratio_of_medians": round(medians[CLIENTS] / medians[1], 2),
    }


def _rate(server: Server, clients: int, seed: int, tokens: int) -> float:
    """Tokens per second of all clients together; each asks once."""

    def ask(n: int) -> int:
        rng = random.Random(1000 * seed + n)
        prompt = f"# {rng.random()}\n{TEXT[rng.randrange(20) :]}"
        status, body = server.complete(server.connect(), prompt=prompt, max_tokens=tokens)
        assert status == 200, body
        return int(body["usage"]["completion_tokens"])

    begun = time.monotonic()
    with ThreadPoolExecutor(clients) as pool:
        produced = sum(pool.map(ask, range(clients)))
    return produced / (time.monotonic() - begun)


def soak(asked: argparse.Namespace) -> dict[str, Any]:
    """Twice as many clients as there are places and a queue for, asking without a pause: what was said, and memory."""
    batch = queue = CLIENTS // 2
    statuses: Counter[int] = Counter()
    cut_off, most = Counter[str](), 0.0
    options = ("--max-batch", str(batch), "--max-queue", str(queue), "--prefix-cache", "64MiB")
    with Server(asked.engine, *options) as server:
        _rate(server, batch, 0, asked.tokens)
        _soak(server, batch, min(120.0, 30 * asked.minutes), asked.tokens, Counter(), Counter())  # what grows once
        before, end = server.rss_mib(), threading.Event()

        def watch() -> None:
            nonlocal most
            while not end.wait(1.0):
                most = max(most, server.metric("num_requests_waiting") + server.metric("num_requests_running"))

        watcher = threading.Thread(target=watch)
        watcher.start()
        _soak(server, SOAKING * (batch + queue), 60 * asked.minutes, asked.tokens, statuses, cut_off)
        end.set()
        watcher.join()
        after = server.rss_mib()
    return {
        "minutes": asked.minutes,
        "clients": SOAKING * (batch + queue),
        "max_batch": batch,
        "max_queue": queue,
        "statuses": {str(status): count for status, count in sorted(statuses.items())},
        "answers_cut_off": cut_off["length"],
        "most_at_once": most,
        "rss_mib": {"before": before, "after": after, "ratio": round(after / before, 4)},
    }


def _soak(
    server: Server, clients: int, seconds: float, tokens: int, statuses: Counter[int], cut_off: Counter[str]
) -> None:
    """Let clients ask until the time is over; answers with fewer tokens than were asked for are ``cut_off``."""
    end = time.monotonic() + seconds

    def client(n: int) -> None:
        rng, connection = random.Random(n), server.connect()
        while time.monotonic() < end:
            wanted = rng.randrange(1, tokens + 1)
            prompt = (f"# {rng.random()}\n" if rng.random() < 0.5 else "") + TEXT * rng.randrange(1, 5)
            status, body = server.complete(connection, prompt=prompt, max_tokens=wanted)
            statuses[status] += 1
            if status == 200 and body["choices"][0]["finish_reason"] == "length":
                cut_off["length"] += body["usage"]["completion_tokens"] != wanted
            if status == 429:
                time.sleep(0.2)  # patient clients wait as long as they are told; these do not

    with ThreadPoolExecutor(clients) as pool:
        list(pool.map(client, range(clients)))


def first_token(asked: argparse.Namespace) -> dict[str, Any]:
    """Seconds from nothing to the first token, in fresh processes: of a session, and of a server."""
    code = (
        "import sys, time; begun = time.perf_counter()\n"
        "from flabc.runtime.sampling import SamplingParams; from flabc.runtime.session import Session\n"
        "imported = time.perf_counter(); session = Session.open(sys.argv[1]); opened = time.perf_counter()\n"
        "next(session.stream(sys.argv[2], SamplingParams())); done = time.perf_counter()\n"
        "print(imported - begun, opened - imported, done - opened)"
    )
    command = [sys.executable, "-c", code, str(asked.engine), TEXT]
    parts = []
    served = []
    for _ in range(asked.rounds):
        said = subprocess.run(command, check=True, capture_output=True, text=True).stdout.split()
        parts.append([round(float(value), 3) for value in said])
        begun = time.monotonic()
        with Server(asked.engine) as server:
            server.complete(server.connect(), prompt=TEXT, max_tokens=1)
            served.append(round(time.monotonic() - begun, 3))
    return {
        "session_s": [dict(zip(("import", "open", "first_token"), part, strict=True)) for part in parts],
        "open_to_first_token_s": [round(part[1] + part[2], 3) for part in parts],
        "server_s": served,
    }


def overhead(asked: argparse.Namespace) -> dict[str, Any]:
    """Python's share of a decode step: all of it but the runtime's own call, for a session and for batches."""
    from flabc.runtime.backend import Limits
    from flabc.runtime.batch import Batch, Job
    from flabc.runtime.sampling import SamplingParams
    from flabc.runtime.session import Session

    session = Session.open(asked.engine, limits=Limits(max_batch=CLIENTS))
    inner: Any = session.backend
    inside = _timed(inner)
    found: dict[str, Any] = {}
    drawn = {"greedy": {}, "sampled": {"temperature": 0.8, "top_p": 0.95, "seed": 0}}
    for name, how in drawn.items():
        params = SamplingParams(max_tokens=asked.tokens, ignore_eos=True, **how)
        stream = session.stream(TEXT, params)
        next(stream)
        found[f"session {name}"] = _share(lambda stream=stream: next(stream), asked.tokens - 1, inside)  # type: ignore[misc]
        for rows in (1, CLIENTS):
            batch = Batch(session.backend, 256)
            batch.waiting.extend(Job(session, session.encode(TEXT), params) for _ in range(rows))
            while len(batch.running) < rows:
                batch.step()
            found[f"batch of {rows} {name}"] = _share(batch.step, asked.tokens // 2, inside)
    return {"steps": found}


def mixed(asked: argparse.Namespace) -> dict[str, Any]:
    """Whether requests of all kinds, sixteen at a time, are answered as each is alone by a session, to the character.

    Streamed or not, chats or texts, one prompt or three, with stop strings or without, through OpenAI's client.
    """
    from flabc.runtime.backend import Limits
    from flabc.runtime.sampling import SamplingParams
    from flabc.runtime.session import Session

    rng, cases = random.Random(3), list[_Case]()
    text = 5 * (TEXT + "fibonacci(n - 1) + fibonacci(n - 2)\n\n\nclass Point:\n    pass\n")
    for n in range(MIXED):
        begin = [rng.randrange(40) for _ in range(3 if n % 4 == 3 else 1)]
        prompts = [text[at : at + rng.randrange(1, 200)] for at in begin]
        cases.append(_Case(n, prompts, rng.choice([(), ("e",), ("ab", "\n")]), rng.randint(1, asked.tokens)))
    room = ("--max-length", "512", "--max-batch", "8", "--max-queue", str(2 * MIXED), "--prefill-tokens", "32")
    with Server(asked.engine, *room) as server:
        client = require("openai", "eval").OpenAI(base_url=f"{server.url}/v1", api_key="none")
        with client, ThreadPoolExecutor(CLIENTS) as pool:
            found = list(pool.map(lambda case: case.said_to(client, server.model), cases))
    session, differ = Session.open(asked.engine, limits=Limits(max_length=512)), list[dict[str, Any]]()
    for case, said in zip(cases, found, strict=True):
        params = SamplingParams(max_tokens=case.tokens, stop=case.stop)
        alone = [session.generate(each, params).text for each in case.asked]
        differ += [{"prompts": case.prompts, "served": said, "alone": alone}] if said != alone else []
    return {"requests": len(cases), "answered_as_alone": len(cases) - len(differ), "different": differ}


@dataclass(frozen=True)
class _Case:
    """One of the mixed requests; its number says of which kind."""

    number: int
    prompts: list[str]
    stop: tuple[str, ...]
    tokens: int

    @property
    def asked(self) -> Sequence[Any]:
        """Its prompts, as a session takes them."""
        return [[{"role": "user", "content": self.prompts[0]}]] if self.number % 4 == 1 else self.prompts

    def said_to(self, client: Any, model: str) -> list[str]:
        """The server's answers."""
        drawn = {"model": model, "max_tokens": self.tokens, "temperature": 0, "stop": list(self.stop) or None}
        if self.number % 4 == 0:
            pieces = client.completions.create(prompt=self.prompts[0], stream=True, **drawn)
            return ["".join(piece.choices[0].text for piece in pieces)]
        if self.number % 4 == 1:
            return [client.chat.completions.create(messages=self.asked[0], **drawn).choices[0].message.content or ""]
        return [choice.text for choice in client.completions.create(prompt=self.prompts, **drawn).choices]


def _timed(backend: Any) -> list[float]:
    """Time the runtime's own call from now on; a list of one number, the seconds spent in it."""
    spent = [0.0]
    session = backend._session

    class Timed:
        def __getattr__(self, name: str) -> Any:
            return getattr(session, name)

        def run_with_iobinding(self, binding: Any) -> None:
            begun = time.perf_counter()
            session.run_with_iobinding(binding)
            spent[0] += time.perf_counter() - begun

    backend._session = Timed()
    return spent


def _share(step: Callable[[], object], count: int, inside: Sequence[float]) -> dict[str, float]:
    before, begun = inside[0], time.perf_counter()
    for _ in range(count):
        step()
    whole, runtime = time.perf_counter() - begun, inside[0] - before
    return {"step_ms": round(1000 * whole / count, 3), "python_share": round(1 - runtime / whole, 4)}


MEASURES: dict[str, Callable[[argparse.Namespace], dict[str, Any]]] = {
    "first-token": first_token,
    "mixed": mixed,
    "overhead": overhead,
    "soak": soak,
    "throughput": throughput,
}


if __name__ == "__main__":
    main()
