"""The numbers that judge forgetting in a classifier, and the table that sets methods beside the retrained model."""

from __future__ import annotations

import dataclasses
import json
import math
import os
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from semu_peft.arguments import check_kind
from semu_peft.files import written_whole

from .membership import WIDEST_INTERVAL

# The four metrics of SalUn and SEMU that the average gap runs over, and the names tables give them.
GAP_METRICS = {
    "unlearning_accuracy": "UA",
    "retain_accuracy": "RA",
    "test_accuracy": "TA",
    "membership_inference": "MIA",
}
_FORMAT = "semu_peft.ForgettingComparison"
_INTERVALS = (
    "membership_interval", "unlearning_accuracy_interval", "retain_accuracy_interval", "test_accuracy_interval",
    "forgotten_test_accuracy_interval",
)  # fmt: skip


@dataclass(frozen=True)
class ForgettingMetrics:
    """How well one model forgot, what it kept, and what that cost. Accuracies and shares are in percent.

    Attributes:
        unlearning_accuracy: UA = 100 - accuracy on the forget set.
        retain_accuracy: RA, accuracy on the retained training examples.
        test_accuracy: TA, accuracy on test examples (for class forgetting, of the remaining classes).
        membership_inference: MIA, share of forget examples that a confidence attack calls non-members.
        trainable_parameters: Number of parameters that were trained. SEMU's bases are frozen.
        total_parameters: Number of all parameters.
        forgotten_test_accuracy: Accuracy on the forgotten class's test examples, for class forgetting.
        seconds: Time that the unlearning took.
        adapter_bytes: Size of the saved adapter.
        membership_interval: Between which values 95% of refits of the membership attack lie.
        membership_threshold: The same share by an attack that does not saturate, a threshold.
        unlearning_accuracy_interval: Wilson's 95% interval of as many examples, as of the next three; it has a width at
            0 and 100 as well. They do not count when metrics are compared.
        retain_accuracy_interval: Of the retain accuracy.
        test_accuracy_interval: Of the test accuracy.
        forgotten_test_accuracy_interval: Of that on the forgotten class's test examples.

    Raises:
        ValueError: A percentage is outside [0, 100] or NaN, or a count or time is negative.

    Examples:
        >>> from semu_peft.evaluation import ForgettingMetrics
        >>> unlearned = ForgettingMetrics(100.0, 98.0, 94.0, 97.0, trainable_parameters=20, total_parameters=1000)
        >>> retrained = ForgettingMetrics(100.0, 99.0, 95.0, 100.0, trainable_parameters=1000, total_parameters=1000)
        >>> unlearned.trainable_share
        2.0
        >>> unlearned.average_gap(retrained)
        1.25
    """

    unlearning_accuracy: float
    retain_accuracy: float
    test_accuracy: float
    membership_inference: float
    trainable_parameters: int
    total_parameters: int
    forgotten_test_accuracy: float | None = None
    seconds: float | None = None
    adapter_bytes: int | None = None
    membership_interval: tuple[float, float] | None = None
    membership_threshold: float | None = None
    unlearning_accuracy_interval: tuple[float, float] | None = field(default=None, compare=False)
    retain_accuracy_interval: tuple[float, float] | None = field(default=None, compare=False)
    test_accuracy_interval: tuple[float, float] | None = field(default=None, compare=False)
    forgotten_test_accuracy_interval: tuple[float, float] | None = field(default=None, compare=False)

    def __post_init__(self) -> None:
        for name in _INTERVALS:
            if (bounds := getattr(self, name)) is not None:
                low, high = bounds  # a list where it comes out of a file
                object.__setattr__(self, name, (low, high))
                if not 0 <= low <= high <= 100:
                    raise ValueError(f"`{name}` must be two percentages in order, got {low} and {high}.")
        for name in (*GAP_METRICS, "forgotten_test_accuracy", "membership_threshold"):
            value = getattr(self, name)
            if value is not None and not 0 <= value <= 100:
                raise ValueError(f"`{name}` must be a percentage from 0 to 100, got {value}.")
        for name in ("trainable_parameters", "total_parameters", "seconds", "adapter_bytes"):
            value = getattr(self, name)
            if value is not None and not (value >= 0 and math.isfinite(value)):
                raise ValueError(f"`{name}` must be a finite number, 0 or more, got {value}.")

    @property
    def trainable_share(self) -> float:
        """Trained parameters in percent of all (0 for a model without parameters)."""
        return 100 * self.trainable_parameters / self.total_parameters if self.total_parameters else 0.0

    @property
    def cannot_tell(self) -> tuple[str, ...]:
        """The metrics that come out by chance: the membership attack, where its interval is wide."""
        low, high = self.membership_interval or (0.0, 0.0)
        return ("membership_inference",) if high - low > WIDEST_INTERVAL else ()

    def gaps(self, reference: ForgettingMetrics) -> dict[str, float]:
        """Signed differences to the retrained model, `self - reference`, in percentage points, by metric name."""
        return {name: getattr(self, name) - getattr(reference, name) for name in GAP_METRICS}

    def average_gap(self, reference: ForgettingMetrics) -> float:
        """Mean absolute difference to the retrained model over UA, RA, TA and MIA, in percentage points.

        `(|ΔUA| + |ΔRA| + |ΔTA| + |ΔMIA|) / 4` (SalUn, Fan et al., ICLR 2024, arXiv 2310.12508). An average hides which
        of the four moved, so read it with [`gaps`][ForgettingMetrics.gaps], and beside the gap of doing nothing. Where
        a metric of either row [`cannot_tell`][ForgettingMetrics.cannot_tell], the mean holds its chance as well, and a
        comparison marks it with a question mark.
        """
        gaps = self.gaps(reference)
        return sum(abs(gap) for gap in gaps.values()) / len(gaps)


