"""Contriever: a search encoder from unlabelled text, by telling crops of one document from crops of all others (Izacard et al. 2022, arXiv 2112.09118).

Two random spans of the same passage, each with a tenth of its tokens deleted, are a pair; spans of other documents are not. The negatives are keys
of earlier batches, given by a slowly following copy of the encoder (momentum contrast), or the other pairs of a large batch.
"""

from __future__ import annotations

import tempfile
from array import array
from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache, partial
from itertools import chain, pairwise
from typing import Any, Literal

import numpy as np
import torch
from datasets import Dataset
from torch import Tensor, nn
from torch.nn.utils.rnn import pad_sequence

from wellread import runtime
from wellread.batches import Batches
from wellread.contrastive import Queue, against_queue, gathered, in_batch, in_chunks, momentum_copy
from wellread.data import Corpus, name_of
from wellread.documents import rows
from wellread.errors import BadInput
from wellread.inputs import TextInput
from wellread.method import method, sentence_input
from wellread.network import Network
from wellread.results import Report
from wellread.retrieve.spans import Score, can_judge, cautions, held_out, owner, whole, with_spans
from wellread.train import History, fit

# --- two views of a chunk


def crop(tokens: Tensor, shortest: float, longest: float) -> Tensor:
    """A random span of tokens [T] -> [t]: t is T times a uniform share from `shortest` to `longest`, rounded down but at least 2; its start is uniform."""
    share = shortest + (longest - shortest) * float(torch.rand(()))
    length = min(max(int(len(tokens) * share), 2), len(tokens))
    start = int(torch.randint(len(tokens) - length + 1, ()))
    return tokens[start : start + length]


def thinned(tokens: Tensor, share: float) -> Tensor:
    """Tokens [T] -> [t], each left out with probability `share` by itself; never all of them."""
    kept = tokens[torch.rand(len(tokens)) >= share]
    return kept if len(kept) else tokens[:1]


@dataclass(frozen=True)
class Frame:
    """What a tokenizer puts before and after a text (token ids), what it pads with, and how many tokens it may give."""

    before: list[int]
    after: list[int]
    padding: int
    longest: int

    @classmethod
    def of(cls, source: TextInput) -> Frame:
        tokenizer: Any = source.tokenizer
        bare, framed = tokenizer("a", add_special_tokens=False)["input_ids"], tokenizer("a")["input_ids"]
        start = next((i for i in range(len(framed) - len(bare) + 1) if framed[i : i + len(bare)] == bare), None)
        if start is None:
            raise BadInput("this tokenizer changes a text when it adds its special tokens: crops of texts cannot be framed with it")
        padding = next((each for each in (tokenizer.pad_token_id, tokenizer.eos_token_id) if each is not None), 0)
        return cls(framed[:start], framed[start + len(bare) :], padding, source.max_length)

    def batch(self, texts: Sequence[Tensor]) -> dict[str, Tensor]:
        """Token ids of texts, [T] each, as the encoder's input: {"input_ids", "attention_mask"}: int64 [B, T], padded on the right."""
        room = self.longest - len(self.before) - len(self.after)
        rows = [torch.tensor([*self.before, *text[:room].tolist(), *self.after]) for text in texts]
        mask = [torch.ones_like(row) for row in rows]
        return {"input_ids": pad_sequence(rows, True, self.padding), "attention_mask": pad_sequence(mask, True)}


# --- the corpus as chunks of tokens


@dataclass(frozen=True)
class Chunks:
    """Pieces of documents as token ids without special tokens. Only a few numbers per chunk lie in memory.

    tokens: int32, all documents one after the other, memory-mapped. start, end: int64 [N]. owner: int64 [N], which document (of passages "file#3": which file);
    chunks of one owner are no negatives of each other. group: int64 [N]. skipped: texts that were too short. unknown: share of tokens the tokenizer has no word for.
    """

    tokens: np.ndarray
    start: np.ndarray
    end: np.ndarray
    owner: np.ndarray
    group: np.ndarray
    skipped: int
    unknown: float

    def __len__(self) -> int:
        return len(self.start)

    def __getitem__(self, row: int) -> Tensor:
        return torch.from_numpy(self.tokens[self.start[row] : self.end[row]].astype(np.int64))


