#!/usr/bin/env bash
# Set-up, then the tests of all that builds without LibTorch, under a sanitizer: what it finds
# fails its test. The last line is as of test.sh.
set -euo pipefail
. "$(dirname "$0")/lib.sh"
case ${1:-} in
  asan | tsan) preset=$1; shift ;;
  --help)
    echo "Usage: launch/sanitize.sh asan|tsan [CTEST ARGUMENTS]"
    echo "asan: AddressSanitizer and UBSan; tsan: ThreadSanitizer"
    exit 0 ;;
  *) die 2 "asan or tsan?" "launch/sanitize.sh --help" ;;
esac

"$root/launch/setup.sh" --tests
export ROUTECAST_PYTHON=$build/python/bin/python
export CCACHE_DIR=${CCACHE_DIR:-$cache/ccache} CCACHE_BASEDIR=$root CCACHE_NOHASHDIR=1
build=$root/build-$preset
mkdir -p "$build"
cmake -S "$root" --preset "$preset" >"$build/configure.log" 2>&1 ||
  die 4 "configuring failed: $(grep -m1 -A2 'CMake Error' "$build/configure.log" | tail -1)" \
    "see $build/configure.log"
say "building under $preset (log: $build/build.log)"
ninja -C "$build" -j "${ROUTECAST_JOBS:-$(build_jobs)}" >"$build/build.log" 2>&1 || {
  grep -m 20 -E 'error|FAILED' "$build/build.log" >&2 || tail -20 "$build/build.log" >&2
  die 1 "the build failed" "see $build/build.log"
}
run_tests "$@"
