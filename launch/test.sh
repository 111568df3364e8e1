#!/usr/bin/env bash
# Set-up, then every test. The last line is "N passed, N failed, N skipped"; exit 1 where a test
# failed, or one that is not labelled gpu skipped.
set -euo pipefail
. "$(dirname "$0")/lib.sh"
case ${1:-} in
  --help)
    echo "Usage: launch/test.sh [CTEST ARGUMENTS], e.g. -L unit, -R planner, -LE pipeline"
    exit 0 ;;
esac

"$root/launch/setup.sh" --tests
export ROUTECAST_PYTHON=$build/python/bin/python
export OMP_NUM_THREADS=1 MKL_NUM_THREADS=1
run_tests "$@"
