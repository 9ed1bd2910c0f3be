"""The exceptions that stand for a mistake of the user's."""

import contextlib
import errno
from collections.abc import Iterator

REMEDIES = {
    **dict.fromkeys((errno.ENOSPC, errno.EDQUOT, errno.EFBIG), "make room"),
    **dict.fromkeys((errno.EACCES, errno.EPERM, errno.EROFS), "allow it"),
    errno.ENOENT: "keep it, where every process sees it,",
    errno.ENOTDIR: "put a directory there",
}
"""The operating system's errors that a user can mend, and how."""


class UserError(Exception):
    """A mistake the user can mend: a bad path, bad data, flags that disagree.

    The message is one line that says what is wrong and how to mend it. A program's main prints it
    on stderr behind "error: " and exits with status 2; any other exception is a defect, or what
    another start may be enough for, and keeps its traceback.
    """


@contextlib.contextmanager
def mendable(what: str, then: str = "") -> Iterator[None]:
    """Raises the operating system's errors in ``REMEDIES`` as a ``UserError``.

    Others pass as they are, such as EIO, a stale file handle or a TimeoutError: they may be over
    at another start.

    Args:
        what: could not be done: how the message begins.
        then: how it ends, after the remedy.
    """
    try:
        yield
    except OSError as error:
        remedy = REMEDIES.get(error.errno or 0)
        if remedy is None:
            raise
        raise UserError(f"{what}: {error.strerror}; {remedy}{then}") from error
