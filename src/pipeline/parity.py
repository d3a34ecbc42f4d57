"""Whether the served stack reads and answers a prompt as training did: a reference that training leaves with a version, and its comparison with a replica.

A replica makes of the reference's prompts what training made of them (POST /adapters/parity). Tokens and image grids must be equal and pixels equal to the bit; log-probabilities may differ by TOLERANCES.
"""

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import TYPE_CHECKING, Any, Literal

from pipeline.reference import REFERENCE_FILE, Expected, Logprobs, Reference, Replayed, gap

if TYPE_CHECKING:
    from pipeline.registry import Version
    from pipeline.serving.client import Replica

SHOWN_MISMATCHES = 3
CONTEXT_TOKENS = 8
"""Shown on each side of the first token that differs."""
Kind = Literal["tokens", "pixels", "grid", "base", "adapter", "refused", "incomparable"]
Verdict = Literal["faithful", "prompt-differs", "base-differs", "adapter-differs", "not-compared", "no-reference"]
"""prompt-differs: other tokens or pixels reach the model. base-differs: the stack computes otherwise, whatever the adapter. adapter-differs: the base is as in
training, so the adapter is not applied, not wholly, or at another scale."""


@dataclass(frozen=True)
class Tolerance:
    """How far log-probabilities may differ: each token's by `max`, and all tokens' by `mean` on average."""

    max: float
    mean: float
    source: str


_FLOAT32 = Tolerance(1e-3, 1e-3, "measured, vLLM against PEFT, tiny GLM-4.5V on a CPU, 642 tokens: at most 1.7e-5")
_BFLOAT16 = Tolerance(0.5, 0.05, "measured likewise, bfloat16 on either side or both: at most 0.23, on average at most 0.018")
TOLERANCES: Mapping[tuple[str, str], Tolerance] = {
    ("float32", "float32"): _FLOAT32,
    ("float32", "bfloat16"): _BFLOAT16,
    ("bfloat16", "float32"): _BFLOAT16,
    ("bfloat16", "bfloat16"): _BFLOAT16,
}
"""By the reference's precision and the replica's. In bfloat16 answers that a model finds unlikely (log-probability -10 and less) move most. What must be seen is
further away: on the same model a lost k_proj of one layer of four 0.87 (mean 0.13), an adapter at 1.1 times its scale 0.57 (0.067)."""


@dataclass(frozen=True)
class Mismatch:
    """One way in which serving is not as training was; `prompt` is its kind, '' for all together."""

    kind: Kind
    prompt: str
    message: str


@dataclass(frozen=True)
class Apart:
    """Differences of log-probabilities over all tokens that were compared; infinite where one is no number."""

    max: float
    mean: float
    tokens: int


@dataclass(frozen=True)
class Parity:
    """The verdict, and what it rests on. `base` and `adapter` are None where nothing could be compared."""

    verdict: Verdict
    mismatches: tuple[Mismatch, ...] = ()
    base: Apart | None = None
    adapter: Apart | None = None
    tolerance: Tolerance | None = None
    effect: float | None = None
    """`Reference.effect`."""
    compared: tuple[str, ...] = ()
    skipped: tuple[str, ...] = ()
    """Composed prompts that the server does not take, each with the reason."""

    @property
    def faithful(self) -> bool:
        return self.verdict == "faithful"

    @property
    def reason(self) -> str:
        """The verdict for a person."""
        said = [mismatch.message for mismatch in self.mismatches[:SHOWN_MISMATCHES]]
        said += [f"and {more} more"] if (more := len(self.mismatches) - len(said)) else []
        return "; ".join(said) or f"served as trained: {', '.join(self.compared)}"

    def as_dict(self) -> dict[str, Any]:
        """For JSON: no infinity and no NaN in it."""
        found: dict[str, Any] = asdict(self)
        for side in ("base", "adapter"):
            if found[side]:
                found[side] |= {key: value if math.isfinite(value) else None for key, value in found[side].items()}
        if self.effect is not None and not math.isfinite(self.effect):
            found["effect"] = None
        return found


NO_REFERENCE = Parity(
    "no-reference", (Mismatch("incomparable", "", f"the version has no {REFERENCE_FILE}: its training could not make one, or is older; train it again"),)
)


