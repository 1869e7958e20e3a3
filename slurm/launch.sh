# shellcheck shell=bash
# Sourced by the jobs in this folder: start a module of the pipeline on all nodes of a job, read the
# state of the job in Slurm, requeue it.
# One srun task per node runs `accelerate launch` with one process per GPU (one on CPU nodes).
# The table in slurm/README.md has every variable that is read here.

say() { echo "[$(date '+%F %T')] slurm: $*"; }

case ${1:-} in
  -h|--help) sed -n '2,/^#SBATCH/{/^#SBATCH/d;s/^# \{0,1\}//;p}' "$0"; exit 0 ;;
esac

# A dry run outside a job: of a job on this machine, or on SLURM_JOB_NUM_NODES like it.
if [ -n "${dry_run:=}" ] && [ -z "${SLURM_JOB_NODELIST:-}" ]; then
  SLURM_JOB_NODELIST=$(hostname) SLURM_JOB_ID=${SLURM_JOB_ID:-1}
  SLURM_JOB_NUM_NODES=${SLURM_JOB_NUM_NODES:-1}
  SLURM_JOB_CPUS_PER_NODE=${SLURM_JOB_CPUS_PER_NODE:-$(nproc)}
  SLURM_GPUS_ON_NODE=${SLURM_GPUS_ON_NODE:-${GPUS_PER_NODE:-0}}
  scontrol() { [ "$*" != "show hostnames $SLURM_JOB_NODELIST" ] || echo "$SLURM_JOB_NODELIST"; }
fi

if [ -z "${SLURM_JOB_NODELIST:-}" ]; then
  say "not in a Slurm job: submit this script with sbatch, or call it under salloc"
  exit 2
fi

# The id of one task of an array. SLURM_JOB_ID of the last task is also the id of the array: with it
# scontrol would show and requeue all tasks.
job=${SLURM_ARRAY_JOB_ID:+${SLURM_ARRAY_JOB_ID}_$SLURM_ARRAY_TASK_ID}
job=${job:-$SLURM_JOB_ID}
restarts=${SLURM_RESTART_COUNT:-0}  # not set before the first requeue

export SLURM_EXPORT_ENV=ALL  # after sbatch --export=NONE srun would pass on no variable

# GPUs of the job on its nodes, one number for each kind of node, as the controller counts them. A job
# that was submitted from within another inherits the variables of that one.
counted() {
  local gres found
  for gres in $(scontrol -o -d show job "$job" 2>/dev/null | grep -o ' GRES=[^ ]*'); do
    found=$(grep -oE '(=|,)gpu(:[^:,()]+)?:[0-9]+' <<<"$gres" | sed 's/.*://' | paste -s -d +)
    echo $((${found:-0}))
  done | sort -nu
}
slurm_gpus=$(counted)
if [ -z "${GPUS_PER_NODE:-}" ] && [ "$(wc -w <<<"$slurm_gpus")" -gt 1 ]; then
  say "the nodes have different numbers of GPUs for this job (${slurm_gpus//$'\n'/, }):" \
    "ask for them with --gpus-per-node"
  exit 2
fi
slurm_gpus=${slurm_gpus%%$'\n'*}
slurm_gpus=${slurm_gpus:-${SLURM_GPUS_ON_NODE:-0}}  # the controller does not answer
gpus=${GPUS_PER_NODE:-$slurm_gpus} told=${GPUS_PER_NODE:-}
export GPUS_PER_NODE=$gpus  # the trainer compares: with a broken driver it must not use the CPU
processes=${NPROC_PER_NODE:-$gpus}
[ "$processes" -gt 0 ] || processes=1
case ${ACCELERATE_USE_CPU:-} in 1|[Tt]rue|TRUE|[Yy]es|YES) told=0 ;; esac
[ "$gpus" -gt 0 ] || export ACCELERATE_USE_CPU=true   # gloo
export NNODES=$SLURM_JOB_NUM_NODES WORLD=$((SLURM_JOB_NUM_NODES * processes))

container=() wrap=() python=python
case ${CONTAINER_GPUS:=nvidia} in
  nvidia) by_flag=(--nv) by_device=(--device nvidia.com/gpu=all) ;;
  rocm) by_flag=(--rocm) by_device=(--device /dev/kfd --device /dev/dri --group-add keep-groups) ;;
  *) say "CONTAINER_GPUS ($CONTAINER_GPUS): must be nvidia or rocm"; exit 2 ;;
