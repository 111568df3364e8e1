#!/usr/bin/env bash
# Does the memory of routecast-collect stay flat? Collects with RANKS for MINUTES (give enough
# text) and reads each rank's memory from the store's spans: the most in the second quarter of the
# time against the most in the last. Ends with 1 where a rank grew by more than 2 %.
#
# Usage: bench/memory_flat.sh RANKS MINUTES FOLDER FLAGS...
#   FLAGS: those of routecast-collect without --store. FOLDER: made anew, for the store.
set -euo pipefail
root=$(cd "$(dirname "$0")/.." && pwd)
ranks=$1 minutes=$2 folder=$3
shift 3
rm -rf "$folder"
mkdir -p "$folder"
code=0
"$root/launch/run_ranks.sh" -n "$ranks" routecast-collect --quiet --store="$folder/store" \
  --max_hours="$(awk "BEGIN {print $minutes / 60}")" "$@" || code=$?
case $code in 0 | 75) ;; *) exit "$code" ;; esac
python3 - "$folder"/store/spans/*.jsonl <<'READ'
import json, sys

grown = False
for path in sys.argv[1:]:
    spans = [json.loads(line) for line in open(path)]
    chunks = [s for s in spans if s["span"] == "chunk"]
    begin, end = chunks[0]["time"], chunks[-1]["time"]
    def most(first, last):
        return max(s["anonymous_bytes"] for s in chunks
                   if first <= (s["time"] - begin) / (end - begin) <= last)
    early, late = most(0.25, 0.5), most(0.75, 1)
    grown |= late > 1.02 * early
    print(f"{path.rsplit('/', 1)[1]}: {len(chunks)} chunks in {end - begin:.0f} s, "
          f"{early / 2**20:.1f} MiB in the second quarter, {late / 2**20:.1f} MiB in the last "
          f"({100 * (late / early - 1):+.2f} %)")
sys.exit(grown)
READ