def chunks(corpus: Dataset, tokenizer: Any, *, length: int = 256, shortest: int = 20, seed: int = 0) -> Chunks:
    """Each document in pieces of `length` tokens, whose borders are shifted at random; pieces below `shortest` tokens are left out."""
    random, unknown, skipped, total = np.random.default_rng(seed), 0, 0, 0
    numbers = np.unique(corpus["group"], return_inverse=True)[1] if "group" in corpus.column_names else np.zeros(len(corpus), int)
    found = array("q")
    with tempfile.TemporaryFile() as file:
        for passage, group in zip(runtime.track(rows(corpus), f"tokens of {name_of(corpus)}", len(corpus)), numbers.tolist(), strict=True):
            ids = tokenizer(whole(passage), add_special_tokens=False, verbose=False)["input_ids"]
            np.asarray(ids, np.int32).tofile(file)
            first = int(random.integers(1, length + 1)) if len(ids) > length else len(ids)
            borders = [0, *range(first, len(ids), length), len(ids)]
            pieces = [[total + start, total + end, owner(passage.id), group] for start, end in pairwise(borders) if end - start >= shortest]
            found.extend(chain.from_iterable(pieces))
            skipped, total = skipped + (not pieces), total + len(ids)
            unknown += ids.count(tokenizer.unk_token_id)
        file.flush()
        tokens: np.ndarray = np.memmap(file, np.int32, "r") if total else np.empty(0, np.int32)  # stays readable after the file is closed
    start, end, whose, group_of = np.frombuffer(found, np.int64).reshape(-1, 4).T
    return Chunks(tokens, start, end, whose, group_of, skipped, unknown / max(total, 1))


