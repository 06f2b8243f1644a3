"""Contrastive context prediction: languages of an encoder aligned by documents without translations (Wu et al. 2022, arXiv 2206.03281).

A sentence is to be told, from its own language's earlier sentences, to be near another sentence: in every language the same relation between neighbours
is learned, and the languages' spaces take the same shape. A calibration per language then lays them on each other; it can also be had alone.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from functools import lru_cache
from typing import Any, Literal

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from wellread.batches import Batches
from wellread.calibration import FEWEST, Level, calibrate, check_known, uncalibrated
from wellread.contrastive import Queue, against_queue, gathered, in_chunks, momentum_copy
from wellread.data import Corpus, name_of
from wellread.errors import BadInput, Diverged
from wellread.inputs import TextInput
from wellread.method import method, sentence_input
from wellread.network import Network
from wellread.results import Report
from wellread.retrieve.contexts import Contexts, apart, contexts, found_neighbours
from wellread.train import History, fit

Norm = Literal["alternating", "batch", "none"]

# --- pairs


def pair_batches(
    source: TextInput, parts: Contexts, *, steps: int, batch_size: int = 48, window: int = 4, language_power: float = 0.3, tokens: int = 64, seed: int = 0
) -> Batches:
    """One epoch of `steps` batches {"centers", "contexts": token tensors [B, T], "page": int64 [B], "language": int64 [B], the same in all rows}.

    Each batch is of one language, drawn in proportion to (its sentences that have a neighbour) ** language_power. Its sentences come in a new random order
    when all were seen; the context of a sentence is drawn evenly from its neighbours.
    """
    able = parts.centers(window)
    pools = [np.flatnonzero(able & (parts.language == code)) for code in range(len(parts.languages))]
    odds = np.array([float(len(pool)) ** language_power for pool in pools])
    drawn = np.random.default_rng(seed).choice(len(pools), steps, p=odds / odds.sum())
    earlier = [np.cumsum(drawn == code) - 1 for code in range(len(pools))]  # how many batches of this language came before
    order = lru_cache(maxsize=2 * len(pools))(lambda code, turn: np.random.default_rng((seed, code, turn)).permutation(pools[code]))
    cut = replace(source, max_length=min(tokens, source.max_length))

    def get(numbers: np.ndarray) -> dict[str, Any]:
        code = int(drawn[numbers[0] // batch_size])
        center = []
        for number in numbers.tolist():
            turn, place = divmod(int(earlier[code][number // batch_size]) * batch_size + number % batch_size, len(pools[code]))
            center.append(int(order(code, turn)[place]))
        near = [parts.neighbours(each, window) for each in center]
        context = [int(each[int(torch.randint(len(each), ()))]) for each in near]
        return {
            "centers": cut(parts.texts(center)),
            "contexts": cut(parts.texts(context)),
            "page": torch.from_numpy(parts.page[center]),
            "language": torch.full((len(center),), code),
        }

    return Batches(steps * batch_size, get, batch_size=batch_size, seed=seed)


# --- the contrast


class LanguageNorm(nn.Module):
    """Batch norm of x [B, d] with running statistics of each language, and either the batch's statistics or the running ones.

    A batch's own statistics tell which vectors were normalised together; with them on both sides of a pair, the pair is found without being understood.
    Only batches normalised by their own statistics change the running ones, the first of a language entirely.
    """

    mean: Tensor
    variance: Tensor
    seen: Tensor

    def __init__(self, width: int, languages: int, momentum: float = 0.1) -> None:
        super().__init__()
        self.weight, self.bias, self.momentum = nn.Parameter(torch.ones(width)), nn.Parameter(torch.zeros(width)), momentum
        self.register_buffer("mean", torch.zeros(languages, width))
        self.register_buffer("variance", torch.ones(languages, width))
        self.register_buffer("seen", torch.zeros(languages, dtype=torch.int64))

    def forward(self, x: Tensor, language: int, of_the_batch: bool) -> Tensor:
        if not of_the_batch:  # copies: the other side changes these before the backward pass
            return F.batch_norm(x, self.mean[language].clone(), self.variance[language].clone(), self.weight, self.bias)
        self.seen[language] += 1
        pace = max(self.momentum, 1 / int(self.seen[language]))
        return F.batch_norm(x, self.mean[language], self.variance[language], self.weight, self.bias, training=True, momentum=pace)


class Projected(nn.Module):
    """Encoder and projection: linear, norm, ReLU, linear. Only the encoder is kept after the training."""

    def __init__(self, encoder: nn.Module, width: int, languages: int, norm: bool = True) -> None:
        super().__init__()
        self.encoder, self.enter, self.leave = encoder, nn.Linear(width, width), nn.Linear(width, width)
        self.norm = LanguageNorm(width, languages) if norm else None

    def embedded(self, tokens: dict[str, Tensor]) -> Tensor:
        """Token tensors [B, T] to the encoder's vectors [B, d]."""
        return in_chunks(lambda part: self.encoder(**part), tokens)

    def project(self, x: Tensor, language: int, of_the_batch: bool) -> Tensor:
        """Vectors [B, d] of one language to [B, d], not normalised."""
        x = self.enter(x)
        return self.leave(F.relu(x if self.norm is None else self.norm(x, language, of_the_batch)))

    def forward(self, tokens: dict[str, Tensor], language: int) -> Tensor:
        return self.project(self.embedded(tokens), language, False)


