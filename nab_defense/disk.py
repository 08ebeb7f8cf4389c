"""What a disk refuses, and what to do about it in words."""

from __future__ import annotations

import errno

__all__ = ["DISK", "disk_error"]

DISK = {
    errno.ENOSPC: "the disk is full; make room",
    errno.EDQUOT: "the quota is used up; make room",
    errno.EACCES: "no permission; name another folder",
    errno.EPERM: "no permission; name another folder",
    errno.EROFS: "it is on a read-only disk; name another folder",
    errno.ENAMETOOLONG: "the name is too long; name another one",
    errno.ENOTDIR: "a file is where a folder should be; name another folder",
    errno.EISDIR: "a folder is where a file should be; name another one",
    errno.EEXIST: "a file is where a folder should be; name another folder",
}


def disk_error(error: BaseException | None) -> OSError | None:
    """The trouble with the disk behind an error, one of DISK; torch.save wraps it in a RuntimeError of its own."""
    while error is not None and not (isinstance(error, OSError) and error.errno in DISK):
        error = error.__cause__ or error.__context__
    return error
