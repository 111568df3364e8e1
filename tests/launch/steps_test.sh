#!/usr/bin/env bash
# launch/pipeline.sh and launch/evaluate.sh --bundle, with scripts as programs: what runs, with
# which flags, in which order; what is not done again; what comes out.
set -uo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
failed=0
fail() { echo "FAILED $*"; failed=1; }
check() { [ "$2" = "$3" ] || fail "$1: expected '$2', got '$3'"; }

export ROUTECAST_BUILD=$folder/build
mkdir -p "$ROUTECAST_BUILD/bin"
for program in collect train evaluate; do
  cat >"$ROUTECAST_BUILD/bin/routecast-$program" <<PROGRAM
#!/usr/bin/env bash
echo "$program \$*" >>"$folder/calls"
if [ -e "$folder/stop-$program" ]; then exit "\$(cat "$folder/stop-$program")"; fi
if [ -e "$folder/deaf-$program" ]; then
  trap '' TERM USR1
  touch "$folder/started"
  sleep .5
fi
if [ -e "$folder/slow-$program" ]; then
  trap 'echo it saves; sleep .3; echo saved; exit 75' TERM USR1
  touch "$folder/started"
  while :; do sleep .05; done
fi
for flag in "\$@"; do
  case \$flag in --out=*) mkdir -p "\${flag#--out=}"; echo "{}" >"\${flag#--out=}/results.json" ;; esac
done
PROGRAM
  chmod +x "$ROUTECAST_BUILD/bin/routecast-$program"
done
calls() { cut -d' ' -f1 "$folder/calls" 2>/dev/null | tr '\n' ' '; rm -f "$folder/calls"; }

# The pipeline.
pipeline=$ROUTECAST_SOURCE_DIR/launch/pipeline.sh
out=$folder/out
cat >"$folder/config" <<CONFIG
# a comment
[evaluate replay]
--compare
[pipeline]
out=$out
[collect]
--model=some model
[train hidden]
--kind=hidden
[train second]
--kind=moe
[evaluate own]
--predictor=markov
CONFIG
"$pipeline" --dry_run "$folder/config" >"$folder/plan" || fail "--dry_run: exit $?"
check "lines of the plan" 5 "$(wc -l <"$folder/plan")"
[ ! -e "$out" ] || fail "--dry_run wrote $out"
echo 75 >"$folder/stop-train"
"$pipeline" "$folder/config" >"$folder/log" 2>&1
check "a stopped step" 75 $?
check "up to the stop" "collect train " "$(calls)"
rm "$folder/stop-train"
"$pipeline" "$folder/config" >"$folder/log" 2>&1
check "going on" 0 $?
grep -qx "evaluate --store=$out/store --out=$out/evaluate-replay --predictor=$out/train-hidden,$out/train-second --compare" \
  "$folder/calls" || fail "trained models are not handed on: $(cat "$folder/calls")"
grep -q -- "--predictor=markov$" "$folder/calls" || fail "an own --predictor does not come last"
check "what was left" "train train evaluate evaluate " "$(calls)"
"$pipeline" "$folder/config" >"$folder/log" 2>&1
check "all done before" "" "$(calls)"
# Some steps alone, and some anew.
"$pipeline" --only=evaluate-own,train-hidden "$folder/config" >"$folder/log" 2>&1
check "selected, done before" "" "$(calls)"
grep -q "collect: left out" "$folder/log" || fail "what is left out is not said: $(cat "$folder/log")"
check "a plan of one step" 1 "$("$pipeline" --dry_run --only=collect "$folder/config" | wc -l)"
mkdir -p "$out/store" && touch "$out/store/old" "$out/pipeline.tar.gz"
"$pipeline" --only=collect --again=collect "$folder/config" >"$folder/log" 2>&1
check "collected again, alone" "collect " "$(calls)"
[ ! -e "$out/store/old" ] || fail "the old store is still there"
for stale in train-hidden train-second evaluate-replay evaluate-own; do
  [ ! -e "$out/$stale" ] || fail "$stale stood on the old store, and is still there"
done
[ -e "$out/pipeline.tar.gz" ] || fail "without a [pack] the archive is not the pipeline's to remove"
"$pipeline" "$folder/config" >"$folder/log" 2>&1
check "what stood on the old store" "train train evaluate evaluate " "$(calls)"
echo 75 >"$folder/stop-evaluate"
"$pipeline" --again=train-second "$folder/config" >"$folder/log" 2>&1
check "a step anew, and those behind it" "train evaluate " "$(calls)"
rm "$folder/stop-evaluate"
"$pipeline" "$folder/config" >"$folder/log" 2>&1
check "going on without --again" "evaluate evaluate " "$(calls)"
for flag in --only=colect --again=train; do
  "$pipeline" $flag "$folder/config" >/dev/null 2>"$folder/errors"
  check "$flag" 2 $?
  grep -q "steps: collect train-hidden" "$folder/errors" || fail "$flag: $(cat "$folder/errors")"
done
# Two runs in one folder would write the same files.
flock "$out/lock" "$pipeline" "$folder/config" >"$folder/log" 2>&1
check "a folder in use" 4 $?
grep -q "another run is at work in $out" "$folder/log" || fail "a folder in use: $(cat "$folder/log")"
sed -i 's/--kind=moe/--kind=gnn/' "$folder/config"
"$pipeline" "$folder/config" >"$folder/log" 2>&1
check "from the changed step on" "train evaluate evaluate " "$(calls)"
echo 3 >"$folder/stop-evaluate"
sed -i 's/--compare/--compare --quiet/' "$folder/config"
"$pipeline" "$folder/config" >"$folder/log" 2>&1
check "a failed step's exit code" 3 $?
rm "$folder/stop-evaluate"
calls >/dev/null

