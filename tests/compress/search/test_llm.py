"""The operator that asks a language model: against a small local server, transcripts, and answers of all kinds."""

from __future__ import annotations

import json
import threading
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import pytest

from flabc.compress.allocate import Pool
from flabc.compress.search.client import endpoint, transcript
from flabc.compress.search.fitness import Fitness, Rung
from flabc.compress.search.genome import Genome, Site, Space
from flabc.compress.search.journal import Journal, Reply
from flabc.compress.search.llm import RETRIES, Client, Dialogue, Message
from flabc.compress.search.loop import Best, search
from flabc.compress.search.operators import Task
from flabc.compress.search.registry import OPERATORS
from flabc.errors import LanguageModelError, UsageError

SITES = tuple(Site(("ffn", layer), tuple(range(1, 11)), tuple(range(1, 11))) for layer in range(4))
SPACE = Space(Genome((10,) * 4, (1,) * 4), SITES, 28)
POOLS = tuple(Pool(layer, 10, 1) for layer in range(4))


def cost(genome: Genome) -> float:
    """Least where the later layers lose most."""
    return sum((10 - units) ** 2 / (1 + layer) for layer, units in enumerate(genome.ffn))


def answer(*rates: Sequence[float], how: str = "initial") -> str:
    return json.dumps({"candidates": [{"how": how, "ffn": list(each)} for each in rates]})


#: Good answers, one in a fence with words around it, and four that cannot be used.
FIRST = answer((0.3, 0.3, 0.3, 0.3), (0.0, 0.2, 0.4, 0.6))
SECOND = f"Here you are:\n```json\n{answer((0.1, 0.2, 0.4, 0.5), how='crossover')}\n```"
THIRD = answer((0.1, 0.3, 0.4, 0.4), how="mutation")
WRONG = ("I would rather not.", answer((0.3, 0.3)), answer((0.3, 0.3, 0.3, 1.3)), '{"candidates": []}')


class Scripted:
    """Says what it is given, and keeps what it was asked."""

    def __init__(self, *texts: str) -> None:
        self.texts, self.asked = list(texts), list[list[Message]]()

    def __call__(self, messages: Sequence[Message]) -> Reply:
        self.asked.append(list(messages))
        if not self.texts:
            raise LanguageModelError("Nothing more to say.")
        return Reply(self.texts.pop(0), 100, 10)


def run(
    client: Client, *, file: Path = Path(":memory:"), evaluations: int = 4, fallback: bool = False
) -> tuple[Best, Dialogue, list[tuple[Genome, str, str]]]:
    with Journal(file) as journal:
        dialogue = Dialogue(client, journal, fallback)
        task = Task(SPACE, POOLS, 3, evaluations, 2, dialogue=dialogue)
        fitness = Fitness([Rung(1, lambda some: {genome: cost(genome) for genome in some})], journal)
        return search(OPERATORS["llm"], task, fitness), dialogue, journal.candidates()


def test_the_model_proposes_and_is_told_what_came_of_it() -> None:
    client = Scripted(FIRST, SECOND, THIRD)
    best, dialogue, candidates = run(client)
    assert [genome.ffn for genome, _, _ in candidates] == [(7, 7, 7, 7), (10, 8, 6, 4), (9, 8, 6, 5), (9, 7, 6, 6)]
    assert [origin for _, origin, _ in candidates] == ["initial", "initial", "crossover", "mutation"]
    assert best.genome == min((genome for genome, _, _ in candidates), key=cost)
    assert (dialogue.asked, dialogue.valid, dialogue.prompt_tokens, dialogue.completion_tokens) == (3, 3, 300, 30)
    first, second, _ = (asked[0]["content"] for asked in client.asked)
    assert "0.300 of the parameters" in first
    assert "[4 numbers]" in first
    told = [line for line in second.splitlines() if line.startswith("KL")]
    scored = sorted(
        (cost(genome), [round(1 - units / 10, 3) for units in genome.ffn]) for genome, _, _ in candidates[:2]
    )
    assert told == [f'KL {kl:.4g}: {{"ffn": {rates}}}' for kl, rates in scored]


def test_rates_off_the_budget_are_repaired_and_that_is_noted() -> None:
    _, _, candidates = run(Scripted(answer((0.0, 0.0, 0.0, 0.0))), evaluations=1)
    genome, _, repair = candidates[0]
    assert sum(genome.ffn) == 28
    assert repair == " ".join(f"ffn.{layer}{units - 10:+d}" for layer, units in enumerate(genome.ffn))


