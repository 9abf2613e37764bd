"""Draw the documentation's pictures: `make pictures`, or `python docs/pictures.py [FOLDER]`.

All are drawn from what is there: the house from the import contract in setup.cfg, the others from a small network that
is trained on scikit-learn's digits and forgets the 3s, in a few seconds on one core.
"""

from __future__ import annotations

import configparser
import copy
import sys
from pathlib import Path

import torch
from matplotlib.axes import Axes
from matplotlib.figure import FigureBase
from peft import get_peft_model
from sklearn.datasets import load_digits
from sklearn.model_selection import train_test_split
from torch import Tensor, nn
from torch.utils.data import DataLoader, TensorDataset

from semu_peft import SemuConfig, initialize_semu_weights, objectives, unlearn
from semu_peft.evaluation import predict, relearning
from semu_peft.objectives import Attacker
from semu_peft.report import plot_confusion
from semu_peft.report.figure import TEXT, new_figure, save_figure

ROOT = Path(__file__).parents[1]
FORGOTTEN = 3
BLUE, ORANGE, GREY = "#0072b2", "#e69f00", "#c8ccd0"  # of Okabe and Ito's palette, told apart by the colour-blind
STYLE = (
    ".room{font:600 15px system-ui,sans-serif;fill:#1b2733}"
    ".file{font:12px ui-monospace,Menlo,Consolas,monospace;fill:#3d4a57}"
    f".arrow{{fill:none;stroke:{BLUE};stroke-width:2}}"
)


def main() -> None:
    folder = Path(sys.argv[1]) if len(sys.argv) > 1 else ROOT / "docs" / "pictures"
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "house.svg").write_text(house(ROOT / "setup.cfg", ROOT / "semu_peft"), encoding="utf-8")
    torch.manual_seed(0)
    train, test = read_digits()
    model = trained_on(train)
    draw_subspace(model, train, folder / "subspace.png")
    draw_forgetting(model, train, test, folder / "forgetting.png")
    draw_relearning(model, train, test, folder / "relearning.png")


# ---- the house ----


