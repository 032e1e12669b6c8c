"""EfficientNet-Lite0 that tells ten kinds of clothes apart: a depthwise network with labels, which ImageNet lacks here.

    python benchmarks/int8/fashion.py .out/bench-int8/efficientnet-fashion.pth

ImageNet's weights stay as they are; a linear head is trained on the features of 6,000 training images of Fashion-MNIST.
"""

from __future__ import annotations

import sys
from pathlib import Path

import torch
from torch import nn

sys.path.insert(0, str(Path(__file__).resolve().parents[2] / "examples/models"))
from efficientnet import EfficientNetLite0, SameConv2d

ROOT = Path(__file__).resolve().parents[2]
IMAGES, CLASSES = 6000, 10


def efficientnet_gray() -> EfficientNetLite0:
    """The factory: [n, 1, height, width] -> logits [n, 10]."""
    model = EfficientNetLite0()
    model._conv_stem = SameConv2d(1, 32, 3, 2)
    model._fc = nn.Linear(1280, CLASSES)
    return model


def main(to: Path) -> None:
    from optkit.data import open_data

    torch.manual_seed(0)
    torch.set_num_threads(1)
    weights = torch.load(ROOT / ".data/efficientnet/weights.pth", weights_only=True)
    # Three equal channels through the stem are one through the sum of its weights
    weights["_conv_stem.weight"] = weights["_conv_stem.weight"].sum(dim=1, keepdim=True)
    head = nn.Linear(1280, CLASSES)
    weights |= {f"_fc.{name}": value for name, value in head.state_dict().items()}
    model = efficientnet_gray()
    model.load_state_dict(weights)
    model.eval()
    features, labels = [], []
    model._fc = nn.Identity()  # type: ignore[assignment]  # the features themselves
    data = open_data(ROOT / "benchmarks/int8/fashion-data.yaml")
    with torch.no_grad():
        for batch in data.batches("calibration", 64, IMAGES):
            features.append(model(torch.from_numpy(batch.feeds["image"])))
            labels.append(torch.from_numpy(batch.labels).long())
    _fit(head, torch.cat(features), torch.cat(labels))
    torch.save(weights | {f"_fc.{name}": value.detach() for name, value in head.state_dict().items()}, to)


def _fit(head: nn.Linear, features: torch.Tensor, labels: torch.Tensor) -> None:
    """Minimize the cross entropy with an L2 penalty of 1 / (2 n)."""
    optimizer = torch.optim.LBFGS(head.parameters(), max_iter=300, line_search_fn="strong_wolfe")

    def loss() -> torch.Tensor:
        optimizer.zero_grad()
        value = nn.functional.cross_entropy(head(features), labels)
        value = value + head.weight.square().sum() / (2 * len(labels))
        value.backward()
        return value

    optimizer.step(loss)


if __name__ == "__main__":
    main(Path(sys.argv[1]))
