"""The command line: parse, one call of ``flabc.api``, print. Imports nothing heavy until a command runs.

Data goes to stdout, progress and notes to stderr. With ``--json`` stdout holds one object and nothing else.
"""

from __future__ import annotations

import json
import os
import sys
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from flabc import __version__
from flabc.commands.build_options import build_flags, take_build_options
from flabc.commands.data import data
from flabc.commands.gate import gate
from flabc.commands.parameters import AT_LEAST_ONE, Group, Numbers, Size, json_option
from flabc.commands.recover import recover
from flabc.commands.search import search
from flabc.commands.serve import serve
from flabc.errors import NOT_BUILT, FlabcError, UsageError

if TYPE_CHECKING:
    from flabc.api import Compressed, Diff, Inspection
    from flabc.exports import Candidate

FORCE = click.option("--force", is_flag=True, help="Replace an output folder that is not empty.")
TIE = click.option("--tie", is_flag=True, help="Tie input and output matrices that a GGUF stores twice.")
CORPUS = click.option(
    "--corpus",
    default="python-stdlib",
    show_default=True,
    help="A built-in corpus, or a file or folder of text.",
)


def emit(as_json: bool, data: Any, show: Callable[[], None]) -> None:
    """Print a result: as JSON, or for a person."""
    if not as_json:
        show()
        return
    plain = data.model_dump(mode="json") if hasattr(data, "model_dump") else data
    click.echo(json.dumps(plain, indent=2, ensure_ascii=False))


@click.group(cls=Group, context_settings={"help_option_names": ["-h", "--help"], "max_content_width": 100})
@click.version_option(__version__, prog_name="flabc")
def cli() -> None:
    """Cut a code language model, prove what it cost, and ship the engine.

    \b
    flabc init --model smollm2-135m && flabc compress && flabc export && flabc bench
    """


@cli.command()
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


@cli.command()
@click.argument("model", required=False)
@click.option("--recipe", help="A shipped recipe or a YAML file.  [default: flab-22]")
@click.option("-o", "--output", type=click.Path(), help="The checkpoint folder to write.")
@click.option("--set", "overrides", multiple=True, metavar="PATH=VALUE", help="Change the recipe; repeatable.")
@click.option("--dry-run", is_flag=True, help="Plan and measure every cut, write nothing.")
@click.option("--device", default="cpu", show_default=True, help="A torch device.")
@click.option("--seed", type=int, help="Picks the calibration text.  [default: 0]")
@click.option("--memory", type=Size(), help="Memory that may be used, e.g. 6GiB.  [default: what is free]")
@click.option("--allow-pickle", is_flag=True, help="Read weights that are only there as pickles (.bin).")
@TIE
@FORCE
@json_option
def compress(
    model: str | None,
    recipe: str | None,
    output: str | None,
    overrides: Sequence[str],
    dry_run: bool,
    device: str,
    seed: int | None,
    memory: int | None,
    allow_pickle: bool,
    tie: bool,
    force: bool,
    as_json: bool,
) -> None:
    """Cut MODEL by a recipe and write a checkpoint that plain transformers loads.

    Beside a flabc.yaml no argument is needed.

    \b
    flabc compress smollm2-135m --recipe flab-22 -o pruned
    flabc compress smollm2-135m -o pruned --set target.params=0.7 --set stages.widths.score=wanda
    """
    from flabc import api
    from flabc.project import Project, find, settle

    model = settle(model, "model", "MODEL")
    output = None if dry_run else settle(output, "checkpoint", "output folder (-o)")
    project = find() or Project(model=model)
    done = api.compress(
        model,
        recipe or project.recipe,
        output,
        overrides=overrides,
        device=device,
        seed=project.seed if seed is None else seed,
        tie=tie,
        memory=memory,
        allow_pickle=allow_pickle,
        force=force,
    )
    emit(as_json, done, lambda: _show_compressed(done))


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


