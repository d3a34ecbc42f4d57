"""The ms-swift boundary: `swift_args` says what to run, `train_adapter` runs it, goes on where a killed one stopped, and returns the adapter."""

import contextlib
import hashlib
import json
import logging
import math
import os
import re
import shutil
import sys
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import cast

from pipeline import checkpoint, process
from pipeline.adapter import ADAPTER_FILES, Adapter, read_adapter
from pipeline.basemodel import BaseModel, template_digest
from pipeline.dataset import Dataset, write_swift_rows
from pipeline.errors import AdapterInvalid, ProcessFailed
from pipeline.progress import Report
from pipeline.project import Project
from pipeline.recipe import Dpo, FinetuneRecipe, Lora
from pipeline.reference import REFERENCE_FILE, read_reference

logger = logging.getLogger(__name__)
SwiftArgs = dict[str, str | int | float | bool | list[str]]
OnMetrics = Callable[[int, Mapping[str, float]], None]
"""Called with the optimizer step and what ms-swift logged there."""
MODEL_TYPE, TEMPLATE = "glm4v_moe", "glm4_5v"
CPU_DEEPSPEED_PLUGIN, EARLY_STOP_PLUGIN, CHUNKED_LOSS_PLUGIN, EXPERT_NF4_PLUGIN, OFFLOAD_CHECKPOINTS_PLUGIN, ZERO3_PLUGIN = (
    Path(__file__).with_name(f"swift_{name}.py") for name in ("cpu_deepspeed", "early_stop", "chunked_loss", "expert_nf4", "offload_checkpoints", "zero3")
)
DECIDING_PLUGINS = frozenset({EXPERT_NF4_PLUGIN.name})
"""Those that change what comes out, beyond what the arguments say: before there was this one, nf4 left the experts as they were."""
DECIDING_PACKAGES = (
    "ms-swift", "transformers", "peft", "accelerate", "torch", "torchvision", "tokenizers", "datasets", "numpy", "pillow", "python",
)  # fmt: skip
"""Whose versions decide what every training makes: the model, its pictures, the order of its rows."""
LAUNCHER_VARIABLES = frozenset({"NPROC_PER_NODE", "NNODES", "NODE_RANK", "MASTER_ADDR", "MASTER_PORT", "RANK", "LOCAL_RANK", "WORLD_SIZE", "LOCAL_WORLD_SIZE"})
"""What would make ms-swift start other processes, or wait for them, than the recipe says."""
ALLOCATOR_VARIABLE = "PYTORCH_CUDA_ALLOC_CONF"
ARGS_FILE, LEASE = "swift_args.json", "training.lease"
"""In a training's folder."""
REFERENCE_SECONDS = 1800.0
"""What a parity reference may take: a base that does not fit the GPUs is read from host memory for every prompt."""
REFERENCE_TRIES = 2
"""Of one that is killed: without a reference its version could never pass the gate."""
CADENCE = ("logging_steps", "save_steps", "eval_steps")
LOGGING_STEPS = 5
PICTURE_WORKERS = 2
"""Processes that make the next rows' pixels while a GPU trains; on a CPU they would take the cores that train."""
POLL_SECONDS = 0.5
KEPT_CHECKPOINTS = 2
"""While the newest is written, the one before it is still whole."""
NEUTRAL_ARGS = frozenset(
    {"save_steps", "eval_steps", "save_total_limit", "logging_steps", "logging_first_step", "report_to", "check_model", "external_plugins"}
)
"""Arguments that do not change what comes out."""
VISION_ATTENTION = ("attn.qkv", "attn.proj")
ALIGNER = ("merger.proj",)
"""GLM-4.5V's linear layers in its vision tower's attention and in the merger behind it, by the ends of their names."""
ROOT_CAUSE = re.compile(r"Root Cause.*?rank\s*: (?P<rank>\d+) .*?exitcode\s*: (?P<code>-?\d+)", re.DOTALL)
"""How torchrun's summary names the process that failed first."""


def swift_command(recipe: FinetuneRecipe) -> str:
    """ms-swift's command for the recipe's method."""
    return "rlhf" if recipe.method == "dpo" else "sft"


