"""Mixture of experts: equal to its base at the start, routing row by row, one domain taken out again, losses against their libraries."""

from __future__ import annotations

import copy
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from datasets import Dataset
from sklearn.discriminant_analysis import LinearDiscriminantAnalysis
from sklearn.metrics import f1_score
from torch import Tensor, nn

import wellread
from wellread import Network, TextInput, families
from wellread.cli import main
from wellread.contrastive import in_batch
from wellread.errors import BadInput
from wellread.evaluate import predict
from wellread.index import Index
from wellread.retrieve import mixture_of_experts
from wellread.retrieve.experts import Experts, Routed, dense, expand, expert_layers, mlp_layers, tagged
from wellread.retrieve.mixture_of_experts import (
    Partners,
    best_threshold,
    clip_argmax,
    co_citations,
    learn,
    pair_batches,
    same,
    set_centroids,
    similarities,
    worth,
)
from wellread.train import fit

WORDS = [f"w{number}" for number in range(96)]
SMALL = {"vocab_size": 100, "hidden_size": 24, "num_attention_heads": 2, "intermediate_size": 32, "max_position_embeddings": 40, "pad_token_id": 0}
FAMILIES: dict[str, dict[str, Any]] = {
    "bert": {"model_type": "bert", "num_hidden_layers": 2, **SMALL},
    "roberta": {"model_type": "roberta", "num_hidden_layers": 2, **SMALL, "type_vocab_size": 1},
    "mpnet": {"model_type": "mpnet", "num_hidden_layers": 2, **SMALL},
    "albert": {"model_type": "albert", "num_hidden_layers": 2, **SMALL, "embedding_size": 16},
    "modernbert": {"model_type": "modernbert", "num_hidden_layers": 2, **SMALL, "cls_token_id": 2, "sep_token_id": 3, "bos_token_id": 2, "eos_token_id": 3},
    "distilbert": {
        "model_type": "distilbert", "n_layers": 2, "dim": 24, "n_heads": 2, "hidden_dim": 32, "vocab_size": 100, "max_position_embeddings": 40,
    },
}  # fmt: skip
DOMAINS = ["blood", "heart care", "skin"]
TEXTS = ["w1 w2 w3", "w4", "w5 w6 w7 w8 w9", "w10 w11"]


def reader(length: int = 32) -> TextInput:
    from tokenizers import Tokenizer, models, pre_tokenizers, processors
    from transformers import PreTrainedTokenizerFast

    special = {"[PAD]": 0, "[UNK]": 1, "[CLS]": 2, "[SEP]": 3}
    words = Tokenizer(models.WordLevel(special | {word: i for i, word in enumerate(WORDS, 4)}, unk_token="[UNK]"))
    words.pre_tokenizer = pre_tokenizers.Whitespace()
    words.post_processor = processors.TemplateProcessing(single="[CLS] $A [SEP]", special_tokens=[("[CLS]", 2), ("[SEP]", 3)])
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=words, pad_token="[PAD]", unk_token="[UNK]", cls_token="[CLS]", sep_token="[SEP]")
    return TextInput(tokenizer, length)


def made(kind: str = "bert", dropout: float = 0.1) -> Network:
    """A small encoder with fresh weights, and a tokenizer with [CLS] and [SEP]."""
    off = {} if dropout else {"hidden_dropout_prob": 0.0, "attention_probs_dropout_prob": 0.0}
    architecture = {"family": "transformers", "auto": "AutoModel", "config": FAMILIES[kind] | off, "pooling": "mean", "normalize": True}
    torch.manual_seed(0)
    network = Network(families.build(architecture), reader(), "head", None, "embedding", architecture)
    with torch.no_grad():
        for parameter in network.module.parameters():
            parameter += 0.1 * torch.randn_like(parameter)
    return network


def out(network: Network, texts: list[str]) -> Tensor:
    with torch.no_grad():
        return network(network.input(texts))


def apart(network: Network) -> Network:
    """A mixture whose copies all differ."""
    other = network.copy()
    torch.manual_seed(1)
    with torch.no_grad():
        for part in other.module.modules():
            if isinstance(part, Experts):
                for parameter in part.parameters():
                    parameter += 0.2 * torch.randn_like(parameter)
    return other


