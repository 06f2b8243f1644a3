"""Maestro: a network that finds its own ranks while it is trained, and that can be cut further afterwards (Horvath et al. 2024, arXiv 2308.14929).

Every layer is written as two, W = U V, with columns of U and rows of V numbered by importance. Each step of training runs one layer, drawn at random,
on its first columns only, so that the first ones learn to do most of the work (low-rank ordered decomposition). A penalty on the tails of the factors
and a cut between epochs take away what is not needed.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from functools import lru_cache
from typing import Any, Literal

import numpy as np
import torch
from datasets import Dataset
from torch import Tensor, nn
from torch.func import functional_call
from torch.nn import functional as F

from wellread import meter, ranks
from wellread.batches import Batches, network_batches
from wellread.charts import line_chart
from wellread.data import Labelled, name_of, subset
from wellread.errors import BadInput
from wellread.evaluate import score
from wellread.lineage import step as lineage_step
from wellread.method import known_classes, method
from wellread.network import Network
from wellread.norm import norm_layers, reestimate_norm
from wellread.results import Report
from wellread.structure import layer_of, put_layer
from wellread.train import fit

NORM_ROWS = 1024
CURVE = (0.9, 0.8, 0.7, 0.6, 0.5)  # shares of the multiply-adds at which a report shows the accuracy


# --- one layer as two


def weights(pair: Any, width: int | None = None) -> tuple[Tensor, Tensor]:
    """V [r, n] and U [o, r] of the two layers that the edit `factorise` makes, or their first `width` columns; the layer's matrix is U @ V."""
    return pair[0].weight.flatten(1)[:width], pair[1].weight.flatten(1)[:, :width]


@contextmanager
def cut_to(pair: Any, width: int) -> Iterator[None]:
    """Inside the block the pair computes with its first `width` columns only, and gradients reach only those."""

    def narrow(x: Tensor) -> Tensor:
        between = functional_call(pair[0], {"weight": pair[0].weight[:width]}, (x,))
        return functional_call(pair[1], {"weight": pair[1].weight[:, :width]}, (between,))

    pair.forward = narrow
    try:
        yield
    finally:
        del pair.forward  # the class's own is back


def hierarchical_lasso(pair: Any, width: int | None = None) -> Tensor:
    """sum over b of ||U[:, b:]||_F + ||V[b:]||_F, a scalar: a column is in as many terms as columns stand before it, so the last ones shrink first."""
    into, out = weights(pair, width)
    tails = torch.stack([into.square().sum(1), out.square().sum(0)]).flip(1).cumsum(1)
    return (tails + 1e-30).sqrt().sum()  # the root has no gradient at zero


def strengths(pair: Any, width: int | None = None) -> Tensor:
    """||u_j|| ||v_j|| of each column, float64 [r]; unlike either norm it does not change when a factor moves from U to V."""
    into, out = (tensor.detach().cpu().double() for tensor in weights(pair, width))
    return into.norm(dim=1) * out.norm(dim=0)


def importance(pair: Any) -> Tensor:
    """What the columns from b on are worth, float64 [r], never rising: ||U[:, b:]||_F ||V[b:]||_F, once each is equally long in U and V."""
    return strengths(pair).flip(0).cumsum(0).flip(0)


def needed(pair: Any, threshold: float, width: int | None = None) -> int:
    """How many columns stay when all from b on go, for the first b whose importance is at most the share `threshold` of the whole; at least 1."""
    return ranks.energy_rank(strengths(pair, width).sqrt(), 1 - threshold)


def dense(pair: Any) -> nn.Linear | nn.Conv2d:
    """The one layer that computes what the two do."""
    into, out = (tensor.detach() for tensor in weights(pair))
    whole = copy.deepcopy(pair[0])
    product = (out.cpu().double() @ into.cpu().double()).reshape(len(out), *whole.weight.shape[1:])
    whole.weight, whole.bias = nn.Parameter(product.to(out), whole.weight.requires_grad), copy.deepcopy(pair[1].bias)
    setattr(whole, "out_features" if isinstance(whole, nn.Linear) else "out_channels", len(out))
    return whole


def narrowed(network: Network, widths: Mapping[str, int | None]) -> Network:
    """A copy whose factorised layers {path: width} keep their first columns only, or are one layer again where the width is None."""
    small = network.copy()
    for path, width in widths.items():
        pair: Any = layer_of(small.module, path)
        if width is None:
            small.module = put_layer(small.module, path, dense(pair))
            continue
        for layer, cut in zip(pair, (pair[0].weight[:width], pair[1].weight[:, :width]), strict=True):
            layer.weight = nn.Parameter(cut.detach().clone(), layer.weight.requires_grad)
        names = ("out_features", "in_features") if isinstance(pair[0], nn.Linear) else ("out_channels", "in_channels")
        for layer, name in zip(pair, names, strict=True):
            setattr(layer, name, width)
    mine = [(record["edit"] == "factorise" and record["layer"] in widths, record) for record in small.edits]
    small.edits = [record | {"rank": widths[record["layer"]]} if ours else record for ours, record in mine if not ours or widths[record["layer"]]]
    return small


