"""ONNX Runtime: runs every ONNX model here, and is the target for CPUs."""

from __future__ import annotations

import tempfile
import time
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import asdict, replace
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import numpy as np

from optkit.context import Context
from optkit.emulation import has_halves
from optkit.errors import BuildError, PassError, UnavailableError, UsageError
from optkit.models import Engine, Feeds, OnnxModel, Signature
from optkit.targets.base import (
    ORT_CPU,
    Availability,
    Dialect,
    Environment,
    Int8Policy,
    Misfit,
    Target,
    check_feeds,
    quote,
)
from optkit.targets.cpu import recorded_cpu, this_cpu
from optkit.targets.onnxruntime_profiler import OrtProfiler

if TYPE_CHECKING:
    import onnx_ir as ir

ENGINE_FILE = "model.ort.onnx"

SHARED_BYTES = 1024
"""Weights of at least this size are handed to ONNX Runtime as they lie in memory, not copied into a protobuf."""

EXTERNAL_BYTES = 1 << 28
"""An engine with more weights than this has them in a file beside it: protobuf ends at 2 GB and loads slowly."""

_SLOWER = ("SkipLayerNormFusion",)
"""What ONNX Runtime fuses to its loss: on the CPU its SkipLayerNormalization takes three times as long as Add and
LayerNormalization (1.32; 128 and 512 tokens of 384 and 768 features, one thread with AVX2)."""

_QUANTIZES = "WeightBiasQuantization"
"""What takes a float weight between DequantizeLinear and QuantizeLinear for a forgotten one, and makes it INT8 with one
scale for all channels: a layer that was left in float for its accuracy loses the most by just that."""

_CRASHES = "MatmulTransposeFusion"
"""What fuses a Transpose into an FP16 MatMul, for which there is no kernel: a later optimizer then ends the process by
a segmentation fault (onnxruntime 1.24, 1.28, 1.30 and 1.32)."""

_MISTYPES = "QDQPropagationTransformer"
"""What moves quantizers about and, from opset 21 on, writes the type of those of INT8 on them (onnxruntime 1.32): on
x86 another optimizer then makes them UINT8 but for that, and ONNX Runtime refuses its own work
(github.com/microsoft/onnxruntime/issues/25526)."""

_ISA_KEY = "optkit.isa"
_LAYOUT_DOMAIN = "com.microsoft.nchwc"

_EXACT_SINCE = (1, 30)
"""Releases up to 1.29 can abort in the optimizer that exact INT8 needs: all that were tried did for a MatMul."""

_LEVELS = {
    "none": "ORT_DISABLE_ALL",
    "basic": "ORT_ENABLE_BASIC",
    "extended": "ORT_ENABLE_EXTENDED",
    "all": "ORT_ENABLE_ALL",
}


class OrtRunner:
    """An ONNX Runtime session."""

    def __init__(self, session: Any, signature: Signature, environment: Environment, held: object = None) -> None:
        self.signature = signature
        self.environment = environment
        self._session = session
        self._held = held  # the weights that the session borrows
        self._outputs = [output.name for output in session.get_outputs()]

    def run(self, feeds: Feeds) -> dict[str, np.ndarray[Any, Any]]:
        """Outputs by name for one batch of feeds.

        Raises:
            UsageError: a feed is missing, unknown, or not of the signature's dtype and shape.
            PassError: ONNX Runtime failed, as on an index out of range.
        """
        check_feeds(self.signature, feeds)
        try:
            outputs = self._session.run(None, dict(feeds))
        except Exception as error:
            raise PassError(f"ONNX Runtime failed to run the model: {_told(error)}") from error
        return dict(zip(self._outputs, outputs, strict=True))

    def view(self, feeds: Feeds) -> dict[str, np.ndarray[Any, Any]]:
        """As ``run``, but float outputs are views of the runtime's own memory: read them before the next call.

        Large outputs are half the cost of a calibration if they are copied, most of it page faults.
        """
        check_feeds(self.signature, feeds)
        binding = self._session.io_binding()
        for name, array in feeds.items():
            binding.bind_cpu_input(name, np.ascontiguousarray(array))
        for name in self._outputs:
            binding.bind_output(name, "cpu")
        try:
            self._session.run_with_iobinding(binding)
        except Exception as error:
            raise PassError(f"ONNX Runtime failed to run the model: {_told(error)}") from error
        values = dict(zip(self._outputs, binding.get_outputs(), strict=True))
        return {name: _viewed(value) for name, value in values.items()}

    def time(self, feeds: Feeds, rounds: int) -> np.ndarray[Any, Any]:
        """Seconds of each of ``rounds`` calls, copies of the outputs included."""
        check_feeds(self.signature, feeds)
        samples = np.empty(rounds)
        feeds = dict(feeds)
        for i in range(rounds):
            start = time.perf_counter_ns()
            self._session.run(None, feeds)
            samples[i] = (time.perf_counter_ns() - start) * 1e-9
        return samples

    def close(self) -> None:
        """Release the session, then the weights that it borrows."""
        self._session = None
        self._held = None

    def __enter__(self) -> OrtRunner:
        return self

    def __exit__(self, *exc: object) -> None:
        self.close()


