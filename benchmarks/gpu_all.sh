#!/usr/bin/env bash
# Everything that wants a GPU, in one call of under ten minutes on one device:
#
#   bash benchmarks/gpu_all.sh OUT [TEXT]
#
# GPU tests, benchmarks of head, step (with a profile) and its variants, a short distillation in fp16, and the shipped
# teacher trained on with TEXT (a folder of .txt with train/ and heldout/, or the shipped text). Writes logs, figures and
# summary.md to OUT. Needs torch with CUDA and this project's packages; no network. PYTHON names the interpreter (default:
# python3), SECONDS_ALL the time for all (default: 560). Nothing is installed; a part that fails does not keep the others
# from running.
set -uo pipefail
cd "$(dirname "$0")/.."
[ $# -ge 1 ] || { echo "usage: bash benchmarks/gpu_all.sh OUT [TEXT]" >&2; exit 2; }
mkdir -p "$1" && out=$(cd "$1" && pwd) || exit 2
text=${2:-recipes/mini/text}
python=${PYTHON:-python3}
seconds_all=${SECONDS_ALL:-560}
export PYTHONPATH="$PWD${PYTHONPATH:+:$PYTHONPATH}" PYTHONUNBUFFERED=1 HF_HUB_OFFLINE=1
started=$SECONDS

missing=$("$python" - <<'PYTHON'
import importlib.util
names = "torch triton deepspeed transformers datasets sentencepiece tensorboard pydantic yaml filelock xxhash tqdm hjson"
names += " msgpack psutil einops cpuinfo dill multiprocess pytest"
print(*[name for name in names.split() if importlib.util.find_spec(name) is None])
PYTHON
) || exit 2
[ -z "$missing" ] || { echo "gpu_all.sh: $python lacks: $missing. Put wheels of them on PYTHONPATH." >&2; exit 2; }
"$python" -c 'import sys, torch; sys.exit(not torch.cuda.is_available())' ||
    { echo "gpu_all.sh: torch sees no CUDA device here" >&2; exit 2; }

# DeepSpeed compiles its fused Adam with nvcc; where there is none torch's own stands in, and summary.md says so.
adam=()
"$python" -c 'import sys; from distilcb.machine import find_compiler; sys.exit(find_compiler() is None)' ||
    adam=(--optim.name adamw_torch)

{
    echo "# On a GPU"
    echo
    echo "\`bash benchmarks/gpu_all.sh\`, commit $(git rev-parse --short=10 HEAD 2>/dev/null || echo unknown), $(date +%F)"
    echo
    echo '```'
    nvidia-smi --query-gpu=name,driver_version,memory.total,clocks.max.sm --format=csv,noheader
    "$python" -c 'import torch, triton, transformers, deepspeed, sys; print("python", sys.version.split()[0], "torch", torch.__version__, "triton", triton.__version__, "transformers", transformers.__version__, "deepspeed", deepspeed.__version__)' 2>/dev/null | tail -1
    echo "optimizer: ${adam[*]:-DeepSpeed fused Adam}"
    echo '```'
    echo
    echo "| part | exit code | seconds |"
    echo "| --- | ---: | ---: |"
} > "$out/summary.md"

# part NAME MOST_SECONDS WORDS...: run it, with what is left of the time as the limit
part() {
    local name=$1 most=$2 left begun code
    shift 2
    left=$((seconds_all - SECONDS + started))
    [ "$left" -lt "$most" ] && most=$left
    begun=$SECONDS
    if [ "$most" -lt 10 ]; then
        echo "| $name | not run: the time was up | |" >> "$out/summary.md"
        return
    fi
    echo "== $name (at most $most s): $*"
    timeout --signal=TERM --kill-after=15 "$most" "$@" > "$out/$name.log" 2>&1
    code=$?
    tail -n 3 "$out/$name.log"
    echo "| $name | $code | $((SECONDS - begun)) |" >> "$out/summary.md"
}

runs=$(mktemp -d)
trap 'rm -rf "$runs"' EXIT
# Of the unit tests those of the Triton kernel: C++ is the CPU's, and compiling it wants ninja.
part tests 200 "$python" -m pytest -q -p no:cacheprovider tests/gpu tests/unit/test_logit_kernel.py -k "not cpp and not compiled_pass and not columns"
part head 40 "$python" benchmarks/head.py --json "$out/head.json" --report "$out/head.md"
part step 110 "$python" benchmarks/step.py --cases real --rounds 3 "${adam[@]}" --json "$out/step.json" --report "$out/step.md" --profile "$runs/profile.json"
cp "$runs"/profile*.txt "$out/" 2>/dev/null
part distillation 50 "$python" launch/train.py --run_dir "$runs/mini" --deepspeed zero2_fp16 "${adam[@]}" --train.steps 300
cp "$runs/mini/summary.json" "$out/distillation.json" 2>/dev/null
part variants 80 "$python" benchmarks/variants.py --cases real --rounds 3 "${adam[@]}" --json "$out/variants.json" --report "$out/variants.md"
# SIGTERM asks a run to save and end, so the time limit is its length; the newest weights are exported then.
part teacher $((seconds_all - SECONDS + started - 45)) "$python" launch/train.py --recipe recipes/mini_teacher_3.yaml --run_dir "$runs/teacher" --deepspeed zero2_bf16 "${adam[@]}" \
    --student.init recipes/mini/teacher --student.init_layers null --data.train "$text/train" --data.heldout "$text/heldout" \
    --optim.global_batch 256 --optim.micro_batch 256 --optim.schedule constant --train.steps 20000 --train.eval_every 1000
if [ -d "$runs/teacher/checkpoints" ]; then
    part export 40 "$python" launch/export.py "$runs/teacher" --output "$runs/exported"
    tar -C "$runs" -czf "$out/teacher.tar.gz" exported 2>/dev/null
    cp "$runs/teacher/metrics.jsonl" "$out/teacher_metrics.jsonl" 2>/dev/null
fi
cat "$out/summary.md"
! grep -qE '^\| [a-z]+ \| ([1-9]|not run)' <(grep -vE '^\| (teacher |export \| not run)' "$out/summary.md")
