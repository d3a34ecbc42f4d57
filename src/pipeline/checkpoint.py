"""A training's checkpoints: what ms-swift writes so that training can go on from there. One that a crash left half written is told from a complete one."""

import json
import shutil
import zipfile
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from pipeline.adapter import read_adapter
from pipeline.errors import AdapterInvalid

LITTLE_BYTES = 1 << 20
"""A disk with less is full."""
STATE_FILE = "trainer_state.json"
"""What transformers' Trainer writes last (rank 0)."""


@dataclass(frozen=True)
class Checkpoint:
    """A checkpoint folder after `step` optimizer steps."""

    folder: Path
    step: int

    def is_last(self, patience: int | None) -> bool:
        """Whether all steps are done, or as many evaluations as `patience` brought no gain. transformers 5.19 would do one step more from here."""
        state = _state(self.folder)
        return bool(state["max_steps"] == self.step or (patience and evaluations_without_gain(state["log_history"]) >= patience))

    def take_cadence(self, values: Mapping[str, int]) -> None:
        """Has the training that goes on from here log, save and evaluate in these intervals: transformers takes them from the checkpoint."""
        state = _state(self.folder)
        if changed := {key: value for key, value in values.items() if state.get(key) != value}:
            draft = self.folder / f"{STATE_FILE}.new"
            draft.write_text(json.dumps(state | changed, indent=2) + "\n", "utf-8")
            draft.replace(self.folder / STATE_FILE)


def evaluations_without_gain(log_history: Sequence[Mapping[str, Any]]) -> int:
    """Evaluations since the one with the lowest loss, by the trainer's own history."""
    losses = [entry["eval_loss"] for entry in log_history if "eval_loss" in entry]
    return len(losses) - 1 - losses.index(min(losses)) if losses else 0


def _state(folder: Path) -> dict[str, Any]:
    """What the Trainer wrote last; raises OSError or ValueError if it is missing or cut short."""
    state: dict[str, Any] = json.loads((folder / STATE_FILE).read_text("utf-8"))
    return state


def checkpoints(output: Path) -> list[Checkpoint]:
    """The checkpoints below a training's output folder, complete or not, by step."""
    found = [Checkpoint(folder, int(number)) for folder in output.glob("checkpoint-*") if (number := folder.name.rpartition("-")[2]).isdecimal()]
    return sorted(found, key=lambda checkpoint: checkpoint.step)


def is_complete(checkpoint: Checkpoint, processes: int, *, sharded: bool) -> bool:
    """Whether training can go on from it: everything that transformers (and DeepSpeed, if `sharded`) reads is there and whole.

    The files are checked and not only the last one's presence, since with several processes each writes its own.
    """
    folder = checkpoint.folder
    try:
        if _state(folder)["global_step"] != checkpoint.step:
            return False
        read_adapter(folder)
        pickles = [folder / "scheduler.pt"]
        pickles += [folder / f"rng_state_{rank}.pth" for rank in range(processes)] if processes > 1 else [folder / "rng_state.pth"]
        if sharded:
            shards = folder / (folder / "latest").read_text("utf-8").strip()
            optimizers, models = sorted(shards.glob("*_optim_states.pt")), sorted(shards.glob("*_model_states.pt"))
            split = any(path.name.startswith("zero_pp_rank_") for path in models)  # stage 3: a part of the model for each process
            if len(optimizers) != processes or len(models) != (processes if split else 1):
                return False
            pickles += [*optimizers, *models]
        else:
            pickles.append(folder / "optimizer.pt")
        return all(zipfile.is_zipfile(path) for path in pickles)  # torch.save writes a zip; its directory stands at the end
    except (OSError, ValueError, KeyError, TypeError, AdapterInvalid):
        return False


def resume_point(output: Path, processes: int, *, sharded: bool) -> Checkpoint | None:
    """The newest complete checkpoint, or None. Removes incomplete ones: ms-swift would count them as checkpoints."""
    complete = None
    for checkpoint in checkpoints(output):
        if is_complete(checkpoint, processes, sharded=sharded):
            complete = checkpoint
        else:
            shutil.rmtree(checkpoint.folder)
    return complete


def size_bytes(checkpoint: Checkpoint) -> int:
    """What its files take, as far as they are written."""
    return sum(path.stat().st_size for path in checkpoint.folder.rglob("*") if path.is_file())


def missing_room(output: Path, processes: int, *, sharded: bool) -> str | None:
    """Which folder has no room for the next checkpoint, and how many bytes are missing; None if it has. To be asked after a training failed: what was cut short counts."""
    free = shutil.disk_usage(output).free
    found = checkpoints(output)
    whole = [size_bytes(each) for each in found if is_complete(each, processes, sharded=sharded)]
    cut = sum(size_bytes(each) for each in found if not is_complete(each, processes, sharded=sharded))
    if whole and (missing := max(whole) - free - cut) > 0:  # resume_point removes what was cut short
        return f"the disk of {output} is full: a checkpoint takes {max(whole):,} bytes, {free + cut:,} are free for it, {missing:,} are missing"
    if not whole and free < LITTLE_BYTES:
        return f"the disk of {output} is full: the first checkpoint takes more than the {free + cut:,} bytes that are free for it"
    return None


def best(output: Path) -> Checkpoint | None:
    """The checkpoint with the lowest validation loss if the training had one, else the last."""
    found = checkpoints(output)
    if not found:
        return None
    named = Path(_state(found[-1].folder).get("best_model_checkpoint") or "").name
    return next((checkpoint for checkpoint in found if checkpoint.folder.name == named), found[-1])
