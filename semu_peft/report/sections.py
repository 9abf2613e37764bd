"""A report's contents, put into words: what each section says, and what it says where something was not given."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from .document import Items, Picture, Section, Table, Text
from .headline import headline
from .wording import measured, model_name, shown

Contents = Mapping[str, Any]
Part = Text | Items | Table | Picture
_KINDS = {"classification": "a classifier", "language": "a language model", "diffusion": "a text-to-image model"}
_IN_SHARES = ("PromptAttacks", "TextRelearning")  # attacks on texts say of one what others say in percent
_MOST_LAYERS = 60
_LONGEST_TEXT = 1000
_TEXTS = (
    "The same prompts, before and after. These texts stand here because they were given to be shown: whoever may not "
    "read what was forgotten may not have this report either."
)


def sections(contents: Contents, pictures: Sequence[Picture] = ()) -> list[Section]:
    """All sections, from what was asked to the environment.

    Args:
        contents: What [`audit`][semu_peft.report.audit.audit] gathered.
        pictures: The pictures, which contents read from a file no longer have.
    """
    written: dict[str, tuple[str, list[Part]]] = {
        "request": ("What was asked", _request(contents)),
        "fingerprints": ("Fingerprints", _fingerprints(contents)),
        "method": ("Method and settings", _method(contents)),
        "tradeoff": ("Forgetting against damage", _tradeoff(contents)),
        "metrics": ("What was measured", _metrics(contents["metrics"])),
        "attacks": ("Attacks", _attacks(contents["attacks"], contents.get("task"))),
        "untested": ("What was not tested", _untested(contents)),
        "layers": ("Where the correction lies", _layers(contents)),
        "samples": ("Samples before and after", _samples(contents)),
        "limits": ("Limits", [Items(tuple(contents["limits"]))]),
        "environment": ("Environment", [_environment(contents["environment"])]),
    }
    return [
        Section(name, title, (*parts, *(picture for picture in pictures if picture.section == name)))
        for name, (title, parts) in written.items()
    ]


def _request(contents: Contents) -> list[Part]:
    request = contents["request"]
    text = Text(request["text"]) if request["text"] else Text("The request was not given in words.", missing=True)
    parts: list[Part] = [text, *headline(contents), Items(tuple(_summary(contents)))]
    rows = [(role, _count(data)) for role, data in request["data"].items()]
    parts.append(
        Table("Data", ("data", "how many"), tuple(rows)) if rows else Text("No data were given.", missing=True)
    )
    return parts


def _count(data: Contents) -> str:
    kind = "examples" if "examples" in data else "files"
    return f"{data[kind]:,d} {kind.removesuffix('s') if data[kind] == 1 else kind}"


def _summary(contents: Contents) -> list[str]:
    share, attacks, missing = contents["share"], contents["attacks"], contents["not_tested"]
    told = []
    if share:
        percent = shown(share["percent"])
        told.append(f"{share['trained']:,d} numbers were trained, {percent}% of the model's {share['total']:,d}.")
    models = len(contents["metrics"]["rows"])
    told.append(
        f"{models} {'model was' if models == 1 else 'models were'} measured and {len(attacks)} "
        f"{'attack' if len(attacks) == 1 else 'attacks'} tried."
    )
    kinds = "kind of evidence is" if len(missing) == 1 else "kinds of evidence are"
    told.append(f"{len(missing)} {kinds} missing: see “What was not tested”.")
    return told


def _fingerprints(contents: Contents) -> list[Part]:
    model, file = contents["model"], contents["adapter_file"]
    adapter = model.get("adapter") if model else None
    rows = []
    if model and model["sha256"]:
        rows.append(("weights of the model, without the adapter", model["sha256"]))
    if adapter:
        rows.append(("adapter in memory", adapter["sha256"]))
    if file:
        rows.append((f"{file['file']}, {file['bytes']:,d} bytes", file["sha256"]))
    rows += [(f"data: {role}, {_count(data)}", data["sha256"]) for role, data in contents["request"]["data"].items()]
    if not rows:
        return [Text("Neither a model nor data were given.", missing=True)]
    note = "Digests stand for the model and the data, of which this report holds nothing else"
    note += "." if not contents["samples"] else ", but what the samples show of them."
    return [Text(note), Table("SHA-256", ("what", "digest"), tuple(rows))]


def _method(contents: Contents) -> list[Part]:
    model, training = contents["model"], contents["training"]
    parts: list[Part] = []
    if model:
        told = {"class": model["class"], "name": model["name"], "parameters": model["parameters"]}
        parts.append(_pairs("Model", {key: value for key, value in told.items() if value != ""}))
    if model and model["adapter"]:
        adapter = model["adapter"]
        state = "merged into the weights" if adapter["merged"] else "beside the weights; it can be switched off"
        parts.append(_pairs("SEMU adapter", {"state": state, **adapter["settings"]}))
    if contents["settings"]:
        parts.append(_pairs("Settings", contents["settings"]))
    if training:
        heads = ("why it ended", "steps", "examples seen", "trained numbers", "seconds")
        keys = ("stop_reason", "steps", "examples_seen", "trainable_parameters", "seconds")
        rows = tuple((run["run"] or "training", *(shown(run[key]) for key in keys)) for run in training)
        parts.append(Table("Training", ("run", *heads), rows))
    missing = [
        name
        for name, there in (("model", model), ("result of the training", training), ("settings", contents["settings"]))
        if not there
    ]
    if missing:
        parts.append(Text(f"Not given: {', '.join(missing)}.", missing=True))
    return parts


def _tradeoff(contents: Contents) -> list[Part]:
    if not contents["training"]:
        return [Text("No result of a training was given.", missing=True)]
    histories = [run["history"] for run in contents["training"]]
    if not any("damage" in entry for history in histories for entry in history):
        text = (
            "The runs recorded no damage, as they do with “max_retain_kl”, or where an objective asks the original "
            "about what is to be kept: their losses are all that is known of the way."
        )
        return [Text(text, missing=True)]
    return [Text("What the run went through; the dot is where the model was left.")]


def _metrics(metrics: Contents) -> list[Part]:
    if not metrics["rows"]:
        return [Text("No metrics were given.", missing=True)]
    parts: list[Part] = []
    kinds = dict.fromkeys(row["kind"] for row in metrics["rows"])
    for kind in kinds:
        rows = [row for row in metrics["rows"] if row["kind"] == kind]
        names = dict.fromkeys(name for row in rows for name in row["values"])
        heads = [model_name(row["name"], metrics["reference"]) for row in rows]
        cells = tuple((name, *(measured(row["values"].get(name)) for row in rows)) for name in names)
        caption = "Metrics" if kind == "mapping" or len(kinds) == 1 else kind
        parts.append(Table(caption, ("metric", *heads), cells))
    sources = {each["source"] for row in metrics["rows"] for each in row["values"].values() if each["source"]}
    if sources:
        told = [f"over {source}" for source in sorted(sources - {"given"})] + ["as they were given"] * (
            "given" in sources
        )
        parts.append(Text(f"In brackets, 95% intervals: {', '.join(told)}."))
    else:
        once = all(row["runs"] == 1 for row in metrics["rows"])
        why = ": one run each, and none over the examples" if once else ""
        parts.append(Text(f"There are no intervals{why}.", missing=True))
    if metrics["reference"] is None:
        parts.append(Text("No retrained model stands beside these numbers.", missing=True))
    return parts


def _attacks(attacks: Sequence[Contents], task: str | None) -> list[Part]:
    if not attacks:
        return [Text("No attacks were given.", missing=True)]
    rows = tuple((each["attack"], each["found"], each["reference"] or "–") for each in attacks)
    unit = (
        "What is known is in percent: of a classifier its accuracy, of a language model the mean token probability, of "
        "a denoiser the original's loss as a share of its own, so that 100 is as much as the original knew."
    )
    parts: list[Part] = [Table("What attacks found", ("attack", "this model", "reference"), rows)]
    if task == "language":
        unit += (
            " The mean token probability is the arithmetic mean over the answers' tokens; the metric “probability” "
            "takes the geometric mean of each answer's, which one unlikely token makes small."
        )
    return parts + [Text(unit)] * any(each["kind"] not in _IN_SHARES for each in attacks)


def _untested(contents: Contents) -> list[Part]:
    rows, others = contents["not_tested"], contents.get("does_not_apply", [])
    parts: list[Part] = [Table("Not tested", ("what", "why"), tuple((row["test"], row["reason"]) for row in rows))]
    if not rows:
        parts = [Text("All kinds of evidence that this report knows are there.")]
    if others:
        kind = _KINDS.get(contents["task"], "such a model")
        parts.append(Text(f"Made for others than {kind}, and not missing: {', '.join(row['test'] for row in others)}."))
    return parts


def _layers(contents: Contents) -> list[Part]:
    layers, spectra = contents["model"].get("layers", []), contents["spectra"]
    parts: list[Part] = []
    if layers:
        # What is not finite is a text, and comes first.
        largest = sorted(layers, key=lambda layer: (layer["norm"] != "nan", -float(layer["norm"])))[:_MOST_LAYERS]
        rows = tuple(
            (
                layer["layer"], " × ".join(map(str, layer["shape"])), shown(layer["rank"]),
                shown(spectra.get(layer["layer"], {}).get("explained_variance")), shown(layer["norm"]),
                shown(layer["relative_norm"]),
            )
            for layer in largest
        )  # fmt: skip
        caption = "Corrections, the largest first"
        if len(layers) > len(largest):
            caption += f"; the JSON file has all {len(layers)} layers"
        heads = ("layer", "matrix", "rank", "share of the gradient's energy", "‖ΔW‖", "‖ΔW‖ / ‖W‖")
        parts.append(Table(caption, heads, rows))
    else:
        parts.append(Text("No model with a SEMU adapter was given: nothing is known of its layers.", missing=True))
    if not spectra:
        parts.append(Text("No profile was given: the spectra of the forget gradients are not shown.", missing=True))
    return parts


def _samples(contents: Contents) -> list[Part]:
    rows = contents["samples"]
    if not rows:
        return [Text("No samples were given.", missing=True)]
    if texts := contents.get("texts"):  # a report of the first versions has none
        return [Text(_TEXTS), _texts(texts)]
    return [Text(f"The same conditions and seeds, before and after: {', '.join(rows)}.")]


def _texts(texts: Sequence[Contents]) -> Table:
    """A line for each text, so that a phone shows the two sides of one below each other."""
    lines = [
        (f"{row['prompt']} (to be forgotten)" if row["forgotten"] else row["prompt"], *map(_excerpt, pair))
        for row in texts
        for pair in zip(row["before"], row["after"], strict=True)
    ]
    return Table("What the model wrote", ("prompt", "before", "after"), tuple(lines), even=True)


def _excerpt(text: str) -> str:
    """A text as far as a table has room; that a model says nothing is shown too."""
    rest = len(text) - _LONGEST_TEXT
    beginning = f"{text[:_LONGEST_TEXT]} … (and {rest:,d} characters; the JSON file has them)"
    return "(nothing)" if not text.strip() else beginning if rest > 0 else text


def _environment(versions: Contents) -> Table:
    return Table("Versions and device", ("what", "version"), tuple(versions.items()))


def _pairs(caption: str, values: Contents) -> Table:
    return Table(
        caption, ("what", "value"), tuple((key.replace("_", " "), shown(value)) for key, value in values.items())
    )
