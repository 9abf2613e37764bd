"""Who brings back what was forgotten, by training the model a little; and the weights that this leads to.

The model itself is never written: what the attacker trains is a second set of values for its weights.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal, TypeVar

import torch
from accelerate.utils import send_to_device
from torch import Tensor, nn

from semu_peft.arguments import check_count, check_kind, check_number
from semu_peft.model_state import aside, device_of
from semu_peft.tuner.keys import without_wrappers
from semu_peft.tuner.layer import SemuLayer
from semu_peft.tuner.patterns import name_matches

from .adapter_parts import all_parts, modules_of
from .base import Objective
from .batches import split_batch
from .classification import CrossEntropy
from .examples import Examples, Row, count_examples, examples_in, join_alike
from .original import with_values

OptimizerOfAttack = Literal["sgd", "adam"] | Callable[[Iterable[nn.Parameter]], torch.optim.Optimizer]
Read = TypeVar("Read")
Augment = Callable[[Any, torch.Generator], Any]
"""`(batch, generator) -> batch`: how an attacker varies its examples."""


@dataclass(frozen=True)
class Attacker:
    """Someone who has the weights and a few examples, and trains for a few steps.

    All floating-point weights of the merged model are trained, in eval mode (norm statistics stay, dropout is off); an
    adapter's core stays as it is, as `W + U R Vᵀ` is moved as well by moving `W`.

    Args:
        optimizer: `"sgd"` (momentum 0.9), `"adam"`, or a factory `(parameters) -> Optimizer`.
        learning_rate: Of these two.
        steps: How many.
        forget_examples: How many of the forgotten examples the attacker has.
        retain_examples: How many others, to keep the model whole meanwhile.
        layers: Names, endings or regular expressions of the layers that are trained; by default all.
        batch_size: Examples of each kind a step; by default all at once.
        augment: Varies each step's examples, such as [`flip`][semu_peft.objectives.attackers.flip].
        name: What to call the attacker; by default what it does.

    Raises:
        TypeError: A setting is of another kind.
        ValueError: It is out of range.

    Examples:
        >>> Attacker()
        Attacker(SGD 0.01, 20 examples, 20 steps)
        >>> Attacker("adam", 1e-3, layers="classifier").label
        'Adam 0.001 on classifier, 20 examples'
    """

    optimizer: OptimizerOfAttack = "sgd"
    learning_rate: float = 1e-2
    steps: int = field(default=20, kw_only=True)
    forget_examples: int = field(default=20, kw_only=True)
    retain_examples: int = field(default=60, kw_only=True)
    layers: str | Sequence[str] | None = field(default=None, kw_only=True)
    batch_size: int | None = field(default=None, kw_only=True)
    augment: Augment | None = field(default=None, kw_only=True)
    name: str | None = field(default=None, kw_only=True)

    def __post_init__(self) -> None:
        if self.optimizer not in ("sgd", "adam") and not callable(self.optimizer):
            raise TypeError(
                f"`optimizer` must be 'sgd', 'adam' or a function (parameters) -> Optimizer, got {self.optimizer!r}. "
                "Write `lambda parameters: torch.optim.AdamW(parameters, 1e-4)`."
            )
        check_number("learning_rate", self.learning_rate, low=0)
        check_count("steps", self.steps)
        check_count("forget_examples", self.forget_examples, least=0)
        check_count("retain_examples", self.retain_examples, least=0)
        check_count("batch_size", self.batch_size, optional=True)
        if not self.forget_examples and not self.retain_examples:
            raise ValueError("`forget_examples` must be at least 1 where `retain_examples` is 0, got 0. Give examples.")
        if self.augment is not None:
            check_kind("augment", self.augment, Callable, "a function (batch, generator) -> batch", "Write `flip`.")  # type: ignore[arg-type]
        if self.layers is not None:
            check_kind("layers", self.layers, (str, list, tuple), "a name or a list of names", "Write ['classifier'].")

    @property
    def label(self) -> str:
        """The attacker in words."""
        if self.name is not None:
            return self.name
        known = {"sgd": "SGD", "adam": "Adam"}.get(self.optimizer) if isinstance(self.optimizer, str) else None
        told = f"{known} {self.learning_rate:g}" if known else getattr(self.optimizer, "__name__", "optimizer")
        patterns = [self.layers] if isinstance(self.layers, str) else self.layers or ()
        where = f" on {', '.join(patterns)}" if patterns else ""
        varied = f", {getattr(self.augment, '__name__', 'augmented')}" if self.augment else ""
        return f"{told}{where}, {self.forget_examples} example{'' if self.forget_examples == 1 else 's'}{varied}"

    def __repr__(self) -> str:
        return f"Attacker({self.label}, {self.steps} steps)"

    def make_optimizer(self, parameters: list[nn.Parameter]) -> torch.optim.Optimizer:
        """The optimiser over these parameters."""
        if self.optimizer == "sgd":
            return torch.optim.SGD(parameters, self.learning_rate, momentum=0.9)
        if self.optimizer == "adam":
            return torch.optim.Adam(parameters, self.learning_rate)
        assert callable(self.optimizer)
        return self.optimizer(parameters)


def flip(batch: Any, generator: torch.Generator) -> Any:
    """Turn a random half of a batch's images `(N, C, H, W)` left to right; anything else in it stays.

    Examples:
        >>> import torch
        >>> images, labels = torch.arange(4.0).view(2, 1, 1, 2), torch.tensor([0, 1])
        >>> flip((images, labels), torch.Generator().manual_seed(1))[0].flatten().tolist()
        [0.0, 1.0, 3.0, 2.0]
    """
    if isinstance(batch, Mapping):
        return {key: flip(value, generator) for key, value in batch.items()}
    if isinstance(batch, (list, tuple)):
        return tuple(flip(value, generator) for value in batch)
    if isinstance(batch, Tensor) and batch.dim() == 4 and batch.is_floating_point():
        turned = (torch.rand(len(batch), generator=generator) < 0.5).to(batch.device)
        return torch.where(turned.view(-1, 1, 1, 1), batch.flip(3), batch)
    return batch


def weights_of(model: nn.Module, layers: str | Sequence[str] | None = None) -> dict[str, nn.Parameter]:
    """The weights that an attacker who has the merged model can train, by name: all but those of adapters.

    Args:
        model: A model, with adapters or without.
        layers: Names, endings or regular expressions of layers; by default all.

    Raises:
        ValueError: No floating-point weight is left.

    Examples:
        >>> from peft import get_peft_model
        >>> from semu_peft import SemuConfig
        >>> model = get_peft_model(nn.Sequential(nn.Linear(4, 3)), SemuConfig(target_modules=["0"]))
        >>> list(weights_of(model)), list(weights_of(model, "0"))[0]
        (['base_model.model.0.weight', 'base_model.model.0.bias'], 'base_model.model.0.weight')
    """
    adapters = _of_adapters(model)
    patterns = [layers] if isinstance(layers, str) else layers
    found = {}
    for name, parameter in model.named_parameters():
        path = without_wrappers(name)
        chosen = patterns is None or any(name_matches(path.rpartition(".")[0], pattern) for pattern in patterns)
        usable = parameter.is_floating_point() and parameter.dtype.itemsize >= 2 and not parameter.is_meta
        if chosen and usable and parameter.numel() and id(parameter) not in adapters:
            found[path] = parameter
    if not found:
        raise ValueError(
            f"`layers` must name layers with floating-point weights in memory, got {layers!r}: none is left for the "
            "attacker to train. Quantised or offloaded weights cannot be: load the model in full."
        )
    return found


def _of_adapters(model: nn.Module) -> set[int]:
    """The `id` of all that adapters have in their layers, frozen bases too: what is not the wrapped layer's own."""
    found: set[int] = set()
    for part in all_parts(model):
        if not part.beside:
            own = {id(parameter) for parameter in part.layer.get_base_layer().parameters()}
            found |= {id(parameter) for parameter in part.layer.parameters()} - own
    return found


