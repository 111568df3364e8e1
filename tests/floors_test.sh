#!/usr/bin/env bash
# A room may include only rooms on lower floors (docs/architecture.md). Scans every #include and
# prints each one that breaks the rule. `--self-test` proves that the check can fail.
set -euo pipefail
root=${ROUTECAST_SOURCE_DIR:-$(cd "$(dirname "$0")/.." && pwd)}
declare -A floor=([common]=0 [corpus]=1 [report]=1 [storage]=1 [models]=1 [comm]=1
                  [collector]=2 [trainer]=2 [evaluator]=2 [launch]=3 [bench]=3)

scan() {  # scan ROOT: prints violations
  local top=$1 room file line target
  for room in "${!floor[@]}"; do
    [ -d "$top/$room" ] || continue
    while IFS=: read -r file line target; do
      [ -n "${floor[$target]:-}" ] || continue
      [ "$target" = "$room" ] && continue
      if [ "${floor[$target]}" -ge "${floor[$room]}" ]; then
        echo "$file:$line: $room (floor ${floor[$room]}) includes $target (floor ${floor[$target]})"
      fi
    done < <(grep -RnoP --include=*.h --include=*.cc --include=*.cu --include=*.cuh \
               '^\s*#\s*include\s*"\K[a-z_]+(?=/)' "$top/$room" || true)
  done
  # Rooms that must build without LibTorch, MPI or gflags.
  for room in common corpus report storage; do
    [ -d "$top/$room" ] || continue
    grep -RnE --include=*.h --include=*.cc '#include [<"](torch|ATen|c10|mpi|nccl|gflags)[/.]' \
      "$top/$room" | sed 's/$/  (this room builds without it)/' || true
  done
  [ -d "$top/evaluator" ] && { grep -RnE --include=*.h --include=*.cc --include=*.cu \
    '#include [<"](mpi|nccl)[/.]' "$top/evaluator" | sed 's/$/  (evaluator links no MPI)/' || true; }
  for room in "${!floor[@]}"; do
    [ "$room" = launch ] || [ "$room" = bench ] || [ ! -d "$top/$room" ] ||
      grep -RnE --include=*.h --include=*.cc '#include [<"]gflags/' "$top/$room" \
        | sed 's/$/  (only launch\/ knows gflags)/' || true
  done
  # Without OpenMP in the compiler at::parallel_for runs on one thread.
  for room in "${!floor[@]}"; do
    [ -d "$top/$room" ] || continue
    for file in $(grep -RlF --include=*.h --include=*.cc 'at::parallel_for(' "$top/$room" || true); do
      grep -qE "routecast_parallel_sources\(.*\b$(basename "$file")\b" "$top/$room/CMakeLists.txt" 2>/dev/null ||
        echo "$file: at::parallel_for(  (list it in routecast_parallel_sources)"
    done
  done
}

# The check itself must be able to fail.
bad=$(mktemp -d)
trap 'rm -rf "$bad"' EXIT
mkdir -p "$bad/models" "$bad/storage"
echo '#include "storage/x.h"' > "$bad/models/a.cc"
echo '#include <torch/torch.h>' > "$bad/storage/b.cc"
echo 'at::parallel_for(0, n, 1, work);' > "$bad/models/c.cc"
[ "$(scan "$bad" | wc -l)" -eq 3 ] || { echo "floors_test does not see a violation"; exit 1; }

found=$(scan "$root")
if [ -n "$found" ]; then echo "$found"; exit 1; fi
echo "floors: no violation"
