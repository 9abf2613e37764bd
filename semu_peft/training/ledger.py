"""Exact deletion: who is in which slice of the data, which stage of the training saw which slices, and what goes."""

from __future__ import annotations

import copy
import json
import operator
from collections.abc import Callable, Collection, Iterable, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import torch
from peft import PeftConfig, PeftModel, get_peft_model
from torch import nn

from semu_peft.arguments import check_count, check_kind, check_model, check_path
from semu_peft.files import written_whole
from semu_peft.objectives.base import LossFunction
from semu_peft.tuner.adapted import targets_for

from .unlearn import unlearn


@dataclass(frozen=True)
class Ledger:
    """Which stage of a training has seen which examples: stage `i` trains its layers on the first `i + 1` slices.

    Deleting an example that is in slice `i` of the order switches off the stages from `i` on. What is left has never
    seen it, and is bit for bit what training without those slices gives.

    Source: S3T, arXiv 2406.16257. Its release matches layers by substrings ("layers.1" also frees 10 to 19) and trains
    the head in every stage, either of which lets a deleted example stay; here layers are named in full and an adapter
    is one stage's alone.

    Attributes:
        slices: The examples of each slice, in the order in which stages take them in.
        stages: The layers that each stage trains, by their full names; those nearest to the output first.
        deleted: The examples that were to be deleted.

    Raises:
        ValueError: There are not as many stages as slices, or something stands in two of them.

    Examples:
        >>> ledger = Ledger(((0, 1), (2, 3)), (("head",), ("fc1",)))
        >>> ledger.seen_by(1), ledger.delete([3]).alive
        ((0, 1, 2, 3), 1)
    """

    slices: tuple[tuple[int, ...], ...]
    stages: tuple[tuple[str, ...], ...]
    deleted: frozenset[int] = frozenset()

    def __post_init__(self) -> None:
        if len(self.slices) != len(self.stages) or not self.stages:
            raise ValueError(
                f"`stages` must be as many as `slices`, got {len(self.stages)} and {len(self.slices)}. Group layers."
            )
        for name, groups in (("slices", self.slices), ("stages", self.stages)):
            every = [item for group in groups for item in group]
            if len(set(every)) < len(every) or not all(groups):
                raise ValueError(f"`{name}` must not be empty or have anything twice, got {groups!r}. Divide it anew.")

    @classmethod
    def divide(cls, examples: int, stages: Sequence[Sequence[str]], *, rotation: int = 0, seed: int = 0) -> Ledger:
        """Divide examples at random into as many slices as there are stages.

        Args:
            examples: How many examples there are; they are known by their numbers.
            stages: The layers of each stage.
            rotation: By how many places the slices are turned; see `rotations`.
            seed: Of the division.
        """
        check_count("examples", examples)
        order = torch.randperm(examples, generator=torch.Generator().manual_seed(seed))
        slices = [tuple(part.tolist()) for part in order.tensor_split(max(1, len(stages)))]
        turn = rotation % len(slices)
        return cls(tuple(slices[turn:] + slices[:turn]), _groups(stages))

    @property
    def alive(self) -> int:
        """How many stages are still to be served, the first ones."""
        hit = (place for place, members in enumerate(self.slices) if self.deleted & set(members))
        return next(hit, len(self.stages))

    def seen_by(self, stage: int) -> tuple[int, ...]:
        """The examples that a stage was trained on."""
        return tuple(example for members in self.slices[: stage + 1] for example in members)

    def delete(self, examples: Collection[int]) -> Ledger:
        """The ledger after a request to delete examples.

        Args:
            examples: Their numbers: integers, also NumPy's, or a tensor of them.

        Raises:
            TypeError: One is no integer.
            ValueError: One is in no slice.
        """
        numbers = set(map(operator.index, examples))
        unknown = sorted(numbers - {example for members in self.slices for example in members})
        if unknown:
            raise ValueError(f"`examples` must be in a slice, got {unknown[:3]}, which nothing was trained on.")
        return replace(self, deleted=self.deleted | numbers)

    def adapter_name(self, stage: int) -> str:
        """What a stage's adapter is called."""
        return f"stage-{stage}"

    def save(self, path: str | Path) -> Path:
        """Write the ledger as JSON. It says who was in the data: keep it as such."""
        check_path("path", path)
        with written_whole(path) as temporary:
            held = {**asdict(self), "deleted": sorted(self.deleted)}
            temporary.write_text(json.dumps(held, default=operator.index), encoding="utf-8")  # NumPy's integers too
        return Path(path)

    @classmethod
    def load(cls, path: str | Path) -> Ledger:
        """Read what `save` wrote.

        Raises:
            ValueError: It is no ledger.
        """
        check_path("path", path)
        try:
            held = json.loads(Path(path).read_text(encoding="utf-8"))
            return cls(tuple(map(tuple, held["slices"])), _groups(held["stages"]), frozenset(held["deleted"]))
        except (KeyError, TypeError, ValueError) as error:
            raise ValueError(f"`path` must be a file that `Ledger.save` wrote, got {path} ({error!r}).") from error


