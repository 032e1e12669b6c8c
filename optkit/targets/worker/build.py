"""Builds and inspects engines with any TensorRT from 8.5 on, and with TensorRT-RTX.

What a version can do is found by looking for the attribute, never by comparing version numbers. Where networks are not
strongly typed (before 10), the request says which precisions the kernels may use and which layers must keep float32.
"""

from __future__ import annotations

import contextlib
import importlib
import json
import os
import platform
import sys
import time
from collections import Counter
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping

    Send = Callable[[Mapping[str, Any]], None]
    Request = Mapping[str, Any]


class RefusalError(Exception):
    """TensorRT did not build; ``nodes`` are those of the ONNX graph that it refused."""

    def __init__(self, text: str, nodes: list[dict[str, Any]] | None = None) -> None:
        super().__init__(text)
        self.nodes = nodes or []


def probe(request: Request, send: Send) -> dict[str, Any]:
    """Whether ``module`` can be imported: its version and features, or ``error`` says why not."""
    try:
        trt = importlib.import_module(request["module"])
        found = {"version": trt.__version__, "features": features(trt)}
    except Exception as error:  # a broken library raises anything
        found = {"error": f"{type(error).__name__}: {error}"}
    return dict(found, python=platform.python_version())


def features(trt: Any) -> dict[str, bool]:
    """What this TensorRT has, of what optkit asks for."""
    return {
        "rtx": _has(trt, "ComputeCapability") and _has(trt, "IBuilderConfig", "set_compute_capability"),
        "strong_typing": _has(trt, "NetworkDefinitionCreationFlag", "STRONGLY_TYPED"),
        "weak_typing": _has(trt, "BuilderFlag", "FP16"),
        "explicit_batch": _has(trt, "NetworkDefinitionCreationFlag", "EXPLICIT_BATCH"),
        "normalization": _has(trt, "INetworkDefinition", "add_normalization"),
        "attention": _has(trt, "IAttention", "decomposable"),
        "progress": _has(trt, "IProgressMonitor") and _has(trt, "IBuilderConfig", "progress_monitor"),
        "parser_node_names": _has(trt, "ParserError", "node_name"),
    }


def _has(owner: Any, *path: str) -> bool:
    for name in path:
        if not hasattr(owner, name):
            return False
        owner = getattr(owner, name)
    return True


def build(request: Request, send: Send) -> dict[str, Any]:
    """Build the plan of an ONNX file.

    The request has ``module`` (tensorrt or tensorrt_rtx), ``onnx`` and ``plan`` (paths), ``profiles`` (each: input to
    its min, opt and max shape), ``workspace`` (bytes or None) and ``tf32``. It may have ``compute_capabilities``,
    ``precisions`` and ``float32`` (for weakly typed networks: flags to set, and layers that keep float32), ``options``
    (``_OPTIONS`` to their values), ``vendor_tactics``, ``timing_cache`` (path) and ``inspect``.

    Raises:
        RefusalError: TensorRT refused a node, the configuration, or the network as a whole.
    """
    begun = time.perf_counter()
    trt = importlib.import_module(request["module"])
    has = features(trt)
    logger = make_logger(trt)
    try:
        builder = trt.Builder(logger)
    except TypeError as error:  # all that the binding says of a driver or a GPU that fails
        raise RefusalError("it cannot start on this machine's GPU, and its log says why") from error
    start = time.perf_counter()
    network = builder.create_network(_network_flags(trt, has))
    _parse(trt, has, network, logger, request["onnx"])
    _refuse_shape_inputs(network)
    decomposed = _decompose_attention(trt, network) if has["attention"] else 0
    parsed = time.perf_counter()
    config = _configure(trt, has, builder, request, send)
    if not has["strong_typing"]:
        _allow_precisions(trt, config, network, request.get("precisions", ()), request.get("float32", ()))
    cache = _TimingCache(trt, config, request.get("timing_cache"))
    plan = builder.build_serialized_network(network, config)
    if plan is None:
        raise RefusalError(last_error(logger))
    cache.save()
    with Path(request["plan"]).open("wb") as file:
        file.write(plan)
    built = time.perf_counter()
    inspected = {"information": _information(trt, logger, plan)} if request.get("inspect") else {}
    return {
        **inspected,
        "timing_cache": cache.told,
        "version": trt.__version__,
        "bytes": plan.nbytes,
        "seconds": {
            "start": start - begun,
            "parse": parsed - start,
            "build": built - parsed,
            "inspect": time.perf_counter() - built,
        },
        "tensors": _boundary(network),
        "network": {"layers": network.num_layers, "types": _layer_types(network), "decomposed_attention": decomposed},
    }


