"""Rerankers: modules that score a query with a document, to put what a first search found into a better order; and `rerank`, which does it.

All are fed alike: the tokens of a pair as a tokenizer makes them (query, separator, document), and all give one score per pair, [B], higher is
better. Those that match words (`Reranker`) take the two texts apart again and look their words up in a table of vectors; the
`CrossEncoder` reads the pair as one text. Definitions follow the survey of Guo et al. 2020 (arXiv 1903.06902) and the papers named below.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any, NamedTuple

import numpy as np
import torch
from datasets import Dataset
from torch import Tensor, nn
from torch.nn import functional as F

from wellread.errors import BadInput
from wellread.evaluate import predict
from wellread.index import Hit, whole_text
from wellread.inputs import TextInput
from wellread.network import Network
from wellread.network import build as built

CENTRES = (1.0, 0.9, 0.7, 0.5, 0.3, 0.1, -0.1, -0.3, -0.5, -0.7, -0.9)  # of KNRM's kernels; the first is for the same word
WIDTH = 0.1  # of the other kernels
EXACT_WIDTH = 1e-3
START = 0.014  # largest weight of a kernel at first, as in published code: kernels rise and fall together, and a large start of the wrong sign is kept


class Words(NamedTuple):
    """Texts side by side, words first and padding after them. ids: int64 [B, T]. mask: bool [B, T]. vectors: [B, T, d], of length 1, 0 in the padding. idf: [B, T]."""

    ids: Tensor
    mask: Tensor
    vectors: Tensor
    idf: Tensor


def split(ids: Tensor, mask: Tensor, separator: int, special: Tensor) -> tuple[tuple[Tensor, Tensor], tuple[Tensor, Tensor]]:
    """The (ids, mask) of queries [B, Q] and of documents [B, D] from pairs [B, T]: what is before and after the first separator.

    special: int64 [S], tokens that are no words (unknown ones too: all unknown words would be the same word); they are left out.
    """
    after = ((ids == separator) & mask.bool()).cumsum(1) > 0  # some tokenizers pad with the separator
    words = mask.bool() & ~torch.isin(ids, special)
    return _packed(ids, words & ~after), _packed(ids, words & after)


def _packed(ids: Tensor, keep: Tensor) -> tuple[Tensor, Tensor]:
    places = keep.int().argsort(dim=1, descending=True, stable=True)[:, : max(1, int(keep.sum(1).max()))]
    kept = keep.gather(1, places)
    return ids.gather(1, places).masked_fill(~kept, -1), kept


# --- what rerankers compare


def same_words(query: Words, document: Words, length: int = 1) -> Tensor:
    """bool [B, Q, D]: whether the `length` tokens from i of the query and from j of the document are the same ones (past both ends they are)."""
    same = [F.pad(query.ids, (0, n), value=-1)[:, n:, None] == F.pad(document.ids, (0, n), value=-1)[:, None, n:] for n in range(length)]
    return torch.stack(same).all(0) & query.mask[:, :, None] & document.mask[:, None]


def similarity(query: Words, document: Words) -> Tensor:
    """[B, Q, D]: cosine of each word with each; exactly 1 where the tokens are equal, whatever rounding says; 0 in the padding."""
    return (query.vectors @ document.vectors.mT).masked_fill(same_words(query, document), 1.0)


def kernels(similarities: Tensor, same: Tensor, query: Tensor, document: Tensor) -> Tensor:
    """KNRM's features [B, K] of similarities [B, Q, D] (Xiong et al. 2017, eqs. 2-4).

    For each kernel the sum over the query's words of log(soft count of document words at that similarity), times 0.01.
    same: bool [B, Q, D], what counts as exactly 1. query, document: masks, bool [B, Q] and [B, D]; padding adds nothing anywhere.
    """
    similarities = similarities.masked_fill(same, 1.0)
    found = []
    for centre in CENTRES:
        width = EXACT_WIDTH if centre == 1.0 else WIDTH
        near = torch.exp(-((similarities - centre) ** 2) / (2 * width**2)) * document[:, None]
        found.append(((near.sum(2).clamp(min=1e-10).log() * 0.01) * query).sum(1))
    return torch.stack(found, 1)


def histogram(similarities: Tensor, same: Tensor, document: Tensor, bins: int = 30) -> Tensor:
    """DRMM's counts [B, Q, bins]: equal bins over -1...1, and the last for the same word. Each query word's sum to the document's length."""
    places = ((similarities + 1) / 2 * (bins - 1)).long().clamp(0, bins - 2).masked_fill(same, bins - 1).masked_fill(~document[:, None], bins)
    counts = similarities.new_zeros(*similarities.shape[:2], bins + 1)
    return counts.scatter_add_(2, places, torch.ones_like(similarities))[..., :bins]


