"""Loaded by ms-swift where a recipe stops early (`external_plugins`): its own callback counts in memory only, so that a resumed training forgets its patience."""

from typing import Any

from swift.callbacks.base import TrainerCallback
from swift.callbacks.mapping import callbacks_map

from pipeline.checkpoint import evaluations_without_gain


class EarlyStop(TrainerCallback):  # type: ignore[misc]  # ms-swift is untyped
    """Counts from the trainer's own history, which a checkpoint holds."""

    def on_save(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        if evaluations_without_gain(state.log_history) >= args.early_stop_interval:
            control.should_training_stop = True


callbacks_map["early_stop"] = EarlyStop
