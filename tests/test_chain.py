"""Chains: the view computes the network, a network stitched to itself is itself, and stitched ones are networks like any other."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from tokenizers import Tokenizer, models, pre_tokenizers
from torch import Tensor, nn
from transformers import PreTrainedTokenizerFast

import wellread
from bench.cifar_resnet import network as cifar_resnet
from wellread import ImageInput, Network, TextInput, families
from wellread.chain import Chain, Stitch, Stitched, chain, fed_differently, keep_only, recognise, stitch
from wellread.errors import BadInput

IMAGES = ("timm/test_resnet", "timm/test_efficientnet", "timm/test_convnext", "timm/test_vit", "torchvision/resnet18", "cifar")
SENTENCES = ["good", "very very good", "bad"]


def bert(layers: int, width: int = 16, words: tuple[str, ...] = ("good", "bad", "very")) -> Network:
    """A random encoder; its tokenizer knows the words."""
    known = {word: number for number, word in enumerate(("[PAD]", "[UNK]", *words))}
    tokenizer = Tokenizer(models.WordLevel(known, unk_token="[UNK]"))
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    size = {"hidden_size": width, "num_hidden_layers": layers, "num_attention_heads": 2, "intermediate_size": 16, "max_position_embeddings": 16}
    config = {"model_type": "bert", "vocab_size": len(known), **size}
    architecture = {"family": "transformers", "auto": "AutoModel", "config": config, "pooling": "mean", "normalize": True}
    fast = PreTrainedTokenizerFast(tokenizer_object=tokenizer, pad_token="[PAD]", unk_token="[UNK]")
    return Network(families.build(architecture), TextInput(fast, 16), head="head", output="embedding", architecture=architecture)


def made(name: str, seed: int = 0) -> Network:
    """A small network whose batch norms are not those of a fresh one."""
    torch.manual_seed(seed)
    if name == "bert":
        network = bert(3)
    elif name == "cifar":
        network = cifar_resnet(8 + 6 * seed, pretrained=False)
    else:
        network = wellread.load(name, pretrained=False, **({"img_size": 32} if "vit" in name else {}))
        network.input = network.input.changed(size=(32, 32))
    with torch.no_grad():
        for key, tensor in network.module.state_dict().items():
            if key.endswith("running_var"):
                tensor.uniform_(0.5, 2.0)
            elif key.endswith("running_mean"):
                tensor.normal_(0, 0.2)
    return network


def batch_of(network: Network) -> Tensor | dict[str, Tensor]:
    if isinstance(network.input, TextInput):
        return network.input(SENTENCES)
    return torch.randn(3, 3, *network.input.size, generator=torch.Generator().manual_seed(7))


def identity(width: int, places: bool) -> Stitch:
    layer = Stitch(width, width, places)
    layer.set(torch.eye(width), torch.zeros(width))
    return layer


def width_after(network: Network, until: int) -> tuple[int, bool]:
    view, batch = chain(network), batch_of(network)
    with torch.no_grad():
        state = view.stem(network.module, batch)
        for path in view.blocks[:until]:
            state = view.block(network.module, path, state)
    return (state.hidden.shape[1], True) if state.hidden.ndim == 4 else (state.hidden.shape[-1], False)


@pytest.mark.parametrize("name", [*IMAGES, "bert"])
def test_the_composition_is_the_network(name: str) -> None:
    network = made(name)
    view, batch = chain(network), batch_of(network)
    with torch.no_grad():
        torch.testing.assert_close(view.run(network.module, batch), network(batch), rtol=1e-5, atol=1e-6)
    assert Chain.of(**view.record) == view and len(view.blocks) >= 3
    assert view.under("a.b").under("c").blocks[0] == f"c.a.b.{view.blocks[0]}"


def test_the_stages_are_those_of_the_paper() -> None:
    assert [len(stage) for stage in chain(made("cifar", 1)).stages] == [2, 2, 2]
    assert [len(stage) for stage in chain(made("torchvision/resnet18")).stages] == [2, 2, 2, 2]
    assert [len(stage) for stage in chain(made("timm/test_vit")).stages] == [6]


@pytest.mark.parametrize("name", [*IMAGES, "bert"])
def test_stitched_to_itself_by_the_identity_it_is_itself(name: str) -> None:
    network, batch = made(name), batch_of(made(name))
    blocks = len(chain(network).blocks)
    for until in {1, blocks // 2, blocks - 1}:
        joined = stitch(network, until, network, until, identity(*width_after(network, until)))
        with torch.no_grad():
            torch.testing.assert_close(joined(batch), network(batch), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("name", ["timm/test_resnet", "timm/test_vit", "bert"])
def test_only_what_is_needed_is_kept(name: str) -> None:
    """Sizes add up: the front, the rest and the stitch, each tensor of the two networks once."""
    network = made(name)
    until, blocks = 2, chain(network).blocks
    joined = stitch(network, until, network, until, identity(*width_after(network, until)))
    mine = {key.removeprefix("front.").removeprefix("back.") for key in joined.module.state_dict() if not key.startswith("stitch.")}
    pooler = {key for key in network.module.state_dict() if ".pooler." in key}  # computed by BERT and used by nothing
    assert mine == set(network.module.state_dict()) - pooler
    assert not any(key.startswith(f"back.{blocks[until - 1]}.") or key.startswith(f"front.{blocks[until]}.") for key in joined.module.state_dict())


def pair(name: str) -> tuple[Network, int, Network, int, Stitch]:
    """Two different networks and a random layer between them."""
    if name == "vit":
        front, back = made("timm/test_vit"), made("timm/test_vit2")
        until, since = 2, 3
    elif name == "bert":
        torch.manual_seed(1)
        front, back = made("bert"), bert(4, width=24)
        until, since = 1, 2
    else:
        front, back = made("cifar"), made("cifar", 1)
        until, since = 2, 3
    (mine, places), (theirs, _) = width_after(front, until), width_after(back, since)
    return front, until, back, since, Stitch(mine, theirs, places)


def test_two_networks_in_one_survive_the_way_to_another_process(tmp_path: Path) -> None:
    for name in ("cifar", "vit", "bert"):
        front, until, back, since, layer = pair(name)
        before = front.fingerprint, back.fingerprint
        joined = stitch(front, until, back, since, layer)
        batch = batch_of(joined)
        ahead, behind = chain(front), chain(back)
        with torch.no_grad():  # by hand
            state = ahead.stem(front.module, batch)
            for path in ahead.blocks[:until]:
                state = ahead.block(front.module, path, state)
            state = state._replace(hidden=layer(state.hidden))
            for path in behind.blocks[since:]:
                state = behind.block(back.module, path, state)
            expected = behind.head(back.module, state)
            output = joined(batch)
        assert torch.equal(output, expected) and (front.fingerprint, back.fingerprint) == before
        joined.save(tmp_path / name)
        torch.save((batch, output), tmp_path / f"{name}.pt")
    code = (
        "import sys, torch, wellread\n"
        "for name in ('cifar', 'vit', 'bert'):\n"
        "    network = wellread.load(f'{sys.argv[1]}/{name}')\n"
        "    batch, output = torch.load(f'{sys.argv[1]}/{name}.pt', weights_only=True)\n"
        "    assert torch.equal(network(batch), output), name"
    )
    done = subprocess.run([sys.executable, "-c", code, tmp_path], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr


@pytest.mark.parametrize("name", ["cifar", "vit"])
def test_stitched_networks_are_exported(name: str, tmp_path: Path) -> None:
    import onnxruntime

    joined = stitch(*pair(name))
    batch = batch_of(joined)
    with torch.no_grad():
        expected = joined(batch)
        program = torch.export.export(joined.module, (batch,))
        torch.testing.assert_close(program.module()(batch), expected, rtol=1e-4, atol=1e-5)
    torch.onnx.export(program, dynamo=True).save(str(tmp_path / "joined.onnx"))
    session = onnxruntime.InferenceSession(str(tmp_path / "joined.onnx"), providers=["CPUExecutionProvider"])
    found = session.run(None, {session.get_inputs()[0].name: batch.numpy()})[0]
    np.testing.assert_allclose(found, expected.numpy(), rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("name", ["cifar", "vit", "bert"])
def test_a_stitched_network_is_a_chain_and_is_stitched_again(name: str, tmp_path: Path) -> None:
    front, until, back, since, layer = pair(name)
    joined = stitch(front, until, back, since, layer)
    view = chain(joined)
    assert "stitch" in view.blocks and len(view.blocks) == until + 1 + len(chain(back).blocks) - since
    twice = stitch(joined, until + 1, back, since, identity(layer.map.weight.shape[0], name == "cifar"))
    batch = batch_of(joined)
    with torch.no_grad():
        torch.testing.assert_close(twice(batch), joined(batch), rtol=1e-4, atol=1e-5)
    twice.save(tmp_path / "twice")
    again = wellread.load(tmp_path / "twice")
    with torch.no_grad():
        assert torch.equal(again(batch), twice(batch))
    if name == "vit":
        assert [step["method"] for step in joined.lineage] == ["load", "load"]


def test_a_stitch_within_a_stage_keeps_the_stages() -> None:
    front, _, back, _, _ = pair("cifar")
    assert [len(stage) for stage in chain(stitch(front, 2, back, 3, Stitch(32, 32, True))).stages] == [1, 3, 2]
    assert [len(stage) for stage in chain(stitch(front, 1, back, 1, Stitch(16, 16, True))).stages] == [3, 2, 2]
    assert [len(stage) for stage in chain(stitch(front, 1, back, 2, Stitch(16, 16, True))).stages] == [2, 2, 2]


def test_a_new_head_fits_on_a_stitched_network() -> None:
    joined = stitch(*pair("cifar")).with_head(["a", "b"])
    assert joined(batch_of(joined)).shape == (3, 2) and chain(joined).head_steps[-1] == ("back.linear",)


class Named(nn.Module):
    """No family's."""

    def __init__(self) -> None:
        super().__init__()
        self.into, self.first, self.second, self.out = nn.Flatten(), nn.Linear(12, 12), nn.Linear(12, 12), nn.Linear(12, 4)

    def forward(self, x: Tensor) -> Tensor:
        return self.out(self.second(self.first(self.into(x))))


