#!/usr/bin/env bash
# Everything of the GPU benchmark into one folder; needs a GPU, and TensorRT in the Python that OPTKIT_TENSORRT_PYTHON
# names. A first run takes half an hour, most of it builds; with the timing cache in OUT a second one takes minutes.
#
#   benchmarks/gpu/run.sh OUT [MODEL:BATCH,BATCH …]
set -euo pipefail
out=${1:?output folder}; shift
cd "$(dirname "$0")/../.."
exec python3 -m benchmarks.gpu.bench "${@:-resnet50:32,1,128}" --out "$out" --work "$out/work" --compile
