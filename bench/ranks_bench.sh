#!/usr/bin/env bash
# Two one-core ranks of routecast-train beside two one-core runs that know nothing of each other
# (goal P8: >= 90 %), and what of a step is spent on its data (P6: <= 1 %). The ranks share a global
# batch of 2 x BATCH windows, each of the two runs has BATCH: equal work a core. Rounds are
# interleaved, the side that begins changes; rates are those of the training steps alone
# (metrics.jsonl), without start, validation and scores. Nothing else should run on the two cores.
#
# Usage: bench/ranks_bench.sh STORE FOLDER FLAGS...
#   FOLDER: made anew, for the runs. FLAGS: more of routecast-train, e.g. --kind=interlayer
# Environment: ROUNDS (5), STEPS (200), BATCH (32), CORES (0,1)
set -euo pipefail
root=$(cd "$(dirname "$0")/.." && pwd)
store=$1 folder=$2
shift 2
rounds=${ROUNDS:-5} steps=${STEPS:-200} batch=${BATCH:-32} cores=${CORES:-0,1}
program=${ROUTECAST_BUILD:-$root/build}/bin/routecast-train
export OMP_NUM_THREADS=1 MKL_NUM_THREADS=1
export OMPI_ALLOW_RUN_AS_ROOT=1 OMPI_ALLOW_RUN_AS_ROOT_CONFIRM=1
rm -rf "$folder"
mkdir -p "$folder"

train() {  # train OUT BATCH FLAGS...
  local out=$1 global=$2
  shift 2
  exec "$program" --quiet --threads=1 --device=cpu --store="$store" --out="$folder/$out" \
    --resume=never --steps="$steps" --validate_every="$steps" --patience=0 \
    --micro_batch=16 --global_batch="$global" --validation_sequences=8 --test_sequences=8 "$@" \
    >/dev/null
}
ranks() {  # ranks ROUND FLAGS...
  local round=$1
  shift
  # mpirun numbers the cores that it may use from 0.
  export -f train
  export program store folder steps
  taskset -c "$cores" mpirun --quiet --bind-to core --map-by core \
    --mca btl self,vader --mca btl_vader_single_copy_mechanism none -n 2 \
    bash -c 'train "$@"' train "ranks-$round" $((2 * batch)) "$@"
}
alone() {  # alone ROUND FLAGS...
  local round=$1
  shift
  (taskset -pc "${cores%,*}" $BASHPID >/dev/null; train "first-$round" "$batch" "$@") &
  local first=$!
  (taskset -pc "${cores#*,}" $BASHPID >/dev/null; train "second-$round" "$batch" "$@" --seed=2)
  wait $first
}
for round in $(seq "$rounds"); do
  if [ $((round % 2)) = 1 ]; then ranks "$round" "$@"; alone "$round" "$@"
  else alone "$round" "$@"; ranks "$round" "$@"; fi
done

python3 - "$folder" "$rounds" "$steps" "$batch" "$*" <<'READ'
import json, os, statistics, sys

folder, rounds, steps, batch, flags = sys.argv[1:]
def lines(run):
    every = [json.loads(line) for line in open(f"{folder}/{run}/metrics.jsonl")]
    return [line for line in every if "samples_per_second" in line]
def rate(run):  # of all steps up to the last
    return lines(run)[-1]["samples_per_second"]
def wait(run):  # the first lines read the store
    every = [line["waiting_for_data"] for line in lines(run)]
    return 100 * statistics.mean(every[len(every) // 2:])
def spread(values, form):
    return f"{form} ({form}-{form})" % (statistics.median(values), min(values), max(values))
cpu = next(l.split(":")[1].strip() for l in open("/proc/cpuinfo") if l.startswith("model name"))
ratios, ranks, alone, waits = [], [], [], []
for r in range(1, int(rounds) + 1):
    runs = [f"{name}-{r}" for name in ("ranks", "first", "second")]
    ranks.append(rate(runs[0]))
    alone.append(rate(runs[1]) + rate(runs[2]))
    ratios.append(100 * ranks[-1] / alone[-1])
    waits += [wait(run) for run in runs]
print(f"{cpu}, {os.cpu_count()} cores; {rounds} rounds of {steps} steps, {batch} windows a core and "
      f"step, flags: {flags or '-'}")
print(f"two ranks: {spread(ranks, '%.1f')} windows/s; two runs: {spread(alone, '%.1f')}")
print(f"ranks beside runs: {spread(ratios, '%.1f')} %, goal 90 %")
print(f"of a step spent on its data: {spread(waits, '%.2f')} %, goal 1 %")
READ
