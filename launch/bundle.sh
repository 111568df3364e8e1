#!/usr/bin/env bash
# Everything that matters about one machine, in one file to send back: what it is, its link, its
# rows in generation and in replay. Interrupt it and start it again: it goes on.
set -euo pipefail
. "$(dirname "$0")/lib.sh"
. "$(dirname "$0")/steps.sh"

usage() {
  cat <<'TEXT'
Usage: launch/evaluate.sh --bundle --store=STORE [--model=FOLDER] [--out=FOLDER] [FLAGS]
Runs status, transfer, a replay of STORE and, with --model, generation, each with --compare and
FLAGS (--phase for the replay, --prompts for generation); packs results.json, device_profile.json, status.json, run.json, table.txt and report.html
of each into FOLDER/routecast-bundle.tar.gz (default: out/bundle). run.json names the host, the
flags and the versions: look at it before you send the file on.
TEXT
}

out=$root/out/bundle model= store= cache_flag=() flags=() of_replay=() of_generation=()
for flag in "$@"; do
  case $flag in
    --help) usage; exit 0 ;;
    --out=?*) out=${flag#--out=} ;;
    --model=?*) model=$flag ;;
    --store=?*) store=$flag ;;
    --mode=* | --compare*) die 2 "$flag is the bundle's to set" "launch/evaluate.sh --bundle --help" ;;
    --cache=?*) cache_flag=("$flag"); flags+=("$flag") ;;
    --phase=*) of_replay+=("$flag") ;;
    --prompts=*) of_generation+=("$flag") ;;
    --*) flags+=("$flag") ;;
    *) die 2 "$flag is not a flag" "write --name=value" ;;
  esac
done
[ -n "$store" ] || die 2 "a bundle replays recorded routing" "give --store=STORE"

pack() {
  local file part
  local files=()
  for part in "${parts[@]}"; do
    for file in status.json device_profile.json results.json run.json table.txt report.html; do
      [ ! -e "$out/$part/$file" ] || files+=("$part/$file")
    done
  done
  tar -C "$out" --sort=name --owner=0 --group=0 -czf "$out/bundle.tmp" "${files[@]}"
  mv "$out/bundle.tmp" "$out/routecast-bundle.tar.gz"
}

evaluate=$root/launch/evaluate.sh
begin_steps "$out"
mkdir -p "$out/status"
parts=(status transfer replay)
[ -z "$model" ] || parts+=(generate)
num_steps=${#parts[@]}
step status "status" "$evaluate" --mode=status --in="$out/status" --out="$out/status"
step transfer "the link, as it is" "$evaluate" --mode=transfer "${cache_flag[@]}" --out="$out/transfer"
step replay "replay at full-size geometry" "$evaluate" --compare "$store" "${flags[@]}" "${of_replay[@]}" --out="$out/replay"
[ -z "$model" ] ||
  step generate "generation" "$evaluate" --compare "$model" "$store" "${flags[@]}" "${of_generation[@]}" --out="$out/generate"
interruptible "packing" pack
printf '\n%s\n' "${times[@]}"
printf '\nto send back: %s (%s bytes)\n' "$out/routecast-bundle.tar.gz" \
  "$(stat -c %s "$out/routecast-bundle.tar.gz")"
