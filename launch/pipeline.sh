#!/usr/bin/env bash
# One configuration file: pre-train, collect, train, evaluate, pack. Done steps are not done again; a changed one
# and those behind it are. Interrupt it and start it again: it goes on.
set -euo pipefail
. "$(dirname "$0")/lib.sh"
. "$(dirname "$0")/steps.sh"

usage() {
  cat <<'TEXT'
Usage: launch/pipeline.sh [--dry_run] [--only=STEPS] [--again=STEPS] CONFIG
  --dry_run      print the commands, change nothing
  --only=STEPS   of these steps alone, comma-separated: pretrain, collect, train-NAME,
                 leaderboard-NAME, evaluate-NAME, pack
  --again=STEPS  do these anew and all behind them: what they left is removed first (collect: the
                 store), also where --only leaves a step behind them out
CONFIG has sections of flags, a flag a line; `#` begins a comment line:
  [pipeline]           out=FOLDER (default: out/pipeline) and ranks=N (default: 1)
  [pretrain]           flags of routecast-pretrain but --out, which is FOLDER/model
  [collect]            flags of routecast-collect but --store, which is FOLDER/store; --model is
                       FOLDER/model where there is a [pretrain]
  [train NAME]         flags of routecast-train but --store and --out; any number of sections
  [leaderboard NAME]   the same with --leaderboard=KINDS
  [evaluate NAME]      flags of routecast-evaluate; any number. --store is FOLDER/store, --out
                       FOLDER/evaluate-NAME, and --predictor all trained models unless it is given
  [pack]               traces=SIZE (48MiB): results of all steps, and documents of the store up to
                       that size, in FOLDER/pipeline.tar.gz
{out} in a flag is FOLDER.
configs/pipelines/ has an example.
TEXT
}

dry_run=no config= only= again=
while [ $# -gt 0 ]; do
  case $1 in
    --dry_run) dry_run=yes ;;
    --only=?*) only=${1#--only=} ;;
    --again=?*) again=${1#--again=} ;;
    --help) usage; exit 0 ;;
    -*) die 2 "unknown argument $1" "launch/pipeline.sh --help" ;;
    *) [ -z "$config" ] || die 2 "two configurations: $config and $1"; config=$1 ;;
  esac
  shift
done
[ -n "$config" ] || die 2 "no configuration is given" "launch/pipeline.sh CONFIG; --help says what it holds"
[ -r "$config" ] || die 2 "cannot read $config" "configs/pipelines/ has examples"

out=out/pipeline ranks=1
traces=              # bytes of the store that are packed; empty: there is no [pack]
sections=()          # pretrain, collect, "train NAME", "leaderboard NAME", "evaluate NAME", in this order of jobs
declare -A flags=()  # by section, a flag a line
wrong() { die 2 "$config, line $number: $1" "${2:-launch/pipeline.sh --help}"; }

read_setting() {  # of [pipeline]
  case $1 in
    out=?*) out=${1#out=} ;;
    ranks=*)
      ranks=${1#ranks=}
      case $ranks in '' | *[!0-9]* | 0) wrong "ranks=$ranks is not a number" ;; esac ;;
    *) wrong "'$1' is not a setting" "out=FOLDER or ranks=N" ;;
  esac
}

read_pack() {
  case $1 in
    traces=?*) traces=$(numfmt --from=iec-i --suffix=B "${1#traces=}" 2>/dev/null) ||
      wrong "'${1#traces=}' is no size" "traces=48MiB" ;;
    *) wrong "'$1' is not a setting" "traces=SIZE" ;;
  esac
  traces=${traces%B}
}

begin_section() {
  section=$1
  case $section in
    pipeline) return ;;
    pack)
      [ -z "$traces" ] || wrong "[pack] is there twice"
      traces=0
      return ;;
    pretrain | collect | "train "?* | "leaderboard "?* | "evaluate "?*) ;;
    *) wrong "[$section] is not a section" \
      "pipeline, pretrain, collect, train NAME, leaderboard NAME, evaluate NAME or pack" ;;
  esac
  case ${section#* } in *[!A-Za-z0-9._-]*) wrong "a name has letters, digits and ._-" ;; esac
  [ -z "${flags[$section]+there}" ] || wrong "[$section] is there twice"
  sections+=("$section")
  flags[$section]=
}

read_config() {
  local line number=0 section=
  while IFS= read -r line || [ -n "$line" ]; do
    number=$((number + 1))
    line=${line#"${line%%[![:space:]]*}"}
    line=${line%"${line##*[![:space:]]}"}
    case $line in
      '' | '#'*) ;;
      '['*']') line=${line#[}; begin_section "${line%]}" ;;
      *)
        case $section in
          '') wrong "a flag before the first section" ;;
          pipeline) read_setting "$line" ;;
          pack) read_pack "$line" ;;
          *)
            case $line in
              --store=* | --out=*) wrong "${line%%=*} is the pipeline's to set" "give out= in [pipeline]" ;;
              --?*) flags[$section]+=$line$'\n' ;;
              *) wrong "'$line' is not a flag" "write --name=value" ;;
            esac ;;
        esac ;;
    esac
  done <"$config"
}

among() { case ,$1, in *,"$2",*) ;; *) return 1 ;; esac; }  # among LIST NAME
selected() { [ -z "$only" ] || among "$only" "$1"; }

# Names of the steps in the order in which they run.
list_steps() {
  local section
  steps=()
  for section in pretrain collect; do [ -z "${flags[$section]+there}" ] || steps+=("$section"); done
  for section in "${sections[@]}"; do
    case $section in "train "* | "leaderboard "*) steps+=("${section/ /-}") ;; esac
  done
  for section in "${sections[@]}"; do
    case $section in "evaluate "*) steps+=("${section/ /-}") ;; esac
  done
  [ -z "$traces" ] || steps+=(pack)
}

