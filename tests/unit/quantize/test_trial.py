from __future__ import annotations

import math

import pytest

from optkit.quantize.trial import Trial, keep_better


@pytest.mark.parametrize(("error", "kept"), [(0.001, True), (0.01, False), (0.1, False), (math.inf, False)], ids=str)
def test_only_a_smaller_error_is_kept(error, kept, caplog):
    caplog.set_level("INFO", "optkit")
    candidate, least, trial = keep_better("x", ("before", 0.01), ("after", error))
    assert (candidate, least) == (("after", error) if kept else ("before", 0.01))
    assert (trial.kept, trial.sqnr_before) == (kept, 20.0)
    assert ("undone" in caplog.text) is not kept


def test_a_broken_candidate_never_wins_even_over_a_broken_one():
    assert keep_better("x", (1, math.inf), (2, math.inf))[2] == Trial("x", False, -math.inf, -math.inf)


def test_a_gain_within_the_noise_is_not_worth_its_operators():
    kept, error, trial = keep_better("smooth", ("before", 0.0400), ("after", 0.0399))
    assert (kept, error, trial.kept) == ("before", 0.0400, False)
