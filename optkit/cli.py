"""The command line: arguments become a recipe, one call, and an exit code. The only file that prints."""

from __future__ import annotations

import contextlib
import dataclasses
import errno
import inspect
import json
import logging
import os
import re
import signal
import sys
import threading
import time
import traceback
import typing
import warnings
from collections.abc import Callable, Iterable, Iterator, Sequence, Sized
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, TypeVar

import typer

from optkit import __version__
from optkit.errors import GateError, OptkitError, PassError, UnavailableError, UsageError, did_you_mean

if TYPE_CHECKING:
    from types import FrameType

    from optkit.bundle import Bundle
    from optkit.context import Progress
    from optkit.documents import Strict
    from optkit.recipe import Recipe

T = TypeVar("T")

INTERRUPTED = 130  # 128 + SIGINT, as shells have it
PIPE_CLOSED = 141  # 128 + SIGPIPE, which Windows does not have

BAR_AFTER_SECONDS = 2.0
"""What is done sooner gets no progress bar."""

CLEAN_UP_SECONDS = 3.0
"""How long a second Ctrl-C is ignored after the first."""

FULL_DISK = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)

app = typer.Typer(rich_markup_mode=None, pretty_exceptions_enable=False, add_completion=False)
recipes = typer.Typer(rich_markup_mode=None, help="List, show and check recipes.")
app.add_typer(recipes, name="recipe")


def main(arguments: Sequence[str] | None = None) -> int:
    """Run one command and return its exit code (``errors.py`` lists them).

    Args:
        arguments: what follows ``optkit``; ``sys.argv`` if not given.
    """
    arguments = list(sys.argv[1:] if arguments is None else arguments)
    try:
        with _interruptible():
            parsed = app(args=arguments or ["--help"], prog_name="optkit", standalone_mode=False)
            if parsed == INTERRUPTED:  # some releases of Typer report Ctrl-C as an exit code
                raise KeyboardInterrupt
            if not isinstance(parsed, Parsed):  # --help and --version have answered already
                return int(parsed or 0)
            answer = parsed.run()
    except (KeyboardInterrupt, typer.Abort):
        answer = _failure("KeyboardInterrupt", "interrupted", INTERRUPTED)
    except Exception as error:  # the last line of defence: whatever it is, the user gets one paragraph
        if "--debug" in arguments:
            traceback.print_exc()
        answer = _explain(error)
    return _say(answer, as_json="--json" in arguments)


# What a command gives back, and how it is said


@dataclass(frozen=True)
class Answer:
    """What a command has to say: ``document`` with ``--json``, else ``text``; ``problem`` goes to stderr."""

    document: dict[str, Any]
    text: str = ""
    problem: str = ""
    exit_code: int = 0


def _say(answer: Answer, as_json: bool) -> int:
    text = json.dumps(answer.document, indent=1, default=str) if as_json else answer.text
    try:
        if text:
            typer.echo(text.rstrip("\n"))
        sys.stdout.flush()
    except BrokenPipeError:
        # Whoever read us has left. Python flushes stdout once more at exit, so give it something that takes it
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return PIPE_CLOSED
    if answer.problem:
        typer.echo(f"{typer.style('error:', fg='red', bold=True)} {answer.problem}", err=True)
    return answer.exit_code


def _failure(kind: str, message: str, exit_code: int, **more: Any) -> Answer:
    document = {"error": {"type": kind, "message": message, "exit_code": exit_code}, **more}
    return Answer(document, problem=message, exit_code=exit_code)


# Typer's own usage errors; named by descent, for their home has changed between its releases
_TyperUsageError: Any = typer.BadParameter.__bases__[0]


