"""Starbucks: one sentence encoder that is good at a fixed list of (layers, dimensions) sizes (Zhuang et al. 2024, arXiv 2410.13230).

A size (n, d) is the output of layer n (counted from 1), pooled over the attended tokens, its first d coordinates, brought to length 1. One
forward pass gives the vectors of every size, so that training all of them costs little more than training the full network.
"""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Annotated, Any, Literal

import numpy as np
import torch
from datasets import Dataset
from torch import Tensor, nn
from torch.nn import functional as F

from wellread import runtime
from wellread.batches import Batches
from wellread.data import Needs, Pairs, name_of
from wellread.errors import BadInput
from wellread.families import Transformer
from wellread.features import capture, running, to_device
from wellread.inputs import TextInput
from wellread.lineage import step as lineage_step
from wellread.meter import row as cost_row
from wellread.method import method
from wellread.network import Network
from wellread.results import Report
from wellread.structure import class_name, layer_of
from wellread.train import fit

SentencePairs = Annotated[Dataset, Needs("pairs of sentences: columns sentence1 and sentence2, for loss cosent also score", ("sentence1", "sentence2"))]

Size = tuple[int, int]  # layers, dimensions
COORDINATES = 0.3  # what the authors' code multiplies the divergence between coordinates with
PAPER = ((1 / 6, 1 / 24), (1 / 3, 1 / 12), (1 / 2, 1 / 6), (2 / 3, 1 / 3), (5 / 6, 2 / 3), (1.0, 1.0))  # (2, 32) to (12, 768) of BERT-base


# --- losses


def cosent(similarity: Tensor, score: Tensor, scale: float = 20.0) -> Tensor:
    """log(1 + sum of exp(scale * (s_j - s_i)) over all i that people score higher than j). Both [B]; a scalar. Only the order of `score` counts."""
    wrong_way = scale * (similarity[None, :] - similarity[:, None])[score[:, None] > score[None, :]]
    return torch.cat([similarity.new_zeros(1), wrong_way]).logsumexp(0)


def ranking(similarity: Tensor, scale: float = 20.0) -> Tensor:
    """Cross-entropy of finding the partner of each row among all: similarities [B, B] of first with second sentences; a scalar (InfoNCE)."""
    return F.cross_entropy(scale * similarity, torch.arange(len(similarity), device=similarity.device))


def divergence(teacher: Tensor, student: Tensor, scale: float = 1.0) -> Tensor:
    """KL(softmax(scale * teacher) || softmax(scale * student)) over the last axis, mean over the rows; both [B, K], a scalar.

    No gradient reaches `teacher`: the large size must not be drawn to the small ones.
    """
    target = (scale * teacher.detach()).log_softmax(-1)
    return F.kl_div((scale * student).log_softmax(-1), target, reduction="batchmean", log_target=True)


def starbucks_loss(
    vectors: Sequence[Tensor],
    dimensions: Sequence[int],
    score: Tensor | None,
    *,
    kl: Literal["scores", "coordinates", "none"] = "scores",
    kl_weight: float = 1.0,
    scale: float = 20.0,
) -> list[Tensor]:
    """The loss of each size, scalars; their sum is what is trained.

    vectors: pooled and not normalised, [2 B, W] each, first sentences before second ones, largest size last.
    dimensions: how many coordinates each size has. score: [B], or None for pairs that belong together.
    kl: what a small size learns from the largest beside its own task: its similarities in the batch, its coordinates, nothing.
    """
    similarities = []
    for vector, size in zip(vectors, dimensions, strict=True):
        first, second = F.normalize(vector[:, :size], dim=-1).chunk(2)
        similarities.append(first @ second.T)
    losses = []
    for number, similarity in enumerate(similarities):
        loss = cosent(similarity.diagonal(), score, scale) if score is not None else ranking(similarity, scale)
        if number + 1 < len(similarities) and kl == "scores":
            loss = loss + kl_weight * divergence(similarities[-1], similarity, scale)
        elif number + 1 < len(similarities) and kl == "coordinates":
            size = dimensions[number]
            loss = loss + COORDINATES * kl_weight * divergence(vectors[-1][:, :size], vectors[number][:, :size])
        losses.append(loss)
    return losses


