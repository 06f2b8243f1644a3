"""Trained rank pruning: train a network into low rank, then cut it (Xu et al. 2020, arXiv 2004.14566)."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any, Literal

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from wellread import ranks
from wellread.batches import network_batches
from wellread.charts import bar_chart
from wellread.data import Labelled, name_of, subset
from wellread.errors import BadInput
from wellread.evaluate import score
from wellread.method import known_classes, method
from wellread.network import Network
from wellread.norm import norm_layers, reestimate_norm
from wellread.ranks import Layer, Spectrum
from wellread.results import Report
from wellread.structure import layer_of
from wellread.train import History, fit

NORM_ROWS = 1024  # enough for means and variances over images and places
NORM_HARM = 0.1  # nats by which re-estimated batch norm may raise the loss; above it, the weights were trained for what they have

Choose = Callable[[Mapping[str, Tensor]], tuple[dict[str, int], float]]
"""Singular values of each layer, float64 [k], to the rank of each layer that is to be cut, and the energy at which they were chosen."""


def spectra(module: nn.Module, layers: Sequence[Layer]) -> dict[str, Spectrum]:
    """Of each layer's weight, written as a matrix."""
    return ranks.spectra({layer.path: ranks.matrix(_weight(module, layer), layer.scheme) for layer in layers})


def project(module: nn.Module, layers: Sequence[Layer], choose: Choose) -> tuple[dict[str, int], float, dict[str, Tensor]]:
    """Put the nearest weights of lower rank into `module`, in place (section 3.1, W <- U_r S_r V_r^T).

    Returns what `choose` gave, the ranks and the energy, and for each projected layer the sub-gradient of its nuclear norm, U_r V_r^T, in the
    shape of the weight (section 3.2).
    """
    found = spectra(module, layers)
    chosen, energy = choose({path: spectrum.values for path, spectrum in found.items()})
    signs = {}
    for layer in layers:
        if layer.path in chosen:
            weight = _weight(module, layer)
            best, sign = ranks.truncated(ranks.matrix(weight.detach(), layer.scheme), found[layer.path], chosen[layer.path])
            with torch.no_grad():
                weight.copy_(ranks.folded(best, layer.shape, layer.scheme))
            signs[layer.path] = ranks.folded(sign, layer.shape, layer.scheme)
    return chosen, energy, signs


def _weight(module: nn.Module, layer: Layer) -> Tensor:
    return layer_of(module, layer.path).weight  # type: ignore[return-value]


class Counted(nn.Module):
    """A module that counts its steps, in a buffer so that a resumed training goes on counting.

    start: what is aimed at, numbers; kept so that a training with another aim is not taken for this one.
    """

    def __init__(self, module: nn.Module, start: Sequence[float]) -> None:
        super().__init__()
        self.module = module
        self.steps: Tensor
        self.register_buffer("steps", torch.zeros((), dtype=torch.int64))
        self.register_buffer("start", torch.tensor(start))


def train_low_rank(
    network: Network,
    train: Labelled,
    layers: Sequence[Layer],
    choose: Choose,
    *,
    every: int | None,
    nuclear: float,
    epochs: int,
    learning_rate: float = 0.01,
    batch_size: int = 128,
    keep_norm: bool = False,
    seed: int = 0,
    name: str = "training into low rank",
) -> History:
    """SGD on cross-entropy, in place; before every `every`-th step, the first included, the layers are projected, and that step also descends
    nuclear * ||W||_* of each of them. Between projections the weights are free. With `every` None this is plain training, to the bit.

    keep_norm: batch norms use, and keep, the means and variances that they came with.
    """
    learning_norms = [] if keep_norm else norm_layers(network.module)

    def step(counted: nn.Module, batch: dict[str, Any]) -> tuple[Tensor, dict[str, float | Tensor]]:
        term: Any = 0.0
        if keep_norm:
            for layer in norm_layers(network.module):
                layer.eval()
        if every is not None and layers:
            assert isinstance(counted, Counted)
            number = int(counted.steps)
            counted.steps += 1
            if number % every == 0:
                _, _, signs = project(network.module, layers, choose)
                if nuclear > 0:  # <W, U_r V_r^T> is ||W||_* of the weights just cut, and its gradient is U_r V_r^T
                    term = sum((nuclear * (_weight(network.module, each) * signs[each.path]).sum() for each in layers if each.path in signs), 0.0)
        loss = F.cross_entropy(network(batch["inputs"]), batch["label"])
        return loss + term if isinstance(term, Tensor) else loss, {"task": loss}

    module = network.module
    if any(isinstance(layer, nn.Conv2d) for layer in module.modules()):
        module.to(memory_format=torch.channels_last)  # type: ignore[call-overload]
    batches = network_batches(network, train, batch_size=batch_size, shuffle=True, seed=seed, drop_last=bool(learning_norms))
    options: dict[str, Any] = {"optimizer": "sgd", "momentum": 0.9, "weight_decay": 1e-4}
    first, energy = choose({path: spectrum.values for path, spectrum in spectra(module, layers).items()}) if layers else ({}, 1.0)
    counted = Counted(module, [energy, *map(float, first.values())])
    history = fit(counted, batches, step, epochs=epochs, learning_rate=learning_rate, seed=seed, name=name, **options)
    module.to(memory_format=torch.contiguous_format)  # type: ignore[call-overload]
    module.eval()
    return history


