"""Starbucks: the losses against sentence-transformers', every exit against the physically cut encoder, and the method on three families."""

from __future__ import annotations

import itertools
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from datasets import Dataset
from torch import Tensor
from torch.nn import functional as F

import wellread
from wellread import Network, TextInput, families
from wellread.cli import main
from wellread.elastic import starbucks
from wellread.elastic.starbucks import (
    cosent,
    default_sizes,
    divergence,
    encoder,
    pair_batches,
    parse_sizes,
    ranking,
    similarities,
    spearman,
    starbucks_loss,
    sub_network,
)  # fmt: skip
from wellread.errors import BadInput
from wellread.features import embed

WORDS = ("red", "blue", "green", "small", "large", "old", "dog", "cat", "bird", "house", "tree", "runs", "sleeps", "falls", "grows")
SMALL = {"vocab_size": 20, "hidden_size": 24, "num_attention_heads": 2, "intermediate_size": 32, "max_position_embeddings": 32, "pad_token_id": 0}
FAMILIES: dict[str, tuple[str, dict[str, Any]]] = {
    "bert": ("mean", {"model_type": "bert", "num_hidden_layers": 3, **SMALL}),
    "cls": ("cls", {"model_type": "bert", "num_hidden_layers": 3, **SMALL}),
    "distilbert": ("mean", {"model_type": "distilbert", "n_layers": 3, "dim": 24, "n_heads": 2, "hidden_dim": 32, "vocab_size": 20}),
    "modernbert": ("mean", {"model_type": "modernbert", "num_hidden_layers": 3, "global_attn_every_n_layers": 2, "local_attention": 4, **SMALL}),
}


def made(kind: str, normalize: bool = True) -> Network:
    """A small encoder with fresh weights, far enough from zero that its blocks matter."""
    from tokenizers import Tokenizer, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    words = Tokenizer(models.WordLevel({"[PAD]": 0, "[UNK]": 1} | {word: i for i, word in enumerate(WORDS, 2)}, unk_token="[UNK]"))
    words.pre_tokenizer = pre_tokenizers.Whitespace()
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=words, pad_token="[PAD]", unk_token="[UNK]")
    pooling, config = FAMILIES[kind]
    architecture = {"family": "transformers", "auto": "AutoModel", "config": config, "pooling": pooling, "normalize": normalize}
    torch.manual_seed(0)
    network = Network(families.build(architecture), TextInput(tokenizer, 32), "head", None, "embedding", architecture)
    with torch.no_grad():
        for parameter in network.module.parameters():
            parameter += 0.1 * torch.randn_like(parameter)
    return network


def pairs(rows: int, seed: int = 0) -> Dataset:
    """Sentences of three words; the score is how many they share."""
    random = np.random.default_rng(seed)
    kinds = (WORDS[:6], WORDS[6:11], WORDS[11:])
    first = [[str(random.choice(kind)) for kind in kinds] for _ in range(rows)]
    second = [[word if random.random() < 0.5 else str(random.choice(kind)) for word, kind in zip(one, kinds, strict=True)] for one in first]
    score = [float(sum(a == b for a, b in zip(one, two, strict=True))) for one, two in zip(first, second, strict=True)]
    return Dataset.from_dict({"sentence1": [" ".join(one) for one in first], "sentence2": [" ".join(two) + " old" for two in second], "score": score})


@pytest.fixture(scope="module", params=FAMILIES)
def network(request: pytest.FixtureRequest) -> Network:
    return made(request.param)


@pytest.fixture(scope="module")
def bert() -> Network:
    return made("bert")


@pytest.fixture
def batch(network: Network) -> dict[str, Tensor]:
    assert isinstance(network.input, TextInput)
    return network.input(["red dog", "old blue cat sleeps in large house", "bird"])  # three lengths: padding must not count


def example(folder: Path) -> dict[str, Any]:
    made("bert").save(folder / "encoder")
    pairs(24).to_csv(folder / "pairs.csv")
    return {"network": str(folder / "encoder"), "pairs": f"csv:{folder / 'pairs.csv'}", "epochs": 1, "batch_size": 8}


# --- losses


