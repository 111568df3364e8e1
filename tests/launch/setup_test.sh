#!/usr/bin/env bash
# install_site of launch/lib.sh with a tiny wheel: repaired after an interruption, once for two
# callers, nothing left behind under the final name when a hash is wrong. No network.
set -uo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
export ROUTECAST_CACHE=$folder/cache PIP_NO_INDEX=1 PIP_FIND_LINKS=$folder/wheels
. "$ROUTECAST_SOURCE_DIR/launch/lib.sh"
locks=$folder/locks
mkdir -p "$locks" "$folder/wheels"
failed=0
fail() { echo "FAILED $*"; failed=1; }

"$(python_for_wheels)" - "$folder" <<'PYTHON'
import hashlib, sys, zipfile
folder = sys.argv[1]
wheel = folder + "/wheels/tiny-1.0-py3-none-any.whl"
with zipfile.ZipFile(wheel, "w") as z:
    z.writestr("tiny.py", "value = 1\n")
    info = "tiny-1.0.dist-info/"
    z.writestr(info + "METADATA", "Metadata-Version: 2.1\nName: tiny\nVersion: 1.0\n")
    z.writestr(info + "WHEEL", "Wheel-Version: 1.0\nRoot-Is-Purelib: true\nTag: py3-none-any\n")
    z.writestr(info + "RECORD", "tiny.py,,\n")
digest = hashlib.sha256(open(wheel, "rb").read()).hexdigest()
open(folder + "/locks/good.txt", "w").write(f"tiny==1.0 --hash=sha256:{digest}\n")
open(folder + "/locks/bad.txt", "w").write(f"tiny==1.0 --hash=sha256:{'0' * 64}\n")
PYTHON

site=$(site_of tiny good.txt)
mkdir -p "$site" "$site.tmp/site"           # as if interrupted between rename and seal
touch "$site/half" "$site.tmp/site/half"
(install_site "$site" good.txt) >"$folder/first.log" 2>&1 & first=$!
(install_site "$site" good.txt) >"$folder/second.log" 2>&1 & second=$!
wait $first || fail "first caller: $(cat "$folder/first.log")"
wait $second || fail "second caller: $(cat "$folder/second.log")"
[ "$(cat "$site/tiny.py" 2>/dev/null)" = "value = 1" ] || fail "the package is not there"
[ -e "$site/.sealed" ] || fail "not sealed"
[ ! -e "$site/half" ] || fail "an interrupted folder was taken for a whole one"
[ ! -e "$site.tmp" ] || fail "the temporary folder stayed"
[ "$(cat "$folder"/*.log | grep -c installing)" -eq 1 ] || fail "two callers installed twice"

bad=$(site_of tiny bad.txt)
error=$( (install_site "$bad" bad.txt) 2>&1 >/dev/null)
code=$?
[ $code -eq 4 ] || fail "a wrong hash gave exit $code: $error"
[ ! -e "$bad/.sealed" ] || fail "a wrong hash was installed"
# nproc heeds OpenMP's variables, which say nothing of how many compilers may run.
cores=$(env -u OMP_NUM_THREADS -u OMP_THREAD_LIMIT nproc)
jobs=$(build_jobs)
[ "$jobs" -ge 1 ] && [ "$jobs" -le "$cores" ] || fail "$jobs compile jobs on $cores cores"
[ "$(OMP_NUM_THREADS=1 OMP_THREAD_LIMIT=1 build_jobs)" = "$jobs" ] ||
  fail "OMP_NUM_THREADS changed the compile jobs"
[ "$(OMP_NUM_THREADS=1 cores)" = "$cores" ] || fail "OMP_NUM_THREADS changed the cores: tests ran one by one"
exit $failed
