"""Scores one quantized model beside the float one on ONNX Runtime: task metric, SQNR, latency.

    python benchmarks/int8/evaluate.py FOLDER CANDIDATE.onnx RESULT.json --batch 16

Latency is processor time of one thread at batch 1, so that other jobs disturb it little; the float model runs in every
round beside the candidate, and the speed-up is the median over rounds with its interval.
"""

from __future__ import annotations

import argparse
import json
import time
from pathlib import Path
from typing import Any

import numpy as np
import onnxruntime as ort
from samples import Samples

from optkit.data import Batch, DataSpec
from optkit.metrics import Cosine
from optkit.numerics import compare
from optkit.targets.cpu import this_cpu
from optkit.validation.statistics import paired_metric, paired_scores, ratio_of_rounds

Array = np.ndarray[Any, Any]

ROUNDS, TURN_SECONDS = 15, 0.1
EXACT_SAMPLES = 64


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("folder", type=Path)
    parser.add_argument("candidate", type=Path)
    parser.add_argument("result", type=Path)
    parser.add_argument("--batch", type=int, default=16)
    parser.add_argument("--exact", action="store_true", help="accuracy without the saturation of INT8 kernels")
    given = parser.parse_args()
    samples = Samples.load(given.folder / "evaluation")
    wanted = _float_outputs(given.folder, samples, given.batch)
    actual = _outputs(_session(given.candidate, given.exact), samples, given.batch)
    result = _accuracy(given.folder, wanted, actual, samples)
    result["exact"] = given.exact or not this_cpu().saturates_int8
    if not result["exact"]:
        result["exact_sqnr_db"] = _exact_sqnr(given.candidate, wanted, samples, given.batch)
    result |= _latency(given.folder / "float.onnx", given.candidate, next(samples.batches(1)))
    result["bytes"] = given.candidate.stat().st_size
    given.result.write_text(json.dumps(result, indent=1))


def _session(path: Path, exact: bool = False) -> ort.InferenceSession:
    options = ort.SessionOptions()
    options.intra_op_num_threads = options.inter_op_num_threads = 1
    options.log_severity_level = 3
    # Without VNNI, U8S8 products saturate; this gives the exact sums that processors with VNNI compute
    options.add_session_config_entry("session.x64quantprecision", str(int(exact)))
    return ort.InferenceSession(path, options, providers=["CPUExecutionProvider"])


def _outputs(session: ort.InferenceSession, samples: Samples, batch: int) -> dict[str, Array]:
    names = [output.name for output in session.get_outputs()]
    front = session.get_inputs()[0].shape[0]
    parts = [session.run(None, feeds) for feeds in samples.batches(front if isinstance(front, int) else batch)]
    return {name: np.concatenate(arrays) for name, arrays in zip(names, zip(*parts, strict=True), strict=True)}


def _float_outputs(folder: Path, samples: Samples, batch: int) -> dict[str, Array]:
    kept = folder / "float-outputs.npz"
    if not kept.exists():
        np.savez(kept, **_outputs(_session(folder / "float.onnx"), samples, batch))
    with np.load(kept) as arrays:
        return dict(arrays)


def _accuracy(folder: Path, wanted: dict[str, Array], actual: dict[str, Array], samples: Samples) -> dict[str, Any]:
    spec = Path(json.loads((folder / "case.json").read_text())["spec"])
    labels = folder / "evaluation/labels.npy"
    batch = Batch(samples.arrays, np.load(labels) if labels.exists() else None)
    metric, rng = DataSpec.load(spec).metric.bound(spec.parent), np.random.default_rng(0)
    base, rows = (metric.records(outputs, batch, wanted) for outputs in (wanted, actual))
    drop = (
        paired_scores(base, rows, 0.95, rng)
        if metric.per_sample
        else paired_metric(metric.score, base, rows, 0.95, rng)
    )
    cosines = {name: Cosine(output=name).records(actual, batch, wanted) for name in wanted}
    return {
        "metric": metric.name,
        "samples": len(rows),
        "float_score": metric.score(base),
        "score": metric.score(rows),
        "difference": [-drop.estimate, -drop.high, -drop.low],
        "sqnr_db": {name: found.sqnr_db for name, found in compare(wanted, actual).outputs.items()},
        "cosine": {name: float(np.mean(values)) for name, values in cosines.items()},
    }


def _exact_sqnr(candidate: Path, wanted: dict[str, Array], samples: Samples, batch: int) -> dict[str, float]:
    """SQNR of the first samples without the saturation of processors that lack VNNI."""
    few = samples.first(EXACT_SAMPLES)
    actual = _outputs(_session(candidate, exact=True), few, batch)
    found = compare({name: array[: len(few)] for name, array in wanted.items()}, actual)
    return {name: difference.sqnr_db for name, difference in found.outputs.items()}


def _latency(baseline: Path, candidate: Path, feeds: dict[str, Array]) -> dict[str, Any]:
    sessions = [_session(baseline), _session(candidate)]
    calls = [_calls(session, feeds) for session in sessions]
    rounds: list[list[Array]] = [[], []]
    for number in range(ROUNDS):
        for which in (0, 1) if number % 2 == 0 else (1, 0):
            rounds[which].append(_turn(sessions[which], feeds, calls[which]))
    speedup = ratio_of_rounds(rounds[0], rounds[1], 0.95, np.random.default_rng(0))
    medians = [1000 * float(np.median(np.concatenate(turns))) for turns in rounds]
    return {"float_ms": medians[0], "ms": medians[1], "speedup": [speedup.estimate, speedup.low, speedup.high]}


def _calls(session: ort.InferenceSession, feeds: dict[str, Array]) -> int:
    """How many calls make a turn, after a warm-up."""
    _turn(session, feeds, 5)
    return max(5, round(TURN_SECONDS / float(np.median(_turn(session, feeds, 5)))))


def _turn(session: ort.InferenceSession, feeds: dict[str, Array], calls: int) -> Array:
    """Processor seconds of this thread, call by call."""
    session.run(None, feeds)  # the other session had the caches until now
    times = [time.thread_time_ns()]
    for _ in range(calls):
        session.run(None, feeds)
        times.append(time.thread_time_ns())
    return np.diff(times) * 1e-9


if __name__ == "__main__":
    main()
