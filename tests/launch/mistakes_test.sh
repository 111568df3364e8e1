#!/usr/bin/env bash
# What users get wrong: each mistake ends with its exit code, at most three lines, the last of
# which says the fix, and leaves nothing behind. Goal: at least 40 of them.
set -uo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
failed=0
tried=0
fail() { echo "FAILED $*"; failed=1; }

bin=$ROUTECAST_BIN_DIR
export HF_HUB_CACHE=$folder/hub
model=$ROUTECAST_SOURCE_DIR/configs/checkpoints/small-16
cd "$folder" || exit 1
for i in $(seq 40); do
  echo "Sentence $i of a text about rivers number $((i * 7)) and the towns beside them."
  echo
done >text.txt
printf '\xff\xfe\x00\x01' >binary.txt
: >empty.txt
mkdir junk
head -c 2000 /dev/urandom >junk/a.bin
head -c 2000 /dev/zero >junk/b.bin
printf '{"text": \x1b[31m\x7f\xc2\x9b}\n' >junk.jsonl
echo '{"title": "no body"}' >fields.jsonl
echo '{"id": 7, "meta": {}, "content": "a text"}' >nested.jsonl
cp -r "$model" foreign
cp -r "$model" cut
head -c 100000 "$model/model.safetensors" >cut/model.safetensors
mkdir -p no_config git_lfs plain half/state
printf 'version https://git-lfs.github.com/spec/v1\noid sha256:00\nsize 9\n' >git_lfs/model.safetensors
cp "$model"/*.json "$model/spiece.model" git_lfs/
cp "$model/model.safetensors" no_config/

"$bin/routecast-collect" --model="$model" --data=text:text.txt#blocks --store=store --quiet \
  --record=ids,probs --max_length=32 --num_shards=2 >log 2>&1 || fail "the good store: $(cat log)"
cp -r store newer
sed -i 's/"schema": *[0-9]*/"schema": 99/' newer/store.json
cp -r store damaged
table=$(find damaged/shards -name '*.sst' -size +1k | head -1)
printf '\xa5\x5a' | dd of="$table" bs=1 seek=900 conv=notrunc 2>/dev/null
# Caches are meant to stay, and so is what run.json says about an end.
seen() { find . | grep -vE '^./(log|error|cache.*|.*\.corpus.*|.*/index\.cache|run|run/run.json|new|new/run.json)$' | sort; }
touch before new_files error
seen >before

# wrong CODE FIX PROGRAM FLAGS...: FIX is what the message has to contain.
wrong() {
  local code=$1 fix=$2 program=$3 got
  shift 3
  tried=$((tried + 1))
  OMP_NUM_THREADS=1 timeout 60 "$bin/routecast-$program" --quiet "$@" >/dev/null 2>error
  got=$?
  [ "$got" -eq "$code" ] || fail "$program $*: exit $got, expected $code: $(cat error)"
  [ "$(grep -c . error)" -le 3 ] || fail "$program $*: more than three lines: $(cat error)"
  [ "$(grep -c . error)" -ge 2 ] || fail "$program $*: no line says the fix: $(cat error)"
  grep -qE -- "$fix" error || fail "$program $*: does not say '$fix': $(cat error)"
  seen | comm -13 before - >new_files
  [ ! -s new_files ] || { fail "$program $*: left $(head -3 new_files)"; seen >before; }
}

collect=(collect --model="$model" --data=text:text.txt --store=new)
# Files of every shard stay open: too many shards are refused before any work.
(ulimit -n 256 && OMP_NUM_THREADS=1 "$bin/routecast-${collect[0]}" --quiet "${collect[@]:1}" \
  --dry_run --num_shards=256) >/dev/null 2>error