def test_losses_are_those_of_sentence_transformers_on_cut_encoders(bert: Network) -> None:
    from sentence_transformers.sentence_transformer.losses import CoSENTLoss, MultipleNegativesRankingLoss

    table = pairs(12)
    parts = encoder(bert)
    rows = next(pair_batches(bert, table, batch_size=12).epoch(0))
    assert len(set(table["score"])) < 12, "there are ties"
    for size in ((1, 7), (2, 12), (3, 24)):
        cut = sub_network(bert, size, untrained=True)
        with torch.no_grad():
            theirs = [cut(bert.input(table[column])) for column in ("sentence1", "sentence2")]
            vectors = parts.vectors(bert.module, rows["inputs"], [size[0]])
        ours = starbucks_loss(vectors, [size[1]], rows["score"])[0]
        torch.testing.assert_close(ours, CoSENTLoss(None).compute_loss_from_embeddings(theirs, rows["score"]), rtol=1e-5, atol=1e-5)
        ours = starbucks_loss(vectors, [size[1]], None)[0]
        torch.testing.assert_close(ours, MultipleNegativesRankingLoss(None).compute_loss_from_embeddings(theirs, None), rtol=1e-5, atol=1e-5)


def test_cosent_counts_only_the_order_and_is_zero_pairs_when_all_are_equal() -> None:
    similarity, score = torch.tensor([0.1, 0.5, 0.3]), torch.tensor([3.0, 1.0, 2.0])
    direct = sum(np.exp(20 * (float(similarity[j]) - float(similarity[i]))) for i, j in itertools.product(range(3), repeat=2) if score[i] > score[j])
    assert cosent(similarity, score).item() == pytest.approx(np.log(1 + direct), rel=1e-5)
    assert torch.equal(cosent(similarity, score), cosent(similarity, score**3 - 7))
    assert cosent(similarity, torch.ones(3)).item() == 0


def test_divergence() -> None:
    torch.manual_seed(0)
    teacher, student = torch.randn(5, 8, requires_grad=True), torch.randn(5, 8, requires_grad=True)
    assert divergence(teacher, teacher).abs().item() < 1e-6 < divergence(teacher, student).item()
    p, q = (3 * teacher).softmax(-1), (3 * student).softmax(-1)
    torch.testing.assert_close(divergence(teacher, student, 3.0), (p * (p / q).log()).sum(-1).mean())
    divergence(teacher, student).backward()
    assert teacher.grad is None and student.grad is not None and student.grad.abs().sum() > 0
    assert all(divergence(torch.randn(4, 6), torch.randn(4, 6)).item() >= 0 for _ in range(50))


@pytest.mark.parametrize("score", [torch.arange(4.0), None])
def test_the_loss_is_the_sum_over_sizes(score: Tensor | None) -> None:
    torch.manual_seed(0)
    vectors, dimensions = [torch.randn(8, 10) for _ in range(3)], [2, 5, 10]

    def base(vector: Tensor, size: int) -> Tensor:
        first, second = F.normalize(vector[:, :size], dim=-1).chunk(2)
        return ranking(first @ second.T) if score is None else cosent((first * second).sum(-1), score)

    plain = torch.stack([base(vector, size) for vector, size in zip(vectors, dimensions, strict=True)])
    for kl in ("none", "scores", "coordinates"):
        torch.testing.assert_close(starbucks_loss(vectors[-1:], [10], score, kl=kl)[0], plain[-1])
        torch.testing.assert_close(torch.stack(starbucks_loss(vectors, dimensions, score, kl=kl, kl_weight=0.0)), plain)
        extra = torch.stack(starbucks_loss(vectors, dimensions, score, kl=kl)) - plain
        assert extra[-1].abs() < 1e-6 and ((extra[:-1] > 1e-4) == (kl != "none")).all()
        torch.testing.assert_close(torch.stack(starbucks_loss(vectors, dimensions, score, kl=kl, kl_weight=2.0)) - plain, 2 * extra, rtol=1e-4, atol=1e-5)
    same = torch.stack(starbucks_loss([vectors[-1]] * 2, [10, 10], score, kl="scores"))
    torch.testing.assert_close(same[0], same[1])


def test_small_sizes_do_not_draw_the_large_one() -> None:
    torch.manual_seed(0)
    full, small = torch.randn(8, 10, requires_grad=True), torch.randn(8, 10, requires_grad=True)
    for kl in ("scores", "coordinates"):
        (gradient,) = torch.autograd.grad(starbucks_loss([small, full], [4, 10], torch.arange(4.0), kl=kl)[0], full, allow_unused=True)
        assert gradient is None


# --- sizes


def test_every_exit_is_the_physically_cut_encoder(network: Network, batch: dict[str, Tensor]) -> None:
    parts = encoder(network)
    assert parts.depth == 3 and parts.width == 24 and (parts.norm is not None) == ("modernbert" in str(network.architecture))
    with torch.no_grad():
        vectors = parts.vectors(network.module, batch, [1, 2, 3])
        for layer, size in itertools.product((1, 2, 3), (5, 24)):
            cut = sub_network(network, (layer, size), untrained=True)
            torch.testing.assert_close(cut(batch), F.normalize(vectors[layer - 1][:, :size], dim=-1), rtol=0, atol=1e-5)
            assert cut.embedding_size == size
        assert not torch.allclose(vectors[0], vectors[1], atol=1e-2), "the layers differ, so that an index off by one would be seen"
        assert torch.equal(sub_network(network, "3x24", untrained=True)(batch), network(batch))