def dynamic_pool(maps: Tensor, heights: Tensor, widths: Tensor, size: tuple[int, int]) -> Tensor:
    """Maxima of maps [B, C, Q, D], not negative, over a grid of `size` cells laid on the upper left heights x widths (int64 [B]): [B, C, *size]."""
    for axis, lengths, cells in ((2, heights, size[0]), (3, widths, size[1])):
        places, parts = torch.arange(maps.shape[axis], device=maps.device), []
        for cell in range(cells):  # as adaptive max pooling: cells overlap when there are more of them than entries
            first, last = cell * lengths // cells, -(-(cell + 1) * lengths // cells)
            inside = (places >= first[:, None]) & (places < last[:, None])
            parts.append((maps * inside[:, None, :, None] if axis == 2 else maps * inside[:, None, None]).amax(axis))
        maps = torch.stack(parts, axis)
    return maps


# --- the models: (query, document) to scores [B]; d is the width of the word vectors


class DSSM(nn.Module):
    """Both texts apart: the mean of the words, two layers, and ten times the cosine (Huang et al. 2013, whose words were letter trigrams)."""

    def __init__(self, width: int, hidden: int = 300, out: int = 128) -> None:
        super().__init__()
        self.layers = nn.Sequential(nn.Linear(width, hidden), nn.Tanh(), nn.Linear(hidden, out), nn.Tanh())

    def forward(self, query: Words, document: Words) -> Tensor:
        """[B]."""
        a, b = (self.layers(text.vectors.sum(1) / text.mask.sum(1, keepdim=True).clamp(min=1)) for text in (query, document))
        return 10 * F.cosine_similarity(a, b)


class ARC1(nn.Module):
    """Both texts apart, by convolutions over three words and maxima, then together through two layers (ARC-I, Hu et al. 2014)."""

    def __init__(self, width: int, maps: int = 64, hidden: int = 64) -> None:
        super().__init__()
        self.first, self.second = nn.Conv1d(width, maps, 3, padding=1), nn.Conv1d(maps, maps, 3, padding=1)
        self.layers = nn.Sequential(nn.Linear(2 * maps, hidden), nn.ReLU(), nn.Linear(hidden, 1))

    def encode(self, text: Words) -> Tensor:
        """[B, maps]."""
        found, mask = text.vectors.mT, text.mask[:, None].to(text.vectors)
        found = F.max_pool1d(F.relu(self.first(found)) * mask, 2, ceil_mode=True)
        return (F.relu(self.second(found)) * F.max_pool1d(mask, 2, ceil_mode=True)).amax(2)

    def forward(self, query: Words, document: Words) -> Tensor:
        """[B]."""
        return self.layers(torch.cat([self.encode(query), self.encode(document)], 1)).squeeze(1)


