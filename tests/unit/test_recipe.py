from __future__ import annotations

import pytest

from optkit.errors import RecipeError
from optkit.models import DimRange
from optkit.recipe import PRESETS, Recipe, schema

MINIMAL = "passes: [export_onnx, optimize_graph, build_engine]\n"


@pytest.mark.parametrize("name", PRESETS)
def test_a_preset_survives_being_written_and_read(name):
    recipe = Recipe.load(name)
    assert recipe.name == name
    assert Recipe.parse(recipe.to_yaml()) == recipe


def test_paths_are_relative_to_the_recipe(tmp_path):
    file = tmp_path / "r.yaml"
    file.write_text(MINIMAL + "data: d.yaml\nmodel: {checkpoint: m.pt, factory: 'm.py:make', arguments: {width: 2}}\n")
    recipe = Recipe.load(file)
    assert recipe.data == str(tmp_path / "d.yaml")
    assert recipe.model.checkpoint == str(tmp_path / "m.pt")
    assert recipe.model.factory == f"{tmp_path}/m.py:make"
    assert recipe.model.arguments == {"width": 2}
    assert Recipe.load(file).model.factory == recipe.model.factory


def test_a_factory_in_a_module_is_no_path(tmp_path):
    file = tmp_path / "r.yaml"
    file.write_text(MINIMAL + "model: {factory: 'package.module:make'}\n")
    assert Recipe.load(file).model.factory == "package.module:make"


def test_a_range_may_be_a_list_or_one_size():
    recipe = Recipe.parse(MINIMAL + "dims: {batch: [1, 8, 64], time: 5}\n")
    assert recipe.dims == {"batch": DimRange(1, 8, 64), "time": DimRange(5, 5, 5)}


def test_updated_validates_and_leaves_the_recipe_alone():
    recipe = Recipe.load("int8")
    changed = recipe.updated(target="tensorrt-rtx", seed=3, gate={"max_drop": 1.0})
    assert (changed.target.name, changed.seed, changed.gate.max_drop) == ("tensorrt-rtx", 3, 1.0)
    assert recipe == Recipe.load("int8")
    with pytest.raises(RecipeError, match="did you mean 'seed'"):
        recipe.updated(sede=3)
    with pytest.raises(RecipeError, match="did you mean 'tensorrt-rtx'"):
        recipe.updated(target="tensorrt-rtz")


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("passes: [{use: export_onxx}]", "r.yaml:1: passes[0]: 'export_onxx' is unknown, did you mean 'export_onnx'?"),
        ("passes:\n- use: export_onnx\n  opst: 17", "r.yaml:3: unknown key passes[0].opst: did you mean 'opset'?"),
        ("gaet: {}\n" + MINIMAL, "r.yaml:1: unknown key gaet: did you mean 'gate'?"),
        (MINIMAL + "gate:\n  max_dorp: 1", "r.yaml:3: unknown key gate.max_dorp: did you mean 'max_drop'?"),
        (MINIMAL + "gate: {max_drop: -1}", "r.yaml:2: gate.max_drop: input should be greater than or equal to 0"),
        (
            MINIMAL + "dims: {batch: [3, 2, 1]}",
            "r.yaml:2: dims.batch: a dynamic dimension needs 1 <= min <= opt <= max",
        ),
        (MINIMAL + "inputs: {x: 'float31[2]'}", "input 'x': 'float31[2]' is not a tensor"),
        (
            "passes: [build_engine, export_onnx]",
            "export_onnx takes a PyTorch model, but build_engine before it gives an engine",
        ),
        ("passes: [{use: build_engine, target: tensort}]", "'tensort' is unknown"),
        ("name: x", "the key passes is missing"),
        ("passes: []", "at least 1 item"),
        ("version: 2\n" + MINIMAL, "r.yaml:1: version: input should be 1"),
    ],
)
def test_what_does_not_fit_is_named(text, message):
    with pytest.raises(RecipeError) as caught:
        Recipe.parse(text, "r.yaml")
    assert message in str(caught.value)


def test_a_missing_file_and_a_misspelt_preset(tmp_path):
    with pytest.raises(RecipeError, match="did you mean 'int8'"):
        Recipe.load("int")
    with pytest.raises(RecipeError, match="cannot read the recipe"):
        Recipe.load(tmp_path / "none.yaml")


def test_the_schema_knows_every_pass_and_target():
    text = str(schema())
    for word in ("export_onnx", "quantize_int8", "tensorrt-rtx", "max_drop"):
        assert word in text
