"""One peer in a process of its own: it runs in the peer's environment, so it imports nothing of flabc.

``python peer_worker.py PEER``: one JSON line in, one out. ``prepare`` turns a Hugging Face folder (or its GGUF) into
what the peer loads, by the peer's own tools; ``open`` loads that; ``generate`` is one timed run, greedy, past all stop
tokens.
"""

from __future__ import annotations

import ctypes
import importlib.metadata
import importlib.util
import json
import os
import subprocess
import sys
import time
import traceback
from collections.abc import Callable, Iterator
from itertools import pairwise
from pathlib import Path
from typing import Any, ClassVar

Rows = list[list[int]]
Reply = dict[str, Any]

#: Of the time that a run took, the share that the peer's own clock must account for.
ACCOUNTED = 0.9

#: Milliseconds outside the steps that are nothing, however short these are.
SLACK_MS = 5.0


class Peer:
    """What every peer can do.

    Args:
        folder: what ``prepare`` left.
        precision: ``fp32``, ``bf16``, ``int8`` or ``int4``.
        max_length: tokens of a sequence, prompt included.
        max_batch: sequences at once.
        threads: for the computation.
    """

    #: What is computed in what, by precision: these alone are measured.
    precisions: ClassVar[dict[str, str]]

    def __init__(self, folder: Path, precision: str, max_length: int, max_batch: int, threads: int) -> None:
        raise NotImplementedError

    @staticmethod
    def prepare(model: Path, gguf: Path, out: Path, precision: str) -> None:
        """Write to ``out`` what the peer loads; the peers that load the model's own folder write nothing."""

    def steps(self, prompts: Rows, count: int) -> Iterator[list[int]]:
        """Yield the next token of each row, ``count`` times."""
        raise NotImplementedError

    def run(self, prompts: Rows, count: int) -> tuple[list[float], Rows]:
        """Milliseconds of each step, the prompts' first, and the tokens of each step, (count, B)."""
        marks, made = [time.perf_counter()], []
        for tokens in self.steps(prompts, count):
            marks.append(time.perf_counter())
            made.append(tokens)
        return [1000 * (b - a) for a, b in pairwise(marks)], made


class Forward(Peer):
    """A model with transformers' ``forward`` and cache; the loop is written out, as ``generate`` does more a token."""

    model: Any

    def steps(self, prompts: Rows, count: int) -> Iterator[list[int]]:
        """Only the last position's logits are asked for, where the model can be asked."""
        import torch

        ids, past = torch.tensor(prompts), None
        mask = torch.ones_like(ids)
        for _ in range(count):
            with torch.inference_mode():
                given = {"input_ids": ids, "attention_mask": mask, "past_key_values": past, "use_cache": True}
                out = self.model(**given, **self.more(mask, ids))
            past, ids = out.past_key_values, out.logits[:, -1].argmax(-1, keepdim=True)  # (B, 1)
            mask = torch.cat([mask, torch.ones_like(ids)], 1)
            yield ids[:, 0].tolist()

    def more(self, mask: Any, ids: Any) -> dict[str, Any]:
        """Further arguments of ``forward``."""
        return {}


class Torch(Forward):
    """torch with transformers, SDPA attention, not compiled."""

    precisions: ClassVar[dict[str, str]] = {"fp32": "float32", "bf16": "weights and activations bfloat16"}

    def __init__(self, folder: Path, precision: str, max_length: int, max_batch: int, threads: int) -> None:
        import torch
        from transformers import AutoModelForCausalLM

        torch.set_num_threads(threads)
        dtype = {"fp32": torch.float32, "bf16": torch.bfloat16}[precision]
        model: Any = AutoModelForCausalLM.from_pretrained(folder, dtype=dtype)
        self.model = model.eval()

    def more(self, mask: Any, ids: Any) -> dict[str, Any]:
        """The prompt's logits are not wanted."""
        return {"logits_to_keep": 1}