esac
[ "$gpus" -gt 0 ] || by_flag=() by_device=()
[ "${CONTAINER:-none}" = none ] || : "${IMAGE:?must name the image for CONTAINER=$CONTAINER}"
case ${CONTAINER:-none} in
  none)
    python=python3
    [ ! -x .venv/bin/python ] || python=$PWD/.venv/bin/python ;;
  pyxis)
    container=(--container-image="$IMAGE" --container-mounts="${MOUNTS:-$PWD:$PWD}"
      --container-workdir="${WORKDIR:-$PWD}" --no-container-mount-home) ;;
  apptainer|singularity)
    wrap=("$CONTAINER" exec "${by_flag[@]}" --bind "${MOUNTS:-$PWD:$PWD}" --pwd "${WORKDIR:-$PWD}"
      "$IMAGE") ;;
  podman)
    # Its processes stay in the step's cgroup, for Slurm to signal and count. It passes on no variable
    # that is not named, and the host's PATH and HOME would be wrong in the image.
    wrap=(podman run --rm --network=host --ipc=host --cgroups=disabled "${by_device[@]}")
    for name in 'SLURM*' 'PYTHON*' NNODES WORLD 'MASTER_*' LAST_ADDR GPUS_PER_NODE \
      ACCELERATE_USE_CPU 'PET_*' 'OMP_*' 'NCCL_*' 'GLOO_*' 'TORCH*' 'CUDA_*' 'ROCR_*' 'HIP_*' \
      'WANDB_*' 'AWS_*' 'GOOGLE_*' 'SWEEP_*' 'STOPPED_*'; do
      wrap+=(--env "$name")
    done
    IFS=, read -ra mounts <<<"${MOUNTS:-$PWD:$PWD}"
    for name in "${mounts[@]}"; do wrap+=(--volume "$name"); done
    wrap+=(--workdir "${WORKDIR:-$PWD}" "$IMAGE") ;;
  *) say "CONTAINER ($CONTAINER): must be none, pyxis, apptainer, singularity or podman"; exit 2 ;;
esac
export PYTHON=${PYTHON:-$python}

# The file to source on each node before a task.
if [ -n "${SITE_SETUP:-}" ]; then
  case $SITE_SETUP in /*) ;; *) SITE_SETUP=$PWD/$SITE_SETUP ;; esac
  if ! { [ -f "$SITE_SETUP" ] && [ -r "$SITE_SETUP" ]; }; then
    say "SITE_SETUP ($SITE_SETUP): not a file that can be read; each node sources it before a task"
    exit 2
  fi
  bash -n "$SITE_SETUP" || { say "SITE_SETUP ($SITE_SETUP): not a bash script, see above"; exit 2; }
  export SITE_SETUP
fi

# A task gets all CPUs of the job on its node; if nodes differ, the smallest number.
cpus=$(tr , '\n' <<<"${SLURM_JOB_CPUS_PER_NODE:-1}" | sort -n | sed 's/(.*//; q')  # of 16(x2),8

# srun reads the options of sbatch and what the user's shell has exported, each version its own part of
# it, and would give a task less than the job has. So a step gets what is said here, and nothing else.
for name in "${!SLURM_@}" "${!SRUN_@}"; do
  case ${name#SLURM_} in
    JOB_*) ;;
    NTASKS*|NPROCS|*_PER_TASK|*_PER_GPU|*_PER_CPU|*_PER_CORE|*_PER_SOCKET|TRES_*|GRES*|STEP_GRES|\
    GPUS|GPUS_PER_NODE|GPU_*|MEM_*|CPU_*|*_BIND|DIST*|HINT|THREAD*|CORE_SPEC|NSOCKETS*|\
    EXACT|EXCLUSIVE|OVER*|WHOLE|HOSTFILE|SPREAD_JOB|USE_MIN_NODES|RELATIVE|HET_SIZE|SRUN_*|\
    STD*MODE|LABELIO|UNBUFFEREDIO|WORKING_DIR|REMOTE_CWD|TIMELIMIT|WAIT|NO_KILL|KILL_BAD_EXIT|\
    EXIT_*|TEST_EXEC|CONTAINER*)
      unset "$name" ;;
  esac
done
everywhere=(--nodes="$NNODES" --ntasks="$NNODES" --ntasks-per-node=1 --cpus-per-task="$cpus")
[ "$slurm_gpus" = 0 ] || everywhere+=(--gpus-per-node="$slurm_gpus")
export OMP_NUM_THREADS=${OMP_NUM_THREADS:-$((cpus > processes ? cpus / processes : 1))}
# By default torchrun kills its ranks 30 s after SIGTERM. A large checkpoint may take longer.
export PET_SHUTDOWN_TIMEOUT=${PET_SHUTDOWN_TIMEOUT:-100}

