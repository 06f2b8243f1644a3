"""LINAS: which sub-networks of one elastic network are worth having here, found with few real measurements
(Sarah et al. 2022, arXiv 2202.12954).

Measuring a sub-network (its accuracy, its milliseconds on this machine) is slow; predicting both from the choices that make it is not. So: measure
a few at random, fit a predictor for each objective, let an evolutionary search run on the predictions alone, measure what it found, and again.

`search` does this for any space of named choices and any measurement; `hardware_aware_search` for the sizes of a network from sortednet or stitchable.
Measurements are the trials of an Optuna study: in a database, several processes work on one search and nothing measured is lost.
"""

from __future__ import annotations

import hashlib
import itertools
import json
import math
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any, Literal

import numpy as np
from datasets import Dataset

from wellread.data import Labelled, Unlabelled, fingerprint
from wellread.elastic.sortednet import parse, sub_network
from wellread.elastic.stitchable import Stitchable, cut
from wellread.errors import BadInput, optional
from wellread.evaluate import METRICS, score
from wellread.meter import milliseconds
from wellread.method import known_classes, method
from wellread.network import Network
from wellread.norm import norm_layers
from wellread.results import Front, Report
from wellread.runtime import track, using

ALL = 4096  # spaces up to this size are predicted whole, larger ones are searched by NSGA-II
FAILURES = 5  # in a row end a search
GENERATIONS, CROWD = 100, 50  # of the search on the predictors: 5,000 predictions, as few as the authors make

Code = tuple[int, ...]
Configuration = dict[str, Any]
Sampler = Literal["linas", "nsga2", "random"]


# --- the space


class Space:
    """Named choices. A configuration {name: value} is coded as the places of its values, a tuple of whole numbers.

    variables: name to its values, in their order. listed: the configurations that exist; None: every combination.
    Raises `BadInput` for a variable without values, values given twice, or a listed configuration of other names or values.
    """

    def __init__(self, variables: Mapping[str, Sequence[Any]], listed: Sequence[Configuration] | None = None) -> None:
        self.variables = {name: list(values) for name, values in variables.items()}
        if not self.variables or any(not values or len(set(values)) < len(values) for values in self.variables.values()):
            raise BadInput("a space needs variables, and each of them at least one value, none of them twice")
        self.counts = [len(values) for values in self.variables.values()]
        self.listed = None if listed is None else list(dict.fromkeys(self.encode(each) for each in listed))
        if self.listed == []:
            raise BadInput("no configuration is listed: give at least one, or None for every combination")
        self.size = math.prod(self.counts) if self.listed is None else len(self.listed)

    def encode(self, configuration: Configuration) -> Code:
        if configuration.keys() != self.variables.keys():
            raise BadInput(f"the configuration {configuration} does not say {', '.join(self.variables)}")
        for name, value in configuration.items():
            if value not in self.variables[name]:
                raise BadInput(f"{name} is {value!r}: choose one of {', '.join(map(str, self.variables[name]))}")
        return tuple(values.index(configuration[name]) for name, values in self.variables.items())

    def decode(self, code: Sequence[int]) -> Configuration:
        return {name: values[int(place)] for (name, values), place in zip(self.variables.items(), code, strict=True)}

    def every(self) -> np.ndarray:
        """int [size, variables]: all codes."""
        return np.asarray(self.listed if self.listed is not None else list(itertools.product(*map(range, self.counts))))

    def nearest(self, code: Code) -> Code:
        """The listed code that takes fewest steps; the code itself where every combination exists."""
        if self.listed is None or code in self.listed:
            return code
        return min(self.listed, key=lambda each: sum(abs(a - b) for a, b in zip(each, code, strict=True)))

    def draw(self, random: np.random.Generator, taken: set[Code]) -> Code | None:
        """A code that is not taken, each as likely as another; None when all are."""
        if self.listed is not None or self.size <= ALL:
            free = [tuple(map(int, each)) for each in self.every() if tuple(map(int, each)) not in taken]
            return free[random.integers(len(free))] if free else None
        while (code := tuple(int(random.integers(count)) for count in self.counts)) in taken:
            pass
        return code


def one_hot(codes: np.ndarray, counts: Sequence[int]) -> np.ndarray:
    """float64 [N, sum of counts] from int [N, variables]; each row sums to the number of variables."""
    return np.concatenate([np.eye(count)[codes[:, i]] for i, count in enumerate(counts)], axis=1)


# --- predictors and the search on them