def inspect(request: Request, send: Send) -> dict[str, Any]:
    """The layers of a plan, as TensorRT's engine inspector tells them; this needs a driver and a GPU that fits.

    Raises:
        RefusalError: TensorRT cannot load the plan here.
    """
    trt = importlib.import_module(request["module"])
    information = _information(trt, make_logger(trt), Path(request["plan"]).read_bytes())
    return {"version": trt.__version__, "information": information}


def _information(trt: Any, logger: Any, plan: Any) -> Any:
    engine = trt.Runtime(logger).deserialize_cuda_engine(plan)
    if engine is None:
        raise RefusalError(last_error(logger))
    context = _context_at_best(trt, engine)
    for chosen in (context, None) if context is not None else (None,):
        inspector = engine.create_engine_inspector()
        if chosen is not None:
            inspector.execution_context = chosen
        with contextlib.suppress(ValueError):  # 8.5 tells nothing of a context of an engine with several profiles
            return json.loads(inspector.get_engine_information(trt.LayerInformationFormat.JSON))
    raise RefusalError(last_error(logger))


def _context_at_best(trt: Any, engine: Any) -> Any:
    """A context at the shapes that kernels were chosen for: without one, dynamic shapes hide every layer's formats."""
    context = engine.create_execution_context()
    names = [engine.get_tensor_name(i) for i in range(engine.num_io_tensors)]
    for name in names if context is not None else ():
        if engine.get_tensor_mode(name) == trt.TensorIOMode.INPUT:
            context.set_input_shape(name, engine.get_tensor_profile_shape(name, 0)[1])
    return context


def make_logger(trt: Any) -> Any:
    """A logger that writes warnings to the log and remembers errors for the reply."""

    class Logger(trt.ILogger):  # type: ignore[misc]  # TensorRT is known only at run time
        """Writes to the log, and remembers errors for the reply."""

        def __init__(self) -> None:
            trt.ILogger.__init__(self)
            self.errors: list[str] = []

        def log(self, severity: Any, text: str) -> None:
            if severity <= trt.ILogger.ERROR:
                self.errors.append(text.strip())
            if severity <= trt.ILogger.WARNING:
                print(f"[{severity.name}] {text.strip()}", file=sys.stderr, flush=True)

    return Logger()


def _network_flags(trt: Any, has: Mapping[str, bool]) -> int:
    kinds = trt.NetworkDefinitionCreationFlag
    # The one is needed before 10 only, the other is all there is from 11 on; both are accepted as long as they exist
    explicit = 1 << int(kinds.EXPLICIT_BATCH) if has["explicit_batch"] else 0
    return explicit | (1 << int(kinds.STRONGLY_TYPED) if has["strong_typing"] else 0)


def _parse(trt: Any, has: Mapping[str, bool], network: Any, logger: Any, path: str) -> None:
    parser = trt.OnnxParser(network, logger)
    if parser.parse_from_file(path):
        return
    nodes = []
    known = has["parser_node_names"]
    errors = [parser.get_error(i) for i in range(parser.num_errors)]
    for error in errors:
        if error.node() < 0:  # not about a node: no memory, or not a model
            raise RefusalError(error.desc() or last_error(logger))
        nodes.append(
            {
                "index": error.node(),
                "name": error.node_name() if known else "",
                "op": error.node_operator() if known else "",
                "reason": error.desc(),
            }
        )
    raise RefusalError(last_error(logger), nodes)


def last_error(logger: Any) -> str:
    """What TensorRT complained of last."""
    return logger.errors[-1] if logger.errors else "TensorRT failed and logged no error"


def _refuse_shape_inputs(network: Any) -> None:
    for tensor in (network.get_input(i) for i in range(network.num_inputs)):
        if tensor.is_shape_tensor:
            raise RefusalError(
                f"the values of input {tensor.name!r} decide the shape of a tensor: make that shape part of the "
                "model, or let it follow from a dynamic dimension of another input"
            )


def _decompose_attention(trt: Any, network: Any) -> int:
    """Let float32 attention, which has no kernel of its own, be built from parts; how many there were."""
    count = 0
    for layer in (network.get_layer(i) for i in range(network.num_layers)):
        if layer.type == trt.LayerType.ATTENTION_INPUT and layer.get_input(0).dtype == trt.DataType.FLOAT:
            layer.__class__ = trt.IAttentionInputLayer  # get_layer gives the base class only
            layer.attention.decomposable = True
            count += 1
    return count


