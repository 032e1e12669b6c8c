"""What baselines gave is remembered: the same, once, within its bytes."""

import numpy as np

from optkit.validation.accuracy import measure_accuracy
from optkit.validation.contest import Contest, Entrant
from optkit.validation.memory import Memory

from .conftest import Function


def remembered(memory):
    base, new = Function(np.copy), Function(np.copy)
    contest = Contest((Entrant("base", memory.of("base", base)),), Entrant("new", new), "base")
    return contest, base, new


def test_a_second_candidate_runs_no_baseline_and_measures_the_same(samples, context):
    contest, base, new = remembered(Memory())
    first = measure_accuracy(contest, samples, context, 16, None, 0.95)
    second = measure_accuracy(contest, samples, context, 16, None, 0.95)
    assert base.sizes == [*[16] * 12, 8] and new.sizes == 2 * base.sizes
    assert first == second


def test_baselines_do_not_share_a_memory(samples, context):
    memory = Memory()
    feeds = {"x": samples.x[:4]}
    assert np.array_equal(memory.of("one", Function(np.copy)).run(feeds)["y"], samples.x[:4])
    assert np.array_equal(memory.of("two", Function(np.negative)).run(feeds)["y"], -samples.x[:4])


def test_one_bit_of_the_feeds_makes_them_others(samples):
    memory, base = Memory(), Function(np.copy)
    x = samples.x[:4]
    for feeds in (x, x, np.where(x == x[1, 1], np.nextafter(x, np.float32(9)), x)):
        assert np.array_equal(memory.of("base", base).run({"x": feeds})["y"], feeds)
    assert base.sizes == [4, 4]


def test_what_does_not_fit_runs_again(samples, context):
    size = 16 * samples.x[0].nbytes
    contest, base, _ = remembered(Memory(2 * size))
    for _ in range(2):
        measure_accuracy(contest, samples, context, 16, 64, 0.95)
    assert base.sizes == [16] * 6  # four batches, then the two that found no room
