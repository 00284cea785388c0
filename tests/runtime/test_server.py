"""A live server, asked by OpenAI's own client and by nobody's."""

from __future__ import annotations

import http.client
import json
import re
import signal
import socket
import subprocess
import sys
import time
import urllib.error
import urllib.request
from argparse import Namespace
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
import openai
import psutil
import pytest

from flabc import api
from flabc.perf.server_fuzz import fuzz
from flabc.perf.serving import mixed
from flabc.runtime.backend import Limits
from flabc.runtime.evaluate.task import EvalOptions
from flabc.runtime.sampling import SamplingParams
from flabc.runtime.session import Session

from .test_harness import QUESTIONS, tasks  # noqa: F401

PROMPT = "def fibonacci(n):\n    return"
TALK = [{"role": "system", "content": "Be brief."}, {"role": "user", "content": "print(1)?"}]
LENGTH = 320


def soon(true: Callable[[], bool]) -> bool:
    """Whether something is true within seconds."""
    end = time.monotonic() + 10
    while not true() and time.monotonic() < end:
        time.sleep(0.02)
    return true()


class Live:
    """A server in a process of its own."""

    def __init__(self, engine: Path, log: Path, *options: str, program: tuple[str, ...] = ("-m", "flabc")) -> None:
        command = [sys.executable, *program, "serve", str(engine), "--port", "0", "--json", "--name", "tiny"]
        self.log, self.clients = log, list[openai.OpenAI]()
        with log.open("w") as errors:
            self.process = subprocess.Popen([*command, *options], stdout=subprocess.PIPE, stderr=errors, text=True)
        assert self.process.stdout is not None
        line = self.process.stdout.readline()
        assert line, log.read_text()
        self.url: str = json.loads(line)["url"]

    def client(self, key: str = "none", retries: int = 0) -> openai.OpenAI:
        self.clients.append(openai.OpenAI(base_url=f"{self.url}/v1", api_key=key, max_retries=retries, timeout=60))
        return self.clients[-1]

    def get(self, path: str) -> tuple[int, str]:
        return self.send(urllib.request.Request(self.url + path))

    def post(self, path: str, body: bytes | dict[str, Any], **headers: str) -> tuple[int, str]:
        raw = body if isinstance(body, bytes) else json.dumps(body).encode()
        return self.send(urllib.request.Request(self.url + path, raw, {"Content-Type": "application/json", **headers}))

    def send(self, request: urllib.request.Request) -> tuple[int, str]:
        try:
            with urllib.request.urlopen(request, timeout=60) as reply:
                return reply.status, reply.read().decode()
        except urllib.error.HTTPError as error:
            with error:
                return error.code, error.read().decode()

    def metric(self, name: str) -> float:
        found = re.findall(rf"^flabc:{name}(?:{{.*}})? (\S+)$", self.get("/metrics")[1], re.M)
        return sum(map(float, found))

    def settled(self) -> bool:
        """Whether soon no request runs."""
        return soon(lambda: self.metric("num_requests_running") == 0)

    def close(self) -> None:
        for client in self.clients:
            client.close()
        if self.process.poll() is None:
            self.process.terminate()
        self.process.wait(30)
        assert self.process.stdout is not None
        self.process.stdout.close()


@pytest.fixture(scope="module")
def live(tiny_engine: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Live]:
    log = tmp_path_factory.mktemp("server") / "log"
    server = Live(tiny_engine, log, "--max-length", str(LENGTH), "--max-batch", "4", "--max-body", "20KB")
    yield server
    server.close()
    assert server.process.returncode == 0
    assert "Traceback" not in log.read_text()


@pytest.fixture(scope="module")
def narrow(tiny_engine: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Live]:
    """A server of few places and many conditions."""
    keys = tmp_path_factory.mktemp("narrow") / "keys"
    keys.write_text("\ufefffirst-key\n# of the tests\n\nsecond-key\n", encoding="utf-8")
    limits = ("--max-batch", "1", "--max-queue", "1", "--timeout", "20")
    server = Live(tiny_engine, keys.with_name("log"), "--api-key-file", str(keys), *limits)
    yield server
    server.close()


@pytest.fixture(scope="module")
def hasty(tiny_engine: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Live]:
    """A server that waits for nobody."""
    server = Live(tiny_engine, tmp_path_factory.mktemp("hasty") / "log", "--max-batch", "1", "--timeout", "0.5")
    yield server
    server.close()


