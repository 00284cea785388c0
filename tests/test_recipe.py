from __future__ import annotations

import json
from pathlib import Path

import pytest
import yaml

from flabc import project, recipe
from flabc.compress.criteria import CRITERIA
from flabc.compress.pipeline import STAGES
from flabc.compress.score import SCORES
from flabc.errors import ArtifactError, RecipeError, UnknownNameError, UsageError


def write(folder: Path, **content: object) -> Path:
    file = folder / "mine.yaml"
    file.write_text(yaml.safe_dump({"name": "mine"} | content))
    return file


@pytest.mark.parametrize("name", list(recipe.shipped()))
def test_every_shipped_recipe_loads_and_describes_itself(name: str) -> None:
    loaded = recipe.load(name)
    assert loaded.name == name
    assert loaded.description


def test_a_recipe_survives_being_dumped() -> None:
    loaded = recipe.load("flab-22")
    assert recipe.parse(loaded.model_dump(mode="json"), "again") == loaded


def test_the_recipe_in_the_documents_is_one() -> None:
    text = (Path(__file__).parent.parent / "docs" / "recovering.md").read_text(encoding="utf-8")
    loaded = recipe.parse(yaml.safe_load(text.partition("```yaml\n")[2].partition("```")[0]), "documents")
    assert [stage.stage for stage in loaded.stages] == ["vocab", "widths", "recover", "widths", "recover"]


def test_every_stage_that_a_recipe_can_name_can_be_run() -> None:
    schema = recipe.Recipe.model_json_schema()
    stages = schema["properties"]["stages"]["items"]["discriminator"]["mapping"]
    assert len(stages) == len(STAGES)


def test_editors_are_offered_the_registered_names() -> None:
    definitions = recipe.Recipe.model_json_schema()["$defs"]
    assert definitions["WidthsConfig"]["properties"]["score"]["enum"] == sorted(SCORES)
    assert definitions["LayersConfig"]["properties"]["criterion"]["enum"] == sorted(CRITERIA)


def test_overrides_reach_stages_by_name_and_number() -> None:
    loaded = recipe.load("flab-22", ["target.params=0.5", "stages.widths.score=wanda", "stages.0.max_size=4096"])
    assert loaded.target is not None
    assert loaded.target.params == 0.5
    assert {stage.stage: stage for stage in loaded.stages}["widths"].score == "wanda"  # type: ignore[union-attr]
    assert loaded.stages[0].max_size == 4096  # type: ignore[union-attr]


@pytest.mark.parametrize("override", ["target.params", "=3", "stages.nosuch.rate=1", "stages.9.rate=1", "name.x=1"])
def test_an_override_that_leads_nowhere_is_refused(override: str) -> None:
    with pytest.raises(RecipeError, match="override"):
        recipe.load("flab-22", [override])


@pytest.mark.parametrize(
    ("stage", "guess"),
    [
        ({"stage": "vocabs"}, "Unknown stage 'vocabs'. Did you mean 'vocab'"),
        ({"stage": "widths", "rate": 0.1, "score": "activatoin"}, "Did you mean 'activation'"),
        ({"stage": "layers", "count": 1, "criterion": "kll"}, "Did you mean 'kl'"),
        (
            {"stage": "vocab", "covrage": 0.9},
            "stages.0.vocab.covrage: Unknown field 'covrage'. Did you mean 'coverage'",
        ),
    ],
)
def test_a_misspelt_name_gets_a_guess(tmp_path: Path, stage: dict[str, object], guess: str) -> None:
    with pytest.raises((UnknownNameError, RecipeError), match=guess) as told:
        recipe.load(write(tmp_path, stages=[stage]))
    assert "at least 1 item" not in str(told.value)


def test_a_misspelt_field_gets_a_guess_at_every_depth(tmp_path: Path) -> None:
    file = write(tmp_path, stages=[{"stage": "vocab"}])
    for override, guess in (("target.parms=0.5", "params"), ("calibration.sequencs=4", "sequences"), ("nam=x", "name")):
        with pytest.raises(RecipeError, match=f"Did you mean '{guess}'"):
            recipe.load(file, [override])


def test_an_override_that_may_mean_two_stages_is_refused(tmp_path: Path) -> None:
    file = write(tmp_path, stages=[{"stage": "widths", "rate": 0.1}, {"stage": "widths", "rate": 0.2}])
    with pytest.raises(RecipeError, match=r"may mean several widths stages.*stages\.0, stages\.1"):
        recipe.load(file, ["stages.widths.score=wanda"])


@pytest.mark.parametrize("value", ["*.py", "@all", "[1", "%x"])
def test_a_value_that_is_no_yaml_says_how_to_quote_it(value: str) -> None:
    with pytest.raises(RecipeError, match=r"is no YAML.*Quote it"):
        recipe.load("flab-22", [f"calibration.corpus={value}"])


@pytest.mark.parametrize(
    ("stages", "field"),
    [
        ([{"stage": "widths", "rate": 1.5}], "rate"),
        ([{"stage": "vocab", "covrage": 0.9}], "covrage"),
        ([{"stage": "layers"}], "no 'target'"),
        ([{"stage": "layers", "count": 1, "fraction": 0.1}], "at most one"),
        ([], "stages"),
        ([{"stage": "widths"}], "no 'target'"),
    ],
)
def test_a_wrong_field_is_named(tmp_path: Path, stages: list[object], field: str) -> None:
    with pytest.raises(RecipeError, match=field):
        recipe.load(write(tmp_path, stages=stages))


def test_an_unknown_recipe_gets_a_guess() -> None:
    with pytest.raises(UnknownNameError, match="Did you mean 'flab-22'"):
        recipe.load("flab-2")


@pytest.mark.parametrize("text", ["a: [", "- 1", ""])
def test_what_is_no_recipe_is_refused(tmp_path: Path, text: str) -> None:
    (tmp_path / "bad.yaml").write_text(text)
    with pytest.raises(RecipeError):
        recipe.load(tmp_path / "bad.yaml")


def test_init_writes_a_project_that_loads_and_matches_its_schema(tmp_path: Path) -> None:
    project.init(tmp_path, "smollm2-135m", "flab-22")
    loaded = project.find(tmp_path)
    assert loaded == project.Project(model="smollm2-135m", precision="fp32")
    schema = json.loads((tmp_path / project.SCHEMA_FILE).read_text())
    written = yaml.safe_load((tmp_path / project.FILE).read_text())
    assert set(written) == set(schema["properties"])


def test_init_keeps_a_project_that_is_there(tmp_path: Path) -> None:
    project.init(tmp_path, "a", "flab-22")
    with pytest.raises(ArtifactError, match="--force"):
        project.init(tmp_path, "b", "flab-22")
    project.init(tmp_path, "b", "flab-22", force=True)
    assert project.find(tmp_path).model == "b"  # type: ignore[union-attr]


def test_a_project_that_does_not_validate_names_the_field(tmp_path: Path) -> None:
    (tmp_path / project.FILE).write_text("model: x\nrecipee: y\n")
    with pytest.raises(RecipeError, match="recipee"):
        project.find(tmp_path)


def test_without_a_project_a_missing_argument_is_a_usage_error(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    with pytest.raises(UsageError, match="flabc init"):
        project.need("MODEL")
