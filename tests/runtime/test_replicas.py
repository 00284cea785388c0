"""Two replicas on a real Ray, asked by OpenAI's client while one of them is killed."""

from __future__ import annotations

import shutil
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path

import openai
import psutil
import pytest

from flabc.runtime.backend import Limits
from flabc.runtime.sampling import SamplingParams
from flabc.runtime.session import Session

from .test_server import LENGTH, PROMPT, Live

TOKENS = 40


@pytest.fixture(scope="module")
def served(tiny_engine: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Live]:
    log = tmp_path_factory.mktemp("replicas") / "log"
    server = Live(tiny_engine, log, "--ray", "--replicas", "2", "--max-length", str(LENGTH), "--threads", "1")
    yield server
    server.close()


def replicas(server: Live) -> list[psutil.Process]:
    """The processes that answer."""
    found = []
    for each in psutil.Process(server.process.pid).children(recursive=True):
        with suppress(psutil.NoSuchProcess, psutil.ZombieProcess):
            found += [each] if "ServeReplica" in "".join(each.cmdline()) else []
    return found


def whole(server: Live, without: set[int]) -> bool:
    """Whether within a minute two replicas are there, none of them one that was killed."""
    end = time.monotonic() + 60
    while time.monotonic() < end:
        there = {each.pid for each in replicas(server)}
        if len(there) == 2 and not there & without:
            return True
        time.sleep(0.2)
    return False


@dataclass
class Asked:
    """One request: when it was sent, when it ended, and how; an empty text if it failed."""

    sent: float
    ended: float
    text: str


def ask(client: openai.OpenAI) -> Asked:
    sent = time.monotonic()
    try:
        text = client.completions.create(model="tiny", prompt=PROMPT, max_tokens=TOKENS, temperature=0).choices[0].text
    except openai.APIError:
        text = ""
    return Asked(sent, time.monotonic(), text)


def test_a_replica_that_is_killed_takes_only_what_it_was_answering(tiny_engine: Path, served: Live) -> None:
    session = Session.open(tiny_engine, limits=Limits(max_length=LENGTH, threads=1))
    alone = session.generate(PROMPT, SamplingParams(max_tokens=TOKENS, temperature=0)).text
    stopped = threading.Event()

    def keep_asking(_: int) -> list[Asked]:
        client, done = served.client(), list[Asked]()
        while not stopped.is_set():
            done.append(ask(client))
        return done

    assert whole(served, set())
    with ThreadPoolExecutor(4) as pool:
        asking = [pool.submit(keep_asking, n) for n in range(4)]
        try:
            time.sleep(2)
            victim = replicas(served)[0]
            killed_at = time.monotonic()
            victim.kill()
            whole_again = whole(served, {victim.pid})
            time.sleep(2)
        finally:
            stopped.set()
        done = [each for future in asking for each in future.result()]
    assert whole_again  # another one took its place
    failed = [each for each in done if not each.text]
    assert all(each.sent <= killed_at <= each.ended for each in failed), [
        (each.sent - killed_at, each.ended - killed_at) for each in failed
    ]
    assert len(failed) <= 4
    assert {each.text for each in done} - {""} == {alone}
    assert sum(each.sent > killed_at for each in done) > 10


def test_the_client_tries_again_by_itself(served: Live) -> None:
    client = served.client(retries=2)
    with ThreadPoolExecutor(2) as pool:
        asking = [pool.submit(lambda: [ask(client).text for _ in range(20)]) for _ in range(2)]
        time.sleep(0.2)
        replicas(served)[0].kill()
        texts = [text for future in asking for text in future.result()]
    assert "" not in texts


def test_it_streams_and_answers_probes(served: Live) -> None:
    stream = served.client().completions.create(model="tiny", prompt=PROMPT, max_tokens=9, temperature=0, stream=True)
    arrived = [time.monotonic() for chunk in stream if chunk.choices[0].text]
    assert len(arrived) > 1
    assert all(a <= b for a, b in pairwise(arrived))
    assert served.get("/health")[0] == served.get("/ready")[0] == 200
    assert served.metric("num_requests_running") == 0


def test_what_was_accepted_is_answered_before_the_end(served: Live) -> None:
    running = [each.pid for each in replicas(served)]
    with ThreadPoolExecutor(3) as pool:
        asking = [pool.submit(ask, served.client()) for _ in range(3)]
        time.sleep(0.1)
        served.process.send_signal(signal.SIGTERM)
        assert all(future.result().text for future in asking)
    assert served.process.wait(60) == 0
    assert not any(psutil.pid_exists(pid) for pid in running)


def test_an_address_that_is_taken_is_told(tiny_engine: Path) -> None:
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = str(taken.getsockname()[1])
        command = [sys.executable, "-m", "flabc", "serve", str(tiny_engine), "--ray", "--port", port]
        done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 1
    assert f"Cannot listen on 127.0.0.1:{port}" in done.stderr


def test_an_engine_that_is_damaged_is_told_before_anything_starts(tiny_engine: Path, tmp_path: Path) -> None:
    harmed = shutil.copytree(tiny_engine, tmp_path / "harmed")
    (harmed / "model.onnx.data").write_bytes(b"no weights")
    command = [sys.executable, "-m", "flabc", "serve", str(harmed), "--ray", "--port", "0"]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 1
    assert "model.onnx.data" in done.stderr
