"""Where and how a call runs: device, precision, progress, the folder in which a long run keeps its checkpoints.

These never change what a method means, so they are no parameters of it: `with using(device="cuda"): model_soup(...)`.
"""

from __future__ import annotations

import os
import sys
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import dataclass, field, replace
from itertools import count
from pathlib import Path
from typing import TYPE_CHECKING, TypeVar

from wellread.errors import BadInput

if TYPE_CHECKING:
    import torch

T = TypeVar("T")


@dataclass(frozen=True)
class Runtime:
    device: str = "auto"  # "auto", or a torch device name
    precision: str = "float32"  # "float32", "bfloat16" or "float16": the arithmetic of forward and backward passes
    progress: bool = True
    folder: Path | None = None  # checkpoints of a long run; None keeps none
    trainings: Iterator[int] = field(default_factory=count, compare=False, repr=False)  # numbers those that keep checkpoints in `folder`


_current: ContextVar[Runtime] = ContextVar("runtime")
_DEFAULT = Runtime()


def current() -> Runtime:
    return _current.get(_DEFAULT)


@contextmanager
def using(**changes: object) -> Iterator[Runtime]:
    """Run the body with some fields of `Runtime` changed. Raises `BadInput` for a device or precision that is not there."""
    if "folder" in changes:
        changes = {"trainings": count(), **changes}
    runtime = replace(current(), **changes)  # type: ignore[arg-type]
    if runtime.precision not in ("float32", "bfloat16", "float16"):
        raise BadInput(f"precision {runtime.precision!r} is not known: choose float32, bfloat16 or float16")
    if runtime.device != "auto":
        _usable(runtime.device)
    token = _current.set(runtime)
    try:
        yield runtime
    finally:
        _current.reset(token)


def _usable(name: str) -> torch.device:
    import torch

    try:
        device = torch.device(name)
        torch.empty(0, device=device)
    except (RuntimeError, AssertionError, NotImplementedError):
        raise BadInput(f"device {name!r} cannot be used on this machine: leave it out, or name one of cpu, cuda, mps that is present") from None
    return device


def device() -> torch.device:
    """The device of this run: the one named, else CUDA, else MPS, else the CPU."""
    import torch

    name = current().device
    if name != "auto":
        return torch.device(name)
    if torch.cuda.is_available():
        return torch.device("cuda", int(os.environ.get("LOCAL_RANK", 0)))
    if torch.backends.mps.is_available():
        return torch.device("mps")
    return torch.device("cpu")


def autocast(on: torch.device) -> torch.autocast:
    """Autocast to this run's precision on `on`; does nothing for float32."""
    import torch

    precision = current().precision
    return torch.autocast(on.type, dtype=getattr(torch, precision) if precision != "float32" else None, enabled=precision != "float32")


def track(items: Iterable[T], what: str, total: int | None = None) -> Iterator[T]:
    """`items` with a progress bar and a remaining time on stderr; silent when progress is off."""
    from tqdm import tqdm

    interval = 0.2 if sys.stderr.isatty() else 10.0  # a log file wants a line now and then, not a redrawn bar
    yield from tqdm(items, desc=what, total=total, disable=not current().progress, mininterval=interval, leave=False, dynamic_ncols=True)


def cache_folder() -> Path:
    """Where features and decoded images are kept between calls: `WELLREAD_CACHE`, else the user's cache folder."""
    named = os.environ.get("WELLREAD_CACHE")
    if named:
        return Path(named).expanduser()
    base = os.environ.get("XDG_CACHE_HOME") or ("~/Library/Caches" if sys.platform == "darwin" else "~/.cache")
    return Path(base).expanduser() / "wellread"
