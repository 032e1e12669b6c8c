"""The report as plain text, at most 100 columns wide."""

from __future__ import annotations

import textwrap
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from optkit.targets.engine_layers import counts_in_words

WIDTH = 100

_REGIONS, _PARTS = 12, 8
"""How many regions in INT8 are shown, and how many parts of those that do not pay."""

_REASONS, _NAMES = 8, 6
"""For how many reasons nodes kept in float32 are named, and how many nodes at a time."""

_LONGEST = 40
"""Characters of a name in a table."""

_NARROWEST = 12
"""Characters of the first column of a table that is too wide for the page."""

Document = Mapping[str, Any]


def render(document: Document) -> str:
    """The summary of a report: verdict, accuracy, stages, latency, warnings; of parts that are missing, nothing."""
    parts = (_verdict, _accuracy, _pruned, _search, _stages, _kept, _engine, _latency, _int8, _passes, _warnings)
    blocks = ["\n".join(fitted(line) for line in part(document)) for part in parts]
    return "\n\n".join(block for block in blocks if block) + "\n"


def _verdict(document: Document) -> Iterator[str]:
    verdict = document.get("verdict")
    if verdict is None:
        return
    yield f"{document.get('recipe', 'report')}: {verdict['status'].upper()}"
    for reason in verdict["reasons"]:
        yield from wrapped(reason)
    candidate = document.get("candidate", {})
    if candidate.get("why_not"):
        yield from wrapped(f"The engine did not run on this machine: {candidate['why_not']}")
        yield from wrapped(f"What was validated instead: {candidate['what']}.")


def _accuracy(document: Document) -> Iterator[str]:
    accuracy = document.get("accuracy")
    if accuracy is None:
        return
    yield f"Accuracy: {accuracy['metric']} on {accuracy['n']} samples"
    if accuracy["broken"]:
        yield from wrapped(accuracy["broken"])
        return
    confidence = f"{100 * accuracy['confidence']:g} % interval"
    baselines = {accuracy["reference"]: {**accuracy, "score": accuracy["baseline"]}, **accuracy["others"]}
    rows = [
        [name, _points(found["score"]), _points(found["drop_points"], 1), interval(found["interval"], 2)]
        for name, found in baselines.items()
    ]
    rows.append([document["candidate"]["name"], _points(accuracy["candidate"]), "", ""])
    yield from table(["", "score", "drop of the candidate", confidence], rows)
    yield f"  ({accuracy['method']})"
    outputs = [[name, *_error(error)] for name, error in accuracy["per_output"].items()]
    yield from table([f"output, against {accuracy['reference']}", "SQNR dB", "cosine", "max error"], outputs)


def _search(document: Document) -> Iterator[str]:
    search = document.get("search")
    if search is None:
        return
    yield "Layers put back into float, the most sensitive first: what each choice gave"
    # The last of those that are timed beside a choice is the one that its speed counts from
    rival = next((list(point["ratios"])[-1] for point in search["points"] if point["ratios"]), None)
    rows = [
        [
            str(point["in_float"]),
            str(point["in_int8"]),
            "-" if point["int8_macs"] is None else f"{100 * point['int8_macs']:.1f} %",
            _points(point["drop_points"], 1),
            interval(point["interval"], 2),
            point["accuracy"],
            str(point["samples"]),
            f"{point['ratios'][rival]:.2f}" if rival in point["ratios"] else "-",
            "chosen" if point["in_float"] == search["chosen"] else "",
        ]
        for point in search["points"]
    ]
    header = ["in float", "in INT8", "MACs in INT8", "drop", "interval", "accuracy", "samples", "speed", ""]
    yield from table(header, rows)
    if rival is not None:
        yield f"  speed: how many times as fast as the {rival}, timed in the same rounds"
    if search["excluded"]:
        yield from wrapped(f"In float: {', '.join(search['excluded'])}")


def _pruned(document: Document) -> Iterator[str]:
    pruning, sparsity = document.get("pruning"), document.get("sparsity")
    if pruning is not None:
        yield f"Channels: {len(pruning['widths'])} layers got narrower by {pruning['importance']}"
        for what in ("macs", "parameters"):
            before, after = pruning[what]
            name = {"macs": "MACs", "parameters": "parameters"}[what]
            yield f"  {after / 1e6:.4g} of {before / 1e6:.4g} M {name} are left ({100 * after / before:.1f} %)"
        yield from wrapped(f"goal {pruning['goal']}, reached {pruning['reached']}")
    if sparsity is not None:
        densities = sparsity["parameters"].values()
        share = 100 * (1 - sum(densities) / len(densities))
        yield f"Weights: {len(densities)} layers are sparse ({sparsity['pattern']}, {share:.0f} % zeros on average)"


