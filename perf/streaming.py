"""A model larger than the memory it may use: random weights of a 7B Llama's shapes, compressed from disk.

    python perf/streaming.py --work build/streaming --memory 6GiB
    python perf/streaming.py --work build/streaming --device cuda --memory 200GiB

Writes the sharded checkpoint once (about 14 GB), compresses it in a process of its own, and writes that process's
peak memory, resident and on a GPU, to ``perf/results/streaming.json`` or ``streaming-DEVICE.json``.
"""

from __future__ import annotations

import argparse
import json
import resource
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import torch

from flabc.compress import load
from flabc.compress.location import locate
from flabc.runtime.measure.environment import environment
from flabc.spec import ModelSpec

RESULTS = Path(__file__).resolve().parent / "results"

#: Llama-2-7B's shapes.
SHAPES = {
    "hidden_size": 4096,
    "intermediate_size": 11008,
    "num_hidden_layers": 32,
    "num_attention_heads": 32,
    "num_key_value_heads": 32,
    "head_dim": 128,
    "max_position_embeddings": 4096,
    "rms_norm_eps": 1e-5,
}


def main() -> None:
    """Make the model, compress it, and write what it took."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--work", type=Path, default=Path("build/streaming"))
    parser.add_argument("--layers", type=int, default=SHAPES["num_hidden_layers"], help="fewer for a trial")
    parser.add_argument("--memory", default="6GiB")
    parser.add_argument("--recipe", default="flab-22")
    parser.add_argument("--device", default="cpu", help="a torch device")
    parser.add_argument("--set", dest="overrides", nargs="*", default=["calibration.sequences=8"])
    asked = parser.parse_args()
    dense = asked.work / f"llama-7b-{asked.layers}"
    if not (dense / "model.safetensors.index.json").is_file():
        make(dense, asked.layers)
    command = [
        sys.executable,
        "-m",
        "flabc",
        "compress",
        str(dense),
        "--recipe",
        asked.recipe,
        "--memory",
        asked.memory,
        "--device",
        asked.device,
    ]
    command += [word for each in asked.overrides for word in ("--set", each)]
    started = time.monotonic()
    done = subprocess.run(
        [*command, "-o", str(asked.work / "pruned"), "--force", "--json"], check=True, stdout=subprocess.PIPE
    )
    result = json.loads(done.stdout)
    found = {
        "environment": environment(),
        "command": ["flabc", "compress", dense.name, *command[5:]],
        "stored_gib": round(sum(file.stat().st_size for file in dense.glob("*.safetensors")) / 2**30, 2),
        "peak_rss_gib": round(resource.getrusage(resource.RUSAGE_CHILDREN).ru_maxrss / 2**20, 2),
        "peak_device_mib": result["peak_device_mib"],
        "seconds": round(time.monotonic() - started, 1),
        "stages": [{key: stage[key] for key in ("stage", "summary", "seconds")} for stage in result["stages"]],
    }
    name = "streaming.json" if asked.device == "cpu" else f"streaming-{asked.device.replace(':', '-')}.json"
    (RESULTS / name).write_text(json.dumps(found, indent=1) + "\n")
    print(json.dumps(found, indent=1))


def make(folder: Path, layers: int) -> None:
    """Random weights in bfloat16, a shard per layer, with the tokenizer of SmolLM2 in front."""
    from safetensors.torch import save_file

    folder.mkdir(parents=True, exist_ok=True)
    files = load.read_tokenizer(locate("smollm2-135m"))
    (folder / "tokenizer.json").write_text(json.dumps(files.tokenizer))
    (folder / "tokenizer_config.json").write_text(json.dumps(files.config))
    config: dict[str, Any] = {**SHAPES, "model_type": "llama", "vocab_size": 49152, "tie_word_embeddings": False}
    config |= {"num_hidden_layers": layers, "rope_theta": 10000.0, "hidden_act": "silu", "torch_dtype": "bfloat16"}
    shapes = ModelSpec.from_config(config).shapes()
    generator = torch.Generator().manual_seed(0)
    places: dict[str, str] = {}
    groups: dict[str, list[str]] = {}
    for name in shapes:
        groups.setdefault(name.split(".")[2] if ".layers." in name else "outer", []).append(name)
    for group, names in groups.items():
        file = f"model-{group}.safetensors"
        save_file({name: drawn(shapes[name], generator) for name in names}, folder / file, metadata={"format": "pt"})
        places |= dict.fromkeys(names, file)
    index = {"metadata": {}, "weight_map": places}
    (folder / "config.json").write_text(json.dumps({**config, "architectures": ["LlamaForCausalLM"]}))
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))


def drawn(shape: tuple[int, ...], generator: torch.Generator) -> torch.Tensor:
    """A matrix as models are initialised, or a norm's ones."""
    if len(shape) == 1:
        return torch.ones(shape, dtype=torch.bfloat16)
    return (0.02 * torch.randn(shape, generator=generator)).bfloat16()


if __name__ == "__main__":
    main()
