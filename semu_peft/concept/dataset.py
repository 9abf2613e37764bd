"""What a concept is unlearned on: latents and encoded prompts, made once, kept on the CPU, and saved to a file."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterable, Iterator, Mapping, Sequence, Sized
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import DataLoader, Dataset
from tqdm.auto import tqdm

from semu_peft.arguments import check_count
from semu_peft.files import load_tensors, save_tensors
from semu_peft.model_state import dtype_of

from .earlier import earlier_erasures, prompts_to_hold
from .families import Family, denoiser_of, family_of
from .sampling import seeded


@dataclass(frozen=True, eq=False, repr=False)
class ConceptExamples(Dataset[dict[str, Any]]):
    """Examples `{"latents", "condition", "anchor", "unconditional", "retain"}`, as the diffusion objectives take them.

    Where earlier erasures are to be held, each has one of their prompts as `"earlier"` beside these. Each prompt's
    encoding is stored once, however many examples share it. With the examples at hand neither the text encoders nor the
    VAE are needed any more.

    Attributes:
        latents: `(N, ...)`, float32, in the space the denoiser works in.
        prompts: The P prompts that occur.
        encoded: The denoiser's keyword arguments for each, flat, `(P, ...)`.
        roles: For each role (`condition`, `anchor` …) the prompt of each example, `(N,)`, int64.
        request: What they were made of: the arguments of
            [`concept_examples`][semu_peft.concept.dataset.concept_examples].

    Raises:
        ValueError: Latents or encodings are not finite.

    Examples:
        >>> examples = ConceptExamples(
        ...     latents=torch.zeros(2, 4, 8, 8), prompts=["a cat", ""],
        ...     encoded={"encoder_hidden_states": torch.zeros(2, 5, 16)},
        ...     roles={"condition": torch.tensor([0, 0]), "unconditional": torch.tensor([1, 1])},
        ... )
        >>> examples
        ConceptExamples(2 of ['a cat'], latents (4, 8, 8))
        >>> next(iter(examples.loader(2)))["condition"]["encoder_hidden_states"].shape
        torch.Size([2, 5, 16])
    """

    latents: Tensor
    prompts: list[str]
    encoded: dict[str, Tensor]
    roles: dict[str, Tensor]
    request: dict[str, Any] = field(default_factory=dict)

    def __post_init__(self) -> None:
        broken = [name for name, tensor in {"latents": self.latents, **self.encoded}.items() if not _is_finite(tensor)]
        if broken:
            part = "VAE or denoiser" if broken[0] == "latents" else "text encoder"
            raise ValueError(
                f"`{broken[0]}` must be finite, got NaN or infinite values. The pipeline's {part} may overflow in "
                "float16: load the pipeline in bfloat16 or float32."
            )

    def __repr__(self) -> str:
        prompts = [self.prompts[int(index)] for index in self.roles["condition"].unique()]
        return f"ConceptExamples({len(self)} of {prompts}, latents {tuple(self.latents.shape[1:])})"

    def __len__(self) -> int:
        return len(self.latents)

    def __getitem__(self, index: int) -> dict[str, Any]:
        conditions = {role: nested(self.rows(int(prompts[index]))) for role, prompts in self.roles.items()}
        return {"latents": self.latents[index], **conditions}

    @property
    def forgotten(self) -> dict[str, list[str]]:
        """The prompts to forget, each with those that are to be answered in its place."""
        given: dict[str, list[str]] = {}
        anchors_of_all = self.roles.get("anchor", self.roles.get("unconditional", self.roles["condition"]))
        for condition, anchor in zip(self.roles["condition"].tolist(), anchors_of_all.tolist(), strict=True):
            anchors = given.setdefault(self.prompts[condition], [])
            if self.prompts[anchor] not in anchors:
                anchors.append(self.prompts[anchor])
        return given

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
        contiguous = {name: tensor.contiguous() for name, tensor in tensors.items()}
        metadata = {"prompts": json.dumps(self.prompts), "request": json.dumps(self.request)}
        return save_tensors(path, contiguous, metadata)

    @classmethod
    def load(cls, path: str | Path) -> ConceptExamples:
        """Read what `save` wrote.

        Raises:
            ValueError: The file is another one.
        """
        tensors, metadata = load_tensors(path, "ConceptExamples.save")
        if "prompts" not in metadata or "latents" not in tensors:
            raise ValueError(f"`path` must be a file that `ConceptExamples.save` wrote, got {path}, which holds none.")
        parts = {
            kind: {key.removeprefix(f"{kind}."): value for key, value in tensors.items() if key.startswith(f"{kind}.")}
            for kind in ("encoded", "roles")
        }
        try:
            prompts, request = json.loads(metadata["prompts"]), json.loads(metadata.get("request", "{}"))
        except ValueError as error:
            raise ValueError(f"{path} is damaged ({error}). Make the examples again.") from error
        for name, indices in parts["roles"].items():
            count = len(tensors["latents"])
            if indices.is_floating_point() or indices.shape != (count,) or not _all_below(indices, len(prompts)):
                raise ValueError(
                    f"{path} is damaged: `{name}` names prompts that are not there. Make the examples again."
                )
        return cls(tensors["latents"], prompts, parts["encoded"], parts["roles"], request)


def concept_examples(
    pipe: Any,
    forget: str | Sequence[str],
    *,
    anchor: str | Sequence[str] = "",
    retain: str | Sequence[str] = "",
    images: Any = None,
    samples_per_prompt: int = 16,
    num_inference_steps: int = 25,
    guidance_scale: float = 5.0,
    height: int | None = None,
    width: int | None = None,
    cache: str | Path | None = None,
    batch_size: int = 4,
    seed: int = 0,
    progress: bool = True,
) -> ConceptExamples:
    """Encode prompts, and images where there are any; without images, sample latents from the pipeline itself.

    Args:
        pipe: A loaded pipeline of Stable Diffusion 1, 2, XL or 3, of Flux or Z-Image, or of a kind that you
            [registered][semu_peft.concept.families.register_family]. One that draws from a picture too (img2img,
            ControlNet) is sampled as the text-to-image pipeline of its parts.
        forget: The prompt, or prompts, to forget.
        anchor: What each is to give instead. As many anchors as forget prompts are taken in pairs; otherwise each
            example draws one of them. The empty prompt is the unconditional one.
        retain: Prompts to hold beside the anchors; the examples share them out evenly. By default the empty one. What
            active erasures in the pipeline were made to forget, and their anchors, is held as well.
        images: Pictures of the concept: a tensor `(N, 3, height, width)` in [0, 1], or a list of PIL images. With
            several forget prompts, one prompt per image.
        samples_per_prompt: Without images, how many latents to sample for each forget prompt.
        num_inference_steps: Sampling steps.
        guidance_scale: Guidance of the sampling.
        height: Height of the images in pixels, by default the pipeline's own.
        width: Width likewise.
        cache: File to keep the examples in: loaded if it exists, in which case the pipeline needs neither text encoders
            nor VAE, and written otherwise.
        batch_size: Images or prompts at a time.
        seed: Seed of samples and draws.
        progress: Show a progress bar.

    Returns:
        The examples, on the CPU.

    Raises:
        TypeError: `images` are no pictures, or a prompt is no text.
        ValueError: A number is out of range, the pipeline is of an unknown kind or lacks a part that is needed, images
            and prompts do not fit, or the cache holds examples that were made of something else.

    Examples:
        >>> from semu_peft.concept import concept_examples
        >>> settings = {"samples_per_prompt": 2, "num_inference_steps": 1, "height": 16, "width": 16}
        >>> concept_examples(pipe, "a cat", anchor="a dog", progress=False, **settings)
        ConceptExamples(2 of ['a cat'], latents (4, 8, 8))
    """
    counts = {"samples_per_prompt": samples_per_prompt, "num_inference_steps": num_inference_steps}
    for name, count in {**counts, "batch_size": batch_size}.items():
        check_count(name, count)
    check_count("seed", seed, least=0)
    prompts = {"forget": as_list(forget, "forget"), "anchor": as_list(anchor, "anchor")}
    retained = as_list(retain, "retain")
    prompts["retain"] = [*retained, *(prompt for prompt in prompts["anchor"] if prompt not in retained)]
    earlier = prompts_to_hold(earlier_erasures(denoiser_of(pipe)), prompts["forget"], prompts["retain"])
    if earlier:
        prompts["earlier"] = earlier
    sampling = {"num_inference_steps": num_inference_steps, "guidance_scale": guidance_scale}
    request: dict[str, Any] = {**prompts, "height": height, "width": width, "seed": seed}
    if images is not None:
        _check_images(images)
        request["images"] = _digest(images)
    else:
        request |= {**sampling, "samples_per_prompt": samples_per_prompt}
    if cache is not None and Path(cache).is_file():
        return _cached(Path(cache), request)
    source = _Source(pipe, family_of(pipe), (height, width), batch_size, seed, progress, with_images=images is not None)
    texts = list(dict.fromkeys([*prompts["forget"], *prompts["anchor"], "", *prompts["retain"], *earlier]))
    with torch.no_grad(), _silent(source.sampler):
        encoded = source.encode(texts)
        if images is not None:
            latents = source.latents_of(images)
            chosen = _assign(prompts["forget"], len(latents))
        else:
            chosen = [place for place in range(len(prompts["forget"])) for _ in range(samples_per_prompt)]
            rows = [texts.index(prompts["forget"][place]) for place in chosen]
            latents = source.sample(encoded, rows, texts.index(""), sampling)
    examples = ConceptExamples(latents, texts, encoded, _roles(prompts, chosen, texts, seed), request)
    if cache is not None:
        examples.save(cache)
    return examples


def _roles(prompts: Mapping[str, list[str]], chosen: list[int], texts: list[str], seed: int) -> dict[str, Tensor]:
    """For each role, the index among `texts` of each example's prompt: its own, its pair's, or what it is dealt.

    The examples are of the prompts to forget at the places `chosen`, one of which may stand at several of them.
    """
    generator = torch.Generator().manual_seed(seed)
    roles = {"condition": torch.tensor([texts.index(prompts["forget"][place]) for place in chosen])}
    paired = len(prompts["anchor"]) == len(prompts["forget"]) > 1
    for role, options in {**prompts, "unconditional": [""]}.items():
        if role == "forget":
            continue
        indices = torch.tensor([texts.index(prompt) for prompt in options])
        if role == "anchor" and paired:
            roles[role] = indices[torch.tensor(chosen)]
        else:
            rounds = -(-len(chosen) // len(indices))
            dealt = torch.cat([torch.randperm(len(indices), generator=generator) for _ in range(rounds)])
            roles[role] = indices[dealt[: len(chosen)]]
    return roles


def _cached(cache: Path, request: Mapping[str, Any]) -> ConceptExamples:
    examples = ConceptExamples.load(cache)
    names = [name for name in {**examples.request, **request} if examples.request.get(name) != request.get(name)]
    if names:
        name = names[0]
        raise ValueError(
            f"`cache`: {cache} was made with {name}={examples.request.get(name)!r}, not {request.get(name)!r}. Name "
            "another file, or remove this one to make it afresh."
        )
    return examples


def _kept(tensor: Tensor) -> Tensor:
    return tensor.float().cpu() if tensor.is_floating_point() else tensor.cpu()


def _is_finite(tensor: Tensor) -> bool:
    return not tensor.is_floating_point() or bool(tensor.isfinite().all())


def _all_below(indices: Tensor, count: int) -> bool:
    return bool(((indices >= 0) & (indices < count)).all())


def _check_images(images: Any) -> None:
    several = isinstance(images, Sized) and isinstance(images, Iterable) and not isinstance(images, (str, Mapping))
    if isinstance(images, (Tensor, np.ndarray)):
        channels = images.shape[1 if isinstance(images, Tensor) else -1] if images.ndim > 3 else None
        got = f"a {type(images).__name__} of shape {tuple(images.shape)}" if channels != 3 else None
    else:  # Pillow's, or arrays
        wrong = next((each for each in images if not hasattr(each, "tobytes")), None) if several else images
        got = None if wrong is None else repr(wrong) if isinstance(wrong, str) else type(wrong).__name__
        got = f"a list with {got} in it" if got and several else got
    if got is not None or not len(images):
        raise TypeError(
            f"`images` must be a tensor `(N, 3, height, width)` in [0, 1] or a list of PIL images, got "
            f"{got or 'none at all'}. Open files by `PIL.Image.open(path)`, and write `[image]` for one."
        )
    arrays = [images] if isinstance(images, Tensor) else [each for each in images if isinstance(each, np.ndarray)]
    # A little beyond 1 is what resizing leaves.
    if arrays and (largest := max(each.max().item() for each in arrays)) > 2:
        raise ValueError(f"`images` must be in [0, 1] unless they are PIL images, got {largest:g}. Divide by 255.")


def _digest(images: Any) -> str:
    parts = images.detach().cpu().contiguous().view(torch.uint8).numpy() if isinstance(images, Tensor) else images
    content = hashlib.sha256()
    for part in parts:
        content.update(part.tobytes())
    return content.hexdigest()


def nested(flat: Mapping[str, Any]) -> dict[str, Any]:
    """Nest what a dot in the name stands for.

    Examples:
        >>> nested({"a.b": 1, "c": 2})
        {'a': {'b': 1}, 'c': 2}
    """
    result: dict[str, Any] = {}
    for name, value in flat.items():
        *parents, last = name.split(".")
        place = result
        for parent in parents:
            place = place.setdefault(parent, {})
        place[last] = value
    return result


def as_list(value: str | Sequence[str], name: str) -> list[str]:
    """Read one prompt or several as a list.

    Raises:
        TypeError: It is neither.
        ValueError: There is none, or something is no text.

    Examples:
        >>> as_list("a cat", "forget")
        ['a cat']
    """
    if not isinstance(value, Sequence):
        raise TypeError(f"`{name}` must be a prompt or a list of prompts, got {value!r}. Write it as a string.")
    several = [value] if isinstance(value, str) else list(value)
    if not several or not all(isinstance(prompt, str) for prompt in several):
        raise ValueError(f"`{name}` must be a prompt or a list of at least one, got {value!r}.")
    return several


def check_prompts(forget: Sequence[str], anchor: Sequence[str] = (), retain: Sequence[str] = ()) -> None:
    """Check that a concept is to be forgotten, and that none of its prompts is given instead or held as well.

    Raises:
        ValueError: A prompt to forget is empty, or is among the anchors or the prompts to retain.

    Examples:
        >>> check_prompts(["a cat"], anchor=["a dog"], retain=["a horse", ""])
    """
    if not all(prompt.strip() for prompt in forget):
        raise ValueError("`forget` must be a prompt, got an empty one. Say what is to be forgotten.")
    for name, prompts in (("anchor", anchor), ("retain", retain)):
        if both := set(forget) & set(prompts):
            raise ValueError(
                f"`{name}` must be another prompt than those to forget, got {min(both)!r}. Take it out of one."
            )


def _assign(prompts: list[str], count: int) -> list[int]:
    """The place among the prompts of each of so many images."""
    if len(prompts) not in (1, count):
        raise ValueError(
            f"`forget` must be one prompt or one per image, got {len(prompts)} prompts for {count} images."
        )
    return [0] * count if len(prompts) == 1 else list(range(count))


class _Source:
    """A pipeline as a source of encodings and latents, some at a time."""

    def __init__(
        self,
        pipe: Any,
        family: Family,
        size: tuple[int | None, int | None],
        batch_size: int,
        seed: int,
        progress: bool,
        with_images: bool,
    ) -> None:
        family.check(pipe)
        family.check_encoders(pipe)
        if with_images and pipe.vae is None:
            raise ValueError("`pipe` has no VAE, which is needed to encode `images`: load it with one.")
        self.sampler = pipe if with_images else family.sampler(pipe)
        self.pipe, self.family, self.size = pipe, family, family.size(pipe, *size)
        self.batch_size, self.seed, self.progress = batch_size, seed, progress

    def encode(self, prompts: list[str]) -> dict[str, Tensor]:
        """What the denoiser takes for each prompt, flat, `(P, ...)`, float32, on the CPU."""
        starts = range(0, len(prompts), self.batch_size)
        parts = [self.family.encode(self.pipe, prompts[i : i + self.batch_size], self.size) for i in starts]
        return {name: torch.cat([_kept(part[name]) for part in parts]).contiguous() for name in parts[0]}

    def latents_of(self, images: Any) -> Tensor:
        """Images as latents, `(N, ...)`."""
        generator = torch.Generator().manual_seed(self.seed)
        parts = []
        for part in self._parts(images, "Encoding images"):
            if not isinstance(part, (Tensor, np.ndarray)):  # PIL images may have one channel, or four
                part = [each.convert("RGB") if hasattr(each, "convert") else each for each in part]
            pixels = self.pipe.image_processor.preprocess(part, height=self.size[0], width=self.size[1])
            parts.append(self.family.to_latents(self.pipe, pixels, generator).float().cpu())
        return torch.cat(parts)

    def sample(self, encoded: Mapping[str, Tensor], rows: list[int], uncond: int, settings: dict[str, Any]) -> Tensor:
        """Latents that the pipeline samples for rows of encoded prompts, `(N, ...)`, each with a seed of its own."""
        latents: list[Tensor] = []
        for part in self._parts(torch.tensor(rows), "Sampling latents"):
            seeds = range(self.seed + len(latents), self.seed + len(latents) + len(part))
            conditions = self._on_device(encoded, part)
            unconditional = self._on_device(encoded, torch.full_like(part, uncond))
            output = self.sampler(
                **self.family.sampling_arguments(conditions, unconditional), generator=seeded(seeds),
                output_type="latent", height=self.size[0], width=self.size[1], **settings,
            )  # fmt: skip
            latents.extend(output.images.float().cpu())
        return torch.stack(latents)

    def _on_device(self, encoded: Mapping[str, Tensor], rows: Tensor) -> dict[str, Tensor]:
        dtype = dtype_of(getattr(self.pipe, self.family.denoiser))
        chosen = {name: tensor[rows].to(self.pipe._execution_device) for name, tensor in encoded.items()}
        return {name: tensor.to(dtype) if tensor.is_floating_point() else tensor for name, tensor in chosen.items()}

    def _parts(self, items: Any, title: str) -> Iterator[Any]:
        starts = range(0, len(items), self.batch_size)
        for start in tqdm(starts, desc=title, disable=not self.progress, leave=False):
            yield items[start : start + self.batch_size]


@contextmanager
def _silent(pipe: Any) -> Iterator[None]:
    """One bar for all samples rather than one for each of them."""
    before = dict(getattr(pipe, "_progress_bar_config", {}) or {})
    pipe.set_progress_bar_config(**{**before, "disable": True})
    try:
        yield
    finally:
        pipe.set_progress_bar_config(**before)
