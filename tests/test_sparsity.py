"""Masks in training, operations on paper, language-model batches."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from datasets import Dataset
from torch import nn
from torch.utils.flop_counter import FlopCounterMode

import wellread
from wellread import Network
from wellread import sparsity as sp
from wellread.errors import BadInput
from wellread.structure import layer_of, masks
from wellread.train import fit

TEXTS = Dataset.from_dict({"text": ["the sun is red and far away " * 4, "the moon is blue, née 月 " * 4] * 6})


@pytest.fixture(scope="module")
def gpt() -> Network:
    return sp.language_model(16, 2, context=32)


def batches(network: Network) -> Any:
    return sp.stream_batches(network, TEXTS, length=32, batch_size=8)


# --- masks


def test_the_targets_are_the_linear_layers_of_the_blocks(gpt: Network) -> None:
    assert len(sp.linear_layers(gpt)) == 2 * 4  # attention in and out, feed-forward in and out; not the tied head
    assert sum(weight.numel() for weight in sp.linear_layers(gpt).values()) == 12 * 2 * 16**2
    llama = sp.language_model(16, 2, context=32, kind="llama")
    assert len(sp.linear_layers(llama)) == 2 * 7 and sp.linear_layers(llama, ["model.model.layers.1"]).keys() < sp.linear_layers(llama).keys()
    vit = wellread.load("timm/test_vit", pretrained=False)
    assert vit.head not in sp.linear_layers(vit) and len(sp.linear_layers(vit)) > 4


def test_counts_are_exact_seeded_and_differ_between_layers(gpt: Network) -> None:
    thin, again, other = sp.sparse(gpt, 0.7), sp.sparse(gpt, 0.7), sp.sparse(gpt, 0.7, seed=1)
    for path, mask in masks(thin.module).items():
        assert int((~mask.keep).sum()) == round(0.7 * mask.keep.numel())
        assert torch.equal(mask.keep, masks(again.module)[path].keep) and not torch.equal(mask.keep, masks(other.module)[path].keep)
    keeps = [mask.keep for mask in masks(thin.module).values()]
    assert not torch.equal(keeps[0], keeps[4])  # the same layer of another block
    assert not masks(gpt.module)
    assert sp.active(thin) == sum(int(keep.sum()) for keep in keeps) < sp.active(gpt)


def test_magnitude_spares_the_largest_and_rescaling_keeps_the_variance(gpt: Network) -> None:
    thin = sp.sparse(gpt, 0.5, criterion="magnitude")
    for path, weight in sp.linear_layers(gpt).items():
        keep = masks(thin.module)[path].keep
        assert weight.detach().abs()[~keep].max() <= weight.detach().abs()[keep].min()
    scaled: Any = layer_of(sp.sparse(gpt, 0.75, rescale=True).module, "model.transformer.h.0.mlp.c_fc")
    plain: Any = layer_of(gpt.module, "model.transformer.h.0.mlp.c_fc")
    assert torch.allclose(scaled.weight[scaled.weight != 0], 2 * plain.weight[scaled.weight != 0])


def test_a_sparse_forward_is_that_of_csr_weights() -> None:
    torch.manual_seed(0)
    network = Network(nn.Sequential(nn.Linear(20, 30), nn.GELU(), nn.Linear(30, 4)))
    thin = sp.sparse(network, 0.6)
    layer: Any = layer_of(thin.module, "0")
    x = torch.randn(7, 20)
    theirs = (layer.weight.detach().to_sparse_csr() @ x.T).T + layer.bias
    assert torch.allclose(layer(x), theirs, atol=1e-5)


def test_dead_weights_have_no_gradient_and_no_moments_and_wake_after_densify(gpt: Network) -> None:
    thin = sp.sparse(gpt, 0.75)
    kept: list[torch.optim.AdamW] = []

    def adamw(groups: Any, lr: float) -> torch.optim.Optimizer:
        kept.append(torch.optim.AdamW(groups, lr=lr, weight_decay=0.1))
        return kept[0]

    fit(thin.module, batches(thin), sp.language_step, epochs=2, learning_rate=1e-2, optimizer=adamw, clip=1.0)
    for path, mask in masks(thin.module).items():
        layer: Any = layer_of(thin.module, path)
        state = kept[0].state[layer.parametrizations["weight"].original]
        assert not state["exp_avg"][~mask.keep].any() and not state["exp_avg_sq"][~mask.keep].any()
        assert state["exp_avg"][mask.keep].any() and not layer.weight[~mask.keep].any()
        assert int((~mask.keep).sum()) == round(0.75 * mask.keep.numel())
    full = sp.dense(thin)
    ids = next(batches(thin).epoch(0))["input_ids"]
    assert torch.equal(thin({"input_ids": ids}), full({"input_ids": ids})) and not masks(full.module)
    path, mask = next(iter(masks(thin.module).items()))
    before: Any = layer_of(full.module, path)
    start = before.weight.detach().clone()
    assert not start[~mask.keep].any()
    fit(full.module, batches(full), sp.language_step, epochs=1, learning_rate=1e-2)
    after: Any = layer_of(full.module, path)
    assert (after.weight[~mask.keep] != 0).all()
    with pytest.warns(UserWarning, match="no masks"):
        sp.dense(full)


def test_no_sparsity_trains_bit_for_bit_as_dense(gpt: Network) -> None:
    plain, thin = gpt.copy(), sp.sparse(gpt, 0.0)
    losses = [fit(each.module, batches(each), sp.language_step, epochs=1, learning_rate=1e-2, weight_decay=0.1).loss for each in (plain, thin)]
    assert losses[0] == losses[1]
    theirs = sp.dense(thin).module.state_dict()
    assert all(torch.equal(tensor, theirs[name]) for name, tensor in plain.module.state_dict().items())


@pytest.mark.parametrize("across", [False, True])
def test_masks_only_grow_and_reach_the_count(gpt: Network, across: bool) -> None:
    thin = sp.sparse(gpt, 0.0)
    size = sp.active(gpt)
    for sparsity in (0.2, 0.5, 0.9):
        before = {path: mask.keep.clone() for path, mask in masks(thin.module).items()}
        with torch.no_grad():  # also a dead weight that would be the largest stays dead
            for weight in sp.linear_layers(thin).values():
                weight.add_(torch.randn(weight.shape))
        sp.prune_to(thin.module, sparsity, across=across)
        for path, mask in masks(thin.module).items():
            assert not (mask.keep & ~before[path]).any() and mask.keep.any()
            assert across or int((~mask.keep).sum()) == round(sparsity * mask.keep.numel())
        assert size - sp.active(thin) == pytest.approx(sparsity * size, abs=8)


# --- operations


def test_the_formula_agrees_with_the_flop_counter(gpt: Network) -> None:
    ids = torch.zeros(3, 32, dtype=torch.int64)
    eager = gpt.copy()
    eager.module.model.set_attn_implementation("eager")  # type: ignore[union-attr,operator]
    with FlopCounterMode(display=False) as counter, torch.no_grad():
        eager({"input_ids": ids})
    assert counter.get_total_flops() == sp.training_flops(gpt, 32) / 3 * ids.numel()
    assert sp.training_flops(gpt, 32) - sp.training_flops(sp.sparse(gpt, 0.5), 32) == 6 * 0.5 * 12 * 2 * 16**2


def test_layers_with_less_weights_than_outputs_are_named(gpt: Network) -> None:
    assert not sp.starved(sp.sparse(gpt, 0.75))
    wide = [path for path in sp.linear_layers(gpt) if not path.endswith("mlp.c_proj")]  # with 16 inputs; that one has 64 for its 16 outputs
    assert sp.starved(sp.sparse(gpt, 0.95)) == wide


# --- batches


def test_bytes_come_back_and_windows_cover_the_stream(gpt: Network) -> None:
    tokenizer = sp.byte_tokenizer()
    assert len(tokenizer) == 257
    text = TEXTS["text"][1]
    assert len(tokenizer(text)["input_ids"]) == len(text.encode()) and tokenizer.decode(tokenizer(text)["input_ids"]) == text
    one = sp.stream_batches(gpt, TEXTS, length=32, batch_size=1000, shuffle=False)
    ids = next(one.epoch(0))["input_ids"]
    expected = b"".join(text.encode() + b"\0" for text in TEXTS["text"])
    assert ids.shape == (len(expected) // 32, 32) and int((ids == 256).sum()) == 11  # the last one is beyond the last window


def test_prompt_and_padding_are_not_scored(gpt: Network) -> None:
    data = Dataset.from_dict({"prompt": ["ab>", "a>"], "text": ["cd", "cdefg"]})
    batch = next(sp.example_batches(gpt, data, length=32, batch_size=2, shuffle=False).epoch(0))
    assert batch["input_ids"].shape == (2, 8)
    assert batch["scored"].tolist() == [[False] * 3 + [True] * 3 + [False] * 2, [False] * 2 + [True] * 6]
    logits = torch.zeros(2, 8, 257)
    assert float(sp.next_token_loss(logits, batch["input_ids"], batch["scored"])) == pytest.approx(math.log(257))
    logits[0, 5:] = 9.0 * torch.randn(3, 257)  # what is predicted after the end does not count
    assert float(sp.next_token_loss(logits, batch["input_ids"], batch["scored"])) == pytest.approx(math.log(257))
    whole = sp.language_loss(gpt, sp.example_batches(gpt, data, length=32, batch_size=2, shuffle=False))
    single = sp.language_loss(gpt, sp.example_batches(gpt, data, length=32, batch_size=1, shuffle=False))
    assert whole == pytest.approx(single, rel=1e-5)


# --- bad input


def test_bad_input(gpt: Network) -> None:
    for sparsity in (-0.1, 1.0):
        with pytest.raises(BadInput, match="below 1"):
            sp.sparse(gpt, sparsity)
    with pytest.raises(BadInput, match="has a mask already"):
        sp.sparse(sp.sparse(gpt, 0.5), 0.5)
    with pytest.raises(BadInput, match="no linear layer is called 'mpl'"):
        sp.sparse(gpt, 0.5, layers=["mpl"])
    with pytest.raises(BadInput, match="no linear layer that could"):
        sp.sparse(Network(nn.Sequential(nn.Conv2d(3, 4, 3), nn.Flatten(), nn.Linear(4, 2))), 0.5)
    shared = nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 4), nn.Linear(4, 2))
    shared[1].weight = shared[0].weight
    with pytest.raises(BadInput, match="share one weight"):
        sp.sparse(Network(shared), 0.5)
    with pytest.raises(BadInput, match="a language model is needed"):
        sp.stream_batches(Network(nn.Linear(2, 2)), TEXTS, length=8)
    with pytest.raises(BadInput, match="less than one window"):
        sp.stream_batches(gpt, TEXTS, length=10**6)
    with pytest.raises(BadInput, match="raise context"):
        sp.example_batches(gpt, Dataset.from_dict({"prompt": ["x" * 40], "text": ["y"]}), length=32)
    with pytest.raises(BadInput, match="does not say"):
        sp.training_flops(Network(nn.Linear(2, 2)), 8)
