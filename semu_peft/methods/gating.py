"""Published methods that act while the model serves: each is one sentence of gates, adapters and second voices.

What they give takes the model's place and is called as the model is. All of them hide and none removes: whoever holds
the weights has the model without them.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from typing import Any, Literal

from peft import LoraConfig, get_peft_model
from torch import nn

from semu_peft.gates import (
    Abstention,
    ActivationGate,
    EmbeddingCorruption,
    ForbiddenAnswers,
    GatedModel,
    HiddenStates,
    LogitCombination,
    Nearest,
    Retrieval,
    adjust_neurons,
    answer_strings,
    gated,
    linear_gate,
    neuron_moments,
    strings_of_answers,
    truncated,
    zeroth_order,
)
from semu_peft.gates.embeddings import Positions, all_but_last
from semu_peft.objectives import NPO, CrossEntropy, UniformDistribution
from semu_peft.objectives.base import LossFunction
from semu_peft.objectives.original import without_adapter
from semu_peft.training.requests import add_request

from .sentence import RetainData, keep, minimise


def o3(
    model: nn.Module,
    forget: Iterable[Any],
    retain: Iterable[Any] | None = None,
    *,
    name: str,
    gate: Nearest | None = None,
    layer: str = "model.norm",
    objective: LossFunction | None = None,
    false_alarms: float = 0.01,
    progress: bool = True,
    **training: Any,
) -> GatedModel:
    """O3: a request in an adapter that is orthogonal to those before it, opened for prompts that are near the request.

    Call it once a request, with the gate of the last one (`served.gate`) and its model (`served.model`).

    Source: Gao et al. 2024, arXiv 2407.10223, where one LoRA (r 8) is trained on over the requests with the overlap of
    one side penalised, cross entropy to random labels or refusals, and the detector is another encoder with one-class
    SVMs over its layers: `gate=Nearest(layers, "one-class")` has these.

    Args:
        model: A model with a SEMU adapter.
        forget: The forget batches.
        retain: Batches on which the gate is to stay closed; by them its thresholds are set.
        name: The request's name, which is its adapter's.
        gate: The gate that knows the earlier requests.
        layer: Whose states tell prompts apart, where there is no gate yet.
        objective: What to minimise; by default NPO.
        false_alarms: On which share of the retain examples it may open.
        progress: Show progress bars.
        training: Further arguments of [`unlearn`][semu_peft.training.unlearn.unlearn].

    Examples:
        >>> from peft import get_peft_model
        >>> from semu_peft import SemuConfig, methods
        >>> from semu_peft.language import text_examples
        >>> model = get_peft_model(decoder, SemuConfig(target_modules="all-linear"), adapter_name="one")
        >>> forget = text_examples(tokenizer, ["a b c", "d e f"]).loader(2)
        >>> methods.o3(model, forget, name="one", max_steps=2, progress=False).adapter_names
        ('one',)
    """
    known = Nearest(layer) if gate is None else gate
    add_request(model, name, forget, objective or NPO(), progress=progress, **training)
    known.add(name, model, forget, progress=progress)
    if retain is not None:
        known.calibrate(model, retain, false_alarms=false_alarms, progress=progress)
    return gated(model, known)


def eco(
    model: nn.Module,
    forget: Iterable[Any],
    retain: Iterable[Any],
    *,
    layer: str = "model.norm",
    strength: float = 100.0,
    kind: Literal["noise", "zero"] = "noise",
    dimensions: int | None = 1,
    positions: Positions = all_but_last,
    false_alarms: float = 0.01,
    score: Callable[[nn.Module], float] | None = None,
    seed: int = 0,
) -> EmbeddingCorruption:
    """ECO: corrupt the embeddings of prompts that a classifier takes for forget prompts.

    Source: Liu et al. 2024, arXiv 2406.07933: a RoBERTa as classifier, threshold .99, noise of σ 100 in one entry or
    zeros in the largest 670 to 1000, on the tokens of names. Here the classifier is a logistic regression on the
    model's own states, and no recogniser of names comes with it: `positions` takes yours.

    Args:
        model: A language model.
        forget: The forget batches, of which the prompts count.
        retain: Batches whose prompts are to stay.
        layer: Whose states the classifier reads.
        strength: `σ`, or where its search begins.
        kind: Noise or zeros.
        dimensions: In how many entries of an embedding.
        positions: Of which tokens, such as [`EntityTokens`][semu_peft.gates.embeddings.EntityTokens]; by default of all
            but the last.
        false_alarms: On which share of the retain examples the gate may open.
        score: What to bring down by the strength, of the corrupted model; without it the strength stays.
        seed: Of the noise.

    Examples:
        >>> from semu_peft import methods
        >>> from semu_peft.language import text_examples
        >>> forget, retain = (text_examples(tokenizer, [text]).loader(1) for text in ("a b c", "d e f"))
        >>> methods.eco(decoder, forget, retain).strength
        100.0
    """
    gate = linear_gate(model, {"request": forget}, retain, HiddenStates(layer), false_alarms=false_alarms)
    made: dict[str, Any] = {"kind": kind, "dimensions": dimensions, "positions": positions, "seed": seed}
    if score is not None:
        at = lambda sigma: score(EmbeddingCorruption(model, gate, sigma, **made))  # noqa: E731
        strength = zeroth_order(at, strength).strength
    return EmbeddingCorruption(model, gate, strength, **made)


def guard(
    model: nn.Module,
    forget: Iterable[Any],
    retain: Iterable[Any],
    *,
    layer: str = "model.norm",
    length: int = 3,
    answers: int | None = 1,
    penalty: float = 0.0,
    threshold: float = 0.5,
    false_alarms: float = 0.01,
) -> ForbiddenAnswers:
    """GUARD: after prompts that a classifier takes for forget prompts, no run of tokens of the answer found is said.

    Source: Deng et al. 2025, arXiv 2505.13312: a small network on the model's penultimate state, a sentence encoder
    that finds the answer, a trie of its forbidden tokens and a softer mask of what is like them (δ .5), in a search
    with 7 beams (`generate(num_beams=7)`). Here the classifier is a logistic regression, and the model's own states and
    embeddings stand for the encoder's. No code of it was to be had; the softer mask is after a summary.

    Args:
        model: A language model.
        forget: The forget batches, with labels.
        retain: Batches whose prompts are to stay, and whose runs of tokens may be said.
        layer: Whose states the classifier reads, and by which answers are found.
        length: How many tokens a run has.
        answers: Of how many answers the runs are forbidden, the likeliest ones; None for all. More of them catch more
            paraphrases, whose answer is often not the first that is found.
        penalty: By how many logits tokens are lowered that are like forbidden ones; takes `length=1`.
        threshold: From which cosine of embeddings on they are alike.
        false_alarms: On which share of the retain examples the gate may open.

    Examples:
        >>> from semu_peft import methods
        >>> from semu_peft.language import text_examples
        >>> forget, retain = (text_examples(tokenizer, [text]).loader(1) for text in ("a b c", "d e f"))
        >>> type(methods.guard(decoder, forget, retain)).__name__
        'ForbiddenAnswers'
    """
    seen = list(forget)  # in one order, whatever a loader does
    states, soft = HiddenStates(layer), {"penalty": penalty, "threshold": threshold}
    gate = linear_gate(model, {"request": seen}, retain, states, false_alarms=false_alarms)
    if answers is None:
        return ForbiddenAnswers(model, gate, answer_strings(seen, length, retain=retain), **soft)
    found = Retrieval.of(model, seen, gate, states, count=answers)
    strings = dict(zip(found.names, strings_of_answers(seen, length, retain=retain), strict=True))
    return ForbiddenAnswers(model, found, strings, **soft)


def ksd(
    model: nn.Module,
    forget: Iterable[Any],
    retain: Iterable[Any] | None = None,
    *,
    layer: str,
    answer: Sequence[int],
    false_alarms: float = 0.01,
) -> Abstention:
    """KSD: abstain on prompts whose last key lies in the box of a skill's keys.

    Source: Li et al. 2025, arXiv 2503.21730: the inputs of the last block's `down_proj`; a box `μ ± k σ` with the
    smallest `k` that holds all keys, which is their largest score and needs no bisection (its release then takes .08 of
    it); decided here for each prompt.

    Args:
        model: A language model.
        forget: The forget batches, of which the prompts count.
        retain: Batches on which the gate is to stay closed; by default the box holds exactly the forget prompts.
        layer: The layer whose inputs are the keys, such as `"model.layers.31.mlp.down_proj"`.
        answer: Token indices of what is said instead, with its end token.
        false_alarms: On which share of the retain examples it may open.

    Examples:
        >>> from semu_peft import methods
        >>> from semu_peft.language import text_examples
        >>> forget = text_examples(tokenizer, ["a b c", "d e f"]).loader(2)
        >>> silent = methods.ksd(decoder, forget, layer="model.layers.1.mlp.down_proj", answer=[2])
        >>> silent.gate.adapter_names
        ('request',)
    """
    gate = Nearest(layer, "box", side="input", pool="last").add("request", model, forget)
    if retain is not None:
        gate.calibrate(model, retain, false_alarms=false_alarms)
    return Abstention(model, gate, answer)


def neuron_adjust(
    model: nn.Module,
    forget: Iterable[Any],
    retain: Iterable[Any],
    *,
    layers: Sequence[str],
    share: float = 0.005,
    seed: int | None = 0,
    progress: bool = True,
) -> ActivationGate:
    """Neuron Adjust: mirror activations that look like the skill's to where retain data would have them.

    Source: Li et al. 2025, arXiv 2503.21730: the pre-activations of all feed-forward blocks; .5 % of the neurons for a
    language, 3 % for code or mathematics.

    Args:
        model: A language model.
        forget: Forget batches, whose answers count.
        retain: Retain batches.
        layers: The layers whose outputs are adjusted, such as every `gate_proj`.
        share: Which share of their neurons.
        seed: Of the draws; None moves every activation that is likelier under the forget data.
        progress: Show progress bars.

    Examples:
        >>> from semu_peft import methods
        >>> from semu_peft.language import text_examples
        >>> forget, retain = (text_examples(tokenizer, [text]).loader(1) for text in ("a b c", "d e f"))
        >>> layers = ["model.layers.0.mlp.gate_proj", "model.layers.1.mlp.gate_proj"]
        >>> adjusted = methods.neuron_adjust(decoder, forget, retain, layers=layers, share=0.1, progress=False)
        >>> sum(len(each.neurons) for each in adjusted.adjustments.values())  # of 2 · 32
        6
    """
    moments = [neuron_moments(model, data, layers, progress=progress) for data in (forget, retain)]
    return ActivationGate(model, adjust_neurons(moments[0], moments[1], share, seed=seed))


def uld(
    model: nn.Module,
    forget: Iterable[Any],
    retain: RetainData = None,
    *,
    layers: int = 8,
    r: int = 32,
    weight: float = 0.75,
    filter: float | None = 0.01,
    retain_weight: float = 6.5,
    learning_rate: float = 1e-3,
    progress: bool = True,
    **training: Any,
) -> LogitCombination:
    """ULD: an assistant of the model's first layers learns the forget data and nothing else; its logits are taken off.

    Source: Ji et al. 2024, arXiv 2406.08607: 8 of 32 layers, LoRA r 32, 10 epochs on TOFU. Two paraphrases a forget
    example and two wrong answers a retain example carry its result: put them into the batches.

    Args:
        model: A language model without adapters, which stays as it is.
        forget: The forget batches.
        retain: Batches on which the assistant is to be uniform.
        layers: How many layers the assistant has.
        r: The LoRA's rank.
        weight: How much is taken off.
        filter: From which share of the likeliest token's probability on.
        retain_weight: Of the retain data's term.
        learning_rate: Of the assistant's training.
        progress: Show progress bars.
        training: Further arguments of [`unlearn`][semu_peft.training.unlearn.unlearn].

    Examples:
        >>> from semu_peft import methods
        >>> from semu_peft.language import text_examples
        >>> forget, retain = (text_examples(tokenizer, [text]).loader(1) for text in ("a b c", "d e f"))
        >>> methods.uld(decoder, forget, retain, layers=1, max_steps=2, progress=False).weight
        0.75
    """
    config = LoraConfig(r=r, lora_alpha=r, target_modules="all-linear", task_type="CAUSAL_LM")
    assistant = get_peft_model(truncated(model, layers), config)
    said: dict[str, Any] = {"learning_rate": learning_rate, "progress": progress, **training}
    minimise(assistant, forget, CrossEntropy(), keep(retain, UniformDistribution(), retain_weight), **said)
    return LogitCombination(model, assistant.eval(), weight, filter=filter)


def whp(
    model: nn.Module,
    forget: Iterable[Any],
    *,
    weight: float = 1.0,
    progress: bool = True,
    adapter_name: str | None = None,
    **training: Any,
) -> LogitCombination:
    """Who's Harry Potter: an adapter learns the forget data still better, and what it makes likelier is lowered.

    Source: Eldan and Russinovich 2023, arXiv 2310.02238; there the combined model then teaches the model itself, for
    which its logits are what `OracleMatching` takes.

    Args:
        model: A language model with an adapter to be reinforced.
        forget: The forget batches.
        weight: `α`.
        progress: Show progress bars.
        adapter_name: The adapter, if there are several.
        training: Further arguments of [`unlearn`][semu_peft.training.unlearn.unlearn].

    Examples:
        >>> from peft import LoraConfig, get_peft_model
        >>> from semu_peft import methods
        >>> from semu_peft.language import text_examples
        >>> model = get_peft_model(decoder, LoraConfig(target_modules="all-linear"))
        >>> forget = text_examples(tokenizer, ["a b c", "d e f"]).loader(2)
        >>> methods.whp(model, forget, max_steps=2, progress=False).relu
        True
    """
    minimise(model, forget, CrossEntropy(), progress=progress, adapter_name=adapter_name, **training)
    return LogitCombination(without_adapter(model, adapter_name), model.eval(), weight, relu=True)
