"""A serving recipe as a running vLLM server: `serve_args` says what to run, `replica` runs it."""

import contextlib
import hashlib
import json
import os
import secrets
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

from pipeline.basemodel import TEMPLATE_FILE, BaseModel, template_digest
from pipeline.errors import ServingError
from pipeline.project import TOKEN_VARIABLE, Project
from pipeline.recipe import Sampling, ServingRecipe, dump_recipe
from pipeline.services import Service, free_port, require_free_port, service
from pipeline.serving.settings import SETTINGS_VARIABLE, FollowerSettings, SamplingSettings
from pipeline.serving_memory import graph_sizes

SERVICE_PREFIX = "vllm-"
PLUGINS = ("tuneserve_cpu_moe", "tuneserve_cpu_lora", "tuneserve_lora_indices", "tuneserve")
"""Each does something only where it is needed."""
FUSED_KERNEL_PLUGIN = "tuneserve_gpu_lora"
FORBIDDEN = {
    "VLLM_ALLOW_RUNTIME_LORA_UPDATING": "opens endpoints that let any client load any folder",
    "VLLM_SKIP_MODEL_NAME_VALIDATION": "answers unknown names from the base model",
}
LORA_KERNELS = Path(__file__).parent / "lora_kernels"
"""Tuned configurations of vLLM's LoRA kernels, by GPU, made by tests/acceptance/gpu/tune_lora.py on an H100 for eight attention adapters of rank 16 on one GPU, and compared with vLLM's on
an H200, and over two, too. Other GPUs use vLLM's defaults."""
PICTURE_GRAPH_TOKENS, PICTURE_GRAPH_PICTURES = (256, 512, 1024), 4
"""What the vision tower's graphs are captured for; a 448x448 picture is 256 tokens. Measured so."""
TUNED_RANK, TUNED_MODULES, TUNED_GPUS = 16, {"qkv_proj", "o_proj"}, 2
END_GRACE_SECONDS = 1.0
"""What vLLM gets to end after it has drained, before everything is killed."""
START_SECONDS = {"cpu": 600.0, "cuda": 1800.0}
"""Until the server is ready: 45-110 s on two CPU cores, over 300 s if several start there at once; loading 214 GB onto GPUs takes minutes."""


def serve_args(recipe: ServingRecipe, base: Path, port: int) -> list[str]:
    """The arguments of vLLM's OpenAI server (0.32) for a recipe; pure."""
    args = ["--model", str(base), "--served-model-name", recipe.served_name, "--host", recipe.host, "--port", str(port)]
    args += ["--dtype", recipe.precision]
    args += ["--quantization", recipe.quantization] if recipe.quantization else []
    args += _parallel_args(recipe) + _batch_args(recipe)
    args += ["--limit-mm-per-prompt", json.dumps({"image": recipe.max_images, "video": 0}), "--mm-processor-cache-gb", str(recipe.image_cache_gib)]
    args += ["--chat-template", str(TEMPLATE_FILE), "--chat-template-content-format", "openai"]
    args += ["--allowed-media-domains", *(recipe.allowed_media_domains or ("none.invalid",))]
    lora = recipe.lora
    args += ["--enable-lora", "--max-lora-rank", str(lora.max_rank), "--max-loras", str(lora.max_loras), "--max-cpu-loras", str(lora.max_cpu_loras)]
    args += ["--lora-target-modules", *lora.target_modules]
    args += ["--enable-mixed-moe-lora-format"] if lora.wraps_experts else []  # takes experts' adapters in either layout
    args += ["--worker-extension-cls", "pipeline.serving.adapter_worker.AdapterWorker"]
    args += ["--shutdown-timeout", str(recipe.drain_seconds)]
    args += ["--enforce-eager"] if recipe.device == "cpu" else ["--gpu-memory-utilization", str(recipe.gpu_memory_utilization), *_graph_args(recipe)]
    return args


