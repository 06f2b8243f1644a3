"""PROP: a reranker from documents alone, by telling which of two word sets speaks better for a document (Ma et al. 2021, arXiv 2010.10137).

Both sets are drawn from the document's unigram language model, as if they were queries; the likelier one is to score higher. Meanwhile the network
guesses hidden words of the document. What comes out is a cross-encoder: use it as it is, or train it further on judged queries (neural_ranking).
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable
from typing import Any, Literal

import numpy as np
import torch
from datasets import Dataset
from torch import Tensor, nn
from torch.nn import functional as F

from wellread import runtime
from wellread.batches import Batches
from wellread.data import Corpus, name_of, subset
from wellread.documents import rows
from wellread.errors import BadInput, optional
from wellread.features import running, to_device
from wellread.index import K1, B
from wellread.inputs import TextInput
from wellread.masked import NOTHING, TiedHead, mask_token, masked, transformer_of, word_table
from wellread.method import method, sentence_input
from wellread.network import Network
from wellread.rerankers import CrossEncoder, build, separator
from wellread.results import Report
from wellread.retrieve.neural_ranking import HEAD_START, Lists, best_share, candidates, read, scored, value
from wellread.retrieve.spans import can_judge, cautions, held_out, scripts, whole
from wellread.retrieve.word_sets import WordPairs, fitting, word_pairs
from wellread.train import History, fit
from wellread.unigram import unigram
from wellread.words import WORD, words

DEPTH = 20  # documents of BM25 that are put into a new order to measure it
SPACELESS = {"THAI", "LAO", "KHMER", "MYANMAR"}  # scripts whose words our pattern of letters does not find


# --- losses: scores [B] of the better and of the worse set for the same document, to a scalar


def hinge(better: Tensor, worse: Tensor) -> Tensor:
    """Mean of max(0, 1 - s1 + s2), the paper's equation; a scalar from [B] and [B]."""
    return F.relu(1 - better + worse).mean()


def softmax_hinge(better: Tensor, worse: Tensor) -> Tensor:
    """Mean hinge between the softmax of the two scores, as the authors' code has it: 2 (1 - sigmoid(s1 - s2)); a scalar from [B] and [B], 0...2."""
    return (2 * torch.sigmoid(worse - better)).mean()


def logistic(better: Tensor, worse: Tensor) -> Tensor:
    """Mean of softplus(s2 - s1), the log-likelihood of the right choice; a scalar from [B] and [B]."""
    return F.softplus(worse - better).mean()


LOSSES: dict[str, Callable[[Tensor, Tensor], Tensor]] = {"softmax_hinge": softmax_hinge, "hinge": hinge, "logistic": logistic}
Loss = Literal["softmax_hinge", "hinge", "logistic"]


# --- training


def second_text(ids: Tensor, separator: int) -> Tensor:
    """bool [B, T]: what comes after the first separator of a pair, ids int64 [B, T]."""
    return (ids == separator).cumsum(1) > 0


def pair_batches(
    source: TextInput, corpus: Dataset, pairs: WordPairs, *, batch_size: int = 16, mask: float = 0.15, shuffle: bool = True, seed: int = 0
) -> Batches:
    """Batches {"inputs": tokens [2 B, T], "labels": int64 [2 B, T]}: each pair's better set with the document, then its worse set with it.

    mask: share of the document's words that are hidden, drawn for each input by itself; labels are these words, -100 elsewhere. 0 hides nothing.
    """
    between = separator(source)

    def get(numbers: np.ndarray) -> dict[str, Any]:
        documents = map(whole, rows(subset(corpus, pairs.document[numbers])))
        given: Any = [(chosen, text) for number, text in zip(numbers, documents, strict=True) for chosen in pairs.texts(number)]
        inputs = source(given)
        if mask:
            inputs, labels = masked(inputs, source.tokenizer, mask, among=second_text(inputs["input_ids"], between))
        else:
            labels = torch.full_like(inputs["input_ids"], NOTHING)
        return {"inputs": inputs, "labels": labels}

    return Batches(len(pairs), get, batch_size=batch_size, shuffle=shuffle, seed=seed)


def scores_and_states(module: CrossEncoder, tokens: dict[str, Tensor]) -> tuple[Tensor, Tensor]:
    """Scores [B] of pairs [B, T] and the transformer's last hidden states [B, T, C], from one pass."""
    states: list[Tensor] = []
    hook = transformer_of(module).register_forward_hook(lambda *call: states.append(call[-1].last_hidden_state))
    try:
        return module(**tokens), states[-1]
    finally:
        hook.remove()


