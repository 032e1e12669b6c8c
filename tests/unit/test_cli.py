from __future__ import annotations

import io
import json
import logging
import os
import re
import resource
import signal
import subprocess
import sys
import time
import warnings
from dataclasses import replace
from pathlib import Path

import pytest
import yaml

import optkit.recipe
from optkit import cli
from optkit.cli import RecipeOptions, Terminal, main
from optkit.errors import PassError, RecipeError, UsageError
from optkit.recipe import PRESETS, Recipe

OPTKIT = (sys.executable, "-m", "optkit")


def error_of(capsys: pytest.CaptureFixture[str]) -> str:
    """What stderr says; stdout must be empty."""
    captured = capsys.readouterr()
    assert captured.out == ""
    assert captured.err.startswith("error: ")
    assert captured.err.count("\n") == 1
    return captured.err.removeprefix("error: ").rstrip()


# Help, and what it costs


@pytest.mark.parametrize("arguments", [["--help"], []])
def test_help_names_every_command(arguments, capsys):
    assert main(arguments) == 0
    text = capsys.readouterr().out
    for command in ("compile", "validate", "bench", "sensitivity", "lint", "verify", "inspect", "doctor", "recipe"):
        assert f"  {command} " in text


def test_help_of_compile_names_the_presets_and_shows_examples(capsys):
    assert main(["compile", "--help"]) == 0
    text = capsys.readouterr().out
    assert "|".join(PRESETS) in text
    assert "optkit compile model.pt2 --precision int8" in text


def test_help_loads_nothing_heavy_and_is_quick():
    code = (
        "import sys; from optkit.__main__ import main; assert main() == 0; "
        "print([m for m in ('torch', 'onnx', 'onnx_ir', 'onnxruntime', 'numpy', 'pydantic') if m in sys.modules])"
    )
    seconds = []
    for _ in range(3):
        before = resource.getrusage(resource.RUSAGE_CHILDREN)
        run = subprocess.run([sys.executable, "-c", code, "--help"], capture_output=True, text=True, check=True)
        after = resource.getrusage(resource.RUSAGE_CHILDREN)
        seconds.append(after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime)
    assert run.stdout.splitlines()[-1] == "[]"
    assert min(seconds) <= 0.35


def test_version(capsys):
    assert main(["--version"]) == 0
    assert capsys.readouterr().out == f"optkit {optkit.__version__}\n"


