"""Bring the languages of a sentence encoder together without translations: per language a shift, a scale and, when it helps, a rotation.

An encoder that saw several languages keeps each in a corner of its own. Subtracting each language's mean often brings most of what can be had; the
statistics come from any sentences of the languages, and no sentence needs a translation. They are a layer of the network and saved with it.
Vectors are rows: [n, d].
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, Literal, NamedTuple

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from wellread import structure
from wellread.errors import BadInput
from wellread.method import sentence_input
from wellread.network import Network
from wellread.results import Report

Level = Literal["shift", "scale", "rotate"]

FEWEST = 20  # sentences of a language, below which its mean is noise
DEAD = 1e-8  # a dimension with less than this share of the mean variance says nothing, and dividing by its deviation would blow up rounding errors
MOST = 4000  # sentences of a language that a rotation is looked for in: all pairs of them are compared

# --- statistics of one language


def statistics(x: Tensor, *, scale: bool = True, shrink: float = 100.0) -> tuple[Tensor, Tensor]:
    """Mean [d] and factor [d] of vectors x [n, d], such that (x - mean) * factor has mean 0 and, with shrink 0, variance 1 in each dimension.

    shrink: the variance is (n * variance + shrink * mean variance) / (n + shrink). Dead dimensions get the factor 0. Without `scale` the others get 1.
    """
    x = x.double()
    mean, variance = x.mean(0), x.var(0, correction=0)
    dead = variance <= DEAD * variance.mean()
    typical = variance[~dead].mean() if not dead.all() else variance.new_ones(())
    variance = (len(x) * variance + shrink * typical) / (len(x) + shrink) if scale else torch.ones_like(variance)
    return mean, torch.where(dead, 0.0, variance.rsqrt())


# --- a rotation without a dictionary


def csls(x: Tensor, y: Tensor, neighbours: int = 10) -> Tensor:
    """Cross-domain similarity local scaling [n, m]: twice the cosine, less the mean cosine of each vector to its nearest ones on the other side.

    x: [n, d], y: [m, d]. A vector that is near to everything (a hub) is nobody's neighbour by that alone (Conneau et al. 2018, arXiv 1710.04087, eq. 4).
    """
    cosine = F.normalize(x, dim=1) @ F.normalize(y, dim=1).T
    nearest = min(neighbours, *cosine.shape)
    return 2 * cosine - cosine.topk(nearest, 1).values.mean(1)[:, None] - cosine.topk(nearest, 0).values.mean(0)[None]


def mutual(x: Tensor, y: Tensor) -> Tensor:
    """int64 [2, pairs]: rows of x [n, d] and y [m, d] that are each other's nearest by `csls`."""
    scores = csls(x, y)
    forth, back = scores.argmax(1), scores.argmax(0)
    rows = torch.arange(len(x), device=x.device)
    both = back[forth] == rows
    return torch.stack([rows[both], forth[both]])


def procrustes(x: Tensor, y: Tensor, pull: float = 0.0) -> Tensor:
    """The rotation R [d, d] with the least ||x R - y||: U V^T of x^T y, plus `pull` times its mean diagonal's size times the identity.

    x, y: [n, d], row i belongs to row i. With few pairs a free rotation fits their noise; pull holds it at the identity.
    """
    cross = x.double().T @ y.double()
    held = pull * cross.diagonal().abs().mean() * torch.eye(len(cross), dtype=cross.dtype, device=cross.device)
    u, _, vt = torch.linalg.svd(cross + held)
    return u @ vt


def rotation(x: Tensor, y: Tensor, *, rounds: int = 10, pull: float = 10.0) -> Tensor:
    """The rotation R [d, d] of x [n, d] towards y [m, d], from pairs that are mutual neighbours, found anew in each round."""
    x, y = F.normalize(x.double(), dim=1), F.normalize(y.double(), dim=1)
    found = torch.eye(x.shape[1], dtype=x.dtype, device=x.device)
    for _ in range(rounds):
        left, right = mutual(x @ found, y)
        found = procrustes(x[left], y[right], pull)
    return found


class Verdict(NamedTuple):
    """Whether a rotation is used, and why.

    before, after: of held-out sentences without translations, the share that has a mutual neighbour in the pivot. agreement: mean cosine of
    held-out vectors turned by the rotations of one half of the sentences and of the other.
    """

    used: bool
    before: float
    after: float
    agreement: float


