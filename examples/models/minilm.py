"""What the MiniLM sentence encoder is used for: classifying texts, and telling how alike two texts are."""

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
        return _sentence_vectors(self.encoder, input_ids, attention_mask)

    def forward(self, input_ids: torch.Tensor, attention_mask: torch.Tensor) -> torch.Tensor:
        return self.head(self.embed(input_ids, attention_mask))


class MiniLmSimilarity(nn.Module):
    """Two texts as ids and mask [n, tokens] -> the cosine of their sentence vectors [n]."""

    def __init__(self, encoder: nn.Module) -> None:
        super().__init__()
        self.encoder = encoder

    def forward(
        self,
        left_input_ids: torch.Tensor,
        left_attention_mask: torch.Tensor,
        right_input_ids: torch.Tensor,
        right_attention_mask: torch.Tensor,
    ) -> torch.Tensor:
        left = _sentence_vectors(self.encoder, left_input_ids, left_attention_mask)
        right = _sentence_vectors(self.encoder, right_input_ids, right_attention_mask)
        return (left * right).sum(-1)


def _sentence_vectors(encoder: nn.Module, input_ids: torch.Tensor, attention_mask: torch.Tensor) -> torch.Tensor:
    hidden = encoder(input_ids=input_ids, attention_mask=attention_mask).last_hidden_state
    mask = attention_mask.unsqueeze(-1).to(hidden.dtype)
    return F.normalize((hidden * mask).sum(1) / mask.sum(1), dim=-1)


def minilm_classifier(folder: str | Path = FETCHED, classes: int = 5, pretrained: bool = False) -> nn.Module:
    """The factory: ``examples/models/minilm.py:minilm_classifier``.

    Args:
        folder: a Hugging Face model folder, by default the one that ``make data`` fetches; without ``pretrained`` only
            its configuration is read.
        classes: how many logits.
        pretrained: load the encoder's weights from the folder instead of leaving them to a state_dict.
    """
    encoder, width = _encoder(folder, pretrained)
    return MiniLmClassifier(encoder, width, classes).eval()


def minilm_similarity(folder: str) -> nn.Module:
    """The factory ``examples/models/minilm.py:minilm_similarity``; its weights are those of the folder."""
    return MiniLmSimilarity(_encoder(folder, pretrained=True)[0]).eval()


def _encoder(folder: str, pretrained: bool) -> tuple[nn.Module, int]:
    from transformers import AutoConfig, AutoModel

    config = AutoConfig.from_pretrained(folder, local_files_only=True)
    if pretrained:
        encoder = AutoModel.from_pretrained(folder, add_pooling_layer=False, local_files_only=True)
    else:
        encoder = AutoModel.from_config(config, add_pooling_layer=False)
    return encoder, config.hidden_size
