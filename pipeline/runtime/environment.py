"""Check what the environment says about a launch, before anything is computed.

Launchers, schedulers and other tools leave variables behind. Each is used as it is, dropped with a
line, or refused with a remedy; none changes a run in silence. Imports nothing heavy.
"""

from __future__ import annotations

import os
import socket
import struct
import sys
from contextlib import suppress

from pipeline.runtime.errors import LaunchError
from pipeline.runtime.text import printable

RENDEZVOUS = ("RANK", "WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT")
"""What torch.distributed needs; torchrun and accelerate launch set all of it, and LOCAL_RANK."""
ALONE = {"RANK": "0", "LOCAL_RANK": "0", "WORLD_SIZE": "1"}
"""Values that say of a process what is true without them."""
BELOW = {"RANK": "WORLD_SIZE", "LOCAL_RANK": "LOCAL_WORLD_SIZE"}
TASKS = {
    "SLURM_STEP_NUM_TASKS": "srun",
    "OMPI_COMM_WORLD_SIZE": "mpirun",
    "PMI_SIZE": "mpirun",
    "MV2_COMM_WORLD_SIZE": "mpirun",
}
"""How many tasks a scheduler has started, and by which program."""
HOW = (
    "accelerate launch --multi_gpu --num_processes N ..., torchrun --nproc_per_node N ..., or "
    "sbatch slurm/train.sh"
)

NEUTRAL = ("", "no", "false", "0", "none")
OWNED = {
    "ACCELERATE_MIXED_PRECISION": "train.precision decides",
    "ACCELERATE_DYNAMO_BACKEND": "train.compile decides",
    "ACCELERATE_GRADIENT_ACCUMULATION_STEPS": "train.micro_batch decides",
    "ACCELERATE_GRADIENT_CLIPPING": "gradients are not clipped",
    "ACCELERATE_TORCH_DEVICE": "ACCELERATE_USE_CPU=true is the only choice of a device",
    "ACCELERATE_USE_FSDP": "the ranks train with DDP",
    "ACCELERATE_USE_DEEPSPEED": "the ranks train with DDP",
    "ACCELERATE_USE_MEGATRON_LM": "the ranks train with DDP",
    "ACCELERATE_USE_PARALLELISM_CONFIG": "the ranks train with DDP",
    "ACCELERATE_USE_SAGEMAKER": "the ranks train with DDP",
    "ACCELERATE_DOWNCAST_BF16": "train.precision decides",
}
"""Settings of Accelerate that would change what is computed, and what decides in their place."""


def is_rank_of_a_launch() -> bool:
    """Return whether this process has joined other ranks, or a launcher of ranks started it."""
    distributed = sys.modules.get("torch.distributed")
    joined = distributed is not None and distributed.is_available() and distributed.is_initialized()
    return joined or "TORCHELASTIC_RUN_ID" in os.environ


def world_size() -> int:
    """Return the number of launched processes; 1 if WORLD_SIZE is not set or no number."""
    text = os.environ.get("WORLD_SIZE", "")
    return max(1, int(text)) if _is_number(text) else 1


def _is_number(text: str) -> bool:
    return text.isascii() and text.isdecimal() and len(text) < 10


def _require_numbers() -> None:
    """Raise ``LaunchError`` if a variable of the launch is no number, or a rank is too high."""
    wrong = "Launchers set it; unset it to train in one process, or use " + HOW
    for name in (*BELOW, *BELOW.values(), "MASTER_PORT"):
        text = os.environ.get(name, "0")
        if text and not _is_number(text):
            shown = printable(text[:80])
            raise LaunchError(f"{name} ({shown}): must be a whole number. {wrong}.")
    for name, limit in BELOW.items():
        value, end = os.environ.get(name) or 0, os.environ.get(limit) or 2**31
        if int(value) >= max(1, int(end)):
            raise LaunchError(f"{name} ({value}): must be below {limit} ({end}). {wrong}.")
    if int(os.environ.get("MASTER_PORT") or 0) >= 2**16:
        raise LaunchError(
            f"MASTER_PORT ({os.environ['MASTER_PORT']}): must be below 65536. {wrong}."
        )


