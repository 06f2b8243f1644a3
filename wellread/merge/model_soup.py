"""Model soups: average the weights of several fine-tunings of one network (Wortsman et al. 2022, arXiv 2203.05482)."""

from __future__ import annotations

import json
import os
import tempfile
import warnings
from collections.abc import Callable, Mapping, Sequence
from itertools import combinations
from typing import Any, Literal

import numpy as np
import psutil
import torch
from datasets import Dataset
from torch import Tensor, nn
from torch.nn import functional as F

from wellread import runtime
from wellread.averages import fill, plain_copy, plain_name, readable, same_structure, state_of
from wellread.batches import network_batches
from wellread.charts import bar_chart
from wellread.data import Labelled, Unlabelled, class_names, fingerprint, labels, name_of, subset
from wellread.errors import BadInput
from wellread.evaluate import metrics, predict
from wellread.method import known_classes, method
from wellread.network import Network, Networks
from wellread.norm import norm_layers, reestimate_norm, statistics_differ
from wellread.results import Report
from wellread.train import fit

NORM_ROWS = 1024  # enough for means and variances over images and places
BARRIER_ROWS = 512  # a collapse is seen on few examples
BARRIER_NETWORKS = 12  # with more networks than this, only the pairs with the best one are tried

# --- basins


def midpoints(count: int, accuracy: Callable[[list[int]], float]) -> np.ndarray:
    """float [k, k]: the accuracy halfway between each two of `count` networks, of each alone on the diagonal; NaN where it was not tried.

    accuracy: of the average of some, by their numbers. With many networks only the pairs with the best one are tried.
    """
    found = np.full((count, count), np.nan)
    found[range(count), range(count)] = [accuracy([i]) for i in range(count)]
    best = int(found.diagonal().argmax())
    pairs = [pair for pair in combinations(range(count), 2) if count <= BARRIER_NETWORKS or best in pair]
    for a, b in runtime.track(pairs, "midpoints of pairs"):
        found[a, b] = found[b, a] = accuracy([a, b])
    return found


def collapsed(accuracies: np.ndarray, chance: float) -> np.ndarray:
    """bool [k, k]: of what the worse of two has above chance, their midpoint lost more than ten points and more than half. Accuracies 0...1.

    Fine-tunings of one network lie in one basin and lose next to nothing; networks from different random starts, or with heads of different
    random starts, lose nearly everything.
    """
    lower = np.minimum.outer(accuracies.diagonal(), accuracies.diagonal())
    lost = lower - np.maximum(accuracies, chance)
    return (lost > 0.1) & (lost > (lower - chance) / 2)


# --- recipes


def greedy(
    scores: Sequence[float], score: Callable[[list[int]], float], tie: Literal["accept", "reject"] = "accept"
) -> tuple[list[int], list[tuple[int, float, bool]]]:
    """Algorithm 1: from the best to the worst, keep a network when the average with it scores no lower (tie "reject": higher).

    scores: of each alone, higher is better. score: of the average of some, by their numbers.
    Returns the members in the order of joining and, for each network tried, (number, score with it, whether it was kept). The score of the
    members never falls, so it is at least that of the best network.
    """
    order = sorted(range(len(scores)), key=lambda i: -scores[i])
    members, best = order[:1], scores[order[0]]
    steps = [(order[0], best, True)]
    for i in runtime.track(order[1:], "tasting"):
        found = score([*members, i])
        kept = found > best or (found == best and tie == "accept")
        members, best = ([*members, i], found) if kept else (members, best)
        steps.append((i, found, kept))
    return members, steps


