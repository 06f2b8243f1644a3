"""SortedNet: one set of weights from which nested smaller networks are cut, without a search and without a second training
(Valipour et al. 2023, arXiv 2309.00255).

A size keeps the first blocks of each list of blocks and, if wanted, the most important share of the channels inside the blocks. Sizes are nested:
what a small one keeps is part of what a larger one keeps. In training, each pass goes through one size drawn at random, and its gradient reaches
only the weights of that size.

How a size shares the weights: it is a list of edits, and edits only select. Applied to a copy of the network whose weights are numbered, they
tell which entry of the cut network is which entry of the whole. The pass then runs the cut network itself on the selected weights.
"""

from __future__ import annotations

import copy
import itertools
import json
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal

import numpy as np
import torch
from datasets import Dataset
from torch import Tensor, nn
from torch.func import functional_call
from torch.nn import functional as F

from wellread import structure
from wellread.batches import Batches, network_batches
from wellread.chain import chain
from wellread.data import Labelled, name_of, subset
from wellread.errors import BadInput
from wellread.evaluate import score
from wellread.features import example_batch
from wellread.lineage import step as lineage_step
from wellread.meter import macs as count_macs
from wellread.meter import milliseconds as time_of
from wellread.meter import parameters as count_parameters
from wellread.method import known_classes, method
from wellread.network import Network
from wellread.norm import norm_layers, reestimate_norm
from wellread.results import Report, Scores
from wellread.runtime import track, using
from wellread.structure import layer_of
from wellread.train import History, fit

MANY = 512  # sizes that are trained at most
NORM_ROWS = 1024  # examples from which batch norm is re-estimated

Edits = list[dict[str, Any]]


# --- sizes


@dataclass(frozen=True)
class Sizes:
    """What can be cut.

    lists: dotted path of each list of blocks to (fewest, all) of its blocks. shares: of the channels inside the blocks, widest first.
    widths: the edit that leaves each share below 1.
    """

    lists: dict[str, tuple[int, int]]
    shares: tuple[float, ...] = (1.0,)
    widths: dict[float, dict[str, Any]] = field(default_factory=dict)

    @property
    def full(self) -> str:
        return size_name([most for _, most in self.lists.values()])

    def every(self) -> list[str]:
        """Every size, smallest depths first, full last."""
        depths = list(itertools.product(*(range(fewest, most + 1) for fewest, most in self.lists.values())))
        return [size_name(depth, share) for share in reversed(self.shares) for depth in depths]

    def path(self) -> list[str]:
        """Sizes that contain each other, from the smallest to the full one: from that, the last block of the longest list is left out in turn."""
        depth = [most for _, most in self.lists.values()]
        fewest = [low for low, _ in self.lists.values()]
        found = [size_name(depth)]
        while depth != fewest:
            longest = max((i for i in range(len(depth)) if depth[i] > fewest[i]), key=lambda i: (depth[i] - fewest[i], i))
            depth[longest] -= 1
            found.append(size_name(depth))
        return [size_name(parse(name)[0], share) for share in reversed(self.shares) for name in reversed(found)]

    def check(self, name: str) -> str:
        """The size in its usual spelling. Raises `BadInput` when the network does not have it."""
        depth, share = parse(name)
        if len(depth) != len(self.lists):
            raise BadInput(f"the size {name!r} has {len(depth)} numbers, and the network {len(self.lists)} lists of blocks ({', '.join(self.lists)})")
        for number, (path, (fewest, most)) in zip(depth, self.lists.items(), strict=True):
            if not fewest <= number <= most:
                why = f": block {fewest} of it changes the shape and stays" if fewest > 1 and number < fewest else ""
                raise BadInput(f"the size {name!r} keeps {number} blocks of {path}, which can keep {fewest} to {most}{why}")
        if share not in self.shares:
            raise BadInput(f"the size {name!r} has the share {share:g}, and the shares are {', '.join(f'{each:g}' for each in self.shares)}")
        return size_name(depth, share)

    def edits(self, name: str) -> Edits:
        """What cuts this size out of the whole network; nothing for the full size."""
        depth, share = parse(name)
        edits = [self.widths[share]] if share in self.widths else []
        for number, (path, (_, most)) in zip(depth, self.lists.items(), strict=True):
            if number < most:
                edits.append({"edit": "keep_blocks", "blocks": path, "keep": list(range(number))})
        return edits