def learn(
    network: Network, batches: Batches, *, loss: Loss | None = "softmax_hinge", epochs: int = 1, learning_rate: float = 2e-5, seed: int = 0
) -> History:
    """Train a cross-encoder in place on such batches as `pair_batches` gives, by the sum of both losses; loss None: by the hidden words alone."""
    reranker: Any = network.module
    head = TiedHead.of(reranker)

    def step(_: nn.Module, batch: dict[str, Any]) -> tuple[Tensor, dict[str, float | Tensor]]:
        scores, states = scores_and_states(reranker, batch["inputs"])
        hidden = batch["labels"] != NOTHING
        guessed = head(states[hidden], word_table(reranker))
        guessing = F.cross_entropy(guessed, batch["labels"][hidden], reduction="sum") / hidden.sum().clamp(min=1)
        better, worse = scores.view(-1, 2).unbind(1)
        choice = 0 * scores.sum() if loss is None else LOSSES[loss](better, worse)
        return choice + guessing, {"choice": choice, "hidden words": guessing, "right": (better > worse).float().mean()}

    groups: list[dict[str, Any]] = [
        {"params": list(reranker.encoder.parameters())},
        {"params": [*reranker.score.parameters(), *head.parameters()], "lr": HEAD_START * learning_rate},
    ]
    module = nn.ModuleList([reranker, head])  # the head ends here
    return fit(
        module, batches, step, epochs=epochs, learning_rate=learning_rate, parameters=groups, weight_decay=0.01, warmup=0.1, seed=seed, name="prop"
    )


def pair_accuracy(network: Network, batches: Batches) -> float:
    """How often the better set scores higher; of batches without hidden words. Chance is 0.5, an equal score counts as half."""
    device, right = runtime.device(), []
    with running(network, device), torch.inference_mode(), runtime.autocast(device):
        for batch in batches.epoch(0):
            better, worse = network(to_device(batch["inputs"], device)).float().view(-1, 2).unbind(1)
            right += ((better > worse).float() + 0.5 * (better == worse)).tolist()
    return float(np.mean(right))


# --- judging


def span_lists(queries: Dataset, texts: Dataset, source: TextInput, language: str | None) -> Lists | None:
    """BM25's best texts for each span (queries, texts: as `held_out` gives them), to be put into a better order; None without spans."""
    known = [row for row, text in enumerate(queries["text"]) if set(source.tokenizer(text, add_special_tokens=False)["input_ids"]) - _special(source)]
    if not known:
        return None
    split, ranking = words(language), optional("bm25s", "retrieve").BM25(k1=K1, b=B)
    ranking.index([split(whole(passage)) for passage in rows(texts)], show_progress=False)
    asked, ids, run = subset(queries, known), list(texts["id"]), {}
    for query, text in zip(asked["id"], asked["text"], strict=True):
        found = ranking.get_scores(split(text))
        run[query] = {ids[place]: float(found[place]) for place in np.argsort(-found, kind="stable")[:DEPTH]}
    return read(candidates(asked, texts, run, {query: {query: 1} for query in asked["id"]}, DEPTH), source, "corpus")


def _special(source: TextInput) -> set[int]:
    return set(source.tokenizer.all_special_ids)