check_names() {  # check_names FLAG LIST
  local name
  for name in ${2//,/ }; do
    among "$(IFS=,; echo "${steps[*]}")" "$name" || die 2 "$1=$2: '$name' is no step of $config" "steps: ${steps[*]}"
  done
}

# Before anything runs: an interrupted run goes on without --again.
forget_steps() {
  local name folder anew=no
  for name in "${steps[@]}"; do
    ! among "$again" "$name" || anew=yes
    [ "$anew" = yes ] || continue
    rm -f "$out/done/$name"
    # Also of steps that --only leaves out: what they made stands on what is made anew.
    case $name in
      pretrain) folder=model ;;
      collect) folder=store ;;
      pack) folder=pipeline.tar.gz ;;
      *) folder=$name ;;
    esac
    rm -rf "${out:?}/$folder"
  done
}

# job SECTION FOLDER COMMAND...: one step with the section's flags.
job() {
  local section=$1 folder=$2 given=()
  shift 2
  [ -z "${flags[$section]}" ] || mapfile -t given <<<"${flags[$section]%$'\n'}"
  given=("${given[@]//'{out}'/"$out"}")  # quoted: & would stand for the match
  if [ "$dry_run" = yes ]; then
    ! selected "$folder" || printf '%s\n' "$(printf '%q ' "$@" "${given[@]}")"
  elif selected "$folder"; then
    step "$folder" "$section" "$@" "${given[@]}"
  else
    pass_step "$section" "$@" "${given[@]}"
  fi
}

run_pipeline() {
  local section name models= asked model=()
  if [ -n "${flags[pretrain]+there}" ]; then
    job pretrain pretrain "$root/launch/pretrain.sh" -n "$ranks" --out="$out/model"
    model=(--model="$out/model")
  fi
  [ -z "${flags[collect]+there}" ] ||
    job collect collect "$root/launch/collect.sh" -n "$ranks" --store="$out/store" "${model[@]}"
  for section in "${sections[@]}"; do
    case $section in
      "train "*)
        name=train-${section#train }
        models+=${models:+,}$out/$name ;;
      "leaderboard "*) name=leaderboard-${section#leaderboard } ;;
      *) continue ;;
    esac
    job "$section" "$name" "$root/launch/train.sh" -n "$ranks" --store="$out/store" --out="$out/$name"
  done
  for section in "${sections[@]}"; do
    case $section in "evaluate "*) ;; *) continue ;; esac
    name=evaluate-${section#evaluate }
    asked=$models
    [[ $'\n'${flags[$section]}$'\n' != *$'\n--policy=on_demand\n'* ]] || asked=  # asks nobody
    # The section's own flags come later, so that its --predictor is the one that counts.
    job "$section" "$name" "$root/launch/evaluate.sh" --store="$out/store" --out="$out/$name" \
      ${asked:+--predictor="$asked"}
  done
}

# What of the steps is worth sending: results and logs, and a share of the traces.
pack() {
  local share try files=()
  local store_bytes
  rm -rf "$out/traces" "$out/pack.tmp"
  store_bytes=$(du -sb "$out/store" | cut -f1)
  # A store's index and logs do not shrink with its share: the second try is smaller.
  for try in 90 60 30; do
    [ "$traces" -gt 0 ] || break
    share=$(awk -v t="$traces" -v s="$store_bytes" -v p="$try" \
      'BEGIN { f = p / 100 * t / s; printf "%.6f", f < 1 ? f : 1 }')
    rm -rf "$out/traces"
    if ! "$build/bin/routecast-trace" subset --store="$out/store" --out="$out/traces" --share="$share"; then
      rm -rf "$out/traces"  # it holds what the failed subset says of itself
      break
    fi
    [ "$(du -sb "$out/traces" | cut -f1)" -gt "$traces" ] || break
    rm -rf "$out/traces"
  done
  mapfile -t files < <(cd "$out" && find . -path ./store -prune -o -path ./traces -prune -o -type f \
    \( -name '*.json' -o -name '*.jsonl' -o -name '*.txt' -o -name '*.html' -o -name '*.csv' -o -name '*.log' \) -print)
  if [ -d "$out/traces" ]; then files+=(traces)
  elif [ "$traces" -gt 0 ]; then say "no traces are packed: no share of the store fits into $traces bytes"; fi
  tar -C "$out" --sort=name --owner=0 --group=0 -czf "$out/pack.tmp" "${files[@]}" || return
  mv "$out/pack.tmp" "$out/pipeline.tar.gz"
  printf 'packed: %s (%s bytes)\n' "$out/pipeline.tar.gz" "$(stat -c %s "$out/pipeline.tar.gz")"
}

read_config
num_steps=${#sections[@]}
[ "$num_steps" -gt 0 ] || die 2 "$config has no section to run" "launch/pipeline.sh --help"
list_steps
check_names --only "$only"
check_names --again "$again"
if [ "$dry_run" = no ]; then
  begin_steps "$out"
  forget_steps
fi
run_pipeline
if [ -n "$traces" ] && [ "$dry_run" = no ] && selected pack; then
  [ "$traces" -eq 0 ] || [ -d "$out/store" ] || die 2 "[pack] has no traces: there is no $out/store"
  interruptible "packing" pack || die 4 "packing failed" "see what is said above"
fi
[ "$dry_run" = yes ] || printf '\n%s\n' "${times[@]}"
