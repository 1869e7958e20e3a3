"""A real Slurm of two nodes on this machine, with its own munge key, sockets and ports."""

from __future__ import annotations

import os
import re
import shutil
import stat
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

import psutil
from launching import REPO, environment

TIMEOUT = 240
NEWER = REPO / ".slurm-24"
"""A Debian with a newer Slurm than the installed one; the Makefile's slurm-programs makes it."""
BINARIES = ("slurmctld", "slurmd", "munged", "sbatch", "srun", "scontrol", "sinfo", "squeue")

# cred_expire: Slurm holds a requeued job back until its credential has expired, 120 s by default.
CONF = """
ClusterName=mini
SlurmctldHost=localhost
SlurmUser=root
SlurmdUser=root
AuthType=auth/munge
AuthInfo=socket={dir}/munge/sock,cred_expire=5
ProctrackType=proctrack/linuxproc
TaskPlugin=task/none
MpiDefault=none
ReturnToService=2
JobRequeue=1
KillWait={kill_wait}
SlurmdTimeout={slurmd_timeout}
SchedulerParameters=sched_interval=2,bf_interval=2
PreemptType=preempt/partition_prio
PreemptMode=REQUEUE
SlurmdParameters=config_overrides
SlurmctldPort={port}
SlurmctldPidFile={dir}/slurmctld.pid
SlurmdPidFile={dir}/slurmd-%n.pid
SlurmdSpoolDir={dir}/spool-%n
StateSaveLocation={dir}/state
SlurmctldLogFile={dir}/log/slurmctld.log
SlurmdLogFile={dir}/log/slurmd-%n.log
SelectType=select/cons_tres
SelectTypeParameters=CR_Core
GresTypes=gpu
NodeName=n1 NodeHostname=localhost NodeAddr=127.0.0.1 Port={port1} CPUs=1 RealMemory=500 Gres=gpu:2
NodeName=n2 NodeHostname=localhost NodeAddr=127.0.0.1 Port={port2} CPUs=1 RealMemory=500 Gres=gpu:2
NodeName=w1 NodeHostname=localhost NodeAddr=127.0.0.1 Port={port3} {wide} RealMemory=500 Gres=gpu:2
NodeName=w2 NodeHostname=localhost NodeAddr=127.0.0.1 Port={port4} {wide} RealMemory=500 Gres=gpu:2
PartitionName=main Nodes=n1,n2 Default=YES MaxTime=INFINITE State=UP PriorityTier=1 GraceTime=30
PartitionName=high Nodes=n1,n2 MaxTime=INFINITE State=UP PriorityTier=10 PreemptMode=OFF
PartitionName=wide Nodes=w1,w2 MaxTime=INFINITE State=UP PreemptMode=OFF
"""
WIDE = (
    "CPUs=8 Sockets=1 CoresPerSocket=4 ThreadsPerCore=2"  # config_overrides: the machine has fewer
)
NODES = ("n1", "n2", "w1", "w2")
# A program of the newer Slurm sees its own Debian, in a mount namespace that ends with it. What the
# jobs read and write is where it is outside.
ENTER = """
root=$1; shift
for folder in /proc /sys /dev /etc/hosts /tmp "$PWD"; do
  if [ -d "$folder" ]; then mkdir -p "$root$folder"; else touch "$root$folder"; fi
  mount --rbind "$folder" "$root$folder" || exit 1
done
exec chroot "$root" env --chdir="$PWD" "$@"
"""
# Python comes back out of that Debian, which has none.
OUTSIDE = """#!/bin/sh
exec nsenter --mount=/proc/{pid}/ns/mnt --wdns="$PWD" {python} "$@"
"""
KILL_WAIT = 15
SLURMD_TIMEOUT = 15


