from __future__ import annotations

import json
import os
import signal
from dataclasses import replace

import numpy as np
import pytest
import torch
from torch import nn

import optkit
from optkit import benchmark
from optkit.benchmark import Bench, Row
from optkit.cli import main
from optkit.errors import CheckpointError, RecipeError, UnavailableError, UsageError
from optkit.passes.export_onnx import ExportOnnx
from optkit.recipe import Recipe
from optkit.report.benchmark import render
from optkit.targets.base import Availability
from optkit.targets.onnxruntime import OnnxRuntimeTarget, OrtRunner, open_onnx
from optkit.targets.tensorrt import TensorRtTarget
from optkit.validation.contest import Entrant
from optkit.validation.latency import Timings
from optkit.validation.statistics import Interval

QUICK = {"latency": {"rounds": 6, "seconds": 0.002, "warmup": 0.0}}

ADD = "g (float[batch,4] x, float[batch,4] y) => (float[batch,4] z) { a = Add(x, y)  z = Relu(a) }"


def net() -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(8, 16), nn.ReLU(), nn.Linear(16, 4))


def recipe(preset: str = "fp32", **changes: object) -> Recipe:
    fields = {"inputs": {"input": "float32[batch,8]"}, "validation": QUICK, "threads": 1, **changes}
    return Recipe.load(preset).updated(**fields)


def of_onnx(preset: str = "fp32") -> Recipe:
    return Recipe.load(preset).updated(validation=QUICK, threads=1)


@pytest.fixture(scope="module")
def found() -> Bench:
    on = ("torch", "onnxruntime", "tensorrt-rtx")
    return optkit.bench(net(), [recipe(), recipe("fp16")], on=on, batches=(1, 48), bound=10.0)


def test_calls_side_by_side_share_an_engine(monkeypatch):
    # TensorRT needs a GPU; ONNX Runtime runs in its place, and what is tested is who builds and opens what
    built, opened = [], []

    def build(self, model, folder, context):
        built.append((model.signature.dims["batch"].opt, self.contexts))
        return OnnxRuntimeTarget().build(model, folder, context)

    def open_engine(self, engine, threads):
        opened.append(self.contexts)
        return OnnxRuntimeTarget().open(engine, threads)

    monkeypatch.setattr(TensorRtTarget, "can_run", lambda self: Availability(True))
    monkeypatch.setattr(TensorRtTarget, "build", build)
    monkeypatch.setattr(TensorRtTarget, "open", open_engine)
    found = optkit.bench(net(), [recipe()], on=("tensorrt",), batches=(1, 4), contexts=(1, 3))
    assert [row.contestant for row in found.rows] == ["tensorrt fp32", "tensorrt fp32, 3 at once"] * 2
    assert built == [(1, 3), (4, 3)]
    assert opened == [1, 3, 1, 3]


def test_what_can_be_timed_with_transfers_has_a_row_for_it(monkeypatch):
    # TensorRT's runner needs a GPU; ONNX Runtime's stands in for it, and what is tested is the table
    monkeypatch.setattr(benchmark, "TensorRtRunner", OrtRunner)
    monkeypatch.setattr(OrtRunner, "with_transfers", lambda self: self, raising=False)
    found = optkit.bench(net(), [recipe()], on=("torch", "onnxruntime"), batches=(1,), transfers=True)
    names = ["PyTorch fp32", "onnxruntime fp32", "onnxruntime fp32, with transfers"]
    assert [row.contestant for row in found.rows] == names
    assert "onnxruntime fp32, with transfers" in found.summary


def test_everyone_who_can_run_has_a_row_for_every_batch_size(found):
    names = ["PyTorch fp32", "onnxruntime fp32", "onnxruntime fp16"]
    assert [(row.batch, row.contestant) for row in found.rows] == [(batch, name) for batch in (1, 48) for name in names]
    for row in found.rows:
        assert 0 < row.median.low <= row.median.estimate <= row.median.high
        assert row.throughput == row.batch / row.median.estimate
        assert row.cosine > 0.9999
    assert [row.speed is None for row in found.rows] == [True, False, False] * 2
    assert {row.against for row in found.rows} == {"PyTorch fp32"}


def test_all_of_one_batch_size_are_timed_in_the_same_rounds(found):
    for heat in found.document["heats"]:
        runners = heat["latency"]["runners"]
        assert set(runners) == {row["contestant"] for row in heat["rows"]}
        assert {len(timed["samples_us"]) for timed in runners.values()} == {6}
        assert heat["latency"]["sizes"] == {"batch": heat["batch"]}
        assert heat["latency"]["feeds"] == "random values"


def test_who_cannot_run_is_told_once_with_the_reason(found):
    if found.document["not_run"]:
        (alike,) = found.document["not_run"]
        assert alike["contestants"] == ["tensorrt-rtx fp32", "tensorrt-rtx fp16"]
        assert alike["why"] and found.not_run["tensorrt-rtx fp16"] == alike["why"]
        assert "Not run\n  tensorrt-rtx fp32, tensorrt-rtx fp16: " in found.summary


