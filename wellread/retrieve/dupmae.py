"""DupMAE: a sentence vector from which the text can be rebuilt, and a vector of word weights beside it (Xiao et al. 2022, arXiv 2211.08769).

Three tasks on unlabelled texts. Hidden words are guessed from the others (masked language modelling). A decoder of one layer rebuilds the whole
text from its sentence vector and a few words. And the words of the text are guessed from the highest logit that any of its other tokens gives
to each word. The decoder is thrown away; the encoder, and the vocabulary head that gives the word weights, stay.
"""

from __future__ import annotations

from functools import lru_cache
from typing import Any, Literal

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from wellread import runtime
from wellread.batches import Batches
from wellread.data import Corpus
from wellread.errors import BadInput
from wellread.inputs import TextInput
from wellread.lexicon import Lexicon, lexicon_of, max_pooled, ranked_by_parts, speakable, trained_head, warm_up, with_lexicon
from wellread.masked import NOTHING, hidden_states, mask_token, masked, transformer_of, word_numbers, word_table
from wellread.method import method, sentence_input
from wellread.network import Network
from wellread.ranking import Judgements, measure
from wellread.results import Report
from wellread.retrieve.contriever import Chunks, Frame, chunks
from wellread.retrieve.spans import can_judge, cautions, held_out, with_spans
from wellread.train import History, fit

Target = Literal["normalised", "code"]

# --- what is asked of the sentence vector


def row_masks(words: Tensor, real: Tensor, share: float) -> Tensor:
    """bool [B, T, T]: which places row i of the decoder sees. Each row leaves out words of its own, each with probability `share`, and itself.

    words: int64 [B, T], the number of each token's word, 0 for special tokens, which are not left out. real: bool [B, T], false for padding.
    Every row sees place 0, where the sentence vector stands.
    """
    rows, length = words.shape
    left_out = torch.rand(rows, length, length + 1, device=words.device) < share  # [text, row, word]
    left_out[:, :, 0] = False
    seen = ~left_out.gather(2, words[:, None].expand(-1, length, -1)) & real[:, None] & real[:, :, None]
    seen.diagonal(dim1=1, dim2=2).fill_(False)
    seen[:, :, 0] = True
    return seen


class Decoder(nn.Module):
    """One transformer layer whose queries are not its keys and values: attention, residual with the queries, norm, feed-forward, norm."""

    def __init__(self, width: int, heads: int, inner: int, *, dropout: float = 0.1, eps: float = 1e-12, std: float = 0.02) -> None:
        super().__init__()
        self.heads = heads
        self.query, self.key, self.value, self.out = (nn.Linear(width, width) for _ in range(4))
        self.widen, self.narrow = nn.Linear(width, inner), nn.Linear(inner, width)
        self.norm, self.last_norm = nn.LayerNorm(width, eps=eps), nn.LayerNorm(width, eps=eps)
        self.dropout = nn.Dropout(dropout)
        for each in self.modules():
            if isinstance(each, nn.Linear):
                nn.init.normal_(each.weight, std=std)
                nn.init.zeros_(each.bias)

    def forward(self, queries: Tensor, states: Tensor, seen: Tensor) -> Tensor:
        """queries and states: [B, T, C]; seen: bool [B, T, T], which states each query attends to; [B, T, C]."""

        def parts(layer: nn.Linear, given: Tensor) -> Tensor:
            return layer(given).unflatten(-1, (self.heads, -1)).transpose(1, 2)

        q, k, v = parts(self.query, queries), parts(self.key, states), parts(self.value, states)
        found = F.scaled_dot_product_attention(q, k, v, seen[:, None], self.dropout.p if self.training else 0.0)
        between = self.norm(queries + self.dropout(self.out(found.transpose(1, 2).flatten(2))))
        return self.last_norm(between + self.dropout(self.narrow(F.gelu(self.widen(between)))))


def sentence_vector(states: Tensor, real: Tensor, pooling: str) -> Tensor:
    """[B, C] from states [B, T, C]: the first one ("cls"), or the mean of those that `real`, bool [B, T], marks."""
    return states[:, 0] if pooling == "cls" else (states * real[..., None]).sum(1) / real.sum(1, keepdim=True)