class MiniSlurm:
    """Two nodes, n1 and n2, of one core each; partition ``high`` preempts ``main``.

    Partition ``wide`` has two more, w1 and w2, that claim 4 cores of 2 threads.

    Args:
        root: the Debian whose Slurm runs; None for the one that is installed.
    """

    def __init__(self, root: Path | None = None) -> None:
        self._prefix: list[str] = []
        if root:
            self._prefix = ["unshare", "--mount", "sh", "-c", ENTER, "enter", str(root)]
        self.dir = Path(tempfile.mkdtemp(prefix="slurm-", dir="/tmp"))  # a socket's path is short
        self.env = {k: v for k, v in environment().items() if not k.startswith(("SLURM", "SBATCH"))}
        self.env |= {"SLURM_CONF": str(self.dir / "slurm.conf"), "PYTHON": sys.executable}
        self.env["ACCELERATE_USE_CPU"] = "true"  # the machine's own GPUs are none of Slurm's
        port = (
            10000 + os.getpid() % 1000 * 10 + 5 * bool(root)
        )  # below those the system gives to clients
        self.lost: set[str] = set()
        for name in ("log", "state", "munge", *(f"spool-{node}" for node in NODES)):
            (self.dir / name).mkdir(mode=0o755)
        key = self.dir / "munge" / "key"
        key.write_bytes(os.urandom(1024))
        key.chmod(0o600)
        self._settings = {"dir": self.dir, "kill_wait": KILL_WAIT, "port": port}
        self._settings |= {f"port{k}": port + k for k in range(1, 5)} | {"wide": WIDE}
        self._configure(SLURMD_TIMEOUT)
        # Two devices that Slurm hands out as GPUs; nothing ever opens them.
        for name in ("gpu0", "gpu1"):
            os.mknod(self.dir / name, stat.S_IFCHR | 0o600, os.makedev(1, 3))
        (self.dir / "gres.conf").write_text(f"Name=gpu File={self.dir}/gpu[0-1]\n")
        if root:
            (self.dir / "cgroup.conf").write_text("CgroupPlugin=disabled\n")
            python = self.dir / "python"
            python.write_text(OUTSIDE.format(pid=os.getpid(), python=sys.executable))
            python.chmod(0o755)
            self.env["PYTHON"] = str(python)

    # -- the daemons ------------------------------------------------------------------------

    def start(self) -> None:
        self._munged()
        self._daemon("slurmctld", "-f", self.env["SLURM_CONF"])
        for node in NODES:
            self.start_node(node)
        self.wait_until(lambda: self.idle_nodes() == {"n1", "n2"}, "two idle nodes", 40)
        self.wait_until(lambda: self.idle_nodes("wide") == {"w1", "w2"}, "two wide nodes", 40)

    def stop(self) -> None:
        if (self.dir / "slurmctld.pid").exists():
            jobs = self.ask("squeue", "-h", "-o", "%A").split()
            if jobs:
                self.ask("scancel", *jobs)
                with suppress(AssertionError):
                    gone = f"the end of {jobs}"
                    self.wait_until(lambda: not self.ask("squeue", "-h"), gone, KILL_WAIT + 30)
        names = (*(f"slurmd-{node}" for node in NODES), "slurmctld", "munged")
        daemons = [process for name in names if (process := self._process(name))]
        for process in daemons:
            process.terminate()
        for process in psutil.wait_procs(daemons, timeout=10)[1]:
            process.kill()
        shutil.rmtree(self.dir, ignore_errors=True)

    def start_node(self, node: str) -> None:
        self.lost.discard(node)
        self._daemon("slurmd", "-f", self.env["SLURM_CONF"], "-N", node)

    def _configure(self, slurmd_timeout: int) -> None:
        conf = CONF.format(slurmd_timeout=slurmd_timeout, **self._settings)
        (self.dir / "slurm.conf").write_text(conf)

    @contextmanager
    def patient(self) -> Iterator[None]:
        """Raise SlurmdTimeout to minutes, as on real clusters."""
        try:
            self._configure(300)
            self.ask("scontrol", "reconfigure")
            yield
        finally:
            self._configure(SLURMD_TIMEOUT)
            self.ask("scontrol", "reconfigure")

    def lose_node(self, node: str, job: str) -> None:
        """Kill slurmd, its job steps and all their processes, as a power cut does."""
        slurmd = self._slurmd_to_lose(node)
        daemons, work = {slurmd}, set()
        for process in psutil.process_iter():
            with suppress(psutil.Error):
                env, parent = process.environ(), process.parent()
                if (env.get("SLURM_JOB_ID"), env.get("SLURMD_NODENAME")) == (job, node):
                    work.add(process)
                    if parent and parent.name().startswith("slurmstepd"):
                        daemons.add(parent)
        assert len(daemons) > 1, daemons
        # Daemons first: a slurmstepd that outlived its script would report a killed script, and the
        # job would end FAILED instead of waiting for its node.
        for process in (*daemons, *(work - daemons)):
            with suppress(psutil.NoSuchProcess):
                process.kill()

    def lose_slurmd(self, node: str) -> None:
        """Kill only slurmd: job steps keep running, and no new ones can start on the node."""
        self._slurmd_to_lose(node).kill()

    def _slurmd_to_lose(self, node: str) -> psutil.Process:
        slurmd = self._process(f"slurmd-{node}")
        assert slurmd
        self.lost.add(node)
        return slurmd

    def _munged(self) -> None:
        files = {"key-file": "munge/key", "socket": "munge/sock", "seed-file": "munge/seed"}
        files |= {"pid-file": "munged.pid", "log-file": "log/munged.log"}
        words = [f"--{option}={self.dir / path}" for option, path in files.items()]
        self._daemon("munged", *words, "--num-threads=2", "--force")

    def _daemon(self, *words: str) -> None:
        command = [*self._prefix, *words]
        subprocess.run(
            command, env=self.env, cwd=REPO, check=True, timeout=30, stdout=subprocess.DEVNULL
        )

    def _process(self, name: str) -> psutil.Process | None:
        with suppress(OSError, ValueError, psutil.NoSuchProcess):
            return psutil.Process(int((self.dir / f"{name}.pid").read_text()))
        return None

    def idle_nodes(self, partition: str = "main") -> set[str]:
        return set(self.ask("sinfo", "-h", "-N", "-p", partition, "-t", "idle", "-o", "%N").split())

    # -- jobs -------------------------------------------------------------------------------

    def ask(self, *words: str, **env: str) -> str:
        """Return the output of a Slurm command, empty if it fails.

        Queries are repeated if the output is empty, because a busy controller may not answer.
        """
        for _ in range(3 if words[0] in ("squeue", "sinfo") or "show" in words else 1):
            done = subprocess.run(
                [*self._prefix, *words],
                env=self.env | env,
                cwd=REPO,
                timeout=60,
                capture_output=True,
                text=True,
            )
            if not re.search("timed out|Unable to contact|Connection refused", done.stderr):
                break
        return done.stdout if done.returncode == 0 else ""

    def submit(self, output: Path, *words: str, **env: str) -> str:
        """Submit a job from the checkout; return its id."""
        answer = self.ask("sbatch", "--parsable", f"--output={output}", *words, **env)
        assert answer, (words, self.logs())
        return answer.strip()

    def show(self, job: str) -> dict[str, str]:
        """Return the job's fields as scontrol prints them."""
        fields = self.ask("scontrol", "-o", "show", "job", job)
        return dict(re.findall(r"(\w[\w/:]*)=(\S*)", fields))

    def restarts(self, job: str) -> int:
        """Return how often the job was requeued; PENDING lasts only a few seconds."""
        return int(self.show(job).get("Restarts", 0))

    def wait(self, job: str, state: str, seconds: float = TIMEOUT) -> dict[str, str]:
        """Wait until the job has ended in ``state``."""
        final = {"COMPLETED", "FAILED", "CANCELLED", "TIMEOUT", "NODE_FAIL"}

        def there() -> bool:
            found = self.show(job).get("JobState")
            assert found == state or found not in final, f"job {job} is {found}, not {state}"
            return found == state

        self.wait_until(there, f"job {job} {state}", seconds)
        return self.show(job)

    def wait_until(
        self, there: Callable[[], bool], what: str, seconds: float = TIMEOUT, every: float = 0.2
    ) -> float:
        """Wait until ``there()`` is true; return the seconds it took."""
        began = time.monotonic()
        while not there():
            waited = time.monotonic() - began
            assert waited < seconds, f"no {what} in {waited:.0f} s\n{self.logs()}"
            time.sleep(every)
        return time.monotonic() - began

    def rank(self, job: str, rank: int) -> psutil.Process:
        """Return the training process of one rank (its data workers have the same environment)."""
        for process in psutil.process_iter():
            with suppress(psutil.Error):
                env, parent = process.environ(), process.parent()
                mine = env.get("SLURM_JOB_ID") == job and env.get("RANK") == str(rank)
                if mine and parent and "RANK" not in parent.environ():
                    return process
        raise AssertionError(f"job {job} has no rank {rank}")

    def logs(self) -> str:
        parts = [self.ask("squeue"), self.ask("sinfo", "-N", "-l")]
        for path in sorted(self.dir.glob("log/slurm*.log")):
            parts.append(f"== {path.name}\n{path.read_text()[-1500:]}")
        return "\n".join(parts)