@dataclass(frozen=True, repr=False)
class ForgettingComparison:
    """Several models' metrics beside those of the model retrained from scratch without the forget set.

    The retrained model is the only measure of success: forgetting more than it does is as wrong as forgetting less.
    Put the model before unlearning in as a row too, for a method has to beat doing nothing.

    `str()` gives a plain-text table. Columns that no row has a value for are left out.

    Attributes:
        rows: Metrics by name, in the order of the table.
        reference: The name of the retrained model's row.

    Raises:
        TypeError: A row holds something else than one model's metrics.
        ValueError: `reference` is not among `rows`.

    Examples:
        >>> from semu_peft.evaluation import ForgettingComparison, ForgettingMetrics
        >>> rows = {
        ...     "SEMU": ForgettingMetrics(100.0, 98.0, 94.0, 97.0, 20, 1000),
        ...     "retrained": ForgettingMetrics(100.0, 99.0, 95.0, 100.0, 1000, 1000),
        ... }
        >>> comparison = ForgettingComparison(rows, reference="retrained")
        >>> comparison
        ForgettingComparison(SEMU, retrained (reference))
        >>> print(comparison)
        model                      UA     RA     TA     MIA  average gap  trained  trained %
        ---------------------  ------  -----  -----  ------  -----------  -------  ---------
        SEMU                   100.00  98.00  94.00   97.00         1.25       20          2
        retrained (reference)  100.00  99.00  95.00  100.00         0.00    1,000        100
        Percent. Average gap: mean |difference| to 'retrained' over UA, RA, TA and MIA.
    """

    rows: dict[str, ForgettingMetrics]
    reference: str

    def __post_init__(self) -> None:
        mend = "Write `{'SEMU': evaluate_forgetting(...), ...}`; lists of several seeds are for `report.audit`."
        check_kind("rows", self.rows, Mapping, "metrics by name", mend)
        for name, row in self.rows.items():
            check_kind(f"rows[{name!r}]", row, ForgettingMetrics, "what `evaluate_forgetting` returned", mend)
        self._reference_row()

    def __repr__(self) -> str:
        return f"ForgettingComparison({', '.join(map(self._title, self.rows))})"

    def __str__(self) -> str:
        header, *body = self._table()
        widths = [max(map(len, column)) for column in zip(header, *body, strict=True)]
        rule = ["-" * width for width in widths]
        lines = []
        for first, *numbers in (header, rule, *body):
            aligned = [cell.rjust(width) for cell, width in zip(numbers, widths[1:], strict=True)]
            lines.append("  ".join([first.ljust(widths[0]), *aligned]))
        return "\n".join([*lines, self._caption()])

    def to_markdown(self) -> str:
        """Return the table in GitHub's Markdown, numbers aligned to the right."""
        header, *body = [[markdown_cell(cell) for cell in line] for line in self._table()]
        rule = ["---", *["---:"] * (len(header) - 1)]
        table = "\n".join("| " + " | ".join(line) + " |" for line in (header, rule, *body))
        return f"{table}\n\n{self._caption()}"

    def save(self, path: str | os.PathLike[str]) -> Path:
        """Write the comparison as JSON, whole or not at all (through a temporary file and a rename).

        Args:
            path: The file to write; missing folders are created.

        Returns:
            The path written.
        """
        content = {
            "format": _FORMAT,
            "reference": self.reference,
            "rows": {name: dataclasses.asdict(metrics) for name, metrics in self.rows.items()},
        }
        with written_whole(path) as temporary:
            temporary.write_text(json.dumps(content, indent=2, allow_nan=False) + "\n", encoding="utf-8")
        return Path(path)

    @classmethod
    def load(cls, path: str | os.PathLike[str]) -> ForgettingComparison:
        """Read what [`save`][ForgettingComparison.save] wrote.

        Args:
            path: The JSON file.

        Returns:
            The comparison, equal to the one saved.

        Raises:
            FileNotFoundError: There is no such file.
            ValueError: The file is not a saved comparison.
        """
        try:
            content: Any = json.loads(Path(path).read_text(encoding="utf-8"))
            if content["format"] != _FORMAT:
                raise ValueError(f"its format is {content['format']!r}")
            rows = {name: ForgettingMetrics(**metrics) for name, metrics in content["rows"].items()}
            return cls(rows=rows, reference=content["reference"])
        except (ValueError, TypeError, KeyError, AttributeError) as error:
            raise ValueError(
                f"`path` must be a file that `ForgettingComparison.save` wrote, got {os.fspath(path)}: {error!r}. It "
                f"should be JSON with the format {_FORMAT!r}, a reference and rows of metrics."
            ) from error

    def _reference_row(self) -> ForgettingMetrics:
        if self.reference not in self.rows:
            raise ValueError(
                f"`reference` must be one of the rows {list(self.rows)}, got {self.reference!r}. Add the metrics of "
                "the model retrained without the forget set under that name."
            )
        return self.rows[self.reference]

    def _caption(self) -> str:
        caption = f"Percent. Average gap: mean |difference| to '{self.reference}' over UA, RA, TA and MIA."
        doubtful = [name for name, row in self.rows.items() if row.cannot_tell]
        if not doubtful:
            return caption
        return (
            f"{caption} (?) The membership attack on {', '.join(doubtful)} cannot tell members from others: its value, "
            "and a quarter of the average gap, are chance within the interval shown."
        )

    def _average_gap(self, row: ForgettingMetrics) -> str:
        reference = self._reference_row()
        return f"{row.average_gap(reference):.2f}{' (?)' if row.cannot_tell or reference.cannot_tell else ''}"

    def _table(self) -> list[list[str]]:
        """Return the header and one line per row, as text, without the columns that no row has a value for."""
        columns: list[tuple[str, Callable[[ForgettingMetrics], Any], str]] = [
            *((short, lambda row, name=name: getattr(row, name), ".2f") for name, short in GAP_METRICS.items()),
            ("MIA 95%", lambda row: _interval(row.membership_interval), ""),
            ("threshold MIA", lambda row: row.membership_threshold, ".2f"),
            ("forgotten TA", lambda row: row.forgotten_test_accuracy, ".2f"),
            ("average gap", self._average_gap, ""),
            ("trained", lambda row: row.trainable_parameters, ",d"),
            ("trained %", lambda row: row.trainable_share, ".3g"),
            ("bytes", lambda row: row.adapter_bytes, ",d"),
            ("seconds", lambda row: row.seconds, ".1f"),
        ]
        shown = [column for column in columns if any(column[1](row) is not None for row in self.rows.values())]
        table = [["model", *(title for title, _, _ in shown)]]
        for name, row in self.rows.items():
            cells = ["-" if (value := read(row)) is None else format(value, form) for _, read, form in shown]
            table.append([self._title(name), *cells])
        return table

    def _title(self, name: str) -> str:
        return f"{name} (reference)" if name == self.reference else name


def _interval(bounds: tuple[float, float] | None) -> str | None:
    return None if bounds is None else f"{bounds[0]:.1f}–{bounds[1]:.1f}"


def markdown_cell(text: str) -> str:
    """A text that stays in its cell of a Markdown table, on its line.

    Examples:
        >>> from semu_peft.evaluation.comparison import markdown_cell
        >>> markdown_cell("a | b")
        'a \\\\| b'
    """
    return " ".join(text.split()).replace("|", "\\|")
