"""What the registry says of one followed model: its aliases, the canary's share and what is switched off. Pure; registry_reader.py reads it."""

import math
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from pipeline.switch import Disabled, read_disabled
from pipeline.version import BASE_REVISION_TAG, CANARY_TAG, CANDIDATE, CHAMPION, DIGEST_TAG, DISABLED_TAG, TEMPLATE_DIGEST_TAG, disabled_tag


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
    )


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
