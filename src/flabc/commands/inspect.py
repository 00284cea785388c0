"""``flabc inspect``."""

from __future__ import annotations

from typing import TYPE_CHECKING

import click

from .parameters import emit, json_option

if TYPE_CHECKING:
    from flabc.api import Inspection


@click.command()
@click.argument("model")
@json_option
def inspect(model: str, as_json: bool) -> None:
    """Say what MODEL is made of and what each cut could save.

    MODEL is a Hugging Face folder, a hub id, a GGUF file, or a built-in alias (smollm2-135m).

    \b
    flabc inspect smollm2-135m
    """
    from flabc import api

    found = api.inspect(model)
    emit(as_json, found, lambda: _show_inspection(found))


def _show_inspection(found: Inspection) -> None:
    spec = found.spec
    click.echo(f"{found.model}: {spec.family}, {len(spec.layers)} layers, hidden {spec.hidden_size}")
    for part, count in found.parameters.items():
        share = count / found.total_parameters
        click.echo(f"  {part:<12} {count / 1e6:9.2f} M  {share:6.1%}")
    click.echo(f"  {'total':<12} {found.total_parameters / 1e6:9.2f} M")
    sizes = ", ".join(f"{precision} {count / 1e6:.0f} MB" for precision, count in found.bytes.items())
    click.echo(f"bytes: {sizes}")
    click.echo(f"KV cache: {found.kv_bytes_per_token['fp32']:,} bytes per token in fp32, half in fp16")
    click.echo("what a cut saves:")
    for cut, count in found.savings.items():
        click.echo(f"  {cut:<36} {count / 1e6:7.2f} M  {count / found.total_parameters:6.1%}")
    if found.can_tie:
        saved = spec.vocab_size * spec.hidden_size
        click.echo(f"The output matrix repeats the embedding: --tie saves {saved / 1e6:.1f} M parameters.")
