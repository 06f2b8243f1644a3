"""One sentence encoder for N domains: shared attention, N copies of every MLP, routed by a domain tag (Hallee et al. 2024, arXiv 2401.15713).

    better = mixture_of_experts(encoder, pairs)             # pairs: sentence1, sentence2, group (the domain)
    better(better.input(["[cardiology] some text"]))        # the tag is one token; the network puts its vector into the place of [CLS]
    better(better.input(["some text"]))                     # without a tag: the domain whose words are nearest
    experts.dense(better, "cardiology")                     # one domain's encoder alone, of the original architecture

Before training the mixture computes what the encoder computes, for every domain.
"""

from __future__ import annotations

from collections.abc import Hashable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from functools import lru_cache
from typing import Annotated, Any, Literal

import numpy as np
import torch
from datasets import Dataset
from scipy import sparse
from sklearn.discriminant_analysis import LinearDiscriminantAnalysis
from sklearn.metrics import f1_score, precision_recall_curve, roc_auc_score
from torch import Tensor, nn
from torch.nn import functional as F

from wellread.batches import Batches
from wellread.contrastive import gathered, in_batch, in_chunks
from wellread.data import Needs, name_of, scores, stratified
from wellread.errors import BadInput
from wellread.index import encode
from wellread.inputs import TextInput
from wellread.meter import parameters
from wellread.method import method, sentence_input
from wellread.network import Network
from wellread.results import Report
from wellread.retrieve.experts import Experts, expand, routed_of, tag
from wellread.train import History, fit

DomainPairs = Annotated[
    Dataset,
    Needs("pairs of texts that belong together, and their domain: columns sentence1, sentence2 and group", ("sentence1", "sentence2", "group")),
]
JudgedPairs = Annotated[
    Dataset,
    Needs(
        "pairs of texts with score 1 (belong together) or 0, and their domain: columns sentence1, sentence2, score and group",
        ("sentence1", "sentence2", "score", "group"),
    ),
]
Loss = Literal["ranking", "clip_argmax"]

# --- pairs from citations


def co_citations(citations: Iterable[Iterable[Hashable]], at_least: int = 1) -> list[tuple[Any, Any, int]]:
    """(a, b, how many cite both) of all pairs of papers that at least so many of the citing papers have among their references.

    citations: the references of each citing paper; one named twice counts once. These are the entries above the diagonal of A^T A, where
    A [citing, cited] is 1 for a reference; papers are ordered by where they are first cited.
    """
    numbers: dict[Hashable, int] = {}
    places = [(row, numbers.setdefault(each, len(numbers))) for row, cited in enumerate(citations) for each in dict.fromkeys(cited)]
    if not places:
        return []
    rows, columns = np.array(places).T
    cites = sparse.csr_array((np.ones(len(places), np.int64), (rows, columns)))
    both, names = sparse.triu(cites.T @ cites, k=1).tocoo(), list(numbers)
    return [(names[a], names[b], int(n)) for a, b, n in sorted(zip(*both.coords, both.data, strict=True)) if n >= at_least]


# --- training


def clip_argmax(first: Tensor, second: Tensor) -> tuple[Tensor, Tensor]:
    """The loss of the authors' final script for vectors [B, d], and the share of rows whose target is not their own partner; two scalars.

    Scores are plain dot products A B^T; the target of row i is where (A A^T + B B^T) / 2 is largest, in both directions. With vectors of one
    length that is i itself; otherwise a long row can be the target of all others.
    """
    logits = first @ second.T
    target = ((first @ first.T + second @ second.T) / 2).detach().argmax(1)
    loss = (F.cross_entropy(logits, target) + F.cross_entropy(logits.T, target)) / 2
    return loss, (target != torch.arange(len(target), device=target.device)).float().mean()


