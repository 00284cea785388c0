"""Models that are never whole in memory: cut and written as resident ones are, with two layers at most at a time."""

from __future__ import annotations

import threading
import weakref
from collections.abc import Callable
from contextlib import nullcontext
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from flabc import api
from flabc.compress import load, stored
from flabc.compress.devices import ahead, beside
from flabc.compress.location import locate
from flabc.compress.stored import Stored, spill, stored_in
from flabc.compress.walk import Walk, dense_variant, without
from flabc.errors import ModelError, UsageError
from flabc.recipe import parse


@settings(max_examples=30, deadline=None)
@given(data=st.data())
def test_selections_are_those_that_torch_makes(tmp_path_factory: pytest.TempPathFactory, data: st.DataObject) -> None:
    tensor = torch.randn(6, 5, 4)
    lazy = spill(tensor, tmp_path_factory.mktemp("spilled"))
    for _ in range(data.draw(st.integers(0, 3))):
        axis = data.draw(st.integers(0, 2))
        index = torch.tensor(data.draw(st.lists(st.integers(0, tensor.shape[axis] - 1), min_size=1, max_size=6)))
        tensor, lazy = tensor.index_select(axis, index), lazy.index_select(axis, index)
    assert lazy.shape == tuple(tensor.shape)
    assert lazy.numel() == tensor.numel()
    assert torch.equal(lazy.load(), tensor)


def test_a_damaged_file_is_named(tmp_path: Path) -> None:
    lazy = spill(torch.ones(3), tmp_path)
    lazy.file.write_bytes(lazy.file.read_bytes()[:20])
    with pytest.raises(ModelError, match=lazy.file.name):
        lazy.load()