def test_unknown_networks_are_named_by_the_user() -> None:
    network = Network(Named(), ImageInput((2, 2)))
    with pytest.raises(BadInput, match="blocks of a Named are not known: name them with chain.*into, first"):
        chain(network)
    view = chain(network, stem=["into"], blocks=["first", "second"], head=["out"])
    assert view.stages == (("first", "second"),)
    assert chain(network, stem=["into"], blocks=[["first"], ["second"]], head=["out"]).stages == (("first",), ("second",))
    joined = stitch(network, 1, network, 1, identity(12, False), chains=(view, view))
    x = torch.randn(2, 3, 2, 2)
    torch.testing.assert_close(joined(x), network(x))
    for wrong, said in (
        ({"stem": ["into"], "blocks": ["first"], "head": ["out"]}, "do not compute what it computes"),
        ({"stem": ["into"], "blocks": ["out", "second"], "head": ["first"]}, "do not run one after the other: mat1"),
        ({"stem": ["into"], "blocks": ["frist", "second"], "head": ["out"]}, "no layer 'frist': did you mean first"),
        ({"stem": ["into"], "head": ["out"]}, "give blocks as well"),
        ({"stem": ["into"], "blocks": [], "head": ["out"]}, "not known"),
    ):
        with pytest.raises(BadInput, match=said):
            chain(network, **wrong)


