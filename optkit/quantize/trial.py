"""Keeps what an accuracy algorithm made only if it is measurably nearer to the float model than what was there."""

from __future__ import annotations

import logging
from dataclasses import dataclass
from typing import TypeVar

from optkit.quantize.measure import decibels

log = logging.getLogger("optkit.quantize")

T = TypeVar("T")

LEAST_GAIN_DB = 0.1
"""What gains less on held-out samples is not worth the operators that it may add."""


@dataclass(frozen=True)
class Trial:
    """One algorithm's outcome on held-out samples; SQNR of the model's outputs in dB, higher is better."""

    algorithm: str
    kept: bool
    sqnr_before: float
    sqnr_after: float


def keep_better(algorithm: str, before: tuple[T, float], after: tuple[T, float]) -> tuple[T, float, Trial]:
    """The second of two candidates if its error is clearly smaller, else the first; that error, and what to record.

    Args:
        algorithm: what was tried.
        before: what was there, with its noise to signal ratio.
        after: what the algorithm made of it, with its own.
    """
    kept = after[1] < before[1] and decibels(after[1]) >= decibels(before[1]) + LEAST_GAIN_DB
    trial = Trial(algorithm, kept, round(decibels(before[1]), 2), round(decibels(after[1]), 2))
    log.info(
        "%s: %.2f dB before, %.2f dB after: %s",
        algorithm,
        trial.sqnr_before,
        trial.sqnr_after,
        "kept" if kept else "undone, held-out samples are no better with it",
    )
    return (*(after if kept else before), trial)