def test_the_report_is_json_and_a_table(found):
    document = json.loads(json.dumps(found.document, allow_nan=False))
    assert render(document) == found.summary
    assert "Batch 48: random values, 6 interleaved rounds" in found.summary
    assert "times as fast as PyTorch fp32, the first on the same device" in found.summary
    assert max(map(len, found.summary.splitlines())) <= 100


def test_recipes_share_an_export_and_graphs_serve_every_batch_size(monkeypatch):
    exported, run = [], ExportOnnx.run
    monkeypatch.setattr(ExportOnnx, "run", lambda self, *given: exported.append(1) or run(self, *given))
    optkit.bench(net(), [recipe(), recipe("fp16")], on=("onnxruntime",), batches=(1, 2))
    assert len(exported) == 1


def test_an_onnx_model_has_no_pytorch_side(onnx_model):
    found = optkit.bench(onnx_model(ADD), [of_onnx()], on=("torch", "onnxruntime"), batches=(2,))
    assert [row.contestant for row in found.rows] == ["onnxruntime fp32"]
    assert found.rows[0].speed is None and found.rows[0].against == "onnxruntime fp32"
    assert "came as ONNX" in found.not_run["PyTorch fp32"]


def test_a_recipe_that_only_builds_takes_the_graph_as_it_is(onnx_model):
    only = Recipe.parse("passes: [build_engine]\nname: as it is\n").updated(validation=QUICK, threads=1)
    found = optkit.bench(onnx_model(ADD), [only, of_onnx()], on=("onnxruntime",), batches=(2,))
    assert [row.contestant for row in found.rows] == ["onnxruntime as it is", "onnxruntime fp32"]


def test_the_options_that_a_recipe_has_for_a_target_apply(onnx_model):
    plain = of_onnx().updated(target={"name": "onnxruntime", "optimization": "basic"})
    found = optkit.bench(onnx_model(ADD), [plain], on=("onnxruntime",), batches=(1,))
    (timed,) = found.document["heats"][0]["latency"]["runners"].values()
    assert timed["settings"]["optimization"] == "basic"


def test_a_pass_that_fails_is_a_reason_and_not_the_end(onnx_model):
    found = optkit.bench(onnx_model(ADD), [of_onnx(), of_onnx("int8")], on=("onnxruntime",), batches=(1, 2))
    assert {row.contestant for row in found.rows} == {"onnxruntime fp32"}
    assert "needs data" in found.not_run["onnxruntime int8"]


def test_a_model_with_a_fixed_batch_runs_at_that_one(onnx_model):
    fixed = onnx_model(ADD.replace("batch", "3"))
    found = optkit.bench(fixed, [of_onnx()], on=("onnxruntime",))
    assert [row.batch for row in found.rows] == [3]
    assert optkit.bench(fixed, [of_onnx()], on=("onnxruntime",), batches=(3,)).rows[0].batch == 3
    with pytest.raises(UsageError, match="fixed at 3: ask for --batch 3, or export it"):
        optkit.bench(fixed, [of_onnx()], on=("onnxruntime",), batches=(1, 3))


def test_a_batch_that_the_file_rules_out_is_refused(tmp_path):
    limited = {0: torch.export.Dim("batch", min=1, max=16)}
    program = torch.export.export(net().eval(), (torch.zeros(4, 8),), dynamic_shapes=(limited,))
    torch.export.save(program, tmp_path / "net.pt2")
    with pytest.raises(CheckpointError, match=r"batch may be 1 to 16 in this file, not 1 to 32"):
        optkit.bench(tmp_path / "net.pt2", [recipe(inputs={})], on=("torch",), batches=(8, 32))


@pytest.mark.parametrize(
    ("given", "error", "said"),
    [
        ({"on": ("tensort",)}, UsageError, "nothing called 'tensort' to run on: did you mean 'tensorrt'"),
        ({"batches": (0,)}, UsageError, "a batch has at least one sample, not 0"),
        ({"recipes": ()}, UsageError, "there is no recipe"),
        ({"recipes": ("fp32", "fp32")}, UsageError, "needs a name of its own, not fp32, fp32, torch"),
        ({"on": ("torch", "torch")}, UsageError, "needs a name of its own"),
        ({"recipes": ("fp23",)}, RecipeError, "did you mean 'fp32'"),
        ({"model": None}, UsageError, "there is no model"),
    ],
)
def test_says_what_does_not_fit(given, error, said):
    fields = {"model": net(), "recipes": [recipe()], "on": ("torch",), **given}
    with pytest.raises(error, match=said):
        optkit.bench(fields.pop("model"), fields.pop("recipes"), **fields)


def test_only_nobody_is_an_error(onnx_model):
    with pytest.raises(UnavailableError, match=r"nobody can run this model here: PyTorch fp32: .* came as ONNX"):
        optkit.bench(onnx_model(ADD), [of_onnx()], on=("torch",), batches=(1,))


