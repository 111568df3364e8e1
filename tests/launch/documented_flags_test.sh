#!/usr/bin/env bash
# Every flag of the programs is named in README.md or docs/*.md, and every flag named there is one
# of a program, a launch script or a benchmark. Reads sources alone.
set -euo pipefail
root=${ROUTECAST_SOURCE_DIR:-$(cd "$(dirname "$0")/../.." && pwd)}
# Of other programs that the documents tell how to call: sbatch, srun, mpirun, ctest, tensorboard.
foreign="test-dir nodes ntasks-per-node cpus-per-task gpus-per-task time gres signal mpi hostfile logdir"
shared="help version flagfile"  # read by launch/flags.cc itself

defined() {  # defined FILE...: the flags that these sources define
  cat "$@" </dev/null | tr '\n' ' ' | grep -oE 'DEFINE_[a-z0-9]+\( *[a-z_0-9]+' | sed 's/.*( *//' | sort -u
}
named() {  # named ROOT: the flags that its documents name
  cat "$1"/README.md "$1"/docs/*.md | grep -oE -- '(^|[^-a-zA-Z0-9])--[a-z][a-z0-9_-]*' |
    sed 's/.*--//' | sort -u
}
of_scripts() {  # of_scripts ROOT: what its scripts compare their arguments with
  cat "$1"/launch/*.sh | grep -oE -- '(^ *|\| *|= )--[a-z_-]+(=\??\*)?( *[|)]| \])' |
    grep -oE -- '--[a-z_-]+' | sed 's/^--//' | sort -u
}
scan() {  # scan ROOT: prints what is not documented, and what does not exist
  local flags known
  flags=$(defined "$1"/launch/*.cc)
  known=$(printf '%s\n' $flags $(of_scripts "$1") $shared $foreign
          { defined "$1"/bench/*.cc || true; } 2>/dev/null
          sed 's/^/no/' <<<"$flags")
  comm -23 <(echo "$flags") <(named "$1") | sed 's/.*/--&: no document names it/'
  comm -13 <(sort -u <<<"$known") <(named "$1") | sed 's/.*/--&: named in a document, and no flag/'
}

# The check itself must be able to fail.
bad=$(mktemp -d)
trap 'rm -rf "$bad"' EXIT
mkdir -p "$bad/launch" "$bad/docs" "$bad/bench"
printf 'DEFINE_bool(said, false, "");\nDEFINE_double(\n    unsaid, 1, "");\n' >"$bad/launch/a.cc"
printf 'case $1 in\n  --quick) quick=yes ;;\nesac\n' >"$bad/launch/a.sh"
printf '`--said`, `--nosaid`, `--quick`, `--misspelt`\n' >"$bad/docs/a.md"
: >"$bad/README.md"
[ "$(scan "$bad" | tr '\n' ';')" = \
  "--unsaid: no document names it;--misspelt: named in a document, and no flag;" ] ||
  { echo "documented_flags_test does not see a fault: $(scan "$bad")"; exit 1; }

found=$(scan "$root")
if [ -n "$found" ]; then echo "$found"; exit 1; fi
echo "flags: all are documented, all that are documented exist"
