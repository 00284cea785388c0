from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from flabc import artifact
from flabc.artifact import Artifact
from flabc.errors import ArtifactError, EngineError
from flabc.spec import LayerSpec, ModelSpec


def write(out: Path, content: str = "content", *, force: bool = False) -> Path:
    with artifact.create(out, "report", force=force) as draft:
        (draft.path / "inner").mkdir()
        (draft.path / "inner" / "file.txt").write_text(content)
    return out


def test_what_was_written_opens(tmp_path: Path) -> None:
    opened = Artifact.open(write(tmp_path / "out"), "report")
    assert list(opened.manifest.files) == ["inner/file.txt"]
    assert opened.manifest.versions["python"] == sys.version.split()[0]
    assert [path.name for path in tmp_path.iterdir()] == ["out"]


@pytest.mark.parametrize("harm", ["flip", "remove", "schema", "no manifest", "garbage", "escape"])
def test_a_harmed_folder_is_refused_and_the_file_named(tmp_path: Path, harm: str) -> None:
    out = write(tmp_path / "out")
    file, manifest = out / "inner" / "file.txt", out / "flabc.json"
    content = json.loads(manifest.read_text())
    named = "flabc.json"
    if harm == "flip":
        file.write_text("Content")
        named = "inner/file.txt is not the file"
    elif harm == "remove":
        file.unlink()
        named = "inner/file.txt is missing"
    elif harm == "schema":
        manifest.write_text(json.dumps(content | {"schema_version": 99}))
    elif harm == "no manifest":
        manifest.unlink()
    elif harm == "garbage":
        manifest.write_text("{")
    else:
        manifest.write_text(json.dumps(content | {"files": {"../../etc/passwd": "0"}}))
        named = "outside the folder"
    with pytest.raises(ArtifactError, match=named):
        Artifact.open(out)


def test_another_kind_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ArtifactError, match="'engine'"):
        Artifact.open(write(tmp_path / "out"), "engine")


def test_a_report_is_no_model_though_it_knows_one(tmp_path: Path) -> None:
    with artifact.create(tmp_path / "report", "report") as draft:
        draft.spec = ModelSpec(
            family="llama",
            hidden_size=8,
            head_dim=4,
            vocab_size=16,
            layers=(LayerSpec(num_attention_heads=2, num_key_value_heads=1, intermediate_size=8),),
            max_position_embeddings=8,
            tie_word_embeddings=True,
            rms_norm_eps=1e-5,
            rope_theta=1e4,
        )
    with pytest.raises(EngineError, match="is a report, which cannot be run"):
        _ = Artifact.open(tmp_path / "report").model


def test_a_full_folder_is_kept_unless_forced(tmp_path: Path) -> None:
    out = write(tmp_path / "out", "first")
    with pytest.raises(ArtifactError, match="not empty"):
        write(out, "second")
    assert (out / "inner" / "file.txt").read_text() == "first"
    write(out, "second", force=True)
    assert (Artifact.open(out).path / "inner" / "file.txt").read_text() == "second"
    assert [path.name for path in tmp_path.iterdir()] == ["out"]


def test_an_empty_folder_is_filled(tmp_path: Path) -> None:
    (tmp_path / "out").mkdir()
    assert Artifact.is_at(write(tmp_path / "out"))


def test_a_file_in_the_way_is_refused(tmp_path: Path) -> None:
    (tmp_path / "out").write_text("mine")
    with pytest.raises(ArtifactError, match="is a file"):
        write(tmp_path / "out")


def test_an_error_leaves_the_old_folder(tmp_path: Path) -> None:
    out = write(tmp_path / "out", "first")

    def half() -> None:
        with artifact.create(out, "report", force=True) as draft:
            (draft.path / "new.txt").write_text("half")
            raise RuntimeError("half way")

    with pytest.raises(RuntimeError, match="half"):
        half()
    assert (out / "inner" / "file.txt").read_text() == "first"
    assert [path.name for path in tmp_path.iterdir()] == ["out"]


WRITER = """
import sys, time
from flabc import artifact
with artifact.create(sys.argv[1], "report", force=True) as draft:
    (draft.path / "big.bin").write_bytes(b"0" * 1000)
    print("ready", flush=True)
    time.sleep(60)
"""


@pytest.mark.parametrize("how", [signal.SIGKILL, signal.SIGINT])
def test_a_killed_writer_leaves_no_half_folder(tmp_path: Path, how: signal.Signals) -> None:
    out = write(tmp_path / "out", "first")
    with subprocess.Popen(
        [sys.executable, "-c", WRITER, str(out)], stdout=subprocess.PIPE, stderr=subprocess.DEVNULL
    ) as writer:
        assert writer.stdout is not None
        assert writer.stdout.readline() == b"ready\n"
        os.kill(writer.pid, how)
        writer.wait()
    assert (Artifact.open(out).path / "inner" / "file.txt").read_text() == "first"
    write(out, "second", force=True)  # the next writer sweeps up
    assert [path.name for path in tmp_path.iterdir()] == ["out"]


def test_two_writers_do_not_sweep_each_other_away(tmp_path: Path) -> None:
    with subprocess.Popen([sys.executable, "-c", WRITER, str(tmp_path / "out")], stdout=subprocess.PIPE) as writer:
        assert writer.stdout is not None
        writer.stdout.readline()
        write(tmp_path / "out")
        assert [path for path in tmp_path.iterdir() if path.name.startswith(".out.")]
        writer.kill()


def test_without_an_atomic_exchange_the_folder_is_still_replaced(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(artifact, "_exchange", lambda *_: False)
    out = write(tmp_path / "out", "first")
    write(out, "second", force=True)
    assert (out / "inner" / "file.txt").read_text() == "second"
    assert [path.name for path in tmp_path.iterdir()] == ["out"]


def test_the_exchange_is_atomic_here(tmp_path: Path) -> None:
    for name in "ab":
        (tmp_path / name).mkdir()
        (tmp_path / name / "is").write_text(name)
    if not artifact._exchange(tmp_path / "a", tmp_path / "b"):
        pytest.skip("this file system cannot exchange two folders")
    assert (tmp_path / "a" / "is").read_text() == "b"


def test_hashing_is_that_of_sha256sum(tmp_path: Path) -> None:
    (tmp_path / "f").write_bytes(os.urandom(100_000))
    expected = subprocess.run(["sha256sum", tmp_path / "f"], capture_output=True, text=True, check=True).stdout.split()[
        0
    ]
    started = time.monotonic()
    assert artifact.sha256(tmp_path / "f") == expected
    assert time.monotonic() - started < 5
