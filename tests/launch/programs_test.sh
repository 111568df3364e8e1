#!/usr/bin/env bash
# Every built program answers --help and --version, names the nearest flag, refuses nonsense.
set -uo pipefail
failed=0
found=0
fail() { echo "FAILED $*"; failed=1; }
for program in "$ROUTECAST_BIN_DIR"/routecast-*; do
  [ -x "$program" ] || continue
  found=$((found + 1))
  name=$(basename "$program")
  help=$("$program" --help) || fail "$name --help: exit $?"
  for flag in --quiet --dry_run --threads --seed --flagfile --version; do
    grep -q -- "$flag" <<<"$help" || fail "$name --help does not name $flag"
  done
  # Flags are sorted by name: no description leans on the one before it.
  grep -E "as the next|The same in|of the same kinds|labels then$|one of them is|of their " <<<"$help" &&
    fail "$name --help: a description that does not stand alone"
  grep -E "=[0-9]+\.[0-9]{12}" <<<"$help" && fail "$name --help: a default of too many digits"
  grep -q logtostderr <<<"$help" && fail "$name --help lists flags of a library"
  "$program" --version | grep -Eq "^$name [0-9]+\.[0-9]+\.[0-9]+ " || fail "$name --version"
  error=$("$program" --treads=1 2>&1)
  code=$?
  [ "$code" -eq 2 ] || fail "$name: an unknown flag gave exit $code"
  grep -q -- "--threads?" <<<"$error" || fail "$name does not name the nearest flag: $error"
  [ "$(wc -l <<<"$error")" -le 3 ] || fail "$name: an error of more than three lines: $error"
  error=$("$program" --seed=x 2>&1)
  code=$?
  [ "$code" -eq 2 ] || fail "$name: a wrong value gave exit $code"
done

# --onnx is refused before a store is looked for: kinds without, and runs of several models.
if [ -x "$ROUTECAST_BIN_DIR/routecast-train" ]; then
  for wrong in "--kind=moe" "--leaderboard=all" "--search=space.json"; do
    error=$("$ROUTECAST_BIN_DIR/routecast-train" --onnx "$wrong" --store=/nowhere --out=/nowhere 2>&1)
    code=$?
    [ "$code" -eq 2 ] || fail "--onnx $wrong gave exit $code: $error"
    grep -q -- "${wrong#--kind=}\|--onnx is of one" <<<"$error" || fail "--onnx $wrong: $error"
  done
fi

# A wrong leaderboard or search is refused before a store is looked for, and leaves nothing.
if [ -x "$ROUTECAST_BIN_DIR/routecast-train" ]; then
  out=$(mktemp -u)
  for wrong in "--leaderboard=hiden" "--search=/nowhere.json" "--leaderboard=all --search=x" \
    "--model=/nowhere" "--leaderboard=all --model=/nowhere --pass_us=1" \
    "--kind_seconds=5" "--leaderboard=all --kind_seconds=-1" "--dtype=fp16"; do
    # shellcheck disable=SC2086
    error=$("$ROUTECAST_BIN_DIR/routecast-train" $wrong --store=/nowhere --out="$out" 2>&1)
    code=$?
    [ "$code" -eq 2 ] || fail "$wrong gave exit $code: $error"
    grep -q "hidden?\|/nowhere.json\|two jobs\|--model\|--kind_seconds\|--dtype=bf16" <<<"$error" || fail "$wrong: $error"
    [ "$(wc -l <<<"$error")" -le 3 ] || fail "$wrong: more than three lines"
    [ ! -e "$out" ] || fail "$wrong left $out"
  done
fi

# --model takes a name in the Hugging Face cache, in both programs that have it.
if [ -x "$ROUTECAST_BIN_DIR/routecast-evaluate" ]; then
  folder=$(mktemp -d)
  trap 'rm -rf "$folder"' EXIT
  export HF_HUB_CACHE=$folder/cache
  repository=$HF_HUB_CACHE/models--somebody--small-16
  mkdir -p "$repository/refs" "$repository/snapshots/0123abcd"
  printf 0123abcd >"$repository/refs/main"
  ln -s "$ROUTECAST_SOURCE_DIR"/configs/checkpoints/small-16/* "$repository/snapshots/0123abcd/"
  echo "a prompt of a few words" >"$folder/text"
  collect=("$ROUTECAST_BIN_DIR/routecast-collect" --data=text:"$folder/text" --store="$folder/store")
  evaluate=("$ROUTECAST_BIN_DIR/routecast-evaluate" --prompts="$folder/text" --cache="$folder/experts")
  # srun without PMI would start jobs of one rank each on the same store.
  for tasks in SLURM_STEP_NUM_TASKS=2 SLURM_NTASKS=4; do
    error=$(env "$tasks" "${collect[@]}" --dry_run --model=somebody/small-16 2>&1)
    code=$?
    [ "$code" -eq 2 ] || fail "$tasks without MPI's ranks gave exit $code: $error"
    [ "$(wc -l <<<"$error")" -eq 3 ] || fail "$tasks: not three lines: $error"
  done
  for program in collect evaluate; do
    declare -n command=$program
    "${command[@]}" --dry_run --model=somebody/small-16 >"$folder/log" 2>&1 ||
      fail "routecast-$program --model=NAME: $(cat "$folder/log")"
    error=$("${command[@]}" --dry_run --model=nobody/nothing 2>&1)
    code=$?
    [ "$code" -eq 2 ] || fail "routecast-$program: an absent model gave exit $code"
    grep -q "hf download nobody/nothing" <<<"$error" ||
      fail "routecast-$program does not say how to fetch a model: $error"
  done
  # The presets' depth can be changed, in even numbers.
  pretrain=("$ROUTECAST_BIN_DIR/routecast-pretrain" --data=text:"$folder/text" --out="$folder/pretrained")
  said=$("${pretrain[@]}" --dry_run --encoder_blocks=6 --decoder_blocks=2 2>&1)
  grep -q "model: 6 + 2 blocks" <<<"$said" || fail "--encoder_blocks, --decoder_blocks: $said"
  for flag in --encoder_blocks=3 --decoder_blocks=66; do
    error=$("${pretrain[@]}" --dry_run $flag 2>&1)
    code=$?
    [ "$code" -eq 2 ] || fail "$flag gave exit $code: $error"
    grep -q -- "${flag%=*}" <<<"$error" || fail "$flag is not named: $error"
  done
  # One rank of a larger allocation, said with -n 1 or mpirun, is no mistake.
  SLURM_NTASKS=4 "$ROUTECAST_SOURCE_DIR/launch/run_ranks.sh" -n 1 "${collect[@]}" --dry_run \
    --model=somebody/small-16 >"$folder/log" 2>&1 || fail "-n 1 of 4 tasks: $(cat "$folder/log")"
  SLURM_NTASKS=4 mpirun -n 1 "${collect[@]}" --dry_run --model=somebody/small-16 \
    >"$folder/log" 2>&1 || fail "mpirun -n 1 of 4 tasks: $(cat "$folder/log")"
fi
echo "$found programs"
exit $failed
