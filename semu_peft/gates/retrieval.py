"""A gate that opens the nearest of many: which answer a prompt asks for, found by the prompts that are remembered."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from semu_peft.arguments import check_count, check_kind, check_model
from semu_peft.model_state import aside, eval_mode
from semu_peft.objectives.batches import check_batches

from .hidden import HiddenStates
from .intervention import Gate, Weights, any_open


class Retrieval:
    """Opens, where another gate opens, those of many names whose prompts are most like the example's.

    `w_j = w · 1[j among the k largest of max_i cos(h, h_ji)]`, with `w` the other gate's weight and `h_ji` the states
    of the prompts that are remembered of name `j`.

    Source: GUARD, arXiv 2505.13312, which finds the answer that a prompt is to draw by a sentence encoder; here the
    model's own states do, unless `inputs` is another encoder.

    Args:
        gate: For which examples at all.
        keys: A state of each remembered prompt, `(n, D)`.
        names: The name of each; a name may have several prompts, such as a question and its paraphrases.
        inputs: By which states prompts are compared: [`HiddenStates`][semu_peft.gates.hidden.HiddenStates], or a
            function `(model, *args, **kwargs) -> states (N, D)`, such as a sentence encoder.
        count: How many names are opened for an example.

    Raises:
        ValueError: There is no prompt, or not a name for each.

    Examples:
        >>> from semu_peft.gates import Retrieval
        >>> known = lambda model, x: {"all": x[:, 0].gt(0).float()}
        >>> gate = Retrieval(known, torch.eye(2), ["a", "b"], lambda model, x: x)
        >>> gate(None, torch.tensor([[3.0, 1.0], [1.0, 2.0], [-1.0, 2.0]]))
        {'a': tensor([1., 0., 0.]), 'b': tensor([0., 1., 0.])}
    """

    def __init__(
        self,
        gate: Gate | Callable[..., Weights],
        keys: Tensor,
        names: Sequence[str],
        inputs: HiddenStates | Callable[..., Tensor],
        *,
        count: int = 1,
    ) -> None:
        for name, value in (("gate", gate), ("inputs", inputs)):
            check_kind(name, value, Callable, "a function", "`gates` has some.")  # type: ignore[arg-type]
        check_count("count", count)
        if keys.dim() != 2 or not len(keys) or isinstance(names, str) or len(names) != len(keys):
            raise ValueError(
                f"`names` must be one for each of the states `keys`, (n, D), got {len(names)} for {tuple(keys.shape)}. "
                "Name the prompt that each is of."
            )
        self.gate, self.inputs, self.count = gate, inputs, count
        self.keys = nn.functional.normalize(keys.detach().float(), dim=-1)
        self.names = tuple(dict.fromkeys(names))
        self.owners = torch.tensor([self.names.index(name) for name in names])

    @classmethod
    def of(
        cls,
        model: nn.Module,
        forget: Iterable[Any],
        gate: Gate | Callable[..., Weights],
        inputs: HiddenStates,
        *,
        count: int = 1,
    ) -> Retrieval:
        """Remember the prompts of forget batches, each by its number: `"0"`, `"1"`, …

        Args:
            model: The model.
            forget: The forget batches, of which the prompts count.
            gate: For which examples at all.
            inputs: By which states prompts are compared.
            count: How many are opened for an example.

        Examples:
            >>> from semu_peft.gates import HiddenStates, Retrieval
            >>> from semu_peft.gates.intervention import always
            >>> model, x = nn.Sequential(nn.Linear(4, 3)), torch.eye(4)
            >>> gate = Retrieval.of(model, [x[:2], x[2:]], always, HiddenStates("0"))
            >>> list(gate(model, x[2:3]))
            ['2']
        """
        check_model(model)
        check_batches(forget, "forget")
        with eval_mode(model):
            found = [inputs.of_prompts(model, batch).cpu() for batch in forget]
        keys = torch.cat(found) if found else torch.zeros(0, 1)
        return cls(gate, keys, [str(number) for number in range(len(keys))], inputs, count=count)

    @torch.no_grad()
    def similarities(self, model: nn.Module, *args: Any, **kwargs: Any) -> Tensor:
        """How like each name's prompts inputs are, `(N, names)`: the largest cosine."""
        if isinstance(self.inputs, HiddenStates):
            states, real = self.inputs(model, *args, **kwargs)
        else:
            with aside():
                states = self.inputs(model, *args, **kwargs).float().unsqueeze(1)
            real = torch.ones(states.shape[:2], dtype=torch.bool, device=states.device)
        cosines = nn.functional.normalize(states, dim=-1) @ self.keys.to(states.device).mT
        nearest = cosines.masked_fill(~real.unsqueeze(-1), -torch.inf).amax(1)
        owners = self.owners.to(states.device).expand_as(nearest)
        found = nearest.new_full((len(nearest), len(self.names)), -torch.inf)
        return found.scatter_reduce(1, owners, nearest, "amax")

    def __call__(self, model: nn.Module, *args: Any, **kwargs: Any) -> dict[str, Tensor]:
        """Weights of those names that are open for an input, see [`Gate`][semu_peft.gates.intervention.Gate]."""
        open_rows = any_open(self.gate(model, *args, **kwargs))
        if not (open_rows > 0).any():
            return {self.names[0]: open_rows}
        similarities = self.similarities(model, *args, **kwargs)
        nearest = similarities.topk(min(self.count, len(self.names)), dim=-1).indices
        chosen = torch.zeros_like(similarities).scatter(1, nearest, 1.0) * open_rows.to(similarities).unsqueeze(1)
        places = (chosen > 0).any(0).nonzero()[:, 0].tolist()
        return {self.names[place]: chosen[:, place] for place in places}
