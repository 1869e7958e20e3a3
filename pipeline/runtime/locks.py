"""Lock files between processes on one node, or on nodes that share a file system."""

from __future__ import annotations

import errno
import os
import stat
from contextlib import suppress
from pathlib import Path

with suppress(ImportError):  # on Windows, where only --help works
    import fcntl

UNSUPPORTED = (errno.ENOLCK, errno.ENOSYS, errno.ENOTSUP)


class FileLock:
    """An advisory POSIX lock (``fcntl.lockf``) on a file, or on single bytes of it.

    The kernel releases it when its process ends, so a killed process leaves no stale lock. Forked
    workers do not inherit it. It works between nodes over NFS (version 4, or 3 with lockd) and over
    Lustre mounted with ``flock``. It does not exclude threads of one process from each other. The
    kernel also releases it when the process closes *any* descriptor of the file: open a lock file
    only through one ``FileLock``.

    Args:
        path: the lock file. It is created in an existing folder and never removed.

    Raises:
        OSError: the file cannot be opened for writing.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        self._descriptor = os.open(path, os.O_RDWR | os.O_CREAT | os.O_NONBLOCK, 0o666)
        if not stat.S_ISREG(os.fstat(self._descriptor).st_mode):
            os.close(self._descriptor)
            raise OSError(errno.EINVAL, "no regular file, which a lock needs", str(path))

    def acquire(self, byte: int = 0, *, shared: bool = False, wait: bool = True) -> bool:
        """Lock one byte of the file; return False if ``wait`` is False and the byte is locked.

        Args:
            byte: offset of the byte; each byte is a lock of its own.
            shared: allow other shared holders at the same time.
            wait: block until the holder releases it.

        Raises:
            OSError: the file system does not support locks; the message says how to mount it.
        """
        kind = fcntl.LOCK_SH if shared else fcntl.LOCK_EX
        try:
            fcntl.lockf(self._descriptor, kind | (0 if wait else fcntl.LOCK_NB), 1, byte)
        except (BlockingIOError, PermissionError):
            return False
        except OSError as error:
            if error.errno not in UNSUPPORTED:
                raise
            reason = (
                f"files cannot be locked there ({error.strerror}), so two processes would not "
                "notice each other; mount the file system with locks (NFS: lockd; Lustre: flock)"
            )
            raise OSError(error.errno, reason) from None
        return True

    def release(self, byte: int = 0) -> None:
        """Unlock one byte; no error if it is not held."""
        fcntl.lockf(self._descriptor, fcntl.LOCK_UN, 1, byte)

    def is_in_place(self) -> bool:
        """Return whether the path still leads to the file that this process has open.

        A process that finds another file there, or none, can lock it too.
        """
        try:
            found, own = self.path.stat(), os.fstat(self._descriptor)
        except (FileNotFoundError, NotADirectoryError):
            return False
        except OSError as error:
            return error.errno != errno.ESTALE  # it was removed by another node
        return (found.st_dev, found.st_ino) == (own.st_dev, own.st_ino)

    def write_holder(self, text: str) -> None:
        """Write the holder's name into the file, for messages of processes that do not get it."""
        os.ftruncate(self._descriptor, 0)
        os.pwrite(self._descriptor, text.encode(), 0)

    def holder(self) -> str:
        """Return the name that the last holder wrote; "" if none."""
        return os.pread(self._descriptor, 200, 0).decode(errors="replace").strip()

    def close(self) -> None:
        """Release every byte and close the file."""
        os.close(self._descriptor)

    def __enter__(self) -> FileLock:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()
