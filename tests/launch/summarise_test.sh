#!/usr/bin/env bash
# tests/support/summarise.py against runs that are known.
set -uo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
failed=0
cat >"$folder/tests.json" <<'JSON'
{"tests": [{"name": "a", "properties": [{"name": "LABELS", "value": ["unit"]}]},
           {"name": "g", "properties": [{"name": "LABELS", "value": ["gpu"]}]}]}
JSON
good='<testcase name="a" status="run"><system-out>ok</system-out></testcase>'
broken='<testcase name="a" status="fail"><failure message="x"/></testcase>'
inside='<testcase name="a" status="run"><system-out>x
[  SKIPPED ] A.B (0 ms)</system-out></testcase>'
gpu='<testcase name="g" status="notrun"><skipped message="x"/></testcase>'

check() {  # check NAME CODE LAST_LINE CASES...
  local name=$1 code=$2 last=$3 output
  shift 3
  echo "<testsuite>$*</testsuite>" >"$folder/tests.xml"
  output=$(/usr/bin/env python3 "$ROUTECAST_SOURCE_DIR/tests/support/summarise.py" \
    "$folder/tests.xml" "$folder/tests.json")
  local got=$?
  [ $got -eq "$code" ] && [ "$(tail -1 <<<"$output")" = "$last" ] || {
    echo "FAILED $name: exit $got, $output"
    failed=1
  }
}
check gpu-may-skip 0 "1 passed, 0 failed, 1 skipped" "$good" "$gpu"
check failure 1 "0 passed, 1 failed, 1 skipped" "$broken" "$gpu"
check skip-inside 1 "0 passed, 0 failed, 2 skipped" "$inside" "$gpu"
check did-not-run 1 "1 passed, 1 failed, 0 skipped" "$good"
check nothing-ran 1 "0 passed, 2 failed, 0 skipped" ""
exit $failed