def pairs(rows: int = 48, domains: int = 2, seed: int = 0, labels: bool = False) -> Dataset:
    """Pairs that share the words of their topic, six topics in each domain; with labels half of them are of two topics."""
    random = np.random.default_rng(seed)
    table: dict[str, list[Any]] = {"sentence1": [], "sentence2": [], "group": [], "score": []}
    for row in range(rows):
        domain, topic, belongs = row % domains, int(random.integers(6)), (row // domains) % 2 == 0
        other = topic if belongs or not labels else (topic + 1) % 6
        for column, about in (("sentence1", topic), ("sentence2", other)):
            own = WORDS[80 // domains * domain :][80 // domains // 6 * about :][: 80 // domains // 6]
            table[column].append(" ".join(random.choice(own if random.random() < 0.6 else WORDS[80:]) for _ in range(8)))
        table["group"].append(DOMAINS[domain])
        table["score"].append(int(belongs))
    return Dataset.from_dict(table if labels else {name: each for name, each in table.items() if name != "score"})


def example(folder: Path) -> dict[str, Any]:
    made().save(folder / "encoder")
    pairs().to_csv(folder / "pairs.csv")
    pairs(32, seed=1, labels=True).to_csv(folder / "judged.csv")
    given = {"encoder": str(folder / "encoder"), "pairs": f"csv:{folder / 'pairs.csv'}", "held_out": f"csv:{folder / 'judged.csv'}"}
    return {**given, "steps": 2, "batch_size": 4}


# --- at the start


@pytest.mark.parametrize("kind", FAMILIES)
def test_at_the_start_every_domain_computes_what_the_base_computes(kind: str) -> None:
    base = made(kind)
    mixture = expand(base, DOMAINS)
    expected, before = out(base, TEXTS), base.fingerprint
    for domain in DOMAINS:
        torch.testing.assert_close(out(mixture, tagged(mixture, TEXTS, domain)), expected, rtol=0, atol=1e-6)
        assert dense(mixture, domain).fingerprint == before
    mixed = [f"[{DOMAINS[0]}] {TEXTS[0]}", TEXTS[1], f"[{DOMAINS[2]}] {TEXTS[2]}", f"[{DOMAINS[1]}]{TEXTS[3]}"]
    torch.testing.assert_close(out(mixture, mixed), expected, rtol=0, atol=1e-6)
    torch.testing.assert_close(out(mixture, TEXTS), expected, rtol=0, atol=1e-6)
    assert base.fingerprint == before and "[skin]" not in base.input.tokenizer.get_vocab()


def test_minilm_at_the_start() -> None:
    base = wellread.load("minilm-l6")
    mixture = expand(base, ["a b", "c"], layers=[1, 4])
    texts = ["Where is my card?", "a much longer text about something else, with more words and signs (!)", "x"]
    for domain in ("a b", "c"):
        torch.testing.assert_close(out(mixture, tagged(mixture, texts, domain)), out(base, texts), rtol=0, atol=1e-6)
    assert sum(isinstance(part, Experts) for part in mixture.module.modules()) == 5, "two layers of two MLP layers each, and the first token"
    grown = sum(p.numel() for p in mixture.module.parameters()) - sum(p.numel() for p in base.module.parameters())
    mlp = 384 * 1536 * 2 + 1536 + 384
    assert grown == 2 * mlp + 2 * 384, "one more MLP in each of two layers, and two domain tokens"


@pytest.mark.parametrize("words", [29, 30, 31, 60])
def test_long_texts_lose_the_same_words_with_and_without_a_tag(words: int) -> None:
    base = made()
    mixture = expand(base, DOMAINS)
    text = " ".join(WORDS[:words])
    expected = base.input([text])["input_ids"]
    assert expected.shape[1] == min(words + 2, 32)
    for given in ([text], tagged(mixture, [text], "skin")):
        tokens, _ = mixture.module.untagged(**mixture.input(given))
        assert torch.equal(tokens["input_ids"], expected) and bool(tokens["attention_mask"].all())
    torch.testing.assert_close(out(mixture, [text, "w1"]), out(base, [text, "w1"]), rtol=0, atol=1e-6)


def test_tokens_without_their_tags_are_those_of_the_plain_tokenizer() -> None:
    base = made()
    mixture = expand(base, DOMAINS)
    given = [f"[heart care] {TEXTS[0]}", TEXTS[2], f"  [skin]   {TEXTS[1]}"]
    tokens, domain = mixture.module.untagged(**mixture.input(given))
    plain = base.input([TEXTS[0], TEXTS[2], TEXTS[1]])
    assert domain.tolist() == [1, -1, 2]
    assert set(tokens) == set(plain) and all(torch.equal(tokens[name], plain[name]) for name in plain)
    inside, domain = mixture.module.untagged(**mixture.input(["w1 [skin] w2", "[skin] [blood] w1"]))
    assert inside["input_ids"].tolist() == [[2, 5, 1, 6, 3], [2, 1, 5, 3, 0]] and domain.tolist() == [-1, 2], "a tag inside a text is an unknown word"


def test_tags_before_byte_level_pieces() -> None:
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors, trainers
    from transformers import PreTrainedTokenizerFast

    pieces = Tokenizer(models.BPE())
    pieces.pre_tokenizer, pieces.decoder = pre_tokenizers.ByteLevel(add_prefix_space=False), decoders.ByteLevel()
    trainer = trainers.BpeTrainer(vocab_size=300, special_tokens=["<s>", "<pad>", "</s>", "<unk>"], initial_alphabet=pre_tokenizers.ByteLevel.alphabet())
    pieces.train_from_iterator(["some text and some more text"] * 9, trainer)
    pieces.post_processor = processors.RobertaProcessing(("</s>", 2), ("<s>", 0), add_prefix_space=False)
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=pieces, bos_token="<s>", cls_token="<s>", eos_token="</s>", pad_token="<pad>", unk_token="<unk>")
    base = made("roberta")
    base.module.model.resize_token_embeddings(len(tokenizer))
    base.architecture["config"]["vocab_size"] = len(tokenizer)
    base.input = TextInput(tokenizer, 32)
    mixture = expand(base, DOMAINS)
    texts = ["some text", "more, (text)", "and\nsome"]
    torch.testing.assert_close(out(mixture, tagged(mixture, texts, "skin")), out(base, texts), rtol=0, atol=1e-6)


# --- routing


@pytest.mark.parametrize("kind", ["bert", "distilbert"])
def test_a_mixed_batch_is_its_domains_one_by_one(kind: str) -> None:
    mixture = apart(expand(made(kind), DOMAINS))
    mixed = [f"[{DOMAINS[number]}] {text}" for number, text in zip((2, 0, 2, 1), TEXTS, strict=True)]
    weights = torch.randn(4, 24, generator=torch.Generator().manual_seed(0))

    def gradients(batches: list[list[int]]) -> tuple[Tensor, dict[str, Tensor]]:
        network, rows = mixture.copy(), torch.zeros(4, 24)
        for batch in batches:
            found = network(network.input([mixed[row] for row in batch]))
            (found * weights[batch]).sum().backward()
            rows[batch] = found.detach()
        return rows, {name: each.grad for name, each in network.module.named_parameters() if each.grad is not None}

    together, parts = gradients([[0, 1, 2, 3]]), gradients([[1], [3], [0, 2]])
    torch.testing.assert_close(together[0], parts[0], rtol=0, atol=1e-6)
    assert together[1].keys() == parts[1].keys()
    for name, each in together[1].items():
        torch.testing.assert_close(each, parts[1][name], rtol=0, atol=2e-5, msg=name)
    others = [out(mixture, tagged(mixture, TEXTS[:1], domain)) for domain in DOMAINS]
    assert min(float((others[a] - others[b]).abs().max()) for a, b in ((0, 1), (0, 2), (1, 2))) > 1e-2, "the domains differ"


def test_reduced_precision_does_not_change_the_types() -> None:
    mixture = apart(expand(made(), DOMAINS))
    mixed = [f"[{DOMAINS[row % 3]}] {text}" for row, text in enumerate(TEXTS)]
    with torch.autocast("cpu", torch.bfloat16):
        together = out(mixture, mixed)
        alone = torch.cat([out(mixture, [text]) for text in mixed])
    assert together.dtype == alone.dtype
    torch.testing.assert_close(together.float(), alone.float(), rtol=0, atol=0.03)


def test_an_expert_that_is_absent_has_no_gradient_and_does_not_move() -> None:
    mixture = expand(made(), DOMAINS)
    mixture(mixture.input(tagged(mixture, TEXTS, "skin"))).sum().backward()
    for name, parameter in mixture.module.named_parameters():
        if ".copies." in name:
            assert (parameter.grad is None) == (".copies.2." not in name), name
    table = pairs(domains=3).filter(lambda row: row["group"] != "blood")
    partners = Partners.of(table, DOMAINS)
    trained, _ = learn(mixture, pair_batches(mixture.input, partners, steps=3, batch_size=4), partners, learning_rate=1e-2)
    before, after = mixture.module.state_dict(), trained.module.state_dict()
    for name in before:
        if ".copies." in name:
            assert torch.equal(before[name], after[name]) == (".copies.0." in name), f"{name}: no gradient, no weight decay, no moments"


def test_one_domain_is_the_dense_encoder_also_in_training() -> None:
    base, table = made(dropout=0.1), pairs(domains=1)
    partners = Partners.of(table)
    mixture = expand(base, partners.names)
    settings: dict[str, Any] = {"learning_rate": 1e-3, "seed": 3}
    plain, history = learn(base, pair_batches(base.input, partners, steps=10, batch_size=8, tags=False), partners, **settings)
    routed, same_history = learn(mixture, pair_batches(mixture.input, partners, steps=10, batch_size=8), partners, **settings)
    np.testing.assert_allclose(history.loss, same_history.loss, rtol=0, atol=1e-5)
    torch.testing.assert_close(out(routed, tagged(routed, TEXTS, "blood")), out(plain, TEXTS), rtol=0, atol=1e-5)
    assert float((out(plain, TEXTS) - out(base, TEXTS)).abs().max()) > 1e-2, "ten steps changed something"


def test_fit_leaves_out_what_a_step_does_not_use() -> None:
    """The loop's part in it: parameters without gradient in some steps."""
    experts = Experts(nn.Linear(3, 3), 3)

    def step(module: Any, batch: dict[str, Any]) -> Tensor:
        module.parts = [(0, torch.arange(4)) if int(batch["index"][0]) % 8 else (1, torch.arange(4))]
        return module(torch.ones(4, 3)).square().mean()

    start = copy.deepcopy(experts.state_dict())
    from wellread.batches import Batches

    fit(experts, Batches(32, lambda rows: {}, batch_size=4), step, epochs=1, weight_decay=0.5, optimizer="adamw", clip=1.0)
    moved = [not torch.equal(start[f"copies.{number}.weight"], experts.copies[number].weight) for number in range(3)]
    assert moved == [True, True, False]


def test_a_text_without_a_tag_goes_to_the_nearest_domain() -> None:
    table = pairs(60, domains=2)
    partners = Partners.of(table)
    mixture = apart(expand(made(), partners.names))
    with torch.no_grad():
        table_of_words = mixture.module.network.model.embeddings.word_embeddings[0].weight
        table_of_words[4:44, 0] += 9  # the words of the first domain lie on one side, those of the second on the other
        table_of_words[44:84, 0] -= 9
    assert set_centroids(mixture, partners) == 1.0
    routed = mixture.module
    words = routed.network.model.embeddings.word_embeddings[0].weight.detach().double()
    texts = dict.fromkeys((text, group) for column in ("sentence1", "sentence2") for text, group in zip(table[column], table["group"], strict=True))
    means = torch.stack([words[mixture.input.tokenizer(text)["input_ids"][1:]].mean(0) for text, _ in texts]).numpy()
    theirs = LinearDiscriminantAnalysis("lsqr", shrinkage="auto").fit(means, [group for _, group in texts])
    guessed = [DOMAINS[number] for number in routed.nearest(torch.from_numpy(means).float()).tolist()]
    assert guessed == theirs.predict(means).tolist()
    text = " ".join(WORDS[40:46])
    torch.testing.assert_close(out(mixture, [text]), out(mixture, [f"[heart care] {text}"]), rtol=0, atol=1e-6)
    assert not torch.allclose(out(mixture, [text]), out(mixture, [f"[blood] {text}"]), atol=1e-3)


def test_which_layers_are_mlps() -> None:
    assert mlp_layers(made("bert").module) == {n: [f"model.encoder.layer.{n}.intermediate.dense", f"model.encoder.layer.{n}.output.dense"] for n in (0, 1)}
    assert mlp_layers(made("distilbert").module) == {n: [f"model.transformer.layer.{n}.ffn.lin1", f"model.transformer.layer.{n}.ffn.lin2"] for n in (0, 1)}
    assert mlp_layers(made("modernbert").module) == {n: [f"model.layers.{n}.mlp.Wi", f"model.layers.{n}.mlp.Wo"] for n in (0, 1)}
    assert mlp_layers(made("albert").module) == {0: [f"model.encoder.albert_layer_groups.0.albert_layers.0.{name}" for name in ("ffn", "ffn_output")]}
    assert mlp_layers(nn.Linear(2, 2)) == {}
    assert expert_layers(made("distilbert").module, None, r"layer\.1\.ffn") == ["model.transformer.layer.1.ffn"], "the outermost"


@pytest.mark.parametrize("pattern", [r"layer\.0\.ffn$", r"\.output$"])
def test_layers_named_by_the_user(pattern: str) -> None:
    base = made("distilbert" if "ffn" in pattern else "bert")
    mixture = expand(base, DOMAINS, expert_modules=pattern)
    torch.testing.assert_close(out(mixture, tagged(mixture, TEXTS, "blood")), out(base, TEXTS), rtol=0, atol=1e-6)
    mixed = [f"[{DOMAINS[row % 3]}] {text}" for row, text in enumerate(TEXTS)]
    torch.testing.assert_close(out(mixture, mixed), out(base, TEXTS), rtol=0, atol=1e-6)


# --- one domain taken out


@pytest.mark.parametrize("kind", FAMILIES)
def test_a_domain_taken_out_computes_what_it_computed_inside(kind: str, tmp_path: Path) -> None:
    base = made(kind)
    mixture = apart(expand(base, DOMAINS))
    long = " ".join(WORDS[:50])
    for domain in DOMAINS:
        alone = dense(mixture, domain)
        assert alone.structure == base.structure and alone.record["input"] == base.record["input"]
        assert {name: each.shape for name, each in alone.module.state_dict().items()} == {name: each.shape for name, each in base.module.state_dict().items()}
        texts = [*TEXTS, long]
        assert all(torch.equal(each, base.input(texts)[name]) for name, each in alone.input(texts).items()), "the tokenizer is the old one again"
        torch.testing.assert_close(out(alone, texts), out(mixture, tagged(mixture, texts, domain)), rtol=0, atol=1e-6)
    alone.save(tmp_path / "alone")
    assert torch.equal(out(wellread.load(tmp_path / "alone"), TEXTS), out(alone, TEXTS))
    again = expand(alone, ["one", "two"])
    torch.testing.assert_close(out(again, tagged(again, TEXTS, "two")), out(alone, TEXTS), rtol=0, atol=1e-6)


def test_what_cannot_be_taken_out() -> None:
    mixture = expand(made(), DOMAINS)
    with pytest.raises(BadInput, match="no domain 'liver': it has blood, heart care, skin"):
        dense(mixture, "liver")
    with pytest.raises(BadInput, match="no domain 'Skin'"):
        tagged(mixture, TEXTS, "Skin")
    with pytest.raises(BadInput, match="no mixture of experts"):
        dense(made(), "skin")
    with pytest.raises(BadInput, match="changed after it was made"):
        dense(mixture.with_head(["a", "b"]), "skin")
    with pytest.raises(BadInput, match="a mixture of experts already"):
        expand(mixture, ["a", "b"])


# --- pairs, batches, losses


def test_co_citations_are_what_counting_gives() -> None:
    assert co_citations([["a", "b", "c"], ["b", "a", "a"], ["c"], []]) == [("a", "b", 2), ("a", "c", 1), ("b", "c", 1)]
    assert co_citations([["a", "b", "c"], ["b", "a"]], at_least=2) == [("a", "b", 2)]
    assert co_citations([]) == [] and co_citations([["a"], ["b"]]) == []
    random = np.random.default_rng(0)
    lists = [random.choice(30, 6, replace=False).tolist() for _ in range(40)]
    counted = {(a, b): sum(a in each and b in each for each in lists) for a in range(30) for b in range(a)}
    found = {(max(a, b), min(a, b)): n for a, b, n in co_citations(lists)}
    assert found == {pair: n for pair, n in counted.items() if n} and len(found) == len(co_citations(lists))


def test_batches_hold_one_domain_each_in_turn() -> None:
    table = pairs(45, domains=3)
    partners, source = Partners.of(table), expand(made(), DOMAINS).input
    batches = list(pair_batches(source, partners, steps=8, batch_size=4, seed=1).epoch(0))
    domain_of = {text: name for column in ("sentence1", "sentence2") for text, name in zip(table[column], table["group"], strict=True)}
    found = [{domain_of[partners.texts[int(each)]] for each in batch["numbers"].flatten()} for batch in batches]
    assert len(batches) == 24 and found == [{name} for _ in range(8) for name in DOMAINS]
    written = {frozenset(pair) for pair in zip(partners.first.tolist(), partners.second.tolist(), strict=True)}
    assert {frozenset(row) for batch in batches for row in batch["numbers"].tolist()} <= written
    blood = [frozenset(row) for batch in batches[::3] for row in batch["numbers"].tolist()]
    assert len(set(blood[:15])) == 15 and len(set(blood[15:30])) == 15, "all pairs of a domain once before any comes again"
    swapped = np.mean([tuple(row) not in set(zip(partners.first.tolist(), partners.second.tolist(), strict=True)) for b in batches for row in b["numbers"].tolist()])
    assert 0.3 < swapped < 0.7
    for batch in batches[:3]:
        texts = [partners.texts[int(row)] for row in batch["numbers"].T.flatten()]
        expected = source([f"[{domain_of[text]}] {text}" for text in texts])
        assert all(torch.equal(batch["inputs"][name], each) for name, each in expected.items())
    again = list(pair_batches(source, partners, steps=8, batch_size=4, seed=1).epoch(0))
    assert all(torch.equal(a["numbers"], b["numbers"]) for a, b in zip(batches, again, strict=True))


def test_known_partners_are_no_negatives() -> None:
    table = Dataset.from_dict({"sentence1": ["a", "a", "c"], "sentence2": ["b", "c", "d"], "group": ["x"] * 3})
    partners = Partners.of(table)
    letters = {text: number for number, text in enumerate(partners.texts)}
    first, second = torch.tensor([letters["a"], letters["c"]]), torch.tensor([letters[each] for each in "bcda"])
    assert same(first, second, partners.known(), 4).tolist() == [[True, True, False, True], [False, True, True, True]]


def test_ranking_is_that_of_sentence_transformers() -> None:
    losses = pytest.importorskip("sentence_transformers.losses")
    torch.manual_seed(0)
    first, second = torch.randn(6, 5), torch.randn(6, 5)
    theirs = losses.MultipleNegativesRankingLoss(model=None, scale=1 / 0.05)
    expected = theirs.compute_loss_from_embeddings([first, second], None)
    torch.testing.assert_close(in_batch(first, second, temperature=0.05), expected)


def test_clip_argmax_and_when_its_targets_are_not_the_partners() -> None:
    torch.manual_seed(0)
    first, second = torch.randn(2, 7, 5).unbind()
    logits = first @ second.T
    target = torch.stack([((first[i] @ first.T + second[i] @ second.T) / 2).softmax(0).argmax() for i in range(7)])
    expected = sum(-each.log_softmax(1)[torch.arange(7), target].mean() for each in (logits, logits.T)) / 2
    loss, off = clip_argmax(first, second)
    torch.testing.assert_close(loss, expected)
    assert off.item() == pytest.approx(float((target != torch.arange(7)).float().mean()))
    near = torch.eye(5).repeat(1, 1) + 0.5
    long = near.clone()
    long[2] *= 9
    assert clip_argmax(long, long)[1].item() == pytest.approx(0.8), "the long row is everyone's target"
    normal = [torch.nn.functional.normalize(each, dim=-1) for each in (first, second)]
    assert clip_argmax(*normal)[1].item() == 0
    plain = (in_batch(*normal, temperature=1, cosine=False) + in_batch(*normal[::-1], temperature=1, cosine=False)) / 2
    torch.testing.assert_close(clip_argmax(*normal)[0], plain, msg="with vectors of one length it is the ranking in both directions")


def test_the_threshold_is_the_best_of_all() -> None:
    random = np.random.default_rng(0)
    truth = random.integers(0, 2, 60)
    similarity = np.round(truth * 0.4 + random.normal(size=60), 1)
    tried = {t: f1_score(truth, similarity >= t) for t in np.unique(similarity)}
    best = best_threshold(similarity, truth)
    assert tried[best] == pytest.approx(max(tried.values())) and best == min(t for t in tried if tried[t] == pytest.approx(max(tried.values())))
    halves = [np.arange(30), np.arange(30, 60)]
    expected = [f1_score(truth[b], similarity[b] >= best_threshold(similarity[a], truth[a])) for a, b in (halves, halves[::-1])]
    assert worth(similarity, truth, halves)["F1"] == pytest.approx(np.mean(expected))
    assert worth(truth + 0.0, truth, halves) == {"ROC-AUC": 1.0, "F1": 1.0}


# --- the method


def test_the_smallest_data() -> None:
    few = Dataset.from_dict({"sentence1": ["w1", "w1", "w4", "w4"], "sentence2": ["w2", "w3", "w5", "w6"], "group": ["skin", "skin", "blood", "blood"]})
    mixture = mixture_of_experts(made(), few, steps=1)
    assert 0 <= mixture.reports["mixture_of_experts"].figures["texts without tag routed rightly"] <= 1
    one = mixture_of_experts(made(), pairs(domains=1), steps=1)
    assert one.reports["mixture_of_experts"].figures["texts without tag routed rightly"] == 1
    torch.testing.assert_close(out(one, TEXTS), out(one, tagged(one, TEXTS, "blood")), rtol=0, atol=1e-6)


@pytest.mark.parametrize(("kind", "loss"), [("bert", "ranking"), ("distilbert", "clip_argmax")])
def test_it_learns_both_domains(kind: str, loss: Any) -> None:
    base, judged = made(kind), pairs(120, seed=1, labels=True)
    before = base.fingerprint
    mixture = mixture_of_experts(base, pairs(200), judged, loss=loss, steps=40, batch_size=16, learning_rate=5e-3)
    assert base.fingerprint == before and mixture.lineage[-1]["method"] == "mixture-of-experts"
    report = mixture.reports["mixture_of_experts"]
    rows = report.tables["held-out pairs"]
    assert [row["domain"] for row in rows] == ["blood", "heart care"]
    for row in rows:
        assert row["ROC-AUC after"] > row["ROC-AUC before"] + 0.1 and row["F1 after"] > 0.6
    asked = Partners.of(judged)
    mine = asked.domain == 0
    texts = [tagged(mixture, [judged[column][row] for row in np.flatnonzero(mine)], "blood") for column in ("sentence1", "sentence2")]
    cosines = torch.cosine_similarity(*(torch.from_numpy(predict(mixture, Dataset.from_dict({"text": each}))) for each in texts)).numpy()
    np.testing.assert_allclose(similarities(mixture, asked, {"blood": "blood", "heart care": "skin"})[mine], cosines, rtol=0, atol=1e-5)
    assert report.figures["texts without tag routed rightly"] > 0.65, "random word vectors of 24 dimensions hold so much"
    assert ("targets that are not the partner" in report.figures) == (loss == "clip_argmax")
    if loss == "clip_argmax":
        assert report.figures["targets that are not the partner"] < 0.05, "the encoder normalises"
    total = sum(each.numel() for each in mixture.module.parameters())
    assert report.figures["parameters"] == total and report.figures["parameters used for a text"] == sum(each.numel() for each in base.module.parameters()) + 24
    assert mixture.measured[0]["metrics"]["roc_auc"] == pytest.approx(np.mean([row["ROC-AUC after"] for row in rows]))


def test_an_index_reads_tags(tmp_path: Path) -> None:
    mixture = apart(expand(made(), DOMAINS))
    texts = [f"[{DOMAINS[row % 3]}] {text}" for row, text in enumerate(TEXTS)]
    index = Index.build(mixture, [{"id": str(row), "title": "", "text": text} for row, text in enumerate(texts)], tmp_path / "index", lexical=False)
    found = [hits[0].id for hits in index.search(texts, k=1, mode="dense")]
    index.close()
    assert found == ["0", "1", "2", "3"]
    with torch.inference_mode():
        mixture(mixture.input(texts))
    torch.testing.assert_close(out(mixture.copy(), texts), out(mixture, texts), rtol=0, atol=0)


def test_the_same_seed_gives_the_same_encoder() -> None:
    first, second, other = (mixture_of_experts(made(), pairs(), steps=2, batch_size=4, seed=seed).fingerprint for seed in (1, 1, 2))
    assert first == second != other


def test_the_command_and_another_process(tmp_path: Path, same_in_another_process: Callable[..., None]) -> None:
    words = [word for name, value in example(tmp_path).items() for word in (f"--{name.replace('_', '-')}", str(value))]
    assert main(["run", "mixture-of-experts", *words, "--layers", "1", "--out", str(tmp_path / "out"), "--quiet"]) == 0
    same_in_another_process(["[blood] w1 w2", "w3", "[heart care] w50"], "mixture_of_experts", "pairs", 48)
    loaded = wellread.load(tmp_path / "out")
    assert isinstance(loaded.module, Routed) and loaded.module.domains == ["blood", "heart care"]
    torch.testing.assert_close(out(dense(loaded, "blood"), TEXTS), out(loaded, tagged(loaded, TEXTS, "blood")), rtol=0, atol=1e-6)
    assert sum("encoder.layer" in name for name, part in loaded.module.named_modules() if isinstance(part, Experts)) == 2


# --- bad input


def changed(table: Dataset, column: str, row: int, value: Any) -> Dataset:
    content = table.to_dict()
    content[column][row] = value
    return Dataset.from_dict(content)


JUDGED = partial(pairs, 32, seed=1, labels=True)


@pytest.mark.parametrize(
    ("given", "words"),
    [
        ({"steps": 0}, "steps is 0"),
        ({"batch_size": 1}, "batch_size is 1"),
        ({"temperature": 0.0}, "temperature is 0"),
        ({"layers": [2]}, "layers names 2, and the encoder has MLPs in the layers 0, 1"),
        ({"layers": [0], "expert_modules": "output"}, "give one of them"),
        ({"expert_modules": "lin1"}, "no layer: names are .*model.encoder.layer.N.intermediate.dense"),
        ({"expert_modules": "("}, "no regular expression"),
        ({"expert_modules": "model"}, "'model', which holds the word embeddings"),
        ({"pairs": lambda: Dataset.from_dict({"sentence1": ["a", "b"], "sentence2": ["b", "a"], "group": ["x"] * 2})}, "has 2 pairs of 2 different texts"),
        ({"pairs": lambda: changed(pairs(), "group", 0, "skin")}, "the domain 'skin' has 1 pairs of 2 different texts"),
        ({"pairs": lambda: changed(pairs(), "sentence2", 3, " ")}, "nothing in row 3 of sentence2"),
        ({"pairs": lambda: changed(pairs(), "group", 3, None)}, "nothing in row 3 of group"),
        ({"pairs": lambda: pairs().remove_columns("group")}, "no column 'group'"),
        ({"pairs": lambda: Dataset.from_dict({**pairs().to_dict(), "group": ["PAD"] * 48})}, "'PAD' cannot be written as a tag"),
        ({"pairs": lambda: Dataset.from_dict({**pairs().to_dict(), "group": ["a[b"] * 48})}, "cannot be written as a tag"),
        ({"held_out": lambda: changed(JUDGED(), "group", 3, "liver")}, "the domain 'liver', which pairs have not: they have blood, heart care"),
        ({"held_out": lambda: changed(JUDGED(), "score", 3, 2)}, "the score 2: give 1"),
        ({"held_out": lambda: changed(JUDGED(), "sentence2", 3, pairs()["sentence1"][5])}, "1 texts of held_out are in pairs too"),
        ({"held_out": lambda: JUDGED().select(range(4))}, "fewer than two pairs of each score in the domain 'blood'"),
        ({"held_out": lambda: JUDGED().remove_columns("score")}, "no column 'score'"),
    ],
)
def test_what_cannot_be(given: dict[str, Any], words: str) -> None:
    given = {name: value() if callable(value) else value for name, value in given.items()}
    with pytest.raises(BadInput, match=words):
        mixture_of_experts(made(), **{"pairs": pairs(), **given})


def test_encoders_that_cannot_be_used(monkeypatch: pytest.MonkeyPatch) -> None:
    base = made()
    for wrong in (wellread.load("timm/test_vit", pretrained=False), Network(base.module, None, "head", None, "embedding", base.architecture)):
        with pytest.raises(BadInput, match="a sentence encoder is needed"):
            mixture_of_experts(wrong, pairs())
    bare = reader()
    bare.tokenizer.backend_tokenizer.post_processor = None
    with pytest.raises(BadInput, match="no token before a text"):
        expand(Network(base.module, bare, "head", None, "embedding", base.architecture), DOMAINS)
    left = reader()
    left.tokenizer.padding_side = "left"
    with pytest.raises(BadInput, match="pads on the right"):
        expand(Network(base.module, left, "head", None, "embedding", base.architecture), DOMAINS)

    class Plain(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.words, self.up = nn.Embedding(100, 4), nn.Linear(4, 4)

        def forward(self, input_ids: Tensor, attention_mask: Tensor) -> Tensor:
            return self.up(self.words(input_ids)).mean(1)

    with pytest.raises(BadInput, match="no MLP was recognised .* expert_modules.* among words, up"):
        expand(Network(Plain(), reader(), "up", None, "embedding"), DOMAINS)
    named = expand(Network(Plain(), reader(), "up", None, "embedding"), DOMAINS, expert_modules="^up$")
    assert out(named, tagged(named, TEXTS, "skin")).shape == (4, 4)
    monkeypatch.setattr("psutil.virtual_memory", lambda: type("Memory", (), {"available": 10_000})())
    with pytest.raises(BadInput, match="GB more to train and 0.0 GB are free"):
        expand(base, DOMAINS)
