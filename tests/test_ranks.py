"""Ranks: matrices and their truncation, which layers can be cut, what that costs, and ranks from an energy or a budget."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn

import wellread
from wellread import ImageInput, Network, meter, ranks
from wellread.data import as_data
from wellread.errors import BadInput
from wellread.ranks import Layer, energy_rank, find_layers, folded, limit_for, matrix, ranks_for_budget, ranks_for_energy, truncated, value_rank

SIZE = 12


class Small(nn.Module):
    """Convolutions of every kind, and what cannot be cut."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Conv2d(3, 8, 3, padding=1)
        self.wide = nn.Conv2d(8, 12, (3, 5), stride=2, padding=(1, 0), bias=False)
        self.point = nn.Conv2d(12, 10, 1)
        self.groups = nn.Conv2d(10, 10, 3, groups=5)
        self.same = nn.Conv2d(10, 10, 3, padding="same")
        self.first, self.second = nn.Linear(10, 10), nn.Linear(10, 10)
        self.second.weight = self.first.weight
        self.read = nn.Linear(10, 16)
        self.idle = nn.Linear(4, 4)
        self.head = nn.Linear(16, 2)

    def forward(self, x: Tensor) -> Tensor:
        x = self.same(self.groups(self.point(self.wide(self.stem(x)).relu()))).mean((2, 3))
        return self.head(self.read(self.second(self.first(x))).to(self.read.weight.dtype))


class Called(nn.Module):
    """A layer of its own that is used twice, on maps of two sizes."""

    def __init__(self) -> None:
        super().__init__()
        self.stem, self.conv, self.head = nn.Conv2d(3, 6, 1), nn.Conv2d(6, 6, 3, padding=2, dilation=2), nn.Linear(6, 2)

    def forward(self, x: Tensor) -> Tensor:
        x = self.stem(x)
        return self.head((self.conv(x).mean((2, 3), keepdim=True) + self.conv(x[:, :, ::2, ::2])).mean((2, 3)))


@pytest.fixture
def small() -> Network:
    torch.manual_seed(0)
    return Network(Small(), ImageInput((SIZE, SIZE)), "head", ("a", "b"))


SHAPES = [(6, 4, 3, 3), (4, 9, 3, 5), (20, 3, 1, 3), (7, 5, 1, 1), (12, 30), (30, 12)]