def _groups(stages: Iterable[Iterable[str]]) -> tuple[tuple[str, ...], ...]:
    groups = tuple(stages)
    if names := [group for group in groups if isinstance(group, str)]:  # its letters would be taken for layers
        raise ValueError(f"`stages` must be groups of layers, got the name {names[0]!r}. Write [{names[:1]}, …].")
    return tuple(map(tuple, groups))


def rotations(ledger: Ledger, budget: int) -> list[Ledger]:
    """The ledger with its slices in other orders, as far from each other as a budget of trainings allows.

    All are trained, and that with the most stages alive is served. Each has another first slice, so that it takes
    `L · H_budget` random deletions on average until nothing is left.

    Args:
        ledger: A ledger of `L` stages.
        budget: How many orders, `L` at the most.

    Raises:
        ValueError: There are not so many.

    Examples:
        >>> ledger = Ledger(((0,), (1,), (2,), (3,)), (("a",), ("b",), ("c",), ("d",)))
        >>> [each.slices[0] for each in rotations(ledger, 2)], round(expected_deletions(4, 4), 3)
        ([(0,), (2,)], 8.333)
    """
    check_count("budget", budget)
    count = len(ledger.slices)
    if budget > count:
        raise ValueError(f"`budget` must be at most the {count} slices, got {budget}: there are no more first slices.")
    turns = [place * count // budget for place in range(budget)]
    return [replace(ledger, slices=ledger.slices[turn:] + ledger.slices[:turn]) for turn in turns]


def expected_deletions(slices: int, budget: int = 1) -> float:
    """How many random deletions it takes on average until no stage of any order is left, `L (1 + 1/2 + … + 1/B)`.

    Examples:
        >>> expected_deletions(4), expected_deletions(4, 2)
        (4.0, 6.0)
    """
    check_count("slices", slices)
    check_count("budget", budget)
    return slices * sum(1 / place for place in range(1, budget + 1))


def train_stages(
    model: nn.Module,
    ledger: Ledger,
    batches: Callable[[tuple[int, ...]], Iterable[Any]],
    objective: LossFunction,
    config: PeftConfig,
    *,
    seed: int = 0,
    progress: bool = True,
    **training: Any,
) -> PeftModel:
    """Train the stages of a ledger that are alive, one adapter after the other, each on what it may see.

    A stage's result depends on the stages before it and on nothing else: it has seeds of its own, and all others are
    frozen. So a model that is trained without the last slices has bit for bit the same first stages.

    Args:
        model: A model without adapters.
        ledger: Who is where.
        batches: Makes the batches of some examples, the same for the same ones.
        objective: What to minimise, such as `CrossEntropy`.
        config: The adapters' configuration, such as a `LoraConfig`; its target modules are the stage's layers.
        seed: Of all stages.
        progress: Show progress bars.
        training: Further arguments of [`unlearn`][semu_peft.training.unlearn.unlearn].

    Returns:
        The model with one adapter a stage, all active.

    Raises:
        ValueError: No stage is alive, or a layer is not in the model. Whatever fails, the model is as it was.

    Examples:
        >>> from peft import LoraConfig
        >>> from semu_peft import objectives
        >>> from semu_peft.training.ledger import Ledger, train_stages
        >>> data = torch.randn(8, 4), torch.randint(3, (8,))
        >>> ledger = Ledger.divide(8, [["2"], ["0"]])
        >>> model = train_stages(
        ...     nn.Sequential(nn.Linear(4, 6), nn.ReLU(), nn.Linear(6, 3)), ledger,
        ...     lambda ids: [tuple(each[list(ids)] for each in data)], objectives.CrossEntropy(), LoraConfig(r=2),
        ...     learning_rate=1e-2, max_steps=2, progress=False,
        ... )
        >>> list(model.peft_config)
        ['stage-0', 'stage-1']
    """
    check_model(model)
    check_kind("config", config, PeftConfig, "a PEFT configuration", "Write `LoraConfig(r=8)`.")
    _check_stages(model, ledger)
    wrapped: Any = model
    flags = [(parameter, parameter.requires_grad) for parameter in model.parameters()]
    try:
        for stage in range(ledger.alive):
            name, own = ledger.adapter_name(stage), copy.deepcopy(config)
            own.target_modules = targets_for(wrapped, list(ledger.stages[stage]))  # type: ignore[attr-defined]
            with torch.random.fork_rng(devices=[]):  # the adapter's start and dropout, whatever was drawn before
                torch.manual_seed(seed + stage)
                if stage == 0:
                    wrapped = get_peft_model(model, own, adapter_name=name)
                else:
                    wrapped.add_adapter(name, own)
                wrapped.base_model.set_adapter([ledger.adapter_name(each) for each in range(stage + 1)])
                said: dict[str, Any] = {"seed": seed + stage, "progress": progress, "adapter_name": name}
                unlearn(wrapped, batches(ledger.seen_by(stage)), objective, **said, **training)
    except BaseException:
        if wrapped is not model:
            wrapped.unload()
            vars(model).pop("peft_config", None)
        for parameter, flag in flags:
            parameter.requires_grad_(flag)
        raise
    return wrapped


def take_back(model: PeftModel, ledger: Ledger) -> list[str]:
    """Delete the adapters of the stages that are not alive any more.

    Args:
        model: What `train_stages` gave.
        ledger: The ledger after `delete`.

    Returns:
        Their names; with all of them gone the model is the one before any training.

    Examples:
        >>> from peft import LoraConfig
        >>> from semu_peft.training.ledger import Ledger, take_back
        >>> ledger = Ledger(((0,), (1,)), (("0",), ("1",)))
        >>> base = nn.Sequential(nn.Linear(2, 2), nn.Linear(2, 2))
        >>> model = get_peft_model(base, LoraConfig(target_modules=["0"]), adapter_name="stage-0")
        >>> model.add_adapter("stage-1", LoraConfig(target_modules=["1"]))
        >>> take_back(model, ledger.delete([1])), list(model.peft_config)
        (['stage-1'], ['stage-0'])
    """
    gone = [ledger.adapter_name(stage) for stage in range(ledger.alive, len(ledger.stages))]
    gone = [name for name in gone if name in model.peft_config]
    tuner: Any = model.base_model
    staying: Any = [name for name in model.peft_config if name not in gone]
    if staying:
        tuner.set_adapter(staying)
        for name in gone:
            model.delete_adapter(name)
        tuner.set_adapter(staying)
    else:
        tuner.disable_adapter_layers()  # PEFT's models keep their last adapter
        for name in gone[1:]:
            model.delete_adapter(name)
    return gone


def _check_stages(model: nn.Module, ledger: Ledger) -> None:
    if ledger.alive == 0:
        raise ValueError("`ledger` must have a stage alive, got none: every stage has seen a deleted example.")
    known = dict(model.named_modules())
    missing = [name for layers in ledger.stages for name in layers if name not in known]
    if missing:
        raise ValueError(f"`ledger` must name layers of the model in full, got {missing[:3]}, which are not there.")