class ContextContrast(nn.Module):
    """An encoder in training: its loss for B sentences and a neighbour of each, against `queue` earlier sentences of the same language.

    norm: alternating (one side by the batch's statistics, the other by the language's running ones, in turn), batch (both by the batch's: pairs recognise
    each other), none. shared: one bank for all languages. The last two are here to be compared with.
    momentum: 0 puts the encoder's own earlier vectors into the bank; else a copy gives them that follows so slowly.
    All that it remembers is in buffers, so that a resumed training has it.
    """

    steps: Tensor
    rank: Tensor

    def __init__(
        self, encoder: nn.Module, width: int, languages: int, *, queue: int | Sequence[int] = 1024, temperature: float = 0.05, momentum: float = 0.0,
        norm: Norm = "alternating", shared: bool = False,
    ) -> None:  # fmt: skip
        super().__init__()
        self.projected = Projected(encoder, width, languages, norm != "none")
        self.slow = momentum_copy(self.projected, momentum) if momentum else None
        sizes = [queue] * languages if isinstance(queue, int) else list(queue)
        self.banks = nn.ModuleList([Queue(sum(sizes) if shared else size, width) for size in (sizes[:1] if shared else sizes)])
        self.recent = Queue(512, width)
        self.temperature, self.norm, self.shared = temperature, norm, shared
        self.register_buffer("steps", torch.zeros((), dtype=torch.int64))
        self.register_buffer("rank", torch.tensor(float(width)))

    def bank(self, language: int) -> Queue:
        """The earlier sentences of a language."""
        found = self.banks[0 if self.shared else language]
        assert isinstance(found, Queue)
        return found

    def forward(self, centers: dict[str, Tensor], neighbours: dict[str, Tensor], pages: Tensor, language: int) -> Tensor:
        """A scalar. centers, neighbours: token tensors [B, T] of one language; pages: int64 [B], earlier sentences of the same page are no negatives."""
        made = self.projected
        both = [made.embedded(centers), made.embedded(neighbours)]
        first = int(self.steps) % 2 if self.training and self.norm == "alternating" else 0
        z = [both[0], both[1]]
        for side in (1 - first, first):  # the side with running statistics comes before the other changes them
            z[side] = made.project(both[side], language, self.training and (side == first or self.norm == "batch"))
        loss = self.loss(z[0], z[1], pages, language)
        if self.training:
            with torch.no_grad():
                if self.slow is not None:
                    self.slow.update_parameters(made)
                    z[1] = self.slow(neighbours, language)
                owners = gathered(pages[:, None])[0][:, 0]
                self.bank(language).put(gathered(F.normalize(z[1].detach(), dim=1))[0], owners)
                self.recent.put(gathered(both[1].detach())[0], owners)
                self.steps += 1
        return loss

    def loss(self, z: Tensor, other: Tensor, pages: Tensor, language: int) -> Tensor:
        """Both directions of projected vectors [B, d], [B, d]: each is to be found from the other among the bank of its language."""
        bank = self.bank(language)
        return against_queue(z, other, bank, pages, temperature=self.temperature) + against_queue(other, z, bank, pages, temperature=self.temperature)

    def watch(self) -> float:
        """The smaller effective rank of the last embeddings and of the fullest bank, every tenth step. Raises `Diverged` below a twentieth of the width."""
        held = [self.recent.held()[0], max((bank.held()[0] for bank in self.banks), key=len)]  # type: ignore[operator]
        if int(self.steps) % 10 == 0 and all(len(each) >= 64 for each in held):
            ranks = [effective_rank(each) for each in held]
            self.rank.fill_(min(ranks))
            limit = 0.05 * min(held[0].shape[1], 512)
            if min(ranks) < limit:
                what = "its vectors lie" if ranks[0] < limit else "its projected vectors lie"
                raise Diverged(
                    f"the encoder collapsed at step {int(self.steps)}: {what} in {min(ranks):.1f} of {held[0].shape[1]} dimensions; lower learning_rate, "
                    "or raise temperature"
                )
        return float(self.rank)


