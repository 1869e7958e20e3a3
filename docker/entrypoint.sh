#!/bin/sh
# The first word says what runs; everything after it are its own arguments.
#
#   train --config configs/dcgan_64.yaml ...    one process per GPU, on NNODES nodes
#   evaluate --run /runs/a --pending            the same
#   doctor --config configs/dcgan_64.yaml       the same: is this cluster fit for it?
#   prepare SOURCE --out /data/shards ...       one command, all cores
#   anything else                               is started as it is: python, accelerate, sh, ...
#
# NNODES (1); NODE_RANK and MASTER_ADDR, needed with more than one; MASTER_PORT (29500)
# GPUS_PER_NODE (those that nvidia-smi lists; 0 means CPU), NPROC_PER_NODE (one per GPU, else 1)
set -eu

case "${1:-}" in
  ''|-h|--help) sed -n '2,/^set/{/^set/d;s/^# \{0,1\}//;p}' "$0"; exit 0 ;;
  train|evaluate|doctor) module=pipeline.$1; shift ;;
  prepare) shift; exec python -m pipeline.prepare "$@" ;;
  *) exec "$@" ;;
esac

# PyTorch must see what nvidia-smi sees; pipeline.runtime.launch compares.
gpus=${GPUS_PER_NODE:-$(nvidia-smi --list-gpus 2>/dev/null | grep -c '^GPU' || true)}
export GPUS_PER_NODE="$gpus"
processes=${NPROC_PER_NODE:-$gpus}
[ "$processes" -gt 0 ] || processes=1
[ "$gpus" -gt 0 ] || export ACCELERATE_USE_CPU=true  # gloo
nodes=${NNODES:-1}
world=$((nodes * processes))
if [ "$nodes" -gt 1 ] && { [ -z "${NODE_RANK:-}" ] || [ -z "${MASTER_ADDR:-}" ]; }; then
  echo "error: NNODES ($nodes): needs on each node NODE_RANK (0 to $((nodes - 1)); is" \
    "${NODE_RANK:-missing}) and MASTER_ADDR (where node 0 is reached; is ${MASTER_ADDR:-missing})." >&2
  exit 2
fi

# Signals go to the first process alone. One Python takes them itself; a launcher hands them on.
[ "$world" -gt 1 ] || exec python -m "$module" "$@"
exec python -m accelerate.commands.launch --multi_gpu --quiet --num_machines "$nodes" \
  --num_processes "$world" --machine_rank "${NODE_RANK:-0}" \
  --main_process_ip "${MASTER_ADDR:-127.0.0.1}" --main_process_port "${MASTER_PORT:-29500}" \
  --gpu_ids all --mixed_precision no --dynamo_backend no -m "$module" "$@"
