from __future__ import annotations

import ast
import io
import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import onnx
import pytest

import optkit.targets.worker as worker_package
from optkit.errors import BuildError, UnavailableError
from optkit.targets import cuda
from optkit.targets.worker.build import _allow_precisions
from optkit.targets.worker.frames import HEADER, FrameError, read_frame, write_frame
from optkit.targets.worker_client import PYTHON_VARIABLE, Limits, Worker, probe

LIMITS = Limits(60)

SOURCES = sorted(Path(worker_package.__file__).parent.glob("*.py"))

linux = pytest.mark.skipif(sys.platform != "linux", reason="signals, shell scripts and /proc")


@pytest.fixture
def script(tmp_path):
    """Write an executable shell script that stands in for the worker's Python."""

    def write(text: str) -> str:
        path = tmp_path / "python"
        path.write_text(f"#!/bin/sh\n{text}\n")
        path.chmod(0o755)
        return str(path)

    return write


@pytest.fixture
def request_build(tmp_path):
    """A request to build something that takes a moment."""
    pytest.importorskip("tensorrt_rtx", reason="TensorRT-RTX is not installed")
    text = "g (float[64,64] x) => (float[64,64] y) { a = Softmax(x) t = Transpose(x) b = MatMul(a, t) y = Relu(b) }"
    path = tmp_path / "model.onnx"
    onnx.save(onnx.parser.parse_model(f'<ir_version: 10, opset_import: ["" : 20]> {text}'), path)
    plan = str(tmp_path / "engine.plan")
    base = {"do": "build", "module": "tensorrt_rtx", "onnx": str(path), "plan": plan, "profiles": []}
    return {**base, "compute_capabilities": ["8.6"], "workspace": None, "tf32": True}


def signalling(worker: Worker, number: int):
    """A progress that sends the worker a signal in the middle of its work."""

    def progress(items, description, total=None):
        for item in items:
            os.kill(worker.pid, number)
            yield item

    return progress


def save_large(path: str) -> None:
    """A model with 64 MiB of weights."""
    weights = onnx.numpy_helper.from_array(np.ones((4096, 4096), np.float32), "w")
    x, y = (onnx.helper.make_tensor_value_info(name, onnx.TensorProto.FLOAT, [1, 4096]) for name in "xy")
    graph = onnx.helper.make_graph([onnx.helper.make_node("MatMul", ["x", "w"], ["y"])], "g", [x], [y], [weights])
    opsets = [onnx.helper.make_opsetid("", 20)]
    onnx.save(onnx.helper.make_model(graph, ir_version=10, opset_imports=opsets), path)


def memory_of(worker: Worker, field: str) -> int:
    """Megabytes that the system says of the worker."""
    status = Path(f"/proc/{worker.pid}/status").read_text()
    return int(status.partition(f"{field}:")[2].split()[0]) >> 10


def is_alive(pid: int) -> bool:
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    return "\nState:\tZ" not in Path(f"/proc/{pid}/status").read_text()


def test_frames_carry_messages_and_arrays():
    arrays = {"a": np.arange(6, dtype=np.float16).reshape(2, 3).T, "b": np.array(7), "c": np.zeros((0, 4), np.uint8)}
    pipe = io.BytesIO()
    write_frame(pipe, {"do": "nothing"}, arrays)
    write_frame(pipe, {"do": "more"})
    pipe.seek(0)
    message, received = read_frame(pipe)
    assert message == {"do": "nothing"}
    assert list(received) == list(arrays)
    for name, array in arrays.items():
        assert received[name].dtype == array.dtype
        np.testing.assert_array_equal(received[name], array)
    assert read_frame(pipe) == ({"do": "more"}, {})
    assert read_frame(pipe) is None


@pytest.mark.parametrize(
    ("frame", "message"),
    [
        (b"Python 3.11.2\n", "not a frame: b'Python 3.11.2"),
        (b"OPTK\0", "not a frame"),
        (HEADER.pack(b"OPTK", 10, 0) + b"{}", "ended after 2 of 10 bytes"),
        (HEADER.pack(b"OPTK", 1 << 30, 0), "over the limit"),
        (HEADER.pack(b"OPTK", 2, 0) + b"{}", "a frame without sense"),
        (HEADER.pack(b"OPTK", 4, 0) + b"\xff\xfe\0\0", "a frame without sense"),
    ],
)
def test_refuses_what_is_not_a_frame(frame, message):
    with pytest.raises(FrameError, match=message):
        read_frame(io.BytesIO(frame))


