"""Bad input through the real command line: the message, the exit code, and that nothing is left behind."""

from __future__ import annotations

import errno
import os
import resource
import shutil
import signal
import subprocess
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from types import CodeType, FrameType
from typing import Any

import numpy as np
import onnx
import pytest
import torch
from safetensors.torch import save_file

from optkit import bundle
from optkit.bundle import verify
from optkit.cli import main

NET = """
import torch
from torch import nn


def make(width=8):
    return nn.Sequential(nn.Linear(4, width), nn.ReLU(), nn.Linear(width, 3))


def broken():
    raise RuntimeError("no weights today")


def leaves():
    raise SystemExit(0)


def number():
    return 3


class Loops(nn.Module):
    def __init__(self):
        super().__init__()
        self.w = nn.Parameter(torch.zeros(1))

    def forward(self, x):
        total = x * self.w
        while total.sum() < x.sum():  # the line that cannot be exported
            total = total + 1
        return total


def loops():
    return Loops()
"""

DATA = """
import numpy as np


def rows(count=24):
    rng = np.random.default_rng(0)
    return [{"x": rng.standard_normal(4).astype("float32"), "y": i % 3} for i in range(count)]


def with_nan():
    made = rows()
    for row in made[::2]:
        row["x"][1] = float("nan")
    return made


def nothing():
    return []
"""

SPEC = """
source: {kind: python, function: "data.py:rows"}
splits: {calibration: {count: 8}, validation: {count: 16}}
inputs: {x: x}
label: y
metric: top1
"""

# Small enough to be measured in a moment; nothing here is about the numbers
RECIPE = """
passes: [export_onnx, optimize_graph, build_engine]
validation: {stage_samples: 2, latency: {rounds: 2, seconds: 0.001, warmup: 0}}
gate: {max_drop: 100}
threads: 1
"""

ONNX = """<ir_version: 10, opset_import: ["" : 20]>
g (float[batch,4] x) => (float[batch,3] y)
<float[4,3] w = {1,2,3,4,5,6,7,8,9,10,11,12}> { h = MatMul(x, w)  y = Relu(h) }"""


class Payload:
    """A pickle of this makes the file ``ran`` when it is loaded."""

    def __reduce__(self):
        return Path.touch, (Path("ran"),)


def net(width: int = 8) -> torch.nn.Module:
    torch.manual_seed(0)
    return torch.nn.Sequential(torch.nn.Linear(4, width), torch.nn.ReLU(), torch.nn.Linear(width, 3)).eval()