def _stages(document: Document) -> Iterator[str]:
    stages = document.get("stages")
    if not stages:
        return
    last = stages[-1].get("reference", "checkpoint")
    yield "Stages, against the checkpoint" + (f", those after {last} against what that gave" * (last != "checkpoint"))
    rows = []
    for stage in stages:
        error = _error(stage["error"]) if stage["error"] else ["did not run", "", ""]
        tolerance = stage["tolerance"]
        wanted = f"{tolerance['sqnr_db']:g} dB, {tolerance['cosine']:g}" if tolerance else "meant to differ"
        within = {True: "yes", False: "NO", None: "-"}[stage["within"]]
        rows.append([stage["name"], stage["precision"], *error, wanted, within])
    yield from table(["stage", "precision", "SQNR dB", "cosine", "max error", "tolerance", "within"], rows)


def _kept(document: Document) -> Iterator[str]:
    kept = document.get("kept_float32")
    if not kept:
        return
    yield f"Kept in float32: {len(kept)} nodes"
    nodes: dict[str, list[str]] = {}
    for name, reason in kept.items():
        nodes.setdefault(reason, []).append(name)
    for reason, names in list(nodes.items())[:_REASONS]:
        yield from wrapped(f"{_named(names)}: {reason}")
    if len(nodes) > _REASONS:
        yield f"  and for {len(nodes) - _REASONS} more reasons, in report.json"


def _named(names: Sequence[str]) -> str:
    return ", ".join(names[:_NAMES]) + (f" and {len(names) - _NAMES} more" if len(names) > _NAMES else "")


def _engine(document: Document) -> Iterator[str]:
    inspector = document.get("inspector")
    if inspector is None:
        return
    if "layers" not in inspector:
        yield from wrapped(f"Layers of the engine: not looked at, since {inspector['not_inspected']}", "")
        return
    counted = counts_in_words(inspector["precisions"])
    reformats = inspector["reformats"]
    moved = f"; {reformats} only change formats" if reformats else ""
    yield from wrapped(f"Layers of the engine: {counted}{moved}", "")
    if inspector["islands"]:
        yield from wrapped(f"in INT8 in the graph and not in the engine: {_named(inspector['islands'])}")
    if inspector["unproved"]:
        yield from wrapped(f"not proved: that it computes in {' and '.join(inspector['unproved'])}")
    yield "  each with its ONNX nodes and formats: report.json"


def _latency(document: Document) -> Iterator[str]:
    latency = document.get("latency")
    if latency is None:
        return
    sizes = latency["sizes"] if len(latency["sizes"]) > 1 else {"batch": latency["batch"]}
    shown = ", ".join(f"{dim} {size}" for dim, size in sizes.items())
    yield f"Latency in ms: {shown}, {latency['feeds']}, {latency['rounds']} interleaved rounds"
    rows = [[name, *_timing(timed)] for name, timed in latency["runners"].items()]
    yield from table(["", "p50", "p90", "p95", "p99", "mean", "CoV", "samples/s", "calls"], rows)
    candidate = document["candidate"]["name"]
    if candidate not in latency["runners"]:
        yield "  the engine was not timed: it did not run here"
    for name, ratio in latency["ratios"].items():
        found = f"{ratio['ratio']:.2f} times as fast as {name}, {interval(ratio['interval'], 2)}: {ratio['verdict']}"
        yield from wrapped(f"{candidate}: {found}")
    yield from environments(latency["runners"])
    load = latency["load_average"]
    if load["before"] is not None:
        yield f"  load average {load['before']:.1f} before, {load['after']:.1f} after"


def environments(runners: Document) -> Iterator[str]:
    """Where everyone ran and with which settings, those with the same together."""
    where: dict[str, list[str]] = {}
    for name, timed in runners.items():
        settings = "".join(f", {key} {value}" for key, value in timed["settings"].items())
        where.setdefault(f"{timed['runtime']} on {timed['device']}{settings}", []).append(name)
    for described, names in where.items():
        yield from wrapped(f"{', '.join(names)}: {described}")


def _int8(document: Document) -> Iterator[str]:
    int8 = document.get("int8")
    if int8 is None:
        return
    if int8["pays"] is None:
        yield from wrapped(
            f"Whether INT8 is faster than the same recipe without it was not measured: {int8['why_not']}", ""
        )
        return
    yield from _rollbacks(int8)
    yield from _regions(int8)


def _rollbacks(int8: Document) -> Iterator[str]:
    if not int8["rollbacks"]:
        return
    yield f"INT8 beside its {int8['twin']}: what putting regions back into float gave"
    rows = [
        [
            f"{len(tried['excluded'])} in float",
            f"{tried['ratio']:.2f}" if tried["ratio"] is not None else "-",
            interval(tried["interval"], 2),
            _points(tried["drop_points"], 1),
        ]
        for tried in int8["rollbacks"]
    ]
    yield from table(["nodes", "times as fast", "interval", "drop"], rows)


