"""``flabc export``."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

import click

from flabc.errors import NOT_BUILT

from .build_options import build_flags, take_build_options
from .parameters import FORCE, TIE, emit, json_option

if TYPE_CHECKING:
    from flabc.exports import Candidate


@click.command()
@click.argument("checkpoint", required=False)
@click.option("-o", "--output", type=click.Path(), help="The engine folder to write.")
@click.option(
    "--target", help="What to make: onnx, openvino, onnx-standard, tensorrt, or gguf for llama.cpp.  [default: onnx]"
)
@click.option(
    "--precision",
    help="fp32, fp16 or bf16; for onnx also int8, int4, or auto: the fastest here; for openvino fp32, int8 or auto; "
    "for gguf fp16, fp32, bf16 or int8.  [default: the first; for tensorrt fp16]",
)
@click.option(
    "--kl-bound",
    default=0.02,
    show_default=True,
    help="With auto: the most it may differ from the model, nats a token.",
)
@click.option("--compute", help="What an engine of int8 or int4 computes in: fp32, fp16 or bf16.  [default: fp32]")
@click.option("--block-size", type=int, help="Numbers of int8 or int4 that share a scale: 16 to 256.  [default: 32]")
@click.option(
    "--symmetric/--asymmetric", default=None, help="Whether blocks are without zero points.  [default: symmetric]"
)
@click.option("--embedding", help="Of int8 or int4: the embedding in int4, int8 or full.  [default: int8]")
@click.option("--head", help="The output matrix likewise; stored once if it is the embedding's.  [default: int8]")
@click.option(
    "--activations",
    help="OpenVINO, int8: what matrices are multiplied with: numbers of 8 bits with a scale for 32 (blocks) or for a "
    "whole token (tokens), or as computed (full).  [default: blocks]",
)
@build_flags
@TIE
@FORCE
@json_option
def export(
    checkpoint: str | None,
    output: str | None,
    target: str | None,
    precision: str | None,
    kl_bound: float,
    tie: bool,
    force: bool,
    as_json: bool,
    **details: Any,
) -> None:
    """Turn CHECKPOINT, or any dense model, into an engine folder or a GGUF, proven against torch.

    Beside a flabc.yaml and without arguments, both the pruned and the dense engine are made. Where an engine for
    TensorRT cannot be built, graph and build plan are written and the exit code is 3.

    \b
    flabc export pruned -o engine
    flabc export smollm2-135m -o dense-engine
    flabc export pruned -o small-engine --precision int4 --block-size 128
    flabc export pruned -o intel-engine --target openvino --precision auto
    flabc export pruned --target gguf --precision bf16 -o for-llama-cpp
    flabc export pruned --target tensorrt --max-batch 4 -o for-tensorrt
    """
    from flabc import api, artifact
    from flabc.export.precision import Storage
    from flabc.project import Project, find, need, settle

    if checkpoint is not None:
        project = find() or Project(model=checkpoint)
        jobs = [(checkpoint, settle(output, "engine", "output folder (-o)"))]
    else:
        project = need("CHECKPOINT")
        jobs = [(project.checkpoint, output or project.engine), (project.model, project.baseline)]
    if precision is None and target in (None, project.target):  # the project's is meant for its target
        precision = project.precision
    target = target or project.target
    build = take_build_options(details)
    how: dict[str, Any] = {"target": target, "precision": precision, "storage": Storage(**details), "build": build}
    for _, out in jobs:  # the second would be found taken only when the first is made
        artifact.check_free(out, force=force)
    done = [api.export(str(source), out, **how, kl_bound=kl_bound, tie=tie, force=force) for source, out in jobs]
    data = done[0] if checkpoint else {"engines": [result.model_dump(mode="json") for result in done]}

    def show() -> None:
        for result in done:
            for tried in result.candidates:
                click.echo(_tried(tried), err=True)
            size = f"{result.spec.num_parameters / 1e6:.1f} M parameters, {result.precision}"
            click.echo(f"{result.path}: {size}; {_agreement(result.parity)}")

    emit(as_json, data, show)
    if unbuilt := [result for result in done if result.missing]:
        for result in unbuilt:
            click.echo(f"{result.path}: no TensorRT engine was built: {result.missing}", err=True)
        click.get_current_context().exit(NOT_BUILT)


def _agreement(parity: Mapping[str, Any]) -> str:
    """How near an engine is to torch, in words."""
    if "tolerance" not in parity:  # weights are rounded
        return f"KL to torch {parity['kl']:.2g} nats, the same most likely token at {parity['top1_agreement']:.1%}"
    rounding = parity.get("rounding", {}).get("max_relative")
    near = f"logits within {parity['max_relative']:.1g} of torch, {parity['greedy_steps']:.0f} greedy tokens agree"
    return near + (f"; rounding moved logits by up to {rounding:.1g}" if rounding is not None else "")


def _tried(candidate: Candidate) -> str:
    """A line about a precision that was tried."""
    details = " ".join(f"{key}={value}" for key, value in candidate.storage.items())
    name = f"  {candidate.precision} {details}"
    if candidate.total_ms is None:
        return f"{name:<22} {candidate.verdict}"
    return (
        f"{name:<22} {candidate.mib:7.0f} MiB  KL {candidate.kl:.1e}  prefill {candidate.prefill_tokens_per_s:6.0f} "
        f"tokens/s  decode {candidate.decode_tokens_per_s:6.1f} tokens/s  {candidate.verdict}"
    )
