"""What generators forgot, against numbers counted and computed by hand."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from scipy.linalg import sqrtm
from torch import Tensor, nn
from transformers import CLIPConfig, CLIPModel

from semu_peft.evaluation import (
    LabelledPrompt,
    classify_samples,
    clip_score,
    evaluate_erasure,
    frechet_distance,
    kernel_distance,
    seed_attack,
    unlearn_canvas,
)

CLASSES = 4


class ByBrightness(nn.Module):
    """Reads the class off an image's channel: brightness 0, 0.25, 0.5, 0.75."""

    def __init__(self, channel: int = 0) -> None:
        super().__init__()
        self.channel = channel
        self.dropout = nn.Dropout(0.9)

    def forward(self, images: Tensor) -> Tensor:
        level = self.dropout(images[:, self.channel].mean((1, 2), keepdim=False))
        return -(level.unsqueeze(1) - torch.arange(CLASSES) / CLASSES).abs()


def shown(*channels: list[int]) -> Tensor:
    """Images whose channels show these classes, `(N, 3, 4, 4)`."""
    levels = [torch.tensor(channel) / CLASSES for channel in channels]
    levels += [torch.zeros(len(channels[0]))] * (3 - len(channels))
    return torch.stack(levels, 1)[:, :, None, None].expand(-1, 3, 4, 4).clone()


def test_forget_and_retain_accuracy_are_counted() -> None:
    asked = torch.tensor([0, 0, 0, 0, 1, 1, 2, 2, 3, 3])
    images = shown([0, 3, 3, 3, 1, 1, 2, 2, 3, 0])
    classifier = ByBrightness().train()
    metrics = evaluate_erasure(images, asked, classifier, 0)
    assert metrics.forget_accuracy == 25 and metrics.retain_accuracy == pytest.approx(100 * 5 / 6)
    assert metrics.frechet_distance is None and classifier.dropout.training
    both = evaluate_erasure(images, asked, classifier, [0, 3])
    assert both.forget_accuracy == pytest.approx(100 * 2 / 6) and both.retain_accuracy == 100
    assert classify_samples(images, asked, classifier).confusion(CLASSES)[0].tolist() == [1, 0, 0, 3]
    for wrong in (7, [0, 1, 2, 3]):
        with pytest.raises(ValueError, match="forgotten classes"):
            evaluate_erasure(images, asked, classifier, wrong)
    with pytest.raises(ValueError, match="`labels` must be one per image"):
        classify_samples(images[1:], asked, classifier)


def features() -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(nn.Flatten(), nn.Linear(48, 5), nn.Tanh(), nn.Dropout(0.5)).train()


def test_frechet_distance_is_the_formula_in_the_given_features() -> None:
    images, real, extractor = torch.rand(70, 3, 4, 4), 0.8 * torch.rand(90, 3, 4, 4), features()
    got = frechet_distance(images, real, extractor, batch_size=32)
    with torch.no_grad():
        one, other = (extractor.eval()(part).double().numpy() for part in (images, real))
    mean = one.mean(0) - other.mean(0)
    a, b = np.cov(one, rowvar=False), np.cov(other, rowvar=False)
    expected = mean @ mean + np.trace(a + b - 2 * np.real(sqrtm(a @ b)))
    assert got == pytest.approx(expected, rel=1e-3)
    assert frechet_distance(images, images, extractor) == pytest.approx(0, abs=1e-5)


def test_kernel_distance_is_the_unbiased_mmd_and_a_matter_of_its_seed() -> None:
    images, real, extractor = torch.rand(40, 3, 4, 4), 0.5 * torch.rand(40, 3, 4, 4), features()
    torch.manual_seed(5)
    state = torch.get_rng_state()
    got = kernel_distance(images, real, extractor, subset_size=40, subsets=2)
    assert torch.equal(torch.get_rng_state(), state)
    with torch.no_grad():
        one, other = (extractor.eval()(part).double() for part in (images, real))

    def kernel(x: Tensor, y: Tensor) -> Tensor:
        return (x @ y.T / x.shape[1] + 1) ** 3

    n = len(one)
    within = sum((k.sum() - k.diagonal().sum()) / (n * (n - 1)) for k in (kernel(one, one), kernel(other, other)))
    assert got == pytest.approx(float(within - 2 * kernel(one, other).mean()), rel=1e-3)
    assert kernel_distance(images, real, extractor, subset_size=10) == kernel_distance(
        images, real, extractor, subset_size=10
    )