def _explain(error: Exception) -> Answer:
    kind = type(error).__name__
    if isinstance(error, _TyperUsageError):
        where = f" (see {error.ctx.command_path} --help)" if error.ctx else ""
        return _failure("UsageError", f"{' '.join(error.format_message().split())}{where}", 2)
    if isinstance(error, GateError) and error.bundle is not None:
        failure = _failure(kind, str(error), error.exit_code, **_bundle_document(error.bundle))
        return dataclasses.replace(failure, text=error.bundle.summary)
    if isinstance(error, OptkitError) and not isinstance(error, PassError):
        return _failure(kind, str(error), error.exit_code)
    for cause in _causes(error):
        # The pipeline reports these as a failure of the pass in which they happened, but they are the machine's
        if isinstance(cause, MemoryError):
            mend = "use fewer samples (--samples), a smaller validation.batch_size, or a machine with more memory"
            return _failure("MemoryError", f"the memory of this machine is full: {mend}", PassError.exit_code)
        if isinstance(cause, OSError) and cause.errno in FULL_DISK:
            where = cause.filename or "where optkit writes"
            return _failure("OSError", f"{where}: {cause.strerror}: make room, or choose another --out", 2)
    if isinstance(error, OptkitError):
        return _failure(kind, str(error), error.exit_code)
    return _failure(kind, f"a bug in optkit, please report it: {kind}: {error} (--debug shows the traceback)", 1)


def _causes(error: BaseException | None) -> Iterator[BaseException]:
    while error is not None:
        yield error
        error = error.__cause__


@contextlib.contextmanager
def _interruptible() -> Iterator[None]:
    """Ctrl-C and SIGTERM unwind the stack, so that everything cleans up, and a second one does not disturb that."""
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    quiet_until = 0.0

    def interrupt(number: int, frame: FrameType | None) -> None:
        nonlocal quiet_until
        if time.monotonic() >= quiet_until:
            quiet_until = time.monotonic() + CLEAN_UP_SECONDS
            raise KeyboardInterrupt

    before = {number: signal.signal(number, interrupt) for number in (signal.SIGINT, signal.SIGTERM)}
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


# How a command speaks while it works


@dataclass(frozen=True)
class Terminal:
    """The options that every command has."""

    json: Annotated[bool, typer.Option("--json", help="Print one JSON document and nothing else.")] = False
    verbose: Annotated[
        int, typer.Option("--verbose", "-v", count=True, show_default=False, help="Log what is done; -vv: all.")
    ] = 0
    quiet: Annotated[bool, typer.Option("--quiet", "-q", help="No progress bars and no warnings.")] = False
    debug: Annotated[bool, typer.Option("--debug", help="Show the traceback of an error.")] = False

    @contextlib.contextmanager
    def logging(self) -> Iterator[None]:
        """Send the log to stderr while a command runs, and leave other people's warnings out unless asked."""
        log, handler = logging.getLogger("optkit"), _ToStderr()
        before = log.level, log.propagate
        log.addHandler(handler)
        log.setLevel(
            logging.ERROR if self.quiet else (logging.WARNING, logging.INFO, logging.DEBUG)[min(self.verbose, 2)]
        )
        log.propagate = False
        try:
            with warnings.catch_warnings():
                if not self.verbose and not sys.warnoptions:
                    warnings.simplefilter("ignore")
                yield
        finally:
            log.removeHandler(handler)
            log.level, log.propagate = before

    @contextlib.contextmanager
    def progress(self) -> Iterator[Progress]:
        """Progress bars on a terminal, silence everywhere else."""
        from optkit.context import silent

        if self.quiet or not sys.stderr.isatty():
            yield silent
            return
        bars = _Bars()
        try:
            yield bars
        finally:
            bars.close()


class _ToStderr(logging.Handler):
    """Looks up ``sys.stderr`` at every record: a progress bar puts itself in its place while it is drawn."""

    def emit(self, record: logging.LogRecord) -> None:
        label = record.levelname.lower() if record.levelno > logging.DEBUG else record.name
        print(f"{label}: {record.getMessage()}", file=sys.stderr)


class _Bars:
    """One progress bar for each loop that is running, once it has run long enough."""

    def __init__(self) -> None:
        from rich import progress
        from rich.console import Console

        class SlowOnly(progress.Progress):
            def get_renderables(self) -> Iterable[Any]:
                slow = [task for task in self.tasks if (task.elapsed or 0) >= BAR_AFTER_SECONDS]
                if slow:
                    yield self.make_tasks_table(slow)

        self._bars = SlowOnly(
            progress.TextColumn("{task.description}"),
            progress.BarColumn(),
            progress.MofNCompleteColumn(),
            progress.TimeElapsedColumn(),
            progress.TextColumn("ETA"),
            progress.TimeRemainingColumn(),
            console=Console(stderr=True),
            refresh_per_second=4,  # enough for the eye, and hardly felt by what is being timed
            transient=True,
        )

    def __call__(
        self, items: Iterable[T], description: str | Callable[[], str], total: int | None = None
    ) -> Iterator[T]:
        if total is None and isinstance(items, Sized):
            total = len(items)
        describe = description if callable(description) else partial(str, description)
        task = self._bars.add_task(describe(), total=total)
        self._bars.start()
        try:
            for item in items:
                yield item
                self._bars.update(task, advance=1, description=describe())
        finally:
            self._bars.remove_task(task)
            if not self._bars.tasks:
                self._bars.stop()

    def close(self) -> None:
        self._bars.stop()


