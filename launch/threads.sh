#!/usr/bin/env bash
# One machine, ranks as threads of one process; nothing is installed.
#
#     launch/threads.sh DATA_DIR OUTPUT_DIR [flags of `elapid train`]
#
# RANKS data-parallel ranks (2) share GLOBAL_BATCH sequences a step (64), BATCH at a time each (4). Later flags override
# earlier ones, so `--model mamba2-370m` at the end chooses another model. The same command goes on after an interruption.
set -euo pipefail
usage="usage: $0 DATA_DIR OUTPUT_DIR [flags of elapid train]"
data=${1:?$usage} output=${2:?$usage}
ranks=${RANKS:-2} global_batch=${GLOBAL_BATCH:-64} batch=${BATCH:-4}

if ((global_batch % (batch * ranks))); then
    echo "error: GLOBAL_BATCH $global_batch is no multiple of BATCH $batch times RANKS $ranks" >&2
    exit 2
fi
exec "${ELAPID:-elapid}" train --model mamba2-130m --data-dir "$data" --output-dir "$output" --dp "$ranks" --use-zero-1 \
    --batch "$batch" --grad-accum-usteps $((global_batch / batch / ranks)) --max-steps 10000 --lr 6e-4 --warmup-steps 500 \
    --checkpoint-freq 200 --num-kept-checkpoint 3 --save-last-step --resume auto "${@:3}"
