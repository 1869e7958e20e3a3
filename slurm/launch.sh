# shellcheck shell=bash
# Sourced by the jobs beside it: how a module of the pipeline starts on all nodes of a job, and what
# Slurm thinks of the job.
# One srun task per node; in it `accelerate launch` with one process per GPU (one on CPU nodes).
# Every variable read here is in the table of slurm/README.md.

say() { echo "[$(date '+%F %T')] slurm: $*"; }

if [ -z "${SLURM_JOB_NODELIST:-}" ]; then
  say "not in a Slurm job: submit this script with sbatch, or call it under salloc"
  exit 2
fi

# The id of one task of an array. SLURM_JOB_ID of the last one is the whole array's too: scontrol
# would show and requeue all of it.
job=${SLURM_ARRAY_JOB_ID:+${SLURM_ARRAY_JOB_ID}_$SLURM_ARRAY_TASK_ID}
job=${job:-$SLURM_JOB_ID}
restarts=${SLURM_RESTART_COUNT:-0}  # not set in the first life of a job

container=() wrap=() python=python
case ${CONTAINER:-none} in
  none)
    python=python3
    [ ! -x .venv/bin/python ] || python=$PWD/.venv/bin/python ;;
  pyxis)
    container=(--container-image="${IMAGE:?IMAGE: the image pyxis starts}"
      --container-mounts="${MOUNTS:-$PWD:$PWD}" --container-workdir="${WORKDIR:-$PWD}"
      --no-container-mount-home) ;;
  apptainer)
    wrap=(apptainer exec --nv --bind "${MOUNTS:-$PWD:$PWD}" --pwd "${WORKDIR:-$PWD}"
      "${IMAGE:?IMAGE: the image apptainer starts}") ;;
  *) say "CONTAINER ($CONTAINER): must be none, pyxis or apptainer"; exit 2 ;;
esac
export PYTHON=${PYTHON:-$python}
export SLURM_EXPORT_ENV=ALL  # sbatch --export=NONE would hide all that is exported here from srun

