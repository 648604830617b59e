#!/usr/bin/env bash
# Accuracy of public checkpoints under every reading, on all GPUs of this machine: records of every answer, and a report.
#
#     benchmarks/real_models.sh CHECKPOINTS OUT [SECONDS]
#
# CHECKPOINTS: a folder with the folders of NAMES below, as save_pretrained writes them (with tokenizer and template).
# OUT: a folder for real_NAME.jsonl.gz and real_models.md. If records are there already, only what is missing is answered.
# SECONDS: start nothing after that time, 540 by default; give the command again until it says that all is answered.
# JOBS, BATCH: processes (6 for each GPU), and answers that each of them writes side by side (10).
# SAMPLES: of each kind and length (25); HEADS: retaining heads of the 0.5B.
set -eu
checkpoints=$1 out=$2 limit=${3:-540}
cd "$(dirname "$0")/.."
python=$([ -x .venv/bin/python ] && echo .venv/bin/python || echo python3)
export PYTHONPATH=src OMP_NUM_THREADS=1 TOKENIZERS_PARALLELISM=false
gpus=$("$python" -c 'import torch; print(max(1, torch.cuda.device_count()))')
begun=$SECONDS whole=yes
mkdir -p "$out"

answer() { # NAME LENGTH SET
    local left=$((limit - SECONDS + begun)) records="$out/real_$1.jsonl" heads=()
    [ "$left" -gt 15 ] || { whole=no; return 0; }
    [ -f "$records" ] || { [ -f "$records.gz" ] && gunzip --keep "$records.gz"; } || true
    [ "$1" = qwen2.5-coder-0.5b ] && [ -n "${HEADS:-}" ] && heads=(--heads "$HEADS")
    "$python" benchmarks/real_models.py --model "$checkpoints/$1" --length "$2" --set "$3" --jobs "${JOBS:-$((6 * gpus))}" \
        --batch-size "${BATCH:-10}" --samples "${SAMPLES:-25}" --seconds "$left" "${heads[@]}" --out "$records" || { [ $? = 3 ] && whole=no; }
}

for length in 32768 16384 4096; do answer qwen2.5-coder-1.5b $length main; done
for set in ablations main; do answer qwen2.5-coder-0.5b 16384 $set; done
for length in 8192 4096; do answer smollm2-135m $length main; done
for length in 32768 16384 4096; do answer gemma3-270m $length main; done
for length in 32768 4096; do answer qwen2.5-coder-0.5b $length main; done
answer qwen2.5-coder-1.5b 16384 ablations
for name in qwen2.5-coder-1.5b qwen2.5-coder-0.5b gemma3-270m; do answer $name 16384 minference; done
answer smollm2-135m 8192 minference
for name in qwen2.5-coder-1.5b qwen2.5-coder-0.5b; do answer $name 16384 follow-ups; done
for length in 16384 32768; do
    for set in bound propagation decode; do
        for name in qwen2.5-coder-1.5b qwen2.5-coder-0.5b; do answer $name $length $set; done
    done
done

for records in "$out"/real_*.jsonl; do
    [ -f "$records" ] && gzip --no-name --force --best --keep "$records"
done
"$python" -m apb.cli.main report "$out"/real_*.jsonl.gz --out "$out/real_models.md"
[ $whole = yes ] && echo "All is answered." || { echo "Give the command again: not all is answered."; exit 3; }