def replay(replica: "Replica", version: "Version", reference: Reference) -> Parity:
    """Asks `replica` every prompt of `reference` for that version, and for the base, and compares. Takes seconds.

    The version must be callable there. Raises ReplicaError if the replica cannot be asked.
    """
    stands_for = (reference.adapter_digest, reference.base_revision, reference.template_digest)
    if stands_for != (version.digest, version.base_revision, version.template_digest):
        message = f"the {REFERENCE_FILE} of {version.label} was made of another adapter, base or template; train it again"
        return Parity("not-compared", (Mismatch("incomparable", "", message),), effect=reference.effect)
    answers = [replica.parity(version.label, prompt.openai_messages(reference.images), prompt.answer_tokens) for prompt in reference.prompts]
    if other := next((answer for answer in answers if not answer.refused and answer.digest != version.digest), None):
        message = f"{replica.url} answers {version.label} with {other.digest or 'the base'}, not with {version.digest}; look at `tuneserve status`"
        return Parity("not-compared", (Mismatch("incomparable", "", message),), effect=reference.effect)
    return compare(reference, answers)


def compare(reference: Reference, replayed: Sequence[Replayed], tolerance: Tolerance | None = None) -> Parity:
    """Judges what a replica made of the reference's prompts, in their order; pure. `tolerance` takes the place of TOLERANCES' own."""
    mismatches: list[Mismatch] = []
    skipped: list[str] = []
    alike: list[tuple[Expected, Replayed]] = []
    for prompt, answer in zip(reference.prompts, replayed, strict=True):
        if answer.refused and prompt.composed:
            skipped.append(f"{prompt.kind}: {answer.refused}")
        elif answer.refused:
            mismatches.append(Mismatch("refused", prompt.kind, f"{prompt.kind}: the server does not take this held-out row: {answer.refused}"))
        elif found := [*_image_mismatches(prompt, answer), *_token_mismatches(prompt, answer, reference.texts)]:
            mismatches += found
        else:
            alike.append((prompt, answer))
    precisions = sorted({answer.quantization or answer.precision for _, answer in alike})
    pair = (reference.precision, precisions[0]) if len(precisions) == 1 else None
    tolerance = tolerance or (TOLERANCES.get(pair) if pair else None)
    base = adapter = None
    if not alike:
        mismatches += [] if mismatches else [Mismatch("incomparable", "", "the server takes none of the prompts; look at its limits (max_images)")]
    elif tolerance is None:
        known = ", ".join(sorted({served for _, served in TOLERANCES}))
        mismatches.append(Mismatch("incomparable", "", f"no tolerance is known for a replica in {' and '.join(precisions)}; serve in {known}"))
    else:
        base, base_found = _judge("base", [(prompt.kind, prompt.base, answer.base) for prompt, answer in alike], tolerance, alike)
        adapter, adapter_found = _judge("adapter", [(prompt.kind, prompt.adapter, answer.adapter) for prompt, answer in alike], tolerance, alike)
        mismatches += base_found
        mismatches += [] if base_found else [_explained(found, alike, tolerance) for found in adapter_found]
    verdict = _verdict({mismatch.kind for mismatch in mismatches})
    compared = tuple(prompt.kind for prompt, _ in alike)
    return Parity(verdict, tuple(mismatches), base, adapter, tolerance, reference.effect, compared, tuple(skipped))


def _verdict(kinds: set[Kind]) -> Verdict:
    """The first cause in the order in which a prompt passes through the stack."""
    if kinds & {"tokens", "pixels", "grid"}:
        return "prompt-differs"
    if "base" in kinds:
        return "base-differs"
    if "adapter" in kinds:
        return "adapter-differs"
    return "not-compared" if kinds else "faithful"


def _image_mismatches(prompt: Expected, answer: Replayed) -> Iterable[Mismatch]:
    if not len(answer.grids) == len(answer.pixels) == len(prompt.images):
        yield Mismatch("grid", prompt.kind, f"{prompt.kind}: {len(answer.grids)} images reach the served model, {len(prompt.images)} were trained on")
        return
    for index, (trained, served) in enumerate(zip(prompt.grids, answer.grids, strict=True)):
        where = f"{prompt.kind}: image {index + 1} of {len(prompt.images)} ({prompt.images[index][:12]})"
        wanted = prompt.pixels[index].get(answer.pixels_in)
        if trained != served:
            sizes = ["x".join(map(str, grid)) for grid in (served, trained)]
            yield Mismatch("grid", prompt.kind, f"{where} is cut into {sizes[0]} patches by the server, {sizes[1]} in training; it is resized otherwise")
        elif wanted is None:
            yield Mismatch("incomparable", prompt.kind, f"{where}: no pixels in {answer.pixels_in or 'an unknown form'} to compare with; report this")
        elif wanted != answer.pixels[index]:
            remedy = "they are decoded, resized or normalized otherwise"
            yield Mismatch("pixels", prompt.kind, f"{where}: the served model sees other pixels than training; {remedy}")


