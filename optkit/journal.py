"""Collects what optkit warns of, for the report."""

from __future__ import annotations

import contextlib
import logging
from collections.abc import Iterator


@contextlib.contextmanager
def collected_warnings(logger: str = "optkit") -> Iterator[list[str]]:
    """The messages that ``logger`` and those below it warn of; they still go wherever the log goes."""
    messages: list[str] = []
    handler = logging.Handler(logging.WARNING)
    handler.emit = lambda record: messages.append(record.getMessage())  # type: ignore[method-assign]
    log = logging.getLogger(logger)
    log.addHandler(handler)
    try:
        yield messages
    finally:
        log.removeHandler(handler)
