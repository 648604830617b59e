#!/usr/bin/env bash
# The figures that need two GPUs, in one call of under ten minutes: tests, accuracy by strategy, the exact baselines.
# Usage: benchmarks/two_gpus.sh [FOLDER FOR THE RESULTS]
set -u
cd "$(dirname "$0")/.."
out=${1:-benchmarks/results}
mkdir -p "$out"
export PYTHONPATH=src:tests PYTHONUNBUFFERED=1 TOKENIZERS_PARALLELISM=false
python=$([ -x .venv/bin/python ] && echo .venv/bin/python || echo python3)
cores=$(nproc --all)

timeout 100 "$python" -m pytest -q tests/gpu
timeout 120 "$python" -m torch.distributed.run --nproc-per-node 2 benchmarks/ring_overlap.py --out "$out/ring_overlap.json"
timeout 240 "$python" -m apb.cli.main bench prefill --random-weights llama-3.1-8b --ranks 2 \
  --strategy full --strategy ring --strategy ulysses --length 65536 --length 131072 --out "$out/exact_two_gpus.json"
OMP_NUM_THREADS=1 timeout 240 "$python" benchmarks/needle_strategies.py --jobs $((cores - 4)) --shard 17 --samples 204 \
  --out "$out/needle_strategies.json"
