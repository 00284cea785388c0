"""``flabc run``."""

from __future__ import annotations

import json
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import click

from flabc.errors import UsageError

from .parameters import AT_LEAST_ONE, json_option


@click.command()
@click.argument("engine", required=False)
@click.argument("prompt", required=False)
@click.option("--chat", is_flag=True, help="Put the prompt through the model's chat template.")
@click.option("--max-tokens", default=128, show_default=True, help="Tokens to produce at most.")
@click.option("--temperature", default=0.0, show_default=True, help="0 takes the most likely token.")
@click.option("--top-p", default=1.0, show_default=True, help="Sample from this much probability.")
@click.option("--top-k", default=0, show_default=True, help="Sample from so many tokens; 0 from all.")
@click.option("--min-p", default=0.0, show_default=True, help="Sample from tokens with this share of the likeliest's.")
@click.option("--repetition-penalty", default=1.0, show_default=True, help="Above 1: say less again.")
@click.option("--stop", multiple=True, help="A text that ends the answer; repeatable.")
@click.option("--seed", type=int, help="Makes sampling repeatable.")
@click.option(
    "--max-length", type=AT_LEAST_ONE, default=2048, show_default=True, help="Room for prompt and answer together."
)
@click.option("--threads", type=AT_LEAST_ONE, help="Threads for the computation.")
@click.option("--provider", default="auto", show_default=True, help="Where to run: cpu, cuda or tensorrt.")
@json_option
def run(
    engine: str | None,
    prompt: str | None,
    chat: bool,
    stop: Sequence[str],
    max_length: int,
    threads: int | None,
    provider: str,
    as_json: bool,
    **sampling: Any,
) -> None:
    """Let ENGINE go on from PROMPT, streaming; without PROMPT it is read from stdin.

    \b
    flabc run engine "def fibonacci(n):"
    flabc run engine --chat "Write a function that reverses a string."
    """
    from flabc.frozen import fitting
    from flabc.project import settle
    from flabc.runtime.backend import Limits
    from flabc.runtime.sampling import SamplingParams
    from flabc.runtime.session import Session

    folder = Path(settle(engine, "engine", "ENGINE"))
    if prompt is None and not folder.is_dir():  # more likely a prompt than a folder: do not wait for another
        raise UsageError(f"There is no folder {str(folder)!r}.", expected="ENGINE and PROMPT")
    params = fitting(SamplingParams, {"stop": tuple(stop), **sampling})
    limits = Limits(max_length=max_length, threads=threads, provider=provider)
    session = Session.open(folder, limits=limits)
    text = prompt if prompt is not None else sys.stdin.read()
    asked = [{"role": "user", "content": text}] if chat else text
    if as_json:
        answer = session.generate(asked, params)
        click.echo(json.dumps(vars(answer), indent=2, ensure_ascii=False))
        return
    if not chat:
        click.echo(text, nl=False)
    for chunk in session.stream(asked, params):
        click.echo(chunk.text, nl=False)
    click.echo()