def _configure(trt: Any, has: Mapping[str, bool], builder: Any, request: Request, send: Send) -> Any:
    config = builder.create_builder_config()
    config.profiling_verbosity = trt.ProfilingVerbosity.DETAILED  # the inspector tells the layers' precision only so
    if request["workspace"] is not None:
        config.set_memory_pool_limit(trt.MemoryPoolType.WORKSPACE, request["workspace"])
    if not request["tf32"]:
        config.clear_flag(trt.BuilderFlag.TF32)
    for option, value in request.get("options", {}).items():
        _set_option(trt, config, option, value)
    if not request.get("vendor_tactics", True):
        _leave_out_vendor_tactics(trt, config)
    if has["rtx"]:
        _set_capabilities(trt, config, request["compute_capabilities"])
    for shapes in request["profiles"]:
        profile = builder.create_optimization_profile()
        for name, (least, best, most) in shapes.items():
            profile.set_shape(name, least, best, most)
        if config.add_optimization_profile(profile) < 0:
            raise RefusalError(f"TensorRT refused the optimization profile {shapes}")
    if request["profiles"]:
        _set_faster_dynamic_shapes(trt, config)
    if has["progress"]:
        config.progress_monitor = _progress_monitor(trt, send)
    return config


def _set_faster_dynamic_shapes(trt: Any, config: Any) -> None:
    """Compile dynamic shapes once rather than for each shape: 8.5 wants to be asked, later versions always do."""
    feature = getattr(getattr(trt, "PreviewFeature", None), "FASTER_DYNAMIC_SHAPES_0805", None)
    if feature is not None:
        config.set_preview_feature(feature, True)


# option of the target: the attribute of the configuration, or the builder flags
_ATTRIBUTES = {"optimization_level": "builder_optimization_level", "aux_streams": "max_aux_streams"}
_FLAGS = {
    "version_compatible": ("VERSION_COMPATIBLE",),
    "refit": ("REFIT",),
    "strip": ("STRIP_PLAN",),
    "sparsity": ("SPARSE_WEIGHTS",),
}


def _set_option(trt: Any, config: Any, option: str, value: Any) -> None:
    missing = RefusalError(f"TensorRT {trt.__version__} has no `{option}`: leave it out of the target's options")
    if option in _ATTRIBUTES:
        if not hasattr(config, _ATTRIBUTES[option]):
            raise missing
        setattr(config, _ATTRIBUTES[option], value)
    elif option == "hardware_compatibility":
        levels = getattr(getattr(trt, "HardwareCompatibilityLevel", None), "__members__", {})
        if value.upper() not in levels:
            raise missing
        config.hardware_compatibility_level = levels[value.upper()]
    else:
        for name in _FLAGS[option]:
            if not _has(trt, "BuilderFlag", name):
                raise missing
            config.set_flag(getattr(trt.BuilderFlag, name))


def _leave_out_vendor_tactics(trt: Any, config: Any) -> None:
    """Build without cuBLAS and cuDNN, which TensorRT before 11 can borrow kernels from, if they are installed."""
    kinds = trt.TacticSource.__members__
    sources = config.get_tactic_sources()
    for name in ("CUBLAS", "CUBLAS_LT", "CUDNN"):
        if name in kinds:
            sources &= ~(1 << int(kinds[name]))
    config.set_tactic_sources(sources)


def _allow_precisions(trt: Any, config: Any, network: Any, precisions: Any, float32: Any) -> None:
    """Weak typing: which precisions kernels may use, and the layers (by ONNX node) that must compute in float32."""
    for name in precisions:
        config.set_flag(getattr(trt.BuilderFlag, name))
    exact = set(float32)
    held = [layer for layer in (network.get_layer(i) for i in range(network.num_layers)) if layer.name in exact]
    for layer in held:
        layer.precision = trt.DataType.FLOAT
    if held:
        # 8.5.3 refuses a network ("incorrectly marked as an int8 node") if what joins an INT8 convolution must obey
        strictness = "PREFER" if "INT8" in precisions else "OBEY"
        config.set_flag(getattr(trt.BuilderFlag, f"{strictness}_PRECISION_CONSTRAINTS"))