def house(contract: Path, package: Path) -> str:
    """Return the rooms of the import contract as SVG, one floor a layer and the modules of each room inside it."""
    width, left, gap, top, drawn = 940, 44, 12, 20, []
    for floor in read_floors(contract):
        built = [room for room in floor if _exists(package / room)]
        if not built:  # the contract keeps places for rooms to come
            continue
        room_width = (width - left - 20 - gap * (len(built) - 1)) // len(built)
        rooms = {room: wrapped(modules_of(package / room), (room_width - 20) * 10 // 73) for room in built}
        height = 34 + 17 * max(map(len, rooms.values()))
        for index, (room, lines) in enumerate(rooms.items()):
            drawn += _room(room, lines, left + index * (room_width + gap), top, room_width, height)
        top += height + 10
    return "\n".join(
        [
            f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {width} {top + 6}" role="img">',
            "<title>The rooms of semu_peft: each may import from the floors below it, never from above</title>",
            f"<style>{STYLE}</style>",
            f'<rect width="{width}" height="{top + 6}" rx="8" fill="#ffffff"/>',
            f'<path d="M24 24 V{top - 22} m-6 -9 l6 9 l6 -9" class="arrow"/>',
            f'<text transform="translate(16 {top // 2}) rotate(-90)" text-anchor="middle" class="file">imports</text>',
            *drawn,
            "</svg>\n",
        ]
    )


def _room(room: str, lines: list[str], x: int, y: int, width: int, height: int) -> list[str]:
    """Draw a room as a box with its name and the lines of its modules; `tuner`, which runs alone, in another colour."""
    fill, name = "#cfe6f5" if room == "tuner" else "#eef1f4", room if lines else f"{room}.py"
    return [
        f'<rect x="{x}" y="{y}" width="{width}" height="{height}" rx="6" fill="{fill}"/>',
        f'<text x="{x + 10}" y="{y + 21}" class="room">{name}</text>',
        *(f'<text x="{x + 10}" y="{y + 40 + 17 * row}" class="file">{text}</text>' for row, text in enumerate(lines)),
    ]


def read_floors(contract: Path) -> list[list[str]]:
    """Return the rooms of each layer of the contract, from the top; optional ones without their parentheses."""
    config = configparser.ConfigParser()
    config.read(contract, encoding="utf-8")
    lines = config["importlinter:contract:rooms"]["layers"].split("\n")
    return [[room.strip(" ()") for room in line.replace(":", "|").split("|")] for line in lines if line.strip()]


def modules_of(room: Path) -> list[str]:
    """Return the names of a room's modules and packages, in order; none for a single file."""
    inside = [path.parent for path in room.glob("*/__init__.py")]
    return sorted(path.stem for path in [*room.glob("*.py"), *inside] if path.stem != "__init__")


def wrapped(words: list[str], width: int) -> list[str]:
    """Return the words on lines of at most `width` characters, with dots between them."""
    lines: list[str] = []
    for word in words:
        if lines and len(lines[-1]) + 3 + len(word) <= width:
            lines[-1] += f" · {word}"
        else:
            lines.append(word)
    return lines


def _exists(room: Path) -> bool:
    return room.is_dir() or room.with_suffix(".py").is_file()


# ---- digits ----


def read_digits() -> tuple[TensorDataset, TensorDataset]:
    """Return the training and the test images of scikit-learn's handwritten digits, `(N, 64)` in [0, 1]."""
    digits = load_digits()
    images, labels = torch.tensor(digits.data / 16, dtype=torch.float32), torch.tensor(digits.target)
    train, test = train_test_split(range(len(labels)), test_size=0.25, random_state=0, stratify=digits.target)
    return TensorDataset(images[train], labels[train]), TensorDataset(images[test], labels[test])


def trained_on(digits: TensorDataset) -> nn.Module:
    """Return a network of three layers that knows all digits."""
    images, labels = digits.tensors
    model = nn.Sequential(nn.Linear(64, 96), nn.ReLU(), nn.Linear(96, 96), nn.ReLU(), nn.Linear(96, 10))
    optimizer = torch.optim.AdamW(model.parameters(), lr=3e-3, weight_decay=0.05)
    for _ in range(30):
        for chosen in torch.randperm(len(labels)).split(64):
            loss = nn.functional.cross_entropy(model(images[chosen]), labels[chosen])
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
    return model.eval()


def draw_forgetting(model: nn.Module, train: TensorDataset, test: TensorDataset, path: Path) -> None:
    """Forget a digit and draw what the test images are taken for, before and after."""
    gone = train.tensors[1] == FORGOTTEN
    forget = DataLoader(TensorDataset(*(tensor[gone] for tensor in train.tensors)), batch_size=32, shuffle=True)
    before = predict(model, [test.tensors], progress=False)
    unlearned = get_peft_model(copy.deepcopy(model), SemuConfig(target_modules=["2", "4"], explained_variance=0.5))
    objective = objectives.DecoupledDistillation()
    initialize_semu_weights(unlearned, forget, objective, progress=False)
    unlearn(unlearned, forget, objective, epochs=20, learning_rate=0.1, progress=False)
    plot_confusion(before, predict(unlearned, [test.tensors], progress=False), path, forgotten=FORGOTTEN, dpi=100)


def draw_relearning(model: nn.Module, train: TensorDataset, test: TensorDataset, path: Path) -> None:
    """Draw how fast a digit comes back under fine-tuning on 20 examples: original, silenced and retrained model."""

    def parts(digits: TensorDataset) -> tuple[TensorDataset, TensorDataset]:
        gone = digits.tensors[1] == FORGOTTEN
        return tuple(TensorDataset(*(tensor[chosen] for tensor in digits.tensors)) for chosen in (gone, ~gone))

    (forget, retain), (forget_test, retain_test) = parts(train), parts(test)
    retrained, objective = trained_on(retain), objectives.DecoupledDistillation()
    silenced = get_peft_model(copy.deepcopy(model), SemuConfig(target_modules="all-linear", explained_variance=1.0))
    initialize_semu_weights(silenced, [forget.tensors], objective, progress=False)
    unlearn(silenced, [forget.tensors], objective, progress=False)
    figure = new_figure(6.4, 3.4)
    ax = figure.subplots()
    models = {"original (do nothing)": model, "unlearned by SEMU": silenced, "retrained (gold)": retrained}
    for (name, each), colour, marker in zip(models.items(), (GREY, BLUE, ORANGE), "s^o", strict=True):
        curve = relearning(
            each, [forget.tensors], [retain.tensors], attacker=Attacker("sgd", 3e-3, steps=30), steps=range(0, 31, 2),
            forget_test=[forget_test.tensors], retain_test=[retain_test.tensors], progress=False,
        )  # fmt: skip
        ax.plot(curve.steps, curve.forget, color=colour, marker=marker, ms=4, lw=2, label=name)
    ax.set(xlabel="steps of fine-tuning on 20 images of 3s and 60 others", ylabel="3s recognised, %", ylim=(-3, 103))
    ax.legend(frameon=False, labelcolor=TEXT)
    ax.spines[["top", "right"]].set_visible(False)
    save_figure(figure, path, 100)


# ---- the subspace ----


def draw_subspace(model: nn.Module, train: TensorDataset, path: Path) -> None:
    """Draw the middle layer's gradient for 100 images to forget, what is kept of it, its spectrum, the correction."""
    gamma, forget = 0.9, [train[:100]]
    adapted = get_peft_model(copy.deepcopy(model), SemuConfig(target_modules=["2"], explained_variance=gamma))
    profile = initialize_semu_weights(
        adapted, forget, objectives.RandomLabel(), keep_explained_variance=1.0, progress=False
    )
    spectrum = profile.layers["2"]
    rank, found = spectrum.rank, spectrum.directions
    left, values, right = found.left, found.singular_values, found.right.mT
    gradient = (left * values[: left.shape[1]]) @ right  # all directions were kept, so this is G itself
    kept = (left[:, :rank] * values[:rank]) @ right[:rank]

    figure = new_figure(11, 6.6)
    top, bottom = figure.subfigures(2, 1, height_ratios=[1, 1.05])
    _draw_gradients(top, gradient, kept, rank)
    bars, blocks = bottom.subplots(1, 2, width_ratios=[1, 1.25])
    _draw_spectrum(bars, values, rank, gamma)
    _draw_correction(blocks)
    save_figure(figure, path, 85)


def _draw_gradients(figure: FigureBase, gradient: Tensor, kept: Tensor, rank: int) -> None:
    """Draw G as the sum of what the subspace keeps and what it leaves."""
    limit = gradient.abs().max().item() / 2
    share = kept.square().sum() / gradient.square().sum()
    parts = {
        f"forget gradient G\n{len(gradient)} × {gradient.shape[1]}": gradient,
        f"U S Vᵀ, {rank} of {min(gradient.shape)} directions\n{share:.0%} of its energy": kept,
        f"the rest, left out\n{1 - share:.0%}": gradient - kept,
    }
    axes = figure.subplots(1, 3)
    for ax, (title, matrix), sign in zip(axes, parts.items(), ("=", "+", ""), strict=True):
        ax.imshow(matrix, cmap="PuOr", vmin=-limit, vmax=limit, interpolation="nearest")
        ax.set(xticks=[], yticks=[])
        ax.set_title(title, fontsize=11, color=TEXT)
        ax.text(1.22, 0.5, sign, transform=ax.transAxes, fontsize=20, ha="center", va="center", color=TEXT)


def _draw_spectrum(ax: Axes, values: Tensor, rank: int, gamma: float) -> None:
    """Draw the singular values, those kept in blue, and the share of the energy that the first ones hold together."""
    shown = values[: 4 * rank]
    energy = values.square().cumsum(0) / values.square().sum()
    index, right = range(1, len(shown) + 1), len(shown) + 0.4
    ax.bar(index, shown / values[0], color=[BLUE] * rank + [GREY] * (len(shown) - rank), width=0.8)
    ax.plot(index, energy[: len(shown)], color=ORANGE, marker="o", ms=4, lw=1.5)
    ax.axhline(gamma, color=TEXT, lw=1, ls="--")
    notes = {
        f"γ = {gamma:g}": (gamma - 0.02, TEXT),
        "● share of the energy, summed": (0.76, "#a06c00"),
        f"■ singular values, the {rank} that are kept": (0.66, BLUE),
        "■ those that are not": (0.56, "#777d83"),
    }
    for text, (height, colour) in notes.items():
        ax.text(right, height, text, ha="right", va="top", fontsize=10, color=colour)
    ax.set(xlabel="direction", ylabel="value / largest, or share", ylim=(0, 1.05), xlim=(0.3, len(shown) + 0.7))
    ax.set_xticks([1, *range(rank, len(shown) + 1, rank)])
    ax.spines[["top", "right"]].set_visible(False)


def _draw_correction(ax: Axes) -> None:
    """Draw W + U R Vᵀ as blocks of the shapes that the factors have."""
    from matplotlib.patches import Rectangle

    def block(x: float, y: float, width: float, height: float, colour: str, name: str, below: str, ink: str) -> None:
        ax.add_patch(Rectangle((x, y), width, height, facecolor=colour, edgecolor="white", lw=1.5))
        ax.text(x + width / 2, y + height / 2, name, ha="center", va="center", fontsize=14, color=ink)
        ax.text(x + width / 2, y - 0.12, below, ha="center", va="top", fontsize=9, color=TEXT)

    block(0.0, 0.0, 3.0, 3.0, GREY, "W", "m × n\nfrozen", "black")
    ax.text(3.5, 1.5, "+", ha="center", va="center", fontsize=20, color=TEXT)
    block(4.0, 0.0, 0.7, 3.0, BLUE, "U", "m × r\nfrozen", "white")
    block(4.85, 2.3, 0.7, 0.7, ORANGE, "R", "r × r\ntrained", "black")
    block(5.7, 2.3, 3.0, 0.7, BLUE, "Vᵀ", "r × n\nfrozen", "white")
    ax.text(4.35, 3.35, "W' = W + U R Vᵀ,   R = 0 at the start", ha="center", fontsize=12, color=TEXT)
    ax.set(xlim=(-0.2, 9.0), ylim=(-0.9, 3.7), aspect="equal")
    ax.axis("off")


if __name__ == "__main__":
    main()