def _parallel_args(recipe: ServingRecipe) -> list[str]:
    args = ["--tensor-parallel-size", str(recipe.tensor_parallel_size)]
    args += ["--enable-expert-parallel"] if recipe.expert_parallel else []
    args += ["--mm-encoder-tp-mode", "data"] if recipe.vision_data_parallel else []
    return args


def _batch_args(recipe: ServingRecipe) -> list[str]:
    """Chunked prefill is always on: without it one long prompt holds up everybody's answers, and vLLM warns that it may crash."""
    args = ["--max-model-len", str(recipe.max_model_len_tokens), "--enable-chunked-prefill"]
    args += ["--max-num-batched-tokens", str(recipe.max_num_batched_tokens)] if recipe.max_num_batched_tokens else []
    args += ["--max-num-seqs", str(recipe.max_num_seqs)] if recipe.max_num_seqs else []
    args += ["--enable-prefix-caching" if recipe.prefix_caching else "--no-enable-prefix-caching"]
    return args


def _graph_args(recipe: ServingRecipe) -> list[str]:
    args = ["--cudagraph-capture-sizes", *map(str, graph_sizes(recipe.graph_tokens, recipe.max_num_seqs))] if recipe.graph_tokens else []
    if recipe.picture_graphs:
        most = {"encoder_cudagraph_token_budgets": PICTURE_GRAPH_TOKENS, "encoder_cudagraph_max_vision_items_per_batch": PICTURE_GRAPH_PICTURES}
        args += ["--compilation-config", json.dumps({"cudagraph_mm_encoder": True, **most})]
    return args


def serve_environment(recipe: ServingRecipe, settings: Path) -> dict[str, str]:
    """What vLLM and our plugin read from the environment for a recipe; pure but for the user's own VLLM_PLUGINS and VLLM_TUNED_CONFIG_FOLDER, which are kept."""
    plugins = [*PLUGINS, FUSED_KERNEL_PLUGIN] if _fuses(recipe) else [*PLUGINS]
    own = [name for name in os.environ.get("VLLM_PLUGINS", "").split(",") if name and name not in (*PLUGINS, FUSED_KERNEL_PLUGIN)]
    environment = {"VLLM_PLUGINS": ",".join([*plugins, *own]), "HF_HUB_OFFLINE": "1", SETTINGS_VARIABLE: str(settings)}
    environment["VLLM_MEDIA_URL_ALLOW_REDIRECTS"] = "0"  # an allowed domain must not lead to one that is not
    if recipe.device == "cpu":
        environment["VLLM_CPU_OMP_THREADS_BIND"] = "nobind"
        environment["VLLM_CPU_KVCACHE_SPACE"] = str(recipe.kv_cache_gib)
    elif "VLLM_TUNED_CONFIG_FOLDER" not in os.environ and _as_tuned(recipe):
        environment["VLLM_TUNED_CONFIG_FOLDER"] = str(LORA_KERNELS)
    return environment


def _fuses(recipe: ServingRecipe) -> bool:
    """Whether adapters go through our kernel (gpu_lora.py): as the recipe says, or where it was measured, which is for the shapes that vLLM's were tuned for."""
    if recipe.device == "cpu" or recipe.lora.fused_kernel is not None:
        return bool(recipe.lora.fused_kernel)
    return recipe.precision == "bfloat16" and _as_tuned(recipe)


def _as_tuned(recipe: ServingRecipe) -> bool:
    """vLLM takes the nearest shape that a configuration names, however far, so it gets ours for no others than were measured: half of them, over two GPUs, are near enough."""
    return recipe.lora.max_rank == TUNED_RANK and set(recipe.lora.target_modules) == TUNED_MODULES and recipe.tensor_parallel_size <= TUNED_GPUS


