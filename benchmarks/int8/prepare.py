"""Makes what every entrant starts from: the float ONNX model, its samples as ``.npy``, and its outputs.

    python benchmarks/int8/prepare.py resnet8 CALIBRATION EVALUATION FOLDER

FOLDER/   float.onnx   calibration/*.npy   evaluation/*.npy (labels.npy among them)   case.json
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import tempfile
from pathlib import Path

import numpy as np
from cases import CASES, HERE, OUT, ROOT, Case

from optkit.bundle import save_onnx
from optkit.context import Context
from optkit.data import Data, Split, open_data
from optkit.models import OnnxModel
from optkit.pipeline import run_passes
from optkit.recipe import Recipe
from optkit.source import load_model


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("case", choices=CASES)
    parser.add_argument("calibration", type=int)
    parser.add_argument("evaluation", type=int)
    parser.add_argument("folder", type=Path)
    given = parser.parse_args()
    case = CASES[given.case]
    _make_checkpoint(case)
    recipe = _recipe(case)
    assert recipe.data is not None
    data = open_data(recipe.data, recipe.seed)
    given.folder.mkdir(parents=True, exist_ok=True)
    _dump(data, "calibration", given.calibration, given.folder / "calibration")
    _dump(data, "validation", given.evaluation, given.folder / "evaluation")
    save_onnx(_float_model(recipe, data), given.folder / "float.onnx")
    document = {"spec": recipe.data, "metric": data.metric.name}
    (given.folder / "case.json").write_text(json.dumps(document))


def _make_checkpoint(case: Case) -> None:
    """Run the case's own script, if it has one and its file is not there."""
    script, _, name = (case.checkpoint or "").partition(":")
    if script and not (OUT / name).exists():
        subprocess.run([sys.executable, HERE / script, OUT / name], check=True)


def _recipe(case: Case) -> Recipe:
    recipe = Recipe.load(ROOT / case.recipe)
    if case.factory is None:
        return recipe
    return recipe.model_copy(update={"model": recipe.model.model_copy(update={"factory": str(HERE / case.factory)})})


def _dump(data: Data, split: Split, count: int, folder: Path) -> None:
    """One batch of all samples: what is padded is padded to the same length everywhere."""
    batch = next(iter(data.batches(split, count, count)))
    folder.mkdir(exist_ok=True)
    for name, array in batch.feeds.items():
        np.save(folder / f"{name}.npy", array)
    if batch.labels is not None:
        np.save(folder / "labels.npy", batch.labels)


def _float_model(recipe: Recipe, data: Data) -> OnnxModel:
    loaded = load_model(recipe.model.checkpoint or "", recipe, data.inputs)
    steps = [step for step in recipe.passes if step.use in ("export_onnx", "optimize_graph")]
    with tempfile.TemporaryDirectory() as scratch:
        stages = run_passes(steps, loaded.model, Context(recipe.target, Path(scratch), data, recipe.seed))
    model = stages[-1].model
    assert isinstance(model, OnnxModel)
    return model


if __name__ == "__main__":
    main()
