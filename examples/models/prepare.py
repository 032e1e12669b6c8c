"""Writes each fetched model as a ``torch.export`` program too, with a dynamic batch, beside its state_dict.

python examples/models/prepare.py digits fashion efficientnet bbc movies --data .data

.data/digits/handwriting_model.pth     ->  .data/digits/digit_cnn.pt2
.data/fashion/resnet8.pt               ->  .data/fashion/resnet8.pt2
.data/efficientnet/weights.pth         ->  .data/efficientnet/efficientnet_lite0.pt2
.data/bbc/classifier.safetensors       ->  .data/bbc/minilm_classifier.pt2
"""

from __future__ import annotations

import argparse
import os
import sys
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import torch
from torch.export import Dim

sys.path.insert(0, str(Path(__file__).resolve().parent))
from digits import digit_cnn
from efficientnet import efficientnet_lite0
from minilm import minilm_classifier
from resnet8 import resnet8


@dataclass(frozen=True)
class Example:
    """A model: where its weights lie, what it is called, and an input of two samples."""

    weights: str
    program: str
    factory: Callable[[Path], torch.nn.Module]
    inputs: Callable[[], dict[str, torch.Tensor]]


def _tokens() -> dict[str, torch.Tensor]:
    return {"input_ids": torch.randint(1000, 2000, (2, 16)), "attention_mask": torch.ones(2, 16, dtype=torch.int64)}


EXAMPLES = {
    "digits": Example(
        "digits/handwriting_model.pth",
        "digits/digit_cnn.pt2",
        lambda data: digit_cnn(),
        lambda: {"image": torch.randn(2, 1, 28, 28)},
    ),
    "fashion": Example(
        "fashion/resnet8.pt",
        "fashion/resnet8.pt2",
        lambda data: resnet8(),
        lambda: {"image": torch.randn(2, 1, 28, 28)},
    ),
    "efficientnet": Example(
        "efficientnet/weights.pth",
        "efficientnet/efficientnet_lite0.pt2",
        lambda data: efficientnet_lite0(),
        lambda: {"image": torch.randn(2, 3, 224, 224)},
    ),
    "bbc": Example(
        "bbc/classifier.safetensors",
        "bbc/minilm_classifier.pt2",
        lambda data: minilm_classifier(str(data / "minilm")),
        _tokens,
    ),
    "movies": Example(
        "movies/classifier.safetensors",
        "movies/minilm_classifier.pt2",
        lambda data: minilm_classifier(str(data / "minilm"), classes=2),
        _tokens,
    ),
}


def prepare(example: Example, data: Path) -> Path:
    """Load the weights, export, and write the program aside before it gets its name."""
    model = example.factory(data).eval()
    model.load_state_dict(_state_dict(data / example.weights))
    inputs = example.inputs()
    sequence = {1: Dim("sequence", min=2, max=512)} if "input_ids" in inputs else {}
    shapes = tuple({0: Dim("batch", min=1, max=1024), **sequence} for _ in inputs)
    program = torch.export.export(model, tuple(inputs.values()), dynamic_shapes=shapes)
    target = data / example.program
    part = target.with_name(f".{os.getpid()}-{target.name}")
    torch.export.save(program, part)
    return part.replace(target)


def _state_dict(path: Path) -> dict[str, torch.Tensor]:
    if path.suffix == ".safetensors":
        from safetensors.torch import load_file

        return load_file(path)
    return torch.load(path, weights_only=True)


def main() -> int:
    """Read the command line and export."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("models", nargs="+", choices=EXAMPLES, metavar="MODEL", help=", ".join(EXAMPLES))
    parser.add_argument("--data", type=Path, default=Path(__file__).resolve().parents[2] / ".data")
    arguments = parser.parse_args()
    for name in arguments.models:
        example = EXAMPLES[name]
        if not (arguments.data / example.weights).exists():
            print(f"prepare.py: run first: python calibration/fetch.py {name} --to {arguments.data}", file=sys.stderr)
            return 1
        print(f"{name}: {prepare(example, arguments.data)}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
