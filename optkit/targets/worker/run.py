"""Runs and times one engine: by tensor name, with CUDA graphs, on buffers that are allocated once.

A *lane* is one set of input and output buffers with the CUDA graph that works on it. Timing goes round as many lanes
as together exceed twice the second-level cache, so that no call finds its input there because the one before it left
it; it is the time between two CUDA events around one inference, transfers excluded unless they are asked for. A
*queue* is an execution context with a stream and lanes of its own; several work side by side.
"""

from __future__ import annotations

import importlib
import zlib
from pathlib import Path
from typing import TYPE_CHECKING, Any

from .build import RefusalError, last_error, make_logger
from .gpu import Cuda, CudaError

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping, Sequence

    import numpy as np

    Arrays = Mapping[str, np.ndarray[Any, Any]]
    Send = Callable[[Mapping[str, Any]], None]
    Request = Mapping[str, Any]

MOST_LANES = 64

_DTYPES = {
    "FLOAT": "float32",
    "HALF": "float16",
    "BF16": "uint16",  # NumPy has no bfloat16: its bits travel
    "INT8": "int8",
    "UINT8": "uint8",
    "INT32": "int32",
    "INT64": "int64",
    "BOOL": "bool",
}


class Runtime:
    """The operations on the engine that is open: one at a time."""

    def __init__(self) -> None:
        self._session: _Session | None = None

    def open(self, request: Request, send: Send) -> dict[str, Any]:
        """Load ``plan`` with ``module``, for as many ``contexts`` as are to work side by side.

        ``cuda_graph``: replay graphs where the engine can be captured.

        Raises:
            RefusalError: TensorRT cannot load the plan here.
        """
        self._session = None
        self._session = _Session(request["module"], request["plan"], request["cuda_graph"], request.get("contexts", 1))
        return self._session.describe()

    def run(self, request: Request, send: Send) -> dict[str, Any]:
        """The outputs of one batch of ``arrays``."""
        return {"arrays": self._opened().run(request["arrays"])}

    def share(self, request: Request, send: Send) -> dict[str, Any]:
        """Buffers on the GPU for inputs of ``shapes`` and their outputs, with handles to open them by in a process."""
        return self._opened().share(request["shapes"])

    def run_shared(self, request: Request, send: Send) -> dict[str, Any]:
        """Run on what lies in the shared buffers; the outputs are there afterwards."""
        self._opened().run_shared()
        return {}

    def time(self, request: Request, send: Send) -> dict[str, Any]:
        """Seconds of each of ``rounds`` calls; with ``transfers``, copies from and to pinned memory are in them."""
        import numpy as np

        session = self._opened()
        samples = session.time(request["arrays"], request["rounds"], request.get("transfers", False))
        return {"arrays": {"seconds": np.asarray(samples)}, "settings": session.settings}

    def profile(self, request: Request, send: Send) -> dict[str, Any]:
        """Median seconds of each layer over ``rounds`` runs, which TensorRT's profiler slows down."""
        return {"layers": self._opened().profile(request["arrays"], request["rounds"])}

    def _opened(self) -> _Session:
        if self._session is None:
            raise RefusalError("no engine is open")
        return self._session


class _Lane:
    """Buffers for every tensor, and the graph that works on them."""

    def __init__(self, buffers: dict[str, _Buffer]) -> None:
        self.buffers = buffers
        self.graph: int | None = None

    def release(self) -> None:
        for buffer in self.buffers.values():
            buffer.release()


class _Buffer:
    """Device memory that grows."""

    def __init__(self, cuda: Cuda) -> None:
        self._cuda = cuda
        self.pointer = 0
        self.capacity = -1

    def reserve(self, size: int) -> int:
        if size > self.capacity:
            self.release()
            self.pointer, self.capacity = self._cuda.allocate(size), size
        return self.pointer

    def release(self) -> None:
        if self.pointer:
            self._cuda.free(self.pointer)
        self.pointer, self.capacity = 0, -1