def swift_args(recipe: FinetuneRecipe, base: Path, train_file: Path, output: Path) -> SwiftArgs:
    """The arguments of `swift sft` or `swift rlhf` (ms-swift 4.6) for a recipe; pure."""
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
        "use_rslora": lora.rslora,
        "target_modules": target_modules(lora),
        "freeze_vit": lora.freeze_vit,
        "freeze_aligner": lora.freeze_aligner,
        "torch_dtype": training.precision,
        "fp16": False,  # for float32 ms-swift would ask for it
        "bf16": training.precision == "bfloat16",
        "attn_impl": training.attention,
        "per_device_train_batch_size": training.micro_batch_size,
        "gradient_accumulation_steps": training.global_batch_size // (training.micro_batch_size * training.processes),
        "learning_rate": training.learning_rate,
        "lr_scheduler_type": training.scheduler,
        "warmup_ratio": training.warmup_ratio,
        "weight_decay": training.weight_decay,
        "gradient_checkpointing": training.gradient_checkpointing,
        "packing": training.packing,
        "seed": training.seed,
        "data_seed": training.seed,
        "output_dir": str(output),
        "add_version": False,
        "save_strategy": "steps",
        "save_steps": training.checkpoint_steps,
        "save_total_limit": KEPT_CHECKPOINTS,
        "eval_strategy": "no",
        "logging_steps": math.gcd(LOGGING_STEPS, training.checkpoint_steps),  # a logged loss is a mean since the last: resumed trainings log the same
        "logging_first_step": True,
        "dataset_num_proc": 1,
        "dataloader_num_workers": 0 if training.device == "cpu" else PICTURE_WORKERS,
        "report_to": ["none"],
    }
    args |= {"max_steps": training.max_steps} if training.max_steps else {"num_train_epochs": training.epochs or 1.0}
    args |= _method_args(recipe)
    plugins: list[str] = []
    if stopping := training.early_stopping:
        args |= {"split_dataset_ratio": stopping.validation_share, "eval_strategy": "steps", "eval_steps": training.checkpoint_steps}
        args |= {"per_device_eval_batch_size": training.micro_batch_size, "metric_for_best_model": "loss", "greater_is_better": False}
        args |= {"callbacks": ["early_stop"], "early_stop_interval": stopping.patience_checkpoints}
        plugins.append(str(EARLY_STOP_PLUGIN))
    if training.row_weights:
        args["is_binary_loss_scale"] = False
    elif recipe.method == "sft":
        plugins.append(str(CHUNKED_LOSS_PLUGIN))
    if recipe.quantization:
        plugins.append(str(EXPERT_NF4_PLUGIN))
        args |= {"quant_method": "bnb", "quant_bits": 4, "bnb_4bit_quant_type": recipe.quantization, "bnb_4bit_compute_dtype": training.precision}
    if training.offload_checkpoints:
        plugins.append(str(OFFLOAD_CHECKPOINTS_PLUGIN))
        args["gradient_checkpointing_kwargs"] = '{"use_reentrant": true}'
    if training.device == "cpu":
        args["use_cpu"] = True
    if training.deepspeed:
        args["deepspeed"] = training.deepspeed
        plugins += [str(CPU_DEEPSPEED_PLUGIN)] if training.device == "cpu" else []
        plugins += [str(ZERO3_PLUGIN)] if training.deepspeed.startswith("zero3") and training.processes > 1 else []
    if plugins:
        args["external_plugins"] = plugins
    return args


def target_modules(lora: Lora) -> list[str]:
    """The ends of the names of all modules that get an adapter; pure.

    Names, not a pattern: peft 0.20 reduces a pattern for this model to last names, so that it loses the layers and gains modules that it never named.
    """
    if lora.layers:
        language = [f"language_model.layers.{number}.self_attn.{name}" for number in range(lora.layers[0], lora.layers[1] + 1) for name in lora.target_modules]
    else:
        language = list(lora.target_modules)
    return [*language, *(() if lora.freeze_vit else VISION_ATTENTION), *(() if lora.freeze_aligner else ALIGNER)]


def _method_args(recipe: FinetuneRecipe) -> SwiftArgs:
    if recipe.method == "sft":
        return {}
    dpo = recipe.dpo or Dpo()
    args: SwiftArgs = {"rlhf_type": "dpo", "beta": dpo.beta}
    if dpo.sft_weight:
        args["rpo_alpha"] = dpo.sft_weight
    return args


