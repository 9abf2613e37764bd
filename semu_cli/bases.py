"""Base models by folder or name, with and without an adapter; and results put into a folder as one."""

from __future__ import annotations

import contextlib
import json
import os
import warnings
from collections.abc import Callable, Iterator, Mapping
from functools import cached_property
from pathlib import Path
from typing import Any, cast

import typer

from .catalogue import Job
from .verbs import plain

RECORD = "unlearning.json"
"""What was done, beside the adapter."""
PROFILE = "profile.safetensors"
"""The spectra of the forget gradients, beside it."""


def job_of(model: str) -> Job:
    """What a model is for, by its configuration: nothing is loaded yet.

    Raises:
        typer.BadParameter: There is none, or it is of another kind.
    """
    if Path(model, "model_index.json").is_file():
        return "concept"
    if Path(model).is_dir() and not Path(model, "config.json").is_file():
        raise typer.BadParameter(
            f"`--model`: {model} is no model folder. Give one with a config.json (transformers' `save_pretrained`) or "
            "a model_index.json (a pipeline of diffusers)."
        )
    from transformers import AutoConfig

    try:
        config = AutoConfig.from_pretrained(model)
    except (OSError, ValueError) as error:
        if not Path(model).exists() and _is_pipeline(model):
            return "concept"
        reason = str(error).splitlines()[0]
        absent = "" if Path(model).exists() else ": there is no folder of that name here"
        raise typer.BadParameter(
            f"`--model`: {model!r} cannot be read{absent} ({reason}) Give a model's folder, or its name on the Hub."
        ) from None
    names = config.architectures or []
    if any(name.endswith("ForImageClassification") for name in names):
        return "images"
    if any(name.endswith(("ForCausalLM", "LMHeadModel", "ForConditionalGeneration")) for name in names):
        return "text"
    raise typer.BadParameter(
        f"`--model` must be an image classifier or language model of transformers or a pipeline of diffusers, got "
        f"{', '.join(names) or 'a configuration without an architecture'}. From Python any model works: `unlearn`."
    )


def _is_pipeline(model: str) -> bool:
    from diffusers import DiffusionPipeline

    try:
        return bool(DiffusionPipeline.load_config(model))
    except (OSError, ValueError):
        return False


def check_job(model: str, job: Job) -> None:
    """Raise a usage error unless the model is of the kind that a verb is for."""
    if (found := job_of(model)) != job:
        raise typer.BadParameter(f"`--model`: {model!r} is for {found}, not for {job}. Write `semu unlearn {found}`.")


def device() -> str:
    """Where to work: the first GPU there is (`CUDA_VISIBLE_DEVICES` chooses), or the CPU."""
    import torch

    return "cuda" if torch.cuda.is_available() else "cpu"


def silently() -> None:
    """No progress bars of reading and writing weights, which take a moment; those of downloads and of the work stay."""
    from huggingface_hub.utils import are_progress_bars_disabled, enable_progress_bars
    from transformers.utils.logging import disable_progress_bar

    are_wanted = not are_progress_bars_disabled()
    disable_progress_bar()
    if are_wanted:
        enable_progress_bars()


class Beside:
    """The models that are set beside each other, of whatever kind: what is used more than once is loaded once.

    The original is held by nobody here: with an unlearned model and a reference it would be a third in memory.

    Attributes:
        model: The base model's place.
        adapter: The adapter, or None for the bare model.
        reference: The place of a model that never knew, or None.

    Examples:
        >>> from semu_cli.bases import Beside
        >>> class Names(Beside):
        ...     model, adapter, reference = "base", Path("no-cats"), None
        ...     def load(self, place, adapter):
        ...         return place if adapter is None else f"{place} with {adapter}"
        >>> list(Names().each())
        [('original', 'base'), ('unlearned', 'base with no-cats')]
    """

    model: str
    adapter: Path | None
    reference: str | None

    def load(self, place: str, adapter: Path | None) -> Any:
        """One of the models."""
        raise NotImplementedError

    @cached_property
    def judged(self) -> Any:
        """The model with its adapter, if it has one."""
        return self.load(self.model, self.adapter)

    @cached_property
    def never_knew(self) -> Any:
        """The reference, or None."""
        return None if self.reference is None else self.load(self.reference, None)

    def original(self) -> Any:
        """The model without an adapter."""
        return self.judged if self.adapter is None else self.load(self.model, None)

    def places(self) -> dict[str, str]:
        """Where each lies, by its name; nothing is loaded."""
        found = {"model": self.model} if self.adapter is None else {"original": self.model}
        found |= {} if self.adapter is None else {"unlearned": f"{self.model} with {self.adapter}"}
        return found if self.reference is None else {**found, "reference": self.reference}

    def each(self) -> Iterator[tuple[str, Any]]:
        """Name and model of each, one after the other."""
        if self.adapter is not None:
            yield "original", self.original()
        yield "model" if self.adapter is None else "unlearned", self.judged
        if self.never_knew is not None:
            yield "reference", self.never_knew