# How a function becomes a command


@dataclass(frozen=True)
class Parsed:
    """A command whose arguments have been read. It runs outside Typer, which would swallow what is raised."""

    terminal: Terminal
    work: Callable[[], Answer]

    def run(self) -> Answer:
        """Run it; what anything else prints meanwhile goes to stderr."""
        with self.terminal.logging(), contextlib.redirect_stdout(sys.stderr):
            try:
                return self.work()
            except SystemExit as error:
                raise UsageError(
                    f"the Python code of the model or the data called sys.exit({error.code!r}): remove that call"
                ) from error


Command = Callable[..., Answer]


def command(group: typer.Typer, name: str, examples: Sequence[str] = ()) -> Callable[[Command], Command]:
    """Add a command to a group. A parameter whose type is a dataclass becomes one option for each of its fields."""

    def register(function: Command) -> Command:
        own: list[inspect.Parameter] = []
        bundles: dict[str, Any] = {}
        # Not get_type_hints: Python 3.10's wraps what has None as its default, and Typer finds no Argument in that
        for key, parameter in inspect.signature(function, eval_str=True).parameters.items():
            if dataclasses.is_dataclass(parameter.annotation):
                bundles[key] = parameter.annotation
            else:
                own.append(parameter.replace(kind=parameter.KEYWORD_ONLY))

        parameters = [*own, *(option for kind in bundles.values() for option in _options(kind))]

        def parse(**values: Any) -> Parsed:
            for key, kind in bundles.items():
                values[key] = kind(**{field.name: values.pop(field.name) for field in dataclasses.fields(kind)})
            return Parsed(values["terminal"], lambda: function(**values))

        parse.__doc__ = function.__doc__
        parse.__signature__ = inspect.Signature(parameters)  # type: ignore[attr-defined]  # what inspect looks for
        parse.__annotations__ = {parameter.name: parameter.annotation for parameter in parameters}
        epilog = "\b\nExamples:\n" + "\n".join(f"  optkit {line}" for line in examples) if examples else None
        group.command(name, epilog=epilog)(parse)
        return function

    return register


def _options(kind: Any) -> list[inspect.Parameter]:
    hints = typing.get_type_hints(kind, include_extras=True)
    return [
        inspect.Parameter(
            field.name,
            inspect.Parameter.KEYWORD_ONLY,
            default=field.default_factory() if callable(field.default_factory) else field.default,
            annotation=hints[field.name],
        )
        for field in dataclasses.fields(kind)
    ]


# Recipes from options


@dataclass(frozen=True)
class ModelOptions:
    """Options that each set one field of the recipe: those of what goes in."""

    data: Annotated[
        str | None, typer.Option(metavar="SPEC", help="Data spec (YAML): what to calibrate and to judge with.")
    ] = None
    factory: Annotated[
        str | None,
        typer.Option(
            "--model", metavar="MODULE:FACTORY", help="What builds the module of a state_dict; or FILE.py:FACTORY."
        ),
    ] = None
    arg: Annotated[
        list[str], typer.Option(metavar="KEY=VALUE", help="Argument of the factory, as YAML; may be repeated.")
    ] = dataclasses.field(default_factory=list)
    input: Annotated[
        list[str], typer.Option(metavar="NAME=DTYPE[DIMS]", help="An input, as image=float32[batch,3,224,224].")
    ] = dataclasses.field(default_factory=list)
    dim: Annotated[
        list[str],
        typer.Option(
            metavar="NAME=MIN:OPT:MAX", help="Sizes of a dynamic dimension, as batch=1:8:32; batch=8 fixes it."
        ),
    ] = dataclasses.field(default_factory=list)
    trust_pickle: Annotated[
        bool, typer.Option("--trust-pickle", help="Load a pickled module, which runs the code that is in it.")
    ] = False
    seed: Annotated[int | None, typer.Option(metavar="N", help="The only source of randomness [0].")] = None
    threads: Annotated[int | None, typer.Option(metavar="N", help="CPU threads [the number of physical cores].")] = None

    def applied_to(self, recipe: Recipe) -> Recipe:
        """The recipe with what was given put in; paths are relative to the current folder.

        Raises:
            RecipeError: a value does not fit its field.
            UsageError: an option is not of the form that it should have.
        """
        model = {
            "factory": self.factory,
            "arguments": {**recipe.model.arguments, **{k: _yaml(k, v) for k, v in _pairs("--arg", self.arg)}},
            "trust_pickle": self.trust_pickle or None,
        }
        return recipe.updated(
            model=_over(recipe.model, model),
            inputs={**recipe.inputs, **dict(_pairs("--input", self.input))},
            dims={**recipe.dims, **{k: _range(k, v) for k, v in _pairs("--dim", self.dim)}},
            **_given({"data": self.data, "seed": self.seed, "threads": self.threads}),
        ).relative_to(Path.cwd())


