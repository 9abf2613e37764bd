"""Make a language model forget texts, facts or answers, in one call."""

from __future__ import annotations

import inspect
import warnings
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from typing import Any

from peft import PeftModel, get_peft_model
from torch import Tensor, nn
from transformers import PreTrainedModel

from semu_peft import objectives
from semu_peft.adapter.whole_model import add_adapter, taken_back_on_error
from semu_peft.arguments import check_adapter_name, check_count, check_model, check_number
from semu_peft.objectives.base import Objective
from semu_peft.objectives.batches import is_encoder_decoder
from semu_peft.objectives.retain import Retain
from semu_peft.subspace import SubspaceProfile, initialize_semu_weights
from semu_peft.subspace.initialize import check_config
from semu_peft.training.natural import NaturalGradient, why_not_natural
from semu_peft.training.parameters import trained_parameters
from semu_peft.training.unlearn import UnlearnResult, unlearn
from semu_peft.tuner import SemuConfig
from semu_peft.tuner.adapted import base_model

from .dataset import TextExamples, text_examples
from .decoding import check_fits, most_tokens
from .encode import TextEncoder
from .others import answers_about_others
from .samples import own_samples
from .shapes import TextExample, check_apart
from .stopping import UntilUnseen
from .unseen import unseen_answers

_METHODS: dict[str, Callable[[], Objective]] = {
    "npo": lambda: objectives.NPO(beta=0.03),
    "simnpo": objectives.SimNPO,
    "dpo": objectives.DPO,
    "idk": objectives.DPO,
    "altpo": objectives.DPO,
    "flat": objectives.FDivergence,
    "delete": objectives.DecoupledDistillation,
    "undial": objectives.UNDIAL,
    "ce-u": objectives.CEU,
    "wga": objectives.WGA,
    "satimp": objectives.SatImp,
    "inverted-hinge": objectives.InvertedHinge,
    "gradient-ascent": objectives.GradientAscent,
}
# Nearly all that the gradients have: at the same forgetting, others keep more than with the adapter's own default
# (`benchmarks/tofu/without_retain.py`). Bounded, as bases are as large as ranks are.
USUAL_DIRECTIONS: dict[str, Any] = {"explained_variance": 0.99, "r": 128}
_UNSEEN = "unseen-answers"
_OWN, _OTHERS = "what the model says of its own accord", "its own answers about others"
_SHOWN = {"neutral": "neutral texts"}
_ALTERNATES = {"dpo": "refusals", "idk": "refusals", "flat": "refusals", "altpo": "perturbed"}


@dataclass(frozen=True)
class _Usual:
    """What goes with a method where nothing else is asked for; chosen in benchmarks/tofu.

    Attributes:
        retain_weight: Nats of forgetting that a nat of change outweighs, for two sets.
        weight_of_others: Of each set where the model's own answers about others are one: they are near what it forgets.
        weight_of_samples: The same as the first where the model's own samples are all there is to hold.
        kl: How far a step may move the outputs, where that is not the optimiser's default.
    """

    retain_weight: float = 60.0
    weight_of_others: float = 10.0
    weight_of_samples: float = 60.0
    kl: float | None = None

    def weight(self, held: Mapping[str, Any]) -> float:
        """Of all that is held together."""
        if _OTHERS in held:
            return self.weight_of_others * len(held)
        return self.weight_of_samples if _OWN in held else self.retain_weight


# Weighted ascent lets go of an answer as it becomes unlikely, so that far less holds it, at longer steps.
_USUAL = {"wga": _Usual(2.0, 0.3, 6.0, kl=0.5)}


@dataclass(frozen=True, eq=False)
class TextResult:
    """What `forget_text` did.

    Attributes:
        model: The model with the adapter, active: a `PeftModel`, or the model that was given, if it had adapters.
        adapter_name: The adapter's name in it.
        profile: The spectra and ranks of the forget gradients.
        training: History, time and counts of the training.
        examples: What was forgotten, as tokens.

    Examples:
        >>> from semu_peft import forget_text
        >>> few = {"max_steps": 1, "batch_size": 2, "progress": False}
        >>> result = forget_text(decoder, tokenizer, ["a b c", "d e f"], neutral=["g h"], **few)  # of a loaded model
        >>> type(result.model).__name__, len(result.profile.layers), len(result.examples)
        ('PeftModelForCausalLM', 14, 2)
    """

    model: Any = field(repr=False)
    adapter_name: str
    profile: SubspaceProfile = field(repr=False)
    training: UnlearnResult
    examples: TextExamples


