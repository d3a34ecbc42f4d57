"""What the registry says of one followed model: its aliases, the canary's share and what is switched off. Pure; registry_reader.py reads it."""

import math
import re
from collections.abc import Container, Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any

from pipeline.servable import Reason
from pipeline.switch import Disabled, read_disabled
from pipeline.version import BASE_REVISION_TAG, CANARY_TAG, CANDIDATE, CHAMPION, DIGEST_TAG, DISABLED_TAG, TEMPLATE_DIGEST_TAG, disabled_tag

DIGEST = re.compile(r"[0-9a-f]{64}")


@dataclass(frozen=True)
class RegisteredVersion:
    """A version as MLflow holds it. The three after `source`, where its artifacts lie, come from tags and are None when the tag is missing."""

    name: str
    version: str
    source: str
    digest: str | None
    base_revision: str | None
    template_digest: str | None
    canary_percent: str | None = None
    run_id: str | None = field(default=None, compare=False)

    @property
    def label(self) -> str:
        return f"{self.name}/{self.version}"

    @property
    def key(self) -> tuple[str, str]:
        """Number and digest: the number alone may mean other weights tomorrow."""
        return self.version, self.digest or ""


@dataclass(frozen=True)
class Wanted:
    """The registry's word on one model. `exists` is False when MLflow has no such model."""

    exists: bool
    champion: RegisteredVersion | None = None
    candidate: RegisteredVersion | None = None
    percent: float = 0.0
    """Of the requests for the served name, how many go to the candidate."""
    pinned: tuple[RegisteredVersion, ...] = ()
    """Versions that some other alias points to: callable as name/version."""
    off: Mapping[str, Disabled] = field(default_factory=dict)
    """What is switched off, by the tag that says so."""
    complaint: str | None = None
    """What in the registry cannot be understood, and what is done instead."""

    def model_off(self) -> Disabled | None:
        return self.off.get(DISABLED_TAG)

    def version_off(self, version: str, digest: str) -> Disabled | None:
        return self.off.get(disabled_tag(version, digest))


def registered_version(found: Mapping[str, Any]) -> RegisteredVersion:
    """From MLflow's `model_version` object. Raises KeyError or TypeError if it is none."""
    tags = {tag["key"]: tag.get("value", "") for tag in found.get("tags", ())}
    return RegisteredVersion(
        name=found["name"],
        version=str(found["version"]),
        source=found.get("source", ""),
        digest=tags.get(DIGEST_TAG),
        base_revision=tags.get(BASE_REVISION_TAG),
        template_digest=tags.get(TEMPLATE_DIGEST_TAG),
        canary_percent=tags.get(CANARY_TAG),
        run_id=found.get("run_id") or None,
    )


def entry_faults(version: RegisteredVersion, base_revision: str | None, template_digest: str, taken_names: Container[str]) -> Iterator[Reason]:
    """Why a version's entry alone forbids serving it on a base of that revision (None: not known) with that chat template; the first is the most fundamental.

    `taken_names` are what the server calls its base models and other adapters.
    """
    if not version.version.isdecimal() or version.label in taken_names:
        yield Reason("bad-name", "not a version number, or the name of a served base model", "register the adapter under another name")
    tags = {DIGEST_TAG: version.digest, BASE_REVISION_TAG: version.base_revision, TEMPLATE_DIGEST_TAG: version.template_digest}
    if missing := [tag for tag, value in tags.items() if value is None]:
        yield Reason("no-tags", f"has no tag {', '.join(missing)}", "register it with tuneserve")
    elif not DIGEST.fullmatch(str(version.digest)):
        yield Reason("no-tags", f"tag {DIGEST_TAG} is not a SHA-256 in hex (got {str(version.digest)[:80]!r})", "register it with tuneserve")
    if base_revision and version.base_revision not in (None, base_revision):
        trained = f"trained on base {str(version.base_revision)[:16]}, this server has {base_revision[:16]}"
        yield Reason("wrong-base", trained, "train it on the served base")
    if version.template_digest not in (None, template_digest):
        trained = f"trained with chat template {str(version.template_digest)[:16]}, this server has {template_digest[:16]}"
        yield Reason("wrong-template", trained, "train it with the served one")


def aliases(model: Mapping[str, Any]) -> dict[str, str]:
    """Alias -> version number, from MLflow's `registered_model` object."""
    return {alias["alias"]: str(alias["version"]) for alias in model.get("aliases", ())}


def wanted(model: Mapping[str, Any], champion: RegisteredVersion | None, versions: Mapping[str, RegisteredVersion]) -> Wanted:
    """From MLflow's `registered_model` object, the champion, and the versions, by number, that its other aliases point to; one that is gone has no alias."""
    pointed = aliases(model)
    candidate = versions.get(pointed.get(CANDIDATE, ""))
    percent, complaint = canary_percent(candidate)
    taken = {version.key for version in (champion, candidate) if version}
    pinned = {number: versions[number] for alias, number in sorted(pointed.items()) if alias not in (CHAMPION, CANDIDATE) and number in versions}
    off = {tag["key"]: read_disabled(tag.get("value", "")) for tag in model.get("tags", ()) if tag["key"].startswith(DISABLED_TAG)}
    return Wanted(True, champion, candidate, percent, tuple(version for version in pinned.values() if version.key not in taken), off, complaint)


def canary_percent(candidate: RegisteredVersion | None) -> tuple[float, str | None]:
    """The candidate's share in percent, 0 without the tag, and what is wrong with the tag."""
    if candidate is None or candidate.canary_percent is None:
        return 0.0, None
    try:
        percent = float(candidate.canary_percent)
    except ValueError:
        percent = math.nan
    if 0 <= percent <= 100:
        return percent, None
    return 0.0, f"{candidate.label}: tag {CANARY_TAG} is no percentage (got {candidate.canary_percent[:20]!r}), so it gets 0 %; set it: tuneserve canary"
