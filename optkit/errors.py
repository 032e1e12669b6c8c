"""The errors that optkit raises: each says what is wrong, where, and how to mend it, and knows its exit code.

::

    OptkitError                 1  a bug in optkit, if raised as itself
    ├── UsageError              2  what the user typed or handed over does not fit
    │   ├── RecipeError            a recipe or data spec, with file and line
    │   ├── CheckpointError        the model file, its factory or its inputs
    │   ├── DataError              the data set, its columns, labels or values
    │   └── OutputError            the output folder
    ├── GateError               3  the gate was missed or is inconclusive
    ├── UnavailableError        4  a target, device or package is missing here
    └── PassError               5  a pass failed
        ├── PreconditionError      what came in does not suit the pass
        ├── PostconditionError     what went out is not what the pass promised
        └── BuildError             a target could not build its engine
"""

from __future__ import annotations

import difflib
from collections.abc import Iterable
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from optkit.bundle import Bundle


class OptkitError(Exception):
    """Base of everything that optkit raises on purpose."""

    exit_code = 1


class UsageError(OptkitError, ValueError):
    """What the user typed or handed over does not fit."""

    exit_code = 2


class RecipeError(UsageError):
    """A recipe or a data spec is wrong; the message starts with ``file:line``."""


class CheckpointError(UsageError):
    """The checkpoint cannot be read, or does not fit its factory or its inputs."""


class DataError(UsageError):
    """The data set cannot be read, or does not hold what the model needs."""


class OutputError(UsageError):
    """The output folder cannot be used."""


class GateError(OptkitError):
    """The gate was missed, or the samples do not decide it. ``bundle`` is what was rejected, its report included."""

    exit_code = 3

    def __init__(self, message: str, bundle: Bundle | None = None) -> None:
        super().__init__(message)
        self.bundle = bundle


class UnavailableError(OptkitError):
    """A target, device or package is missing on this machine."""

    exit_code = 4


class PassError(OptkitError):
    """A pass failed."""

    exit_code = 5


class PreconditionError(PassError):
    """A model or context does not suit the pass that was asked to run on it."""


class PostconditionError(PassError):
    """A pass did not keep what it promises of its result."""


class BuildError(PassError):
    """A target could not build its engine."""


def did_you_mean(word: str, known: Iterable[str]) -> str:
    """The hint that follows an unknown ``word``: the nearest of ``known``, or all of them if none is near."""
    known = sorted(known)
    near = difflib.get_close_matches(word, known, n=1)
    return f"did you mean {near[0]!r}?" if near else f"known: {', '.join(known)}"
