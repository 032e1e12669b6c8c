"""Reading checkpoints: every format, what is refused, and what the signature says."""

from __future__ import annotations

import io
import json
import logging
import os
import pickle
import sys
import tempfile
import warnings
import zipfile
from collections import OrderedDict
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnx_ir as ir
import pytest
import torch
from source_nets import Mlp, Named, Pair, Scores, Tagger
from torch import nn

from optkit.documents import validate
from optkit.errors import CheckpointError, UnavailableError
from optkit.models import DimRange, OnnxModel, TensorSpec, TorchModel
from optkit.recipe import Recipe
from optkit.source import load_model

NETS = Path(__file__).with_name("source_nets.py")
IMAGE = {"image": "float32[batch,4]"}


@pytest.fixture(autouse=True)
def no_temporary_files(tmp_path_factory: pytest.TempPathFactory, monkeypatch: pytest.MonkeyPatch) -> Any:
    """Loading leaves nothing behind."""
    folder = tmp_path_factory.mktemp("temporary")
    monkeypatch.setattr(tempfile, "tempdir", str(folder))
    yield
    assert list(folder.iterdir()) == []


def recipe(factory: str | None = f"{NETS}:mlp", trust_pickle: bool = False, **more: Any) -> Recipe:
    model = {"factory": factory, "trust_pickle": trust_pickle, "arguments": more.pop("arguments", {})}
    return validate(Recipe, {"passes": ["export_onnx"], "model": model, **more}, "recipe")


def mlp() -> Mlp:
    torch.manual_seed(0)
    net = Mlp()
    net.bn.running_mean = torch.tensor([1.0, 2.0, 3.0])
    return net.eval()


def run(model: TorchModel, *arrays: torch.Tensor) -> Any:
    with torch.no_grad():
        return model.module(*arrays)


def loaded(source: Any, *args: Any) -> TorchModel:
    model = load_model(source, *args).model
    assert isinstance(model, TorchModel)
    return model


def exported(net: nn.Module, path: Path, args: tuple[Any, ...], **settings: Any) -> Path:
    torch.export.save(torch.export.export(net, args, **settings), path)
    return path


def truncated(path: Path, size: int | None = None) -> Path:
    content = path.read_bytes()
    path.write_bytes(content[: len(content) // 2 if size is None else size])
    return path


# state_dicts


def write_zip(net: nn.Module, path: Path) -> None:
    torch.save(net.state_dict(), path)


def write_legacy(net: nn.Module, path: Path) -> None:
    torch.save(net.state_dict(), path, _use_new_zipfile_serialization=False)


def write_wrapped(net: nn.Module, path: Path) -> None:
    torch.save({"epoch": 3, "state_dict": net.state_dict()}, path)


def write_parallel(net: nn.Module, path: Path) -> None:
    torch.save({"model": nn.DataParallel(net).state_dict(), "step": 1}, path)


def write_safetensors(net: nn.Module, path: Path) -> None:
    from safetensors.torch import save_file

    save_file(net.state_dict(), path)


WRITERS = [write_zip, write_legacy, write_wrapped, write_parallel, write_safetensors]


@pytest.mark.parametrize("write", WRITERS)
def test_state_dict_meets_its_factory(write: Callable[[nn.Module, Path], None], tmp_path: Path) -> None:
    net, path = mlp(), tmp_path / "misleading.onnx"
    write(net, path)
    search_path = list(sys.path)
    result = load_model(path, recipe(inputs=IMAGE))
    assert sys.path == search_path
    model = result.model
    assert isinstance(model, TorchModel)
    x = torch.randn(5, 4)
    torch.testing.assert_close(run(model, x), net(x), rtol=0, atol=0)
    assert not model.module.training and not any(p.requires_grad for p in model.module.parameters())
    assert str(model.signature.inputs[0]) == "float32[batch,4]"
    assert str(model.signature.outputs[0]) == "float32[batch,3]"
    assert result.provenance["kind"] == ("safetensors" if write is write_safetensors else "state_dict")
    assert result.provenance["factory"] == f"{NETS}:mlp" and result.provenance["trusted_pickle"] is False
    assert len(result.provenance["sha256"]) == 64 and json.dumps(result.provenance)


def test_factory_of_a_module_and_its_arguments(tmp_path: Path) -> None:
    torch.save(Mlp(6).state_dict(), tmp_path / "m.pt")
    wide = recipe("source_nets:mlp", arguments={"width": 6}, inputs={"image": "float32[batch,6]"})
    assert loaded(tmp_path / "m.pt", wide).signature.outputs[0].shape == ("batch", 3)


@pytest.mark.parametrize(
    ("factory", "arguments", "message"),
    [
        (None, {}, r"7 tensors \(fc.weight, .* and 4 more\).*--model module:function"),
        ("nets.py", {}, "write module:function or path.py:function"),
        ("no_such_module:mlp", {}, "no module 'no_such_module'; install it, or write the path"),
        ("no_such_file.py:mlp", {}, "no such file"),
        (f"{NETS}:mpl", {}, "no function 'mpl'; did you mean 'mlp'"),
        (f"{NETS}:broken", {}, r"RuntimeError: no weights for you at .*source_nets.py:\d+: `raise RuntimeError"),
        (f"{NETS}:mlp", {"wdith": 3}, r"source_nets.py:\d+\) raised TypeError.*wdith"),
        (f"{NETS}:nothing", {}, r"source_nets.py:\d+\) returned int; it must return a torch.nn.Module"),
    ],
)
def test_factory_that_does_not_work(factory: Any, arguments: Any, message: str, tmp_path: Path) -> None:
    torch.save(mlp().state_dict(), tmp_path / "m.pt")
    with pytest.raises(CheckpointError, match=message):
        load_model(tmp_path / "m.pt", recipe(factory, arguments=arguments, inputs=IMAGE))


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("import no_such_package\n", r"nets.py:1: `import no_such_package`"),
        ("def f(:\n", r"SyntaxError.*nets.py:1"),
        ("x = 1\nimport sys; sys.exit(3)\n", r"SystemExit: 3 at .*nets.py:2"),
    ],
)
def test_factory_file_that_cannot_be_imported(text: str, message: str, tmp_path: Path) -> None:
    torch.save(mlp().state_dict(), tmp_path / "m.pt")
    (tmp_path / "nets.py").write_text(text)
    with pytest.raises(CheckpointError, match=message):
        load_model(tmp_path / "m.pt", recipe(f"{tmp_path}/nets.py:f", inputs=IMAGE))