@dataclass(frozen=True)
class RecipeOptions(ModelOptions):
    """The same, and those of what is judged."""

    max_drop: Annotated[
        float | None, typer.Option(metavar="POINTS", help="What the metric may lose, in points of 100 [0.5].")
    ] = None
    min_speedup: Annotated[
        float | None, typer.Option(metavar="FACTOR", help="How many times faster than FP32 it must be [not judged].")
    ] = None
    samples: Annotated[
        int | None, typer.Option(metavar="N", help="How many validation samples to use [the whole split].")
    ] = None

    def applied_to(self, recipe: Recipe) -> Recipe:
        """The recipe with what was given put in, as above."""
        return (
            super()
            .applied_to(recipe)
            .updated(
                validation=_over(recipe.validation, {"samples": self.samples}),
                gate=_over(recipe.gate, {"max_drop": self.max_drop, "min_speedup": self.min_speedup}),
            )
        )


def _for_target(recipe: Recipe, target: str | None) -> Recipe:
    if target is None:
        return recipe
    if not any(step.use == "build_engine" for step in recipe.passes):
        raise UsageError("--target: the recipe has no build_engine pass: add {use: build_engine} to its passes")
    return recipe.updated(target=target)


def _given(fields: dict[str, Any]) -> dict[str, Any]:
    return {key: value for key, value in fields.items() if value is not None}


def _over(part: Strict, fields: dict[str, Any]) -> dict[str, Any]:
    return {**part.model_dump(mode="json"), **_given(fields)}


def _pairs(option: str, texts: Iterable[str]) -> Iterator[tuple[str, str]]:
    for text in texts:
        key, equals, value = text.partition("=")
        if not (key and equals and value):
            raise UsageError(f"{option} {text}: write NAME=VALUE")
        yield key, value


def _yaml(key: str, text: str) -> Any:
    import yaml

    try:
        return yaml.safe_load(text)
    except yaml.YAMLError as error:
        raise UsageError(f"--arg {key}={text}: the value is not YAML; quote it if it is a string") from error


def _range(key: str, text: str) -> int | list[int]:
    sizes = text.split(":")
    if len(sizes) not in (1, 3) or not all(size.isdigit() for size in sizes):
        raise UsageError(f"--dim {key}={text}: write {key}=MIN:OPT:MAX, as in {key}=1:8:32, or one fixed size")
    return int(sizes[0]) if len(sizes) == 1 else [int(size) for size in sizes]


def _base_recipe(source: str | None, precision: str | None) -> tuple[Recipe, str]:
    """The recipe to start from, and what a bundle made with it is called."""
    from optkit.recipe import PRESETS, Recipe

    if source is not None and precision is not None:
        raise UsageError("--recipe and --precision exclude each other: a precision is the built-in recipe of that name")
    if source is None:
        precision = precision or "fp32"
        if precision not in PRESETS:
            raise UsageError(f"--precision {precision}: {did_you_mean(precision, PRESETS)}")
        return Recipe.load(precision), precision
    recipe = Recipe.load(source)
    return recipe, Path(source).stem if recipe.name == "unnamed" else recipe.name


# The commands


def _print_version(wanted: bool) -> None:
    if wanted:
        typer.echo(f"optkit {__version__}")
        raise typer.Exit


