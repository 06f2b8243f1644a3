"""DeepArchitect: a search finds a good network in a family of networks that you write down (Negrinho and Gordon 2017, arXiv 1704.08792).

The family is a space of `wellread.spaces`; each program of it is a network. A searcher is a way to answer the choices of a space.
"""

from __future__ import annotations

import json
import time
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from contextlib import suppress
from typing import Any, Literal

import numpy as np
import torch
from datasets import Dataset
from torch import Tensor, nn
from torch.nn import functional as F

from wellread.adapt.splits import HOLD_OUT, held_out
from wellread.batches import Batches, network_batches, tensor_batches
from wellread.data import Labelled, class_names, labels, name_of, subset
from wellread.errors import BadInput, Diverged
from wellread.evaluate import metrics
from wellread.features import embed, to_device
from wellread.inputs import ImageInput
from wellread.method import method
from wellread.network import Network
from wellread.results import Report
from wellread.runtime import track, using
from wellread.spaces import PLAIN, SPACES, Affine, Built, ChoiceBisection, Concat, Impossible, Program, Shape, parse, walk
from wellread.train import fit

SIDE = 64  # pictures are not made larger than this without being asked
FAILURES = 10  # of the first evaluations end a search
TURNS = 20  # a searcher may propose so many programs per evaluation, most of them known, before the space counts as exhausted


# --- searchers: what to try next


class Random:
    """Every choice with equal chances."""

    def __init__(self, space: Any, shape: Shape, *, seed: int = 0) -> None:
        self.space, self.shape, self.random = space, shape, np.random.default_rng(seed)

    def ask(self) -> Program:
        """The next program to try."""
        return walk(self.space, self.shape, lambda name, values: int(self.random.integers(len(values))))

    def tell(self, program: Program, score: float) -> None:
        """What came of it."""


def uct(mean: float, visits: int, parent_visits: int, exploration: float) -> float:
    """Mean score and a bonus for what was seldom tried; infinite for what was never."""
    return mean + exploration * (2 * np.log(parent_visits) / visits) ** 0.5 if visits else np.inf


class Mcts(Random):
    """Monte Carlo tree search: down the known part of the tree by `uct`, one level more, and from there at random.

    Nodes are the first answers of a program; scores should lie in 0...1.
    """

    def __init__(self, space: Any, shape: Shape, *, exploration: float = 0.5, seed: int = 0) -> None:
        super().__init__(space, shape, seed=seed)
        self.exploration = exploration
        self.nodes: dict[tuple[int, ...], tuple[int, float]] = {(): (0, 0.0)}  # visits and sum of scores of what is in the tree
        self.open: set[tuple[int, ...]] = {()}  # nodes in the tree whose children are not

    def ask(self) -> Program:
        taken: tuple[int, ...] = ()
        inside = True

        def answer(name: str, values: list[Any]) -> int:
            nonlocal taken, inside
            if not inside:
                return int(self.random.integers(len(values)))
            children = [(*taken, place) for place in range(len(values))]
            if taken in self.open:
                self.open.remove(taken)
                self.open.update(children)
                self.nodes |= dict.fromkeys(children, (0, 0.0))
                inside = False
                return int(self.random.integers(len(values)))
            seen = [self.nodes[child] for child in children]
            bonus = [uct(total / max(visits, 1), visits, self.nodes[taken][0], self.exploration) for visits, total in seen]
            taken = children[self.random.choice(np.flatnonzero(np.asarray(bonus) == max(bonus)))]
            return taken[-1]

        program = walk(self.space, self.shape, answer)
        self.path = taken
        return program

    def tell(self, program: Program, score: float) -> None:
        """Of the program asked for last."""
        for depth in range(len(self.path) + 1):
            visits, total = self.nodes[self.path[:depth]]
            self.nodes[self.path[:depth]] = visits + 1, total + score


def ngrams(words: Sequence[str], longest: int = 4) -> Counter[str]:
    """How often each sequence of up to `longest` words stands in a program, and how many words there are."""
    grams = (" ".join(words[i : i + n]) for n in range(1, longest + 1) for i in range(len(words) - n + 1))
    return Counter(grams) + Counter({"how many": len(words)})