class _TimingCache:
    """Kernel timings kept between builds. Builds at the same time do not wait for each other: saving merges."""

    def __init__(self, trt: Any, config: Any, path: str | None) -> None:
        self._config, self._path = config, Path(path) if path else None
        self.told: dict[str, Any] = {}
        if self._path is None:
            return
        content = self._path.read_bytes() if self._path.exists() else b""
        cache = self._read(content)
        if cache is None:
            self._warn("it is damaged and will be replaced")
            cache = config.create_timing_cache(b"")
        config.set_timing_cache(cache, False)
        self.told = {"path": str(self._path), "read": len(content)}

    def save(self) -> None:
        if self._path is None:
            return
        cache = self._config.get_timing_cache()
        self._path.parent.mkdir(parents=True, exist_ok=True)
        with _locked(self._path.with_suffix(".lock")):
            there = self._read(self._path.read_bytes()) if self._path.exists() else None
            if there is not None:
                cache.combine(there, False)
            content = bytes(cache.serialize())
            if self._read(content) is None:  # with 8.5.3 what a BERT's build wrote was lost to the next one
                self._warn("TensorRT does not read back what it would write there, so it stays as it is")
                return
            aside = self._path.with_suffix(f".{os.getpid()}")
            aside.write_bytes(content)
            aside.replace(self._path)
        self.told["written"] = len(content)

    def _read(self, content: bytes) -> Any:
        """A cache with that content, or None if TensorRT does not take it."""
        with contextlib.suppress(Exception):  # whatever a damaged file provokes
            return self._config.create_timing_cache(content)
        return None

    def _warn(self, what: str) -> None:
        print(f"[WARNING] the timing cache {self._path}: {what}", file=sys.stderr, flush=True)


@contextlib.contextmanager
def _locked(path: Path) -> Any:
    """Hold an exclusive lock on a file, where the system has such locks; it is released when the process dies."""
    with path.open("w") as file:
        with contextlib.suppress(ImportError):  # Windows
            import fcntl

            fcntl.flock(file, fcntl.LOCK_EX)
        yield


def _set_capabilities(trt: Any, config: Any, wanted: list[str]) -> None:
    known = trt.ComputeCapability.__members__
    names = ["SM" + capability.replace(".", "") for capability in wanted]
    config.num_compute_capabilities = len(names)
    for position, name in enumerate(names):
        if name not in known:
            raise RefusalError(f"TensorRT-RTX {trt.__version__} does not know {name}, only {', '.join(known)}")
        config.set_compute_capability(known[name], position)


def _progress_monitor(trt: Any, send: Send) -> Any:
    class Monitor(trt.IProgressMonitor):  # type: ignore[misc]  # TensorRT is known only at run time
        """Turns nested phases into one percentage: a phase fills the current step of the phase around it."""

        def __init__(self) -> None:
            trt.IProgressMonitor.__init__(self)
            self._phases: list[list[Any]] = []  # [name, steps, steps done], outermost first
            self._percent = -1

        def phase_start(self, name: str, parent: str | None, steps: int) -> None:
            self._phases.append([name, max(steps, 1), 0])

        def step_complete(self, name: str, step: int) -> bool:
            for phase in self._phases:
                if phase[0] == name:
                    phase[2] = step + 1
            self._tell()
            return True

        def phase_finish(self, name: str) -> None:
            self._phases = [phase for phase in self._phases if phase[0] != name]

        def _tell(self) -> None:
            part = 0.0
            for _, steps, done in reversed(self._phases):
                part = min((done + part) / steps, 1.0)
            percent = int(100 * part)
            if percent > self._percent:
                self._percent = percent
                send({"kind": "progress", "percent": percent, "phase": self._phases[-1][0]})

    return Monitor()


def _boundary(network: Any) -> list[dict[str, Any]]:
    inputs = [network.get_input(i) for i in range(network.num_inputs)]
    outputs = [network.get_output(i) for i in range(network.num_outputs)]
    return [
        {"name": tensor.name, "mode": mode, "dtype": tensor.dtype.name, "shape": list(tensor.shape)}
        for mode, tensors in (("input", inputs), ("output", outputs))
        for tensor in tensors
    ]


def _layer_types(network: Any) -> dict[str, int]:
    """How many layers of the network, before it is compiled, give each data type."""
    layers = [network.get_layer(i) for i in range(network.num_layers)]
    return dict(Counter(layer.get_output(0).dtype.name for layer in layers if layer.num_outputs).most_common())