# --- the encoder, and what is cut out of it


class First(nn.Module):
    """The first `size` coordinates of vectors [B, d]; brought to length 1 again when `normalize`."""

    def __init__(self, size: int, normalize: bool) -> None:
        super().__init__()
        self.size, self.normalize = size, normalize
        self.out = nn.Identity()  # what goes into it is the embedding of the cut network

    def forward(self, x: Tensor) -> Tensor:
        x = x[..., : self.size]
        return self.out(F.normalize(x, dim=-1) if self.normalize else x)


@dataclass(frozen=True)
class Encoder:
    """Where the parts of a sentence encoder are. norm: the layer after the last block; every size ends with it, as its physically cut network does."""

    blocks: str
    depth: int
    width: int
    norm: str | None
    pooling: str

    def vectors(self, module: nn.Module, tokens: dict[str, Tensor], layers: Sequence[int]) -> list[Tensor]:
        """Pooled and not normalised [B, width] after each of `layers` (from 1), from one forward pass."""
        paths = [f"{self.blocks}.{layer - 1}" for layer in layers]
        with capture(module, paths) as caught:
            module(**tokens)
        norm = layer_of(module, self.norm) if self.norm else nn.Identity()
        return [self.pool(norm(caught[path]), tokens["attention_mask"]) for path in paths]

    def pool(self, hidden: Tensor, mask: Tensor) -> Tensor:
        """[B, width] from [B, T, width]; mask [B, T] is 1 where there is a token."""
        if self.pooling == "cls":
            return hidden[:, 0]
        weight = mask.unsqueeze(-1).to(hidden.dtype)
        return (hidden * weight).sum(1) / weight.sum(1).clamp(min=1e-9)


def encoder(network: Network) -> Encoder:
    """The parts of a transformers encoder. Raises `BadInput` for a network whose sizes cannot be cut, and says why."""
    module = network.module
    if not isinstance(network.input, TextInput) or not isinstance(module, Transformer) or network.output != "embedding":
        raise BadInput("a sentence encoder is needed, with its tokenizer: give minilm-l6, hf/NAME of an encoder, or the folder of one")
    if module.pooling not in ("mean", "cls"):
        raise BadInput(f"the pooling {module.pooling!r} is not known: use mean or cls")
    if not isinstance(getattr(module, "head", None), nn.Identity):
        raise BadInput("this encoder has a layer after its pooling (it was cut or got a head): give the encoder without it")
    lists = {name: part for name, part in module.named_modules() if isinstance(part, nn.ModuleList) and len(part)}
    blocks = max(lists, key=lambda name: (len(lists[name]), -name.count(".")), default=None)
    if blocks is None:
        raise BadInput("this encoder has no list of blocks to leave out: sizes need a stack of layers")
    depth = len(lists[blocks])
    seen: list[tuple[str, Any, Any]] = []
    hooks = [
        part.register_forward_hook(lambda _, given, out, name=name: seen.append((name, given, out)))
        for name, part in module.model.named_modules(prefix="model")
        if name in (f"{blocks}.{depth - 1}", "model") or not name.startswith(blocks)
    ]
    try:
        with running(network, network.device), torch.inference_mode():
            module(**to_device(network.input(["two", "sentences of different length"]), network.device))
    finally:
        for hook in hooks:
            hook.remove()
    last = next(_first(out) for name, _, out in seen if name == f"{blocks}.{depth - 1}")
    hidden = next(out for name, _, out in seen if name == "model").last_hidden_state
    norm = next((name for name, given, out in seen if given and given[0] is last and out is hidden and not name.startswith(f"{blocks}.")), None)
    if hidden is not last and norm is None:
        raise BadInput(f"between the last block ({blocks}.{depth - 1}) and the pooling is more than one layer: its smaller sizes cannot be cut out")
    return Encoder(blocks, depth, hidden.shape[-1], norm, module.pooling)


def _first(out: Any) -> Tensor:
    return out[0] if isinstance(out, tuple) else out


