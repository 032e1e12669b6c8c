"""Builds and inspects engines with any TensorRT that has strongly typed networks, and with TensorRT-RTX.

What a version can do is found by looking for the attribute, never by comparing version numbers.
"""

from __future__ import annotations

import importlib
import json
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
    """Which of ``modules`` can be imported: version and features of each, or why not."""
    found: dict[str, Any] = {}
    for name in request["modules"]:
        try:
            trt = importlib.import_module(name)
            found[name] = {"version": trt.__version__, "features": features(trt)}
        except Exception as error:  # a broken library raises anything
            found[name] = {"error": f"{type(error).__name__}: {error}"}
    return {"python": platform.python_version(), "modules": found}


def features(trt: Any) -> dict[str, bool]:
    """What this TensorRT has, of what optkit asks for."""
    return {
        "rtx": _has(trt, "ComputeCapability") and _has(trt, "IBuilderConfig", "set_compute_capability"),
        "strong_typing": _has(trt, "NetworkDefinitionCreationFlag", "STRONGLY_TYPED"),
        "explicit_batch": _has(trt, "NetworkDefinitionCreationFlag", "EXPLICIT_BATCH"),
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
    its min, opt and max shape), ``compute_capabilities``, ``workspace`` (bytes or None) and ``tf32``.

    Raises:
        RefusalError: TensorRT refused a node, the configuration, or the network as a whole.
    """
    trt = importlib.import_module(request["module"])
    has = features(trt)
    logger = _logger(trt)
    builder = trt.Builder(logger)
    start = time.perf_counter()
    network = builder.create_network(_network_flags(trt, has))
    _parse(trt, has, network, logger, request["onnx"])
    _refuse_shape_inputs(network)
    decomposed = _decompose_attention(trt, network) if has["attention"] else 0
    parsed = time.perf_counter()
    config = _configure(trt, has, builder, request, send)
    plan = builder.build_serialized_network(network, config)
    if plan is None:
        raise RefusalError(_last_error(logger))
    with Path(request["plan"]).open("wb") as file:
        file.write(plan)
    return {
        "version": trt.__version__,
        "bytes": plan.nbytes,
        "seconds": {"parse": parsed - start, "build": time.perf_counter() - parsed},
        "tensors": _boundary(network),
        "network": {"layers": network.num_layers, "types": _layer_types(network), "decomposed_attention": decomposed},
    }


def inspect(request: Request, send: Send) -> dict[str, Any]:
    """The layers of a plan, as TensorRT's engine inspector tells them; this needs a driver and a GPU that fits.

    Raises:
        RefusalError: TensorRT cannot load the plan here.
    """
    trt = importlib.import_module(request["module"])
    logger = _logger(trt)
    engine = trt.Runtime(logger).deserialize_cuda_engine(Path(request["plan"]).read_bytes())
    if engine is None:
        raise RefusalError(_last_error(logger))
    text = engine.create_engine_inspector().get_engine_information(trt.LayerInformationFormat.JSON)
    return {"version": trt.__version__, "information": json.loads(text)}


def _logger(trt: Any) -> Any:
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
    if not has["strong_typing"]:
        raise RefusalError(f"TensorRT {trt.__version__} has no strongly typed networks")
    # The one is needed before 10 only, the other is all there is from 11 on; both are accepted as long as they exist
    explicit = 1 << int(kinds.EXPLICIT_BATCH) if has["explicit_batch"] else 0
    return explicit | 1 << int(kinds.STRONGLY_TYPED)


def _parse(trt: Any, has: Mapping[str, bool], network: Any, logger: Any, path: str) -> None:
    parser = trt.OnnxParser(network, logger)
    if parser.parse_from_file(path):
        return
    nodes = []
    known = has["parser_node_names"]
    errors = [parser.get_error(i) for i in range(parser.num_errors)]
    for error in errors:
        if error.node() < 0:  # not about a node: no memory, or not a model
            raise RefusalError(error.desc() or _last_error(logger))
        nodes.append(
            {
                "index": error.node(),
                "name": error.node_name() if known else "",
                "op": error.node_operator() if known else "",
                "reason": error.desc(),
            }
        )
    raise RefusalError(_last_error(logger), nodes)


def _last_error(logger: Any) -> str:
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
    if has["rtx"]:
        _set_capabilities(trt, config, request["compute_capabilities"])
    for shapes in request["profiles"]:
        profile = builder.create_optimization_profile()
        for name, (least, best, most) in shapes.items():
            profile.set_shape(name, least, best, most)
        if config.add_optimization_profile(profile) < 0:
            raise RefusalError(f"TensorRT refused the optimization profile {shapes}")
    if has["progress"]:
        config.progress_monitor = _progress_monitor(trt, send)
    return config


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
