"""What a concept is unlearned on: latents and encoded prompts, made once, kept on the CPU, and saved to a file."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor
from torch.utils.data import DataLoader, Dataset
from tqdm.auto import tqdm

from semu_peft.files import written_whole

from .families import Family, family_of
from .sampling import seeded


@dataclass(frozen=True, eq=False)
class ConceptExamples(Dataset[dict[str, Any]]):
    """Examples `{"latents", "condition", "anchor", "unconditional", "retain"}`, as the diffusion objectives take them.

    Each prompt's encoding is stored once, however many examples share it. With the examples at hand neither the text
    encoders nor the VAE are needed any more.

    Attributes:
        latents: `(N, ...)`, float32, in the space the denoiser works in.
        prompts: The P prompts that occur.
        encoded: The denoiser's keyword arguments for each, flat, `(P, ...)`.
        roles: For each role (`condition`, `anchor` …) the prompt of each example, `(N,)`, int64.
    """

    latents: Tensor
    prompts: list[str]
    encoded: dict[str, Tensor]
    roles: dict[str, Tensor]

    def __len__(self) -> int:
        return len(self.latents)

    def __getitem__(self, index: int) -> dict[str, Any]:
        conditions = {role: nested(self.rows(int(prompts[index]))) for role, prompts in self.roles.items()}
        return {"latents": self.latents[index], **conditions}

    def rows(self, prompt: int | Tensor) -> dict[str, Tensor]:
        """The encoding of one or several prompts, flat."""
        return {name: tensor[prompt] for name, tensor in self.encoded.items()}

    def loader(self, batch_size: int, shuffle: bool = True) -> DataLoader[dict[str, Any]]:
        """Batches for `initialize_semu_weights` and `unlearn`."""
        return DataLoader(self, batch_size=batch_size, shuffle=shuffle)

    def save(self, path: str | Path) -> Path:
        """Write everything to one safetensors file."""
        tensors = {"latents": self.latents}
        tensors |= {f"encoded.{name}": tensor for name, tensor in self.encoded.items()}
        tensors |= {f"roles.{name}": tensor for name, tensor in self.roles.items()}
        with written_whole(path) as file:
            metadata = {"format": "pt", "prompts": json.dumps(self.prompts)}
            save_file({name: tensor.contiguous() for name, tensor in tensors.items()}, file, metadata=metadata)
        return Path(path)

    @classmethod
    def load(cls, path: str | Path) -> ConceptExamples:
        """Read what `save` wrote.

        Raises:
            ValueError: The file is another one.
        """
        with safe_open(path, framework="pt") as file:
            metadata = file.metadata() or {}
            tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
        if "prompts" not in metadata or "latents" not in tensors:
            raise ValueError(f"{path} holds no concept examples. Expected a file written by `ConceptExamples.save`.")
        parts = {
            kind: {key.removeprefix(f"{kind}."): value for key, value in tensors.items() if key.startswith(f"{kind}.")}
            for kind in ("encoded", "roles")
        }
        return cls(tensors["latents"], json.loads(metadata["prompts"]), parts["encoded"], parts["roles"])


def concept_examples(
    pipe: Any,
    forget: str | Sequence[str],
    *,
    anchor: str | Sequence[str] = "",
    retain: str | Sequence[str] | None = None,
    images: Any = None,
    samples_per_prompt: int = 16,
    num_inference_steps: int = 25,
    guidance_scale: float = 5.0,
    height: int | None = None,
    width: int | None = None,
    batch_size: int = 4,
    seed: int = 0,
    progress: bool = True,
) -> ConceptExamples:
    """Encode prompts, and images where there are any; without images, sample latents from the pipeline itself.

    Args:
        pipe: A loaded pipeline of Stable Diffusion 1, 2, XL or 3, or of Flux.
        forget: The prompt, or prompts, to forget.
        anchor: What each is to give instead. As many anchors as forget prompts are taken in pairs; otherwise each
            example draws one of them. The empty prompt is the unconditional one.
        retain: Prompts to hold; each example draws one. By default the empty one.
        images: Pictures of the concept: a tensor `(N, 3, height, width)` in [0, 1], or a list of PIL images. With
            several forget prompts, one prompt per image.
        samples_per_prompt: Without images, how many latents to sample for each forget prompt.
        num_inference_steps: Sampling steps.
        guidance_scale: Guidance of the sampling.
        height: Height of the images in pixels, by default the pipeline's own.
        width: Width likewise.
        batch_size: Images or prompts at a time.
        seed: Seed of samples and draws.
        progress: Show a progress bar.

    Returns:
        The examples, on the CPU.

    Raises:
        ValueError: The pipeline is of an unknown kind or lacks a part that is needed, or images and prompts do not fit.
    """
    family = family_of(pipe)
    wanted = {
        "condition": as_list(forget, "forget"),
        "anchor": as_list(anchor, "anchor"),
        "unconditional": [""],
        "retain": as_list("" if retain is None else retain, "retain"),
    }
    if getattr(pipe, "text_encoder", None) is None:
        raise ValueError("`pipe` has no text encoder: load it with one, or make the examples elsewhere and save them.")
    if images is not None and pipe.vae is None:
        raise ValueError("`pipe` has no VAE, which is needed to encode `images`: load it with one.")
    prompts = list(dict.fromkeys(prompt for several in wanted.values() for prompt in several))
    size = family.size(pipe, height, width)
    with torch.no_grad(), _silent(pipe):
        encoded = _encode(family, pipe, prompts, size, batch_size)
        if images is not None:
            latents = _encode_images(family, pipe, images, size, batch_size, seed, progress)
            chosen = _assign(wanted["condition"], len(latents), "forget")
        else:
            chosen = [prompt for prompt in wanted["condition"] for _ in range(samples_per_prompt)]
            settings = {"num_inference_steps": num_inference_steps, "guidance_scale": guidance_scale}
            settings |= {"height": size[0], "width": size[1]}
            index = torch.tensor([prompts.index(prompt) for prompt in chosen])
            empty = prompts.index("")
            latents = _sample(family, pipe, encoded, index, empty, batch_size, seed, progress, settings)
    generator = torch.Generator().manual_seed(seed)
    roles = {"condition": torch.tensor([prompts.index(prompt) for prompt in chosen])}
    paired = len(wanted["anchor"]) == len(wanted["condition"]) > 1
    for role in ("anchor", "unconditional", "retain"):
        options = torch.tensor([prompts.index(prompt) for prompt in wanted[role]])
        if role == "anchor" and paired:
            roles[role] = options[torch.tensor([wanted["condition"].index(prompt) for prompt in chosen])]
        else:
            roles[role] = options[torch.randint(len(options), (len(chosen),), generator=generator)]
    return ConceptExamples(latents, prompts, encoded, roles)


def nested(flat: Mapping[str, Any]) -> dict[str, Any]:
    """`{"a.b": x}` as `{"a": {"b": x}}`."""
    result: dict[str, Any] = {}
    for name, value in flat.items():
        *parents, last = name.split(".")
        place = result
        for parent in parents:
            place = place.setdefault(parent, {})
        place[last] = value
    return result


def as_list(value: str | Sequence[str], name: str) -> list[str]:
    """One prompt or several as a list.

    Raises:
        ValueError: There is none, or something is no text.
    """
    several = [value] if isinstance(value, str) else list(value)
    if not several or not all(isinstance(prompt, str) for prompt in several):
        raise ValueError(f"`{name}` must be a prompt or a list of at least one, got {value!r}.")
    return several


def _assign(prompts: list[str], count: int, name: str) -> list[str]:
    if len(prompts) not in (1, count):
        raise ValueError(f"`{name}` has {len(prompts)} prompts for {count} images: give one, or one per image.")
    return prompts * count if len(prompts) == 1 else prompts


def _encode(family: Family, pipe: Any, prompts: list[str], size: tuple[int, int], batch_size: int) -> dict[str, Tensor]:
    parts = [family.encode(pipe, prompts[i : i + batch_size], size) for i in range(0, len(prompts), batch_size)]
    return {name: torch.cat([part[name].float().cpu() for part in parts]).contiguous() for name in parts[0]}


def _encode_images(
    family: Family, pipe: Any, images: Any, size: tuple[int, int], batch_size: int, seed: int, progress: bool
) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    parts = []
    for start in tqdm(range(0, len(images), batch_size), desc="Encoding images", disable=not progress, leave=False):
        part = images[start : start + batch_size]
        pixels = pipe.image_processor.preprocess(part, height=size[0], width=size[1])
        parts.append(family.to_latents(pipe, pixels, generator).float().cpu())
    return torch.cat(parts)


def _sample(
    family: Family,
    pipe: Any,
    encoded: dict[str, Tensor],
    index: Tensor,
    empty: int,
    batch_size: int,
    seed: int,
    progress: bool,
    settings: dict[str, Any],
) -> Tensor:
    dtype, device = getattr(pipe, family.denoiser).dtype, pipe.device
    parts = []
    for start in tqdm(range(0, len(index), batch_size), desc="Sampling latents", disable=not progress, leave=False):
        part = index[start : start + batch_size]
        rows = {name: tensor[part].to(device, dtype) for name, tensor in encoded.items()}
        nothing = {name: tensor[[empty] * len(part)].to(device, dtype) for name, tensor in encoded.items()}
        output = pipe(
            **family.sampling_arguments(rows, nothing),
            generator=seeded(range(seed + start, seed + start + len(part))),
            output_type="latent",
            **settings,
        )
        parts.append(output.images.float().cpu())
    return torch.cat(parts)


@contextmanager
def _silent(pipe: Any) -> Iterator[None]:
    """One bar for all samples rather than one for each of them."""
    before = dict(getattr(pipe, "_progress_bar_config", {}) or {})
    pipe.set_progress_bar_config(**{**before, "disable": True})
    try:
        yield
    finally:
        pipe.set_progress_bar_config(**before)
