"""The rows of one file while they are checked: which are good, which are not and why, and how many may be left out."""

from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field
from pathlib import Path

from pipeline.errors import Fault, InvalidInput
from pipeline.example import THOUGHT, Example, Found, read_example
from pipeline.project import Project
from pipeline.rows import read_rows

MAX_FAULTS = 50
"""Shown per file; a file with more is wrong as a whole."""
MAX_WARNINGS = 10
"""Of one sort, shown per file."""


@dataclass
class Split:
    """Changed only by the stages of a check, one after the other."""

    path: Path
    label: str
    """The file as people see it."""
    examples: list[Example] = field(default_factory=list)
    """The rows that are good so far."""
    bad: dict[int, list[Found]] = field(default_factory=dict)
    """Row number to what is wrong with the row."""
    trained: dict[int, list[Found]] = field(default_factory=dict)
    """Held-out rows that are trained on, as `bad`, but never left out."""
    faults: list[Fault] = field(default_factory=list)
    """What is wrong with the file as a whole; once settled, all its faults."""
    warnings: list[Fault] = field(default_factory=list)
    dropped: int = 0

    def refuse(self, found: dict[int, list[Found]]) -> None:
        """These rows are bad."""
        self.bad |= found
        self.examples = [example for example in self.examples if example.row not in found]

    def shown(self, image: Path) -> str:
        """An image's path as the rows have it, where that can be told."""
        folder = self.path if self.path.is_dir() else self.path.parent
        return str(image.relative_to(folder)) if image.is_relative_to(folder) else str(image)

    def fault(self, path: str, message: str) -> Fault:
        return Fault(self.label, path, message)

    def warn(self, warnings: Iterable[tuple[str, str]]) -> None:
        """Adds warnings of one sort, the first few of them."""
        found = [self.fault(path, message) for path, message in warnings]
        more = [self.fault("", f"and {len(found) - MAX_WARNINGS} more warnings like the last")] if len(found) > MAX_WARNINGS else []
        self.warnings += [*found[:MAX_WARNINGS], *more]

    def refuse_mixed(self) -> None:
        """Rows to train on all have a rejected answer, or none has: ms-swift raises on one without where others have one."""
        if 0 < (preferences := sum(bool(example.rejected) for example in self.examples)) < len(self.examples):
            self.faults.append(self.fault("", f"{preferences} of {len(self.examples)} rows have a rejected_response; give all rows of a file one, or none"))

    def settle(self, max_bad_rows: int) -> None:
        """Bad rows become warnings if so many may be left out, else faults."""
        if len(self.bad) <= max_bad_rows:
            self.dropped = len(self.bad)
            self.warn((path, f"left out: {message}") for path, message in _by_row(self.bad))
            if not self.examples and not self.faults:
                self.faults.append(self.fault("", "holds no rows that are good" if self.bad else "holds no rows"))
            self.bad = {}
        elif max_bad_rows:
            self.faults.append(self.fault("", f"has {len(self.bad)} bad rows, more than dataset.max_bad_rows {max_bad_rows}"))
        self.faults += [self.fault(path, message) for path, message in _by_row(self.bad | self.trained)]

    def shown_faults(self) -> list[Fault]:
        more = [self.fault("", f"and {len(self.faults) - MAX_FAULTS} more faults")] if len(self.faults) > MAX_FAULTS else []
        return [*self.faults[:MAX_FAULTS], *more]


def _by_row(found: dict[int, list[Found]]) -> Iterator[tuple[str, str]]:
    return ((f"row {row}{where}", message) for row, reasons in sorted(found.items()) for where, message in reasons)


def read_split(path: Path, project: Project) -> Split:
    """The rows of a file or folder, checked without opening an image."""
    split = Split(path, project.relative(path))
    try:
        for row in read_rows(path, project):
            example, found = (None, [("", row.fault)]) if row.fault else read_example(row.content, row.folder, row.number)
            if example:
                split.examples.append(example)
            else:
                split.bad[row.number] = found
    except InvalidInput as error:
        split.faults += error.faults
    thoughts = [example.row for example in split.examples if (thought := THOUGHT.match(example.answer)) and thought[0] != "<think></think>"]
    if thoughts:
        split.warn([("", f"{len(thoughts)} answers begin with a thought (first: row {thoughts[0]}); models are served without thinking, after an empty one")])
    return split
