#!/bin/bash
# Train on 1..N nodes, GPU or CPU, until the run is finished: over time limits, preemption, dead
# ranks and dead nodes. From the checkout:
#
#   sbatch slurm/train.sh                                            # configs/dcgan_64.yaml
#   sbatch --nodes=4 --gpus-per-node=8 --cpus-per-task=64 slurm/train.sh run.dir=/shared/runs/a
#   sbatch slurm/train.sh --config configs/demo.yaml train.total_steps=5000
#
# Everything else (containers, ports, limits): slurm/README.md.
#SBATCH --job-name=dcgan-train
#SBATCH --nodes=1
#SBATCH --ntasks-per-node=1
#SBATCH --requeue
#SBATCH --open-mode=append
#SBATCH --output=slurm/logs/%x-%j.out
#SBATCH --signal=USR2@120
# USR2 goes to all processes of the step, up to 60 s early; not to this shell.

set -uo pipefail  # not -e: the exit status of srun is looked at
trap : TERM USR1 USR2  # this shell must live to decide what happens next

# Slurm runs a copy of this file from its spool; the checkout is the folder sbatch was called in.
# shellcheck source=slurm/launch.sh
. slurm/launch.sh || { echo "$PWD: not the checkout; call sbatch there, or give --chdir"; exit 2; }

with_config "$@"
set -- "${arguments[@]}"

# The trainer's own reading of the configuration says where its marker files will be. A mistake in
# it ends the job here, in seconds and with one message.
where='
import argparse
from pipeline.config_files import load
from pipeline.errors import one_clear_message
parser = argparse.ArgumentParser(prog="slurm/train.sh")
parser.add_argument("--config")
parser.add_argument("overrides", nargs="*")
words = parser.parse_args()
with one_clear_message():
    print(load(words.config, words.overrides).run.dir)
'
configured=$(alone -c "$where" "$@" | tail -n 1) || { say "the configuration could not be read"; exit 2; }
run_dir=${RUN_DIR:-$configured}

progress() { cat "$run_dir/progress" 2>/dev/null || echo 0; }  # step of the last checkpoint


seconds_left() {
  local end
  end=$(scontrol -o show job "$SLURM_JOB_ID" | sed -n 's/.* EndTime=\([^ ]*\).*/\1/p')
  end=$(date -d "$end" +%s 2>/dev/null) || end=$((${EPOCHSECONDS:-0} + 1000000))  # no time limit
  echo $((end - EPOCHSECONDS))
}

[ "${PREFLIGHT:-0}" = 0 ] || bash slurm/preflight.sh "$@" || exit 1

say "restart $restarts of job $SLURM_JOB_ID: $WORLD process(es) on $SLURM_JOB_NODELIST," \
  "rendezvous $MASTER_ADDR, run $run_dir at step $(progress)"
failures=0 attempt=0
while :; do
  # What an earlier attempt left must not decide about this one.
  rm -f "$run_dir/FINISHED" "$run_dir/PREEMPTED"
  before=$(progress)
  launch "$attempt" pipeline.train "$@"
  status=$? now=$(state) after=$(progress)
  say "srun ended with $status, job $now, step $before -> $after"
  # Exit codes say little behind a launcher; the markers are written by rank 0 after the checkpoint.
  [ -e "$run_dir/FINISHED" ] && { say "finished"; exit 0; }
  # `scontrol requeue` would bring a cancelled job back: only a RUNNING one may.
  [ "$now" = RUNNING ] || { say "ended from outside; Slurm decides"; exit 1; }
  [ -e "$run_dir/PREEMPTED" ] && requeue 50 "step $after"
  failures=$((after > before ? 0 : failures + 1)) attempt=$((attempt + 1))
  [ "$failures" -lt 2 ] || { say "two failures without progress at step $after: giving up"; exit 1; }
  # So late USR2 has been sent; a fresh step would run into the time limit unwarned.
  [ "$(seconds_left)" -gt "${MIN_SECONDS:-180}" ] || requeue 50 "step $after"
  say "fresh step in the same allocation"
done
