"""What an interrupted training needs to go on with the same numbers, in a file that is whole or not there."""

from __future__ import annotations

import hashlib
import json
import logging
import os
import random
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

if TYPE_CHECKING:
    import torch

log = logging.getLogger("optkit.training")


@dataclass(frozen=True)
class Store:
    """The saved state of one training.

    The file is ``<name>-<key>.pt``, and ``<name>-<key>.done.pt`` once the training is over: a pipeline that is
    interrupted later does not train again.

    Attributes:
        folder: where it lies; None keeps nothing.
        name: of the training.
        key: tells it from trainings with other settings, weights or data.
    """

    folder: Path | None
    name: str
    key: str

    def load(self) -> dict[str, Any] | None:
        """The last state, if there is one; what does not belong to this training is left alone, with a warning."""
        if self.folder is None:
            return None
        for path in (self._path(done=True), self._path(done=False)):
            if path.is_file():
                return _read(path)
        others = [path for path in self.folder.glob(f"{self.name}-*.pt") if not path.name.endswith(".done.pt")]
        if others:
            log.warning(
                "%s is the state of a %s with other settings, weights or data: it is not used, and this one starts "
                "anew; run the old recipe to go on with it",
                others[0],
                self.name,
            )
        return None

    def save(self, state: Callable[[], Mapping[str, Any]], *, done: bool = False) -> None:
        """Write the state aside, then give it its name: whenever the process dies, a whole state is there."""
        import torch

        if self.folder is None:
            return
        self.folder.mkdir(parents=True, exist_ok=True)
        path = self._path(done)
        aside = path.with_suffix(".part")
        with aside.open("wb") as file:
            torch.save(dict(state()), file)
            file.flush()
            os.fsync(file.fileno())
        aside.replace(path)
        if done:
            self._path(done=False).unlink(missing_ok=True)

    def _path(self, done: bool) -> Path:
        assert self.folder is not None  # without a folder nobody asks
        return self.folder / f"{self.name}-{self.key}{'.done' if done else ''}.pt"


def _read(path: Path) -> dict[str, Any] | None:
    import torch

    try:
        state = torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:  # whatever a damaged file makes of the unpickler
        log.warning("%s is damaged (%s): the training starts anew", path, type(error).__name__)
        return None
    return state if isinstance(state, dict) else None


def key_of(document: Mapping[str, Any], *modules: torch.nn.Module | None) -> str:
    """A short hash of settings and of every weight."""
    digest = hashlib.sha256(json.dumps(document, sort_keys=True, default=str).encode())
    for module in modules:
        digest.update(str(module).encode())
        for name, tensor in module.state_dict().items() if module is not None else ():
            digest.update(name.encode())
            digest.update(_bytes(tensor))
    return digest.hexdigest()[:16]


def _bytes(tensor: Any) -> bytes:
    import torch

    if not isinstance(tensor, torch.Tensor):
        return repr(tensor).encode()
    return tensor.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy().tobytes()


@contextmanager
def seeded(seed: int) -> Iterator[None]:
    """Seed every generator that a training may draw from; the caller's come back afterwards."""
    import torch

    before = random_state()
    torch.manual_seed(seed)
    np.random.seed(seed % 2**32)  # hooks may draw from it
    random.seed(seed)
    try:
        yield
    finally:
        set_random_state(before)


def random_state() -> dict[str, Any]:
    """The state of every generator, in types that ``torch.load(weights_only=True)`` reads."""
    import torch

    kind, keys, *rest = np.random.get_state(legacy=True)
    return {
        "torch": torch.get_rng_state(),
        "cuda": torch.cuda.get_rng_state_all() if torch.cuda.is_available() else [],
        "numpy": [kind, torch.from_numpy(np.asarray(keys).astype(np.int64)), *rest],
        "python": random.getstate(),
    }


def set_random_state(state: Mapping[str, Any]) -> None:
    """Take back what ``random_state`` gave."""
    import torch

    torch.set_rng_state(state["torch"])
    if state["cuda"]:
        torch.cuda.set_rng_state_all(state["cuda"])
    kind, keys, *rest = state["numpy"]
    np.random.set_state((kind, keys.numpy().astype(np.uint32), *rest))
    random.setstate(state["python"])
