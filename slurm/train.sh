#!/bin/bash
# Train on 1 to N nodes, GPU or CPU, until the run is finished, over time limits, preemption, dead
# ranks and dead nodes. From the checkout:
#
#   sbatch slurm/train.sh                                            # configs/dcgan_64.yaml
#   sbatch --nodes=4 --gpus-per-node=8 --cpus-per-task=64 slurm/train.sh run.dir=/shared/runs/a
#   sbatch slurm/train.sh --config configs/demo.yaml train.total_steps=5000
#   bash slurm/train.sh --dry-run run.dir=/shared/runs/a   # prints the srun line; needs no Slurm
#
# Everything else (containers, ports, limits): slurm/README.md.
#SBATCH --job-name=dcgan-train
#SBATCH --nodes=1
#SBATCH --requeue
#SBATCH --open-mode=append
#SBATCH --output=slurm/logs/%x-%j.out
#SBATCH --signal=USR2@120
# Slurm sends USR2 to all processes of the step, up to 60 s early, but not to this shell.

set -uo pipefail  # not -e: the script handles the exit status of srun
trap : TERM USR1 USR2  # this shell must survive to decide about the requeue

dry_run=
for word; do
  shift
  case $word in --dry-run) dry_run=1 ;; *) set -- "$@" "$word" ;; esac
done

# Slurm runs a copy of this file from its spool. The checkout is the folder that sbatch was called in.
# shellcheck source=slurm/launch.sh
. slurm/launch.sh || { echo "$PWD: not the checkout; call sbatch there, or give --chdir"; exit 2; }

with_config "$@"
set -- "${arguments[@]}"
[ -z "$dry_run" ] || { launch 0 pipeline.train "$@"; exit; }
require_counted_gpus

failures=0
# again STATUS WHERE: handle a step that ended without progress. Return to try again in this
# allocation; else requeue or exit.
again() {
  # `scontrol requeue` would bring a cancelled job back: requeue only a RUNNING one.
  [ "$(state)" = RUNNING ] || { say "the job is no longer RUNNING: not requeued by this script"; exit 1; }
  [ "$1" -ne 143 ] || requeue 50 "$2: ended by SIGTERM"
  nodes_answer || case $? in
    2) say "srun refuses what it is asked for, and would after a requeue: giving up at $2; see its error above"
      exit 2 ;;
    *) requeue 50 "$2: not all nodes answer" ;;
  esac
  failures=$((failures + 1))
  [ "$failures" -lt 2 ] || { say "two failures without progress at $2: giving up; see the errors above"; exit 1; }
}

# A mistake in the configuration ends the job here, within seconds, with one message.
until configured=$(run_folder "$@"); do
  status=$?
  [ "$status" -ne 2 ] || { say "the configuration could not be read; correct what is named above"; exit 2; }
  again "$status" "the set-up"
done
run_dir=$configured
[ "${CONTAINER:-none}" = none ] || run_dir=${RUN_DIR:-$configured}

if [ "${PREFLIGHT:-0}" != 0 ]; then
  until bash slurm/preflight.sh "$@"; do
    status=$?
    [ "$status" -eq 75 ] || exit "$status"
    again "$status" "the preflight"
  done
fi

progress() { cat "$run_dir/progress" 2>/dev/null || echo 0; }  # step of the last checkpoint

seconds_left() {
  local end
  end=$(scontrol -o show job "$job" | sed -n 's/.* EndTime=\([^ ]*\).*/\1/p')
  # Without an answer or a time limit there is no end time: report plenty.
  { [ -n "$end" ] && end=$(date -d "$end" +%s 2>/dev/null); } || { echo 1000000; return; }
  echo $((end - $(date +%s)))
}

# Count failures over requeues of this job. A new submission starts at 0.
count=$run_dir/failures failures=0
[ "$restarts" -gt 0 ] || rm -f "$count"
[ ! -e "$count" ] || read -r failures <"$count"

say "restart $restarts of job $job: $WORLD process(es) on $SLURM_JOB_NODELIST," \
  "rendezvous $MASTER_ADDR, run $run_dir at step $(progress)"
attempt=0
while :; do
  # Markers of an earlier attempt must not decide about this one.
  rm -f "$run_dir/FINISHED" "$run_dir/PREEMPTED" "$run_dir/COLLAPSED"
  before=$(progress)
  launch "$attempt" pipeline.train "$@"
  status=$? now=$(state) after=$(progress)
  say "srun ended with $status, job $now, step $before -> $after"
  # A launcher makes 0 or 1 of every exit code. Rank 0 writes the markers after the checkpoint.
  [ ! -e "$run_dir/FINISHED" ] || { say "finished"; exit 0; }
  # A requeue would come to the same collapse.
  [ ! -e "$run_dir/COLLAPSED" ] || { say "ended by train.watch; see the last lines above"; exit 3; }
  [ "$now" = RUNNING ] || { say "the job is no longer RUNNING: not requeued by this script"; exit 1; }
  [ "$after" -le "$before" ] || { failures=0; rm -f "$count"; }
  [ ! -e "$run_dir/PREEMPTED" ] || requeue 50 "step $after"
  if [ "$after" -le "$before" ]; then
    again "$status" "step $after"
    mkdir -p "$run_dir" && echo "$failures" >"$count"
  fi
  attempt=$((attempt + 1))
  # Near the time limit USR2 may come before a fresh step can handle it.
  [ "$(seconds_left)" -gt "${MIN_SECONDS:-360}" ] || requeue 50 "step $after"
  say "fresh step in the same allocation"
done
