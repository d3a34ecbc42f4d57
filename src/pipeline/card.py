"""A version's model card: what it was trained from and how, what it scores and where it is weak. Written from lineage and from an assessment, by no hand."""

from collections.abc import Mapping

from pipeline.assessment import Assessment, figures, part_mean
from pipeline.registry import Version

NOT_STATED = "not stated"
LINEAGE = (
    ("base model", ("base_model",)),
    ("data, SHA-256", ("dataset_digest",)),
    ("training rows, held-out rows", ("dataset_train_rows", "dataset_eval_rows")),
    ("method", ("method", "quantization")),
    ("rank, alpha", ("lora.rank", "lora.alpha")),
    ("modules", ("lora.target_modules",)),
    ("learning rate", ("training.learning_rate",)),
    ("epochs, or steps", ("training.epochs", "training.max_steps")),
    ("precision", ("training.precision",)),
    ("seconds of training", ("train_seconds",)),
    ("hardware", ("hardware.cpu", "hardware.memory_gib", "hardware.gpu")),
    ("git commit", ("git_commit",)),
)
"""What the card says of the training, each with the parameters and tags of its run that say it."""


def card(version: Version, known: Mapping[str, str], found: Assessment) -> str:
    """The card as Markdown. `known`: parameters (the recipe, flat) and tags (its lineage) of the run that made it; `found`: its last assessment."""

    def said(keys: tuple[str, ...]) -> str:
        return ", ".join(known[key] for key in keys if known.get(key) not in (None, "", "None")) or NOT_STATED

    metric = found.rules.metric
    own = figures(found.own)
    lines = [f"# {version.label}", "", f"A LoRA adapter, served unmerged. Digest `{version.digest}`, base revision `{version.base_revision}`.", ""]
    lines += ["## Training", *(f"- {title}: {said(keys)}" for title, keys in LINEAGE), ""]
    lines += [f"## Scores on {len(found.own.answers)} held-out rows", *(f"- {each}: {own[each]:.1%}" for each in found.told)]
    lines += [f"- graded by {found.judge}"] if found.judge else []
    lines += [f"- against {found.champion if side == 'champion' else side}: {comparisons[0]}" for side, comparisons in found.against.items()]
    lines += [f"- {part}: {part_mean(found.own, part, metric):.1%} of {len(found.own.indices(part))} rows" for part in found.own.parts]
    lines += [f"- seconds an answer: p50 {own['p50_seconds']}, p95 {own['p95_seconds']}", f"- decision: {found.decision.text}", ""]
    lines += ["## Limits", *(f"- {limit}" for limit in limits(found)), "", "## Licence", said(("licence",)), ""]
    return "\n".join(lines)


def limits(found: Assessment) -> list[str]:
    """What the figures themselves say against it."""
    metric = found.rules.metric
    means = {part: part_mean(found.own, part, metric) for part in found.own.parts}
    weakest = min(means, key=means.__getitem__)
    said = [f"weakest on {weakest}: {means[weakest]:.1%}", "measured on rows like those that it was trained for; nothing is known of others"]
    said += [f"{rate:.1%} of its answers {what}" for rate, what in ((found.own.refusal_rate, "refuse"), (found.own.empty_rate, "are empty")) if rate]
    overall = [(side, comparisons[0]) for side, comparisons in found.against.items() if not comparisons[0].low > 0]
    return said + [f"not surely better than {found.champion if side == 'champion' else side}" for side, _ in overall]
