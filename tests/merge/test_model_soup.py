"""Model soups: the average itself, what may not be averaged, the three recipes, and the whole on a CNN, a ViT and a transformer."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import pytest
import torch
from datasets import Dataset
from PIL import Image
from torch import Tensor, nn

import wellread
from wellread import ImageInput, Network, TextInput, families, runtime
from wellread.averages import fill, interpolate, running_mean, same_structure
from wellread.cli import main
from wellread.data import as_data, subset
from wellread.errors import BadInput
from wellread.evaluate import predict, score
from wellread.merge import model_soup
from wellread.merge.model_soup import Mixture, collapsed, greedy, learned, midpoints
from wellread.network import WEIGHTS, Networks
from wellread.norm import reestimate_norm

COLORS = ("blue", "green", "red")


class Turned(nn.Module):
    """tanh(W x) V: with both matrices negated it computes the same, and halfway to that it computes nothing."""

    def __init__(self, classes: int = 3) -> None:
        super().__init__()
        self.into = nn.Linear(3, 8, bias=False)
        self.out = nn.Linear(8, classes, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        return self.out(self.into(x.mean((2, 3))).tanh())


class Tied(nn.Module):
    """Embedding and output share a matrix; a mask of whole numbers and a counter lie beside it."""

    def __init__(self) -> None:
        super().__init__()
        self.embed = nn.Linear(4, 4, bias=False)
        self.head = nn.Linear(4, 4, bias=False)
        self.head.weight = self.embed.weight
        self.register_buffer("positions", torch.arange(4))
        self.register_buffer("num_batches_tracked", torch.tensor(0))


@pytest.fixture(scope="module")
def colors() -> Dataset:
    """48 pictures of noise with a tint."""
    random = np.random.default_rng(0)
    pairs = []
    for row in range(48):
        picture = random.integers(0, 160, (16, 16, 3))
        picture[..., 2 - row % 3] += 40
        pairs.append((Image.fromarray(picture.astype(np.uint8)), COLORS[row % 3]))
    return as_data(pairs)


@pytest.fixture(scope="module", params=["timm/test_resnet", "timm/test_vit"])
def family(request: pytest.FixtureRequest) -> list[Network]:
    """A CNN with batch norm, or a ViT; three fine-tunings that differ a little."""
    size = {"img_size": 32} if "vit" in request.param else {}
    torch.manual_seed(0)
    start = wellread.load(request.param, pretrained=False, **size).with_head(COLORS)
    return near(start.edited(input=start.input.changed(size=(32, 32))), 3)


@pytest.fixture(scope="module")
def turned() -> Network:
    """Tells the colours apart, by construction."""
    network = Network(Turned(), ImageInput((16, 16), mean=(0.35,) * 3, std=(0.05,) * 3), labels=COLORS)
    with torch.no_grad():
        network.module.into.weight.copy_(torch.eye(3)[[2, 1, 0]].repeat(3, 1)[:8])
        network.module.out.weight.copy_(torch.eye(3).repeat(1, 3)[:, :8])
    return network


def near(network: Network, count: int, distance: float = 0.01) -> list[Network]:
    found = []
    for number in range(count):
        other = network.copy()
        generator = torch.Generator().manual_seed(number)
        with torch.no_grad():
            for parameter in other.module.parameters():
                parameter += distance * torch.randn(parameter.shape, generator=generator)
            for name, buffer in other.module.named_buffers():
                if name.endswith("running_var"):
                    buffer += torch.rand(buffer.shape, generator=generator)
        found.append(other)
    return found


def average(networks: Sequence[Network], members: Sequence[int] | None = None) -> nn.Module:
    soup = networks[0].copy().module
    fill(soup, Networks(networks), range(len(networks)) if members is None else members)
    return soup


def states_equal(first: nn.Module, second: nn.Module) -> bool:
    a, b = first.state_dict(), second.state_dict()
    return a.keys() == b.keys() and all(torch.equal(a[name], b[name]) for name in a)


def linear(*rows: Sequence[float], dtype: torch.dtype = torch.float32) -> Network:
    module = nn.Linear(len(rows[0]), len(rows), bias=False)
    module.weight.data = torch.tensor(rows, dtype=dtype)
    return Network(module, ImageInput((1, 1)), labels=[str(i) for i in range(len(rows))])


# --- the average


@pytest.mark.parametrize("count", [2, 3, 4, 7, 8, 53])
def test_the_soup_of_copies_is_the_network_to_the_bit(family: list[Network], count: int) -> None:
    assert states_equal(average([family[1]] * count), family[1].module)


def test_a_running_mean_is_the_mean() -> None:
    tensors = torch.randn(6, 50, dtype=torch.float64)
    mean = tensors[0]
    for count in range(1, 6):
        mean = running_mean(mean, tensors[count], count)
    torch.testing.assert_close(mean, tensors.mean(0), rtol=1e-14, atol=1e-15)
    weighted = running_mean(running_mean(tensors[0], tensors[1], 0.5, 0.2), tensors[2], 0.7, 0.3)
    torch.testing.assert_close(weighted, 0.5 * tensors[0] + 0.2 * tensors[1] + 0.3 * tensors[2], rtol=1e-14, atol=1e-15)


def test_the_uniform_soup_agrees_with_torch_and_does_not_depend_on_the_order(family: list[Network]) -> None:
    torchs = torch.optim.swa_utils.AveragedModel(family[0].module, use_buffers=True)
    for each in family:
        torchs.update_parameters(each.module)
    ours, turned_round = average(family).state_dict(), average(family, [2, 0, 1]).state_dict()
    for name, theirs in torchs.module.state_dict().items():
        if theirs.is_floating_point():
            torch.testing.assert_close(ours[name], theirs, rtol=0, atol=1e-6)
            torch.testing.assert_close(ours[name], turned_round[name], rtol=0, atol=1e-6)
    assert not torch.equal(ours[name], family[0].module.state_dict()[name])


def test_the_soup_of_linear_heads_is_the_logit_ensemble() -> None:
    random = torch.Generator().manual_seed(0)
    heads = [linear(*torch.randint(-9, 9, (5, 6), generator=random).tolist()) for _ in range(5)]
    features = torch.randint(-9, 9, (20, 6), generator=random).float()
    logits = torch.stack([head(features) for head in heads])
    assert torch.equal(average(heads[:2])(features), logits[:2].mean(0))  # of two whole numbers: no rounding on either side
    torch.testing.assert_close(average(heads)(features), logits.mean(0), rtol=0, atol=1e-5)


def test_half_precision_is_summed_in_single() -> None:
    values = [256.0, *[258.0] * 8]  # bfloat16 steps by 2 here: a running mean kept in it would not move
    ours = average([linear([value], dtype=torch.bfloat16) for value in values]).weight
    kept = torch.tensor(values, dtype=torch.bfloat16)
    assert ours.dtype == torch.bfloat16 and ours.item() == kept.double().mean().bfloat16().item()
    stuck = kept[0]
    for count, value in enumerate(kept[1:], 1):
        stuck = stuck + (value - stuck) / (count + 1)
    assert stuck.item() != ours.item()


def test_more_than_fifty_members_are_summed_in_double() -> None:
    values = torch.rand(60, 50, generator=torch.Generator().manual_seed(0)) * 1000
    ours = average([linear(row) for row in values.tolist()]).weight[0]
    assert ours.dtype == torch.float32 and torch.equal(ours, values.double().mean(0).float())
    single = values[0]
    for count, row in enumerate(values[1:], 1):
        single = running_mean(single, row, count)
    assert not torch.equal(single, ours)


def test_tied_tensors_are_averaged_once_and_stay_tied_and_whole_numbers_are_kept(tmp_path: Path) -> None:
    given = []
    for number in range(3):
        network = Network(Tied(), labels=["a", "b"])
        network.module.embed.weight.data.fill_(3.0**number)
        network.module.num_batches_tracked.fill_(number + 7)
        given.append(network.save(tmp_path / str(number)))
    soup = Tied()
    fill(soup, Networks(given), [0, 1, 2])
    assert soup.head.weight is soup.embed.weight
    torch.testing.assert_close(soup.head.weight, torch.full((4, 4), 13 / 3))
    assert soup.positions.tolist() == [0, 1, 2, 3] and soup.num_batches_tracked == 7


def test_prefixes_of_compile_and_data_parallel_do_not_matter(turned: Network, colors: Dataset) -> None:
    a, b, c = near(turned, 3)
    wrapped = [Network(torch.compile(b.module), a.input, labels=COLORS), a, Network(nn.DataParallel(c.module), a.input, labels=COLORS)]
    plain = model_soup([b, a, c], colors, recipe="uniform")
    for order in ([0, 1, 2], [2, 0, 1]):
        soup = model_soup([wrapped[i] for i in order], colors, recipe="uniform")
        assert type(soup.module) is Turned
        torch.testing.assert_close(soup.module.state_dict(), plain.module.state_dict(), rtol=0, atol=1e-6)


def test_interpolation_ends_at_its_ends() -> None:
    first = {"w": torch.randn(40), "half": torch.randn(9).half(), "n": torch.tensor(3)}
    second = {"w": torch.randn(40) * 1e6, "half": torch.randn(9).half(), "n": torch.tensor(4)}
    assert all(torch.equal(interpolate(first, second, 0)[name], first[name]) for name in first)
    assert all(torch.equal(interpolate(first, second, 1)[name], second[name]) for name in ("w", "half"))
    torch.testing.assert_close(interpolate(first, second, 0.25)["w"], 0.75 * first["w"] + 0.25 * second["w"])


# --- batch norm


def test_reestimated_norm_is_that_of_torch(family: list[Network], colors: Dataset) -> None:
    if "test_vit" in repr(family[0]):
        pytest.skip("no batch norm")
    ours, theirs = family[0].copy(), family[0].copy()
    reestimate_norm(ours, colors, batch_size=16)
    pictures = theirs.input([row["image"] for row in colors])
    torch.optim.swa_utils.update_bn(pictures.split(16), theirs.module)
    for name, buffer in theirs.module.eval().named_buffers():
        torch.testing.assert_close(dict(ours.module.named_buffers())[name], buffer, rtol=1e-4, atol=1e-5)
    assert not any(layer.training for layer in ours.module.modules())
    assert [m.momentum for m in ours.module.modules() if hasattr(m, "momentum")] == [m.momentum for m in theirs.module.modules() if hasattr(m, "momentum")]


def test_dropout_is_off_while_norm_is_reestimated(colors: Dataset) -> None:
    module = nn.Sequential(nn.Flatten(), nn.Dropout(0.5), nn.BatchNorm1d(768), nn.Linear(768, 3))
    network = Network(module, ImageInput((16, 16)))
    reestimate_norm(network, colors, batch_size=48)
    given = network.input([row["image"] for row in colors]).flatten(1)
    torch.testing.assert_close(module[2].running_var, given.var(0), rtol=1e-4, atol=1e-5)


# --- recipes


def algorithm_1(values: Sequence[float], target: float, strict: bool) -> list[float]:
    """The paper's listing for networks of one number, scored by their distance to `target`."""
    order = sorted(values, key=lambda value: abs(value - target))
    kept = [order[0]]
    for value in order[1:]:
        now, before = abs(float(np.mean([*kept, value])) - target), abs(float(np.mean(kept)) - target)
        if now < before or (now == before and not strict):
            kept.append(value)
    return kept


