"""LINAS: which sub-networks of one elastic network are worth having here, found with few real measurements
(Sarah et al. 2022, arXiv 2202.12954).

Measuring a sub-network (its accuracy, its milliseconds on this machine) is slow; predicting both from the choices that make it is not. So: measure
a few at random, fit a predictor for each objective, let an evolutionary search run on the predictions alone, measure what it found, and again.

`search` does this for any space of named choices and any measurement; `hardware_aware_search` for the networks of sortednet, stitchable and starbucks.
Measurements are the trials of an Optuna study: in a database, several processes work on one search and nothing measured is lost.
"""

from __future__ import annotations

import hashlib
import itertools
import json
import math
import time
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Annotated, Any, Literal

import numpy as np
from datasets import Dataset

from wellread.data import Needs, Unlabelled, check, fingerprint
from wellread.elastic.sortednet import parse, sub_network
from wellread.elastic.starbucks import spearman
from wellread.elastic.starbucks import sub_network as encoder_of_size
from wellread.elastic.stitchable import Stitchable, cut
from wellread.errors import BadInput, optional
from wellread.evaluate import METRICS, score
from wellread.inputs import input_config
from wellread.meter import milliseconds
from wellread.method import known_classes, method
from wellread.network import Network
from wellread.norm import norm_layers
from wellread.results import Front, Report
from wellread.runtime import track, using

LABELLED = Needs("labelled examples", ("input", "label"))
SCORED = Needs("pairs of sentences and how alike they are", ("sentence1", "sentence2", "score"))
Examples = Annotated[Dataset, Needs("labelled examples, or scored pairs of sentences for an encoder from starbucks", ())]

ALL = 4096  # spaces up to this size are predicted whole, larger ones are searched by NSGA-II
FAILURES = 5  # in a row end a search
GENERATIONS, CROWD = 100, 50  # of the search on the predictors: 5,000 predictions, as few as the authors make

Code = tuple[int, ...]
Configuration = dict[str, Any]


# --- the space


