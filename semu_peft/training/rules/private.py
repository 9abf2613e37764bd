"""Differentially private steps: no example moves the model by more than a bound, and noise hides the rest."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from semu_peft.arguments import check_count, check_number, check_share
from semu_peft.gradients.processes import sum_over_processes
from semu_peft.objectives.base import finite_number

from .base import Rule, Step


@dataclass
class PrivateGradient(Rule):
    """DP-SGD's gradient: `(Σ_i g_i min(1, C / ‖g_i‖) + σ C ξ) / N`, with `ξ` normal and `N` examples in the step.

    Every example's gradient is taken on its own, by a pass each, so that any objective and any adapter serve. A model
    whose examples see each other (batch norm in train mode) is none that this holds for. With any optimiser that sees
    nothing but gradients, what comes out is private too. Natural gradients look at the batch itself and are refused.

    What a run spent follows from how the data were sampled: `epsilon` asks opacus' accountant, for batches drawn anew
    at each step with `sample_rate` (Poisson sampling). Give a loader that draws them so, or take the figure as the
    usual approximation that it then is. A base that was trained so is what DP2Unlearning starts from.

    Source: DP-SGD, Abadi et al. 2016, arXiv 1607.00133, algorithm 1; DP2Unlearning, arXiv 2504.13774.

    Args:
        max_norm: `C`, over all trained parameters together.
        noise_multiplier: `σ`; 0 clips without noise.
        seed: Seed of the noise.

    Raises:
        TypeError: A number is none.
        ValueError: `max_norm` is not above zero, `noise_multiplier` is negative; in a run, there are retain data with a
            weight, which have no part in the guarantee.

    Examples:
        >>> from semu_peft import objectives, unlearn
        >>> batches = [(torch.randn(8, 4), torch.randint(3, (8,)))]
        >>> private = PrivateGradient(max_norm=1.0, noise_multiplier=1.1)
        >>> loss = objectives.CrossEntropy()
        >>> _ = unlearn(torch.nn.Linear(4, 3), batches, loss, rules=private, max_steps=3, progress=False)
        >>> private.steps
        3
    """

    needs_whole_parameters = True

    max_norm: float
    noise_multiplier: float
    seed: int = 0

    def __post_init__(self) -> None:
        if finite_number(self.max_norm, "max_norm") <= 0:
            raise ValueError(f"`max_norm` must be above zero, got {self.max_norm!r}. Take 1.")
        check_number("noise_multiplier", self.noise_multiplier, low=0)
        check_count("seed", self.seed, least=0)
        self._generator = torch.Generator().manual_seed(self.seed)
        self.steps = 0

    def gradients(self, step: Step) -> None:
        step.needed_optimizer(self, "hides what single batches say")
        totals = {name: torch.zeros_like(p, dtype=torch.float32) for name, p in step.parameters.items()}
        count = 0
        for example in step.needed_data(self).example_gradients():
            norm = torch.stack([torch.linalg.vector_norm(each.float()) for each in example.values()]).norm()
            factor = (self.max_norm / norm.clamp_min(1e-30)).clamp(max=1.0)
            for name, gradient in example.items():
                totals[name] += factor * gradient
            count += 1
        everywhere = int(sum_over_processes(torch.tensor(count)))
        for name, total in totals.items():
            noisy = sum_over_processes(total) + self._noise(total)
            step.parameters[name].grad = (noisy / everywhere).to(step.parameters[name].dtype)
        self.steps += 1

    def _noise(self, like: Tensor) -> Tensor:
        """The same on every process, as it is added to what they have summed."""
        noise = torch.randn(like.shape, generator=self._generator)
        return self.noise_multiplier * self.max_norm * noise.to(like)

    def epsilon(self, delta: float, *, sample_rate: float) -> float:
        """What the steps so far have spent, `(ε, δ)`-differential privacy, by opacus' accountant of Rényi privacy.

        Args:
            delta: `δ`, well below one over the number of examples.
            sample_rate: With which probability an example is part of a step.

        Raises:
            ImportError: opacus is not installed.
            ValueError: There is no noise, or no step was taken.
        """
        check_share("delta", delta)
        check_share("sample_rate", sample_rate)
        if not self.steps or not self.noise_multiplier:
            raise ValueError(
                f"`epsilon` must be asked after a run with noise, got {self.steps} steps with `noise_multiplier` "
                f"{self.noise_multiplier}. Without noise nothing is private."
            )
        try:
            from opacus.accountants import RDPAccountant
        except ImportError as error:
            raise ImportError("`epsilon` needs opacus: `pip install opacus`.") from error
        accountant = RDPAccountant()
        accountant.history = [(self.noise_multiplier, sample_rate, self.steps)]
        return float(accountant.get_epsilon(delta))

    def state_dict(self) -> dict[str, Any]:
        return {"generator": self._generator.get_state(), "steps": self.steps}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self._generator.set_state(state["generator"])
        self.steps = state["steps"]