@pytest.mark.parametrize("seed", range(20))
def test_greedy_is_algorithm_1_and_never_falls(seed: int) -> None:
    values = np.random.default_rng(seed).integers(0, 12, 9).astype(float)  # whole numbers: with ties
    for tie in ("accept", "reject"):
        members, steps = greedy([-abs(v - 5.5) for v in values], lambda some: -abs(float(np.mean(values[some])) - 5.5), tie)
        assert [values[i] for i in members] == algorithm_1(values, 5.5, strict=tie == "reject")
        path = [score for _, score, kept in steps if kept]
        assert path == sorted(path) and path[0] == max(-abs(values - 5.5)) and sorted(i for i, _, _ in steps) == list(range(9))
        assert members == [i for i, _, kept in steps if kept]


def test_a_tie_is_accepted_as_in_the_paper_or_rejected_as_in_its_code() -> None:
    assert greedy([0.5, 0.5, 0.4], lambda _: 0.5)[0] == [0, 1, 2]
    assert greedy([0.5, 0.5, 0.4], lambda _: 0.5, "reject")[0] == [0]


@pytest.mark.parametrize("per_tensor", [True, False])
def test_a_mixture_starts_as_the_uniform_soup_and_can_be_any_of_its_networks(family: list[Network], per_tensor: bool) -> None:
    mixture = Mixture(family[0].copy().module, [each.module.state_dict() for each in family], per_tensor=per_tensor)
    batch = torch.randn(2, 3, 32, 32)
    torch.testing.assert_close(mixture(batch), average(family)(batch), rtol=1e-4, atol=1e-5)
    with torch.no_grad():
        mixture.raw[:, 0], mixture.raw[:, 2] = -torch.inf, -torch.inf
    assert torch.equal(mixture(batch), family[1](batch))
    mixture.temperature.data.fill_(2.0)
    torch.testing.assert_close(mixture(batch), 2 * family[1](batch))
    assert {name for name, _ in mixture.named_parameters()} == {"raw", "temperature"}


