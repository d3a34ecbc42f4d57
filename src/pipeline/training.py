"""The ms-swift boundary: `swift_args` says what to run, `train_adapter` runs it and returns the adapter."""

import json
import shutil
import sys
import time
from collections.abc import Callable, Mapping
from pathlib import Path

from pipeline import process
from pipeline.adapter import ADAPTER_FILES, Adapter, read_adapter
from pipeline.dataset import Dataset, write_swift_rows
from pipeline.errors import AdapterInvalid, ProcessFailed
from pipeline.progress import Report
from pipeline.project import Project
from pipeline.recipe import FinetuneRecipe

SwiftArgs = dict[str, str | int | float | bool | list[str]]
OnMetrics = Callable[[int, Mapping[str, float]], None]
"""Called with the optimizer step and what ms-swift logged there."""
MODEL_TYPE, TEMPLATE = "glm4v_moe", "glm4_5v"
LOGGING_STEPS = 5
POLL_SECONDS = 0.5


def swift_args(recipe: FinetuneRecipe, base: Path, train_file: Path, output: Path) -> SwiftArgs:
    """The arguments of `swift sft` (ms-swift 4.6) for a recipe; pure."""
    training, lora = recipe.training, recipe.lora
    args: SwiftArgs = {
        "model": str(base),
        "model_type": MODEL_TYPE,
        "template": TEMPLATE,
        "check_model": False,  # else it asks a model hub about the local folder
        "dataset": [str(train_file)],
        "split_dataset_ratio": 0,
        "strict": True,  # else rows that fail to encode are dropped without a word
        "truncation_strategy": "delete",  # with strict: an error for a row that is too long
        "max_length": training.max_length_tokens,
        "tuner_type": "lora",
        "lora_rank": lora.rank,
        "lora_alpha": lora.alpha,
        "lora_dropout": lora.dropout,
        "target_modules": list(lora.target_modules),
        "torch_dtype": training.precision,
        "num_train_epochs": training.epochs,
        "per_device_train_batch_size": training.micro_batch_size,
        "gradient_accumulation_steps": training.global_batch_size // (training.micro_batch_size * training.processes),
        "learning_rate": training.learning_rate,
        "warmup_ratio": training.warmup_ratio,
        "gradient_checkpointing": training.gradient_checkpointing,
        "seed": training.seed,
        "data_seed": training.seed,
        "output_dir": str(output),
        "add_version": False,
        "save_strategy": "epoch",
        "save_total_limit": 1,
        "save_only_model": True,
        "eval_strategy": "no",
        "logging_steps": LOGGING_STEPS,
        "logging_first_step": True,
        "dataset_num_proc": 1,
        "dataloader_num_workers": 0,
        "report_to": ["none"],
    }
    if training.device == "cpu":
        args["use_cpu"] = True
    if training.deepspeed:
        args["deepspeed"] = training.deepspeed
    return args


def swift_environment(recipe: FinetuneRecipe) -> dict[str, str]:
    """What ms-swift and DeepSpeed read from the environment for a recipe; pure."""
    environment = {"HF_HUB_OFFLINE": "1", "TOKENIZERS_PARALLELISM": "false"}
    if recipe.training.device == "cpu":
        environment["DS_ACCELERATOR"] = "cpu"
        environment["CUDA_VISIBLE_DEVICES"] = ""
    if recipe.training.processes > 1:
        environment["NPROC_PER_NODE"] = str(recipe.training.processes)
    return environment


def redacted(args: SwiftArgs, base_revision: str, dataset_digest: str) -> SwiftArgs:
    """`args` as they may be published with a version: paths of this machine replaced by what they stood for."""
    return {**args, "model": f"revision {base_revision}", "dataset": [f"digest {dataset_digest}"], "output_dir": "output"}


def dump_args(args: SwiftArgs) -> str:
    return json.dumps(args, indent=2)


def train_adapter(recipe: FinetuneRecipe, base: Path, dataset: Dataset, folder: Path, project: Project, on_metrics: OnMetrics, report: Report) -> Adapter:
    """Trains in `folder` (arguments, rows, checkpoints) and returns the adapter in `folder`/adapter.

    Raises ProcessFailed with the log's tail if ms-swift fails. When this process dies or is interrupted, the training ends too.
    """
    output = folder / "swift"
    output.mkdir(parents=True, exist_ok=True)
    write_swift_rows(dataset.train, folder / "train.jsonl")
    args_file = folder / "swift_args.json"
    args_file.write_text(dump_args(swift_args(recipe, base, folder / "train.jsonl", output)), "utf-8")
    child = process.start(
        [sys.executable, "-m", "swift.cli.main", "sft", str(args_file)],
        name="training",
        lease=folder / "training.lease",
        log=project.logs / f"training-{folder.name}.log",
        environment=project.child_environment(swift_environment(recipe)),
        cwd=folder,
    )
    try:
        follow_log = LogFollower(output / "logging.jsonl", on_metrics, report)
        while child.poll() is None:
            time.sleep(POLL_SECONDS)
            follow_log.read()
        follow_log.read()
        if child.poll() != 0:
            raise child.failure(f"training {recipe.name} failed")
    finally:
        child.end()
    return _collect(output, folder / "adapter", child)


def _collect(output: Path, destination: Path, child: process.Child) -> Adapter:
    """Copies the adapter's own files out of the last checkpoint: nothing else of it (pickles, optimizer state) goes further."""
    checkpoints = sorted(output.glob("checkpoint-*"), key=lambda path: int(path.name.rpartition("-")[2]))
    if not checkpoints:
        raise child.failure("training ended without a checkpoint")
    destination.mkdir(exist_ok=True)
    for name in ADAPTER_FILES:
        shutil.copyfile(checkpoints[-1] / name, destination / name)
    try:
        return read_adapter(destination)
    except AdapterInvalid as error:
        raise ProcessFailed(f"training left no usable adapter: {error}; the log is {child.log}") from error


class LogFollower:
    """Reads what ms-swift appends to its logging.jsonl: numbers to `on_metrics`, loss, speed and time left to `report`."""

    def __init__(self, path: Path, on_metrics: OnMetrics, report: Report) -> None:
        self.path, self.on_metrics, self.report = path, on_metrics, report
        self.offset = 0

    def read(self) -> None:
        """Handles every complete line that is new since the last call."""
        if not self.path.exists():
            self.report("loading the model", 0.0)
            return
        with self.path.open("rb") as file:
            file.seek(self.offset)
            for line in file:
                if not line.endswith(b"\n"):
                    return  # still being written
                self.offset += len(line)
                self._handle(json.loads(line))

    def _handle(self, record: Mapping[str, object]) -> None:
        position = record.get("global_step/max_steps")
        if not isinstance(position, str):
            return  # the summary at the end
        step, steps = (int(part) for part in position.split("/"))
        metrics = {key: float(value) for key, value in record.items() if isinstance(value, (int, float))}
        metrics = {key.replace("(", "_").replace(")", ""): value for key, value in metrics.items()}  # names that MLflow takes
        self.on_metrics(step, metrics)
        loss, speed = record.get("loss"), metrics.get("train_speed_s/it")
        shown = [f"step {step}/{steps}"]
        shown += [f"loss {loss:.4f}"] if isinstance(loss, float) else []
        shown += [f"{speed:.2f} s/step"] if speed else []
        self.report(", ".join([*shown, f"{record.get('remaining_time', '?')} left"]), step / steps)