@pytest.fixture(scope="module")
def session(tiny_engine: Path) -> Session:
    return Session.open(tiny_engine, limits=Limits(max_length=LENGTH))


def test_completions_are_those_of_a_session(live: Live, session: Session) -> None:
    ask = live.client().completions.create
    ids = session.codec.encode(PROMPT)
    expected = session.generate(PROMPT, SamplingParams(max_tokens=20))
    for prompt in (PROMPT, ids, [PROMPT], [ids]):
        given = ask(model="tiny", prompt=prompt, max_tokens=20, temperature=0)
        assert given.choices[0].text == expected.text
        assert given.choices[0].finish_reason == expected.finish_reason
        assert (given.usage.prompt_tokens, given.usage.completion_tokens) == (len(ids), len(expected.token_ids))
    several = ask(model="tiny", prompt=[PROMPT, "import", "x"], max_tokens=9, temperature=0, stop=["a", "\n\n"])
    for choice, prompt in zip(several.choices, [PROMPT, "import", "x"], strict=True):
        alone = session.generate(prompt, SamplingParams(max_tokens=9, stop=("a", "\n\n")))
        assert (choice.text, choice.finish_reason) == (alone.text, alone.finish_reason)


def test_a_chat_goes_through_the_models_template(live: Live, session: Session) -> None:
    ask = live.client().chat.completions.create
    expected = session.generate(TALK, SamplingParams(max_tokens=12))
    parts = [
        TALK[0],
        {"role": "user", "content": [{"type": "text", "text": "print"}, {"type": "text", "text": "(1)?"}]},
    ]
    for messages in (TALK, parts):
        given = ask(model="tiny", messages=messages, max_completion_tokens=12, temperature=0)
        assert given.choices[0].message.content == expected.text
        assert given.usage.prompt_tokens == expected.prompt_tokens
    whole = ask(model="tiny", messages=TALK, temperature=0)
    assert whole.choices[0].message.content == session.generate(TALK, SamplingParams(max_tokens=LENGTH)).text


def test_streams_joined_are_the_whole(live: Live) -> None:
    ask = live.client().completions.create
    drawn: dict[str, Any] = {"model": "tiny", "prompt": PROMPT, "max_tokens": 30, "temperature": 0.9, "seed": 5, "n": 2}
    drawn |= {"logprobs": 2, "echo": True}
    whole = ask(**drawn)
    pieces = list(ask(stream=True, stream_options={"include_usage": True}, **drawn))
    for n, choice in enumerate(whole.choices):
        mine = [each for piece in pieces for each in piece.choices if each.index == n]
        assert "".join(each.text for each in mine) == choice.text
        assert mine[-1].finish_reason == choice.finish_reason
        for name in ("tokens", "text_offset", "token_logprobs"):
            given = [value for each in mine for value in getattr(each.logprobs, name)]
            assert given == pytest.approx(getattr(choice.logprobs, name), abs=1e-4)
    assert whole.choices[0].text != whole.choices[1].text
    assert pieces[-1].choices == []
    assert pieces[-1].usage.completion_tokens == whole.usage.completion_tokens
    assert all(piece.usage is None for piece in pieces[:-1])


def test_a_chats_stream_is_the_whole(live: Live) -> None:
    client = live.client()
    drawn: dict[str, Any] = {"model": "tiny", "messages": TALK, "max_tokens": 20, "temperature": 0}
    whole = client.chat.completions.create(logprobs=True, top_logprobs=3, **drawn).choices[0]
    pieces = list(client.chat.completions.create(logprobs=True, top_logprobs=3, stream=True, **drawn))
    assert pieces[0].choices[0].delta.role == "assistant"
    assert "".join(piece.choices[0].delta.content or "" for piece in pieces) == whole.message.content
    given = [entry for piece in pieces if piece.choices[0].logprobs for entry in piece.choices[0].logprobs.content]
    assert given == whole.logprobs.content
    assert len(given) == 20
    for entry in given:  # greedy: the first of the most likely
        assert (entry.token, entry.logprob) == (entry.top_logprobs[0].token, entry.top_logprobs[0].logprob)
        assert entry.bytes == (None if "\ufffd" in entry.token else list(entry.token.encode()))
    assert pieces[-1].choices[0].finish_reason == whole.finish_reason