@cli.command()
@click.argument("checkpoint", required=False)
@click.option("-o", "--output", type=click.Path(), help="The engine folder to write.")
@click.option("--target", help="What to make: onnx, onnx-standard, tensorrt, or gguf for llama.cpp.  [default: onnx]")
@click.option(
    "--precision",
    help="fp32, fp16 or bf16; for onnx also int8, int4, or auto: the fastest here; for gguf fp16, fp32, bf16 or int8. "
    " [default: the first; for tensorrt fp16]",
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
    flabc export pruned --target gguf --precision bf16 -o for-llama-cpp
    flabc export pruned --target tensorrt --max-batch 4 -o for-tensorrt
    """
    from flabc import api
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


@cli.command()
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
    from flabc.project import settle
    from flabc.runtime.backend import Limits
    from flabc.runtime.sampling import SamplingParams
    from flabc.runtime.session import Session

    text = prompt if prompt is not None else sys.stdin.read()
    try:
        params = SamplingParams(stop=tuple(stop), **sampling)
    except ValueError as error:
        raise UsageError(f"These sampling options do not fit: {error}") from error
    limits = Limits(max_length=max_length, threads=threads, provider=provider)
    session = Session.open(settle(engine, "engine", "ENGINE"), limits=limits)
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


@cli.command("eval")
@click.argument("target", required=False)
@click.option(
    "--task",
    default="perplexity",
    show_default=True,
    help="perplexity, kl, humaneval, mbpp, evoeval, crux, crux-input, output-prediction, mined[:dev], "
    "robustness[:KIND,...] or lm-eval:TASK,...",
)
@click.option("--baseline", help="The model to compare with, asked in the same way.")
@click.option("-o", "--output", type=click.Path(), help="The report folder to write; a run cut off goes on there.")
@click.option("--data", type=click.Path(exists=True, path_type=Path), help="The task's file; for lm-eval a folder.")
@CORPUS
@click.option("--chat", is_flag=True, help="Ask through the chat template instead of letting the model go on.")
@click.option("--samples", type=AT_LEAST_ONE, default=1, show_default=True, help="Answers per problem, for pass@k.")
@click.option("--temperature", default=0.0, show_default=True, help="0 takes the most likely token.")
@click.option("--top-p", default=1.0, show_default=True, help="Sample from this much probability.")
@click.option("--max-tokens", type=AT_LEAST_ONE, default=300, show_default=True, help="Tokens of an answer at most.")
@click.option("--limit", type=AT_LEAST_ONE, help="The first so many problems or documents only.")
@click.option("--batch", type=AT_LEAST_ONE, default=64, show_default=True, help="Sequences, or requests, at once.")
@click.option("--threads", type=AT_LEAST_ONE, help="Threads for the computation.")
@click.option("--dtype", default="float32", show_default=True, help="What torch computes in: float32 or bfloat16.")
@click.option("--timeout", "timeout_s", default=10.0, show_default=True, help="Seconds that a program may take.")
@click.option("--seed", default=0, show_default=True, help="Makes sampling repeatable.")
@click.option("--tokenizer", type=click.Path(exists=True, path_type=Path), help="For lm-eval over a server: a folder.")
@click.option("--allow-code-execution", is_flag=True, help="Let code that the model wrote run, in a sandbox.")
@click.option("--diff", nargs=2, type=click.Path(exists=True), help="Two report folders: problems gained and lost.")
@TIE
@FORCE
@json_option
def evaluate(
    target: str | None,
    baseline: str | None,
    output: str | None,
    diff: tuple[str, str] | None,
    tie: bool,
    force: bool,
    as_json: bool,
    **options: Any,
) -> None:
    """Measure the quality of TARGET, alone or beside a baseline, through what will serve it.

    TARGET is an engine, a checkpoint, a model, or the URL of an OpenAI-compatible server (key in OPENAI_API_KEY).

    \b
    flabc eval engine --task perplexity
    flabc eval engine --baseline dense-engine --task humaneval --allow-code-execution -o quality
    flabc eval http://localhost:8000 --task lm-eval:arc_easy --tokenizer engine
    flabc eval --diff quality-monday quality-friday
    """
    from flabc import api
    from flabc.project import settle
    from flabc.runtime.evaluate.task import EvalOptions

    if diff is not None:
        changes = api.diff(*diff)
        emit(as_json, changes, lambda: _show_diff(changes))
        return
    try:
        parsed = EvalOptions(**options)
    except ValueError as error:
        raise UsageError(f"These options do not fit: {error}") from error
    model = settle(target, "engine", "TARGET")
    result = api.evaluate(model, parsed, baseline=baseline, output=output, tie=tie, force=force)

    def show() -> None:
        from flabc.perf import evaluation

        click.echo(evaluation.table(result.rows))
        for missing in result.unprotected:
            click.echo(f"sandbox: {missing}", err=True)
        if output is not None:
            click.echo(f"report: {Path(output).absolute() / evaluation.HTML}")

    emit(as_json, result, show)


@cli.command()
@click.argument("engine", required=False)
@click.option("--baseline", type=click.Path(), help="The engine to compare with.")
@click.option("-o", "--output", type=click.Path(), help="The report folder to write.")
@click.option(
    "--prompt-tokens",
    type=Numbers(),
    default="128",
    show_default=True,
    help="Tokens of each prompt; or several, 128,512.",
)
@click.option("--batch", type=Numbers(), default="1", show_default=True, help="Sequences at once; or several, 1,8.")
@click.option(
    "--output-tokens", type=click.IntRange(2), default=64, show_default=True, help="Tokens that each run produces."
)
@click.option(
    "--rounds", type=AT_LEAST_ONE, default=5, show_default=True, help="Rounds of dense, pruned, pruned, dense."
)
@click.option("--threads", type=AT_LEAST_ONE, help="Threads for the computation.")
@CORPUS
@FORCE
@json_option
def bench(
    engine: str | None,
    baseline: str | None,
    output: str | None,
    prompt_tokens: Sequence[int],
    batch: Sequence[int],
    output_tokens: int,
    rounds: int,
    threads: int | None,
    corpus: str,
    force: bool,
    as_json: bool,
) -> None:
    """Measure ENGINE beside a baseline and write a report.

    Several lengths or batches are a sweep: the first of each is measured in full, then every combination.

    \b
    flabc bench engine --baseline dense-engine -o report
    flabc bench engine --baseline dense-engine --batch 1,4,16 --prompt-tokens 128,1024 -o sweep
    """
    from flabc import api
    from flabc.project import settle
    from flabc.runtime.measure.result import Workload

    first, *sweep = (
        Workload(prompt_tokens=length, batch=size, output_tokens=output_tokens, rounds=rounds, threads=threads)
        for length in prompt_tokens
        for size in batch
    )
    done = api.bench(
        settle(engine, "engine", "ENGINE"),
        settle(baseline, "baseline", "--baseline"),
        settle(output, "report", "report folder (-o)"),
        workload=first,
        sweep=sweep,
        corpus=corpus,
        force=force,
    )

    def show() -> None:
        from rich.console import Console

        from flabc.perf import table

        Console().print(table.as_rich(table.rows(api.read_bench(done.path))))
        click.echo(f"report: {done.html.absolute()}")

    emit(as_json, done, show)


@cli.command()
@click.argument("name", required=False)
@click.option("--schema", is_flag=True, help="Print the JSON schema of recipes.")
@json_option
def recipes(name: str | None, schema: bool, as_json: bool) -> None:
    """List the shipped recipes, or show the one called NAME.

    \b
    flabc recipes
    flabc recipes flab-22 > mine.yaml
    """
    from flabc import recipe

    if schema:
        click.echo(json.dumps(recipe.Recipe.model_json_schema(), indent=2))
        return
    if name is not None:
        loaded = recipe.load(name)
        text = recipe.find(name).read_text(encoding="utf-8")
        emit(as_json, loaded, lambda: click.echo(text, nl=False))
        return
    known = [recipe.load(each) for each in recipe.shipped()]
    data = [{"name": each.name, "description": each.description} for each in known]

    def show() -> None:
        for each in known:
            click.echo(f"{each.name:<12} {each.description}")

    emit(as_json, {"recipes": data}, show)


@cli.command()
@click.option("--model", default="smollm2-135m", show_default=True, help="The model that the project is about.")
@click.option("--recipe", default="flab-22", show_default=True, help="A shipped recipe or a YAML file.")
@click.option("--force", is_flag=True, help="Write anew over a flabc.yaml that is there.")
@json_option
def init(model: str, recipe: str, force: bool, as_json: bool) -> None:
    """Write a commented flabc.yaml; beside it the commands need no arguments.

    \b
    flabc init --model smollm2-135m && flabc compress && flabc export && flabc bench
    """
    from flabc import project
    from flabc import recipe as recipes_module

    recipes_module.load(recipe)  # an unknown name is told now, not at the first compress
    file = project.init(Path(), model, recipe, force=force)
    emit(as_json, {"file": str(file)}, lambda: click.echo(f"wrote {file}; next: flabc compress"))


@cli.command()
@json_option
def doctor(as_json: bool) -> None:
    """Say what this machine can do and how to get what is missing.

    \b
    flabc doctor
    """
    from flabc import api

    findings = api.doctor()

    def show() -> None:
        signs = {"ok": "ok     ", "missing": "missing", "problem": "PROBLEM"}
        for finding in findings:
            fix = f"  → {finding.fix}" if finding.fix else ""
            click.echo(f"{signs[finding.status]}  {finding.name:<26} {finding.detail}{fix}")

    emit(as_json, {"findings": [finding.model_dump() for finding in findings]}, show)


cli.add_command(data)
cli.add_command(recover)
cli.add_command(search)
cli.add_command(serve)
cli.add_command(gate)


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


def _show_diff(changes: Diff) -> None:
    click.echo(f"{changes.task}, {changes.compared} problems: {changes.before} → {changes.after}")
    for sign, names in (("+", changes.gained), ("-", changes.lost)):
        for name in names:
            click.echo(f"{sign} {name}")
    click.echo(f"{len(changes.gained)} gained, {len(changes.lost)} lost")


def _show_compressed(done: Compressed) -> None:
    bits = done.quality["heldout_bits_per_byte"]
    click.echo(
        f"{done.dense.num_parameters / 1e6:.1f} M → {done.spec.num_parameters / 1e6:.1f} M parameters "
        f"({done.kept - 1:+.1%}); held-out bits per byte {bits['dense']:.3f} → {bits['pruned']:.3f}"
    )
    click.echo(f"wrote {done.path}" if done.path else "dry run: nothing written")


def main() -> None:
    """Run the command line; every failure is one readable paragraph and an exit code."""
    try:
        code = cli.main(standalone_mode=False)
        sys.exit(code if isinstance(code, int) else 0)
    except click.ClickException as error:
        error.show()
        sys.exit(error.exit_code)
    except (click.Abort, KeyboardInterrupt):
        sys.exit(_fail("Interrupted.", 130))
    except BrokenPipeError:
        # Whoever read our output has gone; do not let the interpreter complain while flushing.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        sys.exit(1)
    except FlabcError as error:
        sys.exit(_fail(str(error), error.exit_code))
    except Exception as error:
        if os.environ.get("FLABC_TRACEBACK"):
            raise
        text = f"{type(error).__name__}: {error}".rstrip(". ")
        sys.exit(_fail(f"Unexpected {text}. Set FLABC_TRACEBACK=1 to see where.", 1))


def _fail(message: str, code: int) -> int:
    if "--json" in sys.argv:
        click.echo(json.dumps({"error": message}, ensure_ascii=False))
    click.echo(f"flabc: {message}", err=True)
    return code
