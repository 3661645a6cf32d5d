#!/usr/bin/env bash
# Several machines that reach each other by ssh, ranks as processes under mpirun (Open MPI).
#
#     launch/mpirun.sh HOSTFILE DATA_DIR OUTPUT_DIR [flags of `elapid train`]
#
# HOSTFILE has a line `name slots=N` a machine, N the ranks there. The folders are on a disk that all machines share, and
# elapid, built with `--features mpi`, is at the same place on all of them (ELAPID names it). TP ranks of a machine share
# the model (1), the others GLOBAL_BATCH sequences a step (64), BATCH at a time each (1); each rank has CORES cores (8).
# Later flags override earlier ones. The same command goes on after an interruption.
set -euo pipefail
usage="usage: $0 HOSTFILE DATA_DIR OUTPUT_DIR [flags of elapid train]"
hosts=${1:?$usage} data=${2:?$usage} output=${3:?$usage}
tp=${TP:-1} global_batch=${GLOBAL_BATCH:-64} batch=${BATCH:-1} cores=${CORES:-8}

ranks=$(sed -e 's/#.*//' "$hosts" | awk 'match($0, /slots *= *[0-9]+/) { split(substr($0, RSTART, RLENGTH), words, "="); sum += words[2] } END { print sum + 0 }')
if ((ranks == 0 || ranks % tp || global_batch % (batch * (ranks / tp)))); then
    echo "error: the $ranks slots of $hosts are no multiple of TP $tp, or do not share GLOBAL_BATCH $global_batch evenly" >&2
    exit 2
fi
exec mpirun --hostfile "$hosts" -n "$ranks" --map-by "slot:PE=$cores" --bind-to core \
    "${ELAPID:-elapid}" train --model mamba2-1.3b --data-dir "$data" --output-dir "$output" --dtype bfloat16 \
    --tp "$tp" --use-zero-1 --sequence-parallel-enabled --threads "$cores" \
    --batch "$batch" --grad-accum-usteps $((global_batch / batch / (ranks / tp))) --max-steps 10000 --lr 2e-4 \
    --warmup-steps 500 --checkpoint-freq 200 --num-kept-checkpoint 3 --save-last-step --resume auto "${@:4}"
