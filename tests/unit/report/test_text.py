import copy

import pytest

from optkit.report.text import WIDTH, render, table

ERROR = {"equal": False, "sqnr_db": 24.31, "cosine": 0.99812, "max_abs": 0.41, "max_rel": 0.02, "nonfinite": 0}


def _timed(p50: float) -> dict:
    percentiles = {"p50_ms": p50, "p90_ms": 1.1 * p50, "p95_ms": None, "p99_ms": None, "mean_ms": p50, "median_ms": p50}
    where = {"device": "CPU", "runtime": "onnxruntime 1.32", "settings": {"threads": 2}}
    return {**percentiles, **where, "calls": 60, "cov": 0.04, "cov_of_rounds": 0.01, "throughput_per_s": 1e3 / p50}


DOCUMENT = {
    "recipe": "resnet-int8",
    "candidate": {"name": "engine", "what": "int8 engine for onnxruntime", "engine_ran": True, "why_not": None},
    "accuracy": {
        "metric": "top1", "n": 10000, "reference": "PyTorch", "baseline": 0.9211, "candidate": 0.9203, "broken": None,
        "confidence": 0.95, "drop_points": 0.08, "interval": [-0.05, 0.21], "method": "Tango score interval",
        "others": {"FP32 ONNX": {"score": 0.9211, "drop_points": 0.08, "interval": [-0.05, 0.21], "method": "same"}},
        "per_output": {"logits": ERROR},
    },
    "stages": [
        {"name": "export_onnx", "precision": "float32", "tolerance": {"sqnr_db": 60, "cosine": 0.9999}, "within": True,
         "error": {**ERROR, "equal": True, "sqnr_db": None}, "why_not": None},
        {"name": "quantize_int8", "precision": "int8", "tolerance": {"sqnr_db": 15, "cosine": 0.99}, "within": False,
         "error": ERROR, "why_not": None},
        {"name": "build_engine", "precision": "int8", "tolerance": {"sqnr_db": 15, "cosine": 0.99}, "within": None,
         "error": None, "why_not": "no GPU"},
    ],
    "latency": {
        "batch": 4, "sizes": {"batch": 4}, "feeds": "validation samples", "rounds": 20,
        "load_average": {"before": 0.52, "after": 1.71},
        "runners": {"PyTorch": _timed(8.0), "engine": _timed(2.0)},
        "ratios": {"PyTorch": {"ratio": 4.0, "interval": [3.9, 4.1], "verdict": "faster"}},
    },
    "verdict": {"status": "passed", "reasons": ["top1 lost 0.08 points."]},
    "passes": [{"name": "export_onnx", "seconds": 3.21}],
    "warnings": ["the machine was busy"],
}  # fmt: skip


def _row(text: str, start: str, occurrence: int = 0) -> list[str]:
    return [line.split() for line in text.splitlines() if line.strip().startswith(start)][occurrence]


def test_the_summary_holds_the_numbers_in_tables():
    text = render(DOCUMENT)
    assert text.splitlines()[0] == "resnet-int8: PASSED"
    assert "top1 lost 0.08 points." in text
    assert _row(text, "PyTorch") == ["PyTorch", "92.11", "0.08", "[-0.05,", "0.21]"]
    assert _row(text, "FP32 ONNX")[2] == "92.11"
    assert _row(text, "engine") == ["engine", "92.03"]
    assert _row(text, "logits") == ["logits", "24.3", "0.998120", "0.41"]
    assert _row(text, "export_onnx") == ["export_onnx", "float32", "equal", "1", "0", "60", "dB,", "0.9999", "yes"]
    assert _row(text, "quantize_int8")[-1] == "NO"
    assert "did not run" in text
    assert _row(text, "PyTorch", 1) == ["PyTorch", "8", "8.8", "-", "-", "8", "4", "%", "125.0", "60"]
    assert "engine: 4.00 times as fast as PyTorch, [3.90, 4.10]: faster" in text
    assert "PyTorch, engine: onnxruntime 1.32 on CPU, threads 2" in text
    assert "load average 0.5 before, 1.7 after" in text
    assert "Passes: export_onnx 3.2 s" in text
    assert "- the machine was busy" in text


def test_the_summary_counts_the_layers_of_an_engine_and_names_what_is_not_in_int8():
    inspector = {"precisions": {"INT8": 53, "FP16 or narrower": 2, "not told": 1}, "reformats": 4, "layers": []}
    islands = [f"conv_{i}" for i in range(8)]
    text = render({**DOCUMENT, "inspector": {**inspector, "islands": islands, "unproved": ["INT8"]}})
    assert "Layers of the engine: 53 in INT8, 2 in FP16 or narrower, 1 not told; 4 only change formats" in text
    assert "in INT8 in the graph and not in the engine: conv_0, conv_1, conv_2, conv_3, conv_4, conv_5 and 2" in text
    assert "not proved: that it computes in INT8" in text
    proved = render({**DOCUMENT, "inspector": {**inspector, "islands": [], "unproved": []}})
    assert "not in the engine" not in proved and "not proved" not in proved
    text = render({**DOCUMENT, "inspector": {"not_inspected": "there is no GPU"}})
    assert "Layers of the engine: not looked at, since there is no GPU" in text


def test_a_broken_candidate_has_no_table_of_scores():
    document = copy.deepcopy(DOCUMENT)
    document["accuracy"] |= {"broken": "engine gives NaN in output 'logits'", "baseline": None, "candidate": None}
    text = render(document)
    assert "engine gives NaN in output 'logits'" in text
    assert "92.11" not in text


def test_an_engine_that_did_not_run_is_said_first():
    document = copy.deepcopy(DOCUMENT)
    document["candidate"] |= {"why_not": "no GPU is here", "engine_ran": False, "what": "the ONNX model"}
    head = render(document).split("Accuracy:")[0]
    assert "The engine did not run on this machine: no GPU is here" in head
    assert "What was validated instead: the ONNX model." in head


@pytest.mark.parametrize("part", ["accuracy", "stages", "latency", "passes", "warnings", "verdict"])
def test_a_document_without_a_part_has_a_summary_without_it(part):
    document = {key: value for key, value in DOCUMENT.items() if key != part}
    heading = {"verdict": "PASSED", "latency": "Latency in ms"}.get(part, part.capitalize())
    assert heading in render(DOCUMENT)
    assert heading not in render(document)


def test_no_line_is_wider_than_the_page():
    document = copy.deepcopy(DOCUMENT)
    document["warnings"] = ["word " * 100]
    document["verdict"]["reasons"] = ["x" * 250]
    document["stages"][0]["name"] = "a_pass_with_a_name_that_is_far_longer_than_any_name_ought_to_be_in_a_table" * 2
    assert max(map(len, render(document).splitlines())) <= WIDTH


def test_a_table_that_is_too_wide_goes_on_with_its_names_below():
    name, cells = "tensorrt digits-int8, 2 at once, with transfers", ["[0.03983, 0.04404]"] * 4
    shown = list(table(["", "one", "two", "three", "four"], [[name, *cells], ["short", *"1234"]]))
    assert max(map(len, shown)) <= WIDTH
    assert shown[1].split("  ")[-4:] == cells
    assert " ".join([shown[1][:20], *shown[2:-1]]).split() == name.split()
    assert shown[-1].split() == ["short", *"1234"]
    assert list(table(["", "a"], [["", "1"]])) == ["    a", "    1"]