def test_refuses_a_frame_whose_arrays_do_not_add_up():
    pipe = io.BytesIO()
    write_frame(pipe, {}, {"a": np.zeros(3, np.float32)})
    whole = pipe.getvalue()
    with pytest.raises(FrameError, match="ended after 11 of 12 bytes"):
        read_frame(io.BytesIO(whole[:-1]))
    _, text_bytes, _ = HEADER.unpack(whole[: HEADER.size])
    with pytest.raises(FrameError, match="the header says 99 bytes"):
        read_frame(io.BytesIO(HEADER.pack(b"OPTK", text_bytes, 99) + whole[HEADER.size :]))


@pytest.mark.parametrize("source", SOURCES, ids=lambda path: path.name)
def test_runs_on_an_old_python_and_without_optkit(source):
    tree = ast.parse(source.read_text(), feature_version=(3, 8))
    imported = {alias.name for node in ast.walk(tree) if isinstance(node, ast.Import) for alias in node.names}
    imported |= {node.module or "" for node in ast.walk(tree) if isinstance(node, ast.ImportFrom) and not node.level}
    outside = {name.partition(".")[0] for name in imported} - set(sys.stdlib_module_names)
    assert outside <= {"numpy"}


@pytest.mark.parametrize("module", ["tensorrt", "tensorrt_rtx"])
def test_probes_the_python_that_runs_optkit(module):
    found = probe(module)
    assert found["python"].startswith(f"{sys.version_info.major}.{sys.version_info.minor}.")
    assert ("error" in found) != ("version" in found)


@linux
@pytest.mark.parametrize("module", ["tensorrt", "tensorrt_rtx"])
def test_probes_a_python_without_anything_installed(script, monkeypatch, module):
    monkeypatch.setenv(PYTHON_VARIABLE, script(f'exec {sys.executable} -I -S "$@"'))
    assert probe(module)["error"] == f"ModuleNotFoundError: No module named '{module}'"


@linux
def test_remembers_what_is_there_and_looks_again_for_what_was_missing(script, tmp_path):
    started = tmp_path / "started"
    python = script(f'echo >> {started}; PYTHONPATH={tmp_path} exec {sys.executable} -S "$@"')
    assert "error" in probe("tensorrt", python)
    (tmp_path / "tensorrt.py").write_text("__version__ = '0.0'")
    assert [probe("tensorrt", python)["version"] for _ in range(3)] == ["0.0"] * 3
    assert started.read_text() == "\n\n"


def test_says_which_python_cannot_be_started(tmp_path):
    with pytest.raises(UnavailableError, match=rf"missing' cannot be started .*: set {PYTHON_VARIABLE}"):
        probe("tensorrt", str(tmp_path / "missing"))


@linux
@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("echo Welcome to this host", "answered in another language .*b'Welcome to this.*must be a Python"),
        ("exit 3", r"ended with exit code 3 after .* s: it never began; OPTKIT_TENSORRT_PYTHON must be a Python"),
        ("echo no python here >&2; exit 127", r"ended with exit code 127[^\n]*\nno python here"),
        ("kill -SEGV $$", "crashed with SIGSEGV"),
        ("sh -c 'kill -SEGV $$'; exit $?", "crashed with SIGSEGV"),
    ],
)
def test_tells_what_a_wrong_python_did(script, text, message):
    with pytest.raises(BuildError, match=message):
        probe("tensorrt", script(text))


@linux
def test_tells_when_the_worker_was_killed_in_the_middle_of_a_build(request_build):
    with (
        Worker(LIMITS) as worker,
        pytest.raises(BuildError, match=r"killed by SIGKILL after .* in its phase '.*' with \d+ MB"),
    ):
        worker.call(request_build, signalling(worker, signal.SIGKILL))
    assert not Path(request_build["plan"]).exists()