def forget_text(
    model: nn.Module,
    tokenizer: Any,
    forget: Any,
    *,
    retain: Any = None,
    neutral: Any = None,
    method: str | Objective = "wga",
    alternates: Any = None,
    template: str | None = None,
    max_length: int = 512,
    retain_weight: float | None = None,
    max_retain_kl: float | None = None,
    config: SemuConfig | None = None,
    until_unseen: bool = True,
    max_steps: int = 80,
    batch_size: int = 32,
    callbacks: Any = (),
    seed: int = 0,
    progress: bool = True,
    adapter_name: str = "default",
    **training: Any,
) -> TextResult:
    """Make a language model forget texts or answers: tokenise, find the subspace, train, with a hold on all else.

    What is minimised is the method's objective on the forget batches plus `retain_weight` times `KL(original ‖ now)`
    per token on batches that are to stay as they are: the `retain` data and `neutral` texts. Without `retain` the model
    is asked about others than the questions to forget name, and its answers are held
    ([`answers_about_others`][semu_peft.language.others.answers_about_others]); where they name nobody, the run warns,
    and holds what the model says of its own accord unless there are neutral texts. The cores are trained by natural
    gradients, so that no learning rate is needed. Adapters that are active stay so, and only the new one trains.

    Args:
        model: A language model of transformers, decoder or encoder-decoder, also quantised; bare or with adapters.
        tokenizer: Its tokenizer.
        forget: What to forget: a list of texts, of pairs (prompt, answer) or of mappings, a `datasets.Dataset` or a
            path, as [`text_examples`][semu_peft.language.dataset.text_examples] reads it; or ready `TextExamples`.
        retain: What to keep, likewise: answers of the same kind that must stay. Without them, and without the model's
            own answers about others, forgetting more than a few answers takes others of that kind along.
        neutral: Texts of any kind, likewise, on which the model must not change.
        method: `"wga"` (weighted ascent, which forgot the most at the most of the utility in `benchmarks/tofu`),
            `"npo"` (β 0.03), `"simnpo"`, `"unseen-answers"`
            ([`UnseenAnswer`][semu_peft.objectives.language.UnseenAnswer], against
            [`unseen_answers`][semu_peft.language.unseen.unseen_answers]), `"delete"` (struck-out distillation),
            `"undial"`, `"ce-u"`, `"satimp"`, `"inverted-hinge"`, `"gradient-ascent"`; `"idk"` (the same as `"dpo"`),
            `"altpo"` and `"flat"`, which compare two answers; or an objective of your own.
        alternates: Another answer to each prompt, see
            [`choose_alternates`][semu_peft.language.alternates.choose_alternates]; by default refusals where the method
            needs them, and for `"altpo"` the wrong answers that the data bring.
        template: How prompt and answer are written; by default by the tokenizer's chat template, if it has one. Write
            it as the model was trained. Ready `TextExamples` keep theirs.
        max_length: The most tokens of a row; at most as many as the model has positions.
        retain_weight: Weight of what is to stay; by default 60, with `"wga"` 2, or 6 where that is nothing but what the
            model says itself; where its own answers about others are among it 10 of each set, with `"wga"` 0.3; with
            `max_retain_kl`, which brings its own, 0.
        max_retain_kl: The damage that may be done, `KL(original ‖ now)` in nats a token on what is to stay, which no
            step exceeds.
        config: The adapter; by default all linear layers but the head, and of each the directions that explain 0.99 of
            the forget gradient's energy, 128 at most.
        until_unseen: Stop once the mean answer is as unlikely as answers that the model has never learnt, which
            [`unseen_answers`][semu_peft.language.unseen.unseen_answers] makes; past this, everything only gets worse.
            Where it can make none, such as of answers of a word, the run warns, and ends where it would without this.
            Where all answers are as unlikely from the start, it takes none, and says so.
        max_steps: Steps at most.
        batch_size: Rows a step, and as many of what is to stay.
        callbacks: As [`unlearn`][semu_peft.training.unlearn.unlearn] takes them.
        seed: Seed of everything drawn.
        progress: Show progress bars.
        adapter_name: The adapter's name.
        training: Further arguments of [`unlearn`][semu_peft.training.unlearn.unlearn], such as
            `gradient_accumulation_steps` or, for AdamW, `learning_rate`. Steps of `"wga"` are by
            `optimizer=NaturalGradient(kl=0.5)` unless told.

    Returns:
        The model with the adapter, and what was done.

    Raises:
        ValueError: Arguments contradict each other, a row is both to be forgotten and to be kept, or there is nothing
            to forget. Whatever fails, the model is left without the adapter.
        TypeError: An argument is neither of this function nor of `unlearn`.

    Examples:
        >>> from semu_peft import forget_text
        >>> facts = [("What colour is the sky?", "blue"), ("How many?", "two or three")]
        >>> few = {"max_steps": 2, "until_unseen": False, "progress": False}
        >>> result = forget_text(decoder, tokenizer, facts, retain=[("What?", "a b c")], **few)
        >>> result.training.steps, result.model.active_adapters
        (2, ['default'])
    """
    _check_method(method)
    _check(model, adapter_name, retain_weight, max_length, max_steps, batch_size, training)
    if config is not None:
        check_config(config)
    is_seq2seq, longest = is_encoder_decoder(model), most_tokens(model, max_length)
    reading: dict[str, Any] = {"template": template, "max_length": longest, "seq2seq": is_seq2seq, "seed": seed}
    wanted = _ALTERNATES.get(method) if isinstance(method, str) and alternates is None else alternates
    examples = _examples(tokenizer, forget, "forget", alternates=wanted, progress=progress, **reading)
    given = {name: data for name, data in (("retain", retain), ("neutral", neutral)) if data is not None}
    kept = [_examples(tokenizer, data, name, **reading) for name, data in given.items()]
    for name, each in zip(given, kept, strict=True):
        check_apart(examples.examples, each.examples, name)
    for name, each in zip(("forget", *given), (examples, *kept), strict=True):
        check_fits(model, each.rows, name)  # what is given ready
    encoder = examples.encoder or TextEncoder(tokenizer, template, longest, is_seq2seq)
    never_learnt = _unseen(examples, method, seed) if until_unseen or method == _UNSEEN else []
    if until_unseen and not never_learnt:
        warnings.warn(
            "`until_unseen` has nothing to compare with, as no unseen answers can be made of `forget`: the run may go "
            "on far past that level. Give wrong answers (`perturbed_answer`), or fewer `max_steps`.",
            stacklevel=2,
        )
    held = dict(zip(given, kept, strict=True))
    if retain is None:
        # Several for each that is forgotten, but no more than the run can read.
        number = max(4 * batch_size, min(4 * len(examples), batch_size * max_steps))
        asking = {"number": number, "batch_size": batch_size, "seed": seed, "progress": progress}
        held |= _of_the_model_itself(model, examples, template, is_beside=bool(held), **asking)
    usual, weight = _USUAL.get(method, _Usual()) if isinstance(method, str) else _Usual(), retain_weight
    if weight is None:
        weight = 0.0 if max_retain_kl is not None else usual.weight(held)
    terms = [
        Retain(each.loader(min(batch_size, len(each))), objectives.KLToOriginal(), weight / len(held))
        for each in held.values()
    ]
    size = min(batch_size, len(examples))
    rows = [row for each in never_learnt for row in replace(encoder, max_length=longest).encode(each)]
    unseen = _nll(model, TextExamples(rows, never_learnt, tokenizer), size) if rows else None
    of_forget = _nll(model, examples, size) if method == _UNSEEN else None
    objective = _objective(method, unseen, of_forget)
    has_reached = isinstance(objective, objectives.UnseenAnswer) and objective.is_reached
    start = objectives.CrossEntropy() if has_reached else objective  # which has no direction left
    # Where one batch is all, a look costs little, and a few steps more would go far past.
    every = 2 if size == len(examples) else 5
    stop = []
    if until_unseen and unseen is not None and method != _UNSEEN:  # which ends by itself, answer by answer
        least = float(unseen.min())
        stop = [UntilUnseen(examples, float(unseen.mean()), every=every, batch_size=size, likeliest=least)]
    if config is None:
        task = "SEQ_2_SEQ_LM" if is_seq2seq else "CAUSAL_LM"
        config = SemuConfig(target_modules="all-linear", task_type=task, **USUAL_DIRECTIONS)
    with taken_back_on_error(base_model(model), adapter_name=adapter_name):
        adapted = _with_adapter(model, config, adapter_name)
        profile = initialize_semu_weights(
            adapted, examples.loader(size, shuffle=False), start, adapter_name=adapter_name, progress=progress
        )
        asked = any(training.get(name) is not None for name in ("optimizer", "learning_rate", "scheduler"))
        if usual.kl is not None and not asked:
            trained, precision = trained_parameters(adapted), training.get("mixed_precision")
            if why_not_natural(adapted, trained, [objective], precision) is None:  # or AdamW does, as for other methods
                training["optimizer"] = NaturalGradient(kl=usual.kl)
        result = unlearn(
            adapted, examples.loader(size), objective, retain=terms, max_retain_kl=max_retain_kl, max_steps=max_steps,
            callbacks=[*stop, *callbacks], seed=seed, progress=progress, adapter_name=adapter_name, **training,
        )  # fmt: skip
    if retain is None:
        result = replace(result, damage_on=" and ".join(_SHOWN.get(name, name) for name in held))
    return TextResult(adapted, adapter_name, profile, result, examples)