class Mixture(nn.Module):
    """temperature * f(x; sum_i alpha_i theta_i), alpha = softmax(raw): the learned soup (appendix I). Only `raw` and the temperature are trained.

    module: f, run in evaluation mode. states: theta_1...theta_k, all of them in memory. per_tensor: a row of alphas for each parameter tensor,
    else one for all. batch_statistics: let batch norm use those of the batch, since an average has no running statistics of its own.
    Starts as the uniform soup with temperature 1. Input: a batch as networks take it; output: logits [B, K].
    """

    def __init__(self, module: nn.Module, states: Sequence[Mapping[str, Tensor]], *, per_tensor: bool = True, batch_statistics: bool = False) -> None:
        super().__init__()
        names = [name for name, _ in module.named_parameters()]
        self.rows = {name: row if per_tensor else 0 for row, name in enumerate(names)}
        self.raw = nn.Parameter(torch.zeros(len(names) if per_tensor else 1, len(states)))
        self.temperature = nn.Parameter(torch.ones(()))
        buffers = [name for name, _ in module.named_buffers() if name in states[0] and states[0][name].is_floating_point()]
        # in a tuple: neither trained nor copied with this module
        self.held = module, {name: torch.stack([state[name].float() for state in states]) for name in [*names, *buffers]}
        self.batch_statistics = batch_statistics

    def shares(self) -> dict[str, Tensor]:
        """{tensor: alpha [k]}; buffers have the mean of all rows."""
        alpha = self.raw.softmax(1)
        return {name: alpha[self.rows[name]] if name in self.rows else alpha.detach().mean(0) for name in self.held[1]}

    def forward(self, batch: Tensor | Mapping[str, Tensor]) -> Tensor:
        module, stacks = self.held
        module.eval()
        for layer in norm_layers(module) if self.batch_statistics else []:
            layer.train()
        weights = {name: torch.tensordot(share, stacks[name], dims=1) for name, share in self.shares().items()}
        arguments = ((), dict(batch)) if isinstance(batch, Mapping) else ((batch,), {})
        out = torch.func.functional_call(module, weights, *arguments)
        return self.temperature * (out.logits if hasattr(out, "logits") else out)


def learned(
    networks: Networks,
    like: Network,
    validation: Dataset,
    *,
    per_tensor: bool = True,
    batch_statistics: bool = False,
    epochs: int = 5,
    learning_rate: float = 0.05,
    batch_size: int = 256,
    seed: int = 0,
) -> tuple[dict[str, list[float]], float]:
    """Train a `Mixture` on held-out examples by cross-entropy, with AdamW as the authors do: ({tensor: alpha of each network}, temperature).

    like: how the networks are run; its weights do not matter. Raises `BadInput` when the networks do not fit into memory together.
    """
    device = runtime.device()
    needed = 2 * len(networks) * sum(4 * tensor.numel() for tensor in like.module.state_dict().values())  # read, then stacked
    free = torch.cuda.mem_get_info(device)[0] if device.type == "cuda" else psutil.virtual_memory().available
    if needed > free:
        sizes = f"{needed / 1e9:.1f} GB, {free / 1e9:.1f} GB are free"
        raise BadInput(f"the recipe 'learned' holds all {len(networks)} networks in memory ({sizes}): give fewer, or choose the recipe greedy")
    home, targets = like.device, state_of(like.module)
    states = [{plain_name(key, targets): tensor.to(device) for key, tensor in networks.weights(i)} for i in range(len(networks))]
    mixture = Mixture(like.module.to(device), states, per_tensor=per_tensor, batch_statistics=batch_statistics)
    del states
    batches = network_batches(like, validation, batch_size=batch_size, shuffle=True, seed=seed)

    def step(module: nn.Module, batch: dict[str, Any]) -> Tensor:
        return F.cross_entropy(module(batch["inputs"]), batch["label"])

    fit(mixture, batches, step, epochs=epochs, learning_rate=learning_rate, schedule="constant", seed=seed, name="mixing weights")
    like.module.to(home).eval()
    return {name: share.detach().tolist() for name, share in mixture.shares().items()}, mixture.temperature.item()


# --- the method