@pytest.fixture(scope="module")
def material(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Good and bad files of every kind."""
    folder = tmp_path_factory.mktemp("material")
    for name, text in {"net.py": NET, "data.py": DATA, "spec.yaml": SPEC, "recipe.yaml": RECIPE}.items():
        (folder / name).write_text(text)
    state = net().state_dict()
    torch.save(state, folder / "good.pt")
    torch.save(net(16).state_dict(), folder / "wide.pt")
    save_file(state, folder / "good.safetensors")
    torch.export.save(torch.export.export(net(), (torch.randn(2, 4),)), folder / "good.pt2")
    onnx.save(onnx.parser.parse_model(ONNX), folder / "good.onnx")
    torch.save({"model": net(), "payload": Payload()}, folder / "pickled.pt")
    torch.save({key: value for key, value in state.items() if key != "2.bias"}, folder / "missing.pt")
    torch.save({**state, "extra.weight": torch.zeros(2)}, folder / "unexpected.pt")
    torch.save({**state, "2.bias": torch.tensor([0.0, float("nan"), 0.0])}, folder / "nan.pt")
    torch.save({"w": torch.ones(1)}, folder / "loops.pt")
    poisoned = onnx.parser.parse_model(ONNX)
    poisoned.graph.initializer[0].CopyFrom(onnx.numpy_helper.from_array(np.full((4, 3), np.nan, np.float32), "w"))
    onnx.save(poisoned, folder / "nan.onnx")
    (folder / "empty.pt").touch()
    for suffix in ("pt", "pt2", "safetensors", "onnx"):
        whole = (folder / f"good.{suffix}").read_bytes()
        (folder / f"truncated.{suffix}").write_bytes(whole[: len(whole) * 2 // 3])
    shutil.rmtree(folder / "__pycache__", ignore_errors=True)
    return folder


@dataclass(frozen=True)
class Ran:
    """How one command ended."""

    exit_code: int
    message: str


@pytest.fixture
def work(material: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The current folder: a copy of the material."""
    folder = tmp_path / "work"
    shutil.copytree(material, folder)
    monkeypatch.chdir(folder)
    monkeypatch.setattr(sys, "dont_write_bytecode", True)
    return folder


@pytest.fixture
def fails(work: Path, capsys: pytest.CaptureFixture[str]) -> Callable[..., Ran]:
    """Run a command that must fail, with one paragraph and without a trace."""

    def run(*arguments: str) -> Ran:
        before = listing(work.parent)
        exit_code = main(list(arguments))
        captured = capsys.readouterr()
        assert listing(work.parent) == before
        assert captured.out == ""
        assert "Traceback" not in captured.err
        *warnings, message = captured.err.rstrip("\n").split("error: ")
        assert len(warnings) == 1
        assert message
        assert "\n\n" not in message
        assert exit_code != 0
        return Ran(exit_code, message)

    return run


def listing(folder: Path) -> dict[str, int]:
    """Every file and folder, with its size."""
    return {
        str(path.relative_to(folder)): path.lstat().st_size
        for path in sorted(folder.rglob("*"))
        if path.is_file() or path.is_dir()
    }


def compile_onnx(*more: str) -> list[str]:
    return ["compile", "good.onnx", "--recipe", "recipe.yaml", "--out", "out", *more]


def compile_state(*more: str, checkpoint: str = "good.pt", name: str = "input") -> list[str]:
    return [
        "compile",
        checkpoint,
        "--recipe",
        "recipe.yaml",
        "--input",
        f"{name}=float32[batch,4]",
        "--out",
        "out",
        *more,
    ]


def test_the_good_input_is_good(work: Path, capsys: pytest.CaptureFixture[str]):
    """Without this, a broken pipeline would make every other test here pass."""
    assert main(compile_onnx("--data", "spec.yaml")) == 0, capsys.readouterr().err
    assert main(compile_state("--model", "net.py:make", "--force")) == 0, capsys.readouterr().err
    assert {path.name for path in work.iterdir()} - set(listing(work)) == set()
    assert (work / "out" / "manifest.json").is_file()
    assert not [path for path in work.iterdir() if path.name.startswith(".out")]


# The checkpoint


@pytest.mark.parametrize(
    ("checkpoint", "said"),
    [
        ("nowhere.pt", "nowhere.pt: no such file"),
        ("empty.pt", "empty.pt: the file is empty"),
        ("truncated.pt", "truncated.pt: truncated or damaged"),
        ("truncated.pt2", "truncated.pt2: truncated or damaged"),
        ("truncated.safetensors", "truncated.safetensors: truncated or damaged"),
        ("truncated.onnx", "truncated.onnx: truncated or damaged"),
        ("spec.yaml", "optkit reads"),
        ("good.pt", "--model module:function"),
        ("nan.onnx", "nan.onnx: NaN in 1 weight(s): w"),
    ],
)
@pytest.mark.parametrize("command", ["compile", "inspect"])
def test_a_checkpoint_that_cannot_be_read(command: str, checkpoint: str, said: str, fails: Callable[..., Ran]):
    if command == "inspect" and checkpoint in ("good.pt", "nan.onnx"):
        pytest.skip("to look at it is no error")
    ran = fails(command, checkpoint)
    assert ran.exit_code == 2
    assert said in ran.message


def test_a_pickle_that_would_run_code_does_not(work: Path, fails: Callable[..., Ran]):
    ran = fails("compile", "pickled.pt", "--model", "net.py:make")
    assert ran.exit_code == 2
    assert "could run code" in ran.message
    assert "--trust-pickle" in ran.message
    assert not (work / "ran").exists()
    # The payload is real: whoever trusts the file runs it
    torch.load(work / "pickled.pt", weights_only=False)
    assert (work / "ran").exists()


@pytest.mark.parametrize(
    ("checkpoint", "factory", "said"),
    [
        ("missing.pt", "net.py:make", "1 missing: 2.bias"),
        ("unexpected.pt", "net.py:make", "1 unexpected: extra.weight"),
        ("wide.pt", "net.py:make", "of another shape"),
        ("nan.pt", "net.py:make", "NaN or infinity in 1 tensor(s): 2.bias"),
        ("good.pt", "net.py:broken", "RuntimeError: no weights today"),
        ("good.pt", "net.py:leaves", "SystemExit"),
        ("good.pt", "net.py:number", "returned int"),
        ("good.pt", "net.py:mke", "did you mean 'make'?"),
        ("good.pt", "nett.py:make", "there is no file"),
        ("good.pt", "nosuchmodule:make", "no module 'nosuchmodule'"),
        ("good.pt", "net.py", "write module:function or path.py:function"),
    ],
)
def test_a_state_dict_and_its_factory(checkpoint: str, factory: str, said: str, fails: Callable[..., Ran]):
    ran = fails(*compile_state("--model", factory, checkpoint=checkpoint))
    assert ran.exit_code == 2
    assert said in ran.message


def test_an_argument_that_the_factory_does_not_take(fails: Callable[..., Ran]):
    ran = fails(*compile_state("--model", "net.py:make", "--arg", "widht=8"))
    assert ran.exit_code == 2
    assert "widht" in ran.message


@pytest.mark.parametrize(
    ("inputs", "said"),
    [
        ([], "--input input=float32[batch,3,224,224]"),
        (["input=float32[batch,5]"], "float32[batch,5]"),
        (["image=float32[batch,4]"], "'image'"),
        (["input=int64[batch,4]"], "int64"),
        (["input=float32[batch,4]", "mask=float32[batch]"], "'mask'"),
    ],
)
def test_an_input_spec_that_does_not_fit(inputs: list[str], said: str, fails: Callable[..., Ran]):
    options = [word for text in inputs for word in ("--input", text)]
    ran = fails("compile", "good.pt", "--recipe", "recipe.yaml", "--model", "net.py:make", "--out", "out", *options)
    assert ran.exit_code == 2
    assert said in ran.message


def test_a_model_that_cannot_be_exported(fails: Callable[..., Ran]):
    ran = fails(*compile_state("--model", "net.py:loops", checkpoint="loops.pt", name="x"))
    assert ran.exit_code == 5
    assert ran.message.startswith("export_onnx: ")
    assert "net.py" in ran.message
    assert "bug" not in ran.message


# The recipe


@pytest.mark.parametrize(
    ("recipe", "said"),
    [
        ("pases: [export_onnx]", "bad.yaml:1: unknown key pases: did you mean 'passes'?"),
        ("passes: [export_onnx]\nsede: 1", "bad.yaml:2: unknown key sede: did you mean 'seed'?"),
        (
            "passes:\n  - {use: export_onnx, opst: 20}",
            "bad.yaml:2: unknown key passes[0].opst: did you mean 'opset'?",
        ),
        ("passes:\n  - export_onx", "bad.yaml:2: "),
        (
            "passes: [export_onnx]\ngate:\n  max_dorp: 1",
            "bad.yaml:3: unknown key gate.max_dorp: did you mean 'max_drop'?",
        ),
        ("passes: [export_onnx]\nvalidation:\n  latency:\n    round: 3", "did you mean 'rounds'?"),
        ("passes: [export_onnx]\nmodel:\n  factry: x", "bad.yaml:3: "),
        ("passes: [export_onnx]\nseed: many", "bad.yaml:2: seed"),
        ("passes: [export_onnx", "bad.yaml"),
        ("passes: [build_engine, export_onnx]", "export_onnx takes a PyTorch model, but build_engine before it gives"),
        ("passes: [optimize_graph, export_onnx, build_engine]", "export_onnx takes a PyTorch model"),
        ("passes: [export_onnx, {use: build_engine, target: onnxruntim}]", "did you mean 'onnxruntime'?"),
        ("passes: []", "passes"),
        ("- passes", "a mapping"),
    ],
)
def test_a_recipe_with_a_mistake(recipe: str, said: str, work: Path, fails: Callable[..., Ran]):
    (work / "bad.yaml").write_text(recipe)
    for command in (["compile", "good.onnx", "--recipe", "bad.yaml"], ["recipe", "check", "bad.yaml"]):
        ran = fails(*command)
        assert ran.exit_code == 2
        assert said in ran.message


def test_an_unknown_target(fails: Callable[..., Ran]):
    ran = fails(*compile_onnx("--target", "tensorrt-rxt"))
    assert ran.exit_code == 2
    assert "did you mean 'tensorrt-rtx'?" in ran.message


def test_a_missing_runtime(fails: Callable[..., Ran], monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setitem(sys.modules, "onnxruntime", None)  # as if it were not installed
    ran = fails(*compile_onnx())
    assert ran.exit_code == 4
    assert "pip install 'optkit[cpu]'" in ran.message


def test_a_missing_tensorrt(work: Path, tmp_path: Path, fails: Callable[..., Ran], monkeypatch: pytest.MonkeyPatch):
    python = tmp_path / "python"  # a real one, without any installed package
    python.write_text(f'#!/bin/sh\nexec {sys.executable} -S "$@"\n')
    python.chmod(0o755)
    monkeypatch.setenv("OPTKIT_TENSORRT_PYTHON", str(python))
    ran = fails(*compile_onnx("--target", "tensorrt-rtx"))
    assert ran.exit_code == 4
    assert "pip install 'optkit[rtx]'" in ran.message


# The data


@pytest.mark.parametrize(
    ("change", "said"),
    [
        (("data.py:rows", "data.py:nothing"), "there is not one row"),
        (("label: y", "label: z"), "there is no column 'z' for the label"),
        (("{x: x}", "{x: pixels}"), "there is no column 'pixels' for input 'x'"),
        (("data.py:rows", "data.py:with_nan"), "NaN"),
        (("data.py:rows", "data.py:rws"), "did you mean 'rows'?"),
        (("data.py:rows", "nodata.py:rows"), "nodata.py"),
        (("label: y", "lable: y"), "did you mean 'label'?"),
        (("count: 16", "count: 160"), "validation wants 160"),
        (("{x: x}", "{pixels: x}"), "pixels"),
        (("metric: top1", "metric: top"), "spec.yaml"),
    ],
)
def test_data_that_do_not_fit(change: tuple[str, str], said: str, work: Path, fails: Callable[..., Ran]):
    (work / "spec.yaml").write_text(SPEC.replace(*change))
    ran = fails(*compile_onnx("--data", "spec.yaml"))
    assert ran.exit_code == 2
    assert said in ran.message


def test_a_data_spec_that_is_not_there(fails: Callable[..., Ran]):
    ran = fails(*compile_onnx("--data", "nowhere.yaml"))
    assert ran.exit_code == 2
    assert "nowhere.yaml" in ran.message


# The output folder


def test_an_output_folder_that_exists(work: Path, fails: Callable[..., Ran]):
    (work / "out").mkdir()
    ran = fails(*compile_onnx())
    assert ran.exit_code == 2
    assert "out exists already: choose another --out, or replace it with --force" in ran.message
    ran = fails(*compile_onnx("--force"))
    assert ran.exit_code == 2
    assert "is not an optkit bundle, so --force will not replace it" in ran.message


@pytest.mark.parametrize("out", ["good.pt/out", "good.pt", "/proc/optkit/out"])
def test_an_output_folder_that_cannot_be_written(out: str, fails: Callable[..., Ran]):
    ran = fails("compile", "good.onnx", "--recipe", "recipe.yaml", "--out", out)
    assert ran.exit_code == 2
    assert out in ran.message
    assert "--out" in ran.message


@contextmanager
def small_disk(folder: Path) -> Iterator[Path]:
    """A file system of 300 KB: enough to begin."""
    folder.mkdir()
    mount = subprocess.run(
        ["mount", "-t", "tmpfs", "-o", "size=300k", "tmpfs", str(folder)], capture_output=True, text=True, check=False
    )
    if mount.returncode:
        pytest.skip(f"cannot mount a small file system here: {mount.stderr.strip()}")
    try:
        yield folder
    finally:
        subprocess.run(["umount", str(folder)], check=True)


@contextmanager
def small_files(folder: Path) -> Iterator[Path]:
    """Files end at 100 KB, which fails like a full disk does, and needs no privilege."""
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (100_000, hard))
    try:
        yield folder.parent
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))


