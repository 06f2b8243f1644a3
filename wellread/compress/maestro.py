"""Maestro: a network that finds its own ranks while it is trained, and that can be cut further afterwards (Horvath et al. 2024, arXiv 2308.14929).

Every layer is written as two, W = U V, with columns of U and rows of V numbered by importance. Each step of training runs one layer, drawn at random,
on its first columns only, so that the first ones learn to do most of the work (low-rank ordered decomposition). A penalty on the tails of the factors
and a cut between epochs take away what is not needed.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
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
from wellread.train import fit, schedule_factor

NORM_ROWS = 1024
CURVE = (0.9, 0.8, 0.7, 0.6, 0.5)  # shares of the multiply-adds at which a report shows the accuracy


# --- one layer as two


def weights(pair: Any) -> tuple[Tensor, Tensor]:
    """V [r, n] and U [o, r] of the two layers that the edit `factorise` makes; the layer's matrix is U @ V."""
    return pair[0].weight.flatten(1), pair[1].weight.flatten(1)


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


def hierarchical_lasso(pair: Any) -> Tensor:
    """sum over b of ||U[:, b:]||_F + ||V[b:]||_F: a column is in as many terms as columns stand before it, so the last ones shrink first."""
    into, out = weights(pair)
    tails = [squares.flip(0).cumsum(0) for squares in (into.square().sum(1), out.square().sum(0))]
    return sum(((tail + 1e-30).sqrt().sum() for tail in tails), into.new_zeros(()))  # the root has no gradient at zero


def strengths(pair: Any) -> Tensor:
    """||u_j|| ||v_j|| of each column, float64 [r]; unlike either norm it does not change when a factor moves from U to V."""
    into, out = (tensor.detach().cpu().double() for tensor in weights(pair))
    return into.norm(dim=1) * out.norm(dim=0)


def importance(pair: Any) -> Tensor:
    """What the columns from b on are worth, float64 [r], never rising: ||U[:, b:]||_F ||V[b:]||_F, once each is equally long in U and V."""
    return strengths(pair).flip(0).cumsum(0).flip(0)


def needed(pair: Any, threshold: float) -> int:
    """How many columns stay when all from b on go, for the first b whose importance is at most the share `threshold` of the whole; at least 1."""
    return ranks.energy_rank(strengths(pair).sqrt(), 1 - threshold)


def keep_columns(pair: Any, rank: int) -> None:
    """Remove the columns from `rank` on, in place."""
    first, second = pair
    for layer, cut in ((first, first.weight[:rank]), (second, second.weight[:, :rank])):
        layer.weight = nn.Parameter(cut.detach().clone(), layer.weight.requires_grad)
    if isinstance(first, nn.Linear):
        first.out_features = second.in_features = rank
    else:
        first.out_channels = second.in_channels = rank


def dense(pair: Any) -> nn.Linear | nn.Conv2d:
    """The one layer that computes what the two do."""
    first, second = pair
    into, out = weights(pair)
    kind: dict[str, Any] = {"bias": second.bias is not None, "device": into.device, "dtype": into.dtype}
    if isinstance(first, nn.Linear):
        whole: nn.Linear | nn.Conv2d = nn.Linear(first.in_features, second.out_features, **kind)
    else:
        form: dict[str, Any] = {name: getattr(first, name) for name in ("kernel_size", "stride", "padding", "dilation", "padding_mode")}
        whole = nn.Conv2d(first.in_channels, second.out_channels, **form, **kind)
    with torch.no_grad():
        whole.weight.copy_((out.double() @ into.double()).reshape(whole.weight.shape))
        if whole.bias is not None:
            whole.bias.copy_(second.bias)
    whole.weight.requires_grad_(second.weight.requires_grad)
    return whole.train(pair.training)


# --- training


@lru_cache(maxsize=4)
def _cycle(widths: tuple[int, ...], seed: int, cycle: int) -> np.ndarray:
    every = [(layer, width) for layer, most in enumerate(widths) for width in range(1, most + 1)]
    return np.random.default_rng((seed, cycle)).permutation(np.array(every))