def size_name(depth: Sequence[int], share: float = 1.0) -> str:
    """ "3-2-5" for three, two and five blocks; "3-2-5@0.5" with half of the inner channels. """
    return "-".join(map(str, depth)) + (f"@{share:g}" if share != 1.0 else "")


def parse(name: str) -> tuple[list[int], float]:
    """Blocks of each list, and the share of the inner channels."""
    depth, _, share = name.partition("@")
    try:
        return [int(number) for number in depth.split("-")], float(share) if share else 1.0
    except ValueError:
        raise BadInput(f"the size {name!r} cannot be read: write 3-2-5 for 3, 2 and 5 blocks, 3-2-5@0.5 with half of the inner channels") from None


def block_lists(network: Network) -> dict[str, tuple[int, int]]:
    """Dotted path of each list of blocks to (fewest, all): blocks up to the last one that changes the shape must stay, and at least one.

    Lists from which nothing can be left out are not in it. Raises `BadInput` when the network has no blocks that are known.
    """
    view = chain(network)
    shapes: list[tuple[int, ...]] = []
    with torch.no_grad():
        state = view.stem(network.module, example_batch(network))
        shapes.append(tuple(state.hidden.shape))
        for path in view.blocks:
            state = view.block(network.module, path, state)
            shapes.append(tuple(state.hidden.shape))
    needed: dict[str, int] = {}
    count: dict[str, int] = {}
    for number, path in enumerate(view.blocks):
        parent = path.rpartition(".")[0]
        count[parent] = count.get(parent, 0) + 1
        if shapes[number] != shapes[number + 1]:
            needed[parent] = count[parent]
    found = {}
    for parent, blocks in count.items():
        holder = layer_of(network.module, parent)
        fewest = max(1, needed.get(parent, 1))
        if isinstance(holder, nn.Sequential | nn.ModuleList) and len(holder) == blocks and fewest < blocks:
            found[parent] = (fewest, blocks)
    if not found:
        raise BadInput("this network has no list of blocks from which one can be left out: every block changes the shape, or there is one only")
    return found


def width_edits(network: Network, shares: Sequence[float]) -> dict[float, dict[str, Any]]:
    """{share: edit}: the channels and heads inside single blocks, the most important share of each group.

    Important are those with the largest weights (sum of absolute values of the rows that make them), judged once, so the widths are nested.
    """
    from wellread.coupling import channel_groups, keep

    blocks = chain(network).blocks
    inner = []
    for group in channel_groups(network):
        block = next((path for path in blocks if group.name.startswith(f"{path}.")), None)
        if block is not None and all(member.path.startswith(f"{block}.") for member in group.members):
            inner.append(group)
    if not inner:
        raise BadInput("this network has no channels that lie inside one block: leave widths out")
    order = {}
    for group in inner:
        total = torch.zeros(group.units)
        for member in group.producers:
            weight: Any = layer_of(network.module, member.path).weight
            rows = weight.detach().float().cpu().abs().flatten(1).sum(1)
            total += torch.stack([rows[list(channels)].sum() for channels in member.channels])
        order[group] = total.argsort(descending=True, stable=True).tolist()
    return {share: keep(network, {group: order[group][: max(1, round(share * group.units))] for group in inner}) for share in shares}


def find_sizes(network: Network, shares: Sequence[float] = (1.0,)) -> Sizes:
    """All that can be cut from a network. Raises `BadInput` for shares outside (0, 1], or given twice."""
    ordered = tuple(sorted({1.0, *shares}, reverse=True))
    if not all(0 < share <= 1 for share in shares) or len(set(shares)) < len(shares):
        raise BadInput(f"the widths are {', '.join(f'{share:g}' for share in shares)}: give shares above 0 and up to 1, each once")
    return Sizes(block_lists(network), ordered, width_edits(network, ordered[1:]) if len(ordered) > 1 else {})


