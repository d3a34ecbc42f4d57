"""The alias moves only if every replica follows; else it is back where it was. Registry and replica are stood in for at their boundary."""

import fcntl
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path

import pytest

from pipeline.errors import ServingError
from pipeline.promotion import Promotion, promote
from pipeline.registry import Version
from pipeline.serving.client import Served

OLD, NEW = (Version("shop", number, digest * 32, "base", "template", "run") for number, digest in (("1", "aa"), ("2", "bb")))


@dataclass
class FakeRegistry:
    """The alias and its moves; tests/test_registry.py holds the same methods against MLflow's real store."""

    now: Version | None = None
    moves: list[str | None] = field(default_factory=list)
    recorded: list[tuple[str, str | None]] = field(default_factory=list)

    def champion_number(self, name: str) -> str | None:
        return self.now.version if self.now else None

    def move_champion(self, name: str, version: str | None) -> None:
        self.now = next((known for known in (OLD, NEW) if known.version == version), None)
        self.moves.append(version)

    def record_previous(self, version: Version, previous: str | None) -> None:
        self.recorded.append((version.version, previous))


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


def move(registry: FakeRegistry, version: Version, replicas: list[FakeReplica], lock: Path, wait_seconds: float = 5.0) -> Promotion:
    return promote(registry, version, replicas, lock, wait_seconds)  # type: ignore[arg-type]


def test_promotion_waits_for_every_replica_and_records_what_was_before(tmp_path: Path) -> None:
    registry = FakeRegistry(OLD)
    done = move(registry, NEW, [FakeReplica(registry), FakeReplica(registry, lag=2)], tmp_path / "lock")
    assert (done.version, done.previous, registry.now) == (NEW, "1", NEW)
    again = move(registry, NEW, [FakeReplica(registry)], tmp_path / "lock")
    assert again.previous == "2"
    assert registry.recorded == [("2", "1")]


@pytest.mark.parametrize("before", [OLD, None])
def test_the_alias_goes_back_if_a_replica_refuses(before: Version | None, tmp_path: Path) -> None:
    registry = FakeRegistry(before)
    replicas = [FakeReplica(registry), FakeReplica(registry, refuses=NEW.digest, url="http://second")]
    with pytest.raises(ServingError, match=r"http://second does not serve shop/2: digest mismatch\. The alias is back"):
        move(registry, NEW, replicas, tmp_path / "lock", wait_seconds=0.3)
    assert registry.now == before
    assert registry.recorded == []


def test_a_move_that_someone_else_made_meanwhile_is_not_undone(tmp_path: Path) -> None:
    registry = FakeRegistry(None)

    class MovedByHand(FakeReplica):
        def sync(self) -> dict[str, Served]:
            registry.now = OLD
            return super().sync()

    with pytest.raises(ServingError):
        move(registry, NEW, [MovedByHand(registry)], tmp_path / "lock", wait_seconds=0.1)
    assert registry.now == OLD


def test_a_replica_that_is_away_for_a_moment_does_not_undo_a_promotion(tmp_path: Path) -> None:
    registry = FakeRegistry(OLD)

    class Slow(FakeReplica):
        def sync(self) -> dict[str, Served]:
            if self.lag > 0:
                self.lag -= 1
                raise ServingError("cannot be reached (timed out)")
            return super().sync()

    assert move(registry, NEW, [Slow(registry, lag=2)], tmp_path / "lock").version == NEW


def test_promotions_of_one_model_wait_for_one_another(tmp_path: Path) -> None:
    registry = FakeRegistry(OLD)
    with (tmp_path / "lock").open("wb") as held, ThreadPoolExecutor() as pool:
        fcntl.flock(held, fcntl.LOCK_EX)
        waiting = pool.submit(move, registry, NEW, [FakeReplica(registry)], tmp_path / "lock")
        with pytest.raises(TimeoutError):
            waiting.result(timeout=0.3)
        assert registry.moves == []
        fcntl.flock(held, fcntl.LOCK_UN)
        assert waiting.result(timeout=5).version == NEW


def test_a_replica_that_does_not_follow_the_model_stops_it_before_the_alias_moves(tmp_path: Path) -> None:
    registry = FakeRegistry(OLD)
    with pytest.raises(ServingError, match="does not follow shop"):
        move(registry, NEW, [FakeReplica(registry, follows="other")], tmp_path / "lock")
    assert registry.moves == []
