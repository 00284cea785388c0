"""A server that speaks as much of OpenAI's API as an evaluation asks for, and a GPU's memory that is the host's."""

from __future__ import annotations

import ctypes
import json
import threading
from collections.abc import Iterator
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from flabc.runtime.evaluate.perplexity import target_nll
from flabc.runtime.sampling import SamplingParams
from flabc.runtime.session import Session

#: What the addresses of the host's memory are multiples of, as a GPU's are.
ALIGNMENT = 256


class HostMemory:
    """``Memory`` on the host; nothing but what was allocated may be touched."""

    stream = 7

    def __init__(self) -> None:
        self.blocks: dict[int, Any] = {}

    def allocate(self, size: int) -> int:
        block = np.zeros(size + ALIGNMENT, np.uint8)
        address = -(-block.ctypes.data // ALIGNMENT) * ALIGNMENT
        self.blocks[address] = block
        return address

    def free(self, address: int) -> None:
        del self.blocks[address]

    def upload(self, address: int, array: Any) -> None:
        self.check(address, array.nbytes)
        ctypes.memmove(address, array.ctypes.data, array.nbytes)

    def download(self, address: int, array: Any) -> None:
        self.check(address, array.nbytes)
        ctypes.memmove(array.ctypes.data, address, array.nbytes)

    def copy(self, to: int, source: int, size: int) -> None:
        self.check(to, size)
        self.check(source, size)
        ctypes.memmove(to, source, size)

    def wait(self) -> None:
        """All is done at once here."""

    def check(self, address: int, size: int) -> None:
        """Only what was allocated may be touched."""
        assert any(
            start <= address and address + size <= block.ctypes.data + block.nbytes
            for start, block in self.blocks.items()
        ), "outside all that was allocated"


@dataclass
class Served:
    """Where the server is, and every request that it got."""

    url: str
    asked: list[dict[str, Any]] = field(default_factory=list)


class Model:
    """Answers requests with a session, one at a time."""

    def __init__(self, session: Session) -> None:
        self.session = session
        self.lock = threading.Lock()

    def answer(self, body: dict[str, Any]) -> dict[str, Any]:
        """The reply to a completion or a chat completion; prompts are texts, token ids, or one of either in a list."""
        prompt = body.get("messages") or body["prompt"]
        if "messages" not in body and isinstance(prompt, list) and not isinstance(prompt[0], int):
            (prompt,) = prompt
        stop = body.get("stop") or ()
        params = SamplingParams(
            max_tokens=body["max_tokens"], stop=(stop,) if isinstance(stop, str) else tuple(stop), seed=body.get("seed")
        )
        if isinstance(prompt, list) and isinstance(prompt[0], int):
            ids, prompt = prompt, self.session.codec.tokenizer.decode(prompt, skip_special_tokens=False)
        else:
            ids = self.session.encode(prompt)
        with self.lock:
            found = self.session.generate(prompt, params)
            choice: dict[str, Any] = {"index": 0, "finish_reason": found.finish_reason}
            if body.get("echo"):
                choice["logprobs"] = self._echoed(ids)
        choice |= {"message": {"role": "assistant", "content": found.text}} if "messages" in body else {}
        choice |= {"text": found.text} if "prompt" in body else {}
        usage = {"prompt_tokens": found.prompt_tokens, "completion_tokens": len(found.token_ids), "total_tokens": 0}
        return {"id": "1", "object": "x", "created": 0, "model": "tiny", "choices": [choice], "usage": usage}

    def _echoed(self, ids: list[int]) -> dict[str, Any]:
        """Log-probabilities of the prompt, then one of the token produced; of the most likely tokens too."""
        logits = self.session.backend.score(np.array([ids]))[0]
        given = [-float(nll) for nll in target_nll(logits[:-1], np.array(ids[1:]))]
        best = [-float(target_nll(row[None], np.array([row.argmax()]))[0]) for row in logits[:-1]]
        return {
            "tokens": [str(index) for index in ids] + ["x"],
            "token_logprobs": [None, *given, -1.0],
            "top_logprobs": [None, *({"x": max(g, b)} for g, b in zip(given, best, strict=True)), {"x": -1.0}],
        }


@pytest.fixture
def served(tiny_engine: Path) -> Iterator[Served]:
    """A server over the tiny engine."""
    model, requests = Model(Session.open(tiny_engine)), list[dict[str, Any]]()

    class Handler(BaseHTTPRequestHandler):
        def log_message(self, *_: Any) -> None:
            """Nothing on the terminal."""

        def do_GET(self) -> None:
            entry = {"id": "tiny", "object": "model", "created": 0, "owned_by": "x"}
            self._reply({"object": "list", "data": [entry]})

        def do_POST(self) -> None:
            body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
            requests.append(body)
            self._reply(model.answer(body))

        def _reply(self, data: dict[str, Any]) -> None:
            raw = json.dumps(data).encode()
            self.send_response(200)
            self.send_header("Content-Type", "application/json")
            self.send_header("Content-Length", str(len(raw)))
            self.end_headers()
            self.wfile.write(raw)

    with ThreadingHTTPServer(("127.0.0.1", 0), Handler) as server:
        thread = threading.Thread(target=server.serve_forever)
        thread.start()
        yield Served(f"http://127.0.0.1:{server.server_port}", requests)
        server.shutdown()
        thread.join()
