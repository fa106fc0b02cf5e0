"""Atomic writes of files, and the lock on an output directory."""

import fcntl
import logging
import os
import shutil
import socket
from pathlib import Path

from run.config import ConfigError

_claimed: dict[Path, int] = {}  # directories that this process holds, with their locks' descriptors


def claim(output_dir: Path) -> None:
    """Create the directory and lock it while this process lives: two runs would overwrite each other's
    checkpoints. Raises ConfigError if another run uses it, or it cannot be written."""
    output_dir = output_dir.resolve()
    if output_dir in _claimed:
        return
    try:
        output_dir.mkdir(parents=True, exist_ok=True)
        descriptor = os.open(output_dir / ".lock", os.O_RDWR | os.O_CREAT, 0o644)
    except OSError as error:
        remedy = f"cannot be written ({error.strerror}); choose another"
        raise ConfigError("output_dir", str(output_dir), remedy) from error
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        holder = os.read(descriptor, 200).decode(errors="replace").strip()
        os.close(descriptor)
        remedy = f"is in use by another run ({holder}): choose another, or stop that run"
        raise ConfigError("output_dir", str(output_dir), remedy) from None
    except OSError as error:  # a network file system without locks
        logging.getLogger("ballast").warning(
            "output_dir cannot be locked (%s): make sure that no other run uses it", error.strerror
        )
    os.ftruncate(descriptor, 0)
    os.write(descriptor, f"process {os.getpid()} on {socket.gethostname()}\n".encode())
    _claimed[output_dir] = descriptor


def write_atomically(path: Path, content: str | bytes) -> None:
    """Replace the file atomically: even after a power cut it holds either the old content or the new."""
    aside = path.with_name(f".{path.name}.tmp")
    with aside.open("wb") as file:
        file.write(content.encode() if isinstance(content, str) else content)
        file.flush()
        os.fsync(file.fileno())
    aside.replace(path)
    _sync_directory(path.parent)


def _sync_directory(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def _remove(path: Path) -> None:
    """A directory, or the link that stands in the place of one."""
    if path.is_symlink():
        path.unlink(missing_ok=True)
    else:
        shutil.rmtree(path, ignore_errors=True)


def publish(aside: Path, final: Path) -> None:
    """Make a finished directory appear under its name at once: flush every file, rename, flush the parent."""
    for file in aside.rglob("*"):
        if file.is_file():
            descriptor = os.open(file, os.O_RDONLY)
            os.fsync(descriptor)
            os.close(descriptor)
    _sync_directory(aside)
    if (
        final.exists()
    ):  # rename cannot replace a directory that holds files: move the old one out of the way first
        old = final.with_name(f".{final.name}.old")
        _remove(old)
        final.rename(old)
        aside.rename(final)
        _remove(old)
    else:
        aside.rename(final)
    _sync_directory(final.parent)
