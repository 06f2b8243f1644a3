"""SortedNet: a size in training is the cut network on the whole one's weights, sizes are nested, and every one of them is a network of its own."""

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
from PIL import Image
from scipy.stats import chisquare
from torch.nn import functional as F

import wellread
from bench.cifar_resnet import ResNet
from wellread import ImageInput, Network, TextInput, families
from wellread.batches import tensor_batches
from wellread.data import as_data
from wellread.elastic import sortednet
from wellread.elastic.sortednet import Selection, SizedBatches, find_sizes, largest_under, parse, size_name, sub_network, train_nested
from wellread.errors import BadInput
from wellread.meter import macs, parameters
from wellread.norm import norm_layers

COLORS = ("blue", "green", "red")
KINDS = ("cifar", "vit", "convnext", "bert")


def made(kind: str) -> Network:
    """A small classifier with three classes; fresh weights, statistics of batch norm that are not those of a fresh one."""
    torch.manual_seed(0)
    if kind == "cifar":
        arguments = {"blocks": 3, "classes": 3, "width": 4}
        architecture = {"family": "class", "name": "bench.cifar_resnet:ResNet", "arguments": arguments}
        network = Network(ResNet(**arguments), ImageInput((16, 16), mean=(0.35,) * 3, std=(0.1,) * 3), "linear", COLORS, architecture=architecture)
    elif kind == "bert":
        network = text()
    else:
        name = f"timm/test_{kind}"
        network = wellread.load(name, pretrained=False, num_classes=3, **({"img_size": 32} if kind == "vit" else {}))
        network.input, network.labels = network.input.changed(size=(32, 32)), COLORS
    if kind != "cifar":
        with torch.no_grad():
            for parameter in network.module.parameters():
                parameter += 0.1 * torch.randn_like(parameter)  # fresh blocks do so little that leaving one out could not be seen
    for layer in norm_layers(network.module):
        layer.running_var.uniform_(0.5, 2.0)
        layer.running_mean.normal_(0, 0.2)
    return network


def text() -> Network:
    from tokenizers import Tokenizer, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    words = Tokenizer(models.WordLevel({"[PAD]": 0, "[UNK]": 1, "blue": 2, "green": 3, "red": 4}, unk_token="[UNK]"))
    words.pre_tokenizer = pre_tokenizers.Whitespace()
    size = {"hidden_size": 16, "num_hidden_layers": 4, "num_attention_heads": 4, "intermediate_size": 16, "max_position_embeddings": 16, "vocab_size": 5}
    architecture = {"family": "transformers", "auto": "AutoModel", "config": {"model_type": "bert", **size}, "pooling": "mean", "normalize": False}
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=words, pad_token="[PAD]", unk_token="[UNK]")
    return Network(families.build(architecture), TextInput(tokenizer, 16), "head", None, "embedding", architecture).with_head(COLORS)


def batch_of(network: Network) -> Any:
    if isinstance(network.input, TextInput):
        return network.input(["blue", "red green red", "green blue"])
    return torch.randn(3, 3, *network.input.size, generator=torch.Generator().manual_seed(1))


def photos(rows: int, seed: int = 0) -> Dataset:
    """Noise with a tint."""
    random = np.random.default_rng(seed)
    pairs = []
    for row in range(rows):
        picture = random.integers(0, 160, (16, 16, 3))
        picture[..., 2 - row % 3] += 40
        pairs.append((Image.fromarray(picture.astype(np.uint8)), COLORS[row % 3]))
    return as_data(pairs)


def example(folder: Path) -> dict[str, Any]:
    made("cifar").save(folder / "network")
    for row, photo in enumerate(photos(36)):
        place = folder / "photos" / COLORS[photo["label"]]
        place.mkdir(parents=True, exist_ok=True)
        photo["image"].save(place / f"{row}.png")
    return {"network": str(folder / "network"), "train": f"folder:{folder / 'photos'}", "epochs": 1, "batch_size": 8, "sizes": ["1-1-1"]}


@pytest.fixture(scope="module", params=KINDS)
def network(request: pytest.FixtureRequest) -> Network:
    return made(request.param)


@pytest.fixture(scope="module")
def cifar() -> Network:
    return made("cifar")


@pytest.fixture(scope="module")
def trained(cifar: Network) -> Network:
    return sortednet(cifar, photos(96), photos(48, seed=1), epochs=8, batch_size=16, accumulate=1, learning_rate=0.1)


# --- sizes