def classifier(model: str, adapter: Path | None = None, *, as_stored: bool = False) -> Any:
    """An image classifier of transformers; `as_stored` in the precision of its file, to be written again."""
    from transformers import AutoModelForImageClassification

    return _loaded(AutoModelForImageClassification, model, adapter, as_stored)


def language_model(model: str, adapter: Path | None = None, *, as_stored: bool = False) -> tuple[Any, Any]:
    """A language model of transformers, and its tokenizer; `as_stored` in the precision of its file."""
    from transformers import AutoConfig, AutoModelForCausalLM, AutoModelForSeq2SeqLM, AutoTokenizer

    try:
        tokenizer = AutoTokenizer.from_pretrained(model)
    except (OSError, ValueError) as error:
        raise typer.BadParameter(
            f"`--model`: {model!r} has no tokenizer ({str(error).splitlines()[0]}). Save one beside the model."
        ) from None
    config = AutoConfig.from_pretrained(model)
    kind: Any = AutoModelForSeq2SeqLM if config.is_encoder_decoder else AutoModelForCausalLM
    try:
        return _loaded(kind, model, adapter, as_stored), tokenizer
    except ValueError as error:
        if "Unrecognized configuration class" not in str(error):
            raise
        raise typer.BadParameter(
            f"`--model` must be a language model that {kind.__name__} reads, got {', '.join(config.architectures)}. "
            "From Python any model works: `unlearn`."
        ) from None


def pipeline(model: str, adapter: Path | None = None, *, as_stored: bool = False) -> Any:
    """A text-to-image pipeline in float32, or each part `as_stored`; the adapter goes into its denoiser."""
    import torch
    from diffusers import DiffusionPipeline
    from diffusers.utils.logging import disable_progress_bar

    from semu_peft.concept.families import denoiser_of

    silently()
    disable_progress_bar()
    with _whole(model):
        # Without a word, text encoders of transformers 5 come as they are stored, and what reads them in float32.
        dtypes: Any = _stored_dtypes(model) if as_stored else torch.float32
        pipe = DiffusionPipeline.from_pretrained(model, torch_dtype=dtypes)
    pipe = pipe if as_stored else pipe.to(device())
    pipe.set_progress_bar_config(disable=True)
    _adapted(denoiser_of(pipe), adapter, model)
    return pipe


def _stored_dtypes(model: str) -> dict[str, Any]:
    """The precision of each part of a pipeline's files, by the part's name."""
    import torch
    from diffusers import DiffusionPipeline
    from safetensors import safe_open

    kinds = {"F16": torch.float16, "BF16": torch.bfloat16, "F32": torch.float32, "F64": torch.float64}
    found = {"default": torch.float32}
    for file in Path(model if Path(model).is_dir() else DiffusionPipeline.download(model)).glob("*/*.safetensors"):
        with safe_open(file, "pt") as weights:
            names = {weights.get_slice(name).get_dtype() for name in weights.keys()} & set(kinds)  # noqa: SIM118
        if len(names) == 1 and "." not in file.stem:  # which a variant has, that nobody asked for
            found[file.parent.name] = kinds[names.pop()]
    return found


def denoising_loss(pipe: Any, seed: int) -> Any:
    """The loss that a pipeline's denoiser was trained by, with the noise that this seed draws."""
    from semu_peft.concept.families import family_of
    from semu_peft.objectives import DenoisingLoss, NoiseSchedule

    return DenoisingLoss(NoiseSchedule.from_scheduler(pipe.scheduler, family_of(pipe).timestep_scale), seed=seed)


@contextlib.contextmanager
def _whole(model: str) -> Iterator[None]:
    """What safetensors says of a damaged file, with the model that it is in."""
    from safetensors import SafetensorError

    try:
        yield
    except SafetensorError as error:
        raise ValueError(f"Weights of {model} are damaged ({error}). Copy or download the model again.") from error


def _loaded(kind: Any, model: str, adapter: Path | None, as_stored: bool) -> Any:
    """A model where the work is done; on a CPU in float32: one without units for half takes ten times as long."""
    silently()
    with _whole(model):
        loaded = kind.from_pretrained(model).to(device()).eval()
    if not as_stored and device() == "cpu" and loaded.dtype.itemsize < 4 and not getattr(loaded, "is_quantized", False):
        loaded = loaded.float()
    return _adapted(loaded, adapter, model)


def check_adapter(adapter: Path | None, flag: str = "`--adapter`") -> None:
    """Raise a usage error unless the folder has an adapter in it, or none is asked for."""
    if adapter is None:
        return
    if not adapter.is_dir():
        raise typer.BadParameter(f"{flag}: there is no folder {adapter}. Give the folder that `semu unlearn` wrote.")
    weights = ("adapter_model.safetensors", "adapter_model.bin")
    for names in (("adapter_config.json",), weights):
        if not any((adapter / name).is_file() for name in names):
            raise typer.BadParameter(
                f"{flag}: there is no {names[0]} in {adapter}. Give the folder that `semu unlearn` wrote."
            )


