"""Model soups: average the weights of several fine-tunings of one network (Wortsman et al. 2022, arXiv 2203.05482)."""

from __future__ import annotations

import json
import os
import re
import tempfile
import warnings
from collections.abc import Callable, Mapping, Sequence
from itertools import combinations
from pathlib import Path
from typing import Any, Literal

import numpy as np
import psutil
import torch
from datasets import Dataset
from torch import Tensor, nn
from torch.nn import functional as F

from wellread import runtime
from wellread.batches import network_batches
from wellread.charts import bar_chart
from wellread.data import Labelled, Unlabelled, class_names, fingerprint, labels, name_of, subset
from wellread.errors import BadInput
from wellread.evaluate import metrics, predict
from wellread.features import running, to_device
from wellread.method import known_classes, method
from wellread.network import CONFIG, Network, Networks
from wellread.results import Report
from wellread.train import fit

NORM_ROWS = 1024  # enough for means and variances over images and places
BARRIER_ROWS = 512  # a collapse is seen on few examples
BARRIER_NETWORKS = 12  # with more networks than this, only the pairs with the best one are tried

# --- averages


def running_mean(mean: Tensor, new: Tensor, before: float, weight: float = 1.0, *, out: Tensor | None = None) -> Tensor:
    """Mean of what had the total weight `before` and of `new`, which has `weight`. Tensors of one shape; the dtype of `mean`, float32 or float64.

    One step of algorithm 1: mean * m / (m + 1) + new / (m + 1) with `before` = m. Equal tensors give themselves to the bit, for any m.
    """
    return torch.lerp(mean, new.to(mean), weight / (before + weight) if weight else 0.0, out=out)


def interpolate(first: Mapping[str, Tensor], second: Mapping[str, Tensor], amount: float) -> dict[str, Tensor]:
    """(1 - amount) * first + amount * second, two states of one network; at 0 and 1 the end points to the bit. Whole numbers are those of `first`."""
    mixed = {}
    for name, start in first.items():
        wide = torch.promote_types(start.dtype, torch.float32) if start.is_floating_point() else start.dtype
        mixed[name] = running_mean(start.to(wide), second[name], 1 - amount, amount).to(start.dtype) if start.is_floating_point() else start.clone()
    return mixed


def fill(module: nn.Module, networks: Networks, members: Sequence[int], shares: Mapping[str, Sequence[float]] | None = None) -> None:
    """Put the average of the `members` (numbers in `networks`) into `module`, in place.

    shares: {tensor: one weight for each member}, for tensors that are not weighted equally. Summed in float32, in float64 for more than 50
    members, then cast back; whole numbers and truth values are those of the first member; tied tensors are averaged once and stay tied.
    Beside `module` two tensors are in memory at a time, whatever the number of members.
    """
    targets = _state(module)
    wide = torch.float64 if len(members) > 50 else torch.float32
    first_name = {id(target): name for name, target in reversed(targets.items())}
    streams = [networks.weights(member) for member in members]
    with torch.no_grad():
        for _ in range(len(targets)):
            mean = torch.empty(0)
            for count, stream in enumerate(streams):
                key, new = next(stream)
                name = _name(key, targets)
                weights = (shares or {}).get(name, [1.0] * len(members))
                if count == 0:
                    mean = new.to(wide, copy=True) if new.is_floating_point() else new
                elif new.is_floating_point():
                    running_mean(mean, new, sum(weights[:count]), weights[count], out=mean)
            if first_name[id(targets[name])] == name:
                targets[name].copy_(mean)


def _state(module: nn.Module) -> dict[str, Tensor]:
    """The tensors themselves, not copies, under the names that they have without torch.compile."""
    found = module.state_dict(keep_vars=True)
    return {name.replace("_orig_mod.", ""): tensor for name, tensor in found.items() if isinstance(tensor, Tensor)}


def _name(key: str, known: Mapping[str, Any]) -> str:
    """`key` without what torch.compile and DataParallel put before it."""
    key = key.replace("_orig_mod.", "")
    return key if key in known else key.removeprefix("module.")


def _readable(networks: Networks, folder: str) -> Networks:
    """Networks that can be read tensor by tensor: those of other formats than ours are written into `folder`."""
    ours = [isinstance(each, Network) or (Path(each) / CONFIG).is_file() for each in networks.given]
    return Networks([each if ours[i] else networks[i].save(Path(folder) / str(i)) for i, each in enumerate(networks.given)])


def _plain(network: Network) -> Network:
    """An independent copy, out of torch.compile and DataParallel."""
    module: Any = network.module
    while isinstance(module, nn.DataParallel | nn.parallel.DistributedDataParallel) or hasattr(module, "_orig_mod"):
        module = module.module if hasattr(module, "module") else module._orig_mod
    if module is network.module:
        return network.copy()
    return Network(module, network.input, None, network.labels, network.output, lineage=network.lineage).copy()


# --- what may be averaged


