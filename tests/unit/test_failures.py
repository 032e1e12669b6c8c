"""Failures of other people's code, in one line and with the line to blame."""

from __future__ import annotations

import pytest
import torch

from optkit.failures import blame, few, reason


def test_failures_in_one_line() -> None:
    assert reason(ValueError("first\nsecond")) == "ValueError: first"
    assert reason(RuntimeError("The following operation failed in TorchScript\ninner: last")) == (
        "RuntimeError: inner: last"
    )
    assert reason(KeyError()) == "KeyError"
    assert few(["a", "b", "c"]) == "a, b, c" and few(["a", "b", "c", "d", "e"]) == "a, b, c and 2 more"


def test_the_blame_is_with_the_user_and_not_with_torch() -> None:
    layer = torch.nn.Linear(2, 2)
    with pytest.raises(RuntimeError) as caught:
        layer(torch.ones(3))
    assert blame(caught.value).endswith("`layer(torch.ones(3))`")
    assert blame(ValueError("never raised")) == ""
