"""Contrastive losses, the queue, chunks and processes: closed forms, and agreement with sentence-transformers and with one process."""

from __future__ import annotations

import math
import os
import subprocess
import sys
import textwrap
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from wellread.batches import tensor_batches
from wellread.contrastive import Queue, against_queue, gathered, in_batch, in_chunks, momentum_copy
from wellread.runtime import using
from wellread.train import fit


def vectors(rows: int, seed: int = 0, width: int = 5) -> Tensor:
    return torch.randn(rows, width, generator=torch.Generator().manual_seed(seed))


# Losses


def test_one_document_costs_nothing_and_equal_ones_the_logarithm():
    assert in_batch(vectors(1), vectors(1, 1)) == 0
    assert in_batch(vectors(4), vectors(1, 1).expand(4, -1)).item() == pytest.approx(math.log(4), rel=1e-6)


def test_the_gradient_is_softmax_minus_one_hot():
    queries, documents = vectors(3).requires_grad_(), torch.eye(5)[:3]
    in_batch(queries, documents, temperature=1.0, cosine=False).backward()
    expected = (queries.detach()[:, :3].softmax(1) - torch.eye(3)) / 3
    torch.testing.assert_close(queries.grad[:, :3], expected)


def test_it_agrees_with_sentence_transformers():
    losses = pytest.importorskip("sentence_transformers.sentence_transformer.losses")
    theirs = losses.MultipleNegativesRankingLoss(model=None, scale=20.0)
    first, second = vectors(6), vectors(6, 1)
    found = theirs.compute_loss_from_embeddings([first, second], None)
    assert in_batch(first, second, temperature=0.05).item() == pytest.approx(found.item(), rel=1e-6)


def test_rows_after_the_own_ones_are_negatives_and_the_same_source_is_none():
    queries, documents = vectors(2), vectors(4, 1)
    scores = F.normalize(queries, dim=-1) @ F.normalize(documents, dim=-1).T / 0.05
    assert in_batch(queries, documents).item() == pytest.approx(F.cross_entropy(scores, torch.tensor([0, 1])).item(), rel=1e-5)
    assert in_batch(queries, documents, first=2).item() == pytest.approx(F.cross_entropy(scores, torch.tensor([2, 3])).item(), rel=1e-5)
    same = torch.tensor([[True, False, True, True], [True, True, True, True]])
    expected = (scores[0, [0, 1]].logsumexp(0) - scores[0, 0]) / 2  # the second query has no negative left
    assert in_batch(queries, documents, same=same).item() == pytest.approx(expected.item(), rel=1e-5)


# The queue


def test_the_queue_overwrites_the_oldest_and_wraps():
    queue = Queue(5, 2)
    assert queue.held()[0].shape == (0, 2)
    for start in range(0, 8, 2):
        queue.put(torch.full((2, 2), float(start)), torch.tensor([start, start + 1]))
    held, owners = queue.held()
    assert sorted(owners.tolist()) == [3, 4, 5, 6, 7] and sorted(held[:, 0].tolist()) == [2, 4, 4, 6, 6]
    queue.put(torch.arange(14.0).reshape(7, 2), torch.arange(7))
    assert sorted(queue.held()[1].tolist()) == [2, 3, 4, 5, 6]


def test_the_queue_gives_the_loss_of_the_rows_in_it():
    queries, keys, others = vectors(3), vectors(3, 1), vectors(6, 2)
    queue = Queue(10, 5)
    queue.put(others, torch.tensor([10, 11, 12, 13, 0, 0]))
    found = against_queue(queries, keys, queue, torch.tensor([0, 1, 2]), temperature=0.5, cosine=False)
    terms = []
    for row, negatives in enumerate((others[:4], others, others)):  # the last two keys are of the same owner as the first query
        scores = torch.stack([queries[row] @ keys[row], *(negatives @ queries[row])]) / 0.5
        terms.append(scores.logsumexp(0) - scores[0])
    assert found.item() == pytest.approx(torch.stack(terms).mean().item(), rel=1e-5)


def test_a_put_does_not_spoil_a_graph():
    queries, queue = vectors(2).requires_grad_(), Queue(2, 5)
    queue.put(vectors(2, 1), torch.tensor([5, 6]))
    loss = against_queue(queries, vectors(2, 2), queue, torch.tensor([0, 1]))
    queue.put(vectors(2, 3), torch.tensor([7, 8]))
    loss.backward()
    assert torch.isfinite(queries.grad).all()


