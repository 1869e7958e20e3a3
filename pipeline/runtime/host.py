"""Ask the operating system for what it grants: cores, open files, and processes that share memory.

Imports nothing heavy, and nothing that only Linux has.
"""

from __future__ import annotations

import errno
import os
import sys
from contextlib import suppress
from pathlib import Path

MOST_FILES = 10240
"""The limit of open files that is asked for; macOS refuses more, and half of it is plenty."""
SCARCE_FILES = (errno.EMFILE, errno.ENFILE)
NO_SEMAPHORES = (errno.ENOSPC, errno.EROFS, errno.EACCES, errno.EPERM, errno.ENOENT, errno.ENOSYS)


def cores() -> int:
    """Return the number of cores that this process may use."""
    if hasattr(os, "sched_getaffinity"):  # macOS and Windows have no such call
        return len(os.sched_getaffinity(0))
    return os.cpu_count() or 1


def memory() -> int:
    """Return the bytes of memory that this process may use: the machine's, or its cgroup's."""
    found = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    root = Path("/sys/fs/cgroup")
    with suppress(OSError, ValueError):  # Linux with cgroups of version 2; others keep the first
        own = Path("/proc/self/cgroup").read_text().strip().rpartition("::/")[2]
        for folder in (root / own, *(root / own).parents):
            limit = folder / "memory.max"
            if limit.is_file() and (text := limit.read_text().strip()) != "max":
                found = min(found, int(text))
    return found


def peak_memory() -> int:
    """Return the most bytes of memory that this process has held; 0 if the system does not say."""
    try:
        import resource
    except ImportError:
        return 0
    unit = 1 if sys.platform == "darwin" else 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit


def raise_open_files() -> int:
    """Raise the limit of open files as far as it may be, up to 10240; return the limit then.

    A usual limit is 1024, and each shard that is mapped takes one.
    """
    try:
        import resource
    except ImportError:  # Windows has no such limit
        return MOST_FILES
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    if soft == resource.RLIM_INFINITY or soft >= MOST_FILES:
        return MOST_FILES
    wanted = MOST_FILES if hard == resource.RLIM_INFINITY else min(hard, MOST_FILES)
    with suppress(OSError, ValueError):
        resource.setrlimit(resource.RLIMIT_NOFILE, (wanted, hard))
        return wanted
    return soft


def remedy_of_file(error: OSError) -> str:
    """Return what to do about an error of a file, without a full stop."""
    if error.errno in (errno.ENOSPC, errno.EDQUOT, errno.EFBIG):
        return "Make room, then run the same command again"
    if error.errno in (errno.EACCES, errno.EPERM, errno.EROFS):
        return "Give permission, then run the same command again"
    if error.errno in (*SCARCE_FILES, errno.ENOMEM, errno.EAGAIN):
        return f"{remedy_for(error)}, then run the same command again"
    return "Mend it, then run the same command again"


def remedy_for(error: OSError) -> str:
    """Return why the system refuses a file or a process, and what to do; "" for other reasons.

    Args:
        error: raised by an ``open``, or while processes were started that share semaphores.
    """
    if error.errno in SCARCE_FILES:
        return (
            f"open files are limited to {raise_open_files()} here. Raise the limit: ulimit -n 4096 "
            "(its hard limit too: ulimit -Hn shows it; docker run --ulimit nofile=4096)"
        )
    if error.errno in NO_SEMAPHORES:
        return (
            "worker processes share semaphores in /dev/shm, which is full, read-only or missing. "
            "Empty it or mount one (docker run --shm-size 1g or --ipc host)"
        )
    if error.errno in (errno.EAGAIN, errno.ENOMEM):
        return (
            "the limit of processes or of memory is reached (ulimit -u; docker run --pids-limit "
            "and --memory). Raise it"
        )
    return ""
