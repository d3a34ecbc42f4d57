"""Under traffic: the local folder of a version that is in its slot, of one that was evicted from it, and of the previous champion is deleted, cut short or closed.
No request fails, the server lives, status says so, and the folder is whole again by itself."""

import contextlib
import shutil
import threading
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from pipeline.adapter import adapter_digest
from pipeline.errors import AdapterInvalid
from pipeline.registry import Version
from tests.acceptance.figures import show
from tests.acceptance.load import Plan, loading
from tests.acceptance.serving_environment import BASE, Server, World, engine_name, wait_until

WEIGHTS = "adapter_model.safetensors"
REPAIRED_SECONDS = 15.0
RECIPE: dict[str, Any] = {"follow": ["catalog", "shop"], "lora": {"max_loras": 1, "max_cpu_loras": 8}, "poll_seconds": 0.5, "forget_after_seconds": 5}


def delete(folder: Path) -> None:
    folder.chmod(0o700)
    shutil.rmtree(folder)


def truncate(folder: Path) -> None:
    weights = folder / WEIGHTS
    weights.chmod(0o644)
    with weights.open("r+b") as file:
        file.truncate(weights.stat().st_size // 2)
    weights.chmod(0o444)


def close(folder: Path) -> None:
    folder.chmod(0)


DAMAGES: dict[str, Callable[[Path], None]] = {"delete": delete, "truncate": truncate, "chmod 0": close}


@dataclass
class Watch:
    """What status says of the faults of one version, as often as it can be asked; a mended one stays in `mended`."""

    server: Server
    version: Version
    faults: set[str] = field(default_factory=set)
    failures: list[BaseException] = field(default_factory=list)

    def fault(self) -> str | None:
        """Of the version's folder, now."""
        return self.entry()["fault"]

    def entry(self) -> dict[str, Any]:
        entries: list[dict[str, Any]] = self.server.model(self.version.name)["versions"]
        return next(each for each in entries if (each["version"], each["digest"]) == (self.version.version, self.version.digest))

    @contextlib.contextmanager
    def watching(self) -> Iterator["Watch"]:
        done = threading.Event()

        def look() -> None:
            try:
                while not done.wait(0.005):
                    self.faults |= {fault} if (fault := self.fault()) else set()
            except BaseException as error:
                self.failures.append(error)

        thread = threading.Thread(target=look)
        thread.start()
        try:
            yield self
        finally:
            done.set()
            thread.join(timeout=60)


def is_whole(folder: Path, digest: str) -> bool:
    """The right content, and read-only; root may read a closed folder, so the mode is looked at."""
    try:
        return folder.stat().st_mode & 0o777 == 0o555 and (folder / WEIGHTS).stat().st_mode & 0o777 == 0o444 and adapter_digest(folder) == digest
    except (OSError, AdapterInvalid):
        return False


def damage_and_wait(server: Server, version: Version, name: str, damage: Callable[[Path], None]) -> dict[str, Any]:
    """Damages the folder of a version that answers to `name`; what was seen until it was whole again."""
    folder = server.folder(version.digest)
    assert is_whole(folder, version.digest)
    before = Watch(server, version).entry()["mended"]
    with Watch(server, version).watching() as watch:
        damage(folder)
        began = time.monotonic()
        answered = [server.answering(name) for _ in range(5)]
        wait_until(lambda: is_whole(folder, version.digest) and watch.fault() is None, REPAIRED_SECONDS, lambda: f"{folder} whole again: {watch.fault()}")
        seconds = time.monotonic() - began
    assert watch.failures == []
    assert server.alive()
    said = watch.faults | {mended for mended in (watch.entry()["mended"],) if mended and mended != before}
    return {"seconds": seconds, "said": sorted(said), "answered": answered == [engine_name(version)] * 5}


def test_damaged_folders_hurt_no_request_and_are_repaired(world: World, second: Version, tmp_path: Path) -> None:
    shop = world.variant("shop", 0.7, tmp_path / "shop")
    found: dict[str, dict[str, Any]] = {}
    with world.serving("damaged", **RECIPE) as server:
        for version in (shop, second, world.trained):
            server.promote(version)
        victims = {"loaded": (world.trained, "catalog"), "evicted": (shop, "shop"), "previous": (second, second.label)}
        with loading(Plan(server.url, models=("catalog", BASE), clients=3, pause_seconds=0.05), tmp_path) as load:
            for kind, (version, name) in victims.items():
                for way, damage in DAMAGES.items():
                    server.answering(name)  # it is in the engine, whoever has the one slot
                    time.sleep(1.0)  # the traffic's own adapter has the slot again
                    found[f"{kind}, {way}"] = damage_and_wait(server, version, name, damage)
                    time.sleep(5.0)  # after which the replica tries anew at once
            answers = load.stop()
        assert server.alive()
    failed = [answer for answer in answers if not answer.ok]
    show(requests=len(answers), failed=len(failed), damaged=found)
    assert failed == []
    assert {case: bool(seen["said"]) for case, seen in found.items()} == dict.fromkeys(found, True)
    assert all(seen["answered"] for seen in found.values())
    assert len(found) == len(victims) * len(DAMAGES)
