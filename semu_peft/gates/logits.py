"""Two models that speak with one voice: the logits of a second one are taken off those of the first."""

from __future__ import annotations

import copy
import inspect
import math
from collections.abc import Callable
from contextlib import AbstractContextManager
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from transformers import DynamicCache

from semu_peft.arguments import check_count, check_model, check_number, check_share
from semu_peft.objectives.batches import logits_of
from semu_peft.objectives.replica import replicate
from semu_peft.tuner.adapted import base_model

from .intervention import Gate, Intervention, Weights, always, any_open, weights_of_rows


class PairedCache(DynamicCache):
    """The keys and values of two models that go through the same tokens; what is done to one is done to the other.

    Args:
        first: The configuration of the first model.
        second: That of the other.

    Examples:
        >>> from transformers import LlamaConfig
        >>> PairedCache(LlamaConfig(), LlamaConfig()).other.get_seq_length()
        0
    """

    def __init__(self, first: Any, second: Any) -> None:
        super().__init__(**_for_cache(first))
        self.other = DynamicCache(**_for_cache(second))

    def reorder_cache(self, beam_idx: Any) -> None:
        super().reorder_cache(beam_idx)
        self.other.reorder_cache(beam_idx)

    def crop(self, max_length: int) -> None:
        super().crop(max_length)
        self.other.crop(max_length)

    def batch_repeat_interleave(self, repeats: int) -> None:
        super().batch_repeat_interleave(repeats)
        self.other.batch_repeat_interleave(repeats)

    def batch_select_indices(self, indices: Tensor) -> None:
        super().batch_select_indices(indices)
        self.other.batch_select_indices(indices)


class LogitCombination(Intervention):
    """A model from whose logits those of an assistant, which knows what is to be forgotten, are taken off.

    `z − w a`, or `z − w relu(a − z)` with `relu`, which lowers only what the assistant makes likelier. With a `filter`
    the assistant counts only for tokens with `p ≥ filter · max p`. Both models keep their caches while tokens are
    generated, and beams take both along.

    Source: ULD, arXiv 2406.08607 (w .75 on TOFU and .5 on Harry Potter, filter .01; an assistant of the first 8 layers,
    see [`truncated`][semu_peft.gates.logits.truncated]); with `relu` Who's Harry Potter, arXiv 2310.02238.

    Args:
        model: The model.
        assistant: A model with the same vocabulary.
        weight: `w`.
        relu: Take off only what is larger in the assistant.
        filter: From which share of the likeliest token's probability on the assistant counts; by default everywhere.
        gate: For which examples; by default for all.

    Examples:
        >>> from semu_peft.gates import LogitCombination
        >>> model, assistant, x = nn.Linear(4, 3), nn.Linear(4, 3), torch.ones(1, 4)
        >>> combined = LogitCombination(model, assistant, weight=0.5)
        >>> torch.allclose(combined(x), model(x) - 0.5 * assistant(x))
        True
    """

    def __init__(
        self,
        model: nn.Module,
        assistant: nn.Module,
        weight: float = 0.75,
        *,
        relu: bool = False,
        filter: float | None = None,
        gate: Gate | Callable[..., Weights] = always,
    ) -> None:
        super().__init__(model, gate)
        check_model(assistant, "assistant")
        check_number("weight", weight)
        check_share("filter", filter, optional=True)
        self.assistant = assistant
        self.weight, self.relu, self.filter = weight, relu, filter

    def opened(self, weights: dict[str, Tensor]) -> AbstractContextManager[None]:
        hook = partial(self._combine, opened=any_open(weights))
        return self.hooked([(base_model(self.model), hook)], with_kwargs=True)

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        if kwargs.get("use_cache") and kwargs.get("past_key_values") is None:
            kwargs["past_key_values"] = self._cache()
        return super().forward(*args, **kwargs)

    def generation_options(self, weights: dict[str, Tensor], options: dict[str, Any]) -> dict[str, Any]:
        config: Any = getattr(self.model, "generation_config", None)
        if options.get("use_cache", getattr(config, "use_cache", True)):
            options.setdefault("past_key_values", self._cache())
        return options

    def combine(self, logits: Tensor, other: Tensor, opened: Tensor) -> Tensor:
        """The combined logits.

        Args:
            logits: The model's, `(N, …, V)`.
            other: The assistant's.
            opened: For each row a weight in [0, 1], which multiplies `w`.
        """
        z, a = logits.float(), other.to(logits.device).float()
        taken = (a - z).relu() if self.relu else a
        if self.filter is not None:
            taken = taken.where(z >= z.amax(-1, keepdim=True) + math.log(self.filter), 0.0)
        share = weights_of_rows(opened, logits).view(-1, *(1 for _ in logits.shape[1:]))
        return torch.where(share > 0, z - self.weight * share * taken, z).to(logits.dtype)

    def _combine(self, module: nn.Module, args: Any, kwargs: dict[str, Any], output: Any, *, opened: Tensor) -> Any:
        named = {name: value for name, value in kwargs.items() if name != "labels"}
        cache = named.get("past_key_values")
        if isinstance(cache, PairedCache):
            named["past_key_values"] = cache.other
        elif cache is not None and int(cache.get_seq_length()) > 0 and _is_continued(named, cache):
            raise ValueError(
                f"`past_key_values` must be a cache of both models, got a {type(cache).__name__}. Begin with the whole "
                "prompt, or generate with `use_cache=False`."
            )
        else:
            named.pop("past_key_values", None)
        other = logits_of(self.assistant(*args, **named))
        return _with_logits(module, output, self.combine(logits_of(output), other, opened), kwargs.get("labels"))

    def _cache(self) -> PairedCache:
        first, second = (getattr(base_model(each), "config", None) for each in (self.model, self.assistant))
        if first is None or getattr(first, "is_encoder_decoder", False):
            raise ValueError(
                f"`use_cache` must be False for {type(base_model(self.model)).__name__}, whose two caches are not "
                "kept in step. Pass it so."
            )
        return PairedCache(first, second)