def swift_environment(recipe: FinetuneRecipe, rank_logs: Path) -> dict[str, str]:
    """What ms-swift, torch, torchrun and DeepSpeed read from the environment for a recipe; pure. Each process's output goes to a file below `rank_logs`."""
    environment = {"HF_HUB_OFFLINE": "1", "TOKENIZERS_PARALLELISM": "false"}
    if recipe.training.device == "cuda":
        environment[ALLOCATOR_VARIABLE] = "expandable_segments:True"  # else long rows leave gigabytes that are reserved and fit nothing
    if recipe.training.device == "cpu":
        environment["DS_ACCELERATOR"] = "cpu"
        environment["CUDA_VISIBLE_DEVICES"] = ""
    if recipe.training.processes > 1 or recipe.training.deepspeed:  # DeepSpeed without a launcher looks for MPI
        environment["NPROC_PER_NODE"] = str(recipe.training.processes)
        environment["PET_STANDALONE"] = "1"  # a free port for each training, not 29500 for all
        environment |= {"PET_LOG_DIR": str(rank_logs), "PET_TEE": "3", "PET_LOCAL_RANKS_FILTER": "0"}  # the training's own log shows rank 0
    return environment


def published(args: SwiftArgs, base_revision: str, dataset_digest: str) -> SwiftArgs:
    """`args` as they go into the registry with a version: paths of this machine replaced by what they stood for."""
    paths: SwiftArgs = {"model": f"revision {base_revision}", "dataset": [f"digest {dataset_digest}"], "output_dir": "output"}
    names = args.get("external_plugins")
    plugins: SwiftArgs = {"external_plugins": [Path(name).name for name in names]} if isinstance(names, list) else {}
    return {key: value for key, value in args.items() if key != "resume_from_checkpoint"} | paths | plugins


def input_digest(args: SwiftArgs, processes: int, template_digest: str, versions: Mapping[str, str]) -> str:
    """SHA-256 over all that decides what a training makes: its published arguments but for the neutral ones, the prompt template, the libraries.

    `args` name the digest of the rows that are trained on; held-out rows decide nothing.
    """
    packages = [*DECIDING_PACKAGES]
    packages += ["deepspeed"] if "deepspeed" in args else []
    packages += ["bitsandbytes"] if "quant_method" in args else []
    packages += ["trl"] if "rlhf_type" in args else []
    packages += ["flash-attn"] if str(args["attn_impl"]).startswith("flash") else []
    neutral = NEUTRAL_ARGS - ({"save_steps", "eval_steps"} if "early_stop_interval" in args else set())
    deciding = {key: value for key, value in args.items() if key not in neutral}
    if plugins := sorted(DECIDING_PLUGINS.intersection(cast(list[str], args.get("external_plugins", [])))):
        deciding["external_plugins"] = plugins
    content = [deciding, processes, template_digest, {package: versions.get(f"version.{package}") for package in packages}]
    return hashlib.sha256(json.dumps(content, sort_keys=True).encode()).hexdigest()


def dump_args(args: SwiftArgs) -> str:
    return json.dumps(args, indent=2)


def train_adapter(recipe: FinetuneRecipe, base: Path, dataset: Dataset, folder: Path, project: Project, on_metrics: OnMetrics, report: Report) -> Adapter:
    """Trains in `folder` (arguments, rows, checkpoints) and returns the adapter in `folder`/adapter.

    Goes on from the last complete checkpoint that an earlier call with the same inputs left there; an adapter that is there already is returned.
    Raises ProcessFailed with the failing process's log if ms-swift fails. When this process dies or is interrupted, the training ends too.
    """
    adapter, output = folder / "adapter", folder / "swift"
    if adapter.is_dir():
        with contextlib.suppress(AdapterInvalid):  # damaged since: it is taken out of the checkpoint again
            return read_adapter(adapter)
        shutil.rmtree(adapter)
    process.wait_ended(folder / LEASE)  # of a killed command the training may still be ending
    output.mkdir(parents=True, exist_ok=True)
    resumed = checkpoint.resume_point(output, recipe.training.processes, sharded=recipe.training.deepspeed is not None)
    follow_log = LogFollower(output / "logging.jsonl", on_metrics, report, resumed.step if resumed else 0)
    stopping = recipe.training.early_stopping
    if resumed and resumed.is_last(stopping.patience_checkpoints if stopping else None):
        follow_log.read()
    else:
        write_swift_rows(dataset.train, folder / "train.parquet")
        args = swift_args(recipe, base, folder / "train.parquet", output)
        if resumed:
            args["resume_from_checkpoint"] = str(resumed.folder)
            resumed.take_cadence({key: value for key in CADENCE if isinstance(value := args.get(key), int)})
        (folder / ARGS_FILE).write_text(dump_args(args), "utf-8")
        logger.info("training resumed" if resumed else "training started", extra={"step": resumed.step if resumed else 0})
        _run_swift(recipe, folder, project, follow_log)
    trained = _collect(output, adapter, _log(project, folder))
    logger.info("training ended", extra={"digest": trained.digest})
    return trained


