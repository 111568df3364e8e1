#!/usr/bin/env bash
# A full disk under a store, a real one: a small file system in memory, in a mount namespace of
# our own. The dry run says it before anything is computed; the job ends by name, and goes on to
# the same end once there is room.
set -uo pipefail
if [ -z "${FULL_DISK_NAMESPACE:-}" ]; then
  unshare -rm true 2>/dev/null || { echo "no mount namespaces here: skipped"; exit 77; }
  FULL_DISK_NAMESPACE=1 exec unshare -rm "$0"
fi
folder=$(mktemp -d)
trap 'umount "$folder/disk"; rm -rf "$folder"' EXIT
failed=0
fail() { echo "FAILED $*"; failed=1; }

mkdir "$folder/disk"
mount -t tmpfs -o size=160m tmpfs "$folder/disk" || { echo "no tmpfs here: skipped"; exit 77; }
for i in $(seq 3000); do
  echo "Sentence $i tells of a river with $((i * 7 % 1001)) bridges, and of the towns beside it."
  echo
done >"$folder/text"
collect=("$ROUTECAST_BIN_DIR/routecast-collect" --quiet --record="ids,probs,hidden" --hidden_share=1
  --model="$ROUTECAST_SOURCE_DIR/configs/checkpoints/small-16" --data=text:"$folder/text#blocks"
  --cache="$folder/cache" --max_length=24 --num_shards=2)
export OMP_NUM_THREADS=1
# ends CODE TEXT COMMAND...
ends() {
  local code=$1 text=$2 got
  shift 2
  "$@" >"$folder/out" 2>"$folder/error"
  got=$?
  [ "$got" -eq "$code" ] || fail "$*: exit $got, expected $code: $(cat "$folder/error")"
  # No pipe: grep ends at its first match, and who writes into it then fails.
  grep -qE -- "$text" "$folder/error" "$folder/out" || [ -z "$text" ] || fail "$*: does not say '$text': $(cat "$folder/error")"
  [ "$(wc -l <"$folder/error")" -le 3 ] || fail "$*: more than three lines: $(cat "$folder/error")"
}
store=$folder/disk/store
fill() { head -c "$1" /dev/zero >"$folder/disk/ballast" 2>/dev/null; }

fill 150M
ends 4 "no room .*|are needed" "${collect[@]}" --store="$store" --dry_run
[ ! -e "$store" ] || fail "the dry run made $store"
rm "$folder/disk/ballast"

# Of one document all is recorded, whatever share is asked for.
fill 140M
tr -s '\n' <"$folder/text" >"$folder/one"
one=("${collect[@]/#--data=*/--data=text:$folder/one}" --hidden_share=.1 --store="$store")
ends 4 "no room .*|are needed" "${one[@]}" --dry_run
ends 4 "are needed" "${one[@]}"
rm -r "$folder/disk/ballast" "$store"

# A store that was begun.
ends 75 "start the same command" "${collect[@]}" --store="$store" --max_hours=1e-9
fill 160M
ends 4 "are needed" "${collect[@]}" --store="$store" --dry_run
ends 4 "space|room" "${collect[@]}" --store="$store"
rm "$folder/disk/ballast"
ends 0 "" "${collect[@]}" --store="$store"
ends 0 "" "$ROUTECAST_BIN_DIR/routecast-trace" verify --quiet --store="$store"

# What a verb would write is a guess: lack of room is said, and refuses nothing.
fill 160M
ends 0 "there may be no room for" "$ROUTECAST_BIN_DIR/routecast-trace" export --dry_run \
  --store="$store" --out="$folder/disk/out"
exit $failed
