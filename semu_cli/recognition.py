"""Classifiers of pictures by folder or name: an image classifier, or a CLIP model that tells prompts apart."""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Any

import torch
import typer
from torch import Tensor, nn

from .bases import device, silently
from .image_folder import preparation


class Judge(nn.Module):
    """Pictures `(N, 3, height, width)` in [0, 1] to logits, and the class that each prompt asks for.

    Args:
        model: What reads the prepared pictures.
        wanted: The class of each prompt.

    Examples:
        >>> from semu_cli.recognition import Judge
        >>> int(Judge(nn.Identity(), {"a cat": 2}).labels("a cat"))
        2
    """

    def __init__(self, model: nn.Module, wanted: Mapping[str, int]) -> None:
        super().__init__()
        self.model, self.wanted = model, dict(wanted)

    def labels(self, prompt: str) -> Tensor:
        """What a picture of this prompt should be taken for, `(1,)`."""
        return torch.tensor([self.wanted[prompt]])

    def forward(self, images: Tensor) -> Tensor:
        """Prepare pictures as the model was trained, and classify them."""
        from PIL import Image

        arrays = (images.clamp(0, 1) * 255).round().byte().permute(0, 2, 3, 1).cpu().numpy()
        return self.read([Image.fromarray(array) for array in arrays])

    def read(self, pictures: list[Any]) -> Tensor:
        """Logits of some pictures."""
        raise NotImplementedError


class ByClassifier(Judge):
    """By an image classifier of transformers."""

    def __init__(self, model: nn.Module, wanted: Mapping[str, int]) -> None:
        super().__init__(model, wanted)
        self.prepare = preparation(model)

    def read(self, pictures: list[Any]) -> Tensor:
        """Logits of its classes."""
        pixels = torch.stack([self.prepare(picture) for picture in pictures])
        return self.model(pixel_values=pixels.to(device())).logits


class ByText(Judge):
    """By a CLIP model: which of the prompts fits a picture best."""

    def __init__(self, model: nn.Module, processor: Any, wanted: Mapping[str, int]) -> None:
        super().__init__(model, wanted)
        self.processor = processor

    def read(self, pictures: list[Any]) -> Tensor:
        """How well each prompt fits."""
        texts = list(self.wanted)
        inputs = self.processor(text=texts, images=pictures, return_tensors="pt", padding=True, truncation=True)
        return self.model(**inputs.to(device())).logits_per_image


def judge_of(place: str, forget: list[str], retain: list[str], forget_class: str | None) -> Judge:
    """Read a classifier, and what it calls each prompt.

    Raises:
        typer.BadParameter: There is none, or it does not know what a prompt asks for.
    """
    from transformers import AutoConfig, AutoModel, AutoModelForImageClassification, AutoProcessor

    silently()
    try:
        config = AutoConfig.from_pretrained(place)
        is_classifier = any(name.endswith("ForImageClassification") for name in config.architectures or [])
        if not is_classifier and not (hasattr(config, "text_config") and hasattr(config, "vision_config")):
            raise ValueError(f"it is a {config.model_type}.")
        if not is_classifier and not retain:
            raise typer.BadParameter(
                "`--classifier` is a CLIP model, which tells prompts apart: give what else there may be by --retain."
            )
        kind = AutoModelForImageClassification if is_classifier else AutoModel
        model = kind.from_pretrained(place).to(device()).eval()
        processor = None if is_classifier else AutoProcessor.from_pretrained(place)
    except (OSError, ValueError) as error:
        raise typer.BadParameter(
            f"`--classifier`: {place!r} is no image classifier and no CLIP model ({str(error).splitlines()[0]}) Give "
            "the folder of one, with its processor."
        ) from None
    prompts = list(dict.fromkeys([*forget, *retain]))
    if processor is not None:
        return ByText(model, processor, {prompt: number for number, prompt in enumerate(prompts)})
    names = {int(number): str(name) for number, name in config.id2label.items()}
    wanted = {prompt: named_class(prompt, names, "retain") for prompt in retain}
    for prompt in forget:
        if forget_class is not None and forget_class not in names.values():
            raise typer.BadParameter(f"`--forget-class`: the classifier has no class {forget_class!r}. Check the name.")
        by_name = {name: number for number, name in names.items()}
        wanted[prompt] = by_name[forget_class] if forget_class else named_class(prompt, names, "forget")
    return ByClassifier(model, wanted)


def named_class(prompt: str, names: dict[int, str], flag: str) -> int:
    """The class of a classifier that a prompt names, in whole words; names may have synonyms after commas.

    Raises:
        typer.BadParameter: It names none, or several.

    Examples:
        >>> from semu_cli.recognition import named_class
        >>> named_class("a photo of a cat", {0: "dog", 1: "cat, tabby"}, "forget")
        1
    """
    words = {number: [part.strip().lower() for part in name.split(",")] for number, name in names.items()}
    found = [
        number
        for number, parts in words.items()
        if any(part and re.search(rf"\b{re.escape(part)}\b", prompt.lower()) for part in parts)
    ]
    if len(found) == 1:
        return found[0]
    shown = ", ".join(list(names.values())[:12]) + (", …" if len(names) > 12 else "")
    several = "several classes" if found else "no class"
    mend = "Say which by --forget-class" if flag == "forget" else "Write the class's name into the prompt"
    raise typer.BadParameter(
        f"`--{flag}`: {prompt!r} names {several} of the classifier. It knows: {shown}. {mend}, or take a CLIP model as "
        "--classifier, which tells the prompts themselves apart."
    )
