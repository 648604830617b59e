#!/usr/bin/env bash
# The paper's comparison (its tables 14, 16 and 18) on all GPUs of this machine, in under 10 minutes.
#
# Usage: benchmarks/paper_table.sh FOLDER [RANKS]     RANKS: by default the number of GPUs
# Writes FOLDER/paper_<part>_<RANKS>gpu.json as it goes, and at the end, from all of these, paper_<RANKS>gpu.md, its
# plots, and one page of the same, paper_<RANKS>gpu.html. Cases that do not fit in memory or in the time are left out
# with a sentence. The parts, the most informative first:
#   short   32K, 64K, 128K by all strategies
#   long    256K, 512K by those that share the prompt
#   decode  decode after 32K and 128K tokens
#   blocks  apb with four times as many blocks, 128K to 512K
#   layer   one layer of full attention at 256K and 512K, where all layers take too long
#   1m      1M by apb, star and ring
#
# Environment: PARTS="layer 1m" (only these parts, for instance those that an earlier call had no time for), LIMIT=120
# (seconds for all parts), MODEL=models/needle (a checkpoint instead of Llama-3.1-8B's shape with random weights),
# DIVIDE=64 (divides all lengths). Without a GPU: MODEL=models/needle DIVIDE=64 benchmarks/paper_table.sh FOLDER 2
set -u
trap 'exit 130' INT
cd "$(dirname "$0")/.." || exit 1
out=${1:?usage: benchmarks/paper_table.sh FOLDER [RANKS]}
mkdir -p "$out" || exit 2
export PYTHONPATH=src PYTHONUNBUFFERED=1 TOKENIZERS_PARALLELISM=false
python=${PYTHON:-$([ -x .venv/bin/python ] && echo .venv/bin/python || echo python3)}
ranks=${2:-$("$python" -c 'import torch; print(torch.cuda.device_count())')}
[[ $ranks =~ ^[1-9][0-9]*$ ]] || {
  echo "There are '$ranks' GPUs to run on; without any, say how many ranks: benchmarks/paper_table.sh FOLDER 2" >&2
  exit 2
}
every="short long decode blocks layer 1m"
parts=${PARTS:-$every}
for name in $parts; do
  [[ " $every " == *" $name "* ]] || { echo "Unknown part $name; choose of: $every." >&2; exit 2; }
done
divide=${DIVIDE:-1}
limit=${LIMIT:-570}
model=(--random-weights llama-3.1-8b)
[ -z "${MODEL:-}" ] || model=(--model "$MODEL")

# The paper's eight blocks; the plan's default anchor and passing lengths are then those of the paper's table 8.
blocks=$((ranks > 8 ? ranks : 8))
# More blocks mean less attention, and early and late blocks on every rank. Not below 4K, the paper's shortest.
more=$((4 * blocks))
sharing=(--strategy apb --strategy star --strategy ring --strategy ulysses)
if [ "$ranks" = 1 ]; then
  sharing=(--strategy apb --strategy star)
  echo "On one rank ring and ulysses are full attention: left out." >&2
fi
# Seconds allowed per strategy and length: few ranks take longer, and measure less in the same time.
patience=$((ranks > 7 ? 40 : ranks > 1 ? 70 : 100))

# part NAME MOST LEAST LENGTHS COMMAND OPTION...: one call of apb bench of at most MOST seconds, if LEAST are left.
part() {
  local name=$1 most=$2 least=$3 file="$out/paper_$1_${ranks}gpu.json" left=$((limit - 20 - SECONDS)) status length
  local lengths=() wanted=$4 command=$5
  shift 5
  [[ " $parts " == *" $name "* ]] || return
  rm -f "$file"
  [ -n "$wanted" ] || { echo "Part $name: left out, its blocks would be shorter than 4K." >&2; return; }
  [ "$left" -ge "$least" ] || { echo "Part $name: left out, $left seconds are left for it." >&2; return; }
  for length in $wanted; do lengths+=(--length $((length / divide))); done
  # An interrupt rather than a kill, so that apb ends the processes that it started.
  timeout --foreground --signal INT --kill-after 20 $((left < most ? left : most)) \
    "$python" -m apb.cli.main bench "$command" "${lengths[@]}" "${model[@]}" "$@" --out "$file"
  status=$?
  [ "$status" = 0 ] || echo "Part $name: stopped (status $status); what it had measured is in its file." >&2
  rm -f "${file%.json}"_*.svg  # replaced by plots of all parts
}

several=(--ranks "$ranks" --blocks $blocks)
part short 220 30 "32768 65536 131072" prefill --strategy full "${sharing[@]}" "${several[@]}" --max-seconds 30
part long 300 60 "262144 524288" prefill "${sharing[@]}" "${several[@]}" --repeat 1 --max-seconds $patience
part decode 60 30 "32768 131072" decode "${several[@]}"
long=""
for length in 131072 262144 524288; do
  [ $((length / more)) -lt 4096 ] || long+=" $length"
done
part blocks 120 40 "$long" prefill --strategy apb --ranks "$ranks" --blocks $more --repeat 1 --max-seconds $patience
if [ -z "${MODEL:-}" ]; then
  part layer 60 40 "262144 524288" prefill --strategy full --layers 1 --ranks 1 --repeat 1 --max-seconds 20
else
  echo "Part layer: left out, a checkpoint has all its layers." >&2
fi
# The paper's anchor and passing lengths at 1M (its figure 1).
part 1m 300 60 1048576 prefill "${sharing[@]:0:6}" "${several[@]}" \
  --anchor-length $((4096 / divide)) --passing-length $((2048 / divide)) --repeat 1 --max-seconds 150

shopt -s nullglob
results=("$out"/paper_*_"${ranks}gpu.json")
[ ${#results[@]} -gt 0 ] || { echo "Nothing was measured." >&2; exit 1; }
report=("$python" -m apb.cli.main report "${results[@]}" --out)
"${report[@]}" "$out/paper_${ranks}gpu.md" || exit 1
"${report[@]}" "$out/paper_${ranks}gpu.html" || echo "No page, but the tables as Markdown." >&2
echo "paper_table.sh: $SECONDS seconds; the tables are in $out/paper_${ranks}gpu.md" >&2