# --- a size as a selection of the weights


class Selection:
    """One size of a network, run on the weights of the whole one.

    module: the whole network; edits: what cuts the size out. Holds the form of the cut network and, for each of its tensors, where its entries lie.
    """

    def __init__(self, module: nn.Module, edits: Edits) -> None:
        numbered = copy.deepcopy(module).double()
        starts, names, first = [], [], 0
        for name, tensor in _tensors(numbered).items():
            tensor.data = torch.arange(first, first + tensor.numel(), dtype=torch.float64).view(tensor.shape)
            starts.append(first)
            names.append(name)
            first += tensor.numel()
        for record in edits:
            numbered = structure.apply(numbered, record)
        self.where: dict[str, tuple[str, Tensor | None]] = {}  # tensor of the cut network: tensor of the whole, numbers in it (None: all of it)
        whole = _tensors(module)
        for name, tensor in _tensors(numbered).items():
            numbers = tensor.detach().long()
            place = int(np.searchsorted(starts, int(numbers.flatten()[0]), side="right")) - 1
            source = whole[names[place]]
            numbers = numbers - starts[place]
            if int(numbers.min()) < 0 or int(numbers.max()) >= source.numel():
                raise BadInput(f"the tensor {name!r} of a size is made of several tensors of the network: sizes can only be cut by selecting")
            all_of_it = numbers.shape == source.shape and torch.equal(numbers.flatten(), torch.arange(source.numel()))
            self.where[name] = names[place], None if all_of_it else numbers
        self.others = {name: tensor.clone() for name, tensor in numbered.named_buffers() if not tensor.is_floating_point()}  # counters, positions
        self.form = numbered.to("meta")

    def tensors(self, module: nn.Module) -> dict[str, Tensor]:
        """The tensors of the cut network, taken from the whole one; gradients flow back to it."""
        whole = _tensors(module)
        found = {}
        for name, (source, numbers) in self.where.items():
            found[name] = whole[source] if numbers is None else whole[source].flatten()[numbers.to(whole[source].device)]
        return found

    def numbers(self, module: nn.Module) -> dict[str, set[int]]:
        """{tensor of the whole network: numbers of the entries that this size keeps}."""
        whole = _tensors(module)
        return {
            source: set(range(whole[source].numel())) if numbers is None else set(numbers.flatten().tolist()) for source, numbers in self.where.values()
        }

    def __call__(self, module: nn.Module, batch: Tensor | Mapping[str, Tensor]) -> Any:
        """The output of the cut network on the weights of `module`, in the mode (training, evaluation) of `module`.

        In training, batch norm goes by the statistics of the batch and those of the network stay as they are: they belong to no single size.
        """
        self.form.train(module.training)
        tensors = self.tensors(module)
        if module.training:
            parameters = dict(self.form.named_parameters())
            tensors = {name: tensor if name in parameters else tensor.clone() for name, tensor in tensors.items()}
        others = {name: tensor.to(next(iter(tensors.values())).device, copy=True) for name, tensor in self.others.items()}
        given = (batch,) if isinstance(batch, Tensor) else ()
        out = functional_call(self.form, {**others, **tensors}, given, {} if given else dict(batch))  # type: ignore[arg-type]
        return out.logits if hasattr(out, "logits") else out


def _tensors(module: nn.Module) -> dict[str, Tensor]:
    """Parameters and buffers with fractions."""
    return {name: tensor for name, tensor in [*module.named_parameters(), *module.named_buffers()] if tensor.is_floating_point()}


# --- training


