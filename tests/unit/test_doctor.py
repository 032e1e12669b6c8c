from __future__ import annotations

import subprocess
import sys

import pytest

from optkit import doctor
from optkit.doctor import Finding, diagnose
from optkit.targets import cuda


def by_subject(findings: list[Finding]) -> dict[str, Finding]:
    found = {finding.subject: finding for finding in findings}
    assert len(found) == len(findings) or len(cuda.detect().gpus) > 1
    return found


def test_finds_what_the_tests_need():
    found = by_subject(diagnose())
    for subject in (
        "python",
        "torch",
        "onnx",
        "onnx_ir",
        "onnxscript",
        "target onnxruntime: build",
        "processor",
        "disk",
    ):
        assert found[subject].ok, found[subject]
        assert found[subject].mend == ""
    assert "CPU" in found["target onnxruntime: run"].detail
    assert found["python"].detail.startswith(sys.version.split()[0])


def test_whatever_is_missing_has_a_mend():
    for finding in diagnose():
        assert finding.detail
        assert finding.ok or finding.mend, finding


def test_survives_an_environment_with_nothing_in_it(monkeypatch, tmp_path):
    for name in ("torch", "onnx", "onnxruntime", "onnxscript"):
        monkeypatch.setitem(sys.modules, name, None)
    monkeypatch.setenv("OPTKIT_TENSORRT_PYTHON", str(tmp_path / "missing"))
    monkeypatch.setattr(doctor, "_memory", lambda: 1 / 0)
    found = by_subject(diagnose(tmp_path))
    assert found["torch"].required
    assert found["torch"].mend == "pip install torch"
    assert "cannot be imported: ModuleNotFoundError" in found["torch"].detail
    assert found["target onnxruntime: build"].mend == "pip install 'optkit[cpu]'"
    assert "target onnxruntime: run" not in found
    assert "cannot be started" in found["target tensorrt-rtx: build"].detail
    assert "OPTKIT_TENSORRT_PYTHON" in found["tensorrt"].mend
    assert found["memory"].detail == "cannot be looked at: ZeroDivisionError: division by zero"
    assert not any(found[subject].ok for subject in ("torch", "onnx", "onnxscript", "tensorrt", "memory"))


def test_survives_a_folder_that_is_gone(tmp_path):
    disk = by_subject(diagnose(tmp_path / "gone"))["disk"]
    assert not disk.ok
    assert disk.detail.startswith("there is no folder")


def test_judges_the_room(monkeypatch, tmp_path):
    monkeypatch.setattr(doctor, "ROOM", 1 << 60)
    found = by_subject(diagnose(tmp_path))
    for subject in ("memory", "disk"):
        assert not found[subject].ok
        assert found[subject].mend


def test_lists_every_gpu(monkeypatch):
    gpus = (cuda.Gpu("NVIDIA H100", "9.0", 80 * 10**9), cuda.Gpu("NVIDIA L4", "8.9", 24 * 10**9))
    monkeypatch.setattr(cuda, "detect", lambda: cuda.Cuda("13.0", gpus))
    details = [finding.detail for finding in diagnose() if finding.subject == "GPU"]
    assert details[0] == "NVIDIA H100, compute capability 9.0, 80.0 GB, CUDA up to 13.0"
    assert len(details) == 2


@pytest.mark.skipif(not doctor.MEMINFO.exists(), reason="not Linux")
def test_reads_the_memory(monkeypatch, tmp_path):
    assert " GB of " in by_subject(diagnose())["memory"].detail
    monkeypatch.setattr(doctor, "MEMINFO", tmp_path / "missing")
    assert by_subject(diagnose())["memory"].detail == "this system does not say"


def test_targets_load_nothing_heavy():
    heavy = "{'torch', 'onnx', 'onnx_ir', 'onnxruntime', 'onnxscript', 'tensorrt_rtx'}"
    code = f"import sys, optkit.targets, optkit.doctor; print(sorted({heavy} & set(sys.modules)))"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"
