"""The contract of a pass: a frozen configuration that takes one kind of model and returns the next."""

from __future__ import annotations

from pathlib import Path
from typing import Any, ClassVar, Generic, Literal, TypeAlias, TypeVar

from pydantic import BaseModel, ConfigDict

from optkit.context import Context
from optkit.models import Engine, Model, OnnxModel, TorchModel
from optkit.tunable import Tunable, search_space

Kind: TypeAlias = Literal["torch", "onnx", "engine"]

In = TypeVar("In", bound=Model)
Out = TypeVar("Out", bound=Model)


def kind_of(model: Model) -> Kind:
    """Which kind of model this is."""
    if isinstance(model, TorchModel):
        return "torch"
    return "onnx" if isinstance(model, OnnxModel) else "engine"


class Pass(BaseModel, Generic[In, Out]):
    """One step of the pipeline. Its fields are its YAML keys; ``use`` is its name.

    A pass clones, edits and returns; with nothing to do it returns the object that it was given. It keeps nothing on
    itself, and it does not time, print, catch or write files: the pipeline does.
    """

    model_config = ConfigDict(frozen=True, extra="forbid", use_attribute_docstrings=True)

    takes: ClassVar[Kind]
    gives: ClassVar[Kind]

    use: Any

    @classmethod
    def search_space(cls) -> dict[str, Tunable]:
        """What a tuner may vary: ranges by field, those of nested settings as ``calibrate.method``."""
        return search_space(cls)

    def relative_to(self, folder: Path) -> Pass[In, Out]:
        """The same pass with the paths among its fields resolved against a folder: that of the recipe file."""
        return self

    def check_machine(self) -> None:
        """Raise ``UnavailableError`` if this machine lacks what the pass needs whatever the model is."""

    def requires(self, model: In, context: Context) -> None:
        """Raise ``PreconditionError`` if the model or the context does not suit this pass."""

    def run(self, model: In, context: Context) -> Out:
        """The model after this pass."""
        raise NotImplementedError

    def ensures(self, before: In, after: Out, context: Context) -> None:
        """Raise ``PostconditionError`` if the result is not what this pass promises."""


class TorchPass(Pass[TorchModel, TorchModel]):
    """A pass from PyTorch to PyTorch: pruning, distillation."""

    takes: ClassVar[Kind] = "torch"
    gives: ClassVar[Kind] = "torch"


class OnnxPass(Pass[OnnxModel, OnnxModel]):
    """A pass from ONNX to ONNX: fusion, cast, quantization. The signature stays as it is."""

    takes: ClassVar[Kind] = "onnx"
    gives: ClassVar[Kind] = "onnx"


class BuildPass(Pass[OnnxModel, Engine]):
    """A pass that ends the pipeline with an engine."""

    takes: ClassVar[Kind] = "onnx"
    gives: ClassVar[Kind] = "engine"
