from __future__ import annotations

import pytest

from optkit.targets import cuda


def test_says_that_there_is_no_driver():
    found = cuda.detect("libcuda-of-nobody.so.1")
    assert found.gpus == ()
    assert found.reason == "no NVIDIA driver on this machine (libcuda-of-nobody.so.1 cannot be loaded)"


def test_finds_gpus_or_says_why_not():
    found = cuda.detect()
    assert bool(found.gpus) != bool(found.reason)


@pytest.mark.gpu
def test_describes_the_gpu():
    found = cuda.detect()
    if not found.gpus:
        pytest.skip(found.reason)
    gpu = found.gpus[0]
    major, _, minor = gpu.capability.partition(".")
    assert gpu.name
    assert int(major) >= 5
    assert int(minor) >= 0
    assert gpu.memory > 1 << 30
    assert float(found.cuda) >= 11