class MatchPyramid(nn.Module):
    """The similarities of words as a picture: convolution, a grid of maxima, convolution, two layers (Pang et al. 2016, after ARC-II)."""

    def __init__(self, width: int, maps: int = 8, grid: tuple[int, int] = (3, 10), hidden: int = 64) -> None:
        super().__init__()
        self.grid = grid
        self.first, self.second = nn.Conv2d(1, maps, 3, padding=1), nn.Conv2d(maps, 2 * maps, 3, padding=1)
        self.layers = nn.Sequential(nn.Linear(2 * maps * grid[0] * grid[1], hidden), nn.ReLU(), nn.Linear(hidden, 1))

    def forward(self, query: Words, document: Words) -> Tensor:
        """[B]."""
        found = F.relu(self.first(similarity(query, document)[:, None]))
        pooled = dynamic_pool(found, query.mask.sum(1), document.mask.sum(1), self.grid)
        return self.layers(F.relu(self.second(pooled)).flatten(1)).squeeze(1)


class DRMM(nn.Module):
    """For each word of the query a histogram of its similarities with the document's words; weighed by idf (Guo et al. 2016, log counts).

    Word order does not matter, and the histogram has no gradient to the word vectors.
    """

    def __init__(self, width: int, bins: int = 30, hidden: int = 5) -> None:
        super().__init__()
        self.bins = bins
        self.layers = nn.Sequential(nn.Linear(bins, hidden), nn.Tanh(), nn.Linear(hidden, 1), nn.Tanh())
        self.gate = nn.Parameter(torch.zeros(()))  # all words alike at first: a gate of 1 sees little but the rarest word, and learns slowly

    def forward(self, query: Words, document: Words) -> Tensor:
        """[B]."""
        counts = histogram(similarity(query, document), same_words(query, document), document.mask, self.bins)
        gates = (self.gate * query.idf).masked_fill(~query.mask, -1e4).softmax(1) * query.mask
        return (gates * self.layers(counts.log1p()).squeeze(2)).sum(1)