@linux
def test_kills_a_worker_that_hangs(request_build):
    with Worker(Limits(2)) as worker:
        start = time.monotonic()
        with pytest.raises(BuildError, match=r"did not finish within 2 s.*raise `timeout`"):
            worker.call(request_build, signalling(worker, signal.SIGSTOP))
        assert time.monotonic() - start < 10
    assert not is_alive(worker.pid)


@linux
def test_kills_what_the_worker_started(script, tmp_path):
    pid_file = tmp_path / "pid"
    python = script(f'sleep 1000 & echo $! > {pid_file}\nexec {sys.executable} "$@"')
    with Worker(LIMITS, python) as worker:
        assert "python" in worker.call({"do": "probe", "module": "none"})
        child = int(pid_file.read_text())
        assert is_alive(child)
    deadline = time.monotonic() + 5
    while is_alive(child) and time.monotonic() < deadline:
        time.sleep(0.01)
    assert not is_alive(child)


@linux
def test_the_worker_ends_when_nobody_listens():
    boot = "import sys; sys.path[0] = sys.argv[1]; from worker.serve import main; del sys.path[0]; main()"
    command = [sys.executable, "-c", boot, str(SOURCES[0].parent.parent)]
    worker = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE)
    worker.stdout.close()
    assert worker.wait(timeout=20) == 1  # its input is still open: the heartbeat found out
    worker.stdin.close()


def test_keeps_prints_out_of_the_frames_and_answers_bad_requests(request_build):
    with Worker(LIMITS) as worker:
        reply = worker.call({"do": "dance"})
        assert reply["error"] == "failed"
        assert "KeyError: 'dance'" in worker.log()
        assert worker.call(request_build)["bytes"] == Path(request_build["plan"]).stat().st_size


@linux
def test_tells_when_memory_ran_out(script, request_build):
    with Worker(LIMITS) as worker:
        worker.call({"do": "probe", "module": "tensorrt_rtx"})
        status = Path(f"/proc/{worker.pid}/status").read_text()
    started = int(status.partition("VmPeak:")[2].split()[0])
    save_large(request_build["onnx"])
    # Enough to start and to import TensorRT-RTX, not enough to read 64 MiB of weights
    with Worker(LIMITS, script(f'ulimit -v {started + 50_000}\nexec {sys.executable} "$@"')) as worker:
        reply = worker.call(request_build)
    assert reply["error"] == "refused"
    assert "bad_alloc" in reply["text"]
    assert not Path(request_build["plan"]).exists()


@linux
def test_kills_a_worker_that_takes_too_much_memory(request_build):
    with Worker(LIMITS) as worker:
        worker.call({"do": "probe", "module": "tensorrt_rtx"})
        limit = memory_of(worker, "VmHWM") + 40
    save_large(request_build["onnx"])
    with Worker(Limits(60, limit)) as worker:
        with pytest.raises(
            BuildError, match=rf"took more than {limit} MB of memory after .* was killed: raise `memory_mb`"
        ):
            worker.call(request_build)
        assert not is_alive(worker.pid)
        with pytest.raises(BuildError, match="was killed: open the engine again"):
            worker.call(request_build)
    assert not Path(request_build["plan"]).exists()


@linux
def test_a_build_within_its_memory_limit_is_left_alone(request_build):
    with Worker(Limits(60, 4096)) as worker:
        assert "error" not in worker.call(request_build)


