"""What a split holds, in figures: rows, images and lengths; as metrics for a run and as a table for a person."""

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any


@dataclass(frozen=True)
class Lengths:
    """A quantity over all rows, in tokens."""

    total: int
    mean: float
    p95: int
    """Nineteen rows in twenty have no more."""
    max: int


@dataclass(frozen=True)
class SplitStatistics:
    """The good rows of a split."""

    rows: int
    dropped: int
    images: int
    """Different ones, by content."""
    tokens: Lengths
    """Of whole rows as trained on, image tokens included."""
    image_tokens: Lengths
    answer_tokens: Lengths

    def as_dict(self) -> dict[str, Any]:
        return asdict(self)

    def metrics(self, split: str) -> dict[str, float]:
        """Flat figures with names that MLflow takes, below `dataset.<split>.`."""
        flat: dict[str, float] = {}
        for key, value in self.as_dict().items():
            flat |= {f"{key}_{name}": figure for name, figure in value.items()} if isinstance(value, dict) else {key: value}
        return {f"dataset.{split}.{key}": float(value) for key, value in flat.items()}


def lengths(values: Sequence[int]) -> Lengths:
    """All zero for no values."""
    if not values:
        return Lengths(0, 0.0, 0, 0)
    ordered = sorted(values)
    return Lengths(sum(ordered), round(sum(ordered) / len(ordered), 2), ordered[-(-len(ordered) * 95 // 100) - 1], ordered[-1])


def table(statistics: Mapping[str, SplitStatistics]) -> str:
    """One line per split, lengths as mean / p95 / longest in tokens."""
    head = ("split", "rows", "left out", "images", "tokens: mean / p95 / max", "image tokens", "answer tokens", "tokens in all")
    lines: list[tuple[str, ...]] = [head]
    for name, split in statistics.items():
        shown = [f"{each.mean:.1f} / {each.p95} / {each.max}" for each in (split.tokens, split.image_tokens, split.answer_tokens)]
        lines.append((name, f"{split.rows}", f"{split.dropped}", f"{split.images}", *shown, f"{split.tokens.total}"))
    widths = [max(len(line[column]) for line in lines) for column in range(len(head))]
    return "\n".join("  ".join(cell.ljust(width) for cell, width in zip(line, widths, strict=True)).rstrip() for line in lines)