# --- training


@lru_cache(maxsize=4)
def _cycle(widths: tuple[int, ...], seed: tuple[int, ...]) -> np.ndarray:
    every = [(layer, width) for layer, most in enumerate(widths) for width in range(1, most + 1)]
    return np.random.default_rng(seed).permutation(np.array(every))


def draw(widths: Sequence[int], number: int, seed: Sequence[int] = (0,)) -> tuple[int, int]:
    """The layer that step `number` cuts, and to how many columns. Each cycle goes once through every layer and width, in an order of its own."""
    cycle, place = divmod(number, sum(widths))
    layer, width = _cycle(tuple(widths), (*seed, cycle))[place]
    return int(layer), int(width)


class Ordered(nn.Module):
    """A module whose layers lose columns between epochs, with what a resumed training must know: `steps` done, `ranks` int64 [epochs + 1, layers].

    Row e of `ranks` holds in epoch e; the last one is what remains. Columns beyond it are not read again, by forward pass, penalty or importance.
    """

    def __init__(self, module: nn.Module, pairs: Sequence[Any], epochs: int) -> None:
        super().__init__()
        self.module, self.pairs = module, list(pairs)
        self.steps: Tensor
        self.ranks: Tensor
        self.register_buffer("steps", torch.zeros((), dtype=torch.int64))
        self.register_buffer("ranks", torch.tensor([[len(weights(pair)[0]) for pair in pairs]] * (epochs + 1)))

    def shrink(self, epoch: int, threshold: float) -> None:
        """Fill row `epoch` of the ranks from the one before and the weights as they are; a threshold of 0 keeps all."""
        for number, pair in enumerate(self.pairs):
            width = int(self.ranks[epoch - 1, number])
            self.ranks[epoch, number] = needed(pair, threshold, width) if threshold > 0 else width


def train_ordered(
    network: Network,
    paths: Sequence[str],
    batches: Batches,
    loss: Callable[[Tensor, dict[str, Any]], Tensor],
    *,
    epochs: int,
    lasso: float,
    shrink: float,
    learning_rate: float = 0.01,
    ordered: bool = True,
    seed: int = 0,
    name: str = "ordered training",
) -> tuple[Network, list[dict[str, int]]]:
    """Train a network, in place, whose layers at `paths` are factorised. Returns a copy at the ranks that are left, and the ranks after each epoch.

    loss: (output, batch with "inputs") to a scalar. lasso, shrink: as for `maestro`. ordered: False trains all columns in every step.
    SGD with momentum 0.9 and weight decay 1e-4; the learning rate falls to a tenth after 50 % and after 75 % of the steps.
    """
    module = network.module
    whole = Ordered(module, [layer_of(module, path) for path in paths], epochs)

    def step(_: nn.Module, batch: dict[str, Any]) -> tuple[Tensor, dict[str, float | Tensor]]:
        epoch, number = divmod(int(whole.steps), len(batches))
        if epoch and number == 0:
            whole.shrink(epoch, shrink)
        whole.steps += 1
        widths = whole.ranks[epoch].tolist()
        chosen, width = draw(widths, number, (seed, epoch)) if ordered else (0, widths[0])
        with ExitStack() as cuts:
            for layer, (pair, most) in enumerate(zip(whole.pairs, widths, strict=True)):
                cuts.enter_context(cut_to(pair, width if layer == chosen else most))
            task = loss(network(batch["inputs"]), batch)
        if lasso == 0:
            return task, {"task": task}
        penalty = torch.stack([hierarchical_lasso(pair, most) for pair, most in zip(whole.pairs, widths, strict=True)]).sum()
        return task + lasso * penalty, {"task": task}

    if any(isinstance(layer, nn.Conv2d) for layer in module.modules()):
        module.to(memory_format=torch.channels_last)  # type: ignore[call-overload]
    options: dict[str, Any] = {"optimizer": "sgd", "momentum": 0.9, "weight_decay": 1e-4, "schedule": "step"}
    fit(whole, batches, step, epochs=epochs, learning_rate=learning_rate, seed=seed, name=name, **options)
    whole.shrink(epochs, shrink)
    module.to(memory_format=torch.contiguous_format).eval()  # type: ignore[call-overload]
    history = [dict(zip(paths, row, strict=True)) for row in whole.ranks[1:].tolist()]
    return narrowed(network, history[-1]), history


