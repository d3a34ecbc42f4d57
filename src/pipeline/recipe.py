"""Typed recipes: one finetune recipe is one training run, one serving recipe is one vLLM server. A wrong key or value is refused, all faults at once."""

import difflib
import json
import typing
from pathlib import Path
from typing import Annotated, Any, Literal, Self, TypeVar

import yaml
from pydantic import AfterValidator, BaseModel, ConfigDict, Field, ValidationError, model_validator
from pydantic.fields import FieldInfo
from pydantic_core import ErrorDetails

from pipeline.adapter import name_fault
from pipeline.errors import Fault, InvalidInput


def _adapter_name(name: str) -> str:
    if fault := name_fault(name):
        raise ValueError(fault)
    return name


AdapterName = Annotated[str, AfterValidator(_adapter_name)]
"""A registered model's name, which is also its served name."""
ATTENTION = ("q_proj", "k_proj", "v_proj", "o_proj")
"""Gives the same adapter keys with every version of transformers and peft that was tried, and is what a small server wraps."""


class Section(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True, allow_inf_nan=False)


class DatasetFiles(Section):
    """Question-answer rows: .jsonl, .json, .csv, .parquet or a Hugging Face dataset folder each (image paths relative to the file)."""

    train: Path
    eval: Path
    """Held-out rows; never trained on."""
    max_bad_rows: Annotated[int, Field(ge=0)] = 0
    """Bad rows that may be left out of each file; they are reported, and more than these fail. Held-out rows in train always fail."""


class Lora(Section):
    rank: Annotated[int, Field(ge=1, le=512)] = 16
    alpha: Annotated[float, Field(gt=0)] = 32
    """The update is scaled by alpha / rank."""
    dropout: Annotated[float, Field(ge=0, lt=1)] = 0.0
    target_modules: Annotated[tuple[str, ...], Field(min_length=1)] = ATTENTION


class Training(Section):
    device: Literal["cpu", "cuda"] = "cuda"
    precision: Literal["float32", "bfloat16"] = "bfloat16"
    epochs: Annotated[float, Field(gt=0)] = 1.0
    micro_batch_size: Annotated[int, Field(ge=1)] = 1
    """Rows per process and step of the model; what memory allows."""
    global_batch_size: Annotated[int, Field(ge=1)] = 16
    """Rows per optimizer step, over all processes and accumulation steps."""
    processes: Annotated[int, Field(ge=1)] = 1
    """Training processes on this host, one per GPU."""
    deepspeed: Literal["zero1", "zero2", "zero3", "zero2_offload", "zero3_offload"] | None = None
    """How optimizer state (1), gradients (2) and weights (3) are split over the processes."""
    learning_rate: Annotated[float, Field(gt=0, le=1)] = 1e-4
    warmup_ratio: Annotated[float, Field(ge=0, lt=1)] = 0.05
    max_length_tokens: Annotated[int, Field(ge=16)] = 4096
    """Longest row, image tokens included; a longer one is an error, not cut."""
    gradient_checkpointing: bool = True
    """Less memory for about a third more time."""
    seed: Annotated[int, Field(ge=0)] = 42

    @model_validator(mode="after")
    def _batches_divide(self) -> Self:
        step = self.micro_batch_size * self.processes
        if self.global_batch_size % step:
            raise ValueError(
                f"global_batch_size: {self.global_batch_size} is not a multiple of micro_batch_size x processes = {step}; use {max(1, self.global_batch_size // step) * step}"
            )
        return self

    @model_validator(mode="after")
    def _deepspeed_has_gpus(self) -> Self:
        if self.deepspeed and self.device == "cpu":
            raise ValueError(f"deepspeed: {self.deepspeed} needs device: cuda for now; remove it to train on the CPU in one process")
        return self