def test_factory_file_imports_its_neighbour(tmp_path: Path) -> None:
    torch.save(nn.Linear(4, 2).state_dict(), tmp_path / "m.pt")
    (tmp_path / "neighbour_of_a_factory.py").write_text("from torch import nn\n")
    (tmp_path / "nets.py").write_text(
        "def f():\n    import neighbour_of_a_factory as n\n    return n.nn.Linear(4, 2)\n"
    )
    model = loaded(tmp_path / "m.pt", recipe(f"{tmp_path}/nets.py:f", inputs={"input": "float32[batch,4]"}))
    assert model.signature.outputs[0].shape == ("batch", 2)
    assert str(tmp_path) not in sys.path


def test_state_dict_that_does_not_fit(tmp_path: Path) -> None:
    state = mlp().state_dict()
    del state["fc.bias"], state["bn.num_batches_tracked"]
    state["head.weight"] = torch.ones(1)
    torch.save(state, tmp_path / "m.pt")
    with pytest.raises(CheckpointError, match=r"1 missing: fc.bias; 1 unexpected: head.weight; check the factory"):
        load_model(tmp_path / "m.pt", recipe(inputs=IMAGE))
    torch.save(mlp().state_dict(), tmp_path / "m.pt")
    with pytest.raises(CheckpointError, match=r"1 of another shape: fc.weight is \[3, 4\], not \[3, 9\]"):
        load_model(tmp_path / "m.pt", recipe(arguments={"width": 9}, inputs=IMAGE))


def test_old_state_dict_without_the_count_of_batches(tmp_path: Path) -> None:
    state = mlp().state_dict()
    del state["bn.num_batches_tracked"]
    torch.save(OrderedDict(state), tmp_path / "m.pt")
    assert loaded(tmp_path / "m.pt", recipe(inputs=IMAGE)).signature.inputs


def test_tied_weights_that_are_saved_once(tmp_path: Path) -> None:
    (tmp_path / "nets.py").write_text(
        "from torch import nn\n"
        "def f():\n    net = nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 4))\n"
        "    net[1].weight = net[0].weight\n    return net\n"
    )
    state = nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 4)).state_dict()
    del state["1.weight"]
    torch.save(state, tmp_path / "m.pt")
    model = loaded(tmp_path / "m.pt", recipe(f"{tmp_path}/nets.py:f", inputs={"input": "float32[batch,4]"}))
    torch.testing.assert_close(model.module.state_dict()["1.weight"], state["0.weight"])


@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
def test_weights_that_are_not_finite(bad: float, tmp_path: Path) -> None:
    net = mlp()
    net.fc.bias.data[1] = bad
    torch.save(net.state_dict(), tmp_path / "m.pt")
    with pytest.raises(CheckpointError, match=r"NaN or infinity in 1 tensor\(s\): fc.bias"):
        load_model(tmp_path / "m.pt", recipe(inputs=IMAGE))


def test_infinity_in_a_buffer_is_a_mask() -> None:
    net = nn.Linear(4, 4)
    net.register_buffer("mask", torch.full((4,), float("-inf")))
    assert loaded(net, recipe(inputs={"input": "float32[batch,4]"})).signature.outputs
    net.mask[0] = float("nan")  # type: ignore[index, operator]
    with pytest.raises(CheckpointError, match="mask"):
        load_model(net, recipe(inputs={"input": "float32[batch,4]"}))


# Pickles