# --- after training


def ordered_layers(network: Network) -> list[str]:
    """The layers that the last edits of a network have factorised in the channel scheme, and that still are two plain layers."""
    found = []
    for record in reversed(network.edits):
        if record["edit"] != "factorise" or record.get("scheme", "channel") != "channel":
            break
        pair: Any = layer_of(network.module, record["layer"])
        if isinstance(pair, nn.Sequential) and len(pair) == 2 and all(type(part) in (nn.Linear, nn.Conv2d) for part in pair):
            found.append(record["layer"])
    return found[::-1]


def deploy(
    network: Network, data: Dataset | None = None, *, keep: float | None = None, budget: ranks.Measure = "macs", threshold: float = 0.0
) -> Network:
    """A smaller copy of a network from `maestro` (or of another whose last edits are `factorise`), without training.

    data: examples from which batch norm is estimated anew; labels are not read.
    keep: share of the cost of the network with whole layers that may remain; one threshold for all layers is found that meets it.
    budget: what `keep` counts, and what a pair must have less of than the whole layer: multiply-adds or parameters.
    threshold: when `keep` is not given, columns go whose importance, with all behind them, is at most this share of their layer's.
    Each layer keeps its first columns, or is one layer again where two would not be cheaper.
    Raises `BadInput` for no factorised layer and for a budget that rank 1 everywhere does not meet, with the smallest that it does.
    """
    if not 0 <= threshold < 1:
        raise BadInput(f"threshold is {threshold}: give a share of a layer's importance, at least 0 and below 1")
    paths = ordered_layers(network)
    if not paths:
        raise BadInput("the last edits of this network factorise no layer: give one from maestro, before other edits")
    whole = narrowed(network, dict.fromkeys(paths))
    layers = [layer for layer in ranks.find_layers(whole)[0] if layer.path in paths]
    columns = {path: strengths(layer_of(network.module, path)).sqrt() for path in paths}
    if keep is None:
        chosen = ranks.ranks_for_energy(layers, columns, 1 - threshold, measure=budget)
    else:
        chosen, _ = ranks.ranks_for_budget(layers, columns, ranks.limit_for(whole, layers, keep, budget), measure=budget)
    small = narrowed(network, {path: chosen.get(path) for path in paths})
    if data is not None and norm_layers(small.module):
        reestimate_norm(small, data)
    said = {"keep": keep, "budget": budget, "threshold": threshold}
    small.lineage.append(lineage_step("maestro-deploy", said, parents=[network.fingerprint], result=small.fingerprint))
    return small


