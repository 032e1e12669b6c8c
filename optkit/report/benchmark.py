"""What ``optkit bench`` measured, as plain text: one table for every batch size."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from optkit.report.text import Document, environments, fitted, interval, milliseconds, table, wrapped


def render(document: Document) -> str:
    """The tables, what was not run, and the batch that keeps to a latency bound."""
    blocks = [_heat(heat, document["confidence"]) for heat in document["heats"] if heat["rows"]]
    parts = [*blocks, _runners(document), _not_run(document), _bound(document)]
    texts = ["\n".join(map(fitted, part)) for part in parts]
    return "\n\n".join(text for text in texts if text) + "\n"


def _heat(heat: Document, confidence: float) -> Iterator[str]:
    latency = heat["latency"]
    sizes = "".join(f", {dim} {size}" for dim, size in latency["sizes"].items() if dim != "batch")
    yield f"Batch {heat['batch']}{sizes}: {latency['feeds']}, {latency['rounds']} interleaved rounds"
    header = ["", "median ms", f"{100 * confidence:g} % interval", "p95 ms", "samples/s", "times as fast", "cosine"]
    yield from table(header, [_row(row) for row in heat["rows"]])
    doubtful = [row["contestant"] for row in heat["rows"] if not row["reliable"]]
    if doubtful:
        yield from wrapped("the intervals are too narrow: so few rounds cannot give that confidence")
    against = dict.fromkeys(row["against"] for row in heat["rows"] if row["speed"] is not None)
    if against:
        yield from wrapped(f"times as fast as {' or '.join(against)}, the first on the same device")


def _row(row: Document) -> list[str]:
    speed = "" if row["speed"] is None else f"{row['speed']:.2f} {interval(row['speed_interval'], 2)}"
    return [
        row["contestant"],
        milliseconds(row["median_ms"]),
        f"[{milliseconds(row['interval_ms'][0])}, {milliseconds(row['interval_ms'][1])}]",
        milliseconds(row["p95_ms"]),
        f"{row['throughput_per_s']:.1f}",
        speed,
        f"{row['cosine']:.5f}",
    ]


def _runners(document: Document) -> Iterator[str]:
    last: dict[str, Any] = {}
    for heat in document["heats"]:
        if heat["latency"]:
            last.update(heat["latency"]["runners"])
    yield from environments(last)


def _not_run(document: Document) -> Iterator[str]:
    if document["not_run"]:
        yield "Not run"
    for alike in document["not_run"]:
        yield from wrapped(f"{', '.join(alike['contestants'])}: {alike['why']}")


def _bound(document: Document) -> Iterator[str]:
    bound = document.get("bound")
    if bound is None:
        return
    yield f"The batch with the most samples/s whose p{bound['percentile']} is within {milliseconds(bound['ms'])} ms"
    for name, best in bound["best"].items():
        if best is None:
            yield from wrapped(f"{name}: none of these")
        else:
            told = f"batch {best['batch']}, {best['throughput_per_s']:.1f} samples/s"
            yield from wrapped(f"{name}: {told}, p{bound['percentile']} {milliseconds(best['p95_ms'])} ms")
    for row in bound["undecided"]:
        few = f"{row['calls']} calls are too few to tell, {bound['calls_needed']} are needed: use more rounds"
        yield from wrapped(f"{row['contestant']} at batch {row['batch']}: {few}")
