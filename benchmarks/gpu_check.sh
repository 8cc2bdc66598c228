#!/usr/bin/env bash
# Everything that only a CUDA machine can say, in one call of under nine minutes.
#
#   OUT=folder PYTHON=python3 bash benchmarks/gpu_check.sh
#
# First all that only judges, side by side: builds the extension in place, runs the contract, then
# the GPU's own tests, the verifier and the sanitizers. Then what is timed, alone: benchmarks, parts
# of the model, and a sweep of launch choices if time is left. Installs nothing, fetches nothing, and
# leaves the GPU's settings as they are. Every step has its own time limit and its own log in $OUT; a
# step that fails does not stop the next, but the exit status is then 1. SKIP is not a failure: it
# says why.
#
# How the seconds add up on an H200 with 16 cores, reckoned and not yet measured:
#     facts 5, build beside contract 90, gpu tests beside verify and sanitizers 90    185
#     qk_norm_rope3d 5b 28, card 22                                                    50
#     expert_adaln 5b 26, gated_residual_adaln 5b 28, card 22                          76
#     expert_ffn 5b 46, card 52                                                        98
#     block 30, transformer of 6 blocks 52, vae-decode 14                              96
#                                                                                     505
# Other sizes, rope3d alone, vae-encode and all 42 blocks are left to calls of their own.

set -u
cd "$(dirname "${BASH_SOURCE[0]}")/.." || exit 1

PYTHON=${PYTHON:-python3}
OUT=${OUT:-./out/gpu_check}
WORKERS=${WORKERS:-10}
BUDGET=${BUDGET:-530} # seconds for all steps together; what is left bounds every step
mkdir -p "$OUT/bench" || exit 1
OUT=$(cd "$OUT" && pwd)
SUMMARY=$OUT/summary.txt
: >"$SUMMARY"
unset TRITON_INTERPRET # it would send every kernel to the CPU

line() { # status, step, remark
    printf '%-5s %-42s %s\n' "$1" "$2" "$3" | tee -a "$SUMMARY"
}

# record STEP STATUS SECONDS LIMIT: a line of the summary
record() {
    case $2 in
    0) line ok "$1" "$3 s" ;;
    124 | 137) line FAIL "$1" "stopped after its $4 s" ;;
    *) line FAIL "$1" "status $2 after $3 s: $(grep -v '^ *$' "$OUT/$1.log" | tail -n 1 | cut -c1-120)" ;;
    esac
}

left() { echo $((BUDGET - SECONDS)); }

# step NAME LIMIT COMMAND...: run it, log it, record it
step() {
    local name=$1 limit=$2 began=$SECONDS status
    shift 2
    if (($(left) < 5)); then
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

# spare NAME LIMIT COMMAND...: the same if there is time for it
spare() {
    if (($(left) < $2)); then
        line SKIP "$1" "$(left) s are left; it wants $2"
        return
    fi
    step "$@"
}

# Tests that ask for several workers get them where pytest-xdist is there.
workers() { "$PYTHON" -c 'import xdist' 2>/dev/null && echo "-n $WORKERS"; }

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

bench() { # op size limit arguments...
    local op=$1 size=$2 limit=$3
    shift 3
    step "bench-$op-$size" "$limit" "$PYTHON" -m benchmarks --op "$op" --size "$size" \
        --device cuda --out "$OUT/bench" "$@"
}

part() { # part limit arguments...
    local part=$1 limit=$2
    shift 2
    step "model-$part" "$limit" "$PYTHON" -m benchmarks.model --part "$part" \
        --size 5b-480x720-49f --budget 0.5 --out "$OUT/bench" "$@"
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

# What only judges may share the card: the contract compiles every kernel, and those after it find
# them compiled.
step build 90 env COGVX_CUDA=1 MAX_JOBS=6 "$PYTHON" setup.py build_ext --inplace &
tests contract 120 tests/kernels/test_contract.py tests/kernels/test_arguments.py tests/kernels/test_tracing.py
wait
tests tests-gpu 90 -m gpu tests &
step verify 90 "$PYTHON" -m cogvx_kernels verify --device cuda --json "$OUT/verify.json" &
sanitize 90
wait

# What is timed runs alone.
for size in 5b-480x720-49f card-480x720-49f; do
    [[ $size == 5b* ]] && quick=() || quick=(--quick)
    bench qk_norm_rope3d "$size" 45 "${quick[@]}"
    bench gated_residual_adaln "$size" 45 "${quick[@]}"
done
bench expert_adaln 5b-480x720-49f 45
ours=(cogvx-grouped cogvx-dense)
others=(split-cat compile-split-cat cublaslt-gelu)
bench expert_ffn 5b-480x720-49f 70 --quick --providers "${ours[@]}" "${others[@]}" \
    --conventions model "text and video experts"
bench expert_ffn card-480x720-49f 70 --quick \
    --providers "${ours[@]}" "${others[@]}" grouped-mm compile-grouped-mm \
    --conventions "text and video experts" "4 experts, top-1" "4 experts, top-2"
part block 50
part transformer 80 --layers 6
part vae-decode 30
spare tune 45 "$PYTHON" -m benchmarks.tune --op expert_adaln --quick --out "$OUT/bench"

echo
for log in "$OUT"/bench-*.log; do
    [[ -e $log ]] && sed -n '/provider/,/^$/p;/refused\|outside/p' "$log" | cut -c1-88 | sed "1i $(basename "$log" .log)"
done
for log in "$OUT"/model-*.log; do
    [[ -e $log ]] && sed -n '/^part/,$p' "$log" | cut -c1-120
done
[[ -e $OUT/tune.log ]] && grep -A 4 '^expert_adaln' "$OUT/tune.log"
echo
cat "$SUMMARY"
echo "$((SECONDS)) s; logs and results in ${OUT/#$PWD\//}"
! grep -q '^FAIL' "$SUMMARY"
