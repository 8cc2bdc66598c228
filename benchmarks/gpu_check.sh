#!/usr/bin/env bash
# Everything that only a CUDA machine can say, in one call of under nine minutes.
#
#   OUT=folder PYTHON=python3 bash benchmarks/gpu_check.sh
#
# Builds the extension in place, runs the tests and the verifier on the GPU, then the benchmarks and
# a sweep of launch choices, then the sanitizers. Installs nothing, fetches nothing, and leaves the
# GPU's settings as they are. Every step has its own time limit and its own log in $OUT; a step that
# fails does not stop the next, but the exit status is then 1. SKIP is not a failure: it says why.

set -u
cd "$(dirname "${BASH_SOURCE[0]}")/.." || exit 1

PYTHON=${PYTHON:-python3}
OUT=${OUT:-./out/gpu_check}
BUDGET=${BUDGET:-530} # seconds for all steps together; what is left bounds every step
mkdir -p "$OUT/bench" || exit 1
OUT=$(cd "$OUT" && pwd)
SUMMARY=$OUT/summary.txt
: >"$SUMMARY"
failed=0
unset TRITON_INTERPRET # it would send every kernel to the CPU

line() { # status, step, remark
    printf '%-5s %-42s %s\n' "$1" "$2" "$3" | tee -a "$SUMMARY"
}

# record STEP STATUS SECONDS LIMIT: a line of the summary
record() {
    case $2 in
    0) line ok "$1" "$3 s" ;;
    124 | 137) failed=1 && line FAIL "$1" "stopped after its $4 s" ;;
    *) failed=1 && line FAIL "$1" "status $2 after $3 s: $(grep -v '^ *$' "$OUT/$1.log" | tail -n 1 | cut -c1-120)" ;;
    esac
}

left() { echo $((BUDGET - SECONDS)); }

# step NAME LIMIT COMMAND...: run it, log it, record it
step() {
    local name=$1 limit=$2 began=$SECONDS status
    shift 2
    if (($(left) < 5)); then
        failed=1
        line FAIL "$name" "no time left"
        return
    fi
    ((limit > $(left))) && limit=$(left)
    timeout -k 5 "$limit" "$@" >"$OUT/$name.log" 2>&1
    status=$?
    record "$name" "$status" $((SECONDS - began)) "$limit"
}

facts() {
    nvidia-smi
    uname -srm
    "$PYTHON" - <<'PY'
import importlib.metadata, platform, sys
import torch
print("python", platform.python_version())
for name in ("torch", "triton", "numpy", "pytest", "diffusers", "liger-kernel", "matplotlib"):
    try:
        print(name, importlib.metadata.version(name))
    except importlib.metadata.PackageNotFoundError:
        print(name, "not installed")
print("CUDA", torch.version.cuda, "cuDNN", torch.backends.cudnn.version())
if not torch.cuda.is_available():
    sys.exit("torch sees no CUDA device")
p = torch.cuda.get_device_properties(0)
print(p.name, f"sm_{p.major}{p.minor}", p.multi_processor_count, "SMs", p.total_memory, "bytes")
PY
    local status=$?
    ptxas --version || "$("$PYTHON" -c 'import triton.backends.nvidia as n, os; print(os.path.join(os.path.dirname(n.__file__), "bin", "ptxas"))')" --version
    nvcc --version
    return $status
}

# Tests that ask for several workers get them where pytest-xdist is there.
workers() { "$PYTHON" -c 'import xdist' 2>/dev/null && echo "-n 8"; }

# tests NAME LIMIT ARGUMENTS...: pytest; 5 means that it collected nothing
tests() {
    local name=$1 limit=$2
    shift 2
    if [[ ! -d tests ]]; then
        line SKIP "$name" "no tests here"
        return
    fi
    # shellcheck disable=SC2046
    step "$name" "$limit" "$PYTHON" -m pytest -q -p no:cacheprovider $(workers) "$@"
}

bench() { # op size limit
    step "bench-$1-$2" "$3" "$PYTHON" -m benchmarks --op "$1" --size "$2" --device cuda \
        --out "$OUT/bench"
}

# The four tools at once: they only judge, so they may share the card.
sanitize() {
    local limit=$1 tool pids=() names=() began=$SECONDS i status log
    if ! command -v compute-sanitizer >/dev/null; then
        line SKIP sanitizers "compute-sanitizer is not on PATH"
        return
    fi
    ((limit > $(left))) && limit=$(left)
    if ((limit < 20)); then
        line SKIP sanitizers "no time left"
        return
    fi
    for tool in memcheck racecheck initcheck synccheck; do
        # Uncached, so that every tensor is an allocation of its own with an end to run over.
        PYTORCH_NO_CUDA_MEMORY_CACHING=1 timeout -k 5 "$limit" \
            compute-sanitizer --tool "$tool" --error-exitcode 9 \
            "$PYTHON" -m cogvx_kernels verify --device cuda --quick \
            >"$OUT/sanitize-$tool.log" 2>&1 &
        pids+=($!)
        names+=("sanitize-$tool")
    done
    for i in "${!pids[@]}"; do
        wait "${pids[$i]}"
        status=$?
        log=$OUT/${names[$i]}.log
        if grep -qiE 'device not supported|not supported on this (device|system|platform)' "$log"; then
            line SKIP "${names[$i]}" "this runtime does not support it"
        else
            record "${names[$i]}" "$status" $((SECONDS - began)) "$limit"
        fi
    done
}

# `timeout` runs programs, not functions: a bash that knows this one.
export -f facts
export PYTHON

step facts 40 bash -c facts
step build 90 env COGVX_CUDA=1 MAX_JOBS=16 "$PYTHON" setup.py build_ext --inplace
step verify 75 "$PYTHON" -m cogvx_kernels verify --device cuda --json "$OUT/verify.json"
tests tests-gpu 75 -m gpu tests
tests contract 60 tests/kernels/test_contract.py
for size in 5b-480x720-49f card-480x720-49f 2b-480x720-49f 1.5-5b-768x1360-81f; do
    bench qk_norm_rope3d "$size" 45
    bench rope3d "$size" 35
done
for size in 5b-480x720-49f card-480x720-49f; do
    bench expert_adaln "$size" 25
    bench gated_residual_adaln "$size" 30
done
for part in vae-decode vae-encode transformer; do
    step "model-$part" 45 "$PYTHON" -m benchmarks.model --part "$part" --size 5b-480x720-49f \
        --budget 1 --out "$OUT/bench"
done
step tune 60 "$PYTHON" -m benchmarks.tune --op qk_norm_rope3d --quick --out "$OUT/bench"
sanitize 75

echo
for log in "$OUT"/bench-*.log; do
    [[ -e $log ]] && sed -n '/provider/,/^$/p;/refused\|outside/p' "$log" | cut -c1-88 | sed "1i $(basename "$log" .log)"
done
[[ -e $OUT/tune.log ]] && grep -A 4 '^qk_norm' "$OUT/tune.log"
echo
cat "$SUMMARY"
echo "$((SECONDS)) s; logs and results in ${OUT/#$PWD\//}"
exit $failed
