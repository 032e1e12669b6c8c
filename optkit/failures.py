"""How the failure of somebody else's code is told: what happened in one line, and which line of the user's it was."""

from __future__ import annotations

import importlib
import os
import sys
import traceback
from collections.abc import Sequence
from pathlib import Path


def reason(error: BaseException) -> str:
    """The error in one line; TorchScript says what happened last, everyone else first."""
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    if not lines:
        return type(error).__name__
    line = lines[-1] if "TorchScript" in lines[0] else lines[0]
    return f"{type(error).__name__}: {line.removeprefix(f'{type(error).__name__}: ')}"


def blame(error: BaseException) -> str:
    """Where the last line of the user's own code in a traceback is, and what it says."""
    if isinstance(error, SyntaxError) and error.filename:
        return f" at {error.filename}:{error.lineno}"
    torch = sys.modules.get("torch")
    theirs = [str(Path(package.__file__).parent) for package in (importlib, torch) if package and package.__file__]
    ours = f"{Path(__file__).parent}{os.sep}"
    frames = traceback.extract_tb(error.__traceback__)
    users = [frame for frame in frames if not frame.filename.startswith((ours, "<", *theirs))]
    return f" at {users[-1].filename}:{users[-1].lineno}: `{users[-1].line}`" if users else ""


def few(words: Sequence[str]) -> str:
    """The first three, and how many more there are."""
    more = f" and {len(words) - 3} more" if len(words) > 3 else ""
    return ", ".join(words[:3]) + more
