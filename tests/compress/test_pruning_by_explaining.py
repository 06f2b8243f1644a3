"""Pruning by explaining: scores, the order of cutting, and the whole on CNNs and a ViT."""

from __future__ import annotations

import os
import subprocess
import sys
from itertools import pairwise
from pathlib import Path

import numpy as np
import pytest
import torch
from datasets import Dataset
from PIL import Image
from torch import Tensor, nn

import wellread
from wellread import ImageInput, Network
from wellread.batches import network_batches
from wellread.coupling import channel_groups
from wellread.data import as_data, subset
from wellread.errors import BadInput
from wellread.evaluate import predict

pytest.importorskip("torch_pruning")
pytest.importorskip("zennit")
from wellread.compress.pruning_by_explaining import least, pruning_by_explaining, unit_scores

COLORS = ("blue", "green", "red")
CRITERIA = ("lrp", "taylor", "taylor_after", "gradient", "weight", "random")


class Plain(nn.Module):
    """Twelve filters, of which the last four are not read."""

    def __init__(self) -> None:
        super().__init__()
        self.conv, self.norm, self.head = nn.Conv2d(3, 12, 3, padding=1), nn.BatchNorm2d(12), nn.Linear(12, 3)
        nn.init.uniform_(self.norm.bias, 0.5, 1)  # no channel is silent
        with torch.no_grad():
            self.head.weight[:, 8:] = 0

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.norm(self.conv(x)).relu().mean((2, 3)))


@pytest.fixture(scope="module")
def colors() -> Dataset:
    """18 pictures of noise with a tint."""
    random = np.random.default_rng(0)
    pairs = []
    for row in range(18):
        picture = random.integers(0, 160, (16, 16, 3))
        picture[..., 2 - row % 3] += 40
        pairs.append((Image.fromarray(picture.astype(np.uint8)), COLORS[row % 3]))
    return as_data(pairs)


def plain() -> Network:
    torch.manual_seed(0)
    return Network(Plain(), ImageInput((16, 16)), labels=COLORS, architecture={"family": "timm", "name": "none"})


def family(name: str) -> Network:
    torch.manual_seed(0)
    size = {"img_size": 32} if "vit" in name else {}
    start = wellread.load(name, pretrained=False, **size).with_head(COLORS)
    for layer in start.module.modules():
        if isinstance(layer, nn.BatchNorm2d):
            nn.init.ones_(layer.weight)  # fresh blocks start with 0: nothing in them counts
    return start.edited(input=start.input.changed(size=(32, 32)))


@pytest.mark.parametrize("criterion", CRITERIA)
def test_scores_depend_neither_on_batches_nor_on_order(criterion, colors) -> None:
    net = family("timm/test_resnet")
    groups = channel_groups(net)
    scores = []
    for rows, size in ((range(18), 18), (range(17, -1, -1), 5)):
        torch.manual_seed(1)
        scores.append(unit_scores(net, groups, network_batches(net, subset(colors, rows), batch_size=size), torch.arange(3), criterion))
    for group in groups:
        assert scores[0][group].shape == (group.units,) and scores[0][group].max() > 0
        torch.testing.assert_close(scores[0][group], scores[1][group], rtol=1e-3, atol=1e-6)


@pytest.mark.parametrize("criterion", ["lrp", "taylor", "taylor_after", "gradient"])
def test_filters_that_nothing_reads_have_no_score_and_go_first(criterion, colors) -> None:
    net = plain()
    (group,) = channel_groups(net)
    scores = unit_scores(net, [group], network_batches(net, colors), torch.arange(3), criterion)[group]
    assert (scores[8:] == 0).all() and (scores[:8] > 0).all()
    made = pruning_by_explaining(net, colors, remove=4 / 12, criterion=criterion)
    torch.testing.assert_close(made.module.conv.weight, net.module.conv.weight[:8])
    np.testing.assert_allclose(predict(made, colors), predict(net, colors), rtol=1e-5, atol=1e-5)


def test_weight_scores_are_shares_of_the_magnitude() -> None:
    net = plain()
    (group,) = channel_groups(net)
    expected = net.module.conv.weight.abs().sum((1, 2, 3))
    found = unit_scores(net, [group], network_batches(net, as_data([(Image.new("RGB", (16, 16)), "blue")])), torch.arange(1), "weight")[group]
    torch.testing.assert_close(found, (expected / expected.sum()).detach())


