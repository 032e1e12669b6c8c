"""How far two sets of outputs are apart: SQNR, cosine and the largest error, safe where values are not finite.

For a reference ``r`` and an actual ``a``, flattened and in float64::

    sqnr_db = 10 log10( sum r^2 / sum (r - a)^2 )      inf where they are equal
    cosine  = r.a / (|r| |a|)                          1 where both are zero
    max_abs = max |r - a|
    max_rel = max |r - a| / max |r|                    of the tensor's largest value: elements near zero say little
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from optkit.errors import PostconditionError
from optkit.models import Feeds

Array = np.ndarray[Any, Any]


@dataclass(frozen=True)
class Difference:
    """How far outputs are from their reference: every figure is that of the worst output.

    Attributes:
        sqnr_db: signal to noise ratio in dB; ``inf`` is equal, ``-inf`` is not finite where the reference is.
        cosine: from -1 to 1; 0 where the actual is not finite and the reference is.
        max_abs: the largest error.
        max_rel: the largest error relative to the largest value of the reference.
        nonfinite: how many values are NaN or infinite where the reference is not, or the reverse.
        outputs: the same for each output.
    """

    sqnr_db: float
    cosine: float
    max_abs: float
    max_rel: float
    nonfinite: int = 0
    outputs: Mapping[str, Difference] = field(default_factory=dict)

    @property
    def worst(self) -> str:
        """The name of the output with the lowest SQNR; empty if this is a single output's difference."""
        return min(self.outputs, key=lambda name: self.outputs[name].sqnr_db, default="")

    def __str__(self) -> str:
        text = f"SQNR {self.sqnr_db:.1f} dB, cosine {self.cosine:.6f}, max error {self.max_abs:.3g}"
        text += f" ({self.max_rel:.2g} of the largest value)"
        return text + (f", {self.nonfinite} values not finite" if self.nonfinite else "")


@dataclass(frozen=True)
class Sums:
    """What the difference of one output is made of: the sums of two batches add up to those of both together."""

    signal: float = 0.0
    noise: float = 0.0
    other: float = 0.0
    product: float = 0.0
    largest: float = 0.0
    max_abs: float = 0.0
    nonfinite: int = 0

    @classmethod
    def of(cls, reference: Array, actual: Array) -> Sums:
        """The sums over every element of two arrays of one shape."""
        r, a = reference.astype(np.float64).ravel(), actual.astype(np.float64).ravel()
        finite = np.isfinite(r) & np.isfinite(a)
        same = (r == a) | (np.isnan(r) & np.isnan(a))
        # Infinities and NaN that agree (a mask of -inf) carry no error; the rest is judged without them
        nonfinite = int(np.count_nonzero(~finite & ~same))
        r, a = r[finite], a[finite]
        error = np.abs(r - a)
        return cls(
            signal=float(r @ r),
            noise=float(error @ error),
            other=float(a @ a),
            product=float(r @ a),
            largest=float(np.max(np.abs(r), initial=0.0)),
            max_abs=float(np.max(error, initial=0.0)),
            nonfinite=nonfinite,
        )

    def __add__(self, more: Sums) -> Sums:
        return Sums(
            signal=self.signal + more.signal,
            noise=self.noise + more.noise,
            other=self.other + more.other,
            product=self.product + more.product,
            largest=max(self.largest, more.largest),
            max_abs=max(self.max_abs, more.max_abs),
            nonfinite=self.nonfinite + more.nonfinite,
        )

    @property
    def difference(self) -> Difference:
        """The figures of this one output."""
        if self.nonfinite:
            return Difference(-math.inf, 0.0, math.inf, math.inf, self.nonfinite)
        if self.noise == 0.0:
            return Difference(math.inf, 1.0, 0.0, 0.0)
        return Difference(
            sqnr_db=10 * math.log10(self.signal / self.noise) if self.signal else -math.inf,
            cosine=self.product / math.sqrt(self.signal * self.other) if self.signal and self.other else 0.0,
            max_abs=self.max_abs,
            max_rel=self.max_abs / self.largest if self.largest else math.inf,
        )


def compare(reference: Feeds, actual: Feeds) -> Difference:
    """Compare every output of ``reference`` with the one of the same name in ``actual``.

    Raises:
        PostconditionError: an output is missing or has another shape.
    """
    return difference(sums(reference, actual))


def sums(reference: Feeds, actual: Feeds) -> dict[str, Sums]:
    """What ``difference`` needs, by output: for comparisons that are too long to keep their outputs.

    Raises:
        PostconditionError: an output is missing or has another shape.
    """
    found: dict[str, Sums] = {}
    for name, wanted in reference.items():
        if name not in actual:
            raise PostconditionError(f"the output {name!r} is missing; there are {', '.join(actual) or 'none'}")
        if np.shape(actual[name]) != np.shape(wanted):
            raise PostconditionError(
                f"the output {name!r} has the shape {np.shape(actual[name])}, not {np.shape(wanted)}"
            )
        found[name] = Sums.of(np.asarray(wanted), np.asarray(actual[name]))
    return found


def difference(sums: Mapping[str, Sums]) -> Difference:
    """The difference over all outputs, each with its own figures in ``outputs``."""
    outputs = {name: found.difference for name, found in sums.items()}
    return Difference(
        sqnr_db=min((d.sqnr_db for d in outputs.values()), default=math.inf),
        cosine=min((d.cosine for d in outputs.values()), default=1.0),
        max_abs=max((d.max_abs for d in outputs.values()), default=0.0),
        max_rel=max((d.max_rel for d in outputs.values()), default=0.0),
        nonfinite=sum(d.nonfinite for d in outputs.values()),
        outputs=outputs,
    )
