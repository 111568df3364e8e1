#!/usr/bin/env bash
# Usage: launch/train.sh [-n RANKS] FLAGS     fits a speculation model to a trace store; --help lists the flags.
set -euo pipefail
ranks=1
if [ "${1:-}" = -n ]; then ranks=$2; shift 2; fi
exec "$(dirname "$0")/run_ranks.sh" -n "$ranks" routecast-train "$@"
