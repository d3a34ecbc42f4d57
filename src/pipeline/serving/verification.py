"""Proof that a loaded adapter does what it should and nothing else, by what the engine says of one fixed prompt. The comparison is pure."""

import math
from collections.abc import Mapping
from dataclasses import dataclass

from pipeline.errors import VersionRefused
from pipeline.serving.engine import Fingerprint
from pipeline.serving.engine import Mapping as ModuleMapping

LEAST_DIFFERENCE = 1e-5
"""An adapter that moves no log-probability of the prompt by more than this does nothing: twice the replica's own noise counts where that is more."""
TOLERANCE = {"float32": 1e-3, "other": 0.15}
"""How far an answer may move that should not: other requests in the same step change sums' order. Measured between two stacks on a tiny model: float32 1e-5,
bfloat16 0.07; a version that leaks into others' answers moves them by whole units."""


@dataclass(frozen=True)
class Verification:
    """What was seen; log-probabilities in natural logarithms, each the largest over the prompt's tokens."""

    differs_by: float
    """From the base."""
    noise: float
    """Between two looks at the base."""
    others_moved_by: float
    """The base and every other loaded adapter, against how each was when it was verified."""
    modules: int
    """Of the model, that the adapter changes."""
    seconds: float = 0.0


def apart(one: Fingerprint, other: Fingerprint) -> float:
    """The largest difference; infinite if the two are not of the same prompt or hold a NaN."""
    if len(one) != len(other):
        return math.inf
    if any(math.isnan(value) for value in (*one, *other)):
        return math.inf
    return max((abs(a - b) for a, b in zip(one, other, strict=True) if a != b), default=0.0 if one else math.inf)


def verify(
    new: Fingerprint,
    base: tuple[Fingerprint, Fingerprint],
    others: Mapping[str, tuple[Fingerprint, Fingerprint]],
    mapping: ModuleMapping,
    float32: bool,
) -> Verification:
    """Judges a loaded adapter. `base` and each of `others` (by name): as it was before, and as it is now.

    Raises VersionRefused: keys-match-nothing, keys-unmatched, not-finite, no-effect or disturbs-others.
    """
    if mapping.modules == 0:
        raise VersionRefused("keys-match-nothing", "none of its weights belongs to a module that this server adapts; train it on this base's own class")
    if mapping.unmapped:
        shown = ", ".join(mapping.unmapped[:3])
        raise VersionRefused("keys-unmatched", f"{len(mapping.unmapped)} of its modules are none of this server's ({shown}); train without them")
    if any(map(math.isnan, new)):
        raise VersionRefused("not-finite", "its answers are not numbers (NaN); train it again")
    noise = apart(*base)
    tolerance = TOLERANCE["float32" if float32 else "other"]
    moved = {name: apart(*pair) for name, pair in {"the base": base, **others}.items()}
    if worst := max((name for name in moved if moved[name] > tolerance), key=lambda name: moved[name], default=None):
        raise VersionRefused("disturbs-others", f"with it loaded, {worst} answers otherwise (log-probability off by {moved[worst]:.2g}); report this")
    differs = apart(new, base[1])
    if differs <= max(2 * noise, LEAST_DIFFERENCE):
        raise VersionRefused("no-effect", f"answers as the base does (log-probabilities within {differs:.2g}); it was not trained, or its weights are zero")
    return Verification(differs, noise, max(moved.values()), mapping.modules)
