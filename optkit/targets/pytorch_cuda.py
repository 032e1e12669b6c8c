"""PyTorch on an NVIDIA GPU, as well as it can be asked to run: the rival that a GPU engine has to beat."""

from __future__ import annotations

import contextlib
import copy
import logging
from collections.abc import Iterator
from typing import Any, Literal, TypeAlias

import numpy as np

from optkit.errors import UnavailableError
from optkit.models import Feeds, TorchModel
from optkit.targets import cuda
from optkit.targets.base import Environment, check_feeds
from optkit.targets.pytorch import to_numpy, to_torch

Mode: TypeAlias = Literal["eager", "graph", "compile"]

MOST_LANES = 16


class TorchCudaRunner:
    """A copy of a module on the GPU. ``time`` gives the time between two CUDA events, transfers excluded.

    Args:
        model: the module; it is copied.
        half: run in FP16; inputs come in float32 and their cast is part of the run, as it is in an engine.
        channels_last: lay images out with the channels last.
        mode: ``eager``, ``graph`` for a captured CUDA graph, ``compile`` for ``torch.compile``.
        tf32: let float32 products and convolutions run in TF32.
    """

    def __init__(
        self, model: TorchModel, half: bool, channels_last: bool, mode: Mode = "eager", tf32: bool = False
    ) -> None:
        import torch

        if not torch.cuda.is_available():
            raise UnavailableError(f"torch {torch.__version__} sees no GPU: install a build for CUDA")
        self.signature = model.signature
        self._tf32, self._half, self._channels_last = tf32, half, channels_last
        module = copy.deepcopy(model.module).eval().cuda()
        module = module.half() if half else module
        module = module.to(memory_format=torch.channels_last) if channels_last else module  # type: ignore[call-overload]
        self._module: Any = _compiled(module) if mode == "compile" else module
        self._graphs = mode != "eager"
        self._lanes: list[tuple[Any, Any, Any]] = []
        self._laid_out: Any = None
        settings = {"precision": "float16" if half else "float32", "channels_last": channels_last, "mode": mode}
        device = torch.cuda.get_device_name()
        self.environment = Environment(
            device,
            f"torch {torch.__version__}",
            {**settings, "tf32": tf32, "cudnn_benchmark": True, "cuda_graph": self._graphs, "transfers": False},
        )

    def run(self, feeds: Feeds) -> dict[str, np.ndarray[Any, Any]]:
        """Outputs by name for one batch of feeds."""
        import torch

        check_feeds(self.signature, feeds)
        with torch.inference_mode(), self._settings():
            outputs = self._call(self._inputs(feeds))
        return {name: to_numpy(output.float().cpu()) for name, output in zip(self._names(), outputs, strict=True)}

    def time(self, feeds: Feeds, rounds: int) -> np.ndarray[Any, Any]:
        """Seconds of each of ``rounds`` calls, on inputs that lie on the GPU."""
        import torch

        check_feeds(self.signature, feeds)
        timed: Any = torch.cuda.Event
        events = [(timed(enable_timing=True), timed(enable_timing=True)) for _ in range(rounds)]
        with torch.inference_mode(), self._settings():
            self._lay_out(feeds)
            for i, (start, stop) in enumerate(events):
                inputs, graph, _ = self._lanes[i % len(self._lanes)]
                start.record()
                if graph is None:
                    self._call(inputs)
                else:
                    graph.replay()
                stop.record()
            torch.cuda.synchronize()
        self.environment.settings.update(rotated_buffers=len(self._lanes), clocks_mhz=cuda.clocks())
        return np.array([1e-3 * start.elapsed_time(stop) for start, stop in events])

    @contextlib.contextmanager
    def _settings(self) -> Iterator[None]:
        """PyTorch's for a while: shapes stay the same, so that a search for the fastest convolutions pays."""
        import torch

        before = torch.backends.cudnn.benchmark
        torch.backends.cuda.matmul.allow_tf32 = torch.backends.cudnn.allow_tf32 = self._tf32
        torch.backends.cudnn.benchmark = True
        try:
            yield
        finally:
            torch.backends.cudnn.benchmark = before

    def _names(self) -> list[str]:
        return [spec.name for spec in self.signature.outputs]

    def _inputs(self, feeds: Feeds) -> list[Any]:
        import torch

        tensors = [to_torch(feeds[spec.name]).cuda() for spec in self.signature.inputs]
        if not self._channels_last:
            return tensors
        return [t.contiguous(memory_format=torch.channels_last) if t.ndim == 4 else t for t in tensors]

    def _call(self, inputs: list[Any]) -> list[Any]:
        import torch
        from torch.utils import _pytree

        given = self._module(*(x.half() if self._half and x.is_floating_point() else x for x in inputs))
        return [leaf for leaf in _pytree.tree_leaves(given) if isinstance(leaf, torch.Tensor)]

    def _lay_out(self, feeds: Feeds) -> None:
        import torch

        layout = {name: (array.shape, array.tobytes()) for name, array in feeds.items()}
        if layout == self._laid_out:
            return
        size = sum(array.nbytes for array in feeds.values())
        l2 = torch.cuda.get_device_properties(0).L2_cache_size
        self._lanes = []
        for _ in range(min(2 * l2 // size + 2, MOST_LANES)):
            inputs = self._inputs(feeds)
            for _ in range(3):
                self._call(inputs)
            self._lanes.append((inputs, *self._captured(inputs)))
        self._laid_out = layout

    def _captured(self, inputs: list[Any]) -> tuple[Any, Any]:
        """A CUDA graph of the call and the outputs that it writes, where a graph is wanted."""
        import torch

        if not self._graphs:
            return None, None
        torch.cuda.synchronize()
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            outputs = self._call(inputs)
        return graph, outputs

    def close(self) -> None:
        """Release what lies on the device."""
        import torch

        self._lanes, self._module, self._laid_out = [], None, None
        torch.cuda.empty_cache()

    def __enter__(self) -> TorchCudaRunner:
        return self

    def __exit__(self, *exc: object) -> None:
        self.close()


def _compiled(module: Any) -> Any:
    """``torch.compile`` at its best, without the tables and the failed kernels that it writes to standard error."""
    import torch
    from torch._inductor import config, select_algorithm

    if hasattr(config, "max_autotune_report_choices_stats"):
        config.max_autotune_report_choices_stats = False
    select_algorithm.PRINT_AUTOTUNE = False
    logging.getLogger(select_algorithm.__name__).setLevel(logging.CRITICAL)
    return torch.compile(module, mode="max-autotune-no-cudagraphs")