def default_sizes(depth: int, width: int) -> list[Size]:
    """The paper's six sizes (1/6 of the layers and 1/24 of the dimensions, ..., all), one for each number of layers that comes out."""
    sizes = {max(1, round(depth * layers)): max(1, round(width * dimensions)) for layers, dimensions in PAPER}
    return sorted(sizes.items())


def parse_sizes(sizes: Sequence[str] | None, depth: int, width: int) -> list[Size]:
    """Sizes from "2x64" (2 layers, 64 dimensions), smallest first; the full size is appended when it is not there. Raises `BadInput`."""
    if sizes is None:
        return default_sizes(depth, width)
    found = [_size(each) for each in sizes]
    for (layers, dimensions), name in zip(found, sizes, strict=True):
        if not (1 <= layers <= depth and 1 <= dimensions <= width):
            raise BadInput(f"the size {name!r} is not in this encoder: it has {depth} layers and {width} dimensions")
    for before, after in itertools.pairwise(found):
        if after == before:
            raise BadInput(f"the size {size_name(after)!r} is given twice: give each once")
        if after[0] < before[0] or after[1] < before[1]:
            raise BadInput(f"the sizes are not sorted, {size_name(after)!r} comes after {size_name(before)!r}: none may be smaller than the one before")
    return found if found[-1:] == [(depth, width)] else [*found, (depth, width)]


def size_name(size: Size) -> str:
    """ "2x64" for 2 layers and 64 dimensions. """
    return f"{size[0]}x{size[1]}"


def _size(name: str | Size) -> Size:
    parts = name.lower().split("x") if isinstance(name, str) else list(name)
    try:
        layers, dimensions = map(int, parts)
    except (ValueError, TypeError):
        raise BadInput(f"the size {name!r} is not layers x dimensions: write 2x64 for 2 layers and 64 dimensions") from None
    return layers, dimensions


def cut_edits(network: Network, size: Size, parts: Encoder) -> list[dict[str, Any]]:
    """The edits that leave the first layers and the first coordinates; none for the full size."""
    layers, dimensions = size
    edits: list[dict[str, Any]] = []
    if layers < parts.depth:
        edits.append({"edit": "keep_blocks", "blocks": parts.blocks, "keep": list(range(layers))})
    if dimensions < parts.width:
        arguments = {"size": dimensions, "normalize": bool(network.module.normalize)}
        edits.append({"edit": "new_head", "layer": "head", "part": class_name(First), "arguments": arguments})
    return edits


def sub_network(network: Network, size: str | Size, *, untrained: bool = False) -> Network:
    """The encoder of one size as a network of its own: layers physically cut, vectors of fewer coordinates, tokenizer and pooling kept.

    size: "2x64", or (2, 64). untrained: also a size that was not among the trained ones, or of an encoder that was not trained for sizes.
    Vectors of different sizes must not be compared with each other: embed documents and queries with the same one.
    Raises `BadInput` for a size that the encoder does not have or was not trained for.
    """
    parts = encoder(network)
    wanted = parse_sizes([size if isinstance(size, str) else size_name(size)], parts.depth, parts.width)[0]
    report = network.reports.get("starbucks")
    trained = [row["size"] for row in report.tables["sizes"]] if isinstance(report, Report) else []
    if not untrained and size_name(wanted) not in trained:
        known = f"the trained ones are {', '.join(trained)}" if trained else "it has no report of trained sizes"
        raise BadInput(f"this encoder was not trained for the size {size_name(wanted)} ({known}): choose one of them, or say untrained=True")
    edits = cut_edits(network, wanted, parts)
    head = {"head": "head.out"} if wanted[1] < parts.width else {}
    cut = network.edited(*edits, **head)
    made = lineage_step("starbucks-size", {"size": size_name(wanted)}, parents=[network.fingerprint], result=cut.fingerprint)
    cut.lineage = [*network.lineage, made]
    return cut


# --- training and judging


