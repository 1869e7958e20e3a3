#!/bin/bash
# Score every checkpoint of a run that has no score yet. Scores that exist are not computed again, so
# the same job may run any number of times, also beside the training. From the checkout:
#
#   sbatch slurm/evaluate.sh                                     # runs/dcgan_64
#   sbatch --gpus-per-node=4 slurm/evaluate.sh --run /shared/runs/a
#   sbatch slurm/evaluate.sh --run /shared/runs/a --watch        # until the training has finished
#
# It takes all arguments of `python -m pipeline.evaluate`. At its time limit and when preempted it
# requeues itself. Settings: slurm/README.md.
#SBATCH --job-name=dcgan-fid
#SBATCH --nodes=1
#SBATCH --requeue
#SBATCH --open-mode=append
#SBATCH --output=slurm/logs/%x-%j.out
#SBATCH --signal=USR2@120

set -uo pipefail
trap : TERM USR1 USR2

# shellcheck source=slurm/launch.sh
. slurm/launch.sh || { echo "$PWD: not the checkout; call sbatch there, or give --chdir"; exit 2; }

case ${1:-} in
  reference|fetch-weights|probe) ;;  # commands with arguments of their own
  *)
    case " $* " in
      *" --run"*|*" --config"*|*" --checkpoint"*|*" --snapshot"*|*" --against"*) ;;
      *) set -- --run "${RUN_DIR:-runs/dcgan_64}" "$@" ;;
    esac
    case " $* " in
      *" --pending"*|*" --watch"*|*" --checkpoint"*|*" --snapshot"*|*" --images"*) ;;
      *) set -- --pending "$@" ;;
    esac ;;
esac

export STOPPED_EXIT_CODE=75
require_counted_gpus
output=$(mktemp)
trap 'rm -f "$output"' EXIT
say "restart $restarts of job $job: $WORLD process(es) on $SLURM_JOB_NODELIST, evaluate $*"
launch 0 pipeline.evaluate "$@" 2>&1 | tee "$output"
status=$? now=$(state)
say "srun ended with $status, job $now"
# A launcher turns every exit code into 1. The message of rank 0 tells a stop on any number of ranks.
if [ "$status" -eq 75 ] || grep -q 'run the same command again to go on' "$output"; then
  [ "$now" = RUNNING ] && requeue 50 "the stop"
fi
exit "$status"