def test_the_momentum_copy_moves_by_one_minus_m_to_the_n():
    module = nn.Linear(2, 1)
    with torch.no_grad():
        module.weight.fill_(0.0)
    copy = momentum_copy(module, 0.9)
    with torch.no_grad():
        module.weight.fill_(1.0)
    for _ in range(7):
        copy.update_parameters(module)
    assert copy.module.weight[0, 0].item() == pytest.approx(1 - 0.9**7, rel=1e-5)
    assert not any(parameter.requires_grad for parameter in copy.parameters())


# Chunks


@pytest.mark.parametrize("size", [1, 3, 100])
def test_chunks_have_the_gradient_of_the_whole_and_keep_one_chunk(size: int):
    seen: list[int] = []

    def loss(module: nn.Module, rows: int) -> Tensor:
        def encode(part: dict[str, Tensor]) -> Tensor:
            seen.append(len(part["x"]))
            return module(part["x"] * part["mask"])

        first, second = ({"x": vectors(8, seed).double(), "mask": torch.ones(8, 1)} for seed in (0, 1))
        return in_batch(in_chunks(encode, first, rows), in_chunks(encode, second, rows))

    module = nn.Sequential(nn.Linear(5, 7), nn.Tanh(), nn.Linear(7, 4)).double()
    expected = torch.autograd.grad(loss(module, 8), list(module.parameters()))
    seen.clear()
    found = torch.autograd.grad(loss(module, size), list(module.parameters()))
    assert max(seen) == min(size, 8) and len(seen) == (2 if size > 8 else 4 * math.ceil(8 / size))  # forward, and again in backward
    for mine, right in zip(found, expected, strict=True):
        torch.testing.assert_close(mine, right, rtol=1e-9, atol=1e-12)


def test_dropout_is_the_same_when_a_chunk_is_computed_again():
    module = nn.Sequential(nn.Linear(5, 50), nn.Dropout(0.5), nn.Linear(50, 1))
    torch.manual_seed(0)
    out = in_chunks(module, vectors(6), 2)
    kept = torch.autograd.grad(out.sum(), module[2].bias, retain_graph=False)[0]
    assert kept.item() == 6.0
    torch.manual_seed(0)
    again = torch.cat([module(part) for part in vectors(6).split(2)])
    torch.testing.assert_close(out, again)


# Processes


def trained() -> tuple[dict[str, Tensor], list[float]]:
    """Pairs learned in batches of 6, by which the two processes get three rows each; the documents of both are negatives."""
    torch.manual_seed(0)
    module = nn.Sequential(nn.Linear(5, 4), nn.Tanh(), nn.Linear(4, 3))
    batches = tensor_batches({"inputs": torch.cat([vectors(20), vectors(20, 1)], 1)}, batch_size=7, shuffle=True, drop_last=True)

    def step(given: nn.Module, batch: dict) -> Tensor:
        first, second = batch["inputs"].chunk(2, dim=1)
        documents, place = gathered(given(second))
        return in_batch(given(first), documents, first=place, temperature=0.5)

    history = fit(module, batches, step, epochs=2, learning_rate=0.5, optimizer="sgd")
    return {name: tensor.clone() for name, tensor in module.state_dict().items()}, history.loss


PROCESSES = """
    import sys
    sys.path.insert(0, {tests!r})
    import torch
    import accelerate
    from test_contrastive import trained
    from wellread.runtime import using
    with using(progress=False, device="cpu"):
        found = trained()
    torch.save(found, sys.argv[1] + "/" + str(accelerate.PartialState().process_index) + ".pt")
"""


def test_two_processes_learn_from_the_negatives_of_both(tmp_path: Path):
    script = tmp_path / "processes.py"
    script.write_text(textwrap.dedent(PROCESSES).format(tests=str(Path(__file__).parent)))
    command = [sys.executable, "-m", "accelerate.commands.launch", "--multi_gpu", "--num_processes", "2", "--main_process_port", "0"]
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    child = subprocess.run(
        [*command, str(script), str(tmp_path)], capture_output=True, text=True, timeout=200, cwd=Path(__file__).parents[1], env=environment
    )
    assert child.returncode == 0, child.stderr[-3000:]
    with using(progress=False, device="cpu"):
        weights, losses = trained()
    for rank in (0, 1):
        theirs, found = torch.load(tmp_path / f"{rank}.pt")
        np.testing.assert_allclose(found, losses, rtol=1e-5)
        for name, tensor in weights.items():
            torch.testing.assert_close(theirs[name], tensor, rtol=1e-5, atol=1e-6)
