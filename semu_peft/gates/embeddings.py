"""Prompts whose embeddings are corrupted before the model reads them, and how strong that must be."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from contextlib import AbstractContextManager
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor, nn

from semu_peft.arguments import check_count, check_kind, check_number, check_positive
from semu_peft.tuner.adapted import base_model

from .intervention import Gate, Intervention, Weights, any_open, weights_of_rows

_TAIL = 16  # numbers that torch draws together

Positions = Callable[[Tensor, Tensor], Tensor]
"""Which tokens are meant, `(N, L)`: of `input_ids` and of which of these are no padding, `(N, L)` both."""

Find = Callable[[str], Iterable[tuple[int, int]]]
"""Where in a text something is: each time from which character on, and up to which."""


def all_but_last(input_ids: Tensor, real: Tensor) -> Tensor:
    """All real tokens but each row's last, which is ECO's choice where no names are found.

    Args:
        input_ids: Token indices `(N, L)`.
        real: Which of them are no padding.

    Examples:
        >>> from semu_peft.gates.embeddings import all_but_last
        >>> real = torch.tensor([[True, True, True], [False, True, True]])
        >>> all_but_last(torch.zeros(2, 3), real).int().tolist()
        [[1, 1, 0], [0, 1, 0]]
    """
    rest = real.flip(-1).int().cumsum(-1).flip(-1)
    return real & (rest > 1)


class EntityTokens:
    """The tokens that a text's names are made of; of a text in which none is found, all but the last.

    Source: ECO, arXiv 2406.07933, where `dslim/bert-base-NER` finds the names. Here anything does that says where in a
    text they stand:

    - words with a capital letter: `lambda text: [m.span() for m in re.finditer(r"[A-Z]\\w+", text)]`;
    - spaCy: `lambda text: [(e.start_char, e.end_char) for e in nlp(text).ents]`;
    - a `pipeline("ner", aggregation_strategy="simple")` of transformers:
      `lambda text: [(e["start"], e["end"]) for e in ner(text)]`.

    A token belongs to a name where it shares a character with it. Special tokens belong to none.

    Args:
        tokenizer: The model's.
        find: Where in a text the names are.

    Raises:
        TypeError: The tokenizer cannot decode, or `find` cannot be called.

    Examples:
        >>> import re
        >>> from semu_peft.gates import EntityTokens
        >>> find = lambda text: [match.span() for match in re.finditer("blue|red", text)]
        >>> ids = tokenizer("the sky is blue", return_tensors="pt").input_ids
        >>> EntityTokens(tokenizer, find)(ids, torch.ones_like(ids)).int().tolist()
        [[0, 0, 0, 1]]
    """

    def __init__(self, tokenizer: Any, find: Find) -> None:
        if not hasattr(tokenizer, "decode"):
            raise TypeError(
                f"`tokenizer` must be the model's, got {type(tokenizer).__name__}. Load it beside the model."
            )
        check_kind("find", find, Callable, "a function", "Give `text -> [(start, end), …]`.")  # type: ignore[arg-type]
        self.tokenizer, self.find = tokenizer, find

    def __call__(self, input_ids: Tensor, real: Tensor) -> Tensor:
        """See [`Positions`][semu_peft.gates.embeddings.Positions]."""
        real = real.bool().cpu()
        chosen = torch.zeros_like(real)
        for row, held in enumerate(real):
            places = held.nonzero()[:, 0]
            chosen[row, places] = torch.tensor(self._of_text(input_ids[row].cpu()[places].tolist()), dtype=torch.bool)
        return torch.where(chosen.any(-1, keepdim=True), chosen, all_but_last(input_ids, real))

    def _of_text(self, tokens: list[int]) -> list[bool]:
        spans = [(int(first), int(last)) for first, last in self.find(self._decoded(tokens))]
        special = set(getattr(self.tokenizer, "all_special_ids", ()))
        start = end = 0
        chosen = []
        for count, token in enumerate(tokens, 1):
            reached = len(self._decoded(tokens[:count]))
            if reached > end:  # else a further byte of the same character
                start, end = end, reached
            meant = any(max(start, first) < min(end, last) for first, last in spans)
            chosen.append(meant and token not in special)
        return chosen

    def _decoded(self, tokens: list[int]) -> str:
        return str(self.tokenizer.decode(tokens, skip_special_tokens=True, clean_up_tokenization_spaces=False))


class EmbeddingCorruption(Intervention):
    """A model that reads corrupted embeddings of the prompts on which a gate opens: `e + w σ ε`, or `e` with zeros.

    Only prompts are corrupted, not what is generated after them, and the same for every example, whose tokens are
    counted from the first that is no padding.

    Source: ECO, arXiv 2406.07933. Its release overwrites positions that were not selected, and takes every hook of the
    model off with its own; here all else stays.

    Args:
        model: A language model.
        gate: Which prompts.
        strength: `σ` of the noise; for `"zero"` 1 leaves nothing.
        kind: Gaussian noise, or zeros in the largest entries.
        dimensions: In how many entries of an embedding: the first for noise, the largest for zeros; by default all.
        positions: Which tokens, `(input_ids, real) -> mask`, all `(N, L)`; by default all real ones but the last.
            [`EntityTokens`][semu_peft.gates.embeddings.EntityTokens] are those of names.
        seed: Of the noise.

    Examples:
        >>> from transformers import LlamaConfig, LlamaForCausalLM
        >>> from semu_peft.gates import EmbeddingCorruption
        >>> sizes = {"hidden_size": 8, "intermediate_size": 8, "num_attention_heads": 2, "vocab_size": 16}
        >>> model = LlamaForCausalLM(LlamaConfig(num_hidden_layers=1, **sizes)).eval()
        >>> gate = lambda model, input_ids, **others: {"request": (input_ids[:, 0] == 7).float()}
        >>> corrupted, ids = EmbeddingCorruption(model, gate, strength=100.0), torch.tensor([[7, 1, 2], [3, 1, 2]])
        >>> (corrupted(input_ids=ids).logits == model(ids).logits).flatten(1).all(1)
        tensor([False,  True])
    """

    def __init__(
        self,
        model: nn.Module,
        gate: Gate | Callable[..., Weights],
        strength: float = 1.0,
        *,
        kind: Literal["noise", "zero"] = "noise",
        dimensions: int | None = None,
        positions: Positions = all_but_last,
        seed: int = 0,
    ) -> None:
        super().__init__(model, gate)
        check_kind("positions", positions, Callable, "a function", "Give `(input_ids, real) -> mask`.")  # type: ignore[arg-type]
        check_number("strength", strength, low=0.0)
        check_count("dimensions", dimensions, optional=True)
        if kind not in ("noise", "zero"):
            raise ValueError(f"`kind` must be 'noise' or 'zero', got {kind!r}. Use one of these.")
        find: Any = getattr(base_model(model), "get_input_embeddings", None)
        if find is None:
            raise ValueError(
                f"`model` must have embeddings of tokens, got {type(model).__name__}. Load a language model."
            )
        self.strength, self.kind, self.dimensions = strength, kind, dimensions
        self.positions, self.seed = positions, seed

    def opened(self, weights: dict[str, Tensor]) -> AbstractContextManager[None]:
        layer: Any = base_model(self.model)
        state: dict[str, Tensor] = {}

        def corrupt(module: nn.Module, args: tuple[Any, ...], output: Tensor) -> Tensor:
            if "chosen" not in state:  # the prompt
                real = state["real"] if "real" in state else torch.ones(output.shape[:2], dtype=torch.bool)
                state["chosen"] = self._chosen(args[0], real).to(output.device)
                state["noise"] = self._noise(output, real)
            chosen, noise = state["chosen"], state["noise"]
            if output.shape[1] < chosen.shape[1]:  # a token that follows
                return output
            rows = weights_of_rows(any_open(weights), output)
            chosen, noise = (each.repeat_interleave(len(rows) // len(each), 0) for each in (chosen, noise))
            chosen = nn.functional.pad(chosen, (0, output.shape[1] - chosen.shape[1]))
            return self._corrupted(output, chosen, rows, noise)

        def look(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
            mask = kwargs.get("attention_mask")
            if "chosen" not in state and isinstance(mask, Tensor) and mask.dim() == 2:
                state["real"] = mask.bool()

        found: Any = layer.get_input_embeddings()
        return self.hooked([(found, corrupt)], before=[(layer, look)])

    def _chosen(self, input_ids: Tensor, real: Tensor) -> Tensor:
        chosen = torch.as_tensor(self.positions(input_ids, real.to(input_ids.device)))
        if chosen.shape != input_ids.shape:
            raise ValueError(
                f"`positions` must say of each token whether it is meant, {tuple(input_ids.shape)}, got a mask of "
                f"shape {tuple(chosen.shape)}. Return one like `input_ids`."
            )
        return chosen.bool()

    def _noise(self, output: Tensor, real: Tensor) -> Tensor:
        """`ε`, `(N, L, D)`: that of a token depends on how many real ones are before it alone."""
        length, size = output.shape[1:]
        generator = torch.Generator().manual_seed(self.seed)
        # The last numbers that torch draws depend on how many there are.
        noise = torch.randn(length + _TAIL, size, generator=generator)[:length]
        if self.dimensions is not None:
            noise[:, self.dimensions :] = 0
        return noise[(real.cpu().long().cumsum(1) - 1).clamp_min(0)].to(output)

    def _corrupted(self, output: Tensor, chosen: Tensor, rows: Tensor, noise: Tensor) -> Tensor:
        weight = self.strength * rows.to(output.dtype).view(-1, 1, 1)
        if self.kind == "noise":
            changed = output + weight * nn.functional.pad(noise, (0, 0, 0, output.shape[1] - noise.shape[1]))
        else:
            size = output.shape[-1] if self.dimensions is None else min(self.dimensions, output.shape[-1])
            largest = torch.zeros_like(output).scatter(-1, output.abs().topk(size).indices, 1.0)
            changed = output * (1 - weight.clamp(max=1) * largest)
        return torch.where(chosen.unsqueeze(-1) & (rows > 0).view(-1, 1, 1), changed, output)


@dataclass(frozen=True)
class StrengthSearch:
    """What a search found.

    Attributes:
        strength: The strength with the smallest loss.
        loss: That loss.
        tried: Every strength and its loss, in order.

    Examples:
        >>> StrengthSearch(0.5, 1.0, ((0.5, 1.0),))
        StrengthSearch(strength=0.5, loss=1.0, tried=((0.5, 1.0),))
    """

    strength: float
    loss: float
    tried: tuple[tuple[float, float], ...]


def secant(function: Callable[[float], float], x: float, step: float, low: float = 0.0) -> float:
    """`(f(x + ε) − f(x′)) / (x + ε − x′)` with `x′ = max(x − ε, low)`: the slope over what was really asked.

    Where the lower point is clipped, ECO's release divides by 2 ε all the same.

    Args:
        function: `f`.
        x: Where.
        step: `ε`.
        low: The smallest argument that `f` takes.

    Examples:
        >>> f = lambda x: 3 * x**2 - 5 * x + 1
        >>> round(secant(f, 0.7, 0.3), 6), round(secant(f, 0.7, 0.3, low=0.5), 6)
        (-0.8, -0.5)
    """
    check_positive("step", step)
    lower = max(x - step, low)
    return (function(x + step) - function(lower)) / (x + step - lower)


def zeroth_order(
    function: Callable[[float], float],
    start: float = 0.1,
    *,
    learning_rate: float = 100.0,
    step: float | None = None,
    low: float = 1e-3,
    steps: int = 10,
    goal: float | None = None,
) -> StrengthSearch:
    """Search a strength by slopes that are estimated from two values, `σ ← max(σ − lr ĝ, low)`, and keep the best.

    Source: ECO, arXiv 2406.07933: lr 100, σ₀ .1, ε .999 σ₀, 10 steps. Choose on data that are not those reported on.

    Args:
        function: The loss at a strength.
        start: `σ₀`.
        learning_rate: Of a step.
        step: `ε`; by default .999 σ₀.
        low: The smallest strength.
        steps: How many.
        goal: At which loss to stop.

    Returns:
        The best strength that was tried.

    Raises:
        TypeError: `function` cannot be called.

    Examples:
        >>> found = zeroth_order(lambda x: (x - 0.4) ** 2, learning_rate=0.5, steps=3)
        >>> round(found.strength, 6), len(found.tried)
        (0.4, 4)
    """
    check_kind("function", function, Callable, "a function", "Give `strength -> loss`.")  # type: ignore[arg-type]
    check_positive("start", start)
    check_count("steps", steps)
    tried = [(start, function(start))]
    for _ in range(steps):
        if goal is not None and tried[-1][1] <= goal:
            break
        slope = secant(function, tried[-1][0], 0.999 * start if step is None else step, low)
        x = max(tried[-1][0] - learning_rate * slope, low)
        tried.append((x, function(x)))
    strength, loss = min(tried, key=lambda each: each[1])
    return StrengthSearch(strength, loss, tuple(tried))