class Smbo(Random):
    """Surrogate: of `pool` random programs the one that a ridge regression on n-grams of its printed parts expects most of, or now and then any.

    n-grams count when they stand three times or more in what was tried. Programs already tried are not proposed again.
    """

    def __init__(self, space: Any, shape: Shape, *, pool: int = 50, explore: float = 0.25, penalty: float = 1000.0, seed: int = 0) -> None:
        super().__init__(space, shape, seed=seed)
        self.pool, self.explore, self.penalty = pool, explore, penalty
        self.tried: dict[tuple[int, ...], tuple[Counter[str], float]] = {}

    def ask(self) -> Program:
        drawn = [super(Smbo, self).ask() for _ in range(self.pool)]
        pool = [each for each in drawn if each.error is None and each.choices not in self.tried] or drawn
        if not self.tried or self.random.random() < self.explore:
            return pool[0]
        return pool[int(np.argmax(self.predict(pool)))]

    def predict(self, programs: Sequence[Program]) -> np.ndarray:
        """float64 [N]: expected scores."""
        from sklearn.feature_extraction import DictVectorizer
        from sklearn.linear_model import Ridge

        seen = [counts for counts, _ in self.tried.values()]
        often = {gram for gram, count in sum(seen, Counter()).items() if count >= 3} | {"how many"}
        table = DictVectorizer().fit([dict.fromkeys(often, 0)])
        model = Ridge(alpha=self.penalty).fit(table.transform(seen), [score for _, score in self.tried.values()])
        return model.predict(table.transform([ngrams(each.words) for each in programs]))

    def tell(self, program: Program, score: float) -> None:
        """What came of it; any program of this space."""
        self.tried[program.choices] = ngrams(program.words), score


def search(searcher: Random, score: Callable[[Program], float], evaluations: int) -> list[dict[str, Any]]:
    """Rows, in their order: evaluation, score, best (so far), seconds, words, choices, proposals (until it came), error.

    score: a program to a number in 0...1, high is good. What raises or is not finite counts as an evaluation with score 0, its error noted;
    so does what has no network. A program proposed again is answered from memory and does not count.
    Raises `BadInput` when the first ten fail, or all.
    """
    rows: list[dict[str, Any]] = []
    known: dict[tuple[int, ...], float] = {}
    asked = 0

    def left() -> Iterator[None]:
        while len(rows) < evaluations and asked < TURNS * evaluations:
            yield

    for _ in track(left(), "trying architectures"):
        program, error, found, started = searcher.ask(), None, 0.0, time.perf_counter()
        asked += 1
        if program.choices in known:
            searcher.tell(program, known[program.choices])
            continue
        try:
            if program.error:
                raise Impossible(program.error)
            found = float(score(program))
            if not np.isfinite(found):
                raise ValueError(f"the score is {found}")
        except BadInput:
            raise
        except Exception as failed:  # whatever one architecture cannot do must not cost the others
            found, error = 0.0, f"{type(failed).__name__}: {' '.join(str(failed).split())[:200]}"
        known[program.choices] = found
        searcher.tell(program, found)
        best = max(known.values())
        rows.append(
            {"evaluation": len(rows) + 1, "score": found, "best": best, "seconds": time.perf_counter() - started, "words": " ".join(program.words),
             "choices": json.dumps(program.choices), "proposals": asked, "error": error or ""}
        )  # fmt: skip
        if error and len(rows) in (FAILURES, evaluations) and all(row["error"] for row in rows):
            raise BadInput(f"all of the first {len(rows)} architectures failed, the last one with {error}: change the space")
    return rows


# --- the method