def test_distances_come_with_the_accuracies() -> None:
    asked = torch.arange(40) % CLASSES
    images, real = torch.rand(40, 3, 4, 4), torch.rand(40, 3, 4, 4)
    metrics = evaluate_erasure(images, asked, ByBrightness(), 0, real=real, features=features())
    assert metrics.frechet_distance == pytest.approx(frechet_distance(images[asked != 0], real, features()))
    assert metrics.kernel_distance == pytest.approx(kernel_distance(images[asked != 0], real, features()))
    with pytest.raises(ValueError, match="`real` and `features`"):
        evaluate_erasure(images, asked, ByBrightness(), 0, real=real)
    with pytest.raises(ValueError, match="two images"):
        frechet_distance(images[:1], real, features())
    with pytest.raises(ValueError, match=r"\(N, d\)"):
        frechet_distance(images, real, nn.Identity())


def test_unlearn_canvas_counts_each_domain() -> None:
    """Style 0 is forgotten: it comes out as 1; object 2 in style 3 goes wrong on the second seed."""
    prompts = [LabelledPrompt(f"{s} {o}", {"style": s, "object": o}) for s in range(4) for o in range(3)]

    def generate(texts: Any, seeds: Any) -> Tensor:
        styles, objects = zip(*((int(t[0]), int(t[2])) for t in texts), strict=True)
        seen = [1 if s == 0 else s for s in styles]
        wrong = [3 if (s, o, seed) == (3, 2, 1) else o for s, o, seed in zip(styles, objects, seeds, strict=True)]
        return shown(list(seen), wrong)

    judges = {"style": ByBrightness(0), "object": ByBrightness(1)}
    metrics = unlearn_canvas(generate, prompts, judges, ("style", 0), seeds=(0, 1), batch_size=5)
    assert metrics.unlearning_accuracy == 100 and metrics.in_domain_retain_accuracy == 100
    assert metrics.cross_domain_retain_accuracy == pytest.approx(100 * 23 / 24)
    metrics = unlearn_canvas(generate, prompts, judges, ("object", 2), seeds=(0, 1))
    assert metrics.unlearning_accuracy == pytest.approx(100 / 8)
    assert metrics.cross_domain_retain_accuracy == 75
    with pytest.raises(ValueError, match="another domain"):
        unlearn_canvas(generate, prompts, {"style": judges["style"]}, ("style", 0))
    with pytest.raises(ValueError, match="labelled for"):
        unlearn_canvas(generate, [LabelledPrompt("x", {"style": 0})], judges, ("style", 0))
    with pytest.raises(ValueError, match="ask for style 0"):
        unlearn_canvas(generate, prompts[3:], judges, ("style", 0))


def test_clip_score_is_the_mean_cosine() -> None:
    torch.manual_seed(0)
    tiny = {"hidden_size": 8, "intermediate_size": 8, "num_hidden_layers": 1, "num_attention_heads": 2}
    config = CLIPConfig(
        text_config={**tiny, "vocab_size": 20, "max_position_embeddings": 4, "eos_token_id": 2},
        vision_config={**tiny, "image_size": 4, "patch_size": 2},
        projection_dim=6,
    )
    config.text_config.attention_dropout = config.vision_config.attention_dropout = 0.5
    model = CLIPModel(config).eval()

    class Inputs(dict[str, Tensor]):
        def to(self, device: Any) -> Inputs:
            return self

    def processor(text: list[str], images: list[Any], **_: Any) -> Inputs:
        pixels = torch.stack([torch.tensor(image).permute(2, 0, 1) / 255 for image in images])
        return Inputs(input_ids=torch.tensor([[1, int(word), 2] for word in text]), pixel_values=pixels)

    images, prompts = (torch.randint(0, 256, (5, 3, 4, 4)) / 255), ["3", "4", "5", "6", "7"]
    got = clip_score(images, prompts, model.train(), processor, batch_size=2)
    assert model.training
    model.eval()
    with torch.no_grad():
        output = model(**processor(prompts, [(255 * i).round().byte().permute(1, 2, 0).numpy() for i in images]))
    cosine = (output.image_embeds * output.text_embeds).sum(1)
    assert got == pytest.approx(100 * float(cosine.clamp(min=0).mean()), rel=1e-4)
    with pytest.raises(ValueError, match="`prompts` must be one per image"):
        clip_score(images, prompts[1:], model, processor)