@pytest.mark.parametrize("full", [small_disk, small_files])
def test_a_full_disk(full: Callable[[Path], Iterator[Path]], work: Path, fails: Callable[..., Ran]):
    weights = np.random.default_rng(0).standard_normal((4, 50_000)).astype(np.float32)
    model = onnx.parser.parse_model(ONNX.replace("float[4,3] w = {1,2,3,4,5,6,7,8,9,10,11,12}", "float[4,3] w = {1}"))
    model.graph.initializer[0].CopyFrom(onnx.numpy_helper.from_array(weights, "w"))
    model.graph.output[0].type.tensor_type.shape.dim[1].dim_value = 50_000
    onnx.save(model, work / "large.onnx")
    with full(work / "disk") as folder:
        ran = fails("compile", "large.onnx", "--recipe", "recipe.yaml", "--out", str(folder / "out"))
    assert ran.exit_code == 2
    assert os.strerror(errno.ENOSPC) in ran.message or os.strerror(errno.EFBIG) in ran.message
    assert "choose another --out" in ran.message


# Ctrl-C


@contextmanager
def interrupted_at(function: str) -> Iterator[list[str]]:
    """Send SIGINT when a function of optkit is called first. Yields the functions in the order of their first call."""
    called: list[str] = []
    seen: set[CodeType] = set()
    package = str(Path(bundle.__file__).parent)

    def profile(frame: FrameType, event: str, _: object) -> None:
        code = frame.f_code
        if event != "call" or code in seen:
            return
        seen.add(code)
        if code.co_filename.startswith(package) and not code.co_filename.endswith("cli.py"):
            called.append(f"{Path(code.co_filename).stem}.{code.co_name}")
            if called[-1] == function:
                os.kill(os.getpid(), signal.SIGINT)

    sys.setprofile(profile)
    try:
        yield called
    finally:
        sys.setprofile(None)


