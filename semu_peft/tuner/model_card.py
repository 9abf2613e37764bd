"""The README beside a saved adapter: what it is, how to load it, what it was made with, and how well it forgot."""

from __future__ import annotations

import json
import re
from collections.abc import Mapping, Sequence
from dataclasses import fields, is_dataclass, replace
from numbers import Integral, Real
from pathlib import Path
from typing import Any

from huggingface_hub import EvalResult, HfApi, ModelCard, ModelCardData, hf_hub_download
from huggingface_hub.errors import (
    EntryNotFoundError,
    HFValidationError,
    LocalEntryNotFoundError,
    RepositoryNotFoundError,
)
from huggingface_hub.utils import validate_repo_id
from peft.utils import CONFIG_NAME

from semu_peft.arguments import check_kind, check_path
from semu_peft.files import final_name, written_whole

CARD_NAME = "README.md"
_BLANK = "# Model Card for Model ID"  # the template that PEFT and transformers write where there is no card yet
_TAGS = ("semu", "machine-unlearning")
_BEGIN, _END = "<!-- semu_peft: what was forgotten -->", "<!-- semu_peft: end -->"
_ASK = "> Say here what was forgotten, with which data and objective, and how that was measured."

_TEXT = """# SEMU adapter

An adapter that makes {base} forget. It adds `U R Vᵀ` to the weights of {layers} layers, with frozen orthonormal bases
`U`, `V` of rank {ranks} and a small trained core `R`
([SEMU](https://arxiv.org/abs/2502.07587)).

{block}

## Use

```python
import semu_peft  # the package semu-peft. Without this line PEFT does not know the method: `KeyError: 'SEMU'`
from peft import PeftModel

model = PeftModel.from_pretrained(base_model, "{name}")
merged = model.merge_and_unload()  # a stock model that has forgotten
```

Importing `semu_peft` is what registers the method with PEFT; nothing of it is called. `base_model` is the loaded model;
of a diffusion pipeline it is the denoiser, `pipe.unet` or `pipe.transformer`, which then has the adapter.

Without `semu_peft`, load the same correction as a LoRA. It is written once, and PEFT alone reads it:

```python
from semu_peft import save_as_lora

save_as_lora(model, "forgets-as-lora")
```

```python
from peft import PeftModel  # in a process without semu_peft

model = PeftModel.from_pretrained(base_model, "forgets-as-lora")
```

Whoever holds the original weights can switch the adapter off. To hand on a model that has forgotten, merge the adapter
and ship the merged weights alone. This is approximate unlearning: there is no proof that no trace is left.

## Settings

| setting | value |
| --- | --- |
{settings}

### Framework versions

{versions}
"""
_SETTINGS = (
    "explained_variance",
    "r",
    "orthogonal_to_weight",
    "conv_mode",
    "core",
    "init_weights",
    "bias",
    "save_dtype",
)


def fill_model_card(folder: Path, settings: Mapping[str, Any]) -> None:
    """Put the adapter's own description in the place of a blank model card, and SEMU's tags on any.

    What somebody has written is kept; where there is no card, none is made.

    Args:
        folder: The folder that the adapter was saved to.
        settings: The fields of the adapter's configuration.
    """
    path = folder / CARD_NAME
    if path.is_file():
        _filled(path.read_text(encoding="utf-8"), final_name(folder), settings).save(path)


def write_model_card(folder: Path, settings: Mapping[str, Any], older: str | None = None) -> None:
    """Write the adapter's card, where nothing else writes one.

    Args:
        folder: The folder that the adapter is being saved to.
        settings: The fields of the adapter's configuration.
        older: The text of a card that was there, which is kept unless it is blank.
    """
    _filled(older or _blank_card(), final_name(folder), settings).save(folder / CARD_NAME)


def card_in(folder: Path) -> str | None:
    """The text of the card in a folder, where there is one."""
    path = folder / CARD_NAME
    return path.read_text(encoding="utf-8") if path.is_file() else None


