"""A model that is changed while it is called: for the examples that a gate says, decided once a prompt."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from contextvars import ContextVar
from functools import partial
from typing import Any, Protocol
from weakref import WeakKeyDictionary

import torch
from torch import Tensor, nn

from semu_peft.arguments import check_model
from semu_peft.model_state import eval_mode
from semu_peft.tuner.adapted import base_model

Weights = Mapping[str, Tensor]
"""By the name of an adapter or request, a weight in [0, 1] for each example, `(N,)`."""

Hook = tuple[nn.Module, Callable[..., Any]]

_WITHIN: ContextVar[frozenset[int]] = ContextVar("semu_within", default=frozenset())  # whose hooks are to run
_GENERATING: ContextVar[bool] = ContextVar("semu_generating", default=False)  # then examples become beams


def first_of(output: Any) -> Tensor:
    """What a layer gives: the tensor, or the first of several, as attention gives its weights as well.

    Examples:
        >>> from semu_peft.gates.intervention import first_of
        >>> first_of((torch.ones(1), None))
        tensor([1.])
    """
    tensor: Tensor = output[0] if isinstance(output, (tuple, list)) else output
    return tensor


class Gate(Protocol):
    """Says for each example how far a correction is to be active: `(model, inputs) -> weight per example and name`.

    It is called with the model as it is without the corrections, and with what the model itself is called with. Any
    function will do. A gate never trains.

    Examples:
        >>> import torch
        >>> def about_seven(model, input_ids, **others):
        ...     return {"default": (input_ids == 7).any(-1).float()}
        >>> about_seven(None, torch.tensor([[1, 7], [1, 2]]))
        {'default': tensor([1., 0.])}
    """

    def __call__(self, model: nn.Module, *args: Any, **kwargs: Any) -> Weights: ...


class Intervention(nn.Module):
    """A model that is changed while it is called, for those examples of a batch on which a gate opens.

    The decision is taken of the prompt, with the model as it is without the change, and kept while tokens are generated
    from it: by `generate`, or by calls that hand on the cache (`past_key_values`) of the first one. A subclass says
    what is done. Outside its calls the model is what it was.

    Args:
        model: The model.
        gate: See [`Gate`][semu_peft.gates.intervention.Gate].

    Examples:
        >>> from torch import nn
        >>> from semu_peft.gates import Intervention
        >>> class Silent(Intervention):
        ...     def opened(self, weights):
        ...         hook = lambda module, inputs, output: output * (1 - weights["all"])[:, None]
        ...         return self.hooked([(self.model, hook)])
        >>> silent = Silent(nn.Identity(), lambda model, x: {"all": (x[:, 0] > 0).float()})
        >>> silent(torch.tensor([[1.0, 2.0], [-1.0, 2.0]])).tolist()
        [[0.0, 0.0], [-1.0, 2.0]]
    """

    def __init__(self, model: nn.Module, gate: Gate | Callable[..., Weights]) -> None:
        super().__init__()
        check_model(model)
        if isinstance(model, Intervention):
            raise TypeError(
                f"`model` must be the model itself, got a {type(model).__name__}, inside of which another change would "
                "not be seen. Open several adapters by one gate, or take `model.model`."
            )
        if not callable(gate):
            raise TypeError(
                f"`gate` must be a gate, `(model, *inputs) -> weights by name`, got {type(gate).__name__}. Make one "
                "of `gates.Nearest`, `gates.Classifier`, or a function."
            )
        self.model = model
        self.gate = gate
        self._decided: WeakKeyDictionary[Any, dict[str, Tensor]] = WeakKeyDictionary()

    # ---- what a subclass says ----

    @property
    def base(self) -> nn.Module:
        """The model without the change: what the gate sees, and what is called where nothing is open."""
        return self.model

    def opened(self, weights: dict[str, Tensor]) -> AbstractContextManager[Any]:
        """Change the model for the length of a call, by weights of which at least one is above zero."""
        raise NotImplementedError

    # ---- a call ----

    @torch.no_grad()
    def decide(self, *args: Any, **kwargs: Any) -> dict[str, Tensor]:
        """Ask the gate about inputs.

        Returns:
            By name, a weight for each example, `(N,)`.

        Raises:
            TypeError: The gate returns something else than tensors by name.
            ValueError: A weight is outside [0, 1], or there is none for an example.
        """
        with eval_mode(self.base):
            weights = self.gate(self.base, *args, **kwargs)
        return checked(weights)

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        """Call the model, changed for the examples on which the gate opens."""
        cache = kwargs.get("past_key_values")
        weights = self.decide(*args, **kwargs) if not _is_filled(cache) else self._decision_of(cache)
        with self.applied(weights):
            output = self.base(*args, **kwargs)
        filled = getattr(output, "past_key_values", None)
        if filled is not None and not isinstance(filled, tuple):
            self._decided[filled] = weights
        return output

    @torch.no_grad()
    def generate(self, inputs: Tensor | None = None, **kwargs: Any) -> Any:
        """Generate as the model does, by one decision about the prompt.

        Args:
            inputs: The prompts, which may be named (`input_ids`, `inputs_embeds`) as well.
            kwargs: What the model's own `generate` takes.
        """
        base: Any = self.base
        named = dict(kwargs) if inputs is None else {_main_input(base): inputs, **kwargs}
        weights = self.decide(**_for_forward(base, named))
        token = _GENERATING.set(True)
        try:
            with self.applied(weights):
                return base.generate(**self.generation_options(weights, named))
        finally:
            _GENERATING.reset(token)

    def generation_options(self, weights: dict[str, Tensor], options: dict[str, Any]) -> dict[str, Any]:
        """What `generate` is called with; a subclass may add to it."""
        return options

    def applied(self, weights: dict[str, Tensor]) -> AbstractContextManager[Any]:
        """The model as the weights want it, for the length of the context."""
        return self.opened(weights) if any(bool((each > 0).any()) for each in weights.values()) else nullcontext()

    @staticmethod
    def hooked(hooks: Sequence[Hook], *, before: Sequence[Hook] = (), with_kwargs: bool = False) -> Hooks:
        """Forward hooks for the length of a context, and some `before` the modules run; all others stay.

        Those before are called with the keyword arguments, the others `with_kwargs`.
        """
        return Hooks(hooks, before, with_kwargs)

    def _decision_of(self, cache: Any) -> dict[str, Tensor]:
        try:
            return self._decided[cache]
        except (KeyError, TypeError):
            raise ValueError(
                f"`past_key_values` must be a cache that a call of this {type(self).__name__} has filled, got a "
                f"{type(cache).__name__} of something else, for which nothing was decided. Begin with the whole prompt."
            ) from None

    def __getattr__(self, name: str) -> Any:
        """Answer for the model, which code around it asks for its `config`, `device`, `generation_config` …"""
        try:
            return super().__getattr__(name)
        except AttributeError:
            if name.startswith("_") or "model" not in self.__dict__.get("_modules", {}):
                raise
        return getattr(self.model, name)


class Hooks:
    """Forward hooks that are there for the length of a context, see `Intervention.hooked`.

    Only calls from within the context see them: another thread that calls the model meanwhile does not.

    Examples:
        >>> import torch
        >>> from semu_peft.gates.intervention import Hooks
        >>> layer, x = nn.Identity(), torch.ones(1)
        >>> with Hooks([(layer, lambda module, inputs, output: output + 1)]):
        ...     layer(x)
        tensor([2.])
        >>> layer(x)
        tensor([1.])
    """

    def __init__(self, hooks: Sequence[Hook], before: Sequence[Hook] = (), with_kwargs: bool = False) -> None:
        self._hooks, self._before, self._with_kwargs = hooks, before, with_kwargs
        self._handles: list[Any] = []

    def __enter__(self) -> None:
        self._token = _WITHIN.set(_WITHIN.get() | {id(self)})
        for module, hook in self._before:
            self._handles.append(module.register_forward_pre_hook(partial(self._run, hook), with_kwargs=True))
        for module, hook in self._hooks:
            run = partial(self._run, hook)
            self._handles.append(module.register_forward_hook(run, with_kwargs=self._with_kwargs))

    def __exit__(self, *error: Any) -> None:
        while self._handles:
            self._handles.pop().remove()
        _WITHIN.reset(self._token)

    def _run(self, hook: Callable[..., Any], *args: Any) -> Any:
        within = _WITHIN.get()
        if id(self) not in within:
            return None
        token = _WITHIN.set(within - {id(self)})  # what the hook itself calls is as it was
        try:
            return hook(*args)
        finally:
            _WITHIN.reset(token)


def checked(weights: Any) -> dict[str, Tensor]:
    """A gate's weights, checked.

    Raises:
        TypeError: They are no tensors by name.
        ValueError: They are not `(N,)` in [0, 1].

    Examples:
        >>> import torch
        >>> from semu_peft.gates.intervention import checked
        >>> checked({"default": torch.tensor([2.0])})
        Traceback (most recent call last):
        ValueError: `gate` must give weights in [0, 1], got 2.0 to 2.0 for 'default'. Scale or clamp them.
    """
    if not isinstance(weights, Mapping) or not all(isinstance(each, Tensor) for each in weights.values()):
        raise TypeError(
            f"`gate` must give tensors of weights by the adapter's name, got {type(weights).__name__}. Return "
            "`{'default': weights}`, one weight for each example."
        )
    sizes = {name: tuple(each.shape) for name, each in weights.items()}
    if len(set(sizes.values())) > 1 or any(len(size) != 1 for size in sizes.values()):
        raise ValueError(f"`gate` must give one weight for each example, `(N,)`, got {sizes}. Reduce them to that.")
    for name, each in weights.items():
        if not bool(((each >= 0) & (each <= 1)).all()):  # also where one is not a number
            raise ValueError(
                f"`gate` must give weights in [0, 1], got {float(each.min())} to {float(each.max())} for {name!r}. "
                "Scale or clamp them."
            )
    return {name: each.detach().float() for name, each in weights.items()}


def always(model: nn.Module, *args: Any, **kwargs: Any) -> dict[str, Tensor]:
    """The gate that is open for every example.

    Examples:
        >>> import torch
        >>> from semu_peft.gates.intervention import always
        >>> always(nn.Identity(), torch.zeros(2, 3))
        {'all': tensor([1., 1.])}
    """
    tensor = next(value for value in (*args, *kwargs.values()) if isinstance(value, Tensor))
    return {"all": torch.ones(len(tensor), device=tensor.device)}


def any_open(weights: Weights) -> Tensor:
    """The largest weight of each example, `(N,)`, for what is done whichever request an example is about.

    Examples:
        >>> import torch
        >>> from semu_peft.gates.intervention import any_open
        >>> any_open({"a": torch.tensor([0.0, 1.0]), "b": torch.tensor([0.5, 0.0])})
        tensor([0.5000, 1.0000])
    """
    return torch.stack(list(weights.values())).amax(0)


def weights_of_rows(weights: Tensor, tensor: Tensor) -> Tensor:
    """The weights of a tensor's rows, where each example may stand several times in a row, as beams and tokens do.

    Args:
        weights: Of the examples, `(N,)`.
        tensor: With `N` rows or a multiple.

    Raises:
        ValueError: The batch is not the first dimension.

    Examples:
        >>> import torch
        >>> from semu_peft.gates.intervention import weights_of_rows
        >>> weights_of_rows(torch.tensor([1.0, 0.0]), torch.zeros(4, 3))
        tensor([1., 1., 0., 0.])
    """
    rows, count = len(tensor), len(weights)
    second = rows != count > 1 and tensor.dim() > 2 and tensor.shape[1] == count and not _GENERATING.get()
    if rows % count or second:
        raise ValueError(
            f"`inputs` must keep one row, or equally many, for each of the {count} examples, got a layer of shape "
            f"{tuple(tensor.shape)}. Put the batch first."
        )
    return weights.to(tensor.device).repeat_interleave(rows // count)


def _is_filled(cache: Any) -> bool:
    if cache is None:
        return False
    length = getattr(cache, "get_seq_length", None)
    return len(cache) > 0 if length is None else int(length()) > 0


def _main_input(model: Any) -> str:
    return getattr(model, "main_input_name", None) or "input_ids"


def _for_forward(model: nn.Module, named: Mapping[str, Any]) -> dict[str, Any]:
    """What of the arguments of `generate` describes the prompt."""
    known = inspect.signature(base_model(model).forward).parameters
    return {name: value for name, value in named.items() if name in known and isinstance(value, Tensor)}
