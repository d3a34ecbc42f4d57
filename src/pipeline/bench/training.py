"""`tuneserve bench train`: short trainings of a recipe, as `tuneserve train` runs them and as ms-swift alone does with the same arguments, in turns."""

import contextlib
import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Sequence
from dataclasses import asdict
from importlib import metadata
from pathlib import Path

from pipeline import process
from pipeline.basemodel import BaseModel
from pipeline.bench.record import Record
from pipeline.bench.steps import Training, logged_steps, step_seconds
from pipeline.dataset import Dataset, write_swift_rows
from pipeline.progress import Report
from pipeline.project import Project
from pipeline.recipe import FinetuneRecipe
from pipeline.training import ARGS_FILE, LOGGING_STEPS, child_environment, dump_args, swift_args, swift_command, swift_environment, train_adapter

TRAIN, BARE = ARMS = ("train", "bare")
"""`tuneserve train`'s training without MLflow, and `swift sft` or `swift rlhf` started by hand with the same arguments and environment."""
UNTIMED_STEPS = 2
"""The first of a training, in which kernels are chosen and memory is taken."""
LOG = Path("swift", "logging.jsonl")
"""In a training's folder."""
POLL_SECONDS = 1.0


def shortened(recipe: FinetuneRecipe, steps: int) -> FinetuneRecipe:
    """The recipe with UNTIMED_STEPS and then `steps` steps, each of them logged, without validation; pure."""
    total = UNTIMED_STEPS + steps
    update = {"max_steps": total, "epochs": None, "early_stopping": None, "checkpoint_steps": logged_one_by_one(total)}
    return recipe.model_copy(update={"training": recipe.training.model_copy(update=update)})


def logged_one_by_one(steps: int) -> int:
    """The least number of steps between checkpoints, `steps` or more, with which training.py has every step logged: it has no divisor in common with LOGGING_STEPS."""
    return steps if steps % LOGGING_STEPS else steps + 1


def step_tokens(recipe: FinetuneRecipe, rows: Dataset) -> float | None:
    """Of an optimizer step, in the mean; None for preferences, whose rows are several texts. Packed rows are taken as full."""
    train = dict(rows.statistics).get("train")
    if recipe.method == "dpo" or train is None:
        return None
    return recipe.training.global_batch_size * (recipe.training.max_length_tokens if recipe.training.packing else train.tokens.mean)


def turns(arms: Sequence[str], rounds: int) -> list[tuple[int, str]]:
    """To and fro: A B, B A, ..."""
    return [(number, arm) for number in range(rounds) for arm in (arms if number % 2 == 0 else arms[::-1])]


def measure(recipe: FinetuneRecipe, base: BaseModel, rows: Dataset, project: Project, arms: Sequence[str], rounds: int, record: Record, report: Report) -> None:
    """Trains the shortened `recipe` in each arm and round; each training is a line of the `record` as soon as it is over, and its files are removed.

    Raises ProcessFailed with the log of a training that failed: what was measured until then is on record.
    """
    plan = turns(arms, rounds)
    for done, (number, arm) in enumerate(plan):

        def told(text: str, share: float, done: int = done, number: int = number, arm: str = arm) -> None:
            report(f"round {number + 1} of {rounds}, {arm}: {text}", (done + share) / len(plan))

        folder = project.runs / f"bench-{record.folder.name}-{number}-{arm}"
        began = time.monotonic()
        try:
            if arm == TRAIN:
                train_adapter(recipe, base.folder, rows, folder, project, lambda *_: None, told)
            else:
                _train_bare(recipe, base, rows, folder, project, told)
            seconds, steps = time.monotonic() - began, logged_steps(folder / LOG)
        finally:
            shutil.rmtree(folder, ignore_errors=True)
        memory = max((float(step.get("memory(GiB)", 0.0)) for step in steps), default=0.0) or None
        record.add(asdict(Training(arm, number, tuple(step_seconds(steps)[UNTIMED_STEPS:]), memory, round(seconds, 1))))


def _train_bare(recipe: FinetuneRecipe, base: BaseModel, rows: Dataset, folder: Path, project: Project, report: Report) -> None:
    """Without a supervisor: it is ended here, and outlives this process only if that is killed outright."""
    folder.mkdir(parents=True)
    write_swift_rows(rows.train, folder / "train.parquet")
    (folder / ARGS_FILE).write_text(dump_args(swift_args(recipe, base.folder, folder / "train.parquet", folder / LOG.parent)), "utf-8")
    log = project.logs / f"training-{folder.name}.log"
    command = [sys.executable, "-m", "swift.cli.main", swift_command(recipe), str(folder / ARGS_FILE)]
    environment = child_environment(project, swift_environment(recipe, log.with_suffix(".ranks")))
    with log.open("wb") as output:
        child = subprocess.Popen(
            command, stdin=subprocess.DEVNULL, stdout=output, stderr=subprocess.STDOUT, env=environment, cwd=folder, start_new_session=True
        )
        try:
            while child.poll() is None:
                time.sleep(POLL_SECONDS)
                done, all_steps = len(logged_steps(folder / LOG)), recipe.training.max_steps or 1
                report(f"step {done}/{all_steps}" if done else "loading the model", done / all_steps)
        finally:
            with contextlib.suppress(ProcessLookupError):
                os.killpg(child.pid, signal.SIGKILL)
            child.wait()
    if child.returncode:
        raise process.failure(f"ms-swift alone failed (exit code {child.returncode})", log)


def settings_of(path: str, recipe: FinetuneRecipe, rows: Dataset, arms: Sequence[str], steps: int, rounds: int, planned_gib: float | None) -> dict[str, object]:
    """As the record's header has them; `planned_gib`: what `tuneserve plan` says that each GPU holds."""
    packages = ["ms-swift", "transformers", "peft", "torch", *(["deepspeed"] if recipe.training.deepspeed else [])]
    return {
        "recipe": path,
        "arms": list(arms),
        "against": BARE if BARE in arms else arms[0],
        "steps": steps,
        "untimed_steps": UNTIMED_STEPS,
        "rounds": rounds,
        "rows": recipe.training.global_batch_size,
        "step_tokens": step_tokens(recipe, rows),
        "planned_gib": planned_gib,
        "versions": {package: metadata.version(package) for package in packages},
    }