# A signal that the running step does not hear is heeded before the next one.
sed "s|^out=.*|out=$folder/deaf R\\&D|; s|--kind=hidden|--kind=hidden --cache={out}/c|" "$folder/config" \
  >"$folder/config-deaf"
touch "$folder/deaf-collect"
rm -f "$folder/started"
"$pipeline" "$folder/config-deaf" >"$folder/log" 2>&1 &
run=$!
for _ in $(seq 200); do [ -e "$folder/started" ] && break; sleep .05; done
kill -TERM $run
wait $run
check "a signal that no step hears" 75 $?
check "nothing after it" "collect " "$(calls)"
rm "$folder/deaf-collect" "$folder/started"
"$pipeline" "$folder/config-deaf" >"$folder/log" 2>&1
check "going on behind it" 0 $?
grep -q -- "--cache=$folder/deaf R&D/c" "$folder/calls" || fail "{out} is not the folder: $(cat "$folder/calls")"
calls >/dev/null
# So is one during what is no step.
cat >"$folder/no-step" <<SCRIPT
. "$ROUTECAST_SOURCE_DIR/launch/lib.sh"; . "$ROUTECAST_SOURCE_DIR/launch/steps.sh"
interruptible "a wait" sh -c 'touch "$folder/waits"; exec sleep 60'
echo it went on
SCRIPT
bash "$folder/no-step" >"$folder/log" 2>&1 &
run=$!
for _ in $(seq 200); do [ -e "$folder/waits" ] && break; sleep .05; done
kill -TERM $run
wait $run
check "a signal outside of steps" 75 $?
! grep -q "it went on" "$folder/log" || fail "it went on"

wrong() {  # wrong NAME TEXT: exit 2, three lines at most, the line is named
  printf '%b' "$2" >"$folder/wrong"
  "$pipeline" "$folder/wrong" >/dev/null 2>"$folder/errors"
  check "$1" 2 $?
  grep -q -- "$3" "$folder/errors" || fail "$1: $(cat "$folder/errors")"
  [ "$(wc -l <"$folder/errors")" -le 3 ] || fail "$1: more than three lines"
}
wrong "unknown section" "[collect]\n[colect]\n" "line 2"
wrong "a section twice" "[collect]\n[collect]\n" "twice"
wrong "a flag in no section" "--model=x\n" "line 1"
wrong "not a flag" "[collect]\nmodel=x\n" "line 2"
wrong "the store is the pipeline's" "[collect]\n--store=x\n" "--store"
wrong "ranks" "[pipeline]\nranks=two\n" "ranks=two"
wrong "nothing to do" "# empty\n" "no section"
wrong "a name with a slash" "[train ../x]\n" "line 1"
check "calls of wrong configurations" "" "$(calls)"

# The bundle.
evaluate=$ROUTECAST_SOURCE_DIR/launch/evaluate.sh
bundle=$folder/bundle
"$evaluate" --bundle --store=s --model=m --rounds=2 --cache=c --out="$bundle" >"$folder/log" 2>&1 ||
  fail "--bundle: $(cat "$folder/log")"
cat >"$folder/expected" <<CALLS
evaluate --mode=status --in=$bundle/status --out=$bundle/status
evaluate --mode=transfer --cache=c --out=$bundle/transfer
evaluate --compare --store=s --rounds=2 --cache=c --out=$bundle/replay
evaluate --compare --model=m --store=s --rounds=2 --cache=c --out=$bundle/generate
CALLS
diff "$folder/expected" "$folder/calls" || fail "other calls than expected"
check "what is packed" "generate/results.json replay/results.json status/results.json transfer/results.json " \
  "$(tar tzf "$bundle/routecast-bundle.tar.gz" | sort | tr '\n' ' ')"
calls >/dev/null
"$evaluate" --bundle --store=s --rounds=2 --cache=c --out="$bundle" >/dev/null 2>&1
check "nothing is done twice" "" "$(calls)"
"$evaluate" --bundle --store=s --model=m --prompts=p --phase=both --out="$folder/parts" >/dev/null 2>&1
cat >"$folder/expected" <<CALLS
evaluate --compare --store=s --phase=both --out=$folder/parts/replay
evaluate --compare --model=m --store=s --prompts=p --out=$folder/parts/generate
CALLS
grep -- --compare "$folder/calls" | diff "$folder/expected" - || fail "each part has its own flags"
calls >/dev/null
# A signal to all processes at once, as timeout and batch systems send it.
touch "$folder/slow-evaluate"
setsid "$evaluate" --bundle --store=s --out="$folder/slow" >"$folder/log" 2>&1 &
group=$!
for _ in $(seq 200); do [ -e "$folder/started" ] && break; sleep .05; done
kill -TERM -- -$group
wait $group
check "a signal to the whole group" 75 $?
grep -q '^saved$' "$folder/slow/log/status.log" || fail "the log ends before the step: $(cat "$folder/log")"
rm "$folder/slow-evaluate"
calls >/dev/null
for flags in "--rounds=2" "--store=s --mode=status" "--store=s store"; do
  # shellcheck disable=SC2086
  "$evaluate" --bundle $flags --out="$folder/none" >/dev/null 2>"$folder/errors"
  check "--bundle $flags" 2 $?
done
check "calls of wrong bundles" "" "$(calls)"
exit $failed
