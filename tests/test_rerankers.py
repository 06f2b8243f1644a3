from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from torch.nn import functional as F

from wellread import Network
from wellread.errors import BadInput
from wellread.index import Hit
from wellread.inputs import TextInput
from wellread.rerankers import (
    CENTRES,
    MODELS,
    Reranker,
    Words,
    best_first,
    dynamic_pool,
    histogram,
    idf,
    kernels,
    mixed,
    reordered,
    rerank,
    same_words,
    separator,
    similarity,
    split,
)

ORDERLESS = ("dssm", "drmm", "knrm")


def tokenizer(before="[CLS]", between=("[SEP]",), after="[SEP]", words="abcdefghijklmnop", side="right"):
    from tokenizers import Tokenizer, models, pre_tokenizers, processors
    from transformers import PreTrainedTokenizerFast

    special = list(dict.fromkeys(["[PAD]", "[UNK]", before, *between, after]))
    vocabulary = {word: number for number, word in enumerate([*special, *words])}
    made = Tokenizer(models.WordLevel(vocabulary, unk_token="[UNK]"))
    made.pre_tokenizer = pre_tokenizers.Whitespace()
    pair = f"{before}:0 $A:0 {' '.join(f'{each}:0' for each in between)} $B:1 {after}:1"
    marks = [(each, vocabulary[each]) for each in special]
    made.post_processor = processors.TemplateProcessing(single=f"{before} $A {after}", pair=pair, special_tokens=marks)
    names = {"pad_token": "[PAD]", "unk_token": "[UNK]", "cls_token": before, "sep_token": after}
    return PreTrainedTokenizerFast(tokenizer_object=made, padding_side=side, **names)


def texts(*rows: list[int], width: int = 8, seed: int = 0, longest: int | None = None) -> Words:
    """Words of token numbers below 50, all from one random table, in float64."""
    table = F.normalize(torch.randn(50, width, generator=torch.Generator().manual_seed(seed), dtype=torch.float64), dim=1)
    longest = longest or max(1, max(map(len, rows)))
    ids = torch.tensor([row + [-1] * (longest - len(row)) for row in rows])
    mask = ids >= 0
    return Words(ids, mask, table[ids.clamp(min=0)] * mask[..., None], (1.0 + ids.clamp(min=0).double() / 10))


def model(name: str):
    torch.manual_seed(1)
    found = MODELS[name](8)
    if "knrm" in name:  # which start near 0
        torch.nn.init.normal_(found.layer.weight)
    return found.double().eval()


# --- pairs


@pytest.mark.parametrize("side", ["left", "right"])
@pytest.mark.parametrize("marks", [{}, {"before": "<s>", "between": ("</s>", "</s>"), "after": "</s>"}])
def test_a_pair_is_taken_apart(marks, side):
    source = TextInput(tokenizer(**marks, side=side), 32)
    batch = source([("a b", "c d e"), ("f", "g strange b"), ("h a b c", "")])
    first, second = split(batch["input_ids"], batch["attention_mask"], separator(source), torch.tensor(source.tokenizer.all_special_ids))
    words = [[[source.tokenizer.convert_ids_to_tokens(int(i)) for i in row[kept]] for row, kept in zip(*part, strict=True)] for part in (first, second)]
    assert words == [[["a", "b"], ["f"], ["h", "a", "b", "c"]], [["c", "d", "e"], ["g", "b"], []]]
    assert (first[0][~first[1]] == -1).all() and first[0].shape == (3, 4) and second[0].shape == (3, 3)


def test_a_tokenizer_without_a_separator_is_refused():
    from tokenizers import processors

    bare = tokenizer()
    bare.backend_tokenizer.post_processor = processors.TemplateProcessing(single="$A", pair="$A $B", special_tokens=[])
    with pytest.raises(BadInput, match="separator"):
        separator(TextInput(bare, 16))


def test_idf_counts_texts_not_words():
    tokens = {"input_ids": torch.tensor([[1, 1, 2], [1, 3, 0]]), "attention_mask": torch.tensor([[1, 1, 1], [1, 1, 0]])}
    assert torch.allclose(idf(tokens, 5), torch.tensor([1.0, 1.0, 1.5, 1.5, 1.0]).log())


# --- features against their definitions


def test_similarities_are_exact_where_the_words_are():
    query, document = texts([1, 2]), texts([2, 3, 2], [1])
    document = document._replace(vectors=document.vectors * (1 - 1e-6))  # as rounding would have it
    query = Words(*(each.expand(2, *each.shape[1:]) for each in query))
    found = similarity(query, document)
    assert found[0, 1].tolist()[::2] == [1.0, 1.0] and found[1, 0, 0] == 1.0 and (found[1, :, 1:] == 0).all()
    assert float(found[0, 0, 1]) == pytest.approx(float(query.vectors[0, 0] @ document.vectors[0, 1]), abs=1e-6)