class Optimum(Forward):
    """optimum-onnx: ``ORTModelForCausalLM`` on its own export."""

    precisions: ClassVar[dict[str, str]] = {"fp32": "float32"}

    def __init__(self, folder: Path, precision: str, max_length: int, max_batch: int, threads: int) -> None:
        import onnxruntime
        from optimum.onnxruntime import ORTModelForCausalLM

        options = onnxruntime.SessionOptions()
        options.intra_op_num_threads = threads
        self.model = ORTModelForCausalLM.from_pretrained(
            folder, session_options=options, provider="CPUExecutionProvider", use_io_binding=False
        )

    @staticmethod
    def prepare(model: Path, gguf: Path, out: Path, precision: str) -> None:
        """Export by optimum's own command."""
        _run(["optimum-cli", "export", "onnx", "--model", str(model), "--task", "text-generation-with-past", str(out)])

    def more(self, mask: Any, ids: Any) -> dict[str, Any]:
        """Positions, which its graph may want."""
        return {"position_ids": (mask.cumsum(-1) - 1)[:, -ids.shape[1] :]}


class Genai(Peer):
    """onnxruntime-genai on the graph of its own model builder."""

    precisions: ClassVar[dict[str, str]] = {
        "fp32": "float32",
        "int8": "weights int8 in blocks of 32, the builder's defaults",
        "int4": "weights int4 in blocks of 32, the builder's defaults",
    }

    def __init__(self, folder: Path, precision: str, max_length: int, max_batch: int, threads: int) -> None:
        import onnxruntime_genai as genai

        file = folder / "genai_config.json"
        config = json.loads(file.read_text(encoding="utf-8"))
        config["model"]["decoder"]["session_options"]["intra_op_num_threads"] = threads
        file.write_text(json.dumps(config), encoding="utf-8")
        self.genai, self.model = genai, genai.Model(str(folder))

    @staticmethod
    def prepare(model: Path, gguf: Path, out: Path, precision: str) -> None:
        """Build by its model builder, which is a script."""
        package = importlib.util.find_spec("onnxruntime_genai")
        assert package is not None
        assert package.origin is not None
        builder = Path(package.origin).parent / "models" / "builder.py"
        asked = ["-i", str(model), "-o", str(out), "-p", precision, "-e", "cpu", "-c", str(out / "cache")]
        _run([sys.executable, str(builder), *asked])

    def steps(self, prompts: Rows, count: int) -> Iterator[list[int]]:
        """``min_length`` keeps stop tokens away."""
        import numpy as np

        params, length = self.genai.GeneratorParams(self.model), len(prompts[0]) + count
        params.set_search_options(do_sample=False, min_length=length, max_length=length, batch_size=len(prompts))
        generator = self.genai.Generator(self.model, params)
        generator.append_tokens(np.array(prompts, np.int32))
        for _ in range(count):
            generator.generate_next_token()
            yield [int(token) for token in generator.get_next_tokens()]


