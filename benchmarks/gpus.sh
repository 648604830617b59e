#!/usr/bin/env bash
# The figures that need GPUs. Usage: benchmarks/gpus.sh FOLDER PART ...
#   tests       the tests that need a GPU, or two                                      about 370 s
#   sanitize    every kernel on small shapes under compute-sanitizer and Triton's checker about 200 s
#   attention   every attention kernel on APB's shapes, with its error                 about 60 s
#   small       selection by torch and by the kernels, decode, a cache in fp8          about 40 s
#   prefill     full (torch's kernels) and apb, Llama-3.1-8B shape, 64K, 128K and 256K about 230 s
#   decode      decode after 32K and 128K tokens, with and without CUDA graphs         about 60 s
#   decode_two  two GPUs: decode after 128K tokens, weights shared, and the sequence   about 150 s
#   sessions    1, 4 and 16 texts of 32K tokens decoded at once, in turns and in one pass about 120 s
#   overlap     two GPUs: overlap of sends and attention in ring attention             about 40 s
#   exact       two GPUs: full, ring and ulysses, Llama-3.1-8B shape, 64K and 128K     about 180 s
#   tensor      two GPUs: sequence parallel and tensor parallel, Qwen2.5-14B shape, 64K about 150 s
#   accuracy    the shipped model with full attention, 200 samples a cell              about 120 s on two
#   strategies  the shipped model with every strategy and compressor, 204 samples      about 190 s on two
#   report      every answer of the shipped model at 4K, 16K and 32K, 102 samples      about 290 s on two
#   heads       retaining heads of the shipped model: data, 3000 steps of two widths
#   needed      every compressor at 32K on every kind of question, 204 samples from SEED on
#   study       compressors, lengths, blocks, anchors, late questions, 204 samples; ONLY=regex for some cells
set -u
cd "$(dirname "$0")/.."
out=${1:?usage: benchmarks/gpus.sh FOLDER PART ...}
shift
[ $# -gt 0 ] || { echo "Name at least one part; benchmarks/gpus.sh begins with their list." >&2; exit 2; }
mkdir -p "$out"
export PYTHONPATH=src:tests PYTHONUNBUFFERED=1 TOKENIZERS_PARALLELISM=false
python=$([ -x .venv/bin/python ] && echo .venv/bin/python || echo python3)
cores=$(nproc --all)
gpus=$(nvidia-smi --list-gpus | wc -l)

bench() { "$python" -m apb.cli.main bench "$@"; }

for part; do
  case $part in
    tests) timeout 600 "$python" -m pytest -q tests/gpu ;;
    sanitize)
      hopper="hopper64 hopper128 hopper256" others="portable64 portable128 portable256 decode cached matvec selection"
      check() {  # NAME COMMAND ...: its output in NAME.txt, its exit status and last line here
        timeout 240 "${@:2}" > "$out/$1.txt" 2>&1
        echo "$1: exit status $?; $(tail -n 1 "$out/$1.txt")"
      }
      # Version 2025.3 reports Triton's warp specialization as a race; the package nvidia-cuda-sanitizer-api has later
      # versions.
      sanitizer=${COMPUTE_SANITIZER:-compute-sanitizer}
      "$sanitizer" --version | tail -n 1
      memory="env PYTORCH_NO_CUDA_MEMORY_CACHING=1 $sanitizer --error-exitcode 1 --tool"
      check racecheck $memory racecheck "$python" tests/gpu/small_shapes.py $hopper $others
      # A correct control, which must pass, and a careless one, which racecheck passes too, as it does not track TMA's
      # writes.
      check racecheck_control $memory racecheck "$python" tests/gpu/hand_over.py
      check racecheck_careless $memory racecheck "$python" tests/gpu/hand_over.py careless
      check memcheck $memory memcheck "$python" tests/gpu/small_shapes.py $hopper $others tiles &
      check initcheck $memory initcheck "$python" tests/gpu/small_shapes.py $hopper $others &
      check synccheck $memory synccheck "$python" tests/gpu/small_shapes.py $hopper $others &
      # Triton's own checker does track them; of its controls the last one must fail.
      triton="env TRITON_INSTRUMENTATION_MODE=consan TRITON_CACHE_DIR=$(mktemp -d)"
      for name in $hopper; do check "consan_$name" $triton "$python" tests/gpu/small_shapes.py $name & done
      check consan_control $triton "$python" tests/gpu/hand_over.py &
      check consan_careless $triton "$python" tests/gpu/hand_over.py careless &
      wait ;;
    attention) bench attention --out "$out/attention_h200.json" ;;
    small) timeout 120 "$python" benchmarks/small_kernels.py --out "$out/small_kernels_h200.json" ;;
    prefill)  # blocks of 16K
      for length in 65536 131072 262144; do
        bench prefill --random-weights llama-3.1-8b --strategy full --strategy apb --length $length --blocks $((length / 16384)) \
          --baseline-backend torch --repeat 2 --max-seconds 120 --out "$out/prefill_${length}_h200.json"
      done ;;
    decode) bench decode --random-weights llama-3.1-8b --length 32768 --length 131072 --out "$out/decode_h200.json" ;;
    decode_two)
      bench decode --random-weights llama-3.1-8b --length 131072 --ranks 1 --tensor-parallel 2 \
        --out "$out/decode_tensor_parallel_two_gpus.json"
      bench decode --random-weights llama-3.1-8b --length 131072 --ranks 2 --out "$out/decode_sequence_parallel_two_gpus.json" ;;
    sessions) bench decode --random-weights llama-3.1-8b --length 32768 --sessions 1 --sessions 4 --sessions 16 \
      --out "$out/decode_sessions_h200.json" ;;
    overlap) timeout 120 "$python" -m torch.distributed.run --nproc-per-node 2 benchmarks/ring_overlap.py --out "$out/ring_overlap.json" ;;
    exact) bench prefill --random-weights llama-3.1-8b --ranks 2 --strategy full \
      --strategy ring --strategy ulysses --length 65536 --length 131072 --out "$out/exact_two_gpus.json" ;;
    tensor)
      bench prefill --random-weights qwen2.5-14b --length 65536 --ranks 2 --strategy ring --strategy apb --repeat 2 \
        --out "$out/sequence_parallel_two_gpus.json"
      bench prefill --random-weights qwen2.5-14b --length 65536 --ranks 1 --tensor-parallel 2 --strategy full \
        --strategy apb --repeat 2 --out "$out/tensor_parallel_two_gpus.json" ;;
    accuracy) timeout 240 "$python" -m apb.training.needle.evaluate models/needle "$out/accuracy.json" cuda 200 ;;
    strategies) OMP_NUM_THREADS=1 timeout 300 "$python" benchmarks/needle_strategies.py --jobs $((cores - 4)) --shard 17 \
      --samples 204 --out "$out/needle_strategies.json" ;;
    report) OMP_NUM_THREADS=1 timeout 400 "$python" benchmarks/needle_records.py --jobs $((cores - 4)) --seconds 240 \
      --out "$out/needle_records.jsonl" ;;
    heads)
      data=$(mktemp -d)
      OMP_NUM_THREADS=1 timeout 90 "$python" -m apb.training.heads.generated "$data/heads.jsonl" --jobs $((cores - 4))
      for hidden in 256 1024; do  # one GPU each, if there are two
        CUDA_VISIBLE_DEVICES=$((hidden / 1024 % gpus)) OMP_NUM_THREADS=4 timeout 400 "$python" -m apb.cli.main train heads \
          --data "$data/heads.jsonl" --hidden $hidden --out "$out/heads_$hidden.safetensors" 2> "$out/heads_$hidden.log" &
      done
      wait
      rm -r "$data" ;;
    needed | study)
      heads=${HEADS:-models/needle/heads.safetensors}
      OMP_NUM_THREADS=1 timeout 330 "$python" benchmarks/needle_compressors.py --jobs $((cores - 4)) --samples 204 \
        --part "$part" --heads "$heads" ${ONLY:+--only "$ONLY"} ${SEED:+--seed "$SEED"} --out "$out/needle_compressors_$part.json" ;;
    *) echo "Unknown part $part; benchmarks/gpus.sh begins with their list." >&2; exit 2 ;;
  esac
done