# What was typed wrong


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["complie"], "'compile'"),
        (["compile", "--precison", "int8"], "--precision"),
        (["recipe", "chek"], "'check'"),
        (["verify"], "Missing argument"),
        (["compile", "m.pt", "--threads", "many"], "--threads"),
        (["compile", "m.pt", "--precision", "in8"], "did you mean 'int8'?"),
        (["compile", "m.pt", "--recipe", "in8"], "did you mean 'int8'?"),
        (["compile", "m.pt", "--recipe", "int8", "--precision", "int8"], "exclude each other"),
        (["compile", "m.pt", "--target", "onnxruntim"], "did you mean 'onnxruntime'?"),
        (["compile", "m.pt", "--max-drop", "-1"], "max_drop"),
        (["compile", "m.pt", "--threads", "0"], "threads"),
        (["compile", "m.pt", "--arg", "width"], "--arg width: write NAME=VALUE"),
        (["compile", "m.pt", "--arg", "width=[1"], "--arg width=[1"),
        (["compile", "m.pt", "--dim", "batch=1:8"], "--dim batch=1:8: write batch=MIN:OPT:MAX"),
        (["compile", "m.pt", "--dim", "batch=8:1:32"], "min <= opt <= max"),
        (["compile", "m.pt", "--input", "image=float32"], "float32[batch,3,224,224]"),
        (["compile"], "there is no model"),
        (["sensitivity"], "there is no model"),
        (["sensitivity", "m.pt", "--recipe", "fp16"], "no quantize_int8"),
        (["sensitivity", "m.pt", "--samples", "0"], "--samples"),
        (["lint", "m.onnx"], "no such file"),
        (["lint", "m.onnx", "--target", "tensort"], "did you mean 'tensorrt'?"),
    ],
)
def test_a_wrong_argument_is_one_line_and_exit_code_2(arguments, said, capsys, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert main(arguments) == 2
    assert said in error_of(capsys)
    assert list(tmp_path.iterdir()) == []


def test_an_error_as_json_is_one_document(capsys):
    assert main(["recipe", "show", "in8", "--json"]) == 2
    document = json.loads(capsys.readouterr().out)
    assert document["error"]["type"] == "RecipeError"
    assert document["error"]["exit_code"] == 2
    assert "'int8'" in document["error"]["message"]


def test_a_usage_error_as_json(capsys):
    assert main(["compile", "--json", "--precison", "int8"]) == 2
    assert json.loads(capsys.readouterr().out)["error"]["exit_code"] == 2


# What is not the user's fault. These faults cannot be caused for real in a test, so they are raised


@pytest.mark.parametrize(
    ("fault", "exit_code", "said"),
    [
        (TypeError("no"), 1, "a bug in optkit, please report it: TypeError: no (--debug shows the traceback)"),
        (MemoryError(), 5, "memory"),
        (OSError(28, "No space left on device", "/x"), 2, "/x: No space left on device: make room"),
        (KeyboardInterrupt(), 130, "interrupted"),
        (SystemExit(0), 2, "sys.exit(0)"),
    ],
)
def test_a_fault(fault, exit_code, said, monkeypatch, capsys):
    monkeypatch.setattr(optkit.recipe, "schema", lambda: _raise(fault))
    assert main(["recipe", "schema"]) == exit_code
    assert said in error_of(capsys)


@pytest.mark.parametrize(("cause", "exit_code"), [(MemoryError(), 5), (OSError(28, "No space left on device"), 2)])
def test_a_full_machine_is_no_bug_of_the_pass_it_happened_in(cause, exit_code, monkeypatch, capsys):
    fault = PassError("this is a bug in the pass")
    fault.__cause__ = cause
    monkeypatch.setattr(optkit.recipe, "schema", lambda: _raise(fault))
    assert main(["recipe", "schema"]) == exit_code
    assert "bug" not in error_of(capsys)


def test_the_traceback_comes_with_debug_only(monkeypatch, capsys):
    monkeypatch.setattr(optkit.recipe, "schema", lambda: _raise(RecipeError("wrong")))
    assert main(["recipe", "schema", "--debug"]) == 2
    assert "Traceback (most recent call last)" in capsys.readouterr().err
    assert main(["recipe", "schema"]) == 2
    assert error_of(capsys) == "wrong"


def _raise(fault: BaseException) -> None:
    raise fault


# Recipes from options


def test_every_option_lands_in_the_recipe(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    options = RecipeOptions(
        data="spec.yaml",
        factory="net.py:make",
        arg=["width=32", "name=x", "flags=[true, 0.5]"],
        input=["image=float32[batch,3,8,8]"],
        dim=["batch=1:4:16", "side=7"],
        trust_pickle=True,
        max_drop=1.5,
        min_speedup=2.0,
        samples=64,
        seed=7,
        threads=3,
    )
    recipe = options.applied_to(Recipe.load("int8"))
    assert recipe.data == str(tmp_path / "spec.yaml")
    assert recipe.model.factory == f"{tmp_path / 'net.py'}:make"
    assert recipe.model.arguments == {"width": 32, "name": "x", "flags": [True, 0.5]}
    assert recipe.model.trust_pickle
    assert recipe.inputs == {"image": "float32[batch,3,8,8]"}
    assert (recipe.dims["batch"].min, recipe.dims["batch"].opt, recipe.dims["batch"].max) == (1, 4, 16)
    assert (recipe.dims["side"].min, recipe.dims["side"].max) == (7, 7)
    assert (recipe.gate.max_drop, recipe.gate.min_speedup) == (1.5, 2.0)
    assert (recipe.validation.samples, recipe.seed, recipe.threads) == (64, 7, 3)
    assert Recipe.parse(recipe.to_yaml()) == recipe


def test_no_options_change_nothing(tmp_path):
    file = tmp_path / "r.yaml"
    file.write_text(
        "data: d.yaml\nseed: 3\nthreads: 2\nmodel: {checkpoint: m.pt, factory: 'net.py:make', trust_pickle: true}\n"
        "inputs: {x: 'float32[n,4]'}\ndims: {n: [1, 2, 8]}\npasses: [export_onnx, build_engine]\n"
        "gate: {max_drop: 2.0, min_speedup: 1.1}\nvalidation: {samples: 5}\n"
    )
    recipe = Recipe.load(file)
    assert RecipeOptions().applied_to(recipe) == recipe


def test_options_add_to_what_the_recipe_has():
    base = Recipe.load("fp32").updated(inputs={"a": "float32[4]"}, model={"arguments": {"width": 1, "depth": 2}})
    recipe = RecipeOptions(input=["b=float32[4]"], arg=["width=3"]).applied_to(base)
    assert recipe.inputs == {"a": "float32[4]", "b": "float32[4]"}
    assert recipe.model.arguments == {"width": 3, "depth": 2}


def test_a_target_for_a_recipe_that_builds_nothing_is_refused():
    recipe = Recipe.parse("passes: [export_onnx]")
    with pytest.raises(UsageError, match="build_engine"):
        cli._for_target(recipe, "onnxruntime")
    assert cli._for_target(Recipe.load("int8"), "tensorrt-rtx").target.name == "tensorrt-rtx"


# The recipe commands


def test_list_shows_presets_and_the_folder_and_says_what_is_broken(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "recipes").mkdir()
    (tmp_path / "recipes" / "good.yaml").write_text("description: for cats\npasses: [export_onnx]\n")
    (tmp_path / "recipes" / "bad.yaml").write_text("pases: []\n")
    assert main(["recipe", "list"]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert [line.split()[0] for line in lines] == [*PRESETS, "recipes/bad.yaml", "recipes/good.yaml"]
    assert "recipes/bad.yaml:1" in lines[-2]
    assert "for cats" in lines[-1]


def test_show_prints_a_recipe_that_loads_back(capsys):
    assert main(["recipe", "show", "int8"]) == 0
    assert Recipe.parse(capsys.readouterr().out) == Recipe.load("int8")
    assert main(["recipe", "show", "int8", "--json"]) == 0
    assert Recipe.parse(yaml.safe_dump(json.loads(capsys.readouterr().out))) == Recipe.load("int8")


def test_check_goes_through_all_files(tmp_path, capsys):
    bad = tmp_path / "bad.yaml"
    bad.write_text("passes: [export_onnx]\nsede: 1\n")
    assert main(["recipe", "check", "int8", str(bad), "fp32"]) == 2
    captured = capsys.readouterr()
    assert [line.split(":")[0] for line in captured.out.splitlines()] == ["int8", "fp32"]
    assert f"{bad}:2" in captured.err
    assert "did you mean 'seed'?" in captured.err
    assert main(["recipe", "check", "int8"]) == 0


def test_schema_is_json(capsys):
    assert main(["recipe", "schema"]) == 0
    assert "passes" in json.loads(capsys.readouterr().out)["properties"]


# The machine


def test_doctor_finds_what_runs_these_tests(capsys):
    assert main(["doctor", "--json"]) == 0
    findings = {finding["subject"]: finding for finding in json.loads(capsys.readouterr().out)["findings"]}
    assert findings["torch"]["ok"]
    assert findings["torch"]["required"]
    assert main(["doctor"]) == 0
    assert re.search(r"^ok +torch ", capsys.readouterr().out, re.MULTILINE)


def test_doctor_exits_with_4_where_something_needed_is_missing(monkeypatch, capsys):
    monkeypatch.setitem(sys.modules, "onnxscript", None)  # as if it were not installed
    assert main(["doctor"]) == 4
    assert re.search(r"^MISSING +onnxscript .*\n.*> pip install onnxscript", capsys.readouterr().out, re.MULTILINE)


# The terminal


def test_a_reader_that_leaves_is_no_error():
    run = subprocess.run(
        ["bash", "-c", f"set -o pipefail; {' '.join(OPTKIT)} recipe schema | true"],
        capture_output=True,
        text=True,
        check=False,
    )
    assert run.stderr == ""
    assert run.returncode == 141


@pytest.mark.parametrize(
    ("terminal", "said"),
    [
        (Terminal(), "warning: two\n"),
        (Terminal(quiet=True), ""),
        (Terminal(verbose=1), "info: one\nwarning: two\n"),
        (Terminal(verbose=2), "optkit.some: zero\ninfo: one\nwarning: two\n"),
    ],
)
def test_the_log_goes_to_stderr(terminal, said, capsys):
    log = logging.getLogger("optkit.some")
    with terminal.logging():
        log.debug("zero")
        log.info("one")
        log.warning("two")
    log.warning("after")
    captured = capsys.readouterr()
    assert captured.out == ""
    assert captured.err == said


def test_what_others_print_does_not_mix_with_the_answer(monkeypatch, capsys):
    def chatty() -> dict[str, object]:
        print("hello")
        warnings.warn("deprecated", stacklevel=1)
        return {}

    monkeypatch.setattr(optkit.recipe, "schema", chatty)
    with warnings.catch_warnings():
        warnings.simplefilter("always")
        assert main(["recipe", "schema", "--json"]) == 0
    captured = capsys.readouterr()
    assert json.loads(captured.out) == {}
    assert "hello" in captured.err


class FakeTerminal(io.StringIO):
    def isatty(self) -> bool:
        return True


@pytest.mark.parametrize(("threshold", "drawn"), [(0.05, True), (60.0, False)])
def test_only_slow_loops_get_a_bar(threshold, drawn, monkeypatch):
    monkeypatch.setattr(cli, "BAR_AFTER_SECONDS", threshold)
    monkeypatch.setattr(sys, "stderr", FakeTerminal())
    monkeypatch.setenv("TERM", "xterm")
    with Terminal().progress() as progress:
        for _ in progress(range(4), "calibrate"):
            time.sleep(0.15)
    assert isinstance(sys.stderr, FakeTerminal)
    assert ("calibrate" in sys.stderr.getvalue()) is drawn
    assert ("ETA" in sys.stderr.getvalue()) is drawn


def test_a_bar_may_say_how_far_it_is(monkeypatch):
    monkeypatch.setattr(cli, "BAR_AFTER_SECONDS", 0.0)
    monkeypatch.setattr(sys, "stderr", FakeTerminal())
    monkeypatch.setenv("TERM", "xterm")
    losses: list[float] = []
    with Terminal().progress() as progress:
        for loss in progress([0.25, 0.125], lambda: f"loss {losses[-1:]}"):
            losses.append(loss)
            time.sleep(0.3)
    assert "loss []" in sys.stderr.getvalue()
    assert "loss [0.25]" in sys.stderr.getvalue()


@pytest.mark.parametrize("terminal", [Terminal(), Terminal(quiet=True)])
def test_no_bars_without_a_terminal_or_when_quiet(terminal, monkeypatch):
    stream = FakeTerminal() if terminal.quiet else io.StringIO()
    monkeypatch.setattr(cli, "BAR_AFTER_SECONDS", 0.0)
    monkeypatch.setattr(sys, "stderr", stream)
    with replace(terminal).progress() as progress:
        assert list(progress(iter([1, 2]), "calibrate", 2)) == [1, 2]
    assert stream.getvalue() == ""


# Ctrl-C


def test_a_second_interrupt_does_not_disturb_the_cleaning_up():
    cleaned = False
    before = signal.getsignal(signal.SIGINT)
    with pytest.raises(KeyboardInterrupt), cli._interruptible():
        try:
            os.kill(os.getpid(), signal.SIGINT)
            time.sleep(5)
        finally:
            os.kill(os.getpid(), signal.SIGINT)
            cleaned = True
    assert cleaned
    assert signal.getsignal(signal.SIGINT) is before


def test_sigterm_unwinds_like_an_interrupt():
    with pytest.raises(KeyboardInterrupt), cli._interruptible():
        os.kill(os.getpid(), signal.SIGTERM)
        time.sleep(5)


def test_an_interrupt_while_arguments_are_read(monkeypatch, capsys):
    def interrupted(*_: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr("typer.core.TyperOption.process_value", interrupted)
    assert main(["recipe", "list"]) == 130
    assert error_of(capsys) == "interrupted"


def test_the_script_runs_as_a_module(tmp_path: Path):
    run = subprocess.run([*OPTKIT, "recipe", "show", "nope"], capture_output=True, text=True, cwd=tmp_path, check=False)
    assert run.returncode == 2
    assert run.stderr == "error: nope: neither a preset nor a file; known: bf16, fp16, fp32, int8\n"
