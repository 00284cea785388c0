"""Measures everything that the README's tables show, by the commands that a reader would type.

    python perf/figures.py smollm2-135m --chat
    python perf/figures.py qwen2.5-coder-0.5b.gguf --name qwen2.5-coder-0.5b --tie

What is there already in the work folder is not made again. ``make docs`` then writes the tables.
"""

from __future__ import annotations

import argparse
import shutil
import subprocess
import sys
from pathlib import Path

RESULTS = Path(__file__).resolve().parent / "results"

#: Tasks that compare the pruned engine with the dense one, and their further arguments.
TASKS = {
    "perplexity": [],
    "kl": [],
    "humaneval": ["--allow-code-execution"],
    "output-prediction": [],
}

#: Speed; and the dense engine against torch on the same weights, which is what exporting alone costs.
BENCH, PARITY = "bench", "torch"
WHAT = (BENCH, *TASKS, PARITY)


def main() -> None:
    """Compress, export, bench and evaluate; then copy the results to ``perf/results``."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", help="whatever `flabc compress` takes as a model")
    parser.add_argument("--name", help="the model's name in the tables; by default as it is given")
    parser.add_argument("--recipe", default="flab-22")
    parser.add_argument("--work", type=Path, default=Path("build/figures"), help="where folders are made")
    parser.add_argument("--tie", action="store_true", help="as for `flabc compress`")
    parser.add_argument("--chat", action="store_true", help="ask HumanEval's questions in the chat template")
    parser.add_argument("--only", nargs="+", default=WHAT, choices=WHAT, metavar="WHAT", help=", ".join(WHAT))
    asked = parser.parse_args()
    name = asked.name or asked.model
    work = asked.work / f"{name}-{asked.recipe}"
    work.mkdir(parents=True, exist_ok=True)
    model = named(work, asked.model)
    tie = ["--tie"] * asked.tie

    chat = ["--chat"] * asked.chat
    measured = {}
    make(work, "dense-engine", ["export", model, *tie])
    if set(asked.only) - {PARITY}:
        make(work, "pruned", ["compress", model, "--recipe", asked.recipe, *tie])
        make(work, "engine", ["export", "pruned"])
    if BENCH in asked.only:
        make(work, BENCH, ["bench", "engine", "--baseline", "dense-engine", "--rounds", "4"])
        measured[f"{name}-{asked.recipe}.json"] = work / BENCH / "bench.json"
    for task, more in TASKS.items():
        if task in asked.only:
            words = ["eval", "engine", "--baseline", "dense-engine", "--task", task, *more]
            make(work, task, words + (chat if task == "humaneval" else []))
            measured[f"{name}-{asked.recipe}.{task}.json"] = work / task / "eval.json"
    if PARITY in asked.only:
        humaneval = ["--task", "humaneval", *TASKS["humaneval"], *tie, *chat]
        make(work, PARITY, ["eval", "dense-engine", "--baseline", model, *humaneval])
        measured[f"{name}.{PARITY}.json"] = work / PARITY / "eval.json"
    for file, source in measured.items():
        shutil.copyfile(source, RESULTS / file)
        print(RESULTS / file)


def make(work: Path, folder: str, command: list[str]) -> None:
    """Run a command of flabc that writes ``folder``, unless it is there."""
    if (work / folder).exists():
        return
    words = ["-m", "flabc", *command, "-o", folder]
    print("+", *words, file=sys.stderr)
    subprocess.run([sys.executable, *words], cwd=work, check=True, stdout=sys.stderr)


def named(work: Path, model: str) -> str:
    """A file or folder by its own name, so that results do not carry the paths of one machine."""
    if not Path(model).exists():
        return model
    link = work / Path(model).name
    if not link.exists():
        link.symlink_to(Path(model).resolve())
    return link.name


if __name__ == "__main__":
    main()
