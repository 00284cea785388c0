"""Corpora: what is read, and on which side of the split it lands."""

from __future__ import annotations

import gzip
import hashlib
import json
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from flabc.compress.config import Calibration
from flabc.compress.data import corpus, source
from flabc.compress.data.corpus import Document
from flabc.errors import CorpusError, UnknownNameError


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Forty files, some in folders, beside some that are no text."""
    root = tmp_path_factory.mktemp("texts")
    (root / "deep" / "deeper").mkdir(parents=True)
    for index in range(40):
        place = (root, root / "deep", root / "deep" / "deeper")[index % 3]
        (place / f"{index}.py").write_text(f"x = {index}\n", encoding="utf-8")
    (root / "image.png").write_bytes(b"\x89PNG")
    (root / "latin.py").write_bytes(b"# \xe9t\xe9\n")
    (root / "empty.py").write_text("")
    return root


def texts(name: Path | str) -> dict[str, list[str]]:
    return {side: [d.text for d in corpus.load(str(name), side)] for side in ("calibration", "heldout")}  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("name", "asked", "rows"),
    [
        ("hf:some/code", ("some/code", "train"), [{"content": "a = 1"}]),
        ("hf:some/code:validation", ("some/code", "validation"), [{"text": "a = 1"}]),
        ("hf:some/code:train:body", ("some/code", "train"), [{"body": "a = 1", "text": "not this"}]),
    ],
)
def test_a_dataset_of_the_hub_is_streamed(
    monkeypatch: pytest.MonkeyPatch, name: str, asked: tuple[str, str], rows: list[dict[str, str]]
) -> None:
    datasets = pytest.importorskip("datasets")

    def given(dataset: str, *, split: str, streaming: bool) -> list[dict[str, str]]:
        assert ((dataset, split), streaming) == (asked, True)
        return rows

    monkeypatch.setattr(datasets, "load_dataset", given)
    assert [text for _, text in source.read(name)] == ["a = 1"]


def test_a_misspelt_column_is_not_replaced_by_another(monkeypatch: pytest.MonkeyPatch) -> None:
    datasets = pytest.importorskip("datasets")
    monkeypatch.setattr(datasets, "load_dataset", lambda *_, **__: [{"body": "a = 1", "text": "not this"}])
    with pytest.raises(UnknownNameError, match="Did you mean 'body'"):
        list(source.read("hf:some/code:train:bdy"))


@pytest.mark.parametrize("name", ["cut.jsonl.gz", "none.jsonl.gz", "latin.jsonl"])
def test_a_damaged_file_is_told_with_where(tmp_path: Path, name: str) -> None:
    whole = gzip.compress(b"".join(b'{"text": "%d"}\n' % n for n in range(9999)))
    latin = '{"text": "fine"}\n{"text": "\u00fc"}\n'.encode("latin-1")
    (tmp_path / name).write_bytes({"cut": whole[:2000], "none": b"{}", "latin": latin}[name.split(".")[0]])
    with pytest.raises(CorpusError, match=rf"{name} cannot be read behind line \d+"):
        list(source.read(str(tmp_path / name)))


def test_a_dataset_that_is_out_of_reach_is_told(monkeypatch: pytest.MonkeyPatch) -> None:
    datasets = pytest.importorskip("datasets")

    def unreachable(*_: object, **__: object) -> None:
        raise ConnectionError("no route to the hub")

    monkeypatch.setattr(datasets, "load_dataset", unreachable)
    with pytest.raises(CorpusError, match=r"'hf:some/code' cannot be read: no route to the hub"):
        list(source.read("hf:some/code"))


def test_every_text_of_a_folder_is_on_one_side(folder: Path) -> None:
    sides = texts(folder)
    assert sorted(sides["calibration"] + sides["heldout"]) == sorted(f"x = {index}\n" for index in range(40))


def test_names_are_paths_inside_the_folder(folder: Path) -> None:
    for document in corpus.load(str(folder), "calibration"):
        assert (folder / document.name).read_text() == document.text


def test_the_sides_of_the_standard_library_share_no_text() -> None:
    sides = texts("python-stdlib")
    assert not set(sides["calibration"]) & set(sides["heldout"])
    share = len(sides["heldout"]) / sum(map(len, sides.values()))
    assert share == pytest.approx(1 / corpus.HELDOUT_ONE_IN, abs=0.06)


def test_the_standard_library_is_its_own_source_only() -> None:
    names = [d.name for side in ("calibration", "heldout") for d in corpus.load("python-stdlib", side)]  # type: ignore[arg-type]
    assert {"json/decoder.py", "argparse.py"} <= set(names)
    assert not [name for name in names if {"site-packages", "test", "tests"} & set(Path(name).parts)]
    assert all(name.endswith(".py") for name in names)


@given(st.text(), st.text(), st.text())
def test_the_side_hangs_on_the_content_alone(content: str, name: str, other: str) -> None:
    digest = hashlib.sha256(content.encode()).hexdigest()
    expected = "heldout" if int(digest[:16], 16) % 5 == 0 else "calibration"
    assert Document(name, content).split == Document(other, content).split == expected


def test_two_copies_of_a_file_stay_together(tmp_path: Path) -> None:
    for index in range(30):
        for copy in "ab":
            (tmp_path / f"{copy}{index}.md").write_text(f"text {index}", encoding="utf-8")
    for documents in texts(tmp_path).values():
        assert all(documents.count(text) == 2 for text in documents)


def test_a_new_file_moves_no_other_across(tmp_path: Path) -> None:
    for index in range(30):
        (tmp_path / f"{index}.txt").write_text(f"text {index}", encoding="utf-8")
    before = texts(tmp_path)
    (tmp_path / "0-first.txt").write_text("something new", encoding="utf-8")
    after = texts(tmp_path)
    for side in before:
        assert set(before[side]) <= set(after[side])


def test_the_order_does_not_hang_on_the_names(tmp_path: Path) -> None:
    first, second = tmp_path / "first", tmp_path / "second"
    for index in range(30):
        for root, name in ((first, index), (second, 100 - index)):
            root.mkdir(exist_ok=True)
            (root / f"{name}.txt").write_text(f"text {index}", encoding="utf-8")
    assert texts(first) == texts(second)


def test_the_fingerprint_tells_other_texts_apart() -> None:
    whole = [Document("a", "one"), Document("b", "two")]
    renamed = [Document("c", "one"), Document("d", "two")]
    assert corpus.fingerprint(whole) == corpus.fingerprint(renamed)
    others = [whole[:1], whole[::-1], [Document("a", "onetwo")], [Document("a", "one"), Document("b", "tw0")], []]
    assert len({corpus.fingerprint(documents) for documents in [whole, *others]}) == 6


def test_a_single_file_is_a_corpus_of_one(tmp_path: Path) -> None:
    file = tmp_path / "notes.anything"
    file.write_text("hello", encoding="utf-8")
    side = Document("", "hello").split
    assert corpus.load(str(file), side) == [Document("notes.anything", "hello", str(file))]


@pytest.mark.parametrize("side", ["calibration", "heldout"])
def test_a_corpus_without_text_is_an_error_that_says_what_to_do(tmp_path: Path, side: corpus.Split) -> None:
    (tmp_path / "image.png").write_bytes(b"\x89PNG")
    with pytest.raises(CorpusError, match=rf"has no {side} text.*Give a larger folder"):
        corpus.load(str(tmp_path), side)


def test_a_corpus_that_nobody_knows_is_answered_with_the_nearest() -> None:
    with pytest.raises(UnknownNameError, match="Did you mean 'python-stdlib'"):
        corpus.load("python-stlib", "calibration")


def test_the_recipe_s_default_corpus_is_a_built_in_one() -> None:
    assert Calibration.model_validate({}).corpus in corpus.CORPORA


def test_a_single_file_has_two_sides_that_make_it_whole(tmp_path: Path) -> None:
    file = tmp_path / "all.py"
    file.write_text("".join(f"value_{number} = {number} * {number}\n" for number in range(20_000)))
    sides = [corpus.load(str(file), split) for split in ("calibration", "heldout")]
    assert all(sides)
    lines = [line for side in sides for document in side for line in document.text.splitlines()]
    assert sorted(lines) == sorted(file.read_text().splitlines())


def test_json_lines_give_a_document_each_zipped_or_not(tmp_path: Path) -> None:
    lines = "".join(json.dumps({("text", "content")[n % 2]: f"text {n}", "id": n}) + "\n" for n in range(40))
    (tmp_path / "plain.jsonl").write_text(lines + "\n", encoding="utf-8")
    with gzip.open(tmp_path / "zipped.jsonl.gz", "wt", encoding="utf-8") as file:
        file.write(lines)
    for name in ("plain.jsonl", "zipped.jsonl.gz"):
        sides = texts(tmp_path / name)
        assert sorted(sides["calibration"] + sides["heldout"]) == sorted(f"text {n}" for n in range(40))
    assert len(texts(tmp_path)["calibration"]) == 2 * len(sides["calibration"])


@pytest.mark.parametrize(
    ("line", "problem"),
    [
        ("{", "line 2, is not JSON"),
        ('{"body": "x"}', r"one of the fields text.*fields \['body'\]"),
        ("3", "int"),
    ],
)
def test_a_line_without_a_text_is_named(tmp_path: Path, line: str, problem: str) -> None:
    file = tmp_path / "bad.jsonl"
    file.write_text('{"text": "fine"}\n' + line + "\n")
    with pytest.raises(CorpusError, match=problem):
        list(source.read(str(file)))


def test_a_parquet_file_is_read_by_datasets(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HF_HOME", str(tmp_path / "home"))
    datasets = pytest.importorskip("datasets")
    wanted = [f"text {n}" for n in range(40)]
    datasets.Dataset.from_dict({"content": wanted, "stars": [1] * 40}).to_parquet(tmp_path / "rows.parquet")
    sides = texts(tmp_path / "rows.parquet")
    assert sorted(sides["calibration"] + sides["heldout"]) == sorted(wanted)
    renamed = datasets.Dataset.from_dict({"body": wanted})
    renamed.to_parquet(tmp_path / "renamed.parquet")
    with pytest.raises(CorpusError, match=r"row 0, has no text.*fields \['body'\]"):
        list(source.read(str(tmp_path / "renamed.parquet")))
    assert [text for _, text in source.read(f"{tmp_path}/renamed.parquet:train:body")] == wanted


def test_several_corpora_are_read_one_after_another(tmp_path: Path) -> None:
    for name in "ab":
        (tmp_path / name).mkdir()
        for n in range(30):
            (tmp_path / name / f"{n}.txt").write_text(f"{name} {n}")
    both = corpus.load([str(tmp_path / "a"), str(tmp_path / "b")], "calibration")
    alone = [d for name in "ab" for d in corpus.load(str(tmp_path / name), "calibration")]
    assert sorted(both, key=lambda d: d.text) == sorted(alone, key=lambda d: d.text)
    assert {d.corpus for d in both} == {str(tmp_path / "a"), str(tmp_path / "b")}


def test_the_built_in_corpora_are_what_they_say() -> None:
    for name, text in ((name, next(source.read(name))[1]) for name in source.CORPORA):
        assert text.strip(), name
    assert next(source.python_packages())[0].endswith(".py")
    assert not next(source.english())[0].endswith(".py")


def test_what_is_installed_is_sampled(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(source, "INSTALLED_CHARACTERS", 50_000)
    found = [len(text) for _, text in source.python_packages()]
    assert 50_000 <= sum(found) < 50_000 + max(found) + 1
    assert found == [len(text) for _, text in source.python_packages()]
