"""How a network is fed: what turns pictures or sentences into the tensors it takes. Saved with the network."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from PIL import Image
from torch import Tensor, nn

from wellread.errors import BadInput

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase


@dataclass(frozen=True)
class ImageInput:
    """Pictures as [B, channels, H, W]. Mean and standard deviation are in units of 0...1; ImageNet's when not given.

    crop: with 1.0 the whole picture is resized to `size`, whatever its shape; below 1.0 the shorter side is resized to size / crop and the
    centre is cut out, as ImageNet networks are evaluated.
    """

    size: tuple[int, int] = (224, 224)
    channels: int = 3
    mean: tuple[float, ...] = ()
    std: tuple[float, ...] = ()
    interpolation: str = "bicubic"
    crop: float = 1.0

    column = "image"

    def __post_init__(self) -> None:
        if self.channels not in (1, 3):
            raise BadInput(f"an ImageInput has 1 or 3 channels, not {self.channels}")
        for name, imagenet in (("mean", (0.485, 0.456, 0.406)), ("std", (0.229, 0.224, 0.225))):
            value = getattr(self, name) or (imagenet if self.channels == 3 else (round(sum(imagenet) / 3, 3),))
            if len(value) != self.channels:
                raise BadInput(f"{name} has {len(value)} values for {self.channels} channels: give one for each")
            object.__setattr__(self, name, tuple(value))

    def changed(self, **fields: Any) -> ImageInput:
        return replace(self, **fields)

    def pixels(self, images: Sequence[Image.Image]) -> Tensor:
        """uint8 [B, channels, H, W]. Grey is repeated to three channels, transparency laid on white, 16 bits scaled to 8."""
        return torch.from_numpy(np.stack([self._pixels(image) for image in images]))

    def normalise(self, pixels: Tensor) -> Tensor:
        """float32 [B, channels, H, W] from values 0...255."""
        mean = torch.tensor(self.mean, device=pixels.device).view(1, -1, 1, 1) * 255
        std = torch.tensor(self.std, device=pixels.device).view(1, -1, 1, 1) * 255
        return (pixels.float() - mean) / std

    def __call__(self, images: Sequence[Image.Image]) -> Tensor:
        return self.normalise(self.pixels(images))

    def _pixels(self, image: Image.Image) -> np.ndarray:
        image = flat(image).convert("L" if self.channels == 1 else "RGB")
        height, width = self.size
        resample = getattr(Image.Resampling, self.interpolation.upper())
        if self.crop >= 1.0:
            image = image.resize((width, height), resample) if image.size != (width, height) else image
        else:
            scale = max(height / self.crop / image.height, width / self.crop / image.width)
            image = image.resize((max(width, round(image.width * scale)), max(height, round(image.height * scale))), resample)
            left, top = (image.width - width) // 2, (image.height - height) // 2
            image = image.crop((left, top, left + width, top + height))
        array = np.asarray(image)
        return np.ascontiguousarray(array[None] if array.ndim == 2 else array.transpose(2, 0, 1))

    def config(self) -> dict[str, Any]:
        return {"kind": "image", **asdict(self)}

    @classmethod
    def of_timm(cls, module: nn.Module) -> ImageInput:
        from timm.data import resolve_model_data_config

        data = resolve_model_data_config(module)
        channels, height, width = data["input_size"]
        return cls((height, width), channels, tuple(data["mean"]), tuple(data["std"]), data["interpolation"], float(data["crop_pct"]))

    @classmethod
    def of_torchvision(cls, transform: Any) -> ImageInput:
        size = transform.crop_size[0]
        return cls((size, size), 3, tuple(transform.mean), tuple(transform.std), transform.interpolation.value, size / transform.resize_size[0])

    @classmethod
    def of_transformers(cls, processor: Any) -> ImageInput:
        size = processor.size
        height = size.get("height") or size.get("shortest_edge") or 224
        width = size.get("width") or height
        filters = {0: "nearest", 1: "lanczos", 2: "bilinear", 3: "bicubic"}
        mean, std = (processor.image_mean, processor.image_std) if getattr(processor, "do_normalize", True) else ((0.0,) * 3, (1.0,) * 3)
        return cls((height, width), 3, tuple(mean), tuple(std), filters.get(int(processor.resample), "bilinear"))


def flat(image: Image.Image) -> Image.Image:
    """The picture without transparency and with 8 bits a channel."""
    if image.mode in ("I;16", "I;16B", "I;16L", "I"):
        values = np.asarray(image, dtype=np.float64)
        return Image.fromarray((values / (65535 if values.max() > 255 else 255) * 255).round().clip(0, 255).astype(np.uint8))
    if image.mode == "F":
        values = np.asarray(image, dtype=np.float64)
        return Image.fromarray((values * (255 if values.max() <= 1 else 1)).round().clip(0, 255).astype(np.uint8))
    if image.mode in ("RGBA", "LA", "PA") or "transparency" in image.info:
        image = image.convert("RGBA")
        return Image.alpha_composite(Image.new("RGBA", image.size, "white"), image).convert("RGB")
    return image


@dataclass(frozen=True)
class TextInput:
    """Sentences as a dict of token tensors [B, T], padded to the longest of the batch and cut at `max_length` tokens."""

    tokenizer: PreTrainedTokenizerBase
    max_length: int = 256

    column = "text"

    def __call__(self, texts: Sequence[str]) -> dict[str, Tensor]:
        if self.tokenizer.pad_token is None:
            self.tokenizer.pad_token = self.tokenizer.eos_token
        encoded = self.tokenizer(list(texts), padding=True, truncation=True, max_length=self.max_length, return_tensors="pt")
        return dict(encoded)

    def config(self) -> dict[str, Any]:
        return {"kind": "text", "max_length": self.max_length}


def input_config(source: ImageInput | TextInput | None) -> dict[str, Any] | None:
    return source.config() if source is not None else None


def input_from(config: dict[str, Any] | None, folder: Path) -> ImageInput | TextInput | None:
    """The input of a saved network; the tokenizer lies beside it in `folder`/tokenizer."""
    if config is None:
        return None
    fields: dict[str, Any] = {key: tuple(value) if isinstance(value, list) else value for key, value in config.items() if key != "kind"}
    if config["kind"] == "image":
        return ImageInput(**fields)
    from transformers import AutoTokenizer

    return TextInput(AutoTokenizer.from_pretrained(folder / "tokenizer"), **fields)
