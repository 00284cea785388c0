"""A search from a model to a recipe: the recipe is what compress takes, and a search that is killed goes on."""

from __future__ import annotations

import csv
import json
import os
import shutil
import signal
import sqlite3
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any
from xml.etree import ElementTree

import pytest
import yaml
from click.testing import CliRunner

from flabc import api, recipe, searching, sweeping
from flabc.cli import cli
from flabc.commands.parameters import FRACTIONS
from flabc.compress.search import population, spread
from flabc.compress.search.fitness import Rung
from flabc.compress.search.latencies import Latencies
from flabc.compress.search.population import Population
from flabc.compress.sensitivity import levels_of
from flabc.errors import ArtifactError, CorpusError, LanguageModelError, UnknownNameError, UsageError
from flabc.searching import Options, Searched

SMALL = Options(evaluations=40, offspring=8, levels=6, sequences=(2, 6))


pytestmark = pytest.mark.usefixtures("one_thread")


@pytest.fixture(scope="module")
def corpus(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A little text, so that reading it takes no time."""
    from flabc.compress.data.corpus import load

    folder = tmp_path_factory.mktemp("corpus")
    for side in ("calibration", "heldout"):
        for at, document in enumerate([d for d in load("python-stdlib", side) if 1600 < len(d.text) < 12_000][:24]):
            (folder / f"{side}-{at}.py").write_text(document.text, encoding="utf-8")
    return folder


@pytest.fixture(scope="module")
def wanted(tmp_path_factory: pytest.TempPathFactory, corpus: Path) -> Path:
    """A recipe that cuts the vocabulary and a layer before, and refits after."""
    file = tmp_path_factory.mktemp("wanted") / "wanted.yaml"
    content = {
        "name": "wanted",
        "target": {"params": 0.72},
        "calibration": {"corpus": str(corpus), "sequences": 6, "sequence_length": 48},
        "stages": [
            {"stage": "vocab", "max_size": 640},
            {"stage": "widths", "of": ["ffn", "heads"], "multiple_of": 8, "score": "wifv"},
            {"stage": "restore"},
        ],
    }
    file.write_text(yaml.safe_dump(content), encoding="utf-8")
    return file


@pytest.fixture(scope="module")
def model(tiny: Callable[[str], Path]) -> str:
    return str(tiny("qwen2-tied"))


@pytest.fixture(scope="module")
def unbroken(model: str, wanted: Path, tmp_path_factory: pytest.TempPathFactory) -> Searched:
    return searching.search(model, wanted, tmp_path_factory.mktemp("searched") / "out", SMALL)


def test_what_is_found_is_a_recipe_that_compress_takes(model: str, wanted: Path, unbroken: Searched) -> None:
    found = recipe.load(unbroken.path / "recipe.yaml")
    assert found.model_dump(exclude={"name", "description", "stages"}) == recipe.load(wanted).model_dump(
        exclude={"name", "description", "stages"}
    )
    done = api.compress(model, unbroken.path / "recipe.yaml", None)
    left = [(layer.intermediate_size, layer.num_key_value_heads) for layer in done.spec.layers]
    assert left == list(zip(unbroken.ffn, unbroken.heads, strict=True))
    assert done.spec.num_parameters == unbroken.best.parameters
    assert 0.70 < done.kept <= 0.72


def test_evolution_is_better_than_uniform_and_says_so(unbroken: Searched) -> None:
    assert unbroken.evaluations == 40
    assert unbroken.best.kl < unbroken.uniform.kl
    with (unbroken.path / "candidates.csv").open() as file:
        rows = list(csv.DictReader(file))
    assert [row["origin"] for row in rows] == ["uniform"] + ["mutation"] * 39
    whole = [float(row["kl"]) for row in rows if row["rungs"] == "2"]
    assert min(whole) == unbroken.best.kl
    assert float(rows[0]["kl"]) == unbroken.uniform.kl
    assert 10 <= len(whole) < 20  # the first, and a quarter of the others
    summary = json.loads((unbroken.path / "search.json").read_text())
    assert Searched.model_validate({**summary, "path": unbroken.path}) == unbroken


def test_candidates_are_refitted_if_a_stage_that_follows_does_it(model: str, wanted: Path, tmp_path: Path) -> None:
    kl = {}
    for refits in ("here", "later", "never"):
        content = yaml.safe_load(wanted.read_text())
        content["stages"][1]["restore"] = refits == "here"
        if refits == "never":
            content["stages"].pop()
        given = recipe.parse(content, refits)
        options = SMALL.model_copy(update={"operator": "uniform", "evaluations": 1})
        found = searching.search(model, given, tmp_path / refits, options)
        assert found.recipe["stages"][1].get("restore", True) == (refits == "here")
        kl[refits] = found.best.kl
    assert kl["here"] == kl["later"]
    assert kl["later"] != kl["never"]


def files_of(folder: Path) -> dict[str, str]:
    return {name: (folder / name).read_text() for name in ("recipe.yaml", "candidates.csv", "search.json")}


def evaluated(journal: Path) -> list[tuple[Any, ...]]:
    try:
        with sqlite3.connect(f"file:{journal}?mode=ro", uri=True) as connection:
            return connection.execute("SELECT genome, rung, kl FROM evaluations ORDER BY rowid").fetchall()
    except sqlite3.OperationalError:  # not there yet
        return []


def test_a_search_that_is_killed_goes_on_to_the_same_end(
    model: str, wanted: Path, unbroken: Searched, tmp_path: Path
) -> None:
    out = tmp_path / "out"
    command = [sys.executable, "-m", "flabc", "search", model, "--recipe", str(wanted), "-o", str(out)]
    command += ["--evaluations", "40", "--offspring", "8", "--levels", "6", "--sequences", "2,6"]
    with subprocess.Popen(command, env={**os.environ, "OMP_NUM_THREADS": "1"}, stderr=subprocess.PIPE) as process:
        deadline = time.monotonic() + 120
        while len(evaluated(out / "journal.sqlite")) < 14 and process.poll() is None and time.monotonic() < deadline:
            time.sleep(0.002)
        process.send_signal(signal.SIGKILL)
        assert process.wait() == -signal.SIGKILL
    before = evaluated(out / "journal.sqlite")
    whole = evaluated(unbroken.path / "journal.sqlite")
    assert 14 <= len(before) < len(whole)
    with pytest.raises(ArtifactError, match="not empty"):
        searching.search(model, wanted, out, SMALL)
    with pytest.raises(UsageError, match="of another search: seed differ"):
        searching.search(model, wanted, out, SMALL, seed=1, resume=True)
    found = searching.search(model, wanted, out, SMALL, resume=True)
    assert found.model_dump(exclude={"path"}) == unbroken.model_dump(exclude={"path"})
    assert files_of(out) == files_of(unbroken.path)
    after = evaluated(out / "journal.sqlite")
    assert after[: len(before)] == before  # nothing lost
    assert len(after) == len({row[:2] for row in after}) == len(whole)  # nothing twice
    assert sorted(after) == sorted(whole)


def test_a_recipe_that_was_found_is_a_start_for_another_target(model: str, unbroken: Searched, tmp_path: Path) -> None:
    few = SMALL.model_copy(update={"evaluations": 1})
    found = searching.search(model, unbroken.path / "recipe.yaml", tmp_path / "out", few, target=0.68)
    assert found.best.kl < found.uniform.kl
    assert found.best.parameters <= round(0.68 / 0.72 * unbroken.best.parameters) + 400
    assert "start" in (tmp_path / "out" / "candidates.csv").read_text()


def test_sub_blocks_may_go(model: str, wanted: Path, tmp_path: Path) -> None:
    options = SMALL.model_copy(update={"operator": "random", "evaluations": 24, "sub_blocks": True})
    found = searching.search(model, wanted, tmp_path / "out", options, target=0.5)
    done = api.compress(model, tmp_path / "out" / "recipe.yaml", None)
    assert done.spec.num_parameters == found.best.parameters
    assert done.kept <= 0.5


def test_text_that_was_searched_on_is_not_evaluated_on(model: str, wanted: Path, corpus: Path, tmp_path: Path) -> None:
    options = SMALL.model_copy(update={"evaluate_on": (str(corpus),)})
    with pytest.raises(CorpusError, match="searched on"):
        searching.search(model, wanted, tmp_path / "out", options)


def test_what_cannot_be_done_is_refused_before_any_work(wanted: Path, tmp_path: Path) -> None:
    def search(**fields: Any) -> Searched:
        return searching.search("nowhere", wanted, tmp_path / "out", SMALL.model_copy(update=fields))

    with pytest.raises(UnknownNameError, match="Did you mean 'evolution'"):
        search(operator="evolutoin")
    with pytest.raises(UsageError, match=r"rising numbers up to calibration.sequences, 6. Found: 4, 2"):
        search(sequences=(4, 2))
    with pytest.raises(UsageError, match="has 0"):
        searching.search("nowhere", recipe.load(wanted).model_copy(update={"stages": ()}), tmp_path / "out")
    with pytest.raises(UnknownNameError, match="Unknown model 'nowhere'"):
        search()
    assert not (tmp_path / "out").exists()


def test_a_transcript_is_replayed_and_written_anew(model: str, wanted: Path, tmp_path: Path) -> None:
    said = {"candidates": [{"how": "initial", "ffn": [0.1, 0.3, 0.5], "heads": [0, 0.5, 0]}]}
    file = tmp_path / "said.jsonl"
    lines = [json.dumps({"text": text, "prompt_tokens": 9, "completion_tokens": 4}) for text in ("?", json.dumps(said))]
    file.write_text("".join(f"{line}\n" for line in lines))
    options = SMALL.model_copy(update={"operator": "llm", "evaluations": 1, "llm_replay": file})
    found = searching.search(model, wanted, tmp_path / "out", options)
    assert (found.asked, found.valid, found.prompt_tokens, found.completion_tokens) == (2, 1, 18, 8)
    assert found.ffn[0] >= found.ffn[1] >= found.ffn[2] < found.ffn[0]
    assert (tmp_path / "out" / "transcript.jsonl").read_text() == file.read_text()
    more = options.model_copy(update={"evaluations": 3})
    with pytest.raises(LanguageModelError, match="no more replies than 2"):
        searching.search(model, wanted, tmp_path / "out", more, resume=True)
    more = more.model_copy(update={"fallback": "evolution"})
    assert searching.search(model, wanted, tmp_path / "out", more, resume=True).evaluations == 3
    with pytest.raises(UsageError, match="nobody to ask"):
        searching.search(model, wanted, tmp_path / "other", Options(operator="llm"))
    both = options.model_copy(update={"llm_folder": model})
    with pytest.raises(UsageError, match="nobody to ask, or several"):
        searching.search(model, wanted, tmp_path / "other", both)


def test_a_model_here_is_asked_and_counted(model: str, wanted: Path, tmp_path: Path) -> None:
    """A random one says nothing of use, which is counted."""
    talker = shutil.copytree(model, tmp_path / "talker")
    config = json.loads((talker / "config.json").read_text())
    (talker / "config.json").write_text(json.dumps(config | {"max_position_embeddings": 2048}))
    asked = {"operator": "llm", "evaluations": 3, "llm_folder": str(talker), "fallback": "evolution"}
    found = searching.search(model, wanted, tmp_path / "out", SMALL.model_copy(update=asked))
    assert found.asked >= 2
    assert (found.valid, found.evaluations) == (0, 3)
    replies = [json.loads(line) for line in (tmp_path / "out" / "transcript.jsonl").read_text().splitlines()]
    assert len({reply["text"] for reply in replies}) == found.asked  # another seed for each
    assert found.completion_tokens == sum(reply["completion_tokens"] for reply in replies) > 0
    assert found.prompt_tokens > 100 * found.asked


def test_the_command_prints_a_table_or_one_object(model: str, wanted: Path, tmp_path: Path) -> None:
    arguments = ["search", model, "--recipe", str(wanted), "--operator", "uniform", "--sequences", "3"]
    shown = CliRunner().invoke(cli, [*arguments, "-o", str(tmp_path / "out")], catch_exceptions=False)
    assert [line.split()[0] for line in shown.stdout.splitlines()] == ["parameters", "uniform"]
    told = CliRunner().invoke(
        cli, [*arguments, "-o", str(tmp_path / "out"), "--force", "--json"], catch_exceptions=False
    )
    assert json.loads(told.stdout)["evaluations"] == 1
    wrong = CliRunner().invoke(cli, [*arguments, "-o", "x", "--sequences", "two"])
    assert "apart by commas" in wrong.stderr


def test_a_sweep_goes_from_large_to_small(
    model: str, wanted: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    few, prepared = SMALL.model_copy(update={"evaluations": 16}), list[object]()

    def counted(*asked: Any, **more: Any) -> Any:
        prepared.append(asked)
        return levels_of(*asked, **more)

    monkeypatch.setattr(population, "levels_of", counted)
    done = sweeping.sweep(model, wanted, tmp_path / "swept", (0.7, 0.8, 0.75), few)
    assert len(prepared) == 1  # the places are cut to their levels once
    assert [point.target for point in done.points] == [0.8, 0.75, 0.7]
    dense = api.inspect(model).total_parameters
    for point in done.points:
        assert point.target - 0.02 < point.parameters / dense <= point.target
        assert point.heldout_kl > 0
    with (done.path / "sweep.csv").open() as file:
        rows = list(csv.DictReader(file))
    assert [sweeping.Point.model_validate(row) for row in rows] == list(done.points)
    for point in done.points:
        kept = api.compress(model, done.path / point.recipe, None).spec
        assert kept.num_parameters == point.parameters
    # The second search begins with what the first found, cut to its own budget.
    with (done.path / "0.75" / "candidates.csv").open() as file:
        assert next(csv.DictReader(file))["origin"] == "start"
    assert ElementTree.parse(done.path / "sweep.svg").getroot().tag.endswith("svg")
    assert "parameters left, millions" in (done.path / "sweep.svg").read_text()
    again = sweeping.sweep(model, wanted, tmp_path / "swept", (0.7, 0.8, 0.75), few, resume=True)
    assert again == done


def test_a_sweep_over_time_is_drawn_over_time(
    model: str, wanted: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    layer = api.inspect(model).spec.layers[0]
    heads = {each: 3.0 * each for each in range(1, layer.num_key_value_heads + 1)}
    latencies = Latencies(ffn={layer.intermediate_size: 20.0}, heads=heads, rest=2.0)
    few = SMALL.model_copy(update={"evaluations": 16, "latencies": latencies})
    drawn, write = list[dict[str, Any]](), sweeping.write_curves

    def counted(curves: dict[str, Any], *more: Any) -> None:
        drawn.append(curves)
        write(curves, *more)

    monkeypatch.setattr(sweeping, "write_curves", counted)
    (point,) = sweeping.sweep(model, wanted, tmp_path / "swept", (0.7,), few).points
    assert drawn == [
        {
            "uniform": [(point.uniform_milliseconds, point.uniform_heldout_kl)],
            "evolution": [(point.milliseconds, point.heldout_kl)],
        }
    ]
    assert point.milliseconds != point.uniform_milliseconds
    assert "milliseconds of a step" in (tmp_path / "swept" / "sweep.svg").read_text()


def test_a_budget_of_time_is_kept(model: str, wanted: Path, tmp_path: Path) -> None:
    """A layer's attention takes most of the time here, and few of the parameters: it is what goes."""
    spec = api.inspect(model).spec
    channels, groups = spec.layers[0].intermediate_size, spec.layers[0].num_key_value_heads
    table = tmp_path / "latencies.json"
    slow = {"ffn": {channels: 1.0}, "heads": {each: 5.0 * each for each in range(1, groups + 1)}, "rest": 2.0}
    table.write_text(json.dumps(slow))
    asked = ["search", model, "--recipe", str(wanted), "--target", "0.6", "--latencies", str(table), "--json"]
    few = ["--evaluations", "16", "--offspring", "8", "--levels", "6", "--sequences", "2,6"]
    done = CliRunner().invoke(cli, [*asked, *few, "-o", str(tmp_path / "out")], catch_exceptions=False)
    found = searching.Searched.model_validate({**json.loads(done.stdout), "path": tmp_path / "out"})
    whole = 2.0 + len(spec.layers) * (1.0 + 5.0 * groups)
    assert found.best.milliseconds is not None
    assert found.best.milliseconds <= 0.6 * whole
    assert sum(found.heads) < groups * len(spec.layers)
    cut = api.compress(model, tmp_path / "out" / "recipe.yaml", None).spec
    took = 2.0 + sum(layer.intermediate_size / channels + 5.0 * layer.num_key_value_heads for layer in cut.layers)
    assert took == pytest.approx(found.best.milliseconds, abs=1e-5)
    again = CliRunner().invoke(cli, [*asked[:-1], *few, "-o", str(tmp_path / "out"), "--resume"])
    assert f"{found.best.milliseconds:.2f} ms" in again.stdout


def test_workers_find_what_one_process_finds(
    model: str, wanted: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Who the workers are, and how they stand in for this process; they themselves are tested over a real Ray."""
    asked = []

    @contextmanager
    def here(
        population: Population, portions: Sequence[Any], workers: spread.Workers, top_k: int | None
    ) -> Iterator[list[Rung]]:
        asked.append(workers)
        each = [population.on(portion, top_k) for portion in portions]
        yield [Rung(portion.weight, portion.kl) for portion in each]

    few = SMALL.model_copy(update={"evaluations": 12, "top_k": 2})
    alone = searching.search(model, wanted, tmp_path / "alone", few)
    monkeypatch.setattr(spread, "rungs", here)
    spreading = few.model_copy(update={"ray": "auto", "workers": 3})
    found = searching.search(model, wanted, tmp_path / "spread", spreading)
    assert asked == [spread.Workers(3, "auto")]
    assert found.model_dump(exclude={"path"}) == alone.model_dump(exclude={"path"})
    # A search that was begun by one goes on by many, and the other way round.
    shutil.copytree(tmp_path / "alone", tmp_path / "on")
    again = searching.search(model, wanted, tmp_path / "on", spreading, resume=True)
    assert again.model_dump(exclude={"path"}) == alone.model_dump(exclude={"path"})


def test_a_table_of_latencies_needs_a_target(model: str, wanted: Path, tmp_path: Path) -> None:
    timed = SMALL.model_copy(update={"latencies": Latencies(ffn={4096: 1.0})})
    with pytest.raises(UsageError, match=r"not how much may be.*--target"):
        searching.search(model, wanted, tmp_path / "out", timed)


@pytest.mark.parametrize(
    ("said", "meant"), [("0.5:0.9:0.1", (0.5, 0.6, 0.7, 0.8, 0.9)), ("0.7,0.65", (0.7, 0.65)), ("0.5:0.6:0.2", (0.5,))]
)
def test_targets_are_read_as_they_are_meant(said: str, meant: tuple[float, ...]) -> None:
    assert FRACTIONS(said) == meant


@pytest.mark.parametrize("said", ["1:2:0.5", "0.9:0.5:0.1", "0.5:0.9", "0.5:0.9:0", "a", ""])
def test_targets_that_make_no_sense_are_refused(said: str, tmp_path: Path) -> None:
    found = CliRunner().invoke(cli, ["search", "nothing", "--sweep", said, "-o", str(tmp_path / "out")])
    assert found.exit_code == 2
    assert "expected numbers between 0 and 1" in found.output