def _token_mismatches(prompt: Expected, answer: Replayed, texts: Mapping[int, str]) -> Iterable[Mismatch]:
    trained, served = prompt.prompt_tokens, answer.prompt_tokens
    if trained == served:
        return
    first = next((at for at, pair in enumerate(zip(trained, served, strict=False)) if pair[0] != pair[1]), min(len(trained), len(served)))
    shown = [_around(tokens, first, {**answer.texts, **texts}) for tokens in (trained, served)]
    message = f"{prompt.kind}: token {first} of the prompt differs: training has {shown[0]}, the server {shown[1]}; serve with the template of training"
    yield Mismatch("tokens", prompt.kind, message)


def _around(tokens: Sequence[int], at: int, texts: Mapping[int, str]) -> str:
    """The token at `at` with its neighbours, as text."""

    def text(part: Sequence[int]) -> str:
        return repr("".join(texts.get(token, f"<{token}>") for token in part))

    before = text(tokens[max(0, at - CONTEXT_TOKENS) : at])
    if at >= len(tokens):
        return f"its end after {before}"
    return f"{text(tokens[at : at + 1])} (id {tokens[at]}) after {before} and before {text(tokens[at + 1 : at + 1 + CONTEXT_TOKENS])}"


def _gaps(trained: Logprobs, served: Logprobs) -> list[float]:
    return [math.inf] * max(1, len(trained)) if len(trained) != len(served) else [gap(*pair) for pair in zip(trained, served, strict=True)]


def _judge(
    kind: Literal["base", "adapter"], sides: Sequence[tuple[str, Logprobs, Logprobs]], tolerance: Tolerance, alike: Sequence[tuple[Expected, Replayed]]
) -> tuple[Apart, list[Mismatch]]:
    """How far base or adapter are apart over all prompts, and each prompt in which a token is too far; the mean is over all prompts, since answers are short."""
    found: list[Mismatch] = []
    every: list[float] = []
    for (name, trained, served), (prompt, answer) in zip(sides, alike, strict=True):
        gaps = _gaps(trained, served)
        every += gaps
        worst = max(range(len(gaps)), key=gaps.__getitem__)
        if gaps[worst] <= tolerance.max:
            continue
        first = next(at for at, gap in enumerate(gaps) if gap > tolerance.max)
        token = prompt.answer_tokens[worst]
        shown = f"{answer.texts.get(token, f'<{token}>')!r}, token {worst} of the answer"
        values = f"{_shown(trained, worst)} in training, {_shown(served, worst)} served"
        message = f"{name}: the {kind}'s log-probability of {shown}, is {values}: {gaps[worst]:.3g} apart, {tolerance.max:g} allowed"
        found.append(Mismatch(kind, name, message + (f"; token {first} is the first that is too far" if first != worst else "")))
    apart = Apart(max(every), sum(every) / len(every), len(every))
    if not found and not apart.mean <= tolerance.mean:
        message = f"the {kind}'s log-probabilities are {apart.mean:.3g} apart on average over {apart.tokens} tokens, {tolerance.mean:g} allowed"
        found.append(Mismatch(kind, "", message))
    return apart, found


def _shown(values: Logprobs, at: int) -> str:
    value = values[at] if at < len(values) else None
    return "not a number" if value is None else f"{value:.4f}"


def _explained(mismatch: Mismatch, alike: Sequence[tuple[Expected, Replayed]], tolerance: Tolerance) -> Mismatch:
    """Says whether the adapter is lost wholly: then it answers as the base does."""
    lost = all(gap <= tolerance.max for _, answer in alike for gap in _gaps(answer.base, answer.adapter))
    what = "it answers as the base does: it is not applied" if lost else "the base is as in training: the adapter is applied in part or at another scale"
    return Mismatch(mismatch.kind, mismatch.prompt, f"{mismatch.message}; {what}")