def effective_rank(x: Tensor) -> float:
    """The exponential of the entropy of the singular values of centred vectors [n, d]: 1 on a line, d in a ball (Roy and Vetterli 2007)."""
    found = torch.linalg.svdvals((x - x.mean(0)).float())
    p = found / found.sum().clamp(min=1e-30)
    return float(torch.special.entr(p).sum().exp())


def learn(
    encoder: Network, batches: Batches, languages: int, *, queue: int | Sequence[int] = 1024, temperature: float = 0.05, momentum: float = 0.0,
    norm: Norm = "alternating", shared: bool = False, learning_rate: float = 2e-5, seed: int = 0,
) -> tuple[Network, History]:  # fmt: skip
    """A copy of a sentence encoder after one epoch of such batches as `pair_batches` gives, and what happened."""
    result = uncalibrated(encoder).copy()
    contrast = ContextContrast(
        result.module, result.embedding_size, languages, queue=queue, temperature=temperature, momentum=momentum, norm=norm, shared=shared
    )

    def step(module: Any, batch: dict[str, Any]) -> tuple[Tensor, dict[str, float | Tensor]]:
        rank = module.watch()
        return module(batch["centers"], batch["contexts"], batch["page"], int(batch["language"][0])), {"effective rank": rank}

    history = fit(contrast, batches, step, epochs=1, learning_rate=learning_rate, weight_decay=0.01, warmup=0.1, clip=2.0, seed=seed, name="context prediction")
    return result, history


