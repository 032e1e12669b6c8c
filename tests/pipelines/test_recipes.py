"""Every recipe is checked and run, and every model goes through every precision from both of its formats."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

import optkit
from optkit.bundle import verify
from optkit.errors import GateError
from optkit.recipe import Recipe, schema

ROOT = Path(__file__).resolve().parents[2]
DATA = ROOT / ".data"
RECIPES = sorted((ROOT / "recipes").glob("*.yaml"))

# Enough to see that the whole way works; what the samples prove is the recipes' own business
QUICK = {"samples": 32, "batch_size": 8, "stage_samples": 4, "latency": {"rounds": 2, "seconds": 0.01, "warmup": 0.0}}

MODELS = {
    "digits": ("digits/handwriting_model.pth", "digits/digit_cnn.pt2", "digits.py:digit_cnn", "digits"),
    "resnet8": ("fashion/resnet8.pt", "fashion/resnet8.pt2", "resnet8.py:resnet8", "fashion-mnist"),
    "efficientnet": (
        "efficientnet/weights.pth",
        "efficientnet/efficientnet_lite0.pt2",
        "efficientnet.py:efficientnet_lite0",
        "efficientnet-photos",
    ),
    "minilm": ("bbc/classifier.safetensors", "bbc/minilm_classifier.pt2", "minilm.py:minilm_classifier", "bbc"),
}

needs_data = pytest.mark.skipif(not (DATA / "bbc").is_dir(), reason="`make data` has not been run")


def quick(recipe: Recipe, samples: int = 16) -> Recipe:
    """The recipe on few samples, with a gate that so few can pass."""
    document = recipe.model_dump(mode="json")
    for step in document["passes"]:
        if step["use"] == "quantize_int8":
            step["calibrate"]["samples"] = samples
        for training in (step.get("train"), (step.get("recover") or {}).get("train")):
            if training is not None:
                training.update({"epochs": 1, "samples": 128, "batch_size": 16})
    return recipe.updated(
        passes=document["passes"],
        validation=QUICK,
        gate={**document["gate"], "max_drop": 60.0, "min_speedup": None},
        threads=1,
    )


def test_the_schema_beside_the_recipes_is_the_one_that_is_used():
    assert json.loads((ROOT / "recipes/schema.json").read_text()) == schema(), "run `make schema`"


@needs_data
@pytest.mark.parametrize("path", RECIPES, ids=lambda path: path.stem)
def test_every_recipe_runs(path: Path, tmp_path: Path):
    recipe = Recipe.load(path)
    assert recipe.name == path.stem and recipe.description
    bundle = optkit.compile(None, quick(recipe), tmp_path / "out")
    assert bundle.manifest["verdict"] == "passed"
    assert {problem.exit_code for problem in verify(bundle.path)} <= (
        {4} if recipe.target.name != "onnxruntime" else set()
    )


@needs_data
@pytest.mark.parametrize("precision", ["fp32", "fp16", "int8"])
@pytest.mark.parametrize("format", ["state_dict", "pt2"])
@pytest.mark.parametrize("model", MODELS)
def test_every_model_in_every_precision(model: str, format: str, precision: str, tmp_path: Path):
    weights, program, factory, data = MODELS[model]
    checkpoint = DATA / (weights if format == "state_dict" else program)
    recipe = quick(Recipe.load(precision)).updated(
        data=str(ROOT / f"calibration/{data}.yaml"),
        model={"factory": str(ROOT / "examples/models" / factory) if format == "state_dict" else None},
    )
    bundle = optkit.compile(checkpoint, recipe, tmp_path / "out")
    error = next(iter(bundle.report["accuracy"]["per_output"].values()))
    assert error["sqnr_db"] > {"fp32": 60, "fp16": 35, "int8": 8}[precision]


@needs_data
def test_the_gate_is_honest_on_few_samples(tmp_path: Path):
    # 32 samples cannot show that INT8 loses less than half a point, so nothing may come out
    recipe = quick(Recipe.load(ROOT / "recipes/digits-int8.yaml")).updated(gate={"max_drop": 0.5})
    with pytest.raises(GateError, match="inconclusive"):
        optkit.compile(None, recipe, tmp_path / "out")
    assert not (tmp_path / "out").exists()