def _log(project: Project, folder: Path) -> Path:
    return project.logs / f"training-{folder.name}.log"


def make_reference(recipe: FinetuneRecipe, base: BaseModel, adapter: Adapter, dataset: Dataset, folder: Path, project: Project) -> str:
    """The text of the parity.json that belongs to `adapter`, made of held-out rows on the hardware that trained; kept in `folder`, and made once. One that is
    killed is begun again, up to REFERENCE_TRIES in all.

    Raises ProcessFailed if it cannot be made; the adapter is what it was.
    """
    from pipeline.parity_prompts import questions_of  # PIL

    path, task_file = folder / REFERENCE_FILE, folder / "parity_task.json"
    with contextlib.suppress(OSError, ValueError, AdapterInvalid):  # none yet, or one that was cut short
        text = path.read_text("utf-8")
        if read_reference(text, str(path)).adapter_digest == adapter.digest:
            return text
    process.wait_ended(folder / LEASE)  # of a killed command the training, or this, may still be ending
    questions = questions_of(dataset.eval)
    task: dict[str, object] = {"base": str(base.folder), "base_revision": base.revision, "adapter": str(adapter.folder), "adapter_digest": adapter.digest}
    task |= {"precision": recipe.training.precision, "device": recipe.training.device, "attention": recipe.training.attention}
    task |= {"template_digest": template_digest(), "images": questions.images, "questions": [each.model_dump() for each in questions.questions]}
    task_file.write_text(json.dumps(task), "utf-8")
    alone = recipe.model_copy(update={"training": recipe.training.model_copy(update={"processes": 1, "deepspeed": None})})
    for tries_left in reversed(range(REFERENCE_TRIES)):
        child = process.start(
            [sys.executable, "-m", "pipeline.swift_parity", str(task_file), str(path)],
            name="parity reference",
            lease=folder / LEASE,
            log=_log(project, folder).with_suffix(".parity.log"),
            environment=child_environment(project, swift_environment(alone, folder)),
            cwd=folder,
        )
        try:
            deadline = time.monotonic() + REFERENCE_SECONDS
            while child.poll() is None:
                if time.monotonic() > deadline:
                    raise child.failure(f"the parity reference was not made within {REFERENCE_SECONDS:.0f} s")
                time.sleep(POLL_SECONDS)
            if child.poll() == 0:
                break
            if not (child.killed() and tries_left):
                raise child.failure("the parity reference could not be made")
        finally:
            child.end()
    text = path.read_text("utf-8")
    try:
        read_reference(text, str(path))
    except AdapterInvalid as error:
        raise child.failure(f"the parity reference is not whole: {error}") from error
    return text


def child_environment(project: Project, own: Mapping[str, str]) -> dict[str, str]:
    """A child's, without what would make it wait for other processes than the recipe says; how the user has memory allocated stays."""
    own = {name: value for name, value in own.items() if name != ALLOCATOR_VARIABLE or name not in os.environ}
    return {name: value for name, value in project.child_environment(own).items() if name in own or name not in LAUNCHER_VARIABLES}


def _run_swift(recipe: FinetuneRecipe, folder: Path, project: Project, follow_log: "LogFollower") -> None:
    rank_logs = _log(project, folder).with_suffix(".ranks")
    shutil.rmtree(rank_logs, ignore_errors=True)
    environment = child_environment(project, swift_environment(recipe, rank_logs))
    child = process.start(
        [sys.executable, "-m", "swift.cli.main", swift_command(recipe), str(folder / ARGS_FILE)],
        name="training",
        lease=folder / LEASE,
        log=_log(project, folder),
        environment=environment,
        cwd=folder,
    )
    try:
        while child.poll() is None:
            time.sleep(POLL_SECONDS)
            follow_log.read()
        follow_log.read()
        if child.poll() != 0:
            logger.error("training failed", extra={"log": str(child.log), "exit_code": child.poll()})
            raise failure_of(child, recipe, folder / "swift", rank_logs)
    finally:
        child.end()


