"""optkit beside its peers: the same models, samples, and runtime; one table.

    python benchmarks/int8/run.py [--models resnet8 ...] [--peers optkit ort ...] [--quick]

Every step is a process of its own on one thread, whose processor seconds and peak memory are taken from the system.
Results are kept one by one under .out/bench-int8: an interrupted run goes on where it was. Standard library only, so
that the peak memory of a child is its own (Linux counts what it inherits at the fork).
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path
from typing import Any

import table
from cases import CASES, ENTRANTS, HERE, OUT, PEERS, QUICK, ROOT, Case, Entrant

REQUIREMENTS = {
    "ort": ["onnxruntime==1.32.0", "onnx==1.23.2", "sympy"],
    "nncf": ["nncf==3.4.0", "onnxruntime==1.32.0", "onnx"],
    "modelopt": ["nvidia-modelopt[onnx]==0.47.0"],
}
ENVIRONMENT = {
    **os.environ,
    **dict.fromkeys(("OMP_NUM_THREADS", "OPENBLAS_NUM_THREADS", "MKL_NUM_THREADS"), "1"),
    "HF_HUB_OFFLINE": "1",
    "PYTHONPATH": str(ROOT),
    "PYTHONWARNINGS": "ignore",
}
INSTALL_SECONDS = 1200


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--models", nargs="+", choices=CASES, default=list(CASES))
    parser.add_argument("--peers", nargs="+", choices=PEERS, default=list(PEERS))
    parser.add_argument("--quick", action="store_true", help="few samples: whether everything runs, not how well")
    given = parser.parse_args()
    OUT.mkdir(parents=True, exist_ok=True)
    pythons = {peer: _python(peer) for peer in given.peers}
    for name in given.models:
        case = replace(CASES[name], **QUICK) if given.quick else CASES[name]
        folder = OUT / (f"{name}-quick" if given.quick else name)
        _prepare(name, case, folder)
        for entrant in ENTRANTS:
            if entrant.peer in given.peers and entrant.fits(case):
                _enter(entrant, case, folder, pythons[entrant.peer])
    print(table.text(given.models, given.peers, given.quick))


def _python(peer: str) -> Path | None:
    """The interpreter of a peer's own environment, made if it is not there; None if it does not install."""
    if peer == "optkit":
        return Path(sys.executable)
    folder = OUT / f"venv-{peer}"
    if not (folder / ".ready").exists():
        _say(f"installing {peer}")
        subprocess.run([sys.executable, "-m", "venv", folder], check=True)
        constraints = OUT / "constraints.txt"
        # This torch has a CPU wheel here; a looser range would take the build with several GB of CUDA
        constraints.write_text("torch==2.13.0\n")
        command = [folder / "bin/pip", "install", "--quiet", "--constraint", constraints, *REQUIREMENTS[peer]]
        with (OUT / f"venv-{peer}.log").open("w") as log:
            try:
                subprocess.run(command, stdout=log, stderr=log, timeout=INSTALL_SECONDS, check=True)
            except subprocess.SubprocessError:
                _say(f"{peer} does not install: see {log.name}")
                return None
        (folder / ".ready").touch()
    return folder / "bin/python"


def _prepare(name: str, case: Case, folder: Path) -> None:
    if (folder / "case.json").exists():
        return
    _say(f"{name}: preparing")
    command = [sys.executable, HERE / "prepare.py", name, str(case.calibration), str(case.evaluation), folder]
    done = _measured(command, folder.with_suffix(".log"))
    if "error" in done:
        sys.exit(f"{name} cannot be prepared: {done['error']} (see {folder.with_suffix('.log')})")


def _enter(entrant: Entrant, case: Case, folder: Path, python: Path | None) -> None:
    """Quantize and score, each unless its result is there; what fails is a result too."""
    model, log = folder / f"{entrant.name}.onnx", folder / f"{entrant.name}.log"
    cost, score = folder / f"{entrant.name}.cost.json", folder / f"{entrant.name}.score.json"
    if not cost.exists():
        _say(f"{folder.name}: {entrant.peer} {entrant.title}")
        count = case.few if entrant.few else case.calibration
        script = HERE / f"quantize_{entrant.peer}.py"
        arguments = [folder / "float.onnx", folder / "calibration", str(count), model, json.dumps(entrant.options)]
        done = _measured([python, script, *arguments], log) if python else {"error": "does not install"}
        cost.write_text(json.dumps({**done, "calibration": count}))
    if not score.exists() and model.exists():
        options = ["--batch", str(case.batch), *(["--exact"] if entrant.exact else [])]
        done = _measured([sys.executable, HERE / "evaluate.py", folder, model, score, *options], log)
        if "error" in done:
            score.write_text(json.dumps(done))


def _measured(command: list[Any], log: Path) -> dict[str, Any]:
    """Processor seconds, peak memory in MB, and the last line of the log if it failed."""
    start = time.perf_counter()
    with log.open("a") as file:
        child = subprocess.Popen([str(word) for word in command], stdout=file, stderr=file, env=ENVIRONMENT)
        _, status, usage = os.wait4(child.pid, 0)
    child.returncode = os.waitstatus_to_exitcode(status)
    measured = {
        "cpu_s": usage.ru_utime + usage.ru_stime,
        "wall_s": time.perf_counter() - start,
        "peak_mb": usage.ru_maxrss / 1024,
    }
    if child.returncode == 0:
        return measured
    lines = [line for line in log.read_text(errors="replace").splitlines() if line.strip()]
    reason = f"killed by signal {-child.returncode}" if child.returncode < 0 else lines[-1] if lines else "no message"
    return {**measured, "error": reason}


def _say(text: str) -> None:
    print(time.strftime("%H:%M:%S"), text, file=sys.stderr, flush=True)


if __name__ == "__main__":
    main()