def test_padding_does_not_count(network: Network, batch: dict[str, Tensor]) -> None:
    parts = encoder(network)
    alone = network.input(["bird"])
    with torch.no_grad():
        for padded, single in zip(parts.vectors(network.module, batch, [1, 2, 3]), parts.vectors(network.module, alone, [1, 2, 3]), strict=True):
            torch.testing.assert_close(padded[2:], single, rtol=0, atol=1e-5)


def test_an_encoder_that_does_not_normalise_is_only_truncated() -> None:
    plain = made("bert", normalize=False)
    batch = plain.input(["red dog runs"])
    assert torch.equal(sub_network(plain, "3x6", untrained=True)(batch), plain(batch)[:, :6])


def test_the_cut_encoder_is_smaller_and_can_be_used_like_any_other(bert: Network) -> None:
    cut = sub_network(bert, "1x8", untrained=True)
    parts = encoder(bert)
    block = sum(p.numel() for p in bert.module.get_submodule(f"{parts.blocks}.0").parameters())
    assert sum(p.numel() for p in bert.module.parameters()) - sum(p.numel() for p in cut.module.parameters()) == 2 * block
    texts = Dataset.from_dict({"text": ["red dog", "old cat"]})
    np.testing.assert_allclose(embed(cut, texts), cut(cut.input(texts["text"])).detach().numpy(), atol=1e-6)
    classifier = cut.with_head(["a", "b"])
    assert classifier(cut.input(["red dog"])).shape == (1, 2) and cut.lineage[-1]["method"] == "starbucks-size"


def test_default_sizes_are_the_papers() -> None:
    assert default_sizes(12, 768) == [(2, 32), (4, 64), (6, 128), (8, 256), (10, 512), (12, 768)]
    assert default_sizes(3, 24)[-1] == (3, 24) and [layers for layers, _ in default_sizes(3, 24)] == [1, 2, 3]
    assert parse_sizes(["1x4", "2x4"], 3, 24) == [(1, 4), (2, 4), (3, 24)] and parse_sizes(["3x24"], 3, 24) == [(3, 24)]


# --- the method


@pytest.mark.filterwarnings("ignore:pairs and validation share")  # there are few sentences of three words
@pytest.mark.parametrize("kind", ["bert", "distilbert", "modernbert"])
def test_every_size_learns(kind: str) -> None:
    network = made(kind)
    before = network.fingerprint
    train, test = pairs(96), pairs(60, seed=1)
    several = starbucks(network, train, test, sizes=["1x6", "2x12"], epochs=6, learning_rate=3e-3, batch_size=16)
    table = several.reports["starbucks"].tables["sizes"]
    assert [row["size"] for row in table] == ["1x6", "2x12", "3x24"] and network.fingerprint == before
    assert several.lineage[-1]["method"] == "starbucks"
    assert np.mean([row["spearman"] - row["spearman, truncated"] for row in table[:2]]) > 0.05  # fresh weights know shared words already
    assert [row["parameters, M"] for row in table] == sorted(row["parameters, M"] for row in table)
    assert [row["MACs, M"] for row in table] == sorted(row["MACs, M"] for row in table)
    told = spearman(several, test, [(1, 6), (3, 24)])
    assert told == {row["size"]: row["spearman"] for row in table if row["size"] in told}
    found = similarities(several, test, [(1, 6)])["1x6"]
    cut = sub_network(several, "1x6")
    with torch.no_grad():
        direct = (cut(cut.input(test["sentence1"])) * cut(cut.input(test["sentence2"]))).sum(-1)
    np.testing.assert_allclose(found, direct.numpy(), atol=1e-5)
    with pytest.raises(BadInput, match="not trained for the size 1x5 .*1x6, 2x12, 3x24"):
        sub_network(several, "1x5")