def _adapted(model: Any, adapter: Path | None, place: str) -> Any:
    if adapter is None:
        return model
    from peft import PeftModel

    import semu_peft  # noqa: F401  registers the method

    _check_made_for(adapter, model, place)
    return PeftModel.from_pretrained(model, str(adapter))


def _check_made_for(adapter: Path, model: Any, place: str) -> None:
    """Raise a usage error where the model has none of the adapter's layers, and warn where it is called otherwise.

    The adapter keeps no digest of the model's weights, and one with equal layers takes it without a word.
    """
    from semu_peft.tuner.adapter_file import read_settings

    settings = read_settings(adapter / "adapter_config.json")
    layers, made_for = list(settings.get("ranks") or ()), settings.get("base_model_name_or_path")
    there = {name for name, _ in model.named_modules()} | {name for name, _ in model.named_parameters()}
    if layers and not there & set(layers):
        of = f", which was made for {made_for}" if made_for else ""
        raise typer.BadParameter(
            f"`--adapter`: {place} has no layer of {adapter}{of} ({layers[0]!r}, for one). Give the model that it was "
            "made for as --model."
        )
    if made_for and not is_same_model(made_for, place):
        warnings.warn(
            f"{adapter} was made for {made_for}, and --model is {place}. An adapter belongs to the weights that it was "
            "trained on: on others it does not forget, and may do damage. Go on only if this is that model, elsewhere.",
            stacklevel=2,
        )


def is_same_model(first: str, second: str) -> bool:
    """Whether two places may be of one model.

    Of two folders that are there that is seen. One that is not may have been moved, and one that is may be a copy of
    what the Hub has by a name: then the last part counts.

    Examples:
        >>> from semu_cli.bases import is_same_model
        >>> is_same_model("openai-community/gpt2", "models/of/mine/gpt2"), is_same_model("gpt2", "distilgpt2")
        (True, False)
    """
    one, other = Path(first), Path(second)
    if one.exists() and other.exists():
        return one.samefile(other)
    return one.absolute().name == other.absolute().name


def check_place(folder: Path) -> None:
    """Raise a usage error unless a folder can be there: before hours of work, and not after them."""
    if folder.exists() and not folder.is_dir():
        raise typer.BadParameter(f"`--output-dir` must be a folder, got {folder}, a file. Choose another path.")
    above = next(each for each in (folder.absolute().parent, *folder.absolute().parents) if each.exists())
    if not above.is_dir():
        raise typer.BadParameter(f"`--output-dir`: {folder} would be inside {above}, a file. Choose another path.")
    if not os.access(above, os.W_OK | os.X_OK):
        raise typer.BadParameter(f"`--output-dir`: nothing may be written to {above}. Choose another path.")


def check_output(folder: Path) -> None:
    """Raise a usage error unless results can go there: an adapter's folder may be written over, no other."""
    check_place(folder)
    if folder.is_dir() and any(folder.iterdir()) and not (folder / "adapter_config.json").is_file():
        raise typer.BadParameter(f"`--output-dir`: {folder} has other files in it. Choose a new folder.")


def check_new(folder: Path) -> None:
    """Raise a usage error unless the folder is a new or an empty one."""
    check_place(folder)
    if folder.is_dir() and any(folder.iterdir()):
        raise typer.BadParameter(f"`--output-dir`: {folder} exists and is not empty. Choose a new folder.")


def write_adapter(folder: Path, save: Callable[[Path], Any], record: Mapping[str, Any]) -> None:
    """Save an adapter, what is beside it, and what was done: the whole of all, or nothing."""
    from semu_peft.files import folder_written_whole
    from semu_peft.tuner.adapter_file import forget_older_weights, read_settings

    names = ["adapter_config.json", "adapter_model.safetensors", RECORD, PROFILE, "README.md"]
    with folder_written_whole(folder, names) as temporary:
        save(temporary)
        text = json.dumps(cast(Any, plain(record)), indent=2, ensure_ascii=False)
        (temporary / RECORD).write_text(text + "\n", encoding="utf-8")
    forget_older_weights(folder, read_settings(folder / names[0]).get("weights_sha256"))


def write_model(folder: Path, save: Callable[[Path], Any]) -> None:
    """Save a model into a new folder: the whole of it, or nothing."""
    from semu_peft.files import folder_written_whole, follow_umask

    if folder.is_dir():
        folder.rmdir()  # it is empty; then one rename puts the finished one there
    with folder_written_whole(folder, ["config.json"]) as temporary:
        save(temporary)
        follow_umask(*temporary.rglob("*.safetensors"))