def test_a_network_that_is_no_chain_is_refused() -> None:
    network = made("cifar")
    forward = type(network.module).forward
    network.module.forward = lambda x: forward(network.module, x) + x.mean()
    with pytest.raises(BadInput, match="do not compute what it computes"):
        chain(network)


def test_a_known_family_after_edits() -> None:
    network = made("cifar").edited({"edit": "factorise", "layer": "layer2.0.conv2", "rank": 5}).with_head(["a", "b"])
    joined = stitch(made("cifar"), 1, network, 1, identity(16, True))
    assert joined(batch_of(joined)).shape == (3, 2) and "back.layer2.0.conv2.1.weight" in joined.module.state_dict()


def test_networks_that_do_not_fit_together_are_refused() -> None:
    small, other = made("cifar"), made("cifar", 1)
    layer = identity(16, True)
    for change, said in (
        ({"size": (16, 16)}, r"size \(32, 32\) and \(16, 16\): give both one input"),
        ({"mean": (0.5, 0.5, 0.5)}, "mean"),
        ({"std": (0.5, 0.5, 0.5)}, "std"),
    ):
        with pytest.raises(BadInput, match=said):
            stitch(small, 1, other.edited(input=other.input.changed(**change)), 1, layer)
    with pytest.raises(BadInput, match="takes pictures and the other text"):
        stitch(small, 1, bert(2), 1, layer)
    assert "different tokenizers" in str(fed_differently(bert(2), bert(2, words=("other", "words"))))
    assert fed_differently(bert(2), bert(3)) is None
    for until, since in ((0, 1), (4, 1), (1, 6), (1, -1)):
        with pytest.raises(BadInput, match=f"cannot stitch after {until} of 3 blocks to block {since} of 6"):
            stitch(small, until, other, since, layer)
    with pytest.raises(BadInput, match="does not fit between the two"):
        stitch(small, 1, other, 1, identity(32, True))
    loose = Network(other.module, other.input, "linear")
    loose.architecture = None
    with pytest.raises(BadInput, match="cannot be built by another process"):
        stitch(small, 1, loose, 1, layer)


def test_what_is_not_named_is_taken_out() -> None:
    module = nn.Sequential(nn.Sequential(nn.Linear(1, 1), nn.Linear(1, 1)), nn.BatchNorm1d(1), nn.Linear(1, 1))
    assert set(keep_only(module, ["0.1", "1"]).state_dict()) == {"0.1.weight", "0.1.bias", *(f"1.{k}" for k in nn.BatchNorm1d(1).state_dict())}


def test_wrap_builds_it_from_the_record() -> None:
    """The edit alone gives the shape; `stitch` fills in the other network's weights."""
    front, until, back, since, layer = pair("cifar")
    joined = stitch(front, until, back, since, layer)
    record = joined.edits[-1]
    assert record["edit"] == "wrap" and record["part"] == "wellread.chain:Stitched"
    built = front.edited(record)
    assert isinstance(built.module, Stitched) and {k: v.shape for k, v in built.module.state_dict().items()} == {
        k: v.shape for k, v in joined.module.state_dict().items()
    }


def test_families_that_are_no_chains_are_not_recognised() -> None:
    for name in ("torchvision/squeezenet1_1", "torchvision/densenet121"):
        assert recognise(wellread.load(name, pretrained=False).module) is None