[ $? -eq 4 ] || fail "few open files: $(cat error)"
grep -q "ulimit -n [0-9]" error || fail "few open files: no fix: $(cat error)"
wrong 2 "--threads\?" "${collect[@]}" --treads=2
wrong 2 "use 0 for cores" "${collect[@]}" --threads=-1
wrong 2 "1 to 1024 threads" "${collect[@]}" --dry_run --threads=100000
wrong 2 "denoise" "${collect[@]}" --task=denoice
wrong 2 "ids" "${collect[@]}" --record=idz
wrong 2 "nowhere" collect --model=nowhere --data=text:text.txt --store=new
wrong 2 "hf download" collect --model=google/switch-base-8 --data=text:text.txt --store=new
wrong 2 "--data" collect --model="$model" --store=new
wrong 2 "--store" collect --model="$model" --data=text:text.txt
wrong 2 "nowhere.txt" collect --model="$model" --data=text:nowhere.txt --store=new
wrong 2 "text\?" collect --model="$model" --data=txt:text.txt --store=new
wrong 3 "#title" collect --model="$model" --data=jsonl:fields.jsonl#text --store=new
wrong 2 "holds no document" collect --model="$model" --data=text:empty.txt --store=new
wrong 3 "#content" collect --model="$model" --data=jsonl:nested.jsonl --store=new
wrong 2 "once for each" collect --model="$model" --data=text:text.txt,text:empty.txt --store=new
wrong 2 "name a new folder" collect --model="$model" --data=text:text.txt --store=foreign --dry_run
wrong 2 "name a new folder" pretrain --data=text:text.txt --out=store --dry_run
wrong 2 "name a new folder" train --store=store --kind=interlayer --out=store --dry_run
wrong 2 "name a new folder" train --store=store --kind=interlayer --out=text.txt --dry_run
wrong 2 "name a new folder" evaluate --mode=status --out=store
cmp -s store/run.json newer/run.json || fail "a refused --out changed the store"
wrong 2 "--device" "${collect[@]}" --device=gpu0
wrong 2 "--dtype" "${collect[@]}" --dtype=fp8
wrong 2 "--max_length" "${collect[@]}" --max_length=0
wrong 2 "--hidden_share" "${collect[@]}" --hidden_share=2
wrong 2 "--top_p" "${collect[@]}" --task=generate --temperature=1 --top_p=1.5
wrong 2 "--noise_density" "${collect[@]}" --task=encode --noise_density=0.3
wrong 2 "--record lacks topk" "${collect[@]}" --record=ids --top_k=8
wrong 2 "--sample_seed" "${collect[@]}" --task=generate --sample_seed=2
wrong 2 "2 binary ones were dropped" collect --model="$model" --data=text:junk --store=new
wrong 3 "not usable JSON" collect --model="$model" --data=jsonl:junk.jsonl --store=new
LC_ALL=C grep -q $'[\x01-\x09\x0b-\x1f\x7f]' error && fail "junk JSON: control bytes in the error"
wrong 2 "--compression" "${collect[@]}" --compression=lz4
wrong 2 "store" collect --model="$model" --data=text:text.txt --store=store --max_length=64
wrong 2 "config.json|spiece.model" collect --model=no_config --data=text:text.txt --store=new
wrong 3 "model.safetensors" collect --model=cut --data=text:text.txt --store=new
wrong 3 "git lfs|LFS" collect --model=git_lfs --data=text:text.txt --store=new

wrong 2 "verify" trace verfy --store=store
wrong 2 "store" trace info --store=nowhere
wrong 2 "store.json" trace info --store=plain
wrong 2 "schema|newer" trace info --store=newer
wrong 3 "salvage|collect" trace verify --store=damaged
wrong 2 "npz" trace export --store=store --out=exported --format=npy
wrong 2 "--out" trace export --store=store
wrong 2 "--share" trace subset --store=store --out=part --share=0
wrong 2 "--in" trace import --out=imported
wrong 2 "--share is of" trace verify --store=store --share=.3
wrong 2 "exist|name" trace subset --store=store --out=plain/../store --share=.5

train=(train --store=store --out=run)
wrong 2 "hidden\?" "${train[@]}" --kind=hiden
wrong 2 "hidden" "${train[@]}" --kind=hidden
wrong 2 "--store" train --out=run
wrong 2 "--out" train --store=store
wrong 2 "--epochs" "${train[@]}" --kind=interlayer --epochs=0
wrong 2 "--learning_rate" "${train[@]}" --kind=interlayer --learning_rate=-1
wrong 2 "--heads|width" "${train[@]}" --kind=interlayer --heads=5
wrong 2 "--context|interlayer" "${train[@]}" --kind=hidden --context=4
wrong 2 "--layers|--members" "${train[@]}" --kind=ensemble --layers=3
wrong 2 "--micro_batch|--global_batch" "${train[@]}" --kind=interlayer --global_batch=20
wrong 2 "cosine" "${train[@]}" --kind=interlayer --schedule=cosin
wrong 2 "--cycle_beta1|one_cycle" "${train[@]}" --kind=interlayer --cycle_beta1
wrong 2 "--token_inputs|interlayer" "${train[@]}" --kind=hidden --token_inputs
wrong 2 "--router_inputs|--record" "${train[@]}" --kind=interlayer --router_inputs
wrong 2 "nowhere" train --store=nowhere --out=run
wrong 2 "--start_from|nowhere" "${train[@]}" --kind=interlayer --start_from=nowhere

