#!/usr/bin/env bash
# Every check that needs a CUDA machine, in one call of under nine minutes.
#
#   OUT=folder PYTHON=python3 bash benchmarks/gpu_check.sh
#
# First correctness: builds the extension in place, runs the contract, then side by side the GPU's
# own tests, the verifier and the sanitizers. Then speed, alone: ops, convolutions, parts of the model,
# and a sweep of launch choices if time is left. Installs nothing, fetches nothing, and leaves the
# GPU's settings as they are. Every step has its own time limit and its own log in $OUT; a step that
# fails does not stop the next, but the exit status is then 1. SKIP is not a failure.
#
# Seconds on an H200 with 16 cores, estimated and not yet measured: correctness 220, ops 152,
# convolutions 22, parts of the model 125, in all 519. Other conventions and sizes, vae-encode, a whole
# clip, all 42 blocks and the compiled VAE, which takes minutes, are left to calls of their own.

set -u
cd "$(dirname "${BASH_SOURCE[0]}")/.." || exit 1

PYTHON=${PYTHON:-python3}
OUT=${OUT:-./out/gpu_check}
WORKERS=${WORKERS:-10}
BUDGET=${BUDGET:-530} # seconds for all steps together; the rest of them bounds every step
SIZE=5b-480x720-49f
mkdir -p "$OUT/bench" || exit 1
OUT=$(cd "$OUT" && pwd)
SUMMARY=$OUT/summary.txt
TOKENS=(rope3d qk_norm_rope3d expert_adaln gated_residual gated_residual_adaln expert_ffn)
VIDEOS=(spatial_norm_silu residual_moments temporal_conv frame_cache_join)
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

# facts: the machine and what is installed
facts() {
    nvidia-smi; uname -srm; "$PYTHON" -m cogvx_kernels doctor; nvcc --version
    "$PYTHON" -c 'import sys, torch; sys.exit(not torch.cuda.is_available() and "torch sees no CUDA device")'
}

# spare NAME LIMIT COMMAND...: a step if there is time for it
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
    step "$name" "$limit" "$PYTHON" -m pytest --all -q -p no:cacheprovider $(workers) "$@"
}

bench() { # name limit arguments...
    local name=$1 limit=$2
    shift 2
    step "bench-$name" "$limit" "$PYTHON" -m benchmarks --op "$name" --size "$SIZE" \
        --device cuda --out "$OUT/bench" "$@"
}

# sanitize LIMIT: every tool over small samples of every op, and over the frame cache's tests, whose
# ops overwrite their arguments. All at once: nothing is timed, so they may share the GPU.
sanitize() {
    local limit=$1 pids=() names=() began=$SECONDS i status log
    if ! command -v compute-sanitizer >/dev/null; then
        line SKIP sanitizers "compute-sanitizer is not on PATH"
        return
    fi
    ((limit > $(left))) && limit=$(left)
    if ((limit < 20)); then
        line SKIP sanitizers "no time left"
        return
    fi
    local verify=(-m cogvx_kernels verify --device cuda --quick --again)
    local cache=(-m pytest --all -q -p no:cacheprovider tests/kernels/test_frame_cache.py
        -k "every_length or every_dtype or around_a_view")
    local tool
    for tool in memcheck racecheck initcheck synccheck; do
        watched "$tool" "$limit" "${verify[@]}" "${TOKENS[@]/#/--op=}"
        watched "$tool-videos" "$limit" "${verify[@]}" "${VIDEOS[@]/#/--op=}"
        [[ $tool == synccheck || ! -d tests ]] || watched "$tool-cache" "$limit" "${cache[@]}"
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

# watched TOOL[-WHAT] LIMIT ARGUMENTS...: python under a tool, in the background; for sanitize
watched() {
    local name=$1 limit=$2
    shift 2
    # Uncached, so that every tensor is an allocation of its own with an end to run over.
    PYTORCH_NO_CUDA_MEMORY_CACHING=1 timeout -k 5 "$limit" \
        compute-sanitizer --tool "${name%%-*}" --error-exitcode 9 \
        "$PYTHON" "$@" >"$OUT/sanitize-$name.log" 2>&1 &
    pids+=($!)
    names+=("sanitize-$name")
}

# predicted OP: the times that the counters of its kernels predict, to print beside what was measured
predicted() {
    grep -q "^| \`$1\`" "$OUT/predicted.txt" || return 0
    echo "$1, predicted"
    sed -n '1p' "$OUT/predicted.txt"
    grep "^| \`$1\`" "$OUT/predicted.txt"
}

# `timeout` runs programs, not functions: a bash that knows this one.
export -f facts
export PYTHON

step facts 40 bash -c facts

# Alone: which tests are collected depends on what is built.
step build 90 env COGVX_CUDA=1 MAX_JOBS=12 "$PYTHON" setup.py build_ext --inplace

# The contract compiles every kernel, and those after it find them compiled.
tests contract 140 tests/kernels/test_contract.py tests/kernels/test_arguments.py tests/kernels/test_tracing.py
tests tests-gpu 110 -m gpu tests &
step verify 110 "$PYTHON" -m cogvx_kernels verify --device cuda --json "$OUT/verify.json" &
sanitize 110
wait

# Timed, so alone.
bench qk_norm_rope3d 45 --quick
bench gated_residual_adaln 45 --quick
bench expert_ffn 60 --quick --conventions "text and video experts" \
    --providers cogvx-grouped cogvx-dense split-cat compile-split-cat cublaslt-gelu
bench spatial_norm_silu 60 --quick --conventions model \
    --providers cogvx compile diffusers-eager sglang
bench residual_moments 45 --quick --conventions model --providers cogvx compile torch-steps
bench temporal_conv 50 --quick --conventions model --providers cogvx torch-steps
bench frame_cache_join 30 --quick --providers cogvx cogvx-append compile
bench conv 45 --budget 0.1 --conventions 0 2 4 8
bench block 50 --budget 3
bench transformer 70 --budget 3 --layers 4
bench vae-decode 60 --budget 1 --frames 17 --repeats 2 \
    --providers diffusers-channels-last diffusers-patched diffusers-patched-fast cogvx
spare bench-qk_norm_rope3d-card 25 "$PYTHON" -m benchmarks --op qk_norm_rope3d \
    --size card-480x720-49f --device cuda --quick --out "$OUT/bench"
spare tune 45 "$PYTHON" -m benchmarks.tune --op expert_adaln --quick --out "$OUT/bench"

echo
"$PYTHON" -m cogvx_kernels counters --table >"$OUT/predicted.txt" 2>&1
for log in "$OUT"/bench-*.log "$OUT"/tune.log; do
    op=$(basename "$log" .log)
    predicted "${op#bench-}"
    [[ -e $log ]] && sed -n '/provider/,/^$/p;/refused\|outside/p' "$log" | cut -c1-120 | sed "1i $(basename "$log" .log)"
done
echo
cat "$SUMMARY"
echo "$((SECONDS)) s; logs and results in ${OUT/#$PWD\//}"
! grep -q '^FAIL' "$SUMMARY"