def judged(x: Tensor, y: Tensor, held_x: Tensor, held_y: Tensor, *, rounds: int = 10, pull: float = 10.0) -> tuple[Tensor, Verdict]:
    """A rotation [d, d] of x [n, d] towards y [m, d] and whether it is to be trusted, from held_x [k, d] and held_y [l, d].

    It must raise the share of mutual neighbours and be found again (agreement 0.9) from each half of the sentences. The share alone does not do: a free
    rotation that fits noise raises it too.
    """
    found = rotation(x, y, rounds=rounds, pull=pull)
    first, second = (rotation(x[half::2], y[half::2], rounds=rounds, pull=pull) for half in (0, 1))
    agreement = float(F.cosine_similarity(held_x @ first, held_x @ second).mean())
    before, after = (mutual(each, held_y).shape[1] / min(len(held_x), len(held_y)) for each in (held_x, held_x @ found))
    return found, Verdict(after > before and agreement >= 0.9, before, after, agreement)


# --- the layer


class Calibration(nn.Module):
    """Sentence vectors [B, d] to vectors of one common space [B, d], to be compared by cosine: ((x - mean) * factor) R of the vector's language.

    The language of a vector is that whose mean is nearest, or `language` for all of them.
    sentences, source: how many sentences of each language, and of what, the statistics come from. rotated: the languages that have a rotation.
    """

    keeps_dtype = True
    mean: Tensor
    factor: Tensor
    rotation: Tensor

    def __init__(
        self, width: int, languages: list[str], sentences: list[int], source: str = "", rotated: Sequence[str] = (), language: str | None = None
    ) -> None:
        super().__init__()
        self.arguments: dict[str, Any] = {
            "width": width, "languages": list(languages), "sentences": list(sentences), "source": source, "rotated": list(rotated), "language": language,
        }  # fmt: skip
        self.languages, self.language = list(languages), language
        self.turned = [self.languages.index(each) for each in rotated]
        self.register_buffer("mean", torch.zeros(len(languages), width))
        self.register_buffer("factor", torch.ones(len(languages), width))
        self.register_buffer("rotation", torch.eye(width).repeat(len(self.turned), 1, 1))

    def recognise(self, x: Tensor) -> Tensor:
        """int64 [B]: the language of vectors [B, d], by number."""
        if self.language is not None:
            return torch.full((len(x),), self.languages.index(self.language), device=x.device)
        return (x.float() @ self.mean.T - self.mean.square().sum(1) / 2).argmax(1)

    def forward(self, x: Tensor) -> Tensor:
        which = self.recognise(x)
        out = (x.float() - self.mean[which]) * self.factor[which]
        for number, turn in zip(self.turned, self.rotation, strict=True):
            out = torch.where((which == number)[:, None], out @ turn, out)
        return out.to(x.dtype)


class Calibrated(nn.Module):
    """An encoder that ends with a layer of its own, and a `Calibration` after it."""

    def __init__(self, encoder: nn.Module, **arguments: Any) -> None:
        super().__init__()
        self.encoder, self.head = encoder, Calibration(**arguments)

    def forward(self, **tokens: Tensor) -> Tensor:
        return self.head(self.encoder(**tokens))


PART = structure.class_name(Calibration)


def _layer(network: Network) -> Calibration | None:
    found = structure.layer_of(network.module, network.head) if network.head else None
    return found if isinstance(found, Calibration) else None


def _ending(network: Network, layer: Calibration) -> Network:
    """A copy of `network` that ends with a copy of `layer`."""
    last = structure.layer_of(network.module, network.head) if network.head else None
    if isinstance(last, nn.Identity | Calibration):
        other = network.edited({"edit": "new_head", "layer": network.head, "part": PART, "arguments": layer.arguments})
    else:
        other = network.edited({"edit": "wrap", "part": structure.class_name(Calibrated), "arguments": layer.arguments}, head="head")
    structure.layer_of(other.module, other.head or "").load_state_dict(layer.state_dict())
    return other


def uncalibrated(network: Network) -> Network:
    """The encoder without its calibration; itself when it has none."""
    if _layer(network) is None:
        return network
    return network.edited({"edit": "new_head", "layer": network.head, "part": "torch.nn:Identity", "arguments": {}})