# sbatch counts them on the node, salloc says what was asked for (8, or a100:8).
gpus=${GPUS_PER_NODE:-${SLURM_GPUS_ON_NODE:-${SLURM_GPUS_PER_NODE:-0}}} gpus=${gpus##*:}
if [ -z "${GPUS_PER_NODE:-}" ] && [[ ${SLURM_GPUS:-} =~ ^([^,]*:)?([0-9]+)$ ]] &&
  [ $((gpus * SLURM_JOB_NUM_NODES)) != "${BASH_REMATCH[2]}" ]; then
  say "--gpus=$SLURM_GPUS on $SLURM_JOB_NUM_NODES nodes: not the same number on each;" \
    "ask for them with --gpus-per-node"
  exit 2
fi
export GPUS_PER_NODE=$gpus  # the trainer compares: a driver that fails must not mean CPU
processes=${NPROC_PER_NODE:-$gpus}
[ "$processes" -gt 0 ] || processes=1
[ "$gpus" -gt 0 ] || export ACCELERATE_USE_CPU=true   # gloo
export NNODES=$SLURM_JOB_NUM_NODES WORLD=$((SLURM_JOB_NUM_NODES * processes))

# A node's task gets all the CPUs that the job has there: the fewest, if nodes differ. srun of Slurm
# >= 22.05 takes no --cpus-per-task over from sbatch, and would leave a task one core.
fewest() { tr , '\n' <<<"$1" | sort -n | sed 's/(.*//; q'; }  # of 16(x2),8
cpus=$(fewest "${SLURM_JOB_CPUS_PER_NODE:-1}")
[ -z "${SLURM_CPUS_PER_TASK:-}" ] || cpus=$((SLURM_CPUS_PER_TASK * $(fewest "${SLURM_TASKS_PER_NODE:-1}")))
[ -n "${SLURM_CPUS_PER_GPU:-}" ] || export SRUN_CPUS_PER_TASK=$cpus
export OMP_NUM_THREADS=${OMP_NUM_THREADS:-$((cpus > processes ? cpus / processes : 1))}
# torchrun's agent kills its ranks 30 s after SIGTERM by default: less than a large save may take.
export PET_SHUTDOWN_TIMEOUT=${PET_SHUTDOWN_TIMEOUT:-100}

# The first node leads. Its name in Slurm need not be one that the others know, and may be 127.0.1.1
# to itself; its address in Slurm is the same to all.
address() {  # of a node of the job, given `head` or `tail`
  local node found
  node=$(scontrol show hostnames "$SLURM_JOB_NODELIST" | "$1" -n 1)
  found=$(scontrol -o show node "$node" | sed -n 's/.* NodeAddr=\([^ ]*\).*/\1/p')
  echo "${found:-$node}"
}
MASTER_ADDR=${MASTER_ADDR:-$(address head)} LAST_ADDR=$(address tail)
export MASTER_ADDR MASTER_PORT LAST_ADDR
# Ten ports of its own for each job, below those that systems hand out to clients.
base_port=${MASTER_PORT:-$((20000 + SLURM_JOB_ID % 1200 * 10))}

# On every node, before what a task starts. Stop signals are for the ranks, which take them from
# their first line on; the launcher above them would die of USR2 and orphan them; ignored before
# exec, it stays ignored. And gloo would listen where the node's own name leads, which may be
# 127.0.1.1: it is told the interface towards another node.
# shellcheck disable=SC2016
on_node='
  trap "" USR1 USR2
  other=$MASTER_ADDR
  [ "$SLURM_NODEID" != 0 ] || other=$LAST_ADDR
  if [ "$SLURM_NNODES" -gt 1 ] && [ -z "${GLOO_SOCKET_IFNAME:-}" ]; then
    other=$(getent ahosts "$other" | sed "s/ .*//; q")
    name=$(ip -o route get "$other" 2>/dev/null | sed -n "s/.* dev \([^ ]*\).*/\1/p")
    [ -z "$name" ] || export GLOO_SOCKET_IFNAME=$name
  fi
  exec "$@"'

everywhere=(--nodes="$NNODES" --ntasks="$NNODES" --ntasks-per-node=1)

# task WORD...: in the container, if any, as the step that the array `step` describes.
task() { srun "${container[@]}" "${step[@]}" sh -c "$on_node" task "${wrap[@]}" "$@"; }

# launch ATTEMPT MODULE ARGUMENT...: each attempt has another port, for the last one's may linger.
launch() {
  MASTER_PORT=$((base_port + $1 % 10))
  local step=("${everywhere[@]}" --kill-on-bad-exit=1 --label)
  shift
  # SLURM_NODEID differs from task to task: expanded there, not here. --gpu_ids all: or a
  # default_config.yaml of the user's would choose.
  # shellcheck disable=SC2016
  task sh -c '
    [ "$WORLD" -gt 1 ] || exec "$PYTHON" -m "$@"
    exec "$PYTHON" -m accelerate.commands.launch --multi_gpu --gpu_ids all \
      --num_machines "$NNODES" --num_processes "$WORLD" --machine_rank "$SLURM_NODEID" \
      --main_process_ip "$MASTER_ADDR" --main_process_port "$MASTER_PORT" \
      --mixed_precision no --dynamo_backend no -m "$@"' launch "$@"
}

# The words of the command line in one process on the first node, without a GPU: what srun would
# take over from a job with --gpus does not fit one node.
alone() (
  unset "${!SLURM_GPU@}" SLURM_CPUS_PER_GPU SLURM_MEM_PER_GPU
  step=(--nodes=1 --ntasks=1 --ntasks-per-node=1 --gres=none)
  task "$PYTHON" "$@"
)

# Whether all nodes start a process; Slurm notices a lost one only after SlurmdTimeout (5 minutes).
nodes_answer() { timeout 60 srun "${everywhere[@]}" true; }

# shellcheck disable=SC2034
# with_config ARGUMENT...: them in `arguments`, behind the default configuration if they name none.
with_config() {
  arguments=("$@")
  case " $* " in
    *" --config"*) ;;
    *) arguments=(--config configs/dcgan_64.yaml "$@") ;;
  esac
}

# run_folder ARGUMENT...: where the trainer's own reading of the configuration puts the run. Status
# 2, with one message, for a mistake in it.
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

state() {  # patient: the controller may be restarting
  local found try
  for try in 1 2 3 4 5 6; do
    found=$(scontrol -o show job "$job" 2>/dev/null | sed -n 's/.* JobState=\([A-Z_]*\).*/\1/p')
    [ -z "$found" ] || break
    sleep $((try * 2))
  done
  echo "${found:-UNKNOWN}"
}

# requeue LIMIT WHERE: only while `state` is RUNNING, or a cancelled job would come back.
requeue() {
  local try
  if [ "$restarts" -ge "${MAX_REQUEUE:-$1}" ]; then
    say "requeued $restarts times, MAX_REQUEUE is ${MAX_REQUEUE:-$1}: giving up at $2"
    exit 1
  fi
  for try in 1 2 3 4 5 6; do
    say "requeue at $2"
    scontrol requeue "$job" && sleep 120  # until the controller ends this script
    [ "$(state)" = RUNNING ] || break
    sleep $((try * 2))
  done
  exit 1
}
