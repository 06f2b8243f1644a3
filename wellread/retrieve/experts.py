"""A sentence encoder with copies of some layers, one for each domain, and the tag of a domain before a text: how `mixture_of_experts` is built.

    start = expand(encoder, ["cardiology", "dermatology"])  # computes what the encoder computes, for both
    start(start.input(["[cardiology] some text"]))          # the tag is one token; the network puts its vector into the place of [CLS]
    dense(start, "cardiology")                              # one domain's encoder alone, of the original architecture
"""

from __future__ import annotations

import copy
import json
import re
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import psutil
import torch
from torch import Tensor, nn

from wellread.errors import BadInput
from wellread.inputs import TextInput
from wellread.lineage import step as lineage_step
from wellread.method import sentence_input
from wellread.network import Network
from wellread.structure import class_name, layer_of, put_layer

# --- the network


class Experts(nn.Module):
    """Copies of one layer, with weights of their own: each row of a batch goes through that of its domain.

    `parts`, set before a forward pass, are the domains of the batch and their rows, (number, int64 [b]). A copy without rows is not run, so
    that its gradient stays None and the optimiser leaves it alone.
    """

    def __init__(self, layer: nn.Module, count: int) -> None:
        super().__init__()
        self.copies = nn.ModuleList(copy.deepcopy(layer) for _ in range(count))
        self.parts: list[tuple[int, Tensor]] = []

    def forward(self, *given: Tensor) -> Tensor:
        """What the layer takes and gives, [B, ...]."""
        if len(self.parts) == 1:
            return self.copies[self.parts[0][0]](*given)
        found = torch.cat([self.copies[number](*(each[rows] for each in given)) for number, rows in self.parts])
        return found[torch.cat([rows for _, rows in self.parts]).argsort()]


class FirstToken(nn.Module):
    """The embedding of the first token, whatever token it is: weight [d]."""

    def __init__(self, weight: Tensor) -> None:
        super().__init__()
        self.weight = nn.Parameter(weight.detach().clone())

    def forward(self, words: Tensor) -> Tensor:
        """[B, T, d] to [B, T, d]."""
        return torch.cat([self.weight.to(words.dtype).expand(len(words), 1, -1), words[:, 1:]], 1)


