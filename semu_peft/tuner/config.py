"""The configuration that a SEMU adapter is built from, and rebuilt from when it is loaded."""

from __future__ import annotations

import copy
import os
import tempfile
import warnings
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

from huggingface_hub import hf_hub_download
from huggingface_hub.errors import EntryNotFoundError
from peft import PeftConfig
from peft.utils import CONFIG_NAME, SAFETENSORS_WEIGHTS_NAME

from .adapter_file import (
    are_ranks,
    check_adapter_file,
    forget_older_weights,
    keep_weights,
    matching_weights,
    read_settings,
    replace_pickle,
    share_weights,
)
from .misnomers import explaining
from .model_card import fill_model_card
from .names import check_names, check_pattern
from .peft_type import add_peft_type

_FOREIGN = {
    "rank": "The upper bound on every layer's rank is `r`, and the rank of single layers `rank_pattern`.",
    "gamma": "The share of the forget gradient's energy that is kept, γ, is `explained_variance`.",
    "init_lora_weights": "What the bases start from is `init_weights`.",
    **dict.fromkeys(
        ("alpha", "lora_alpha", "use_rslora"),
        "A core has no factor α / r: it is trained at full scale, and dialled afterwards by `set_scale`.",
    ),
    "lora_dropout": "A correction has no dropout: it is trained with the model in eval mode.",
}