def for_language(network: Network, language: str) -> Network:
    """A calibrated encoder for texts of one language, which is then not guessed.

    Its vectors can be compared with those of the same encoder for other languages. Raises `BadInput` for a language without statistics.
    """
    layer = _layer(network)
    if layer is None:
        raise BadInput("this network is not calibrated: calibrate it with sentences of each language first")
    if language not in layer.languages:
        raise BadInput(f"there are no statistics of the language {language!r}: choose {', '.join(layer.languages)}, or use uncalibrated(network) for it")
    chosen = Calibration(**{**layer.arguments, "language": language})
    chosen.load_state_dict(layer.state_dict())
    return _ending(network, chosen)


# --- from texts


def unknown(network: Network, texts: Sequence[str]) -> float:
    """The share of the tokens of these texts that the encoder's tokenizer has no word for."""
    tokenizer: Any = sentence_input(network).tokenizer
    found = tokenizer(list(texts), add_special_tokens=False, verbose=False)["input_ids"]
    return sum(each.count(tokenizer.unk_token_id) for each in found) / max(sum(map(len, found)), 1)


def check_known(network: Network, texts: Mapping[str, Sequence[str]]) -> dict[str, float]:
    """`unknown` of each language. Raises `BadInput` naming a language of which it is above a tenth."""
    shares = {language: unknown(network, some) for language, some in texts.items()}
    if wrong := {language: each for language, each in shares.items() if each > 0.1}:
        worst = max(wrong, key=lambda language: wrong[language])
        raise BadInput(
            f"the encoder's tokenizer does not know {wrong[worst]:.0%} of the tokens of {worst!r}: leave out {', '.join(map(repr, wrong))}, "
            "or take an encoder that was made for it"
        )
    return shares


def fitted(
    x: Mapping[str, Tensor], held: Mapping[str, Tensor], pivot: str, *, level: Level = "rotate", shrink: float = 100.0, pull: float = 10.0, source: str = ""
) -> tuple[Calibration, dict[str, Verdict]]:
    """The layer for vectors of each language, float64 [n, d], and what became of each rotation; held: others of each language, [k, d], to judge rotations on."""
    found = {language: statistics(each, scale=level != "shift", shrink=shrink) for language, each in x.items()}
    turns: dict[str, Tensor] = {}
    verdicts: dict[str, Verdict] = {}
    if level == "rotate" and len(held[pivot]):
        mine, theirs = (
            {language: (side[language][:MOST] - mean) * factor for language, (mean, factor) in found.items() if len(held[language])} for side in (x, held)
        )
        for language in [each for each in mine if each != pivot]:
            turn, verdicts[language] = judged(mine[language], mine[pivot], theirs[language], theirs[pivot], pull=pull)
            turns |= {language: turn} if verdicts[language].used else {}
    layer = Calibration(x[pivot].shape[1], list(x), [len(each) for each in x.values()], source, list(turns))
    layer.mean.copy_(torch.stack([mean for mean, _ in found.values()]))
    layer.factor.copy_(torch.stack([factor for _, factor in found.values()]))
    if turns:
        layer.rotation.copy_(torch.stack(list(turns.values())))
    return layer, verdicts


