#!/bin/bash
# A grid of runs as a job array: each task trains one combination of the values that are given as
# lists, the way train.sh trains. From the checkout:
#
#   sbatch --array=0-5 slurm/sweep.sh --config configs/demo.yaml optim.g_lr=1e-4,2e-4 run.seed=0,1,2
#
# The runs lie in SWEEP_DIR (runs/sweep), each named by its values, and are one group in W&B. A task
# with an index beyond the grid ends with the right --array in its message. The same line again goes
# on with what is not finished; --array=0-5%2 trains two at a time.
#SBATCH --job-name=dcgan-sweep
#SBATCH --nodes=1
#SBATCH --ntasks-per-node=1
#SBATCH --requeue
#SBATCH --open-mode=append
#SBATCH --output=slurm/logs/%x-%A_%a.out
#SBATCH --signal=USR2@120

folder=${SWEEP_DIR:-runs/sweep}
left=${SLURM_ARRAY_TASK_ID:-0} size=1 name='' words=()
for word in "$@"; do
  value=${word#*=}
  # A list in brackets is one value.
  if [[ $word != *=*,* || $value == \[* ]]; then
    words+=("$word")
    continue
  fi
  IFS=, read -ra values <<<"$value"
  # Task 0 has the first value of each list, task 1 the second of the first list, and so on.
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
