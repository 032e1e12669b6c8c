"""What is compared: the models with their data, and every entrant with its options. Standard library only."""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

HERE = Path(__file__).resolve().parent
ROOT = HERE.parent.parent
OUT = ROOT / ".out/bench-int8"


@dataclass(frozen=True)
class Case:
    """A model: its kind, its recipe, how many samples calibrate and judge it, and how many of them at a time."""

    title: str
    kind: str
    recipe: str
    calibration: int
    evaluation: int
    batch: int = 16
    factory: str | None = None
    """Replaces the recipe's: a model that gives more outputs to compare."""
    checkpoint: str | None = None
    """The script here that writes ``OUT / checkpoint``, before the colon, and the file's name."""
    few: int = 64
    """Calibration samples of entrants that keep every activation of every sample in memory."""


CASES = {
    "digits": Case("digit CNN, MNIST", "convolutional", "recipes/digits-int8.yaml", 256, 4500),
    "resnet8": Case("ResNet8, Fashion-MNIST", "convolutional", "recipes/fashion-resnet8-int8.yaml", 256, 5000),
    "efficientnet": Case(
        "EfficientNet-Lite0, photographs (agreement with FP32)",
        "convolutional",
        "recipes/efficientnet-lite0-int8.yaml",
        64,
        320,
        batch=8,
        few=24,
    ),
    "minilm": Case(
        "MiniLM-L6, BBC news: logits, sentence vector",
        "transformer",
        "recipes/minilm-bbc-int8.yaml",
        64,
        300,
        batch=8,
        factory="models.py:minilm_both",
    ),
    "ocr": Case(
        "PP-OCRv4 recognizer, rendered words",
        "mixed",
        "benchmarks/int8/ocr.yaml",
        64,
        250,
        batch=8,
        few=24,
        checkpoint="ocr.py:ocr.onnx",
    ),
    "vowels": Case(
        "BiLSTM, JapaneseVowels",
        "recurrent",
        "benchmarks/int8/vowels.yaml",
        128,
        370,
        checkpoint="vowels.py:vowels.pt",
    ),
}

QUICK = {"calibration": 32, "evaluation": 64, "few": 16}


@dataclass(frozen=True)
class Entrant:
    """One way of quantizing: ``quantize_<peer>.py`` gets the options as JSON."""

    peer: str
    title: str
    options: dict[str, Any] = field(default_factory=dict)
    only: tuple[str, ...] = ("convolutional", "transformer", "mixed", "recurrent")
    """The kinds of models that it is meant for."""
    exact: bool = False
    """Meant for TensorRT, which sums exactly: judged without the saturation of processors that lack VNNI."""
    few: bool = False
    """Gets ``Case.few`` samples: it keeps every activation in memory."""

    @property
    def name(self) -> str:
        return "-".join(f"{self.peer} {self.title}".replace(",", "").replace("=", " ").split())

    def fits(self, case: Case) -> bool:
        return case.kind in self.only


U8S8 = {"activation_type": "QUInt8", "weight_type": "QInt8", "per_channel": True}
S8S8 = {"activation_type": "QInt8", "weight_type": "QInt8", "per_channel": True}
NARROW = {"reduce_range": True}
ENTROPY, PERCENTILE = {"calibrate_method": "Entropy"}, {"calibrate_method": "Percentile"}
PRODUCTS = {"op_types_to_quantize": ["Conv", "MatMul", "Gemm"]}

CONVOLUTIONAL, CONVOLUTIONS = ("convolutional",), ("convolutional", "mixed")
ATTENTION, DYNAMIC = ("transformer", "mixed"), ("transformer", "mixed", "recurrent")

ENTRANTS = (
    Entrant("optkit", "default"),
    Entrant("optkit", "without bias correction", {"correct_bias": False}, CONVOLUTIONS),
    Entrant("optkit", "with equalize", {"equalize": True}, CONVOLUTIONS),
    Entrant("optkit", "static", {"activations": "static"}, DYNAMIC),
    Entrant("optkit", "for TensorRT", {"target": "tensorrt-rtx"}, exact=True),
    Entrant("ort", "default"),
    Entrant("ort", "U8S8 min-max", U8S8),
    Entrant("ort", "U8S8 min-max, 7-bit weights", {**U8S8, **NARROW}, CONVOLUTIONAL),
    Entrant("ort", "U8S8 entropy", {**U8S8, **ENTROPY}, CONVOLUTIONAL, few=True),
    Entrant("ort", "U8S8 percentile", {**U8S8, **PERCENTILE}, CONVOLUTIONAL, few=True),
    Entrant("ort", "U8S8 percentile, 7-bit weights", {**U8S8, **PERCENTILE, **NARROW}, CONVOLUTIONAL, few=True),
    Entrant("ort", "products U8S8 min-max", {**U8S8, **PRODUCTS}, ATTENTION),
    Entrant("ort", "products U8S8 percentile", {**U8S8, **PRODUCTS, **PERCENTILE}, ATTENTION, few=True),
    Entrant(
        "ort",
        "products U8S8 percentile, 7-bit weights",
        {**U8S8, **PRODUCTS, **PERCENTILE, **NARROW},
        ATTENTION,
        few=True,
    ),
    Entrant("ort", "dynamic", {"dynamic": True, "per_channel": True}, DYNAMIC),
    Entrant("ort", "dynamic, 7-bit weights", {"dynamic": True, "per_channel": True, **NARROW}, DYNAMIC),
    Entrant("ort", "for TensorRT", {**S8S8, "extra_options": {"ActivationSymmetric": True}}, exact=True),
    Entrant("nncf", "default"),
    Entrant("nncf", "accurate bias correction", {"fast_bias_correction": False}, CONVOLUTIONS),
    Entrant(
        "nncf",
        "min-max ranges, accurate bias correction",
        {"fast_bias_correction": False, "ranges": "MINMAX"},
        CONVOLUTIONS,
    ),
    Entrant("nncf", "transformer", {"model_type": "transformer"}, ATTENTION),
    Entrant("modelopt", "max", {"calibration_method": "max"}, exact=True),
    Entrant("modelopt", "entropy", {"calibration_method": "entropy"}, CONVOLUTIONS, exact=True, few=True),
)

PEERS = tuple(dict.fromkeys(entrant.peer for entrant in ENTRANTS))