class Routed(nn.Module):
    """An encoder whose `layers` are Experts, one copy for each domain, and whose first token has an embedding for each domain.

    domains: their names. first: token id of the first domain's tag; the others follow. place: where the tokenizer puts the tag.
    longest: tokens that the encoder reads. unknown, padding: token ids. words: path of the word embedding.
    start: id of the token whose place a domain takes.
    centroids [N, d] and offsets [N], buffers by which a text without a tag is routed: see `set_centroids`.
    """

    centroids: Tensor
    offsets: Tensor

    def __init__(
        self,
        network: nn.Module,
        domains: list[str],
        first: int,
        place: int,
        longest: int,
        unknown: int,
        padding: int,
        words: str,
        start: int,
        layers: list[str],
    ) -> None:
        super().__init__()
        self.domains, self.first, self.place, self.longest, self.unknown, self.padding = domains, first, place, longest, unknown, padding
        self.words, self.start, self.layers = words, start, layers
        for path in layers:
            put_layer(network, path, Experts(layer_of(network, path), len(domains)))
        table: Any = layer_of(network, words)
        put_layer(network, words, nn.Sequential(table, Experts(FirstToken(table.weight[start]), len(domains))))
        self.network = network
        self.register_buffer("centroids", torch.zeros(len(domains), table.embedding_dim))
        self.register_buffer("offsets", torch.zeros(len(domains)))

    def forward(self, input_ids: Tensor, attention_mask: Tensor | None = None, **more: Tensor) -> Tensor:
        """The encoder's output [B, d] for token ids [B, T], mask [B, T] and what else the tokenizer gives for each token, [B, T]."""
        tokens, domain = self.untagged(input_ids, attention_mask, **more)
        missing = domain < 0
        if bool(missing.any()):
            domain = torch.where(missing, self.nearest(self.mean_word(tokens["input_ids"], tokens["attention_mask"])), domain)
        parts = [(number, (domain == number).nonzero()[:, 0]) for number in domain.unique().tolist()]
        for part in self.modules():
            if isinstance(part, Experts):
                part.parts = parts
        return self.network(**tokens)

    def untagged(self, input_ids: Tensor, attention_mask: Tensor | None = None, **more: Tensor) -> tuple[dict[str, Tensor], Tensor]:
        """The tokens [B, t] as the tokenizer gives them for the texts without tags, and the domain of each text, int64 [B], -1 without a tag.

        A text as long as the encoder's input has one token more than that when it carries a tag; one without a tag loses its last word.
        """
        mask = torch.ones_like(input_ids) if attention_mask is None else attention_mask
        domain = input_ids[:, self.place] - self.first if input_ids.shape[1] > self.place else torch.full_like(input_ids[:, 0], -1)
        tagged = (domain >= 0) & (domain < len(self.domains))
        length = (mask.sum(1) - tagged.long()).clamp(max=self.longest)
        column = torch.arange(int(length.max()), device=input_ids.device)
        source = column + (column >= torch.where(tagged, self.place, self.longest - 1)[:, None]).long()
        source = source.clamp(max=input_ids.shape[1] - 1)
        words = column < length[:, None]
        ids = input_ids.gather(1, source).masked_fill(~words, self.padding)
        stray = (ids >= self.first) & (ids < self.first + len(self.domains))  # a tag inside a text is a word that the encoder does not know
        tokens = {name: each.gather(1, source) for name, each in more.items()}
        tokens |= {"input_ids": ids.masked_fill(stray, self.unknown), "attention_mask": words.to(mask.dtype)}
        return tokens, torch.where(tagged, domain, -1)

    @torch.no_grad()
    def mean_word(self, ids: Tensor, mask: Tensor) -> Tensor:
        """The mean embedding of the words [B, d] of texts without tag, [B, T] each."""
        inside = mask.clone()
        inside[:, 0] = 0
        vectors = layer_of(self.network, f"{self.words}.0")(ids).float() * inside[..., None]
        return vectors.sum(1) / inside.sum(1, keepdim=True).clamp(min=1)

    def nearest(self, means: Tensor) -> Tensor:
        """The domain int64 [B] to which each mean word [B, d] belongs."""
        return (means @ self.centroids.float().T + self.offsets.float()).argmax(1)


def mlp_layers(module: nn.Module) -> dict[int, list[str]]:
    """The Linear layers outside of the attention of each block, by the number of the block: what a transformer's MLP consists of."""
    lists = {
        name: each
        for name, each in module.named_modules()
        if isinstance(each, nn.ModuleList) and all(any(isinstance(part, nn.Linear) for part in block.modules()) for block in each)
    }
    if not lists:
        return {}
    path = max(lists, key=lambda name: len(lists[name]))
    found: dict[int, list[str]] = {}
    for number, block in enumerate(lists[path]):
        inner = [name for name, each in block.named_modules() if isinstance(each, nn.Linear) and not re.search("att(entio)?n", name, re.IGNORECASE)]
        found[number] = [f"{path}.{number}.{name}" for name in inner]
    return {number: names for number, names in found.items() if names}


def expert_layers(module: nn.Module, blocks: Sequence[int] | None, pattern: str | None) -> list[str]:
    """The layers to copy: those of the MLPs of these blocks (None: of all), or those whose path `pattern` is found in.

    Raises `BadInput` with what there is to choose from.
    """
    if pattern is None:
        known = mlp_layers(module)
        if not known:
            raise BadInput(f"no MLP was recognised in this encoder: give expert_modules, a regular expression for layers among {_candidates(module)}")
        if wrong := [number for number in blocks or [] if number not in known]:
            raise BadInput(f"layers names {wrong[0]}, and the encoder has MLPs in the layers {', '.join(map(str, known))}: choose among them")
        return [name for number in sorted(set(known if blocks is None else blocks)) for name in known[number]]
    if blocks is not None:
        raise BadInput("layers and expert_modules both say which layers become experts: give one of them")
    try:
        matching = [name for name, each in module.named_modules() if name and re.search(pattern, name) and list(each.parameters())]
    except re.error as wrong_pattern:
        raise BadInput(f"expert_modules {pattern!r} is no regular expression: {wrong_pattern}") from None
    outer = [name for name in matching if not any(name.startswith(f"{other}.") for other in matching)]
    if not outer:
        raise BadInput(f"expert_modules {pattern!r} is found in the name of no layer: names are {_candidates(module)}")
    return outer


