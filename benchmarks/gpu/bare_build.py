"""Builds an ONNX file with TensorRT and nothing around it: what optkit's own builds are compared with.

    trt-python benchmarks/gpu/bare_build.py model.onnx --plan model.plan --precisions FP16,INT8 --cache timing --log log

It runs in the Python that has TensorRT, without optkit. Written for TensorRT 8.5, whose networks are weakly typed.
"""

from __future__ import annotations

import argparse
import json
import resource
import time
from pathlib import Path

BEGUN = time.perf_counter()

import tensorrt as trt  # noqa: E402  (its import is part of the time)


class Logger(trt.ILogger):
    """Keeps every message with the second that it came at."""

    def __init__(self) -> None:
        trt.ILogger.__init__(self)
        self.lines: list[str] = []

    def log(self, severity: trt.ILogger.Severity, text: str) -> None:
        """Called by TensorRT."""
        self.lines.append(f"{time.perf_counter() - BEGUN:8.3f} {severity.name[0]} {text}")


def main() -> None:
    """Build, and print the seconds of each part."""
    parser = argparse.ArgumentParser()
    parser.add_argument("onnx")
    parser.add_argument("--plan", required=True)
    parser.add_argument("--precisions", default="")
    parser.add_argument("--cache", help="timing cache; read if it is there, written in any case")
    parser.add_argument("--threads", type=int, default=1, help="that the builder may use; TensorRT's default is 1")
    parser.add_argument("--log", help="where every message goes")
    chosen = parser.parse_args()
    logger: trt.ILogger = Logger() if chosen.log else trt.Logger(trt.Logger.WARNING)
    seconds = {"import": time.perf_counter() - BEGUN}

    def took(what: str) -> None:
        seconds[what] = time.perf_counter() - BEGUN - sum(seconds.values())

    builder = trt.Builder(logger)
    builder.max_threads = chosen.threads
    took("builder")
    network = builder.create_network(1 << int(trt.NetworkDefinitionCreationFlag.EXPLICIT_BATCH))
    onnx = trt.OnnxParser(network, logger)
    if not onnx.parse_from_file(chosen.onnx):
        raise SystemExit(str(onnx.get_error(0)))
    took("parse")
    config = builder.create_builder_config()
    for name in filter(None, chosen.precisions.split(",")):
        config.set_flag(getattr(trt.BuilderFlag, name))
    vendors = (trt.TacticSource.CUBLAS, trt.TacticSource.CUBLAS_LT, trt.TacticSource.CUDNN)
    config.set_tactic_sources(config.get_tactic_sources() & ~sum(1 << int(vendor) for vendor in vendors))
    cache = Path(chosen.cache) if chosen.cache else None
    if cache:
        config.set_timing_cache(
            config.create_timing_cache(cache.read_bytes() if cache.exists() else b""), ignore_mismatch=False
        )
    plan = builder.build_serialized_network(network, config)
    if plan is None:
        raise SystemExit("TensorRT did not build")
    took("build")
    Path(chosen.plan).write_bytes(plan)
    if cache:
        cache.write_bytes(config.get_timing_cache().serialize())
    took("write")
    if chosen.log:
        Path(chosen.log).write_text("\n".join(logger.lines))
    used = resource.getrusage(resource.RUSAGE_SELF)
    processor = {"user_seconds": used.ru_utime, "system_seconds": used.ru_stime, "page_faults": used.ru_minflt}
    print(json.dumps({"seconds": seconds, "all": time.perf_counter() - BEGUN, **processor}))


if __name__ == "__main__":
    main()
