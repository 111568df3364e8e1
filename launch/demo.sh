#!/usr/bin/env bash
# Set-up, then the whole loop on this machine: text, a Switch Transformer, its routing in a trace
# store, speculation models, a prefetching runtime, a report. Safe to interrupt: started again,
# it goes on where it was.
set -euo pipefail
. "$(dirname "$0")/lib.sh"
. "$(dirname "$0")/steps.sh"

usage() {
  cat <<'TEXT'
Usage: launch/demo.sh [--quick] [--pretrain] [--scratch] [--out DIR]
  --quick     a tenth of the size
  --pretrain  train the `demo` preset anew and go on with that, instead of the checkpoint that
              the repository ships
  --scratch   train the speculation model `hidden` from nothing, instead of going on with the one
              that the repository ships (with --pretrain always)
  --out DIR   results (default: out/demo, with -quick, -pretrain and -scratch added)
  --help      this text
TEXT
}

quick=no pretrain=no scratch=no out=
while [ $# -gt 0 ]; do
  case $1 in
    --quick) quick=yes ;;
    --pretrain) pretrain=yes ;;
    --scratch) scratch=yes ;;
    --out) [ $# -ge 2 ] || die 2 "--out needs a folder"; out=$2; shift ;;
    --out=*) out=${1#--out=} ;;
    --help) usage; exit 0 ;;
    *) die 2 "unknown argument $1" "launch/demo.sh --help" ;;
  esac
  shift
done
if [ -z "$out" ]; then
  out=$root/out/demo
  [ "$quick" = no ] || out+=-quick
  [ "$pretrain" = no ] || out+=-pretrain
  [ "$scratch" = no ] || out+=-scratch
fi

ranks=2
corpus=$cache/corpus
data=(--data="text:$corpus/gcide.txt#blocks" --data="text:$corpus/anarchism.txt#blocks"
      --data="text:$corpus/wordnet.txt#blocks" --cache="$cache/corpus-index")
if [ "$quick" = yes ]; then
  pretrain_steps=10 sequences=100 generated=400
  rows=(--rounds=3 --warmup_rounds=1 --max_new_tokens=8) settle=()
  hidden_steps=80 train_hidden=(--test_sequences=100 --validation_sequences=64)
  train_interlayer=(--steps=16 --global_batch=16 --micro_batch=8 --test_sequences=16
                    --validation_sequences=16)
else
  pretrain_steps=60 sequences=1000 generated=4000
  # The trial whether speculation pays takes 48 steps, three times as many where it is a close run
  # (docs/runtime.md): it is over before the rounds that count.
  rows=(--rounds=20 --warmup_rounds=4) settle=(--warmup_rounds=10)
  hidden_steps=1200 train_hidden=(--test_sequences=600)
  # A window of `interlayer` costs many times one of `hidden`: small steps, so that there are some.
  train_interlayer=(--steps=240 --global_batch=16 --micro_batch=8 --test_sequences=64
                    --validation_sequences=32)
fi
# The `demo` preset whole where its model is used, else a look at how it goes.
size=(--steps="$pretrain_steps")
checkpoint=$(dirname "$(find "$root/configs/checkpoints" -name config.json 2>/dev/null |
  sort | head -1)" 2>/dev/null || true)
if [ "$pretrain" = yes ]; then
  size=()
  checkpoint=$out/pretrain
fi
# The shipped predictor of the shipped checkpoint learned from twenty times as many sequences, for
# two hours and a half: it goes on with what was collected here, at a twentieth of the first
# learning rate (at a sixth it forgets: docs/speculation.md).
predictor=$root/configs/predictors/$(basename "$checkpoint")-hidden
if [ "$pretrain" = no ] && [ "$scratch" = no ] && [ -e "$predictor/config.json" ]; then
  train_hidden+=(--start_from="$predictor" --learning_rate=3e-4)
  [ "$quick" = yes ] || hidden_steps=300
fi

num_steps=9
run_demo() {
  step corpus "text from Debian packages" "$root/launch/corpus.sh" "$corpus"
  step pretrain "pre-training, $ranks ranks" "$root/launch/pretrain.sh" -n $ranks \
    --preset=demo "${size[@]}" "${data[@]}" --out="$out/pretrain"
  step collect "routing of denoising, $ranks ranks" "$root/launch/collect.sh" -n $ranks \
    --model="$checkpoint" "${data[@]}" --task=denoise --max_sequences=$sequences \
    --max_length=128 --hidden_share=0.5 --store="$out/store"
  step generate "routing of generation, $ranks ranks" "$root/launch/collect.sh" -n $ranks \
    --model="$checkpoint" "${data[@]}" --task=generate --max_sequences=$generated \
    --max_length=128 --hidden_share=1 --store="$out/store-generate"
  step stats "statistics of the store" "$build/bin/routecast-trace" stats \
    --store="$out/store" --out="$out/stats"
  # Both models learn from generation, which is what the runtime runs: there the next token follows
  # from the model's own state, which it does not where the text decides it.
  step train-hidden "speculation model: hidden, $ranks ranks" "$root/launch/train.sh" \
    -n $ranks --store="$out/store-generate" --kind=hidden --steps="$hidden_steps" \
    "${train_hidden[@]}" --out="$out/train-hidden"
  step train-interlayer "speculation model: interlayer, $ranks ranks" \
    "$root/launch/train.sh" -n $ranks --store="$out/store-generate" --kind=interlayer \
    "${train_interlayer[@]}" --out="$out/train-interlayer"
  local runs=$out/train-hidden,$out/train-interlayer
  step evaluate "generation under a 25 % budget" "$root/launch/evaluate.sh" --compare \
    --model="$checkpoint" --store="$out/store-generate" --predictor="$runs" "${rows[@]}" \
    "${settle[@]}" --out="$out/evaluate"
  step replay "replay at full-size geometry, and the report" "$root/launch/evaluate.sh" --baselines=simple \
    --compare --store="$out/store-generate" --predictor="$runs" "${rows[@]}" \
    --out="$out/replay" \
    --report_with="$out/evaluate,$runs,$out/stats,$out/pretrain,$checkpoint"
  cp "$out/replay/report.html" "$out/report.html"
  cp "$out/evaluate/results.json" "$out/results.json"
}

started=$SECONDS
begin_steps "$out"
interruptible "set-up" "$root/launch/setup.sh"
[ "$pretrain" = yes ] || [ -e "${checkpoint:-/none}/config.json" ] ||
  die 2 "no checkpoint is in configs/checkpoints" "launch/demo.sh --pretrain trains one"
run_demo
printf '\nGeneration under a 25 %% budget\n'
cat "$out/evaluate/table.txt"
printf '\nReplay at full-size geometry, synthetic weights, 25 %% budget\n'
cat "$out/replay/table.txt"
printf '\n'
printf '%s\n' "${times[@]}"
printf '%-44s %5s s\n' everything "$((SECONDS - started))"
# The largest process of any step: run.json has it.
peak=$(cat "$out"/*/run.json | sed -n 's/^ *"peak_memory_bytes": \([0-9]*\).*/\1/p' | sort -n | tail -1)
printf '%-44s %5s MiB\n' "most memory of a process" "$((${peak:-0} >> 20))"
printf '\nreport: %s\n' "$out/report.html"