# NCCL's flight recorder: each rank writes its last collectives to a file when one times out. PyTorch
# prefers the same settings by their newer names, TORCH_FR_*.
export TORCH_NCCL_TRACE_BUFFER_SIZE=${TORCH_NCCL_TRACE_BUFFER_SIZE:-2000}
export TORCH_NCCL_DUMP_ON_TIMEOUT=${TORCH_NCCL_DUMP_ON_TIMEOUT:-1}
dump=$PWD/slurm/logs/nccl-$SLURM_JOB_ID-rank
export TORCH_NCCL_DEBUG_INFO_TEMP_FILE=${TORCH_NCCL_DEBUG_INFO_TEMP_FILE:-$dump}

# The first node hosts the rendezvous. The other nodes may not resolve its name, and the node itself
# may resolve it to 127.0.1.1. NodeAddr in Slurm is the same on all nodes.
address() {  # print the address of the first (`head`) or last (`tail`) node of the job
  local node found
  node=$(scontrol show hostnames "$SLURM_JOB_NODELIST" | "$1" -n 1)
  found=$(scontrol -o show node "$node" | sed -n 's/.* NodeAddr=\([^ ]*\).*/\1/p')
  echo "${found:-$node}"
}
MASTER_ADDR=${MASTER_ADDR:-$(address head)} LAST_ADDR=$(address tail)
export MASTER_ADDR MASTER_PORT LAST_ADDR
# Ten ports for each job, below the range that systems use for clients.
base_port=${MASTER_PORT:-$((20000 + SLURM_JOB_ID % 1200 * 10))}

# Runs on every node, before the program of a task. The ranks handle stop signals from their first
# line on. The launcher would die of USR2 and orphan them, so the signal is ignored before exec,
# which keeps it ignored. gloo would listen on the address of the node's own name, which may be
# 127.0.1.1, so it gets the interface of the route to another node.
# shellcheck disable=SC2016
on_node='
  trap "" USR1 USR2
  site() { . "$SITE_SETUP"; }
  if [ -n "${SITE_SETUP:-}" ]; then
    [ -r "$SITE_SETUP" ] ||
      { echo "SITE_SETUP ($SITE_SETUP): no such file on $SLURMD_NODENAME" >&2; exit 2; }
    site >&2
    set +eu
  fi
  other=$MASTER_ADDR
  [ "$SLURM_NODEID" != 0 ] || other=$LAST_ADDR
  if [ "$SLURM_NNODES" -gt 1 ] && [ -z "${GLOO_SOCKET_IFNAME:-}" ]; then
    other=$(getent ahosts "$other" | sed "s/ .*//; q")
    name=$(ip -o route get "$other" 2>/dev/null | sed -n "s/.* dev \([^ ]*\).*/\1/p")
    [ -z "$name" ] || export GLOO_SOCKET_IFNAME=$name
  fi
  exec "$@"'

# task WORD...: run a command in the container, if any, with the options of srun in `step`.
task() { srun "${container[@]}" "${step[@]}" "$shell" -c "$on_node" task "${wrap[@]}" "$@"; }
shell="sh"
[ -z "${SITE_SETUP:-}" ] || shell="bash"  # modules are functions of bash

# launch ATTEMPT MODULE ARGUMENT...: run a module on all ranks. Each attempt uses another port, as
# the previous one may still be taken.
launch() {
  MASTER_PORT=$((base_port + $1 % 10))
  local step=("${everywhere[@]}" --kill-on-bad-exit=1 --label)
  shift
  # SLURM_NODEID differs from task to task, so the task expands it. Without --gpu_ids all a
  # default_config.yaml of the user would choose the GPUs.
  # shellcheck disable=SC2016
  local program='
    trap "" USR1 USR2  # a container engine may have reset it
    [ "$WORLD" -gt 1 ] || exec "$PYTHON" -m "$@"
    exec "$PYTHON" -m accelerate.commands.launch --multi_gpu --gpu_ids all \
      --num_machines "$NNODES" --num_processes "$WORLD" --machine_rank "$SLURM_NODEID" \
      --main_process_ip "$MASTER_ADDR" --main_process_port "$MASTER_PORT" \
      --mixed_precision no --dynamo_backend no -m "$@"'
  [ -z "$dry_run" ] || { show "$program" "$@"; return; }
  task sh -c "$program" launch "$@"
}

