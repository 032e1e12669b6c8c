from __future__ import annotations

from typing import Annotated, Literal

import pytest
from pydantic import BaseModel

from optkit.passes.base import OnnxPass
from optkit.tunable import Tunable, search_space


class Inner(BaseModel):
    method: Annotated[Literal["max", "mse"], Tunable()] = "max"
    samples: int = 512


class Step(OnnxPass):
    use: Literal["step"] = "step"
    inner: Inner = Inner()
    smooth: Annotated[bool, Tunable()] = True
    alpha: Annotated[float, Tunable(low=0.1, high=0.9)] = 0.5
    rate: Annotated[float, Tunable(low=1e-4, high=1e-2, log=True)] = 1e-3
    multiple: Annotated[int | None, Tunable(choices=(8, 16))] = None
    exclude: tuple[str, ...] = ()


def test_the_search_space_names_every_marked_field_and_its_range():
    assert Step.search_space() == {
        "inner.method": Tunable(("max", "mse")),
        "smooth": Tunable((False, True)),
        "alpha": Tunable(low=0.1, high=0.9),
        "rate": Tunable(low=1e-4, high=1e-2, log=True),
        "multiple": Tunable((8, 16)),
    }


def test_the_schema_carries_the_ranges():
    fields = Step.model_json_schema()["properties"]
    assert fields["alpha"]["tune"] == {"low": 0.1, "high": 0.9}
    assert fields["rate"]["tune"] == {"low": 1e-4, "high": 1e-2, "log": True}
    assert fields["smooth"]["tune"] == {}
    assert "tune" not in fields["exclude"]


def test_a_mark_without_a_range_needs_a_type_that_lists_values():
    class Loose(BaseModel):
        share: Annotated[float, Tunable()] = 0.5

    with pytest.raises(TypeError, match=r"Loose.share is marked Tunable\(\) but its type lists no values"):
        search_space(Loose)
