"""Published methods for text-to-image pipelines by their names: each is one sentence of the rooms below."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from semu_peft.concept import edit_concepts, unlearn_concept
from semu_peft.concept.erase import ConceptResult
from semu_peft.edits import Edit


def uce(
    pipe: Any,
    forget: Mapping[str, str] | Sequence[str] | str,
    retain: Sequence[str] | str = (),
    *,
    anchor: str = "",
    preserve: float = 1.0,
    ridge: float = 0.5,
) -> Edit:
    """UCE: make cross-attention answer prompts as it answers others, in closed form, without images or training.

    `W' = (Σ W c*ₑ cₑᵀ + W C) (Σ cₑ cₑᵀ + C)⁻¹` over the prompts, `C` of the retained ones and the ridge.

    Source: Gandikota et al., WACV 2024, arXiv 2308.14761.

    Args:
        pipe: A loaded pipeline, which stays as it is until the edit is applied to its denoiser.
        forget: The prompts, or what each is to be answered as.
        retain: Prompts to hold.
        anchor: What prompts without an answer of their own are answered as.
        preserve: Weight of the retained prompts.
        ridge: Weight of everything else.

    Examples:
        >>> from semu_peft import methods
        >>> methods.uce(pipe, {"a cat": "a dog"}, retain=["a car"]).made_by  # `pipe` is a loaded pipeline
        'edit_concepts'
    """
    return edit_concepts(pipe, forget, anchor=anchor, retain=retain, preserve=preserve, ridge=ridge)


def esd(
    pipe: Any,
    forget: Any,
    retain: Any = None,
    *,
    preserve: float = 0.0,
    progress: bool = True,
    adapter_name: str = "default",
    **training: Any,
) -> ConceptResult:
    """ESD: under its own prompt, the denoiser says what points away from the concept, `ε₀(∅) − η (ε₀(c) − ε₀(∅))`.

    In the forget gradient's subspace of cross-attention's keys and values (ESD-x).

    Source: Gandikota et al., ICCV 2023, arXiv 2303.07345.

    Args:
        pipe: A loaded pipeline, whose denoiser is given the adapter.
        forget: The prompts to forget, or ready examples.
        retain: Prompts to hold, of effect with `preserve` above 0.
        preserve: Weight of what is held; the paper holds nothing.
        progress: Show progress bars.
        adapter_name: The adapter's name.
        training: Further arguments of [`unlearn_concept`][semu_peft.concept.erase.unlearn_concept].

    Examples:
        >>> from semu_peft import methods
        >>> from semu_peft.concept import concept_examples
        >>> few = {"samples_per_prompt": 2, "num_inference_steps": 1, "height": 16, "width": 16, "progress": False}
        >>> examples = concept_examples(pipe, "a cat", **few)  # `pipe` is a loaded pipeline
        >>> methods.esd(pipe, examples, max_steps=1, batch_size=2, progress=False).training.steps
        1
    """
    return unlearn_concept(
        pipe, forget, retain=retain, objective="negative-guidance", preserve=preserve, progress=progress,
        adapter_name=adapter_name, **training,
    )  # fmt: skip


def concept_ablation(
    pipe: Any,
    forget: Any,
    retain: Any = None,
    *,
    anchor: Any = None,
    progress: bool = True,
    adapter_name: str = "default",
    **training: Any,
) -> ConceptResult:
    """Concept ablation: under the concept's prompt the denoiser says what it said under the anchor's.

    `‖ε(x, c) − ε₀(x, c*)‖²`, in the forget gradient's subspace; SEMU's own sentence for pipelines.

    Source: Kumari et al., ICCV 2023, arXiv 2303.13516; SEMU, arXiv 2502.07587.

    Args:
        pipe: A loaded pipeline, whose denoiser is given the adapter.
        forget: The prompts to forget, or ready examples.
        retain: Prompts to hold.
        anchor: What to give instead; by default what the pipeline gives without a prompt.
        progress: Show progress bars.
        adapter_name: The adapter's name.
        training: Further arguments of [`unlearn_concept`][semu_peft.concept.erase.unlearn_concept].

    Examples:
        >>> from semu_peft import methods
        >>> from semu_peft.concept import concept_examples
        >>> few = {"samples_per_prompt": 2, "num_inference_steps": 1, "height": 16, "width": 16, "progress": False}
        >>> examples = concept_examples(pipe, "a cat", anchor="a dog", **few)  # `pipe` is a loaded pipeline
        >>> methods.concept_ablation(pipe, examples, max_steps=1, batch_size=2, progress=False).training.steps
        1
    """
    return unlearn_concept(
        pipe, forget, anchor=anchor, retain=retain, objective="condition-matching", progress=progress,
        adapter_name=adapter_name, **training,
    )  # fmt: skip
