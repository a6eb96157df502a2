#!/usr/bin/env bash
# A million tokens more for a run with 16-bit activations, end to end. Two hours on two cores of a Zen 4.
#
#   bash benchmarks/recipes/further.sh RUN SEED OUT
#
# RUN is a finished run's id: its latent weights are in its folder. SEED chooses which part of the text is read:
# runs/small3 came of the second run of shipped_checkpoint.sh with seed 2, runs/small4 of runs/small3 with seed 3.
set -euo pipefail
cd "$(dirname "$0")/../.."
run=${1:?give a run} seed=${2:?give a seed} out=${3:?give a folder}

python -m lbllm quantize --from "$run" --corpus embedded+wikipedia --set seed="$seed" --set e2e.tokens=1000000 \
    --set e2e.seq_len=512 --set e2e.batch_tokens=2048 --set e2e.lr_levels=3e-3 --set e2e.lr_weight=2e-3 --out "$out"
python -m lbllm table "$(benchmarks/recipes/newest_run.sh)" --text wikitext2 --limit 10