def needs_its_norm(network: Network, data: Labelled) -> bool:
    """Whether batch norm estimated anew on `data` would raise the loss there by more than `NORM_HARM` nats: its weights were tuned for what it has."""
    if not norm_layers(network.module) or len(data) < 2:
        return False
    other = network.copy()
    reestimate_norm(other, data)
    return score(network, data, "log_loss") - score(other, data, "log_loss") > NORM_HARM  # scores are negated losses


@method
def trained_rank_pruning(
    network: Network,
    train: Labelled,
    validation: Labelled | None = None,
    *,
    keep: float | None = None,
    budget: Literal["macs", "parameters"] = "macs",
    energy: float = 0.9,
    scheme: Literal["channel", "spatial"] = "channel",
    layers: Literal["all", "conv", "linear", "kxk"] = "all",
    leave_out: list[str] | None = None,
    pays: Literal["counted", "measured", "always"] = "counted",
    every: int | None = 20,
    nuclear: float = 3e-4,
    epochs: int = 5,
    tune: int = 0,
    learning_rate: float = 0.01,
    batch_size: int = 128,
    keep_norm: bool | None = None,
    seed: int = 0,
) -> Network:
    """A smaller, faster network: trained for a while so that its layers can be cut to low rank and it just works.

    network: a classifier of the classes of `train`; a convolutional network or any other with Linear layers.
    train: what it is trained on, best of the task it was made for.
    validation: what the accuracies of the report are measured on; nothing is chosen by it.
    keep: share of the whole network's cost that may remain, such as 0.5; one energy for all layers is then found to meet it. None: use `energy`.
    budget: what `keep` counts, and what a cut layer must have less of: multiply-adds (macs) or parameters.
    energy: share of the squared singular values that each layer keeps, when `keep` is not given.
    scheme: how a convolution of h x w becomes two: channel (h x w, then 1 x 1) or spatial (h x 1, then 1 x w).
    layers: which may be cut: all; conv, linear; kxk for convolutions larger than 1 x 1 (the paper). Never the head or the one that reads the picture.
    leave_out: names of layers, or of blocks that hold them, that stay as they are.
    pays: when a layer is cut: only where two layers cost less than one, counted, or measured as time on this machine as well; or,
        without `keep`, always.
    every: steps between two projections; None trains without them, so that the cut comes unprepared.
    nuclear: weight of the nuclear norm in the steps that follow a projection; 0 leaves it out.
    epochs: of training before the cut; 0 cuts at once.
    tune: epochs of training after the cut, of the two layers of each.
    learning_rate, batch_size: of SGD with momentum 0.9, weight decay 1e-4 and a cosine schedule.
    keep_norm: batch norms keep the means and variances that they came with; no: they learn along and are estimated anew on `train` after the
        cut. None: kept where new ones would raise the loss on `train` by more than 0.1, as in a network that was tuned with kept ones.
    seed: of the order of the examples.

    The report "rank pruning" has the rank and the cost of each layer, the layers that were left out and why, parameters, multiply-adds and
    milliseconds before and after, the accuracy before training, before and after the cut, and says so when the result is not faster.
    Raises BadInput for no layer that can be cut, an energy outside (0, 1], a budget that rank 1 everywhere does not meet (with the smallest
    that it does), `every` below 1, and a network that is no classifier of these classes.
    Source: Xu et al. 2020, arXiv 2004.14566.
    """
    for right, sentence in (
        (every is None or every >= 1, f"every is {every}: give at least 1 step, or None"),
        (nuclear >= 0, f"nuclear is {nuclear}: give a weight of at least 0"),
        (0 < energy <= 1, f"energy is {energy}: give the share of the squared singular values to keep, above 0 and at most 1"),
        (epochs >= 0 and tune >= 0, f"epochs is {epochs} and tune {tune}: give at least 0"),
    ):
        if not right:
            raise BadInput(sentence)
    known_classes(network, train, "train")
    found, left = ranks.find_layers(network, scheme=scheme, which=layers, leave_out=leave_out or ())
    limit = 0.0 if keep is None else ranks.limit_for(network, found, keep, budget)

    def choose(values: Mapping[str, Tensor]) -> tuple[dict[str, int], float]:
        if keep is None:
            return ranks.ranks_for_energy(found, values, energy, measure=budget, pays=pays != "always"), energy
        return ranks.ranks_for_budget(found, values, limit, measure=budget)

    original = spectra(network.module, found)
    start, _ = choose({path: spectrum.values for path, spectrum in original.items()})
    if pays == "measured":
        slower = {path: times for path, times in ranks.milliseconds(network, found, start).items() if times[1] >= times[0]}
        left |= {path: f"two layers of rank {start[path]} take {twice:.3f} ms, one takes {once:.3f} ms" for path, (once, twice) in slower.items()}
        found = [layer for layer in found if layer.path not in slower]
        limit = 0.0 if keep is None else ranks.limit_for(network, found, keep, budget)
    if not found:
        why = "; ".join(f"{path}: {reason}" for path, reason in list(left.items())[:3])
        raise BadInput(f"no layer of this network can be cut as asked ({why or 'it has none of that kind'}): change layers, pays or leave_out")

    accuracies: dict[str, float] = {}

    def note(stage: str, each: Network) -> None:
        if validation is not None:
            accuracies[stage] = score(each, validation)

    note("before training", network)
    trained = network.copy()
    norm_rows = subset(train, np.random.default_rng(seed).permutation(len(train))[:NORM_ROWS])
    if keep_norm is None:
        keep_norm = needs_its_norm(network, norm_rows)
    options: dict[str, Any] = {"learning_rate": learning_rate, "batch_size": batch_size, "keep_norm": keep_norm, "seed": seed}
    if epochs:
        train_low_rank(trained, train, found, choose, every=every, nuclear=nuclear, epochs=epochs, **options)
        note("trained, whole", trained)
    chosen, reached, _ = project(trained.module, found, choose)
    small = ranks.cut(trained, found, chosen)
    note("cut", small)
    if not keep_norm and chosen and norm_layers(small.module) and len(train) > 1:
        reestimate_norm(small, norm_rows)
        note("cut, batch norm re-estimated", small)
    if tune:
        train_low_rank(small, train, [], choose, every=None, nuclear=0.0, epochs=tune, name="training after the cut", **options)
        note("cut, trained on", small)

    timed, warned = ranks.compared(network, small)
    if not chosen:
        warned.insert(0, f"no layer was cut: at energy {reached:.3g} two layers cost as much as one everywhere; lower energy, or give keep")
    figures: dict[str, Any] = {
        "parameters": timed[1]["parameters, M"] / timed[0]["parameters, M"],
        "multiply-adds": timed[1]["MACs, M"] / timed[0]["MACs, M"],
        "layers cut": len(chosen),
        "energy": reached,
    }
    if validation is not None:
        figures |= {f"accuracy {stage}": value for stage, value in accuracies.items()}
        small.measured = [{"data": name_of(validation), "rows": len(validation), "metrics": {"accuracy": list(accuracies.values())[-1]}}]
    small.reports["rank pruning"] = Report(
        f"{len(chosen)} of {len(found)} layers cut to low rank",
        figures,
        tables={
            "cost": timed,
            "layers": ranks.table(found, chosen, original),
            "left out": [{"layer": path, "because": reason} for path, reason in left.items()],
        },
        text="Parameters and multiply-adds are shares of what they were. "
        f"Cut in the {scheme} scheme, to ranks from one energy of {reached:.4g} for all layers.",
        pictures={"accuracy": bar_chart(accuracies, x=f"accuracy on {name_of(validation)}", from_zero=False)} if validation is not None else {},
        warnings=warned,
    )
    return small

