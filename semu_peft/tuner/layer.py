"""What every SEMU layer has in common: a frozen base layer and, for each adapter, the correction `U R Vᵀ`."""

from __future__ import annotations

import warnings
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from peft.tuners.tuners_utils import BaseTunerLayer, check_adapters_to_merge, onload_layer
from torch import Tensor, nn

from .config import SemuConfig
from .frozen_base import FrozenBase, adapter_dtype, sum_in_dtype_of
from .tensors import TENSORS, AdapterTensors, HoldsTensors
from .uninitialized import AtBackward, NotInitializedError, OffloadedError, check_values
from .weight_use import WeightUse, weight_use

__all__ = ["BASE", "ROOM", "NotInitializedError", "SemuLayer", "in_range"]

_LINEAR_IN_WEIGHT = (nn.Linear, nn.Conv1d, nn.Conv2d, nn.Conv3d)
_NOT_OF_THE_BASE = ("base_layer", "parametrizations")
ROOM = "_room"  # where a configuration notes what an adapter is to have room for: rank and offset, by layer
BASE = "__base__"  # PEFT's name for "no adapter" where each example of a batch names its own


class SemuLayer(nn.Module, FrozenBase, HoldsTensors, BaseTunerLayer):
    """What every SEMU layer has in common, whatever the shape of its weight.

    For each adapter there are two frozen tensors with orthonormal columns and one that is trained, in float32 whatever
    the model's dtype:

    - `semu_U`: `(m, r)`, a basis of output directions;
    - `semu_V`: `(n, r)`, a basis of input directions;
    - `semu_core`: the core `R`, `(r, r)` or, for a diagonal core, `(r,)`.

    Where a method starts from a core that is not zero, a further tensor `semu_offset` of the core's shape holds it, and
    the correction is `U (R − R₀) Vᵀ`: the base weight is never written, and nothing changes before training does.

    `m × n` is the shape of the weight read as a matrix ([`weight_to_matrix`]); a convolution in `per_channel` mode is a
    batch of matrices, and all of these have its input channels as a leading dimension. An adapter is initialised when
    its configuration's `ranks` list the layer; before that it has rank 0 and does nothing.

    Examples:
        >>> import torch
        >>> from peft import get_peft_model
        >>> from semu_peft import SemuConfig, SemuLayer
        >>> config = SemuConfig(target_modules=["0"], r=2, init_weights=False)
        >>> model = get_peft_model(torch.nn.Sequential(torch.nn.Linear(4, 3)), config)
        >>> layer = next(module for module in model.modules() if isinstance(module, SemuLayer))
        >>> {name: tuple(getattr(layer, name)["default"].shape) for name in ("semu_U", "semu_V", "semu_core")}
        {'semu_U': (3, 2), 'semu_V': (4, 2), 'semu_core': (2, 2)}
    """

    adapter_layer_names: tuple[str, ...] = ("semu_core",)
    other_param_names: tuple[str, ...] = (
        "semu_U", "semu_V", "semu_offset", "r", "scaling", "configs", "requested_ranks", "awaits_file",
        "follows_dtype",
    )  # fmt: skip
    # What PEFT's `disable_input_dtype_casting` sets. Inputs are never cast here: the bases follow them.
    cast_input_dtype_enabled = True

    def __init__(
        self,
        base_layer: nn.Module,
        adapter_name: str,
        config: SemuConfig,
        layer_name: str = "",
        requested: int | None = None,
    ) -> None:
        super().__init__()
        self.base_layer = base_layer
        self.layer_name = layer_name
        self._weight_use = self.find_weight_use()
        self.semu_U = AdapterTensors("semu_U")
        self.semu_V = AdapterTensors("semu_V")
        self.semu_offset = AdapterTensors("semu_offset")
        self.semu_core = AdapterTensors("semu_core", trainable=True)
        self.r: dict[str, int] = {}
        self.scaling: dict[str, float] = {}
        self.configs: dict[str, SemuConfig] = {}
        self.requested_ranks: dict[str, int | None] = {}
        # Whether the adapter has the ranks of a saved one and waits for its tensors.
        self.awaits_file: dict[str, bool] = {}
        self.follows_dtype: dict[str, bool] = {}  # whether the adapter is in the model's dtype, not in float32
        self._disable_adapters = False
        self.merged_adapters: list[str] = []
        self._merged_scales: dict[str, float] = {}
        self._active_adapter = adapter_name
        self.update_layer(adapter_name, config, requested)

    def __getattr__(self, name: str) -> Any:
        """Answer for the base layer, which code around the model asks for its `stride`, `kernel_size`, `padding_idx` …

        What is private, or belongs to a machinery that works on a module itself, stays the base layer's own.
        """
        try:
            return super().__getattr__(name)
        except AttributeError:
            if name.startswith("_") or name in _NOT_OF_THE_BASE:
                raise
        return getattr(self.get_base_layer(), name)

    @classmethod
    def refusal(cls, base_layer: nn.Module) -> str | None:
        """Why a base layer cannot be corrected although its type is supported, and the mend; `None` where it can."""
        if weight_use(base_layer) is WeightUse.UNKNOWN:
            return "its weight is computed, and what its own `forward` does with that is not known"
        return None

    # ---- the geometry of the weight, which each layer type defines ----

    def weight_to_matrix(self, weight: Tensor, adapter_name: str) -> Tensor:
        """Read a tensor shaped like the base weight as the matrix `(m, n)`, or batch of matrices, to factorise."""
        raise NotImplementedError

    def matrix_shape(self, adapter_name: str) -> tuple[int, ...]:
        """`(m, n)`, or `(batch, m, n)`: the shape of the weight read as a matrix."""
        return tuple(self.weight_to_matrix(self.base_weight.detach(), adapter_name).shape)

    def matrix_to_weight(self, matrix: Tensor, adapter_name: str) -> Tensor:
        """The inverse of [`weight_to_matrix`]."""
        raise NotImplementedError

    def add_correction(self, output: Tensor, x: Tensor, adapter_name: str) -> Tensor:
        """Return `output + (U R Vᵀ)(x)` for one adapter, without forming the dense weight."""
        raise NotImplementedError

    def joins_weight(self, adapter_names: list[str], x: Tensor) -> bool:
        """Whether these corrections are cheaper added to the weight than run beside it; where they can be at all.

        While the model is compiled or exported the answer does not depend on the sizes of `x`.
        """
        return False

    # ---- life of an adapter ----

    def update_layer(self, adapter_name: str, config: SemuConfig, requested: int | None = None) -> None:
        """Add an adapter to this layer.

        It has the rank that `config.ranks` lists, to be filled by loading; else, where no data is needed
        (`init_weights`), the requested one or `r`; else none, until its forget data has been seen.

        Args:
            adapter_name: The adapter's name.
            config: The adapter's configuration, whose `ranks` are written where no data is needed.
            requested: The rank that the user's `rank_pattern` asks for here.
        """
        self.configs[adapter_name] = config
        self.scaling[adapter_name] = 1.0
        self.requested_ranks[adapter_name] = requested
        saved = self.layer_name in config.ranks
        needs_data = config.init_weights is True
        room, with_offset = vars(config).get(ROOM, {}).get(self.layer_name, (0, False))
        rank = config.ranks.get(self.layer_name, room)
        if not needs_data and not saved:
            rank = (config.r or 0) if requested is None else requested
        rank = min(rank, *self.matrix_shape(adapter_name)[-2:])
        self.allocate(adapter_name, rank, offset=with_offset or self.layer_name in config.offsets)
        if not needs_data:
            config.ranks[self.layer_name] = rank
            if not self.semu_core.stored_parameter(adapter_name).is_meta:
                self._initialize_without_data(adapter_name, rank)
        self.awaits_file[adapter_name] = saved
        self._move_adapter_to_device_of_base_layer(adapter_name)
        self.set_adapter(self.active_adapters, inference_mode=config.inference_mode)

    def tensor_shapes(self, adapter_name: str, rank: int) -> dict[str, tuple[int, ...]]:
        """The shapes of an adapter's tensors at a rank, by the names of their attributes."""
        *batch, m, n = self.matrix_shape(adapter_name)
        core = (rank,) if self.configs[adapter_name].core == "diagonal" else (rank, rank)
        shapes = {"semu_U": (m, rank), "semu_V": (n, rank), "semu_core": core, "semu_offset": core}
        return {kind: (*batch, *shape) for kind, shape in shapes.items()}

    def allocate(self, adapter_name: str, rank: int, *, offset: bool = False) -> None:
        """Make room for an adapter of this rank, zeros for now, and for the offset of its core if it has one."""
        factory: dict[str, Any] = {"dtype": self._dtype_of(adapter_name)}
        if adapter_name in self.semu_core and self.semu_core.lacks_values(adapter_name):
            factory["device"] = "meta"
        parts = {kind: torch.zeros(shape, **factory) for kind, shape in self.tensor_shapes(adapter_name, rank).items()}
        if not offset:
            del parts["semu_offset"]
        self._assign(adapter_name, parts)
        self._move_adapter_to_device_of_base_layer(adapter_name)

    def _initialize_without_data(self, adapter_name: str, rank: int) -> None:
        config = self.configs[adapter_name]
        if config.init_weights == "weight":
            with onload_layer(self):
                matrix = self.weight_to_matrix(self.get_base_weight().detach(), adapter_name)
                left, _, right = torch.linalg.svd(matrix.to(adapter_dtype(matrix.dtype)), full_matrices=False)
            self.set_basis(adapter_name, left[..., :rank], right.mT[..., :rank])
            return
        *batch, m, n = self.matrix_shape(adapter_name)
        # Not in torch's default dtype, which may be one that nothing is decomposed in.
        left, right = (torch.linalg.qr(torch.randn(*batch, size, rank, dtype=torch.float32))[0] for size in (m, n))
        core = 0.1 * torch.randn(self.tensor_shapes(adapter_name, rank)["semu_core"], dtype=torch.float32)
        self.set_basis(adapter_name, left, right, core)

    def set_basis(
        self,
        adapter_name: str,
        left: Tensor,
        right: Tensor,
        core: Tensor | None = None,
        *,
        offset: Tensor | None = None,
    ) -> None:
        """Give an adapter its bases, and so initialise it: `ΔW = U (R − R₀) Vᵀ`.

        The core's `Parameter` stays the same object, so that an optimiser made before keeps training it.

        Args:
            adapter_name: The adapter's name.
            left: `U`, `(m, r)` or `(channels, m, r)`, orthonormal columns.
            right: `V`, `(n, r)` or `(channels, n, r)`, orthonormal columns.
            core: `R`, `(..., r, r)`, or `(..., r)` for a diagonal core. By default zeros, or the offset where there is
                one: either way the correction is zero.
            offset: `R₀`, of the core's shape; none unless given.

        Raises:
            ValueError: The shapes do not fit the layer or each other.

        Examples:
            >>> import torch
            >>> from semu_peft.tuner import Linear, SemuConfig
            >>> layer = Linear(torch.nn.Linear(4, 3), "default", SemuConfig(), "layer")
            >>> u, s, vt = torch.linalg.svd(layer.weight, full_matrices=False)
            >>> layer.set_basis("default", u[:, :2], vt.mT[:, :2], offset=torch.diag(s[:2]))
            >>> layer.r["default"], bool(layer.get_delta_weight("default").any())
            (2, False)
        """
        shapes = self.tensor_shapes(adapter_name, left.shape[-1])
        parts = {"semu_U": left, "semu_V": right}
        if offset is not None:
            parts["semu_offset"] = offset
        start = left.new_zeros(shapes["semu_core"]) if offset is None else offset
        parts["semu_core"] = start if core is None else core
        words = {"semu_U": "left", "semu_V": "right", "semu_core": "core", "semu_offset": "offset"}
        for kind, tensor in parts.items():
            if tuple(tensor.shape) != shapes[kind]:
                raise ValueError(f"`{words[kind]}` must have shape {shapes[kind]}, got {tuple(tensor.shape)}.")
        self._assign(adapter_name, parts)
        self._move_adapter_to_device_of_base_layer(adapter_name)
        self.record(adapter_name)

    def record(self, adapter_name: str) -> None:
        """Write what the layer has into the adapter's configuration, by which it is initialised."""
        config = self.configs[adapter_name]
        config.ranks[self.layer_name] = self.r[adapter_name]
        others = {name for name in config.offsets if name != self.layer_name}
        config.offsets = sorted(others | ({self.layer_name} if adapter_name in self.semu_offset else set()))
        self.awaits_file[adapter_name] = False

    def _assign(self, adapter_name: str, parts: Mapping[str, Tensor]) -> None:
        dtype = self._dtype_of(adapter_name)
        self.r[adapter_name] = parts["semu_U"].shape[-1]
        for kind in TENSORS:
            tensors: AdapterTensors = getattr(self, kind)
            if kind in parts:
                tensors[adapter_name] = parts[kind].detach().to(dtype, copy=True).contiguous()  # shared with nobody
            elif adapter_name in tensors:
                del tensors[adapter_name]

    def _dtype_of(self, adapter_name: str) -> torch.dtype:
        dtype = self.base_weight.dtype
        follows = self.follows_dtype.get(adapter_name) and dtype.is_floating_point and dtype.itemsize >= 2
        return dtype if follows else adapter_dtype(dtype)

    def follow_dtype(self, adapter_name: str) -> None:
        """Keep the adapter in the dtype of the base weight from now on, bases rounded to it too."""
        self.follows_dtype[adapter_name] = True
        self._assign(
            adapter_name,
            {
                kind: getattr(self, kind).stored_parameter(adapter_name)
                for kind in TENSORS
                if adapter_name in getattr(self, kind)
            },
        )

    def is_initialized(self, adapter_name: str) -> bool:
        """Whether the adapter has its bases here, with rank 0 where the data named no direction."""
        return self.layer_name in self.configs[adapter_name].ranks

    def _move_adapter_to_device_of_base_layer(self, adapter_name: str, device: torch.device | None = None) -> None:
        if adapter_name not in self.semu_core:  # PEFT names another method's adapter, put around this layer
            return
        # PEFT would also cast to the base layer's dtype; bases rounded to bfloat16 are no longer orthonormal.
        device = device or self.base_weight.device
        if device.type == "meta":
            device = self.execution_device
        for tensors in self.tensors_of(adapter_name):
            parameter = tensors.stored_parameter(adapter_name)
            if device is not None and not parameter.is_meta and not tensors.is_brought_by_library(adapter_name):
                parameter.data = parameter.data.to(device)

    # ---- scale, as diffusers and PEFT set it ----

    def set_scale(self, adapter: str, scale: float) -> None:
        """Dial one adapter's correction: 0 is the original model, 1 the trained forgetting.

        Raises:
            ValueError: The adapter is merged at another scale.
        """
        if adapter in self.merged_adapters and scale != self._merged_scales[adapter]:
            raise ValueError(f"The adapter {adapter!r} is merged into the weights; call `unmerge_adapter` first.")
        if adapter in self.scaling:
            self.scaling[adapter] = scale

    def scale_layer(self, scale: float) -> None:
        """Multiply the scale of all active adapters; that of merged ones counts once they are unmerged.

        Diffusers scales before a pass and back after it, whether the adapters are merged or not.
        """
        for name in self.active_adapters:
            if name in self.scaling:
                self.scaling[name] *= scale

    def unscale_layer(self, scale: float | None = None) -> None:
        """Divide the scale of all active adapters; `None` sets it back to 1."""
        for name in self.active_adapters:
            if name in self.scaling:
                self.scaling[name] = 1.0 if scale is None else self.scaling[name] / scale

    # ---- the correction as a dense weight ----

    def get_core(self, adapter_name: str, *, scaled: bool = True) -> Tensor:
        """The core that the layer computes with, `R − R₀` as `(..., r, r)` matrices, times the adapter's scale."""
        core = self.semu_core[adapter_name]
        if adapter_name in self.semu_offset:
            core = core - self.semu_offset[adapter_name]
        if self.configs[adapter_name].core == "diagonal":
            core = torch.diag_embed(core)
        scale = self.scaling[adapter_name] if scaled else 1.0
        return core if scale == 1.0 else core * scale

    def get_delta_weight(self, adapter_name: str) -> Tensor:
        """`U (R − R₀) Vᵀ` in the shape of the base weight and in the adapter's dtype (float32 or better)."""
        left, right = self.semu_U[adapter_name], self.semu_V[adapter_name]
        return self.matrix_to_weight(left @ self.get_core(adapter_name) @ right.mT, adapter_name)

    def is_sum_of_weights(self) -> bool:
        """Whether the layer computes just what its base layer would with [`correction`] added to the weight."""
        names = [name for name in self._live_adapters() if self.r[name] > 0]
        if not names or self.disable_adapters or self.merged or isinstance(self.base_layer, BaseTunerLayer):
            return False
        ready = all(self.is_initialized(name) and not self.awaits_file[name] for name in names)
        if not ready or self._weight_use is not WeightUse.PLAIN or not self.base_is_bare(*_LINEAR_IN_WEIGHT):
            return False
        weight, delta = self.base_layer.weight, self.semu_core.stored_parameter(names[0])
        return weight.dtype == delta.dtype and weight.dtype.itemsize >= 4 and not weight.is_meta and not delta.is_meta

    def correction(self) -> Tensor:
        """The sum of what the active adapters add to the weight, in the shape of the base weight."""
        deltas = [self.get_delta_weight(name) for name in self._live_adapters() if self.r[name] > 0]
        return sum(deltas[1:], deltas[0])

    def merge(self, safe_merge: bool = False, adapter_names: list[str] | None = None) -> None:
        """Add the corrections of `adapter_names` (default: the active adapters) to the base weight.

        Raises:
            ValueError: `safe_merge` is set and a merged weight is not finite, or the weight is computed anew for each
                pass; the base weight is then unchanged.
        """
        names = [name for name in check_adapters_to_merge(self, adapter_names) if name in self.semu_core]
        if any(self.r[name] > 0 for name in names) and (reason := self.no_place_for_merge()):
            raise ValueError(reason)
        deltas = []
        for name in names:
            if self.r[name] > 0:
                deltas.append(self.get_delta_weight(name))
                # Eight-bit floats can be told apart from NaN in a wider dtype alone.
                if safe_merge and not self._base_weight_plus(deltas[-1]).to(deltas[-1].dtype).isfinite().all():
                    raise ValueError(f"NaNs detected in the merged weights. The adapter {name} seems to be broken")
        for delta in deltas:
            self.set_base_weight(self._base_weight_plus(delta))
        self.merged_adapters.extend(names)
        self._merged_scales.update({name: self.scaling[name] for name in names})

    def unmerge(self) -> None:
        """Take all merged corrections out of the base weight again."""
        if not self.merged:
            warnings.warn("Already unmerged. Nothing to do.", stacklevel=2)
            return
        while self.merged_adapters:
            name = self.merged_adapters.pop()
            merged_scale = self._merged_scales.pop(name)
            if name in self.semu_core and self.r[name] > 0:
                scale, self.scaling[name] = self.scaling[name], merged_scale
                try:
                    self.set_base_weight(self._base_weight_plus(-self.get_delta_weight(name)))
                finally:
                    self.scaling[name] = scale

    def _base_weight_plus(self, delta: Tensor) -> Tensor:
        return sum_in_dtype_of(self.get_base_weight(), delta)

    def unload_and_optionally_merge_module(
        self, merge: bool, safe_merge: bool, adapter_names: list[str] | None
    ) -> nn.Module:
        """The bare layer, with the corrections added to its weight where `merge` is set.

        A layer of another method beneath this one (SEMU injected over LoRA) is merged and taken off as well.
        """
        layer: Any = self
        while isinstance(layer, BaseTunerLayer):
            if merge:
                layer.merge(safe_merge=safe_merge, adapter_names=adapter_names)
            layer = layer.base_layer  # type: ignore[attr-defined]
        return layer

    def _live_adapters(self) -> list[str]:
        return [name for name in self.active_adapters if name in self.semu_core]

    def forward(self, x: Tensor, *args: Any, adapter_names: Sequence[str] | None = None, **kwargs: Any) -> Tensor:
        """The base layer's output, plus the corrections of the active adapters unless disabled or merged.

        `adapter_names` gives each example an adapter of its own instead of the active ones.
        """
        if self.disable_adapters:
            if self.merged:
                self.unmerge()
            return self.base_layer(x, *args, **kwargs)
        names = [] if self.merged or adapter_names is not None else self._live_adapters()
        if not names and adapter_names is None:
            return self.base_layer(x, *args, **kwargs)
        corrections = [name for name in names if self.r[name] > 0]
        check_values(self, corrections)
        if corrections and (self._corrects_parameter or self.joins_weight(corrections, x)):
            output = self.run_base(x, self._corrected_weight(corrections), *args, **kwargs)
        else:
            output = self.base_layer(x, *args, **kwargs)
            for name in corrections:
                output = self.add_correction(output, x, name)
        if adapter_names is not None:
            return self._correct_each(output, x, adapter_names, *args, **kwargs)
        for name in names:
            output = self._guard(output, name)
        return output

    @property
    def _corrects_parameter(self) -> bool:
        return self._weight_use is not WeightUse.PLAIN and self.weight_use is WeightUse.OWN

    def _corrected_weight(self, adapter_names: Sequence[str]) -> Tensor:
        deltas = [self.get_delta_weight(name) for name in adapter_names]
        # The parameter itself, not its data: while another adapter is initialised it has a gradient.
        return sum_in_dtype_of(self.base_weight, sum(deltas[1:], deltas[0]))

    def _correct_each(
        self, output: Tensor, x: Tensor, adapter_names: Sequence[str], *args: Any, **kwargs: Any
    ) -> Tensor:
        """Add to each row of `output` the correction of the adapter that the row names, as LoRA does for a mixed batch.

        A name that this layer does not carry stands for no correction.
        """
        if len(x) != len(adapter_names):
            raise ValueError(
                "Length of `adapter_names` should be the same as the number of inputs, but got "
                f"{len(adapter_names)} and {len(x)} respectively."
            )
        if self.merged:
            raise ValueError(
                "Cannot pass `adapter_names` when there are merged adapters, please call `unmerge_adapter` first."
            )
        for name in dict.fromkeys(adapter_names):
            if name == BASE or not self.r.get(name):
                continue
            rows = torch.tensor([row for row, chosen in enumerate(adapter_names) if chosen == name], device=x.device)
            if self._corrects_parameter:
                corrected = self.run_base(x[rows], self._corrected_weight([name]), *args, **kwargs)
            else:
                corrected = self.add_correction(output[rows], x[rows], name)
            output = output.index_copy(0, rows, corrected)
        return output

    def _guard(self, output: Any, adapter_name: str) -> Any:
        core = self.semu_core.stored_parameter(adapter_name)
        error: Any = OffloadedError if core.is_meta and self.semu_core.is_brought_by_library(adapter_name) else None
        error = error if self.is_initialized(adapter_name) else NotInitializedError
        needed = error is not None or self.r[adapter_name] == 0
        if needed and core.requires_grad and torch.is_grad_enabled() and isinstance(output, Tensor):
            return AtBackward.apply(output, core, error, adapter_name)
        return output

    def __repr__(self) -> str:
        return f"semu.{super().__repr__()}"


def in_range(x: Tensor) -> Tensor:
    """`x`, in float32 where it is float16."""
    # A sum over large float16 activations overflows, and a core of zeros would make NaN of it.
    return x.float() if x.dtype == torch.float16 else x
