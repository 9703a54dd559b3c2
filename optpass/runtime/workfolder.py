"""The hidden folder in which a bundle grows: locked by its process, so that a dead one's can be told and removed."""

from __future__ import annotations

import os
import secrets
import shutil
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from optpass.errors import UserError

try:
    import fcntl
except ImportError:  # Windows: nothing is locked there, and nobody's folder removed.
    fcntl = None  # type: ignore[assignment]


@contextmanager
def alone(folder: Path, *, shared: bool = False) -> Iterator[None]:
    """Inside, nobody else changes ``folder`` who asks for that in this way; with ``shared``, others may read it too.

    Raises:
        UserError: another process is at work on it.
    """
    if fcntl is None or not folder.is_dir():
        yield
        return
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        # Where the file system has no locks, nothing is locked.
        with suppress(OSError):
            try:
                fcntl.flock(descriptor, (fcntl.LOCK_SH if shared else fcntl.LOCK_EX) | fcntl.LOCK_NB)
            except BlockingIOError:
                raise UserError(f"another process is at work on {folder}; try again when it is done") from None
        yield
    finally:
        os.close(descriptor)


class WorkFolder:
    """``.NAME.partial-TOKEN`` beside ``out``. A process that is killed leaves it; the next one for ``out`` removes it.

    The lock is the kernel's: it ends with the process, however that ends, and holds across machines
    where the file system says so.
    """

    def __init__(self, out: Path) -> None:
        self._parent, self._name = Path(os.path.abspath(out)).parent, Path(os.path.abspath(out)).name
        self.token = secrets.token_hex(4)
        self.path = self._parent / f"{self._prefix}{self.token}"
        self._lock: int | None = None

    @property
    def _prefix(self) -> str:
        return f".{self._name}.partial-"

    def make(self) -> None:
        """Make the folder, and remove those that dead processes left for the same name.

        Raises:
            OSError: nothing can be written there.
        """
        # Locked before it has the name that others look for: no moment in which it seems dead.
        unseen = self._parent / f".{self._name}.new-{self.token}"
        unseen.mkdir(parents=True)
        self._lock = _locked(unseen)
        unseen.rename(self.path)
        self._remove_dead()

    def remove(self) -> None:
        """Remove what is there, and let go of the lock; harmless when the folder was renamed."""
        shutil.rmtree(self.path, ignore_errors=True)
        if self._lock is not None:
            os.close(self._lock)
            self._lock = None

    def _remove_dead(self) -> None:
        # Not glob: a bundle's name may hold its special characters.
        for path in self._parent.iterdir():
            if path == self.path or not path.name.startswith(self._prefix) or path.is_symlink():
                continue
            if (lock := _locked(path)) is not None:
                shutil.rmtree(path, ignore_errors=True)
                os.close(lock)


def _locked(folder: Path) -> int | None:
    """A descriptor that holds the folder's lock; ``None`` where it has an owner, or there are no locks."""
    if fcntl is None:
        return None
    with suppress(OSError):
        descriptor = os.open(folder, os.O_RDONLY)
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError:
            os.close(descriptor)
        else:
            return descriptor
    return None