def _regions(int8: Document) -> Iterator[str]:
    if int8["regions_why_not"]:
        yield from wrapped(f"Which regions in INT8 are slow is not known: {int8['regions_why_not']}", "")
    if not int8["regions"]:
        return
    yield f"Regions in INT8 beside the {int8['twin']}, in ms under a profiler, the slowest first"
    regions = sorted(int8["regions"], key=lambda region: region["ratio"])
    rows = [
        [
            f"{_short(region['name'])} ({len(region['nodes'])})",
            milliseconds(region["int8_ms"]),
            milliseconds(region["twin_ms"]),
            f"{region['ratio']:.2f}",
            interval(region["interval"], 2),
            "pays" if region["pays"] else "does not pay",
        ]
        for region in regions[:_REGIONS]
    ]
    yield from table(["region (nodes)", "INT8", "twin", "times as fast", "interval", ""], rows)
    if len(regions) > _REGIONS:
        yield f"  and {len(regions) - _REGIONS} more in report.json"
    parts = [part for region in regions if not region["pays"] and len(region["parts"]) > 1 for part in region["parts"]]
    lost = sorted(parts, key=lambda part: part["twin_ms"] - part["int8_ms"])
    rows = [
        [
            _short(part["name"]) + (f" and {len(part['nodes']) - 1} more" if len(part["nodes"]) > 1 else ""),
            milliseconds(part["int8_ms"]),
            milliseconds(part["twin_ms"]) if part["twin_ms"] else "-",
        ]
        for part in lost[:_PARTS]
        if part["int8_ms"] > part["twin_ms"]
    ]
    yield from table(["what loses the most in them", "INT8", "twin"], rows)


def _passes(document: Document) -> Iterator[str]:
    passes = document.get("passes")
    if passes:
        yield from wrapped("Passes: " + ", ".join(f"{step['name']} {step['seconds']:.1f} s" for step in passes), "")


def _warnings(document: Document) -> Iterator[str]:
    warnings = document.get("warnings")
    if not warnings:
        return
    yield "Warnings"
    for warning in warnings:
        yield from wrapped(f"- {warning}")


def table(header: Sequence[str], rows: Sequence[Sequence[str]]) -> Iterator[str]:
    """Columns as wide as their widest cell; the first to the left, the others to the right.

    Where they are too wide for the page, what the first column says goes on in the lines below.
    """
    if not rows:
        return
    first, *others = (max(map(len, column)) for column in zip(header, *rows, strict=True))
    first = min(first, max(WIDTH - 2 - sum(width + 2 for width in others), _NARROWEST))
    for row in [header, *rows]:
        name, *more = textwrap.wrap(row[0], max(first, 1), subsequent_indent="  ", break_on_hyphens=False) or [""]
        cells = [name.ljust(first), *(cell.rjust(width) for cell, width in zip(row[1:], others, strict=True))]
        yield "  " + "  ".join(cells).rstrip()
        yield from (f"  {line}" for line in more)


def wrapped(text: str, indent: str = "  ") -> list[str]:
    """A paragraph whose later lines are indented further."""
    return textwrap.wrap(text, WIDTH, initial_indent=indent, subsequent_indent=indent + "  ", break_on_hyphens=False)


def fitted(line: str) -> str:
    """A line cut to the width of the page."""
    return line if len(line) <= WIDTH else line[: WIDTH - 1] + "…"


def _short(name: str) -> str:
    return name if len(name) <= _LONGEST else f"{name[: _LONGEST // 2 - 1]}…{name[-_LONGEST // 2 :]}"


def _points(score: float | None, factor: float = 100) -> str:
    return "-" if score is None else f"{factor * score:.2f}"


def interval(limits: Sequence[float | None] | None, digits: int) -> str:
    """Two limits, or a dash where there are none."""
    if limits is None or limits[0] is None or limits[1] is None:
        return "-"
    return f"[{limits[0]:.{digits}f}, {limits[1]:.{digits}f}]"


def _error(error: Document) -> list[str]:
    if error["equal"]:
        return ["equal", "1", "0"]
    return [
        "-" if error["sqnr_db"] is None else f"{error['sqnr_db']:.1f}",
        "-" if error["cosine"] is None else f"{error['cosine']:.6f}",
        "not finite" if error["max_abs"] is None else f"{error['max_abs']:.3g}",
    ]


def _timing(timed: Document) -> list[str]:
    percentiles = [milliseconds(timed[f"p{q}_ms"]) for q in (50, 90, 95, 99)]
    spread, rate = f"{100 * timed['cov']:.0f} %", f"{timed['throughput_per_s']:.1f}"
    return [*percentiles, milliseconds(timed["mean_ms"]), spread, rate, str(timed["calls"])]


def milliseconds(value: float | None) -> str:
    """Four digits, or a dash where nothing was measured."""
    return "-" if value is None else f"{value:.4g}"