@pytest.mark.parametrize("scheme", ["channel", "spatial"])
@pytest.mark.parametrize("shape", SHAPES)
def test_truncation_is_the_best_there_is(shape: tuple[int, ...], scheme: ranks.Scheme) -> None:
    scheme = scheme if len(shape) == 4 else "channel"
    torch.manual_seed(0)
    weight = torch.randn(shape)
    flat = matrix(weight, scheme)
    assert torch.equal(folded(flat, shape, scheme), weight)
    u, s, vt = torch.linalg.svd(flat.double(), full_matrices=False)
    [spectrum] = ranks.spectra({"": flat}).values()
    torch.testing.assert_close(spectrum.values, s, rtol=1e-9, atol=1e-9)
    for rank in (1, len(s) // 2 + 1, len(s)):
        best, sign = truncated(flat, spectrum, rank)
        error = torch.linalg.matrix_norm(flat.double() - best.double())
        torch.testing.assert_close(error, (s[rank:] ** 2).sum().sqrt(), rtol=1e-4, atol=1e-5)
        torch.testing.assert_close(sign.double(), u[:, :rank] @ vt[:rank], rtol=1e-4, atol=1e-5)
        again, _ = truncated(best, ranks.spectra({"": best})[""], rank)
        torch.testing.assert_close(again, best, rtol=1e-5, atol=1e-5)


def test_the_subgradient_is_the_derivative_of_the_nuclear_norm() -> None:
    torch.manual_seed(0)
    flat, direction = torch.randn(6, 9, dtype=torch.float64), torch.randn(6, 9, dtype=torch.float64)
    _, sign = truncated(flat, ranks.spectra({"": flat})[""], 6)
    norm = lambda amount: float(torch.linalg.matrix_norm(flat + amount * direction, "nuc"))  # noqa: E731
    assert (norm(1e-5) - norm(-1e-5)) / 2e-5 == pytest.approx(float((sign * direction).sum()), rel=1e-7)


def test_a_direction_that_is_gone_has_no_subgradient() -> None:
    flat = torch.outer(torch.arange(1.0, 5), torch.arange(1.0, 7))
    _, sign = truncated(flat, ranks.spectra({"": flat})[""], 3)
    assert float(torch.linalg.matrix_norm(sign, 2)) == pytest.approx(1, abs=1e-5)
    assert float(torch.linalg.matrix_norm(sign)) == pytest.approx(1, abs=1e-5)  # one direction, not three


def test_rank_rules() -> None:
    values = torch.tensor([3.0, 2.0, 1.0, 0.5])  # squares 9, 4, 1, 0.25: shares 0.632, 0.912, 0.982, 1
    assert [energy_rank(values, e) for e in (0.1, 9 / 14.25, 0.64, 0.92, 0.99, 1.0)] == [1, 1, 2, 3, 4, 4]
    assert energy_rank(torch.zeros(3), 0.9) == 1
    assert [value_rank(values, t) for t in (9.0, 2.0, 0.6, 0.1)] == [1, 2, 3, 4]


@pytest.mark.parametrize("scheme", ["channel", "spatial"])
def test_counted_costs_are_what_the_cut_network_costs(small: Network, scheme: ranks.Scheme) -> None:
    for network in (small, Network(Called(), ImageInput((SIZE, SIZE)), "head")):
        layers, _ = find_layers(network, scheme=scheme)
        assert layers
        for layer in layers:
            cut = network.edited(layer.edit(2))
            assert meter.macs(cut) - meter.macs(network) == layer.cost(2) - layer.cost(None)
            assert meter.parameters(cut) - meter.parameters(network) == layer.cost(2, "parameters") - layer.cost(None, "parameters")
            with pytest.raises(BadInput, match="rank"):
                network.edited(layer.edit(layer.highest + 1))
            x = torch.randn(2, 3, SIZE, SIZE)
            torch.testing.assert_close(network.edited(layer.edit(layer.highest))(x), network(x), rtol=1e-4, atol=1e-5)


def test_what_cannot_be_cut_is_named_with_the_reason(small: Network) -> None:
    layers, left = find_layers(small)
    assert [layer.path for layer in layers] == ["wide", "point"]
    assert left == {
        "stem": "reads the picture",
        "groups": "is in 5 groups",
        "same": "has no numeric padding",
        "first": "shares its weight with another layer",
        "second": "shares its weight with another layer",
        "read": "its weight is read by another part of the network",
        "idle": "does not run as a layer of its own",
        "head": "the head",
    }
    assert [layer.path for layer in find_layers(small, which="kxk")[0]] == ["wide"]
    assert find_layers(small, which="linear")[0] == []
    assert find_layers(small, leave_out=["wide"])[1]["wide"] == "left out by name (wide)"
    with pytest.raises(BadInput, match=r"'wid', and no layer is called so: did you mean wide"):
        find_layers(small, leave_out=["wid"])
    assert ranks.is_named("blocks.10.attn.proj", "attn.proj") and not ranks.is_named("blocks.10.attn", "blocks.1")
    assert find_layers(small, smallest=11)[1]["point"] == "has 10 outputs"


@pytest.mark.parametrize("name", ["timm/test_vit", "timm/test_efficientnet", "timm/test_convnext"])
def test_layers_of_known_families_can_all_be_cut(name: str) -> None:
    network = wellread.load(name, pretrained=False)
    layers, left = find_layers(network)
    assert network.head not in [layer.path for layer in layers] and left[network.head or ""] == "the head"
    x = torch.randn(1, 3, *network.input.size)  # type: ignore[union-attr]
    whole = ranks.cut(network, layers, {layer.path: layer.highest for layer in layers})
    torch.testing.assert_close(whole(x), network(x), rtol=1e-4, atol=1e-4)
    assert len(whole.edits) == len(layers) >= 4


def test_parts_that_read_weights_themselves_are_left_alone() -> None:
    class Attention(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.embed = nn.Conv2d(3, 16, 4, 4)
            self.encoder = nn.TransformerEncoder(nn.TransformerEncoderLayer(16, 2, 32, batch_first=True), 1)
            self.own, self.head = nn.Linear(16, 16), nn.Linear(16, 2)

        def forward(self, x: Tensor) -> Tensor:
            return self.head(self.own(self.encoder(self.embed(x).flatten(2).mT).mean(1)))

    network = Network(Attention(), ImageInput((SIZE, SIZE)), "head")
    layers, left = find_layers(network)
    assert [layer.path for layer in layers] == ["own"]
    assert left["encoder.layers.0.self_attn.out_proj"] == "is a NonDynamicallyQuantizableLinear"
    assert "encoder.layers.0.linear1" in left


# --- budgets


def spectra_of(network: Network, layers: list[Layer]) -> dict[str, Tensor]:
    flat = {layer.path: matrix(network.module.get_submodule(layer.path).weight, layer.scheme) for layer in layers}
    return {path: each.values for path, each in ranks.spectra(flat).items()}


@pytest.mark.parametrize("measure", ["macs", "parameters"])
@pytest.mark.parametrize("keep", [0.45, 0.6, 0.8])
def test_a_budget_is_met_by_the_highest_energy_that_meets_it(measure: ranks.Measure, keep: float) -> None:
    torch.manual_seed(0)
    network = wellread.load("timm/test_resnet", pretrained=False)
    layers, _ = find_layers(network, which="kxk")
    values = spectra_of(network, layers)
    limit = limit_for(network, layers, keep, measure)
    chosen, energy = ranks_for_budget(layers, values, limit, measure=measure)
    assert chosen == ranks_for_energy(layers, values, energy, measure=measure)
    cost = {"macs": meter.macs, "parameters": meter.parameters}[measure]
    assert cost(ranks.cut(network, layers, chosen)) <= keep * cost(network)
    above = ranks_for_energy(layers, values, min(1.0, energy + 1e-4), measure=measure)
    while above == chosen:
        energy += 1e-3
        above = ranks_for_energy(layers, values, energy, measure=measure)
    assert cost(ranks.cut(network, layers, above)) > keep * cost(network)
    for layer in layers:
        if layer.path in chosen:
            assert layer.cost(chosen[layer.path], measure) < layer.cost(None, measure)


def test_a_budget_that_cannot_be_met_says_what_can(small: Network) -> None:
    layers, _ = find_layers(small)
    with pytest.raises(BadInput, match=r"the 2 layers that can be cut at rank 1 leave (0\.\d+)") as refused:
        limit_for(small, layers, 0.05, "parameters")
    least = float(str(refused.value).split("leave ")[1].split(";")[0])
    limit = limit_for(small, layers, least, "parameters")
    assert set(ranks_for_budget(layers, spectra_of(small, layers), limit, measure="parameters")[0].values()) == {1}
    with pytest.raises(BadInput, match="at most 1"):
        ranks_for_energy(layers, spectra_of(small, layers), 1.5)
    for wrong in (0.0, 1.0, 2.0):
        with pytest.raises(BadInput, match="between 0 and 1"):
            limit_for(small, layers, wrong, "macs")


# --- whitening


def test_whitened_is_best_on_the_inputs_and_plain_when_they_are_white() -> None:
    torch.manual_seed(0)
    x = torch.randn(400, 9, dtype=torch.float64) @ torch.randn(9, 9, dtype=torch.float64)
    weight = torch.randn(7, 9, dtype=torch.float64)
    best = ranks.whitened(weight, 3, x.T @ x / len(x))
    plain, _ = truncated(weight, ranks.spectra({"": weight})[""], 3)
    outputs = x @ weight.T
    s = torch.linalg.svdvals(outputs)  # no network of rank 3 has less error on these outputs
    assert torch.linalg.matrix_rank(best) == 3
    error = lambda w: float(torch.linalg.matrix_norm(outputs - x @ w.T))  # noqa: E731
    assert error(best) == pytest.approx(float((s[3:] ** 2).sum().sqrt()), rel=1e-6)
    assert error(best) < error(plain)
    torch.testing.assert_close(ranks.whitened(weight, 3, torch.eye(9, dtype=torch.float64)), plain)


def test_second_moments_are_those_of_the_inputs() -> None:
    torch.manual_seed(0)
    network = wellread.load("timm/test_resnet", pretrained=False)
    network.input = network.input.changed(size=(32, 32))  # type: ignore[union-attr]
    layers = [layer for layer in find_layers(network)[0] if layer.shape[-1] == 3][:1]
    data = as_data(list(torch.randint(0, 255, (5, 3, 32, 32), dtype=torch.uint8)))
    found = ranks.second_moments(network, data, layers, batch_size=2)
    [(path, moment)] = found.items()
    layer = network.module.get_submodule(path)
    with torch.no_grad(), wellread.features.capture(network.module, [path], inputs=True) as caught:
        network(torch.cat([batch["inputs"] for batch in wellread.batches.network_batches(network, data, label=False).epoch(0)]))
    out = layer(caught[path])
    assert float(out.detach().square().sum(1).mean()) == pytest.approx(
        float((matrix(layer.weight.detach(), "channel").double() @ moment * matrix(layer.weight.detach(), "channel")).sum()), rel=1e-4
    )


def test_whole_layer_and_parts_are_timed(small: Network) -> None:
    layers, _ = find_layers(small)
    found = ranks.milliseconds(small, layers, {"wide": 2}, seconds=0.001)
    assert list(found) == ["wide"] and all(0 < time < 100 for time in found["wide"])
    assert isinstance(small.module.get_submodule("wide"), nn.Conv2d)


def test_flags_survive_the_cut_and_lost_hooks_are_warned_of(small: Network) -> None:
    layers, _ = find_layers(small)
    small.module.get_submodule("wide").requires_grad_(False)
    cut = ranks.cut(small, layers, {"wide": 2})
    assert [parameter.requires_grad for parameter in cut.module.get_submodule("wide").parameters()] == [False, False]
    small.module.get_submodule("wide").register_forward_hook(lambda *_: None)
    with pytest.warns(UserWarning, match="'wide' had hooks"):
        ranks.cut(small, layers, {"wide": 2})
