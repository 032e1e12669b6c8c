from __future__ import annotations

import numpy as np
import pytest

from optkit.errors import UsageError
from optkit.models import DimRange, Signature, TensorSpec

IMAGE = TensorSpec("image", "float32", ("batch", 3, 8, 8))
IDS = TensorSpec("ids", "int64", ("batch", "sequence"))


def test_parse_reads_sizes_and_names():
    assert TensorSpec.parse("image", "float32[batch,3,8,8]") == IMAGE
    assert TensorSpec.parse("x", " int64 [ ] ") == TensorSpec("x", "int64", ())
    assert TensorSpec.parse("image", str(IMAGE)) == IMAGE


@pytest.mark.parametrize("text", ["float32", "float31[2]", "float32[0,3]", "float32[-1]", "float32[a b]", "float32[2"])
def test_parse_refuses_what_is_not_a_tensor(text):
    with pytest.raises(UsageError, match="input 'x'"):
        TensorSpec.parse("x", text)


@pytest.mark.parametrize("sizes", [(0, 1, 2), (2, 1, 3), (1, 4, 3)])
def test_a_range_must_be_ordered(sizes):
    with pytest.raises(UsageError, match="min <= opt <= max"):
        DimRange(*sizes)


def test_the_batch_is_the_dynamic_dimension_in_front_of_every_input():
    assert Signature((IMAGE, IDS), ()).batch == "batch"
    assert Signature((IMAGE, TensorSpec("k", "float32", (3,))), ()).batch is None
    assert Signature((TensorSpec("x", "float32", (1, 3)),), ()).batch is None


def test_random_feeds_have_the_chosen_sizes_and_valid_values():
    signature = Signature((IMAGE, IDS), (), {"sequence": DimRange(1, 5, 9)})
    feeds = signature.random_feeds(np.random.default_rng(0), batch=2)
    assert feeds["image"].shape == (2, 3, 8, 8) and feeds["image"].dtype == np.float32
    assert feeds["ids"].shape == (2, 5) and set(np.unique(feeds["ids"])) == {0, 1}


def test_random_feeds_of_every_dtype():
    import ml_dtypes

    specs = tuple(TensorSpec(name, name, (2,)) for name in ("bfloat16", "float16", "bool", "uint8"))
    feeds = Signature(specs, ()).random_feeds(np.random.default_rng(0))
    assert [feed.dtype for feed in feeds.values()] == [ml_dtypes.bfloat16, np.float16, np.bool_, np.uint8]
