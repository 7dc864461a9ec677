"""Write files and directories beside their place and rename them: none is ever half there."""

from __future__ import annotations

import errno
import fcntl
import os
import shutil
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from molmo_edge.errors import ConfigError

_PREFIX = ".molmo-edge-"


def expand_home(path: Path | str) -> Path:
    """Replace a leading ``~`` or ``~user``. Raises ConfigError for what cannot be a path."""
    path = Path(path)
    if "\0" in str(path):
        raise ConfigError("A path has no NUL characters.")
    try:
        return path.expanduser()
    except RuntimeError:
        if len(path.parts) == 1 and path.name != "~":  # a file whose name begins so
            return path
        raise ConfigError(f"'{path}' begins with an unknown home directory.") from None


def file_mode(path: Path) -> int:
    """What a path is, for the functions of `stat`; 0 for nothing, or a name that cannot be."""
    with suppress(OSError, ValueError):
        return path.stat().st_mode
    return 0


def write_file(path: Path, content: str | bytes) -> None:
    """Write a regular file, in a directory that is created when missing. Raises OSError."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with replacing(path) as temporary:
        temporary.write_bytes(content.encode() if isinstance(content, str) else content)


@contextmanager
def replacing(path: Path) -> Iterator[Path]:
    """Yield a path of the same name to write a file or directory to; it then replaces `path`.

    After an error `path` is what it was.

    Raises:
        OSError: `path` is there and no regular file, such as /dev/null; or what writing raises.
    """
    path = Path(os.path.realpath(path))  # a symbolic link stays one; a loop of them is left
    if path.is_symlink() or (path.exists() and not path.is_file()):
        raise OSError(errno.EEXIST, "exists and is not a regular file", str(path))
    with scratch(path.parent) as work:
        made = work / path.name
        yield made
        # safetensors makes its files readable for their owner alone.
        (work / "probe").touch()
        mode = (work / "probe").stat().st_mode
        for file in [made] if made.is_file() else filter(Path.is_file, made.rglob("*")):
            file.chmod(mode)
        made.rename(path)


@contextmanager
def scratch(parent: Path) -> Iterator[Path]:
    """A temporary directory in `parent`; those that killed processes left there are removed."""
    with _locked(parent):
        for left in parent.glob(f"{_PREFIX}*"):
            with suppress(OSError), _locked(left, fcntl.LOCK_NB):  # its process is dead
                shutil.rmtree(left)
        work = Path(tempfile.mkdtemp(prefix=_PREFIX, dir=parent))
        held = lock(work)
    try:
        yield work
    finally:
        shutil.rmtree(work, ignore_errors=True)
        os.close(held)


def lock(path: Path, flags: int = 0) -> int:
    """Lock a file or directory until the descriptor that is returned is closed.

    That is at the latest when the process ends. Raises OSError, with `fcntl.LOCK_NB` a
    BlockingIOError where another process has it.
    """
    descriptor = os.open(path, os.O_RDONLY)
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | flags)
    except BaseException:
        os.close(descriptor)
        raise
    return descriptor


@contextmanager
def _locked(directory: Path, flags: int = 0) -> Iterator[None]:
    descriptor = lock(directory, flags)
    try:
        yield
    finally:
        os.close(descriptor)
