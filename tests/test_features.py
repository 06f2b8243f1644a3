"""Embeddings and stages of networks of every family, and their cache."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from torch import nn

import wellread
from wellread import Network, runtime
from wellread.data import load_data
from wellread.errors import BadInput
from wellread.features import as_map, capture, embed, probe, running, stage_features, stages
from wellread.inputs import ImageInput


def small(name: str) -> Network:
    torch.manual_seed(0)
    network = wellread.load(name, pretrained=False)
    size = network.input.size if "vit" in name or "swin" in name else (32, 32)
    return network.edited(input=network.input.changed(size=size, crop=1.0))


DATA = "digits:train[:12]"


def test_the_nine_levels_of_efficientnet_lite0_are_those_of_the_literature() -> None:
    network = small("timm/tf_efficientnet_lite0")
    found = probe(network, stages(network))
    assert [t.shape[1] for t in found.values()] == [32, 16, 24, 40, 80, 112, 192, 320, 1280]


@pytest.mark.parametrize(
    "name",
    ["timm/test_efficientnet", "timm/test_vit", "timm/test_convnext", "timm/test_resnet", "torchvision/resnet18", "torchvision/mobilenet_v3_small"],
)
def test_stages_of_any_family_are_maps(name: str) -> None:
    network = small(name)
    found = probe(network, stages(network))
    assert len(found) >= 2
    maps = {layer: as_map(value, network) for layer, value in found.items()}
    assert all(m.ndim == 4 and m.shape[0] == 1 for m in maps.values())


def test_tokens_become_a_square_without_the_prefix() -> None:
    network = small("timm/test_vit")
    layer = stages(network)[-1]
    tokens = probe(network, [layer])[layer]
    side = network.module.patch_embed.grid_size[0]
    grid = as_map(tokens, network)
    assert grid.shape[2:] == (side, side) and tokens.shape[1] > side * side
    torch.testing.assert_close(grid[0, :, 0, 1], tokens[0, tokens.shape[1] - side * side + 1])


def test_channels_last_maps_are_turned() -> None:
    network = small("timm/test_vit")
    network.module.output_fmt = "NHWC"
    assert as_map(torch.zeros(1, 4, 5, 6), network).shape == (1, 6, 4, 5)


@pytest.mark.parametrize("name", ["timm/test_efficientnet", "timm/test_vit", "torchvision/resnet18"])
def test_the_embedding_is_what_goes_into_the_head(name: str) -> None:
    network = small(name)
    data = load_data(DATA)
    found = embed(network, data)
    head = network.module.get_submodule(network.head)
    with torch.inference_mode():
        logits = network(network.input([row["image"] for row in data]))
        torch.testing.assert_close(head(torch.from_numpy(found)), logits, rtol=1e-4, atol=1e-4)


def test_text_embeddings_ignore_padding() -> None:
    from datasets import Dataset

    network = wellread.load("minilm-l6")
    texts = ["short", "a very much longer sentence than the other one"]
    together = embed(network, Dataset.from_dict({"text": texts}))
    alone = embed(network, Dataset.from_dict({"text": texts[:1]}))
    np.testing.assert_allclose(together[0], alone[0], atol=1e-6)
    assert stage_features(network, Dataset.from_dict({"text": texts}))[stages(network)[-1]].shape == (2, 384)


def test_features_are_computed_once_and_again_when_anything_changes(monkeypatch: pytest.MonkeyPatch) -> None:
    network = small("timm/test_efficientnet")
    data = load_data("digits:train[20:30]")
    calls = []
    network.module.register_forward_hook(lambda *_: calls.append(1))
    first = embed(network, data)
    assert len(calls) == 1
    assert np.array_equal(embed(network, data), first) and len(calls) == 1
    embed(network, data.select(range(9)))
    assert len(calls) == 2
    with torch.no_grad():
        next(network.module.parameters()).add_(1)
    assert not np.array_equal(embed(network, data), first) and len(calls) == 3
    network.input = network.input.changed(size=(40, 40))
    embed(network, data)
    assert len(calls) == 4
    with runtime.using(progress=False):
        embed(network, data, cache=False)
    assert len(calls) == 5


def test_batch_size_does_not_change_features() -> None:
    network = small("timm/test_resnet")
    data = load_data(DATA)
    np.testing.assert_allclose(embed(network, data, batch_size=5, cache=False), embed(network, data, batch_size=12, cache=False), atol=1e-5)


def test_a_network_is_left_as_it_was_found() -> None:
    network = small("timm/test_resnet")
    network.module.train()
    network.module.get_submodule("layer1").eval()
    with running(network, torch.device("cpu")):
        assert not network.module.training
    assert network.module.training and not network.module.get_submodule("layer1").training
    with capture(network.module, ["layer1"]):
        pass
    assert not network.module.get_submodule("layer1")._forward_hooks


def test_a_layer_named_by_the_user_and_one_that_is_not_there() -> None:
    module = nn.Sequential(nn.Conv2d(1, 4, 3), nn.ReLU(), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(4, 10))
    network = Network(module, input=ImageInput((8, 8), 1))
    assert stage_features(network, load_data(DATA), ["1"])["1"].shape == (12, 4)
    assert stages(network) == ["1"] and network.embedding_size == 4
    with pytest.raises(BadInput, match="no layer 'layer5'"):
        stage_features(network, load_data(DATA), ["layer5"])
    with pytest.raises(BadInput, match="does not say how it is fed"):
        embed(Network(module), load_data(DATA))
