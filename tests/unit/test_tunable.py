from __future__ import annotations

from typing import Annotated, Literal

import pytest
from pydantic import BaseModel

from optkit.passes.base import OnnxPass
from optkit.passes.quantize_int8 import QuantizeInt8
from optkit.passes.registry import passes
from optkit.tunable import Tunable, search_space


class Inner(BaseModel):
    method: Annotated[Literal["max", "mse"] | Literal["auto"], Tunable()] = "max"
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
        "inner.method": Tunable(("max", "mse", "auto")),
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

    class LooseInPart(BaseModel):
        share: Annotated[Literal["auto"] | float, Tunable()] = "auto"

    with pytest.raises(TypeError, match=r"LooseInPart.share is marked Tunable\(\) but its type lists no values"):
        search_space(LooseInPart)
    with pytest.raises(TypeError, match=r"Loose.share is marked Tunable\(\) but its type lists no values"):
        search_space(Loose)


@pytest.mark.parametrize("step", passes().values(), ids=passes().keys())
def test_every_pass_can_tell_its_search_space(step):
    for name, tunable in step.search_space().items():
        assert tunable.choices or tunable.low < tunable.high, name


def test_what_int8_may_vary():
    space = QuantizeInt8.search_space()
    assert space["calibrate.method"] == Tunable(("max", "percentile", "entropy", "mse", "auto"))
    assert space["round"] == Tunable(("nearest", "gptq"))
    assert set(space) >= {"calibrate.percentile", "weights", "smooth", "correct_bias"}