def test_echo_tells_the_prompts_log_probabilities(live: Live, session: Session) -> None:
    ids = session.codec.encode(PROMPT)
    logits = session.backend.score(np.array([ids]))[0].astype(np.float64)
    logprobs = logits - np.log(np.exp(logits).sum(-1, keepdims=True))
    for wanted in (0, 2):
        given = live.client().completions.create(
            model="tiny", prompt=ids, max_tokens=wanted, temperature=0, echo=True, logprobs=1
        )
        told = given.choices[0].logprobs
        assert told is not None
        assert len(told.tokens or []) == len(ids) + wanted
        assert given.choices[0].text.startswith(PROMPT)
        np.testing.assert_allclose(
            told.token_logprobs[1 : len(ids)], logprobs[np.arange(len(ids) - 1), ids[1:]], atol=1e-3
        )
        best = [max(top.values()) for top in told.top_logprobs[1 : len(ids)]]
        np.testing.assert_allclose(best, logprobs[:-1].max(-1), atol=1e-3)


def test_a_seed_makes_an_answer_repeatable_in_any_company(live: Live, session: Session) -> None:
    def ask(seed: int) -> str:
        given = live.client().completions.create(
            model="tiny",
            prompt=PROMPT,
            max_tokens=40,
            temperature=1.2,
            seed=seed,
            extra_body={"top_k": 40, "min_p": 0.01},
        )
        return given.choices[0].text

    params = {"max_tokens": 40, "temperature": 1.2, "top_k": 40, "min_p": 0.01}
    expected = [session.generate(PROMPT, SamplingParams(seed=seed, **params)).text for seed in range(12)]
    with ThreadPoolExecutor(12) as pool:
        assert list(pool.map(ask, range(12))) == expected
    assert len(set(expected)) > 1


@pytest.mark.parametrize("folder", ["tiny_engine", "tiny_dense_engine"])
def test_200_mixed_requests_are_answered_as_alone(folder: str, request: pytest.FixtureRequest) -> None:
    found = mixed(Namespace(engine=request.getfixturevalue(folder), tokens=24))
    assert found == {"requests": 200, "answered_as_alone": 200, "different": []}


@pytest.mark.parametrize(
    ("change", "status", "told"),
    [
        ({"model": "other"}, 404, "'other' is not served here. Expected: tiny"),
        ({"prompt": "a " * 400}, 400, rf"has \d+ tokens. Expected: fewer than {LENGTH}"),
        ({"prompt": ""}, 400, "prompt is empty"),
        ({"prompt": []}, 400, "prompt"),
        ({"prompt": [1, 10**6]}, 400, "token 1000000. Expected: ids from 0 to"),
        ({"prompt": None}, 400, "prompt"),
        ({"max_tokens": -1}, 400, "max_tokens: .*greater than or equal to 0"),
        ({"max_tokens": 0}, 400, "max_tokens is 0"),
        ({"max_tokens": 0, "echo": True, "logprobs": 1, "prompt": [10**6, 1]}, 400, "token 1000000"),
        ({"max_tokens": 0, "echo": True, "logprobs": 1, "prompt": ""}, 400, "prompt is empty"),
        ({"max_tokens": 0, "echo": True, "logprobs": 1, "prompt": "a " * 400}, 400, f"fewer than {LENGTH}"),
        ({"temperature": 3}, 400, "temperature"),
        ({"n": 99}, 400, "99 answers.*at most 68"),
        ({"n": 1, "echo": True, "logprobs": 1, "prompt": ["a"] * 35}, 400, "70 answers and scores.*at most 68"),
        ({"response_format": {"type": "json_object"}}, 400, "'response_format' is not supported"),
        ({"logit_bias": {"5": 1}}, 400, "'logit_bias' is not supported"),
        ({"best_of": 4}, 400, "'best_of' is not supported"),
    ],
)
def test_what_cannot_be_answered_is_refused_as_openai_does(
    live: Live, change: dict[str, Any], status: int, told: str
) -> None:
    code, body = live.post("/v1/completions", {"model": "tiny", "prompt": "a", "max_tokens": 2} | change)
    error = json.loads(body)["error"]
    assert code == status
    assert re.search(told, error["message"])
    assert error["type"] == "invalid_request_error"
    assert set(error) == {"message", "type", "param", "code"}


def test_what_asks_for_nothing_is_ignored(live: Live) -> None:
    nothing = {
        "user": "me",
        "unheard_of": [1],
        "response_format": {"type": "text"},
        "best_of": 1,
        "frequency_penalty": 0.0,
    }
    assert live.post("/v1/completions", {"model": "tiny", "prompt": "a", "suffix": None, **nothing})[0] == 200