@app.callback()
def _root(
    version: Annotated[
        bool, typer.Option("--version", help="Print the version.", is_eager=True, callback=_print_version)
    ] = False,
) -> None:
    """Compile a PyTorch checkpoint to a fast engine and prove that it is right."""


@command(
    app,
    "compile",
    [
        "compile model.pt2 --precision int8 --data calibration/fashion-mnist.yaml",
        "compile weights.safetensors --model net.py:make --arg width=32 --input 'image=float32[batch,3,224,224]'",
        "compile --recipe recipes/digits-int8.yaml --target tensorrt-rtx --out digits-rtx",
    ],
)
def compile_checkpoint(
    options: RecipeOptions,
    terminal: Terminal,
    checkpoint: Annotated[
        str | None,
        typer.Argument(
            metavar="MODEL", help="Checkpoint: .pt2, state_dict, safetensors, TorchScript, ONNX, model folder."
        ),
    ] = None,
    recipe: Annotated[str | None, typer.Option(metavar="FILE", help="Recipe file.")] = None,
    precision: Annotated[
        str | None,
        typer.Option(metavar="fp32|fp16|bf16|int8", help="Built-in recipe, where there is no --recipe [fp32]."),
    ] = None,
    target: Annotated[
        str | None, typer.Option(metavar="NAME", help="What to build for [the recipe's]; `optkit doctor` lists them.")
    ] = None,
    out: Annotated[
        Path | None, typer.Option(metavar="DIR", help="The bundle to write [MODEL-PRECISION in the current folder].")
    ] = None,
    force: Annotated[bool, typer.Option("--force", help="Replace the bundle at --out.")] = False,
) -> Answer:
    """Compile a checkpoint and judge the result.

    Nothing is written to --out unless accuracy and latency, compared with the original, pass the gate.

    Exits with 0 if it passed, 3 if the gate was missed or is inconclusive, 2 if the input does not fit, 4 if something
    is not installed or not on this machine, and 5 if a pass failed.
    """
    base, name = _base_recipe(recipe, precision)
    resolved = options.applied_to(_for_target(base, target))
    if checkpoint is None and resolved.model.checkpoint is None:
        raise UsageError("there is no model: name a checkpoint, or set model.checkpoint in the recipe")
    from optkit.compiler import compile

    out = out or Path(f"{_stem(checkpoint or resolved.model.checkpoint or '')}-{name}")
    with terminal.progress() as progress:
        bundle = compile(checkpoint, resolved, out, force=force, progress=progress)
    return Answer(_bundle_document(bundle), f"{bundle.summary}\nbundle: {bundle.path}")


def _bundle_document(bundle: Bundle) -> dict[str, Any]:
    return {"bundle": str(bundle.path), "verdict": bundle.manifest["verdict"], "report": bundle.report}


def _stem(checkpoint: str) -> str:
    path = Path(checkpoint).resolve()
    return path.name if path.is_dir() else path.stem


@command(
    app,
    "validate",
    [
        "validate digits-int8",
        "validate digits-int8 --baseline model.pt2 --data calibration/digits.yaml --samples 1000",
        "validate tuned.onnx --baseline model.onnx --recipe recipes/digits-int8.yaml",
    ],
)
def validate_candidate(
    options: RecipeOptions,
    terminal: Terminal,
    candidate: Annotated[str, typer.Argument(metavar="CANDIDATE", help="Bundle, ONNX file or checkpoint to judge.")],
    baseline: Annotated[
        str | None, typer.Option(metavar="MODEL", help="What is right [the checkpoint that the bundle was made from].")
    ] = None,
    recipe: Annotated[
        str | None,
        typer.Option(metavar="FILE", help="Where data, gate and measuring are set [the bundle's own recipe]."),
    ] = None,
) -> Answer:
    """Compare a bundle or a model with a baseline.

    Accuracy, latency and the gate, as `compile` judges them. Exits with 0 if it passed and 3 if it did not.
    """
    from optkit import bundle as bundles
    from optkit.compiler import validate
    from optkit.recipe import Recipe
    from optkit.report.text import render

    if recipe is not None:
        base = Recipe.load(recipe)
    else:
        base = bundles.load(candidate).recipe if bundles.is_bundle(Path(candidate)) else Recipe.load("fp32")
    with terminal.progress() as progress:
        report = validate(candidate, baseline, options.applied_to(base), progress=progress)
    exit_code = 0 if report.verdict.status == "passed" else GateError.exit_code
    return Answer(report.document, render(report.document), exit_code=exit_code)


