"""``flabc recover``."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from .parameters import AT_LEAST_ONE, emit, json_option

if TYPE_CHECKING:
    from flabc.recovering import Recovered


@click.command()
@click.argument("checkpoint", type=click.Path(exists=True, file_okay=False, path_type=Path))
@click.option("-o", "--output", required=True, type=click.Path(path_type=Path), help="The checkpoint folder to write.")
@click.option(
    "--data",
    type=click.Path(exists=True, dir_okay=False, path_type=Path),
    help="Tasks: prompt and solution, JSON lines.",
)
@click.option("--text", metavar="CORPUS", help="Plain text: a built-in corpus, or a file or folder.")
@click.option("--teacher", help="The model that was cut, to be followed by the KL between token distributions.")
@click.option(
    "--method",
    type=click.Choice(["lora", "full", "distill"]),
    default="lora",
    show_default=True,
    help="Train adapters, which are merged; all weights; or all weights after the teacher alone.",
)
@click.option(
    "--kl-weight",
    type=click.FloatRange(0, 1),
    help="The KL's share of the loss.  [default: 1 for distill, else 0.5 with a teacher]",
)
@click.option(
    "--hidden-weight",
    type=click.FloatRange(0),
    default=0.0,
    show_default=True,
    help="Added to the loss: how far the states behind the layers are from the teacher's, as a share.",
)
@click.option("--epochs", type=float, default=1.0, show_default=True, help="How often every example is seen.")
@click.option("--max-steps", type=AT_LEAST_ONE, help="Optimiser steps at most.")
@click.option("--learning-rate", type=float, default=2e-4, show_default=True, help="At the peak of a cosine.")
@click.option("--batch", type=AT_LEAST_ONE, default=4, show_default=True, help="Sequences at once, in each process.")
@click.option("--accumulate", type=AT_LEAST_ONE, default=1, show_default=True, help="Batches to a step.")
@click.option("--max-length", type=click.IntRange(2), default=1024, show_default=True, help="Tokens of a sequence.")
@click.option("--packing", is_flag=True, help="Fill sequences with several examples, which do not see each other.")
@click.option("--chat", is_flag=True, help="Make conversations of the tasks, by the model's chat template.")
@click.option("--rank", type=AT_LEAST_ONE, default=16, show_default=True, help="Rank of the adapters.")
@click.option("--alpha", type=AT_LEAST_ONE, default=32, show_default=True, help="Their scale, over the rank.")
@click.option(
    "--dtype",
    type=click.Choice(["auto", "float32", "bfloat16"]),
    default="auto",
    show_default=True,
    help="Compute in this; auto is what the device multiplies fastest.",
)
@click.option("--gradient-checkpointing", is_flag=True, help="Less memory for a third more time.")
@click.option("--evaluations", type=AT_LEAST_ONE, default=10, show_default=True, help="Looks at the loss on dev.")
@click.option("--patience", type=AT_LEAST_ONE, default=3, show_default=True, help="Looks without progress; then stop.")
@click.option("--seed", type=int, default=0, show_default=True, help="Makes training repeatable.")
@click.option("--device", default="cpu", show_default=True, help="A torch device.")
@click.option(
    "--tensorboard", type=click.Path(file_okay=False, path_type=Path), help="A folder for TensorBoard's logs."
)
@click.option("--resume", is_flag=True, help="Go on with a run that was cut off.")
@click.option("--force", is_flag=True, help="Replace an output folder that is not empty, or begin a run anew.")
@json_option
def recover(
    checkpoint: Path,
    output: Path,
    data: Path | None,
    text: str | None,
    teacher: str | None,
    device: str,
    tensorboard: Path | None,
    resume: bool,
    force: bool,
    as_json: bool,
    **options: Any,
) -> None:
    """Train CHECKPOINT on tasks or text, alone or after the model that it was cut from, and write another.

    Prompts are not learnt, only answers. Rows of the split test are never trained on; dev is watched, and the state
    with the least loss on it is what is written, as an ordinary checkpoint whose flabc.json says what was done.
    Several processes train together under accelerate launch, each with the whole model.

    \b
    flabc recover pruned --data tasks.jsonl -o recovered
    flabc recover pruned --teacher smollm2-135m --method distill --text python-stdlib --learning-rate 5e-5 -o recovered
    accelerate launch --multi_gpu -m flabc recover pruned --data tasks.jsonl --device cuda -o recovered
    """
    from flabc import recovering
    from flabc.compress import processes
    from flabc.compress.config import Recovery
    from flabc.frozen import fitting

    parsed = fitting(Recovery, options)
    found = recovering.recover(
        checkpoint,
        output,
        data=data,
        text=text,
        teacher=teacher,
        options=parsed,
        device=device,
        tensorboard=tensorboard,
        resume=resume,
        force=force,
    )
    if processes.is_first():
        emit(as_json, found, lambda: _show(found))


def _unit(name: str, found: Recovered) -> str:
    """What a loss counts; a sum of nats and shares has no unit."""
    if name == "hidden":
        return "of the teacher's states, "
    return "" if name == "loss" and found.hidden_weight else "nats a token "


def _show(found: Recovered) -> None:
    for name, before in found.before.items():
        after = found.after[name]
        if before is not None and after is not None:
            click.echo(f"{name:<6} {before:.4f} → {after:.4f} {_unit(name, found)}on dev")
    click.echo(f"{found.steps} steps, {found.tokens:,} tokens learnt; the state of step {found.best_step}", err=True)
    if (found.after["loss"] or 0) >= (found.before["loss"] or 0):
        click.echo("training did not help: the loss on dev is no lower than before", err=True)
    click.echo(f"wrote {found.path}", err=True)