@method
def contrastive_context_prediction(
    encoder: Network,
    corpus: Corpus,
    *,
    steps: int = 500,
    batch_size: int = 48,
    window: int = 4,
    queue: int = 1024,
    momentum: float = 0.0,
    temperature: float = 0.05,
    learning_rate: float = 2e-5,
    language_power: float = 0.3,
    shortest: int = 5,
    tokens: int = 64,
    calibration: Literal["none", "shift", "scale", "rotate"] = "rotate",
    sentences_to_fit: int = 2000,
    pivot: str | None = None,
    shrink: float = 100.0,
    held_out: int = 300,
    seed: int = 0,
) -> Network:
    """An encoder whose languages lie on each other, so that a question finds text in another language. No translations are needed.

    encoder: a sentence encoder that knows the languages at least a little. It is not changed.
    corpus: passages with id, text and group, the language. Passages "file#1", "file#2", ... of a language are one page, in the order of the table.
    steps: optimiser steps; AdamW, a tenth of them warm-up, cosine. 0 trains nothing and only calibrates, which takes a minute and is often most of the gain.
    batch_size: pairs in a step, all of one language.
    window: the context of a sentence is one at most so many places before or after it.
    queue: earlier sentences of the language that serve as negatives, at most one for each sentence of it.
    momentum: 0 takes the encoder's own earlier vectors as negatives; 0.999 those of a copy that follows slowly.
    temperature: cosines are divided by it.
    learning_rate: highest one.
    language_power: languages are drawn in proportion to their size to this power: 0 evenly, 1 as they are.
    shortest: sentences with fewer tokens are left out.
    tokens: longer sentences are cut, in training.
    calibration: after training, per language: shift its mean to 0, scale its variances to 1 too, or also rotate it to the pivot where that proves itself.
    sentences_to_fit: so many sentences of each language, at most, are read for the calibration.
    pivot: the language that others are rotated to; by default the one with the most sentences.
    shrink: so many sentences' weight has the mean variance in each variance.
    held_out: about so many sentences of each language, whole pages and at most a fifth, are kept out to measure on.
    seed: of pages, pairs, order and dropout.

    Searching with it, the language of a text is guessed from its vector; wellread.calibration.for_language fixes it, and uncalibrated takes the calibration off.
    The report "contrastive_context_prediction" says how the guess does on held-out sentences, and how well they find their neighbours before and after. How well
    languages find each other cannot be measured without translations: if you have some, measure it.
    Raises BadInput for a network that is no sentence encoder, a corpus without group or with one language, a language of which the tokenizer does not know
    a tenth of the tokens, or that has too few sentences with neighbours; Diverged when the loss is not finite or the vectors collapse.
    Source: Wu et al. 2022, arXiv 2206.03281; the authors' code is without the pre-training.
    """
    source = sentence_input(encoder)
    for right, sentence in (
        (steps >= 0, f"steps is {steps}: give 0 (calibration alone) or more"),
        (steps > 0 or calibration != "none", "steps is 0 and calibration none: nothing would be done"),
        (batch_size >= 2, f"batch_size is {batch_size}: give at least 2, the norm needs them"),
        (window >= 1, f"window is {window}: give at least 1"),
        (queue >= batch_size, f"queue is {queue} and a batch has {batch_size} sentences: give at least as many"),
        (0 <= momentum < 1, f"momentum is {momentum}: give a number from 0 to below 1"),
        (0 < temperature < float("inf"), f"temperature is {temperature}: give a number above 0"),
        (shortest >= 1 and tokens >= 8, f"shortest is {shortest} and tokens {tokens}: give at least 1 and 8"),
        (sentences_to_fit >= 20, f"sentences_to_fit is {sentences_to_fit}: give at least 20"),
        (0 <= shrink < float("inf"), f"shrink is {shrink}: give 0 or more"),
        (held_out >= 0, f"held_out is {held_out}: give 0 or more"),
        ("group" in corpus.column_names, "corpus has no column 'group': give the language of each passage there"),
    ):
        if not right:
            raise BadInput(sentence)
    nameless = next((row for row, language in enumerate(corpus["group"]) if language in (None, "")), None)
    if nameless is not None:
        raise BadInput(f"row {nameless} of the corpus has no group: give the language of each passage there")
    whole = contexts(corpus, source.tokenizer, shortest=shortest)
    if len(whole.languages) < 2:
        raise BadInput(f"corpus has the one language {whole.languages[0]!r} in its column 'group': give two or more, or use contriever for one")
    if pivot is not None and pivot not in whole.languages:
        raise BadInput(f"pivot is {pivot!r}: choose one of {', '.join(map(repr, whole.languages))}")
    training, judging = apart(whole, held_out, seed)
    able = training.centers(window)
    pairs = [int((able & (training.language == code)).sum()) for code in range(len(whole.languages))]
    for language, count in zip(whole.languages, pairs, strict=True):
        if steps and count < batch_size:
            raise BadInput(
                f"{language!r} has {count} sentences of {shortest} tokens or more with another one near them, and a batch takes {batch_size}: give longer "
                "documents of it, a smaller batch_size, or steps 0"
            )
    random = np.random.default_rng(seed)
    chosen = {
        language: training.texts(random.permutation(np.flatnonzero(training.language == code))[:sentences_to_fit])
        for code, language in enumerate(whole.languages)
    }
    few = next((language for language, some in chosen.items() if calibration != "none" and len(some) < FEWEST), None)
    if few is not None:
        raise BadInput(f"there are {len(chosen[few])} different sentences of {few!r}: give at least {FEWEST} to estimate its mean from, or calibration none")
    unknowns = check_known(encoder, chosen)
    start = uncalibrated(encoder)
    result, history = start.copy(), History()
    if steps:
        batches = pair_batches(
            source, training, steps=steps, batch_size=batch_size, window=window, language_power=language_power, tokens=tokens, seed=seed
        )
        held = [max(min(queue, count), batch_size) for count in pairs]
        settings: dict[str, Any] = {"temperature": temperature, "momentum": momentum, "learning_rate": learning_rate, "seed": seed}
        result, history = learn(start, batches, len(whole.languages), queue=held, **settings)
    neighbours = {"neighbour found before, %": found_neighbours(start, judging, window)}
    if steps:
        neighbours["neighbour found after training, %"] = found_neighbours(result, judging, window)
    tables: dict[str, list[dict[str, Any]]] = {}
    figures: dict[str, Any] = {"languages": len(whole.languages), "sentences": len(whole), "left out, short or repeated": whole.dropped, "pairs seen": steps * batch_size}
    if calibration != "none":
        level: Level = calibration
        kept = {language: judging.texts(np.flatnonzero(judging.language == code)) for code, language in enumerate(whole.languages)}
        result = calibrate(result, chosen, held_out=kept, level=level, pivot=pivot, shrink=shrink, source=name_of(corpus), seed=seed)
        made = result.reports.pop("calibration")
        tables["calibration"] = made.tables["languages"]
        figures |= {name: value for name, value in made.figures.items() if name != "languages"}
        neighbours["neighbour found calibrated, %"] = found_neighbours(result, judging, window)
    tables["languages"] = [
        {"language": language, "pages": len(np.unique(whole.page[whole.language == code])), "sentences": int((whole.language == code).sum())}
        | {"pairs": pairs[code], "unknown tokens, %": 100 * unknowns[language]}
        | {name: values[code] for name, values in neighbours.items()}
        for code, language in enumerate(whole.languages)
    ]
    if steps:
        figures |= {"loss, last tenth": float(np.mean(history.loss[-max(1, steps // 10) :])), "effective rank at the end": history.logs["effective rank"][-1]}
    text = (
        "Build the index with cosine. A text's language is guessed from its vector. Finding neighbours is measured within each language, on pages that were not "
        "trained on: it tells whether the encoder still understands text, not whether languages find each other."
    )
    result.reports["contrastive_context_prediction"] = Report("languages on one another", figures, tables=tables, text=text)
    return result