@pytest.mark.parametrize("per_tensor", [True, False])
def test_the_learned_soup_prefers_the_network_that_is_right(turned: Network, colors: Dataset, per_tensor: bool) -> None:
    wrong = turned.copy()
    wrong.module.out.weight.data.zero_()
    shares, temperature = learned(Networks([wrong, turned]), turned.copy(), colors, per_tensor=per_tensor, epochs=12, batch_size=16)
    assert shares["out.weight"][1] > 0.6 and temperature > 1
    assert (shares["into.weight"] == shares["out.weight"]) != per_tensor
    assert sum(shares["out.weight"]) == pytest.approx(1)
    soup = turned.copy()
    fill(soup.module, Networks([wrong, turned]), [0, 1], shares)
    torch.testing.assert_close(soup.module.out.weight, shares["out.weight"][1] * turned.module.out.weight)


def test_what_collapses() -> None:
    table = np.array([[0.9, 0.5, 0.05], [0.5, 0.8, 0.3], [0.05, 0.3, 0.34]])
    assert midpoints(3, lambda some: table[some[0], some[-1]]).tolist() == table.tolist()
    assert np.argwhere(np.triu(collapsed(table, chance=0.25))).tolist() == [[0, 1]]  # the third has too little to lose
    assert np.argwhere(np.triu(collapsed(table, chance=0.1))).tolist() == [[0, 2]]
    assert not collapsed(np.array([[0.33, 0.1], [0.1, 0.33]]), chance=0.33).any()


