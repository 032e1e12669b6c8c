"""A text classifier: the MiniLM sentence encoder, the mean of its token vectors, and one linear layer."""

from __future__ import annotations

from pathlib import Path

import torch
from torch import nn
from torch.nn import functional as F

FETCHED = Path(__file__).resolve().parents[2] / ".data/minilm"


class MiniLmClassifier(nn.Module):
    """[n, tokens] ids and mask -> logits [n, classes], from the normalized masked mean of the last hidden state."""

    def __init__(self, encoder: nn.Module, width: int, classes: int) -> None:
        super().__init__()
        self.encoder = encoder
        self.head = nn.Linear(width, classes)

    def embed(self, input_ids: torch.Tensor, attention_mask: torch.Tensor) -> torch.Tensor:
        """Sentence vectors [n, width] of length one."""
        hidden = self.encoder(input_ids=input_ids, attention_mask=attention_mask).last_hidden_state
        mask = attention_mask.unsqueeze(-1).to(hidden.dtype)
        return F.normalize((hidden * mask).sum(1) / mask.sum(1), dim=-1)

    def forward(self, input_ids: torch.Tensor, attention_mask: torch.Tensor) -> torch.Tensor:
        return self.head(self.embed(input_ids, attention_mask))


def minilm_classifier(folder: str | Path = FETCHED, classes: int = 5, pretrained: bool = False) -> nn.Module:
    """The factory: ``examples/models/minilm.py:minilm_classifier``.

    Args:
        folder: a Hugging Face model folder, by default the one that ``make data`` fetches; without ``pretrained`` only
            its configuration is read.
        classes: how many logits.
        pretrained: load the encoder's weights from the folder instead of leaving them to a state_dict.
    """
    from transformers import AutoConfig, AutoModel

    config = AutoConfig.from_pretrained(folder, local_files_only=True)
    if pretrained:
        encoder = AutoModel.from_pretrained(folder, add_pooling_layer=False, local_files_only=True)
    else:
        encoder = AutoModel.from_config(config, add_pooling_layer=False)
    return MiniLmClassifier(encoder, config.hidden_size, classes).eval()