class KNRM(nn.Module):
    """Soft counts of similarities by eleven kernels, and one linear layer (Xiong et al. 2017). Without tanh: losses here want open scores."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.layer = nn.Linear(len(CENTRES), 1)
        nn.init.uniform_(self.layer.weight, -START, START)

    def forward(self, query: Words, document: Words) -> Tensor:
        """[B]."""
        return self.layer(kernels(similarity(query, document), same_words(query, document), query.mask, document.mask)).squeeze(1)


class ConvKNRM(nn.Module):
    """KNRM between phrases of one, two and three words, each as a vector by convolution, in all nine combinations (Dai et al. 2018)."""

    def __init__(self, width: int, maps: int = 64, longest: int = 3) -> None:
        super().__init__()
        self.phrases = nn.ModuleList(nn.Conv1d(width, maps, size) for size in range(1, longest + 1))
        self.layer = nn.Linear(len(CENTRES) * longest**2, 1)
        nn.init.uniform_(self.layer.weight, -START, START)

    def encode(self, text: Words) -> list[Tensor]:
        """[B, T, maps] for each length of phrase, of length 1: phrases that begin at each word, past the end of zeros."""
        found = [F.relu(layer(F.pad(text.vectors.mT, (0, size)))) for size, layer in enumerate(self.phrases)]
        return [F.normalize(each.mT, dim=2) for each in found]

    def forward(self, query: Words, document: Words) -> Tensor:
        """[B]."""
        exact = [same_words(query, document, size + 1) for size in range(len(self.phrases))]
        never, features = torch.zeros_like(exact[0]), []
        for i, a in enumerate(self.encode(query)):
            for j, b in enumerate(self.encode(document)):
                features.append(kernels(a @ b.mT, exact[i] if i == j else never, query.mask, document.mask))
        return self.layer(torch.cat(features, 1)).squeeze(1)


MODELS: dict[str, type[nn.Module]] = {
    "dssm": DSSM, "arc-i": ARC1, "match-pyramid": MatchPyramid, "drmm": DRMM, "knrm": KNRM, "conv-knrm": ConvKNRM,
}  # fmt: skip


# --- as networks


class Reranker(nn.Module):
    """One of MODELS over a table of word vectors. match: the model. words: the table, rows of length 1. idf: [rows]. share: see `rerank`."""

    special: Tensor
    idf: Tensor
    share: Tensor

    def __init__(self, model: str, rows: int, width: int, separator: int, special: list[int]) -> None:
        super().__init__()
        self.words, self.match, self.separator = nn.Embedding(rows, width), MODELS[model](width), separator
        self.words.requires_grad_(False)
        self.register_buffer("special", torch.tensor(special), persistent=False)
        self.register_buffer("idf", torch.ones(rows))
        self.register_buffer("share", torch.ones(()))

    def forward(self, input_ids: Tensor, attention_mask: Tensor, **_: Tensor) -> Tensor:
        """Scores [B] of pairs [B, T]."""
        query, document = (self.look_up(*text) for text in split(input_ids, attention_mask, self.separator, self.special))
        return self.match(query, document)

    def look_up(self, ids: Tensor, mask: Tensor) -> Words:
        """int64 [B, T], -1 in the padding, and bool [B, T]."""
        known = ids.clamp(min=0)
        vectors = self.words(known)
        if self.words.weight.requires_grad:  # else they are of length 1 in the table, which saves most of the time
            vectors = F.normalize(vectors, dim=2)
        return Words(ids, mask, vectors * mask.unsqueeze(2), self.idf[known])


class CrossEncoder(nn.Module):
    """A sentence encoder that reads query and document as one text, and a linear layer to the score. encoder: `Network.structure`."""

    share: Tensor

    def __init__(self, encoder: dict[str, Any], width: int) -> None:
        super().__init__()
        self.encoder, self.score = built(encoder), nn.Linear(width, 1)
        self.register_buffer("share", torch.ones(()))

    def forward(self, **tokens: Tensor) -> Tensor:
        """Scores [B] of pairs [B, T]."""
        return self.score(self.encoder(**tokens)).squeeze(1)


# --- from an encoder


def separator(source: TextInput) -> int:
    """The token that stands between the two texts of a pair. Raises `BadInput` when the tokenizer puts none there."""
    tokenizer: Any = source.tokenizer
    bare, pair = tokenizer("a", add_special_tokens=False)["input_ids"], tokenizer("a", "a")["input_ids"]
    between = pair[pair.index(bare[0]) + len(bare) :] if bare and bare[0] in pair else []
    if not between or between[0] not in tokenizer.all_special_ids:
        raise BadInput("this tokenizer puts no separator between the texts of a pair: give an encoder of the BERT or RoBERTa kind")
    return between[0]


def word_table(encoder: Network) -> Tensor:
    """The vectors [V, d] that an encoder begins with, one for each token of its tokenizer."""
    least = len(encoder.input.tokenizer)  # type: ignore[union-attr]
    found = next((layer for layer in encoder.module.modules() if isinstance(layer, nn.Embedding) and layer.num_embeddings >= least), None)
    if found is None:
        raise BadInput("this network has no table of word vectors: give a transformer such as minilm-l6")
    return found.weight.detach().float()


def idf(tokens: Mapping[str, Tensor], rows: int) -> Tensor:
    """[rows]: log((N + 1) / (n + 1)) of each token, n of N texts [N, T] having it; 0 for those in no text, which tell no texts apart."""
    counts, texts = torch.zeros(rows), tokens["input_ids"]
    for ids, mask in zip(texts, tokens["attention_mask"].bool(), strict=True):
        counts[ids[mask].unique()] += 1
    return ((len(texts) + 1) / (counts + 1)).log() * (counts > 0)


def build(encoder: Network, model: str, length: int, documents: Sequence[str]) -> Network:
    """A reranker to train: a cross-encoder from all of the encoder, or one of MODELS over its word vectors, with idf from `documents`.

    A cross-encoder in place of the encoder is taken as it is.
    """
    assert isinstance(encoder.input, TextInput)
    source = replace(encoder.input, max_length=length)
    if isinstance(encoder.module, CrossEncoder):
        return encoder.edited(input=source)
    arguments: dict[str, Any]
    module: nn.Module
    if model == "cross-encoder":
        made = dict(encoder.architecture or {})
        arguments = {"encoder": {**encoder.structure, "architecture": made | ({"normalize": False} if "normalize" in made else {})}}
        arguments["width"] = encoder.embedding_size
        module = CrossEncoder(**arguments)
        module.encoder.load_state_dict(encoder.module.state_dict())
    else:
        table, special = word_table(encoder), sorted(source.tokenizer.all_special_ids)
        arguments = {"model": model, "rows": len(table), "width": table.shape[1], "separator": separator(source), "special": special}
        module = Reranker(**arguments)
        module.words.weight.data.copy_(F.normalize(table, dim=1))
        module.idf.copy_(idf(source(sorted(set(documents))), len(table)))
    name = f"{type(module).__module__}:{type(module).__name__}"
    return Network(module, source, output="score", architecture={"family": "class", "name": name, "arguments": arguments})


# --- use


def mixed(scores: np.ndarray, first: np.ndarray | None, share: float) -> np.ndarray:
    """`share` of the reranker's scores [N] and the rest of the first search's, of one query; each brought to mean 0 and deviation 1 before."""

    def standard(values: np.ndarray) -> np.ndarray:
        values = np.asarray(values, np.float64)
        return (values - values.mean()) / (values.std() or 1.0)

    return np.asarray(scores, np.float64) if first is None else share * standard(scores) + (1 - share) * standard(first)


def best_first(scores: np.ndarray) -> np.ndarray:
    """Places [N] from the highest score to the lowest; equal scores stay in the order of the first search."""
    return np.argsort(-scores, kind="stable")


def rerank(
    reranker: Network, query: str, texts: Sequence[str], first: Sequence[float] | None = None, *, share: float | None = None, batch_size: int = 64
) -> list[tuple[int, float]]:
    """What a search found in a better order: (its place in `texts`, its new score), best first.

    texts: the passages in the order in which they were found. first: their scores there; without them the reranker decides alone.
    share: how much of the new score is the reranker's, 0...1 (0: the order as it was); by default what was best on held-out queries in training.
    The hits of an `Index` are put in order by `reordered`.
    """
    module: Any = reranker.module
    if reranker.output != "score":
        raise BadInput("this network does not score pairs of query and document: give one that neural-ranking or prop made")
    if not query.strip():
        raise BadInput("the query is empty: say what is searched for")
    if first is not None and (len(first) != len(texts) or not np.isfinite(np.asarray(first, float)).all()):
        raise BadInput(f"the first search gave {len(texts)} texts and {len(first)} scores: one finite score for each is needed")
    if not len(texts):
        return []
    share = float(getattr(module, "share", 1.0)) if share is None else share
    if not 0 <= share <= 1:
        raise BadInput(f"share is {share}: give 0 to 1")
    scores = predict(reranker, Dataset.from_dict({"text": [[query, text] for text in texts]}), batch_size=batch_size)
    new = mixed(scores, None if first is None else np.asarray(first), share)
    return [(int(place), float(new[place])) for place in best_first(new)]


def reordered(reranker: Network, query: str, hits: Sequence[Hit], *, share: float | None = None, batch_size: int = 64) -> list[Hit]:
    """What `Index.search` found in the reranker's order, see `rerank`. Their scores are new; ranks has their old place, as "first search"."""
    texts = [whole_text(hit.title, hit.text) for hit in hits]
    order = rerank(reranker, query, texts, [hit.score for hit in hits], share=share, batch_size=batch_size)
    return [replace(hits[place], score=score, ranks={**hits[place].ranks, "first search": place + 1}) for place, score in order]