def test_an_interrupt_at_any_moment_leaves_nothing_or_a_whole_bundle(work: Path, capsys: pytest.CaptureFixture[str]):
    command = compile_onnx("--data", "spec.yaml")
    for _ in range(2):  # the first time fills caches, whose functions are not called again
        with interrupted_at("nothing") as functions:
            assert main(command) == 0
        shutil.rmtree(work / "out")
    before = listing(work.parent)
    delicate = {"compiler.compile", "compiler._staging", "bundle.write", "bundle._write_json", "bundle.move"}
    assert delicate <= set(functions)
    for function in delicate | set(functions[::16]):
        capsys.readouterr()
        with interrupted_at(function):
            assert main(command) == 130, function
        assert capsys.readouterr().err.endswith("error: interrupted\n"), function
        if (work / "out").exists() and functions.index(function) > functions.index("bundle.move"):
            assert verify(work / "out") == []
            shutil.rmtree(work / "out")
        assert listing(work.parent) == before, function


def test_an_interrupt_while_a_bundle_is_replaced_leaves_one_of_them_whole(
    work: Path, capsys: pytest.CaptureFixture[str]
):
    assert main(compile_onnx()) == 0
    names = {path.name for path in work.iterdir()}
    for line in range(1, 12):
        with interrupted_in(bundle.move, line):
            main(compile_onnx("--force"))
        assert verify(work / "out") == [], f"line {line} of bundle.move"
        assert {path.name for path in work.iterdir()} == names


