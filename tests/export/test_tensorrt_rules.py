"""A graph that TensorRT's documents allow, broken in every way that they forbid."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path

import numpy as np
import onnx
import pytest
from onnx import NodeProto, TensorProto, helper, numpy_helper

from flabc.errors import ModelError
from flabc.export import engine, tensorrt_rules
from flabc.spec import ModelSpec

from ..conftest import VARIANTS


def written(model: Path, out: Path) -> Path:
    spec = ModelSpec.from_config(json.loads((model / "config.json").read_text()))
    out.mkdir()
    engine.write(model, spec, out, "onnx-standard", cache_length=256)
    return out / engine.GRAPH


@pytest.fixture(scope="module")
def allowed(tiny: Callable[[str], Path], tmp_path_factory: pytest.TempPathFactory) -> Path:
    return written(tiny("qwen2-tied"), tmp_path_factory.mktemp("allowed") / "engine")


@pytest.fixture
def file(allowed: Path, tmp_path: Path) -> Path:
    shutil.copytree(allowed.parent, tmp_path / "engine")
    return tmp_path / "engine" / engine.GRAPH


@pytest.mark.parametrize("variant", [name for name in VARIANTS if not name.startswith("gemma2")])
def test_every_family_that_caps_no_attention_keeps_the_rules(
    tiny: Callable[[str], Path], tmp_path: Path, variant: str
) -> None:
    file = written(tiny(variant), tmp_path / "engine")
    for name in (engine.GRAPH, engine.SCORING_GRAPH):
        assert tensorrt_rules.violations(file.with_name(name)) == []


def test_a_capped_attention_is_refused_by_name(tiny: Callable[[str], Path], tmp_path: Path) -> None:
    with pytest.raises(ModelError, match=r"Attention '.*softcap is 50.*Supported ONNX Operators"):
        tensorrt_rules.check(written(tiny("gemma2-tied"), tmp_path / "engine"))


def test_a_cache_whose_length_is_open_is_refused(tiny: Callable[[str], Path], tmp_path: Path) -> None:
    model = tiny("qwen2-tied")
    engine.write(
        model, ModelSpec.from_config(json.loads((model / "config.json").read_text())), tmp_path, "onnx-standard"
    )
    with pytest.raises(ModelError, match=r"max_length places long; expected a number.*KV Cache.*and 1 more"):
        tensorrt_rules.check(tmp_path / engine.GRAPH)


def node(model: onnx.ModelProto, kind: str) -> NodeProto:
    return next(each for each in model.graph.node if each.op_type == kind)


def attribute(kind: str, name: str, value: object) -> Callable[[onnx.ModelProto], None]:
    """Sets an attribute of the first node of that operator."""

    def edit(model: onnx.ModelProto) -> None:
        found = node(model, kind)
        kept = [each for each in found.attribute if each.name != name]
        del found.attribute[:]
        found.attribute.extend([*kept, helper.make_attribute(name, value)])

    return edit


def newer(model: onnx.ModelProto) -> None:
    model.opset_import[0].version = 26


def other_domain(model: onnx.ModelProto) -> None:
    node(model, "Sigmoid").domain = "com.microsoft"


def unknown_operator(model: onnx.ModelProto) -> None:
    node(model, "Sigmoid").op_type = "Det"


def second_output(model: onnx.ModelProto) -> None:
    node(model, "Attention").output.append("present_key")


def past_input(model: onnx.ModelProto) -> None:
    found = node(model, "Attention")
    found.input.append(found.input[1])


def counted_keys(model: onnx.ModelProto) -> None:
    node(model, "Attention").input.extend(["", "", "token_counts"])


def without_mask(model: onnx.ModelProto) -> None:
    del node(model, "Attention").input[3:]


def mask_of_integers(model: onnx.ModelProto) -> None:
    """A mask that is cast to integers on its way."""
    found = node(model, "Attention")
    cast = helper.make_node("Cast", [found.input[3]], ["mask_of_integers"], to=TensorProto.INT64)
    model.graph.node.insert(list(model.graph.node).index(found), cast)
    found.input[3] = "mask_of_integers"


def three_dimensions(model: onnx.ModelProto) -> None:
    """A query whose heads lie side by side again."""
    found = node(model, "Attention")
    at = list(model.graph.node).index(found)
    model.graph.initializer.append(numpy_helper.from_array(np.array([0, 0, 96]), "flat"))
    model.graph.node.insert(at, helper.make_node("Reshape", [found.input[0], "flat"], ["flat_query"]))
    found.input[0] = "flat_query"
    attribute("Attention", "q_num_heads", 6)(model)


def cache_from_inside(model: onnx.ModelProto) -> None:
    found = node(model, "TensorScatter")
    at = list(model.graph.node).index(found)
    model.graph.node.insert(at, helper.make_node("Identity", [found.input[0]], ["copied"]))
    found.input[0] = "copied"


def cache_not_given_back(model: onnx.ModelProto) -> None:
    kept = [each for each in model.graph.output if each.name != node(model, "TensorScatter").output[0]]
    del model.graph.output[:]
    model.graph.output.extend(kept)


def open_length(model: onnx.ModelProto) -> None:
    for value in [*model.graph.input, *model.graph.output]:
        if "key" in value.name:
            value.type.tensor_type.shape.dim[2].dim_param = "max_length"


def doubles(model: onnx.ModelProto) -> None:
    found = node(model, "Sigmoid")
    at = list(model.graph.node).index(found)
    nodes = [
        helper.make_node("Cast", [found.input[0]], ["wide"], to=TensorProto.DOUBLE),
        helper.make_node("Cast", ["wide"], ["narrow"], to=TensorProto.FLOAT),
    ]
    for each in reversed(nodes):
        model.graph.node.insert(at, each)
    found.input[0] = "narrow"


def integers_multiplied(model: onnx.ModelProto) -> None:
    model.graph.node.append(helper.make_node("MatMul", ["input_ids", "input_ids"], ["squared"]))


def truth_of_integers(model: onnx.ModelProto) -> None:
    model.graph.node.append(helper.make_node("Not", ["write_indices"], ["nothing"]))


def half_a_weight(model: onnx.ModelProto) -> None:
    """One norm's weight in float16 among float32: what a weakly typed network would have cast in silence."""
    name = node(model, "RMSNormalization").input[1]
    weight = next(each for each in model.graph.initializer if each.name == name)
    weight.CopyFrom(numpy_helper.from_array(np.ones(48, np.float16), name))


