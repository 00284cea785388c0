"""What cuts buy on a GPU: one command, one folder of results.

    PYTHONPATH=src python perf/gpu_suite.py -o OUT --budget 10m

It needs torch with CUDA, transformers, numpy, pydantic, psutil and pyyaml, no network, and no installed flabc: it runs
from the source tree. Energy needs nvidia-ml-py, drawings need matplotlib; without them the results say so. Where there
is no network, carry the wheels: ``pip download -d wheels pydantic psutil pyyaml nvidia-ml-py`` on a machine with the
same Python, then ``pip install --no-index --find-links wheels pydantic psutil pyyaml nvidia-ml-py``.

Published shapes with random weights (speed does not depend on the numbers), dense against cuts, in turns. What is too
large for the GPU is measured in slices of its layers, and its times are calculated and labelled ``extrapolated``.
First the decoder is compared with transformers on the device. ``OUT/suite.json`` and a file per cell are written after
every cell; the same command goes on where it was stopped. Cells come by importance, and one that the rest of the budget
cannot hold is skipped and says why. ``--model`` measures a real model;
``--engine DENSE PRUNED`` two engine folders beside it, in ONNX Runtime or TensorRT, whichever they are made for.
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

from flabc.perf import duration


def main(words: list[str] | None = None) -> None:
    """Measure what was asked for; the exit code is 1 if a cell failed."""
    asked = _parser().parse_args(words)
    from flabc.errors import FlabcError
    from flabc.perf.gpu_run import Suite

    try:
        failed = Suite(asked.output, vars(asked)).run()
    except FlabcError as error:
        print(f"gpu_suite: {error}", file=sys.stderr)
        sys.exit(error.exit_code)
    sys.exit(1 if failed else 0)


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add = parser.add_argument
    add("-o", "--output", type=Path, required=True, help="the folder of results")
    add("--budget", type=seconds, default=600.0, help="time for all, e.g. 90s, 10m, 1h (10m)")
    add("--pair", action="append", metavar="SHAPE:CUT", help="these pairs only; repeatable")
    add("--batch", type=numbers, help="for --pair, --model: batches, e.g. 1,8,64 (1,8,64)")
    add("--prompt-tokens", type=numbers, help="for --pair, --model: lengths of prompts (128)")
    add("--output-tokens", type=int, default=128, help="tokens that each run produces (128)")
    add("--rounds", type=int, default=3, help="rounds of dense, pruned, pruned, dense (3)")
    add("--layers", type=int, help="measure so many layers of the dense model at most")
    add("--dtype", choices=("bfloat16", "float16", "float32"), help="bfloat16 on a GPU, else float32")
    add("--model", type=Path, help="a Hugging Face folder, measured with its own weights")
    add("--pruned", type=Path, help="for --model: the pruned folder; else --cut with random weights")
    add("--cut", default="flab-22", help="for --model (flab-22)")
    add("--engine", type=Path, nargs=2, metavar=("DENSE", "PRUNED"), help="two engine folders, measured as well")
    add("--no-graphs", action="store_true", help="without CUDA graphs, to see what they give")
    add("--no-fusing", action="store_true", help="without torch.compile for small kernels")
    add("--no-energy", action="store_true", help="do not read the energy counter")
    add("--cpu", action="store_true", help="run where there is no GPU, to see that it works")
    return parser


def seconds(text: str) -> float:
    """A time such as 90s, 10m or 1h."""
    try:
        return duration.seconds(text)
    except ValueError as error:
        raise argparse.ArgumentTypeError(str(error)) from error


def numbers(text: str) -> list[int]:
    """Whole numbers from one on, apart by commas."""
    parts = text.split(",")
    if not all(part.isdecimal() and int(part) for part in parts):
        raise argparse.ArgumentTypeError(f"{text!r}: expected whole numbers from 1 on, apart by commas, e.g. 1,8")
    return [int(part) for part in parts]


if __name__ == "__main__":
    main()
