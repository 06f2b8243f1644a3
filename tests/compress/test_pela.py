"""PELA: the low-rank start, the two losses, training against a teacher that stays as it is, and the whole on a ViT and a text encoder."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from datasets import Dataset
from PIL import Image
from torch import nn

import wellread
from wellread import Network, TextInput, families, meter
from wellread.compress.pela import blocks, distil, feature_error, feature_loss, features_of, low_rank_start, pela, perturbation_loss, ratio_rank
from wellread.data import as_data
from wellread.errors import BadInput
from wellread.evaluate import predict
from wellread.ranks import Layer, find_layers
from wellread.structure import layer_of

WORDS = ["sun", "moon", "star", "red", "blue", "far", "near"]


def text_encoder(folder: Path) -> Network:
    """Two layers of BERT, without dropout, over a vocabulary of words."""
    from transformers import BertTokenizerFast

    (folder / "vocab.txt").write_text("\n".join(["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", *WORDS]))
    tokenizer = BertTokenizerFast(vocab_file=str(folder / "vocab.txt"))
    config = {
        "model_type": "bert", "vocab_size": 12, "hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 64,
        "max_position_embeddings": 40, "hidden_dropout_prob": 0.0, "attention_probs_dropout_prob": 0.0, "attn_implementation": "eager",
    }  # fmt: skip
    torch.manual_seed(0)
    module = families.Transformer("AutoModel", config)
    with torch.no_grad():
        for parameter in module.parameters():
            parameter.mul_(4 if parameter.ndim > 1 else 1)  # as random as it starts, every word is much the same to it
    architecture = {"family": "transformers", "auto": "AutoModel", "config": config, "pooling": "mean", "normalize": False}
    return Network(module, TextInput(tokenizer, 32), "head", output="embedding", architecture=architecture)


def vit() -> Network:
    torch.manual_seed(0)
    network = wellread.load("timm/test_vit", pretrained=False, img_size=32)
    return network.edited(input=network.input.changed(size=(32, 32)))  # type: ignore[union-attr]


def example(folder: Path) -> dict[str, Any]:
    return {"network": str(vit().save(folder / "vit")), "data": "digits:train[:16]", "held_out": "digits:test[:8]", "epochs": 1, "batch_size": 8}


@pytest.fixture(scope="module")
def text(tmp_path_factory: pytest.TempPathFactory) -> Network:
    return text_encoder(tmp_path_factory.mktemp("vocabulary"))


@pytest.fixture(scope="module")
def sentences() -> Dataset:
    random = np.random.default_rng(0)
    return as_data([" ".join(random.choice(WORDS, random.integers(2, 9))) for _ in range(64)])


@pytest.fixture(scope="module")
def pictures() -> Dataset:
    random = np.random.default_rng(0)
    return as_data([Image.fromarray(random.integers(0, 255, (32, 32, 3), dtype=np.uint8)) for _ in range(16)])


def linear(network: Network) -> list[Layer]:
    return find_layers(network, which="linear", leave_out=["pooler"] if network.output == "embedding" else [])[0]


# --- the start


@pytest.mark.parametrize("kind", ["text", "vit"])
def test_at_full_rank_the_student_is_the_teacher(kind: str, text: Network, sentences: Dataset, pictures: Dataset) -> None:
    network, data = (text, sentences) if kind == "text" else (vit(), pictures)
    layers = linear(network)
    student = low_rank_start(network, layers, {layer.path: layer.highest for layer in layers})
    np.testing.assert_allclose(predict(student, data), predict(network, data), rtol=1e-5, atol=2e-5)
    assert len(student.edits) == len(layers)
    assert feature_error(student, network, data, blocks(network)) < 1e-9


@pytest.mark.parametrize("ratio", [1.5, 2.0, 3.0])
def test_ranks_and_sizes_are_those_of_the_ratio(text: Network, ratio: float) -> None:
    layers = linear(text)
    chosen = {layer.path: ratio_rank(layer, ratio) for layer in layers}
    student = low_rank_start(text, layers, chosen)
    for layer in layers:
        o, i = layer.shape
        assert chosen[layer.path] == int(o * i / (ratio * (o + i)))
        first, second = layer_of(student.module, layer.path)  # type: ignore[misc]
        assert first.weight.numel() + second.weight.numel() == chosen[layer.path] * (o + i) <= o * i / ratio
        weight = layer_of(text.module, layer.path).weight
        assert torch.equal(second.bias, layer_of(text.module, layer.path).bias)  # type: ignore[arg-type]
        torch.testing.assert_close(first.weight @ first.weight.T, second.weight.T @ second.weight, rtol=1e-4, atol=1e-5)
        left = torch.linalg.svdvals(weight.double())[chosen[layer.path] :]  # type: ignore[union-attr]
        error = torch.linalg.matrix_norm(second.weight @ first.weight - weight)
        assert float(error.detach()) == pytest.approx(float((left**2).sum().sqrt().detach()), rel=1e-4)


def test_a_start_on_data_changes_the_features_less(text: Network, sentences: Dataset) -> None:
    layers = linear(text)
    chosen = {layer.path: ratio_rank(layer, 3.0) for layer in layers}
    plain, weighted = (low_rank_start(text, layers, chosen, data) for data in (None, sentences))
    assert plain.edits == weighted.edits
    assert feature_error(weighted, text, sentences, blocks(text)) < 0.9 * feature_error(plain, text, sentences, blocks(text))


# --- the losses


def test_feature_loss_is_a_mean_over_blocks_and_tokens() -> None:
    student = {"a": torch.zeros(2, 3, 4), "b": torch.zeros(2, 3, 4)}
    teacher = {"a": torch.ones(2, 3, 4), "b": torch.full((2, 3, 4), 2.0)}
    assert float(feature_loss(student, teacher)) == pytest.approx((1 + 4) / 2)
    teacher["a"][1, 2] = 100.0
    mask = torch.tensor([[1, 1, 1], [1, 1, 0]])
    assert float(feature_loss(student, teacher, mask)) == pytest.approx((1 + 4) / 2)
    assert float(feature_loss(teacher, teacher, mask)) == 0.0


def test_padding_does_not_change_the_loss(text: Network, sentences: Dataset) -> None:
    student = low_rank_start(text, linear(text), {layer.path: 4 for layer in linear(text)})
    inputs = text.input(sentences["text"][:6])  # type: ignore[misc, operator]
    short = int(inputs["attention_mask"].sum(1).max())
    found = []
    for length in (short, short + 5):
        padded = {key: nn.functional.pad(value[:, :short], (0, length - short)) for key, value in inputs.items()}
        mine, theirs = (features_of(each, blocks(text), padded)[0] for each in (student, text))
        found.append(float(feature_loss(mine, theirs, padded["attention_mask"]).detach()))
        unmasked = float(feature_loss(mine, theirs).detach())
    assert found[0] == pytest.approx(found[1], rel=1e-5) and found[0] > 0
    assert unmasked != pytest.approx(found[1], rel=1e-3)
    assert float(feature_loss(theirs, theirs, padded["attention_mask"]).detach()) == 0.0


def test_the_perturbation_is_the_largest_entry_and_touches_one_row_and_column() -> None:
    torch.manual_seed(0)
    weights = [torch.randn(7, 5), torch.randn(6, 8)]
    pairs = []
    for weight in weights:
        u, s, vt = torch.linalg.svd(weight)
        parts = nn.Sequential(nn.Linear(weight.shape[1], 3, bias=False), nn.Linear(3, weight.shape[0]))
        parts[0].weight.data, parts[1].weight.data = s[:3, None].sqrt() * vt[:3], u[:, :3] * s[:3].sqrt()
        pairs.append((parts, weight))
    moved = [float((parts[1].weight @ parts[0].weight - weight).abs().max().detach()) for parts, weight in pairs]
    loss = perturbation_loss(pairs, epsilon=0.1)
    assert float(loss.detach()) == pytest.approx(np.mean([(each - 0.1) ** 2 for each in moved]), rel=1e-5)
    loss.backward()
    for parts, weight in pairs:
        place = (parts[1].weight @ parts[0].weight - weight).abs().argmax()
        row, column = divmod(int(place), weight.shape[1])
        assert parts[1].weight.grad.abs().sum(1).nonzero().flatten().tolist() == [row]
        assert parts[0].weight.grad.abs().sum(0).nonzero().flatten().tolist() == [column]
    assert float(perturbation_loss(pairs, epsilon=max(moved) + 1, hinge=True).detach()) == 0.0
    assert float(perturbation_loss(pairs, epsilon=max(moved) + 1).detach()) > 0.9
    exact = [(parts, (parts[1].weight @ parts[0].weight).detach()) for parts, _ in pairs]
    assert float(perturbation_loss(exact, epsilon=0.1).detach()) == pytest.approx(0.01, rel=1e-4)


# --- the training


def test_training_brings_the_features_back_and_leaves_the_teacher(text: Network, sentences: Dataset) -> None:
    before = {key: tensor.clone() for key, tensor in text.module.state_dict().items()}
    modes = [layer.training for layer in text.module.modules()]
    layers = linear(text)
    student = low_rank_start(text, layers, {layer.path: ratio_rank(layer, 3.0) for layer in layers})
    cut = feature_error(student, text, sentences, blocks(text))
    logs = distil(student, text, sentences, layers, epochs=6, learning_rate=3e-3, batch_size=16)
    assert set(logs) == {"features", "outputs", "perturbation"} and len(logs["features"]) == 6 * 4
    assert feature_error(student, text, sentences, blocks(text)) < 0.6 * cut
    assert all(torch.equal(before[key], tensor) for key, tensor in text.module.state_dict().items())
    assert modes == [layer.training for layer in text.module.modules()]
    assert all(parameter.grad is None for parameter in text.module.parameters())


def test_the_regulariser_holds_weights_near_the_original(text: Network, sentences: Dataset) -> None:
    layers = linear(text)
    moved = []
    for weight in (0.0, 100.0):
        student = low_rank_start(text, layers, {layer.path: ratio_rank(layer, 2.0) for layer in layers})
        distil(student, text, sentences, layers, epochs=3, learning_rate=3e-3, batch_size=16, perturbation=weight)
        pairs = [(layer_of(student.module, layer.path), layer_of(text.module, layer.path).weight) for layer in layers]
        moved.append(float(perturbation_loss(pairs, 0.0).detach()))  # type: ignore[arg-type]
    assert moved[1] < 0.9 * moved[0]


# --- the method

LOAD = """
import json, sys, wellread
from wellread.evaluate import predict
from wellread.data import as_data
network = wellread.load(sys.argv[1])
print(json.dumps([predict(network, as_data(["sun moon far", "red star"])).tolist(), network.lineage[-1]["method"], list(network.reports)]))
"""


def test_saved_without_the_teacher_and_loaded_in_a_new_process(text: Network, sentences: Dataset, tmp_path: Path) -> None:
    small = pela(text, sentences, ratio=3.0, epochs=1, batch_size=16)
    report = small.reports["pela"]
    assert report.figures["parameters of the cut layers"] <= 1 / 3
    assert report.figures["parameters of the network"] == pytest.approx(meter.parameters(small) / meter.parameters(text))
    assert report.figures["feature error after training"] < report.figures["feature error after the cut"]
    assert {row["layer"] for row in report.tables["left out"]} == {"model.pooler.dense"}
    assert len(report.tables["layers"]) == len(small.edits) == 12
    small.save(tmp_path / "small")
    done = subprocess.run([sys.executable, "-c", LOAD, str(tmp_path / "small")], capture_output=True, text=True, check=True)
    theirs, made_by, reports = json.loads(done.stdout)
    assert (made_by, reports) == ("pela", ["pela"])
    np.testing.assert_array_equal(np.float32(theirs), predict(small, as_data(["sun moon far", "red star"])))


def test_a_vit_to_a_share_of_all_its_parameters(pictures: Dataset) -> None:
    network = vit()
    small = pela(network, pictures, keep=0.6, epochs=1, start="whitened", outputs=1.0, batch_size=8)
    assert meter.parameters(small) <= 0.6 * meter.parameters(network)
    ranks_found = {record["rank"] for record in small.edits}
    assert len(ranks_found) > 2  # each layer its own
    assert not any("head" in record["layer"] or "patch_embed" in record["layer"] for record in small.edits)


@pytest.mark.parametrize(
    ("settings", "sentence"),
    [
        ({"ratio": 1.0}, "above 1"),
        ({"ratio": 0.5}, "above 1"),
        ({"keep": 0.05}, r"at rank 1 leave 0\.\d+; give more"),
        ({"ratio": 1000.0}, "no Linear layer of this network can be cut"),
        ({"leave_out": ["atention"]}, "did you mean .*attention"),
        ({"features": 0.0}, "nothing to learn from"),
        ({"epsilon": -1.0}, "at least 0"),
    ],
)
def test_bad_input(text: Network, sentences: Dataset, settings: dict[str, Any], sentence: str) -> None:
    with pytest.raises(BadInput, match=sentence):
        pela(text, sentences, **settings)


def test_a_convolutional_network_is_sent_elsewhere(pictures: Dataset) -> None:
    with pytest.raises(BadInput, match="trained-rank-pruning"):
        pela(wellread.load("timm/test_resnet", pretrained=False), pictures)


def test_adapters_must_be_merged_first(text: Network, sentences: Dataset) -> None:
    wrapped = text.copy()
    wrapped.module.add_module("lora_A", nn.Linear(2, 2))
    with pytest.raises(BadInput, match="merge them"):
        pela(wrapped, sentences)