class LlamaCpp(Peer):
    """llama.cpp through the C API that llama-cpp-python binds; its high-level class has one sequence."""

    precisions: ClassVar[dict[str, str]] = {
        "fp32": "F32, cache F16 as is its default",
        "bf16": "BF16, cache F16",
        "int8": "Q8_0, activations rounded to 8 bits, cache F16",
        "int4": "Q4_0, activations rounded to 8 bits, cache F16",
    }

    #: ``llama_ftype`` of llama.h.
    FILE_TYPES: ClassVar[dict[str, int]] = {"fp32": 0, "bf16": 32, "int8": 7, "int4": 2}
    FILE = "model.gguf"

    def __init__(self, folder: Path, precision: str, max_length: int, max_batch: int, threads: int) -> None:
        import llama_cpp

        self.api = llama_cpp
        llama_cpp.llama_backend_init()
        path = str(folder / self.FILE).encode()
        self.model = llama_cpp.llama_model_load_from_file(path, llama_cpp.llama_model_default_params())
        params = llama_cpp.llama_context_default_params()
        params.n_ctx, params.n_seq_max = max_batch * max_length, max_batch
        params.n_batch = max_batch * max_length
        params.n_threads = params.n_threads_batch = threads
        self.context = llama_cpp.llama_init_from_model(self.model, params)
        if not self.context:
            raise RuntimeError("llama.cpp made no context")
        self.vocab_size = llama_cpp.llama_vocab_n_tokens(llama_cpp.llama_model_get_vocab(self.model))
        self.room = params.n_batch

    @staticmethod
    def prepare(model: Path, gguf: Path, out: Path, precision: str) -> None:
        """Quantise the float32 file by llama.cpp's own quantiser."""
        import llama_cpp

        if precision == "fp32":
            (out / LlamaCpp.FILE).symlink_to(gguf)
            return
        params = llama_cpp.llama_model_quantize_default_params()
        params.ftype = LlamaCpp.FILE_TYPES[precision]
        paths = str(gguf).encode(), str(out / LlamaCpp.FILE).encode()
        failed = llama_cpp.llama_model_quantize(*paths, ctypes.byref(params))
        if failed:
            raise RuntimeError(f"llama_model_quantize returned {failed}")

    def steps(self, prompts: Rows, count: int) -> Iterator[list[int]]:
        """All rows in one call of ``llama_decode``; logits of the last position of each."""
        api = self.api
        api.llama_memory_clear(api.llama_get_memory(self.context), True)
        batch = api.llama_batch_init(self.room, 0, 1)
        try:
            position, new = 0, prompts
            for _ in range(count):
                last = self._fill(batch, new, position)
                if code := api.llama_decode(self.context, batch):
                    raise RuntimeError(f"llama_decode returned {code}")
                position += len(new[0])
                tokens = [self._best(at) for at in last]
                yield tokens
                new = [[token] for token in tokens]
        finally:
            api.llama_batch_free(batch)

    def _fill(self, batch: Any, rows: Rows, position: int) -> list[int]:
        """Put rows into a batch; where the last token of each is."""
        at, last = 0, []
        for row, tokens in enumerate(rows):
            for offset, token in enumerate(tokens):
                batch.token[at], batch.pos[at] = token, position + offset
                batch.n_seq_id[at], batch.seq_id[at][0] = 1, row
                batch.logits[at] = offset == len(tokens) - 1
                at += 1
            last.append(at - 1)
        batch.n_tokens = at
        return last

    def _best(self, at: int) -> int:
        import numpy as np

        logits = self.api.llama_get_logits_ith(self.context, at)
        return int(np.ctypeslib.as_array(logits, (self.vocab_size,)).argmax())


class OpenVino(Peer):
    """OpenVINO's runtime on the IR that optimum-intel exports, which keeps keys and values as its state."""

    precisions: ClassVar[dict[str, str]] = {
        "fp32": "float32, cache float32",
        "bf16": "weights float16 as exported, computed in bfloat16, cache bfloat16",
        "int8": "weights int8, the exporter's and the plugin's defaults (activations and cache may be 8 bits)",
        "int4": "weights int4, the exporter's and the plugin's defaults (activations and cache may be 8 bits)",
    }
    FORMATS: ClassVar[dict[str, str]] = {"fp32": "fp32", "bf16": "fp16", "int8": "int8", "int4": "int4"}
    HINTS: ClassVar[dict[str, dict[str, str]]] = {
        "fp32": {"INFERENCE_PRECISION_HINT": "f32", "KV_CACHE_PRECISION": "f32"},
        "bf16": {"INFERENCE_PRECISION_HINT": "bf16", "KV_CACHE_PRECISION": "bf16"},
    }

    def __init__(self, folder: Path, precision: str, max_length: int, max_batch: int, threads: int) -> None:
        import openvino

        hints = {"PERFORMANCE_HINT": "LATENCY", "INFERENCE_NUM_THREADS": threads, **self.HINTS.get(precision, {})}
        model = openvino.Core().compile_model(folder / "openvino_model.xml", "CPU", hints)
        self.request = model.create_infer_request()
        self.wanted = {given.any_name for given in model.inputs}

    @staticmethod
    def prepare(model: Path, gguf: Path, out: Path, precision: str) -> None:
        """Export by optimum-intel's own command."""
        task = ["--task", "text-generation-with-past", "--weight-format", OpenVino.FORMATS[precision]]
        _run(["optimum-cli", "export", "openvino", "--model", str(model), *task, str(out)])

    def steps(self, prompts: Rows, count: int) -> Iterator[list[int]]:
        """Nothing but the request and the largest logit: OpenVINO GenAI's pipeline, tried beside, took longer."""
        import numpy as np

        self.request.reset_state()
        ids, rows, length = np.array(prompts, np.int64), len(prompts), 0
        for _ in range(count):
            positions = np.tile(np.arange(length, length + ids.shape[1]), (rows, 1))
            length += ids.shape[1]
            given = {"input_ids": ids, "attention_mask": np.ones((rows, length), np.int64), "position_ids": positions}
            given["beam_idx"] = np.arange(rows, dtype=np.int32)
            feeds = {name: array for name, array in given.items() if name in self.wanted}
            logits = self.request.infer(feeds, share_inputs=True, share_outputs=True)["logits"]
            ids = logits[:, -1].argmax(-1)[:, None]  # (B, 1)
            yield ids[:, 0].tolist()


