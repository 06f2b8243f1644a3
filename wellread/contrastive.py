"""Learning that pairs belong together: in-batch and queued negatives, momentum encoders, large batches on small memory.

Vectors are [B, d]; row i of the queries belongs to row i of the documents. `same` marks pairs that must not be pushed apart (two passages of
one page, the same chunk drawn twice). Under several processes the documents of all of them are everyone's negatives: see `gathered`.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import torch
import torch.distributed
from torch import Tensor, nn
from torch.distributed.nn.functional import all_gather
from torch.nn import functional as F
from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn
from torch.utils.checkpoint import checkpoint

AT_ONCE = 64  # texts that are encoded together in training; larger batches go in parts and cost no more memory


def in_batch(
    queries: Tensor, documents: Tensor, *, temperature: float = 0.05, cosine: bool = True, same: Tensor | None = None, first: int = 0
) -> Tensor:
    """Mean cross-entropy of finding, for each query, its own document among all: softmax of the scores / temperature.

    queries: [B, d]. documents: [N, d], N >= B; the one of query i is row `first` + i, further rows (hard negatives, other processes) are
    negatives only. same: bool [B, N], true where a document must not count as a negative of a query; the own one always counts.
    With cosine the vectors are brought to length 1 first. The scalar is 0 for one document and log N for equal ones.
    """
    if cosine:
        queries, documents = F.normalize(queries, dim=-1), F.normalize(documents, dim=-1)
    scores = _full(queries @ documents.T) / temperature
    own = torch.arange(first, first + len(queries), device=scores.device)
    if same is not None:
        scores = scores.masked_fill(same & (torch.arange(scores.shape[1], device=scores.device) != own[:, None]), -torch.inf)
    return F.cross_entropy(scores, own)


def against_queue(
    queries: Tensor, keys: Tensor, queue: Queue, owners: Tensor, *, temperature: float = 0.05, cosine: bool = True
) -> Tensor:
    """Mean cross-entropy of the own key among it and all keys of the queue that are not of the same owner (He et al. 2020, eq. 1).

    queries, keys: [B, d]; the gradient of the keys, where they have one, is that of the own key. owners: int64 [B], what each pair was drawn from.
    """
    held, whose = queue.held()
    if cosine:
        queries, keys, held = (F.normalize(each, dim=-1) for each in (queries, keys, held))
    positive = (queries * keys).sum(1, keepdim=True)
    negative = (queries @ held.T).masked_fill(owners[:, None] == whose[None], -torch.inf)
    scores = _full(torch.cat([positive, negative], 1)) / temperature
    return F.cross_entropy(scores, torch.zeros(len(scores), dtype=torch.int64, device=scores.device))


def _full(scores: Tensor) -> Tensor:
    """In at least float32: a softmax over thousands of bfloat16 scores is none."""
    return scores.to(torch.promote_types(scores.dtype, torch.float32))


class Queue(nn.Module):
    """The last `size` keys and what they were drawn from, oldest overwritten first. In buffers, so that a resumed training has them."""

    vectors: Tensor
    owners: Tensor
    seen: Tensor

    def __init__(self, size: int, width: int) -> None:
        super().__init__()
        self.register_buffer("vectors", torch.zeros(size, width))
        self.register_buffer("owners", torch.zeros(size, dtype=torch.int64))
        self.register_buffer("seen", torch.zeros((), dtype=torch.int64))

    def put(self, keys: Tensor, owners: Tensor) -> None:
        """keys: [B, d], owners: int64 [B]; of more keys than there is room for, the last ones stay."""
        size, start = len(self.vectors), int(self.seen)
        keys, owners = keys.detach()[-size:], owners[-size:]
        places = (start + torch.arange(len(keys), device=keys.device)) % size
        self.vectors[places], self.owners[places] = keys.to(self.vectors), owners
        self.seen += len(keys)

    def held(self) -> tuple[Tensor, Tensor]:
        """Keys [n, d] and owners [n] that were put in so far."""
        filled = min(int(self.seen), len(self.vectors))
        return self.vectors[:filled].clone(), self.owners[:filled].clone()  # the next put must not change what a graph holds


def momentum_copy(module: nn.Module, momentum: float) -> AveragedModel:
    """A copy that follows `module` at each `update_parameters(module)`: old * momentum + new * (1 - momentum), buffers too. Needs no gradient."""
    copy = AveragedModel(module, multi_avg_fn=get_ema_multi_avg_fn(momentum), use_buffers=True)
    copy.update_parameters(module)  # the first call copies
    return copy.requires_grad_(False)


def in_chunks(encode: Callable[[Any], Tensor], inputs: Tensor | Mapping[str, Tensor], size: int | None = None) -> Tensor:
    """`encode(inputs)` [B, d] in chunks of `size` rows (None: 64), each computed again in the backward pass.

    Gradients are those of the whole batch, memory is that of one chunk: how a large batch of negatives fits (Gao et al. 2021, arXiv 2101.06983).
    """

    size = size or AT_ONCE

    def part(start: int) -> Any:
        if isinstance(inputs, Mapping):
            return {name: each[start : start + size] for name, each in inputs.items()}
        return inputs[start : start + size]

    rows = len(next(iter(inputs.values())) if isinstance(inputs, Mapping) else inputs)
    if rows <= size or not torch.is_grad_enabled():
        return torch.cat([encode(part(start)) for start in range(0, rows, size)])
    return torch.cat([checkpoint(encode, part(start), use_reentrant=False) for start in range(0, rows, size)])


def gathered(vectors: Tensor) -> tuple[Tensor, int]:
    """The rows of all processes [N, d], with gradient, and the place of the first own one; `vectors` and 0 when there is one process.

    The loss over own queries and all documents, averaged over the processes as `fit` does, is then that of one process with the whole batch.
    Every process must take part in every step: give `fit` batches with `drop_last`.
    """
    if not (torch.distributed.is_available() and torch.distributed.is_initialized() and torch.distributed.get_world_size() > 1):
        return vectors, 0
    rank, counts = torch.distributed.get_rank(), torch.zeros(torch.distributed.get_world_size(), dtype=torch.int64, device=vectors.device)
    torch.distributed.all_gather_into_tensor(counts, torch.tensor([len(vectors)], device=vectors.device))
    rows = counts.tolist()  # a batch need not be shared evenly
    parts = all_gather(F.pad(vectors, (0, 0, 0, max(rows) - len(vectors))))
    return torch.cat([part[:count] for part, count in zip(parts, rows, strict=True)]), sum(rows[:rank])
