"""Who is compared with whom: the baselines and the candidate, all opened and ready to run."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import combinations

from optkit.errors import UsageError
from optkit.models import Signature
from optkit.targets.base import Runner


@dataclass(frozen=True)
class Entrant:
    """A runner and the name that the report calls it by.

    Attributes:
        name: in the report.
        runner: already open.
        scored: whether it runs over the validation samples too, or is only timed.
    """

    name: str
    runner: Runner
    scored: bool = True


@dataclass(frozen=True)
class Contest:
    """Baselines and a candidate with the same inputs and outputs.

    Attributes:
        baselines: the first is the reference: what "correct" means, and what the metric's drop is counted from.
        candidate: what is judged.
        rival: the name of the baseline that a speedup is counted from.
        what: what the candidate is, in words.
        why_not: why the engine itself did not run and something else stands in for it; None if it ran.
    """

    baselines: tuple[Entrant, ...]
    candidate: Entrant
    rival: str
    what: str = "engine"
    why_not: str | None = None

    def __post_init__(self) -> None:
        names = [entrant.name for entrant in self.entrants]
        if len(set(names)) != len(names):
            raise UsageError(f"every entrant of a comparison needs its own name, not {', '.join(names)}")
        for one, other in combinations(self.entrants, 2):
            _check_same_boundary(one, other)

    @property
    def reference(self) -> Entrant:
        """The baseline that says what is correct."""
        return self.baselines[0]

    @property
    def entrants(self) -> tuple[Entrant, ...]:
        """Everyone, baselines first."""
        return (*self.baselines, self.candidate)

    @property
    def timed(self) -> tuple[Entrant, ...]:
        """Everyone whose latency means something: what stands in for an engine says nothing of the engine's."""
        return self.entrants if self.why_not is None else self.baselines

    @property
    def same_device(self) -> bool:
        """Whether the candidate ran where the rival ran; otherwise a ratio of latencies compares two machines."""
        (rival,) = (entrant for entrant in self.entrants if entrant.name == self.rival)
        return rival.runner.environment.device == self.candidate.runner.environment.device

    @property
    def signature(self) -> Signature:
        """What fits everyone: the boundary with the fewest dynamic dimensions, and of those the narrowest batch."""
        return min((entrant.runner.signature for entrant in self.entrants), key=_freedom)


def _freedom(signature: Signature) -> tuple[int, int]:
    return len(signature.dynamic), signature.range(signature.batch).max if signature.batch else 1


def _check_same_boundary(one: Entrant, other: Entrant) -> None:
    for side in ("inputs", "outputs"):
        mine, theirs = _shown(one, side), _shown(other, side)
        if mine != theirs:
            raise UsageError(
                f"{other.name} cannot be compared with {one.name}: its {side} are {', '.join(theirs)}, not "
                f"{', '.join(mine)}; export both with the same names, dtypes and ranks"
            )


def _shown(entrant: Entrant, side: str) -> Sequence[str]:
    """Names, dtypes and ranks; sizes may differ where one of the two is dynamic."""
    specs = entrant.runner.signature.inputs if side == "inputs" else entrant.runner.signature.outputs
    return sorted(f"{spec.name} ({spec.dtype}, {len(spec.shape)} dimensions)" for spec in specs)