class Payload:
    """Unpickling this makes a folder."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self) -> Any:
        return (os.mkdir, (str(self.path),))


@pytest.mark.parametrize("zipped", [True, False])
def test_malicious_pickle_does_not_run(zipped: bool, tmp_path: Path) -> None:
    ran, path = tmp_path / "ran", tmp_path / "m.pt"
    torch.save({"w": torch.ones(1), "x": Payload(ran)}, path, _use_new_zipfile_serialization=zipped)
    with pytest.raises(CheckpointError, match=r"the pickle names posix.mkdir, .*torch.export.save.*--trust-pickle"):
        load_model(path, recipe(inputs=IMAGE))
    assert not ran.exists()
    with pytest.raises(CheckpointError):  # the payload does work: it is only held back
        load_model(path, recipe(inputs=IMAGE, trust_pickle=True))
    assert ran.exists()


def test_plain_pickle_is_refused(tmp_path: Path) -> None:
    ran, path = tmp_path / "ran", tmp_path / "m.pt"
    path.write_bytes(pickle.dumps({"x": Payload(ran)}))
    with pytest.raises(CheckpointError, match=r"m.pt"):
        load_model(path, recipe(inputs=IMAGE))
    assert not ran.exists()


@pytest.mark.parametrize("zipped", [True, False])
def test_pickled_module_only_when_trusted(zipped: bool, tmp_path: Path) -> None:
    net, path = mlp().train(), tmp_path / "m.pt"
    torch.save(net, path, _use_new_zipfile_serialization=zipped)
    with pytest.raises(CheckpointError, match=r"the pickle names source_nets.Mlp"):
        load_model(path, recipe(inputs=IMAGE))
    result = load_model(path, recipe(None, trust_pickle=True, inputs=IMAGE))
    assert result.provenance["trusted_pickle"] is True and result.provenance["kind"] == "pickle"
    x = torch.randn(2, 4)
    assert isinstance(result.model, TorchModel)
    torch.testing.assert_close(run(result.model, x), net.eval()(x))


def test_trust_is_recorded_only_where_it_was_needed(tmp_path: Path) -> None:
    torch.save(mlp().state_dict(), tmp_path / "m.pt")
    result = load_model(tmp_path / "m.pt", recipe(trust_pickle=True, inputs=IMAGE))
    assert result.provenance["trusted_pickle"] is False


# Files that are not what they should be


def test_missing_empty_and_unknown_files(tmp_path: Path) -> None:
    def refused(name: str, content: bytes | None = None) -> str:
        if content is not None:
            (tmp_path / name).write_bytes(content)
        with pytest.raises(CheckpointError) as caught:
            load_model(tmp_path / name, recipe(inputs=IMAGE))
        return str(caught.value)

    assert "no such file" in refused("missing.pt")
    assert "the file is empty" in refused("empty.pt", b"")
    assert "Git LFS" in refused("lfs.pt", b"version https://git-lfs.github.com/spec/v1\n")
    assert "b'hello wo', which is nothing known; optkit reads a torch.export .pt2" in refused("a.onnx", b"hello world")
    np.savez(tmp_path / "a.npz", x=np.ones(1))
    assert "a zip archive with x.npy in it" in refused("a.npz")
    (tmp_path / "folder").mkdir()
    assert "without config.json" in refused("folder")
    torch.save({"epoch": 1}, tmp_path / "no.pt")
    assert "a dict of epoch, but no state_dict" in refused("no.pt")
    torch.save({0: torch.ones(1)}, tmp_path / "numbers.pt")
    assert "a dict of 0, but no state_dict" in refused("numbers.pt")
    with pytest.raises(CheckpointError, match="no model: name a checkpoint"):
        load_model("", recipe())
    with pytest.raises(CheckpointError, match="dict: not a model"):
        load_model({}, recipe())  # type: ignore[arg-type]


@pytest.mark.parametrize("write", WRITERS)
def test_truncated_state_dict(write: Callable[[nn.Module, Path], None], tmp_path: Path) -> None:
    for keep in (0.1, 0.5, 0.99):
        path = tmp_path / "m.pt"
        write(mlp(), path)
        truncated(path, int(path.stat().st_size * keep))
        with pytest.raises(CheckpointError, match="truncated or damaged"):
            load_model(path, recipe(inputs=IMAGE))


# torch.export


@pytest.fixture(scope="module")
def pt2(tmp_path_factory: pytest.TempPathFactory) -> Path:
    batch = torch.export.Dim("batch", min=1, max=16)
    path = tmp_path_factory.mktemp("pt2") / "mlp.pt2"
    return exported(mlp(), path, (torch.randn(2, 4),), dynamic_shapes={"image": {0: batch}})


def test_pt2_says_its_inputs_and_ranges(pt2: Path, tmp_path: Path) -> None:
    path = tmp_path / "misleading.pt"
    path.write_bytes(pt2.read_bytes())
    result = load_model(path, recipe(None), (TensorSpec("image", "float32", ("batch", 4)),))
    model = result.model
    assert isinstance(model, TorchModel) and result.provenance["kind"] == "torch.export"
    assert str(model.signature.inputs[0]) == "float32[batch,4]"
    assert str(model.signature.outputs[0]) == "float32[batch,3]"
    assert model.signature.dims == {"batch": DimRange(1, 1, 16)}
    x = torch.randn(1, 4)
    torch.testing.assert_close(run(model, x), mlp()(x))
    assert not any(part.training for part in model.module.modules())


def test_pt2_takes_names_and_narrower_ranges_from_the_recipe(pt2: Path) -> None:
    model = loaded(pt2, recipe(None, inputs={"image": "float32[rows,4]"}, dims={"rows": [2, 4, 8]}))
    assert str(model.signature.inputs[0]) == "float32[rows,4]" and model.signature.dims == {"rows": DimRange(2, 4, 8)}
    assert str(loaded(pt2, recipe(None, dims={"batch": 1})).signature.inputs[0]) == "float32[1,4]"
    assert str(loaded(pt2, recipe(None, inputs={"image": "float32[5,4]"})).signature.outputs[0]) == "float32[5,3]"


@pytest.mark.parametrize(
    ("more", "message"),
    [
        ({"dims": {"batch": [1, 8, 64]}}, "batch may be 1 to 16 in this file, not 1 to 64"),
        ({"dims": {"bathc": [1, 8, 16]}}, "no dynamic dimension of the inputs; did you mean 'batch'"),
        ({"inputs": {"imaeg": "float32[batch,4]"}}, "has no input 'imaeg'; did you mean 'image'"),
        ({"inputs": {"image": "float16[batch,4]"}}, "cannot become float16"),
        ({"inputs": {"image": "float32[batch,width]"}}, "cannot become float32\\[batch,width\\]"),
        ({"inputs": {"image": "float32[99,4]"}}, "99 may be 1 to 16"),
    ],
)
def test_pt2_that_does_not_fit_the_recipe(more: dict[str, Any], message: str, pt2: Path) -> None:
    with pytest.raises(CheckpointError, match=message):
        load_model(pt2, recipe(None, **more))


def test_static_pt2_stays_static(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    path = exported(mlp(), tmp_path / "m.pt2", (torch.randn(2, 4),))
    with caplog.at_level(logging.WARNING, "optkit.source"):
        model = loaded(path, recipe(None), (TensorSpec("image", "float32", ("batch", 4)),))
    assert str(model.signature.inputs[0]) == "float32[2,4]" and str(model.signature.outputs[0]) == "float32[2,3]"
    assert "fixed at float32[2,4]" in caplog.text


class Encoder(nn.Module):
    def forward(self, input: torch.Tensor, *, mask: torch.Tensor) -> dict[str, Any]:
        return {"last": input * mask[:, :, None], "sums": (input.sum(1), mask + 1)}


def test_pt2_with_a_second_dimension_keywords_and_nested_outputs(tmp_path: Path) -> None:
    batch, sequence = torch.export.Dim.AUTO, torch.export.Dim("s", max=64)
    path = exported(
        Encoder(),
        tmp_path / "m.pt2",
        (torch.randn(2, 5, 3),),
        kwargs={"mask": torch.ones(2, 5, dtype=torch.int64)},
        dynamic_shapes={"input": {0: batch, 1: sequence}, "mask": {0: batch, 1: sequence}},
    )
    model = loaded(path, recipe(None, dims={"sequence": [4, 8, 32]}))
    assert [str(spec) for spec in model.signature.inputs] == ["float32[batch,sequence,3]", "int64[batch,sequence]"]
    assert {spec.name: str(spec) for spec in model.signature.outputs} == {
        "last": "float32[batch,sequence,3]",
        "sums_0": "float32[batch,3]",
        "sums_1": "int64[batch,sequence]",
    }
    assert model.signature.dims == {"sequence": DimRange(4, 8, 32), "batch": DimRange(1, 1, 32)}
    x, mask = torch.randn(3, 6, 3), torch.ones(3, 6, dtype=torch.int64)
    torch.testing.assert_close(run(model, x, mask), (x, x.sum(1), mask + 1))
    assert str(loaded(path, recipe(None)).signature.inputs[0]) == "float32[batch,dim_0,3]"
    named = loaded(path, recipe(None), (TensorSpec("mask", "int64", ("n", "tokens")),)).signature
    assert str(named.inputs[0]) == "float32[n,tokens,3]"


def test_pt2_model_exports_to_onnx_with_dynamic_shapes(pt2: Path) -> None:
    module = loaded(pt2, recipe(None)).module
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        program = torch.onnx.export(
            module,
            (torch.randn(3, 4),),
            dynamo=True,
            dynamic_shapes={"image": {0: torch.export.Dim("batch", min=1, max=16)}},
            verbose=False,
        )
    assert program is not None
    assert [str(dim) for dim in program.model.graph.inputs[0].shape or ()] == ["batch", "4"]


def test_pt2_in_training_mode(tmp_path: Path) -> None:
    path = exported(mlp().train(), tmp_path / "m.pt2", (torch.randn(2, 4),))
    with pytest.raises(CheckpointError, match="exported in training mode"):
        load_model(path, recipe(None))


def test_pt2_with_inputs_that_are_no_tensors(tmp_path: Path) -> None:
    class Nested(nn.Module):
        def forward(self, pair: list[torch.Tensor]) -> torch.Tensor:
            return pair[0] + pair[1]

    path = exported(Nested(), tmp_path / "m.pt2", ([torch.ones(2), torch.ones(2)],))
    with pytest.raises(CheckpointError, match="other than plain tensors"):
        load_model(path, recipe(None))


def test_truncated_pt2(pt2: Path, tmp_path: Path) -> None:
    path = tmp_path / "m.pt2"
    path.write_bytes(pt2.read_bytes())
    with pytest.raises(CheckpointError, match="truncated or damaged"):
        load_model(truncated(path), recipe(None))


def changed(source: Path, path: Path, member: str, change: Callable[[bytes], bytes]) -> Path:
    """A copy of a zip archive with one member changed."""
    with zipfile.ZipFile(source) as old, zipfile.ZipFile(path, "w") as new:
        for name in old.namelist():
            content = old.read(name)
            new.writestr(name, change(content) if name.endswith(member) else content)
    return path


def pickled(payload: Any) -> bytes:
    buffer = io.BytesIO()
    torch.save(payload, buffer)
    return buffer.getvalue()


@pytest.mark.parametrize(
    ("member", "change", "message"),
    [
        ("model.json", ('"guards_code": []', "\"guards_code\": [\"__import__('os').system('touch RAN')\"]"), "guards"),
        ("model.json", ('"torch.ops.aten.linear.default"', '"torch.ops.load_library"'), "it calls"),
        ("model.json", ('"torch.ops.aten.linear.default"', '"torch.hub.load"'), "it calls"),
        ("model.json", ('"name": "image"', '"name": "image\\nimport os"'), "no identifier"),
        ("model.json", ('"expr_str": "Symbol(', '"expr_str": "exec(1) + Symbol('), "no arithmetic"),
    ],
)
def test_pt2_that_would_run_code(member: str, change: tuple[str, str], message: str, pt2: Path, tmp_path: Path) -> None:
    ran = tmp_path / "ran"

    def edit(content: bytes) -> bytes:
        text = json.dumps(json.loads(content))
        assert change[0] in text
        return text.replace(change[0], change[1].replace("RAN", str(ran))).encode()

    path = changed(pt2, tmp_path / "m.pt2", member, edit)
    with pytest.raises(CheckpointError, match=f"{message}.*--trust-pickle"):
        load_model(path, recipe(None))
    assert not ran.exists()


def test_pt2_with_malicious_example_inputs(pt2: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.CRITICAL, "torch._export.serde.serialize")  # its warning has too few arguments
    ran = tmp_path / "ran"
    path = changed(pt2, tmp_path / "m.pt2", "sample_inputs/model.pt", lambda _: pickled(((Payload(ran),), {})))
    with pytest.raises(CheckpointError, match=r"sample_inputs/model.pt pickles posix.mkdir"):
        load_model(path, recipe(None))
    assert not ran.exists()
    assert load_model(path, recipe(None, trust_pickle=True)).provenance["trusted_pickle"] is True
    assert ran.exists()


def test_pt2_with_real_guards_and_derived_sizes_is_not_suspected(tmp_path: Path) -> None:
    class Views(nn.Module):
        def forward(self, x: torch.Tensor) -> tuple[torch.Tensor, ...]:
            return x.reshape(-1, 4).sum(1), x.reshape(x.shape[0] // 2, 2, -1), x[: x.shape[0] // 2]

    half = torch.export.Dim("half", min=2, max=8)
    path = exported(Views(), tmp_path / "m.pt2", (torch.ones(8, 4),), dynamic_shapes={"x": {0: 2 * half}})
    signature = loaded(path, recipe(None)).signature
    assert [spec.shape for spec in signature.outputs] == [
        ("batch",),
        ("output_1_dim_0", 2, 4),
        ("output_1_dim_0", 4),
    ]


# TorchScript


def script(net: nn.Module, path: Path) -> Path:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        torch.jit.script(net).save(str(path))
    return path


def test_torchscript(tmp_path: Path) -> None:
    net = mlp()
    path = script(net, tmp_path / "m.pt")
    result = load_model(path, recipe(None, inputs=IMAGE))
    assert isinstance(result.model, TorchModel) and result.provenance["kind"] == "torchscript"
    x = torch.randn(3, 4)
    torch.testing.assert_close(run(result.model, x), net(x))
    assert str(result.model.signature.outputs[0]) == "float32[batch,3]"
    with pytest.raises(CheckpointError, match="forward takes image, but no 'x'"):
        load_model(path, recipe(None, inputs={"x": "float32[batch,4]"}))
    with pytest.raises(CheckpointError, match="mat1 and mat2 shapes"):
        load_model(path, recipe(None, inputs={"image": "float32[batch,5]"}))
    with pytest.raises(CheckpointError, match="truncated or damaged"):
        load_model(truncated(path), recipe(None, inputs=IMAGE))


# Live modules


def test_live_module_is_never_changed() -> None:
    class Counting(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.fc = nn.Linear(4, 2)
            self.register_buffer("calls", torch.zeros(()))

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            self.calls += 1  # type: ignore[operator, misc]
            return self.fc(x)  # type: ignore[no-any-return]

    net = Counting().train()
    handle = net.register_forward_hook(lambda module, args, output: output * 2)
    before = {name: tensor.clone() for name, tensor in net.state_dict().items()}
    model = loaded(net, recipe(inputs={"x": "float32[batch,4]"}))
    assert net.training and net.fc.training and all(p.requires_grad for p in net.parameters())
    assert list(net._forward_hooks) == [handle.id]
    for name, tensor in net.state_dict().items():
        torch.testing.assert_close(tensor, before[name], rtol=0, atol=0)
    assert model.module is not net and not model.module.training
    assert {p.data_ptr() for p in net.parameters()}.isdisjoint(p.data_ptr() for p in model.module.parameters())
    assert model.module.calls.item() == 0
    x = torch.randn(2, 4)
    torch.testing.assert_close(run(model, x), 2 * net.fc(x))


def test_probing_leaves_the_random_numbers_of_torch_alone() -> None:
    torch.manual_seed(3)
    expected = torch.rand(2)
    torch.manual_seed(3)

    class Noisy(nn.Module):
        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return x + torch.rand_like(x)

    load_model(Noisy(), recipe(inputs={"x": "float32[batch,4]"}))
    torch.testing.assert_close(torch.rand(2), expected, rtol=0, atol=0)


# Signatures


def test_inputs_by_priority() -> None:
    data = (TensorSpec("image", "float32", ("n", 4)),)
    assert loaded(mlp(), recipe(), data).signature.dynamic == ("n",)
    assert loaded(mlp(), recipe(inputs=IMAGE), data).signature.dynamic == ("batch",)
    with pytest.raises(CheckpointError, match=r"Mlp.forward takes image\).*--input image=float32\[batch,3,224,224\]"):
        load_model(mlp(), recipe())


@pytest.mark.parametrize(
    ("inputs", "message"),
    [
        ({"imaeg": "float32[batch,4]"}, "forward takes image, but no 'imaeg'; did you mean 'image'"),
        ({"image": "float32[batch,5]"}, r"does not accept .*\[2, 5\].*mat1 and mat2.*source_nets.py:\d+: `return"),
        ({"image": "int64[batch,4]"}, "does not accept the inputs image=int64"),
        ({"image": "float32[batch,width]"}, "does not accept"),
    ],
)
def test_inputs_that_do_not_fit(inputs: dict[str, str], message: str) -> None:
    with pytest.raises(CheckpointError, match=message):
        load_model(mlp(), recipe(inputs=inputs))


def test_input_that_is_missing() -> None:
    class Two(nn.Module):
        def forward(self, a: torch.Tensor, b: torch.Tensor) -> torch.Tensor:
            return a + b

    with pytest.raises(CheckpointError, match="takes a, b, and nothing describes a; write --input a="):
        load_model(Two(), recipe(inputs={"b": "float32[batch,4]"}))
    model = loaded(Two(), recipe(inputs={"b": "float32[batch,4]", "a": "float32[batch,1]"}))
    assert [spec.name for spec in model.signature.inputs] == ["a", "b"]


def test_names_beside_keyword_arguments_are_checked() -> None:
    class Open(nn.Module):
        def forward(self, x: torch.Tensor, mask: torch.Tensor | None = None, **more: Any) -> torch.Tensor:
            return x if mask is None else x * mask

    with pytest.raises(CheckpointError, match=r"takes x, mask=\.\.\., but no 'maks'; did you mean 'mask'"):
        load_model(Open(), recipe(inputs={"x": "float32[batch,4]", "maks": "float32[batch,4]"}))
    swapped = {"mask": "float32[batch,1]", "x": "float32[batch,4]"}
    assert [spec.name for spec in loaded(Open(), recipe(inputs=swapped)).signature.inputs] == ["x", "mask"]


def test_inputs_of_any_name_where_forward_takes_anything() -> None:
    class Any_(nn.Module):
        def forward(self, *args: torch.Tensor) -> torch.Tensor:
            return args[0] - args[1]

    model = loaded(Any_(), recipe(inputs={"b": "float32[batch,4]", "a": "float32[batch,4]"}))
    one = torch.ones(2, 4)
    torch.testing.assert_close(run(model, 3 * one, one), 2 * one)
    assert [spec.name for spec in model.signature.inputs] == ["b", "a"]


@pytest.mark.parametrize("make", [lambda: nn.LazyLinear(2), lambda: nn.Linear(4, 2, device="meta")])
def test_weights_without_values(make: Callable[[], nn.Module]) -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        net = make()
    with pytest.raises(CheckpointError, match=r"2 tensor\(s\) have no values yet: weight, bias"):
        load_model(net, recipe(inputs={"input": "float32[batch,4]"}))


def test_dimension_that_does_not_vary() -> None:
    class Two(nn.Module):
        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return x.reshape(2, 4)

    with pytest.raises(CheckpointError, match="at another batch: forward does not accept"):
        load_model(Two(), recipe(inputs={"x": "float32[batch,4]"}))
    assert str(loaded(Two(), recipe(inputs={"x": "float32[2,4]"})).signature.outputs[0]) == "float32[2,4]"


def test_dims_from_the_recipe() -> None:
    sizes = recipe(inputs={"x": "float32[batch,height]"}, dims={"height": [4, 8, 16], "batch": 3})
    signature = loaded(nn.Flatten(0), recipe(inputs={"input": "float32[batch,4]"})).signature
    assert [str(spec) for spec in signature.outputs] == ["float32[output_dim_0]"]

    class Even(nn.Module):
        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return x.reshape(3, 4, -1)

    signature = loaded(Even(), sizes).signature
    assert str(signature.inputs[0]) == "float32[3,height]" and signature.dims == {"height": DimRange(4, 8, 16)}
    assert str(signature.outputs[0]) == "float32[3,4,output_dim_2]"


def test_nested_dict_outputs_integers_and_a_gap_between_the_inputs() -> None:
    net = Tagger()
    model = loaded(net, recipe(inputs={"ids": "int64[batch,sequence]", "scale": "float32[]"}))
    assert {spec.name: str(spec) for spec in model.signature.outputs} == {
        "hidden": "float32[batch,sequence,4]",
        "stats_0": "float32[batch,4]",
        "stats_1": "int64[]",
        "flat": "float32[flat_dim_0,4]",
    }
    ids, scale = torch.ones(2, 3, dtype=torch.int64), torch.tensor(2.0)
    by_name = model.module(scale=scale, ids=ids)
    for actual, by_keyword, name in zip(run(model, ids, scale), by_name, ("hidden", "stats", "stats", "flat")):  # noqa: B905
        torch.testing.assert_close(actual, by_keyword)
        assert name != "hidden" or torch.equal(actual, net.embed(ids) * 2)


@pytest.mark.parametrize(
    ("result", "names"), [(Pair, ["low", "high"]), (Scores, ["logits"]), (lambda *x: list(x), ["output_0"])]
)
def test_outputs_are_named_after_their_fields(result: Any, names: list[str]) -> None:
    model = loaded(Named(result), recipe(inputs={"x": "float32[batch,2]"}))
    assert [spec.name for spec in model.signature.outputs] == names
    assert {spec.shape for spec in model.signature.outputs} == {("batch", 2)}


def test_outputs_that_are_inputs_or_each_other() -> None:
    class Alias(nn.Module):
        def forward(self, x: torch.Tensor, n: torch.Tensor) -> dict[str, torch.Tensor]:
            doubled = x.to(torch.bfloat16) * 2
            return {"x": x, "a": doubled, "b": doubled, "n": n + 1}

    model = loaded(Alias(), recipe(inputs={"x": "bfloat16[batch,2]", "n": "int32[batch]"}))
    assert [f"{spec.name}={spec}" for spec in model.signature.outputs] == [
        "x_output=bfloat16[batch,2]",
        "a=bfloat16[batch,2]",
        "b=bfloat16[batch,2]",
        "n_output=int32[batch]",
    ]


def test_outputs_that_optkit_cannot_have() -> None:
    class Returns(nn.Module):
        def __init__(self, function: Callable[[torch.Tensor], Any]) -> None:
            super().__init__()
            self.function = function

        def forward(self, x: torch.Tensor) -> Any:
            return self.function(x)

    one = recipe(inputs={"x": "float32[batch,2]"})
    with pytest.raises(CheckpointError, match="returns no tensor"):
        load_model(Returns(lambda x: None), one)
    with pytest.raises(CheckpointError, match="output 'output' is complex64"):
        load_model(Returns(lambda x: x * 1j), one)
    with pytest.raises(CheckpointError, match="ranks of the outputs change"):
        load_model(Returns(lambda x: x if len(x) == 2 else x[None]), one)


# ONNX


ONNX = (
    '<ir_version: 10, opset_import: ["": 20]> g (float[N,4] x) => (float[N,M] y) <float[4,2] w = {%s}> {y=MatMul(x,w)}'
)


ONNX_TEXT_TYPE = '<ir_version: 10, opset_import: ["": 20]> g (string[N] x) => (string[N] y) {y=Identity(x)}'


def onnx_text(weights: str = "1,2,3,4,5,6,7,8") -> onnx.ModelProto:
    return onnx.parser.parse_model(ONNX % weights)


def test_onnx_file(tmp_path: Path) -> None:
    path = tmp_path / "misleading.pt"
    onnx.save(onnx_text(), path)
    result = load_model(path, recipe(None))
    assert isinstance(result.model, OnnxModel) and result.provenance["kind"] == "onnx"
    assert str(result.model.signature.inputs[0]) == "float32[N,4]"
    assert str(result.model.signature.outputs[0]) in ("float32[N,2]", "float32[N,M]")
    changed = load_model(path, recipe(None, inputs={"x": "float32[batch,4]"}, dims={"batch": [1, 2, 8]})).model
    assert isinstance(changed, OnnxModel)
    assert changed.signature.inputs[0].shape == ("batch", 4) and changed.signature.dims == {"batch": DimRange(1, 2, 8)}
    assert changed.signature.outputs[0].shape[0] == "batch"
    assert ir.to_proto(changed.ir).graph.input[0].type.tensor_type.shape.dim[0].dim_param == "batch"
    fixed = load_model(path, recipe(None, dims={"N": 3})).model
    assert fixed.signature.inputs[0].shape == (3, 4) and fixed.signature.outputs[0].shape[0] == 3


def test_onnx_without_names_for_its_dimensions(tmp_path: Path) -> None:
    onnx.save(onnx.parser.parse_model(ONNX.replace("[N", "[?") % "1,2,3,4,5,6,7,8"), tmp_path / "m")
    model = load_model(tmp_path / "m", recipe(None)).model
    assert model.signature.inputs[0].shape == ("batch", 4)
    assert str(model.ir.graph.inputs[0].shape[0]) == "batch"  # type: ignore[union-attr, index]


def test_onnx_with_external_data(tmp_path: Path) -> None:
    proto = onnx_text()
    weights = np.arange(8, dtype=np.float32).reshape(4, 2)
    proto.graph.initializer[0].CopyFrom(onnx.numpy_helper.from_array(weights, "w"))
    onnx.save(proto, tmp_path / "m.onnx", save_as_external_data=True, location="m.data", size_threshold=0)
    result = load_model(tmp_path / "m.onnx", recipe(None))
    assert list(result.provenance["external_data"]) == ["m.data"]
    assert isinstance(result.model, OnnxModel)
    tensor = result.model.ir.graph.initializers["w"].const_value
    assert isinstance(tensor, ir.ExternalTensor)
    np.testing.assert_array_equal(tensor.numpy(), weights)
    truncated(tmp_path / "m.data")
    with pytest.raises(CheckpointError, match=r"m.onnx"):
        load_model(tmp_path / "m.onnx", recipe(None))
    (tmp_path / "m.data").unlink()
    with pytest.raises(CheckpointError, match=r"m.data, which is not beside it"):
        load_model(tmp_path / "m.onnx", recipe(None))


def test_truncated_and_invalid_onnx(tmp_path: Path) -> None:
    path = tmp_path / "m.onnx"
    size = len(onnx_text().SerializeToString())
    for keep in range(2, size, 7):
        onnx.save(onnx_text(), path)
        with pytest.raises(CheckpointError, match=r"m.onnx"):
            load_model(truncated(path, keep), recipe(None))
    proto = onnx_text()
    proto.graph.node[0].op_type = "MatMull"
    onnx.save(proto, path)
    with pytest.raises(CheckpointError, match=r"not a valid ONNX model.*MatMull"):
        load_model(path, recipe(None))


def test_onnx_with_a_type_that_optkit_lacks() -> None:
    model = ir.from_proto(onnx.parser.parse_model(ONNX_TEXT_TYPE))
    with pytest.raises(CheckpointError, match="input 'x' is string"):
        load_model(model, recipe(None))


def test_onnx_with_nan(tmp_path: Path) -> None:
    proto = onnx_text()
    weights = onnx.numpy_helper.to_array(proto.graph.initializer[0]).copy()
    weights[1, 1] = np.nan
    proto.graph.initializer[0].CopyFrom(onnx.numpy_helper.from_array(weights, "w"))
    onnx.save(proto, tmp_path / "m.onnx")
    for source in (tmp_path / "m.onnx", ir.from_proto(proto)):
        with pytest.raises(CheckpointError, match=r"NaN in 1 weight\(s\): w"):
            load_model(source, recipe(None))


@pytest.mark.parametrize("dtype", ["float16", "bfloat16", "float", "double", "int8", "bool"])
def test_onnx_types(dtype: str, onnx_model: Callable[..., OnnxModel]) -> None:
    text = f"g ({dtype}[N,4] x) => ({dtype}[N,4] y) {{ y = Identity(x) }}"
    model = load_model(onnx_model(text).ir, recipe(None)).model
    assert model.signature.inputs[0].dtype == {"float": "float32", "double": "float64"}.get(dtype, dtype)


def test_onnx_in_memory_is_never_changed(onnx_model: Callable[..., OnnxModel]) -> None:
    model = onnx_model("g (float[N,4] x) => (float[N,4] y) { y = Relu(x) }")
    before = ir.to_proto(model.ir).SerializeToString()
    assert load_model(model, recipe(None)).model is model
    for source in (model, model.ir):
        renamed = load_model(source, recipe(None, inputs={"x": "float32[batch,4]"})).model
        assert renamed.signature.outputs[0].shape == ("batch", 4)
    assert ir.to_proto(model.ir).SerializeToString() == before


# Hugging Face


@pytest.fixture(scope="module")
def bert(tmp_path_factory: pytest.TempPathFactory) -> Path:
    transformers = pytest.importorskip("transformers")
    sizes = {"hidden_size": 8, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 8}
    config = transformers.BertConfig(vocab_size=20, max_position_embeddings=18, num_labels=3, **sizes)
    folder = tmp_path_factory.mktemp("bert")
    transformers.utils.logging.disable_progress_bar()
    torch.manual_seed(0)
    transformers.BertForSequenceClassification(config).save_pretrained(folder)
    return folder


def test_huggingface_folder(bert: Path, capfd: pytest.CaptureFixture[str]) -> None:
    result = load_model(bert, recipe(None))
    model = result.model
    assert isinstance(model, TorchModel) and result.provenance["kind"] == "huggingface"
    assert [f"{spec.name}={spec}" for spec in model.signature.inputs] == [
        "input_ids=int64[batch,sequence]",
        "attention_mask=int64[batch,sequence]",
    ]
    assert [f"{spec.name}={spec}" for spec in model.signature.outputs] == ["logits=float32[batch,3]"]
    assert model.signature.dims == {"sequence": DimRange(1, 16, 16)}
    assert run(model, torch.ones(2, 5, dtype=torch.int64), torch.ones(2, 5, dtype=torch.int64))[0].shape == (2, 3)
    assert capfd.readouterr().err == ""
    assert loaded(bert, recipe(None, dims={"sequence": 8})).signature.dims == {}
    with pytest.raises(CheckpointError, match="no 'atention_mask'; did you mean 'attention_mask'"):
        load_model(bert, recipe(None, inputs={"input_ids": "int64[batch,8]", "atention_mask": "int64[batch,8]"}))
    more = {"input_ids": "int64[batch,16]", "token_type_ids": "int64[batch,16]"}
    assert loaded(bert, recipe(None, inputs=more)).signature.dynamic == ("batch",)


def test_huggingface_folder_that_lacks_weights(bert: Path, tmp_path: Path) -> None:
    for name in ("config.json", "model.safetensors"):
        (tmp_path / name).write_bytes((bert / name).read_bytes())
    config = json.loads((tmp_path / "config.json").read_text())
    (tmp_path / "config.json").write_text(json.dumps({**config, "architectures": ["BertForMaskedLM"]}))
    with pytest.raises(CheckpointError, match=r"lack .*cls.predictions"):
        load_model(tmp_path, recipe(None))
    truncated(tmp_path / "model.safetensors")
    with pytest.raises(CheckpointError, match="transformers cannot load this folder"):
        load_model(tmp_path, recipe(None))


def test_huggingface_folder_without_transformers(bert: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "transformers", None)
    with pytest.raises(UnavailableError, match="pip install transformers"):
        load_model(bert, recipe(None))