def test_a_streamed_model_is_compressed_to_the_same_files(
    tiny: Callable[[str], Path], tiny_recipe: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = tiny("llama-untied-biased")
    resident = api.compress(str(folder), tiny_recipe, tmp_path / "resident")
    monkeypatch.setattr("flabc.compress.preflight.streams", lambda *_, **__: True)
    streamed = api.compress(str(folder), tiny_recipe, tmp_path / "streamed")
    assert streamed.spec == resident.spec
    for file in (tmp_path / "resident").iterdir():
        if file.name != "flabc.json":  # has the seconds that each stage took
            assert file.read_bytes() == (tmp_path / "streamed" / file.name).read_bytes(), file.name
    assert sorted(path.name for path in tmp_path.iterdir()) == ["resident", "streamed"]


class Scale:
    """Weighs what is loaded from disk and still alive."""

    def __init__(self, patch: pytest.MonkeyPatch) -> None:
        self.now = self.peak = 0
        original = Stored.load

        def load_and_weigh(self_: Stored) -> torch.Tensor:
            tensor = original(self_)
            size = tensor.numel()
            self.now += size
            self.peak = max(self.peak, self.now)
            weakref.finalize(tensor, self._gone, size)
            return tensor

        patch.setattr(stored.Stored, "load", load_and_weigh)

    def _gone(self, size: int) -> None:
        self.now -= size


def test_what_is_made_ahead_comes_in_order_and_no_more_than_two_are_there() -> None:
    class Made:
        def __init__(self, number: int) -> None:
            self.number = number

    made: list[weakref.ref[Made]] = []
    begun = [threading.Event() for _ in range(4)]
    most = 0

    def make(number: int) -> Made:
        nonlocal most
        each = Made(number)
        made.append(weakref.ref(each))
        most = max(most, sum(one() is not None for one in made))
        begun[number].set()
        return each

    taken = ahead(partial(partial, make), range(4))
    for number in range(4):
        each = next(taken)
        assert each.number == number
        if number < 3:
            assert begun[number + 1].wait(10)  # by itself, while this one is in use
        del each
    assert next(taken, None) is None
    assert most == 2

    def fail(number: int) -> int:
        if number:
            raise ModelError("It cannot be read.")
        return number

    taken_of_two = ahead(partial(partial, fail), range(2))
    assert next(taken_of_two) == 0
    with pytest.raises(ModelError, match="cannot be read"):
        next(taken_of_two)


def test_copies_wait_for_what_was_computed_before_and_are_kept_until_computed_with(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """The order of calls, with stand-ins for streams; the streams themselves need a GPU."""
    done: list[str] = []

    class Stream:
        def __init__(self, name: str) -> None:
            self.name = name

        def record_event(self) -> Stream:
            done.append(f"event on {self.name}")
            return Stream("event")

        def synchronize(self) -> None:
            done.append(f"wait for {self.name}")

    class Copied:
        def record_stream(self, stream: Stream) -> None:
            done.append(f"kept for {stream.name}")

    def make(_: int) -> Any:
        done.append("copy")
        return {"weight": Copied()}

    monkeypatch.setattr(torch.cuda, "Stream", lambda _: Stream("copying"))
    monkeypatch.setattr(torch.cuda, "current_stream", lambda _: Stream("computing"))
    monkeypatch.setattr(torch.cuda, "stream", lambda _: nullcontext())
    copied = beside(make, torch.device("cuda"))(0)
    assert done == ["event on computing"]  # before another thread begins
    assert copied().keys() == {"weight"}
    assert done[1:] == ["wait for event", "copy", "wait for copying", "kept for computing"]


@pytest.mark.parametrize("by_itself", [False, True], ids=["when asked for", "ahead"])
def test_two_layers_and_the_embeddings_are_all_that_is_in_memory(
    tiny: Callable[[str], Path], monkeypatch: pytest.MonkeyPatch, by_itself: bool
) -> None:
    if by_itself:  # as on a GPU, but for the stream
        monkeypatch.setattr(Walk, "fetched", lambda walk: ahead(partial(partial, walk.fetch), range(3)))
    model = load.load(str(tiny("llama-untied-biased")), stream=True)
    assert all(isinstance(weight, Stored) for weight in model.weights.values())
    tokens = torch.randint(0, 600, (4, 30), generator=torch.Generator().manual_seed(0))
    walk = Walk(model, tokens, torch.device("cpu"), torch.float32)
    dense = dense_variant(model.spec)
    with monkeypatch.context() as patch:
        scale = Scale(patch)
        states = walk.run([dense, *(without(dense, layer) for layer in range(3))])
        layer = sum(t.numel() for name, t in model.weights.items() if ".layers.1." in name)
        embedding = model.spec.vocab_size * model.spec.hidden_size
        assert embedding <= scale.peak <= max(embedding, 2 * layer)
        assert scale.now <= layer
        for _ in walk.readouts(states):
            pass
        assert scale.peak <= 2 * layer + embedding + model.spec.hidden_size
    resident = load.load(str(tiny("llama-untied-biased")))
    again = Walk(resident, tokens, torch.device("cpu"), torch.float32)
    assert torch.equal(states[dense], again.run([dense])[dense])
    *_, (_, (_, _, last)) = again.stream(dense)
    torch.testing.assert_close(states[dense], last)


def test_too_little_memory_is_told_before_any_work(
    tiny: Callable[[str], Path], tiny_recipe: Path, tmp_path: Path
) -> None:
    with pytest.raises(UsageError, match=r"not enough memory.*Found: 0\.1 GiB.*calibration\.sequences"):
        api.compress(str(tiny("llama-tied")), tiny_recipe, tmp_path / "out", memory=2**27)
    assert not (tmp_path / "out").exists()


def test_too_little_room_is_told_before_any_work(
    tiny: Callable[[str], Path], tiny_recipe: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    class Full:
        free = 1000

    monkeypatch.setattr("shutil.disk_usage", lambda _: Full())
    with pytest.raises(UsageError, match="not enough room on the disk"):
        api.compress(str(tiny("llama-tied")), tiny_recipe, tmp_path / "out")
    assert not list(tmp_path.iterdir())


def test_room_for_training_is_asked_for_where_it_takes_place(
    tiny: Callable[[str], Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """States of three trainings of all weights, and two models: 11 times 4 bytes a parameter."""

    class Nearly:
        free = 44 * load.load(str(tiny("llama-tied"))).spec.num_parameters - 1

    monkeypatch.setattr("shutil.disk_usage", lambda _: Nearly())
    recipe = {"name": "trained", "stages": [{"stage": "recover", "method": "full"}]}
    monkeypatch.setenv("TMPDIR", str(tmp_path))
    monkeypatch.setattr("tempfile.tempdir", None)
    with pytest.raises(UsageError, match=f"not enough room on the disk of {tmp_path}.*TMPDIR"):
        api.compress(str(tiny("llama-tied")), parse(recipe, "trained"), tmp_path / "out")


def test_weights_stay_on_disk_where_memory_does_not_suffice(tiny: Callable[[str], Path]) -> None:
    from flabc.compress.config import Calibration, VocabConfig
    from flabc.compress.preflight import streams, workspace_bytes
    from flabc.spec import ModelSpec

    spec = ModelSpec.from_config(load.read_config(locate(str(tiny("llama-tied")))))
    stages, calibration = [VocabConfig()], Calibration()
    work = workspace_bytes(spec, stages, calibration, torch.float32)
    big = 10 * 2**30
    asked = {"stages": stages, "calibration": calibration, "dtype": torch.float32}
    assert work > workspace_bytes(spec, stages, calibration, torch.bfloat16)
    assert streams(spec, big, memory=work + big, can_stream=True, **asked)  # type: ignore[arg-type]
    assert not streams(spec, big, memory=work + 2 * big, can_stream=True, **asked)  # type: ignore[arg-type]
    with pytest.raises(UsageError, match="convert the model to safetensors"):
        streams(spec, big, memory=work + big, can_stream=False, **asked)  # type: ignore[arg-type]


def test_refitting_inputs_asks_for_the_room_of_another_model(tiny: Callable[[str], Path]) -> None:
    from flabc.compress.config import Calibration, RestoreConfig
    from flabc.compress.preflight import copies, streams, workspace_bytes
    from flabc.spec import ModelSpec

    spec = ModelSpec.from_config(load.read_config(locate(str(tiny("llama-tied")))))
    calibration, big = Calibration(), 10 * 2**30
    for inputs, models in ((True, 3), (False, 2)):
        stages = [RestoreConfig(inputs=inputs)]
        work = workspace_bytes(spec, stages, calibration, torch.float32)
        enough = work + models * big
        for memory, stream in ((enough, False), (enough - 1, True)):
            found = streams(spec, big, stages, calibration, dtype=torch.float32, memory=memory, can_stream=True)
            assert found is stream
        assert copies(stages) == models


def test_restoring_behind_norms_asks_for_the_room_of_what_it_hears(tiny: Callable[[str], Path]) -> None:
    from flabc.compress.config import Calibration, RestoreConfig
    from flabc.compress.preflight import workspace_bytes
    from flabc.spec import ModelSpec

    sizes, stages = {}, [RestoreConfig()]
    for name in ("gemma2-tied", "qwen2-tied"):
        spec = ModelSpec.from_config(load.read_config(locate(str(tiny(name)))))
        less, more = (
            workspace_bytes(
                spec, stages, Calibration(sequences=count, sequence_length=512, first_tokens=0.0), torch.bfloat16
            )
            for count in (128, 256)
        )
        sizes[name] = (more - less) / (128 * 512)  # a token's
    assert sizes["gemma2-tied"] - sizes["qwen2-tied"] == 5 * 48 * 2


def test_first_tokens_ask_for_the_room_of_as_many_more_tokens(tiny: Callable[[str], Path]) -> None:
    from flabc.compress.config import Calibration, RestoreConfig
    from flabc.compress.preflight import workspace_bytes
    from flabc.spec import ModelSpec

    spec = ModelSpec.from_config(load.read_config(locate(str(tiny("qwen2-tied")))))
    asked = (Calibration(sequences=128, first_tokens=0.5), Calibration(sequences=192, first_tokens=0.0))
    with_firsts, more_texts = (workspace_bytes(spec, [RestoreConfig()], each, torch.float32) for each in asked)
    assert with_firsts == more_texts


def test_pickles_are_read_only_if_they_are_allowed(
    tiny: Callable[[str], Path], tiny_recipe: Path, tmp_path: Path
) -> None:
    import shutil

    from safetensors.torch import load_file

    folder = tmp_path / "pickled"
    shutil.copytree(tiny("llama-tied"), folder)
    torch.save(load_file(folder / "model.safetensors"), folder / "pytorch_model.bin")
    (folder / "model.safetensors").unlink()
    with pytest.raises(ModelError, match="--allow-pickle"):
        api.compress(str(folder), tiny_recipe, tmp_path / "out")
    assert not (tmp_path / "out").exists()
    done = api.compress(str(folder), tiny_recipe, tmp_path / "out", allow_pickle=True)
    assert done.spec == api.compress(str(tiny("llama-tied")), tiny_recipe, None).spec


def test_a_tokenizer_of_another_model_is_refused(tiny: Callable[[str], Path], tmp_path: Path) -> None:
    import json
    import shutil

    folder = tmp_path / "mixed"
    shutil.copytree(tiny("llama-tied"), folder)
    content = json.loads((folder / "tokenizer.json").read_text())
    content["added_tokens"].append({**content["added_tokens"][0], "id": 900, "content": "<|far|>"})
    (folder / "tokenizer.json").write_text(json.dumps(content))
    with pytest.raises(ModelError, match=r"does not match the model.*ids below vocab_size, 700"):
        load.load(str(folder))


def test_stored_tensors_are_listed_without_reading_them(tiny: Callable[[str], Path]) -> None:
    found = stored_in(tiny("llama-tied") / "model.safetensors")
    whole = load.load(str(tiny("llama-tied"))).weights
    assert {name: weight.shape for name, weight in found.items()} == {n: tuple(t.shape) for n, t in whole.items()}