def adapters_token(project: Project) -> Path:
    """The file with the token for the /adapters routes. The project's own is made at first use, readable by its owner only.

    Raises ServingError if $TUNESERVE_TOKEN_FILE names one that is not there: replicas with a token that nobody else has would take no hint.
    """
    path = project.token
    if os.environ.get(TOKEN_VARIABLE):
        if not path.is_file():
            raise ServingError(f"{TOKEN_VARIABLE}: {path} is not there; put the token of all replicas into it (openssl rand -hex 32), or unset the variable")
        return path
    with contextlib.suppress(FileExistsError):
        path.parent.mkdir(parents=True, exist_ok=True)
        with os.fdopen(os.open(path, os.O_CREAT | os.O_EXCL | os.O_WRONLY, 0o600), "w") as file:
            file.write(secrets.token_urlsafe(32))
    return path


def sampling_settings(sampling: Sampling, folder: Path) -> SamplingSettings:
    return SamplingSettings(
        folder=folder,
        share=sampling.share,
        keep_days=sampling.keep_days,
        keep_images=sampling.keep_images,
        max_bytes=int(sampling.max_gib * 2**30),
        redact=sampling.redact,
    )


@contextlib.contextmanager
def replica(project: Project, recipe: ServingRecipe, base: BaseModel, mlflow_uri: str, waiting: Callable[[], None] = lambda: None) -> Iterator[Service]:
    """A vLLM server of `recipe`, found or started, that follows the registry at `mlflow_uri` and is ready.

    Raises ServingError (port taken, forbidden environment) or ProcessFailed (vLLM's own failure, with its log's tail).
    """
    for variable, reason in FORBIDDEN.items():
        if os.environ.get(variable):
            raise ServingError(f"{variable} is set: it {reason}; unset it")
    if not mlflow_uri.startswith(("http://", "https://")):
        raise ServingError(
            f"MLFLOW_TRACKING_URI is {mlflow_uri}: a replica follows an MLflow server only; give its http(s) URL, or unset it for the embedded one"
        )
    name = SERVICE_PREFIX + recipe.name
    settings = FollowerSettings(
        mlflow_uri=mlflow_uri,
        models=recipe.follow,
        base_revision=base.revision,
        template_digest=template_digest(),
        base_folder=base.folder,
        state_dir=project.state / "serving" / recipe.name,
        token_file=adapters_token(project),
        follow_tag=recipe.follow_tag,
        poll_seconds=recipe.poll_seconds,
        first_sync_seconds=recipe.first_sync_seconds,
        forget_after_seconds=recipe.forget_after_seconds,
        cache_bytes=int(recipe.adapter_cache_gib * 2**30),
        max_adapter_bytes=int(recipe.lora.max_adapter_gib * 2**30),
        sticky_header=recipe.sticky_header,
        disabled_answers=recipe.disabled_answers,
        float32=recipe.precision == "float32",
        max_rank=recipe.lora.max_rank,
        max_loras=recipe.lora.max_loras,
        max_cpu_loras=recipe.lora.max_cpu_loras,
        target_modules=recipe.lora.target_modules,
        wraps_experts=recipe.lora.wraps_experts,
        sampling=sampling_settings(recipe.sampling, project.samples / recipe.name) if recipe.sampling else None,
    )
    settings_file = project.services / f"{name}.settings"

    def command() -> tuple[list[str], str]:
        port = require_free_port(recipe.host, recipe.port) if recipe.port else free_port(8000)
        settings_file.write_text(settings.model_dump_json(indent=2), "utf-8")
        argv = [sys.executable, "-m", "vllm.entrypoints.openai.api_server", *serve_args(recipe, base.folder, port)]
        return argv, f"http://{recipe.host}:{port}"

    identity = hashlib.sha256((dump_recipe(recipe) + settings.model_dump_json()).encode()).hexdigest()[:16]
    with service(
        project,
        name,
        identity=identity,
        command=command,
        health="/adapters/ready",
        headers={"Authorization": f"Bearer {settings.token_file.read_text('utf-8').strip()}"},
        environment=serve_environment(recipe, settings_file),
        start_seconds=START_SECONDS[recipe.device],
        grace_seconds=recipe.drain_seconds + END_GRACE_SECONDS,
        waiting=waiting,
    ) as up:
        yield up
