#!/usr/bin/env bash
# launch/corpus.sh: whole, clean, repeatable; keeps what is there; fails without half a file.
set -euo pipefail
export LC_ALL=C
root=${ROUTECAST_SOURCE_DIR:-$(cd "$(dirname "$0")/../.." && pwd)}
if [ ! -e /usr/share/dictd/gcide.dict.dz ] || [ ! -e /usr/share/wordnet/data.noun ] ||
   [ ! -e /usr/share/doc/anarchism/html/secA1.html ]; then
  echo "skipped: dict-gcide, anarchism or wordnet-base is not installed"
  exit 77
fi
out=$(mktemp -d)
trap 'rm -rf "$out"' EXIT
fail() { echo "default_corpus_test: $*"; exit 1; }

"$root/launch/corpus.sh" "$out"
markup='</?(p|b|i|a|br)( [^>]*)?>|&(amp|lt|gt|quot);|\[1913 Webster|^ |  '
check() {  # check FILE MIN_DOCUMENTS MIN_BYTES
  local documents bytes
  documents=$(awk 'BEGIN { RS = "" } END { print NR }' "$out/$1")
  bytes=$(stat -c %s "$out/$1")
  [ "$documents" -ge "$2" ] || fail "$1 has $documents documents, expected $2"
  [ "$bytes" -ge "$3" ] || fail "$1 has $bytes bytes, expected $3"
  ! grep -qE "$markup" "$out/$1" ||
    fail "$1 holds markup: $(grep -m1 -E "$markup" "$out/$1" | cut -c1-120)"
}
check gcide.txt 115000 20000000
check anarchism.txt 600 9000000
check wordnet.txt 110000 10000000
grep -q '^dog, domestic dog, Canis familiaris: a member of the genus Canis' "$out/wordnet.txt" ||
  fail "wordnet.txt lacks the dog"
[ "$(ls "$out" | wc -l)" -eq 3 ] || fail "left-overs: $(ls "$out")"

echo kept > "$out/gcide.txt"
"$root/launch/corpus.sh" "$out"
[ "$(cat "$out/gcide.txt")" = kept ] || fail "a file that was there was written again"
status=0
"$root/launch/corpus.sh" 2> /dev/null || status=$?
[ "$status" -eq 2 ] || fail "no argument: exit $status, not 2"
echo "default corpus: whole and clean"