class Space:
    """Named choices. A configuration {name: value} is coded as the places of its values, a tuple of whole numbers.

    variables: name to its values, in their order. listed: the configurations that exist; None: every combination. Where two combinations make the
    same network, list one of them. codes: all of them, int [size, variables], or None when they are more than `ALL` combinations.
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
        few = self.listed is not None or self.size <= ALL
        self.codes = np.asarray(self.listed or list(itertools.product(*map(range, self.counts)))) if few else None

    def encode(self, configuration: Configuration) -> Code:
        if configuration.keys() != self.variables.keys():
            raise BadInput(f"the configuration {configuration} does not say {', '.join(self.variables)}")
        for name, value in configuration.items():
            if value not in self.variables[name]:
                raise BadInput(f"{name} is {value!r}: choose one of {', '.join(map(str, self.variables[name]))}")
        return tuple(values.index(configuration[name]) for name, values in self.variables.items())

    def decode(self, code: Sequence[int]) -> Configuration:
        return {name: values[int(place)] for (name, values), place in zip(self.variables.items(), code, strict=True)}

    def draw(self, random: np.random.Generator, taken: set[Code]) -> Code | None:
        """A code that is not taken, each as likely as another; None when all are."""
        if self.codes is not None:
            free = [code for code in map(tuple, self.codes.tolist()) if code not in taken]
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
    operators = {"crossover": SBX(prob=0.9, eta=15, repair=RoundingRepair()), "mutation": PM(prob=0.02, eta=20, repair=RoundingRepair())}
    algorithm = NSGA2(pop_size=population, sampling=IntegerRandomSampling(), eliminate_duplicates=True, **operators)
    return minimize(problem, algorithm, ("n_gen", generations), seed=seed).pop.get("X").astype(int)


def propose(space: Space, codes: Sequence[Code], values: np.ndarray, known: Mapping[Code, float] | None, seed: int) -> dict[Code, tuple[float, float]]:
    """Codes in the order in which they should be measured, each with the cost and the quality that are predicted of it.

    codes, values [N, 2]: measured; cost should be low and quality high. known: cost of every code, where it takes no measurement and so no predictor.
    """
    features = one_hot(np.asarray(codes), space.counts)
    models: list[Any] = [None if known and i == 0 else predictor(features, values[:, i], seed) for i in range(2)]

    def predict(asked: np.ndarray) -> np.ndarray:
        hot = one_hot(asked, space.counts)
        cost: Any = [known[code] for code in map(tuple, asked.tolist())] if known else models[0].predict(hot)
        return np.stack([cost, -models[1].predict(hot)], axis=1)

    pool = evolve(space, predict, seed) if space.codes is None else space.codes
    found = predict(pool)
    return {tuple(pool[i].tolist()): (float(found[i, 0]), -float(found[i, 1])) for i in by_rank(found)}


# --- measured, as an Optuna study


def search(
    space: Space,
    measure: Callable[[Configuration], dict[str, Any]],
    *,
    cost: str,
    quality: str,
    evaluations: int = 60,
    population: int = 15,
    known: Mapping[Code, float] | None = None,
    storage: str | None = None,
    name: str = "search",
    seed: int = 0,
) -> list[dict[str, Any]]:
    """The measured rows, in their order: what `measure` gave, the configuration, and what was predicted of it before.

    measure: configuration to a row with at least the numbers `cost` (low is good) and `quality` (high is good). It may fail: that is noted, and counts.
    evaluations: different configurations that are measured, all processes together; those found in the storage count.
    population: configurations measured between two fits of the predictors; with as many as evaluations, the search is a random one.
    known: cost of every code, when it takes no measurement.
    storage, name: URL of a database and the name of the study in it; see `hardware_aware_search`.
    Raises `BadInput` for a study of another space, a row without the two numbers, and after five failures in a row.
    """
    optuna = optional("optuna", "search")
    if evaluations < 1 or population < 2:
        raise BadInput(f"evaluations is {evaluations} and population {population}: give at least 1 and 2")
    State = optuna.trial.TrialState
    budget = min(evaluations, space.size)
    failed_in_a_row = 0

    def states(study: Any, before: float = math.inf) -> tuple[list[Any], dict[Code, Any]]:
        """(trials that measured something, the trial of each code that is measured, failed or under way)."""
        of: dict[Code, Any] = {}
        for trial in study.get_trials(deepcopy=False):
            lost = trial.state == State.PRUNED or (trial.state == State.FAIL and "error" not in trial.user_attrs)  # free to be measured again
            if trial.number < before and not lost and trial.params.keys() == space.variables.keys():
                of.setdefault(space.encode(trial.params), trial)
        return [trial for trial in of.values() if trial.state == State.COMPLETE], of

    def objective(trial: Any) -> tuple[float, float]:
        nonlocal failed_in_a_row
        configuration = {name: trial.suggest_categorical(name, values) for name, values in space.variables.items()}
        for _ in range(100):  # another process may be about to say what it measures; one that died there is not waited for long
            earlier = (other for other in study.get_trials(deepcopy=False) if other.number < trial.number and other.state == State.RUNNING)
            if all(other.params.keys() == space.variables.keys() for other in earlier):
                break
            time.sleep(0.05)
        code, of = space.encode(configuration), states(study, before=trial.number)[1]
        if code in of or len(of) >= budget:
            raise optuna.TrialPruned("another process has it, or measured the last one")
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
        guess = zip((cost, quality), proposed.get(code, (None, None)), strict=True)
        trial.set_user_attr("row", {**configuration, **row, **{f"predicted {key}": value for key, value in guess if key != cost or not known}})
        return values

    with _quiet(optuna):
        database = optuna.storages.RDBStorage(storage, heartbeat_interval=30) if storage else optuna.storages.InMemoryStorage()
        study = optuna.create_study(storage=database, study_name=name, directions=["minimize", "maximize"], load_if_exists=True)
        said = json.dumps([space.variables, space.listed, cost, quality], default=str)
        if study.user_attrs.get("space", said) != said:
            raise BadInput(f"the study {name!r} in {storage} is of another space or other objectives: give another name, or another storage")
        study.set_user_attr("space", said)
        optuna.storages.fail_stale_trials(study)  # of processes that were killed
        proposed: dict[Code, tuple[float, float]] = {}
        rounds = 0

        def left() -> Iterator[None]:
            while len(states(study)[1]) < budget:
                yield

        for _ in track(left(), "measuring sub-networks", total=budget):
            done, of = states(study)
            if len(done) // population != rounds:
                rounds = len(done) // population
                fitted = done[: rounds * population]  # no more, so that a search that was interrupted goes on as if it had not been
                values = np.asarray([each.values for each in fitted])
                proposed = propose(space, [space.encode(each.params) for each in fitted], values, known, seed + rounds)
            code = next((code for code in proposed if code not in of), None) or space.draw(np.random.default_rng((seed, len(of))), set(of))
            if code is not None:  # None: another process took the last one
                study.sampler = optuna.samplers.PartialFixedSampler(space.decode(code), optuna.samplers.RandomSampler())
                study.optimize(objective, n_trials=1)
        rows = [trial.user_attrs["row"] for trial in states(study)[0]]
    if not rows:
        raise BadInput("no measurement succeeded: look at the errors in the study, or measure one configuration by hand")
    return rows


@contextmanager
def _quiet(optuna: Any) -> Iterator[None]:
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
    """All sizes that a network from sortednet, stitchable or starbucks lists, as a space, and what its report says of each.

    Raises `BadInput` for a network without such a report.
    """
    module: Any = network.module
    maker = "stitchable" if isinstance(module, Stitchable) else next((each for each in ("sortednet", "starbucks") if each in network.reports), "")
    report = network.reports.get(maker)
    if not isinstance(report, Report):
        raise BadInput("this network lists no sizes: give one that sortednet, stitchable or starbucks returned, before other changes")
    rows, listed = report.tables["sizes"], list[Configuration]()
    for row in rows:
        if maker == "stitchable":
            listed.append({key: module.configurations[row["number"]].get(key, "none") for key in ("front", "until", "back", "since")})
        elif maker == "sortednet":
            depth, share = parse(row["size"])
            listed.append({**dict(zip([each["blocks"] for each in report.tables["blocks"]], depth, strict=True)), "width": share})
        else:
            listed.append({key: row[key] for key in ("layers", "dimensions")})
    space = Space({name: sorted({each[name] for each in listed}, key=lambda v: (isinstance(v, str), v)) for name in listed[0]}, listed)
    return space, {space.encode(each): row for each, row in zip(listed, rows, strict=True)}


def chosen(network: Network, point: dict[str, Any], examples: Dataset | None = None) -> Network:
    """The sub-network of one point of the front, as a network of its own. examples: needed where the search needed them."""
    if "size" not in point:
        raise BadInput("this is no point of a front from hardware_aware_search: it does not say its size")
    if isinstance(network.module, Stitchable):
        return cut(network, int(point["number"]))
    return encoder_of_size(network, point["size"]) if "starbucks" in network.reports else sub_network(network, point["size"], examples)


@method
def hardware_aware_search(
    network: Network,
    validation: Examples,
    examples: Unlabelled | None = None,
    test: Examples | None = None,
    *,
    cost: Literal["milliseconds", "macs", "parameters"] = "milliseconds",
    metric: str | None = None,
    evaluations: int = 60,
    population: int = 15,
    batch_size: int = 1,
    threads: int | None = None,
    storage: str | None = None,
    seed: int = 0,
) -> Front:
    """From one network with many sizes, those that are best for what they cost on this machine, measuring as few as possible.

    network: from sortednet, stitchable (a classifier) or starbucks; the sizes that its report lists are searched.
    validation: labelled examples (scored pairs of sentences for starbucks) on which sizes are compared; the found ones look a little better on them
        than they are.
    examples: pictures or texts as it was trained on, from which batch norm is estimated; needed where sortednet kept no statistics (sizes "all").
    test: other examples of that kind, on which only the efficient sizes are measured in the end.
    cost: milliseconds are measured here; macs and parameters are known of every size, so only the quality is predicted.
    metric: what should be high: accuracy (by default), balanced_accuracy, macro_f1, auroc or log_loss (negated); spearman for starbucks.
    evaluations: sizes that are measured, at most.
    population: sizes measured before the predictors are fitted anew; with as many as evaluations, the search is a random one, to compare.
    batch_size, threads: of the timed batches; threads of the processor, all by default.
    storage: URL of a database, such as sqlite:///search.db or postgresql://...: a search cut short goes on, and several processes share one. For
        milliseconds, only machines of one kind should.
    seed: of all that is drawn.

    The points are all measured sizes; `front.best(cost_at_most)` is one of them and `chosen(network, point)` makes the network of it. "predicted ..."
    is what the predictors said before the size was measured.
    Raises BadInput for a network without a list of sizes, other classes, and when measurements fail again and again.
    Source: Sarah et al. 2022, arXiv 2202.12954; settings of the authors' DyNAS-T where not said otherwise.
    """
    space, listed = sizes_of(network)
    encoder = "starbucks" in network.reports
    measures = ("spearman",) if encoder else METRICS
    metric = metric or measures[0]
    if metric not in measures:
        raise BadInput(f"the metric {metric!r} is not known for this network: choose {', '.join(measures)}")
    for table, argument in ((validation, "validation"), (test, "test")):
        if table is not None:
            check(table, SCORED if encoder else LABELLED, (input_config(network.input) or {})["kind"], argument)
            if not encoder:
                known_classes(network, table, argument)
    if examples is None and norm_layers(network.module):
        for row in listed.values():
            if row.get("statistics") == 0:
                chosen(network, row)  # says what is missing, before an hour of measuring
    column = {"milliseconds": f"ms, batch {batch_size}", "macs": "MACs, M", "parameters": "parameters, M"}[cost]
    known = None if cost == "milliseconds" else {code: float(row[column]) for code, row in listed.items()}

    def quality(row: dict[str, Any], table: Dataset) -> float:
        if encoder:
            return spearman(network, table, [(row["layers"], row["dimensions"])])[row["size"]]
        return score(chosen(network, row, examples), table, metric)

    def measure(configuration: Configuration) -> dict[str, Any]:
        row = listed[space.encode(configuration)]
        found: dict[str, Any] = {key: row[key] for key in ("size", "number", "parameters, M", "MACs, M") if key in row}
        with using(progress=False):
            if cost == "milliseconds":
                found[column] = milliseconds(chosen(network, row, examples), batch_size, threads=threads, repeats=25, seconds=2.0)
            return found | {metric: quality(row, validation)}

    inputs = [network.fingerprint, fingerprint(validation), examples is not None and fingerprint(examples), cost, metric, batch_size, threads]
    name = "wellread-" + hashlib.sha256(json.dumps(inputs).encode()).hexdigest()[:16]
    budget: dict[str, Any] = {"evaluations": evaluations, "population": population, "seed": seed}
    rows = search(space, measure, cost=column, quality=metric, known=known, storage=storage, name=name, **budget)
    front = Front([{"evaluation": i, **row} for i, row in enumerate(rows, 1)], column, metric)
    if test is not None:
        for i in front.efficient():
            with using(progress=False):
                front.points[i][f"{metric} on test"] = quality(front.points[i], test)
    return front
