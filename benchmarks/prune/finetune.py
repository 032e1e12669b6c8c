"""How much of what INT8 lost finetune_int8 brings back: each case compiled without it and with it, on the same samples.

    python benchmarks/prune/finetune.py [--out .out/bench-finetune] [CASE ...]

Accuracy is that of the engines as the validator measures it on the whole validation split. Writes ``finetune.json``
into --out after each case.
"""

from __future__ import annotations

import argparse
import json
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import optkit
from optkit.recipe import Recipe
from optkit.targets.cpu import this_cpu

ROOT = Path(__file__).resolve().parents[2]

CLIPPED = {"activations": "static", "calibrate": {"method": "percentile", "percentile": 98}, "correct_bias": False}
"""Cuts off a fiftieth of every activation: more than any sound calibration does."""

STATIC = {"activations": "static"}
PHOTOS = {"epochs": 4, "batch_size": 16, "held_out": 0.2}
FASHION = {"epochs": 2, "samples": 20000}
LABELLED = {"epochs": 3, "samples": 6000, "batch_size": 32, "held_out": 0}

CASES: Mapping[str, tuple[str, Mapping[str, Any], Mapping[str, Any]]] = {
    "EfficientNet-Lite0, default": ("recipes/efficientnet-lite0-int8.yaml", STATIC, {"train": PHOTOS}),
    # Its checkpoint is written by benchmarks/int8/fashion.py
    "EfficientNet-Lite0, labels": ("benchmarks/int8/fashion.yaml", STATIC, {"train": LABELLED}),
    "ResNet8, clipped": ("recipes/fashion-resnet8-int8.yaml", CLIPPED, {"train": FASHION}),
    "ResNet8, clipped, ranges learned": (
        "recipes/fashion-resnet8-int8.yaml",
        CLIPPED,
        {"train": FASHION, "ranges": "learned"},
    ),
}
"""Recipe, fields of quantize_int8, fields of finetune_int8."""


def main() -> None:
    """Run the cases."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("cases", nargs="*", metavar="CASE", help=f"of: {', '.join(CASES)}")
    parser.add_argument("--out", type=Path, default=ROOT / ".out/bench-finetune")
    given = parser.parse_args()
    given.out.mkdir(parents=True, exist_ok=True)
    document: dict[str, Any] = {"cpu": this_cpu().name, "cases": {}}
    for name in given.cases or CASES:
        document["cases"][name] = case(*CASES[name], given.out)
        (given.out / "finetune.json").write_text(json.dumps(document, indent=1))
        print(name, json.dumps(document["cases"][name]), flush=True)


def case(recipe: str, quantize: Mapping[str, Any], finetune: Mapping[str, Any], out: Path) -> dict[str, Any]:
    """What INT8 loses without fine-tuning and with it."""
    base = Recipe.load(ROOT / recipe)
    passes = [step.model_dump(mode="json") for step in base.passes]
    passes = [{**step, **quantize} if step["use"] == "quantize_int8" else step for step in passes]
    tuned = [*passes[:-1], {"use": "finetune_int8", **finetune}, passes[-1]]
    before, after = (compiled(base, steps, out / name) for name, steps in (("ptq", passes), ("tuned", tuned)))
    lost, left = before["drop_points"], after["drop_points"]
    return {"ptq": before, "tuned": after, "recovered": (lost - left) / lost if lost > 0 else None}


def compiled(base: Recipe, passes: list[dict[str, Any]], out: Path) -> dict[str, Any]:
    """The drop of one recipe, with its interval."""
    latency = {"rounds": 2, "seconds": 0.01, "warmup": 0.0}
    recipe = base.updated(
        passes=passes, gate={"max_drop": 100.0}, threads=1, validation={"latency": latency, "stage_samples": 8}
    )
    start = time.perf_counter()
    bundle = optkit.compile(None, recipe, out, force=True)
    accuracy = bundle.report["accuracy"]
    keys = ("drop_points", "interval", "baseline", "candidate")
    found = {key: accuracy[key] for key in keys if key in accuracy}
    record = bundle.manifest["records"].get("finetune_int8", {})
    training = {
        key: record[key] for key in ("score_before", "score", "best_epoch", "steps", "seconds") if key in record
    }
    return {**found, "samples": bundle.report["samples"]["count"], "seconds": time.perf_counter() - start, **training}


if __name__ == "__main__":
    main()
