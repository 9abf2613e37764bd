"""How a diffusion model was trained: how much noise at each timestep, and what it predicts."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Literal, get_args

import torch
from torch import Tensor

PredictionType = Literal["epsilon", "v_prediction", "sample", "flow_prediction"]


@dataclass(frozen=True, eq=False)
class NoiseSchedule:
    """The forward process `x_t = a_t x_0 + s_t ε` of a diffusion model, and the target of its prediction.

    | `prediction_type` | target |
    | --- | --- |
    | `"epsilon"` | `ε` (Ho et al. 2020, arXiv 2006.11239) |
    | `"v_prediction"` | `a_t ε − s_t x_0` (Salimans & Ho 2022, arXiv 2202.00512) |
    | `"sample"` | `x_0` |
    | `"flow_prediction"` | `ε − x_0` (rectified flow; Esser et al. 2024, arXiv 2403.03206) |

    Attributes:
        signal: `a_t`, `(T,)`, float32, falling with the index.
        noise: `s_t`, `(T,)`, float32, rising with the index.
        timesteps: What the model is given at each index, `(T,)`, int64 or float32.
        prediction_type: What the model predicts.

    Examples:
        >>> from diffusers import DDPMScheduler
        >>> from semu_peft.objectives import NoiseSchedule
        >>> schedule = NoiseSchedule.from_scheduler(DDPMScheduler(num_train_timesteps=100))
        >>> len(schedule), schedule.prediction_type
        (100, 'epsilon')
        >>> bool(schedule.noise[0] < schedule.noise[-1])
        True
    """

    signal: Tensor
    noise: Tensor
    timesteps: Tensor
    prediction_type: PredictionType = "epsilon"

    def __len__(self) -> int:
        return len(self.timesteps)

    @classmethod
    def from_scheduler(cls, scheduler: Any, timestep_scale: float = 1.0) -> NoiseSchedule:
        """Read the schedule out of a diffusers scheduler, whatever sampler it is and wherever its sampling stands.

        A sampler's own `add_noise` can work at another scale than the model (Euler, LMS and Heun do); here `x_t` is
        always what the model itself takes.

        Args:
            scheduler: A scheduler with `alphas_cumprod` (DDPM, DDIM, Euler, DPM-Solver, UniPC …), or for flow matching.
            timestep_scale: Factor between the scheduler's timesteps and those the model is given (1/1000 for Flux).

        Raises:
            ValueError: The scheduler is of another kind (EDM, consistency models, variance exploding …).
        """
        config = scheduler.config
        count = int(config.get("num_train_timesteps", 1000))
        kind = config.get("prediction_type", "epsilon")
        if hasattr(scheduler, "scale_noise") or config.get("use_flow_sigmas") or kind == "flow_prediction":
            if hasattr(scheduler, "scale_noise"):
                fresh = type(scheduler).from_config(config)  # sampling overwrites what training needs
                sigmas, timesteps = fresh.sigmas[:count].float().cpu(), fresh.timesteps[:count].float().cpu()
                sigmas, timesteps = sigmas.flip(0), timesteps.flip(0)
            else:
                sigmas = torch.arange(1, count + 1) / count
                shift = config.get("flow_shift") or 1.0
                sigmas = shift * sigmas / (1 + (shift - 1) * sigmas)
                timesteps = sigmas * count
            return cls(1 - sigmas, sigmas, timesteps * timestep_scale, "flow_prediction")
        alphas = getattr(scheduler, "alphas_cumprod", None)
        if not isinstance(alphas, Tensor) or kind not in get_args(PredictionType):
            raise ValueError(
                f"{type(scheduler).__name__} (prediction_type {kind!r}) describes no forward process known here: "
                "expected a scheduler with `alphas_cumprod` and the prediction_type 'epsilon', 'v_prediction' or "
                "'sample', or a flow-matching one. Pass the DDPMScheduler or FlowMatchEulerDiscreteScheduler that the "
                "model was trained with, or a `NoiseSchedule`."
            )
        alphas = alphas.double().cpu()
        timesteps = torch.arange(len(alphas))
        if config.get("timestep_type") == "continuous" and kind == "v_prediction":  # `ln σ / 4`, as Euler tells it
            timesteps = ((1 - alphas) / alphas).sqrt().log().float() / 4
        timesteps = timesteps if timestep_scale == 1.0 else timesteps * timestep_scale
        return cls(alphas.sqrt().float(), (1 - alphas).sqrt().float(), timesteps, kind)

    def add_noise(self, clean: Tensor, noise: Tensor, index: Tensor) -> Tensor:
        """Make `x_t`, shaped like `clean` `(N, ...)`, at the schedule indices `(N,)`."""
        signal_rate, noise_rate = self._at(index, clean)
        return signal_rate * clean + noise_rate * noise

    def target(self, clean: Tensor, noise: Tensor, index: Tensor) -> Tensor:
        """Make what the model should predict at `x_t`, shaped like `clean` `(N, ...)`."""
        if self.prediction_type == "epsilon":
            return noise
        if self.prediction_type == "sample":
            return clean
        if self.prediction_type == "flow_prediction":
            return noise - clean
        signal_rate, noise_rate = self._at(index, clean)
        return signal_rate * noise - noise_rate * clean

    def timesteps_at(self, index: Tensor) -> Tensor:
        """The timesteps that the model is given at the schedule indices `(N,)`, on the device of `index`."""
        return self.timesteps.to(index.device)[index]

    def share_below(self, timestep: float) -> float:
        """The share of the schedule below a timestep, for a `timestep_span`.

        Pipelines with two experts (Wan 2.2) change from one to the other at `boundary_ratio · num_train_timesteps`.

        Examples:
            >>> schedule = NoiseSchedule(torch.linspace(1, 0, 5), torch.linspace(0, 1, 5), torch.arange(0, 1000, 200))
            >>> round(schedule.share_below(600), 3)
            0.6
        """
        return float((self.timesteps < timestep).float().mean())

    def draw(
        self, count: int, generator: torch.Generator, antithetic: bool = True, span: tuple[float, float] = (0.0, 1.0)
    ) -> Tensor:
        """Draw schedule indices, uniformly.

        Args:
            count: How many.
            generator: Where to draw from, on the CPU.
            antithetic: Draw in pairs `t, T − 1 − t`, which evens out the noise levels of a batch (within `span`).
            span: The part of the schedule to draw from, as shares of T.

        Returns:
            `(count,)`, int64, on the CPU.
        """
        low, high = int(span[0] * len(self)), max(int(span[0] * len(self)) + 1, round(span[1] * len(self)))
        if not antithetic:
            return torch.randint(low, high, (count,), generator=generator)
        first = torch.randint(low, high, ((count + 1) // 2,), generator=generator)
        return torch.cat([first, low + high - 1 - first])[:count]

    def _at(self, index: Tensor, like: Tensor) -> tuple[Tensor, Tensor]:
        shape = (-1, *(1 for _ in like.shape[1:]))
        return tuple(values.to(like)[index.to(like.device)].view(shape) for values in (self.signal, self.noise))  # type: ignore[return-value]
