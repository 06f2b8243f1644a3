"""Gradient norms of single examples are those of one backward pass each, for every kind of layer, and nothing is left changed."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn

import wellread
from wellread import gradients
from wellread.families import Transformer
from wellread.gradients import gradient_norms


def plain(module: nn.Module, inputs: Tensor | dict[str, Tensor], targets: Tensor) -> Tensor:
    """[B]: one backward pass for each example, written as anybody would."""
    modes = {part: part.training for part in module.modules()}
    module.eval()
    found = []
    for row in range(len(targets)):
        module.zero_grad()
        one = {key: value[row : row + 1] for key, value in inputs.items()} if isinstance(inputs, dict) else inputs[row : row + 1]
        out = module(**one) if isinstance(one, dict) else module(one)
        nn.functional.cross_entropy(out, targets[row : row + 1]).backward()
        found.append(torch.cat([p.grad.flatten() for p in module.parameters() if p.grad is not None]).norm())
    module.zero_grad()
    for part, mode in modes.items():
        part.training = mode
    return torch.stack(found).detach()


class Twice(nn.Module):
    """One layer used twice, one never, and one whose weight is also used by itself."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.b, self.c, self.out = (nn.Linear(6, 6) for _ in range(4))

    def forward(self, x: Tensor) -> Tensor:
        x = self.a(self.a(x).relu())
        return self.out(self.b(x).relu() @ self.b.weight)