def test_what_can_be_cut(cifar: Network) -> None:
    assert find_sizes(cifar).lists == {"layer1": (1, 3), "layer2": (1, 3), "layer3": (1, 3)}
    assert find_sizes(made("vit")).lists == {"blocks": (1, 6)}
    assert find_sizes(made("bert")).lists == {"model.encoder.layer": (1, 4)}
    assert find_sizes(made("convnext")).lists == {"stages.1.blocks": (1, 2), "stages.2.blocks": (1, 4), "stages.3.blocks": (1, 2)}
    sizes = find_sizes(cifar, [0.5])
    assert len(sizes.every()) == 54 == len(set(sizes.every())) and sizes.every()[-1] == sizes.full == "3-3-3" and sizes.shares == (1.0, 0.5)
    assert sizes.path()[:3] == ["1-1-1@0.5", "2-1-1@0.5", "2-2-1@0.5"] and sizes.path()[-1] == "3-3-3" and len(sizes.path()) == 14
    assert all(size_name(*parse(name)) == name for name in sizes.every())


def test_the_full_size_is_the_network_to_the_bit(network: Network) -> None:
    sizes = find_sizes(network)
    assert sizes.edits(sizes.full) == []
    assert torch.equal(Selection(network.module, [])(network.module, batch_of(network)), network(batch_of(network)))


def some_sizes(network: Network) -> tuple[Any, list[str]]:
    sizes = find_sizes(network, [0.5])
    return sizes, [sizes.path()[0], sizes.path()[2], sizes.every()[-2], sizes.full]


def test_a_size_on_the_whole_networks_weights_is_the_cut_network(network: Network) -> None:
    sizes, names = some_sizes(network)
    outputs = []
    for name in names:
        cut = network.edited(*sizes.edits(name))
        outputs.append(cut(batch_of(network)))
        assert torch.equal(Selection(network.module, sizes.edits(name))(network.module, batch_of(network)), outputs[-1]), name
    assert not any(torch.allclose(a, b, atol=1e-4) for a, b in itertools.combinations(outputs, 2)), "the sizes are different networks"


def test_sizes_are_nested(network: Network) -> None:
    sizes = find_sizes(network, [0.75, 0.5])
    for share in sizes.shares:
        kept = [Selection(network.module, sizes.edits(name)).numbers(network.module) for name in sizes.path() if parse(name)[1] == share]
        for small, large in itertools.pairwise(kept):
            assert all(small[name] <= large[name] for name in small) and sum(map(len, small.values())) < sum(map(len, large.values()))
    depth = sizes.full
    narrow, half, whole = (Selection(network.module, sizes.edits(f"{depth}@{share}" if share < 1 else depth)).numbers(network.module) for share in (0.5, 0.75, 1))
    assert all(narrow[name] <= half[name] <= whole[name] for name in narrow) and sum(map(len, narrow.values())) < sum(map(len, half.values()))


def test_cut_networks_are_as_small_as_they_should_be(cifar: Network) -> None:
    sizes = find_sizes(cifar, [0.5])
    blocks = {path: parameters(Network(cifar.module.get_submodule(path))) for path in ("layer1.2", "layer2.1", "layer2.2", "layer3.2")}
    cut = cifar.edited(*sizes.edits("2-1-2"))
    assert parameters(cifar) - parameters(cut) == blocks["layer1.2"] + blocks["layer2.1"] + blocks["layer2.2"] + blocks["layer3.2"]
    narrow = cifar.edited(*sizes.edits("3-3-3@0.5"))
    for path in ("layer1.0", "layer2.2", "layer3.1"):
        before, after = (each.module.get_submodule(path).conv2.weight for each in (cifar, narrow))
        assert after.shape[1] == before.shape[1] // 2 and after.shape[0] == before.shape[0]
        strong = cifar.module.get_submodule(path).conv1.weight.abs().sum((1, 2, 3)).topk(after.shape[1]).indices.sort().values
        assert torch.equal(after, before[:, strong]), "the channels with the largest weights stay"


# --- training


def test_gradients_reach_the_size_and_nothing_else(network: Network) -> None:
    sizes, names = some_sizes(network)
    module = network.copy().module.train()
    for name in names[:3]:
        module.zero_grad()
        selection = Selection(module, sizes.edits(name))
        selection(module, batch_of(network)).square().sum().backward()
        kept = selection.numbers(module)
        for path, parameter in module.named_parameters():
            outside = torch.ones(parameter.numel(), dtype=torch.bool)
            outside[list(kept.get(path, ()))] = False
            gradient = torch.zeros_like(parameter) if parameter.grad is None else parameter.grad
            assert not gradient.flatten()[outside].any(), (name, path)
        with_gradient = [path for path, parameter in module.named_parameters() if parameter.grad is not None and parameter.grad.any()]
        assert len(with_gradient) > 0.5 * len(kept)