def _of_the_model_itself(
    model: nn.Module, forget: TextExamples, template: str | None, *, is_beside: bool, **asking: Any
) -> dict[str, TextExamples]:
    """What to hold without `retain`: answers about others, or samples where there is nothing else."""
    try:
        return {_OTHERS: answers_about_others(model, forget.tokenizer, forget, template=template, **asking)}
    except (TypeError, ValueError) as error:  # it may not generate at all
        warnings.warn(
            f"Nothing is held but {_SHOWN['neutral'] if is_beside else _OWN}, which says little of answers of the same "
            "kind: others may be lost with those to be forgotten, so measure what is left of them. (The model was to "
            f"be asked about others instead: {error})",
            stacklevel=3,
        )
    return {} if is_beside else {_OWN: own_samples(model, forget.tokenizer, without=forget, **asking)}


def _check_method(method: Any) -> None:
    names = [*_METHODS, _UNSEEN]
    if not isinstance(method, Objective) and method not in names:
        raise ValueError(
            f"`method` must be one of {', '.join(map(repr, names))} or an Objective, got {method!r}. Take 'wga'."
        )


def _objective(method: str | Objective, unseen: Tensor | None, of_forget: Tensor | None) -> Objective:
    if isinstance(method, Objective):
        return method
    if method in _METHODS:
        return _METHODS[method]()
    assert unseen is not None  # or it was refused
    return objectives.UnseenAnswer(unseen, forget_nll=of_forget)