def require_whole_launch() -> None:
    """Refuse tasks that would not find each other; drop variables that say a process is alone.

    Raises:
        LaunchError: a rendezvous is half described, or a scheduler started several tasks without;
            or a variable is no number.
    """
    _require_numbers()
    given = {name for name in (*RENDEZVOUS, "LOCAL_RANK") if os.environ.get(name)}
    missing = [name for name in RENDEZVOUS if name not in given]
    if not missing:
        return
    for name, count in ((name, os.environ.get(name, "")) for name in TASKS):
        if count.isdecimal() and int(count) > 1:
            raise LaunchError(
                f"{name} ({count}): {TASKS[name]} started {count} tasks, but {', '.join(missing)} "
                f"are not set: each task would train alone and write the same files. Use {HOW}."
            )
    for name in ("RANK", "LOCAL_RANK", "WORLD_SIZE"):
        if name in given and os.environ[name] != ALONE[name]:
            raise LaunchError(
                f"{name} ({os.environ[name]}): set without {', '.join(missing)}. Unset it to train "
                f"in one process; for several use {HOW}."
            )
    for name in ALONE:
        os.environ.pop(name, None)


def use_reachable_interface() -> None:
    """Make gloo listen where other nodes reach this one, on a host whose own name means loopback.

    gloo listens on the address of the host's name. Debian writes it into /etc/hosts as 127.0.1.1,
    and a container on the host's network has that file. A set GLOO_SOCKET_IFNAME is left alone.
    """
    alone = os.environ.get("WORLD_SIZE", "1") == os.environ.get("LOCAL_WORLD_SIZE", "1")
    if alone or os.environ.get("GLOO_SOCKET_IFNAME"):
        return
    with suppress(OSError):  # a name that means nothing: gloo would take loopback
        if not socket.gethostbyname(socket.gethostname()).startswith("127."):
            return
    with suppress(OSError, KeyError), socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as probe:
        probe.connect((os.environ["MASTER_ADDR"], 9))  # sends nothing, but chooses a route
        mine = probe.getsockname()[0]
        for _, name in socket.if_nameindex():
            if _address(probe, name) == mine and not mine.startswith("127."):
                os.environ["GLOO_SOCKET_IFNAME"] = name


def _address(opened: socket.socket, interface: str) -> str:
    """Return the IPv4 address of an interface; "" without one. Linux only."""
    get_address = 0x8915  # SIOCGIFADDR of linux/sockios.h
    try:
        import fcntl

        said = fcntl.ioctl(opened, get_address, struct.pack("256s", interface.encode()))
    except (OSError, ImportError):
        return ""
    return socket.inet_ntoa(said[20:24])


def drop_accelerate_settings(precision: str) -> list[str]:
    """Take out of the environment what would make Accelerate compute another thing than we say.

    ``accelerate launch`` exports its options and its default_config.yaml as ``ACCELERATE_*``.

    Args:
        precision: ``no``, ``bf16`` or ``fp16``, as Accelerate calls it; the same value in the
            environment is no difference.

    Returns:
        A line for each setting that was dropped.
    """
    lines = []
    for name, reason in OWNED.items():
        value = os.environ.get(name, "")
        same = (name, value) in (
            ("ACCELERATE_MIXED_PRECISION", precision),
            ("ACCELERATE_GRADIENT_ACCUMULATION_STEPS", "1"),
        )
        if value.lower() not in NEUTRAL and not same:
            lines.append(f"{name} ({value}) is ignored: {reason}")
        if name == "ACCELERATE_MIXED_PRECISION" and name in os.environ:
            os.environ[name] = "no"  # its presence says that accelerate launch was here
        else:
            os.environ.pop(name, None)
    return lines