def test_answers_that_cannot_be_used_are_asked_for_again_and_counted() -> None:
    client = Scripted(WRONG[0], WRONG[1], WRONG[2], FIRST, FIRST, SECOND, WRONG[3], THIRD)
    _, dialogue, candidates = run(client)
    assert len(candidates) == 4
    assert (dialogue.asked, dialogue.valid) == (8, 3)
    said = [asked[-1]["content"].splitlines()[0] for asked in client.asked]
    assert "no JSON object" in said[1]
    assert "'ffn' must have 4 numbers from 0 to 1" in said[2]
    assert "tried before" in said[5]
    assert "candidates: List should have at least 1 item" in said[7]
    assert [message["role"] for message in client.asked[3]] == ["user", *["assistant", "user"] * 3]


def test_it_ends_when_the_model_fails_for_good() -> None:
    client = Scripted(FIRST, *WRONG, SECOND)
    with pytest.raises(LanguageModelError, match=f"gave {1 + RETRIES} answers in a row that cannot be used"):
        run(client)
    assert client.texts == [SECOND]


def test_evolution_goes_on_only_when_it_was_asked_for(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    file = tmp_path / "journal.sqlite"
    best, dialogue, candidates = run(Scripted(FIRST, *WRONG), file=file, evaluations=20, fallback=True)
    assert "The search goes on with evolution" in capsys.readouterr().err
    assert [origin for _, origin, _ in candidates] == ["initial", "initial", *["mutation"] * 18]
    assert (dialogue.asked, dialogue.valid) == (5, 1)
    again = Scripted(THIRD)
    assert run(again, file=file, evaluations=20, fallback=True)[0] == best
    assert not again.asked  # it has failed for good


def test_what_was_said_is_not_asked_again(tmp_path: Path) -> None:
    file = tmp_path / "journal.sqlite"
    with pytest.raises(LanguageModelError, match="Nothing more"):
        run(Scripted(FIRST, WRONG[0]), file=file)
    rest = Scripted(SECOND, THIRD)
    best, dialogue, candidates = run(rest, file=file)
    unbroken = run(Scripted(FIRST, WRONG[0], SECOND, THIRD))
    assert (best, candidates) == (unbroken[0], unbroken[2])
    assert (dialogue.asked, dialogue.valid) == (4, 3)
    assert len(rest.asked) == 2


def test_a_transcript_is_said_again(tmp_path: Path) -> None:
    file = tmp_path / "transcript.jsonl"
    file.write_text("".join(json.dumps({"text": text}) + "\n" for text in (FIRST, SECOND, THIRD)))
    assert run(transcript(file, 0))[::2] == run(Scripted(FIRST, SECOND, THIRD))[::2]
    with pytest.raises(LanguageModelError, match="no more replies than 3"):
        run(transcript(file, 0), evaluations=9)
    file.write_text('{"txt": 1}\n')
    with pytest.raises(UsageError, match="not a transcript"):
        transcript(file, 0)


@contextmanager
def serving(respond: Callable[[dict[str, Any]], tuple[int, dict[str, Any]]]) -> Iterator[str]:
    """An endpoint on this machine."""

    class Handler(BaseHTTPRequestHandler):
        def do_POST(self) -> None:
            asked = json.loads(self.rfile.read(int(self.headers["content-length"])))
            assert self.path == "/v1/chat/completions"
            assert self.headers["authorization"] == "Bearer secret"
            status, body = respond(asked)
            self.send_response(status)
            self.send_header("content-type", "application/json")
            self.end_headers()
            self.wfile.write(json.dumps(body).encode())

        def log_message(self, *_: object) -> None:
            pass

    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    thread = threading.Thread(target=server.serve_forever)
    thread.start()
    try:
        yield f"http://127.0.0.1:{server.server_port}/v1"
    finally:
        server.shutdown()
        thread.join()
        server.server_close()


def test_an_endpoint_is_asked_by_openais_client(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("OPENAI_API_KEY", "secret")
    texts, asked = [FIRST, SECOND, THIRD], list[dict[str, Any]]()

    def respond(request: dict[str, Any]) -> tuple[int, dict[str, Any]]:
        asked.append(request)
        if not texts:
            return 401, {"error": {"message": "go away"}}
        message = {"role": "assistant", "content": texts.pop(0)}
        choice = {"index": 0, "message": message, "finish_reason": "stop"}
        usage = {"prompt_tokens": 70, "completion_tokens": 7, "total_tokens": 77}
        return 200, {
            "id": "a",
            "object": "chat.completion",
            "created": 1,
            "model": "m",
            "choices": [choice],
            "usage": usage,
        }

    with serving(respond) as url:
        best, dialogue, candidates = run(endpoint(url, "m", 3))
        assert (best, candidates) == run(Scripted(FIRST, SECOND, THIRD))[::2]
        assert (dialogue.prompt_tokens, dialogue.completion_tokens) == (210, 21)
        assert {request["model"] for request in asked} == {"m"}
        with pytest.raises(LanguageModelError, match=r"does not answer.*go away"):
            endpoint(url, "m", 3)([{"role": "user", "content": "?"}])