@command(
    app,
    "bench",
    [
        "bench model.pt2 --batch 1,8,32,128 --bound 5ms",
        "bench model.pt2 --on tensorrt,onnxruntime,torch --precision fp16,int8 --data calibration/fashion-mnist.yaml",
        "bench --recipe recipes/digits-int8.yaml --on onnxruntime,torch",
    ],
)
def time_side_by_side(
    options: ModelOptions,
    terminal: Terminal,
    checkpoint: Annotated[
        str | None, typer.Argument(metavar="MODEL", help="Checkpoint, as `compile` takes it.")
    ] = None,
    on: Annotated[
        str | None, typer.Option(metavar="NAME,NAME", help="Who takes part: torch and targets [all of them].")
    ] = None,
    precision: Annotated[
        str | None,
        typer.Option(
            metavar="fp32|fp16|bf16|int8,...", help="Built-in recipes [fp32,fp16, with --data fp32,fp16,int8]."
        ),
    ] = None,
    recipe: Annotated[
        list[str] | None, typer.Option(metavar="FILE", help="Recipe file instead; may be repeated.")
    ] = None,
    batch: Annotated[
        str | None, typer.Option(metavar="N,N", help="Batch sizes [1,8,32,128, or the only one the model takes].")
    ] = None,
    contexts: Annotated[
        str, typer.Option(metavar="N,N", help="Calls side by side, each number a row (TensorRT).")
    ] = "1",
    transfers: Annotated[
        bool, typer.Option("--transfers", help="A row with copies from and to the host as well (TensorRT).")
    ] = False,
    bound: Annotated[
        str | None, typer.Option(metavar="TIME", help="Latency to keep to, as 5ms: says which batch does.")
    ] = None,
    rounds: Annotated[
        int | None, typer.Option(metavar="N", min=2, help="Interleaved rounds [the recipe's: 20].")
    ] = None,
) -> Answer:
    """Time a model side by side: runtimes, precisions and batch sizes.

    Everyone who can run here is timed in the same interleaved rounds; the others are listed with the reason. Exits with
    4 only if nobody can run.
    """
    from optkit.benchmark import PLATFORMS, bench

    presets = precision or ("fp32,fp16,int8" if options.data else "fp32,fp16")
    if recipe and precision:
        raise UsageError("--recipe and --precision exclude each other: a precision is the built-in recipe of that name")
    bases = [_base_recipe(file, None) for file in recipe or ()] or [_base_recipe(None, p) for p in _words(presets)]
    chosen = [options.applied_to(base) for base, _ in bases]
    if rounds is not None:
        chosen = [_with_rounds(one, rounds) for one in chosen]
    with terminal.progress() as progress:
        found = bench(
            checkpoint,
            chosen,
            on=PLATFORMS if on is None else _words(on),
            batches=None if batch is None else _sizes("batch", batch),
            contexts=_sizes("contexts", contexts),
            transfers=transfers,
            bound=None if bound is None else _seconds(bound),
            progress=progress,
        )
    if found.interrupted:
        return Answer(found.document, found.summary, "interrupted: what was done by then is above", INTERRUPTED)
    return Answer(found.document, found.summary)


def _with_rounds(recipe: Recipe, rounds: int) -> Recipe:
    latency = _over(recipe.validation.latency, {"rounds": rounds})
    return recipe.updated(validation=_over(recipe.validation, {"latency": latency}))


def _words(text: str) -> list[str]:
    return [word.strip() for word in text.split(",") if word.strip()]


def _sizes(option: str, text: str) -> list[int]:
    if not all(word.isdigit() and int(word) for word in _words(text)) or not _words(text):
        raise UsageError(f"--{option} {text}: write numbers, as in --{option} 1,8,32")
    return [int(word) for word in _words(text)]


def _seconds(text: str) -> float:
    match = re.fullmatch(r"(\d+(?:\.\d+)?)\s*(us|ms|s)", text.strip())
    if match is None or float(match[1]) == 0:
        raise UsageError(f"--bound {text}: write a time with its unit, as 5ms, 800us or 0.2s")
    return float(match[1]) * {"us": 1e-6, "ms": 1e-3, "s": 1.0}[match[2]]


