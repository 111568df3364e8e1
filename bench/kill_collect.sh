#!/usr/bin/env bash
# Kills routecast-collect at random moments with random numbers of ranks, finishes it, and holds
# the export against that of a run nobody disturbed. Prints the kills and ends with 1 where the
# exports differ.
#
# Usage: bench/kill_collect.sh KILLS FOLDER FLAGS...
#   FLAGS: those of routecast-collect without --store; give --threads. FOLDER: for the stores.
# Environment: ROUTECAST_BIN_DIR (default build/bin), KILL_MAX_MS (latest moment, default 6000),
# KILL_SEED.
set -euo pipefail
kills=$1 folder=$2
shift 2
bin=${ROUTECAST_BIN_DIR:-$(cd "$(dirname "$0")/.." && pwd)/build/bin}
max_ms=${KILL_MAX_MS:-6000}
RANDOM=${KILL_SEED:-1}
export OMP_NUM_THREADS=1 MKL_NUM_THREADS=1
mpi=(mpirun --quiet --bind-to none --oversubscribe --mca btl self,vader
     --mca btl_vader_single_copy_mechanism none)
[ "$(id -u)" -ne 0 ] || mpi+=(--allow-run-as-root)
mkdir -p "$folder"
rm -rf "$folder/whole" "$folder/killed" "$folder"/export-*

collect() {  # collect RANKS STORE FLAGS...
  local ranks=$1 store=$2
  shift 2
  "${mpi[@]}" -n "$ranks" "$bin/routecast-collect" --quiet --store="$store" \
    --cache="$folder/corpus" "$@"
}
chunks() { "$bin/routecast-trace" info --store="$1" 2>/dev/null | awk '/^chunks/ {print $2 "/" $4 + 0}'; }

collect 1 "$folder/whole" "$@"
died=0 ended=0
while [ "$died" -lt "$kills" ]; do
  ranks=$((RANDOM % 3 + 1))
  (mpi=(exec "${mpi[@]}"); collect "$ranks" "$folder/killed" "$@") >"$folder/log" 2>&1 &
  job=$!
  at=$((RANDOM % max_ms + 50))
  sleep "$(printf '%d.%03d' $((at / 1000)) $((at % 1000)))"
  # One rank, all of them, or mpirun itself: a crash of a process, of a host, of the launcher.
  victims=$(pgrep -P "$job" || true)
  case $((RANDOM % 3)) in
    0) victims=${victims%%$'\n'*} ;;
    1) victims=$job ;;
  esac
  # shellcheck disable=SC2086  # a list of process ids
  [ -z "$victims" ] || kill -9 $victims 2>/dev/null || true
  if wait "$job"; then
    ended=$((ended + 1))
    rm -rf "$folder/killed"  # it finished first: begin again
    continue
  fi
  died=$((died + 1))
  echo "kill $died: $ranks ranks after $at ms, chunks $(chunks "$folder/killed" || echo none)"
done
collect 2 "$folder/killed" "$@"
for store in whole killed; do
  "$bin/routecast-trace" verify --store="$folder/$store"
  "$bin/routecast-trace" export --quiet --store="$folder/$store" --out="$folder/export-$store"
done
cmp "$folder/export-whole/traces.npz" "$folder/export-killed/traces.npz"
echo "$died kills, $ended runs that ended first, exports equal"
