"""Word weights of texts by an encoder: a vocabulary head that is saved with it, and search by its vectors and its words at once.

A sentence encoder gives one vector [d] of a text. With a `Lexicon` it also gives a weight to every word of its vocabulary, most of them left out:
a sparse vector [V] whose columns are the tokenizer's words (Formal et al. 2021, arXiv 2107.05720; Xiao et al. 2023, arXiv 2305.02564).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np
import torch
from datasets import Dataset
from scipy.sparse import csr_matrix, vstack
from torch import Tensor, nn
from torch.nn import functional as F

from wellread import runtime
from wellread.batches import Batches
from wellread.errors import BadInput
from wellread.features import running, to_device
from wellread.index import whole_text
from wellread.masked import NOTHING, TiedHead, hidden_states, transformer_of, word_numbers, word_table
from wellread.method import sentence_input
from wellread.network import Network
from wellread.ranking import Run
from wellread.structure import class_name, layer_of
from wellread.train import History, fit

Values = Literal["raw", "log"]


def max_pooled(logits: Tensor, real: Tensor) -> Tensor:
    """[B, U]: the highest of the logits [B, T, U] over the places that `real`, bool [B, T], marks; minus infinity where it marks none."""
    return logits.masked_fill(~real[..., None], -torch.inf).amax(1)


class Lexicon(nn.Module):
    """A vocabulary head that stands where the encoder's vector passes and lets it through, so that it is saved and loaded with the encoder.

    kept: bool [V], the words that the lexical vector may hold.
    """

    kept: Tensor

    def __init__(self, width: int, vocabulary: int, table_width: int | None = None) -> None:
        super().__init__()
        self.guess = TiedHead(width, vocabulary, table_width)
        self.register_buffer("kept", torch.ones(vocabulary, dtype=torch.bool))

    def forward(self, vector: Tensor) -> Tensor:
        """[B, d], unchanged."""
        return vector

    def logits(self, states: Tensor, table: Tensor, words: Tensor) -> Tensor:
        """[..., U] for the words [U] of the table [V, E], from states [..., C]: what TiedHead gives, for some of the words."""
        return F.linear(self.guess.beside(states), table[words], self.guess.bias[words])


def lexicon_of(network: Network | nn.Module) -> Lexicon:
    """The vocabulary head that was trained with an encoder. Raises `BadInput` when there is none."""
    module = network.module if isinstance(network, Network) else network
    found = next((part for part in module.modules() if isinstance(part, Lexicon)), None)
    if found is None:
        raise BadInput("this encoder has no vocabulary head, so it gives no word weights: make one with dupmae")
    return found


def trained_head(name: str, width: int, vocabulary: int) -> TiedHead:
    """The vocabulary head of a masked language model of transformers: a folder, or hf/NAME. Raises `BadInput` when it has none that fits."""
    from transformers import AutoModelForMaskedLM

    try:
        state = AutoModelForMaskedLM.from_pretrained(name.removeprefix("hf/"), dtype=torch.float32).state_dict()
    except (OSError, ValueError) as failed:
        raise BadInput(f"vocabulary_head {name!r} cannot be opened as a masked language model ({str(failed)[:120].strip()})") from None
    for dense, norm, bias in (
        ("cls.predictions.transform.dense", "cls.predictions.transform.LayerNorm", "cls.predictions.bias"),  # BERT
        ("lm_head.dense", "lm_head.layer_norm", "lm_head.bias"),  # RoBERTa, MPNet
        ("vocab_transform", "vocab_layer_norm", "vocab_projector.bias"),  # DistilBERT
    ):
        if bias in state and state[bias].shape == (vocabulary,) and state[f"{dense}.weight"].shape == (width, width):
            head = TiedHead(width, vocabulary)
            parts = {"dense.": dense, "norm.": norm}
            head.load_state_dict({"bias": state[bias]} | {mine + kind: state[f"{its}.{kind}"] for mine, its in parts.items() for kind in ("weight", "bias")})
            return head
    raise BadInput(f"vocabulary_head {name!r} has no head of {vocabulary} words on vectors of {width}: give the masked language model that the encoder comes from")


def with_lexicon(encoder: Network, head: TiedHead | None = None) -> Network:
    """A copy that carries a vocabulary head: `head`, or the one it has from before, or a new one. Raises `BadInput` for an encoder that cannot."""
    inner, table, path = transformer_of(encoder.module), word_table(encoder.module), encoder.head or ""
    there = layer_of(encoder.module, path)
    if isinstance(there, Lexicon):
        result = encoder.copy()
    elif path and isinstance(there, nn.Identity):
        arguments = {"width": inner.config.hidden_size, "vocabulary": len(table), "table_width": table.shape[1]}
        result = encoder.edited({"edit": "new_head", "layer": path, "part": class_name(Lexicon), "arguments": arguments})
    else:
        raise BadInput(f"the sentence vector of this encoder passes a head of its own ({type(there).__name__}): give the encoder without it")
    if head is not None:
        lexicon_of(result).guess.load_state_dict(head.state_dict())
    return result


def warm_up(network: Network, batches: Batches, words: Tensor, *, learning_rate: float = 1e-3, seed: int = 0) -> History:
    """Train the vocabulary head alone, in place, to guess hidden words from the states of an encoder that stays as it is.

    batches: {"masked": token tensors [B, T], "labels": int64 [B, T]} as `masked.masked` gives them. words: int64 [U], ascending, what is guessed from.
    """
    lexicon = lexicon_of(network)

    def step(module: nn.Module, batch: dict[str, Any]) -> Tensor:
        hidden = batch["labels"] != NOTHING
        logits = lexicon.logits(hidden_states(module, batch["masked"])[hidden], word_table(module), words.to(hidden.device))
        return F.cross_entropy(logits, torch.searchsorted(words.to(hidden.device), batch["labels"][hidden]))

    return fit(network.module, batches, step, epochs=1, learning_rate=learning_rate, parameters=list(lexicon.parameters()), seed=seed, name="vocabulary head")


def speakable(tokenizer: Any, words: Tensor, size: int) -> Tensor:
    """bool [size]: those of `words` that mean something: no special tokens and no places left free in the vocabulary ([unused7])."""
    kept = torch.zeros(size, dtype=torch.bool)
    kept[words[words < len(tokenizer)]] = True
    kept[[each for each in tokenizer.all_special_ids if each < size]] = False
    kept[[number for token, number in tokenizer.get_vocab().items() if token.startswith(("[unused", "<unused")) and number < size]] = False
    return kept


# --- the two parts of a search


@dataclass(frozen=True)
class Joint:
    """Texts as vectors of meaning, float32 [N, d], and of words, sparse [N, V]."""

    dense: np.ndarray
    lexical: csr_matrix


def both_parts(module: nn.Module, tokens: dict[str, Tensor], tokenizer: Any, values: Values = "raw") -> tuple[Tensor, Tensor]:
    """The encoder's vectors [B, d] and word weights [B, U] for the U words that its lexicon keeps, with gradient: to train both on pairs.

    A word weighs the highest logit that any token of the text gives it ("raw"), or log(1 + that, at least 0) as in SPLADE ("log"). Special tokens
    give none; the text is read as it is, nothing hidden.
    """
    lexicon, caught = lexicon_of(module), []
    hook = transformer_of(module).register_forward_hook(lambda *call: caught.append(call[2].last_hidden_state))
    try:
        dense = module(**tokens)
    finally:
        hook.remove()
    logits = lexicon.logits(caught[-1], word_table(module), lexicon.kept.nonzero()[:, 0])
    pooled = max_pooled(logits, word_numbers(tokens["input_ids"], tokenizer) > 0)
    pooled = pooled.masked_fill(pooled == -torch.inf, 0.0)
    return dense, pooled if values == "raw" else pooled.relu().log1p()


def top(weights: Tensor, k: int) -> tuple[Tensor, Tensor]:
    """The `k` highest of [B, U] and their columns, [B, min(k, U)] each; of equal ones the first columns."""
    found, column = weights.sort(dim=1, descending=True, stable=True)
    return found[:, :k], column[:, :k]


def joint(network: Network, texts: Sequence[str], *, k: int = 260, values: Values = "raw", unit: bool = True, batch_size: int = 64) -> Joint:
    """Both parts of texts (titles and texts as `index.whole_text` joins them).

    k: so many word weights are kept of each text, the highest ones. unit: bring each part to length 1, so that neither drowns the other.
    """
    if k < 1:
        raise BadInput(f"k is {k}: keep at least 1 word of each text")
    source, lexicon, device = sentence_input(network), lexicon_of(network), runtime.device()
    words, size, order = lexicon.kept.nonzero()[:, 0].cpu().numpy(), len(lexicon.kept), np.argsort([-len(text) for text in texts], kind="stable")
    dense, lexical = [], []
    with running(network, device), torch.inference_mode(), runtime.autocast(device):
        for start in range(0, len(order), batch_size):
            tokens = to_device(source([texts[row] for row in order[start : start + batch_size]]), device)
            vectors, weights = both_parts(network.module, tokens, source.tokenizer, values)
            found, column = (each.cpu().numpy() for each in top(weights.float(), k))
            rows = np.repeat(np.arange(len(found)), found.shape[1])
            lexical.append(csr_matrix((found.ravel(), (rows, words[column].ravel())), (len(found), size)))
            dense.append(vectors.float().cpu().numpy())
    back = np.argsort(order)
    one, two = np.concatenate(dense)[back], csr_matrix(vstack(lexical))[back]
    if unit:
        one = one / np.linalg.norm(one, axis=1, keepdims=True).clip(1e-12)
        length = np.sqrt(np.asarray(two.multiply(two).sum(1)).ravel()).clip(1e-12)
        two = csr_matrix(two.multiply(1 / length[:, None]))
    two.eliminate_zeros()
    return Joint(one.astype(np.float32), two)


def lexical(network: Network, texts: Sequence[str], *, k: int = 260, values: Values = "raw", unit: bool = True) -> csr_matrix:
    """The word weights of texts alone, sparse [N, V], columns as the tokenizer numbers its words; see `joint`."""
    return joint(network, texts, k=k, values=values, unit=unit).lexical


def joint_scores(queries: Joint, documents: Joint) -> np.ndarray:
    """float [Q, N]: the dot product of the vectors of meaning plus that of the word weights."""
    return queries.dense @ documents.dense.T + (queries.lexical @ documents.lexical.T).toarray()


def ranked_by_parts(network: Network, queries: Dataset, texts: Dataset, **settings: Any) -> dict[str, Run]:
    """A run (query id to document id to score) by each part and by both. Tables with id and text, perhaps title; settings as `joint` takes them."""
    titles = texts["title"] if "title" in texts.column_names else [""] * len(texts)
    asked = joint(network, queries["text"], **settings)
    held = joint(network, [whole_text(title or "", text or "") for title, text in zip(titles, texts["text"], strict=True)], **settings)
    scores = {"dense": asked.dense @ held.dense.T, "lexical": (asked.lexical @ held.lexical.T).toarray(), "joint": joint_scores(asked, held)}
    names = texts["id"]
    return {part: {query: dict(zip(names, row.tolist(), strict=True)) for query, row in zip(queries["id"], each, strict=True)} for part, each in scores.items()}