@method
def prop(
    encoder: Network,
    corpus: Corpus,
    *,
    pairs: int = 5,
    words_per_set: float = 3.0,
    background: Literal["documents", "collection"] = "documents",
    vocabulary: int = 500,
    subsample: float = 1e-4,
    rop_loss: Literal["softmax_hinge", "hinge", "logistic"] = "softmax_hinge",
    mask: float = 0.15,
    epochs: int = 1,
    batch_size: int = 16,
    learning_rate: float = 2e-5,
    length: int = 256,
    shortest: int = 100,
    skip_short: float = 0.8,
    queries: int = 100,
    language: str | None = "en",
    seed: int = 0,
) -> Network:
    """A reranker made from documents alone: no queries, no judgements. To be used as it is, or as the start for the few judgements there are.

    encoder: a sentence encoder of the BERT or RoBERTa kind, with a mask token. It is not changed.
    corpus: passages with text, if you like id and title.
    pairs: of word sets for each document; the same in every epoch.
    words_per_set: mean of the Poisson numbers of words in a set, 0 left out. For questions, their usual number of words that are no stop words.
    background: smooth a document's word counts by how many documents have a word (the authors' code), or how often the collection has it (their paper).
    vocabulary: words that the sets of a document are drawn from, its own and others; 0 for all.
    subsample: word2vec's threshold: words with a larger share of the collection are drawn less often.
    rop_loss: softmax_hinge (the authors' code), hinge with margin 1 (their paper), or logistic.
    mask: share of the document's words that are hidden and guessed; 0 leaves that out, and with a few thousand pairs the word sets then teach sooner.
    epochs: passes over the pairs.
    batch_size: pairs in a step, each of two inputs.
    learning_rate: highest one of the encoder; of the new layers twenty times that. The paper's 2e-5 belongs to a long run: a short one needs 1e-4.
    length: tokens of set and document together; longer documents are cut.
    shortest, skip_short: documents of fewer words are skipped with this chance.
    queries: so many documents, at most a tenth, are kept out of the training to measure on (0 measures nothing).
    language: of stop words and stemming; none takes words as they are.
    seed: of the pairs, the new layers, the hidden words and the order.

    The network takes pairs: a text column whose rows are [query, document]; its output is [B]. `wellread.rerankers.rerank` orders what a search
    found; the weight it gives the reranker beside the first search was the best on spans of held-out documents. neural-ranking trains it further.
    The report "prop" has some of the pairs, what was skipped and why, how often the better sets' words occur in their document, how many held-out
    pairs are told apart, and the order of BM25's best documents for held-out spans. The same seed draws the same pairs (word_sets.word_pairs).
    Raises `BadInput` for a network that is no sentence encoder or has no mask token, fewer than two documents with words, a script without spaces
    between words, and settings out of range; Diverged, with the last good weights kept, at a loss that is not finite.
    Source: Ma et al. 2021, arXiv 2010.10137.
    """
    source = sentence_input(encoder)
    for right, sentence in (
        (min(pairs, epochs, batch_size) >= 1, "pairs, epochs and batch_size must be at least 1"),
        (0 < words_per_set < 100, f"words_per_set is {words_per_set}: give a mean above 0 and below 100"),
        (vocabulary == 0 or vocabulary >= 2, f"vocabulary is {vocabulary}: give at least 2, or 0 for all words"),
        (subsample > 0, f"subsample is {subsample}: give a share above 0 (inf keeps every word)"),
        (0 <= mask < 1, f"mask is {mask}: give a share, at least 0 and below 1"),
        (0 < learning_rate < float("inf"), f"learning_rate is {learning_rate}: give a number above 0"),
        (length >= 8, f"length is {length}: a word set and a document need at least 8 tokens"),
        (0 <= skip_short <= 1, f"skip_short is {skip_short}: give a chance from 0 to 1"),
        (queries >= 0, f"queries is {queries}: give 0 or more"),
    ):
        if not right:
            raise BadInput(sentence)
    if mask:
        mask_token(source.tokenizer)
    separator(source)
    longest = min(source.tokenizer.model_max_length, getattr(transformer_of(encoder.module).config, "max_position_embeddings", length))
    if length > longest:
        raise BadInput(f"length is {length}, and this encoder reads {longest} tokens at most")
    if queries:
        can_judge(language)
    kinds = scripts([passage.text for passage in rows(subset(corpus, range(min(len(corpus), 100))))])
    if kinds and (main := kinds.most_common(1)[0][0]) in SPACELESS:
        raise BadInput(f"the corpus is in {main.title()} script, which has no spaces between words: take a method that needs none (contriever)")

    training, asked, texts = held_out(corpus, count=queries, seed=seed)
    least = 2 if len(training) < 100_000 else 10
    model = unigram(map(whole, rows(training)), language=language, background=background, least=least)
    if (model.lengths > 0).sum() < 2:
        raise BadInput("fewer than two documents of the corpus hold words that are no stop words: give more documents, or name their language")
    said = np.fromiter((len(WORD.findall(whole(passage))) for passage in rows(training)), np.int64, len(training))
    drawing: dict[str, Any] = {"pairs": pairs, "words_per_set": words_per_set, "vocabulary": vocabulary, "subsample": subsample, "seed": seed}
    drawn = word_pairs(model, model.counts, said, shortest=shortest, skip_short=skip_short, **drawing)
    found = fitting(drawn, source, length)
    if not len(found):
        raise BadInput(
            f"no pair of word sets is left: {len(drawn.skipped)} of {len(training)} documents were skipped, the first because it has "
            f"{drawn.skipped[0][1] if drawn.skipped else 'only equal sets'}; {len(drawn)} pairs were too long for length {length}: "
            "lower shortest or skip_short, or raise length"
        )
    warned = cautions(corpus)
    sample = [whole(passage) for passage in rows(subset(training, np.random.default_rng(0).permutation(len(training))[:200]))]
    tokens: Any = source.tokenizer(sample, add_special_tokens=False, verbose=False)["input_ids"]
    cut = float(np.mean([len(each) > length for each in tokens]))
    if cut > 0.2:
        warned.append(f"{cut:.0%} of the documents are longer than {length} tokens, and words of their unread part are in the sets: give shorter passages")
    network = build(encoder, "cross-encoder", length, [])
    ours: TextInput = network.input  # type: ignore[assignment]
    lists = span_lists(asked, texts, ours, language) if len(asked) else None
    before = scored(network, lists) if lists else None
    batches = pair_batches(ours, training, found, batch_size=batch_size, mask=mask, seed=seed)
    history = learn(network, batches, loss=rop_loss, epochs=epochs, learning_rate=learning_rate, seed=seed)

    reasons = Counter(reason for _, reason in found.skipped)
    last = max(1, history.steps // 10)
    figures: dict[str, Any] = {"documents": len(training), **{f"skipped: {reason}": count for reason, count in reasons.items()}}
    figures |= {"pairs": len(found), "ties dropped": found.ties, "too long, dropped": len(drawn) - len(found), "pairs, sha256": found.sha256}
    figures |= {"documents that are cut": cut, "loss": rop_loss}
    better, worse = found.inside.mean(1).tolist()
    figures |= {"words of better sets that occur in the document": better, "words of worse sets that do": worse}
    figures |= {f"{name}, last tenth": float(np.mean(values[-last:])) for name, values in history.logs.items()}
    names = [passage.id for passage in rows(training)]
    some = [(pair, found.texts(pair)) for pair in np.random.default_rng(seed).permutation(len(found))[:10].tolist()]
    tables: dict[str, list[dict[str, Any]]] = {
        "some of the pairs": [{"id": names[found.document[pair]], "better": a, "worse": b, "gap": float(found.gap[pair])} for pair, (a, b) in some]
    }
    if found.skipped:
        tables["documents without pairs, the first thousand"] = [{"id": names[row], "why": why} for row, why in found.skipped[:1000]]
    text = "The better set of a pair is the likelier one under the document's language model. Word sets are no questions: the judge is your own queries."
    if better < 0.5:
        warned.append(f"only {better:.0%} of the words of the better sets occur in their document: there is little to learn from these pairs")
    if len(asked):
        others = subset(texts, range(len(asked)))  # what is left of the held-out documents
        kept_out = word_pairs(model, model.counted(map(whole, rows(others))), np.full(len(others), shortest), shortest=shortest, **drawing)
        kept_out = fitting(kept_out, ours, length)
        if len(kept_out):
            accuracy = pair_accuracy(network, pair_batches(ours, others, kept_out, batch_size=32, mask=0, shuffle=False))
            figures |= {"held-out pairs": len(kept_out), "held-out pairs told apart": accuracy}
            network.measured = [{"data": f"word sets of {name_of(corpus)}", "rows": len(kept_out), "metrics": {"pairs told apart": accuracy}}]
            if accuracy < 0.7:
                warned.append(f"{accuracy:.0%} of the held-out pairs are told apart, chance is 50 %: train longer (pairs, epochs) or raise learning_rate")
    if lists and before is not None:
        after = scored(network, lists)
        share, by_share = best_share(lists, after)
        network.module.share.fill_(share)  # type: ignore[union-attr,operator]
        figures["weight of the reranker"] = share
        orders = {"BM25": by_share[0.0], "reranker before": value(lists, before, 1.0, "nDCG@10"), "reranker after": by_share[1.0]}
        orders["BM25 and reranker after"] = by_share[share]
        tables[f"the first {DEPTH} of BM25 for spans of held-out documents"] = [{"order by": by, "nDCG@10": worth} for by, worth in orders.items()]
        text += (
            " Spans share their rare words with their document, which is kinder to BM25 than people's questions are; the weight was chosen on them. "
            "Other weights: rerank(..., share=)."
        )
        if share == 0:
            warned.append("on spans of held-out documents the reranker adds nothing to BM25: its weight is 0; train it on judged queries (neural-ranking)")
    network.reports["prop"] = Report("a reranker from documents alone", figures, tables=tables, text=text, warnings=warned)
    return network
