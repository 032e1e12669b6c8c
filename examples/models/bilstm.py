"""A bidirectional LSTM for JapaneseVowels; its trained weights are ``vowels_bilstm.pt`` beside this file."""

from __future__ import annotations

import torch
from torch import nn


class BiLstm(nn.Module):
    """Utterances [n, 29, 12] -> logits [n, 9], from the mean over the steps."""

    def __init__(self) -> None:
        super().__init__()
        self.lstm = nn.LSTM(12, 64, batch_first=True, bidirectional=True)
        self.head = nn.Linear(128, 9)

    def forward(self, utterance: torch.Tensor) -> torch.Tensor:
        """Nine logits for each utterance."""
        logits: torch.Tensor = self.head(self.lstm(utterance)[0].mean(dim=1))
        return logits
