"""Stitchable neural networks: pre-trained networks of several sizes become one of any size between (Pan et al. 2023, arXiv 2302.06586)."""

from __future__ import annotations

import copy
import itertools
import time
import warnings
from collections.abc import Sequence
from typing import Any, Literal

import numpy as np
import torch
from datasets import Dataset
from torch import Tensor, nn
from torch.nn import functional as F

from wellread import runtime
from wellread.batches import network_batches
from wellread.chain import Chain, Stitch, chain, fed_differently, stitch
from wellread.charts import front_chart
from wellread.data import Labelled, Unlabelled, labels, name_of, subset
from wellread.errors import BadInput
from wellread.evaluate import predict
from wellread.features import capture, running, to_device
from wellread.lineage import merged
from wellread.meter import macs, row
from wellread.method import known_classes, method
from wellread.network import Network, build
from wellread.norm import norm_layers
from wellread.results import Front, Report
from wellread.structure import class_name
from wellread.train import fit

Pair = tuple[int, int, int]  # run the front's blocks 0...j, the stitching layer of this number, the back's blocks from k on

# --- where to stitch (section 3.3 of the paper)


def paired(depth: int, kernel: int = 2, stride: int = 1) -> list[Pair]:
    """Two networks of equal depth: all (j, k) inside a sliding window of `kernel` blocks; those of one window share a layer, the first that has them."""
    found: dict[tuple[int, int], int] = {}
    for layer, start in enumerate(range(0, depth, stride)):
        window = range(start, min(start + kernel, depth))
        for pair in itertools.product(window, window):
            found.setdefault(pair, layer)
    return [(j, k, layer) for (j, k), layer in found.items()]


