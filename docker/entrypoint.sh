#!/bin/sh
# The first argument is a command; the others are passed to it.
#
#   train --config configs/dcgan_64.yaml ...    one process per GPU, on NNODES nodes
#   evaluate --run /runs/a --pending            the same
#   doctor --config configs/dcgan_64.yaml       the same: check this cluster for such a run
#   prepare SOURCE --out /data/shards ...       all cores of this machine
#   generate grid --run /runs/a --out x.png     one process
#   anything else                               runs unchanged: python, accelerate, sh, ...
#
# Variables: NNODES (1); NODE_RANK and MASTER_ADDR, required if NNODES > 1; MASTER_PORT (29500);
# GPUS_PER_NODE (number that nvidia-smi lists; 0 = CPU); NPROC_PER_NODE (one per GPU, else 1)
set -eu

case "${1:-}" in
  ''|-h|--help) sed -n '2,/^set/{/^set/d;s/^# \{0,1\}//;p}' "$0"; exit 0 ;;
  train|evaluate|doctor) module=pipeline.$1; shift ;;
  prepare|generate) module=pipeline.$1; shift; exec python -m "$module" "$@" ;;
  *) exec "$@" ;;
esac

# PyTorch must see as many GPUs as nvidia-smi; pipeline.runtime.launch compares.
gpus=${GPUS_PER_NODE:-$(nvidia-smi --list-gpus 2>/dev/null | grep -c '^GPU' || true)}
export GPUS_PER_NODE="$gpus"
processes=${NPROC_PER_NODE:-$gpus}
[ "$processes" -gt 0 ] || processes=1
[ "$gpus" -gt 0 ] || export ACCELERATE_USE_CPU=true  # gloo
nodes=${NNODES:-1}
world=$((nodes * processes))
if [ "$nodes" -gt 1 ] && { [ -z "${NODE_RANK:-}" ] || [ -z "${MASTER_ADDR:-}" ]; }; then
  echo "error: NNODES ($nodes): NODE_RANK (${NODE_RANK:-missing}) must be 0 to $((nodes - 1)) and" \
    "MASTER_ADDR (${MASTER_ADDR:-missing}) the address of node 0: set both on each node." >&2
  exit 2
fi

# An engine signals the first process only: a single Python, or a launcher, which forwards signals.
[ "$world" -gt 1 ] || exec python -m "$module" "$@"
exec python -m accelerate.commands.launch --multi_gpu --quiet --num_machines "$nodes" \
  --num_processes "$world" --machine_rank "${NODE_RANK:-0}" \
  --main_process_ip "${MASTER_ADDR:-127.0.0.1}" --main_process_port "${MASTER_PORT:-29500}" \
  --gpu_ids all --mixed_precision no --dynamo_backend no -m "$module" "$@"