def test_phrases_are_the_same_when_all_their_words_are():
    query, document = texts([1, 2, 3]), texts([5, 1, 2, 3], [1, 2, 9, 3])
    query = Words(*(each.expand(2, *each.shape[1:]) for each in query))
    assert same_words(query, document, 2).nonzero().tolist() == [[0, 0, 1], [0, 1, 2], [0, 2, 3], [1, 0, 0], [1, 2, 3]]
    assert same_words(query, document, 3).nonzero().tolist() == [[0, 0, 1], [0, 1, 2], [0, 2, 3], [1, 2, 3]]


def test_kernels_are_their_formula():
    query, document = texts([1, 2, 7]), texts([2, 3, 9, 2, 11])
    cosines, same = similarity(query, document), same_words(query, document)
    found = kernels(cosines, same, query.mask, document.mask)[0]
    for centre, value in zip(CENTRES, found.tolist(), strict=True):
        width = 1e-3 if centre == 1 else 0.1
        counts = [sum(math.exp(-((c - centre) ** 2) / (2 * width**2)) for c in row) for row in cosines[0].tolist()]
        assert value == pytest.approx(0.01 * sum(math.log(max(count, 1e-10)) for count in counts), abs=2e-5)


def test_the_exact_kernel_counts_exact_matches():
    document = texts([2, 3, 2, 2, 4])
    for word, count in ((2, 3), (3, 1)):
        query = texts([word])
        found = kernels(similarity(query, document), same_words(query, document), query.mask, document.mask)[0, 0]
        assert math.exp(float(found) / 0.01) == pytest.approx(count, rel=1e-4)
    query = texts([30])
    assert float(kernels(similarity(query, document), same_words(query, document), query.mask, document.mask)[0, 0]) == pytest.approx(
        0.01 * math.log(1e-10), rel=1e-5
    )


def test_kernels_that_tile_the_line_hold_each_word_once():
    """The soft counts of the ten wide kernels add up to |d| * sigma * sqrt(2 pi) / 0.2, as integrals over the line do."""
    query, document = texts([1]), texts(list(range(2, 40)), width=64)
    query = texts([1], width=64)
    cosines = similarity(query, document)
    assert float(cosines.abs().max()) < 0.6  # the tiling ends at 0.9
    found = kernels(cosines, same_words(query, document), query.mask, document.mask)[0, 1:]
    assert float((found / 0.01).exp().sum()) == pytest.approx(38 * 0.1 * math.sqrt(2 * math.pi) / 0.2, rel=0.02)


def test_histograms_sum_to_the_length():
    query, document = texts([1, 2], [3, 4]), texts([2, 3, 2, 9, 11], [1, 2])
    found = histogram(similarity(query, document), same_words(query, document), document.mask)
    assert found.shape == (2, 2, 30) and found.sum(2).tolist() == [[5, 5], [2, 2]] and found[..., -1].tolist() == [[0, 2], [0, 0]]
    twin = document._replace(vectors=query.vectors[:, :1].expand_as(document.vectors))  # another word with the same vector
    found = histogram(similarity(query, twin), torch.zeros(2, 2, 5, dtype=torch.bool), document.mask)
    assert found[0, 0, -2] == 5 and (found[..., -1] == 0).all()


def test_dynamic_pooling_is_that_of_torch_without_the_padding():
    maps = torch.rand(4, 2, 7, 31)
    heights, widths = torch.tensor([7, 1, 2, 5]), torch.tensor([31, 4, 10, 17])
    found = dynamic_pool(maps, heights, widths, (3, 10))
    for row, (height, width) in enumerate(zip(heights, widths, strict=True)):
        assert torch.equal(found[row], F.adaptive_max_pool2d(maps[row, :, :height, :width], (3, 10)))


# --- models


@pytest.mark.parametrize("name", MODELS)
def test_padding_and_company_change_nothing(name):
    pairs = [([1, 2], [2, 3, 4, 1, 9]), ([5], [6, 7]), ([1, 9, 9, 4], [3]), ([8, 3, 2], list(range(40))), ([4], [])]
    with torch.no_grad():
        alone = torch.cat([model(name)(texts(q), texts(d)) for q, d in pairs])
        together = model(name)(texts(*[q for q, _ in pairs]), texts(*[d for _, d in pairs]))
        padded = model(name)(texts(*[q for q, _ in pairs], longest=9), texts(*[d for _, d in pairs], longest=53))
    assert alone.shape == (5,) and torch.isfinite(alone).all() and len(set(alone.tolist())) > 2
    assert torch.allclose(alone, together, atol=1e-9, rtol=0) and torch.allclose(alone, padded, atol=1e-9, rtol=0)