@method
def deep_architect(
    train: Labelled,
    validation: Labelled | None = None,
    network: Network | None = None,
    *,
    space: str | None = None,
    searcher: Literal["smbo", "mcts", "mcts-bisection", "random"] = "smbo",
    evaluations: int = 64,
    epochs: int = 10,
    patience: int | None = 3,
    batch_size: int = 64,
    learning_rate: float = 1e-3,
    metric: Literal["accuracy", "balanced_accuracy", "macro_f1", "auroc"] = "accuracy",
    exploration: float = 0.5,
    pool: int = 50,
    explore: float = 0.25,
    penalty: float = 1000.0,
    size: int | None = None,
    seed: int = 0,
) -> Network:
    """From a family of networks or heads that you write down in a few lines, a good one, trained, with far fewer tries than all.

    train: labelled examples, learned from by every architecture.
    validation: labelled examples that the search goes by, so the winner's figure on them is optimistic: keep a test set apart. Without it a
        fifth of train is held out.
    network: a pre-trained network; then heads on its frozen features are searched, and it comes back with the best. Without it, whole
        networks for pictures.
    space: head, convnet, resnet, or an expression such as "Concat([Repeat(Concat([Affine([64, 128]), ReLU()]), [1, 2])])"; repr() of one made in
        Python. The last layer, one output per class, is added. By default head with a network, convnet without.
    searcher: smbo, mcts, mcts-bisection (long lists of values halved again and again), or random.
    evaluations: architectures that are trained, at most.
    epochs, patience: passes over train for each, at most; it ends after so many passes that are not better on validation.
    batch_size: rows per step.
    learning_rate: of those whose space does not choose one.
    metric: what is searched for, on validation.
    exploration: c of mcts.
    pool, explore, penalty: of smbo: programs to predict at each step, share of steps at random, and ridge penalty.
    size: side of the pictures in pixels, without a network; by default as large as the first one, at most 64.
    seed: of the search, first weights and batches.

    The report "deep-architect" holds every evaluation, the program that gives the winner again, and what a plain network trained in the same way
    reaches (a linear head, or a small convolutional network); when that is not beaten it is returned and a warning says so.
    Raises BadInput for a space that cannot be read, an empty list of values, parts that never fit together, and settings out of range.
    Source: Negrinho and Gordon 2017, arXiv 1704.08792; numbers of the searchers as in the authors' code.
    """
    for right, sentence in (
        (evaluations >= 1 and epochs >= 1, f"evaluations is {evaluations} and epochs {epochs}: give at least 1"),
        (batch_size >= 2, f"batch_size is {batch_size}: give at least 2"),
        (pool >= 1 and 0 <= explore <= 1, f"pool is {pool} and explore {explore}: give at least 1, and a share"),
        (exploration >= 0 and penalty > 0, f"exploration is {exploration} and penalty {penalty}: give at least 0, and more than 0"),
        (learning_rate > 0, f"learning_rate is {learning_rate}: give more than 0"),
        (size is None or size >= 4, f"size is {size}: give at least 4 pixels"),
    ):
        if not right:
            raise BadInput(sentence)
    names = class_names(train)
    where = "" if validation is None else name_of(validation)
    if validation is None:
        held = held_out(labels(train), HOLD_OUT)
        where = f"{name_of(train)}, a fifth held out"
        train, validation = subset(train, np.setdiff1d(np.arange(len(train)), held)), subset(train, held)
    elif class_names(validation) != names:
        raise BadInput(f"train has the classes {', '.join(names[:6])} and validation {', '.join(class_names(validation)[:6])}: they must be the same")
    default = "convnet" if network is None else "head"
    wanted = SPACES.get(space or default) or parse(str(space))
    truth = labels(validation)

    source = None
    if network is not None:
        if network.head is None:
            raise BadInput("this network has no Linear layer to exchange for a new head: name its head with Network(module, head=PATH)")
        tables = [{"inputs": torch.from_numpy(embed(network, each)), "label": torch.from_numpy(labels(each))} for each in (train, validation)]
        shape: Shape = tuple(tables[0]["inputs"].shape[1:])
        learned = tensor_batches(tables[0], batch_size=batch_size, shuffle=True, seed=seed, drop_last=True)
        judged = tensor_batches(tables[1], batch_size=256)
    else:
        source = _input(train, size)
        feeds = Network(nn.Identity(), source)
        shape = source.channels, *source.size
        learned = network_batches(feeds, train, batch_size=batch_size, shuffle=True, seed=seed, drop_last=True)
        judged = network_batches(feeds, validation, batch_size=256)

    best: tuple[float, Program, nn.Module] | None = None

    def score(program: Program) -> float:
        nonlocal best
        with torch.random.fork_rng():
            torch.manual_seed(seed)
            module = Built(program.layers)
        rates = {"learning_rate": float(program.values.get("learning_rate", learning_rate)), "weight_decay": float(program.values.get("weight_decay", 0))}
        with using(progress=False):
            found = trained(module, learned, judged, truth, metric, epochs=epochs, patience=patience, seed=seed, **rates)
        if best is None or found > best[0]:
            best = found, program, module
        return found

    def ended(part: Any) -> Concat:
        return Concat([part, Affine(len(names))])

    whole = ChoiceBisection(ended(wanted)) if searcher == "mcts-bisection" else ended(wanted)
    if searcher == "smbo":
        searching: Random = Smbo(whole, shape, pool=pool, explore=explore, penalty=penalty, seed=seed)
    else:
        searching = Random(whole, shape, seed=seed) if searcher == "random" else Mcts(whole, shape, exploration=exploration, seed=seed)
    plain, compared = walk(ended(PLAIN[default]), shape, lambda name, values: 0), float("nan")
    if not plain.error:
        with suppress(Diverged):
            compared = score(plain)
    rows = search(searching, score, evaluations)
    assert best is not None
    found, program, module = best
    warnings = []
    if program is plain:
        warnings = ["no architecture was better than the plain one that it was compared with, so that is returned: give more evaluations, or another space"]

    if network is not None:
        result = network.with_head(names, part="wellread.spaces:Built", layers=program.layers)
        result.module.get_submodule(str(network.head)).load_state_dict(module.state_dict())
    else:
        architecture = {"family": "class", "name": "wellread.spaces:Built", "arguments": {"layers": program.layers}}
        result = Network(module, source, None, tuple(names), "logits", architecture)
    figures = {f"best {metric} on validation": found, f"plain {metric} on validation": compared, "searcher": searcher, "evaluations": len(rows)}
    figures |= {"proposed again": rows[-1]["proposals"] - len(rows), "failed": sum(bool(row["error"]) for row in rows)}
    figures |= {"seconds of training": sum(row["seconds"] for row in rows)}
    text = f"Architecture: {' '.join(program.words)}\n\nSpace: {whole!r}\n\nChoices: {list(program.choices)}"
    result.reports["deep-architect"] = Report(f"{len(rows)} architectures by {searcher}", figures, {"evaluations": rows}, text, warnings=warnings)
    result.measured = [{"data": where, "rows": len(validation), "metrics": {metric: found}}]
    return result