def truncated(model: nn.Module, layers: int = 8) -> nn.Module:
    """The model's first layers under its own head, over the same tensors: an assistant that costs no memory.

    Adapters that are put into it are not in the model. `get_peft_model` freezes the weights that both share.

    Source: ULD, arXiv 2406.08607, where the first 8 of 32 layers are copied.

    Args:
        model: A language model of transformers without adapters.
        layers: How many layers to keep.

    Raises:
        ValueError: The model has no list of so many layers.

    Examples:
        >>> from transformers import LlamaConfig, LlamaForCausalLM
        >>> from semu_peft.gates import truncated
        >>> sizes = {"hidden_size": 8, "intermediate_size": 8, "num_attention_heads": 2, "vocab_size": 16}
        >>> model = LlamaForCausalLM(LlamaConfig(num_hidden_layers=3, **sizes))
        >>> short = truncated(model, layers=1)
        >>> len(short.model.layers), len(model.model.layers), short.lm_head.weight is model.lm_head.weight
        (1, 3, True)
    """
    check_model(model)
    check_count("layers", layers)
    config: Any = getattr(model, "config", None)
    count = getattr(config, "num_hidden_layers", 0)
    if layers > count:
        raise ValueError(f"`layers` must be at most the model's {count}, got {layers}. Keep fewer.")
    replicas = replicate(model)
    lists = [module for module in model.modules() if isinstance(module, nn.ModuleList) and len(module) == count]
    if replicas is None or not lists:
        raise ValueError(
            f"`model` must be a plain transformer with a list of {count} layers, got {type(model).__name__}. Take the "
            "adapters off, or give an assistant of your own."
        )
    for each in lists:
        shorter: Any = replicas[id(each)]
        vars(shorter)["_modules"] = dict(list(vars(shorter)["_modules"].items())[:layers])
    own = copy.deepcopy(config)
    own.num_hidden_layers = layers
    if getattr(own, "layer_types", None):
        own.layer_types = own.layer_types[:layers]
    for module in replicas.values():
        if vars(module).get("config") is config:
            vars(module)["config"] = own
    return replicas[id(model)]


def _is_continued(named: dict[str, Any], cache: Any) -> bool:
    """Whether a cache held tokens before this call filled it."""
    ids = named.get("input_ids")
    ids = named.get("inputs_embeds") if ids is None else ids
    return ids is None or int(cache.get_seq_length()) > ids.shape[1]


def _for_cache(config: Any) -> dict[str, Any]:
    """What a `DynamicCache` of this version of transformers is made of: later ones ask for the configuration."""
    known = inspect.signature(DynamicCache.__init__).parameters
    return {"config": config} if "config" in known and config is not None else {}


def _with_logits(module: nn.Module, output: Any, logits: Tensor, labels: Tensor | None) -> Any:
    if isinstance(output, Tensor):
        return logits
    if isinstance(output, tuple):
        place = 1 if labels is not None else 0
        return (*output[:place], logits, *output[place + 1 :])
    output["logits"] = logits
    if labels is not None:  # the loss was that of the model alone
        config: Any = module.config
        loss: Any = module.loss_function
        output["loss"] = loss(logits=logits, labels=labels, vocab_size=config.vocab_size)
    return output