class SizedBatches(Batches):
    """Batches that also carry "size", the number of the size that their pass goes through: the same for all processes, and after a resume.

    full_share: part of the passes that goes through the last of the `sizes`, the full one, before the rest is drawn evenly from all.
    """

    def __init__(self, batches: Batches, sizes: int, full_share: float = 0.0) -> None:
        kept = {name: getattr(batches, name) for name in ("batch_size", "shuffle", "seed", "drop_last")}
        super().__init__(batches.rows, batches.get, **kept)
        self.sizes, self.full_share = sizes, full_share

    def epoch(self, number: int, *, start: int = 0, process: int = 0, processes: int = 1) -> Iterator[dict[str, Any]]:
        for batch, content in enumerate(super().epoch(number, start=start, process=process, processes=processes), start):
            random = np.random.default_rng((self.seed, number, batch))
            chosen = self.sizes - 1 if random.random() < self.full_share else int(random.integers(self.sizes))
            yield {**content, "size": chosen}


def train_nested(
    network: Network,
    sizes: Sequence[Edits],
    batches: Batches,
    loss: Callable[[Tensor, dict[str, Any]], Tensor],
    *,
    full_share: float = 0.0,
    **settings: Any,
) -> History:
    """Train a network in place so that every size works: the expectation of the loss over sizes drawn at random (section 3 of the paper).

    sizes: the edits of each, full size last. loss: (output of the size, batch) to a scalar. settings go to `fit`; `accumulate` passes, each through
    a size of its own, make one step.
    """
    selections = [Selection(network.module, edits) for edits in sizes]
    said = json.dumps([full_share, *sizes])

    def step(module: nn.Module, batch: dict[str, Any]) -> Tensor:
        assert said, "closed over, so that the checkpoint of a training with other sizes is not taken for one of this"
        return loss(selections[batch["size"]](module, batch["inputs"]), batch)

    return fit(network.module, SizedBatches(batches, len(selections), full_share), step, **settings)


# --- what was trained


def sub_network(network: Network, size: str, data: Dataset | None = None, *, untrained: bool = False) -> Network:
    """One size of a network from `sortednet`, as a network of its own that holds nothing of the rest.

    size: "3-2-5", as in the report "sortednet", or what `largest_under` says.
    data: examples from which batch norm is re-estimated, labels are not read; needed only where the report keeps no statistics for the size.
    untrained: also a size that was not trained.
    Raises `BadInput` for a size that the network does not have, and for one that was not trained.
    """
    report = _report(network)
    sizes = Sizes(
        {row["blocks"]: (row["fewest"], row["all"]) for row in report.tables["blocks"]},
        tuple(row["share"] for row in report.tables["widths"]),
        {row["share"]: row["edit"] for row in report.tables["widths"] if row["edit"]},
    )
    name = sizes.check(size)
    rows = report.tables["sizes"]
    if not untrained and name not in [row["size"] for row in rows]:
        some = [row["size"] for row in rows]
        shown = ", ".join(some[:8]) + (f", ... ({len(some)})" if len(some) > 8 else "")
        raise BadInput(f"the size {name!r} was not trained (trained are {shown}): choose one of them, or say untrained=True")
    cut = network.edited(*sizes.edits(name))
    if data is not None:
        reestimate_norm(cut, data)
    elif norm_layers(cut.module) and name != sizes.full:
        _fill_norm(cut, network, rows, name)
    cut.module.to(memory_format=torch.contiguous_format)  # type: ignore[call-overload]  # as it will be loaded: another layout rounds differently
    made = lineage_step("sortednet-size", {"size": name}, parents=[network.fingerprint], result=cut.fingerprint)
    cut.lineage = [*network.lineage, made]
    return cut


