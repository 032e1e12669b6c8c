"""MiniLM with two outputs, so that its sentence vectors can be compared beside its classes."""

from __future__ import annotations

import sys
from pathlib import Path

import torch
from torch import nn

sys.path.insert(0, str(Path(__file__).resolve().parents[2] / "examples/models"))
from minilm import minilm_classifier


class Both(nn.Module):
    """[n, tokens] ids and mask -> logits [n, classes] and the sentence vectors [n, width] that they come from."""

    def __init__(self, classifier: nn.Module) -> None:
        super().__init__()
        # The attributes of the classifier keep their names, and so do the keys of its state_dict
        self.encoder, self.head, self.embed = classifier.encoder, classifier.head, classifier.embed

    def forward(self, input_ids: torch.Tensor, attention_mask: torch.Tensor) -> dict[str, torch.Tensor]:
        vector = self.embed(input_ids, attention_mask)
        return {"logits": self.head(vector), "vector": vector}


def minilm_both() -> nn.Module:
    return Both(minilm_classifier())
