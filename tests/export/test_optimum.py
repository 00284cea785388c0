"""optimum's ``ORTModelForCausalLM`` on our engines: in an environment of its own, as it pins an older transformers."""

from __future__ import annotations

import json
import os
import subprocess
from pathlib import Path

import pytest

from flabc import api
from flabc.runtime.sampling import SamplingParams
from flabc.runtime.session import Session

#: Names the interpreter of an environment with optimum-onnx.
VARIABLE = "FLABC_OPTIMUM_PYTHON"

THEIRS = """
import json, sys
import torch
from optimum.onnxruntime import ORTModelForCausalLM
folder, ids = sys.argv[1], torch.tensor([json.loads(sys.argv[2])])
model = ORTModelForCausalLM.from_pretrained(folder, provider="CPUExecutionProvider", use_io_binding=False)
greedy = {"max_new_tokens": 24, "do_sample": False, "eos_token_id": None, "pad_token_id": 0}
made = model.generate(ids, attention_mask=torch.ones_like(ids), **greedy)
print(json.dumps(made[0, ids.shape[1]:].tolist()))
"""


@pytest.mark.skipif(VARIABLE not in os.environ, reason=f"{VARIABLE} names no interpreter with optimum-onnx")
@pytest.mark.parametrize("precision", ["fp32", "int8"])
def test_optimum_says_the_same(tiny_checkpoint: Path, tmp_path: Path, precision: str) -> None:
    api.export(tiny_checkpoint, tmp_path / "e", precision=precision)
    session, prompt = Session.open(tmp_path / "e"), "def fibonacci(n):"
    ours = session.generate(prompt, SamplingParams(max_tokens=24, ignore_eos=True)).token_ids
    command = [os.environ[VARIABLE], "-c", THEIRS, str(tmp_path / "e"), json.dumps(session.encode(prompt))]
    theirs = subprocess.run(command, check=True, capture_output=True, text=True).stdout
    assert json.loads(theirs.splitlines()[-1]) == list(ours)