def test_statistics_of_the_whole_network_stay_in_training(cifar: Network) -> None:
    module = cifar.copy().module.train()
    before = {name: buffer.clone() for name, buffer in module.named_buffers()}
    selection = Selection(module, find_sizes(cifar).edits("1-2-3"))
    first = selection(module, batch_of(cifar))
    assert all(torch.equal(buffer, before[name]) for name, buffer in module.named_buffers())
    cut = cifar.edited(*find_sizes(cifar).edits("1-2-3")).module.train()
    assert torch.equal(first, cut(batch_of(cifar))) and not torch.allclose(first, cut.eval()(batch_of(cifar)))


def test_passes_through_one_size_add_up_to_one_large_batch() -> None:
    start = made("vit")
    edits = find_sizes(start).edits("2")
    images = torch.randn(16, 3, 32, 32, generator=torch.Generator().manual_seed(0))
    columns = {"inputs": images, "label": torch.arange(16) % 3}
    states = []
    for size, accumulate in ((4, 4), (16, 1)):
        each = start.copy()
        train_nested(
            each, [edits], tensor_batches(columns, batch_size=size), lambda out, batch: F.cross_entropy(out, batch["label"]),
            epochs=2, accumulate=accumulate, learning_rate=0.1, optimizer="sgd",
        )  # fmt: skip
        states.append(each.module.state_dict())
    for name, tensor in states[0].items():
        torch.testing.assert_close(tensor, states[1][name], rtol=1e-4, atol=1e-5)
    assert not torch.equal(states[0]["head.weight"], start.module.state_dict()["head.weight"])
    assert torch.equal(states[0]["blocks.4.mlp.fc1.weight"], start.module.state_dict()["blocks.4.mlp.fc1.weight"])


def test_sizes_are_drawn_evenly_and_the_same_everywhere() -> None:
    def drawn(seed: int, share: float = 0.0, **part: int) -> list[int]:
        batches = tensor_batches({"inputs": torch.zeros(3000, 1)}, batch_size=1, shuffle=True, seed=seed)
        return [batch["size"] for batch in SizedBatches(batches, 10, share).epoch(0, **part)]

    first = drawn(0)
    assert chisquare(np.bincount(first, minlength=10)).pvalue > 0.001
    assert first == drawn(0) != drawn(1) and first[100:] == drawn(0, start=100) and first == drawn(0, process=1, processes=2)
    counts = np.bincount(drawn(0, 0.5), minlength=10)
    assert chisquare(counts, [150] * 9 + [1650]).pvalue > 0.001


def test_every_size_of_the_path_learns(cifar: Network, trained: Network) -> None:
    report = trained.reports["sortednet"]
    table = report.tables["sizes"]
    assert [row["size"] for row in table] == find_sizes(cifar).path() and table[-1]["size"] == "3-3-3"
    assert min(row["accuracy"] for row in table) > 0.6 > report.figures["accuracy before"]  # chance: 1/3
    for column in ("parameters, M", "MACs, M"):
        assert [row[column] for row in table] == sorted({row[column] for row in table})
    from wellread.evaluate import score

    for row in (table[0], table[3], table[-1]):
        cut = sub_network(trained, row["size"])
        assert score(cut, photos(48, seed=1)) == row["accuracy"] and macs(cut) == pytest.approx(1e6 * row["MACs, M"])
    assert trained.lineage[-1]["method"] == "sortednet" and sub_network(trained, "1-1-1").lineage[-1]["settings"] == {"size": "1-1-1"}


def test_width_and_every_combination(cifar: Network) -> None:
    several = sortednet(cifar, photos(24), photos(12, seed=1), sizes=["1-1-1@0.5", "3-3-3"], widths=[0.5], epochs=1, batch_size=8, accumulate=1)
    table = several.reports["sortednet"].tables["sizes"]
    assert [row["size"] for row in table] == ["1-1-1@0.5", "3-3-3"]
    cut = sub_network(several, "1-1-1@0.5")
    assert parameters(cut) == round(1e6 * table[0]["parameters, M"]) < parameters(several) / 4
    everything = sortednet(cifar, photos(24), sizes=["all"], epochs=1, batch_size=8, accumulate=1)
    assert len(everything.reports["sortednet"].tables["sizes"]) == 27
    with pytest.raises(BadInput, match="no batch-norm statistics were kept for the size '1-1-3'"):
        sub_network(everything, "1-1-3")
    assert torch.isfinite(sub_network(everything, "1-1-3", photos(24))(batch_of(cifar))).all()


def test_a_transformer_learns_too() -> None:
    train, test = (as_data([(" ".join([color] * count), color) for count in counts for color in COLORS]) for counts in ((1, 2, 3) * 4, (4, 5)))
    several = sortednet(made("bert"), train, test, epochs=8, optimizer="adamw", learning_rate=3e-3, batch_size=12, accumulate=1)
    assert [row["accuracy"] for row in several.reports["sortednet"].tables["sizes"]] == [1.0] * 4
    assert "sortednet norm" not in several.reports


