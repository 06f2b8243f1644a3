"""A folder that appears whole or not at all: everything wellread saves is written beside its place and moved there at the end."""

from __future__ import annotations

import errno
import os
import platform
import re
import shutil
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from itertools import count
from pathlib import Path

from wellread.errors import BadInput

# `force` removes a folder for good, so it only does that to one that holds something wellread writes.
MARKS = ("result.json", "model.safetensors", "report.html")

_HOST = re.sub(r"[^A-Za-z0-9-]", "-", platform.node())[:32] or "host"
_active: set[str] = set()  # the partial folders this process is writing now
_numbers = count()


def writable(path: str | Path, force: bool = False) -> Path:
    """The absolute form of `path` when a folder can be written there; a method calls this before it starts to compute.

    Missing parents are allowed (`new_folder` makes them). Leftovers of killed runs at this place are removed.
    Raises `BadInput` when something exists at `path` and `force` is false, when what exists is a file, or with `force` a folder that
    wellread did not write, and when the folder above cannot be written.
    """
    if not isinstance(path, (str, Path)) or not str(path).strip() or "\0" in str(path):
        raise BadInput(f"{path!r} is not the name of a folder: give the path of a folder that does not exist yet")
    try:
        target = Path(path).expanduser().resolve()
        if not target.name:
            raise BadInput(f"{target} cannot be replaced: give the path of a folder that does not exist yet")
        above = next(parent for parent in target.parents if parent.exists())
        probe = above / _sibling(target, "partial").name
        probe.mkdir()  # asked by doing it: permission bits do not tell about read-only disks and root
        probe.rmdir()
    except (OSError, RuntimeError) as error:
        raise BadInput(f"cannot write {path}: {getattr(error, 'strerror', None) or error}; choose another folder") from None
    _sweep(target)
    if target.exists():
        _replaceable(target, force)
    return target


@contextmanager
def new_folder(path: str | Path, force: bool = False) -> Iterator[Path]:
    """Yields an empty folder beside `path`; when the body ends well it is moved to `path`, otherwise it is removed.

    A kill leaves at most `.<name>.partial-<pid>-...` beside `path`, which the next call removes once that process is gone.
    With `force` an existing folder stays readable until the new one is complete. Raises what `writable` raises.
    """
    target = writable(path, force)
    partial = _sibling(target, "partial")
    _active.add(partial.name)
    try:
        try:
            partial.parent.mkdir(parents=True, exist_ok=True)
            partial.mkdir()
            yield partial
            _to_disk(partial)
            _move(partial, target, force)
        except OSError as error:
            if error.errno in (errno.ENOSPC, errno.EDQUOT):
                raise BadInput(f"the disk is full: nothing was written to {target}; free some space or choose another folder") from error
            raise
    finally:
        shutil.rmtree(partial, ignore_errors=True)
        _active.discard(partial.name)


def _sibling(target: Path, role: str) -> Path:
    return target.parent / f".{target.name}.{role}-{os.getpid()}-{next(_numbers)}.{_HOST}"


def _replaceable(target: Path, force: bool) -> None:
    """Raises `BadInput` unless the existing `target` may be replaced."""
    if not target.is_dir():
        raise BadInput(f"{target} is a file: give the path of a folder that does not exist yet")
    if not force:
        raise BadInput(f"{target} exists: choose another folder, or use force to replace it")
    if target == Path.home() or target == Path.cwd() or target in Path.cwd().parents:
        raise BadInput(f"{target} is the folder you work in and is not replaced: choose another folder")
    if any(target.iterdir()) and not any((target / mark).exists() for mark in MARKS):
        raise BadInput(f"{target} was not written by wellread and is not replaced: choose another folder, or remove it yourself")


def _move(partial: Path, target: Path, force: bool) -> None:
    """Puts `partial` in the place of `target`. At any moment `target` is the old folder, nothing, or the new folder."""
    if target.exists():
        _replaceable(target, force)  # it may have been made while the body ran
        before = _sibling(target, "before")
        _active.add(before.name)
        os.rename(target, before)
        try:
            os.rename(partial, target)
        except OSError:
            os.rename(before, target)
            raise
        finally:
            _active.discard(before.name)
        garbage = before.with_name(before.name.replace(".before-", ".partial-"))  # a half-removed folder must never be put back
        os.rename(before, garbage)
        shutil.rmtree(garbage, ignore_errors=True)
    else:
        os.rename(partial, target)
    _sync(target.parent)


def _sweep(target: Path) -> None:
    """Removes what killed runs left beside `target`; a folder that one of them had set aside and not yet replaced is put back."""
    pattern = re.compile(rf"\.{re.escape(target.name)}\.(partial|before)-(\d+)-\d+\.(.+)")
    with suppress(OSError):
        for entry in list(os.scandir(target.parent)):
            found = pattern.fullmatch(entry.name)
            if not found or entry.name in _active:
                continue
            role, process, host = found[1], int(found[2]), found[3]
            if host != _HOST:  # a shared disk: whether that process lives cannot be asked from here
                if time.time() - entry.stat().st_mtime < 24 * 3600:
                    continue
            elif process != os.getpid() and _alive(process):
                continue
            if role == "before" and not target.exists():
                with suppress(OSError):
                    os.rename(entry.path, target)
            else:
                shutil.rmtree(entry.path, ignore_errors=True)


def _alive(process: int) -> bool:
    import psutil  # os.kill(pid, 0) would end the process on Windows

    try:
        return bool(psutil.Process(process).status() != psutil.STATUS_ZOMBIE)
    except psutil.NoSuchProcess:
        return False
    except psutil.Error:
        return True


def _to_disk(folder: Path) -> None:
    """Waits until the contents are on the disk, so that a power cut after the move cannot leave empty files."""
    mode = folder.stat().st_mode & 0o666
    for path in [*folder.rglob("*"), folder]:
        if path.is_file() and not path.is_symlink():
            path.chmod(path.stat().st_mode | mode)  # safetensors makes files that only their owner can read
        _sync(path)


def _sync(path: Path) -> None:
    with suppress(OSError):  # some file systems cannot
        handle = os.open(path, os.O_RDONLY)
        try:
            os.fsync(handle)
        finally:
            os.close(handle)
