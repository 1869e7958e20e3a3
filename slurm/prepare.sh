#!/bin/bash
# Pack a large source on many nodes: each task of the array packs its part of the shards, and the last
# task to end writes the index. From the checkout, with the arguments of pipeline.prepare:
#
#   sbatch --array=0-7 --cpus-per-task=16 slurm/prepare.sh /data/photos --out /shared/shards --size 64
#
# A task that is killed or meets its time limit requeues itself. To pack what is still missing, submit
# the same line again; nothing is packed twice.
#SBATCH --job-name=dcgan-prepare
#SBATCH --nodes=1
#SBATCH --requeue
#SBATCH --open-mode=append
#SBATCH --output=slurm/logs/%x-%A_%a.out
#SBATCH --signal=TERM@60

set -uo pipefail
trap : TERM USR1 USR2
# shellcheck source=slurm/launch.sh
. slurm/launch.sh || { echo "$PWD: not the checkout; call sbatch there, or give --chdir"; exit 2; }

if [ -z "${SLURM_ARRAY_TASK_ID:-}" ]; then
  say "not an array: submit it with sbatch --array=0-7 slurm/prepare.sh SOURCE --out DIR ..."
  exit 2
fi
# shellcheck disable=SC2153
first=$SLURM_ARRAY_TASK_MIN last=$SLURM_ARRAY_TASK_MAX stride=$SLURM_ARRAY_TASK_STEP
if [ $(((last - first) / stride + 1)) -ne "$SLURM_ARRAY_TASK_COUNT" ]; then
  say "--array: must be a range like 0-7 or 0-14:2, not a list: the tasks share the work evenly"
  exit 2
fi
part=$(((SLURM_ARRAY_TASK_ID - first) / stride))/$SLURM_ARRAY_TASK_COUNT
say "part $part of job $SLURM_ARRAY_JOB_ID, restart $restarts, on $SLURM_JOB_NODELIST"
alone -m pipeline.prepare "$@" --part "$part"
status=$? now=$(state)
say "srun ended with $status, job $now"
# Requeue after a signal only: a mistake in the arguments or the source (2) would occur again.
[ "$status" -ge 128 ] && [ "$now" = RUNNING ] && requeue 5 "part $part"
exit "$status"