def same_structure(networks: Networks, module: nn.Module, names: Sequence[str]) -> list[dict[str, Any]]:
    """Read every network once; the record of each. Raises `BadInput` when they cannot be averaged into `module`, which holds the first.

    Named are the networks and what differs (architecture, edits, output, labels, input) or the first tensor that is missing, of another shape
    or dtype, not finite, or of whole numbers that differ (quantised weights; the counters of batch norm may differ).
    """
    known = _state(module)
    records: list[dict[str, Any]] = []
    for i in range(len(networks)):
        who, pair = names[i], f"{names[i]} and {names[0]} cannot be averaged"
        records.append(networks.record(i))
        for part in ("architecture", "edits", "output", "labels", "input"):
            mine, theirs = (json.dumps(_comparable(record[part]), sort_keys=True) for record in (records[i], records[0]))
            if mine != theirs and "null" not in (mine, theirs):  # null: not known
                raise BadInput(f"{pair}, their {part} differ ({mine[:60]}, {theirs[:60]}): give fine-tunings of one network")
        missing = set(known)
        for key, tensor in networks.weights(i, verify=True):
            name = _name(key, known)
            missing.discard(name)
            if re.search(r"(^|[._])lora[._]?(a|b|up|down|embedding)", name, re.IGNORECASE):
                raise BadInput(f"{who} has an adapter beside its weights ({name!r}), whose factors must not be averaged: merge it into them first")
            if name not in known or _kind(tensor) != _kind(known[name]):
                theirs = _kind(known[name]) if name in known else "missing"
                raise BadInput(f"{pair}, their tensors {name!r} differ ({_kind(tensor)}, {theirs}): give fine-tunings of one network")
            if tensor.is_floating_point():
                if not tensor.sum().isfinite() and not tensor.isfinite().all():  # the sum needs no second tensor
                    raise BadInput(f"{who} is damaged, its tensor {name!r} holds values that are not finite: leave it out")
            elif not name.endswith("num_batches_tracked") and not torch.equal(tensor.to(known[name].device), known[name]):
                raise BadInput(f"{pair}, the whole numbers in their tensors {name!r} differ: give fine-tunings that are not quantised")
        if missing:
            name = min(missing)
            raise BadInput(f"{pair}, their tensors {name!r} differ (missing, {_kind(known[name])}): give fine-tunings of one network")
    return records


def _kind(tensor: Tensor) -> str:
    return f"{list(tensor.shape)} {str(tensor.dtype).removeprefix('torch.')}"


def _comparable(part: Any) -> Any:
    """Without what a sweep may change (dropout rates) and what is only a note."""
    if isinstance(part, Mapping):
        return {key: _comparable(value) for key, value in part.items() if "drop" not in key and not key.startswith(("_", "transformers_version"))}
    return part


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


def norm_layers(module: nn.Module) -> list[Any]:
    """The batch-norm layers that keep running statistics."""
    return [layer for layer in module.modules() if isinstance(layer, nn.modules.batchnorm._BatchNorm) and layer.running_mean is not None]


def statistics_differ(networks: Networks, module: nn.Module) -> bool:
    """Whether the running statistics of batch norm are not those of `module` in all networks.

    Fine-tunings that kept their statistics share them, and need them: re-estimated ones would be none that any of their weights were trained with.
    """
    found = {id(part) for layer in norm_layers(module) for part in (layer.running_mean, layer.running_var)}
    shared = {name: tensor for name, tensor in _state(module).items() if id(tensor) in found}
    return any(
        (name := _name(key, shared)) in shared and not torch.equal(tensor.to(shared[name].device), shared[name])
        for i in range(len(networks) if shared else 0)
        for key, tensor in networks.weights(i)
    )


def reestimate_norm(network: Network, data: Dataset, *, batch_size: int = 128) -> None:
    """Give the batch-norm layers the means and variances that they see on `data`, in place; labels are not read.

    As torch.optim.swa_utils.update_bn, but all other layers stay in evaluation mode, so dropout does not widen the variances.
    """
    layers = norm_layers(network.module)
    momenta = [layer.momentum for layer in layers]
    device = runtime.device()
    with running(network, device), torch.no_grad(), runtime.autocast(device):
        for layer in layers:
            layer.reset_running_stats()
            layer.momentum = None  # the plain mean over the batches
            layer.train()
        for batch in network_batches(network, data, batch_size=batch_size, label=False, drop_last=True).epoch(0):
            network(to_device(batch["inputs"], device))
    for layer, momentum in zip(layers, momenta, strict=True):
        layer.momentum = momentum


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
    home, targets = like.device, _state(like.module)
    states = [{_name(key, targets): tensor.to(device) for key, tensor in networks.weights(i)} for i in range(len(networks))]
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
    several = _readable(several, scratch.name)
    soup = _plain(several[0]) if isinstance(several.given[0], Network) else several[0]  # one that is just loaded needs no copy
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