def _unseen(examples: TextExamples, method: Any, seed: int) -> list[TextExample]:
    """Answers that the model has not learnt; none where none can be made, unless the method needs them."""
    try:
        found = unseen_answers(examples.examples, seed=seed)
    except ValueError:  # of a word or two each
        found = []
    if method == _UNSEEN and not found:
        raise ValueError(
            f"`forget` must know its texts for {_UNSEEN!r}, and have some of more than a few words. Make it with "
            "`text_examples`."
        )
    return found


def _nll(model: nn.Module, examples: TextExamples, batch_size: int) -> Tensor:
    return objectives.sequence_nll(model, examples.loader(batch_size, shuffle=False), progress=False)


def _check(
    model: nn.Module, adapter_name: str, retain_weight: float | None, max_length: int, max_steps: int, batch_size: int,
    training: Any,
) -> None:  # fmt: skip
    check_model(model)
    check_adapter_name(adapter_name)
    if not isinstance(base_model(model), PreTrainedModel):
        raise TypeError(
            f"`model` must be a language model of transformers, got {type(model).__name__}. For another one, make "
            "batches with `text_examples`, and call `initialize_semu_weights` and `unlearn`."
        )
    inputs = inspect.signature(type(base_model(model)).forward).parameters
    needed = [
        name for name, each in inputs.items() if each.default is each.empty and each.kind is each.POSITIONAL_OR_KEYWORD
    ]
    if "input_ids" not in inputs or not {"self", "input_ids"}.issuperset(needed):
        raise TypeError(
            f"`model` must read texts by themselves, got {type(base_model(model)).__name__}, which reads "
            f"{base_model(model).main_input_name!r}. Make batches of all that it reads, and call "
            "`initialize_semu_weights` and `unlearn`."
        )
    if adapter_name in getattr(base_model(model), "peft_config", {}):
        raise ValueError(f"`adapter_name`: the model has an adapter {adapter_name!r} already. Choose another name.")
    check_count("max_length", max_length, least=2)
    check_count("max_steps", max_steps)
    check_count("batch_size", batch_size)
    if retain_weight is not None:
        check_number("retain_weight", retain_weight, low=0)
    if unknown := sorted(set(training) - set(inspect.signature(unlearn).parameters)):
        raise TypeError(f"`{unknown[0]}` is an argument of neither `forget_text` nor `unlearn`. Check its name.")


def _examples(tokenizer: Any, data: Any, name: str, *, alternates: Any = None, **reading: Any) -> TextExamples:
    """What is given as tokens: made here, or ready."""
    if not isinstance(data, TextExamples):
        return text_examples(tokenizer, data, alternates=alternates, name=name, **reading)
    if alternates is not None and "alternate_labels" not in data[0]:
        raise ValueError(
            f"`{name}` must have its alternates in it, as it is ready: `text_examples(..., alternates={alternates!r})`."
        )
    if data.encoder is not None and data.encoder.seq2seq != reading["seq2seq"]:
        raise ValueError(
            f"`{name}` must be made for the model, as it is ready: `text_examples(..., seq2seq={reading['seq2seq']})`."
        )
    return data


def _with_adapter(model: Any, config: SemuConfig, adapter_name: str) -> Any:
    """The model with a new adapter: a `PeftModel`, or beside the adapters that it has in what it is already."""
    if isinstance(model, PeftModel) or getattr(model, "peft_config", None):
        add_adapter(model, config, adapter_name=adapter_name)
        return model
    return get_peft_model(model, config, adapter_name=adapter_name)
