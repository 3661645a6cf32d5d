#!/usr/bin/env bash
# Trainium instances without Slurm or MPI: a process a core of this instance.
#
#     launch/trainium.sh CORES DATA_DIR OUTPUT_DIR [flags of `elapid train`]
#
# TP cores share the model (1), the others GLOBAL_BATCH sequences a step (64), BATCH at a time each (1). On several instances
# the same command runs on each: NODES says how many there are (1), NODE which one this is, from 0 (0), and MASTER_ADDR the
# address of the first; the folders are on a disk that all see. Later flags override earlier ones. SIGTERM and Ctrl-C save
# and leave; the same command goes on after an interruption.
set -euo pipefail
usage="usage: $0 CORES DATA_DIR OUTPUT_DIR [flags of elapid train]"
cores=${1:?$usage} data=${2:?$usage} output=${3:?$usage}
tp=${TP:-1} global_batch=${GLOBAL_BATCH:-64} batch=${BATCH:-1} nodes=${NODES:-1} node=${NODE:-0}

ranks=$((cores * nodes))
if ((ranks % tp || global_batch % (batch * (ranks / tp)))); then
    echo "error: $ranks cores are no multiple of TP $tp, or do not share GLOBAL_BATCH $global_batch evenly" >&2
    exit 2
fi
if ((nodes > 1)) && [ -z "${MASTER_ADDR:-}" ]; then
    echo "error: $nodes instances, and MASTER_ADDR does not name the first" >&2
    exit 2
fi
export WORLD_SIZE=$ranks LOCAL_WORLD_SIZE=$cores MASTER_ADDR=${MASTER_ADDR:-127.0.0.1}
threads=$(($(nproc) / cores > 0 ? $(nproc) / cores : 1))

pids=()
# From a terminal Ctrl-C reaches the processes by itself, and a second signal would end them at once.
trap : INT
trap 'kill -TERM "${pids[@]}" 2>/dev/null || true' TERM
for ((core = 0; core < cores; core++)); do
    RANK=$((node * cores + core)) LOCAL_RANK=$core "${ELAPID:-elapid}" train --device neuron \
        --compile-cache "$output/neuron-cache" --model mamba2-130m --data-dir "$data" --output-dir "$output" \
        --dtype bfloat16 --tp "$tp" --use-zero-1 --sequence-parallel-enabled --threads $threads --batch "$batch" \
        --grad-accum-usteps $((global_batch / batch / (ranks / tp))) --max-steps 10000 --lr 6e-4 --warmup-steps 500 \
        --checkpoint-freq 200 --num-kept-checkpoint 3 --save-last-step --resume auto "${@:4}" &
    pids+=($!)
done

# Waits for a process, whatever signals come in between.
ended() {
    local code=0
    wait "$1" || code=$?
    while kill -0 "$1" 2>/dev/null; do
        code=0
        wait "$1" || code=$?
    done
    return $code
}
result=0
for pid in "${pids[@]}"; do
    ended "$pid" || result=$?
done
exit $result