def update_model_card(
    adapter: str | Path,
    *,
    description: str | None = None,
    metrics: Mapping[str, float] | Sequence[EvalResult] | Any = None,
    dataset: str = "forget and retain data",
    task: str | None = None,
    license: str | None = None,
    token: str | None = None,
    revision: str | None = None,
) -> ModelCard:
    """Say in an adapter's model card what was forgotten and how that was measured, for people and for the Hub.

    A blank card, as transformers' `push_to_hub` writes it over the one that was saved, becomes the adapter's. What
    somebody wrote stays: a description stands in a place of its own, which a further call writes again. The numbers
    are there as a table and as the card's `model-index`; those of the same name, task and data set are replaced.

    Args:
        adapter: The folder that the adapter was saved to, or the name of its repository on the Hub.
        description: What was forgotten, with which data and objective, in Markdown.
        metrics: Numbers by name, what an evaluation returned (a dataclass of numbers), or `EvalResult`s of your own.
        dataset: What they were measured on, in words.
        task: The Hub's name of the task, such as `"image-classification"`; by default the card's, or `"other"`.
        license: The Hub's identifier of the license.
        token: The Hub's token; by default the stored one.
        revision: The branch on the Hub.

    Returns:
        The card as it is now.

    Raises:
        TypeError: An argument is of another kind.
        ValueError: There is no SEMU adapter.
        FileNotFoundError: There is neither such a folder nor such a repository.

    Examples:
        >>> import tempfile, torch
        >>> from peft import get_peft_model
        >>> from semu_peft import SemuConfig, update_model_card
        >>> config, folder = SemuConfig(target_modules=["0"], r=2, init_weights=False), tempfile.mkdtemp()
        >>> get_peft_model(torch.nn.Sequential(torch.nn.Linear(4, 3)), config).save_pretrained(folder)
        >>> card = update_model_card(folder, description="Forgets threes.", metrics={"unlearning accuracy": 98.5})
        >>> card.data.eval_results[0].metric_value, "Forgets threes." in card.text
        (98.5, True)
    """
    check_path("adapter", adapter)
    check_kind("description", description, (str, type(None)), "a text or None", "Say in words what was forgotten.")
    check_kind("dataset", dataset, str, "a text", "Say in words what was measured on.")
    local = Path(adapter).is_dir()
    given: dict[str, Any] = {"token": token, "revision": revision}
    settings, text = _read_folder(Path(adapter)) if local else _read_repository(str(adapter), given)
    name = final_name(Path(adapter)) if local else str(adapter)
    card = _filled(text, name, settings)
    data: Any = card.data
    if license is not None:
        data["license"] = license
    results = _results(metrics, dataset, task or data.get("pipeline_tag", None) or "other")
    if results:
        before = [old for old in data.eval_results or [] if not any(map(old.is_equal_except_value, results))]
        data.eval_results = [*before, *results]
        data.model_name = data.get("model_name", None) or name
    if results or description is not None:
        card.text = _told(card.text, description, data.eval_results or [])
    content = str(card)
    if local:
        with written_whole(Path(adapter, CARD_NAME)) as temporary:
            temporary.write_text(content, encoding="utf-8")
    else:
        HfApi(token=token).upload_file(
            path_or_fileobj=content.encode(), path_in_repo=CARD_NAME, repo_id=str(adapter), revision=revision,
            commit_message="Update the model card",
        )  # fmt: skip
    return card


def _filled(text: str, name: str, settings: Mapping[str, Any]) -> ModelCard:
    """A card with SEMU's tags, and with the adapter's description where it was blank."""
    card = ModelCard(_PATH_OBJECT.sub(_plain_path, text))
    base = card.data.get("base_model", None) or settings.get("base_model_name_or_path")
    if isinstance(base, str) and _is_public(base):
        card.data["base_model"] = base
    else:
        card.data.pop("base_model", None)
    tags = [tag for tag in card.data.get("tags") or [] if _may_stay(tag)]
    card.data["tags"] = sorted({*tags, *_TAGS})
    if _BLANK in card.text:
        card.data["library_name"] = "peft"  # transformers takes it for a model of its own
        versions = [line for line in card.text.splitlines() if line.startswith("- PEFT ")]
        if not versions and settings.get("peft_version"):
            versions = [f"- PEFT {settings['peft_version']}"]
        card.text = _description(name, settings, versions)
    return card


def _is_public(base: str) -> bool:
    """Whether a base model is named as on the Hub: a folder here says nothing to others, and its path too much."""
    if not base or Path(base).is_dir():
        return False
    try:
        validate_repo_id(base)
    except HFValidationError:
        return False
    return True


def _may_stay(tag: str) -> bool:
    """Whether a tag is none of a base model, such as `base_model:adapter:gpt2`, or of one that others can find."""
    base = re.match(r"base_model:((adapter|finetune|merge|quantized):)?", tag)
    return base is None or _is_public(tag[base.end() :])


def _read_folder(folder: Path) -> tuple[dict[str, Any], str]:
    card = folder / CARD_NAME
    return _settings(folder / CONFIG_NAME, str(folder)), card.read_text("utf-8") if card.is_file() else _blank_card()


def _read_repository(name: str, given: dict[str, Any]) -> tuple[dict[str, Any], str]:
    try:
        settings = _settings(Path(hf_hub_download(name, CONFIG_NAME, **given)), name)
    except LocalEntryNotFoundError:
        raise  # the Hub could not be asked
    except EntryNotFoundError:
        raise _no_adapter(name) from None
    except (RepositoryNotFoundError, ValueError) as error:
        if isinstance(error, ValueError) and "SEMU" in str(error):
            raise
        raise FileNotFoundError(
            f"`adapter`: there is neither a folder nor a repository {name!r}. Give what `save_pretrained` or "
            "`push_to_hub` was given."
        ) from error
    try:
        return settings, Path(hf_hub_download(name, CARD_NAME, **given)).read_text(encoding="utf-8")
    except EntryNotFoundError:
        return settings, _blank_card()


