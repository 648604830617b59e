#!/usr/bin/env bash
# The paper's comparison (its tables 14, 16 and 18) on this machine's GPUs, however many there are, in under 10 minutes.
# Usage: benchmarks/paper_table.sh FOLDER [GPUS]; writes FOLDER/paper_<part>_<GPUS>gpu.json and prints the tables.
# What does not fit in memory, or into the seconds allowed for it, is left out with a sentence.
set -u
cd "$(dirname "$0")/.."
out=${1:?usage: benchmarks/paper_table.sh FOLDER [GPUS]}
mkdir -p "$out"
export PYTHONPATH=src PYTHONUNBUFFERED=1 TOKENIZERS_PARALLELISM=false
python=$([ -x .venv/bin/python ] && echo .venv/bin/python || echo python3)
gpus=${2:-$("$python" -c 'import torch; print(torch.cuda.device_count())')}
[ "$gpus" -ge 1 ] || { echo "paper_table.sh needs a GPU, and torch sees none." >&2; exit 2; }
blocks=$((gpus > 8 ? gpus : 8))
bench() { "$python" -m apb.cli.main bench "$@" --random-weights llama-3.1-8b --ranks "$gpus"; }

# The paper's eight blocks, anchor and passing lengths (table 8), for every length; full attention is one GPU's.
while read -r length anchor passing seconds; do
  timeout 200 bash -c "$(declare -f bench); python='$python' gpus=$gpus; bench prefill --length $length --strategy full \
    --strategy ulysses --strategy ring --strategy star --strategy apb --blocks $blocks --anchor-length $anchor \
    --passing-length $passing --repeat 3 --max-seconds $seconds --out '$out/paper_${length}_${gpus}gpu.json'" ||
    echo "The part for $length tokens was stopped or failed; what was measured until then is in its file." >&2
done <<'LENGTHS'
32768 1024 512 8
65536 2048 1024 12
131072 4096 2048 25
262144 8192 4096 30
524288 8192 8192 40
1048576 4096 2048 60
LENGTHS
timeout 60 bash -c "$(declare -f bench); python='$python' gpus=$gpus; bench decode --length 32768 --length 131072 \
  --out '$out/paper_decode_${gpus}gpu.json'" || echo "The part for decode was stopped or failed." >&2