@command(
    app,
    "sensitivity",
    [
        "sensitivity model.onnx --data calibration/digits.yaml",
        "sensitivity --recipe recipes/digits-int8.yaml --target tensorrt --samples 256 --json",
    ],
)
def rank_layers(
    options: ModelOptions,
    terminal: Terminal,
    checkpoint: Annotated[
        str | None, typer.Argument(metavar="MODEL", help="Float checkpoint, as `compile` takes it.")
    ] = None,
    recipe: Annotated[
        str | None, typer.Option(metavar="FILE", help="Recipe with quantize_int8 [the built-in int8].")
    ] = None,
    target: Annotated[
        str | None, typer.Option(metavar="NAME", help="Whose INT8 to rank [the recipe's]; it need not be here.")
    ] = None,
    samples: Annotated[
        int | None, typer.Option(metavar="N", min=1, help="How many calibration samples to use [the recipe's].")
    ] = None,
) -> Answer:
    """Rank the INT8 layers by the error that each adds.

    Each is alone in INT8 in turn: its SQNR is that of the outputs on a few held-out calibration samples, its noise the
    share of what all layers add so. Names are those that `exclude` of quantize_int8 takes.
    """
    from optkit.compiler import sensitivity
    from optkit.recipe import Recipe

    resolved = options.applied_to(_for_target(Recipe.load(recipe or "int8"), target))
    with terminal.progress() as progress:
        ranking = sensitivity(checkpoint, resolved, samples=samples, progress=progress)
    total = sum(node.macs or 0 for node in ranking.nodes)
    lines = [f"{'SQNR dB':>8}  {'noise':>6}  {'MACs':>6}  {'op':13}  layer"]
    for node in ranking.nodes:
        share = f"{100 * node.macs / total:5.1f}%" if node.macs and total else "?"
        lines.append(f"{node.sqnr_db:8.2f}  {100 * node.noise:5.1f}%  {share:>6}  {node.op:13}  {node.name}")
    lines.append(f"all in INT8: {ranking.sqnr_db:.2f} dB on {ranking.samples} samples, for {resolved.target.name}")
    return Answer({"target": resolved.target.name, **dataclasses.asdict(ranking)}, "\n".join(lines))


@command(app, "lint", ["lint model-int8.onnx --target tensorrt"])
def lint_model(
    terminal: Terminal,
    file: Annotated[Path, typer.Argument(metavar="MODEL", help="Quantized ONNX file, or bundle.")],
    target: Annotated[str, typer.Option(metavar="NAME", help="What the model is meant for.")] = "onnxruntime",
) -> Answer:
    """Judge a quantized ONNX model by what a target wants.

    Rules E break a build, rules W cost accuracy or time. Exits with 2 if there are errors, and 0 otherwise.
    """
    from optkit.compiler import lint
    from optkit.recipe import Recipe

    meant_for = Recipe.load("int8").updated(target=target).target
    findings = lint(file, meant_for)
    errors = sum(finding.is_error for finding in findings)
    lines = [f"{found.rule}  {found.node}: {found.message}\n    > {found.mend}" for found in findings]
    lines.append(f"{file} for {target}: errors: {errors}, warnings: {len(findings) - errors}")
    document = {"model": str(file), "target": target, "findings": [dataclasses.asdict(found) for found in findings]}
    return Answer(document, "\n".join(lines), exit_code=UsageError.exit_code if errors else 0)


@command(app, "verify", ["verify digits-int8", "verify digits-int8 --rebuild"])
def verify_bundle(
    terminal: Terminal,
    bundle: Annotated[Path, typer.Argument(metavar="BUNDLE", help="Folder that `compile` wrote.")],
    rebuild: Annotated[
        bool, typer.Option("--rebuild", help="Build an engine that does not fit again, from the bundle's ONNX.")
    ] = False,
) -> Answer:
    """Check a bundle on this machine.

    Every file is the one that was written, the engine fits the versions, the GPU and the processor here, and it
    answers.
    """
    from optkit.bundle import verify

    problems = verify(bundle)
    rebuilt = rebuild and any(problem.changes is not None for problem in problems)
    if rebuilt:
        from optkit.rebuild import rebuild as build_again

        with terminal.progress() as progress:
            build_again(bundle, progress=progress)
        problems = verify(bundle)
    told = "\n".join(f"{bundle}: {problem.what}; {problem.mend}" for problem in problems)
    document = {
        "bundle": str(bundle),
        "rebuilt": rebuilt,
        "problems": [dataclasses.asdict(problem) for problem in problems],
    }
    how = "its engine was built again here; `optkit validate` judges it" if rebuilt else ""
    if not problems:
        return Answer(document, f"{bundle}: {how or 'whole, and its engine runs here'}")
    text = f"{bundle}: {how}" if rebuilt else ""
    return Answer(document, text, told, exit_code=min(problem.exit_code for problem in problems))