def pair_batches(network: Network, pairs: Dataset, *, scored: bool = True, batch_size: int = 16, shuffle: bool = False, seed: int = 0) -> Batches:
    """{"inputs": tokens of 2 B sentences, first ones before second ones; "score": float32 [B]} for a network that reads text."""
    first, second = list(pairs["sentence1"]), list(pairs["sentence2"])
    score = torch.from_numpy(np.asarray(pairs["score"], dtype=np.float32)) if scored else None  # a CSV has them as text
    tokenise = network.input
    assert isinstance(tokenise, TextInput)

    def get(rows: np.ndarray) -> dict[str, Any]:
        batch: dict[str, Any] = {"inputs": tokenise([first[int(row)] for row in rows] + [second[int(row)] for row in rows])}
        return batch if score is None else batch | {"score": score[rows]}

    return Batches(len(pairs), get, batch_size=batch_size, shuffle=shuffle, seed=seed, drop_last=shuffle)


def similarities(network: Network, pairs: Dataset, sizes: Sequence[Size], *, batch_size: int = 64) -> dict[str, np.ndarray]:
    """{size: float32 [N]}: the cosine of the two sentences of each pair at each size, all from one pass. The sizes need not be trained."""
    parts, device = encoder(network), runtime.device()
    batches = pair_batches(network, pairs, scored=False, batch_size=batch_size)
    found: dict[str, list[np.ndarray]] = {size_name(size): [] for size in sizes}
    with running(network, device), torch.inference_mode(), runtime.autocast(device):
        for batch in runtime.track(batches.epoch(0), f"embedding {name_of(pairs)}", total=len(batches)):
            vectors = parts.vectors(network.module, to_device(batch["inputs"], device), [layers for layers, _ in sizes])
            for (layers, dimensions), vector in zip(sizes, vectors, strict=True):
                first, second = vector.float()[:, :dimensions].chunk(2)
                found[size_name((layers, dimensions))].append(F.cosine_similarity(first, second).cpu().numpy())
    return {name: np.concatenate(parts) for name, parts in found.items()}


def spearman(network: Network, pairs: Dataset, sizes: Sequence[Size]) -> dict[str, float]:
    """{size: rank correlation of the cosines with the scores that people gave}."""
    from scipy.stats import spearmanr

    scores = np.asarray(pairs["score"], dtype=float)
    return {name: float(spearmanr(found, scores).statistic) for name, found in similarities(network, pairs, sizes).items()}


def check_pairs(pairs: Dataset, scored: bool, argument: str) -> None:
    """Raises `BadInput` for empty sentences and for scores that are missing, not finite or all the same."""
    for column in ("sentence1", "sentence2"):
        empty = next((row for row, text in enumerate(pairs[column]) if not isinstance(text, str) or not text.strip()), None)
        if empty is not None:
            raise BadInput(f"{argument} has no text in row {empty} of {column}: fill it or remove the row")
    if not scored:
        return
    if "score" not in pairs.column_names:
        raise BadInput(f"{argument} has no column 'score' (it has {', '.join(pairs.column_names)}): add it, or choose loss=ranking for matching pairs")
    try:
        scores = np.asarray(list(pairs["score"]), dtype=float)
    except (TypeError, ValueError):
        raise BadInput(f"{argument} has scores that are not numbers: give one number per pair") from None
    bad = np.flatnonzero(~np.isfinite(scores))
    if len(bad):
        raise BadInput(f"{argument} has no usable score in row {bad[0]}: fill it or remove the row")
    if np.ptp(scores) == 0:
        raise BadInput(f"all scores of {argument} are {scores[0]:g}: nothing can be learned or measured from one score")


