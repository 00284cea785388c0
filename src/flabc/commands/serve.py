"""``flabc serve``."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import click

from flabc.errors import UsageError, require

from .parameters import AT_LEAST_ONE, Size, json_option

SECONDS = click.FloatRange(0, min_open=True)


@click.command()
@click.argument("engine", required=False)
@click.option("--host", default="127.0.0.1", show_default=True, help="The address to listen on.")
@click.option("--port", type=click.IntRange(0, 65535), default=8000, show_default=True, help="0 takes a free one.")
@click.option("--name", help="What clients call the model.  [default: the folder's name]")
@click.option(
    "--api-key-file",
    type=click.Path(exists=True, dir_okay=False, path_type=Path),
    help="Keys, one a line; a request must have one of them.",
)
@click.option("--max-batch", type=AT_LEAST_ONE, default=16, show_default=True, help="Sequences that run at once.")
@click.option(
    "--max-length", type=AT_LEAST_ONE, default=2048, show_default=True, help="Room for prompt and answer together."
)
@click.option(
    "--max-queue", type=click.IntRange(0), default=64, show_default=True, help="Sequences that may wait for room."
)
@click.option("--max-body", type=Size(), default="1MiB", show_default=True, help="The largest body of a request.")
@click.option("--timeout", type=SECONDS, default=600.0, show_default=True, help="Seconds that a request may take.")
@click.option("--drain-timeout", type=SECONDS, default=30.0, show_default=True, help="Seconds to end in when told to.")
@click.option(
    "--prefill-tokens",
    type=click.IntRange(2),
    default=256,
    show_default=True,
    help="Prompt tokens computed between two tokens of the others.",
)
@click.option(
    "--prefix-cache",
    type=Size(),
    default="256MiB",
    show_default=True,
    help="Memory for what prompts have in common; 0 for none.",
)
@click.option("--threads", type=AT_LEAST_ONE, help="Threads for the computation.")
@click.option("--ray", is_flag=True, help="Serve by several replicas, over Ray Serve.")
@click.option("--replicas", type=AT_LEAST_ONE, default=2, show_default=True, help="With --ray: how many.")
@click.option(
    "--ray-address",
    default="local",
    show_default=True,
    help="With --ray: a cluster's address, or auto; local starts a Ray of its own.",
)
@json_option
def serve(
    engine: str | None,
    host: str,
    port: int,
    name: str | None,
    api_key_file: Path | None,
    max_batch: int,
    max_length: int,
    max_queue: int,
    max_body: int,
    timeout: float,
    drain_timeout: float,
    prefill_tokens: int,
    prefix_cache: int,
    threads: int | None,
    ray: bool,
    replicas: int,
    ray_address: str,
    as_json: bool,
) -> None:
    """Serve ENGINE over an API that OpenAI's clients speak.

    SIGTERM or Ctrl-C lets the requests that were accepted end; a second one ends at once.

    \b
    flabc serve engine
    flabc serve engine --host 0.0.0.0 --api-key-file keys.txt --max-batch 32
    flabc serve engine --ray --replicas 2
    """
    for module in ("fastapi", "uvicorn", "prometheus_client"):
        require(module, "serve")
    from flabc.project import settle
    from flabc.runtime.backend import Limits
    from flabc.runtime.scheduler import Policy
    from flabc.runtime.server.app import Access

    folder = Path(settle(engine, "engine", "ENGINE"))
    known = name or folder.resolve().name
    limits = Limits(max_batch, max_length, threads=threads)
    policy = Policy(max_queue, prefill_tokens, prefix_cache, timeout)
    access = Access(_keys(api_key_file) if api_key_file else [], max_body)

    def started(port: int) -> None:
        url = f"http://{f'[{host}]' if ':' in host else host}:{port}"
        click.echo(json.dumps({"url": url, "model": known}) if as_json else f"serving {known} at {url}/v1")

    if ray:
        from flabc.runtime.server import replicas as several

        where = several.Replicas(replicas, ray_address)
        about: dict[str, Any] = {"host": host, "port": port, "drain_s": drain_timeout, "started": started}
        several.serve(folder, known, limits, policy, access, where, **about)
        return
    from flabc.runtime.server.app import build
    from flabc.runtime.server.process import listen
    from flabc.runtime.server.process import serve as run
    from flabc.runtime.session import Session

    listening = listen(host, port, timeout)
    app = build(Session.open(folder, limits=limits), known, policy, access)
    run(app, listening, drain_s=drain_timeout, started=lambda: started(listening.getsockname()[1]))


def _keys(file: Path) -> list[str]:
    try:
        text = file.read_text(encoding="utf-8-sig")  # some editors begin a file with a mark
    except UnicodeDecodeError as error:
        raise UsageError(f"{file} is no text.", expected="one key a line, in UTF-8") from error
    lines = [line.strip() for line in text.splitlines()]
    keys = [line for line in lines if line and not line.startswith("#")]
    if not keys:
        raise UsageError(f"{file} has no key.", expected="one key a line", fix="Leave --api-key-file out to need none.")
    return keys