@command(app, "doctor", ["doctor"])
def look_at_machine(terminal: Terminal) -> Answer:
    """Say what this machine has and what is missing.

    Exits with 4 if something is missing that optkit cannot work without.
    """
    from optkit.doctor import diagnose

    findings = diagnose()
    width = max(len(finding.subject) for finding in findings)
    lines = []
    for finding in findings:
        mark = "ok" if finding.ok else "MISSING" if finding.required else "-"
        lines.append(f"{mark:8}{finding.subject:{width}}  {finding.detail}")
        if finding.mend:
            lines.append(f"{'':8}{'':{width}}  > {finding.mend}")
    broken = any(finding.required and not finding.ok for finding in findings)
    document = {"findings": [dataclasses.asdict(finding) for finding in findings]}
    return Answer(document, "\n".join(lines), exit_code=UnavailableError.exit_code if broken else 0)


@command(app, "inspect", ["inspect model.pt2", "inspect model.onnx --json"])
def inspect_file(
    terminal: Terminal,
    file: Annotated[Path, typer.Argument(metavar="FILE", help="Checkpoint, ONNX file, engine or bundle.")],
) -> Answer:
    """Say what a file is and what is in it.

    None of the code that a file may bring is run.
    """
    from optkit.inspect_model import describe, inspect_path

    document = inspect_path(file)
    return Answer(document, describe(document))


@command(recipes, "list")
def list_recipes(terminal: Terminal) -> Answer:
    """List built-in recipes and those in ./recipes."""
    from optkit.recipe import PRESETS, Recipe

    rows: list[dict[str, str]] = []
    for source in (*PRESETS, *map(str, sorted(Path("recipes").glob("*.yaml")))):
        try:
            recipe = Recipe.load(source)
            rows.append({"recipe": source, "description": recipe.description or _passes(recipe)})
        except OptkitError as error:
            rows.append({"recipe": source, "error": "; ".join(str(error).splitlines())})
    width = max(len(row["recipe"]) for row in rows)
    lines = [f"{row['recipe']:{width}}  {row.get('description') or row.get('error', '')}".rstrip() for row in rows]
    return Answer({"recipes": rows}, "\n".join(lines))


def _passes(recipe: Recipe) -> str:
    return " > ".join(step.use for step in recipe.passes)


@command(recipes, "show", ["recipe show int8 > my-recipe.yaml"])
def show_recipe(
    terminal: Terminal, recipe: Annotated[str, typer.Argument(metavar="RECIPE", help="Built-in name or file.")]
) -> Answer:
    """Print a recipe with every default filled in."""
    from optkit.recipe import Recipe

    loaded = Recipe.load(recipe)
    return Answer(loaded.model_dump(mode="json"), loaded.to_yaml().rstrip())


@command(recipes, "check", ["recipe check recipes/*.yaml"])
def check_recipes(
    terminal: Terminal, files: Annotated[list[str], typer.Argument(metavar="RECIPE...", help="Files to check.")]
) -> Answer:
    """Check recipes without running them.

    Every key, every value, and that each pass takes what the one before it gives.
    """
    from optkit.recipe import Recipe

    good, problems = [], []
    for file in files:
        try:
            loaded = Recipe.load(file)
        except UsageError as error:
            problems.append(str(error))
        else:
            good.append(f"{file}: {_passes(loaded)}")
    document = {"recipes": good, "problems": problems}
    return Answer(document, "\n".join(good), problem="\n".join(problems), exit_code=2 if problems else 0)


@command(recipes, "schema", ["recipe schema > recipes/schema.json"])
def print_schema(terminal: Terminal) -> Answer:
    """Print the JSON schema of recipes, for editors."""
    from optkit.recipe import schema

    document = schema()
    return Answer(document, json.dumps(document, indent=1))
