#!/usr/bin/env bash
# The preset quick with float16 parameters and one activation range per token, groups of 64 and of 128.
#
#   bash benchmarks/recipes/quick_groups.sh [FOLDER]      FOLDER for the results, runs by default
set -euo pipefail
cd "$(dirname "$0")/../.."
folder=${1:-runs}

for size in 64 128; do
    python -m lbllm quantize --model smollm2-135m-instruct --preset quick --group-size "$size" \
        --set quant.param_bits=16 --set quant.act_group_size=-1 --corpus embedded+wikipedia --out "$folder/m$size"
    python -m lbllm table "$(benchmarks/recipes/newest_run.sh)" --text wikitext2 --limit 10
done