def draw(widths: Sequence[int], number: int, seed: int = 0) -> tuple[int, int]:
    """The layer that step `number` cuts, and to how many columns. Each cycle goes once through every layer and width, in an order of its own."""
    cycle, place = divmod(number, sum(widths))
    layer, width = _cycle(tuple(widths), seed, cycle)[place]
    return int(layer), int(width)


class OrderedBatches(Batches):
    """Batches that also say which "layer" their step cuts to which "width"; `first` steps of the cycle lie behind."""

    def __init__(self, batches: Batches, widths: Sequence[int], first: int = 0) -> None:
        kept = {name: getattr(batches, name) for name in ("batch_size", "shuffle", "seed", "drop_last")}
        super().__init__(batches.rows, batches.get, **kept)
        self.widths, self.first, self.past = list(widths), first, 0

    def epoch(self, number: int, *, start: int = 0, process: int = 0, processes: int = 1) -> Iterator[dict[str, Any]]:
        """Of epoch `past` + `number`: a training of one epoch after `past` others sees the pictures in another order than they did."""
        for batch, content in enumerate(super().epoch(self.past + number, start=start, process=process, processes=processes), start):
            layer, width = draw(self.widths, self.first + number * len(self) + batch, self.seed)
            yield {**content, "layer": layer, "width": width}


class Momentum(nn.Module):
    """A module with the momentum of what is trained in it as buffers: it goes on from one training to the next, and in a resumed one."""

    def __init__(self, module: nn.Module, values: Mapping[str, Tensor]) -> None:
        super().__init__()
        self.module = module
        self.trained = [(name, parameter) for name, parameter in module.named_parameters() if parameter.requires_grad]
        for number, (name, parameter) in enumerate(self.trained):
            self.register_buffer(f"momentum{number}", values.get(name, torch.zeros_like(parameter)).clone())

    def values(self) -> dict[str, Tensor]:
        return {name: self.get_buffer(f"momentum{number}") for number, (name, _) in enumerate(self.trained)}

    def sgd(self, groups: Any, lr: float) -> torch.optim.Optimizer:
        """SGD with momentum 0.9 and weight decay 1e-4 that starts from the buffers and leaves its own in them."""
        optimizer = torch.optim.SGD(groups, lr=lr, momentum=0.9, weight_decay=1e-4)
        values = self.values()
        for name, parameter in self.trained:
            optimizer.state[parameter]["momentum_buffer"] = values[name].clone()

        def store(*_: Any) -> None:
            torch._foreach_copy_(list(self.values().values()), [optimizer.state[each]["momentum_buffer"] for _, each in self.trained])

        optimizer.register_step_post_hook(store)
        return optimizer


def train_ordered(
    network: Network,
    paths: Sequence[str],
    batches: Batches,
    loss: Callable[[Tensor, dict[str, Any]], Tensor],
    *,
    epochs: int,
    lasso: float = 1e-6,
    shrink: float = 1e-5,
    ordered: bool = True,
    full_pass: bool = False,
    learning_rate: float = 0.01,
    seed: int = 0,
    name: str = "ordered training",
) -> list[dict[str, int]]:
    """Train a network in place whose layers at `paths` are factorised, and cut it after every epoch. Returns the ranks then.

    loss: (output, batch with "inputs") to a scalar. lasso, shrink, full_pass: as for `maestro`. ordered: False trains all columns in every step.
    The learning rate falls to a tenth after 50 % and after 75 % of the epochs.
    """
    pairs = [layer_of(network.module, path) for path in paths]
    values: dict[str, Tensor] = {}
    history: list[dict[str, int]] = []
    walk = OrderedBatches(batches, [len(weights(pair)[0]) for pair in pairs])
    for epoch in range(epochs):
        holder = Momentum(network.module, values)
        walk.past = epoch

        def step(_: nn.Module, batch: dict[str, Any]) -> tuple[Tensor, dict[str, float | Tensor]]:
            whole = network(batch["inputs"]) if full_pass or not ordered else None
            task = loss(whole, batch) if whole is not None else torch.zeros(())
            if ordered:
                with cut_to(pairs[batch["layer"]], batch["width"]):
                    part = network(batch["inputs"])
                task = task + F.cross_entropy(part, whole.detach().softmax(-1)) if whole is not None else loss(part, batch)
            penalty = sum((hierarchical_lasso(pair) for pair in pairs), torch.zeros((), device=task.device)) if lasso > 0 else 0.0
            return task + lasso * penalty, {"task": task}

        rate = learning_rate * schedule_factor(epoch, epochs, "step")
        fit(holder, walk, step, epochs=1, learning_rate=rate, optimizer=holder.sgd, schedule="constant", seed=seed, name=f"{name} {epoch + 1}")
        values, walk.first = holder.values(), walk.first + len(walk)
        kept = [needed(pair, shrink) if shrink > 0 else len(weights(pair)[0]) for pair in pairs]
        if kept != walk.widths:
            for path, pair, rank in zip(paths, pairs, kept, strict=True):
                keep_columns(pair, rank)
                for key, cut in ((f"{path}.0.weight", slice(rank)), (f"{path}.1.weight", (slice(None), slice(rank)))):
                    if key in values:
                        values[key] = values[key][cut].clone()
            walk.widths, walk.first = kept, 0
            said = dict(zip(paths, kept, strict=True))
            network.edits = [each | {"rank": said[each["layer"]]} if _of(each, said) else each for each in network.edits]
        history.append(dict(zip(paths, kept, strict=True)))
    network.module.eval()
    return history


