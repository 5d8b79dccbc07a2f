"""Locks between processes: on an open file, and gone with the process that has it, however that ends."""

import errno
from typing import BinaryIO

TAKEN = (errno.EACCES, errno.EAGAIN)  # by another process
NO_LOCKS = (errno.ENOLCK, errno.ENOSYS, errno.EOPNOTSUPP, errno.EINVAL)  # what file systems without locks say


def lock(file: BinaryIO) -> None:
    """Lock a file for as long as it is open. Raises OSError if another process has done so."""
    try:
        import fcntl
    except ImportError:  # Windows, where what is locked cannot be read: not the part that says who holds it
        import msvcrt

        file.seek(1 << 20)
        msvcrt.locking(file.fileno(), msvcrt.LK_NBLCK, 1)  # type: ignore[attr-defined]
        return
    fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