class FinetuneRecipe(Section):
    """One training run: what to train, on which rows, how, and the name it is registered and served under."""

    name: AdapterName
    base_model: str
    """`tiny` for the built-in tiny GLM-4.5V, else a folder with a GLM-4.5V in Hugging Face's format."""
    dataset: DatasetFiles
    lora: Lora = Lora()
    training: Training = Training()


class ServedLora(Section):
    max_rank: Literal[1, 8, 16, 32, 64, 128, 256, 320, 512] = 16
    max_loras: Annotated[int, Field(ge=1)] = 4
    """Adapters in one batch; each slot is preallocated for every wrapped module, and requests for more wait."""
    max_cpu_loras: Annotated[int, Field(ge=1)] = 16
    """Adapters in host memory; keep it at two more than the versions that clients may call."""
    target_modules: Annotated[tuple[str, ...], Field(min_length=1)] = ("qkv_proj", "o_proj")
    """vLLM's modules that take adapters; weights for others are refused."""

    @model_validator(mode="after")
    def _cpu_holds_gpu(self) -> Self:
        if self.max_cpu_loras < self.max_loras + 2:
            raise ValueError(f"max_cpu_loras: {self.max_cpu_loras} is too few for max_loras {self.max_loras}; use at least {self.max_loras + 2}")
        return self


class ServingRecipe(Section):
    """One vLLM server that serves a base model and follows registered models."""

    name: AdapterName
    base_model: str
    """As in a finetune recipe."""
    served_name: Annotated[str, Field(min_length=1)] = "glm-4.5v"
    """What clients call the base."""
    follow: Annotated[tuple[AdapterName, ...], Field(min_length=1)]
    """Registered models; each one's version under the alias `champion` is served under the model's name."""
    device: Literal["cpu", "cuda"] = "cuda"
    host: str = "127.0.0.1"
    port: Annotated[int, Field(ge=0, le=65535)] = 8000
    """0 takes 8000 if it is free, else any free port."""
    precision: Literal["float32", "bfloat16"] = "bfloat16"
    max_model_len_tokens: Annotated[int, Field(ge=16)] = 16384
    max_images: Annotated[int, Field(ge=0)] = 4
    """Per request."""
    kv_cache_gib: Annotated[int, Field(ge=1)] = 1
    """CPU only; on a GPU it is what gpu_memory_utilization leaves."""
    gpu_memory_utilization: Annotated[float, Field(gt=0, le=0.95)] = 0.9
    tensor_parallel_size: Annotated[int, Field(ge=1)] = 1
    allowed_media_domains: tuple[str, ...] = ()
    """Hosts that image URLs may name; none: data URLs only."""
    poll_seconds: Annotated[float, Field(ge=0.05, le=60)] = 1.0
    """How often the registry is asked."""
    lora: ServedLora = ServedLora()

    @model_validator(mode="after")
    def _names_differ(self) -> Self:
        if len(set(self.follow)) < len(self.follow):
            raise ValueError("follow: names a model twice; name each once")
        for name in self.follow:
            if fault := name_fault(name, {self.served_name}):
                raise ValueError(f"follow: {fault}")
        return self


Recipe = FinetuneRecipe | ServingRecipe
R = TypeVar("R", FinetuneRecipe, ServingRecipe)


class UniqueKeyLoader(yaml.SafeLoader):
    """YAML's safe loader, but a key that stands twice is an error, not silently the last one."""

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict[Any, Any]:
        keys = [key.value for key, _ in node.value]
        if twice := next((key for key in keys if keys.count(key) > 1), None):
            raise yaml.constructor.ConstructorError(None, None, f"key '{twice}' stands twice; remove one", node.start_mark)
        return super().construct_mapping(node, deep)


