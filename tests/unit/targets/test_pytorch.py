from __future__ import annotations

import ml_dtypes
import numpy as np
import pytest
import torch

from optkit.errors import CheckpointError, UsageError
from optkit.models import Signature, TensorSpec, TorchModel
from optkit.targets.pytorch import open_torch


class TwoHeads(torch.nn.Module):
    def forward(self, x: torch.Tensor, mask: torch.Tensor) -> dict[str, torch.Tensor]:
        return {"sum": (x * mask).sum(-1), "double": 2 * x}


SIGNATURE = Signature(
    (TensorSpec("x", "float32", ("batch", 3)), TensorSpec("mask", "bool", ("batch", 3))),
    (TensorSpec("total", "float32", ("batch",)), TensorSpec("twice", "float32", ("batch", 3))),
)
MODEL = TorchModel(TwoHeads().eval(), SIGNATURE)
X = np.arange(6, dtype=np.float32).reshape(2, 3)
MASK = np.array([[True, False, True]] * 2)


def test_runs_and_names_outputs_by_the_signature():
    with open_torch(MODEL) as runner:
        outputs = runner.run({"mask": MASK, "x": X})
    assert list(outputs) == ["total", "twice"]
    np.testing.assert_array_equal(outputs["total"], [2, 8])
    np.testing.assert_array_equal(outputs["twice"], 2 * X)


def test_takes_read_only_and_reversed_arrays():
    frozen = X.copy()
    frozen.flags.writeable = False
    outputs = open_torch(MODEL).run({"x": frozen[::-1], "mask": MASK})
    np.testing.assert_array_equal(outputs["twice"], 2 * X[::-1])


def test_keeps_bfloat16():
    spec = TensorSpec("x", "bfloat16", (3,))
    model = TorchModel(torch.nn.Identity(), Signature((spec,), (TensorSpec("y", "bfloat16", (3,)),)))
    x = np.array([1, 2.5, -3], ml_dtypes.bfloat16)
    y = open_torch(model).run({"x": x})["y"]
    assert y.dtype == x.dtype
    np.testing.assert_array_equal(y, x)


def test_gives_the_threads_back():
    before = torch.get_num_threads()
    seen: list[int] = []

    class Spy(torch.nn.Module):
        def forward(self, x: torch.Tensor) -> torch.Tensor:
            seen.append(torch.get_num_threads())
            assert torch.is_inference_mode_enabled()
            return x

    spec = TensorSpec("x", "float32", (3,))
    runner = open_torch(TorchModel(Spy(), Signature((spec,), (spec,))), threads=before + 1)
    runner.run({"x": X[0]})
    assert len(runner.time({"x": X[0]}, 3)) == 3
    assert seen == [before + 1] * 4
    assert torch.get_num_threads() == before


@pytest.mark.parametrize(
    ("feeds", "message"),
    [
        ({"x": X}, "input 'mask' is missing: the model takes 'x', 'mask'"),
        ({"x": X, "mast": MASK, "mask": MASK}, "unknown input 'mast': did you mean 'mask'?"),
        ({"x": X.astype(np.float64), "mask": MASK}, r"input 'x': float32\[batch,3\] is wanted, not float64\[2,3\]"),
        ({"x": X[:, :2], "mask": MASK}, r"input 'x': float32\[batch,3\] is wanted, not float32\[2,2\]"),
        ({"x": X, "mask": MASK[:1]}, r"bool\[batch,3\] is wanted, not bool\[1,3\], and batch is 2 in 'x'"),
    ],
)
def test_refuses_feeds_that_do_not_fit(feeds, message):
    with pytest.raises(UsageError, match=message):
        open_torch(MODEL).run(feeds)


def test_refuses_a_signature_with_other_outputs():
    wrong = TorchModel(MODEL.module, Signature(SIGNATURE.inputs, SIGNATURE.outputs[:1]))
    with pytest.raises(CheckpointError, match="gives 2 tensors, but its signature names total"):
        open_torch(wrong).run({"x": X, "mask": MASK})