def largest_under(network: Network, *, macs: float | None = None, parameters: float | None = None, milliseconds: float | None = None) -> str:
    """The size with most multiply-accumulates that stays within all budgets: no search, a look into the report.

    macs, parameters: numbers, not millions. milliseconds: for one example, as measured when the network was trained.
    Raises `BadInput` when even the smallest is too large, and says what it needs.
    """
    budgets = {"MACs, M": macs and macs / 1e6, "parameters, M": parameters and parameters / 1e6, "ms, batch 1": milliseconds}
    asked = {column: budget for column, budget in budgets.items() if budget is not None}
    if not asked:
        raise BadInput("no budget was given: give macs, parameters or milliseconds")
    rows = [row for row in _report(network).tables["sizes"] if all(row[column] is not None for column in asked)]
    fitting = [row for row in rows if all(row[column] <= budget for column, budget in asked.items())]
    if not fitting:
        least = ", ".join(f"{min(row[column] for row in rows):.4g} {column}" for column in asked)
        raise BadInput(f"no size is that small: the smallest needs {least}")
    return max(fitting, key=lambda row: (row["MACs, M"], row["parameters, M"]))["size"]


def _report(network: Network) -> Report:
    report = network.reports.get("sortednet")
    if not isinstance(report, Report):
        raise BadInput("this network has no report of trained sizes: it is not from sortednet, or was changed since (then its sizes are lost)")
    return report


def _statistics(network: Network) -> np.ndarray:
    """float [n]: all running means and variances of batch norm, in the order of the layers."""
    layers = norm_layers(network.module)
    return torch.cat([tensor.float().cpu() for layer in layers for tensor in (layer.running_mean, layer.running_var)]).numpy().astype(np.float64)


def _fill_norm(cut: Network, network: Network, rows: list[dict[str, Any]], name: str) -> None:
    """Give the cut network the statistics that were estimated for its size."""
    kept, start = network.reports.get("sortednet norm"), 0
    for row in rows:
        if row["size"] == name and row["statistics"] and isinstance(kept, Scores):
            values = torch.from_numpy(kept.values[start : start + row["statistics"]])
            for layer in norm_layers(cut.module):
                for tensor in (layer.running_mean, layer.running_var):
                    tensor.copy_(values[: len(tensor)])
                    values = values[len(tensor) :]
            return
        start += row["statistics"] or 0
    raise BadInput(f"no batch-norm statistics were kept for the size {name!r}: give data, some examples as the network was trained on")