@explaining(_FOREIGN)
@dataclass
class SemuConfig(PeftConfig):
    """Configuration of a SEMU adapter, `W' = W + U R Vᵀ` with frozen orthonormal `U`, `V` and a trainable core `R`.

    Args:
        target_modules (`list[str] | str`, *optional*):
            The layers to correct, as in every PEFT method: a list of names or name endings, a regular expression that
            must match the whole name, or a word: `"all-linear"`, every linear layer but the output layer, as in PEFT;
            `"all-layers"`, convolutions and PyTorch's attention as well. Layers that cannot be corrected are passed
            over then, with a warning. `None` takes PEFT's default for the architecture.
        exclude_modules (`list[str] | str`, *optional*):
            Names, name endings or a regular expression of layers to leave alone.
        layers_to_transform (`list[int] | int`, *optional*):
            Restrict `target_modules` (when it is a list) to these layer indices.
        layers_pattern (`list[str] | str`, *optional*):
            Name of the module list that `layers_to_transform` counts in, where PEFT cannot tell.
        target_parameters (`list[str]`, *optional*):
            Names or name endings of parameters of two or three dimensions to correct, for weights that no layer of a
            supported type holds. Fused experts `(experts, m, n)`, as in transformers' mixtures
            (`["mlp.experts.gate_up_proj", "mlp.experts.down_proj"]`), get bases and a core for each expert.
            With `target_modules=[]` nothing else is corrected.
        target_experts (`dict[str, list[int]]`):
            Correct these experts of fused ones alone, `{"down_proj": [3]}`: by the parameter's name, name ending or
            regular expression, the first that matches; the others stay as they are, bit for bit.
        modules_to_save (`list[str]`, *optional*):
            Modules that are trained in full and saved beside the adapter. The learning rate of a core is far too high
            for them: give them one of their own (`unlearn(..., optimizer=...)`, see "Everything PEFT does").
        ensure_weight_tying (`bool`, defaults to `False`):
            Where the head or a further embedding shares its weight with the input embedding and one of them is named
            in `target_modules`, correct the shared weight once, for all of them. Without it, each layer named has a
            correction of its own, which cannot be merged into one weight; PEFT warns then. Layers in
            `modules_to_save` are tied likewise.
        explained_variance (`float`, defaults to 0.9):
            γ in (0, 1]: each layer keeps the fewest leading singular directions of its forget gradient whose squared
            singular values sum to at least this share of the total.
        explained_variance_pattern (`dict[str, float]`):
            Another γ for some layers: by name, name ending or regular expression, the first that matches. The paper
            uses 1.0 for the attention layers of diffusion models.
        min_parameters (`int`, defaults to 48):
            How many numbers all cores are to have together at least. Where γ gives fewer, as for a class that the model
            is sure of, whose gradient has one direction a layer, every layer is raised to the same smallest rank that
            is enough: in a handful of numbers nothing can be forgotten without taking other things along. `r` and
            `rank_pattern` stay as they are. 0 leaves the ranks to γ alone, as in the paper.
        r (`int`, *optional*):
            Upper bound on every layer's rank. With `init_weights="weight"` or `False`, where no gradient decides, it
            *is* the rank.
        rank_pattern (`dict[str, int]`):
            The ranks that you want some layers to have instead of what γ gives them: by name, name ending or regular
            expression, the first that matches. A key that is a layer's full name means that layer alone.
        ranks (`dict[str, int]`):
            The ranks that the layers have, by full name: written when an adapter gets its bases, so that loading needs
            no data. A layer that is listed here is initialised; leave it empty in a new configuration.
        offsets (`list[str]`):
            The layers whose correction is counted from another core than zero, by full name; written with `ranks`.
        orthogonal_to_weight (`bool`, defaults to `False`):
            Remove from each forget gradient its component along the layer's weight before factorising it.
        conv_mode (`"flatten"` or `"per_channel"`, defaults to `"flatten"`):
            How a convolution's weight `(out, in, *kernel)` is read: as one `out × (in·kernel)` matrix, or as `in`
            matrices `out × kernel` (the paper's reading), which needs many times more parameters.
        core (`"full"` or `"diagonal"`, defaults to `"full"`):
            Train the whole `r × r` core or its diagonal only.
        init_weights (`True`, `"weight"` or `False`, defaults to `True`):
            `True`: the adapter does nothing until [`~semu_peft.initialize_semu_weights`] has seen forget data.
            `"weight"`: the leading singular vectors of the weight itself, no data needed (the LoRA-XS basis).
            `False`: random orthonormal bases and a random core, for tests.
        bias (`"none"`, `"all"` or `"semu_only"`, defaults to `"none"`):
            Which biases are trained in full, saved beside the adapter: none, all of the model's, or those of the
            corrected layers. As in LoRA they change in the model itself, also while the adapter is switched off.
        trainable_token_indices (`list[int] | dict[str, list[int]]`, *optional*):
            Rows of the token embedding (or of the layers named) that are trained in full, by token index.
        save_dtype (`"float32"`, `"bfloat16"` or `"float16"`, *optional*):
            The dtype of the bases `U` and `V` in a saved file; the core keeps its own. Loading takes the orthonormal
            matrix nearest to the rounded one, in float32. `None` saves the bases as they are.
        forgotten (`dict[str, list[str]]`):
            Metadata, from which no layer is computed: the prompts that the adapter was made to forget, each with those
            whose answer it gives instead. [`~semu_peft.unlearn_concept`] writes it, and holds these prompts when it
            trains a further adapter. It is saved in clear in `adapter_config.json`.
        parents (`list[str]`):
            Metadata: the adapters that this one is the sum of, or that were active or merged, or that it was kept
            orthogonal to, when it got its bases. It may do little without them. Written, not given.
        weights_sha256 (`str`, *optional*):
            The digest of the weights beside a saved configuration: written and checked, not given.

    Raises:
        ValueError: A value is outside its range, or two values contradict each other.
        TypeError: `target_parameters` is a string, or a keyword is another method's; the error names SEMU's.

    Examples:
        >>> import torch
        >>> from peft import get_peft_model
        >>> from semu_peft import SemuConfig
        >>> model = torch.nn.Sequential(torch.nn.Linear(6, 5), torch.nn.ReLU(), torch.nn.Linear(5, 3))
        >>> config = SemuConfig(target_modules=["0", "2"], r=4, rank_pattern={"2": 2}, init_weights="weight")
        >>> get_peft_model(model, config).peft_config["default"].ranks
        {'0': 4, '2': 2}
    """

    target_modules: list[str] | str | None = field(
        default=None, metadata={"help": "Names, name endings or regular expression of the layers to correct."}
    )
    exclude_modules: list[str] | str | None = field(
        default=None, metadata={"help": "Names, name endings or regular expression of the layers to leave alone."}
    )
    layers_to_transform: list[int] | int | None = field(
        default=None, metadata={"help": "Restrict target_modules to these layer indices."}
    )
    layers_pattern: list[str] | str | None = field(
        default=None, metadata={"help": "Name of the module list that layers_to_transform counts in."}
    )
    target_parameters: list[str] | None = field(
        default=None, metadata={"help": "Names or name endings of parameters to correct, such as fused experts."}
    )
    target_experts: dict[str, list[int]] = field(
        default_factory=dict, metadata={"help": "Which of the fused experts to correct, by parameter; else all."}
    )
    modules_to_save: list[str] | None = field(
        default=None, metadata={"help": "Modules trained in full and saved beside the adapter."}
    )
    ensure_weight_tying: bool = field(
        default=False, metadata={"help": "Give layers that share the input embedding's weight one correction."}
    )
    explained_variance: float = field(
        default=0.9, metadata={"help": "Share of the forget gradient's energy that the kept directions explain."}
    )
    explained_variance_pattern: dict[str, float] = field(
        default_factory=dict, metadata={"help": "Another explained_variance by layer name, ending or pattern."}
    )
    min_parameters: int = field(
        default=48, metadata={"help": "How many numbers all cores are to have together at least; 0: γ alone decides."}
    )
    r: int | None = field(default=None, metadata={"help": "Upper bound on every layer's rank."})
    rank_pattern: dict[str, int] = field(
        default_factory=dict, metadata={"help": "Ranks that some layers are to have, by name, ending or pattern."}
    )
    ranks: dict[str, int] = field(
        default_factory=dict, metadata={"help": "Rank of every initialised layer, by full name; written, not given."}
    )
    offsets: list[str] = field(
        default_factory=list, metadata={"help": "Layers whose core counts from an offset; written, not given."}
    )
    orthogonal_to_weight: bool = field(
        default=False, metadata={"help": "Remove the gradient's component along the weight before factorising."}
    )
    conv_mode: Literal["flatten", "per_channel"] = field(
        default="flatten", metadata={"help": "Read a convolution as one matrix, or as one matrix an input channel."}
    )
    core: Literal["full", "diagonal"] = field(
        default="full", metadata={"help": "Train the whole core or its diagonal only."}
    )
    init_weights: bool | Literal["weight"] = field(
        default=True, metadata={"help": "True: from forget data; 'weight': from the weight; False: random."}
    )

    bias: Literal["none", "all", "semu_only"] = field(
        default="none", metadata={"help": "Which biases are trained in full: none, all, or the corrected layers'."}
    )
    trainable_token_indices: list[int] | dict[str, list[int]] | None = field(
        default=None, metadata={"help": "Rows of the token embedding that are trained in full."}
    )
    save_dtype: Literal["float32", "bfloat16", "float16"] | None = field(
        default=None, metadata={"help": "The dtype of the bases in a saved file."}
    )
    forgotten: dict[str, list[str]] = field(
        default_factory=dict,
        metadata={"help": "Prompts made to be forgotten, and what each gives; written, not given."},
    )
    parents: list[str] = field(
        default_factory=list, metadata={"help": "Adapters that it was made of or beside; written, not given."}
    )
    weights_sha256: str | None = field(
        default=None, metadata={"help": "Digest of the weights beside a saved configuration; written, not given."}
    )
    # Where a save was cut short between the weights and the configuration: the weights that belong to this one.
    _kept_weights = None  # type: Path | None

    def __post_init__(self) -> None:
        super().__post_init__()
        self.peft_type = add_peft_type()
        self.target_modules = _as_set(self.target_modules)
        self.exclude_modules = _as_set(self.exclude_modules)
        if self.ensure_weight_tying:  # filled by PEFT's search for tied layers, and not saved
            self.modules_to_tie: set[str] | None = None
            self.target_modules_to_tie: set[str] | None = None
        self._check()

    def _check(self) -> None:
        self._check_names()
        if not _is_share(self.explained_variance):
            raise ValueError(
                f"`explained_variance` must be a share in (0, 1], got {self.explained_variance!r}. Use 0.9 to keep 90% "
                "of the forget gradient's energy, or 1.0 to keep all of it."
            )
        pattern = self.explained_variance_pattern
        if not isinstance(pattern, dict) or not all(map(_is_share, pattern.values())):
            raise ValueError(
                f"`explained_variance_pattern` must map layer names or patterns to shares in (0, 1], got {pattern!r}."
            )
        if self.r is not None and (not isinstance(self.r, int) or isinstance(self.r, bool) or self.r < 1):
            raise ValueError(f"`r` must be a positive integer or None (no upper bound on the rank), got {self.r!r}.")
        least = self.min_parameters
        if not isinstance(least, int) or isinstance(least, bool) or least < 0:
            raise ValueError(f"`min_parameters` must be an integer of zero or more, got {least!r}. Use 0 for γ alone.")
        _check_choice("conv_mode", self.conv_mode, ("flatten", "per_channel"))
        _check_choice("core", self.core, ("full", "diagonal"))
        _check_choice("init_weights", self.init_weights, (True, False, "weight"))
        _check_choice("bias", self.bias, ("none", "all", "semu_only"))
        _check_choice("save_dtype", self.save_dtype, (None, "float32", "bfloat16", "float16"))
        if not _is_record(self.forgotten):
            raise ValueError(
                f"`forgotten` must map prompts to lists of prompts, got {self.forgotten!r}. Leave it out: it is "
                "written by `unlearn_concept`."
            )
        if not isinstance(self.parents, (list, tuple)) or not all(isinstance(each, str) for each in self.parents):
            raise ValueError(
                f"`parents` must be a list of adapters' names, got {self.parents!r}. Leave it out: it is written when "
                "an adapter gets its bases."
            )
        if self.init_weights is not True and self.r is None:
            raise ValueError(
                f"`init_weights={self.init_weights!r}` looks at no forget data, so the rank must be given: set `r`, or "
                "use `init_weights=True` and call `initialize_semu_weights`."
            )
        for name in ("rank_pattern", "ranks"):
            value = getattr(self, name)
            if not are_ranks(value):
                raise ValueError(f"`{name}` must map layer names to ranks of 0 or more, got {value!r}.")
        experts = self.target_experts
        if not isinstance(experts, dict) or not all(map(_are_indices, experts.values())):
            raise ValueError(
                f"`target_experts` must map names of parameters to lists of different indices, got {experts!r}. Write "
                "`{'down_proj': [3]}` for the fourth expert of `down_proj`."
            )
        if isinstance(self.target_modules, str):
            for name in ("layers_to_transform", "layers_pattern"):
                if getattr(self, name) is not None:
                    raise ValueError(
                        f"`{name}` cannot be used when `target_modules` is the string {self.target_modules!r}: say it "
                        "in the regular expression, or give `target_modules` as a list of names."
                    )
        if self.layers_pattern and self.layers_to_transform is None:
            raise ValueError("`layers_pattern` only says where to count `layers_to_transform`; set that as well.")

    def _check_names(self) -> None:
        for name in ("target_modules", "exclude_modules", "layers_pattern"):
            check_names(name, getattr(self, name))
        for name in ("target_parameters", "modules_to_save"):
            check_names(name, getattr(self, name), pattern=False)
        for module in self.modules_to_save or ():
            check_pattern("modules_to_save", module)  # PEFT looks for it as one
        for name in _BY_PATTERN:
            value = getattr(self, name)
            for pattern in value if isinstance(value, dict) else ():
                if not isinstance(pattern, str):
                    raise TypeError(f"`{name}` must map names or patterns, got the key {pattern!r}. Names are strings.")
                check_pattern(name, pattern)
        indices = self.layers_to_transform
        several = indices if isinstance(indices, (list, tuple, set)) else [] if indices is None else [indices]
        if any(not isinstance(index, int) or isinstance(index, bool) for index in several):
            raise TypeError(
                f"`layers_to_transform` must be a layer's index, a list of them or None, got {indices!r}. Count from 0."
            )
        for name in _SWITCHES:
            if not isinstance(getattr(self, name), bool):
                raise TypeError(f"`{name}` must be True or False, got {getattr(self, name)!r}. It is a switch.")

    def _trained_in_full(self) -> list[str]:
        """Parts of the names of tensors that a file has beside the corrections."""
        modules = [name for name in self.modules_to_save or () if name not in _HEADS]
        return [*modules, *(["trainable_tokens_delta"] if self.trainable_token_indices else [])]

    def to_dict(self) -> dict[str, Any]:
        """The fields as they stand in `adapter_config.json`, where sets are sorted lists: one adapter, one file."""
        return {key: sorted(value) if isinstance(value, set) else value for key, value in super().to_dict().items()}

    def save_pretrained(self, save_directory: str, **kwargs: Any) -> None:
        """Write `adapter_config.json` last and whole, with the digest of the weights that PEFT has just written.

        Somebody's model card that is still blank gets the adapter's description.

        Raises:
            ValueError: `save_directory` is a file.
        """
        folder = Path(save_directory)
        if folder.is_file():
            raise ValueError(
                f"`save_directory` must be a folder, got {str(folder)!r}, which is a file. Give another path."
            )
        folder.mkdir(parents=True, exist_ok=True)
        replace_pickle(folder)
        written = copy.copy(self)
        # PEFT's models give `auto_mapping_dict`, after the weights; transformers does not, and writes them afterwards.
        written.weights_sha256 = keep_weights(folder) if "auto_mapping_dict" in kwargs else None
        with tempfile.TemporaryDirectory(dir=folder, prefix=".adapter_config.") as temporary:
            super(SemuConfig, written).save_pretrained(temporary, **kwargs)
            os.replace(Path(temporary, CONFIG_NAME), folder / CONFIG_NAME)
        forget_older_weights(folder, written.weights_sha256)
        if written.weights_sha256 is not None:
            share_weights(folder)
        fill_model_card(folder, self.to_dict())

    @classmethod
    def from_json_file(cls, path_json_file: str, **kwargs: Any) -> dict[str, Any]:
        """Read an `adapter_config.json`.

        Raises:
            ValueError: It is damaged, or of another PEFT method.
        """
        return read_settings(Path(path_json_file))

    @classmethod
    def from_pretrained(
        cls, pretrained_model_name_or_path: str, subfolder: str | None = None, **kwargs: Any
    ) -> SemuConfig:
        """Load the configuration, and check the adapter file beside it before any model is touched.

        Raises:
            ValueError: The adapter file in that folder is damaged, not a SEMU adapter, of another rank, or not the one
                that the configuration was written with.
        """
        config = super().from_pretrained(pretrained_model_name_or_path, subfolder=subfolder, **kwargs)
        folder = Path(pretrained_model_name_or_path, subfolder or "")
        digest, config.weights_sha256 = config.weights_sha256, None
        if not folder.is_dir():
            if digest is None:
                return config
            found = _downloaded_folder(pretrained_model_name_or_path, subfolder, cls._split_kwargs(kwargs)[0])
            if found is None:
                return config
            folder = found
        kept, problem = matching_weights(folder, digest)
        check_adapter_file(kept or folder / SAFETENSORS_WEIGHTS_NAME, config.ranks, config._trained_in_full())
        if problem is not None:
            raise ValueError(problem)
        if kept is not None:
            warnings.warn(
                f"{folder / SAFETENSORS_WEIGHTS_NAME} is not the file that {CONFIG_NAME} beside it was written with, "
                "as after a save that was cut short. The SEMU adapter is loaded as it was before, from "
                f"{kept.name}. Save it again; or, if you changed the weights, remove that file, and `weights_sha256` "
                "from the configuration.",
                stacklevel=2,
            )
        config._kept_weights = kept
        return config