def test_chats_that_cannot_be_answered_are_refused(live: Live) -> None:
    picture = [{"role": "user", "content": [{"type": "image_url", "image_url": {"url": "file:///etc/passwd"}}]}]
    for messages in ([], picture, [{"role": "nobody", "content": "x"}]):
        code, body = live.post("/v1/chat/completions", {"model": "tiny", "messages": messages})
        assert (code, "messages" in json.loads(body)["error"]["param"]) == (400, True)
    injected = {"model": "tiny", "messages": TALK, "chat_template": "{{ 7*7 }}", "max_tokens": 3, "temperature": 0}
    plain = {key: value for key, value in injected.items() if key != "chat_template"}
    said = [json.loads(live.post("/v1/chat/completions", body)[1])["choices"] for body in (injected, plain)]
    assert said[0] == said[1]


def test_odd_bodies_and_paths_get_error_objects(live: Live) -> None:
    for body in (b"", b"{", b"[]", b'{"model": "tiny", "prompt": "\\ud800"}', b"\xff\xfe", b"[" * 9000):
        code, told = live.post("/v1/completions", body)
        assert (code, json.loads(told)["error"]["type"]) == (400, "invalid_request_error"), body[:20]
    for path, status in (("/v1/nothing", 404), ("/v1/models/../../etc/passwd", 404), ("/v1/completions", 405)):
        code, told = live.get(path)
        assert (code, "message" in json.loads(told)["error"]) == (status, True)
    assert json.loads(live.get("/v1/models/tiny")[1])["max_model_len"] == LENGTH


@pytest.mark.parametrize("number", ["NaN", "Infinity", "-Infinity", "1e999", "9" * 5000, "-" + "9" * 4000, "true"])
def test_no_number_makes_the_server_fail(live: Live, number: str) -> None:
    for name in ("temperature", "top_p", "min_p", "repetition_penalty", "top_k", "seed", "n", "logprobs", "unknown"):
        body = f'{{"model": "tiny", "prompt": "a", "max_tokens": 1, "{name}": {number}}}'
        code, told = live.post("/v1/completions", body.encode())
        assert code in (200, 400), (name, told)
    for body in (f'"prompt": [{number}]', f'"prompt": "a", "max_tokens": {number}', f'"prompt": [[1, {number}]]'):
        code, told = live.post("/v1/completions", f'{{"model": "tiny", "stop": ["a"], {body}}}'.encode())
        assert code in (200, 400), told


def test_tokens_known_before_are_no_more_than_the_prompts(live: Live) -> None:
    ask = live.client().completions.create
    prompt = [7, *range(30, 60)]
    for known in (0, len(prompt) - 2):
        given = ask(model="tiny", prompt=prompt, n=3, max_tokens=2, temperature=0)
        assert given.usage.prompt_tokens == len(prompt)
        assert given.usage.prompt_tokens_details.cached_tokens == known


def test_a_request_that_takes_too_long_is_told_so(hasty: Live) -> None:
    body = {"model": "tiny", "prompt": "x", "n": 40, "max_tokens": 2000, "temperature": 0}
    code, told = hasty.post("/v1/completions", body)
    assert (code, json.loads(told)["error"]["type"]) == (504, "timeout_error")
    assert "longer than 0.5 s" in json.loads(told)["error"]["message"]
    code, told = hasty.post("/v1/completions", body | {"stream": True})
    events = [line.removeprefix("data: ") for line in told.splitlines() if line]
    assert (code, json.loads(events[-1])["error"]["code"]) == (200, "timeout")
    assert json.loads(events[0])["choices"][0]["text"]
    with pytest.raises(openai.APIError, match=r"longer than 0\.5 s"):
        list(hasty.client().completions.create(stream=True, **body))
    assert hasty.settled()


def test_a_body_that_does_not_come_is_not_waited_for(hasty: Live) -> None:
    connection = http.client.HTTPConnection(hasty.url.removeprefix("http://"), timeout=30)
    connection.putrequest("POST", "/v1/completions")
    connection.putheader("Content-Type", "application/json")
    connection.putheader("Content-Length", "100")
    connection.endheaders(b'{"model"')
    reply = connection.getresponse()
    assert (reply.status, "after 0.5 s" in reply.read().decode()) == (408, True)
    connection.close()