@method
def sortednet(
    network: Network,
    train: Labelled,
    validation: Labelled | None = None,
    *,
    sizes: list[str] | None = None,
    widths: list[float] | None = None,
    full_share: float = 0.0,
    accumulate: int = 4,
    epochs: int = 3,
    batch_size: int = 32,
    learning_rate: float = 0.01,
    optimizer: Literal["sgd", "adamw"] = "sgd",
    seed: int = 0,
) -> Network:
    """One network from which smaller ones of many depths and widths can be cut at any time, without a search and without training again.

    network: a pre-trained classifier whose blocks are known: CNNs and ViTs of timm, torchvision's ResNets, encoders with a head.
    train: labelled examples of the network's classes; batch norm of each size is estimated on some of them.
    validation: labelled examples on which each size is measured; nothing is chosen on them.
    sizes: the first blocks that each size keeps of each list of blocks, such as 3-2-5, or 3-2-5@0.5 with half of the inner channels; "all" for every
        combination; by default a path of sizes that contain each other, one block apart. The full size is always trained, too.
    widths: shares of the channels and heads inside the blocks that sizes may keep, such as 0.5; the most important ones by weight are kept.
    full_share: part of the passes that goes through the full size, beside the even draw from all.
    accumulate: passes, each through a size of its own, that make one step.
    epochs, batch_size, learning_rate, optimizer: of the fine-tuning; a cosine with a tenth warm-up; take adamw and about 1e-4 for transformers.
    seed: of the order of examples and of the sizes drawn.

    The result is the whole network; `sub_network(result, "3-2-5")` is one size as a network of its own, `largest_under(result, macs=20e6)` says which
    fits a budget. The report "sortednet" lists the sizes, what they cost and, with validation, how accurate they are; "sortednet norm" keeps the
    statistics of batch norm of each size. With "all", both are only measured for the path.
    Raises BadInput for a network without known blocks, sizes that it does not have, and for widths without channels inside blocks.
    Source: Valipour et al. 2023, arXiv 2309.00255. No authors' code was found.
    """
    known_classes(network, train, "train")
    if validation is not None:
        known_classes(network, validation, "validation")
    if not 0 <= full_share <= 1:
        raise BadInput(f"full_share is {full_share:g}: give a part from 0 to 1")
    found = find_sizes(network, widths or [1.0])
    path = found.path()
    listed = found.every() if sizes == ["all"] else path if sizes is None else [found.check(name) for name in sizes]
    if len(set(listed)) < len(listed):
        raise BadInput(f"the size {next(name for name in listed if listed.count(name) > 1)!r} is given twice: give each once")
    if len(listed) > MANY:
        raise BadInput(f"this network has {len(listed)} sizes, and at most {MANY} are trained: list those you want")
    listed = [name for name in listed if name != found.full] + [found.full]

    result = network.copy()
    batches = network_batches(result, train, batch_size=batch_size, shuffle=True, seed=seed, drop_last=True)
    settings: dict[str, Any] = {"momentum": 0.9, "weight_decay": 1e-4} if optimizer == "sgd" else {"weight_decay": 0.01}
    settings |= {"optimizer": optimizer, "learning_rate": learning_rate, "epochs": epochs, "accumulate": accumulate, "warmup": 0.1, "seed": seed}

    def loss(output: Tensor, batch: dict[str, Any]) -> Tensor:
        return F.cross_entropy(output, batch["label"])

    train_nested(result, [found.edits(name) for name in listed], batches, loss, full_share=full_share, name="sortednet", **settings)

    rows, kept, chosen = [], [], np.sort(np.random.default_rng(seed).permutation(len(train))[:NORM_ROWS])
    estimate = subset(train, chosen)
    for name in track(listed, "measuring sizes"):
        cut = result.edited(*found.edits(name))
        row: dict[str, Any] = {"size": name, "parameters, M": count_parameters(cut) / 1e6, "MACs, M": count_macs(cut) / 1e6}
        row |= {"ms, batch 1": None, "accuracy": None, "statistics": 0}
        if sizes != ["all"] or name in path:
            with using(progress=False):
                if norm_layers(cut.module):
                    reestimate_norm(cut, estimate)
                    kept.append(_statistics(cut))
                    row["statistics"] = len(kept[-1])
                    if name == found.full:
                        reestimate_norm(result, estimate)
                row["ms, batch 1"] = time_of(cut, seconds=1.0)
                row["accuracy"] = score(cut, validation) if validation is not None else None
        rows.append(row)
    result.module.to(memory_format=torch.contiguous_format)  # type: ignore[call-overload]
    figures: dict[str, Any] = {"sizes": len(rows), "full size": found.full, "smallest, share of MACs": min(r["MACs, M"] for r in rows) / rows[-1]["MACs, M"]}
    if validation is not None:
        figures |= {"accuracy, full size": rows[-1]["accuracy"], "accuracy before": score(network, validation)}
        figures["mean accuracy of the sizes"] = float(np.mean([row["accuracy"] for row in rows if row["accuracy"] is not None]))
        result.measured = [{"data": name_of(validation), "rows": len(validation), "metrics": {"accuracy": rows[-1]["accuracy"]}}]
    tables = {
        "sizes": rows,
        "blocks": [{"blocks": path, "fewest": fewest, "all": most} for path, (fewest, most) in found.lists.items()],
        "widths": [{"share": share, "edit": found.widths.get(share)} for share in found.shares],
    }
    text = "Each size is cut out with sub_network(network, size), and largest_under(network, macs=...) names the one that fits. "
    result.reports["sortednet"] = Report(f"one network, {len(rows)} sizes", figures, tables=tables, text=text)
    if kept:
        meaning = "means and variances of batch norm, size after size and layer after layer: sub_network reads them, they say nothing by themselves"
        result.reports["sortednet norm"] = Scores(np.concatenate(kept), "statistic of batch norm", meaning)  # type: ignore[assignment]
    return result