def _candidates(module: nn.Module) -> str:
    leaves = (name for name, each in module.named_modules() if not list(each.children()) and list(each.parameters()))
    return ", ".join(list(dict.fromkeys(re.sub(r"\.\d+", ".N", name) for name in leaves))[:16])


def expand(encoder: Network, domains: Sequence[str], *, layers: Sequence[int] | None = None, expert_modules: str | None = None) -> Network:
    """The mixture before training: for every domain it computes what the encoder computes.

    Raises `BadInput` for a network that is no sentence encoder, layers that are not there, names that cannot be a tag, and when the copies
    would not fit into memory.
    """
    source, module = sentence_input(encoder), encoder.module
    if any(isinstance(part, Routed) for part in module.modules()):
        raise BadInput("this encoder is a mixture of experts already: take one domain out of it first, wellread.retrieve.experts.dense")
    chosen = expert_layers(module, layers, expert_modules)
    copied = sum(each.numel() for path in chosen for each in layer_of(module, path).parameters())
    needed, free = 16 * copied * (len(domains) - 1), psutil.virtual_memory().available  # weights, gradients and two moments, 4 bytes each
    if needed > free:
        sizes = f"{needed / 1e9:.1f} GB more to train and {free / 1e9:.1f} GB are free"
        raise BadInput(f"experts for {len(domains)} domains need {sizes}: give layers, or fewer domains")
    tables = {name: each for name, each in module.named_modules() if isinstance(each, nn.Embedding)}
    if not tables:
        raise BadInput("this encoder has no table of word embeddings (nn.Embedding), in which a domain could have its token: take a transformer")
    words = max(tables, key=lambda name: tables[name].num_embeddings)
    if inside := next((path for path in chosen if f"{words}.".startswith(f"{path}.")), None):
        raise BadInput(f"expert_modules names {inside!r}, which holds the word embeddings that all domains share: name layers of the MLPs")
    reads, place = tagged_input(source, domains)
    tokenizer: Any = reads.tokenizer
    unknown, start = tokenizer.unk_token_id, tokenizer("a")["input_ids"][0]
    record = {
        "edit": "wrap",
        "part": class_name(Routed),
        "arguments": {
            "domains": list(domains), "first": int(tokenizer.convert_tokens_to_ids(tag(domains[0]))), "place": place, "longest": source.max_length,
            "unknown": int(start if unknown is None else unknown), "padding": int(tokenizer.pad_token_id or 0), "layers": chosen,
            "words": words, "start": int(start),
        },
    }  # fmt: skip
    return encoder.edited(record, input=reads, head=f"network.{encoder.head}" if encoder.head else None)


def dense(network: Network, domain: str) -> Network:
    """One domain's encoder, of the original architecture and with the original tokenizer: for texts of this domain its output is that of the mixture.

    Raises `BadInput` for an unknown domain, and for a mixture that was changed after it was made.
    """
    number, routed = _number(network, domain), routed_of(network)
    if network.module is not routed or [each.get("part") for each in network.edits[-1:]] != [class_name(Routed)]:
        raise BadInput("this mixture was changed after it was made, so that its domains cannot be taken out: call dense first, and change the result")
    inner = copy.deepcopy(routed.network)
    for path in routed.layers:
        experts: Any = layer_of(inner, path)
        put_layer(inner, path, experts.copies[number])
    table, token = layer_of(inner, routed.words).children()
    with torch.no_grad():
        table.weight[routed.start] = token.copies[number].weight  # type: ignore[union-attr,index,operator]
    put_layer(inner, routed.words, table)
    head = network.head.removeprefix("network.") if network.head else None
    source = TextInput(_without_tags(network.input.tokenizer, routed.domains), routed.longest)  # type: ignore[union-attr]
    result = Network(inner, source, head, None, "embedding", copy.deepcopy(network.architecture), copy.deepcopy(network.edits[:-1]))
    made = lineage_step("mixture-of-experts-dense", {"domain": domain}, parents=[network.fingerprint], result=result.fingerprint)
    result.lineage = [*network.lineage, made]
    return result


