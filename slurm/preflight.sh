#!/bin/bash
# Check software, GPUs, network, shared folders and shards of an allocation before a run. Give it the
# sizes and the arguments of the run:
#
#   sbatch --nodes=2 --gpus-per-node=8 slurm/preflight.sh
#   salloc --nodes=2 --gpus-per-node=8 bash slurm/preflight.sh run.dir=/shared/runs/a   # waits
#   sbatch --nodes=2 --gpus-per-node=8 --export=ALL,PREFLIGHT=1 slurm/train.sh        # then trains
#
# Prints a table and READY (exit code 0) or NOT READY (1). The exit code is 2 for a mistake in the
# arguments, 75 for an interrupted preflight. PREFLIGHT_MINUTES (10): time limit of each step.
#SBATCH --job-name=dcgan-preflight
#SBATCH --nodes=1
#SBATCH --open-mode=append
#SBATCH --output=slurm/logs/%x-%j.out

set -uo pipefail
# shellcheck source=slurm/launch.sh
. slurm/launch.sh || { echo "$PWD: not the checkout; call sbatch there, or give --chdir"; exit 2; }
with_config "$@"
require_counted_gpus

say "preflight of $WORLD process(es) on $SLURM_JOB_NODELIST, rendezvous $MASTER_ADDR"
export SLURM_TIMELIMIT=${PREFLIGHT_MINUTES:-10}  # of each step

cut_short() { say "interrupted: srun ended with $1; submit the preflight again"; exit 75; }

# Without the checkout, Python and the libraries on each node there is no table: check them first.
step=("${everywhere[@]}" --label)
task "$PYTHON" -c 'import pipeline.runtime.launch, torch, accelerate'
status=$?
[ "$status" -ne 143 ] || cut_short "$status"  # SIGTERM
if [ "$status" -ne 0 ]; then
  say "NOT READY: a node cannot start $PYTHON in $PWD; the lines above name it by its number in" \
    "$SLURM_JOB_NODELIST. Put both on a file system that all nodes see"
  exit 1
fi
run_folder "${arguments[@]}" >/dev/null || { [ $? -ne 2 ] || exit 2; }

SECONDS=0
report=$(launch 9 pipeline.doctor "${arguments[@]}" | sed 's/^ *[0-9]*: //')
status=$?
[ -z "$report" ] || echo "$report"
# NCCL_DEBUG=INFO prints more lines after the table.
grep -qx READY <<<"$report" && exit 0
grep -q '^NOT READY' <<<"$report" && exit 1
[ "$SECONDS" -ge $((SLURM_TIMELIMIT * 60 - 10)) ] || cut_short "$status"
say "NOT READY: no table within $SLURM_TIMELIMIT minutes. If nothing above says why, the nodes do" \
  "not reach $MASTER_ADDR: set MASTER_ADDR, GLOO_SOCKET_IFNAME or NCCL_SOCKET_IFNAME"
exit 1
