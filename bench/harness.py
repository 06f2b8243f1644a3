"""What every bench file uses: state what must come out, measure, write it down whatever came out.

A bench file is:

    EXPECTS = [Expect("a greedy soup is at least as accurate as the best of its members", "greedy - best_member", 0.0)]

    if __name__ == "__main__":
        ...                                                     # a loop over SEEDS that fills lists, one value per seed
        record("model-soup", figures={"greedy": [...]}, baselines={"best_member": [...]}, expects=EXPECTS, seeds=SEEDS, ...)
"""

from __future__ import annotations

import json
import os
import platform
import time
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from datetime import datetime, timezone
from pathlib import Path
from typing import Any

import numpy as np

from wellread import catalog
from wellread.errors import BadInput
from wellread.lineage import versions

RESULTS = Path(__file__).parent / "results"
STARTED = time.time()

Figures = Mapping[str, float | Sequence[float]]


@dataclass(frozen=True)
class Expect:
    """Something that must come out, stated before the run.

    metric: the name of a figure or baseline, or arithmetic on names ("greedy - best_member", "min(greedy)", "fast / slow"). Names stand for
    arrays with one value per seed; the value that is compared is the mean of what comes out.
    """

    sentence: str
    metric: str
    threshold: float
    at_least: bool = True  # False: at most

    def result(self, figures: Figures) -> dict[str, Any]:
        """The expectation with what came out. A metric that cannot be computed has failed, and says why: a long run is never lost to it."""
        functions: dict[str, Any] = {"min": np.min, "max": np.max, "median": np.median, "abs": np.abs, "__builtins__": {}}
        arrays = {name: np.atleast_1d(np.asarray(values, dtype=float)) for name, values in figures.items()}
        value, why = float("nan"), {}
        try:
            value = float(np.mean(eval(self.metric, functions | arrays)))  # written in the bench file, by us
        except Exception as error:
            why = {"error": f"{type(error).__name__}: {error}"}
        passed = value >= self.threshold if self.at_least else value <= self.threshold  # nan passes neither
        return {**asdict(self), "value": _finite(value), "passed": bool(passed), **why}


def record(
    method: str,
    *,
    figures: Figures,
    baselines: Figures,
    expects: Sequence[Expect],
    claims_tested: Sequence[str],
    sizes: Mapping[str, Any],
    seeds: Sequence[int],
    seconds: float | None = None,
    notes: Sequence[str] = (),
    results: Path | None = None,
) -> dict[str, Any]:
    """Write the measurement of `method` to results/<method>.json, print it, and return it.

    figures: what the method gave, by name: one number, or one per seed. Names are Python identifiers and say their unit ("accuracy_percent").
    baselines: the same for what it is compared with, measured in the same run.
    claims_tested: which of the card's claims this run can speak about, in words.
    sizes: rows, networks, epochs: all that makes the run smaller than the paper's.
    seconds: of the whole run; by default since this module was imported.
    When the method's file was changed during the run, no hash is written and the result counts as one of an older version.
    Raises `BadInput` when nothing is expected or when a name stands twice.
    """
    card = catalog.card(method)
    if not expects:
        raise BadInput(f"the bench of {card.name} expects nothing: state before the run what must come out")
    if twice := sorted(set(figures) & set(baselines)):
        raise BadInput(f"{twice[0]!r} is a figure and a baseline: give them different names")
    if wrong := next((name for name in (*figures, *baselines) if not name.isidentifier()), None):
        raise BadInput(f"the figure {wrong!r} cannot be used in an expect: name it with letters, digits and underscores")
    changed = card.code.stat().st_mtime > STARTED
    content = {
        "method": card.name,
        "chapter": card.chapter,
        "code_sha256": None if changed else catalog.code_sha256(method),
        "date": datetime.now(timezone.utc).date().isoformat(),
        "machine": machine(),
        "versions": versions(),
        "sizes": dict(sizes),
        "seconds": round(time.time() - STARTED if seconds is None else seconds, 1),
        "seeds": list(seeds),
        "expects": [expect.result({**figures, **baselines}) for expect in expects],
        "claims_tested": list(claims_tested),
        "figures": {name: summary(values) for name, values in figures.items()},
        "baselines": {name: summary(values) for name, values in baselines.items()},
        "notes": [*notes, *([f"{card.code.name} was changed while it was measured"] if changed else [])],
    }
    _write((results or RESULTS) / f"{card.path.stem}.json", content)
    _print(content)
    return content