@method
def maestro(
    network: Network,
    train: Labelled,
    validation: Labelled | None = None,
    *,
    keep: float | None = None,
    budget: Literal["macs", "parameters"] = "macs",
    layers: Literal["all", "conv", "linear", "kxk"] = "all",
    leave_out: list[str] | None = None,
    lasso: float = 1e-6,
    shrink: float = 1e-5,
    epochs: int = 5,
    learning_rate: float = 0.01,
    batch_size: int = 128,
    seed: int = 0,
) -> Network:
    """A network that finds its own ranks in one training, and that can be cut further later without training again.

    network: a classifier of the classes of `train`; a convolutional network or any other with Linear layers.
    train: what it is trained on, best of the task it was made for; batch norm is estimated on some of it at the end.
    validation: what the accuracies of the report are measured on; nothing is chosen by it.
    keep: share of the cost that the result may have, such as 0.5. None: the result keeps all ranks that training left, factorised everywhere and
        ordered, to be cut by `deploy`.
    budget: what `keep` counts: multiply-adds (macs) or parameters.
    layers: which are factorised: all; conv, linear; kxk for convolutions larger than 1 x 1. Never the head or the one that reads the picture.
    leave_out: names of layers, or of blocks that hold them, that stay as they are.
    lasso: weight of the penalty on the tails of the factors (lambda_gl); more of it leaves fewer ranks.
    shrink: after each epoch columns go whose importance, with all behind them, is at most this share of their layer's (epsilon_ps); 0 keeps all.
    epochs: of training; the learning rate falls to a tenth after half and after three quarters of them.
    learning_rate, batch_size: of SGD with momentum 0.9 and weight decay 1e-4.
    seed: of the order of the examples and of the cuts.

    `deploy(result, data, keep=0.5)` makes a smaller network of it at once. The report "maestro" has the ranks of each layer after each epoch, the
    importance of its columns, what the meter says and, with validation, accuracy and time at several budgets.
    Raises BadInput for no layer that can be factorised, a negative lasso, a budget that rank 1 everywhere does not meet (with the smallest that it
    does), and a network that is no classifier of these classes.
    Source: Horvath et al. 2024, arXiv 2308.14929, and SamuelHorvath/Maestro-LoD.
    """
    for right, sentence in (
        (lasso >= 0, f"lasso is {lasso}: give a weight of at least 0"),
        (0 <= shrink < 1, f"shrink is {shrink}: give a share of a layer's importance, at least 0 and below 1"),
        (epochs >= 1, f"epochs is {epochs}: give at least 1"),
    ):
        if not right:
            raise BadInput(sentence)
    known_classes(network, train, "train")
    found, left = ranks.find_layers(network, which=layers, leave_out=leave_out or ())
    if not found:
        why = "; ".join(f"{path}: {reason}" for path, reason in list(left.items())[:3])
        raise BadInput(f"no layer of this network can be factorised as asked ({why or 'it has none of that kind'}): change layers or leave_out")
    if keep is not None:
        ranks.limit_for(network, found, keep, budget)  # before any training
    full = {layer.path: layer.highest for layer in found}
    start = ranks.cut(network, found, full)
    batches = network_batches(start, train, batch_size=batch_size, shuffle=True, seed=seed, drop_last=bool(norm_layers(start.module)))
    settings: dict[str, Any] = {"epochs": epochs, "lasso": lasso, "shrink": shrink, "learning_rate": learning_rate, "seed": seed}
    ordered, history = train_ordered(start, list(full), batches, lambda out, batch: F.cross_entropy(out, batch["label"]), **settings)
    sample = subset(train, np.random.default_rng(seed).permutation(len(train))[:NORM_ROWS]) if len(train) > 1 else None
    if norm_layers(ordered.module) and sample is not None:
        reestimate_norm(ordered, sample)
    result = ordered if keep is None else deploy(ordered, sample, keep=keep, budget=budget)
    result.lineage = list(network.lineage)  # @method adds the step

    timed, warned = ranks.compared(network, result)
    if keep is None:
        warned = ["all layers are two, at all ranks that training left, which need not be cheaper: cut it with deploy(network, data, keep=...)"]
    final = {record["layer"]: record["rank"] for record in result.edits if record["edit"] == "factorise"}
    rows = []
    for path in full:
        shares = importance(layer_of(ordered.module, path))
        row: dict[str, Any] = {"layer": path, "rank": final.get(path, "whole"), "of": full[path]}
        row |= {f"after epoch {number + 1}": each[path] for number, each in enumerate(history)}
        rows.append(row | {"importance of the columns": [round(float(value / shares[0].clamp(min=1e-300)), 6) for value in shares]})
    figures: dict[str, Any] = {
        "parameters": timed[1]["parameters, M"] / timed[0]["parameters, M"],
        "multiply-adds": timed[1]["MACs, M"] / timed[0]["MACs, M"],
        "ranks left by training": sum(history[-1].values()) / sum(full.values()),
    }
    tables = {"cost": timed, "layers": rows, "left out": [{"layer": path, "because": reason} for path, reason in left.items()]}
    pictures = {}
    if validation is not None:
        figures |= {"accuracy before": score(network, validation), "accuracy": score(result, validation)}
        result.measured = [{"data": name_of(validation), "rows": len(validation), "metrics": {"accuracy": figures["accuracy"]}}]
        curve = _curve(ordered, network, sample, validation) if keep is None else []
        if len(curve) > 1:
            tables["sizes"] = curve
            at = [row["multiply-adds"] for row in curve]
            pictures["sizes"] = line_chart({"accuracy": [row["accuracy"] for row in curve]}, x="multiply-adds, share", y="accuracy", at=at)
    result.reports["maestro"] = Report(
        f"{sum(history[-1].values())} of {sum(full.values())} ranks left by training in {len(full)} layers",
        figures,
        tables=tables,
        text="Parameters, multiply-adds and times are shares of what they were. "
        "The importance of a column is that of it and of all behind it, as a share of the layer's.",
        pictures=pictures,
        warnings=warned,
    )
    return result


def _curve(ordered: Network, network: Network, sample: Dataset | None, validation: Dataset) -> list[dict[str, float]]:
    """Cost, time and accuracy of cuts that `deploy` makes; those that cannot be reached are left out."""
    rows = []
    macs, time = meter.macs(network), meter.milliseconds(network, 32)
    for keep in CURVE:
        try:
            small = deploy(ordered, sample, keep=keep)
        except BadInput:
            break
        found = {"multiply-adds": meter.macs(small) / macs, "time of a batch of 32": meter.milliseconds(small, 32) / time}
        rows.append({"keep": keep, **found, "accuracy": score(small, validation)})
    return rows
