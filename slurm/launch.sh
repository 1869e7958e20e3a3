# shellcheck shell=bash
# Sourced by the jobs beside it: how a module of the pipeline starts on all nodes of a job, and what
# Slurm thinks of the job.
# One srun task per node; in it `accelerate launch` with one process per GPU (one on CPU nodes).
# Every variable read here is in the table of slurm/README.md.

say() { echo "[$(date '+%F %T')] slurm: $*"; }

# srun of Slurm >= 22.05 does not take this over from sbatch, and would leave a task one core.
[ -z "${SLURM_CPUS_PER_TASK:-}" ] || export SRUN_CPUS_PER_TASK=$SLURM_CPUS_PER_TASK

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

gpus=${GPUS_PER_NODE:-${SLURM_GPUS_ON_NODE:-0}}
processes=${NPROC_PER_NODE:-$gpus}
[ "$processes" -gt 0 ] || processes=1
[ "$gpus" -gt 0 ] || export ACCELERATE_USE_CPU=true   # gloo
export NNODES=$SLURM_JOB_NUM_NODES WORLD=$((SLURM_JOB_NUM_NODES * processes))
threads=$((${SLURM_CPUS_PER_TASK:-${SLURM_CPUS_ON_NODE:-1}} / processes))
export OMP_NUM_THREADS=${OMP_NUM_THREADS:-$((threads > 0 ? threads : 1))}
# torchrun's agent kills its ranks 30 s after SIGTERM by default: less than a large save may take.
export PET_SHUTDOWN_TIMEOUT=${PET_SHUTDOWN_TIMEOUT:-100}

# The first node leads. Its name in Slurm need not be one the network knows; its address is.
head=$(scontrol show hostnames "$SLURM_JOB_NODELIST" | head -n 1)
if [ -z "${MASTER_ADDR:-}" ]; then
  MASTER_ADDR=$head
  getent hosts "$head" >/dev/null ||
    MASTER_ADDR=$(scontrol -o show node "$head" | sed -n 's/.* NodeAddr=\([^ ]*\).*/\1/p')
fi
export MASTER_ADDR MASTER_PORT
# Ten ports of its own for each job, below those that systems hand out to clients.
base_port=${MASTER_PORT:-$((20000 + SLURM_JOB_ID % 1200 * 10))}

# A task's process: stop signals are for the ranks, which take them from their first line on. The
# launcher above them would die of USR2 and orphan them; ignored before exec, it stays ignored.
task() { srun "${container[@]}" "${step[@]}" sh -c 'trap "" USR1 USR2; exec "$@"' task "${wrap[@]}" "$@"; }

# launch ATTEMPT MODULE ARGUMENT...: each attempt has another port, for the last one's may linger.
launch() {
  MASTER_PORT=$((base_port + $1 % 10))
  local step=(--kill-on-bad-exit=1 --label)
  shift
  # SLURM_NODEID differs from task to task: expanded there, not here.
  # shellcheck disable=SC2016
  task sh -c '
    [ "$WORLD" -gt 1 ] || exec "$PYTHON" -m "$@"
    exec "$PYTHON" -m accelerate.commands.launch --multi_gpu --num_machines "$NNODES" \
      --num_processes "$WORLD" --machine_rank "$SLURM_NODEID" --main_process_ip "$MASTER_ADDR" \
      --main_process_port "$MASTER_PORT" --mixed_precision no --dynamo_backend no -m "$@"' launch "$@"
}

# The words of the command line in one process on the first node, in the same environment.
alone() {
  local step=(--nodes=1 --ntasks=1)
  task "$PYTHON" "$@"
}

# shellcheck disable=SC2034
# with_config ARGUMENT...: them in `arguments`, behind the default configuration if they name none.
with_config() {
  arguments=("$@")
  case " $* " in
    *" --config"*) ;;
    *) arguments=(--config configs/dcgan_64.yaml "$@") ;;
  esac
}

restarts=${SLURM_RESTART_COUNT:-0}  # not set in the first life of a job

state() {  # patient: the controller may be restarting
  local found try
  for try in 1 2 3 4 5 6; do
    found=$(scontrol -o show job "$SLURM_JOB_ID" 2>/dev/null | sed -n 's/.* JobState=\([A-Z_]*\).*/\1/p')
    [ -z "$found" ] || break
    sleep $((try * 2))
  done
  echo "${found:-UNKNOWN}"
}

# requeue LIMIT WHERE: only while `state` is RUNNING, or a cancelled job would come back.
requeue() {
  if [ "$restarts" -ge "${MAX_REQUEUE:-$1}" ]; then
    say "requeued $restarts times, MAX_REQUEUE is ${MAX_REQUEUE:-$1}: giving up at $2"
    exit 1
  fi
  say "requeue at $2"
  scontrol requeue "$SLURM_JOB_ID" || exit 1
  sleep 120  # until the controller ends this script
  exit 1
}
