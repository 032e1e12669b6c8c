"""What distillation brings back of what pruning lost, on the trained ResNet8 and Fashion-MNIST.

    python benchmarks/prune/distill.py [--train-samples N] [--epochs 2] [--samples 10000] [--rows NAME ...]

Accuracy is top-1 in PyTorch on the test images, which neither pruning nor training sees; a tenth of the training
samples is held out and chooses the epoch. The original teaches, with the weights of the loss that `distill` has by
default. Writes ``distill.json`` into --out.
"""

from __future__ import annotations

import argparse
import json
import tempfile
import time
from dataclasses import replace
from pathlib import Path
from typing import Any

from optkit.compiler import cpu_threads
from optkit.context import Context
from optkit.data import open_data
from optkit.models import TorchModel
from optkit.passes.base import TorchPass
from optkit.passes.distill import Distill
from optkit.passes.prune_channels import PruneChannels
from optkit.passes.prune_weights import PruneWeights
from optkit.pipeline import run_passes
from optkit.pruning.sparsity import is_two_of_four
from optkit.recipe import Recipe
from optkit.source import load_model
from optkit.targets.cpu import this_cpu
from optkit.targets.pytorch import open_torch
from optkit.training import Training

ROOT = Path(__file__).resolve().parents[2]
RECIPE = ROOT / "recipes/fashion-resnet8-int8.yaml"
ROWS: dict[str, TorchPass] = {
    "2:4 by magnitude": PruneWeights(method="magnitude"),
    "2:4 by second order": PruneWeights(),
    "half the MACs": PruneChannels(macs=0.5),
}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--train-samples", type=int, default=None, help="held-out ones included; all if not given")
    parser.add_argument("--epochs", type=int, default=2)
    parser.add_argument("--learning-rate", type=float, default=1e-3)
    parser.add_argument("--batch-size", type=int, default=128)
    parser.add_argument("--samples", type=int, default=10_000, help="test images")
    parser.add_argument("--rows", nargs="+", choices=ROWS, default=list(ROWS), metavar="NAME")
    parser.add_argument("--out", type=Path, default=ROOT / ".out/bench-prune")
    given = parser.parse_args()
    training = Training(
        samples=given.train_samples,
        epochs=given.epochs,
        batch_size=given.batch_size,
        learning_rate=given.learning_rate,
    )
    recipe = Recipe.load(RECIPE)
    assert recipe.data is not None  # the recipe names Fashion-MNIST
    data = open_data(recipe.data, recipe.seed)
    model = load_model(recipe.model.checkpoint or "", recipe, data.inputs).model
    assert isinstance(model, TorchModel)  # the checkpoint is a state_dict
    with tempfile.TemporaryDirectory() as scratch, cpu_threads(1):
        context = Context(recipe.target, Path(scratch), data)
        found: dict[str, Any] = {
            "processor": this_cpu().name,
            "samples": given.samples,
            "training": training.model_dump(mode="json"),
            "top1": top1(model, context, given.samples),
            "rows": {},
        }
        print(f"{'':24}{'pruned':>8}{'taught':>8}{'CPU s':>8}   the whole model has {found['top1']:.2f}", flush=True)
        given.out.mkdir(parents=True, exist_ok=True)
        for name in given.rows:
            row = measured(ROWS[name], Distill(train=training), model, context, given.samples)
            found["rows"][name] = row
            print(f"{name:24}{row['pruned']:8.2f}{row['taught']:8.2f}{row['cpu_seconds']:8.0f}", flush=True)
            (given.out / "distill.json").write_text(json.dumps(found, indent=1), encoding="utf-8")


def measured(prune: TorchPass, teach: Distill, model: TorchModel, context: Context, samples: int) -> dict[str, Any]:
    """Top-1 before and after, and what the training says of itself."""
    started = time.process_time()
    _, pruned, taught = (stage.model for stage in run_passes([prune, teach], model, replace(context, original=None)))
    seconds = time.process_time() - started
    assert isinstance(pruned, TorchModel) and isinstance(taught, TorchModel)  # what such passes give
    return {
        "pruned": top1(pruned, context, samples),
        "taught": top1(taught, context, samples),
        "cpu_seconds": seconds,
        "two_of_four": sorted(
            name
            for name, weight in taught.module.named_parameters()
            if weight.ndim > 1 and is_two_of_four(weight.detach().numpy())
        ),
        "distill": taught.records["distill"],
    }


def top1(model: TorchModel, context: Context, samples: int) -> float:
    """Percent of the test images."""
    assert context.data is not None  # main opened it
    right = 0
    with open_torch(model, context.threads) as runner:
        for batch in context.data.batches("validation", 100, samples):
            (logits,) = runner.run(batch.feeds).values()
            right += int((logits.argmax(1) == batch.labels).sum())
    return 100 * right / samples


if __name__ == "__main__":
    main()