def _pair(network: Network, path: str) -> Any:
    return layer_of(network.module, path)


def _of(record: Mapping[str, Any], paths: Mapping[str, Any] | Sequence[str]) -> bool:
    return record["edit"] == "factorise" and record["layer"] in paths


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


def merged(network: Network, paths: Sequence[str]) -> Network:
    """A copy in which these pairs are one layer each again, with what was trained; it computes the same."""
    whole = network.copy()
    for path in paths:
        whole.module = put_layer(whole.module, path, dense(layer_of(whole.module, path)))
    whole.edits = [record for record in whole.edits if not _of(record, paths)]
    return whole


def deploy(
    network: Network,
    data: Dataset | None = None,
    *,
    keep: float | None = None,
    budget: ranks.Measure = "macs",
    threshold: float = 0.0,
    pays: Literal["counted", "measured"] = "counted",
) -> Network:
    """A smaller copy of a network from `maestro` (or of another whose last edits are `factorise`), without training.

    data: examples from which batch norm is estimated anew; labels are not read.
    keep: share of the cost of the network with whole layers that may remain; one threshold for all layers is found that meets it.
    budget: what `keep` counts, and what a pair must have less of than the whole layer: multiply-adds or parameters.
    threshold: when `keep` is not given, columns go whose importance, with all behind them, is at most this share of their layer's.
    pays: counted, or measured as well: layers whose pair is slower here stay whole.
    Each layer keeps its first columns, or is one layer again where two would not be cheaper.
    Raises `BadInput` for no factorised layer and for a budget that rank 1 everywhere does not meet, with the smallest that it does.
    """
    if not 0 <= threshold < 1:
        raise BadInput(f"threshold is {threshold}: give a share of a layer's importance, at least 0 and below 1")
    paths = ordered_layers(network)
    if not paths:
        raise BadInput("the last edits of this network factorise no layer: give one from maestro, before other edits")
    whole = merged(network, paths)
    layers = [layer for layer in ranks.find_layers(whole)[0] if layer.path in paths]
    columns = {layer.path: strengths(layer_of(network.module, layer.path)).sqrt() for layer in layers}

    def choose() -> dict[str, int]:
        if keep is None:
            return ranks.ranks_for_energy(layers, columns, 1 - threshold, measure=budget)
        return ranks.ranks_for_budget(layers, columns, ranks.limit_for(whole, layers, keep, budget), measure=budget)[0]

    chosen = choose()
    if pays == "measured":
        times = ranks.milliseconds(whole, layers, chosen)
        layers = [layer for layer in layers if layer.path not in chosen or times[layer.path][1] < times[layer.path][0]]
        chosen = choose()
    small = ranks.cut(whole, layers, chosen)
    for path, rank in chosen.items():
        mine, theirs = (_pair(each, path) for each in (small, network))
        with torch.no_grad():
            mine[0].weight.copy_(theirs[0].weight[:rank])
            mine[1].weight.copy_(theirs[1].weight[:, :rank])
    if data is not None and norm_layers(small.module):
        reestimate_norm(small, data)
    small.module.to(memory_format=torch.contiguous_format)  # type: ignore[call-overload]  # as it will be loaded
    said = {"keep": keep, "budget": budget, "threshold": threshold, "pays": pays}
    small.lineage = [*network.lineage, lineage_step("maestro-deploy", said, parents=[network.fingerprint], result=small.fingerprint)]
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
    full_pass: bool = False,
    pays: Literal["counted", "measured"] = "counted",
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
    full_pass: run the whole network in each step, too, and let the cut one learn its answers; twice the time.
    pays: with `keep`: when a layer is two layers, only where that is cheaper, counted, or measured as time on this machine as well.
    epochs: of training; the learning rate falls to a tenth after half and after three quarters of them.
    learning_rate, batch_size: of SGD with momentum 0.9 and weight decay 1e-4.
    seed: of the order of the examples and of the cuts.

    `deploy(result, data, keep=0.5)` makes a smaller network of it at once. The report "maestro" has the ranks of each layer after each epoch, the
    importance of its columns and, with validation, the accuracy at several budgets.
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
    whole = ranks.cut(network, found, full)
    if any(isinstance(layer, nn.Conv2d) for layer in whole.module.modules()):
        whole.module.to(memory_format=torch.channels_last)  # type: ignore[call-overload]
    batches = network_batches(whole, train, batch_size=batch_size, shuffle=True, seed=seed, drop_last=bool(norm_layers(whole.module)))
    settings: dict[str, Any] = {"lasso": lasso, "shrink": shrink, "full_pass": full_pass, "learning_rate": learning_rate, "seed": seed}
    history = train_ordered(whole, list(full), batches, lambda out, batch: F.cross_entropy(out, batch["label"]), epochs=epochs, **settings)
    sample = subset(train, np.random.default_rng(seed).permutation(len(train))[:NORM_ROWS]) if len(train) > 1 else None
    if norm_layers(whole.module) and sample is not None:
        reestimate_norm(whole, sample)
    whole.module.to(memory_format=torch.contiguous_format)  # type: ignore[call-overload]  # as it will be loaded
    result = whole if keep is None else deploy(whole, sample, keep=keep, budget=budget, pays=pays)
    result.lineage = list(network.lineage)  # @method adds the step

    timed, warned = ranks.compared(network, result)
    if keep is None:
        warned = ["all layers are two, at all ranks that training left, which need not be cheaper: cut it with deploy(network, data, keep=...)"]
    final = {record["layer"]: record["rank"] for record in result.edits if _of(record, full)}
    rows = []
    for path in full:
        shares = importance(layer_of(whole.module, path))
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
        curve = _curve(whole, network, sample, validation) if keep is None else []
        if len(curve) > 1:
            tables["sizes"] = curve
            at = [row["multiply-adds"] for row in curve]
            pictures["sizes"] = line_chart({"accuracy": [row["accuracy"] for row in curve]}, x="multiply-adds, share", y="accuracy", at=at)
    result.reports["maestro"] = Report(
        f"{sum(history[-1].values())} of {sum(full.values())} ranks left by training in {len(full)} layers",
        figures,
        tables=tables,
        text="Parameters and multiply-adds are shares of what they were. "
        "The importance of a column is that of it and of all behind it, as a share of the layer's.",
        pictures=pictures,
        warnings=warned,
    )
    return result


def _curve(whole: Network, network: Network, sample: Dataset | None, validation: Dataset) -> list[dict[str, float]]:
    """Cost and accuracy of cuts that `deploy` makes; those that cannot be reached are left out."""
    rows = []
    for keep in CURVE:
        try:
            small = deploy(whole, sample, keep=keep)
        except BadInput:
            break
        rows.append({"keep": keep, "multiply-adds": meter.macs(small) / meter.macs(network), "accuracy": score(small, validation)})
    return rows