class _Tasting:
    """Fills one network with averages of others and scores them, each once. The scores lie in the run's folder, so that a killed run goes on."""

    def __init__(self, networks: Networks, soup: Network, validation: Dataset, rows: np.ndarray, norm: Dataset | None, metric: str, key: str) -> None:
        self.networks, self.soup, self.validation, self.norm, self.metric, self.key = networks, soup, validation, norm, metric, key
        self.rows, self.sample = rows, subset(validation, rows)
        self.scores: dict[str, float] = {}
        self.logits: Any = 0.0  # of the single networks, summed
        folder = runtime.current().folder
        self.file = folder / "soup.npz" if folder else None
        if self.file and self.file.is_file():
            with np.load(self.file) as saved:
                if str(saved["key"]) == key:
                    self.scores, self.logits = json.loads(str(saved["scores"])), saved["logits"]

    def fill(self, members: Sequence[int], shares: Mapping[str, Sequence[float]] | None = None) -> None:
        fill(self.soup.module, self.networks, members, shares)
        if self.norm is not None and len(members) > 1:
            reestimate_norm(self.soup, self.norm)

    def score(self, members: Sequence[int]) -> float:
        """The metric on the validation data."""
        if str(members) not in self.scores:
            logits = self._predict(members, self.validation)
            self.scores[str(members)] = _figure(logits, self.validation, self.metric)
            if len(members) == 1:
                self.logits = self.logits + logits
                self.scores[f"sample {members}"] = _figure(logits[self.rows], self.sample, "accuracy")
            self._keep()
        return self.scores[str(members)]

    def accuracy(self, members: Sequence[int]) -> float:
        """On a sample of the validation data; of a single network after its score."""
        if f"sample {members}" not in self.scores:
            self.scores[f"sample {members}"] = _figure(self._predict(members, self.sample), self.sample, "accuracy")
            self._keep()
        return self.scores[f"sample {members}"]

    def _predict(self, members: Sequence[int], data: Dataset) -> np.ndarray:
        self.fill(members)
        with runtime.using(progress=False):  # the caller's bar counts the averages
            logits = predict(self.soup, data)
        if logits.shape[1] < len(class_names(data)):
            raise BadInput(f"the networks have {logits.shape[1]} classes and validation has {len(class_names(data))}: give data of the networks' classes")
        return logits

    def _keep(self) -> None:
        if self.file:
            self.file.parent.mkdir(parents=True, exist_ok=True)
            partial = self.file.with_suffix(f".{os.getpid()}.npz")
            np.savez(partial, key=self.key, scores=json.dumps(self.scores), logits=self.logits)
            os.replace(partial, self.file)


def _figure(logits: np.ndarray, data: Dataset, metric: str) -> float:
    if metric == "accuracy":
        return float((logits.argmax(1) == labels(data)).mean())  # the other metrics take seconds for a thousand classes
    found = metrics(logits, labels(data))[metric]
    return -found if metric == "log_loss" else found