def load_recipe(path: Path, kind: type[R]) -> R:
    """The recipe in the YAML file `path`. Raises InvalidInput with a fault for everything that is wrong with it."""
    try:
        data = yaml.load(path.read_text("utf-8"), UniqueKeyLoader)  # noqa: S506 (a safe loader)
    except (OSError, UnicodeDecodeError) as error:
        raise InvalidInput([Fault(str(path), "", f"cannot be read ({error}); give the path of a YAML recipe")]) from error
    except yaml.YAMLError as error:
        raise InvalidInput([Fault(str(path), "", f"is not YAML ({error})".replace("\n", " "))]) from error
    if not isinstance(data, dict):
        raise InvalidInput([Fault(str(path), "", f"holds no mapping; a recipe starts with the keys {', '.join(kind.model_fields)}")])
    try:
        return kind.model_validate_json(json.dumps(data, default=str), strict=True)  # strict JSON: no '16' for 16, and still lists for tuples
    except ValidationError as error:
        raise InvalidInput([_fault(str(path), kind, details) for details in error.errors()]) from error


def check_recipe(path: Path) -> tuple[list[Fault], DatasetFiles | None]:
    """What is wrong with a finetune or serving recipe (told apart by the keys that only one of them has), and its dataset's files as far as they are named right."""
    try:
        data = yaml.safe_load(path.read_text("utf-8"))
    except (OSError, UnicodeDecodeError, yaml.YAMLError):
        data = None
    keys = set(data) if isinstance(data, dict) else set()
    own_serving, own_finetune = (set(a.model_fields) - set(b.model_fields) for a, b in ((ServingRecipe, FinetuneRecipe), (FinetuneRecipe, ServingRecipe)))
    serving = len(keys & own_serving) > len(keys & own_finetune)
    faults: list[Fault] = []
    try:
        load_recipe(path, ServingRecipe) if serving else load_recipe(path, FinetuneRecipe)
    except InvalidInput as error:
        faults += error.faults
    try:
        return faults, None if serving or "dataset" not in keys else DatasetFiles.model_validate(data["dataset"])
    except ValidationError:
        return faults, None


def dump_recipe(recipe: Recipe) -> str:
    """The recipe as YAML with every default written out: what actually ran."""
    return yaml.safe_dump(recipe.model_dump(mode="json"), sort_keys=False, allow_unicode=True)


def _fault(file: str, kind: type[Recipe], details: ErrorDetails) -> Fault:
    """One of pydantic's findings in our words, with what was probably meant."""
    location = [str(part) for part in details["loc"]]
    if details["type"] == "extra_forbidden":
        known = _fields(kind, location[:-1])
        return Fault(file, ".".join(location), f"unknown key{_did_you_mean(location[-1], known)}; known here: {', '.join(known)}")
    got = details["input"]
    if details["type"] == "missing":
        return Fault(file, ".".join(location), "is missing; add it")
    if details["type"] == "literal_error":
        choices = [choice.strip("' ") for choice in details["ctx"]["expected"].replace(" or ", ", ").split(",")]
        return Fault(file, ".".join(location), f"{got!r} is not one of {', '.join(choices)}{_did_you_mean(str(got), choices)}")
    message = details["msg"].removeprefix("Value error, ")
    if details["type"] == "value_error" and isinstance(got, dict) and ": " in message:  # a relation between fields names its field first
        field, message = message.split(": ", 1)
        return Fault(file, ".".join([*location, field]), message)
    return Fault(file, ".".join(location), f"{message[:1].lower()}{message[1:]} (got {got!r})")


def _did_you_mean(word: str, known: list[str]) -> str:
    close = difflib.get_close_matches(word, known, n=1)
    return f"; did you mean '{close[0]}'?" if close else ""


def _fields(kind: type[BaseModel], location: list[str]) -> list[str]:
    """The keys known at `location` inside `kind`."""
    fields: dict[str, FieldInfo] = kind.model_fields
    for part in location:
        annotation: Any = fields[part].annotation
        inner = next(a for a in (annotation, *typing.get_args(annotation)) if isinstance(a, type) and issubclass(a, BaseModel))
        fields = inner.model_fields
    return list(fields)