@dataclass(frozen=True)
class Partners:
    """Pairs by numbers: texts, `first` and `second` int64 [P] into them, `domain` int64 [P] into `names`."""

    texts: list[str]
    first: np.ndarray
    second: np.ndarray
    domain: np.ndarray
    names: list[str]

    @classmethod
    def of(cls, pairs: Dataset, names: Sequence[str] | None = None, argument: str = "pairs") -> Partners:
        """Of a table with sentence1, sentence2 and group. names: the domains, if they are known. Raises `BadInput` for an empty text or domain."""
        numbers: dict[str, int] = {}
        for column in ("sentence1", "sentence2", "group"):
            empty = next((row for row, text in enumerate(pairs[column]) if text is None or not str(text).strip()), None)
            if empty is not None:
                raise BadInput(f"{argument} has nothing in row {empty} of {column}: fill it or remove the row")
        first, second = (
            np.array([numbers.setdefault(str(text), len(numbers)) for text in pairs[column]], np.int64) for column in ("sentence1", "sentence2")
        )
        groups = [str(each).strip() for each in pairs["group"]]
        known = sorted(set(groups)) if names is None else list(names)
        if unknown := sorted(set(groups) - set(known)):
            raise BadInput(f"{argument} has the domain {unknown[0]!r}, which pairs have not: they have {', '.join(known)}")
        return cls(list(numbers), first, second, np.array([known.index(each) for each in groups], np.int64), known)

    def known(self) -> Tensor:
        """int64, sorted: first * texts + second of all pairs in both directions, by which `same` finds them."""
        size = len(self.texts)
        return torch.from_numpy(np.unique(np.concatenate([self.first * size + self.second, self.second * size + self.first])))


def same(first: Tensor, second: Tensor, known: Tensor, texts: int) -> Tensor:
    """bool [B, N]: where text `first` [B] and text `second` [N] are one text or a known pair, and so no negatives of each other."""
    return torch.isin(first[:, None] * texts + second[None], known) | (first[:, None] == second[None])


def pair_batches(source: TextInput, partners: Partners, *, steps: int, batch_size: int = 16, tags: bool = True, seed: int = 0) -> Batches:
    """One epoch of `steps` batches of each domain in turn, no batch of two: {"inputs": tokens of 2 B texts, "numbers": int64 [B, 2], which texts}.

    The two texts of a pair are swapped at random. Pairs come in a new random order each time all of their domain were seen.
    tags: whether texts carry their domain.
    """
    rows_of = [np.flatnonzero(partners.domain == number) for number in range(len(partners.names))]
    rows_of = [rows for rows in rows_of if len(rows)]
    order = lru_cache(maxsize=2 * len(rows_of))(lambda which, turn: np.random.default_rng((seed, which, turn)).permutation(rows_of[which]))

    def get(numbers: np.ndarray) -> dict[str, Any]:
        chosen = []
        for update, place in zip(*divmod(numbers, batch_size), strict=True):
            which, drawn = int(update) % len(rows_of), int(update) // len(rows_of) * batch_size + int(place)
            turn, at = divmod(drawn, len(rows_of[which]))
            chosen.append(int(order(which, turn)[at]))
        pairs = np.stack([partners.first[chosen], partners.second[chosen]], 1)
        swapped = torch.rand(len(pairs)).numpy() < 0.5
        pairs[swapped] = pairs[swapped, ::-1]
        names = [f"{tag(partners.names[number])} " if tags else "" for number in partners.domain[chosen]]
        texts = [name + partners.texts[number] for side in (0, 1) for name, number in zip(names, pairs[:, side], strict=True)]
        return {"inputs": source(texts), "numbers": torch.from_numpy(pairs)}

    return Batches(steps * len(rows_of) * batch_size, get, batch_size=batch_size, seed=seed)