class _Session:
    """An open engine with as many queues as are to work side by side; the first one also runs and profiles."""

    def __init__(self, module: str, plan: str, cuda_graph: bool, contexts: int) -> None:
        self._trt = importlib.import_module(module)
        try:
            self._cuda = Cuda()
        except CudaError as error:
            raise RefusalError(str(error)) from error
        logger = make_logger(self._trt)
        self._runtime = self._trt.Runtime(logger)
        engine = self._runtime.deserialize_cuda_engine(Path(plan).read_bytes())
        if engine is None:
            raise RefusalError(last_error(logger))
        self._engine = engine
        self._tensors = _Tensors(self._trt, engine)
        self._queues = [_Queue(self._trt, self._cuda, engine, self._tensors, logger, cuda_graph, 0)]
        for number in range(1, contexts):
            self._queues.append(_Queue(self._trt, self._cuda, engine, self._tensors, logger, cuda_graph, number))
        self.settings: dict[str, Any] = {}

    def describe(self) -> dict[str, Any]:
        engine, profiles = self._engine, range(self._engine.num_optimization_profiles)
        dtypes = self._tensors.dtypes
        return {
            "version": self._trt.__version__,
            "driver_calls": self._cuda.through,
            "l2_bytes": self._cuda.l2_bytes,
            "inputs": [
                {
                    "name": name,
                    "dtype": dtypes[name],
                    "shape": list(engine.get_tensor_shape(name)),
                    "profiles": [[list(s) for s in engine.get_tensor_profile_shape(name, i)] for i in profiles],
                }
                for name in self._tensors.inputs
            ],
            "outputs": [
                {"name": name, "dtype": dtypes[name], "shape": list(engine.get_tensor_shape(name))}
                for name in self._tensors.outputs
            ],
        }

    def run(self, arrays: Arrays) -> dict[str, Any]:
        return self._queues[0].run(self._tensors.prepared(arrays))

    def share(self, shapes: Mapping[str, Sequence[int]]) -> dict[str, Any]:
        return self._queues[0].share(shapes)

    def run_shared(self) -> None:
        self._queues[0].run_shared()

    def time(self, arrays: Arrays, rounds: int, transfers: bool) -> list[float]:
        """Calls go to the queues in turn, each of which works through its own."""
        feeds = self._tensors.prepared(arrays)
        queues = self._queues[: max(rounds, 1)]
        for queue in queues:
            queue.lay_out(feeds, self._lanes_wanted(queue.lane_bytes(feeds)))
        cuda = self._cuda
        starts = [cuda.event() for _ in range(rounds)]
        stops = [cuda.event() for _ in range(rounds)]
        moves = [queue.transfers(feeds) if transfers else None for queue in queues]
        try:
            for i in range(rounds):
                which = i % len(queues)
                queues[which].call(i // len(queues), starts[i], stops[i], moves[which])
            for queue in queues:
                queue.synchronize()
            first = queues[0]
            self.settings = {
                "cuda_graph": not first.no_graph or first.no_graph,
                "transfers": transfers,
                "rotated_buffers": first.lanes * len(queues),
                "rotated_bytes": first.lanes * len(queues) * first.lane_bytes(feeds),
            }
            return [cuda.seconds(start, stop) for start, stop in zip(starts, stops)]  # noqa: B905 (3.8 has no strict)
        finally:
            for event in (*starts, *stops):
                cuda.destroy_event(event)
            for move in moves:
                if move:
                    move.release()

    def _lanes_wanted(self, lane_bytes: int) -> int:
        """As many of each queue as together exceed twice the cache."""
        wanted = 2 * self._cuda.l2_bytes // max(lane_bytes * len(self._queues), 1) + 2
        return int(min(wanted, MOST_LANES))

    def profile(self, arrays: Arrays, rounds: int) -> list[dict[str, Any]]:
        return self._queues[0].profile(self._tensors.prepared(arrays), rounds)


class _Tensors:
    """The names and types of an engine's inputs and outputs."""

    def __init__(self, trt: Any, engine: Any) -> None:
        names = [engine.get_tensor_name(i) for i in range(engine.num_io_tensors)]
        self.inputs = [name for name in names if engine.get_tensor_mode(name) == trt.TensorIOMode.INPUT]
        self.outputs = [name for name in names if name not in self.inputs]
        self.dtypes = {name: _dtype_of(engine.get_tensor_dtype(name)) for name in names}

    def prepared(self, arrays: Arrays) -> dict[str, Any]:
        """The feeds as the engine wants them: TensorRT before 10 has no INT64."""
        import numpy as np

        feeds = {}
        for name in self.inputs:
            if name not in arrays:
                raise RefusalError(f"the engine's input {name!r} is missing")
            given, wanted = arrays[name], np.dtype(self.dtypes[name])
            feeds[name] = np.ascontiguousarray(given, dtype=wanted)
            if given.dtype.kind in "iu" and wanted.itemsize < given.dtype.itemsize and (feeds[name] != given).any():
                raise RefusalError(f"input {name!r} has values that do not fit into the engine's {wanted.name}")
        return feeds

    def bytes_of(self, name: str, shape: Sequence[int]) -> int:
        import numpy as np

        count = 1
        for dim in shape:
            count *= dim
        return count * np.dtype(self.dtypes[name]).itemsize


class _Queue:
    """An execution context with the stream that it works on, and the lanes that calls go round."""

    def __init__(
        self, trt: Any, cuda: Cuda, engine: Any, tensors: _Tensors, logger: Any, cuda_graph: bool, number: int
    ) -> None:
        self._trt, self._cuda, self._engine, self._tensors = trt, cuda, engine, tensors
        self._logger, self._wants_graph, self._number = logger, cuda_graph, number
        self._context = engine.create_execution_context()
        if self._context is None:
            raise RefusalError(f"no execution context: {last_error(logger)}")
        self._profile = self._context.active_optimization_profile
        self._stream = cuda.stream()
        self._single = self._lane()
        self._shared: tuple[_Lane, Mapping[str, Sequence[int]]] | None = None
        self._lanes: list[_Lane] = []
        self._laid_out: Any = None
        self._filled: Any = None
        self._data_dependent: set[str] = set()
        self.no_graph = ""

    @property
    def lanes(self) -> int:
        return len(self._lanes)

    def synchronize(self) -> None:
        self._cuda.synchronize(self._stream)

    def run(self, feeds: Arrays) -> dict[str, Any]:
        self._set_shapes({name: array.shape for name, array in feeds.items()})
        lane = self._single
        self._upload(lane, feeds)
        allocators = self._set_addresses(lane)
        self._enqueue()
        self.synchronize()
        return {name: self._download(lane, name, allocators) for name in self._tensors.outputs}

    def share(self, shapes: Mapping[str, Sequence[int]]) -> dict[str, Any]:
        """Buffers of these shapes that another process can open; it must have closed those of the last call."""
        if self._shared is not None:
            self._shared[0].release()
        lane, shapes = self._lane(), {name: tuple(shapes[name]) for name in self._tensors.inputs}
        self._shared = lane, shapes
        self._set_shapes(shapes)
        told = {}
        for name in (*self._tensors.inputs, *self._tensors.outputs):
            shape, size = list(self._context.get_tensor_shape(name)), self._bytes(name)
            if size is None:
                raise RefusalError(f"the data decide the shape of {name!r}")
            handle = self._cuda.handle_of(lane.buffers[name].reserve(size)).hex()
            told[name] = {"dtype": self._tensors.dtypes[name], "shape": shape, "bytes": size, "handle": handle}
        return {"buffers": told}

    def run_shared(self) -> None:
        """Run on what lies in the shared buffers."""
        if self._shared is None:
            raise RefusalError("nothing is shared")
        lane, shapes = self._shared
        self._set_shapes(shapes)  # another call may have changed them
        self._set_addresses(lane)
        self._enqueue()
        self.synchronize()

    def transfers(self, feeds: Arrays) -> _Transfers:
        return _Transfers(
            self._cuda, self._stream, feeds, {name: self._bytes(name) or 0 for name in self._tensors.outputs}
        )

    def call(self, turn: int, start: int, stop: int, move: _Transfers | None) -> None:
        """Enqueue one call on the lane whose turn it is, between two events."""
        lane = self._lanes[turn % len(self._lanes)]
        if lane.graph is None:
            self._set_addresses(lane)
        self._cuda.record(start, self._stream)
        if move:
            move.inwards(lane)
        if lane.graph is None:
            self._enqueue()
        else:
            self._cuda.launch(lane.graph, self._stream)
        if move:
            move.outwards(lane)
        self._cuda.record(stop, self._stream)

    def profile(self, feeds: Arrays, rounds: int) -> list[dict[str, Any]]:
        self._set_shapes({name: array.shape for name, array in feeds.items()})
        self._upload(self._single, feeds)
        self._set_addresses(self._single)
        self._enqueue()
        self.synchronize()
        profiler = _profiler(self._trt)
        self._context.profiler = profiler
        try:
            for _ in range(rounds):
                self._enqueue()
                self.synchronize()
        finally:
            self._context.profiler = None
        median = {name: sorted(times)[len(times) // 2] for name, times in profiler.times.items()}
        return [{"name": name, "seconds": 1e-3 * milliseconds} for name, milliseconds in median.items()]

    def lane_bytes(self, feeds: Arrays) -> int:
        self._set_shapes({name: array.shape for name, array in feeds.items()})
        return sum(array.nbytes for array in feeds.values()) + sum(self._bytes(n) or 0 for n in self._tensors.outputs)

    def lay_out(self, feeds: Arrays, wanted: int) -> None:
        """Have so many lanes, each with the feeds in it and its graph captured."""
        layout = {name: array.shape for name, array in feeds.items()}
        self._set_shapes(layout)
        if layout != self._laid_out:
            self._release_lanes()
            unknown = [name for name in self._tensors.outputs if self._bytes(name) is None]
            self.no_graph = "" if self._wants_graph else "not asked for"
            if unknown:
                self.no_graph = f"the data decide the shape of {unknown[0]!r}"
            self._lanes = [self._lane() for _ in range(1 if unknown else wanted)]
            self._laid_out, self._filled = layout, None
        content = [zlib.crc32(array.tobytes()) for array in feeds.values()]
        if content != self._filled:
            for lane in self._lanes:
                self._upload(lane, feeds)
            self._filled = content
        for lane in self._lanes:
            if lane.graph is None and not self.no_graph:
                self._capture(lane)

    def _lane(self) -> _Lane:
        return _Lane({name: _Buffer(self._cuda) for name in (*self._tensors.inputs, *self._tensors.outputs)})

    def _set_shapes(self, shapes: Mapping[str, Sequence[int]]) -> None:
        wanted = self._fitting_profile(shapes)
        if wanted != self._profile:
            if not self._context.set_optimization_profile_async(wanted, self._stream):
                raise RefusalError(f"optimization profile {wanted}: {last_error(self._logger)}")
            self.synchronize()
            self._profile = wanted
        for name, shape in shapes.items():
            if not self._context.set_input_shape(name, shape):
                raise RefusalError(f"input {name!r} of shape {list(shape)}: {last_error(self._logger)}")

    def _fitting_profile(self, shapes: Mapping[str, Sequence[int]]) -> int:
        """The profile of this queue among those that take the shapes: TensorRT before 10 wants one for each context."""
        engine = self._engine
        fitting, ranges = [], []
        for i in range(engine.num_optimization_profiles):
            limits = {name: engine.get_tensor_profile_shape(name, i) for name in shapes}
            fits = [_within(shapes[name], least, most) for name, (least, _, most) in limits.items()]
            if all(fits):
                fitting.append(i)
                continue
            bad = list(limits)[fits.index(False)]
            ranges.append(f"{bad} from {list(limits[bad][0])} to {list(limits[bad][2])}")
        if fitting:
            return fitting[min(self._number, len(fitting) - 1)]
        given = ", ".join(f"{name} {list(shape)}" for name, shape in shapes.items())
        raise RefusalError(
            f"no optimization profile of the engine takes {given}; it has {'; '.join(dict.fromkeys(ranges))}"
        )

    def _upload(self, lane: _Lane, feeds: Arrays) -> None:
        for name, array in feeds.items():
            pointer = lane.buffers[name].reserve(array.nbytes)
            self._cuda.to_device(pointer, array.ctypes.data, array.nbytes, self._stream)
        self.synchronize()

    def _set_addresses(self, lane: _Lane) -> dict[str, Any]:
        """Point the context at the lane; outputs whose shape follows from the data get an allocator each."""
        allocators: dict[str, Any] = {}
        for name in self._tensors.inputs:
            self._context.set_tensor_address(name, lane.buffers[name].reserve(0))
        for name in self._tensors.outputs:
            size = self._bytes(name)
            if size is None:
                allocators[name] = _output_allocator(self._trt, lane.buffers[name])
                self._context.set_output_allocator(name, allocators[name])
            else:
                self._context.set_tensor_address(name, lane.buffers[name].reserve(size))
        return allocators

    def _bytes(self, name: str) -> int | None:
        """The size of a tensor for the input shapes that are set, or None if the data decide it."""
        shape = self._context.get_tensor_shape(name)
        if any(dim < 0 for dim in shape):
            self._data_dependent.add(name)
        if name in self._data_dependent:  # after a run TensorRT 8 tells the shape of that run
            return None
        return self._tensors.bytes_of(name, shape)

    def _enqueue(self) -> None:
        if not self._context.execute_async_v3(self._stream):
            raise RefusalError(last_error(self._logger))

    def _download(self, lane: _Lane, name: str, allocators: Mapping[str, Any]) -> Any:
        import numpy as np

        shape = allocators[name].shape if name in allocators else self._context.get_tensor_shape(name)
        array = np.empty(tuple(shape), self._tensors.dtypes[name])
        self._cuda.to_host(array.ctypes.data, lane.buffers[name].pointer, array.nbytes, self._stream)
        self.synchronize()
        return array

    def _capture(self, lane: _Lane) -> None:
        self._set_addresses(lane)
        self._enqueue()  # what is set up once must not end up in the graph
        self.synchronize()
        try:
            lane.graph = self._cuda.capture(self._stream, self._enqueue)
        except (CudaError, RefusalError) as error:
            self.no_graph = f"cannot be captured: {error}"

    def _release_lanes(self) -> None:
        for lane in self._lanes:
            if lane.graph is not None:
                self._cuda.destroy_graph(lane.graph)
            lane.release()
        self._lanes = []


class _Transfers:
    """Copies between pinned host memory and a lane, within the timed region."""

    def __init__(self, cuda: Cuda, stream: int, feeds: Arrays, outputs: Mapping[str, int]) -> None:
        self._cuda, self._stream = cuda, stream
        self._inputs = {name: array.nbytes for name, array in feeds.items()}
        self._outputs = outputs
        self._host = {name: cuda.allocate_host(size) for name, size in (*self._inputs.items(), *outputs.items())}
        for name, array in feeds.items():
            _copy_in(self._host[name], array)

    def inwards(self, lane: _Lane) -> None:
        for name, size in self._inputs.items():
            self._cuda.to_device(lane.buffers[name].pointer, self._host[name], size, self._stream)

    def outwards(self, lane: _Lane) -> None:
        for name, size in self._outputs.items():
            self._cuda.to_host(self._host[name], lane.buffers[name].pointer, size, self._stream)

    def release(self) -> None:
        for pointer in self._host.values():
            self._cuda.free_host(pointer)


def _copy_in(pointer: int, array: Any) -> None:
    import ctypes

    ctypes.memmove(pointer, array.ctypes.data, array.nbytes)


def _within(shape: Sequence[int], least: Sequence[int], most: Sequence[int]) -> bool:
    bounds = zip(least, shape, most)  # noqa: B905 (3.8 has no strict)
    return len(shape) == len(least) and all(low <= size <= high for low, size, high in bounds)


def _dtype_of(dtype: Any) -> str:
    if dtype.name not in _DTYPES:
        raise RefusalError(f"optkit does not feed tensors of TensorRT's type {dtype.name}")
    return _DTYPES[dtype.name]


def _output_allocator(trt: Any, buffer: _Buffer) -> Any:
    class Allocator(trt.IOutputAllocator):  # type: ignore[misc]  # TensorRT is known only at run time
        """Gives TensorRT memory for an output once it knows how large that is, and learns its shape."""

        def __init__(self) -> None:
            trt.IOutputAllocator.__init__(self)
            self.shape: tuple[int, ...] = ()

        def reallocate_output(self, name: str, memory: int, size: int, alignment: int) -> int:
            return buffer.reserve(size)

        def reallocate_output_async(self, name: str, memory: int, size: int, alignment: int, stream: int) -> int:
            return buffer.reserve(size)

        def notify_shape(self, name: str, shape: Any) -> None:
            self.shape = tuple(shape)

    return Allocator()


def _profiler(trt: Any) -> Any:
    class Profiler(trt.IProfiler):  # type: ignore[misc]  # TensorRT is known only at run time
        """Collects milliseconds by layer."""

        def __init__(self) -> None:
            trt.IProfiler.__init__(self)
            self.times: dict[str, list[float]] = {}

        def report_layer_time(self, layer_name: str, ms: float) -> None:
            self.times.setdefault(layer_name, []).append(ms)

    return Profiler()
