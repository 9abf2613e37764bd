"""A gate that opens where a prompt is near what was to be forgotten, by the model's own hidden states."""

from __future__ import annotations

import json
from collections.abc import Iterable, Sequence
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor, nn
from tqdm.auto import tqdm

from semu_peft.arguments import check_adapter_name, check_model, check_number, check_switch
from semu_peft.files import load_tensors, save_tensors
from semu_peft.model_state import eval_mode
from semu_peft.objectives.batches import check_batches

from .closed import without_adapters
from .hidden import HiddenStates, Pool
from .signatures import METRICS, Metric, Signature

# By how much a prompt's own score may change with what is beside it in a batch: a share of it, and in any case.
_SLACK, _ROUNDING = 1e-4, 1e-5


@dataclass(frozen=True)
class Calibration:
    """What a gate does on the data that its thresholds were set by.

    Attributes:
        false_alarms: Share of the retain examples on which it opens.
        caught: By request, whether the threshold lies above all of the request's own prompts.

    Examples:
        >>> Calibration(0.01, {"request": True})
        Calibration(false_alarms=0.01, caught={'request': True})
    """

    false_alarms: float
    caught: dict[str, bool]


@dataclass(eq=False)
class Nearest:
    """Opens an adapter for prompts whose hidden state is near the prompts of the adapter's forget request.

    Of each request a few vectors are remembered, a signature, in the states of the *original* model at one layer. A
    prompt whose score is at most the request's threshold opens its adapter. The threshold is the largest score of the
    request's own prompts, until `calibrate` sets it by false alarms on retain data.

    Source: O3, arXiv 2407.10223, whose detector is another encoder and whose score subtracts two terms of opposite
    meaning; here each metric stands alone, or both in several layers before a one-class SVM, as there. Its soft weight,
    which is never below .12 and above 1 for some, is not here: `ramp` is. The box is KSD's, arXiv 2503.21730.

    Args:
        layer: The layer's name, such as `"model.norm"`, or several, whose states stand side by side.
        metric: `"cosine"` (to the nearest prompt), `"mahalanobis"`, `"box"` or `"one-class"`
            ([`OneClass`][semu_peft.gates.signatures.OneClass], which needs scikit-learn to remember a request).
        side: What the layer gives, or what it takes in.
        pool: Of which token the state is, see [`HiddenStates`][semu_peft.gates.hidden.HiddenStates]. By default any of
            them may be near, so that nothing that is added to a text closes the gate.
        ramp: Beyond the threshold the weight falls from 1 to 0 over `ramp` times the threshold's size; 0 decides hard.

    Examples:
        >>> import torch
        >>> from semu_peft.gates import Nearest
        >>> model = nn.Sequential(nn.Linear(4, 3))
        >>> gate = Nearest("0").add("request", model, [torch.eye(4)[:2]])
        >>> gate(model, torch.eye(4)[:1])
        {'request': tensor([1.])}
    """

    layer: str | Sequence[str]
    metric: Metric = "cosine"
    side: Literal["output", "input"] = "output"
    pool: Pool = "any"
    ramp: float = 0.0
    signatures: dict[str, Signature] = field(default_factory=dict, repr=False)

    def __post_init__(self) -> None:
        if self.metric not in METRICS:
            raise ValueError(f"`metric` must be one of {tuple(METRICS)}, got {self.metric!r}. Use one of these.")
        check_number("ramp", self.ramp, low=0.0)
        _ = self.states  # whose arguments are checked

    @property
    def states(self) -> HiddenStates:
        """Where it looks."""
        return HiddenStates(self.layer, self.side, self.pool)

    @property
    def adapter_names(self) -> tuple[str, ...]:
        """The requests that it knows."""
        return tuple(self.signatures)

    def add(self, name: str, model: nn.Module, forget: Iterable[Any], *, progress: bool = False) -> Nearest:
        """Remember a request, by the model without the request's adapter and those of the other requests.

        Args:
            name: The request's name, which is its adapter's.
            model: The model, with or without adapters.
            forget: The forget batches; of those with labels −100 on the prompt, the prompts.
            progress: Show a progress bar.

        Returns:
            The gate.

        Raises:
            ValueError: There are too few examples for the metric, or no such layer. The gate is unchanged then.
        """
        check_adapter_name(name)
        check_model(model)
        check_batches(forget, "forget")
        check_switch("progress", progress)
        plain = without_adapters(model, [*self.signatures, name])
        rows = tqdm(forget, desc="Signature", disable=not progress, leave=False)
        with eval_mode(plain):
            found = [self.states.of_prompts(plain, batch).cpu() for batch in rows]
        metric, states = METRICS[self.metric], torch.cat(found) if found else torch.zeros(0, 1)
        if len(states) < metric.least:
            raise ValueError(
                f"`forget` must have at least {metric.least} examples for {self.metric!r}, got {len(states)}. Give "
                "more, or use `metric='cosine'`, which needs one."
            )
        tensors = metric.fit(states, len(self.states.layers))
        own = float(metric.own_scores(tensors, states).max())
        self.signatures[name] = Signature(tensors, own, _above(own))
        return self

    def remove(self, name: str) -> None:
        """Forget a request.

        Raises:
            ValueError: There is none of that name.
        """
        if name not in self.signatures:
            raise ValueError(f"`name` must be one of {list(self.signatures)}, got {name!r}. Name a request.")
        del self.signatures[name]

    def calibrate(
        self, model: nn.Module, retain: Iterable[Any], *, false_alarms: float = 0.01, progress: bool = False
    ) -> Calibration:
        """Set all thresholds such that the gate opens on at most a share of the retain data.

        Each request has an equal part of the false alarms. Its threshold lies half-way between its own prompts and the
        nearest retain examples that must stay out, or just below these where they are nearer than some of its own.

        Args:
            model: The model, with or without adapters.
            retain: Batches on which the gate is to stay closed; the more, the rarer false alarms can be told.
            false_alarms: The share of examples on which it may open.
            progress: Show a progress bar.

        Returns:
            The share on which it does open, and whether each request still has all its prompts within.

        Raises:
            ValueError: There is no request yet, or no example.
        """
        check_number("false_alarms", false_alarms, low=0.0, high=1.0)
        check_batches(retain, "retain")
        self._check_known()
        plain = without_adapters(model, self.signatures)
        with eval_mode(plain):
            rows = [
                self._scores(*self.states.of_batch(plain, batch))
                for batch in tqdm(retain, desc="Calibration", disable=not progress, leave=False)
            ]
        if not rows:
            raise ValueError("`retain` must give at least one batch, got none. Check what was put into the list.")
        scores = {name: torch.cat([each[name] for each in rows]).cpu() for name in self.signatures}
        allowed = int(false_alarms * len(next(iter(scores.values()))) / len(scores))
        for name, each in scores.items():
            self.signatures[name] = _calibrated(self.signatures[name], each, allowed)
        opened = torch.stack([self._weight(name, each) > 0 for name, each in scores.items()]).any(0)
        caught = {name: each.threshold >= each.own for name, each in self.signatures.items()}
        return Calibration(float(opened.float().mean()), caught)

    def scores(self, model: nn.Module, *args: Any, **kwargs: Any) -> dict[str, Tensor]:
        """How far inputs are from each request, `(N,)`; the model is to be the original."""
        self._check_known()
        return self._scores(*self.states(model, *args, **kwargs))

    def __call__(self, model: nn.Module, *args: Any, **kwargs: Any) -> dict[str, Tensor]:
        """Weights of inputs by request, see [`Gate`][semu_peft.gates.intervention.Gate]."""
        found = self.scores(model, *args, **kwargs)
        return {name: self._weight(name, each) for name, each in found.items()}

    def _scores(self, states: Tensor, real: Tensor) -> dict[str, Tensor]:
        scores = {}
        for name, signature in self.signatures.items():
            tensors = {key: tensor.to(states.device) for key, tensor in signature.tensors.items()}
            each = METRICS[self.metric].score(tensors, states)
            scores[name] = each.masked_fill(~real, torch.inf).amin(-1)
        return scores

    def _weight(self, name: str, scores: Tensor) -> Tensor:
        threshold = self.signatures[name].threshold
        if self.ramp == 0:
            return (scores <= threshold).float()
        size = max(abs(threshold), torch.finfo(scores.dtype).tiny)
        return (1 - (scores - threshold) / size / self.ramp).clamp(0, 1)

    def _check_known(self) -> None:
        if not self.signatures:
            raise ValueError("`gate` must know a request, got none. Call `gate.add(name, model, forget)` first.")

    def save(self, path: str | Path) -> Path:
        """Write the signatures and settings into one safetensors file. They say what was forgotten: keep it as such."""
        tensors: dict[str, Tensor] = {}
        requests: dict[str, dict[str, float]] = {}
        for number, (name, signature) in enumerate(self.signatures.items()):
            requests[name] = {"own": signature.own, "threshold": signature.threshold}
            tensors |= {f"{number}.{key}": tensor.contiguous() for key, tensor in signature.tensors.items()}
        settings = {key: value for key, value in asdict(replace(self, signatures={})).items() if key != "signatures"}
        return save_tensors(path, tensors, {"gate": json.dumps({"settings": settings, "requests": requests})})

    @classmethod
    def load(cls, path: str | Path) -> Nearest:
        """Read what `save` wrote.

        Raises:
            FileNotFoundError: There is no such file.
            ValueError: It is damaged, or no gate.
        """
        tensors, metadata = load_tensors(path, "Nearest.save")
        try:
            held = json.loads(metadata["gate"])
            gate = cls(**held["settings"])
            for number, (name, values) in enumerate(held["requests"].items()):
                own = {key.partition(".")[2]: each for key, each in tensors.items() if key.startswith(f"{number}.")}
                gate.signatures[name] = Signature(own, float(values["own"]), float(values["threshold"]))
        except (KeyError, TypeError, AttributeError) as error:
            raise ValueError(f"`path` must be a file that `Nearest.save` wrote, got {path} ({error!r}).") from error
        return gate


def _above(own: float) -> float:
    """The threshold that a score of the request's own stays within."""
    return own + abs(own) * _SLACK + _ROUNDING


def _calibrated(signature: Signature, scores: Tensor, allowed: int) -> Signature:
    """The threshold at which at most so many of the scores are within."""
    if allowed >= len(scores):
        return replace(signature, threshold=max(float(scores.max()), signature.own))
    border = float(scores.sort().values[allowed])  # the nearest that must stay out
    own = _above(signature.own)
    if own < border:
        return replace(signature, threshold=(own + border) / 2)
    return replace(signature, threshold=float(torch.nextafter(torch.tensor(border), torch.tensor(-torch.inf))))