def learn(
    network: Network,
    batches: Batches,
    partners: Partners,
    *,
    loss: Loss = "ranking",
    temperature: float = 0.05,
    learning_rate: float = 2e-5,
    seed: int = 0,
) -> tuple[Network, History]:
    """A copy of an encoder after one epoch of such batches as `pair_batches` gives, and what happened. For mixtures and for dense encoders."""
    result, known, texts = network.copy(), partners.known(), len(partners.texts)

    def step(module: nn.Module, batch: dict[str, Any]) -> Tensor | tuple[Tensor, dict[str, float | Tensor]]:
        first, second = in_chunks(lambda tokens: module(**tokens), batch["inputs"]).chunk(2)
        if loss == "clip_argmax":
            value, off = clip_argmax(gathered(first)[0], gathered(second)[0])
            return value, {"targets off the diagonal": off}
        theirs, start = gathered(second)
        whose = gathered(batch["numbers"][:, 1:])[0][:, 0]
        near = same(batch["numbers"][:, 0], whose, known.to(whose.device), texts)
        return in_batch(first, theirs, temperature=temperature, same=near, first=start)

    rate: dict[str, Any] = {"learning_rate": learning_rate, "warmup": 0.1, "weight_decay": 0.01}
    history = fit(result.module, batches, step, epochs=1, seed=seed, name="mixture of experts", **rate)
    return result, history


def set_centroids(network: Network, partners: Partners) -> float:
    """Let a mixture route texts without a tag: to the domain whose mean word embedding is nearest, in units of the spread within domains (LDA).

    The share of every second text that the others route rightly, mean over the domains.
    """
    routed, source = routed_of(network), network.input
    assert isinstance(source, TextInput)
    members = np.unique(np.concatenate([np.stack([partners.domain, side], 1) for side in (partners.first, partners.second)]), axis=0)
    means = []
    for start in range(0, len(members), 256):
        given = source([partners.texts[row] for _, row in members[start : start + 256]])
        tokens, _ = routed.untagged(**{name: each.to(network.device) for name, each in given.items()})
        means.append(routed.mean_word(tokens["input_ids"], tokens["attention_mask"]))
    mean, domain = torch.cat(means), members[:, 0]

    def settle(rows: np.ndarray) -> None:
        if len(partners.names) == 1:
            return
        found = LinearDiscriminantAnalysis("lsqr", shrinkage="auto", priors=np.full(len(partners.names), 1 / len(partners.names)))
        found.fit(mean[rows].cpu().double().numpy(), domain[rows])
        weight, offset = found.coef_, found.intercept_
        if len(weight) == 1:  # of two classes scikit-learn gives the difference
            weight, offset = np.concatenate([0 * weight, weight]), np.append(0 * offset, offset)
        routed.centroids.copy_(torch.from_numpy(weight))
        routed.offsets.copy_(torch.from_numpy(offset))

    settle(np.arange(0, len(members), 2))
    judged = routed.nearest(mean[1::2]).cpu().numpy() == domain[1::2]
    settle(np.arange(len(members)))
    return float(np.mean([judged[domain[1::2] == number].mean() for number in range(len(partners.names))]))


# --- judging


def best_threshold(similarity: np.ndarray, truth: np.ndarray) -> float:
    """The similarity from which on pairs are best said to belong together: highest F1 on these, [N] each; of equal ones the lowest."""
    precision, recall, thresholds = precision_recall_curve(truth, similarity)
    f1 = 2 * precision * recall / np.maximum(precision + recall, 1e-12)
    return float(thresholds[int(f1[:-1].argmax())])


def similarities(network: Network, partners: Partners, tags: Mapping[str, str] | None = None) -> np.ndarray:
    """float [P]: the cosine of the two texts of each pair. tags: the tag that texts of each domain carry; none without it."""
    pairs = list(zip(partners.first, partners.second, partners.domain, strict=True))
    before = [f"{tag(tags[name])} " if tags else "" for name in partners.names]
    texts = list(dict.fromkeys(before[domain] + partners.texts[each] for *both, domain in pairs for each in both))
    vectors, place = encode(network, texts), {text: row for row, text in enumerate(texts)}
    vectors /= np.linalg.norm(vectors, axis=1, keepdims=True).clip(1e-12)
    first, second = ([place[before[pair[2]] + partners.texts[pair[side]]] for pair in pairs] for side in (0, 1))
    return (vectors[first] * vectors[second]).sum(1)