def predictor(features: np.ndarray, values: np.ndarray, seed: int = 0) -> Any:
    """Ridge or RBF support vector regression, whichever is nearer to `values` [N] of held-out rows in five folds; features are [N, d].

    Ridge chooses its penalty by leave-one-out, the other its C in the same folds; values are standardised for both. A constant predicts itself.
    """
    from sklearn.compose import TransformedTargetRegressor
    from sklearn.linear_model import RidgeCV
    from sklearn.model_selection import GridSearchCV, KFold, cross_val_score
    from sklearn.preprocessing import StandardScaler
    from sklearn.svm import SVR

    error: dict[str, Any] = {"cv": KFold(min(5, len(values)), shuffle=True, random_state=seed), "scoring": "neg_mean_squared_error"}
    ridge = TransformedTargetRegressor(RidgeCV(np.linspace(0.1, 10, 100)), transformer=StandardScaler())
    if len(values) < 5 or np.ptp(values) == 0:
        return ridge.fit(features, values)
    bent = TransformedTargetRegressor(SVR(gamma="auto", epsilon=0), transformer=StandardScaler())
    best = GridSearchCV(bent, {"regressor__C": [1, 3, 10, 30, 100]}, **error).fit(features, values)
    return best.best_estimator_ if best.best_score_ > cross_val_score(ridge, features, values, **error).mean() else ridge.fit(features, values)


def by_rank(objectives: np.ndarray) -> np.ndarray:
    """int [N]: row numbers of [N, 2], both to be low: front after front, in each the most lonely first (the order of NSGA-II)."""
    optional("pymoo", "search")
    from pymoo.operators.survival.rank_and_crowding.metrics import calc_crowding_distance
    from pymoo.util.nds.non_dominated_sorting import NonDominatedSorting

    fronts = NonDominatedSorting().do(objectives)
    return np.concatenate([front[np.argsort(-calc_crowding_distance(objectives[front]), kind="stable")] for front in fronts])


def evolve(
    space: Space, predict: Callable[[np.ndarray], np.ndarray], seed: int, generations: int = GENERATIONS, population: int = CROWD
) -> np.ndarray:
    """int [population, variables]: the last generation of NSGA-II on `predict`, int codes [N, variables] to [N, 2], both low. Settings are the authors'."""
    optional("pymoo", "search")
    from pymoo.algorithms.moo.nsga2 import NSGA2
    from pymoo.core.problem import Problem
    from pymoo.operators.crossover.sbx import SBX
    from pymoo.operators.mutation.pm import PM
    from pymoo.operators.repair.rounding import RoundingRepair
    from pymoo.operators.sampling.rnd import IntegerRandomSampling
    from pymoo.optimize import minimize

    class Predicted(Problem):
        def _evaluate(self, x: np.ndarray, out: dict[str, Any], *args: Any, **more: Any) -> None:
            out["F"] = predict(x.astype(int))

    problem = Predicted(n_var=len(space.counts), n_obj=2, xl=np.zeros(len(space.counts)), xu=np.asarray(space.counts) - 1.0, vtype=int)
    operators = {
        "crossover": SBX(prob=0.9, eta=15, repair=RoundingRepair()),
        "mutation": PM(prob=1.0, prob_var=0.02, eta=20, repair=RoundingRepair()),
    }
    algorithm = NSGA2(pop_size=population, sampling=IntegerRandomSampling(), eliminate_duplicates=True, **operators)
    return minimize(problem, algorithm, ("n_gen", generations), seed=seed).pop.get("X").astype(int)


class Linas:
    """What to measure next. known: cost of every code, where it needs no measurement and so no predictor."""

    def __init__(self, space: Space, population: int, known: Mapping[Code, float] | None, seed: int) -> None:
        self.space, self.population, self.known, self.seed = space, population, known, seed
        self.round, self.queue = 0, list[Code]()
        self.predicted: dict[Code, tuple[float, float]] = {}

    def rank(self, codes: Sequence[Code], values: np.ndarray, seed: int) -> None:
        """Fill the queue from all that was measured: values [N, 2], cost to be low and quality to be high."""
        features = one_hot(np.asarray(codes), self.space.counts)
        models = [predictor(features, values[:, i], seed) for i in range(2)]

        def predict(asked: np.ndarray) -> np.ndarray:
            asked_features = one_hot(asked, self.space.counts)
            cost = [self.known[tuple(map(int, code))] for code in asked] if self.known else models[0].predict(asked_features)
            return np.stack([cost, -models[1].predict(asked_features)], axis=1)

        whole = self.space.listed is not None or self.space.size <= ALL
        pool = self.space.every() if whole else evolve(self.space, predict, seed)
        found = predict(pool)
        self.queue = [tuple(map(int, pool[i])) for i in by_rank(found)]
        self.predicted = {tuple(map(int, code)): (float(cost), -float(low)) for code, (cost, low) in zip(pool, found, strict=True)}

    def next(self, codes: Sequence[Code], values: np.ndarray, taken: set[Code]) -> Code | None:
        """codes, values: measured, in their order. taken: also those that are being measured, or failed."""
        now = len(codes) // self.population
        if now and now != self.round:
            self.rank(codes[: now * self.population], values[: now * self.population], self.seed + now)
            self.round = now
        if not now:
            self.predicted, self.queue = {}, []
        found = next((code for code in self.queue if code not in taken), None)
        return self.space.draw(np.random.default_rng((self.seed, len(taken))), taken) if found is None else found


