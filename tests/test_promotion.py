"""The alias moves only if every replica follows; else it is back where it was. Registry and replica are stood in for at their boundary."""

from dataclasses import dataclass, field

import pytest

from pipeline.errors import ServingError
from pipeline.promotion import promote
from pipeline.registry import Version
from pipeline.serving.client import Served

OLD, NEW = (Version("shop", number, digest * 32, "base", "template", "run") for number, digest in (("1", "aa"), ("2", "bb")))


@dataclass
class FakeRegistry:
    now: Version | None = None
    moves: list[str | None] = field(default_factory=list)

    def champion(self, name: str) -> Version | None:
        return self.now

    def set_champion(self, version: Version, previous: Version | None) -> None:
        self.now = version
        self.moves.append(version.version)

    def unset_champion(self, name: str) -> None:
        self.now = None
        self.moves.append(None)


@dataclass
class FakeReplica:
    """Serves what the registry says after `lag` looks, never a refused digest."""

    registry: FakeRegistry
    lag: int = 0
    refuses: str = ""
    url: str = "http://replica"
    follows: str = "shop"

    def status(self) -> dict[str, Served]:
        return {self.follows: Served(None, None, None)}

    def sync(self) -> dict[str, Served]:
        self.lag -= 1
        wanted = self.registry.now
        assert wanted
        key = (wanted.version, wanted.digest)
        if wanted.digest == self.refuses:
            return {"shop": Served(key, None, "digest mismatch")}
        return {"shop": Served(key, key if self.lag < 0 else None, None)}


def test_promotion_waits_for_every_replica() -> None:
    registry = FakeRegistry(OLD)
    done = promote(registry, NEW, [FakeReplica(registry), FakeReplica(registry, lag=2)])  # type: ignore[arg-type, list-item]
    assert (done.version, done.previous, registry.now) == (NEW, OLD, NEW)


@pytest.mark.parametrize("before", [OLD, None])
def test_the_alias_goes_back_if_a_replica_refuses(before: Version | None) -> None:
    registry = FakeRegistry(before)
    replicas = [FakeReplica(registry), FakeReplica(registry, refuses=NEW.digest, url="http://second")]
    with pytest.raises(ServingError, match=r"http://second does not serve shop/2: digest mismatch\. The alias is back"):
        promote(registry, NEW, replicas, wait_seconds=0.3)  # type: ignore[arg-type]
    assert registry.now == before


def test_a_replica_that_does_not_follow_the_model_stops_it_before_the_alias_moves() -> None:
    registry = FakeRegistry(OLD)
    with pytest.raises(ServingError, match="does not follow shop"):
        promote(registry, NEW, [FakeReplica(registry, follows="other")])  # type: ignore[arg-type, list-item]
    assert registry.moves == []