# show PROGRAM ARGUMENT...: print the step that `launch` would start, and what its first task runs.
show() {
  local on_node="..."
  srun() { printf '%q ' srun "$@"; echo; }
  task sh -c ... launch "${@:2}"
  echo "node 0: $(SLURM_NODEID=0 sh -c "run() { echo \"\$@\"; exit; }; ${1//exec /run }" launch "${@:2}")"
}

# alone ARGUMENT...: run Python in one process on the first node, without a GPU.
alone() {
  local step=(--nodes=1 --ntasks=1 --ntasks-per-node=1 --cpus-per-task="$cpus" --gres=none)
  task "$PYTHON" "$@"
}

# Test that all nodes start a process. Slurm notices a lost node only after SlurmdTimeout (5 minutes).
# Status 2: srun ended at once, before it asked a node, as it would after a requeue too.
nodes_answer() {
  local said status
  said=$(timeout 60 srun "${everywhere[@]}" true 2>&1)
  status=$?
  [ "$status" -ne 0 ] || return 0
  echo "$said"
  [ "$status" -lt 124 ] || return 1  # it waited, or was stopped
  # Words of a node or a controller that is gone, for now.
  ! grep -qiE 'launch|node failure|not available \(|contact|controller|communication|timed out|busy' \
    <<<"$said" || return 1
  ! grep -qiE 'configuration (file|source)|completing|allocation|aborted|exit code|slurmstepd' \
    <<<"$said" || return 1
  return 2
}

# Refuse to train on the CPU of a node with GPUs that Slurm did not give to the job.
require_counted_gpus() {
  local found
  [ "$gpus" = 0 ] && [ -z "$told" ] || return 0
  # shellcheck disable=SC2016
  found=$(timeout 90 srun "${everywhere[@]}" bash -c '
    gpus=$(timeout 30 nvidia-smi -L 2>/dev/null | grep -c "^GPU ")
    # Slurm denies a job the devices of others: they can be seen, not opened.
    [ "$gpus" -gt 0 ] || for device in /dev/nvidia[0-9]* /dev/dri/render*; do
      case $device in /dev/dri/*) [ -e /dev/kfd ] || continue ;; esac
      ! { : <"$device"; } 2>/dev/null || gpus=$((gpus + 1))
    done
    [ "$gpus" = 0 ] || echo "$SLURMD_NODENAME has $gpus GPU(s)"' 2>/dev/null | sort | head -n 1)
  [ -n "$found" ] || return 0
  say "$found, but Slurm gave this job none: ask for them with --gpus-per-node; if Slurm does not" \
    "count them set GPUS_PER_NODE to their number; GPUS_PER_NODE=0 computes on the CPU"
  exit 2
}

# shellcheck disable=SC2034
# with_config ARGUMENT...: set `arguments`, with the default --config if none is given.
with_config() {
  arguments=("$@")
  case " $* " in
    *" --config"*) ;;
    *) arguments=(--config configs/dcgan_64.yaml "$@") ;;
  esac
}

# run_folder ARGUMENT...: print run.dir as the trainer reads it from the configuration. Status 2, with
# one message, for a mistake in the configuration.
run_folder() {
  alone -c '
import argparse
from pipeline.config.loading import load
from pipeline.runtime.errors import exit_on_user_error
parser = argparse.ArgumentParser(prog="slurm/train.sh")
parser.add_argument("--config")
parser.add_argument("overrides", nargs="*")
words = parser.parse_args()
with exit_on_user_error():
    print(load(words.config, words.overrides).run.dir)
' "$@" | tail -n 1
}

state() {  # print the state of the job; tries again while the controller restarts
  local found try
  for try in 1 2 3 4 5 6; do
    found=$(scontrol -o show job "$job" 2>/dev/null | sed -n 's/.* JobState=\([A-Z_]*\).*/\1/p')
    [ -z "$found" ] || break
    sleep $((try * 2))
  done
  echo "${found:-UNKNOWN}"
}

# requeue LIMIT WHERE: requeue the job, only while its state is RUNNING: a requeue would bring a
# cancelled job back.
requeue() {
  local try
  if [ "$restarts" -ge "${MAX_REQUEUE:-$1}" ]; then
    say "requeued $restarts times, MAX_REQUEUE is ${MAX_REQUEUE:-$1}: giving up at $2;" \
      "submit the job again, or raise MAX_REQUEUE"
    exit 1
  fi
  for try in 1 2 3 4 5 6; do
    say "requeue at $2"
    scontrol requeue "$job" && sleep 120  # the controller ends this script meanwhile
    [ "$(state)" = RUNNING ] || break
    sleep $((try * 2))
  done
  exit 1
}