@linux
def test_counts_the_workers_own_memory_and_not_that_of_its_parent():
    code = (
        "import numpy as np; held = np.ones(300 << 17)\n"  # 300 MB before the worker begins
        "from optkit.targets.worker_client import Limits, Worker\n"
        "with Worker(Limits(60, 200)) as worker: print(worker.call({'do': 'probe', 'module': 'none'})['python'])"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.stdout.startswith("3."), done.stderr


def test_opening_an_engine_without_a_driver_is_refused_and_not_a_crash(request_build):
    if cuda.detect().gpus:
        pytest.skip("this machine has a driver and a GPU")
    with Worker(LIMITS) as worker:
        worker.call(request_build)
        reply = worker.call({**request_build, "do": "open", "cuda_graph": True})
        assert reply["error"] == "refused" and "driver" in reply["text"]
        assert worker.call({"do": "run"})["text"] == "no engine is open"  # and it goes on answering


@pytest.mark.parametrize(
    ("precisions", "held", "flags"),
    [
        (["FP16"], ["gate"], ["FP16", "OBEY_PRECISION_CONSTRAINTS"]),
        (["FP16", "INT8"], ["gate"], ["FP16", "INT8", "PREFER_PRECISION_CONSTRAINTS"]),
        (["FP16", "INT8"], [], ["FP16", "INT8"]),
    ],
)
def test_insists_on_float32_only_where_no_int8_is_beside_it(precisions, held, flags):
    # Stands for TensorRT 8.5, which wants a GPU; what it does with the flags was seen on one
    names = ["FP16", "INT8", "OBEY_PRECISION_CONSTRAINTS", "PREFER_PRECISION_CONSTRAINTS"]
    trt = SimpleNamespace(
        BuilderFlag=SimpleNamespace(**{name: name for name in names}), DataType=SimpleNamespace(FLOAT="float32")
    )
    layers = [SimpleNamespace(name=name, precision=None) for name in ("conv", "gate")]
    network = SimpleNamespace(num_layers=len(layers), get_layer=layers.__getitem__)
    given: list[str] = []
    _allow_precisions(trt, SimpleNamespace(set_flag=given.append), network, precisions, held)
    assert given == flags
    assert [layer.precision for layer in layers] == [None, "float32" if held else None]


# Stands for a TensorRT whose timing caches are lines of text, of which it takes none that is BERT's: what the worker
# does with them is read, merge and write a file that others write too
TEXT_CACHES = (
    "import sys; sys.path.insert(0, sys.argv[1]); from worker.build import _TimingCache\n"
    "class Cache:\n"
    "    def __init__(self, content): self.lines = set(content.split())\n"
    "    def combine(self, other, ignore): self.lines |= other.lines; return True\n"
    "    def serialize(self): return b' '.join(sorted(self.lines))\n"
    "class Config:\n"
    "    def create_timing_cache(self, content): return None if b'BERT' in content else Cache(content)\n"
    "    def set_timing_cache(self, cache, ignore): self.cache = cache\n"
    "    def get_timing_cache(self): return self.cache\n"
    "config = Config()\n"
)


@linux
def test_builds_at_the_same_time_share_a_timing_cache(tmp_path):
    code = (
        f"{TEXT_CACHES}"
        "for i in range(20):\n"
        "    cache = _TimingCache(None, config, sys.argv[2])\n"
        "    config.cache.lines.add(f'{sys.argv[3]}-{i}'.encode())\n"
        "    cache.save()\n"
    )
    path = tmp_path / "timing" / "kernels.cache"
    command = [sys.executable, "-c", code, str(SOURCES[0].parent.parent), str(path)]
    builds = [subprocess.Popen([*command, str(number)]) for number in range(4)]
    assert [build.wait(timeout=60) for build in builds] == [0] * 4
    assert set(path.read_text().split()) == {f"{number}-{i}" for number in range(4) for i in range(20)}
    assert sorted(file.suffix for file in path.parent.iterdir()) == [".cache", ".lock"]


@pytest.mark.parametrize(
    ("before", "added", "after", "log"),
    [
        (b"Conv", "BERT", b"Conv", "does not read back"),
        (b"BERT", "Conv", b"Conv", "it is damaged"),
        (b"Conv", "Gemm", b"Conv Gemm", ""),
    ],
)
def test_keeps_a_timing_cache_that_can_be_read(tmp_path, before, added, after, log):
    path = tmp_path / "kernels.cache"
    path.write_bytes(before)
    code = (
        f"{TEXT_CACHES}"
        "cache = _TimingCache(None, config, sys.argv[2])\n"
        f"config.cache.lines.add(b'{added}')\n"
        "cache.save()\n"
    )
    command = [sys.executable, "-c", code, str(SOURCES[0].parent.parent), str(path)]
    done = subprocess.run(command, check=True, stderr=subprocess.PIPE, text=True)
    assert path.read_bytes() == after
    assert log in done.stderr and bool(log) == bool(done.stderr)
