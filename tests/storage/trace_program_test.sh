#!/usr/bin/env bash
# The verbs of routecast-trace as people type them: what they make, and what they refuse.
set -uo pipefail
trace=$ROUTECAST_BIN_DIR/routecast-trace
[ -x "$trace" ] || { echo "routecast-trace is not built"; exit 77; }
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
cd "$folder" || exit 1
failed=0
fail() { echo "FAILED $*"; failed=1; }
# expect CODE ARGUMENTS...: the exit code; output in `log`.
expect() {
  local wanted=$1
  shift
  "$trace" "$@" >log 2>&1
  local code=$?
  [ "$code" -eq "$wanted" ] || fail "routecast-trace $*: exit $code, not $wanted: $(cat log)"
}
says() { grep -q -- "$1" log || fail "\"$1\" is not said: $(cat log)"; }

for i in 1 2 3 4 5 6 7 8 9 10 11 12; do echo "{\"routing\": [[[0,$i],[2,1]],[[$i,0],[3,2]]]}"; done >a.jsonl
echo '{"routing": [[[12,1],[2,1]]]}' >b.jsonl

expect 0 import --format=jsonl --in=a.jsonl --out=a --model=m
says "12 sequences, 24 tokens, 2 layers of 13 experts, 2 a token"
grep -q '"exit_status": 0' a/run.json || fail "import leaves no run.json"
expect 0 import --format=jsonl --in=b.jsonl --out=b --model=m
expect 0 info --store=a
says "12 of\|12: "
expect 0 verify --store=a
expect 0 stats --store=a --out=stats
says "^decoder .* -  *-$"  # neither drops nor probabilities were recorded
grep -q '"slot_load"' stats/stats.json || fail "stats say nothing of slots"
[ "$(awk -F, 'NR > 1 { n += $3 } END { print n }' stats/slot_load.csv)" -eq 96 ] ||
  fail "slot_load.csv: not 24 tokens x 2 layers x 2 experts"
grep -q "<p>Model m. All parts of the split are counted: " stats/report.html ||
  fail "the page does not name its model"
grep -q '"nmi_previous"' stats/stats.json || fail "stats say nothing of information"
[ "$(head -1 stats/transitions.csv)" = layer_id,previous_expert_id,expert_id,count ] ||
  fail "no transitions"
grep -q "<h2>Journeys" stats/report.html || fail "no page of the statistics"
expect 0 export --store=a --out=exported
expect 0 import --in=exported/traces.npz --out=again
expect 0 export --store=again --out=exported2
cmp -s exported/traces.npz exported2/traces.npz || fail "an export does not come back"