@contextmanager
def interrupted_in(function: Callable[..., object], step: int) -> Iterator[None]:
    """Send SIGINT before the ``step``-th line that a function runs."""
    ran = 0

    def trace(frame: FrameType, event: str, _: object) -> Any:
        nonlocal ran
        if frame.f_code is not function.__code__:
            return None
        ran += event == "line"
        if ran == step:
            os.kill(os.getpid(), signal.SIGINT)
        return trace

    sys.settrace(trace)
    try:
        yield
    finally:
        sys.settrace(None)


# Interrupted inside of code made from a string, Python ends with SIGINT rather than with the exit code it is given
SLEEPS = """
import time
from pathlib import Path


def make():
    print("ready", flush=True)  # to stderr, as everything that is not the answer
    exec("time.sleep(60)")
"""


def test_an_interrupted_process_ends_with_130_and_one_line(work: Path):
    (work / "net.py").write_text(SLEEPS)
    before = listing(work.parent)
    command = [sys.executable, "-m", "optkit", *compile_state("--model", "net.py:make")]
    with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True) as process:
        assert process.stderr is not None
        assert process.stderr.readline() == "ready\n"
        process.send_signal(signal.SIGINT)
        out, err = process.communicate(timeout=30)
    assert (process.returncode, out, err) == (130, "", "error: interrupted\n")
    assert listing(work.parent) == before


def test_an_interrupt_while_torch_is_imported(work: Path):
    before = listing(work.parent)
    command = [sys.executable, "-m", "optkit", *compile_onnx()]
    with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True) as process:
        maps = Path(f"/proc/{process.pid}/maps")
        while "libtorch" not in maps.read_text():
            assert process.poll() is None
        process.send_signal(signal.SIGINT)
        out, err = process.communicate(timeout=30)
    assert (process.returncode, out, err) == (130, "", "error: interrupted\n")
    assert listing(work.parent) == before
