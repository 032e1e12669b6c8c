"""The specs in calibration/ fit the schema and, where their data were fetched, the models beside them."""

from __future__ import annotations

import importlib.util
import sys
from pathlib import Path
from typing import Any

import pytest

from optkit.data import DataSpec, open_data

ROOT = Path(__file__).resolve().parents[2]
SPECS = sorted((ROOT / "calibration").glob("*.yaml"))
SHAPES = {
    "digits": ["image=float32[batch,1,28,28]"],
    "fashion-mnist": ["image=float32[batch,1,28,28]"],
    "efficientnet-photos": ["image=float32[batch,3,224,224]"],
    "efficientnet-crops": ["image=float32[batch,3,224,224]"],
    "bbc": ["input_ids=int64[batch,sequence]", "attention_mask=int64[batch,sequence]"],
    "bbc-all": ["input_ids=int64[batch,sequence]", "attention_mask=int64[batch,sequence]"],
    "movies": ["input_ids=int64[batch,sequence]", "attention_mask=int64[batch,sequence]"],
    "words": [
        f"{side}_{name}=int64[batch,16]" for side in ("left", "right") for name in ("input_ids", "attention_mask")
    ],
    "vowels": ["utterance=float32[batch,29,12]"],
}


def load(path: Path) -> Any:
    """Import a file that is in no package."""
    spec = importlib.util.spec_from_file_location(path.stem, path)
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    # Dataclasses look their module up
    sys.modules[path.stem] = module
    spec.loader.exec_module(module)
    return module


@pytest.fixture(scope="module")
def fetch() -> Any:
    return load(ROOT / "calibration/fetch.py")


@pytest.mark.parametrize("path", SPECS, ids=lambda path: path.stem)
def test_a_spec_is_complete(path: Path, fetch: Any) -> None:
    spec = DataSpec.load(path)
    assert path.stem in SHAPES
    assert f"`{path.name}`" in (ROOT / "calibration/README.md").read_text()
    assert spec.description and spec.fetch is not None
    script, *sets = spec.fetch.removeprefix("python ").split()
    assert (ROOT / script).is_file()
    assert set(sets) <= set(fetch.SETS)


@pytest.mark.parametrize("path", SPECS, ids=lambda path: path.stem)
def test_a_spec_fits_its_data(path: Path) -> None:
    spec = DataSpec.load(path)
    files = [file for split in ("calibration", "validation") for file in spec.source_of(split).files(path.parent)]  # type: ignore[arg-type]
    if not all(file.exists() for file in files):
        pytest.skip(f"needs its data: {spec.fetch}")
    data = open_data(path)
    assert [f"{tensor.name}={tensor}" for tensor in data.inputs] == SHAPES[path.stem]
    for split in ("calibration", "validation"):
        (batch,) = data.batches(split, 4, limit=4)  # type: ignore[arg-type]
        assert len(batch) == 4
        assert (batch.labels is not None) == data.metric.needs_labels or spec.label is not None


def test_specs_with_more_to_validate_share_nothing_with_calibration(fetch: Any) -> None:
    articles = DataSpec.load(ROOT / "calibration/bbc-all.yaml").splits
    assert articles.calibration.rows == (0, fetch.BBC_HEAD_ARTICLES)
    assert articles.validation.rows is not None and articles.validation.rows[0] == fetch.BBC_HEAD_ARTICLES
    assert not set(fetch.CALIBRATION_PHOTOS) & set(fetch.VALIDATION_PHOTOS)
    crops = ROOT / ".data/crops"
    if crops.is_dir():
        assert {path.name for path in crops.iterdir()} == {Path(name).stem for name in fetch.VALIDATION_PHOTOS}


@pytest.mark.parametrize(
    ("file", "factory", "parameters"),
    [
        ("digits.py", "digit_cnn", 390_410),
        ("resnet8.py", "resnet8", 308_074),
        ("efficientnet.py", "efficientnet_lite0", 4_652_008),
    ],
)
def test_a_factory_makes_the_published_model(file: str, factory: str, parameters: int) -> None:
    model = getattr(load(ROOT / "examples/models" / file), factory)()
    assert sum(parameter.numel() for parameter in model.parameters()) == parameters


def test_the_weights_in_the_repository_fit_their_factory() -> None:
    import torch

    model = load(ROOT / "examples/models/resnet8.py").resnet8()
    weights = torch.load(ROOT / "examples/models/fashion_resnet8.pt", weights_only=True)
    model.load_state_dict(weights)
    assert model.eval()(torch.zeros(2, 1, 28, 28)).shape == (2, 10)


# --- fetching ---------------------------------------------------------------------------------------------------------


def test_fetching_is_idempotent_and_leaves_nothing_else(fetch: Any, tmp_path: Path, monkeypatch: Any) -> None:
    calls = []

    def toy(to: Path, scratch: Path, options: Any) -> None:
        calls.append(to)
        (scratch / "download").write_text("left over")
        (to / "weights").write_text("w")

    monkeypatch.setitem(fetch.SETS, "toy", toy)
    options = fetch.Options(tmp_path / "data", None)
    fetch.fetch("toy", options)
    fetch.fetch("toy", options)
    assert len(calls) == 1
    assert sorted(path.relative_to(tmp_path).as_posix() for path in tmp_path.rglob("*")) == [
        "data", "data/toy", "data/toy/weights",
    ]  # fmt: skip


def test_a_set_that_fails_leaves_nothing(fetch: Any, tmp_path: Path, monkeypatch: Any, capsys: Any) -> None:
    def toy(to: Path, scratch: Path, options: Any) -> None:
        (to / "half").write_text("w")
        fetch._verified(to / "half", "0" * 64)

    monkeypatch.setitem(fetch.SETS, "toy", toy)
    monkeypatch.setattr(sys, "argv", ["fetch.py", "toy", "--to", str(tmp_path)])
    assert fetch.main() == 1
    assert "half is not the file that was pinned" in capsys.readouterr().err
    assert list(tmp_path.iterdir()) == []


def test_a_program_that_fails_is_quoted(fetch: Any) -> None:
    with pytest.raises(fetch.FetchError, match=r"cannot unpack:\n  .*the disk is full"):
        fetch._call([sys.executable, "-c", "import sys; sys.exit('the disk is full')"], "cannot unpack")
    with pytest.raises(fetch.FetchError, match="there is no no-such-program on this machine"):
        fetch._call(["no-such-program"], "cannot unpack")
