"""An engine runs where neither torch nor transformers is installed."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

from flabc.runtime.sampling import SamplingParams
from flabc.runtime.session import Session

from .test_server import Live

PROMPT = "def fibonacci(n):"

WALL = """
import json, sys

class Wall:
    def find_spec(self, name, path=None, target=None):
        if name.split(".")[0] in ("torch", "transformers", "onnx", "onnx_ir", "safetensors"):
            raise ModuleNotFoundError(f"No module named {name!r}", name=name)

sys.meta_path.insert(0, Wall())
"""

ANSWERING = """
from flabc import Session
from flabc.runtime.sampling import SamplingParams
print(json.dumps(Session.open(sys.argv[1]).generate(sys.argv[2], SamplingParams(max_tokens=16)).token_ids))
"""


SERVING = """
from flabc.cli import main
main()
"""


def run(folder: Path) -> subprocess.CompletedProcess[str]:
    return subprocess.run([sys.executable, "-c", WALL + ANSWERING, folder, PROMPT], capture_output=True, text=True)


def test_an_engine_says_the_same(tiny_engine: Path) -> None:
    done = run(tiny_engine)
    assert done.returncode == 0, done.stderr
    expected = Session.open(tiny_engine).generate(PROMPT, SamplingParams(max_tokens=16)).token_ids
    assert tuple(json.loads(done.stdout)) == expected


def test_it_serves_the_same(tiny_engine: Path, tmp_path: Path) -> None:
    server = Live(tiny_engine, tmp_path / "log", program=("-c", WALL + SERVING))
    try:
        ask = server.client().completions.create
        said = ask(model="tiny", prompt=PROMPT, max_tokens=16, temperature=0, logprobs=1, echo=True).choices[0].text
    finally:
        server.close()
    assert said == PROMPT + Session.open(tiny_engine).generate(PROMPT, SamplingParams(max_tokens=16)).text


def test_a_checkpoint_names_the_extra_it_needs(tiny_checkpoint: Path) -> None:
    done = run(tiny_checkpoint)
    assert done.returncode != 0
    assert "MissingExtraError" in done.stderr
    assert "flabc[compress]" in done.stderr