# --- measured, as an Optuna study


def search(
    space: Space,
    measure: Callable[[Configuration], dict[str, Any]],
    *,
    cost: str,
    quality: str,
    evaluations: int = 60,
    population: int = 15,
    sampler: Sampler = "linas",
    known: Mapping[Code, float] | None = None,
    storage: str | None = None,
    name: str = "search",
    seed: int = 0,
) -> list[dict[str, Any]]:
    """The measured rows, in their order: what `measure` gave, the configuration, and what was predicted of it before.

    measure: configuration to a row with at least the numbers `cost` (low is good) and `quality` (high is good). It may fail: that is noted, and counts.
    evaluations: different configurations that are measured, all processes together; those found in the storage count.
    population: configurations measured between two fits of the predictors. known: cost of every code, when it takes no measurement.
    storage, name: URL of a database and the name of the study in it; see `hardware_aware_search`.
    Raises `BadInput` for a study of another space, a row without the two numbers, and after five failures in a row.
    """
    optuna = optional("optuna", "search")
    if evaluations < 1 or population < 2:
        raise BadInput(f"evaluations is {evaluations} and population {population}: give at least 1 and 2")
    said = json.dumps([space.variables, space.listed, cost, quality], default=str)
    linas = Linas(space, population if sampler == "linas" else space.size + 1, known, seed)
    State = optuna.trial.TrialState

    def states(study: Any, before: float = math.inf) -> tuple[list[Any], set[Code], dict[Code, Any]]:
        """(trials that measured something, codes that are measured, failed or under way, the trial of each code)."""
        of: dict[Code, Any] = {}
        for trial in study.get_trials(deepcopy=False):
            lost = trial.state == State.PRUNED or (trial.state == State.FAIL and "error" not in trial.user_attrs)
            if trial.number < before and not lost and trial.params.keys() == space.variables.keys():
                of.setdefault(space.nearest(space.encode(trial.params)), trial)
        return [trial for trial in of.values() if trial.state == State.COMPLETE], set(of), of

    class Proposed(optuna.samplers.BaseSampler):  # type: ignore[misc,name-defined]
        def infer_relative_search_space(self, study: Any, trial: Any) -> dict[str, Any]:
            return {name: optuna.distributions.CategoricalDistribution(values) for name, values in space.variables.items()}

        def sample_relative(self, study: Any, trial: Any, search_space: dict[str, Any]) -> dict[str, Any]:
            done, taken, _ = states(study)
            codes = [space.encode(each.params) for each in done]
            code = linas.next(codes, np.asarray([each.values for each in done]).reshape(-1, 2), taken)
            return space.decode(code or next(iter(taken)))

        def sample_independent(self, study: Any, trial: Any, param_name: str, param_distribution: Any) -> Any:
            raise AssertionError("all variables are proposed together")

    failed_in_a_row = 0

    def objective(trial: Any) -> tuple[float, float]:
        nonlocal failed_in_a_row
        asked = {name: trial.suggest_categorical(name, values) for name, values in space.variables.items()}
        code = space.nearest(space.encode(asked))
        for _ in range(100):  # another process may be about to say what it measures; one that died there is not waited for long
            earlier = (other for other in study.get_trials(deepcopy=False) if other.number < trial.number and other.state == State.RUNNING)
            if all(other.params.keys() == space.variables.keys() for other in earlier):
                break
            time.sleep(0.05)
        _, taken, of = states(study, before=trial.number)
        if code in of and of[code].state == State.COMPLETE:  # NSGA-II asks again: told, not measured, not counted
            return tuple(of[code].values)  # type: ignore[return-value]
        if code in taken or len(taken) >= evaluations:
            raise optuna.TrialPruned("another process has it, or measured the last one")
        configuration = space.decode(code)
        try:
            row = measure(configuration)
            if wrong := [key for key in (cost, quality) if key not in row]:
                raise BadInput(f"the measurement says no {wrong[0]!r} (it says {', '.join(row)}): name the objectives as it does")
            values = float(row[cost]), float(row[quality])
            if not np.isfinite(values).all():
                raise ValueError(f"{cost} is {values[0]}, {quality} is {values[1]}")
        except BadInput:
            raise
        except Exception as error:
            trial.set_user_attr("error", f"{type(error).__name__}: {error}")
            failed_in_a_row += 1
            if failed_in_a_row >= FAILURES:
                raise BadInput(f"{FAILURES} measurements in a row failed, the last one with {type(error).__name__}: {error}") from error
            return math.nan, math.nan
        failed_in_a_row = 0
        guess = linas.predicted.get(code, (None, None))
        predictions = {f"predicted {key}": value for key, value in zip((cost, quality), guess, strict=True) if key != cost or not known}
        trial.set_user_attr("row", {**configuration, **row, **predictions})
        return values

    with _quiet(optuna):
        database = optuna.storages.RDBStorage(storage, heartbeat_interval=30) if storage else optuna.storages.InMemoryStorage()
        rule = optuna.samplers.NSGAIISampler(population_size=population, seed=seed) if sampler == "nsga2" else Proposed()
        directions = ["minimize", "maximize"]
        study = optuna.create_study(storage=database, study_name=name, directions=directions, sampler=rule, load_if_exists=True)
        if study.user_attrs.get("space", said) != said:
            raise BadInput(f"the study {name!r} in {storage} is of another space or other objectives: give another name, or another storage")
        study.set_user_attr("space", said)
        budget = min(evaluations, space.size)

        def left() -> Iterator[None]:
            for _ in range(50 * evaluations):  # NSGA-II may turn in circles
                if len(states(study)[1]) >= budget:
                    return
                yield

        for _ in track(left(), "measuring sub-networks", total=budget):
            study.optimize(objective, n_trials=1)
        rows = [trial.user_attrs["row"] for trial in states(study)[0]]
    if not rows:
        raise BadInput("no measurement succeeded: look at the errors in the study, or measure one configuration by hand")
    return rows


