"""A gate that asks a classifier of prompts: any module or scikit-learn estimator, or a linear one fitted here."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from semu_peft.arguments import check_model, check_number, check_positive
from semu_peft.files import load_tensors, save_tensors
from semu_peft.model_state import aside, eval_mode
from semu_peft.objectives.batches import check_batches

from .closed import without_adapters
from .hidden import HiddenStates


class Classifier:
    """Opens adapters for the prompts that a classifier takes for theirs, `w = 1[p ≥ threshold]`.

    Source: ECO, arXiv 2406.07933 (a RoBERTa that reads the prompt; threshold .99), and GUARD, arXiv 2505.13312 (a small
    network on the model's own penultimate state).

    Args:
        scorer: Called with what `inputs` gives, or an estimator with `predict_proba`. It returns probabilities `(N,)`
            or `(N, names)`; or an output with `logits`, or `predict_proba` of it, with class 0 for what is nobody's.
        adapter_names: The adapters, in the order of the classes.
        inputs: What the scorer is given, `(model, *args, **kwargs) -> Any`; a
            [`HiddenStates`][semu_peft.gates.hidden.HiddenStates] of which the states are taken; by default what the
            model is called with.
        threshold: From which probability on it opens.

    Raises:
        TypeError: The scorer cannot be called.
        ValueError: The threshold is no probability.

    Examples:
        >>> from semu_peft.gates import Classifier
        >>> gate = Classifier(lambda x: x.sigmoid()[:, 0], ["request"], threshold=0.9)
        >>> gate(None, torch.tensor([[5.0], [0.0]]))
        {'request': tensor([1., 0.])}
    """

    def __init__(
        self,
        scorer: Any,
        adapter_names: Sequence[str] = ("default",),
        *,
        inputs: HiddenStates | Callable[..., Any] | None = None,
        threshold: float = 0.5,
    ) -> None:
        if not callable(scorer) and not hasattr(scorer, "predict_proba"):
            raise TypeError(
                f"`scorer` must be a module, a function or an estimator with `predict_proba`, got "
                f"{type(scorer).__name__}. `LinearScorer.fit` makes one."
            )
        if isinstance(adapter_names, str):
            raise TypeError(
                f"`adapter_names` must be a list of names, got {adapter_names!r}. Write [{adapter_names!r}]."
            )
        check_number("threshold", threshold, low=0.0, high=1.0)
        self.scorer, self.adapter_names = scorer, tuple(adapter_names)
        self.inputs, self.threshold = inputs, threshold

    def __call__(self, model: nn.Module, *args: Any, **kwargs: Any) -> dict[str, Tensor]:
        """Weights of inputs, see [`Gate`][semu_peft.gates.intervention.Gate]."""
        found = self.probabilities(model, *args, **kwargs)
        return {name: (each >= self.threshold).float() for name, each in zip(self.adapter_names, found.mT, strict=True)}

    @torch.no_grad()
    def probabilities(self, model: nn.Module, *args: Any, **kwargs: Any) -> Tensor:
        """`(N, names)`; of several states of an example the largest.

        Raises:
            ValueError: There is not one probability for each name.
        """
        real = None
        if isinstance(self.inputs, HiddenStates):
            given, real = self.inputs(model, *args, **kwargs)
            found = self._asked(given.flatten(0, 1))
            found = found.view(*real.shape, -1).masked_fill(~real.unsqueeze(-1), 0.0).amax(1)
        elif self.inputs is not None:
            with aside():
                found = self._asked(self.inputs(model, *args, **kwargs))
        else:
            found = self._asked(*args, **kwargs)
        if found.dim() != 2 or found.shape[1] != len(self.adapter_names):
            raise ValueError(
                f"`scorer` must give a probability for each of {list(self.adapter_names)}, got a tensor of shape "
                f"{tuple(found.shape)}. Give `adapter_names` in the order of its classes, after the one for the rest."
            )
        return found

    def _asked(self, *args: Any, **kwargs: Any) -> Tensor:
        if hasattr(self.scorer, "predict_proba"):
            rows = args[0].cpu().numpy() if isinstance(args[0], Tensor) else args[0]
            return torch.as_tensor(self.scorer.predict_proba(rows))[:, 1:].float()
        if isinstance(self.scorer, nn.Module):
            with eval_mode(self.scorer):
                output = _called(self.scorer, args, kwargs)
        else:
            output = _called(self.scorer, args, kwargs)
        logits = output.get("logits") if isinstance(output, Mapping) else getattr(output, "logits", None)
        if logits is not None:
            return logits.float().softmax(-1)[:, 1:]
        scores: Tensor = output.float()
        return scores.unsqueeze(1) if scores.dim() == 1 else scores

    def save(self, path: str | Path) -> Path:
        """Write a gate with a `LinearScorer` on hidden states into one safetensors file.

        Raises:
            TypeError: The scorer is another one, which is to be saved by its own means.
        """
        if not isinstance(self.scorer, LinearScorer) or not isinstance(self.inputs, HiddenStates):
            raise TypeError(
                f"`scorer` must be a LinearScorer on HiddenStates to be saved here, got {type(self.scorer).__name__}. "
                "Save it by its own means and make the gate again."
            )
        settings = {
            "names": self.adapter_names,
            "threshold": self.threshold,
            "inputs": asdict(self.inputs),
        }
        tensors = {name: tensor.contiguous() for name, tensor in self.scorer.state_dict().items()}
        return save_tensors(path, tensors, {"gate": json.dumps(settings)})

    @classmethod
    def load(cls, path: str | Path) -> Classifier:
        """Read what `save` wrote.

        Raises:
            FileNotFoundError: There is no such file.
            ValueError: It is damaged, or no such gate.
        """
        tensors, metadata = load_tensors(path, "Classifier.save")
        try:
            held = json.loads(metadata["gate"])
            scorer = LinearScorer(*reversed(tensors["weight"].shape))
            scorer.load_state_dict(tensors)
            inputs = HiddenStates(**held["inputs"])
            return cls(scorer, held["names"], inputs=inputs, threshold=held["threshold"])
        except (KeyError, TypeError, RuntimeError) as error:
            raise ValueError(f"`path` must be a file that `Classifier.save` wrote, got {path} ({error!r}).") from error


class LinearScorer(nn.Module):
    """`σ(W x̂ + b)` of standardised states, one row for each name.

    Args:
        features: Size of a state.
        names: How many requests.

    Examples:
        >>> from semu_peft.gates.classifier import LinearScorer
        >>> x = torch.tensor([[1.0], [2.0], [-1.0], [-2.0]])
        >>> scorer = LinearScorer.fit([x[:2]], x[2:])
        >>> (scorer(x)[:, 0] > 0.5).tolist()
        [True, True, False, False]
    """

    weight: Tensor
    bias: Tensor
    mean: Tensor
    deviation: Tensor

    def __init__(self, features: int, names: int = 1) -> None:
        super().__init__()
        for key, shape in (("weight", (names, features)), ("bias", (names,)), ("mean", (features,))):
            self.register_buffer(key, torch.zeros(shape))
        self.register_buffer("deviation", torch.ones(features))

    def forward(self, x: Tensor) -> Tensor:
        """Probabilities `(N, names)` of states `(N, D)`."""
        buffers: dict[str, Tensor] = {name: each.to(x.device) for name, each in self.named_buffers()}
        scaled = (x.float() - buffers["mean"]) / buffers["deviation"]
        return torch.sigmoid(scaled @ buffers["weight"].mT + buffers["bias"])

    @classmethod
    def fit(cls, requests: Sequence[Tensor], rest: Tensor, *, penalty: float = 1e-2) -> LinearScorer:
        """Fit a logistic regression for each request against everything else, both sides weighted equally.

        `min mean₊ softplus(−z) + mean₋ softplus(z) + penalty ‖w‖²`, which is convex, by L-BFGS.

        Args:
            requests: For each request its states, `(n, D)`.
            rest: States of everything else, `(m, D)`.
            penalty: Of the weights.

        Raises:
            ValueError: A side has no example.
        """
        check_positive("penalty", penalty)
        groups = [states.float() for states in requests]
        if not groups or not all(len(each) for each in (*groups, rest)):
            raise ValueError("`requests` and `rest` must have an example each, got a side without one. Give more data.")
        every = torch.cat([*groups, rest.float()])
        scorer = cls(every.shape[1], len(groups))
        scorer.mean.copy_(every.mean(0))
        scorer.deviation.copy_(every.std(0, correction=0).clamp_min(1e-6))
        owners = torch.cat([torch.full((len(each),), place) for place, each in enumerate((*groups, rest))])
        scaled = ((every - scorer.mean) / scorer.deviation).double()
        for place in range(len(groups)):
            weight, bias = _logistic(scaled, owners == place, penalty)
            scorer.weight[place], scorer.bias[place] = weight, bias
        return scorer


def linear_gate(
    model: nn.Module,
    requests: Mapping[str, Iterable[Any]],
    retain: Iterable[Any],
    inputs: HiddenStates,
    *,
    false_alarms: float = 0.01,
    penalty: float = 0.1,
) -> Classifier:
    """Fit a [`Classifier`][semu_peft.gates.classifier.Classifier] that tells the prompts of requests from all others.

    It is fitted on every other retain example, and the threshold set on those between: the gate opens on at most a
    share of them, half-way to the forget prompts where these are all likelier.

    Args:
        model: The model; the adapters of the requests are left out.
        requests: Forget batches by request.
        retain: Batches on which the gate is to stay closed, in all states that it may come to see of them.
        inputs: The states that it reads.
        false_alarms: On which share of the retain examples it may open.
        penalty: Of the weights, see [`LinearScorer.fit`][semu_peft.gates.classifier.LinearScorer.fit].

    Raises:
        ValueError: There are no examples, or the share is out of range.

    Examples:
        >>> from semu_peft.gates import HiddenStates, linear_gate
        >>> model, x = nn.Sequential(nn.Linear(4, 3)), torch.randn(20, 4)
        >>> gate = linear_gate(model, {"request": [x + 3]}, [x - 3], HiddenStates("0"))
        >>> gate(model, x + 3)["request"].mean()
        tensor(1.)
    """
    check_model(model)
    check_number("false_alarms", false_alarms, low=0.0, high=1.0)
    check_batches(retain, "retain")
    plain = without_adapters(model, requests)
    with eval_mode(plain):
        groups = [torch.cat([inputs.of_prompts(plain, batch).cpu() for batch in each]) for each in requests.values()]
        seen = [inputs.of_batch(plain, batch) for batch in retain]
    examples = [example[held].cpu() for states, real in seen for example, held in zip(states, real, strict=True)]
    fitted, told = examples[::2], examples[1::2] or examples
    scorer = LinearScorer.fit(groups, torch.cat(fitted) if fitted else groups[0][:0], penalty=penalty)
    likely = torch.stack([scorer(states).amax() for states in told]).sort(descending=True).values
    own = torch.cat([scorer(states)[:, place] for place, states in enumerate(groups)]).min()
    threshold = _between(likely, own, int(false_alarms * len(likely)))
    return Classifier(scorer, tuple(requests), inputs=inputs, threshold=threshold)


def _between(likely: Tensor, own: Tensor, allowed: int) -> float:
    """The threshold that at most so many of the probabilities reach."""
    if allowed >= len(likely):
        return min(float(likely[-1]), float(own))
    border = likely[allowed]
    above = (border + own) / 2 if own > border else torch.nextafter(border, torch.ones_like(border))
    return min(float(above), 1.0)


def _logistic(x: Tensor, positive: Tensor, penalty: float) -> tuple[Tensor, Tensor]:
    weight = torch.zeros(x.shape[1], dtype=x.dtype, requires_grad=True)
    bias = torch.zeros((), dtype=x.dtype, requires_grad=True)
    optimizer = torch.optim.LBFGS([weight, bias], max_iter=100, line_search_fn="strong_wolfe")

    def loss() -> Tensor:
        optimizer.zero_grad()
        z = x @ weight + bias
        sides = nn.functional.softplus(-z[positive]).mean() + nn.functional.softplus(z[~positive]).mean()
        total: Tensor = sides + penalty * weight.square().sum()
        total.backward()
        return total

    with torch.enable_grad():
        optimizer.step(loss)
    return weight.detach().float(), bias.detach().float()


def _called(scorer: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    """A scorer called with one thing, or with several by their names."""
    if len(args) == 1 and isinstance(args[0], Mapping):
        return scorer(**args[0])
    return scorer(*args, **kwargs)