def position_vectors(embeddings: Any, length: int) -> Tensor:
    """The encoder's vectors [T, C] of the first `length` positions. RoBERTa and its kin number them from behind the padding token on."""
    table = embeddings.position_embeddings
    first = 0 if table.padding_idx is None else table.padding_idx + 1
    return table.weight[first : first + length]


# --- what is asked of the other tokens


def bag_loss(pooled: Tensor, words: Tensor, counted: Tensor, target: Target = "normalised") -> Tensor:
    """Mean over texts of - sum_v w_v log softmax(pooled)_v, a scalar in nats.

    pooled: [B, U]. words: int64 [B, T], columns of `pooled`; counted: bool [B, T], which of them are words of the text. Every distinct word weighs the
    same: all together 1 ("normalised"), or each 1 / (words with repeats), as in the authors' code, which is less than 1 together when words repeat.
    """
    ordered = words.masked_fill(~counted, -1).sort(1).values
    distinct = (ordered >= 0) & torch.cat([torch.ones_like(counted[:, :1]), ordered[:, 1:] != ordered[:, :-1]], 1)
    count = (distinct if target == "normalised" else counted).sum(1, keepdim=True).clamp(min=1)
    chances = F.log_softmax(pooled, -1).gather(1, ordered.clamp(min=0))
    return -(chances.masked_fill(~distinct, 0.0) / count).sum(1).mean()


# --- the training


class Duplex(nn.Module):
    """An encoder with its vocabulary head, and the decoder that is thrown away: the losses of a batch.

    words: int64 [U], ascending, the words of the vocabulary that guesses choose from. A weight of 0 leaves a task out.
    """

    words: Tensor

    def __init__(
        self,
        encoder: nn.Module,
        words: Tensor,
        *,
        pooling: str = "cls",
        query: Literal["v1", "v2"] = "v2",
        bow_target: Target = "normalised",
        decoder_weight: float = 1.0,
        bow_weight: float = 0.1,
    ) -> None:
        super().__init__()
        self.encoder = encoder
        self.pooling, self.query, self.bow_target, self.decoder_weight, self.bow_weight = pooling, query, bow_target, decoder_weight, bow_weight
        inner, table = transformer_of(encoder), word_table(encoder)
        width, config = table.shape[1], inner.config
        self.decoder = Decoder(
            width, config.num_attention_heads, getattr(config, "intermediate_size", None) or getattr(config, "hidden_dim", None) or 4 * width,
            dropout=inner.embeddings.dropout.p, eps=inner.embeddings.LayerNorm.eps, std=getattr(config, "initializer_range", 0.02),
        )  # fmt: skip
        self.register_buffer("words", words)

    def guesses(self, states: Tensor) -> Tensor:
        """Logits [..., U] from states [..., C]."""
        return lexicon_of(self.encoder).logits(states, word_table(self.encoder), self.words)

    def rebuilt(self, sentence: Tensor, tokens: dict[str, Tensor], seen: Tensor) -> Tensor:
        """States [B, T, C] from sentence vectors [B, C] and what each row sees, bool [B, T, T], of the text (token tensors [B, T])."""
        embeddings, length = transformer_of(self.encoder).embeddings, seen.shape[1]
        repeated = sentence[:, None].expand(-1, length, -1)
        states = torch.cat([sentence[:, None], embeddings(input_ids=tokens["input_ids"])[:, 1:]], 1)
        if self.query == "v1":
            queries = repeated + position_vectors(embeddings, length)
        else:
            queries = embeddings(input_ids=None, inputs_embeds=repeated)
        return self.decoder(queries, states, seen)

    def forward(self, batch: dict[str, Any]) -> dict[str, Tensor]:
        """The losses "masked", "sentence" and "bag", scalars in nats, not yet weighted, of a batch of `text_batches`."""
        column = torch.searchsorted(self.words, batch["text"]["input_ids"])  # of what is not among the words, any: it is not counted
        real, counted, chosen = batch["text"]["attention_mask"].bool(), batch["words"] > 0, batch["labels"] != NOTHING
        states, found = hidden_states(self.encoder, batch["masked"]), {}
        if self.bow_weight:
            logits = self.guesses(states)
            found["bag"] = bag_loss(max_pooled(logits[:, 1:], real[:, 1:]), column, counted, self.bow_target)
            guesses = logits[chosen]
        else:
            guesses = self.guesses(states[chosen])
        found["masked"] = F.cross_entropy(guesses, column[chosen])
        if self.decoder_weight:
            sentence = sentence_vector(states, real, self.pooling)[batch["sentence"]]
            rebuilt = self.rebuilt(sentence, batch["text"], batch["seen"])
            found["sentence"] = F.cross_entropy(self.guesses(rebuilt[counted]), column[counted])
        return found

    def loss(self, found: dict[str, Tensor]) -> Tensor:
        """The weighted sum, a scalar."""
        weight = {"masked": 1.0, "sentence": self.decoder_weight, "bag": self.bow_weight}
        return sum((weight[name] * each for name, each in found.items()), torch.zeros((), device=self.words.device))