# A store to which a second chunk is still to come.
cp -r a part && rm part/shards/*.seal
sed -i 's/"num_chunks": 1/"num_chunks": 2/' part/store.json
for verb in export stats; do
  expect 0 $verb --store=part --out=of_part
  says "part is unfinished: 1 of 2 chunks are in it"
  expect 0 $verb --store=a --out=of_a
  grep -q unfinished log && fail "$verb of a whole store: $(cat log)"
done

expect 2 info --store=a --layers=3
says "--layers is of routecast-trace import"
expect 2 verify --store=a --format=csv --share=0.3
expect 2 stats --store=a --out=stats --compression=zstd
expect 2 import --format=jsonl --in=a.jsonl --store=a --out=other

expect 2 merge --store=a --store=b --out=c
says "--renumber"
expect 0 merge --store=a --store=b --out=c --renumber
says "13 sequences; 0 were in several stores"
expect 0 merge --store=a --store=a --out=d
says "12 sequences; 12 were in several stores"
expect 0 subset --store=a --share=0.5 --seed=3 --out=half
expect 0 verify --store=half
expect 2 subset --store=a --share=0.000001 --out=nothing
says "larger --share"

cp -r a damaged
rm damaged/shards/00000/CURRENT
expect 3 verify --store=damaged
says "damaged/shards/00000"
says "sound: 12 sequences"
expect 0 salvage --store=damaged --out=salvaged
says "12 sequences; lost: 0 sequences, 0 chunks"
expect 0 verify --store=salvaged
says ", sealed"
expect 0 export --store=salvaged --out=exported3
cmp -s exported/traces.npz exported3/traces.npz || fail "a salvaged store differs"

expect 2 merge --store=a --out=d
says "is there already"
expect 2 stats --store=a --store=b --out=stats
says "takes one store"
expect 2 import --format=jsonl --out=e
says "--in is missing"
expect 2 import --format=jsonl --in=nowhere --out=e
says "does not exist"
expect 2 import --format=jsons --in=a.jsonl --out=e
says "jsonl"
echo '{"routing": [[[0,0]]]}' >bad.jsonl
expect 3 import --format=jsonl --in=bad.jsonl --out=e
says "bad.jsonl: line 1"
[ "$(ls -A e)" = run.json ] || fail "a refused import leaves $(ls -A e)"
grep -q '"exit_status": 3' e/run.json || fail "a refused import does not say how it ended"
expect 2 info --store=e
says "routecast-trace import wrote its run.json and made no store there"
expect 2 info --store=a/store.json
says "give its folder: --store=a$"
(cd a && "$trace" info --store=store.json >../log 2>&1)
says "give its folder: --store=.$"
expect 2 export --store=a --out=exported --format=parquet
says "use one of these"
expect 0 import --format=jsonl --in=b.jsonl --out=e
grep -q '"exit_status": 0' e/run.json || fail "an import after a refused one: $(cat e/run.json)"
expect 0 verify --store=e
for verb in "merge --store=a" "subset --store=a" "import --in=a.jsonl --format=jsonl"; do
  # shellcheck disable=SC2086
  expect 0 $verb --dry_run --out=dry
done
[ -e dry ] && fail "--dry_run makes a folder"

# Systems start programs with few open files, and let them take more.
many=()
for i in $(seq 24); do many+=(--store=a); done
(ulimit -Sn 16; "$trace" merge "${many[@]}" --out=few_files) >log 2>&1 ||
  fail "with 16 open files of $(ulimit -Hn): $(cat log)"
(ulimit -n 16; "$trace" merge "${many[@]}" --out=too_few) >log 2>&1
[ $? -eq 4 ] || fail "with 16 open files and no more: $(cat log)"
says "ulimit -n"

# A dry run refuses what the run would refuse, and says what would be written.
expect 0 merge --dry_run --store=a --store=a --out=dry
says "12 sequences of 2 stores would be written to dry: about .* free"
expect 2 merge --dry_run --store=a --store=b --out=dry
says "--renumber"
expect 2 merge --dry_run --store=a --out=c
says "is there already"
expect 0 subset --dry_run --store=a --share=1 --out=dry
says "12 sequences would be written"
expect 2 subset --dry_run --store=a --share=0.000001 --out=dry
says "larger --share"
expect 2 subset --dry_run --store=a --out=c
says "is there already"
expect 0 import --dry_run --format=jsonl --in=a.jsonl --out=dry
says "12 sequences, 24 tokens"
expect 3 import --dry_run --format=jsonl --in=bad.jsonl --out=dry
says "bad.jsonl: line 1"
for verb in export stats; do
  expect 0 $verb --dry_run --store=a --out=dry
  says "12 sequences would be written to dry: about .* free"
  expect 2 $verb --dry_run --store=a --out=a.jsonl/dry
  says "Not a directory"
  grep -q "would be written" log && fail "a dry run plans what it refuses"
  expect 2 $verb --store=a --out=a
  says "a is a trace store"
done
ln -s loop loop
for verb in stats export merge; do
  expect 2 $verb --store=a --out=loop/below
  says "look at failed: loop/below"
  [ "$(wc -l <log)" -le 3 ] || fail "$verb into a circle of links: $(cat log)"
done
grep -q '"program": "routecast-trace import"' a/run.json || fail "the store's run.json is replaced"
expect 0 verify --dry_run --store=damaged
says "would be read"
expect 2 salvage --dry_run --store=a --out=c
says "is there already"
[ -e dry ] && fail "a dry run writes"
exit $failed
