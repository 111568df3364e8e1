#!/usr/bin/env bash
# One configuration file: collect, train, evaluate. Done steps are not done again; a changed one
# and those behind it are. Interrupt it and start it again: it goes on.
set -euo pipefail
. "$(dirname "$0")/lib.sh"
. "$(dirname "$0")/steps.sh"

usage() {
  cat <<'TEXT'
Usage: launch/pipeline.sh [--dry_run] CONFIG
CONFIG has sections of flags, a flag a line; `#` begins a comment line:
  [pipeline]           out=FOLDER (default: out/pipeline) and ranks=N (default: 1)
  [collect]            flags of routecast-collect but --store, which is FOLDER/store
  [train NAME]         flags of routecast-train but --store and --out; any number of sections
  [evaluate NAME]      flags of routecast-evaluate; any number. --store is FOLDER/store, --out
                       FOLDER/evaluate-NAME, and --predictor all trained models unless it is given
configs/pipelines/ has an example.
TEXT
}

dry_run=no config=
while [ $# -gt 0 ]; do
  case $1 in
    --dry_run) dry_run=yes ;;
    --help) usage; exit 0 ;;
    -*) die 2 "unknown argument $1" "launch/pipeline.sh --help" ;;
    *) [ -z "$config" ] || die 2 "two configurations: $config and $1"; config=$1 ;;
  esac
  shift
done
[ -n "$config" ] || die 2 "no configuration is given" "launch/pipeline.sh CONFIG; --help says what it holds"
[ -r "$config" ] || die 2 "cannot read $config"

out=out/pipeline ranks=1
sections=()          # collect, "train NAME", "evaluate NAME", in this order of jobs
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

begin_section() {
  section=$1
  case $section in
    pipeline) return ;;
    collect | "train "?* | "evaluate "?*) ;;
    *) wrong "[$section] is not a section" "pipeline, collect, train NAME or evaluate NAME" ;;
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

# job SECTION FOLDER COMMAND...: one step with the section's flags.
job() {
  local section=$1 folder=$2 given=()
  shift 2
  [ -z "${flags[$section]}" ] || mapfile -t given <<<"${flags[$section]%$'\n'}"
  if [ "$dry_run" = yes ]; then printf '%s\n' "$(printf '%q ' "$@" "${given[@]}")"; return; fi
  step "$folder" "$section" "$@" "${given[@]}"
}

run_pipeline() {
  local section name models=
  for section in "${sections[@]}"; do
    [ "$section" != collect ] ||
      job collect collect "$root/launch/collect.sh" -n "$ranks" --store="$out/store"
  done
  for section in "${sections[@]}"; do
    case $section in "train "*) ;; *) continue ;; esac
    name=train-${section#train }
    models+=${models:+,}$out/$name
    job "$section" "$name" "$root/launch/train.sh" -n "$ranks" --store="$out/store" --out="$out/$name"
  done
  for section in "${sections[@]}"; do
    case $section in "evaluate "*) ;; *) continue ;; esac
    name=evaluate-${section#evaluate }
    # The section's own flags come later, so that its --predictor is the one that counts.
    job "$section" "$name" "$root/launch/evaluate.sh" --store="$out/store" --out="$out/$name" \
      ${models:+--predictor="$models"}
  done
}

read_config
num_steps=${#sections[@]}
[ "$num_steps" -gt 0 ] || die 2 "$config has no section to run" "launch/pipeline.sh --help"
[ "$dry_run" = yes ] || begin_steps "$out"
run_pipeline
[ "$dry_run" = yes ] || printf '\n%s\n' "${times[@]}"
