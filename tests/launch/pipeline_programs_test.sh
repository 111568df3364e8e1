#!/usr/bin/env bash
# launch/pipeline.sh with the real programs, small: what one step leaves the next one reads, an
# interrupted pipeline goes on, and a second run does nothing.
set -uo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
failed=0
fail() { echo "FAILED $*"; failed=1; }

root=$ROUTECAST_SOURCE_DIR
export ROUTECAST_BUILD=$ROUTECAST_BUILD_DIR ROUTECAST_CACHE=$folder/cache
out=$folder/out
cat >"$folder/config" <<CONFIG
[pipeline]
out=$out
ranks=2
[pretrain]
--preset=demo
--data=text:$root/docs/*.md#blocks
--steps=3
--log_every=1
[collect]
--data=text:$root/docs/*.md#blocks
--cache=$folder/cache
--task=generate
--record=ids,probs,hidden,output
--hidden_share=1
--max_length=48
--max_sequences=200
[train hidden]
--kind=hidden
--steps=4
--test_sequences=8
--validation_sequences=8
[evaluate generate]
--model={out}/model
--compare
--baselines=none
--rounds=2
--warmup_rounds=1
--max_new_tokens=6
[pack]
traces=4MiB
CONFIG

# Ctrl-C (as launch scripts see it: TERM) while collecting: 75, and the store goes on.
"$root/launch/pipeline.sh" "$folder/config" >"$folder/log" 2>&1 &
pipeline=$!
for _ in $(seq 300); do
  [ ! -e "$out/store/store.json" ] || break
  sleep 0.1
done
kill -TERM "$pipeline"
wait "$pipeline"
code=$?
case $code in 75 | 0) ;; *) fail "stopped with $code: $(tail -3 "$folder/log")" ;; esac

"$root/launch/pipeline.sh" "$folder/config" >"$folder/log" 2>&1 ||
  fail "going on: $? $(tail -5 "$folder/log")"
table=$out/evaluate-generate/table.txt
grep -q "^decoder  auto *hidden" "$table" || fail "no row of the trained model: $(cat "$table")"
grep -q '"lossless": true' "$out/evaluate-generate/results.json" || fail "rows differ in bits"

# The package holds results of every step, and traces of no more than was asked for.
mkdir "$folder/package"
tar -C "$folder/package" -xzf "$out/pipeline.tar.gz" || fail "no package"
for file in model/config.json train-hidden/results.json evaluate-generate/table.txt \
  traces/store.json log/collect.log; do
  [ -e "$folder/package/$file" ] || fail "the package lacks $file"
done
[ "$(du -sb "$folder/package/traces" | cut -f1)" -le 4194304 ] || fail "too many traces are packed"
"$ROUTECAST_BIN_DIR/routecast-trace" verify --store="$folder/package/traces" >"$folder/log" 2>&1 ||
  fail "the packed traces: $(tail -2 "$folder/log")"

touch "$folder/before"
"$root/launch/pipeline.sh" "$folder/config" >"$folder/log" 2>&1 || fail "again: $?"
[ -z "$(find "$out/train-hidden" "$out/evaluate-generate" -newer "$folder/before" -type f)" ] ||
  fail "a second run did something again"
exit $failed