@pytest.mark.parametrize("name", MODELS)
def test_which_models_see_the_order_of_words(name):
    words = list(np.random.default_rng(0).permutation(40))
    with torch.no_grad():
        one, other = (float(model(name)(texts([3, 1, 2]), texts([int(w) for w in order]))) for order in (words, words[::-1]))
    assert (abs(one - other) < 1e-9) == (name in ORDERLESS)


@pytest.mark.parametrize("name", MODELS)
def test_what_can_be_learned(name):
    torch.manual_seed(0)
    module = Reranker(name, 40, 8, 2, [0, 2])
    module.words.requires_grad_(True)
    ids = torch.tensor([[0, 5, 6, 2, 7, 5, 9, 2], [0, 8, 9, 2, 9, 6, 11, 2]])
    module(ids, torch.ones_like(ids)).square().sum().backward()
    assert all(each.grad is not None and each.grad.abs().sum() > 0 for each in module.match.parameters() if each.ndim > 1)
    assert (module.words.weight.grad is None) == (name == "drmm")


@pytest.mark.parametrize("name", ["knrm", "conv-knrm"])
def test_kernels_weigh_little_at_first(name):
    assert 0 < float(MODELS[name](8).layer.weight.detach().abs().max()) <= 0.014


# --- use


def made(name: str = "knrm") -> Network:
    torch.manual_seed(0)
    source = TextInput(tokenizer(), 32)
    arguments = {"model": name, "rows": len(source.tokenizer), "width": 8, "separator": separator(source), "special": source.tokenizer.all_special_ids}
    module = Reranker(**arguments)
    module.words.weight.data = F.normalize(module.words.weight.data, dim=1)
    torch.nn.init.normal_(module.match.layer.weight)
    architecture = {"family": "class", "name": "wellread.rerankers:Reranker", "arguments": arguments}
    return Network(module, source, output="score", architecture=architecture)


FOUND = ["a b c", "d e", "a d f", "p o n", "a a a"]


def test_share_zero_is_the_order_as_it_was():
    assert [place for place, _ in rerank(made(), "a b", FOUND, [5, 4, 3.5, 2, 2], share=0.0)] == [0, 1, 2, 3, 4]
    assert best_first(mixed(np.array([3.0, 9.0, 1.0]), np.array([0.1, 0.3, 0.2]), 0.0)).tolist() == [1, 2, 0]


def test_share_one_is_the_reranker_alone():
    network = made()
    alone, weighed = rerank(network, "a b", FOUND), rerank(network, "a b", FOUND, [1, 2, 3, 4, 5], share=1.0)
    with torch.no_grad():
        scores = network(network.input([("a b", text) for text in FOUND]))
    assert [place for place, _ in alone] == [place for place, _ in weighed] == best_first(scores.numpy()).tolist()
    assert [score for _, score in alone] == pytest.approx(sorted(scores.tolist(), reverse=True))


def test_the_two_searches_weigh_what_they_should():
    found = mixed(np.array([0.0, 10.0]), np.array([300.0, 100.0]), 0.25)
    assert found.tolist() == pytest.approx([0.5, -0.5])  # 0.75 * 1 - 0.25 * 1
    assert mixed(np.array([2.0, 2.0]), np.array([1.0, 3.0]), 0.5).tolist() == [-0.5, 0.5]  # equal scores say nothing
    network = made()
    network.module.share.fill_(0.0)
    assert [place for place, _ in rerank(network, "a b", FOUND, [1, 2, 3, 4, 5])] == [4, 3, 2, 1, 0]


def test_hits_of_an_index_are_put_in_the_order_of_the_reranker():
    hits = [Hit(str(place), 0.0, "", text, {"lexical": place + 1}) for place, text in enumerate(FOUND)]
    found = reordered(made(), "a b", hits, share=1.0)
    assert [(int(hit.id), hit.score) for hit in found] == rerank(made(), "a b", FOUND, [0.0] * 5, share=1.0)
    assert all(hit.ranks == {"lexical": int(hit.id) + 1, "first search": int(hit.id) + 1} for hit in found)


def test_equal_scores_stay_in_order():
    assert [place for place, _ in rerank(made(), "a", ["b c", "b c", "b c"])] == [0, 1, 2]


def test_nothing_found_and_nothing_asked():
    assert rerank(made(), "a", []) == []
    for arguments, complaint in (((" ", FOUND), "empty"), (("a", FOUND, [1.0]), "5 texts and 1 scores"), (("a", FOUND, [math.nan] * 5), "finite")):
        with pytest.raises(BadInput, match=complaint):
            rerank(made(), *arguments)
    with pytest.raises(BadInput, match="share"):
        rerank(made(), "a", FOUND, share=1.5)
    with pytest.raises(BadInput, match="neural-ranking"):
        rerank(Network(torch.nn.Linear(2, 2)), "a", FOUND)
    with torch.no_grad():
        assert torch.isfinite(made()(made().input([("strange", "words")]))).all()