def open_onnx(model: OnnxModel, threads: int = 1, optimize: bool = True) -> OrtRunner:
    """Run an ONNX model that is in memory on ONNX Runtime's CPU provider; its size has no limit.

    Args:
        model: the model; its graph outputs may be more than the signature's (probes).
        threads: intra-op threads.
        optimize: let ONNX Runtime fuse the graph; without it every Q/DQ pair runs as it is written, and so do pairs
            of FP16, which its optimizer turns into something else (EfficientNet-Lite0, onnxruntime 1.32).

    Raises:
        UnavailableError: onnxruntime is not installed.
        BuildError: ONNX Runtime does not take the model.
    """
    target = OnnxRuntimeTarget(optimization="all" if optimize and not _pairs_of_halves(model) else "none")
    options = target.session_options(threads)
    session, held = _open_model(model, options)
    return OrtRunner(session, model.signature, target.environment(threads), held)


def fuses_exactly(policy: Int8Policy | None) -> bool:
    """Whether ONNX Runtime's fused INT8 kernels are exact here on a graph that was made as the policy says.

    They are meant for UINT8 activations, and on processors where they saturate also for weights that are bounded.
    """
    return policy is not None and not policy.symmetric and (policy.sums_in_16_bits or not this_cpu().saturates_int8)


def _pairs_of_halves(model: OnnxModel) -> bool:
    import onnx_ir as ir

    return any(
        node.op_type == "DequantizeLinear" and node.outputs[0].dtype == ir.DataType.FLOAT16 for node in model.ir.graph
    )


