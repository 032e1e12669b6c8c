"""Hooks for ``distill``: half of the training images are mirrored, and every epoch tells how it went.

In a recipe, with the path relative to it: ``{use: distill, hooks: ../examples/hooks/flips.py:Flips}``.
"""

from __future__ import annotations

import numpy as np

import optkit
from optkit.data import Batch
from optkit.training import State


class Flips(optkit.Hooks):
    """A coat is a coat in the mirror too, so the student sees twice as many."""

    def batch(self, batch: Batch, rng: np.random.Generator) -> Batch:
        """Mirror the images [n, 1, height, width] that the dice choose; ``rng`` keeps an interrupted run exact."""
        images = batch.feeds["image"]
        chosen = rng.random(len(images)) < 0.5
        mirrored = np.where(chosen[:, None, None, None], images[..., ::-1], images)
        return Batch({**batch.feeds, "image": mirrored}, batch.labels)

    def on_epoch(self, state: State) -> None:
        """One line for each epoch."""
        print(f"epoch {state.epoch}: loss {state.loss:.3f}, held-out samples {100 * (state.score or 0):.1f} %")
