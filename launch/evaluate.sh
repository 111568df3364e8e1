#!/usr/bin/env bash
# Usage: launch/evaluate.sh FLAGS            generates under a budget and compares; --help lists them.
#        launch/evaluate.sh --bundle FLAGS   all figures of this machine in one file to send back
set -euo pipefail
if [ "${1:-}" = --bundle ]; then
  shift
  exec "$(dirname "$0")/bundle.sh" "$@"
fi
exec "$(dirname "$0")/run_ranks.sh" -n 1 routecast-evaluate "$@"
