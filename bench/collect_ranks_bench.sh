#!/usr/bin/env bash
# Two one-core ranks of routecast-collect with one store beside two one-core jobs side by side, each
# with a store of its own and half of the documents (goal P2: >= 95 %). Rounds are interleaved, the
# side that begins changes. A rate is the tokens of a job over the time from the opened store to the
# finished one (spans/*.jsonl, the slowest rank's end): start-up and index are left out, waiting for
# the last chunks and finishing the store are not. Nothing else should run on the two cores.
#
# Usage: bench/collect_ranks_bench.sh TEXT FOLDER FLAGS...
#   TEXT: blocks between blank lines. FOLDER: made anew, for halves and stores. FLAGS: more of
#   routecast-collect, e.g. --model=configs/checkpoints/small-16 --task=encode
# Environment: ROUNDS (5), CORES (0,1), BLOCKS (0 = all; blocks of TEXT that are used)
set -euo pipefail
root=$(cd "$(dirname "$0")/.." && pwd)
text=$1 folder=$2
shift 2
rounds=${ROUNDS:-5} cores=${CORES:-0,1}
export OMP_NUM_THREADS=1 MKL_NUM_THREADS=1
rm -rf "$folder"
mkdir -p "$folder"
python3 - "$text" "$folder" "${BLOCKS:-0}" <<'HALVES'
import re, sys

text, folder, most = sys.argv[1:]
blocks = [b for b in re.split(r"\n\s*\n", open(text).read()) if b.strip()][:int(most) or None]
for half in (0, 1):
    open(f"{folder}/half-{half}.txt", "w").write("\n\n".join(blocks[half::2]) + "\n")
HALVES

collect() {  # collect RANKS STORE DATA... -- FLAGS...
  local ranks=$1 store=$2 data=()
  shift 2
  for (( ; $#; )); do
    [ "$1" != -- ] || { shift; break; }
    data+=("--data=text:$folder/$1#blocks")
    shift
  done
  taskset -c "$cores" "$root/launch/run_ranks.sh" -n "$ranks" routecast-collect --quiet \
    --threads=1 --device=cpu --store="$folder/$store" --cache="$folder/index" "${data[@]}" "$@"
}
ranks() {  # ranks ROUND FLAGS...
  local round=$1
  shift
  collect 2 "ranks-$round" half-0.txt half-1.txt -- "$@"
}
alone() {  # alone ROUND FLAGS...
  local round=$1
  shift
  collect 1 "first-$round" half-0.txt -- "$@" &
  local first=$!
  collect 1 "second-$round" half-1.txt -- "$@"
  wait $first
}
for round in $(seq "$rounds"); do
  if [ $((round % 2)) = 1 ]; then ranks "$round" "$@"; alone "$round" "$@"
  else alone "$round" "$@"; ranks "$round" "$@"; fi
done

python3 - "$folder" "$rounds" "$*" <<'READ'
import glob, json, os, statistics, sys

folder, rounds, flags = sys.argv[1:]
def measured(store):  # tokens, seconds
    ranks = [[json.loads(line) for line in open(path)]
             for path in glob.glob(f"{folder}/{store}/spans/*.jsonl")]
    begin = max(s["time"] for spans in ranks for s in spans if s["span"] == "open")
    end = max(s["time"] for spans in ranks for s in spans)
    tokens = sum(s["tokens"] for spans in ranks for s in spans if s["span"] == "chunk")
    return tokens, end - begin
def padding(store):
    return 100 * json.load(open(f"{folder}/{store}/run.json"))["results"]["padding_share"]
def spread(values, form):
    return f"{form} ({form}-{form})" % (statistics.median(values), min(values), max(values))
cpu = next(l.split(":")[1].strip() for l in open("/proc/cpuinfo") if l.startswith("model name"))
ranks, alone, ratios = [], [], []
for r in range(1, int(rounds) + 1):
    together = measured(f"ranks-{r}")
    two = [measured(f"{name}-{r}") for name in ("first", "second")]
    ranks.append(together[0] / together[1])
    alone.append(sum(tokens / seconds for tokens, seconds in two))
    ratios.append(100 * ranks[-1] / alone[-1])
print(f"{cpu}, {os.cpu_count()} cores; {rounds} rounds, {together[0]} tokens in {together[1]:.0f} s "
      f"(the two jobs: {two[0][0]} + {two[1][0]} in {two[0][1]:.0f} and {two[1][1]:.0f} s), "
      f"flags: {flags or '-'}")
print(f"two ranks: {spread(ranks, '%.0f')} tokens/s; two jobs: {spread(alone, '%.0f')}")
print(f"ranks beside jobs: {spread(ratios, '%.1f')} %, goal 95 %")
print(f"padding of the ranks' job: {padding('ranks-1'):.1f} %, goal at most 5 %")
READ