@method
def model_soup(
    networks: list[Network],
    validation: Labelled,
    unlabelled: Unlabelled | None = None,
    *,
    recipe: Literal["greedy", "uniform", "learned"] = "greedy",
    metric: Literal["accuracy", "balanced_accuracy", "macro_f1", "auroc", "log_loss"] = "accuracy",
    tie: Literal["accept", "reject"] = "accept",
    refresh_norm: bool = True,
    barriers: bool = True,
    per_tensor: bool = True,
    epochs: int = 5,
    learning_rate: float = 0.05,
    seed: int = 0,
) -> Network:
    """One network from several fine-tunings of the same pre-trained network, at the cost of one.

    networks: classifiers of one structure, fine-tuned from the same weights, head included; those given as folders are read tensor by
        tensor, so that memory holds one network, whatever their number.
    validation: decides what is kept (greedy) or how it is weighted (learned); never report a figure on it.
    unlabelled: examples from which batch norm is re-estimated, best of the training data; by default those of validation, without labels.
    recipe: greedy keeps a network when the score does not fall; uniform keeps all; learned trains mixing weights and holds all in memory.
    metric: what greedy goes by, on validation; log_loss counts negated.
    tie: what greedy does with a network that leaves the score as it was: accept (the paper) or reject (the authors' code).
    refresh_norm: re-estimate the statistics of batch norm for each average, since the mean of variances is not the variance of the mean; not done
        when all networks have the same ones, as fine-tunings with frozen statistics do.
    barriers: try the midpoints of pairs first, and refuse networks that lie in different basins.
    per_tensor: learned mixing weights are for each tensor of each network; no: for each network.
    epochs, learning_rate: of the learned mixing weights.
    seed: of the order in which examples are learned from, and of the choice of those for batch norm and barriers.

    The report "soup" holds the score of each network, the order in which they were tried, what was kept, the uniform soup, the ensemble that
    averages the logits of all (k times the cost), and the accuracies halfway between pairs. A single network comes back with a warning.
    Raises BadInput naming the first tensor in which two networks differ or which is not finite; for classes that are not those of validation;
    naming a pair whose midpoint is no classifier any more, when all pairs are such or the recipe is uniform; for learned networks that do not
    fit into memory together.
    Source: Wortsman et al. 2022, arXiv 2203.05482, algorithm 1 and appendix I.
    """
    several = networks if isinstance(networks, Networks) else Networks(networks)
    names, everyone = [several.name(i) for i in range(len(several))], list(range(len(several)))
    scratch = tempfile.TemporaryDirectory()  # goes with the function
    several = readable(several, scratch.name)
    soup = plain_copy(several[0]) if isinstance(several.given[0], Network) else several[0]  # one that is just loaded needs no copy
    soup.measured, soup.reports, warned = [], {}, []
    known_classes(soup, validation, "validation")
    records = same_structure(several, soup.module, names)
    rng = np.random.default_rng(seed)
    source = validation if unlabelled is None else unlabelled
    chosen = rng.permutation(len(source))[:NORM_ROWS]
    norm = subset(source, chosen) if refresh_norm and statistics_differ(several, soup.module) else None
    if norm is not None and len(norm) < 2:
        raise BadInput("unlabelled has one row, and batch norm needs several: give more, or set refresh_norm to no")
    rows = np.sort(rng.permutation(len(validation))[:BARRIER_ROWS])
    key = [seed, metric, fingerprint(validation), norm and fingerprint(norm), *(record["fingerprint"] for record in records)]
    tasting = _Tasting(several, soup, validation, rows, norm, metric, json.dumps(key))

    scores = [tasting.score([i]) for i in runtime.track(everyone, "scoring networks")]
    figures: dict[str, Any] = {"best network": max(scores)}
    tables = {"networks": [{"number": i + 1, "network": names[i], metric: scores[i]} for i in everyone]}
    if len(several) == 1:
        warned.append("a single network was given and comes back as it is: give several fine-tunings of one network")
    elif barriers:
        accuracies = midpoints(len(several), tasting.accuracy)
        numbers = [str(i + 1) for i in everyone]
        tables["accuracy halfway between two networks"] = [
            {"number": number} | dict(zip(numbers, row, strict=True)) for number, row in zip(numbers, accuracies.tolist(), strict=True)
        ]
        upper = np.triu_indices(len(several), 1)
        broken = collapsed(accuracies, chance=np.bincount(labels(tasting.sample)).max() / len(rows))[upper]
        if broken.any():
            a, b = min(np.transpose(upper)[broken], key=lambda pair: accuracies[tuple(pair)])
            sentence = (
                f"halfway between {names[a]} and {names[b]} there is no classifier (accuracy {accuracies[a, b]:.3f}; alone {accuracies[a, a]:.3f} "
                f"and {accuracies[b, b]:.3f}): they were not fine-tuned from the same weights and head"
            )
            if recipe == "uniform" or broken[np.isfinite(accuracies[upper])].all():
                raise BadInput(sentence)
            warned.append(sentence)
    if len(several) > 1:
        figures |= {"uniform soup": tasting.score(everyone)}
        figures |= {f"ensemble of {len(several)}": _figure(tasting.logits / len(several), validation, metric)}

    members, shares = everyone, None
    if recipe == "greedy":
        members, steps = greedy(scores, tasting.score, tie)
        tables["networks"] = [tables["networks"][i] | {"soup with it": score, "kept": "yes" if kept else "no"} for i, score, kept in steps]
    elif recipe == "learned":
        settings: dict[str, Any] = {"per_tensor": per_tensor, "epochs": epochs, "learning_rate": learning_rate, "seed": seed}
        shares, figures["temperature"] = learned(several, soup, validation, batch_statistics=norm is not None, **settings)
        for i, row in enumerate(tables["networks"]):
            row["mean weight"] = float(np.mean([share[i] for share in shares.values()]))
    if norm is not None and len(members) > 1:
        fill(soup.module, several, members, shares)
        figures["soup with averaged statistics"] = _figure(predict(soup, validation), validation, metric)
    tasting.fill(members, shares)
    logits = predict(soup, validation)
    soup.module.to(memory_format=torch.contiguous_format)  # as it will be loaded: another layout rounds differently
    figures = {"soup": _figure(logits, validation, metric)} | figures | {"networks kept": len(members)}
    soup.measured = [{"data": f"{name_of(validation)} (chosen on it)", "rows": len(validation), "metrics": metrics(logits, labels(validation))}]
    for warning in warned:
        warnings.warn(warning, stacklevel=3)
    what = metric.replace("_", " ") + (", negated" if metric == "log_loss" else "")
    text = f"The figures are {what}, on the data by which the soup was chosen: report figures on other data. "
    ties = f"A network that left the score as it was is {tie}ed (the paper accepts, the authors' code rejects)." if recipe == "greedy" else ""
    bars = {name: value for name, value in figures.items() if name not in ("networks kept", "temperature")} | dict(zip(names, scores, strict=True))
    soup.reports["soup"] = Report(
        f"{recipe} soup of {len(several)} networks",
        figures,
        tables=tables,
        text=text + ties,
        pictures={"scores": bar_chart(bars, x=f"{what}, on {name_of(validation)}", from_zero=False)},
        warnings=warned,
    )
    return soup
