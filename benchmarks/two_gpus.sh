#!/usr/bin/env bash
# The figures that need two GPUs. Usage: benchmarks/two_gpus.sh FOLDER [PART ...]; all parts, if none is named:
#   tests       the tests that need a GPU, or two                                      about 80 s
#   overlap     whether ring attention hides its sends                                 about 40 s
#   exact       prefill of the exact strategies, Llama-3.1-8B shape, 64K and 128K      about 180 s
#   accuracy    the shipped model with full attention, 200 samples a cell              about 120 s
#   strategies  the shipped model with every strategy and compressor, 204 samples      about 220 s
#   heads       retaining heads of the shipped model: data, 3000 steps of two widths
#   needed      the file HEADS and query at 32K on every kind of question, 204 samples
#   study       compressors, lengths, blocks, anchors, late questions, 204 samples; ONLY=regex for some cells
set -u
cd "$(dirname "$0")/.."
out=${1:?usage: benchmarks/two_gpus.sh FOLDER [PART ...]}
shift
parts=${*:-tests overlap exact accuracy strategies heads needed study}
mkdir -p "$out"
export PYTHONPATH=src:tests PYTHONUNBUFFERED=1 TOKENIZERS_PARALLELISM=false
python=$([ -x .venv/bin/python ] && echo .venv/bin/python || echo python3)
cores=$(nproc --all)

for part in $parts; do
  case $part in
    tests) timeout 150 "$python" -m pytest -q tests/gpu ;;
    overlap) timeout 120 "$python" -m torch.distributed.run --nproc-per-node 2 benchmarks/ring_overlap.py --out "$out/ring_overlap.json" ;;
    exact) timeout 300 "$python" -m apb.cli.main bench prefill --random-weights llama-3.1-8b --ranks 2 --strategy full \
      --strategy ring --strategy ulysses --length 65536 --length 131072 --out "$out/exact_two_gpus.json" ;;
    accuracy) timeout 240 "$python" -m apb.training.needle.evaluate models/needle "$out/accuracy.json" cuda 200 ;;
    strategies) OMP_NUM_THREADS=1 timeout 300 "$python" benchmarks/needle_strategies.py --jobs $((cores - 4)) --shard 17 \
      --samples 204 --out "$out/needle_strategies.json" ;;
    heads)
      data=$(mktemp -d)
      OMP_NUM_THREADS=1 timeout 90 "$python" -m apb.training.heads.generated "$data/heads.jsonl" --jobs $((cores - 4))
      for hidden in 256 1024; do  # one GPU each
        CUDA_VISIBLE_DEVICES=$((hidden / 1024)) OMP_NUM_THREADS=4 timeout 400 "$python" -m apb.cli.main train heads \
          --data "$data/heads.jsonl" --hidden $hidden --out "$out/heads_$hidden.safetensors" 2> "$out/heads_$hidden.log" &
      done
      wait
      rm -r "$data" ;;
    needed | study)
      heads=${HEADS:-models/needle/heads.safetensors}
      OMP_NUM_THREADS=1 timeout 330 "$python" benchmarks/needle_compressors.py --jobs $((cores - 4)) --samples 204 \
        --part "$part" --heads "$heads" ${ONLY:+--only "$ONLY"} --out "$out/needle_compressors_$part.json" ;;
    *) echo "Unknown part $part; choose from: tests overlap exact accuracy strategies heads needed study." >&2; exit 2 ;;
  esac
done
