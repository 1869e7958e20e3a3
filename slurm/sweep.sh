#!/bin/bash
# Train a grid of runs as a job array: each task trains one combination of the values given as lists,
# as train.sh does. From the checkout:
#
#   sbatch --array=0-5 slurm/sweep.sh --config configs/demo.yaml optim.g_lr=1e-4,2e-4 run.seed=0,1,2
#
# The runs are folders of SWEEP_DIR (runs/sweep), named by their values, and one group in W&B. A task
# with an index beyond the grid prints the right --array and ends. The same line again resumes the
# unfinished runs. --array=0-5%2 trains two at a time.
#
# With SWEEP_ID it runs a sweep of W&B (configs/sweep.yaml): each task is an agent that trains
# SWEEP_COUNT (1) of its runs on its one node:
#
#   SWEEP_ID=me/dcgan/4f7c2a1b sbatch --array=0-19%4 --gpus-per-node=1 slurm/sweep.sh
#SBATCH --job-name=dcgan-sweep
#SBATCH --nodes=1
#SBATCH --requeue
#SBATCH --open-mode=append
#SBATCH --output=slurm/logs/%x-%A_%a.out
#SBATCH --signal=USR2@120

case ${1:-} in
  -h|--help) sed -n '2,/^#SBATCH/{/^#SBATCH/d;s/^# \{0,1\}//;p}' "$0"; exit 0 ;;
esac

folder=${SWEEP_DIR:-runs/sweep}

if [ -n "${SWEEP_ID:-}" ]; then
  set -uo pipefail
  # shellcheck source=slurm/launch.sh
  . slurm/launch.sh || { echo "$PWD: not the checkout; call sbatch there, or give --chdir"; exit 2; }
  case $PYTHON in */*) PATH=${PYTHON%/*}:$PATH ;; esac  # the sweep's command is `accelerate launch`
  export SWEEP_DIR=$folder
  require_counted_gpus
  say "job $job: ${SWEEP_COUNT:-1} run(s) of sweep $SWEEP_ID on $SLURM_JOB_NODELIST"
  # shellcheck disable=SC2034
  step=("${everywhere[@]}")
  task "$PYTHON" -m wandb agent --count "${SWEEP_COUNT:-1}" "$@" "$SWEEP_ID"
  exit
fi

left=${SLURM_ARRAY_TASK_ID:-0} size=1 name='' words=()
for word in "$@"; do
  value=${word#*=}
  # A list in brackets is a single value.
  if [[ $word != *=*,* || $value == \[* ]]; then
    words+=("$word")
    continue
  fi
  IFS=, read -ra values <<<"$value"
  # Task 0 takes the first value of each list, task 1 the second value of the first list, and so on.
  chosen=${values[left % ${#values[@]}]}
  left=$((left / ${#values[@]})) size=$((size * ${#values[@]}))
  key=${word%%=*}
  words+=("$key=$chosen") name+=${name:+_}${key##*.}=$chosen
done
if [ -z "${SLURM_ARRAY_TASK_ID:-}" ] || [ "$left" -gt 0 ]; then
  echo "the grid has $size combinations: sbatch --array=0-$((size - 1)) slurm/sweep.sh ..."
  exit 2
fi
exec bash slurm/train.sh "${words[@]}" "run.dir=$folder/${name:-run}" "tracking.group=${folder##*/}"