def failure_of(child: process.Child, recipe: FinetuneRecipe, output: Path, rank_logs: Path) -> ProcessFailed:
    """The error of a training that failed; of several processes, the one that torchrun says failed first, with that one's own log. A full disk comes first."""
    what = f"training {recipe.name} failed; run it again to go on from its last checkpoint"
    if full := checkpoint.missing_room(output, recipe.training.processes, sharded=recipe.training.deepspeed is not None):
        what = f"training {recipe.name} failed: {full}; make room (tuneserve gc), and run it again to go on from its last checkpoint"
    found = ROOT_CAUSE.search(child.log.read_text("utf-8", "replace"))
    if found is None:
        return child.failure(what)
    rank, code = int(found["rank"]), int(found["code"])
    log = next(iter(sorted(rank_logs.glob(f"*/attempt_*/{rank}/stderr.log"))), child.log)
    ended = f"was ended by signal {-code}" if code < 0 else f"exited with code {code}"
    return process.failure(f"{what}: process {rank} of {recipe.training.processes} {ended} and the others were ended with it", log)


def _collect(output: Path, destination: Path, log: Path) -> Adapter:
    """Copies the adapter's own files out of the best checkpoint: nothing else of it (pickles, optimizer state) goes further."""
    chosen = checkpoint.best(output)
    if chosen is None:
        raise process.failure("training ended without a checkpoint", log)
    draft = destination.with_name("adapter.draft")
    shutil.rmtree(draft, ignore_errors=True)
    draft.mkdir()
    try:
        for name in ADAPTER_FILES:
            shutil.copyfile(chosen.folder / name, draft / name)
        _sort_names(draft / ADAPTER_FILES[0])
        read_adapter(draft)
    except (AdapterInvalid, OSError, ValueError) as error:
        raise ProcessFailed(f"training left no usable adapter: {error}; the log is {log}") from error
    draft.rename(destination)  # from here on it is there whole, whatever kills us
    return read_adapter(destination)


def _sort_names(config_file: Path) -> None:
    """peft writes sets of names in any order; sorted, equal trainings make equal files and so equal digests."""
    config = json.loads(config_file.read_text("utf-8"))
    for key in ("target_modules", "target_parameters", "modules_to_save"):
        if isinstance(config.get(key), list):
            config[key].sort()
    config_file.write_text(json.dumps(config, indent=2) + "\n", "utf-8")


class LogFollower:
    """Reads what ms-swift appends to its logging.jsonl: numbers to `on_metrics`, loss, speed and time left to `report`.

    What an earlier process wrote is read too: it may not have reached the registry, which takes every step's value once.
    """

    def __init__(self, path: Path, on_metrics: OnMetrics, report: Report, resumed_step: int = 0) -> None:
        self.path, self.on_metrics, self.report, self.resumed_step = path, on_metrics, report, resumed_step
        self.offset = 0
        if path.exists():
            self._cut_half_line()

    def _cut_half_line(self) -> None:
        """A line that a killed process left unfinished would be glued to the next one."""
        os.truncate(self.path, self.path.read_bytes().rfind(b"\n") + 1)

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
        if not isinstance(position, str) or "train_runtime" in record:
            return  # the summaries at the end
        step, steps = (int(part) for part in position.split("/"))
        metrics = {key: float(value) for key, value in record.items() if isinstance(value, (int, float))}
        metrics = {key.replace("(", "_").replace(")", ""): value for key, value in metrics.items()}  # names that MLflow takes
        self.on_metrics(step, metrics)
        if step <= self.resumed_step:
            self.report(f"going on from step {self.resumed_step}/{steps}", self.resumed_step / steps)
            return
        loss, speed = record.get("loss"), metrics.get("train_speed_s/it")
        shown = [f"step {step}/{steps}"]
        shown += [f"loss {loss:.4f}"] if isinstance(loss, float) else []
        shown += [f"{speed:.2f} s/step"] if speed else []
        self.report(", ".join([*shown, f"{record.get('remaining_time', '?')} left"]), step / steps)