def row(contestant: str, batch: int, milliseconds: float, p95: float | None) -> Row:
    median = Interval(1e-3 * milliseconds, 0.9e-3 * milliseconds, 1.1e-3 * milliseconds, "", 20)
    return Row(contestant, batch, "cpu", 100, median, None if p95 is None else 1e-3 * p95, contestant, None, 1.0)


def test_a_bound_is_one_of_the_95th_percentile():
    rows = (row("a", 1, 1, 2), row("a", 8, 4, 4.9), row("a", 32, 12, 14), row("b", 1, 9, 11), row("b", 8, 3, None))
    found = Bench(rows, {}, {})
    assert [one.meets(5e-3) for one in rows] == [True, True, False, False, None]
    assert row("b", 8, 6, None).meets(5e-3) is False  # its median is already over
    assert found.best_within(5e-3) == {"a": rows[1], "b": None}
    told = benchmark._bound_document(found, 5e-3)
    assert told["best"]["a"]["batch"] == 8 and told["best"]["b"] is None
    assert told["undecided"] == [{"contestant": "b", "batch": 8, "calls": 100}]


def test_the_largest_batch_is_not_always_the_best():
    rows = (row("a", 8, 1, 1), row("a", 32, 8, 8))
    assert Bench(rows, {}, {}).best_within(1.0) == {"a": rows[0]}


def test_latencies_of_two_devices_make_no_ratio(onnx_model, context):
    rng = np.random.default_rng(0)
    with open_onnx(onnx_model(ADD)) as runner:
        entrants = [Entrant(name, runner) for name in ("cpu", "gpu", "gpu too")]
        here = runner.environment
    there = replace(here, device="a GPU")
    rounds = tuple(rng.uniform(1e-3, 2e-3, (6, 10)))
    timings = {name: Timings(rounds, where) for name, where in (("cpu", here), ("gpu", there), ("gpu too", there))}
    outputs = {name: {"z": np.ones(4)} for name in timings}
    rows = list(benchmark._rows(entrants, timings, outputs, 1, 0.95, context))
    assert [one.against for one in rows] == ["cpu", "gpu", "gpu"]
    assert [one.speed is None for one in rows] == [True, True, False]


def test_a_reason_that_holds_at_one_batch_size_only_names_it():
    heats = [benchmark._Heat((), 1, {"a": "no GPU"}, None), benchmark._Heat((), 8, {"a": "no GPU", "b": "full"}, None)]
    contestants = [benchmark.Contestant(name, lambda signature: None) for name in ("a", "b")]
    assert benchmark._not_run(heats, contestants) == {"a": "no GPU", "b, batch 8": "full"}


# The command


@pytest.fixture
def add(onnx_model, tmp_path):
    from optkit.bundle import save_onnx

    save_onnx(onnx_model(ADD), tmp_path / "add.onnx")
    return str(tmp_path / "add.onnx")


def test_the_command_prints_the_table_and_one_document(add, capsys):
    arguments = ["bench", add, "--on", "onnxruntime", "--batch", "1, 2", "--rounds", "2", "--precision", "fp32"]
    assert main([*arguments, "--bound", "2s", "--threads", "1"]) == 0
    text = capsys.readouterr().out
    assert "Batch 2: random values, 2 interleaved rounds" in text
    assert "within 2000 ms" in text
    assert "so few rounds cannot give that confidence" in text
    assert main([*arguments, "--json", "--threads", "1"]) == 0
    assert [heat["batch"] for heat in json.loads(capsys.readouterr().out)["heats"]] == [1, 2]


@pytest.mark.parametrize("batch", [1, 2])
def test_an_interrupt_keeps_the_batch_sizes_that_are_done(add, batch, capsys, monkeypatch):
    run = benchmark._run

    def interrupted(contestants, signature, *others):
        if signature.dims["batch"].opt == batch:
            os.kill(os.getpid(), signal.SIGINT)
        return run(contestants, signature, *others)

    monkeypatch.setattr(benchmark, "_run", interrupted)
    arguments = ["--on", "onnxruntime", "--batch", "1,2,4", "--rounds", "2", "--precision", "fp32", "--threads", "1"]
    assert main(["bench", add, *arguments]) == 130
    said = capsys.readouterr()
    assert "error: interrupted" in said.err
    assert ("Batch 1: random values" in said.out) == (batch == 2)
    assert ("batch 2, batch 4: interrupted" in said.out) == (batch == 2)
    assert "Batch 2:" not in said.out


@pytest.mark.parametrize(
    ("arguments", "code", "said"),
    [
        (["--bound", "5"], 2, "--bound 5: write a time with its unit"),
        (["--batch", "one"], 2, "--batch one: write numbers"),
        (["--precision", "fp23"], 2, "--precision fp23: did you mean 'fp32'"),
        (["--precision", "fp32", "--recipe", "x.yaml"], 2, "exclude each other"),
        (["--on", "torch"], 4, "nobody can run this model here: PyTorch fp32: the model came as ONNX"),
    ],
)
def test_the_command_says_what_was_wrong(add, arguments, code, said, capsys):
    assert main(["bench", add, *arguments]) == code
    assert said in capsys.readouterr().err