def test_whole_and_cut_load_in_a_new_process(tmp_path: Path) -> None:
    outputs = {}
    for kind in ("bert", "modernbert"):
        made_of = starbucks(made(kind), pairs(16), sizes=["1x6"], epochs=1)
        for name, each in ((kind, made_of), (f"{kind}-1x6", sub_network(made_of, "1x6"))):
            each.save(tmp_path / name)
            outputs[name] = each(each.input(["red dog", "old cat sleeps"])).detach()
    torch.save(outputs, tmp_path / "outputs.pt")
    code = (
        "import sys, torch, wellread\n"
        "from pathlib import Path\n"
        "from wellread.elastic.starbucks import sub_network\n"
        "folder = Path(sys.argv[1])\n"
        "for name, output in torch.load(folder / 'outputs.pt', weights_only=True).items():\n"
        "    network = wellread.load(folder / name)\n"
        "    tokens = network.input(['red dog', 'old cat sleeps'])\n"
        "    assert torch.equal(network(tokens), output), name\n"
        "    if '-' not in name:\n"
        "        assert torch.equal(sub_network(network, '1x6')(tokens), wellread.load(folder / f'{name}-1x6')(tokens)), name\n"
    )
    done = subprocess.run([sys.executable, "-c", code, str(tmp_path)], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr


def test_the_command_reads_pairs_from_a_file(tmp_path: Path) -> None:
    words = [word for name, value in example(tmp_path).items() for word in (f"--{name.replace('_', '-')}", str(value))]
    assert main(["run", "starbucks", *words, "--out", str(tmp_path / "out"), "--quiet"]) == 0
    made_of = wellread.load(tmp_path / "out")
    assert [row["size"] for row in made_of.reports["starbucks"].tables["sizes"]] == [f"{n}x{d}" for n, d in default_sizes(3, 24)]
    assert sub_network(made_of, default_sizes(3, 24)[0]).embedding_size == default_sizes(3, 24)[0][1]


def test_matching_pairs_need_no_scores(bert: Network) -> None:
    table = pairs(24).remove_columns("score")
    assert starbucks(bert, table, sizes=["1x6"], loss="ranking", epochs=1).fingerprint != bert.fingerprint
    with pytest.raises(BadInput, match="no column 'score'"):
        starbucks(bert, table)


def test_the_same_seed_gives_the_same_encoder(bert: Network) -> None:
    first, second, other = (starbucks(bert, pairs(24), sizes=["1x6"], epochs=1, seed=seed).fingerprint for seed in (1, 1, 2))
    assert first == second != other


# --- bad input


@pytest.mark.parametrize(
    ("sizes", "words"),
    [
        (["4x6"], "it has 3 layers and 24 dimensions"),
        (["0x6"], "it has 3 layers"),
        (["1x25"], "24 dimensions"),
        (["2x6", "1x6"], "not sorted"),
        (["1x8", "2x6"], "not sorted"),
        (["1x6", "1x6"], "twice"),
        (["small"], "write 2x64"),
        (["2x"], "write 2x64"),
    ],
)
def test_sizes_that_cannot_be(bert: Network, sizes: list[str], words: str) -> None:
    with pytest.raises(BadInput, match=words):
        starbucks(bert, pairs(8), sizes=sizes)


def test_pairs_that_cannot_be_used(bert: Network) -> None:
    good = pairs(4).to_dict()
    for change, words in (
        ({"sentence2": ["red", " ", "dog", "cat"]}, "pairs has no text in row 1 of sentence2"),
        ({"score": [1.0, None, 2.0, 3.0]}, "pairs has no usable score in row 1"),
        ({"score": [1.0, float("nan"), 2.0, 3.0]}, "pairs has no usable score in row 1"),
        ({"score": [2.0] * 4}, "all scores of pairs are 2"),
        ({"score": ["high", "low", "low", "low"]}, "not numbers"),
    ):
        with pytest.raises(BadInput, match=words):
            starbucks(bert, Dataset.from_dict(good | change))
    with pytest.raises(BadInput, match="no column 'sentence1'"):
        starbucks(bert, Dataset.from_dict({"text": ["red"], "score": [1.0]}))
    with pytest.raises(BadInput, match="one row"):
        starbucks(bert, pairs(1), loss="ranking")
    with pytest.raises(BadInput, match="kl_weight is -1"):
        starbucks(bert, pairs(4), kl_weight=-1)


def test_networks_that_have_no_sizes(bert: Network) -> None:
    for wrong in (wellread.load("timm/test_vit", pretrained=False), Network(bert.module, None, "head", None, "embedding", bert.architecture)):
        with pytest.raises(BadInput, match="a sentence encoder is needed"):
            starbucks(wrong, pairs(4))
    with pytest.raises(BadInput, match="after its pooling"):
        starbucks(sub_network(bert, "1x6", untrained=True), pairs(4))
    with pytest.raises(BadInput, match="no report of trained sizes"):
        sub_network(bert, "1x6")
    strange = bert.copy()
    strange.module.pooling = "max"
    with pytest.raises(BadInput, match="pooling 'max' is not known"):
        encoder(strange)