def test_the_largest_that_fits(trained: Network) -> None:
    table = trained.reports["sortednet"].tables["sizes"]
    cost = {row["size"]: row["MACs, M"] for row in table}
    budgets = np.linspace(min(cost.values()), 1.2 * max(cost.values()), 40)
    chosen = [cost[largest_under(trained, macs=1e6 * budget)] for budget in budgets]
    assert chosen == sorted(chosen) and all(each <= budget for each, budget in zip(chosen, budgets, strict=True)) and chosen[-1] == max(cost.values())
    assert largest_under(trained, macs=1e9, parameters=1e6 * table[2]["parameters, M"] + 1) == table[2]["size"]
    with pytest.raises(BadInput, match=r"the smallest needs .* MACs, M"):
        largest_under(trained, macs=10)
    with pytest.raises(BadInput, match="no budget"):
        largest_under(trained)


def test_whole_and_cut_load_in_a_new_process(trained: Network, tmp_path: Path) -> None:
    cut = sub_network(trained, "2-2-1")
    trained.save(tmp_path / "whole")
    cut.save(tmp_path / "cut")
    batch = batch_of(trained)
    torch.save({"batch": batch, "whole": trained(batch).detach(), "cut": cut(batch).detach()}, tmp_path / "outputs.pt")
    assert (tmp_path / "cut" / "model.safetensors").stat().st_size < 0.6 * (tmp_path / "whole" / "model.safetensors").stat().st_size
    code = (
        "import sys, torch, wellread\n"
        "from pathlib import Path\n"
        "from wellread.elastic.sortednet import largest_under, sub_network\n"
        "folder = Path(sys.argv[1])\n"
        "said = torch.load(folder / 'outputs.pt', weights_only=True)\n"
        "whole, cut = wellread.load(folder / 'whole'), wellread.load(folder / 'cut')\n"
        "assert torch.equal(whole(said['batch']), said['whole']) and torch.equal(cut(said['batch']), said['cut'])\n"
        "assert torch.equal(sub_network(whole, '2-2-1')(said['batch']), said['cut'])\n"
        "assert largest_under(whole, macs=1e9) == '3-3-3'\n"
    )
    root = Path(wellread.__file__).parents[1]
    done = subprocess.run([sys.executable, "-c", code, str(tmp_path)], capture_output=True, text=True, cwd=root)
    assert done.returncode == 0, done.stderr


# --- bad input


@pytest.mark.parametrize(
    ("settings", "words"),
    [
        ({"sizes": ["4-1-1"]}, "keeps 4 blocks of layer1, which can keep 1 to 3"),
        ({"sizes": ["0-1-1"]}, "keeps 0 blocks of layer1"),
        ({"sizes": ["2-2"]}, "has 2 numbers, and the network 3 lists of blocks"),
        ({"sizes": ["small"]}, "write 3-2-5"),
        ({"sizes": ["1-1-1@0.5"]}, "has the share 0.5, and the shares are 1"),
        ({"sizes": ["1-1-1", "1-1-1"]}, "given twice"),
        ({"widths": [0.0]}, "give shares above 0"),
        ({"widths": [1.5]}, "give shares above 0"),
        ({"full_share": 1.5}, "full_share is 1.5"),
    ],
)
def test_sizes_that_cannot_be(cifar: Network, settings: dict[str, Any], words: str) -> None:
    with pytest.raises(BadInput, match=words):
        sortednet(cifar, photos(6), **settings)


def test_networks_and_sizes_that_cannot_be_used(cifar: Network, trained: Network) -> None:
    with pytest.raises(BadInput, match="every block changes the shape, or there is one only"):
        find_sizes(wellread.load("timm/test_resnet", pretrained=False))
    with pytest.raises(BadInput, match="the classes"):
        sortednet(cifar, as_data([(photo["image"], "cat" if row % 2 else "dog") for row, photo in enumerate(photos(6))]))
    with pytest.raises(BadInput, match="no report of trained sizes"):
        sub_network(cifar, "1-1-1")
    with pytest.raises(BadInput, match="no report of trained sizes"):
        largest_under(trained.copy(), macs=1e9)
    with pytest.raises(BadInput, match="the size '1-1-3' was not trained"):
        sub_network(trained, "1-1-3")
    wide = [{"edit": "factorise", "layer": "linear", "rank": 2}]
    with pytest.raises(BadInput, match="sizes can only be cut by selecting"):
        Selection(cifar.module, wide)

