#!/bin/bash
# Score new checkpoints every night. Each night's job first submits the next one, so that a night that
# fails does not end the series. From the checkout, once:
#
#   sbatch slurm/nightly.sh --run /shared/runs/a
#
# The next nights request what this one was given: GPUs, CPUs, memory, time, partition, account, QOS.
# To stop: scancel -n dcgan-fid-nightly (again, if a night had just begun: it may submit the next)
# NIGHTLY_AT (02:30): time of the next night. NIGHTLY_CHAIN=0: this night only, for cron or scrontab.
#SBATCH --job-name=dcgan-fid-nightly
#SBATCH --dependency=singleton
#SBATCH --nodes=1
#SBATCH --requeue
#SBATCH --open-mode=append
#SBATCH --output=slurm/logs/%x-%j.out
#SBATCH --signal=USR2@120

case ${1:-} in
  -h|--help) sed -n '2,/^#SBATCH/{/^#SBATCH/d;s/^# \{0,1\}//;p}' "$0"; exit 0 ;;
esac

chained() {  # test whether the next night waits already, submitted before a requeue of this one
  [ -n "$(squeue -h -u "$(id -u)" -n "$SLURM_JOB_NAME" -t PENDING -o %A)" ]
}

chain() {  # submit the next night with the options of this one
  local option value words=()
  while read -r option value; do
    case $value in ''|N/A|'(null)') ;; *) words+=("--$option=$value") ;; esac
  done <<END
partition $SLURM_JOB_PARTITION
account ${SLURM_JOB_ACCOUNT:-}
qos ${SLURM_JOB_QOS:-}
reservation ${SLURM_JOB_RESERVATION:-}
time $(squeue -h -j "$SLURM_JOB_ID" -o %l)
gres $(squeue -h -j "$SLURM_JOB_ID" -o %b | sed 's,gres[:/],,g')
gpus ${SLURM_GPUS:-}
cpus-per-task ${SLURM_CPUS_PER_TASK:-}
cpus-per-gpu ${SLURM_CPUS_PER_GPU:-}
mem ${SLURM_MEM_PER_NODE:-}
mem-per-cpu ${SLURM_MEM_PER_CPU:-}
mem-per-gpu ${SLURM_MEM_PER_GPU:-}
END
  (
    # Slurm's variables describe this job, and sbatch would pass them on to the next.
    for option in "${!SLURM_@}"; do [ "$option" = SLURM_CONF ] || unset "$option"; done
    unset SBATCH_GPUS_PER_NODE  # --gres names the GPUs
    sbatch --job-name="$1" --begin="${NIGHTLY_AT:-02:30}" "${words[@]}" slurm/nightly.sh "${@:2}"
  )
}

if [ "${NIGHTLY_CHAIN:-1}" = 1 ] && [ -n "${SLURM_JOB_ID:-}" ]; then  # else evaluate.sh says what is wrong
  for try in 1 2 3 4 5; do  # the controller may be restarting
    chained || chain "$SLURM_JOB_NAME" "$@" && break
    [ "$try" -lt 5 ] || { echo "NO NEXT NIGHT: submit slurm/nightly.sh again"; break; }
    sleep $((try * 10))
  done
fi
exec bash slurm/evaluate.sh "$@"