PEERS: dict[str, type[Peer]] = {
    "onnxruntime-genai": Genai,
    "optimum-onnx": Optimum,
    "llama.cpp": LlamaCpp,
    "openvino": OpenVino,
    "torch": Torch,
}


class Worker:
    """Answers requests about one peer."""

    def __init__(self, name: str) -> None:
        self.kind = PEERS[name]
        self.peer: Peer | None = None

    def prepare(self, model: str, gguf: str, out: str, precision: str) -> Reply:
        """See ``Peer.prepare``."""
        self.kind.prepare(Path(model), Path(gguf), Path(out), precision)
        return {}

    def open(self, folder: str, precision: str, max_length: int, max_batch: int, threads: int) -> Reply:
        """Load, and say what is computed in what, and by which versions."""
        self.peer = self.kind(Path(folder), precision, max_length, max_batch, threads)
        versions = {each.metadata["Name"]: each.version for each in importlib.metadata.distributions()}
        return {"detail": self.kind.precisions[precision], "versions": versions}

    def generate(self, prompts: Rows, output_tokens: int) -> Reply:
        """One run.

        Raises:
            RuntimeError: if it made other than so many tokens of each row, or took longer than its steps together.
        """
        assert self.peer is not None
        began = time.perf_counter()
        steps_ms, made = self.peer.run(prompts, output_tokens)
        whole_ms = 1000 * (time.perf_counter() - began)
        widths = {len(tokens) for tokens in made}
        if (len(made), len(steps_ms), widths) != (output_tokens, output_tokens, {len(prompts)}):
            raise RuntimeError(
                f"{output_tokens} steps of {len(prompts)} tokens were wanted, not {len(made)} of {widths}"
            )
        outside = whole_ms - sum(steps_ms)
        if not -0.01 * whole_ms <= outside <= max((1 - ACCOUNTED) * whole_ms, SLACK_MS):
            raise RuntimeError(f"the steps' times are {sum(steps_ms):.1f} ms together, the run took {whole_ms:.1f} ms")
        return {"ttft_ms": steps_ms[0], "token_ms": steps_ms[1:], "tokens": made}


def _run(command: list[str]) -> None:
    """Run a program of this environment; what it says goes to the log."""
    environment = os.environ | {"PATH": f"{Path(sys.executable).parent}:{os.environ['PATH']}"}
    subprocess.run(command, check=True, stdout=sys.stderr, env=environment)


def main() -> None:
    """Serve requests from stdin until it closes. Libraries write to stdout too, so replies have a pipe of their own."""
    replies = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)
    worker = Worker(sys.argv[1])
    for line in sys.stdin:
        request = json.loads(line)
        method: Callable[..., Reply] = getattr(worker, request["call"])
        try:
            reply = method(**request["arguments"])
        except Exception as error:  # whatever a peer raises is its result; the log has where
            traceback.print_exc()
            reply = {"error": f"{type(error).__name__}: {error}"}
        print(json.dumps(reply), file=replies, flush=True)


if __name__ == "__main__":
    main()