def unpaired(front: int, back: int) -> list[Pair]:
    """Two networks of different depth: block k of the back belongs to block floor(k * front / back) of the front, where that lies before it."""
    nearest = [(k * front // back, k) for k in range(1, back)]
    return [(j, k, j) for j, k in nearest if j < k or front > back]


def positions(front: Sequence[int], back: Sequence[int]) -> list[Pair]:
    """Where to stitch two networks whose stages have so many blocks: inside each stage, all counted over the whole network.

    Networks with different numbers of stages are taken as one stage each.
    """
    if len(front) != len(back):
        front, back = [sum(front)], [sum(back)]
    found: list[Pair] = []
    for stage, (a, b) in enumerate(zip(front, back, strict=True)):
        before = sum(front[:stage]), sum(back[:stage])
        layers = 1 + max((layer for _, _, layer in found), default=-1)
        inside = paired(a) if a == b else unpaired(a, b)
        found += [(j + before[0], k + before[1], layer + layers) for j, k, layer in inside]
    return found


# --- the least-squares start


class Regression:
    """The linear map with bias from x to y of least squares, over rows that come in batches: float64, memory quadratic in the widths."""

    def __init__(self, width_in: int, width_out: int) -> None:
        self.rows = 0
        self._shift_x, self._shift_y = torch.zeros(width_in, dtype=torch.float64), torch.zeros(width_out, dtype=torch.float64)
        self._x, self._y = self._shift_x.clone(), self._shift_y.clone()
        self._xx = torch.zeros(width_in, width_in, dtype=torch.float64)
        self._xy = torch.zeros(width_in, width_out, dtype=torch.float64)

    def update(self, x: Tensor, y: Tensor) -> None:
        """Add rows x [N, i], y [N, o]."""
        x, y = x.to("cpu", torch.float64), y.to("cpu", torch.float64)
        if self.rows == 0:
            self._shift_x, self._shift_y = x.mean(0), y.mean(0)  # products around a point near the means: around zero digits would cancel
        x, y = x - self._shift_x, y - self._shift_y
        self.rows += len(x)
        self._x, self._y = self._x + x.sum(0), self._y + y.sum(0)
        self._xx += x.T @ x
        self._xy += x.T @ y

    def solve(self, ridge: float = 0.0) -> tuple[Tensor, Tensor]:
        """weight [o, i] and bias [o]. ridge: penalty on the weight's squares, in units of the mean variance of x; the bias is free.

        Of several solutions (ridge 0, features that depend on each other) the one of least norm.
        """
        mean_x, mean_y = self._x / self.rows, self._y / self.rows
        covariance = self._xx / self.rows - mean_x[:, None] * mean_x
        covariance = covariance + ridge * covariance.diagonal().mean() * torch.eye(len(mean_x), dtype=torch.float64)
        weight = torch.linalg.lstsq(covariance, self._xy / self.rows - mean_x[:, None] * mean_y, driver="gelsd").solution.T
        return weight, self._shift_y + mean_y - weight @ (self._shift_x + mean_x)


def rows_of(hidden: Tensor, mask: Tensor | None = None) -> Tensor:
    """[N, C]: the places of maps [B, C, h, w], or the tokens of [B, T, C], of those that are words where mask [B, T] says so."""
    if hidden.ndim == 4:
        return hidden.permute(0, 2, 3, 1).flatten(0, 2)
    return hidden.flatten(0, 1) if mask is None else hidden[mask.bool()]


def least_squares(front: Network, back: Network, chains: tuple[Chain, Chain], pairs: Sequence[Pair], data: Dataset, ridge: float) -> dict[Pair, Stitch]:
    """For each pair the layer from the output of the front's block j to the input of the back's block k; pairs whose grids differ are left out.

    Both networks run in evaluation mode on all of `data`. Raises `BadInput` when these are fewer rows than the solution has unknowns.
    """
    ahead, behind = chains[0].blocks, chains[1].blocks
    used = {ahead[j] for j, _, _ in pairs}, {behind[k] for _, k, _ in pairs}
    sums: dict[Pair, Regression] = {}
    places: dict[Pair, bool] = {}
    device = runtime.device()
    batches = network_batches(front, data, batch_size=32, label=False)
    with running(front, device), running(back, device), torch.inference_mode():
        for batch in runtime.track(batches.epoch(0), "least squares", total=len(batches)):
            given = to_device(batch["inputs"], device)
            mask = given.get("attention_mask") if isinstance(given, dict) else None
            with capture(front.module, sorted(used[0])) as outputs:
                front(given)
            with capture(back.module, sorted(used[1]), inputs=True) as inputs:
                back(given)
            for pair in pairs:
                x, y = outputs[ahead[pair[0]]], inputs[behind[pair[1]]]
                maps = x.ndim == 4
                if x.ndim != y.ndim or (x.shape[2:] != y.shape[2:] if maps else x.shape[1] != y.shape[1]):
                    continue
                x, y = rows_of(x, mask), rows_of(y, mask)
                sums.setdefault(pair, Regression(x.shape[1], y.shape[1])).update(x, y)
                places[pair] = maps
    found = {}
    for pair, regression in sums.items():
        wide = len(regression._shift_x)
        if regression.rows <= wide:
            raise BadInput(
                f"calibration gives {regression.rows} rows for {wide + 1} unknowns of each output (after block {pair[0]}): give at least "
                f"{-(-len(data) * (wide + 1) // regression.rows)} examples"
            )
        weight, bias = regression.solve(ridge)
        found[pair] = Stitch(wide, len(bias), places[pair])
        found[pair].set(weight, bias)
    return found


def mean_stitch(layers: Sequence[Stitch]) -> Stitch:
    """The layer that several pairs share starts at the mean of their solutions."""
    shared = copy.deepcopy(layers[0])
    for name, parameter in shared.named_parameters():
        parameter.data = torch.stack([layer.get_parameter(name).detach().double() for layer in layers]).mean(0).float()
    return shared


# --- all sizes in one module


class Stitchable(nn.Module):
    """Several networks and the layers between them; `choice` says which of the configurations runs.

    network: the smallest anchor. others: `Network.structure` of the larger ones, built with fresh weights. chains: `Chain.record` of each anchor.
    heads: dotted path of each one's head. stitches: the arguments of each `Stitch`. configurations: {"front": a} for an anchor alone, else
    {"front", "until", "back", "since", "layer"}: the first `until` blocks of anchor `front`, stitch `layer`, the blocks of `back` from `since` on.
    """

    steps: Tensor

    def __init__(
        self,
        network: nn.Module,
        others: list[dict[str, Any]],
        chains: list[dict[str, Any]],
        heads: list[str | None],
        stitches: list[dict[str, Any]],
        configurations: list[dict[str, int]],
        choice: int,
    ) -> None:
        super().__init__()
        self.anchors = nn.ModuleList([network, *map(build, others)])
        self.chains, self.heads, self.shapes = [Chain.of(**record) for record in chains], heads, stitches
        self.stitches = nn.ModuleList([Stitch(**shape) for shape in stitches])
        self.configurations, self.choice = configurations, choice
        self.register_buffer("steps", torch.zeros((), dtype=torch.int64), persistent=False)  # of the tuning; decides what is drawn
        self.to(next(network.parameters(), torch.empty(0)))

    def forward(self, x: Tensor | None = None, **tokens: Tensor) -> Tensor:
        chosen, batch = self.configurations[self.choice], tokens if x is None else x
        front = self.anchors[chosen["front"]]
        if "back" not in chosen:
            return front(**tokens) if x is None else front(x)
        ahead, behind, back = self.chains[chosen["front"]], self.chains[chosen["back"]], self.anchors[chosen["back"]]
        state = ahead.stem(front, batch)
        for path in ahead.blocks[: chosen["until"]]:
            state = ahead.block(front, path, state)
        state = state._replace(hidden=self.stitches[chosen["layer"]](state.hidden))
        for path in behind.blocks[chosen["since"] :]:
            state = behind.block(back, path, state)
        return behind.head(back, state)


def super_network(anchors: Sequence[Network], chains: Sequence[Chain], layers: Sequence[dict[Pair, Stitch]]) -> Network:
    """One network of all configurations: each anchor, and for each two neighbours (smaller first) the pairs in `layers`. It is set to the largest."""
    configurations: list[dict[str, int]] = [{"front": i} for i in range(len(anchors))]
    shared: dict[tuple[int, ...], list[Stitch]] = {}
    for i, found in enumerate(layers):
        for (j, k, number), layer in found.items():
            key = (i, number, *layer.map.weight.shape)  # type: ignore[union-attr]
            shared.setdefault(key, []).append(layer)  # at the edge of a stage widths may differ: then they cannot share
            configurations.append({"front": i, "until": j + 1, "back": i + 1, "since": k, "layer": list(shared).index(key)})
    stitches = [mean_stitch(several) for several in shared.values()]
    arguments = {
        "others": [copy.deepcopy(each.structure) for each in anchors[1:]],
        "chains": [each.record for each in chains],
        "heads": [each.head for each in anchors],
        "stitches": [layer.arguments for layer in stitches],
        "configurations": configurations,
        "choice": len(anchors) - 1,
    }
    last = anchors[-1]
    made = anchors[0].edited(
        {"edit": "wrap", "part": class_name(Stitchable), "arguments": arguments},
        head=f"anchors.{len(anchors) - 1}.{last.head}" if last.head else None, labels=last.labels, output=last.output,
    )  # fmt: skip
    module: Any = made.module
    for anchor, given in zip(module.anchors[1:], anchors[1:], strict=True):
        anchor.load_state_dict(given.module.state_dict())
    for mine, layer in zip(module.stitches, stitches, strict=True):
        mine.load_state_dict(layer.state_dict())
    module.to(memory_format=torch.contiguous_format)  # as it will be loaded: another layout rounds differently
    made.lineage = merged([each.lineage for each in anchors])
    return made


def cut(network: Network, number: int) -> Network:
    """One configuration of a super-network as a network of its own, which holds nothing else."""
    module = network.module
    if not isinstance(module, Stitchable) or network.edits[-1].get("part") != class_name(Stitchable):
        raise BadInput("this is no super-network of stitchable: give one that it returned, before other changes")
    if not 0 <= number < len(module.configurations):
        raise BadInput(f"there is no configuration {number}: this super-network has 0 to {len(module.configurations) - 1}")
    chosen = module.configurations[number]

    def anchor(i: int) -> Network:
        arguments = network.edits[-1]["arguments"]
        made_of: dict[str, Any] = {"architecture": network.architecture, "edits": network.edits[:-1]} if i == 0 else arguments["others"][i - 1]
        return Network(
            copy.deepcopy(module.anchors[i]), network.input, module.heads[i], network.labels, network.output,
            copy.deepcopy(made_of["architecture"]), copy.deepcopy(made_of["edits"]), list(network.lineage),
        )  # fmt: skip

    front = anchor(chosen["front"])
    if "back" not in chosen:
        return front
    layer: Any = module.stitches[chosen["layer"]]
    chains = module.chains[chosen["front"]], module.chains[chosen["back"]]
    return stitch(front, chosen["until"], anchor(chosen["back"]), chosen["since"], layer, chains=chains)


def tune(
    network: Network,
    train: Dataset,
    *,
    epochs: int,
    learning_rate: float,
    optimizer: Literal["sgd", "adamw"] = "sgd",
    batch_size: int = 64,
    tune_anchors: bool = True,
    teacher: np.ndarray | None = None,
    seed: int = 0,
) -> list[float]:
    """Train all configurations of a super-network together, in place: at each step one, drawn evenly. The losses of the steps.

    teacher: int64 [N], classes for the rows of `train`, which count half (hard distillation); without it the labels count alone.
    Batch norm keeps its statistics, as those that one configuration moves would be wrong for the others; it then bounds no step, so the gradient
    is clipped at 1. All processes draw the same configuration.
    """
    super_module: Any = network.module
    taught = None if teacher is None else torch.from_numpy(np.asarray(teacher))
    batches = network_batches(network, train, batch_size=batch_size, shuffle=True, seed=seed)
    frozen = norm_layers(super_module)
    super_module.steps.zero_()
    before = super_module.choice
    drawn = [number for number, chosen in enumerate(super_module.configurations) if tune_anchors or "back" in chosen]  # networks alone have no stitch

    def step(module: Any, batch: dict[str, Any]) -> Tensor:
        for layer in frozen:
            layer.eval()
        module.choice = int(np.random.default_rng((seed, int(module.steps))).choice(drawn))
        module.steps += 1
        inputs = batch["inputs"]
        logits = module(**inputs) if isinstance(inputs, dict) else module(inputs)
        loss = F.cross_entropy(logits, batch["label"])
        return loss if taught is None else 0.5 * loss + 0.5 * F.cross_entropy(logits, taught[batch["index"].cpu()].to(logits.device))

    settings: dict[str, Any] = {"optimizer": optimizer, "weight_decay": 1e-4, "momentum": 0.9 if optimizer == "sgd" else 0.0}
    trained = None if tune_anchors else super_module.stitches.parameters()
    history = fit(
        super_module, batches, step, epochs=epochs, learning_rate=learning_rate, parameters=trained, warmup=0.1, clip=1.0, seed=seed, name="stitches", **settings
    )
    super_module.choice = before
    return history.loss


# --- the method


def describe(configuration: dict[str, int], names: Sequence[str]) -> str:
    """In words: which blocks of which network."""
    if "back" not in configuration:
        return f"all of {names[configuration['front']]}"
    return f"{names[configuration['front']]} to block {configuration['until']}, {names[configuration['back']]} from block {configuration['since'] + 1}"


def quality(network: Network, data: Dataset, truth: np.ndarray) -> float:
    """The share of rows whose class is truth [N]; for embeddings [N, d] as truth, the mean cosine to them."""
    found = predict(network, data)
    if truth.ndim == 1:
        return float((found.argmax(1) == truth).mean())
    return float(F.cosine_similarity(torch.from_numpy(found), torch.from_numpy(truth)).mean())


@method
def stitchable(
    networks: list[Network],
    calibration: Unlabelled,
    train: Labelled | None = None,
    validation: Labelled | None = None,
    *,
    budget: float | None = None,
    samples: int = 200,
    ridge: float = 1e-6,
    epochs: int = 5,
    learning_rate: float = 0.01,
    optimizer: Literal["sgd", "adamw"] = "sgd",
    batch_size: int = 64,
    tune_anchors: bool = True,
    distill: bool = False,
    timing: bool = True,
    seed: int = 0,
) -> Network:
    """One network of any size between those of a small and a large one, without training or after a little.

    networks: two or more for the same task, fed alike; sorted by cost when they are not. Or one super-network that this method made: then it is
        tuned on, measured anew, or cut to the budget.
    calibration: examples on which the stitching layers are solved; no labels are read.
    train: with it, all sizes are tuned together; without it nothing is trained, which takes minutes and is often enough.
    validation: decides how good each size is; without it that is the agreement with the largest network on the calibration examples.
    budget: cost of the network that comes back, as a share of the largest one's multiply-accumulates (0 to 1): the best size below it, on its own.
        Without it, the super-network of all sizes comes back, set to the largest.
    samples: how many calibration examples the stitching layers are solved on; the others measure agreement.
    ridge: penalty in the least squares, in units of the mean variance of the features.
    epochs, learning_rate, optimizer, batch_size: of the tuning. For transformers adamw with about 5e-5 is the authors' choice.
    tune_anchors: no: the given networks stay as they are, and only the stitching layers are trained.
    distill: half of the loss takes the largest network's answers for the labels.
    timing: measure the milliseconds of every size.
    seed: of the order of the data and of the sizes drawn.

    The report "stitchable" lists every size with its parameters, multiply-accumulates, milliseconds and quality; `cut(network, number)` takes one out.
    Raises BadInput for networks that are no chains of known blocks, are fed differently or have other classes, for a budget below the smallest
    size, and when the calibration examples are too few for the widths.
    Source: Pan, Cai, Zhuang 2023, arXiv 2302.06586.
    """
    given = [networks[i] for i in range(len(networks))]
    for each in given:
        each.check_finite()
    order = np.random.default_rng(seed).permutation(len(calibration))
    solved_on = subset(calibration, np.sort(order[:samples]))
    rest = subset(calibration, np.sort(order[samples : samples + 1000])) if len(calibration) > samples else solved_on
    for table, name in ((train, "train"), (validation, "validation")):
        if table is not None:
            known_classes(given[-1], table, name)
    if budget is not None and not 0 < budget <= 1:
        raise BadInput(f"budget is {budget}: give a share of the largest network's cost, above 0 and at most 1")
    if samples < 1:
        raise BadInput(f"samples is {samples}: give at least 1")
    figures: dict[str, Any] = {}
    if len(given) == 1 and isinstance(given[0].module, Stitchable):
        made = given[0].copy()
    else:
        made, figures["seconds of least squares"] = stitched_by_least_squares(given, solved_on, ridge)
    module: Any = made.module
    anchors = len(module.anchors)
    largest = cut(made, anchors - 1)
    data = rest if validation is None else validation
    if validation is not None:
        truth = labels(validation)
    else:
        outputs = predict(largest, rest)
        truth = outputs.argmax(1) if made.output == "logits" else outputs
    if train is not None:
        teacher = predict(largest, train).argmax(1) if distill else None
        options: dict[str, Any] = {"optimizer": optimizer, "batch_size": batch_size, "tune_anchors": tune_anchors, "seed": seed}
        losses = tune(made, train, epochs=epochs, learning_rate=learning_rate, teacher=teacher, **options)
        figures |= {"steps of tuning": len(losses)}
    measure = "accuracy" if validation is not None else "agreement with the largest" if truth.ndim == 1 else "cosine to the largest"
    names = [f"network {i + 1}" for i in range(anchors)]
    table = []
    numbers = range(len(module.configurations))
    for number in runtime.track(numbers, "measuring sizes", total=len(numbers)):
        one = cut(made, number)
        found = row(describe(module.configurations[number], names), one, (1,) if timing else (), seconds=0.5)
        with runtime.using(progress=False):
            table.append({"number": number, "size": found.pop("network"), measure: quality(one, data, truth), **found})
    if truth.ndim == 1 and table[0][measure] < 2 / max(2, len(made.labels or (0, 0))) and table[0][measure] < 0.5 * table[anchors - 1][measure]:
        warnings.warn("the smallest and the largest network answer differently: are their classes in the same order?", stacklevel=3)
    front = Front(table, "MACs, M", measure)
    figures = {"sizes": len(table), "stitching layers": len(module.stitches), "efficient sizes": len(front.efficient())} | figures
    text = (
        f"{measure} on {name_of(data)}" + (", examples that the layers were solved on" if data is solved_on else "") + ". "
        "Batch norm keeps the statistics of the given networks. "
        + ("Nothing was trained." if train is None else "Trained: " + ("everything." if tune_anchors else "the stitching layers alone."))
    )
    if budget is not None:
        allowed = budget * table[anchors - 1]["MACs, M"]
        if min(each["MACs, M"] for each in table) > allowed:
            least = min(each["MACs, M"] for each in table) / table[anchors - 1]["MACs, M"]
            raise BadInput(f"budget {budget:g} cannot be met: the smallest size costs {least:.3f} of the largest")
        chosen = front.best(allowed)
        made = cut(made, int(chosen["number"]))
        figures |= {"number": chosen["number"], measure: chosen[measure], "share of the largest cost": chosen["MACs, M"] / table[anchors - 1]["MACs, M"]}
    tables = {"sizes": sorted(table, key=lambda each: each["MACs, M"])}
    made.reports["stitchable"] = Report(f"{len(table)} sizes", figures, tables, text, pictures={"front": front_chart(front)})
    return made


def stitched_by_least_squares(networks: Sequence[Network], data: Dataset, ridge: float = 1e-6) -> tuple[Network, float]:
    """The super-network of anchors that are sorted here, no training; and the seconds that the least squares took."""
    if len(networks) < 2:
        raise BadInput("one network was given: give at least two of different sizes, or a super-network that stitchable made")
    costs = [macs(each) for each in networks]
    anchors = [networks[i] for i in np.argsort(costs, kind="stable")]
    if costs != sorted(costs):
        warnings.warn(f"the networks were sorted by cost ({', '.join(f'{cost / 1e6:.1f}' for cost in sorted(costs))} M MACs)", stacklevel=4)
    chains = [chain(each) for each in anchors]
    started = time.perf_counter()
    layers = []
    for i, (front, back) in enumerate(itertools.pairwise(anchors)):
        if why := fed_differently(front, back):
            raise BadInput(why)
        if front.output != back.output or (front.labels and back.labels and front.labels != back.labels):
            raise BadInput(f"networks {i + 1} and {i + 2} have other outputs or classes, or these in another order: stitching needs the same task")
        sizes = [predict(each, subset(data, [0])).shape[1] for each in (front, back)]
        if sizes[0] != sizes[1]:
            what = "classes" if back.output == "logits" else "numbers in their embeddings"
            raise BadInput(f"networks {i + 1} and {i + 2} have {sizes[0]} and {sizes[1]} {what}: stitching needs the same task and output")
        pairs = positions([len(stage) for stage in chains[i].stages], [len(stage) for stage in chains[i + 1].stages])
        layers.append(least_squares(front, back, (chains[i], chains[i + 1]), pairs, data, ridge))
        if not layers[-1]:
            raise BadInput(f"networks {i + 1} and {i + 2} have nowhere the same grid of places or tokens: they cannot be stitched")
    taken = time.perf_counter() - started
    return super_network(anchors, chains, layers), taken