@contextmanager
def _quiet(optuna: Any) -> Iterator[None]:
    import warnings

    before = optuna.logging.get_verbosity()
    optuna.logging.set_verbosity(optuna.logging.ERROR)
    try:
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", category=optuna.exceptions.ExperimentalWarning)
            yield
    finally:
        optuna.logging.set_verbosity(before)


def hypervolume(costs: Sequence[float], qualities: Sequence[float], reference: tuple[float, float]) -> float:
    """Area between the front of these points and the reference (highest cost, lowest quality) that counts; points beyond it add nothing.

    Compare only hypervolumes of the same reference, chosen before the searches.
    """
    optional("pymoo", "search")
    from pymoo.indicators.hv import HV

    return float(HV(ref_point=np.asarray([reference[0], -reference[1]]))(np.stack([costs, -np.asarray(qualities)], axis=1)))


# --- the sizes of a super-network


def sizes_of(network: Network) -> tuple[Space, dict[Code, dict[str, Any]]]:
    """All sizes that a network from sortednet or stitchable lists, as a space, and what its report says of each.

    Raises `BadInput` for a network without such a report.
    """
    listed: list[Configuration]
    if isinstance(network.module, Stitchable):
        report, known = network.reports.get("stitchable"), network.module.configurations
        rows = report.tables["sizes"] if isinstance(report, Report) else []
        listed = [{key: known[row["number"]].get(key, "none") for key in ("front", "until", "back", "since")} for row in rows]
    else:
        report = network.reports.get("sortednet")
        rows = report.tables["sizes"] if isinstance(report, Report) else []
        paths = [each["blocks"] for each in report.tables["blocks"]] if isinstance(report, Report) else []
        listed = []
        for row in rows:
            depth, share = parse(row["size"])
            listed.append({**dict(zip(paths, depth, strict=True)), "width": share})
    if not rows:
        raise BadInput("this network lists no sizes: give one that sortednet or stitchable returned, before other changes")
    space = Space({name: sorted({each[name] for each in listed}, key=lambda v: (isinstance(v, str), v)) for name in listed[0]}, listed)
    return space, {space.encode(each): row for each, row in zip(listed, rows, strict=True)}