def text_batches(
    source: TextInput, parts: Chunks, *, steps: int, batch_size: int = 32, encoder_share: float = 0.3, decoder_share: float = 0.5, seed: int = 0
) -> Batches:
    """One epoch of `steps` batches, in a new random order each time all texts were seen.

    {"text", "masked": token tensors [B, T], as they are and with words hidden; "labels": int64 [B, T], what was hidden; "words": int64 [B, T], the
    word of each token; "seen": bool [B, T, T], what the decoder sees; "sentence": int64 [B], the row whose sentence vector it is given}.
    """
    frame, tokenizer = Frame.of(source), source.tokenizer
    order = lru_cache(maxsize=2)(lambda turn: np.random.default_rng((seed, turn)).permutation(len(parts)))

    def get(numbers: np.ndarray) -> dict[str, Any]:
        text = frame.batch([parts[int(order(number // len(parts))[number % len(parts)])] for number in numbers.tolist()])
        words = word_numbers(text["input_ids"], tokenizer)
        hidden, labels = masked(text, tokenizer, encoder_share)
        seen = row_masks(words, text["attention_mask"].bool(), decoder_share)
        return {"text": text, "masked": hidden, "labels": labels, "words": words, "seen": seen, "sentence": torch.arange(len(numbers))}

    return Batches(steps * batch_size, get, batch_size=batch_size, seed=seed)


def mismatched(batches: Batches) -> Batches:
    """The same texts, each to be rebuilt from the sentence vector of the next one."""

    def get(rows: np.ndarray) -> dict[str, Any]:
        batch = batches.get(rows)
        return batch | {"sentence": batch["sentence"].roll(1)}

    return Batches(batches.rows, get, batch_size=batches.batch_size, seed=batches.seed)


def learn(network: Network, batches: Batches, words: Tensor, *, learning_rate: float = 1e-4, seed: int = 0, **tasks: Any) -> tuple[Network, Duplex, History]:
    """A copy of an encoder with a vocabulary head after one epoch of such batches as `text_batches` gives, the training's module, what happened.

    words: int64 [U], what guesses choose from. tasks: settings of `Duplex`.
    """
    result = network.copy()
    duplex = Duplex(result.module, words, **tasks)

    def step(module: nn.Module, batch: dict[str, Any]) -> tuple[Tensor, dict[str, Any]]:
        found = module(batch)
        return duplex.loss(found), {name: each.detach() for name, each in found.items()}

    history = fit(duplex, batches, step, epochs=1, learning_rate=learning_rate, weight_decay=0.01, warmup=0.1, seed=seed, name="dupmae")
    result.module.eval()
    return result, duplex, history


def bottleneck(duplex: Duplex, batches: Batches) -> dict[str, float]:
    """The decoder's loss in nats with each text's own sentence vector ("own") and with that of another ("other"), means over the batches."""
    found: dict[str, float] = {}
    duplex.eval()
    with torch.inference_mode():
        for name, each in (("own", batches), ("other", mismatched(batches))):
            found[name] = float(np.mean([float(duplex(batch)["sentence"]) for batch in each.epoch(1)]))
    return found


def can_rebuild(module: nn.Module) -> None:
    """Raises `BadInput` for an encoder whose embedding layer the decoder cannot use."""
    inner, table = transformer_of(module), word_table(module)
    if not isinstance(getattr(getattr(inner, "embeddings", None), "position_embeddings", None), nn.Embedding):
        raise BadInput(f"this encoder is a {type(inner).__name__} without a table of positions, which the decoder asks by: give one of the BERT or RoBERTa kind")
    if table.shape[1] != inner.config.hidden_size:
        raise BadInput(f"words have {table.shape[1]} numbers in this encoder and its states {inner.config.hidden_size}: give one in which they are as many")


def corpus_words(parts: Chunks, size: int) -> Tensor:
    """int64 [U]: the tokens that occur in the texts, of a vocabulary of `size`, ascending."""
    seen = np.zeros(size, bool)
    for start in range(0, len(parts.tokens), 2**20):
        seen[parts.tokens[start : start + 2**20]] = True
    return torch.from_numpy(np.flatnonzero(seen))


@method
def dupmae(
    encoder: Network,
    corpus: Corpus,
    *,
    steps: int = 500,
    batch_size: int = 32,
    tokens: int = 150,
    encoder_share: float = 0.3,
    decoder_share: float = 0.5,
    decoder_weight: float = 1.0,
    bow_weight: float = 0.1,
    bow_target: Literal["normalised", "code"] = "normalised",
    sentence: Literal["own", "cls"] = "own",
    query: Literal["v1", "v2"] = "v2",
    words: Literal["corpus", "all"] = "corpus",
    vocabulary_head: str | None = None,
    warm_head: int = 200,
    learning_rate: float = 1e-4,
    k: int = 260,
    queries: int = 100,
    language: str | None = "en",
    seed: int = 0,
) -> Network:
    """An encoder adapted to your own texts so that its vector holds what they say, with a vector of word weights beside it; no labels needed.

    encoder: a sentence encoder of the BERT, RoBERTa, DistilBERT or MPNet kind. It is not changed.
    corpus: passages with id and text, if you like title.
    steps: optimiser steps; AdamW as in the paper, a tenth of them warm-up.
    batch_size: texts in a step.
    tokens: longer passages are cut into pieces of this length.
    encoder_share: of the words, hidden from the encoder.
    decoder_share: of the words, left out for each row of the decoder. More makes it lean on the sentence vector.
    decoder_weight: of the loss of rebuilding the text from its sentence vector; 0 leaves it out.
    bow_weight: of the loss of guessing the text's words from its tokens; 0 leaves it out (RetroMAE). The paper's formula has 1, its code 0.1.
    bow_target: the weights of a text's words add up to 1, or to less when words repeat, as in the code.
    sentence: what the decoder gets: the vector as the encoder pools it (own), which is what you search with, or the first token's state as in the paper.
    query: of the decoder: through the embedding layer with its norm and dropout (v2), or position plus sentence vector as in RetroMAE (v1).
    words: what guesses choose from: the words of the corpus, several times faster when they are few, or all. Only these get weights afterwards.
    vocabulary_head: the masked language model (hf/NAME or its folder) whose trained head to begin with; by default that of an earlier run, or a new one.
    warm_head: steps in which a new head is trained alone, before the rest.
    learning_rate: highest one.
    k: word weights of a text that the report's measurement keeps.
    queries: so many documents, at most a tenth, are kept out of the training to measure on (0 measures nothing).
    language: of the stop words and stemming of BM25 in that measurement.
    seed: of masks, order, dropout and what is new.

    The network gives vectors as before, to search with as before. `joint(network, texts)` gives both parts and `joint_scores` their score; the head
    stays with the network, the decoder does not. The report "dupmae" has the losses, how much the decoder needs the right sentence vector, and how
    BM25, the encoder before and after, and the word weights find held-out documents from a span. Train on pairs afterwards for a good search.
    Raises BadInput for a network that is no such encoder, a tokenizer without a mask token, a corpus of texts of one token, shares outside 0...1.
    Source: Xiao et al. 2022, arXiv 2211.08769 (and 2205.12035, 2305.02564).
    """
    source = sentence_input(encoder)
    for right, said in (
        (steps >= 1, f"steps is {steps}: give at least 1"),
        (warm_head >= 0, f"warm_head is {warm_head}: give 0 or more"),
        (batch_size >= 2, f"batch_size is {batch_size}: give at least 2"),
        (tokens >= 8, f"tokens is {tokens}: give at least 8"),
        (0 < encoder_share < 1, f"encoder_share is {encoder_share}: give a share above 0 and below 1"),
        (0 <= decoder_share < 1, f"decoder_share is {decoder_share}: give a share from 0 to below 1"),
        (decoder_weight >= 0 and bow_weight >= 0, f"decoder_weight is {decoder_weight} and bow_weight {bow_weight}: give 0 or more"),
        (k >= 1, f"k is {k}: give at least 1"),
        (queries >= 0, f"queries is {queries}: give 0 or more"),
    ):
        if not right:
            raise BadInput(said)
    mask_token(source.tokenizer)
    can_rebuild(encoder.module)
    table = word_table(encoder.module)
    if len(source.tokenizer) > len(table):  # type: ignore[arg-type]
        raise BadInput(f"the tokenizer has {len(source.tokenizer)} tokens and the encoder's table {len(table)}: they do not belong together")  # type: ignore[arg-type]
    if queries:
        can_judge(language)
    was_there = any(isinstance(part, Lexicon) for part in encoder.module.modules())
    start = with_lexicon(encoder, trained_head(vocabulary_head, table.shape[1], len(table)) if vocabulary_head else None)
    frame = Frame.of(source)
    room = min(tokens, source.max_length) - len(frame.before) - len(frame.after)
    training, asked, texts = held_out(corpus, count=queries, seed=seed)
    parts = chunks(training, source.tokenizer, length=room, shortest=2, seed=seed)
    if len(parts) < 2:
        raise BadInput(f"corpus has {len(parts)} texts of 2 tokens or more ({parts.skipped} are shorter): give more texts")
    warned = cautions(corpus, parts.unknown)
    chosen = corpus_words(parts, len(table)) if words == "corpus" else torch.arange(len(table))
    lexicon = lexicon_of(start)
    lexicon.kept.copy_(speakable(source.tokenizer, chosen, len(table)) | (lexicon.kept & was_there))
    given: dict[str, Any] = {"batch_size": batch_size, "encoder_share": encoder_share, "decoder_share": decoder_share}
    if warm_head and not was_there and not vocabulary_head:
        warm_up(start, text_batches(source, parts, steps=warm_head, seed=seed + 1, **given), chosen, seed=seed)
    pooling = "cls" if sentence == "cls" else getattr(encoder.module, "pooling", "mean")
    batches = text_batches(source, parts, steps=steps, seed=seed, **given)
    result, duplex, history = learn(
        start, batches, chosen, learning_rate=learning_rate, seed=seed, pooling=pooling, query=query, bow_target=bow_target,
        decoder_weight=decoder_weight, bow_weight=bow_weight,
    )  # fmt: skip

    last = max(1, steps // 10)
    figures: dict[str, Any] = {"texts": len(parts), "texts skipped, of one token": parts.skipped, "words to guess from": len(chosen)}
    figures |= {"target of the bag of words": bow_target} if bow_weight else {}
    names = {"masked": "hidden words", "sentence": "text from sentence vector", "bag": "bag of words"}
    losses = [
        {"loss in nats": names[name], "first tenth": float(np.mean(each[:last])), "last tenth": float(np.mean(each[-last:]))}
        for name, each in history.logs.items()
    ]
    tables: dict[str, list[dict[str, Any]]] = {"losses": losses}
    if decoder_weight:
        found = bottleneck(duplex, text_batches(source, parts, steps=min(4, steps), seed=seed + 2, **given))
        figures |= {"rebuilding loss, own sentence vector": found["own"], "rebuilding loss, another text's": found["other"]}
        if found["other"] - found["own"] < 0.05:
            warned = [*warned, "the decoder hardly needs the sentence vector: train longer, or raise decoder_share"]
    if len(asked):
        judged: Judgements = {each: {each: 1} for each in asked["id"]}
        with runtime.using(progress=False):
            runs = ranked_by_parts(result, asked, texts, k=k)
        tables["the same spans by each part"] = [{"search by": name} | measure(run, judged, ["nDCG@10", "R@10"]).mean for name, run in runs.items()]
    text = "The vectors are searched with as before; joint() gives word weights beside them. Neither was trained on pairs yet: that is the next step."
    report = Report("an encoder that holds its texts", figures, tables=tables, text=text, warnings=warned)
    result.reports["dupmae"] = with_spans(report, encoder, result, corpus, asked, texts, language=language)
    return result
