#!/usr/bin/env bash
# Usage: launch/pretrain.sh [-n RANKS] FLAGS     trains a small Switch Transformer from text; --help lists the flags.
set -euo pipefail
ranks=1
if [ "${1:-}" = -n ]; then ranks=$2; shift 2; fi
exec "$(dirname "$0")/run_ranks.sh" -n "$ranks" routecast-pretrain "$@"
