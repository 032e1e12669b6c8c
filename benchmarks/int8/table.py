"""Prints what is under .out/bench-int8 as Markdown: ``python benchmarks/int8/table.py``. Standard library only."""

from __future__ import annotations

import json
import sys
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

from cases import CASES, ENTRANTS, OUT, PEERS, Entrant

HEAD = (
    "| entrant | metric | difference to FP32 [95 %] | SQNR dB (exact sums) | cosine | speed-up over FP32 [95 %] "
    "| CPU s | peak MB | file MB |\n|---|---|---|---|---|---|---|---|---|"
)
FEATURES = ("avx2", "avx512f", "avx512_vnni", "avx_vnni", "amx_int8")


def text(models: Iterable[str] = CASES, peers: Iterable[str] = PEERS, quick: bool = False) -> str:
    """The whole table; a section for each model that has results."""
    wanted = set(peers)
    return "\n".join([_machine(), *(line for name in models for line in _section(name, wanted, quick))])


def _machine() -> str:
    info = Path("/proc/cpuinfo").read_text(encoding="utf-8", errors="replace")
    lines = dict(line.split(":", 1) for line in info.splitlines() if ":" in line)
    entries = {key.strip(): value.strip() for key, value in lines.items()}
    flags = entries.get("flags", "").split()
    features = ", ".join(f"{name} {'yes' if name in flags else 'NO'}" for name in FEATURES)
    return (
        f"Processor: {entries.get('model name', 'unknown')} ({features}). Without VNNI, ONNX Runtime's UINT8 x INT8 "
        "products saturate and gain less speed: `exact sums` is the SQNR without that saturation.\n"
        "Entrants that are meant for TensorRT, which sums exactly, are judged with exact sums altogether.\n"
        "Latency: processor time, one thread, batch 1, in turns with FP32. CPU s and peak MB: the whole process that "
        "quantizes, imports included."
    )


def _section(name: str, peers: set[str], quick: bool) -> Iterator[str]:
    folder = OUT / (f"{name}-quick" if quick else name)
    rows = [(entrant, _read(folder, entrant)) for entrant in ENTRANTS if entrant.peer in peers]
    scored = [result for _, result in rows if "score" in result]
    if not scored:
        return
    first = scored[0]
    yield f"\n### {CASES[name].title}\n"
    yield (
        f"{first['metric']} on {first['samples']} samples; FP32 {first['float_score']:.4f}, "
        f"{min(result['float_ms'] for result in scored):.2f} ms\n"
    )
    yield HEAD
    yield from (_row(entrant, result) for entrant, result in rows if result)


def _read(folder: Path, entrant: Entrant) -> dict[str, Any]:
    found: dict[str, Any] = {}
    # The cost comes last: a score that failed has processor seconds of its own
    for kind in ("score", "cost"):
        path = folder / f"{entrant.name}.{kind}.json"
        found |= json.loads(path.read_text()) if path.exists() else {}
    return found


def _row(entrant: Entrant, result: dict[str, Any]) -> str:
    name = f"{entrant.peer} {entrant.title}" + (f" ({result['calibration']} samples)" if entrant.few else "")
    name = f"**{name}**" if entrant.peer == "optkit" else name
    cost = f"{result.get('cpu_s', 0):.0f} | {result.get('peak_mb', 0):.0f}"
    if "error" in result or "score" not in result:
        status = f"failed: {result['error'][:120]}" if "error" in result else "not scored yet"
        return f"| {name} | {status} | | | | | {cost} | |"
    speedup = result["speedup"]
    # Adding 0 makes -0 a 0
    difference = [round(100 * value, 2) + 0 for value in result["difference"]]
    exact = [result.get("exact_sqnr_db", {}).get(output) for output in result["sqnr_db"]]
    sqnr = ", ".join(
        f"{value:.1f}" + (f" ({other:.1f})" if other is not None else "")
        for value, other in zip(result["sqnr_db"].values(), exact, strict=True)
    )
    return (
        f"| {name} | {result['score']:.4f} | {difference[0]:+.2f} [{difference[1]:+.2f}, "
        f"{difference[2]:+.2f}] | {sqnr} | {', '.join(f'{value:.4f}' for value in result['cosine'].values())} "
        f"| {speedup[0]:.2f} [{speedup[1]:.2f}, {speedup[2]:.2f}] | {cost} | {result['bytes'] / 1e6:.2f} |"
    )


if __name__ == "__main__":
    print(text(sys.argv[1:] or CASES))
