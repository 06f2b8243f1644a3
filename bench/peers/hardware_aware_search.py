"""LINAS beside DyNAS-T's own, and Optuna's samplers: percent of the front's hypervolume after 60 evaluations of one measured table, and their time.

    python3.11 -m venv /tmp/dynast                                     # its pins are not ours, so it gets an environment of its own,
    echo "$(python -c 'import torch, pathlib; print(pathlib.Path(torch.__file__).parents[1])')" \
        > /tmp/dynast/lib/python3.11/site-packages/ours.pth            # which sees the packages of this one,
    /tmp/dynast/bin/pip install --no-deps dynast==1.6.0 autograd torchprofile numba llvmlite
    python -m bench.hardware_aware_search                              # writes the table
    python -m bench.peers.hardware_aware_search --python /tmp/dynast/bin/python [--quick]

DyNAS-T knows super-networks by name. Its class LINAS runs here as it is, told that the table is a network of BootstrapNAS, with the table's figures as
its metrics; only its networks for text are left out of the import, because fairseq cannot be installed beside Python 3.11. It measures sizes
again that it has measured before, and this counts as an evaluation, as it would in use.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from contextlib import suppress
from importlib.metadata import version
from typing import Any

import numpy as np

from bench.hardware_aware_search import BUDGET, POPULATION, QUICK, SEEDS, Row, Table, linas, shares, table_file
from bench.harness import Expect, record_peer
from wellread.elastic.hardware_aware_search import Space
from wellread.runtime import using

COST = "ms"
EXPECTS = [
    Expect("after 60 evaluations the hypervolume is at least that of DyNAS-T", "percent - percent_dynast", 0.0),
    Expect("and that of Optuna's NSGA-II", "percent - percent_optuna_nsga2", 0.0),
    Expect("and that of Optuna's TPE", "percent - percent_optuna_tpe", 0.0),
    Expect("the search itself takes no longer than DyNAS-T's", "seconds / seconds_dynast", 1.0, at_least=False),
]


class Enough(Exception):
    pass


def dynast(space: Space, table: Table, cost: str, seed: int, evaluations: int) -> list[Row]:
    from types import ModuleType

    for place, name in {"machine_translation.transformer": "TransformerLT", "text_classification.bert": "BertSST2"}.items():
        left_out = ModuleType(place)
        setattr(left_out, f"EvaluationInterface{name}", None)
        setattr(left_out, f"{name}Runner", None)
        sys.modules[f"dynast.supernetwork.{place}_interface"] = left_out
    from dynast.search.search_tactic import LINAS

    class Tabled:
        """What DyNAS-T asks of a super-network of BootstrapNAS, and of a sub-network."""

        row: Row

        def get_search_space(self) -> dict[str, Any]:
            return {"width": {i: list(range(count)) for i, count in enumerate(space.counts)}}

        def get_config_from_pymoo(self, vector: Any) -> Any:
            return vector

        def activate_config(self, vector: Any) -> None:
            self.row = table[tuple(map(int, vector))]

        def get_active_subnet(self) -> Tabled:
            return self

        def to(self, device: str) -> Tabled:
            return self

    rows: list[Row] = []

    def accuracy(network: Tabled) -> float:
        if len(rows) == evaluations:
            raise Enough
        rows.append(network.row)
        return 100 * network.row["accuracy"]

    metrics = {"accuracy_top1": accuracy, "latency": lambda network: (network.row[cost], 0.0)}
    with tempfile.TemporaryDirectory() as folder:
        found = LINAS(
            "bootstrapnas_image_classification", ["latency", "accuracy_top1"], ["latency", "accuracy_top1"], 10 * evaluations, f"{folder}/results.csv",
            population=POPULATION, seed=seed, metric_eval_fns=metrics, bootstrapnas_supernetwork=Tabled(),
        )  # fmt: skip
        with suppress(Enough):
            found.search()
    return rows


def optuna_sampler(kind: str) -> Callable[..., list[Row]]:
    def run(space: Space, table: Table, cost: str, seed: int, evaluations: int) -> list[Row]:
        import optuna

        optuna.logging.set_verbosity(optuna.logging.ERROR)
        samplers = {"nsga2": lambda: optuna.samplers.NSGAIISampler(population_size=POPULATION, seed=seed), "tpe": lambda: optuna.samplers.TPESampler(seed=seed)}
        study = optuna.create_study(directions=["minimize", "maximize"], sampler=samplers[kind]())
        asked: dict[tuple[int, ...], Row] = {}

        def objective(trial: Any) -> tuple[float, float]:
            code = tuple(trial.suggest_int(name, 0, count - 1) for name, count in zip(space.variables, space.counts, strict=True))
            row = asked.setdefault(code, table[code])
            return row[cost], row["accuracy"]

        while len(asked) < evaluations and len(study.trials) < 20 * evaluations:
            study.optimize(objective, n_trials=1)  # a size asked for again costs nothing
        return list(asked.values())

    return run


ARMS: dict[str, Callable[..., list[Row]]] = {
    "": linas,
    "_dynast": dynast,
    "_optuna_nsga2": optuna_sampler("nsga2"),
    "_optuna_tpe": optuna_sampler("tpe"),
}


def measure() -> None:
    began = time.perf_counter()
    if not table_file().exists():
        raise SystemExit(f"there is no table: run python -m bench.hardware_aware_search{' --quick' if QUICK else ''} first")
    read = json.loads(table_file().read_text())
    space, table = Space(read["variables"]), {tuple(code): row for code, row in read["rows"]}
    figures: dict[str, list[float]] = {}
    for seed in SEEDS:
        for name in np.random.default_rng(seed).permutation(list(ARMS)):  # turns in another order each time
            start = time.perf_counter()
            with using(progress=False):
                rows = ARMS[name](space, table, COST, seed, BUDGET)
            figures.setdefault(f"seconds{name}", []).append(time.perf_counter() - start)
            figures.setdefault(f"percent{name}", []).append(shares(rows[:BUDGET], table, COST)[-1])
            figures.setdefault(f"different{name}", []).append(float(len({row["name"] for row in rows[:BUDGET]})))
    for name, values in figures.items():
        print(f"{name:30} {np.mean(values):.4g}", flush=True)
    if QUICK:
        return
    record_peer(
        "hardware_aware_search",
        f"DyNAS-T {version('dynast')}: LINAS; Optuna {version('optuna')}: NSGAIISampler and TPESampler",
        figures=figures,
        expects=EXPECTS,
        sizes={"sizes": len(table), "evaluations": BUDGET, "population": POPULATION},
        seconds=time.perf_counter() - began,
        seeds=SEEDS,
        notes=[
            "percent: of the hypervolume of the whole table (milliseconds, accuracy) after 60 evaluations; seconds: of the search, measurements are looked up",
            "different: sizes among the 60; DyNAS-T measures some again",
        ],
    )


def main() -> None:
    if "--python" in sys.argv:
        at = sys.argv.index("--python")
        rest = [*sys.argv[1:at], *sys.argv[at + 2 :]]
        code = [sys.argv[at + 1], "-W", "ignore", "-m", "bench.peers.hardware_aware_search", *rest]
        sys.exit(subprocess.run(code, env=os.environ | {"PYTHONWARNINGS": "ignore"}).returncode)
    measure()


if __name__ == "__main__":
    main()