def test_of_many_networks_only_pairs_with_the_best_are_tried() -> None:
    tried: list[list[int]] = []
    table = midpoints(20, lambda some: tried.append(some) or (0.9 if some == [7] else 0.5))
    pairs = [some for some in tried if len(some) == 2]
    assert len(pairs) == 19 and all(7 in pair for pair in pairs) and np.isnan(table[0, 1])


# --- the method


@pytest.fixture(scope="module")
def saved(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("saved")


def test_every_recipe_on_a_cnn_and_a_vit(family: list[Network], colors: Dataset, saved: Path) -> None:
    before, kind = [each.fingerprint for each in family], family[0].architecture["name"]
    folders = [str(each.save(saved / f"{kind}-{i}")) for i, each in enumerate(family)]
    batch = torch.randn(2, 3, 32, 32)
    for recipe in ("greedy", "uniform", "learned"):
        soup = model_soup([folders[0], family[1], folders[2]], colors, recipe=recipe, epochs=1)
        assert soup.lineage[-1]["method"] == "model-soup" and soup.lineage[-1]["parents"] == before
        soup.save(saved / f"{kind}-{recipe}")
        torch.save((batch, soup(batch).detach()), saved / f"{kind}-{recipe}.pt")
        figures, rows = soup.reports["soup"].figures, soup.reports["soup"].tables["networks"]
        assert figures["soup"] == score(soup, colors) and figures["best network"] == max(row["accuracy"] for row in rows) and len(rows) == 3
        if recipe == "greedy":
            kept = [row["soup with it"] for row in rows if row["kept"] == "yes"]
            assert kept == sorted(kept) and kept[-1] == figures["soup"] >= figures["best network"]
        if recipe == "uniform":
            assert figures["soup"] == figures["uniform soup"]
            assert ("soup with averaged statistics" in figures) == ("resnet" in kind)
            for name, parameter in average(family).named_parameters():
                assert torch.equal(parameter, soup.module.get_parameter(name))
        if recipe == "learned":
            assert sum(row["mean weight"] for row in rows) == pytest.approx(1)
    assert [each.fingerprint for each in family] == before


def test_soups_load_in_a_new_process(saved: Path) -> None:
    outputs = sorted(saved.glob("*.pt"))
    assert len(outputs) == 6, "the test above saves them"
    code = (
        "import sys, torch, wellread\n"
        "for file in sys.argv[1:]:\n"
        "    batch, output = torch.load(file, weights_only=True)\n"
        "    soup = wellread.load(file.removesuffix('.pt'))\n"
        "    assert torch.equal(soup(batch), output), file\n"
        "    assert 'best network' in soup.reports['soup'].figures"
    )
    done = subprocess.run([sys.executable, "-c", code, *map(str, outputs)], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr


def test_text(tmp_path: Path) -> None:
    from tokenizers import Tokenizer, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    words = Tokenizer(models.WordLevel({"[PAD]": 0, "[UNK]": 1, "good": 2, "bad": 3, "very": 4}, unk_token="[UNK]"))
    words.pre_tokenizer = pre_tokenizers.Whitespace()
    size = {"vocab_size": 5, "hidden_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 16, "max_position_embeddings": 16}
    torch.manual_seed(0)
    given = []
    for dropout in (0.0, 0.1, 0.2):  # a sweep may change dropout, and the average is still one of equals
        architecture = {
            "family": "transformers", "auto": "AutoModelForSequenceClassification",
            "config": {"model_type": "bert", "hidden_dropout_prob": dropout, "num_labels": 2, **size}, "pooling": "mean", "normalize": False,
        }  # fmt: skip
        tokenizer = PreTrainedTokenizerFast(tokenizer_object=words, pad_token="[PAD]", unk_token="[UNK]")
        given.append(Network(families.build(architecture), TextInput(tokenizer), labels=("n", "p"), architecture=architecture))
        given[-1].module.load_state_dict(given[0].module.state_dict())
    opinions = as_data([("very good", "p"), ("bad", "n"), ("good", "p"), ("very very bad", "n")] * 3)
    soup = model_soup([given[0].save(tmp_path / "0"), *given[1:]], opinions)
    assert soup.reports["soup"].figures["networks kept"] == 3 and states_equal(soup.module, given[0].module)
    soup.save(tmp_path / "soup")
    assert wellread.load(tmp_path / "soup").fingerprint == soup.fingerprint
    folders = [str(tmp_path / f"transformers-{i}") for i in (0, 1)]  # as its Trainer leaves them
    for folder, fill_value in zip(folders, (1.0, 4.0), strict=True):
        model = given[0].module.model
        model.config.id2label = {0: "n", 1: "p"}
        model.classifier.bias.data.fill_(fill_value)
        model.save_pretrained(folder)
        tokenizer.save_pretrained(folder)
    soup = model_soup(folders, opinions, recipe="uniform")
    assert soup.module.model.classifier.bias.tolist() == [2.5, 2.5] and soup.reports["soup"].tables["networks"][1]["network"] == folders[1]


def test_a_single_network_comes_back_with_a_warning(turned: Network, colors: Dataset) -> None:
    with pytest.warns(UserWarning, match="a single network"):
        soup = model_soup([turned], colors)
    assert soup is not turned and soup.fingerprint == turned.fingerprint


def test_networks_of_different_basins_are_refused_or_warned_about(turned: Network, colors: Dataset) -> None:
    other = turned.copy()
    for parameter in other.module.parameters():
        parameter.data.neg_()
    assert score(other, colors) == score(turned, colors) > 0.9
    for recipe in ("greedy", "uniform", "learned"):
        with pytest.raises(BadInput, match="halfway between network 1 and network 2 there is no classifier"):
            model_soup([turned, other], colors, recipe=recipe)
    three = [turned, near(turned, 1)[0], other]
    with pytest.raises(BadInput, match="network 3 there is no classifier"):
        model_soup(three, colors, recipe="uniform")
    with pytest.warns(UserWarning, match="network 3 there is no classifier"):
        soup = model_soup(three, colors)
    table = soup.reports["soup"].tables["accuracy halfway between two networks"]
    assert table[0]["3"] == table[2]["1"] < 0.5 < table[0]["2"] and score(soup, colors) >= score(turned, colors)
    assert model_soup([turned, other], colors, recipe="uniform", barriers=False).reports["soup"].figures["soup"] < 0.5


def test_a_killed_run_goes_on(turned: Network, colors: Dataset, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    module = sys.modules["wellread.merge.model_soup"]
    networks = near(turned, 4, 0.3)
    whole = model_soup(networks, colors)
    calls = []

    def counted(*arguments: object, **more: object) -> np.ndarray:
        calls.append(1)
        if len(calls) == 7:
            raise KeyboardInterrupt
        return predict(*arguments, **more)

    monkeypatch.setattr(module, "predict", counted)
    with runtime.using(folder=tmp_path):
        with pytest.raises(KeyboardInterrupt):
            model_soup(networks, colors)
        again = model_soup(networks, colors)
        assert again.fingerprint == whole.fingerprint and again.reports["soup"].figures == whole.reports["soup"].figures
        once = len(calls) - 7
        calls.clear()
        monkeypatch.setattr(module, "predict", lambda *a, **k: calls.append(1) or predict(*a, **k))
        model_soup(networks[::-1], colors)  # other networks: nothing of what is kept holds
        assert len(calls) == once + 6


def test_statistics_come_from_unlabelled_data_when_they_are_given(family: list[Network], colors: Dataset) -> None:
    if "vit" in repr(family[0]):
        pytest.skip("no batch norm")
    dark = as_data([Image.fromarray(np.asarray(row["image"]) // 4) for row in colors])
    shared = {"recipe": "uniform", "barriers": False}
    soups = [model_soup(family[:2], colors, data, refresh_norm=refresh, **shared) for data, refresh in ((None, True), (dark, True), (None, False))]
    assert len({soup.fingerprint for soup in soups}) == 3 and states_equal(soups[2].module, average(family[:2]))


def test_the_command(turned: Network, tmp_path: Path, capsys: pytest.CaptureFixture[str], colors: Dataset) -> None:
    for name in COLORS:
        (tmp_path / "photos" / name).mkdir(parents=True)
    for number, row in enumerate(colors):
        row["image"].save(tmp_path / "photos" / COLORS[row["label"]] / f"{number}.png")
    folders = [str(each.save(tmp_path / str(i))) for i, each in enumerate(near(turned, 2))]
    command = ["run", "model-soup", "--networks", folders[0], "--networks", folders[1], "--validation", f"folder:{tmp_path / 'photos'}"]
    assert main([*command, "--metric", "log_loss", "--no-barriers", "--out", str(tmp_path / "out")]) == 0
    told = capsys.readouterr()
    assert "best network" in told.out and "networks kept" in told.out
    loaded = wellread.load(tmp_path / "out")
    assert "log loss, negated" in loaded.reports["soup"].html() and loaded.lineage[-1]["settings"]["metric"] == "log_loss"
    assert main(["run", "model-soup", "--help"]) == 0
    assert "fine-tuned from the same weights" in " ".join(capsys.readouterr().out.split())


# --- bad input


def changed(network: Network, name: str, value: Tensor | None) -> Network:
    """A network whose module has another tensor, by a name that is not in its class."""
    other = network.copy()
    if value is None:
        delattr(other.module, name)
    elif value.is_floating_point():
        other.module.register_parameter(name, nn.Parameter(value))
    else:
        other.module.register_buffer(name, value)
    return other


@pytest.mark.parametrize(
    ("value", "said"),
    [
        (torch.zeros(2), "'extra' differ \\(\\[2\\] float32, missing\\)"),
        (None, "'into.weight' differ \\(missing, \\[8, 3\\] float32\\)"),
    ],
)
def test_the_first_tensor_that_differs_is_named(turned: Network, colors: Dataset, value: Tensor | None, said: str) -> None:
    other = changed(turned, "into" if value is None else "extra", value)
    with pytest.raises(BadInput, match=f"network 2 and network 1 cannot be averaged, their tensors {said}"):
        model_soup([turned, other], colors)


def test_shapes_kinds_and_whole_numbers_must_agree(turned: Network, colors: Dataset) -> None:
    for mine, theirs, said in (
        (torch.zeros(2), torch.zeros(3), "'extra' differ .*3.*2"),
        (torch.zeros(2), torch.zeros(2).half(), "'extra' differ .*float16.*float32"),
        (torch.tensor([1, 2]), torch.tensor([1, 3]), "whole numbers in their tensors 'extra' differ.*quantised"),
    ):
        with pytest.raises(BadInput, match=said):
            model_soup([changed(turned, "extra", mine), changed(turned, "extra", theirs)], colors)
    with pytest.raises(BadInput, match="adapter.*lora_A"):
        model_soup([changed(turned, "lora_A", torch.zeros(2))] * 2, colors)


def test_other_architectures_edits_and_classes_are_refused(family: list[Network], colors: Dataset) -> None:
    a = family[0]
    pruned = a.edited({"edit": "factorise", "layer": a.head, "rank": 2})
    for other, said in (
        (wellread.load("timm/test_convnext", pretrained=False).with_head(COLORS), "architecture differ"),
        (pruned, "edits differ"),
        (a.edited(labels=COLORS[::-1]), "labels differ"),
        (a.edited(input=a.input.changed(mean=(0.0,) * 3)), "input differ"),
    ):
        with pytest.raises(BadInput, match=f"network 2 and network 1 cannot be averaged, their {said}"):
            model_soup([a, other], colors)
    with pytest.raises(BadInput, match="the classes blue, green, red and the network a, b, c"):
        model_soup([a.edited(labels=("a", "b", "c"))] * 2, colors)
    with pytest.raises(BadInput, match="2 classes and validation has 3"):
        model_soup([Network(Turned(2), ImageInput((16, 16)))] * 2, colors)
    with pytest.raises(BadInput, match="a classifier is needed"):
        model_soup([a.edited(output="embedding")] * 2, colors)


def test_damaged_files_are_named(turned: Network, colors: Dataset, tmp_path: Path) -> None:
    good = turned.save(tmp_path / "good")
    nan = turned.copy()
    nan.module.out.weight.data[1, 1] = torch.nan
    nan.save(tmp_path / "nan")
    with pytest.raises(BadInput, match="nan is damaged, its tensor 'out.weight' holds values that are not finite"):
        model_soup([good, tmp_path / "nan"], colors)
    flipped = turned.save(tmp_path / "flipped") / WEIGHTS
    content = bytearray(flipped.read_bytes())
    content[-1] ^= 1
    flipped.write_bytes(content)
    with pytest.raises(BadInput, match="flipped.* is not what was saved"):
        model_soup([good, tmp_path / "flipped"], colors)
    flipped.write_bytes(content[:-40])
    with pytest.raises(BadInput, match="flipped.* is damaged"):
        model_soup([good, tmp_path / "flipped"], colors)
    with pytest.raises(BadInput, match="there is no network .*nowhere"):
        model_soup([good, tmp_path / "nowhere"], colors)


def test_bad_data_and_settings(turned: Network, colors: Dataset) -> None:
    for wrong, said in (
        ({"recipe": "spicy"}, "recipe is 'spicy'"),
        ({"tie": "maybe"}, "tie is 'maybe'"),
        ({"metric": "speed"}, "metric is 'speed'"),
        ({"validation": subset(colors, [])}, "no rows"),
        ({"validation": subset(colors, range(0, 48, 3))}, "one class only"),
        ({"networks": []}, "networks is empty"),
        ({"recipe": "learned", "epochs": 0}, "epochs is 0"),
    ):
        with pytest.raises(BadInput, match=said):
            model_soup(**{"networks": near(turned, 2), "validation": colors, "barriers": False, **wrong})
    normed = Network(nn.Sequential(nn.Flatten(), nn.BatchNorm1d(768), nn.Linear(768, 3)), ImageInput((16, 16)), labels=COLORS)
    other = normed.copy()
    other.module[1].running_mean += 1
    with pytest.raises(BadInput, match="unlabelled has one row"):
        model_soup([normed, other], colors, as_data([Image.new("RGB", (16, 16))]))


def test_learned_says_when_memory_does_not_hold_the_networks(turned: Network, colors: Dataset, monkeypatch: pytest.MonkeyPatch) -> None:
    import psutil

    little = type("memory", (), {"available": 100})
    monkeypatch.setattr(psutil, "virtual_memory", lambda: little)
    with pytest.raises(BadInput, match="holds all 2 networks in memory"):
        model_soup([turned, turned], colors, recipe="learned")


# --- memory and devices

MEASURE = """
import resource, sys, numpy as np, psutil, wellread
from PIL import Image
from wellread.data import as_data

random = np.random.default_rng(0)
data = as_data([(Image.fromarray(random.integers(0, 255, (32, 32, 3), dtype=np.uint8)), "ab"[row % 2]) for row in range(4)])
with wellread.using(progress=False):
    small = wellread.load("timm/test_vit", pretrained=False).with_head(["a", "b"])
    wellread.merge.model_soup([small, small], data)  # what is imported and allocated once
    before = max(psutil.Process().memory_info().rss, resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024)
    wellread.merge.model_soup([sys.argv[1]] * int(sys.argv[2]), data, recipe=sys.argv[3])
print(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024 - before)
"""


@pytest.mark.slow
@pytest.mark.parametrize("recipe", ["uniform", "greedy"])
def test_memory_does_not_grow_with_the_number_of_networks(recipe: str, tmp_path: Path) -> None:
    network = wellread.load("timm/vit_base_patch16_224", pretrained=False, img_size=32).with_head(["a", "b"])
    network.input = network.input.changed(size=(32, 32))
    size = (network.save(tmp_path / "n") / WEIGHTS).stat().st_size
    for count in (2, 8):
        command = [sys.executable, "-c", MEASURE, str(tmp_path / "n"), str(count), recipe]
        done = subprocess.run(command, capture_output=True, text=True, env=os.environ | {"OMP_NUM_THREADS": "1"})
        assert done.returncode == 0, done.stderr
        assert int(done.stdout.split()[-1]) / size <= 2.2, count


@pytest.mark.gpu
def test_on_a_gpu_in_bfloat16(family: list[Network], colors: Dataset) -> None:
    with runtime.using(device="cuda", precision="bfloat16"):
        for recipe in ("greedy", "uniform", "learned"):
            soup = model_soup(family, colors, recipe=recipe, epochs=1)
            assert soup.device.type == "cpu" and all(tensor.isfinite().all() for tensor in soup.module.state_dict().values())


def test_same_structure_gives_the_records(family: list[Network]) -> None:
    records = same_structure(Networks(family), family[0].module, ["a", "b", "c"])
    assert [record["fingerprint"] for record in records] == [each.fingerprint for each in family]


def test_shared_statistics_of_batch_norm_are_kept(colors: Dataset) -> None:
    normed = Network(nn.Sequential(nn.Flatten(), nn.BatchNorm1d(768), nn.Linear(768, 3)), ImageInput((16, 16)), labels=COLORS)
    several = [normed.copy() for _ in range(3)]
    for number, each in enumerate(several):
        with torch.no_grad():
            each.module[2].bias += 0.01 * number
    soup = model_soup(several, colors, recipe="uniform", barriers=False)
    assert torch.equal(soup.module[1].running_var, normed.module[1].running_var)
    several[2].module[1].running_var *= 2
    soup = model_soup(several, colors, recipe="uniform", barriers=False)
    assert not torch.equal(soup.module[1].running_var, normed.module[1].running_var)