def _settings(path: Path, name: str) -> dict[str, Any]:
    try:
        settings = json.loads(path.read_text(encoding="utf-8"))
    except (FileNotFoundError, json.JSONDecodeError):
        raise _no_adapter(name) from None
    if not isinstance(settings, dict) or settings.get("peft_type") != "SEMU":
        raise _no_adapter(name)
    return settings


def _no_adapter(name: str) -> ValueError:
    return ValueError(
        f"`adapter` must be a saved SEMU adapter, got {name!r}, which has no {CONFIG_NAME} of one. Save the model's "
        "adapter first."
    )


def _blank_card() -> str:
    return str(ModelCard.from_template(ModelCardData(library_name="peft")))


def _results(metrics: Any, dataset: str, task: str) -> list[EvalResult]:
    if metrics is None:
        return []
    if isinstance(metrics, (list, tuple)) and all(isinstance(each, EvalResult) for each in metrics):
        return [replace(each, metric_value=_plain(each.metric_value)) for each in metrics]
    if is_dataclass(metrics) and not isinstance(metrics, type):
        metrics = {field.name: getattr(metrics, field.name) for field in fields(metrics)}
        metrics = {name: value for name, value in metrics.items() if _is_number(value)}
    if not isinstance(metrics, Mapping) or not all(map(_is_number, metrics.values())):
        raise TypeError(
            f"`metrics` must be numbers by name, a dataclass of numbers or `EvalResult`s, got {metrics!r}. Write "
            "`{'unlearning accuracy': 98.5}`."
        )
    slug = re.sub(r"[^a-z0-9]+", "-", dataset.lower()).strip("-") or "data"
    return [
        EvalResult(
            task_type=task, dataset_type=slug, dataset_name=dataset, metric_value=_plain(value),
            metric_type=re.sub(r"[^a-z0-9]+", "_", str(name).lower()).strip("_") or "metric",
            metric_name=str(name).replace("_", " "),
        )
        for name, value in metrics.items()
    ]  # fmt: skip


def _is_number(value: Any) -> bool:
    return isinstance(value, Real) and not isinstance(value, bool)


def _plain(value: Any) -> Any:
    """A number as YAML has it: NumPy's, floats too, would be written as objects, which no safe reader takes."""
    if not _is_number(value):
        return value
    return int(value) if isinstance(value, Integral) else float(value)


def _number(value: Any) -> str:
    return f"{value:.6g}" if _is_number(value) else str(value)


def _told(text: str, description: str | None, results: Sequence[EvalResult]) -> str:
    """The card's text with its marked place written again; where somebody took that out, with one at the end."""
    found = re.search(f"{re.escape(_BEGIN)}(.*?){re.escape(_END)}", text, re.S)
    older = found[1].split("\n| metric |")[0].strip() if found else ""
    words = older if description is None else description.replace("<!--", "&lt;!--").strip()
    block = _block(words, results)
    if found:
        return text[: found.start()] + block + text[found.end() :]
    return f"{text.rstrip()}\n\n## What was forgotten\n\n{block}\n"


def _block(words: str, results: Sequence[EvalResult]) -> str:
    lines = [_BEGIN, words or _ASK]
    if results:
        lines += ["", "| metric | value | measured on |", "| --- | --- | --- |"]
        for result in results:
            cells = [result.metric_name or result.metric_type, _number(result.metric_value), result.dataset_name]
            lines.append(f"| {' | '.join(str(cell).replace('|', chr(92) + '|') for cell in cells)} |")
    return "\n".join([*lines, _END])


# Diffusers keeps the `Path` that a model was loaded from, and PEFT writes it as an object that no safe reader takes.
_PATH_OBJECT = re.compile(r"^base_model: !!python/object/apply:pathlib\.\w+\n((?:- .*\n)+)", re.MULTILINE)


def _plain_path(match: re.Match[str]) -> str:
    parts = [line.removeprefix("- ").strip("'\"") for line in match[1].splitlines()]
    return f"base_model: {json.dumps(str(Path(*parts)))}\n"


def _description(name: str, settings: Mapping[str, Any], versions: list[str]) -> str:
    base = settings.get("base_model_name_or_path")
    ranks = [rank for rank in (settings.get("ranks") or {}).values() if rank > 0]
    return _TEXT.format(
        base=f"`{base if _is_public(base) else Path(base).name}`" if base else "its base model",
        layers=len(ranks),
        ranks=" to ".join(map(str, sorted({min(ranks), max(ranks)}))) if ranks else "0 (not initialised yet)",
        name=name,
        block=_block("", []),
        settings="\n".join(f"| `{field}` | `{settings.get(field)!r}` |" for field in _SETTINGS),
        versions="\n".join(versions),
    )
