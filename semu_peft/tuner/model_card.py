"""The README beside a saved adapter: what it is, how to load it, what it was made with."""

from __future__ import annotations

import json
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from huggingface_hub import ModelCard

_BLANK = "# Model Card for Model ID"  # the template that PEFT writes where there is no card yet
_TAGS = ("semu", "machine-unlearning")

_TEXT = """# SEMU adapter

An adapter that makes {base} forget. It adds `U R Vᵀ` to the weights of {layers} layers, with frozen orthonormal bases
`U`, `V` of rank {ranks} and a small trained core `R`
([SEMU](https://arxiv.org/abs/2502.07587)).

> Say here what was forgotten, with which data and objective, and how that was measured.

## Use

```python
import semu_peft  # pip install semu-peft. Without this line PEFT does not know the method: `KeyError: 'SEMU'`
from peft import PeftModel

model = PeftModel.from_pretrained(base_model, "{folder}")
merged = model.merge_and_unload()  # a stock model that has forgotten
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
    path = folder / "README.md"
    if not path.is_file():
        return
    card = ModelCard(_PATH_OBJECT.sub(_plain_path, path.read_text(encoding="utf-8")))
    tags = [tag for tag in card.data.get("tags") or [] if not tag.endswith(":")]  # of a base model without a name
    card.data["tags"] = sorted({*tags, *_TAGS})
    if not card.data.get("base_model", None):
        card.data.pop("base_model", None)
    if _BLANK in card.text:
        versions = [line for line in card.text.splitlines() if line.startswith("- PEFT ")]
        card.text = _description(folder.name, settings, versions)
    card.save(path)


# Diffusers keeps the `Path` that a model was loaded from, and PEFT writes it as an object that no safe reader takes.
_PATH_OBJECT = re.compile(r"^base_model: !!python/object/apply:pathlib\.\w+\n((?:- .*\n)+)", re.MULTILINE)


def _plain_path(match: re.Match[str]) -> str:
    parts = [line.removeprefix("- ").strip("'\"") for line in match[1].splitlines()]
    return f"base_model: {json.dumps(str(Path(*parts)))}\n"


def _description(name: str, settings: Mapping[str, Any], versions: list[str]) -> str:
    ranks = [rank for rank in settings["ranks"].values() if rank > 0]
    return _TEXT.format(
        base=f"`{base}`" if (base := settings["base_model_name_or_path"]) else "its base model",
        layers=len(ranks),
        ranks=" to ".join(map(str, sorted({min(ranks), max(ranks)}))) if ranks else "0 (not initialised yet)",
        folder=name,
        settings="\n".join(f"| `{field}` | `{settings[field]!r}` |" for field in _SETTINGS),
        versions="\n".join(versions),
    )