def view_batches(
    source: TextInput,
    parts: Chunks,
    *,
    steps: int,
    batch_size: int = 64,
    shortest_crop: float = 0.05,
    longest_crop: float = 0.5,
    delete: float = 0.1,
    group_power: float = 0.0,
    seed: int = 0,
) -> Batches:
    """One epoch of `steps` batches {"queries", "keys": token tensors [B, T] of two views of each chunk, "owner": int64 [B]}.

    Chunks come in a new random order each time all were seen. With several groups each example draws its group by itself, with probability
    proportional to (chunks of the group) ** group_power, and then a chunk of it.
    """
    frame, groups = Frame.of(source), [np.flatnonzero(parts.group == number) for number in np.unique(parts.group)]
    odds = torch.tensor([float(len(each)) for each in groups]) ** group_power
    order = lru_cache(maxsize=2)(lambda turn: np.random.default_rng((seed, turn)).permutation(len(parts)))

    def get(numbers: np.ndarray) -> dict[str, Any]:
        if len(groups) > 1:
            chosen = [int(groups[drawn][int(torch.randint(len(groups[drawn]), ()))]) for drawn in torch.multinomial(odds, len(numbers), True).tolist()]
        else:
            chosen = [int(order(number // len(parts))[number % len(parts)]) for number in numbers.tolist()]
        tokens = [parts[row] for row in chosen]
        first, second = ([thinned(crop(each, shortest_crop, longest_crop), delete) for each in tokens] for _ in range(2))
        return {"queries": frame.batch(first), "keys": frame.batch(second), "owner": torch.from_numpy(parts.owner[chosen])}

    return Batches(steps * batch_size, get, batch_size=batch_size, seed=seed)


# --- the contrast


class Contrast(nn.Module):
    """An encoder in training: its loss for two views of B chunks, with `queue` earlier keys as negatives, or with the batch's own (queue=0).

    The slow copy and the queue are parameters and buffers of this module, so that a resumed training has them. The queue starts empty and grows:
    random columns, as the authors' code has them, are told apart without learning anything.
    """

    def __init__(
        self, encoder: nn.Module, width: int, *, queue: int = 4096, momentum: float = 0.99, temperature: float = 0.05, score: Score = "cosine"
    ) -> None:
        super().__init__()
        self.encoder = encoder
        self.scored: dict[str, Any] = {"temperature": temperature, "cosine": score == "cosine"}
        self.slow = momentum_copy(encoder, momentum) if queue else None
        self.queue = Queue(queue, width) if queue else None

    def forward(self, queries: dict[str, Tensor], keys: dict[str, Tensor], owner: Tensor) -> Tensor:
        """A scalar. queries, keys: token tensors [B, T]; owner: int64 [B], chunks of one owner do not count as negatives of each other."""
        found = in_chunks(lambda tokens: self.encoder(**tokens), queries)
        owners = gathered(owner[:, None])[0][:, 0]
        slow = self.slow
        if self.queue is None or slow is None:
            theirs, first = gathered(in_chunks(lambda tokens: self.encoder(**tokens), keys))
            same = owner[:, None] == owners[None]
            return in_batch(found, theirs, same=same, first=first, **self.scored)
        with torch.no_grad():
            if self.training:
                slow.update_parameters(self.encoder)
            theirs = in_chunks(lambda tokens: slow(**tokens), keys)
        loss = against_queue(found, theirs, self.queue, owner, **self.scored)
        if self.training:
            self.queue.put(gathered(theirs)[0], owners)
        return loss


def learn(
    encoder: Network, batches: Batches, *, queue: int, momentum: float, temperature: float, score: Score, learning_rate: float, seed: int
) -> tuple[Network, History]:
    """A copy of a sentence encoder after one epoch of such batches as `view_batches` gives, and what happened."""
    result = encoder.copy()
    contrast = Contrast(result.module, result.embedding_size, queue=queue, momentum=momentum, temperature=temperature, score=score)

    def step(module: nn.Module, batch: dict[str, Any]) -> Tensor:
        return module(batch["queries"], batch["keys"], batch["owner"])

    optimizer = partial(torch.optim.AdamW, betas=(0.9, 0.98), eps=1e-6, weight_decay=0.01)
    history = fit(contrast, batches, step, epochs=1, learning_rate=learning_rate, optimizer=optimizer, warmup=0.1, seed=seed, name="contriever")
    return result, history


@method
def contriever(
    encoder: Network,
    corpus: Corpus,
    *,
    steps: int = 500,
    batch_size: int = 64,
    queue: int = 4096,
    momentum: float = 0.99,
    temperature: float = 0.05,
    score: Literal["cosine", "dot"] = "cosine",
    learning_rate: float = 2e-5,
    chunk_length: int = 256,
    shortest: int = 20,
    shortest_crop: float = 0.05,
    longest_crop: float = 0.5,
    delete: float = 0.1,
    group_power: float = 0.0,
    queries: int = 100,
    language: str | None = "en",
    seed: int = 0,
) -> Network:
    """An encoder that finds the right passage in your own texts better, learned from these texts alone: no questions, no labels.

    encoder: a sentence encoder; the same one then reads questions and passages. It is not changed.
    corpus: passages with id and text, if you like title, and group (a language, a source), from which examples are then drawn evenly.
    steps: optimiser steps; AdamW as in the paper, a tenth of them warm-up, cosine.
    batch_size: pairs in a step.
    queue: earlier keys that serve as negatives, at most one for each chunk of the corpus; 0 takes the other pairs of the batch instead. In a short run
        with a high learning rate keep it to few batches: old keys are told from new ones by their age alone.
    momentum: of the slow copy that gives the keys. The paper's 0.9995 belongs to 500,000 steps: in 500 such a copy hardly moves.
    temperature: scores are divided by it.
    score: what two texts are compared by, in training and then in the search: cosine, or the plain dot product of the paper.
    learning_rate: highest one.
    chunk_length: tokens of the pieces that long passages are cut into.
    shortest: pieces with fewer tokens are left out.
    shortest_crop, longest_crop: a view is such a share of its chunk (0.1 and 0.5 in the paper's multilingual model).
    delete: share of a view's tokens that are left out (0 in the paper's multilingual model).
    group_power: groups are drawn in proportion to their size to this power: 0 evenly, 1 as they are.
    queries: so many documents, at most a tenth, are kept out of the training to measure on (0 measures nothing).
    language: of the stop words and stemming of BM25 in that measurement.
    seed: of crops, order and dropout.

    The report "contriever" compares words (BM25), the encoder before and after, and words and encoder fused, at finding documents that were not
    trained on from a span cut out of them. Search with what is best there: fused is, unless the encoder is far behind the words.
    Raises BadInput for a network that is no sentence encoder, a corpus of one document or of too short texts, a queue smaller than a batch, shares
    outside 0...1; Diverged, with the last good weights kept, at a loss that is not finite.
    Source: Izacard et al. 2022, arXiv 2112.09118.
    """
    source = sentence_input(encoder)
    for right, sentence in (
        (steps >= 1, f"steps is {steps}: give at least 1"),
        (batch_size >= 2, f"batch_size is {batch_size}: give at least 2, a pair is told apart from others"),
        (queue == 0 or queue >= batch_size, f"queue is {queue} and a batch has {batch_size} keys: give at least as many, or 0 for the batch's own"),
        (0 <= momentum <= 1, f"momentum is {momentum}: give a number from 0 to 1"),
        (0 < temperature < float("inf"), f"temperature is {temperature}: give a number above 0"),
        (0 <= shortest_crop <= longest_crop <= 1, f"longest_crop is {longest_crop} and shortest_crop {shortest_crop}: give shares of 1, in order"),
        (0 <= delete < 1, f"delete is {delete}: give a share, at least 0 and below 1"),
        (2 <= shortest <= chunk_length, f"shortest is {shortest}: give from 2 to chunk_length, {chunk_length}"),
        (queries >= 0, f"queries is {queries}: give 0 or more"),
    ):
        if not right:
            raise BadInput(sentence)
    if queries:
        can_judge(language)
    training, asked, texts = held_out(corpus, count=queries, seed=seed)
    parts = chunks(training, source.tokenizer, length=chunk_length, shortest=shortest, seed=seed)
    if len(np.unique(parts.owner)) < 2:
        raise BadInput(
            f"corpus has {'one document' if len(parts) else 'no text'} of {shortest} tokens or more ({parts.skipped} are shorter), and documents are told "
            "apart from each other: give more texts, or lower shortest"
        )
    warned = cautions(corpus, parts.unknown, groups=True)
    batches = view_batches(
        source, parts, steps=steps, batch_size=batch_size, shortest_crop=shortest_crop, longest_crop=longest_crop,
        delete=delete, group_power=group_power, seed=seed,
    )  # fmt: skip
    held = min(queue, max(len(parts), batch_size)) if queue else 0
    settings: dict[str, Any] = {"momentum": momentum, "temperature": temperature, "score": score, "learning_rate": learning_rate, "seed": seed}
    result, history = learn(encoder, batches, queue=held, **settings)

    start = next((made["settings"].get("name") for made in encoder.lineage if made["method"] == "load"), None)
    figures: dict[str, Any] = {"start": start or "a given network", "chunks": len(parts), "texts left out, too short": parts.skipped}
    figures |= {"pairs seen": steps * batch_size, "negatives of a query, at most": held or batch_size - 1, "score": score}
    figures |= {"loss, last tenth": float(np.mean(history.loss[-max(1, steps // 10) :]))}
    text = "What the start had learned before, perhaps from labelled pairs, is part of every figure: the paper's claim is about a start that knew no pairs."
    report = Report("an encoder for these texts", figures, text=text, warnings=warned)
    result.reports["contriever"] = with_spans(report, encoder, result, corpus, asked, texts, score=score, language=language)
    return result