def trained(module: nn.Module, learned: Batches, judged: Batches, truth: np.ndarray, metric: str = "accuracy", **settings: Any) -> float:
    """Train in place with AdamW; the best epoch on the judged rows, whose weights the module keeps. truth: int [N], their classes."""

    def step(module: nn.Module, batch: dict[str, Any]) -> Tensor:
        return F.cross_entropy(module(batch["inputs"]), batch["label"])

    def validate(module: nn.Module) -> float:
        found = outputs(module, judged)
        return float((found.argmax(1) == truth).mean()) if metric == "accuracy" else metrics(found, truth)[metric]  # the others take longer

    return max(fit(module, learned, step, validate=validate, name="architecture", **settings).validation)


def outputs(module: nn.Module, batches: Batches) -> np.ndarray:
    """float32 [N, classes] of a module in evaluation mode."""
    device = next(module.parameters()).device
    with torch.inference_mode():
        return torch.cat([module(to_device(batch["inputs"], device)).float().cpu() for batch in batches.epoch(0)]).numpy()


def _input(data: Dataset, size: int | None) -> ImageInput:
    """How a new network reads these pictures: one channel when the first is grey."""
    if "image" not in data.column_names:
        raise BadInput("architectures for text need a pre-trained network to start from: give one, such as minilm-l6")
    first = data[0]["image"]
    side = size or min(SIDE, max(first.size))
    return ImageInput((side, side), 1 if first.mode in ("1", "L", "I", "I;16", "F") else 3)