_HEADS = ("classifier", "score", "qa_outputs")  # which PEFT adds to `modules_to_save` by the task, if there or not
_SWITCHES = ("ensure_weight_tying", "orthogonal_to_weight", "inference_mode")
_BY_PATTERN = ("explained_variance_pattern", "rank_pattern", "target_experts")


def _downloaded_folder(repo_id: str, subfolder: str | None, options: dict[str, Any]) -> Path | None:
    """The folder of the Hub's cache with the weights, which are loaded in any case; None where there are none."""
    try:
        return Path(hf_hub_download(repo_id, SAFETENSORS_WEIGHTS_NAME, subfolder=subfolder, **options)).parent
    except EntryNotFoundError:
        return None


def _is_share(value: object) -> bool:
    # bool is an int that must not pass for a number, and the comparison is false for NaN.
    return isinstance(value, (int, float)) and not isinstance(value, bool) and 0 < value <= 1


def _are_indices(value: object) -> bool:
    if not isinstance(value, list) or not value or len(set(map(str, value))) < len(value):
        return False
    return all(isinstance(index, int) and not isinstance(index, bool) and index >= 0 for index in value)


def _is_record(value: object) -> bool:
    return isinstance(value, dict) and all(
        isinstance(prompt, str) and isinstance(given, list) and all(isinstance(each, str) for each in given)
        for prompt, given in value.items()
    )


def _as_set(names: Any) -> Any:
    return set(names) if isinstance(names, (list, tuple)) and all(isinstance(each, str) for each in names) else names


def _check_choice(name: str, value: object, choices: tuple[object, ...]) -> None:
    if not any(value is choice or (isinstance(value, str) and value == choice) for choice in choices):
        raise ValueError(f"`{name}` must be one of {', '.join(map(repr, choices))}, got {value!r}.")