class OnnxRuntimeTarget(Target):
    """ONNX Runtime on the CPU.

    Flushing denormals to zero is not offered: ONNX Runtime lets the first session decide for the whole process, so the
    baseline would be measured under the candidate's setting.
    """

    name: Literal["onnxruntime"] = "onnxruntime"
    optimization: Literal["none", "basic", "extended", "all"] = "all"
    """How far ONNX Runtime rewrites the graph. ``all`` also lays weights out for the processor that it builds on."""
    execution: Literal["sequential", "parallel"] = "sequential"
    """``parallel`` runs independent branches at once."""
    spinning: bool = True
    """Let idle threads wait for work in a loop: lower latency, more processor time. One thread never spins."""
    exact_int8: bool = False
    """Keep INT8 exact on x86 processors without VNNI, whose fast kernels saturate; slower there. It needs onnxruntime
    1.30 or later."""

    @property
    def dialect(self) -> Dialect:
        """UINT8 activations, convolutions quantized in and out, matrix products on their inputs only."""
        saturates = this_cpu().saturates_int8 and not self.exact_int8
        return Dialect(int8=replace(ORT_CPU, sums_in_16_bits=saturates), domains=frozenset({"com.microsoft"}))

    def can_build(self) -> Availability:
        """Whether onnxruntime is installed."""
        return self.can_run()

    def can_run(self) -> Availability:
        """Whether onnxruntime is installed, and new enough for exact INT8."""
        try:
            import onnxruntime as ort
        except ImportError as error:
            return Availability(False, f"onnxruntime cannot be imported ({error})", "pip install 'optkit[cpu]'")
        if self.exact_int8 and tuple(map(int, ort.__version__.split(".")[:2])) < _EXACT_SINCE:
            since = ".".join(map(str, _EXACT_SINCE))
            reason = f"onnxruntime {ort.__version__} can end the whole process when it is asked for exact INT8"
            return Availability(False, reason, f"pip install 'onnxruntime>={since}', or leave out exact_int8")
        return Availability(True)

    def build(self, model: OnnxModel, folder: Path, context: Context) -> Engine:
        """Let ONNX Runtime optimize the model once and save what it made of it."""
        return self.save(model, folder, EXTERNAL_BYTES)

    def save(self, model: OnnxModel, folder: Path, external_above: int) -> Engine:
        """Save the optimized model; weights of more than ``external_above`` bytes in all go into a second file."""
        cpu = this_cpu()
        external = f"{ENGINE_FILE}.data" if _weight_bytes(model) > external_above else None
        stamped = model.clone()
        stamped.ir.metadata_props[_ISA_KEY] = cpu.isa
        with tempfile.TemporaryDirectory(dir=folder) as aside:
            options = self.session_options(threads=1)
            options.optimized_model_filepath = str(Path(aside) / ENGINE_FILE)
            if external:
                options.add_session_config_entry("session.optimized_model_external_initializers_file_name", external)
            try:
                _open_model(stamped, options)
            except BuildError:
                _check_room(Path(aside), _weight_bytes(model))
                raise
            nodes, domains = _contents(Path(aside) / ENGINE_FILE)
            for name in (ENGINE_FILE, external):
                if name:
                    (Path(aside) / name).replace(folder / name)
        records = {
            "files": [external] if external else [],
            "bytes": sum((folder / name).stat().st_size for name in (ENGINE_FILE, external) if name),
            "nodes": nodes,
            "cpu": asdict(cpu),
            "portable": _LAYOUT_DOMAIN not in domains,
        }
        engine = Engine(folder / ENGINE_FILE, self.name, model.signature, records)
        self.open(engine, threads=1).close()
        return engine

    def open(self, engine: Engine, threads: int) -> OrtRunner:
        """Open a saved engine; it was optimized when it was built, so it is run as it is.

        Raises:
            UnavailableError: onnxruntime is not installed, or the engine was laid out for another kind of processor.
            UsageError: the file is not an engine of that signature.
        """
        options = self.model_copy(update={"optimization": "none"}).session_options(threads)
        session = _create(str(engine.path), options, UsageError, f"{engine.path} cannot be opened")
        _check_boundary(session, engine)
        built_for = session.get_modelmeta().custom_metadata_map.get(_ISA_KEY)
        here = this_cpu().isa
        if built_for not in (None, here) and _LAYOUT_DOMAIN in _contents(engine.path)[1]:
            raise UnavailableError(
                f"{engine.path} was laid out for processors with {built_for}, and this one has {here}: "
                "build it again on this machine with `optkit verify BUNDLE --rebuild`, or with "
                "`optimization: extended`, which runs on every processor"
            )
        return OrtRunner(session, engine.signature, self.environment(threads))

    def misfit(self, engine: Engine) -> Misfit | None:
        """Weights that were laid out for another kind of processor."""
        cpu = recorded_cpu(engine.records)
        if cpu is None or engine.records.get("portable", True) or cpu.isa == this_cpu().isa:
            return None
        return Misfit(f"its weights were laid out for processors with {cpu.isa}, and this one has {this_cpu().isa}")

    @property
    def exact_sums(self) -> Mapping[str, Any]:
        """ONNX Runtime can do without its fast kernels."""
        return {"exact_int8": True}

    def profiler(self, engine: Engine, model: OnnxModel, threads: int) -> OrtProfiler:
        """Open a saved engine for profiling: it is run as ``open`` runs it, under ONNX Runtime's profiler."""
        as_built = self.model_copy(update={"optimization": "none"})
        return OrtProfiler(engine, model, partial(as_built.session_options, threads))

    def versions(self) -> dict[str, str]:
        """The version of onnxruntime, if it is installed."""
        try:
            import onnxruntime as ort
        except ImportError:
            return {}
        return {"onnxruntime": ort.__version__}

    def environment(self, threads: int) -> Environment:
        """What a session of this target runs on."""
        settings = {"threads": threads, **self.model_dump(exclude={"name"})}
        versions = self.versions()
        return Environment(this_cpu().name, f"onnxruntime {versions.get('onnxruntime')}", settings)

    def session_options(self, threads: int) -> Any:
        """The options that every session of this target has.

        Raises:
            UnavailableError: onnxruntime is not installed.
        """
        available = self.can_run()
        if not available.ok:
            raise UnavailableError(f"{available.reason}: {available.mend}")
        import onnxruntime as ort

        options = ort.SessionOptions()
        options.log_severity_level = 4  # errors are raised; printing them as well says everything twice
        options.intra_op_num_threads = options.inter_op_num_threads = threads
        options.graph_optimization_level = getattr(ort.GraphOptimizationLevel, _LEVELS[self.optimization])
        options.execution_mode = getattr(ort.ExecutionMode, f"ORT_{self.execution.upper()}")
        entries = {
            "session.intra_op.allow_spinning": self.spinning,
            # A session that has answered must not take the processor from the one that is timed next
            "session.force_spinning_stop": True,
            "session.x64quantprecision": self.exact_int8,
        }
        for key, value in entries.items():
            options.add_session_config_entry(key, str(int(value)))
        return options


