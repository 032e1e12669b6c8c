"""The outputs of a module, found by running it: which of their dimensions follow which dimension of the inputs."""

from __future__ import annotations

import contextlib
import itertools
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np

from optkit.errors import CheckpointError
from optkit.failures import blame, reason
from optkit.models import DimRange, Signature, TensorSpec
from optkit.source.forward import call, dtype_name, is_plain, tensors

if TYPE_CHECKING:
    import torch


@dataclass(frozen=True)
class _Run:
    """What one call of a module returned."""

    names: tuple[str, ...]
    dtypes: tuple[str, ...]
    shapes: tuple[tuple[int, ...], ...]
    plain: bool


def probe(
    module: torch.nn.Module, keywords: Sequence[str], signature: Signature, where: str
) -> tuple[tuple[TensorSpec, ...], bool]:
    """Run the module at two sizes of every dynamic dimension and see which dimensions of the outputs follow.

    Returns:
        The outputs, and whether the module returns a flat structure of tensors as it is.
    """
    choices = {dim: _sizes_to_try(signature.range(dim)) for dim in signature.dynamic}
    picks = range(max(map(len, choices.values()), default=1))
    bases = [{dim: sizes[min(pick, len(sizes) - 1)] for dim, sizes in choices.items()} for pick in picks]
    with _unchanged(module):
        base, first = _first_that_runs(module, keywords, signature, bases, where)
        others = {}
        for dim, sizes in choices.items():
            changed = [{**base, dim: size} for size in sizes if size != base[dim]]
            others[dim] = _first_that_runs(module, keywords, signature, changed, f"{where}: at another {dim}")
    if not first.names:
        raise CheckpointError(f"{where}: forward returns no tensor; return tensors, or a tuple or dict of them")
    runs = [first, *(run for _, run in others.values())]
    if len({(run.names, run.dtypes, tuple(map(len, run.shapes))) for run in runs}) > 1:
        raise CheckpointError(f"{where}: names, dtypes or ranks of the outputs change with the size of the inputs")
    pairs = {dim: (base[dim], changed[dim]) for dim, (changed, _) in others.items()}
    names = _unique(first.names, {spec.name for spec in signature.inputs})
    shapes = _shapes(names, runs, pairs)
    return tuple(map(TensorSpec, names, first.dtypes, shapes)), first.plain


def _sizes_to_try(bounds: DimRange) -> list[int]:
    """Small sizes first, since two are enough; 1 last, since it hides broadcasting."""
    low = max(2, bounds.min)
    sizes = (low, low + 1, bounds.opt, bounds.max, bounds.min)
    kept = dict.fromkeys(size for size in sizes if bounds.min <= size <= bounds.max)
    return sorted(kept, key=lambda size: size == 1)


@contextlib.contextmanager
def _unchanged(module: torch.nn.Module) -> Iterator[None]:
    """Undo what a forward does to buffers, and to torch's random numbers."""
    import torch

    before = {name: buffer.clone() for name, buffer in module.named_buffers()}
    with torch.no_grad(), torch.random.fork_rng(devices=[]):
        yield
        for name, buffer in module.named_buffers():
            if name in before and buffer.shape == before[name].shape:
                buffer.copy_(before[name])


def _first_that_runs(
    module: torch.nn.Module, keywords: Sequence[str], signature: Signature, sizes: list[dict[str, int]], where: str
) -> tuple[dict[str, int], _Run]:
    """Run at the first of these sizes that forward accepts."""
    failures: list[tuple[dict[str, int], Exception]] = []
    for chosen in sizes:
        feeds = signature.random_feeds(np.random.default_rng(0), **chosen)
        try:
            output = call(module, {name: _tensor(value) for name, value in feeds.items()}, keywords)
        except Exception as error:
            failures.append((chosen, error))
            continue
        named = list(tensors(output))
        dtypes = tuple(dtype_name(tensor.dtype, f"{where}: output {name!r}") for name, tensor in named)
        shapes = tuple(tuple(tensor.shape) for _, tensor in named)
        return chosen, _Run(tuple(name for name, _ in named), dtypes, shapes, is_plain(output))
    if not failures:
        raise CheckpointError(f"{where}: there is only one size to try; give it as a fixed size")
    chosen, failure = failures[0]
    tried = ", ".join(
        f"{spec.name} of {list(spec.sized(chosen))}" for spec in signature.inputs if set(spec.shape) & chosen.keys()
    )
    raise CheckpointError(
        f"{where}: forward does not accept the inputs {', '.join(f'{s.name}={s}' for s in signature.inputs)}"
        f"{f' (tried {tried})' if tried else ''}: {reason(failure)}{blame(failure)}; correct them with "
        "--input name=float32[batch,...], or their sizes with `dims` in the recipe"
    ) from failure


def _tensor(array: np.ndarray[Any, Any]) -> torch.Tensor:
    import torch

    if array.dtype.name == "bfloat16":  # torch does not know NumPy's bfloat16, but it has the same bits
        return torch.from_numpy(np.asarray(array).view(np.int16)).view(torch.bfloat16)
    return torch.from_numpy(np.asarray(array))


def _unique(names: Sequence[str], taken: Iterable[str]) -> tuple[str, ...]:
    """Names that differ from each other and from the inputs, as ONNX wants them."""
    used = set(taken)
    unique = []
    for name in names:
        tries = itertools.chain((name, f"{name}_output"), (f"{name}_output_{i}" for i in itertools.count(1)))
        unique.append(next(text for text in tries if text not in used))
        used.add(unique[-1])
    return tuple(unique)


def _shapes(
    names: Sequence[str], runs: Sequence[_Run], sizes: Mapping[str, tuple[int, int]]
) -> list[tuple[int | str, ...]]:
    """A dimension is a size if it never changed, an input's dimension if it equalled that, else a fresh name."""
    fresh: dict[tuple[int, ...], str] = {}

    def dim(output: int, axis: int) -> int | str:
        seen = tuple(run.shapes[output][axis] for run in runs)
        moved = [name for name, size in zip(sizes, seen[1:], strict=True) if size != seen[0]]
        if not moved:
            return seen[0]
        if len(moved) == 1 and (seen[0], seen[1 + list(sizes).index(moved[0])]) == sizes[moved[0]]:
            return moved[0]
        return fresh.setdefault(seen, f"{names[output]}_dim_{axis}")

    return [tuple(dim(i, axis) for axis in range(len(shape))) for i, shape in enumerate(runs[0].shapes)]
