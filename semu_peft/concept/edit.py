"""A hundred concepts in seconds: cross-attention that answers one prompt as it does another, in closed form."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any, Literal

import torch
from torch import Tensor, nn
from transformers import CLIPTextModel, CLIPTextModelWithProjection

from semu_peft.arguments import check_kind, check_number
from semu_peft.edits.deltas import Delta, Dense, LowRank
from semu_peft.edits.edit import Edit
from semu_peft.linalg.closed_form import redirection
from semu_peft.tuner.adapted import own_parameters

from .families import Family, denoiser_of, family_of, written
from .targets import denoiser_targets

_PROMPTS_AT_ONCE = 32


@torch.no_grad()
def edit_concepts(
    pipe: Any,
    forget: Mapping[str, str] | Sequence[str] | str,
    *,
    anchor: str = "",
    retain: Sequence[str] | str = (),
    preserve: float = 1.0,
    ridge: float = 0.5,
    tokens: Literal["last", "all"] = "last",
) -> Edit:
    """Make a pipeline's cross-attention answer prompts as it answers others, without training or images.

    With `c` the text encoding of a prompt's last word, `a` that of its anchor's and `p` that of a retained prompt's,
    each projection `W` to keys and values becomes the minimiser of
    `Σ ‖W' c − W a‖² + λ Σ ‖W' p − W p‖² + δ ‖W' − W‖²`,

    `W' = (Σ W a cᵀ + λ Σ W p pᵀ + δ W) (Σ c cᵀ + λ Σ p pᵀ + δ I)⁻¹`.

    All layers read the same encodings, so that one solve serves them all, and the change of each has at most the rank
    of the number of prompts: as an adapter it is exact, and from there a LoRA of diffusers.

        edit = edit_concepts(pipe, {"a painting by Monet": "a painting", "Snoopy": "a dog"}, retain=["a cat"])
        with edit.apply(pipe.unet): ...
        edit.to_semu(pipe.unet)
        save_as_diffusers_lora(pipe, "lora/")

    Only the last word is redirected, as in the paper's released code: the encodings of the tokens after it, which
    carry the concept too, stay (`tokens="all"` takes them in), and so does SDXL's pooled text, which does not pass
    through cross-attention. Draw pictures before you rely on it.

    Source: UCE, Gandikota et al. 2024, arXiv 2308.14761, equation 7; defaults as in the authors' code.

    Args:
        pipe: A loaded pipeline with a U-Net and cross-attention: Stable Diffusion 1, 2 or XL.
        forget: Prompts, each with the one that is answered instead; or prompts alone, which all get `anchor`.
        anchor: What prompts without one of their own are answered as; by default as nothing.
        retain: Prompts whose answers stay.
        preserve: `λ`, the weight of each of these.
        ridge: `δ` above zero: how much all else stays. Encodings have squared norms of some hundreds.
        tokens: `"last"`, the last word; `"all"`, the last word and all that follows to the end of the sequence. The
            rank is then that of the number of these tokens.

    Returns:
        The edit of `pipe`'s denoiser, bound to its weights. Nothing is changed yet.

    Raises:
        ValueError: The pipeline has no cross-attention that reads the text encoding, or an argument is out of range.
        TypeError: Prompts are no strings.

    Examples:
        >>> from semu_peft.concept import edit_concepts
        >>> edit = edit_concepts(pipe, {"a cat": "a dog", "van gogh": "painting"}, retain=["a car"])
        >>> carried = edit.to_semu(pipe.unet)
        >>> set(carried.ranks.values()), round(carried.error, 5)
        ({2}, 0.0)
    """
    pairs = _pairs(forget, anchor)
    kept = [retain] if isinstance(retain, str) else list(retain)
    _check(pairs, kept, preserve, ridge, tokens)
    family = family_of(pipe)
    family.check(pipe)
    family.check_encoders(pipe)
    denoiser = denoiser_of(pipe)
    weights = _text_readers(denoiser)
    prompts = list(dict.fromkeys([*pairs, *pairs.values(), *kept]))
    with _padded_no_further(pipe, prompts, tokens):
        encoded = dict(zip(prompts, _encoded(family, pipe, prompts), strict=True))
    width = next(iter(weights.values())).shape[1]
    if any(rows.shape[1] != width for rows in encoded.values()):
        raise ValueError(
            f"`pipe`: its cross-attention reads {width} features and its texts have "
            f"{encoded[prompts[0]].shape[1]}: something stands between them. Train instead (`unlearn_concept`)."
        )
    sources, targets = (torch.cat(rows) for rows in zip(*_aligned(pairs, encoded, tokens), strict=True))
    fixed = torch.cat([_words(encoded[prompt], tokens) for prompt in kept]) if kept else sources[:0]
    change = redirection(sources.mT, targets.mT, math.sqrt(preserve) * fixed.mT, ridge)
    deltas = {name: _delta(weight, change.left, change.right) for name, weight in weights.items()}
    settings = {"prompts": len(pairs), "retained": len(kept), "preserve": preserve, "ridge": ridge, "tokens": tokens}
    return Edit(deltas, "edit_concepts", settings).bound_to(denoiser)


def _pairs(forget: Any, anchor: str) -> dict[str, str]:
    if isinstance(forget, Mapping):
        return dict(forget)
    check_kind("forget", forget, (str, list, tuple), "prompts, or prompts by anchor", "Write `{'a cat': 'a dog'}`.")
    return dict.fromkeys([forget] if isinstance(forget, str) else forget, anchor)


def _check(pairs: Mapping[str, str], kept: Sequence[str], preserve: float, ridge: float, tokens: str) -> None:
    given = [("forget", each) for each in pairs] + [("anchor", each) for each in pairs.values()]
    for name, prompt in [*given, *(("retain", each) for each in kept)]:
        check_kind(name, prompt, str, "prompts", "Give strings.")
    if not pairs:
        raise ValueError("`forget` must hold at least one prompt, got none. Write `{'a cat': 'a dog'}`.")
    same = [prompt for prompt, other in pairs.items() if prompt == other]
    both = sorted(set(kept) & set(pairs))
    if same or both:
        raise ValueError(
            f"`forget`: {(same or both)[0]!r} is {'its own anchor' if same else 'among the retained prompts'} as well. "
            "Take it out of one of them."
        )
    check_number("preserve", preserve, low=0.0)
    check_number("ridge", ridge, low=0.0)
    if ridge == 0:
        raise ValueError("`ridge` must be above zero, got 0. Give a small one, such as 1e-4, to hold prompts strictly.")
    if tokens not in ("last", "all"):
        raise ValueError(f"`tokens` must be 'last' or 'all', got {tokens!r}. Take 'last', as the paper's code.")


def _text_readers(denoiser: nn.Module) -> dict[str, Tensor]:
    """The weights of the projections that read the text encoding itself, by the names of their layers."""
    names = denoiser_targets(denoiser, "cross-attention")
    config: Any = getattr(denoiser, "config", {})
    if not all(name.endswith(("to_k", "to_v")) for name in names) or config.get("encoder_hid_dim_type"):
        raise ValueError(
            f"`pipe`: no layer of its {type(denoiser).__name__} reads the text encoding as it is, which a formula "
            "could redirect: it is transformed on its way. Train instead (`unlearn_concept`)."
        )
    parameters = own_parameters(denoiser)
    missing = [name for name in names if f"{name}.weight" not in parameters]
    if missing:
        raise ValueError(f"`pipe`: the weight of {missing[0]!r} is computed for each pass. Store it first.")
    return {name: parameters[f"{name}.weight"].detach() for name in names}


@contextmanager
def _padded_no_further(pipe: Any, prompts: Sequence[str], tokens: str) -> Iterator[None]:
    """Spare the text encoders the padding, which no word before it can see: they encode most of 77 tokens for nothing.

    That is so in CLIP alone, whose attention is causal, and where the last word is all that is wanted.
    """
    encoders = [e for name in ("text_encoder", "text_encoder_2") if (e := getattr(pipe, name, None)) is not None]
    tokenizers = [t for name in ("tokenizer", "tokenizer_2") if (t := getattr(pipe, name, None)) is not None]
    causal = all(isinstance(encoder, (CLIPTextModel, CLIPTextModelWithProjection)) for encoder in encoders)
    lengths = [tokenizer.model_max_length for tokenizer in tokenizers]
    try:
        for tokenizer in tokenizers if causal and tokens == "last" else ():
            texts = [written(pipe, prompt, tokenizer) for prompt in prompts]
            longest = max(len(tokenizer(text, truncation=True)["input_ids"]) for text in texts)
            tokenizer.model_max_length = max(1, min(longest, tokenizer.model_max_length))
        yield
    finally:
        for tokenizer, length in zip(tokenizers, lengths, strict=True):
            tokenizer.model_max_length = length


def _encoded(family: Family, pipe: Any, prompts: Sequence[str]) -> list[Tensor]:
    """Each prompt's encoding from its last word on, `(tokens, features)`, float64 on the CPU."""
    found: list[Tensor] = []
    for start in range(0, len(prompts), _PROMPTS_AT_ONCE):
        some = prompts[start : start + _PROMPTS_AT_ONCE]
        rows = family.encode(pipe, some, family.size(pipe, None, None))["encoder_hidden_states"].double().cpu()
        places = family.last_words(pipe, some)
        found += [row[min(place, len(row) - 1) :] for row, place in zip(rows, places, strict=True)]
    return found


def _words(rows: Tensor, tokens: str) -> Tensor:
    return rows[:1] if tokens == "last" else rows


def _aligned(pairs: Mapping[str, str], encoded: Mapping[str, Tensor], tokens: str) -> list[tuple[Tensor, Tensor]]:
    """The encodings of each prompt with those of its anchor, word by word from the last one on."""
    found = []
    for prompt, other in pairs.items():
        source, target = (_words(encoded[each], tokens) for each in (prompt, other))
        common = min(len(source), len(target))
        found.append((source[:common], target[:common]))
    return found


def _delta(weight: Tensor, left: Tensor, right: Tensor) -> Delta:
    """The change of one projection, `W D`; dense where it is no smaller as factors."""
    outer = weight.double() @ left.to(weight.device)
    right = right.to(weight.device)
    if left.shape[1] * sum(weight.shape) >= weight.numel():
        return Dense((outer @ right.mT).float())
    return LowRank(outer.float(), right.float())
