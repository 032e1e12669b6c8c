"""What pruning loses and what it gains on the trained ResNet8, without training.

    python benchmarks/prune/run.py [--samples 10000] [--rounds 15] [--out .out/bench-prune]

One-shot 2:4 by magnitude and by the second order; channels removed to several goals, with the multiplications that are
left beside the speed that ONNX Runtime's CPU kernels make of them. Accuracy is that of the engines on Fashion-MNIST's
test images, latency is batch 1 on one thread, every model in every round. Writes ``prune.json`` into --out.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import tempfile
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np

from optkit.compiler import cpu_threads
from optkit.context import Context
from optkit.data import open_data
from optkit.models import Engine, TorchModel
from optkit.passes.base import TorchPass
from optkit.passes.build_engine import BuildEngine
from optkit.passes.export_onnx import ExportOnnx
from optkit.passes.optimize_graph import OptimizeGraph
from optkit.passes.prune_channels import PruneChannels
from optkit.passes.prune_weights import PruneWeights
from optkit.pipeline import run_passes
from optkit.recipe import Recipe
from optkit.source import load_model
from optkit.targets.base import Runner
from optkit.targets.cpu import this_cpu
from optkit.validation.statistics import ratio_of_rounds

ROOT = Path(__file__).resolve().parents[2]
RECIPE = ROOT / "recipes/fashion-resnet8-int8.yaml"
TURN_SECONDS = 0.05

SPARSE: dict[str, tuple[PruneWeights, bool]] = {
    "magnitude": (PruneWeights(method="magnitude"), False),
    "magnitude, statistics of norms anew": (PruneWeights(method="magnitude"), True),
    "second order": (PruneWeights(), True),
}
"""2:4 by pass, and whether it is given the calibration samples."""

CHANNELS = {
    "activation, layer, 10 % of the MACs": PruneChannels(macs=0.1),
    "activation, layer, 20 %": PruneChannels(macs=0.2),
    "activation, layer, 30 %": PruneChannels(macs=0.3),
    "taylor, layer, 30 %": PruneChannels(macs=0.3, importance="taylor"),
    "taylor, global, 30 %": PruneChannels(macs=0.3, importance="taylor", scope="global"),
    "magnitude, layer, 30 %": PruneChannels(macs=0.3, importance="magnitude"),
    "activation, layer, 50 %": PruneChannels(macs=0.5),
    "taylor, layer, 50 %": PruneChannels(macs=0.5, importance="taylor"),
    "taylor, global, 50 %": PruneChannels(macs=0.5, importance="taylor", scope="global"),
    "magnitude, layer, 50 %": PruneChannels(macs=0.5, importance="magnitude"),
    "activation, layer, 70 %": PruneChannels(macs=0.7),
    "activation, layer, 1.5 times the speed": PruneChannels(speedup=1.5),
}
"""Widths are multiples of 8, as the target likes them."""


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--samples", type=int, default=10_000)
    parser.add_argument("--rounds", type=int, default=15)
    parser.add_argument("--out", type=Path, default=ROOT / ".out/bench-prune")
    given = parser.parse_args()
    recipe = Recipe.load(RECIPE)
    assert recipe.data is not None  # the recipe names Fashion-MNIST
    data = open_data(recipe.data, recipe.seed)
    model = load_model(recipe.model.checkpoint or "", recipe, data.inputs).model
    assert isinstance(model, TorchModel)  # the checkpoint is a state_dict
    with tempfile.TemporaryDirectory() as scratch, cpu_threads(1), contextlib.ExitStack() as opened:
        context = Context(recipe.target, Path(scratch), data)
        blind = replace(context, data=None)
        models = {"whole": model}
        models |= {name: pruned(step, model, context if sees else blind) for name, (step, sees) in SPARSE.items()}
        models |= {name: pruned(step, model, context) for name, step in CHANNELS.items()}
        runners = {name: opened.enter_context(engine(one, context, opened)) for name, one in models.items()}
        print("built", flush=True)
        speedups = timed(runners, given.rounds)
        print("timed", flush=True)
        found = {
            "processor": this_cpu().name,
            "versions": recipe.target.versions(),
            "samples": given.samples,
            "rows": {
                name: {
                    "top1": top1(runner, context, given.samples),
                    "speedup": speedups[name],
                    **models[name].records.get("pruning", {}),
                }
                for name, runner in runners.items()
            },
        }
    given.out.mkdir(parents=True, exist_ok=True)
    (given.out / "prune.json").write_text(json.dumps(found, indent=1), encoding="utf-8")
    print("\n".join(tables(found["rows"])))


def pruned(step: TorchPass, model: TorchModel, context: Context) -> TorchModel:
    after = run_passes([step], model, context)[-1].model
    assert isinstance(after, TorchModel)  # what such a pass gives
    return after


def engine(model: TorchModel, context: Context, opened: contextlib.ExitStack) -> Runner:
    folder = Path(opened.enter_context(tempfile.TemporaryDirectory(dir=context.scratch)))
    steps = [ExportOnnx(), OptimizeGraph(), BuildEngine()]
    built = run_passes(steps, model, replace(context, scratch=folder))[-1].model
    assert isinstance(built, Engine)  # what build_engine gives
    return context.target.open(built, context.threads)


def top1(runner: Runner, context: Context, samples: int) -> float:
    """Percent of the validation samples."""
    assert context.data is not None  # main opened it
    right = 0
    for batch in context.data.batches("validation", 100, samples):
        (logits,) = runner.run(batch.feeds).values()
        right += int((logits.argmax(1) == batch.labels).sum())
    return 100 * right / samples


def timed(runners: Mapping[str, Runner], rounds: int) -> dict[str, list[float]]:
    """How many times as fast as the first, with the ends of the 95 % interval."""
    names = list(runners)
    feeds = runners[names[0]].signature.random_feeds(np.random.default_rng(0))
    calls = {name: max(1, round(TURN_SECONDS / float(np.median(r.time(feeds, 20))))) for name, r in runners.items()}
    turns: dict[str, list[Any]] = {name: [] for name in names}
    for number in range(rounds):
        for name in names if number % 2 == 0 else reversed(names):
            turns[name].append(runners[name].time(feeds, calls[name]))
    found = {name: ratio_of_rounds(turns[names[0]], turns[name], 0.95, np.random.default_rng(0)) for name in names}
    return {name: [one.estimate, one.low, one.high] for name, one in found.items()}


def tables(rows: dict[str, dict[str, Any]]) -> list[str]:
    """Markdown."""
    whole = rows["whole"]["top1"]
    lines = [f"top-1 of the whole model: {whole:.2f}", "", "| 2:4, one shot | top-1 | lost |", "|---|---|---|"]
    lines += [f"| {name} | {rows[name]['top1']:.2f} | {whole - rows[name]['top1']:.2f} |" for name in SPARSE]
    lines += ["", "| channels | MACs left | parameters left | top-1 | lost | times as fast [95 %] |"]
    lines += ["|---|---|---|---|---|---|"]
    for name in CHANNELS:
        row = rows[name]
        macs, parameters = (100 * row[what][1] / row[what][0] for what in ("macs", "parameters"))
        ratio, low, high = row["speedup"]
        lines.append(
            f"| {name} | {macs:.1f} % | {parameters:.1f} % | {row['top1']:.2f} | {whole - row['top1']:.2f} | "
            f"{ratio:.2f} [{low:.2f}, {high:.2f}] |"
        )
    return lines


if __name__ == "__main__":
    main()
