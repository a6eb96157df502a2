#!/usr/bin/env bash
# 4-bit activations and KV cache for a run with 16-bit ones. A quarter of an hour on two cores of a Zen 4.
#
#   bash benchmarks/recipes/activations.sh RUN OUT
#
# Stage 3 searches the knees and trains nothing; stage 4 then trains 150,000 tokens end to end. runs/four came of
# runs/small3 in this way.
set -euo pipefail
cd "$(dirname "$0")/../.."
run=${1:?give a run} out=${2:?give a folder}

python -m lbllm quantize --from "$run" --act-bits 4 --kv-bits 4 --corpus embedded+wikipedia+everyday-more \
    --set seed=3 --set aar.epochs=0 --set e2e.tokens=150000 --set e2e.seq_len=512 --set e2e.batch_tokens=2048 \
    --set e2e.lr_levels=3e-3 --set e2e.lr_weight=2e-3 --out "$out"
python -m lbllm table "$(benchmarks/recipes/newest_run.sh)" --text wikitext2 --limit 10
