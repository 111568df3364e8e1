#!/usr/bin/env bash
# Usage: launch/evaluate.sh FLAGS     generates under a budget and compares; --help lists them.
set -euo pipefail
exec "$(dirname "$0")/run_ranks.sh" -n 1 routecast-evaluate "$@"