class SequenceFirst(nn.Module):
    """[B, T, d] turned to [T, B, d]: the first dimension of a layer's input is not the batch, although it can be as long."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.norm, self.out = nn.Linear(5, 7), nn.LayerNorm(7), nn.Linear(7, 3)

    def forward(self, x: Tensor) -> Tensor:
        return self.out(self.norm(self.first(x.transpose(0, 1)).tanh()).mean(0))


class Bare(nn.Module):
    """Parameters that belong to no layer."""

    def __init__(self) -> None:
        super().__init__()
        self.token, self.scale, self.out = nn.Parameter(torch.randn(1, 1, 5)), nn.Parameter(torch.randn(5)), nn.Linear(5, 3)

    def forward(self, x: Tensor) -> Tensor:
        x = torch.cat([self.token.expand(len(x), -1, -1), x], 1) * self.scale
        return self.out(x.softmax(1).pow(2).sum(1))


class Decides(nn.Module):
    """Looks at values, which cannot be vectorised."""

    def __init__(self) -> None:
        super().__init__()
        self.scale, self.out = nn.Parameter(torch.randn(4)), nn.Linear(4, 3)

    def forward(self, x: Tensor) -> Tensor:
        return self.out(x * self.scale if x.sum().item() > -1e9 else x)


def lookup() -> nn.Module:
    class Words(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.words, self.places = nn.Embedding(5, 6, padding_idx=0), nn.Embedding(9, 6)
            self.out = nn.Linear(6, 3)

        def forward(self, tokens: Tensor) -> Tensor:
            places = self.places(torch.arange(tokens.shape[1])[None])
            return self.out((self.words(tokens) + places).tanh().sum(1))

    return Words()


CONVOLUTIONS = lambda: nn.Sequential(  # noqa: E731
    nn.Conv2d(4, 8, 3, padding=1),
    nn.BatchNorm2d(8),
    nn.ReLU(inplace=True),
    nn.Conv2d(8, 8, (3, 2), stride=(2, 1), padding=(0, 2), groups=4, bias=False),
    nn.GroupNorm(2, 8),
    nn.ReLU(inplace=True),
    nn.Conv2d(8, 16, 3, dilation=2, padding=2),
    nn.Conv2d(16, 16, 1),
    nn.ReLU(inplace=True),
    nn.AdaptiveAvgPool2d(1),
    nn.Flatten(),
    nn.LayerNorm(16),
    nn.Linear(16, 3),
)

CASES: dict[str, tuple[Callable[[], nn.Module], tuple[int, ...], bool]] = {  # module, shape of an example, whether nothing is written down
    "linear": (lambda: nn.Linear(6, 3), (6,), True),
    "tokens": (lambda: nn.Sequential(nn.Linear(6, 40), nn.LayerNorm(40), nn.ReLU(), nn.Linear(40, 4), nn.Flatten(), nn.Linear(20, 3)), (5, 6), True),
    "few tokens": (lambda: nn.Sequential(nn.Linear(60, 40), nn.Flatten(), nn.BatchNorm1d(120), nn.Linear(120, 3)), (3, 60), True),
    "convolutions": (CONVOLUTIONS, (4, 9, 11), True),
    "same padding": (lambda: nn.Sequential(nn.Conv2d(2, 4, 3, padding="same"), nn.Flatten(), nn.Linear(64, 3)), (2, 4, 4), False),
    "1d": (lambda: nn.Sequential(nn.Conv1d(2, 4, 3), nn.PReLU(), nn.Flatten(), nn.Linear(16, 3)), (2, 6), False),
    "twice": (Twice, (6,), False),
    "bare": (Bare, (4, 5), False),
    "decides": (Decides, (4,), False),
    "sequence first": (SequenceFirst, (4, 5), False),
    "sequence first, as long as the batch": (SequenceFirst, (8, 5), False),
    "attention": (lambda: nn.Sequential(nn.TransformerEncoderLayer(8, 2, 16, batch_first=True), nn.Flatten(), nn.Linear(32, 3)), (4, 8), False),
    "lstm": (lambda: nn.Sequential(Last(nn.LSTM(5, 6, batch_first=True)), nn.Linear(6, 3)), (4, 5), False),
}


class Last(nn.Module):
    def __init__(self, inner: nn.Module) -> None:
        super().__init__()
        self.inner = inner

    def forward(self, x: Tensor) -> Tensor:
        return self.inner(x)[0][:, -1]


def settled(module: nn.Module) -> nn.Module:
    """With norms that do something: statistics and affine parameters away from 0 and 1."""
    with torch.no_grad():
        for part in module.modules():
            for name in ("weight", "bias", "running_mean"):
                tensor = getattr(part, name, None)
                if isinstance(tensor, Tensor) and tensor.ndim == 1:
                    tensor.add_(0.3 * torch.randn_like(tensor))
            if isinstance(getattr(part, "running_var", None), Tensor):
                part.running_var.uniform_(0.5, 2)  # type: ignore[union-attr,operator]
    return module


@pytest.mark.parametrize("name", CASES)
def test_equal_to_one_backward_pass_each(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    torch.manual_seed(0)
    make, shape, closed = CASES[name]
    module, x, y = settled(make()), torch.randn(8, *shape), torch.randint(0, 3, (8,))
    if closed:
        monkeypatch.setattr(gradients, "_written_down", lambda *_: pytest.fail("a gradient was written down"))
    found = gradient_norms(module, x, y)
    assert found.shape == (8,)
    torch.testing.assert_close(found, plain(module, x, y), rtol=1e-5, atol=1e-6)


def test_words(monkeypatch: pytest.MonkeyPatch) -> None:
    torch.manual_seed(0)
    module, tokens, y = lookup(), torch.randint(0, 5, (8, 9)), torch.randint(0, 3, (8,))
    monkeypatch.setattr(gradients, "_written_down", lambda *_: pytest.fail("a gradient was written down"))
    torch.testing.assert_close(gradient_norms(module, tokens, y), plain(module, tokens, y), rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("name", ["test_vit", "test_efficientnet", "test_resnet", "test_convnext"])
def test_networks(name: str) -> None:
    torch.manual_seed(0)
    module = settled(wellread.load(f"timm/{name}", pretrained=False, num_classes=3).module)
    side = 160 if name == "test_vit" else 64
    x, y = torch.randn(4, 3, side, side), torch.randint(0, 3, (4,))
    torch.testing.assert_close(gradient_norms(module, x, y), plain(module, x, y), rtol=1e-5, atol=1e-6)


def test_a_text_network_without_writing_gradients_down(monkeypatch: pytest.MonkeyPatch) -> None:
    torch.manual_seed(0)
    config = {"model_type": "bert", "vocab_size": 30, "hidden_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 24}
    module = Transformer("AutoModelForSequenceClassification", {**config, "num_labels": 3, "max_position_embeddings": 12})
    tokens = {"input_ids": torch.randint(1, 30, (6, 7)), "attention_mask": torch.ones(6, 7, dtype=torch.long)}
    tokens["attention_mask"][3, 4:] = 0
    y = torch.randint(0, 3, (6,))
    monkeypatch.setattr(gradients, "_written_down", lambda *_: pytest.fail("a gradient was written down"))
    torch.testing.assert_close(gradient_norms(module, tokens, y), plain(module, tokens, y), rtol=1e-5, atol=1e-6)


def test_only_what_is_trained_counts() -> None:
    torch.manual_seed(0)
    module = nn.Sequential(nn.Linear(5, 6), nn.ReLU(), nn.Linear(6, 3))
    x, y = torch.randn(8, 5), torch.randint(0, 3, (8,))
    whole = gradient_norms(module, x, y)
    module[0].requires_grad_(False)
    head = gradient_norms(module, x, y)
    torch.testing.assert_close(head, gradient_norms(module[2], module[:2](x), y))
    assert (whole > head).all()
    module[2].weight.requires_grad_(False)
    error = module(x).softmax(1) - nn.functional.one_hot(y, 3)
    torch.testing.assert_close(gradient_norms(module, x, y), error.norm(dim=1))


def test_neither_batches_nor_order_matter() -> None:
    torch.manual_seed(0)
    module, x, y = settled(CONVOLUTIONS()), torch.randn(11, 4, 9, 11), torch.randint(0, 3, (11,))
    whole = gradient_norms(module, x, y)
    parts = torch.cat([gradient_norms(module, a, b) for a, b in zip(x.split(4), y.split(4), strict=True)])
    order = torch.randperm(11)
    torch.testing.assert_close(whole, parts, rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(whole[order], gradient_norms(module, x[order], y[order]), rtol=1e-5, atol=1e-6)


def test_large_batches_are_taken_in_pieces(monkeypatch: pytest.MonkeyPatch) -> None:
    torch.manual_seed(0)
    x, y = torch.randn(8, 4, 9, 11), torch.randint(0, 3, (8,))
    module = settled(CONVOLUTIONS())
    whole = gradient_norms(module, x, y)
    monkeypatch.setattr(gradients, "ELEMENTS", 2000)
    torch.testing.assert_close(gradient_norms(module, x, y), whole, rtol=1e-5, atol=1e-6)


def test_another_loss() -> None:
    torch.manual_seed(0)
    x, y = torch.randn(8, 5), torch.randn(8, 2)
    found = gradient_norms(nn.Linear(5, 2), x, y, lambda out, target: (out - target).square().sum(1))
    assert found.shape == (8,)
    module = nn.Linear(5, 2)
    norms = gradient_norms(module, x, y, lambda out, target: (out - target).square().sum(1))
    torch.testing.assert_close(norms, 2 * (module(x) - y).norm(dim=1) * (x.square().sum(1) + 1).sqrt())


def test_nothing_is_left_changed() -> None:
    torch.manual_seed(0)
    module = nn.Sequential(CONVOLUTIONS(), nn.Dropout(0.5)).train()
    module[0][1].eval()
    modes = [part.training for part in module.modules()]
    module(torch.randn(2, 4, 9, 11)).sum().backward()
    grads = [p.grad.clone() for p in module.parameters()]
    state, drawn = {key: value.clone() for key, value in module.state_dict().items()}, torch.get_rng_state()
    with torch.no_grad():
        found = gradient_norms(module, torch.zeros(3, 4, 9, 11), torch.tensor([0, 1, 2]))
    assert not found.requires_grad
    assert [part.training for part in module.modules()] == modes
    assert all(torch.equal(p.grad, before) for p, before in zip(module.parameters(), grads, strict=True))
    assert all(torch.equal(value, state[key]) for key, value in module.state_dict().items())
    assert torch.equal(torch.get_rng_state(), drawn)
