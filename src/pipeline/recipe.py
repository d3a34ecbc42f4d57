"""Typed recipes: one finetune recipe is one training run, one serving recipe is one vLLM server. A wrong key or value is refused, all faults at once."""

import difflib
import json
import typing
from collections.abc import Iterator
from pathlib import Path
from typing import Annotated, Any, Literal, Self, TypeVar

import yaml
from pydantic import AfterValidator, BaseModel, ConfigDict, Field, ValidationError, model_validator
from pydantic.fields import FieldInfo
from pydantic_core import ErrorDetails

from pipeline.adapter import ADAPTER_NAME, name_fault
from pipeline.errors import Fault, InvalidInput


def _adapter_name(name: str) -> str:
    if fault := name_fault(name):
        raise ValueError(fault)
    return name


AdapterName = Annotated[str, AfterValidator(_adapter_name), Field(json_schema_extra={"pattern": f"^{ADAPTER_NAME.pattern}$"})]
"""A registered model's name, which is also its served name."""
ModuleName = Literal["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]
ATTENTION: tuple[ModuleName, ...] = ("q_proj", "k_proj", "v_proj", "o_proj")
"""Gives the same adapter keys with every version of transformers and peft that was tried, and is what a small server wraps."""

EXPERTS = ("gate_proj", "up_proj", "down_proj")
"""peft 0.20 turns these names into the routed experts' fused weights."""
LayerNumber = Annotated[int, Field(ge=0)]


ReplicaAddress = Annotated[str, Field(pattern=r"^(https?|dns|dns\+https)://[A-Za-z0-9._\[\]:-]+$")]


class Section(BaseModel, use_attribute_docstrings=True):
    model_config = ConfigDict(extra="forbid", frozen=True, allow_inf_nan=False)

    def broken_relations(self) -> Iterator[str]:
        """What does not hold between this section's fields, each as `field: message`."""
        yield from ()

    @model_validator(mode="after")
    def _relations_hold(self) -> Self:
        if broken := list(self.broken_relations()):
            raise ValueError("\n".join(broken))
        return self


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
    rslora: bool = False
    """Scale by alpha / sqrt(rank) instead: high ranks then learn as fast as low ones (arXiv 2312.03732)."""
    dropout: Annotated[float, Field(ge=0, lt=1)] = 0.0
    target_modules: Annotated[tuple[ModuleName, ...], Field(min_length=1)] = ATTENTION
    """Linear modules of the language model that get an adapter; gate_proj, up_proj and down_proj mean the routed experts."""
    layers: tuple[LayerNumber, LayerNumber] | None = None
    """First and last decoder layer that get an adapter, from 0; none: all. The last layers alone are cheaper and forget less. Attention modules only."""
    freeze_vit: bool = True
    """False also adapts the vision tower's attention: for pictures unlike photos. vLLM leaves these weights out where it does not wrap the tower."""
    freeze_aligner: bool = True
    """False also adapts the merger between vision tower and language model; served as `freeze_vit`."""

    def broken_relations(self) -> Iterator[str]:
        if self.layers and self.layers[0] > self.layers[1]:
            yield f"layers: {list(self.layers)} ends before it starts; give [first, last]"
        if self.layers and (others := sorted(set(self.target_modules) - set(ATTENTION))):
            yield f"layers: goes with attention modules only ({', '.join(ATTENTION)}); remove it, or {', '.join(others)}"
        experts = set(self.target_modules) & set(EXPERTS)
        if experts and self.dropout:
            yield f"dropout: must be 0 with {', '.join(sorted(experts))}: peft adapts the routed experts without it"
        if len(experts & {"gate_proj", "up_proj"}) == 1:
            yield "target_modules: gate_proj and up_proj are one fused weight in this model; name both or neither"


class EarlyStopping(Section):
    """Stops when the loss on rows held back from training no longer falls, and keeps the best checkpoint. The recipe's eval rows stay unseen."""

    patience_checkpoints: Annotated[int, Field(ge=1)] = 3
    """Checkpoints without a lower loss before training stops."""
    validation_share: Annotated[float, Field(gt=0, le=0.5)] = 0.05
    """Share of the training rows that is held back."""


class Dpo(Section):
    """Direct preference optimization (arXiv 2305.18290): training rows carry `rejected_response` beside the answer."""

    beta: Annotated[float, Field(gt=0, le=10)] = 0.1
    """How strongly the policy is held to the base; lower moves further away."""
    sft_weight: Annotated[float, Field(ge=0, le=10)] = 0.0
    """Weight of the plain loss on the preferred answer beside the preference loss (RPO); above 0 keeps its likelihood from sinking."""


class Training(Section):
    device: Literal["cpu", "cuda"] = "cuda"
    precision: Literal["float32", "bfloat16"] = "bfloat16"
    epochs: Annotated[float, Field(gt=0)] | None = None
    """Passes over the training rows; 1 if neither this nor max_steps is given."""
    max_steps: Annotated[int, Field(ge=1)] | None = None
    """Optimizer steps, instead of epochs."""
    micro_batch_size: Annotated[int, Field(ge=1)] = 1
    """Rows per process and step of the model; what memory allows."""
    global_batch_size: Annotated[int, Field(ge=1)] = 16
    """Rows per optimizer step, over all processes and accumulation steps."""
    processes: Annotated[int, Field(ge=1)] = 1
    """Training processes on this host, one per GPU."""
    deepspeed: Literal["zero1", "zero2", "zero3", "zero2_offload", "zero3_offload"] | None = None
    """How optimizer state (1), gradients (2) and weights (3) are split over the processes; offload keeps them in host memory.

    Offload needs a C++ compiler (DeepSpeed builds its CPU optimizer at first use) and trains with that optimizer's own betas."""
    learning_rate: Annotated[float, Field(gt=0, le=1)] = 1e-4
    scheduler: Literal["cosine", "linear", "constant_with_warmup"] = "cosine"
    """How the learning rate goes on after the warm-up (of warmup_ratio); cosine and linear fall to 0."""
    warmup_ratio: Annotated[float, Field(ge=0, lt=1)] = 0.05
    """Share of the steps over which the learning rate rises."""
    weight_decay: Annotated[float, Field(ge=0, le=1)] = 0.1
    max_length_tokens: Annotated[int, Field(ge=16)] = 4096
    """Longest row, image tokens included; a longer one is an error, not cut."""
    gradient_checkpointing: bool = True
    """Less memory for about a third more time."""
    offload_checkpoints: bool = False
    """Keeps what gradient checkpointing holds, each layer's input, in host memory: rows about twice as long fit (GLM-4.5V in nf4 on 80 GB: 32,768 tokens) for 2 to 6 % more
    time. Needs device cuda and one process."""
    packing: bool = False
    """Fills each row of a batch up to max_length_tokens with several short ones: no padding. Needs device cuda and flash attention."""
    row_weights: bool = False
    """Rows' `weight` multiplies the loss of their answers' tokens, but not that of the token that ends an answer; without this a row that has one is an error."""
    attention: Literal["sdpa", "flash_attention_2", "flash_attention_3"] = "sdpa"
    """flash_attention_* need the package flash-attn, which our lock does not hold."""
    checkpoint_steps: Annotated[int, Field(ge=1)] = 50
    """Optimizer steps between checkpoints: what a crash can cost."""
    early_stopping: EarlyStopping | None = None
    seed: Annotated[int, Field(ge=0, lt=2**32)] = 42

    def broken_relations(self) -> Iterator[str]:
        step = self.micro_batch_size * self.processes
        if self.global_batch_size % step:
            fits = max(1, self.global_batch_size // step) * step
            yield f"global_batch_size: {self.global_batch_size} is not a multiple of micro_batch_size x processes = {step}; use {fits}"
        if self.epochs is not None and self.max_steps is not None:
            yield "max_steps: stands beside epochs; keep one of the two"
        if self.device == "cpu" and self.deepspeed not in (None, "zero1", "zero2"):
            yield f"deepspeed: {self.deepspeed} needs device: cuda; on the CPU use zero2, or remove it"
        if self.device == "cpu" and self.attention != "sdpa":
            yield f"attention: {self.attention} needs device: cuda; use sdpa"
        if self.offload_checkpoints and not (self.gradient_checkpointing and self.device == "cuda" and self.processes == 1 and self.deepspeed is None):
            yield "offload_checkpoints: needs gradient_checkpointing, device: cuda, one process and no deepspeed; set these, or remove it"
        if self.packing and self.attention == "sdpa":
            yield "packing: needs attention: flash_attention_2 or flash_attention_3, else the rows packed together would see each other"


class Judge(Section):
    """A model that grades answers, behind any OpenAI-compatible chat completions API. It is sent every held-out question, with its wanted answer and the given ones."""

    url: Annotated[str, Field(pattern=r"^https?://[^\s@?#]+$")]
    """The part of its address before `/chat/completions`, for example https://judge.example.com/v1."""
    model: Annotated[str, Field(min_length=1)]
    """As the API names it. It must take `temperature: 0` and `max_tokens`; should see pictures, else set show_images: false; and should not be what was trained."""
    api_key_env: Annotated[str, Field(pattern=r"^[A-Z_][A-Z0-9_]*$")] | None = None
    """Name of the environment variable that holds the API's key when a version is evaluated; never the key itself. None: the API takes no key."""
    instructions: str = ""
    """What the judge is told beside our own instructions: what counts here, and what does not."""
    concurrency: Annotated[int, Field(ge=1, le=256)] = 8
    """Answers that it grades at a time."""
    show_images: bool = True
    """False keeps the pictures here."""


class WatchRules(Section):
    """When a version that `tuneserve promote --watch` has just brought into production is taken out of it again."""

    window_seconds: Annotated[float, Field(ge=1, le=600)] = 10.0
    """What is judged at a time; up to six times as much where fewer than min_samples requests ended in it. Shorter finds a breach sooner and is fooled sooner."""
    min_samples: Annotated[int, Field(ge=2)] = 20
    """Fewer requests decide nothing, and the time in which fewer ended in a window does not count as watched. Five failures decide in any case."""
    max_error_rate_gain: Annotated[float, Field(ge=0, le=1)] = 0.02
    """How much larger than the champion's the share of failed requests may be: 0.02 is two of a hundred. A single failure decides nothing."""
    slowdown: Annotated[float, Field(gt=1)] = 1.8
    """So many times the champion's mean time to first token, per token or per request is a breach. Below 2, because what is measured of a version that takes
    exactly twice as long is below 2 half the time."""
    poll_seconds: Annotated[float, Field(gt=0, le=60)] = 1.0
    """Between two looks at the replicas' counters."""


class PromotionRules(Section):
    """What a version must show on the recipe's held-out rows before it may become champion."""

    metric: Literal["score", "exact_match", "token_f1", "judge"] = "score"
    """score: exact match, but the share of right fields where the answer is a JSON object. token_f1: the overlap of words, for answers in free words.
    judge: the mean of the grades that `judge` gives."""
    judge: Judge | None = None
    """Has another model grade every answer, beside the other metrics; None: no model is asked. It counts for the decision only with metric: judge."""
    minimum_gain: Annotated[float, Field(ge=0, lt=1)] = 0.0
    """How much better than the champion it must surely be: the lower end of the gain's interval must be above this. 0.02 is two points of a hundred."""
    confidence: Annotated[float, Field(ge=0.5, lt=1)] = 0.95
    """Of that interval (paired bootstrap)."""
    floor: Annotated[float, Field(ge=0, le=1)] | None = None
    """The least value of the metric that may be served at all; a model without a champion needs it."""
    protect: tuple[str, ...] = ()
    """Parts of the held-out rows that may not get worse: a `kind` or `slice` of the rows, or `images=2`."""
    allowed_loss: Annotated[float, Field(ge=0, lt=1)] = 0.02
    """By so much the mean over a protected part may fall; with `tuneserve rebase`, the mean over all rows too."""
    max_p95_seconds: Annotated[float, Field(gt=0)] | None = None
    """95 of 100 answers must be there within this, asked 16 at a time."""
    min_examples: Annotated[int, Field(ge=2)] = 20
    """Fewer held-out rows decide nothing."""
    require_parity: bool = True
    """The server must be shown to read and answer prompts as training did (the version's parity.json). False lets a version pass that has no such reference, or whose
    served precision has no known tolerance; one that is shown to be served otherwise is refused all the same."""
    watch: WatchRules = WatchRules()
    """What `--watch` holds a version to once it has users."""
    approval: Literal["automatic", "manual"] = "automatic"
    """manual: `tuneserve retrain` does not promote a version that is better but asks for it, on the version: `tuneserve approve` or `tuneserve reject` answers.
    `tuneserve promote` by hand asks nobody."""
    approval_days: Annotated[float, Field(gt=0, le=365)] = 7
    """A request that nobody has answered by then lapses, and the champion is kept."""

    def broken_relations(self) -> Iterator[str]:
        if self.metric == "judge" and self.judge is None:
            yield "metric: judge needs promotion.judge with url and model; add it, or choose another metric"


class DriftRules(Section):
    """When the champion has become worse than it was: `tuneserve retrain` asks it the rows that people approved since its promotion."""

    rows: Path
    """The file that `tuneserve feedback export` writes; of it, what was approved since the champion was promoted."""
    drop: Annotated[float, Field(gt=0, lt=1)] = 0.05
    """How far the promotion's metric must be below what it was on the held-out rows at promotion; and it must surely be below it (`promotion.confidence`)."""
    minimum_rows: Annotated[int, Field(ge=2)] = 30
    """Fewer tell nothing."""


class FinetuneRecipe(Section):
    """One training run: what to train, on which rows, how, and the name it is registered and served under."""

    name: AdapterName
    base_model: str
    """`tiny` for the built-in tiny GLM-4.5V, else a folder with a GLM-4.5V in Hugging Face's format."""
    quantization: Literal["nf4"] | None = None
    """nf4 holds the frozen base in 4 bits while training, its routed experts too (QLoRA, arXiv 2305.14314); the adapter is served on the unquantized base.

    Keep `training.gradient_checkpointing`: it lets one layer's experts at a time stand in full precision, and not those of all layers."""
    method: Literal["sft", "dpo"] = "sft"
    """sft learns the rows' answers; dpo learns to prefer them to the rows' rejected answers."""
    dataset: DatasetFiles
    lora: Lora = Lora()
    training: Training = Training()
    dpo: Dpo | None = None
    """Settings of method: dpo."""
    promotion: PromotionRules = PromotionRules()
    drift: DriftRules | None = None
    """None: it is not looked for."""
    licence: str | None = None
    """Of the adapter, as its model card should say it; what the base's and the data's licences allow is yours to know."""

    def broken_relations(self) -> Iterator[str]:
        if self.dpo is not None and self.method != "dpo":
            yield "dpo: is read only with method: dpo; remove it, or set the method"
        if self.method == "dpo" and self.training.row_weights:
            yield "training.row_weights: does not go with method: dpo, where ms-swift ignores them; remove it"
        if self.quantization and self.training.deepspeed in ("zero3", "zero3_offload"):
            yield f"training.deepspeed: {self.training.deepspeed} cannot gather 4-bit weights; use zero2, or remove quantization"
        if self.quantization and (experts := sorted(set(self.lora.target_modules) & set(EXPERTS))):
            yield f"lora.target_modules: {', '.join(experts)} mean the routed experts, where peft finds no 4-bit weights to adapt; remove them, or quantization"


class ServedLora(Section):
    """Which adapters a server takes, and how many at once."""

    max_rank: Literal[1, 8, 16, 32, 64, 128, 256, 320, 512] = 16
    """Highest rank that is served; every slot is as large as an adapter of this rank."""
    max_loras: Annotated[int, Field(ge=1)] = 4
    """Adapters in one batch; each slot is preallocated for every wrapped module (GLM-4.5V, rank 16, attention: 60 MiB), and requests for more wait."""
    max_cpu_loras: Annotated[int, Field(ge=1)] = 16
    """Adapters in host memory. Two fewer versions can be called at once: one place is for loading, one for the version that is being forgotten."""
    max_adapter_gib: Annotated[float, Field(gt=0, le=1024)] = 4.0
    """Largest adapter that is fetched (GLM-4.5V at rank 16: attention 63 MB, routed experts 3.1 GB)."""
    target_modules: Annotated[tuple[str, ...], Field(min_length=1)] = ("qkv_proj", "o_proj")
    """vLLM's modules that take adapters; weights for others are refused. The default is attention; routed experts cost 50 times as much GPU memory a slot."""
    fused_kernel: bool | None = None
    """NVIDIA GPUs only: adapters are applied by one kernel of ours, which starts less often and reads less, instead of vLLM's three. None: where that was measured to win, with
    attention adapters of rank 16 on one GPU or two. False: vLLM's, which are tuned to these shapes."""

    def broken_relations(self) -> Iterator[str]:
        if self.max_cpu_loras < self.max_loras + 2:
            yield f"max_cpu_loras: {self.max_cpu_loras} is too few for max_loras {self.max_loras}; use at least {self.max_loras + 2}"

    @property
    def wraps_experts(self) -> bool:
        """Whether routed experts take adapters."""
        return any(module.rpartition(".")[2] == "experts" for module in self.target_modules)


class Sampling(Section):
    """Which answered requests a server keeps for `tuneserve feedback`, in .tuneserve/feedback/samples: questions, answers and the version, readable by its owner alone.

    Headers, users and every other field of a request are never kept, nor are requests for a version by its number, whose pictures are elsewhere (URLs), or with tools.
    """

    share: Annotated[float, Field(gt=0, le=1)]
    """Of the chat requests that adapters answer."""
    keep_days: Annotated[int, Field(ge=1, le=3650)] = 30
    """At most so many days (UTC) a sample is kept, while a server with this setting runs."""
    keep_images: bool = False
    """Also keeps the pictures, each once; without them only their digests are known, and nothing that was asked about a picture can be trained on."""
    max_gib: Annotated[float, Field(gt=0, le=1024)] = 1.0
    """Disk for one server's samples. The oldest days go first; if today's alone are as many, new ones are dropped."""
    redact: Annotated[str, Field(pattern=r"^[A-Za-z_]\w*(\.[A-Za-z_]\w*)+$")] | None = None
    """A function, as module.function, that gets each sample as a dict and returns it with `messages`, `answer` or `images` changed, or None to leave it out; what it
    fails on is left out. It runs in a process of its own and is imported from the project's folder. None: samples are kept as they are."""


class ServingRecipe(Section):
    """One vLLM server that serves a base model and follows registered models."""

    name: AdapterName
    """What `tuneserve` calls this server; its log is vllm-<name>.log."""
    base_model: str
    """As in a finetune recipe. Adapters are refused that were trained on another folder's weights, so also for an FP8 copy of theirs: see `quantization`."""
    served_name: Annotated[str, Field(min_length=1)] = "glm-4.5v"
    """What clients call the base."""
    follow: tuple[AdapterName, ...] = ()
    """Registered models; each one's version under the alias `champion` is served under the model's name."""
    follow_tag: Annotated[str, Field(pattern=r"^[A-Za-z0-9_. /-]+=[^'\"`]+$")] | None = None
    """`key=value`: every registered model with that tag in MLflow is followed too, from the moment that it has it."""
    device: Literal["cpu", "cuda"] = "cuda"
    """cuda for GPUs."""
    host: str = "127.0.0.1"
    """Address to listen on; 0.0.0.0 lets other machines ask."""
    port: Annotated[int, Field(ge=0, le=65535)] = 8000
    """0 takes 8000 if it is free, else any free port."""
    precision: Literal["float32", "bfloat16"] = "bfloat16"
    """Of activations, and of weights that are not quantized."""
    quantization: Literal["fp8_per_tensor", "fp8_per_channel"] | None = None
    """Quantizes the base's weights while loading, which halves them (GLM-4.5V: 102 instead of 201 GiB); per channel is finer, and faster for few requests at a time.
    Adapters stay in `precision` and are those trained on the unquantized folder. Needs GPUs."""
    max_model_len_tokens: Annotated[int, Field(ge=16)] = 16384
    """Longest request, answer included; a longer one is refused. GLM-4.5V can 65,536; the KV cache must hold at least one such request."""
    max_num_batched_tokens: Annotated[int, Field(ge=16)] | None = None
    """Tokens in one step: a longer prompt is read in chunks of this, between other requests' answers. Higher answers long prompts sooner and holds up
    running answers for longer. None: vLLM's own (8192 on an H100 or H200, 2048 on a CPU)."""
    max_num_seqs: Annotated[int, Field(ge=1)] | None = None
    """Requests answered at once; more wait. Higher is more throughput and slower answers. None: vLLM's own (1024 on an H100 or H200, 128 on a CPU)."""
    graph_tokens: Annotated[int, Field(ge=1, le=8192)] | None = None
    """GPUs only: steps of up to so many tokens run as CUDA graphs. Set it above a usual prompt: outside a graph a step takes as long as Python needs to start every GPU kernel of 46
    layers. None: vLLM's own, which is twice max_num_seqs, at most 512."""
    picture_graphs: bool = False
    """GPUs only: the vision tower runs as CUDA graphs for up to four pictures of together 1,024 tokens (448x448 is 256); larger ones run without."""
    prefix_caching: bool = True
    """Keeps the KV cache of common beginnings (system prompt, an image asked about again). False for clients that must not learn from timing what others asked."""
    max_images: Annotated[int, Field(ge=0)] = 4
    """Per request."""
    image_cache_gib: Annotated[float, Field(ge=0, le=1024)] = 4.0
    """Host memory for processed images, so that one that was seen is not processed again. 0: none."""
    kv_cache_gib: Annotated[int, Field(ge=1)] = 1
    """CPU only; on a GPU it is what gpu_memory_utilization leaves."""
    gpu_memory_utilization: Annotated[float, Field(gt=0, le=0.95)] = 0.9
    """Share of each GPU's memory for weights, adapter slots, activations and KV cache together."""
    tensor_parallel_size: Annotated[int, Field(ge=1)] = 1
    """GPUs over which every layer is split."""
    expert_parallel: bool = False
    """Gives each GPU whole experts instead of a slice of every expert."""
    vision_data_parallel: bool = False
    """Gives each GPU the whole vision tower and a share of the images, instead of a slice of the tower: less traffic between GPUs, for about 1.2 GiB more on each of four."""
    allowed_media_domains: tuple[str, ...] = ()
    """Hosts that image URLs may name; none: data URLs only."""
    poll_seconds: Annotated[float, Field(ge=0.05, le=60)] = 1.0
    """How often the registry is asked."""
    first_sync_seconds: Annotated[float, Field(ge=0, le=600)] = 20.0
    """How long the first look at the registry may hold back the server's start."""
    forget_after_seconds: Annotated[float, Field(ge=0, le=86400)] = 60.0
    """How long a version that nothing wants any more is kept loaded; less where its place is needed sooner and no request can still mean it."""
    adapter_cache_gib: Annotated[float, Field(gt=0, le=4096)] = 8.0
    """Disk for fetched adapters; the ones that were not used for longest go first, and never one that is loaded."""
    sticky_header: Annotated[str, Field(pattern=r"^[A-Za-z0-9-]{1,64}$")] | None = "X-User-Id"
    """During a canary a caller stays on one side: by the request's `user`, else by this header, else each request is drawn anew."""
    disabled_answers: Literal["error", "base", "previous"] = "error"
    """What a name that was switched off (`tuneserve disable`) answers with: an error that says so, the base, or the champion before (an error if there is none)."""
    drain_seconds: Annotated[int, Field(ge=0, le=3600)] = 3
    """On SIGTERM, how long running answers may take to end; new requests are refused meanwhile."""
    replicas: tuple[ReplicaAddress, ...] = ()
    """Where this server's copies listen, for `promote`, `canary`, `disable`, `rollback` and `status`: `http://host:port`, or `dns://host:port` for every address
    that the name has. None: this project's running servers."""
    evaluation_replica: ReplicaAddress | None = None
    """A replica of the same base that follows the same models and no user asks: `evaluate` and `promote` ask it the held-out questions, so that users' replicas are
    not slowed. A version on trial is still loaded by every replica that follows its model, but only this one is waited for and asked. None: one of `replicas`."""
    unreachable_replicas: Literal["report", "fail"] = "report"
    """What a promotion does about replicas that cannot be reached: they look at the registry before they are ready, so it is enough to report them; or it fails."""
    sampling: Sampling | None = None
    """None: no request is kept."""
    lora: ServedLora = ServedLora()

    def broken_relations(self) -> Iterator[str]:
        if not (self.follow or self.follow_tag):
            yield "follow: names no registered model; name one, or set follow_tag"
        if len(set(self.follow)) < len(self.follow):
            yield "follow: names a model twice; name each once"
        yield from (f"follow: {fault}" for name in self.follow if (fault := name_fault(name, {self.served_name})))
        if self.lora.wraps_experts and self.device == "cpu":
            yield "lora.target_modules: no adapters for routed experts on a CPU; remove experts, or serve with device: cuda"
        of_gpus = {field: getattr(self, field) for field in ("quantization", "graph_tokens", "picture_graphs")} | {"lora.fused_kernel": self.lora.fused_kernel}
        if self.device == "cpu":
            yield from (f"{field}: needs device: cuda; remove it to serve on the CPU" for field, value in of_gpus.items() if value)
        if self.precision == "float32":
            of_bfloat16 = {"quantization": self.quantization, "lora.fused_kernel": self.lora.fused_kernel}
            yield from (f"{field}: {value} goes with precision: bfloat16 only" for field, value in of_bfloat16.items() if value)
        for field in ("expert_parallel", "vision_data_parallel"):
            if getattr(self, field) and self.tensor_parallel_size == 1:
                yield f"{field}: needs tensor_parallel_size above 1; remove it to serve on one GPU"
        if self.graph_tokens and self.graph_tokens < (self.max_num_seqs or 0):
            yield f"graph_tokens: {self.graph_tokens} is fewer than max_num_seqs {self.max_num_seqs}, whose answers are one step; use at least as many"
        if self.graph_tokens and self.max_num_batched_tokens and self.graph_tokens > self.max_num_batched_tokens:
            yield f"graph_tokens: {self.graph_tokens} is more than a step has: max_num_batched_tokens is {self.max_num_batched_tokens}"
        if self.picture_graphs and not self.max_images:
            yield "picture_graphs: with max_images: 0 there are no pictures; remove it"
        if self.max_num_seqs and self.max_num_batched_tokens and self.max_num_batched_tokens < self.max_num_seqs:
            yield f"max_num_batched_tokens: {self.max_num_batched_tokens} is fewer than max_num_seqs {self.max_num_seqs}; each answer takes a token a step"


NOT_QUOTED = {
    "api_key_env": "give the name of an environment variable, in capitals, never the key itself",
    "url": "give the part of the address before /chat/completions, without credentials",
}
"""Keys whose wrong value may be a secret, with what to do."""
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
        raise InvalidInput([fault for details in error.errors() for fault in _faults(str(path), kind, details)]) from error


def check_recipe(path: Path) -> tuple[list[Fault], DatasetFiles | None]:
    """What is wrong with a finetune or serving recipe (told apart by the keys that only one of them has), and its dataset's files as far as they are named right."""
    data = _loosely(path)
    serving = is_serving(data)
    faults: list[Fault] = []
    try:
        load_recipe(path, ServingRecipe) if serving else load_recipe(path, FinetuneRecipe)
    except InvalidInput as error:
        faults += error.faults
    try:
        return faults, None if serving or "dataset" not in data else DatasetFiles.model_validate(data["dataset"])
    except ValidationError:
        return faults, None


def load_either(path: Path) -> Recipe:
    """The finetune or serving recipe in the YAML file `path`; raises as `load_recipe`."""
    return load_recipe(path, ServingRecipe) if is_serving(_loosely(path)) else load_recipe(path, FinetuneRecipe)


def is_serving(data: dict[str, Any]) -> bool:
    """Whether a recipe's content is rather a serving recipe's: told by the keys that only one of the two kinds has."""
    own_serving, own_finetune = (set(a.model_fields) - set(b.model_fields) for a, b in ((ServingRecipe, FinetuneRecipe), (FinetuneRecipe, ServingRecipe)))
    return len(set(data) & own_serving) > len(set(data) & own_finetune)


def _loosely(path: Path) -> dict[str, Any]:
    """The mapping in the YAML file `path`; empty if there is none."""
    try:
        data = yaml.safe_load(path.read_text("utf-8"))
    except (OSError, UnicodeDecodeError, yaml.YAMLError):
        return {}
    return data if isinstance(data, dict) else {}


def dump_recipe(recipe: Recipe) -> str:
    """The recipe as YAML with every default written out: what actually ran."""
    return yaml.safe_dump(recipe.model_dump(mode="json"), sort_keys=False, allow_unicode=True)


def _faults(file: str, kind: type[Recipe], details: ErrorDetails) -> list[Fault]:
    """One of pydantic's findings, or each relation that one of them names."""
    location = ".".join(str(part) for part in details["loc"])
    if details["type"] == "value_error" and isinstance(details["input"], dict):  # a relation between fields names its field first
        broken = (line.partition(": ") for line in details["msg"].removeprefix("Value error, ").split("\n"))
        return [Fault(file, f"{location}.{field}".lstrip("."), message) for field, _, message in broken]
    return [_fault(file, kind, details)]


def _fault(file: str, kind: type[Recipe], details: ErrorDetails) -> Fault:
    """One finding about one field in our words, with what was probably meant."""
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
    if remedy := NOT_QUOTED.get(location[-1]):
        return Fault(file, ".".join(location), f"{message[:1].lower()}{message[1:]}; {remedy}")
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