def calibrate(
    encoder: Network,
    texts: Mapping[str, Sequence[str]],
    *,
    held_out: Mapping[str, Sequence[str]] | None = None,
    level: Level = "rotate",
    pivot: str | None = None,
    shrink: float = 100.0,
    pull: float = 10.0,
    source: str = "",
    seed: int = 0,
) -> Network:
    """A copy of a sentence encoder whose languages lie on each other. Nothing is trained, no translation is needed.

    texts: sentences by language, of the same kind in each (all from manuals, all from news): else the kinds are what is taken apart.
    held_out: other sentences by language, to judge on; by default a fifth of the texts.
    level: shift (the mean of each language becomes 0), scale (also each variance 1), rotate (also a rotation to the pivot, where it proves itself).
    pivot: the language that others are rotated to; by default the one with the most sentences.
    shrink: so many sentences' weight has the mean variance in each variance.
    pull: how much a rotation is held at none, see `procrustes`.
    source: what the texts are, noted in the network.

    A text's language is guessed from its vector; `for_language` fixes it. `embed` still gives the vectors before calibration, `uncalibrated` the encoder
    without it. The report "calibration" says how often the guess is right on held-out sentences, and how well the language can be read off a vector before
    and after.
    Raises `BadInput` for a network that is no sentence encoder, fewer than 20 sentences of a language, an unknown pivot, and texts of a script that the
    tokenizer does not know.
    """
    sentence_input(encoder)
    if not (0 <= shrink < float("inf") and 0 <= pull < float("inf")):
        raise BadInput(f"shrink is {shrink} and pull {pull}: give numbers from 0 on")
    given = {language: list(dict.fromkeys(text.strip() for text in some if text.strip())) for language, some in texts.items()}
    if not given:
        raise BadInput("texts is empty: give sentences of at least one language")
    few = next((language for language, some in given.items() if len(some) < FEWEST), None)
    if few is not None:
        raise BadInput(f"there are {len(given[few])} different sentences of {few!r}: give at least {FEWEST} to estimate its mean from")
    if pivot is not None and pivot not in given:
        raise BadInput(f"pivot is {pivot!r}: choose one of {', '.join(map(repr, given))}")
    unknowns = check_known(encoder, {language: some[:1000] for language, some in given.items()})
    if held_out is None:
        kept = {language: np.random.default_rng(seed).permutation(len(some)) for language, some in given.items()}
        held_out = {language: [some[row] for row in kept[language][: len(some) // 5]] for language, some in given.items()}
        given = {language: [some[row] for row in kept[language][len(some) // 5 :]] for language, some in given.items()}
    bare = uncalibrated(encoder)
    read, judging = ({language: _vectors(bare, side.get(language, [])) for language in given} for side in (given, held_out))
    center = pivot or max(given, key=lambda language: len(given[language]))
    layer, verdicts = fitted(read, judging, center, level=level, shrink=shrink, pull=pull, source=source)
    result = _ending(encoder, layer)

    rows = []
    for number, (language, x) in enumerate(judging.items()):
        right = float((layer.recognise(x) == number).double().mean()) if len(x) else float("nan")
        row: dict[str, Any] = {"language": language, "sentences": len(given[language]), "held out": len(x), "recognised, %": 100 * right}
        row |= {"unknown tokens, %": 100 * unknowns[language], "dead dimensions": int((layer.factor[number] == 0).sum())}
        if level == "rotate":
            row |= {"rotation": "pivot" if language == center else "none, too few held out"}
        if language in verdicts:
            said = verdicts[language]
            row |= {"rotation": "used" if said.used else "refused", "mutual neighbours before, %": 100 * said.before}
            row |= {"mutual neighbours after, %": 100 * said.after, "agreement of halves": said.agreement}
        rows.append(row)
    figures: dict[str, Any] = {"languages": len(given), "level": level, "rotations used": len(layer.turned), "source": source or "not said"}
    if len(given) > 1 and min(map(len, judging.values())) >= 10:
        whole, after = torch.cat(list(judging.values())), [layer(x) for x in judging.values()]
        labels = np.repeat(np.arange(len(given)), [len(x) for x in judging.values()])
        figures |= {"language read off a vector before, %": identity(whole, labels), "language read off a vector after, %": identity(torch.cat(after), labels)}
    text = (
        "Compare the vectors by cosine. The language of a text is guessed from its vector and counts as that of the nearest mean, also a language that is not "
        "listed here. Statistics belong to the kind of text that they come from: on other text they help less."
    )
    result.reports["calibration"] = Report("languages on one another", figures, tables={"languages": rows}, text=text)
    return result


def _vectors(network: Network, texts: Sequence[str]) -> Tensor:
    """float64 [n, d]"""
    from wellread.index import encode

    return torch.from_numpy(encode(network, list(texts))).double() if texts else torch.empty(0, 0, dtype=torch.float64)


def identity(x: Tensor, labels: np.ndarray) -> float:
    """How often, in %, a linear discriminant reads the language, int64 [n], off vectors [n, d] that it was not fitted on; chance is the largest share."""
    from sklearn.discriminant_analysis import LinearDiscriminantAnalysis
    from sklearn.model_selection import cross_val_score

    return 100 * float(cross_val_score(LinearDiscriminantAnalysis(solver="lsqr", shrinkage="auto"), x.numpy(), labels, cv=5).mean())