def test_the_smallest_go_over_all_groups_until_a_floor() -> None:
    groups = channel_groups(family("timm/test_resnet"))[:2]
    scores = {groups[0]: torch.arange(groups[0].units) / 1e3, groups[1]: 1 + torch.arange(groups[1].units).float()}
    stay = least(scores, groups[0].units, {groups[0]: 3, groups[1]: 1})
    assert stay[groups[0]] == list(range(groups[0].units))[-3:]  # its floor
    assert stay[groups[1]] == list(range(3, groups[1].units))  # and the rest from the next


@pytest.mark.parametrize("name", ["timm/test_resnet", "timm/test_efficientnet", "timm/test_vit"])
def test_the_network_becomes_smaller_and_is_the_same_in_another_process(name, colors, tmp_path: Path) -> None:
    net = family(name)
    before = net.fingerprint
    made = pruning_by_explaining(net, colors, remove=0.3, step=0.15)
    curve = made.reports["pruning"].tables["curve"]
    assert net.fingerprint == before and made.labels == COLORS and len(made.edits) == len(net.edits) + 1
    assert len(curve) == 3 and curve[-1]["units removed, %"] == pytest.approx(30, abs=1)
    for column in ("parameters", "MACs"):
        assert all(a[column] > b[column] for a, b in pairwise(curve))
    assert curve[-1]["parameters"] == sum(p.numel() for p in made.module.parameters())
    made.save(tmp_path / "made")
    assert wellread.load(tmp_path / "made").fingerprint == made.fingerprint
    if "vit" not in name:
        return
    code = f"import wellread; net = wellread.load({str(tmp_path / 'made')!r}); print(net.fingerprint, net.lineage[-1]['method'], sorted(net.reports))"
    done = subprocess.run([sys.executable, "-c", code], env=os.environ | {"HF_HUB_OFFLINE": "1"}, capture_output=True, text=True, check=True)
    assert done.stdout.split(maxsplit=2) == [made.fingerprint, "pruning-by-explaining", "['pruning']\n"]


def test_all_heads_may_go_but_one(colors) -> None:
    net = family("timm/test_vit")
    made = pruning_by_explaining(net, colors, remove=0.97, step=1.0, at_least=4)
    rows = made.reports["pruning"].tables["layers"]
    assert {row["units"] for row in rows} == {"heads", "channels"}
    assert min(row["kept"] for row in rows if row["units"] == "heads") >= 1 and min(row["kept"] for row in rows if row["units"] == "channels") >= 4


def test_removing_nothing_changes_nothing_and_targets_in_macs_are_met(colors) -> None:
    net = family("timm/test_resnet")
    assert pruning_by_explaining(net, colors, remove=0.0).fingerprint == net.fingerprint
    made = pruning_by_explaining(net, colors, remove=0.4, of="macs", step=0.2, criterion="weight")
    assert made.reports["pruning"].figures["MACs left, %"] <= 60
    with pytest.raises(BadInput, match="cannot be removed: at most"):
        pruning_by_explaining(net, colors, remove=0.99)


def test_some_of_the_classes_are_enough(colors) -> None:
    net = family("timm/test_resnet")
    two = as_data([(row["image"], COLORS[row["label"]]) for row in colors if row["label"] > 0])
    made = pruning_by_explaining(net, two, remove=0.1, step=0.1)
    assert made.labels == COLORS and predict(made, two).shape[1] == 3


def test_training_between_steps_changes_what_is_left(colors) -> None:
    net = family("timm/test_resnet")
    still = pruning_by_explaining(net, colors, remove=0.1, step=0.1, criterion="weight")
    tuned = pruning_by_explaining(net, colors, remove=0.1, step=0.1, criterion="weight", epochs=1)
    assert tuned.structure == still.structure and tuned.fingerprint != still.fingerprint


def test_bad_input(colors) -> None:
    net = family("timm/test_resnet")
    with pytest.raises(BadInput, match="remove is 1"):
        pruning_by_explaining(net, colors, remove=1.0)
    with pytest.raises(BadInput, match="above 0 to 1"):
        pruning_by_explaining(net, colors, step=0.0)
    with pytest.raises(BadInput, match="no example of the class 'red'"):
        pruning_by_explaining(net, subset(colors, [row for row in range(18) if row % 3 < 2]))
    other = as_data([(row["image"], ("cat", "dog")[row["label"] % 2]) for row in colors])
    with pytest.raises(BadInput, match="the class 'cat'"):
        pruning_by_explaining(net, other)
    embedding = net.edited(output="embedding")
    with pytest.raises(BadInput, match="a classifier is needed"):
        pruning_by_explaining(embedding, colors)