@pytest.mark.skipif(not hasattr(socket, "TCP_USER_TIMEOUT"), reason="this system has no bound for unread data")
def test_a_client_that_does_not_read_is_dropped(hasty: Live) -> None:
    def open_here() -> int:
        found = psutil.Process(hasty.process.pid).net_connections("tcp")
        return sum(each.status == psutil.CONN_ESTABLISHED and each.raddr == address for each in found)

    host, port = hasty.url.removeprefix("http://").split(":")
    with socket.socket() as deaf:
        deaf.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4096)
        deaf.connect((host, int(port)))
        address = deaf.getsockname()
        assert soon(lambda: open_here() == 1)
        deaf.sendall(b"GET /openapi.json HTTP/1.1\r\nHost: x\r\n\r\n" * 2000)
        assert soon(lambda: open_here() == 0)


def test_bodies_have_a_largest_size(live: Live) -> None:
    large = {"model": "tiny", "prompt": "a" * 30_000}
    assert live.post("/v1/completions", large)[0] == 413
    host, port = live.url.removeprefix("http://").split(":")
    connection = http.client.HTTPConnection(host, int(port), timeout=30)
    pieces = iter([json.dumps(large).encode()[:15_000], b"a" * 15_000])
    connection.request("POST", "/v1/completions", pieces, {"Content-Type": "application/json"}, encode_chunked=True)
    reply = connection.getresponse()  # it said no length
    assert (reply.status, "20000 bytes" in reply.read().decode()) == (413, True)
    connection.close()


def test_metrics_count_what_was_done_and_logs_tell_no_prompts(live: Live, session: Session) -> None:
    before = {
        name: live.metric(name) for name in ("generation_tokens_total", "prompt_tokens_total", "request_success_total")
    }
    talk = [{"role": "user", "content": "a secret that nobody may read"}] * 3
    for _ in range(2):
        live.client().chat.completions.create(model="tiny", messages=talk, max_tokens=7, temperature=0, stop="never")
    assert live.settled()
    prompt = len(session.encode(talk))
    assert live.metric("generation_tokens_total") == before["generation_tokens_total"] + 14
    assert live.metric("prompt_tokens_total") == before["prompt_tokens_total"] + 2 * prompt
    assert live.metric("request_success_total") == before["request_success_total"] + 2
    assert live.metric("prefix_cache_hits_total") >= prompt - 2
    for name in ("time_to_first_token_seconds", "request_time_per_output_token_seconds", "request_queue_time_seconds"):
        assert live.metric(f"{name}_count") > 0
    lines = [json.loads(line) for line in live.log.read_text().splitlines()]
    assert any(line.get("path") == "/v1/chat/completions" and line.get("completion_tokens") == 7 for line in lines)
    assert "secret" not in live.log.read_text()
    assert [live.get(path)[0] for path in ("/health", "/ready")] == [200, 200]


def test_a_client_that_goes_frees_its_place(live: Live) -> None:
    for stream in (True, False):
        body = {"model": "tiny", "prompt": "x", "n": 4, "max_tokens": 300, "stream": stream, "temperature": 0}
        host, port = live.url.removeprefix("http://").split(":")
        connection = http.client.HTTPConnection(host, int(port), timeout=30)
        failed = live.metric("request_failure_total")
        connection.request("POST", "/v1/completions", json.dumps(body), {"Content-Type": "application/json"})
        if stream:
            connection.getresponse().read(10)
        connection.close()
        # Cancelled, and not answered for nobody.
        assert soon(lambda failed=failed: live.metric("request_failure_total") > failed)  # type: ignore[misc]
        assert live.settled()


def test_keys_are_asked_for(narrow: Live) -> None:
    for key in ("first-key", "second-key"):
        assert narrow.client(key).models.list().data[0].id == "tiny"
    for key in ("third-key", "# of the tests", "first-ke"):
        with pytest.raises(openai.AuthenticationError, match="missing or wrong"):
            narrow.client(key).models.list()
    assert narrow.get("/v1/models")[0] == 401
    twice = http.client.HTTPConnection(narrow.url.removeprefix("http://"), timeout=30)
    twice.putrequest("GET", "/v1/models")
    for key in ("third-key", "first-key"):  # whoever looked at the first before must not be outwitted
        twice.putheader("Authorization", f"Bearer {key}")
    twice.endheaders()
    assert twice.getresponse().status == 401
    twice.close()
    assert narrow.get("/ready")[0] == narrow.get("/metrics")[0] == 200


