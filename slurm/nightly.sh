#!/bin/bash
# Score new checkpoints every night: each night's job first submits the next, then works, so that a
# night that fails never ends the series. From the checkout, once:
#
#   sbatch slurm/nightly.sh --run /shared/runs/a
#
# Options on sbatch's command line hold for the first night only; export SBATCH_GPUS_PER_NODE=1,
# SBATCH_TIMELIMIT=2:00:00 and the like instead. Stop: scancel -n dcgan-fid-nightly
# NIGHTLY_AT (02:30): when; NIGHTLY_CHAIN=0: this night only, where cron or scrontab repeats it.
#SBATCH --job-name=dcgan-fid-nightly
#SBATCH --dependency=singleton
#SBATCH --nodes=1
#SBATCH --ntasks-per-node=1
#SBATCH --requeue
#SBATCH --open-mode=append
#SBATCH --output=slurm/logs/%x-%j.out
#SBATCH --signal=USR2@120

chained() {  # a requeued night finds its successor there already
  [ -n "$(squeue -h -u "$(id -u)" -n "$SLURM_JOB_NAME" -t PENDING -o %A)" ]
}

chain() {
  sbatch --job-name="$SLURM_JOB_NAME" --begin="${NIGHTLY_AT:-02:30}" \
    --partition="$SLURM_JOB_PARTITION" ${SLURM_JOB_ACCOUNT:+--account="$SLURM_JOB_ACCOUNT"} \
    slurm/nightly.sh "$@"
}

if [ "${NIGHTLY_CHAIN:-1}" = 1 ]; then
  for try in 1 2 3 4 5; do  # the controller may be restarting
    chained || chain "$@" && break
    sleep $((try * 10))
  done
fi
exec bash slurm/evaluate.sh "$@"
