#!/usr/bin/env bash
# What only several GPUs show: NCCL's results and times. Not yet run.
#
#   PYTHON=python3 bash benchmarks/gpu_parallel.sh
#
# On each number of GPUs here that is a power of two: a step of 5B and of 1.5 against one GPU, with
# and without two groups for guidance; then the command line on all.

set -eu
cd "$(dirname "${BASH_SOURCE[0]}")/.."
PYTHON=${PYTHON:-python3}
GPUS=$("$PYTHON" -c "import torch; print(torch.cuda.device_count())")

ranks() { # number, arguments of torchrun
    local number=$1
    shift
    "$PYTHON" -m torch.distributed.run --standalone --nproc-per-node "$number" "$@"
}

for ((n = 1; n <= GPUS; n *= 2)); do
    for guidance in 1 2; do
        ((n % guidance)) && continue
        ranks "$n" -m benchmarks.parallel --preset 5b --guidance "$guidance"
        ranks "$n" -m benchmarks.parallel --preset 1.5-5b --latents 22 96 170 --guidance "$guidance"
    done
done
out=$(mktemp -d)
ranks "$GPUS" -m cogvx generate --model tiny --prompt "a red circle moves right" --guidance 2 --out "$out/circle.mp4"
