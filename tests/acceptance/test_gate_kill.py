"""`tuneserve promote` killed after each of its steps, by force and through the gate: run again, alias, replica and history always agree."""

import itertools
import random
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

from pipeline import promotion
from pipeline.fleet import Fleet
from pipeline.history import history
from pipeline.lock import model_lock
from pipeline.registry import Version
from pipeline.version import CHAMPION
from tests.acceptance.figures import show
from tests.acceptance.load import ROOT
from tests.acceptance.serving_environment import BASE, Server, World

ROWS = 24
MOST_STEPS = 60


def few_rows(world: World) -> str:
    """The catalog's recipe with ROWS held-out rows, all alike, for versions that need no parity.json."""
    root = world.sandbox.root
    rows = (root / "data/catalog/eval.jsonl").read_text("utf-8").splitlines()
    (root / "data/catalog/eval-few.jsonl").write_text("\n".join(random.Random(1).sample(rows, ROWS)) + "\n", "utf-8")
    text = (root / "recipes/finetune/catalog-tiny.yaml").read_text("utf-8").replace("eval.jsonl", "eval-few.jsonl")
    changed = text.replace("protect: [json, unseen-pair]", "protect: []\n  require_parity: false")
    (root / "recipes/finetune/few.yaml").write_text(changed, "utf-8")
    return "recipes/finetune/few.yaml"


def killed(world: World, step: int, out: Path, *command: str) -> int:
    """The exit code of a command that is killed after that step."""
    environment = world.sandbox.environment | {"MLFLOW_TRACKING_URI": world.mlflow, "PYTHONPATH": str(ROOT)}
    argv = [sys.executable, "-m", "tests.acceptance.dying", str(step), str(out), *command]
    return subprocess.run(argv, cwd=world.sandbox.root, env=environment, capture_output=True, timeout=300, check=False).returncode


def agree(world: World, server: Server, wanted: Version) -> None:
    """Alias, replica and history say the same, and nothing is left over."""
    told = history(world.registry, wanted.name)
    assert world.registry.client.get_registered_model(wanted.name).aliases.keys() == {CHAMPION}
    assert world.registry.champion_number(wanted.name) == wanted.version == told[0].after
    assert server.is_live(wanted) and server.answering(wanted.name).startswith(f"{wanted.label}@")
    assert not any(entry.open for entry in told)
    assert all(newer.before == older.after for newer, older in itertools.pairwise(told))


def kill_at_each_step(world: World, server: Server, reset: Callable[[], None], wanted: Version, folder: Path, *command: str) -> list[str]:
    """The steps of the command, which was killed after each of them and then run again."""
    for step in range(MOST_STEPS):
        reset()
        out = folder / f"steps-{step}"
        code = killed(world, step, out, *command)
        if code == 0:
            return out.read_text("utf-8").splitlines()
        assert code == -9, code
        world.json(*command, seconds=300)
        agree(world, server, wanted)
        assert server.alive()
    raise AssertionError(f"more than {MOST_STEPS} steps")


def test_a_promotion_killed_at_any_step_is_seen_through(world: World, second: Version, tmp_path: Path) -> None:
    few, better = few_rows(world), world.trained
    with world.serving("kill", follow=["catalog"]) as server, Fleet([server.url], world.token) as fleet:
        lock = model_lock(world.project, "promote", "catalog")

        def reset() -> None:
            promotion.promote(world.registry, second, fleet, lock)

        def reset_with_canary() -> None:
            reset()
            promotion.start_canary(world.registry, better, 10.0, fleet, lock)

        steps: dict[str, list[str]] = {}
        for name, before, options in (("forced", reset_with_canary, ("--force",)), ("gated", reset, ("--recipe", few))):
            folder = tmp_path / name
            folder.mkdir()
            steps[name] = kill_at_each_step(world, server, before, better, folder, "promote", better.label, *options, "--replica", server.url, "--json")
        assert server.answering(BASE) == BASE
    kinds: dict[str, Any] = {name: [line.rsplit("/", 1)[-1] for line in lines] for name, lines in steps.items()}
    show(killed_after={name: len(lines) for name, lines in steps.items()}, steps=kinds)
    assert len(steps["forced"]) >= 6 and len(steps["gated"]) >= 12
