#!/usr/bin/env bash
# The preset quick as it is, all four stages, and its table.
#
#   bash benchmarks/recipes/quick.sh [OUT]
set -euo pipefail
cd "$(dirname "$0")/../.."
out=${1:-runs/quick}

python -m lbllm quantize --model smollm2-135m-instruct --preset quick --out "$out"
python -m lbllm table "$(benchmarks/recipes/newest_run.sh)" --text wikitext2 --limit 10