def chosen(network: Network, point: dict[str, Any], examples: Dataset | None = None) -> Network:
    """The sub-network of one point of the front, as a network of its own. examples: needed where the search needed them."""
    if "size" not in point:
        raise BadInput("this is no point of a front from hardware_aware_search: it does not say its size")
    if isinstance(network.module, Stitchable):
        return cut(network, int(point["number"]))
    return sub_network(network, point["size"], examples)


@method
def hardware_aware_search(
    network: Network,
    validation: Labelled,
    examples: Unlabelled | None = None,
    test: Labelled | None = None,
    *,
    cost: Literal["milliseconds", "macs", "parameters"] = "milliseconds",
    metric: str = "accuracy",
    evaluations: int = 60,
    population: int = 15,
    sampler: Literal["linas", "nsga2", "random"] = "linas",
    batch_size: int = 1,
    threads: int | None = None,
    storage: str | None = None,
    seed: int = 0,
) -> Front:
    """From one network with many sizes, those that are best for what they cost on this machine, measuring as few as possible.

    network: a classifier from sortednet or stitchable; the sizes that its report lists are searched.
    validation: labelled examples on which sizes are compared; the found ones look a little better on them than they are.
    examples: pictures or texts as it was trained on, from which batch norm is estimated; needed where sortednet kept no statistics (sizes "all").
    test: other labelled examples, on which only the efficient sizes are measured in the end.
    cost: milliseconds are measured here; macs and parameters are known of every size, so only the quality is predicted.
    metric: what should be high: accuracy, balanced_accuracy, macro_f1, auroc or log_loss (negated).
    evaluations: sizes that are measured, at most.
    population: sizes measured before the predictors are fitted anew.
    sampler: linas; to compare, nsga2 (evolution on measurements) or random.
    batch_size, threads: of the timed batches; threads of the processor, all by default.
    storage: URL of a database, such as sqlite:///search.db or postgresql://...: a search cut short goes on, and several processes share one. For
        milliseconds, only machines of one kind should.
    seed: of all that is drawn.

    The points are all measured sizes; `front.best(cost_at_most)` is one of them and `chosen(network, point)` makes the network of it. "predicted ..."
    is what the predictors said before the size was measured.
    Raises BadInput for a network without a list of sizes, other classes, and when measurements fail again and again.
    Source: Sarah et al. 2022, arXiv 2202.12954; settings of the authors' DyNAS-T where not said otherwise.
    """
    if metric not in METRICS:
        raise BadInput(f"the metric {metric!r} is not known: choose {', '.join(METRICS)}")
    for table, argument in ((validation, "validation"), (test, "test")):
        if table is not None:
            known_classes(network, table, argument)
    space, listed = sizes_of(network)
    if examples is None and norm_layers(network.module):
        for row in listed.values():
            if row.get("statistics") == 0:
                chosen(network, row)  # says what is missing, before an hour of measuring
    column = {"milliseconds": f"ms, batch {batch_size}", "macs": "MACs, M", "parameters": "parameters, M"}[cost]
    known = None if cost == "milliseconds" else {code: float(row[column]) for code, row in listed.items()}

    def measure(configuration: Configuration) -> dict[str, Any]:
        row = listed[space.encode(configuration)]
        found: dict[str, Any] = {key: row[key] for key in ("size", "number", "parameters, M", "MACs, M") if key in row}
        one = chosen(network, row, examples)
        with using(progress=False):
            if cost == "milliseconds":
                found[column] = milliseconds(one, batch_size, threads=threads, repeats=25, seconds=2.0)
            return found | {metric: score(one, validation, metric)}

    inputs = [network.fingerprint, fingerprint(validation), examples is not None and fingerprint(examples), cost, metric, batch_size, threads]
    name = "wellread-" + hashlib.sha256(json.dumps(inputs).encode()).hexdigest()[:16]
    budget: dict[str, Any] = {"evaluations": evaluations, "population": population, "sampler": sampler, "seed": seed}
    rows = search(space, measure, cost=column, quality=metric, known=known, storage=storage, name=name, **budget)
    front = Front([{"evaluation": i, **row} for i, row in enumerate(rows, 1)], column, metric)
    if test is not None:
        for i in front.efficient():
            with using(progress=False):
                front.points[i][f"{metric} on test"] = score(chosen(network, front.points[i], examples), test, metric)
    return front
