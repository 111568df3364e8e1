#!/usr/bin/env bash
# Every run leaves run.json with its exit code, also one that fails or is stopped while it sets
# up; a command that is refused leaves the results of an earlier run as they were.
set -uo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
cd "$folder" || exit 1
failed=0
fail() { echo "FAILED $*"; failed=1; }
bin=$ROUTECAST_BIN_DIR
model=$ROUTECAST_SOURCE_DIR/configs/checkpoints/small-16
export OMP_NUM_THREADS=1

for i in $(seq 40); do
  echo "Sentence $i of a text about rivers number $((i * 7)) and the towns beside them."
  echo
done >text.txt
"$bin/routecast-collect" --model="$model" --data=text:text.txt#blocks --store=store --quiet \
  --record=ids,probs --max_length=32 --num_shards=2 >log 2>&1 || fail "the good store: $(cat log)"
cp -r "$model" cut
head -c 100000 "$model/model.safetensors" >cut/model.safetensors
cp -r store damaged
head -c 40 store/store.json >damaged/store.json

status() { sed -n 's/^ *"exit_status": *\([0-9a-z]*\).*/\1/p' "$1/run.json" 2>/dev/null; }
runs=0
# ends CODE PROGRAM FLAGS...: in a new folder, with CODE, which run.json has as well.
ends() {
  local code=$1 program=$2 got out
  shift 2
  runs=$((runs + 1))
  out=run-$runs
  local to=--out
  [ "$program" = collect ] && to=--store
  timeout 60 "$bin/routecast-$program" --quiet "$@" "$to=$out" >/dev/null 2>error
  got=$?
  [ "$got" -eq "$code" ] || fail "$program $*: exit $got, expected $code: $(cat error)"
  [ "$(status "$out")" = "$code" ] || fail "$program $*: run.json says $(status "$out")"
}

evaluate=(evaluate --model="$model" --prompts=text.txt --cache=cache)
ends 3 evaluate --model=cut --prompts=text.txt --cache=cache
ends 2 "${evaluate[@]}" --predictor=nowhere/run
ends 2 "${evaluate[@]}" --expert_budget=1KiB
ends 3 "${evaluate[@]}" --store=damaged
ends 3 evaluate --store=damaged --cache=cache
ends 3 evaluate --mode=quality --store=damaged
ends 3 evaluate --mode=simulate --store=damaged
ends 2 evaluate --mode=simulate --store=nowhere
ends 2 evaluate --mode=simulate --store=store --profile=nowhere
for i in $(seq 150); do
  echo "Article $i is about the river number $((i * 7)), its boats, and all the towns beside it."
  echo
done >many.txt
"$bin/routecast-collect" --model="$model" --data=text:many.txt#blocks --store=many --quiet \
  --record=ids,probs --max_length=16 --num_shards=2 >log 2>&1 || fail "the larger store: $(cat log)"
ends 0 evaluate --mode=simulate --store=many --baselines=none --expert_budget=25%,50%
earlier=run-$runs
for file in simulation.json table.txt rows.csv report.html; do
  [ -s "run-$runs/$file" ] || fail "a simulation left no $file"
done
"$bin/routecast-evaluate" --mode=simulate --store=many --expert_budget=, >/dev/null 2>error
[ $? -eq 2 ] || fail "no budget at all: $(cat error)"
CUDA_VISIBLE_DEVICES=-1 ends 4 evaluate --mode=transfer --device=cuda:0 --cache=cache
ends 2 evaluate --mode=status --in=nowhere
ends 3 train --store=damaged --kind=interlayer
ends 2 train --store=nowhere --kind=interlayer
ends 2 pretrain --data=text:nowhere.txt
ends 2 collect --model="$model" --data=text:nowhere.txt
ends 3 collect --model=cut --data=text:text.txt
ends 3 trace stats --store=damaged
ends 3 trace export --store=damaged
ends 3 trace merge --store=damaged
ends 3 trace subset --store=damaged
ends 2 trace salvage --store=nowhere
ends 2 trace merge --store=store --store=nowhere
ends 2 trace import --in=nowhere
echo '{"routing": [[[0, 0]]]}' >bad.jsonl
ends 3 trace import --format=jsonl --in=bad.jsonl

# A store whose settings a command does not share is another's.
cp store/run.json before
"$bin/routecast-collect" --quiet --model="$model" --data=text:text.txt --store=store \
  --max_length=64 >/dev/null 2>error
[ $? -eq 2 ] || fail "another length was not refused: $(cat error)"
"$bin/routecast-trace" subset --store=store --out=store >/dev/null 2>error
[ $? -eq 2 ] || fail "a store was cut into itself: $(cat error)"
cmp -s before store/run.json || fail "a refused command wrote the store's run.json"

"$bin/routecast-evaluate" --mode=status --in="$folder" --out=seen >/dev/null 2>error ||
  fail "status: $(cat error)"
cp seen/run.json before
"$bin/routecast-evaluate" --mode=status --in=nowhere --out=seen >/dev/null 2>error
[ $? -eq 2 ] || fail "nowhere was looked into"
cmp -s before seen/run.json || fail "a refused command wrote over run.json"
[ -e seen/status.json ] || fail "a refused command removed results"
grep -q '"path": ".*/seen"' seen/status.json && fail "status lists its own folder"

# A dry run has no folder.
"$bin/routecast-evaluate" --mode=status --in="$folder" --out=dry --dry_run >log 2>&1 ||
  fail "a dry status: $(cat log)"
"$bin/routecast-evaluate" --mode=simulate --store=many --out=dry --dry_run >log 2>&1 ||
  fail "a dry simulation: $(cat log)"
grep -q "predictors x" log || fail "a dry simulation has no plan: $(cat log)"
[ ! -e dry ] || fail "a dry run left a folder"
# What would be refused is refused, and nothing of an earlier run goes for it.
cp -r "$earlier" refused
for flags in "--mode=simulate --expert_budget=0.1%" "--mode=quality --baselines=none"; do
  for dry in "" --dry_run; do
    "$bin/routecast-evaluate" --store=many --out=refused $flags $dry >log 2>&1
    [ $? -eq 2 ] || fail "$flags $dry: $(cat log)"
    [ -s refused/simulation.json ] || fail "$flags $dry removed an earlier run's results"
  done
done

# stopped OUT PROGRAM FLAGS...: by TERM, as soon as its run.json is there.
stopped() {
  local out=$1 program=$2 pid code
  shift 2
  "$bin/routecast-$program" --quiet "$@" --out="$out" >/dev/null 2>error &
  pid=$!
  for _ in $(seq 600); do
    [ ! -e "$out/run.json" ] || break
    sleep 0.05
  done
  kill -TERM "$pid"
  wait "$pid"
  code=$?
  [ "$code" -eq 75 ] || fail "$program stopped with $code: $(cat error)"
  [ "$(status "$out")" = 75 ] || fail "$program stopped: run.json says $(status "$out")"
}
stopped stopped-transfer evaluate --mode=transfer --cache=cache
stopped stopped-pretrain pretrain --data="text:$ROUTECAST_SOURCE_DIR/docs/*.md#blocks" --steps=100000
stopped stopped-generate "${evaluate[@]}" --rounds=100000 --expert_budget=50%
echo "$runs ends"
exit $failed