@method
def starbucks(
    network: Network,
    pairs: SentencePairs,
    validation: Pairs | None = None,
    *,
    sizes: list[str] | None = None,
    loss: Literal["cosent", "ranking"] = "cosent",
    kl: Literal["scores", "coordinates", "none"] = "scores",
    kl_weight: float = 1.0,
    epochs: int = 4,
    batch_size: int = 16,
    learning_rate: float = 5e-5,
    seed: int = 0,
) -> Network:
    """One sentence encoder that can be cut to any listed number of layers and dimensions, each as good as if trained for it.

    network: a sentence encoder (transformers or sentence-transformers), post-norm or pre-norm.
    pairs: sentence1 and sentence2, with a score (higher is more alike, any range) or, for loss ranking, pairs that belong together.
    validation: scored pairs on which each size is measured, before and after; nothing is chosen on them.
    sizes: layers x dimensions, smallest first (2x32 4x64); the full size is always among them. By default the paper's six shares.
    loss: cosent for scored pairs; ranking for matching pairs, the others of the batch being the wrong partners.
    kl: small sizes also learn the full size's similarities in the batch (as in the paper's retrieval code), its coordinates (as in its STS
        code, here without dragging the full size along), or nothing.
    kl_weight: of that part.
    epochs, batch_size, learning_rate: of the fine-tuning; AdamW, cosine, a tenth of it warm-up.
    seed: of the order of the pairs and of dropout.

    The result is the whole encoder; `sub_network(result, "2x64")` is one size as a network of its own. The report "starbucks" lists the sizes,
    what they cost and, with validation, their Spearman correlation before (the given encoder, plainly truncated) and after.
    Raises BadInput for a network that is no sentence encoder, sizes outside it, unsorted or given twice, empty sentences, missing or equal scores.
    Source: Zhuang et al. 2024, arXiv 2410.13230; the losses are those of the authors' code.
    """
    parts = encoder(network)
    wanted = parse_sizes(sizes, parts.depth, parts.width)
    layers, dimensions = [size[0] for size in wanted], [size[1] for size in wanted]
    scored = loss == "cosent"
    check_pairs(pairs, scored, "pairs")
    if validation is not None:
        check_pairs(validation, True, "validation")
    if len(pairs) < 2:
        raise BadInput("pairs has one row, and the losses compare pairs with each other: give more")
    if not 0 <= kl_weight < float("inf"):
        raise BadInput(f"kl_weight is {kl_weight}: give 0 or more")
    result = network.copy()
    names = [size_name(size) for size in wanted]
    said = " ".join(names)  # as text, so that the checkpoint of a training for other sizes is not taken for one of this

    def step(module: nn.Module, batch: dict[str, Any]) -> tuple[Tensor, dict[str, float | Tensor]]:
        vectors = parts.vectors(module, batch["inputs"], layers)
        losses = starbucks_loss(vectors, dimensions, batch.get("score"), kl=kl, kl_weight=kl_weight)
        return torch.stack(losses).sum(), dict(zip(said.split(), losses, strict=True))

    batches = pair_batches(result, pairs, scored=scored, batch_size=batch_size, shuffle=True, seed=seed)
    fit(result.module, batches, step, epochs=epochs, learning_rate=learning_rate, warmup=0.1, seed=seed, name="starbucks")

    result.reports["starbucks"] = Report("sizes", tables={"sizes": [{"size": name} for name in names]})
    rows: list[dict[str, Any]] = []
    for size, name in zip(wanted, names, strict=True):
        cost = cost_row(name, sub_network(result, name), seconds=1.0)
        rows.append({"size": cost.pop("network"), "layers": size[0], "dimensions": size[1]} | cost)
    figures: dict[str, Any] = {"sizes": len(rows), "full size": names[-1], "smallest size": names[0]}
    if validation is not None:
        before, after = spearman(network, validation, wanted), spearman(result, validation, wanted)
        for row in rows:
            row |= {"spearman, truncated": before[row["size"]], "spearman": after[row["size"]]}
        figures |= {"spearman, smallest size": after[names[0]], "spearman, full size": after[names[-1]]}
        figures["spearman, full size before"] = before[names[-1]]
        result.measured = [{"data": name_of(validation), "rows": len(validation), "metrics": {"spearman": after[names[-1]]}}]
    text = (
        "Each size is cut out with sub_network(network, size). Sizes that are not in the table were not trained. Vectors of different sizes do not "
        "fit together: embed documents and queries with the same one."
    )
    result.reports["starbucks"] = Report(f"one encoder, {len(rows)} sizes", figures, tables={"sizes": rows}, text=text)
    return result