evaluate=(evaluate --model="$model" --prompts=text.txt --cache=cache)
wrong 2 "did you mean oracle" "${evaluate[@]}" --predictor=oracel
wrong 2 "did you mean all" "${evaluate[@]}" --policy=al
wrong 2 "--mode=simulate takes lists" "${evaluate[@]}" --eviction=lru,lfu
wrong 2 "on_demand" "${evaluate[@]}" --policy=on_demnd
wrong 2 "lru" "${evaluate[@]}" --eviction=lruu
wrong 2 "--expert_budget" "${evaluate[@]}" --expert_budget=1KiB
wrong 2 "--expert_budget" "${evaluate[@]}" --expert_budget=lots
wrong 2 "--tier" "${evaluate[@]}" --tier=ssd:4GiB
wrong 2 "--batch" "${evaluate[@]}" --batch=0
wrong 2 "--prompts|nowhere" evaluate --model="$model" --prompts=nowhere --cache=cache
wrong 2 "--store" evaluate --model="$model" --mode=simulate --cache=cache
wrong 2 "--mode" evaluate --model="$model" --mode=replya --cache=cache
wrong 2 "nowhere" "${evaluate[@]}" --predictor=nowhere/run
wrong 2 "--mode=simulate" "${evaluate[@]}" --question_us=7
wrong 2 "--mode=quality" "${evaluate[@]}" --sequences=3
wrong 2 "--batch is of --mode=generate" evaluate --mode=simulate --store=store --batch=4
wrong 2 "--policy is of --mode=generate, simulate" evaluate --mode=quality --store=store --policy=top_k
simulate=(evaluate --mode=simulate --store=store)
ln -s loop loop  # nothing that can be looked into
seen >before
wrong 2 "did you mean" "${simulate[@]}" --predictor=markvo
wrong 2 "--report_with does nothing" "${simulate[@]}" --report_with=plain
wrong 2 "--eviction names one twice" "${simulate[@]}" --eviction=lru,lru
wrong 2 "--expert_bytes=12.6MiB" "${simulate[@]}" --expert_bytes=0
wrong 2 "from 0 to 1e9" "${simulate[@]}" --layer_us=-3
wrong 2 "from 0 to 1e9" "${simulate[@]}" --question_us=inf
wrong 2 "give --model=FOLDER" "${simulate[@]}" --dtype=bf16
wrong 2 "asks nobody" "${simulate[@]}" --policy=on_demand --predictor=markov
wrong 2 "use --expert_budget=|--max_sequences|collect" "${simulate[@]}" --baselines=none --expert_budget=1%
wrong 2 "--layer_us is of --mode=simulate" "${evaluate[@]}" --layer_us=3
quality=(evaluate --mode=quality --store=store)
wrong 2 "--out=FOLDER" "${quality[@]}" --answers=npz
wrong 2 "npz" "${quality[@]}" --answers=npy --out=run
wrong 2 "--answers=npz" "${quality[@]}" --answer_ranks=3
wrong 2 "--shift_store out" "${quality[@]}" --answers=npz --out=run --shift_store=store
wrong 2 "always right" "${quality[@]}" --predictor=oracle
wrong 2 "--baselines=simple" "${quality[@]}" --baselines=none
wrong 2 "decodes nothing" evaluate --store=store --phase=encoder --max_new_tokens=4 --cache=cache
wrong 2 "leave one of them out" "${evaluate[@]}" --profile=rtx3090 --link=native
wrong 2 "--rounds=N" "${evaluate[@]}" --rounds=2147483647
wrong 2 "is a checkpoint" "${evaluate[@]}" --predictor="$model"
wrong 2 "unfinished training" "${evaluate[@]}" --predictor=half
wrong 2 "--expert_budget" evaluate --mode=transfer --expert_budget=25% --cache=cache
wrong 2 "--threads" "${evaluate[@]}" --threads=-3

wrong 2 "--preset" pretrain --data=text:text.txt --out=made --preset=demmo
wrong 2 "--steps" pretrain --data=text:text.txt --out=made --steps=-1
wrong 2 "--stop_after" pretrain --data=text:text.txt --out=made --stop_after=-1
wrong 2 "--out" pretrain --data=text:text.txt
wrong 2 "--flagfile|nowhere" pretrain --flagfile=nowhere.flags

# Of two ranks with the same mistake one says it.
"$ROUTECAST_SOURCE_DIR/launch/run_ranks.sh" -n 2 "$bin/routecast-collect" --quiet "${collect[@]:1}" \
  --compression=lz4 2>error
[ $? -eq 2 ] || fail "two ranks: $(cat error)"
[ "$(grep -c . error)" -eq 3 ] || fail "two ranks: not three lines: $(cat error)"

echo "$tried mistakes"
[ "$tried" -ge 40 ] || fail "fewer than 40"
exit $failed
