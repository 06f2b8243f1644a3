"""Tree search and a surrogate against random search at equal budgets: 936 small networks for handwritten digits; heads for solar cells.

    python -m bench.deep_architect [--quick]

Every program of one space is trained once, on scikit-learn's digits; the searches then look into that table, so that many seeds take a minute, and what
counts is what each finds with 64 evaluations. Test rows are never seen by a search. Then whole searches, each training its own: heads on the
features of EfficientNet-Lite0, electroluminescence pictures of solar cells. --quick tries it out on a smaller space and records nothing.
"""

from __future__ import annotations

import sys
import warnings
from typing import Any

import numpy as np
import torch

from bench.harness import Expect, Noted, record
from wellread import Network, load, load_data
from wellread.batches import network_batches
from wellread.data import labels, subset
from wellread.elastic.deep_architect import Mcts, Random, Smbo, deep_architect, outputs, search, trained
from wellread.errors import Diverged
from wellread.features import embed
from wellread.inputs import ImageInput
from wellread.runtime import track, using
from wellread.spaces import PLAIN, Affine, Built, ChoiceBisection, Concat, Program, every, parse, walk

QUICK = "--quick" in sys.argv
SEEDS = [0, 1] if QUICK else list(range(20))
HEAD_SEEDS = [0] if QUICK else [0, 1, 2]
TRAIN, CELLS, BUDGET, LAST, NOISE = (96, 24, 12, 4, 3) if QUICK else (600, 800, 64, 20, 20)
PASSES, HEADS = (1, 2) if QUICK else (4, 16)
RATES, KERNELS = ("[0.003]", "[3]") if QUICK else ("[0.0003, 0.003, 0.03]", "[1, 3]")
SPACE = parse(
    f"""Concat([Hyper("learning_rate", {RATES}), Repeat(Concat([Conv2d([4, 16], {KERNELS}), Or([ReLU(), Sigmoid(), Tanh()])]), [1, 2]),
    Or([MaxPool(), GlobalPool()]), Affine(10)])"""
)
SHAPE = (1, 8, 8)
SEARCHERS = ("random", "mcts", "mcts_bisection", "smbo", "tpe")

EXPECTS = [
    Expect("SMBO's last 20 architectures are above random's, in standard errors", "smbo_last_standard_errors", 2.0),
    Expect("the same for tree search with bisection", "mcts_bisection_last_standard_errors", 2.0),
    Expect("the same for tree search", "mcts_last_standard_errors", 2.0),
    Expect("SMBO reaches what random finds in the end with at most 75 % of the evaluations", "smbo_evaluations / 64", 0.75, at_least=False),
    Expect("the same for tree search with bisection", "mcts_bisection_evaluations / 64", 0.75, at_least=False),
    Expect("SMBO's winner is at least as accurate on test as random's", "smbo_test - random_test", 0.0),
    Expect("the winner of tree search with bisection is, too", "mcts_bisection_test - random_test", 0.0),
    Expect("SMBO's winner is at least as accurate on test as a small network made by hand", "smbo_test - by_hand_test", 0.0),
    Expect("one architecture varies by at most a third of what different ones do, or the comparison says little", "noise_share", 1 / 3, at_least=False),
    Expect("a found head for solar cells is at least as accurate on test as a linear head trained in the same way", "head_test - linear_head_test", 0.0),
]


class Trainer:
    """A program to its accuracy on validation and on test, in percent; nothing when the training diverges."""

    def __init__(self) -> None:
        digits = load_data("digits")
        feeds = Network(torch.nn.Identity(), ImageInput((8, 8), 1))
        self.learned = network_batches(feeds, subset(digits["train"], range(TRAIN)), batch_size=64, shuffle=True, drop_last=True)
        self.judged, self.test = (network_batches(feeds, digits[part], batch_size=360) for part in ("validation", "test"))
        self.truth, self.test_truth = labels(digits["validation"]), labels(digits["test"])

    def __call__(self, program: Program, seed: int = 0, learning_rate: float = 0.003) -> tuple[float, float]:
        torch.manual_seed(seed)
        module = Built(program.layers)
        rate = float(program.values.get("learning_rate", learning_rate))
        try:
            with using(progress=False):
                found = trained(module, self.learned, self.judged, self.truth, epochs=PASSES, learning_rate=rate, seed=seed)
        except Diverged:
            return 0.0, 0.0
        module.eval()
        return 100 * found, 100 * float((outputs(module, self.test).argmax(1) == self.test_truth).mean())


def searched(name: str, table: dict[str, tuple[float, float]], seed: int) -> list[tuple[float, float]]:
    """Accuracies on validation and test of what was tried, in order; at most BUDGET different programs."""
    found: list[tuple[float, float]] = []

    def look(program: Program) -> float:
        found.append(table[str(program.layers) + str(program.values)])
        return found[-1][0] / 100

    if name == "tpe":
        by_optuna(look, seed)
        return found[:BUDGET]
    space = ChoiceBisection(SPACE) if name == "mcts_bisection" else SPACE
    searcher = Smbo(space, SHAPE, seed=seed) if name == "smbo" else Random(space, SHAPE, seed=seed) if name == "random" else Mcts(space, SHAPE, seed=seed)
    search(searcher, look, BUDGET)
    return found