def test_a_full_queue_is_told_and_waiting_helps(narrow: Live) -> None:
    def ask(retries: int) -> str:
        given = narrow.client("first-key", retries).completions.create(
            model="tiny", prompt="x", max_tokens=400, temperature=0, extra_body={"seed": 1}
        )
        return given.choices[0].text

    with ThreadPoolExecutor(8) as pool:
        asked = [pool.submit(ask, 0) for _ in range(8)]
        failures = [job.exception() for job in asked]
    refused = [failure for failure in failures if failure is not None]
    assert refused
    assert failures.count(None) >= 2
    for failure in refused:
        assert isinstance(failure, openai.RateLimitError)
        assert 1 <= int(failure.response.headers["retry-after"]) <= 60
    with ThreadPoolExecutor(4) as pool:
        assert len(set(pool.map(ask, [9] * 4))) == 1


def test_sigterm_lets_accepted_requests_end_and_accepts_no_more(tiny_engine: Path, tmp_path: Path) -> None:
    server = Live(tiny_engine, tmp_path / "log", "--max-batch", "1")
    client = server.client()
    stream = client.completions.create(model="tiny", prompt="x", n=3, max_tokens=480, temperature=0, stream=True)
    first = next(iter(stream))
    server.process.send_signal(signal.SIGTERM)
    time.sleep(0.15)
    with pytest.raises(openai.InternalServerError, match="shutting down"):
        client.completions.create(model="tiny", prompt="x", max_tokens=1)
    assert server.get("/ready")[0] == 503
    ends = [choice.finish_reason for piece in [first, *stream] for choice in piece.choices if choice.finish_reason]
    assert ends == ["length"] * 3
    assert server.process.wait(20) == 0
    server.close()


def test_a_second_signal_ends_at_once(tiny_engine: Path, tmp_path: Path) -> None:
    server = Live(tiny_engine, tmp_path / "log", "--max-batch", "1")
    stream = server.client().completions.create(model="tiny", prompt="x", n=30, max_tokens=480, stream=True)
    next(iter(stream))
    for _ in range(2):
        server.process.send_signal(signal.SIGTERM)
        time.sleep(0.2)
    assert server.process.wait(2) == 128 + signal.SIGTERM
    stream.close()
    server.close()


def test_killed_it_serves_again_after_a_start(tiny_engine: Path, tmp_path: Path) -> None:
    times, texts = [], []
    for n in range(2):
        begun = time.monotonic()
        server = Live(tiny_engine, tmp_path / f"log{n}")
        given = server.client().completions.create(model="tiny", prompt=PROMPT, max_tokens=5, temperature=0)
        times.append(time.monotonic() - begun)
        texts.append(given.choices[0].text)
        server.process.kill()
        server.close()
    assert texts[0] == texts[1]
    assert times[1] < 1.5 * times[0] + 2


@pytest.mark.filterwarnings("default")  # what others warn of is theirs
def test_lm_evals_own_client_gets_what_a_session_gives(
    live: Live,
    session: Session,
    tiny_engine: Path,
    tasks: Path,  # noqa: F811
) -> None:
    def likelihood(question: str, choice: str) -> float:
        ids, begin = session.codec.encode(question + choice), len(session.codec.encode(question))
        logits = session.backend.score(np.array([ids[:-1]]))[0].astype(np.float64)
        logprobs = logits - np.log(np.exp(logits).sum(-1, keepdims=True))
        return float(logprobs[np.arange(begin - 1, len(ids) - 1), ids[begin:]].sum())

    options = EvalOptions(task="lm-eval:flabc_choice", data=tasks, tokenizer=tiny_engine, batch=2)
    found = {row.metric.split()[-1]: row.target.value for row in api.evaluate(live.url, options).rows}
    right = []
    for asked in QUESTIONS:
        choices: Any = asked["choices"]
        sums = [likelihood(str(asked["question"]), choice) for choice in choices]
        means = [total / len(choice) for total, choice in zip(sums, choices, strict=True)]
        right.append([int(np.argmax(each)) == asked["gold"] for each in (sums, means)])
    assert (found["acc"], found["acc_norm"]) == tuple(np.mean(right, axis=0))


@pytest.mark.filterwarnings("default")  # what others warn of is theirs
def test_generated_requests_get_what_the_document_promises(live: Live) -> None:
    statuses = fuzz(live.url, "tiny", 200)
    assert {200, 400, 404} <= set(statuses)
    assert live.settled()
    assert live.get("/ready")[0] == 200


def test_a_port_that_is_taken_is_told(live: Live, tiny_engine: Path) -> None:
    command = [sys.executable, "-m", "flabc", "serve", str(tiny_engine), "--port", live.url.rsplit(":", 1)[1]]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 1
    assert "Cannot listen" in done.stderr
    assert "--port" in done.stderr
