#!/usr/bin/env bash
# Usage: launch/collect.sh [-n RANKS] FLAGS     records routing into a trace store; --help lists the flags.
set -euo pipefail
ranks=1
if [ "${1:-}" = -n ]; then ranks=$2; shift 2; fi
exec "$(dirname "$0")/run_ranks.sh" -n "$ranks" routecast-collect "$@"