def by_optuna(look: Any, seed: int) -> None:
    """The same space and budget for Optuna's TPE, which is asked about each choice by its place, name and size."""
    import optuna

    optuna.logging.set_verbosity(optuna.logging.ERROR)
    known: dict[tuple[int, ...], float] = {}

    def objective(trial: Any) -> float:
        place = 0

        def ask(name: str, values: list[Any]) -> int:
            nonlocal place
            place += 1
            return trial.suggest_categorical(f"{place} {name} of {len(values)}", list(range(len(values))))

        program = walk(SPACE, SHAPE, ask)
        if program.choices not in known:
            known[program.choices] = look(program)
        if len(known) == BUDGET:
            trial.study.stop()
        return known[program.choices]

    study = optuna.create_study(direction="maximize", sampler=optuna.samplers.TPESampler(seed=seed))
    study.optimize(objective, n_trials=4 * BUDGET)


def standard_errors(ours: list[float], theirs: list[float]) -> float:
    """Difference of the means over seeds, in standard errors of that difference."""
    error = np.sqrt(np.var(ours, ddof=1) / len(ours) + np.var(theirs, ddof=1) / len(theirs))
    return float((np.mean(ours) - np.mean(theirs)) / max(error, 1e-9))


def heads(figures: Noted, baselines: Noted) -> None:
    """Whole searches for heads on frozen features, and a linear head trained in the same way."""
    cells, network = load_data("elpv"), load("efficientnet-lite0")
    train, validation, test = (subset(cells[part], range(min(CELLS, len(cells[part])))) for part in ("train", "validation", "test"))
    features, truth = torch.from_numpy(embed(network, test)), labels(test)
    for seed in HEAD_SEEDS:
        for name, noted, settings in (
            ("head", figures, {"space": "head", "evaluations": HEADS}),
            ("random_head", baselines, {"space": "head", "evaluations": HEADS, "searcher": "random"}),
            ("linear_head", baselines, {"space": "Empty()", "evaluations": 1}),
        ):
            with using(progress=False):
                found = deep_architect(train, validation, network, seed=seed, **settings)  # type: ignore[arg-type]
            with torch.inference_mode():  # the rest of the network is the same for all
                guess = found.module.get_submodule(str(found.head))(features).argmax(1).numpy()
            noted(**{f"{name}_test": 100 * float((guess == truth).mean())})


def main() -> None:
    warnings.filterwarnings("ignore", module="optuna")
    figures, baselines = Noted(), Noted()
    train = Trainer()
    programs = list(every(SPACE, SHAPE))
    table = {str(each.layers) + str(each.values): train(each) for each in track(programs, "training every program", total=len(programs))}
    validation = np.array([pair[0] for pair in table.values()])
    print(f"{len(table)} programs, accuracy {validation.min():.1f} to {validation.max():.1f} %, half are above {np.median(validation):.1f} %", flush=True)

    some = np.random.default_rng(0).permutation(len(programs))[:NOISE]
    again = np.array([[train(programs[i], seed)[0] for seed in (0, 1, 2)] for i in some])
    figures(noise_share=float(np.sqrt(again.var(1, ddof=1).mean()) / validation.std(ddof=1)))
    by_hand = walk(Concat([PLAIN["convnet"], Affine(10)]), SHAPE, lambda name, values: 0)
    for seed in (0, 1, 2):
        baselines(by_hand_test_of_three=train(by_hand, seed)[1])
    baselines["by_hand_test"] = [float(np.mean(baselines["by_hand_test_of_three"]))] * len(SEEDS)

    runs = {name: [searched(name, table, seed) for seed in SEEDS] for name in SEARCHERS}
    target = float(np.mean([max(pair[0] for pair in run) for run in runs["random"]]))
    last: dict[str, list[float]] = {}
    for name, found in runs.items():
        noted = baselines if name in ("random", "tpe") else figures
        print(name)
        best = [np.maximum.accumulate([pair[0] for pair in run]) for run in found]
        last[name] = [float(np.mean([pair[0] for pair in run[-LAST:]])) for run in found]
        noted.update(
            {
                f"{name}_best": [float(each[-1]) for each in best],
                f"{name}_mean_best_so_far": [float(each.mean()) for each in best],
                f"{name}_last_mean": last[name],
                f"{name}_evaluations": [float(next((i for i, value in enumerate(each, 1) if value >= target), BUDGET)) for each in best],
                f"{name}_test": [max(run)[1] for run in found],
            }
        )
        noted(**{f"{name}_last_standard_errors": standard_errors(last[name], last["random"])})
        print("  " + ", ".join(f"{key.removeprefix(name + '_')} {np.mean(values):.4g}" for key, values in noted.items() if key.startswith(f"{name}_")), flush=True)
    heads(figures, baselines)
    if QUICK:
        return
    record(
        "deep-architect",
        figures=figures,
        baselines=baselines,
        expects=EXPECTS,
        claims_tested=["MCTS with bisection and SMBO find better networks than random search at equal budgets"],
        sizes={
            "programs": len(table),
            "train": TRAIN,
            "validation": len(train.truth),
            "test": len(train.test_truth),
            "epochs": PASSES,
            "evaluations": BUDGET,
            "solar_cells_train": CELLS,
            "head_evaluations": HEADS,
        },
        seeds=SEEDS,
        notes=[
            "accuracies in percent; each program was trained once, with one seed, and all searches look into that table: seeds are of the searches",
            f"..._last_mean: of the last {LAST} of {BUDGET} programs tried; ..._evaluations: until the mean of random's final bests is reached, {BUDGET} when never",
            "..._test of a search: of the program that was best on validation",
            "a program proposed again is not counted, for any searcher; SMBO draws from those not tried",
            "noise_share: standard deviation of one program over three seeds, as a share of that between programs",
            f"tpe: Optuna, categorical, the same space; heads: {len(HEAD_SEEDS)} whole searches with SMBO on frozen EfficientNet-Lite0 features",
        ],
    )


if __name__ == "__main__":
    main()
