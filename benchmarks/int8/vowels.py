"""Trains the BiLSTM of ``examples/models/bilstm.py`` to tell nine speakers apart by a vowel, in seconds.

python benchmarks/int8/vowels.py .out/bench-int8/vowels.pt
"""

from __future__ import annotations

import sys
from pathlib import Path

import torch
from torch import nn

sys.path.insert(0, str(Path(__file__).resolve().parents[2] / "examples/models"))
from bilstm import BiLstm

ROOT = Path(__file__).resolve().parents[2]
STEPS = 400


def main(to: Path) -> None:
    from optkit.data import open_data

    torch.manual_seed(0)
    torch.set_num_threads(1)
    batch = next(iter(open_data(ROOT / "benchmarks/int8/vowels-training.yaml").batches("calibration", 270)))
    features, labels = torch.from_numpy(batch.feeds["utterance"]), torch.from_numpy(batch.labels)
    model = BiLstm()
    optimizer = torch.optim.Adam(model.parameters(), lr=1e-2, weight_decay=1e-4)
    for _ in range(STEPS):
        rows = torch.randint(0, len(labels), (64,))
        optimizer.zero_grad()
        nn.functional.cross_entropy(model(features[rows]), labels[rows]).backward()
        optimizer.step()
    torch.save(model.state_dict(), to)


if __name__ == "__main__":
    main(Path(sys.argv[1]))