def worth(similarity: np.ndarray, truth: np.ndarray, halves: Sequence[np.ndarray]) -> dict[str, float]:
    """ROC-AUC of similarities [N] for pairs that belong together or not (truth [N], 1 or 0); mean F1 of each half with the threshold of the other."""
    found = [f1_score(truth[b], similarity[b] >= best_threshold(similarity[a], truth[a])) for a, b in (halves, halves[::-1])]
    return {"ROC-AUC": float(roc_auc_score(truth, similarity)), "F1": float(np.mean(found))}


@method
def mixture_of_experts(
    encoder: Network,
    pairs: DomainPairs,
    held_out: JudgedPairs | None = None,
    *,
    layers: list[int] | None = None,
    expert_modules: str | None = None,
    loss: Literal["ranking", "clip_argmax"] = "ranking",
    temperature: float = 0.05,
    steps: int = 200,
    batch_size: int = 16,
    learning_rate: float = 2e-5,
    seed: int = 0,
) -> Network:
    """One sentence encoder for several domains, each with an expert of its own in every layer, to host instead of one fine-tuned encoder per domain.

    encoder: a sentence encoder with [CLS] or the like before each text. It is not changed.
    pairs: texts that belong together (sentence1, sentence2; such as papers that are cited together, see `co_citations`) and their domain (group).
    held_out: pairs of other texts with score 1 or 0, of the same domains, to measure on; nothing is chosen on them.
    layers: numbers of the layers, from 0, whose MLP is copied for each domain; by default all.
    expert_modules: for an encoder whose MLPs are not recognised, a regular expression for the names of the layers to copy.
    loss: ranking (cosines, others of the batch as wrong partners, known partners left out), or clip_argmax, that of the authors' final script.
    temperature: of loss ranking; cosines are divided by it.
    steps: optimiser steps for each domain, which take turns; AdamW, a tenth of them warm-up, cosine.
    batch_size: pairs in a step, all of one domain.
    learning_rate: highest one.
    seed: of the order of the pairs and of dropout.

    Texts carry their domain as "[cardiology] some text" (`experts.tagged`), in front of the title where there is one; a text without a tag goes to the
    domain whose words are nearest. `experts.dense(result, "cardiology")` is one domain's encoder alone. The report "mixture_of_experts" has
    sizes, how well texts without tag are routed and, with held_out, ROC-AUC and F1 by domain: before, after, and without tags.
    Raises BadInput for a network that is no sentence encoder or has no MLPs, a domain with fewer than two pairs or a name that cannot be a tag,
    held-out texts that are trained on, domains that the pairs have not, and experts that do not fit into memory.
    Source: Hallee et al. 2024, arXiv 2401.15713.
    """
    sentence_input(encoder)
    for right, sentence in (
        (steps >= 1, f"steps is {steps}: give at least 1"),
        (batch_size >= 2, f"batch_size is {batch_size}: give at least 2, a pair is told apart from others"),
        (0 < temperature < float("inf"), f"temperature is {temperature}: give a number above 0"),
    ):
        if not right:
            raise BadInput(sentence)
    partners = Partners.of(pairs)
    for number, name in enumerate(partners.names):
        mine = partners.domain == number
        found, different = int(mine.sum()), len(np.union1d(partners.first[mine], partners.second[mine]))
        if found < 2 or different < 3:
            has = f"has {found} pairs of {different} different texts"
            raise BadInput(f"the domain {name!r} {has}, and pairs are told apart from each other: give at least 2 pairs, or leave it out")
    judged = None if held_out is None else _judged(held_out, partners)
    start = expand(encoder, partners.names, layers=layers, expert_modules=expert_modules)
    batches = pair_batches(start.input, partners, steps=steps, batch_size=batch_size, seed=seed)  # type: ignore[arg-type]
    result, history = learn(start, batches, partners, loss=loss, temperature=temperature, learning_rate=learning_rate, seed=seed)
    routed_rightly = set_centroids(result, partners)

    routed = routed_of(result)
    copies = sum(each.numel() for part in routed.modules() if isinstance(part, Experts) for each in part.parameters())
    total, last, domains = parameters(result), max(1, len(history.loss) // 10), len(partners.names)
    figures: dict[str, Any] = {"domains": domains, "pairs": len(pairs), "parameters": total}
    figures |= {"parameters used for a text": total - copies + copies // domains}
    figures |= {"parameters of separate encoders": domains * parameters(encoder)}
    figures |= {"texts without tag routed rightly": routed_rightly, "loss, last tenth": float(np.mean(history.loss[-last:]))}
    if loss == "clip_argmax":
        figures["targets that are not the partner"] = float(np.mean(history.logs["targets off the diagonal"]))
    listed = [{"domain": each, "tag": tag(each), "pairs": int((partners.domain == number).sum())} for number, each in enumerate(partners.names)]
    tables: dict[str, list[dict[str, Any]]] = {"domains": listed}
    if judged is not None:
        tables["held-out pairs"], means = _table(encoder, result, *judged)
        figures |= {f"ROC-AUC {name}": value for name, value in means.items()}
        result.measured = [{"data": name_of(held_out), "rows": len(held_out), "metrics": {"roc_auc": means["after"]}}]  # type: ignore[arg-type]
    text = (
        "Put the tag in front of a text, or of its title when it has one: [domain] text. A tag that is misspelt is read as words. Vectors of "
        "different domains come out of different experts: search within one. Whether one encoder tuned on all pairs does as well was not measured."
    )
    result.reports["mixture_of_experts"] = Report(f"one encoder for {domains} domains", figures, tables=tables, text=text)
    return result


def _judged(held_out: Dataset, partners: Partners) -> tuple[Partners, np.ndarray]:
    """The held-out pairs and whether they belong together; refused when they are not apart from what is trained on."""
    asked, truth = Partners.of(held_out, partners.names, "held_out"), scores(held_out, "held_out")
    if not np.isin(truth, (0, 1)).all():
        raise BadInput(f"held_out has the score {truth[~np.isin(truth, (0, 1))][0]:g}: give 1 for pairs that belong together and 0 for others")
    crossing = set(asked.texts) & set(partners.texts)
    if crossing:
        raise BadInput(f"{len(crossing)} texts of held_out are in pairs too (such as {min(crossing)[:60]!r}): split by text, so that none is in both")
    for number in np.unique(asked.domain):
        if min((truth[asked.domain == number] == each).sum() for each in (0, 1)) < 2:
            raise BadInput(f"held_out has fewer than two pairs of each score in the domain {partners.names[number]!r}: give more, or leave it out")
    return asked, truth.astype(np.int64)


def _table(before: Network, after: Network, asked: Partners, truth: np.ndarray) -> tuple[list[dict[str, Any]], dict[str, float]]:
    own = {name: name for name in asked.names}
    found = {"before": similarities(before, asked), "after": similarities(after, asked, own), "without tags": similarities(after, asked)}
    table: list[dict[str, Any]] = []
    for number in np.unique(asked.domain):
        rows = np.flatnonzero(asked.domain == number)
        halves = stratified(truth[rows], (0.5, 0.5))
        row: dict[str, Any] = {"domain": asked.names[number], "pairs": len(rows)}
        for name, each in found.items():
            row |= {f"{measure} {name}": value for measure, value in worth(each[rows], truth[rows], halves).items()}
        table.append(row)
    return table, {name: float(np.mean([row[f"ROC-AUC {name}"] for row in table])) for name in found}