def half_a_sum(model: onnx.ModelProto) -> None:
    found = node(model, "Add")
    model.graph.initializer.append(numpy_helper.from_array(np.array([1], np.int32), "one_in_32_bits"))
    found.input[1] = "one_in_32_bits"


def unknown_value(model: onnx.ModelProto) -> None:
    model.graph.node.append(helper.make_node("Mystery", ["logits"], ["riddle"], domain="nowhere"))


def open_axes(model: onnx.ModelProto) -> None:
    del node(model, "Squeeze").input[1:]


def computed_axes(model: onnx.ModelProto) -> None:
    node(model, "Unsqueeze").input[1] = "write_indices"


def mean_too(model: onnx.ModelProto) -> None:
    found = node(model, "RMSNormalization")
    found.op_type = "LayerNormalization"
    found.output.append("mean")


def data_beyond_its_end(model: onnx.ModelProto) -> None:
    weight = next(each for each in model.graph.initializer if each.external_data)
    next(entry for entry in weight.external_data if entry.key == "offset").value = str(10**9)


def data_elsewhere(model: onnx.ModelProto) -> None:
    weight = next(each for each in model.graph.initializer if each.external_data)
    next(entry for entry in weight.external_data if entry.key == "location").value = "other.data"


#: How each rule is broken, and what the message must say.
BROKEN: list[tuple[str, Callable[[onnx.ModelProto], None], str]] = [
    ("opset", newer, "opset 26"),
    ("operator", other_domain, "com.microsoft"),
    ("operator", unknown_operator, "Det"),
    ("attention inputs and outputs", second_output, "2 outputs"),
    ("attention inputs and outputs", past_input, "past_key"),
    ("attention inputs and outputs", counted_keys, "nonpad_kv_seqlen"),
    ("attention attributes", attribute("Attention", "softcap", 30.0), "softcap is 30"),
    ("attention attributes", attribute("Attention", "qk_matmul_output_mode", 1), "qk_matmul_output_mode is 1"),
    ("attention attributes", attribute("Attention", "softmax_precision", 1), "softmax_precision"),
    ("attention mask", without_mask, "no mask"),
    ("attention mask", attribute("Attention", "is_causal", 1), "is_causal"),
    ("attention mask", mask_of_integers, "expected BOOL"),
    ("attention dimensions", three_dimensions, "the query has 3"),
    ("cache form", attribute("TensorScatter", "axis", 1), "axis 1"),
    ("cache form", attribute("TensorScatter", "mode", "circular"), "circular"),
    ("cache input", cache_from_inside, "no input of the graph"),
    ("cache output", cache_not_given_back, "no output of the graph"),
    ("cache length", open_length, "max_length places"),
    ("type", doubles, "DOUBLE"),
    ("operand type", integers_multiplied, "INT64; expected floating point"),
    ("operand type", truth_of_integers, "expected BOOL"),
    ("strong typing", half_a_weight, "FLOAT and FLOAT16"),
    ("strong typing", half_a_sum, "INT32 and INT64"),
    ("known type", unknown_value, "types cannot be inferred"),
    ("constant axes", open_axes, "Squeeze"),
    ("constant axes", computed_axes, "Unsqueeze"),
    ("one output", mean_too, "2 outputs"),
    ("weight data", data_beyond_its_end, "expected 1000"),
    ("weight data", data_elsewhere, "other.data is missing"),
]


@pytest.mark.parametrize(("rule", "edit", "told"), BROKEN)
def test_a_broken_rule_is_named_with_its_place_and_its_document(
    file: Path, rule: str, edit: Callable[[onnx.ModelProto], None], told: str
) -> None:
    model = onnx.load(str(file), load_external_data=False)
    edit(model)
    file.write_bytes(model.SerializeToString())
    found = [each for each in tensorrt_rules.violations(file) if each.rule == rule]
    assert found
    assert all(each.node and each.document == tensorrt_rules.RULES[rule][1] for each in found)
    assert told in " ".join(map(str, found))
    with pytest.raises(ModelError, match=r"TensorRT does not take model\.onnx"):
        tensorrt_rules.check(file)


def test_every_rule_is_broken_once() -> None:
    assert {rule for rule, _, _ in BROKEN} == set(tensorrt_rules.RULES)


def test_data_outside_the_folder_is_refused(file: Path) -> None:
    model = onnx.load(str(file), load_external_data=False)
    weight = next(each for each in model.graph.initializer if each.external_data)
    next(entry for entry in weight.external_data if entry.key == "location").value = "../outside.data"
    (file.parent.parent / "outside.data").write_bytes((file.parent / engine.DATA).read_bytes())
    file.write_bytes(model.SerializeToString())
    assert "outside the folder" in " ".join(map(str, tensorrt_rules.violations(file)))
