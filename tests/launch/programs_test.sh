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
echo "$found programs"
exit $failed