def routed_of(network: Network) -> Routed:
    """The mixture inside a network. Raises `BadInput` when there is none."""
    found = next((part for part in network.module.modules() if isinstance(part, Routed)), None)
    if found is None:
        raise BadInput("this network is no mixture of experts: make one with mixture-of-experts")
    return found


def _number(network: Network, domain: str) -> int:
    known = routed_of(network).domains
    if domain not in known:
        raise BadInput(f"this network has no domain {domain!r}: it has {', '.join(known)}")
    return known.index(domain)


# --- tags


def tag(domain: str) -> str:
    """What stands before a text of this domain."""
    return f"[{domain}]"


def tagged(network: Network, texts: Sequence[str], domain: str) -> list[str]:
    """The texts with the tag of a domain before them. Raises `BadInput` naming the known domains; a tag that is misspelt is read as words."""
    _number(network, domain)
    return [f"{tag(domain)} {text}" for text in texts]


def tagged_input(source: TextInput, domains: Sequence[str]) -> tuple[TextInput, int]:
    """The input with a tag for each domain as one more token, and the place at which the tokenizer puts it. The tokenizer given stays as it is."""
    from tokenizers import AddedToken

    tokenizer: Any = copy.deepcopy(source.tokenizer)
    if not getattr(tokenizer, "is_fast", False) or tokenizer.padding_side != "right":
        raise BadInput("the domain tags need a fast tokenizer that pads on the right: this one is another kind")
    vocabulary, bare = tokenizer.get_vocab(), [tokenizer(text)["input_ids"] for text in ("a", "some text")]
    for domain in domains:
        if tag(domain) in vocabulary or not domain.strip() or re.search(r"[\[\]\n]", domain):
            why = "a token of the tokenizer, empty, or with brackets"
            raise BadInput(f"the domain {domain!r} cannot be written as a tag {tag(domain)!r} ({why}): rename it")
    if tokenizer.pad_token is None:
        tokenizer.pad_token = tokenizer.eos_token
    tokenizer.add_tokens([AddedToken(tag(each), special=True, normalized=False, lstrip=True, rstrip=True) for each in domains])
    ids = [tokenizer.convert_tokens_to_ids(tag(each)) for each in domains]
    if ids != list(range(max(vocabulary.values()) + 1, max(vocabulary.values()) + 1 + len(domains))):
        raise BadInput("this tokenizer has gaps in its numbers, so that tags cannot be added to it: use the tokenizer that came with the encoder")
    with_tag = [tokenizer(f"{tag(domains[-1])} {text}")["input_ids"] for text in ("a", "some text")]
    place = with_tag[0].index(ids[-1]) if ids[-1] in with_tag[0] else 0
    if not place:
        raise BadInput("this tokenizer puts no token before a text ([CLS], <s>), whose place a domain could take: use a BERT-like encoder")
    if [[each for each in row if each != ids[-1]] for row in with_tag] != bare:
        raise BadInput("this tokenizer reads a text otherwise behind a tag: use another encoder")
    return TextInput(tokenizer, source.max_length + 1), place


def _without_tags(tokenizer: Any, domains: Sequence[str]) -> Any:
    from transformers import AutoTokenizer

    tags = set(map(tag, domains))
    with tempfile.TemporaryDirectory() as folder:
        tokenizer.save_pretrained(folder)
        file = Path(folder) / "tokenizer.json"
        content = json.loads(file.read_text("utf-8"))
        content["added_tokens"] = [each for each in content["added_tokens"] if each["content"] not in tags]
        file.write_text(json.dumps(content, ensure_ascii=False), "utf-8")
        return AutoTokenizer.from_pretrained(folder)