def record_peer(
    name: str,
    peer: str,
    *,
    figures: Figures,
    expects: Sequence[Expect],
    sizes: Mapping[str, Any],
    seconds: float,
    notes: Sequence[str],
    results: Path | None = None,
    **more: Any,
) -> dict[str, Any]:
    """Write a comparison with what users have today to results/peers/<name>.json, print what was expected, and return it.

    peer: what it is compared with, in words. figures: one number, or one per seed, by name. more: what else belongs into the file, such as `seeds`.
    """
    import torch

    content = {
        "peer": peer,
        "date": datetime.now(timezone.utc).date().isoformat(),
        "machine": machine(),
        "versions": versions(),
        "threads": torch.get_num_threads(),
        "sizes": dict(sizes),
        "seconds": round(seconds, 1),
        "expects": [expect.result(figures) for expect in expects],
        "figures": {figure: summary(values) if isinstance(values, Sequence) else values for figure, values in figures.items()},
        "notes": list(notes),
        **more,
    }
    _write((results or RESULTS) / "peers" / f"{name}.json", content)
    for expect in content["expects"]:
        print(f"{'held' if expect['passed'] else 'FAILED'}: {expect['sentence']}: {catalog.shown(expect['value'])}")
    return content


class Noted(dict[str, list[float]]):
    """Figures as they come: `note(accuracy_percent=81.2)` adds a value to that name, one per seed, and prints it."""

    def __call__(self, **values: float) -> None:
        for name, value in values.items():
            self.setdefault(name, []).append(float(value))
            print(f"  {name:34} {value:.4g}", flush=True)


def _write(target: Path, content: Mapping[str, Any]) -> None:
    target.parent.mkdir(parents=True, exist_ok=True)
    beside = target.with_suffix(f".{os.getpid()}.tmp")
    beside.write_text(json.dumps(content, indent=1, ensure_ascii=False, default=_number) + "\n", "utf-8")
    os.replace(beside, target)


def summary(values: float | Sequence[float]) -> dict[str, Any]:
    """Values per seed, their mean, and their standard deviation (n - 1 below the root; None for one value)."""
    array = np.atleast_1d(np.asarray(values, dtype=float))
    if array.ndim != 1 or len(array) == 0:
        raise BadInput("a figure is one number, or a list of numbers, one per seed")
    sd = _finite(array.std(ddof=1)) if len(array) > 1 else None
    return {"per_seed": [_finite(value) for value in array], "mean": _finite(array.mean()), "sd": sd}


def _finite(value: float) -> float | None:
    return float(value) if np.isfinite(value) else None  # JSON has no nan


def machine() -> dict[str, Any]:
    """The kind of machine, not which one."""
    import psutil

    cpu = platform.processor() or platform.machine()
    info = Path("/proc/cpuinfo")
    if info.exists():
        cpu = next((line.partition(":")[2].strip() for line in info.read_text().splitlines() if line.startswith("model name")), cpu)
    return {
        "cpu": cpu,
        "cores": len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count(),
        "memory_gb": round(psutil.virtual_memory().total / 2**30),
        "gpu": _gpu(),
        "system": platform.system(),
    }


def _gpu() -> str | None:
    import torch

    return torch.cuda.get_device_name() if torch.cuda.is_available() else None


def _number(value: Any) -> Any:
    if isinstance(value, np.generic):
        return value.item()
    raise TypeError(f"{value!r} is not JSON")


def _print(content: dict[str, Any]) -> None:
    on = content["machine"]
    print(f"\n{content['method']}: {len(content['seeds'])} seeds, {content['seconds']:.0f} s on {on['cores']} x {on['cpu']}")
    for kind in ("figures", "baselines"):
        for name, figure in content[kind].items():
            print(f"  {kind[:-1]:9} {name:32} {catalog.shown(figure['mean'])}" + ("" if figure["sd"] is None else f" ± {figure['sd']:.2g}"))
    for expect in content["expects"]:
        sign = ">=" if expect["at_least"] else "<="
        value = expect.get("error") or f"{catalog.shown(expect['value'])} {sign} {catalog.shown(expect['threshold'])}"
        print(f"  {'held' if expect['passed'] else 'FAILED':9} {expect['sentence']}: {value}")
    for note in content["notes"]:
        print(f"  note      {note}")
