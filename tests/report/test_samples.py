"""Grids of samples: files that can be opened, of the right size, drawn from the right seeds and scales."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from diffusion_models import quiet, sd_pipeline
from matplotlib.image import imread
from torch import Tensor

from semu_peft import SemuConfig
from semu_peft.concept import Preview, concept_examples, unlearn_concept
from semu_peft.report import (
    SampleGrids,
    plot_before_after,
    plot_samples,
    plot_scales,
)
from semu_peft.report.samples import _strip
from semu_peft.tuner.adapted import semu_layers

QUICK: dict[str, Any] = {"height": 16, "width": 16, "num_inference_steps": 2}


def rows(seed: int = 0, channels: int = 1) -> dict[str, Tensor]:
    draw = torch.Generator().manual_seed(seed)
    return {name: torch.rand(3, channels, 8, 8, generator=draw) for name in ("three", "a very long name of a class")}


@pytest.mark.parametrize("channels", [1, 3])
def test_grids_are_written_and_before_and_after_is_twice_as_wide(channels: int, tmp_path: Path) -> None:
    plot_samples(rows(0, channels), tmp_path / "one.png", marked=["three"], title="title")
    plot_before_after(rows(0, channels), rows(1, channels), tmp_path / "two.png", dpi=150)
    one, two = (imread(tmp_path / name) for name in ("one.png", "two.png"))
    assert one.std() > 0.1 and two.shape[1] > 1.4 * one.shape[1]
    assert not list(tmp_path.glob(".*"))


def test_a_strip_holds_the_images_in_order() -> None:
    images = torch.stack([torch.full((1, 8, 8), level) for level in (0.0, 0.5)])
    strip = _strip(images, 3)
    assert strip.shape == (9, 27, 1)
    assert strip[0, 0, 0] == 0 and strip[0, 9, 0] == 0.5 and (strip[:, 18:] == 1).all()


def test_what_is_no_grid_is_refused(tmp_path: Path) -> None:
    for wrong in ({}, {"a": torch.rand(3, 8, 8)}, {"a": torch.rand(2, 4, 8, 8)}):
        with pytest.raises(ValueError, match="Rows must be"):
            plot_samples(wrong, tmp_path / "x.png")
    with pytest.raises(ValueError, match="must have the same rows"):
        plot_before_after(rows(), {"three": rows()["three"]}, tmp_path / "x.png")
    with pytest.raises(ValueError, match="picture format"):
        plot_samples(rows(), tmp_path / "x.txt")
    assert not list(tmp_path.iterdir())


def test_the_slider_samples_at_every_scale_and_puts_it_back(tmp_path: Path) -> None:
    pipe = quiet(sd_pipeline())
    pipe.unet.add_adapter(SemuConfig(target_modules=["to_k"], init_weights=False, r=2))
    layers = list(semu_layers(pipe.unet).values())
    layers[0].set_scale("default", 0.3)
    seen: list[float] = []

    def sample() -> dict[str, Tensor]:
        seen.append(layers[0].scaling["default"])
        return {"cat": torch.full((1, 8, 8), seen[-1] / 2)}

    path = tmp_path / "scales.png"
    plot_scales(pipe.unet, sample, path, scales=(0, 0.5, 1.5))
    assert seen == [0, 0.5, 1.5] and layers[0].scaling["default"] == 0.3
    assert layers[1].scaling["default"] == 1.0 and path.is_file()

    def broken() -> dict[str, Tensor]:
        raise RuntimeError("no")

    with pytest.raises(RuntimeError):
        plot_scales(pipe.unet, broken, tmp_path / "scales.png")
    assert layers[0].scaling["default"] == 0.3


def test_grids_during_training(tmp_path: Path) -> None:
    pipe = quiet(sd_pipeline())
    grids = SampleGrids(tmp_path, ["cat"], ["dog", ""], samples=2, settings=QUICK)
    examples = concept_examples(pipe, "cat", anchor="dog", samples_per_prompt=4, progress=False, **QUICK)
    unlearn_concept(pipe, examples, max_steps=4, callbacks=Preview(pipe, grids, times=1), progress=False)
    assert [path.name for path in sorted(tmp_path.iterdir())] == ["step-00000.png", "step-00002.png", "step-00004.png"]
    assert list(grids.first) == ["cat", "dog", "(no prompt)"]