def _open_model(model: OnnxModel, options: Any) -> tuple[Any, list[Any]]:
    """A session over a model in memory, and the weights that it borrows."""
    import onnx_ir as ir
    import onnxruntime as ort

    graph_only = model.ir.clone()
    names: list[str] = []
    held: list[Any] = []
    for name, value in graph_only.graph.initializers.items():
        tensor = value.const_value
        # ONNX Runtime drops a weight that no node uses before it looks for those that it borrows
        unused = not value.uses()
        if tensor is None or unused or value.is_graph_input() or not _is_shareable(tensor):
            continue
        array = np.ascontiguousarray(tensor.numpy())
        held.append(ort.OrtValue.ortvalue_from_numpy_with_onnx_type(array, int(tensor.dtype)))
        names.append(name)
        shape = ir.Shape(array.shape)
        value.const_value = ir.ExternalTensor("memory", 0, tensor.nbytes, tensor.dtype, shape=shape, name=name)
    options.add_external_initializers(names, held)
    payload = ir.to_proto(graph_only).SerializeToString()
    disabled = [*_SLOWER]
    if _has_float_layer_in_int8(model):
        disabled.append(_QUANTIZES)
    if has_halves(model):
        disabled.append(_CRASHES)
    if _has_signed_quantizers_of_opset_21(model):
        disabled.append(_MISTYPES)
    return _create(payload, options, BuildError, "ONNX Runtime does not take the model", disabled), held


def _has_signed_quantizers_of_opset_21(model: OnnxModel) -> bool:
    import onnx_ir as ir

    quantizers = (node for node in model.ir.graph if node.op_type == "QuantizeLinear")
    zeros = (zero for node in quantizers for zero in node.inputs[2:] if zero is not None)
    return model.ir.opset_imports.get("", 0) >= 21 and any(zero.dtype == ir.DataType.INT8 for zero in zeros)


def _has_float_layer_in_int8(model: OnnxModel) -> bool:
    """Whether a float weight meets dequantized values."""
    import onnx_ir as ir

    for node in model.ir.graph:
        if node.op_type not in ("Conv", "ConvTranspose", "Gemm"):
            continue
        read, weight = node.inputs[:2]
        producer = None if read is None else read.producer()
        dequantized = producer is not None and producer.op_type == "DequantizeLinear"
        if dequantized and weight is not None and ir.convenience.get_const_tensor(weight) is not None:
            return True
    return False


def _is_shareable(tensor: ir.TensorProtocol) -> bool:
    """Whether a tensor is worth sharing, and of a type that lies in memory as NumPy holds it."""
    import onnx_ir as ir

    return tensor.dtype != ir.DataType.STRING and tensor.dtype.bitwidth >= 8 and tensor.nbytes >= SHARED_BYTES


def _create(
    source: str | bytes,
    options: Any,
    failure: type[BuildError | UsageError],
    what: str,
    disabled: Sequence[str] = (),
) -> Any:
    import onnxruntime as ort

    try:
        return ort.InferenceSession(
            source, options, providers=["CPUExecutionProvider"], disabled_optimizers=list(disabled)
        )
    except Exception as error:
        raise failure(f"{what}: {_told(error)}") from error


def _told(error: Exception) -> str:
    """The message of an ONNX Runtime error without its prefix and code."""
    return str(error).split(" : ", 3)[-1].strip()


def _check_boundary(session: Any, engine: Engine) -> None:
    found = ([i.name for i in session.get_inputs()], [o.name for o in session.get_outputs()])
    wanted = ([i.name for i in engine.signature.inputs], [o.name for o in engine.signature.outputs])
    if found != wanted:
        raise UsageError(
            f"{engine.path} takes {quote(found[0])} and gives {quote(found[1])}, "
            f"but its signature says {quote(wanted[0])} and {quote(wanted[1])}: build it again"
        )


def _viewed(value: Any) -> np.ndarray[Any, Any]:
    """A float32 tensor as it lies in ONNX Runtime's memory; of old releases (1.23), and of other types, a copy."""
    viewable = hasattr(value, "__dlpack__") and value.data_type() == "tensor(float)"
    array: np.ndarray[Any, Any] = np.from_dlpack(value) if viewable else value.numpy()
    return array


def _weight_bytes(model: OnnxModel) -> int:
    tensors = [value.const_value for value in model.ir.graph.initializers.values()]
    return sum(tensor.nbytes for tensor in tensors if tensor is not None)


def _check_room(folder: Path, size: int) -> None:
    """Raise the ``OSError`` that ONNX Runtime takes for a fault of the model when it cannot save it: a full disk."""
    with (folder / "room").open("wb") as file:
        while size > 0:
            size -= file.write(bytes(min(size, 1 << 20)))


def _contents(path: Path) -> tuple[dict[str, int], set[str]]:
    """How many nodes of each type a saved model has, most frequent first, and the domains that they are from."""
    import onnx

    nodes = onnx.load(path, load_external_data=False).graph.node
    return dict(Counter(node.op_type for node in nodes).most_common()), {node.domain for node in nodes}