def corrections_of(model: nn.Module) -> dict[int, Callable[[], Tensor]]:
    """What SEMU layers add to their weights, where that can be added to the weight itself: by the weight's `id`.

    Training `W` beside a correction `U R Vᵀ` that stays is training `W + U R Vᵀ`, in fewer operations. Layers are left
    out that compute with something else than their own parameter (another adapter beneath, quantised or parametrised
    weights), whose weight another module uses too, or has lower precision than the correction.

    Examples:
        >>> import torch
        >>> from peft import get_peft_model
        >>> from semu_peft import SemuConfig
        >>> config = SemuConfig(target_modules=["0"], r=2, init_weights=False)
        >>> model = get_peft_model(nn.Sequential(nn.Linear(4, 3), nn.Linear(3, 2)), config)
        >>> [correction().shape for correction in corrections_of(model).values()]
        [torch.Size([3, 4])]
    """
    modules = modules_of(model)
    uses = Counter(
        id(weight)
        for module in modules
        for weight in vars(module).get("_parameters", {}).values()
        if weight is not None
    )
    return {
        id(module.base_layer.weight): module.correction
        for module in modules
        if isinstance(module, SemuLayer) and module.is_sum_of_weights() and uses[id(module.base_layer.weight)] == 1
    }


class Relearner:
    """One attacker at work on one model, step by step.

    Weights in half precision are trained as mixed precision does: in float32, of which each pass sees the rounded ones.
    In themselves most small steps would be rounded away.

    Args:
        model: The model, which stays as it is.
        attacker: Who attacks.
        forget: The examples that were forgotten.
        retain: Other examples; None where the attacker has none.
        learn: What the attacker minimises, such as the ordinary training loss.
        generator: Draws the attacker's examples, and their variations.

    Attributes:
        model: The model with the weights as the attacker has them now.
        rows: Which of the forget examples the attacker has.

    Raises:
        ValueError: There is no weight to train, or no example; or the model is sharded.

    Examples:
        >>> import torch
        >>> from semu_peft.objectives import CrossEntropy
        >>> model, batch = nn.Linear(2, 2), (torch.eye(2), torch.tensor([0, 1]))
        >>> generator = torch.Generator().manual_seed(0)
        >>> relearner = Relearner(model, Attacker("sgd", 1.0), Examples([batch]), None, CrossEntropy(), generator)
        >>> before = model.weight.clone()
        >>> for _ in range(5):
        ...     relearner.step()
        >>> relearner.model(batch[0]).argmax(1).tolist(), torch.equal(model.weight, before)
        ([0, 1], True)
    """

    def __init__(
        self,
        model: nn.Module,
        attacker: Attacker,
        forget: Examples,
        retain: Examples | None,
        learn: Objective,
        generator: torch.Generator,
    ) -> None:
        self.attacker, self.generator, self.learn = attacker, generator, learn
        self.originals = list(weights_of(model, attacker.layers).values())
        self._corrections = corrections_of(model)
        with torch.no_grad():
            self.values = [nn.Parameter(self._start(weight).clone()) for weight in self.originals]
            values = dict(zip(map(id, self.originals), self.values, strict=True))
            for weight in model.parameters():
                if id(weight) in self._corrections and id(weight) not in values:
                    values[id(weight)] = nn.Parameter(self._start(weight), requires_grad=False)
        self.model = with_values(model, values)
        _leave_out(self.model, {id(values[number]) for number in self._corrections})
        self.model.eval()
        self.device = device_of(self.model)
        self.rows = forget.draw(attacker.forget_examples, generator)
        kept = [] if retain is None else retain.draw(attacker.retain_examples, generator)
        self._sources = [(forget, self.rows)] + ([(retain, kept)] if retain is not None and kept else [])
        if not any(rows for _, rows in self._sources):
            raise ValueError(
                f"`attacker` must have an example to train on, got {attacker.forget_examples} forgotten ones and no "
                "others. Raise `forget_examples`, or give `retain`."
            )
        self._ready = None if attacker.batch_size else self._batches()
        self._precise = [
            nn.Parameter(value.detach().float()) if torch.finfo(value.dtype).bits < 32 else value
            for value in self.values
        ]
        self._optimizer = attacker.make_optimizer(self._precise)

    @torch.no_grad()
    def displaced(self) -> list[tuple[nn.Parameter, Tensor]]:
        """The model's weights, and what has become of them: the change of one that is trained, else the value.

        The relearner is used up, as these are its own tensors.
        """
        found = []
        for weight, trained in zip(self.originals, self.values, strict=True):
            value = trained.detach()
            if id(weight) in self._corrections:
                value.sub_(self._corrections[id(weight)]())
            found.append((weight, value.sub_(weight) if weight.requires_grad else value))
        return found

    def _start(self, weight: nn.Parameter) -> Tensor:
        """A weight as the attacker finds it, merged."""
        correction = self._corrections.get(id(weight))
        return weight.detach() if correction is None else weight.detach() + correction()

    def step(self) -> None:
        """Train for one step on all the attacker has, each example counting alike."""
        batches = self._batches() if self._ready is None else self._ready
        with aside(), torch.enable_grad():
            losses = []
            for batch in batches:
                varied = self.attacker.augment(batch, self.generator) if self.attacker.augment else batch
                losses.append(self.learn(self.model, varied) * (count_examples(batch) or 1))
            loss = torch.stack(losses).sum() / examples_in(batches)
            gradients = torch.autograd.grad(loss, self.values, allow_unused=True)
        for precise, gradient in zip(self._precise, gradients, strict=True):
            precise.grad = None if gradient is None else gradient.to(precise.dtype)
        self._optimizer.step()
        for value, precise in zip(self.values, self._precise, strict=True):
            precise.grad = None
            if precise is not value:
                value.data.copy_(precise)

    def curve(self, at: Collection[int], read: Callable[[nn.Module], Read], name: str | None = None) -> list[Read]:
        """Train up to the last of these steps, and read something of the model after each of them.

        Args:
            at: After how many steps to read; 0 is the model as it was.
            read: What is read.
            name: What to call the attack in a progress bar; None shows none.
        """
        from tqdm.auto import tqdm

        found = []
        for step in tqdm(range(max(at) + 1), desc=name, disable=name is None, leave=False):
            if step:
                self.step()
            if step in at:
                found.append(read(self.model))
        return found

    def _batches(self) -> list[Any]:
        found = []
        for examples, rows in self._sources:
            chosen: Sequence[Row] = rows
            if self.attacker.batch_size:
                order = torch.randperm(len(rows), generator=self.generator)[: self.attacker.batch_size]
                chosen = [rows[index] for index in order.tolist()]
            found += examples.batches_of(chosen) if chosen else []
        found = [send_to_device(batch, self.device) for batch in found]
        # Means over examples can be taken of all at once; those over tokens weigh an example by its length.
        one_pass = self.attacker.augment is None and isinstance(self.learn, CrossEntropy)
        return join_alike(found) if one_pass and all(split_batch(batch)[2].dim() == 1 for batch in found) else found


def _leave_out(model: nn.Module, merged: Collection[int]) -> None:
    """Let layers whose weight, by its `id`, has the correction in it compute with that weight alone."""
    for module in modules_of(model):
        if isinstance(module, SemuLayer) and id(getattr(module.base_layer, "weight", None)) in merged:
            module._disable_adapters = True