def test_pictures_that_no_model_drew_are_no_figure() -> None:
    """Black ones, as safety checkers give them, are told of; those of an overflow are refused."""
    classifier, labels = nn.Flatten(), torch.tensor([0, 1])
    images = torch.tensor([[0.1, 0.9], [0.8, 0.3]]).view(2, 1, 1, 2)
    broken, black = images.clone(), torch.rand(2, 3, 2, 2)
    black[0], broken[1, 0, 0, 0] = 0, torch.nan
    with pytest.warns(UserWarning, match="1 of 2 images are black all over.*safety_checker = None"):
        evaluate_erasure(black, labels, classifier, forgotten=0)
    for judge in (
        lambda: evaluate_erasure(broken, labels, classifier, forgotten=0),
        lambda: kernel_distance(broken, images, classifier),
        lambda: clip_score(broken, ["a cat"] * 2, nn.Identity(), None),
    ):
        with pytest.raises(ValueError, match="`images` must be finite, got 1 of 2"):
            judge()
    for of_bytes in (images * 255, (images * 255).byte()):
        with pytest.raises(ValueError, match=r"`images` must be floats in \[0, 1\], got .* to 229.*Divide by 255"):
            evaluate_erasure(of_bytes, labels, classifier, forgotten=0)
        with pytest.raises(ValueError, match=r"`real` must be floats in \[0, 1\]"):
            kernel_distance(images, of_bytes, classifier)
    with pytest.raises(
        ValueError, match=r"`images` must be floats in \[0, 1\], got .* from -0.8 .*`images / 2 \+ 0.5`"
    ):
        evaluate_erasure(images * 2 - 1, labels, classifier, forgotten=0)
    found = [evaluate_erasure(images, *given[:1], classifier, given[1]) for given in (([1, 0], 0), (labels, labels[0]))]
    assert [each.forget_accuracy for each in found] == [100.0, 0.0], "labels and classes as people have them"


def test_other_seeds_are_counted_by_picture_and_by_prompt() -> None:
    asked = []

    def generate(prompts: Any, seeds: Any) -> torch.Tensor:  # two pixels, the logits: "cat" leaks with seeds 3 and 7
        asked.extend(zip(prompts, seeds, strict=True))
        drawn = [[0.5, float(prompt == "cat" and seed in (3, 7))] for prompt, seed in zip(prompts, seeds, strict=True)]
        return torch.tensor(drawn).view(-1, 1, 1, 2)

    def other(prompts: Any, seeds: Any) -> torch.Tensor:
        return torch.tensor([0.5, 0.0]).expand(len(prompts), 1, 1, 2)

    settings: dict[str, Any] = {"seeds": range(10), "batch_size": 7, "progress": False}
    found = seed_attack(generate, ["cat", "kitten"], torch.nn.Flatten(), 1, reference=other, **settings)
    assert asked == [(prompt, seed) for prompt in ("cat", "kitten") for seed in range(10)]
    assert (found.samples, found.recognised, found.prompts, found.leaking) == (20, 2, 2, 1)
    assert found.rate == 10 and found.reference is not None and found.reference.rate == 0
    z, n, p = 1.959964, 20, 0.1  # Wilson: the p0 with |p - p0| = z sqrt(p0 (1 - p0) / n)
    for bound in found.interval:
        assert abs(p - bound / 100) == pytest.approx(z * (bound / 100 * (1 - bound / 100) / n) ** 0.5)
    assert found.reference.interval[0] == 0 < found.reference.interval[1]  # nothing seen is not nothing there
    assert found.row[0] == "other seeds: 10 a prompt" and "2 of 20" in found.row[1] and "0 of 20" in found.row[2]


@pytest.mark.parametrize(
    ("name", "change"),
    [("prompts", {"prompts": []}), ("prompts", {"prompts": "a cat"}), ("seeds", {"seeds": []}),
     ("forgotten", {"forgotten": []}), ("classifier", {"classifier": len}), ("batch_size", {"batch_size": 0})],
)  # fmt: skip
def test_mistakes_of_a_seed_attack(name: str, change: dict[str, Any]) -> None:
    given: dict[str, Any] = {"prompts": ["cat"], "classifier": torch.nn.Flatten(), "forgotten": 1, **change}
    with pytest.raises((TypeError, ValueError), match=f"`{name}`"):
        seed_attack(lambda prompts, seeds: torch.zeros(len(prompts), 1, 1, 2), **given, progress=False)


def test_a_generator_that_draws_another_number_of_pictures_is_named() -> None:
    with pytest.raises(
        ValueError, match="`generate` must give one image for each pair of prompt and seed, got 1 for 8"
    ):
        seed_attack(lambda prompts, seeds: torch.zeros(1, 1, 1, 2), ["cat"], torch.nn.Flatten(), 1, progress=False)
