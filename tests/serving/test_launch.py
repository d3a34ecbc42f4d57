"""What vLLM is told for a serving recipe, and what must not be set around it."""

import json
import stat
from pathlib import Path

import pytest

from pipeline.basemodel import TEMPLATE_FILE, BaseModel
from pipeline.errors import ServingError
from pipeline.process import GRACE_SECONDS
from pipeline.project import Project
from pipeline.recipe import Sampling, ServingRecipe, load_recipe
from pipeline.serving.launch import END_GRACE_SECONDS, LORA_KERNELS, adapters_token, replica, sampling_settings, serve_args, serve_environment
from pipeline.serving.settings import SETTINGS_VARIABLE
from tests.conftest import ROOT

EMBEDDED = load_recipe(ROOT / "recipes/serving/tiny-cpu.yaml", ServingRecipe)


def option(args: list[str], name: str) -> str:
    return args[args.index(name) + 1]


FIXED = f"--chat-template {TEMPLATE_FILE} --chat-template-content-format openai"
ANSWERS = "1 2 4 8 16 24 32 40 48 56 64"
PROMPTS_512 = "192 256 320 384 448 512"
PROMPTS = f"{PROMPTS_512} 576 640 704 768 832 896 960 1024"
PICTURES = """--compilation-config
    {"cudagraph_mm_encoder":true,"encoder_cudagraph_token_budgets":[256,512,1024],"encoder_cudagraph_max_vision_items_per_batch":4}"""
GOLDEN = {
    "tiny-cpu": f"""--model /base --served-model-name glm-4.5v --host 127.0.0.1 --port 8000 --dtype bfloat16
        --tensor-parallel-size 1 --max-model-len 2048 --enable-chunked-prefill --enable-prefix-caching
        --limit-mm-per-prompt {{"image":2,"video":0}} --mm-processor-cache-gb 4.0 {FIXED} --allowed-media-domains none.invalid
        --enable-lora --max-lora-rank 16 --max-loras 4 --max-cpu-loras 16 --lora-target-modules qkv_proj o_proj --worker-extension-cls pipeline.serving.adapter_worker.AdapterWorker
        --shutdown-timeout 3 --enforce-eager""",
    "glm-4.5v-h200-fp8": f"""--model /base --served-model-name glm-4.5v --host 127.0.0.1 --port 8000 --dtype bfloat16 --quantization fp8_per_channel
        --tensor-parallel-size 1 --max-model-len 16384 --enable-chunked-prefill --max-num-batched-tokens 512 --max-num-seqs 64 --enable-prefix-caching
        --limit-mm-per-prompt {{"image":4,"video":0}} --mm-processor-cache-gb 8.0 {FIXED} --allowed-media-domains none.invalid
        --enable-lora --max-lora-rank 16 --max-loras 8 --max-cpu-loras 32 --lora-target-modules qkv_proj o_proj --worker-extension-cls pipeline.serving.adapter_worker.AdapterWorker
        --shutdown-timeout 3 --gpu-memory-utilization 0.92 --cudagraph-capture-sizes {ANSWERS} 128 {PROMPTS_512} {PICTURES}""",
    "glm-4.5v-4xh100": f"""--model /base --served-model-name glm-4.5v --host 127.0.0.1 --port 8000 --dtype bfloat16
        --tensor-parallel-size 4 --enable-expert-parallel --mm-encoder-tp-mode data
        --max-model-len 32768 --enable-chunked-prefill --max-num-batched-tokens 8192 --max-num-seqs 128 --enable-prefix-caching
        --limit-mm-per-prompt {{"image":4,"video":0}} --mm-processor-cache-gb 8.0 {FIXED} --allowed-media-domains none.invalid
        --enable-lora --max-lora-rank 16 --max-loras 8 --max-cpu-loras 32 --lora-target-modules qkv_proj o_proj --worker-extension-cls pipeline.serving.adapter_worker.AdapterWorker
        --shutdown-timeout 3 --gpu-memory-utilization 0.9 --cudagraph-capture-sizes {ANSWERS} 72 80 88 96 104 112 120 128 {PROMPTS}""",
}
GOLDEN["glm-4.5v-2xh200"] = (
    GOLDEN["glm-4.5v-h200-fp8"]
    .replace("--quantization fp8_per_channel", "")
    .replace("--tensor-parallel-size 1 --max-model-len 16384", "--tensor-parallel-size 2 --max-model-len 32768")
    .replace("--max-num-batched-tokens 512", "--max-num-batched-tokens 1024")
    .replace(PROMPTS_512, PROMPTS)
)
GOLDEN["production"] = GOLDEN["glm-4.5v-h200-fp8"].replace("127.0.0.1", "0.0.0.0").replace("--shutdown-timeout 3", "--shutdown-timeout 60")  # noqa: S104


@pytest.mark.parametrize("path", sorted((ROOT / "recipes/serving").glob("*.yaml")), ids=lambda path: path.stem)
def test_every_shipped_recipes_arguments(path: Path) -> None:
    args = serve_args(load_recipe(path, ServingRecipe), Path("/base"), 8000)
    assert [argument.replace(" ", "") for argument in args] == GOLDEN[path.stem].split()
    if path.stem != "production":
        assert option(args, "--shutdown-timeout") == "3" and 3 + END_GRACE_SECONDS <= GRACE_SECONDS  # Ctrl-C is over in 10 s


def test_without_domains_no_image_url_is_fetched() -> None:
    assert option(serve_args(EMBEDDED, Path("/base"), 1), "--allowed-media-domains") == "none.invalid"
    open_ = EMBEDDED.model_copy(update={"allowed_media_domains": ("img.example",)})
    assert option(serve_args(open_, Path("/base"), 1), "--allowed-media-domains") == "img.example"


def test_graphs_for_prompts_and_pictures_are_asked_for() -> None:
    own = serve_args(EMBEDDED.model_copy(update={"device": "cuda"}), Path("/base"), 1)
    assert not {"--cudagraph-capture-sizes", "--compilation-config"} & set(own)
    args = serve_args(EMBEDDED.model_copy(update={"device": "cuda", "graph_tokens": 96, "max_num_seqs": 16, "picture_graphs": True}), Path("/base"), 1)
    sizes = args.index("--cudagraph-capture-sizes")
    assert args[sizes + 1 : sizes + 8] == ["1", "2", "4", "8", "16", "64", "96"]
    assert json.loads(args[args.index("--compilation-config") + 1])["cudagraph_mm_encoder"] is True


def test_prefix_caching_can_be_off() -> None:
    args = serve_args(EMBEDDED.model_copy(update={"prefix_caching": False}), Path("/base"), 1)
    assert "--no-enable-prefix-caching" in args and "--enable-prefix-caching" not in args


def test_on_gpus_nothing_of_the_cpu_is_set() -> None:
    recipe = EMBEDDED.model_copy(update={"device": "cuda"})
    assert not [name for name in serve_environment(recipe, Path("s")) if name.startswith("VLLM_CPU")]


@pytest.mark.parametrize(
    ("recipe", "lora", "tuned"),
    [
        ({"device": "cuda"}, {}, True),
        ({}, {}, False),
        ({"device": "cuda", "tensor_parallel_size": 2}, {}, True),
        ({"device": "cuda", "tensor_parallel_size": 4}, {}, False),
        ({"device": "cuda"}, {"max_rank": 64}, False),
        ({"device": "cuda"}, {"target_modules": ("qkv_proj", "o_proj", "experts")}, False),
    ],
)
def test_tuned_kernels_are_for_the_shapes_that_they_were_tuned_for(
    recipe: dict[str, object], lora: dict[str, object], tuned: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delenv("VLLM_TUNED_CONFIG_FOLDER", raising=False)
    changed = EMBEDDED.model_copy(update=recipe | {"lora": EMBEDDED.lora.model_copy(update={"max_rank": 16, **lora})})
    assert serve_environment(changed, Path("s")).get("VLLM_TUNED_CONFIG_FOLDER") == (str(LORA_KERNELS) if tuned else None)
    monkeypatch.setenv("VLLM_TUNED_CONFIG_FOLDER", "/theirs")
    assert "VLLM_TUNED_CONFIG_FOLDER" not in serve_environment(changed, Path("s"))


@pytest.mark.parametrize(
    ("recipe", "lora", "fused"),
    [
        ({}, {}, False),
        ({"device": "cuda"}, {}, True),
        ({"device": "cuda"}, {"fused_kernel": False}, False),
        ({"device": "cuda", "tensor_parallel_size": 2}, {}, True),
        ({"device": "cuda", "tensor_parallel_size": 4}, {}, False),
        ({"device": "cuda", "tensor_parallel_size": 4}, {"fused_kernel": True}, True),
        ({"device": "cuda"}, {"max_rank": 64}, False),
        ({"device": "cuda", "precision": "float32"}, {}, False),
    ],
)
def test_our_kernel_applies_adapters_where_it_was_measured_or_asked_for(
    recipe: dict[str, object], lora: dict[str, object], fused: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("VLLM_PLUGINS", "tuneserve_gpu_lora,theirs")
    changed = EMBEDDED.model_copy(update=recipe | {"lora": EMBEDDED.lora.model_copy(update={"max_rank": 16, **lora})})
    plugins = serve_environment(changed, Path("s"))["VLLM_PLUGINS"].split(",")
    assert ("tuneserve_gpu_lora" in plugins) == fused and plugins[-1] == "theirs" and len(set(plugins)) == len(plugins)


def test_the_users_own_plugins_stay(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("VLLM_PLUGINS", "theirs,tuneserve")
    environment = serve_environment(EMBEDDED, Path("/settings"))
    assert environment["VLLM_PLUGINS"] == "tuneserve_cpu_moe,tuneserve_cpu_lora,tuneserve_lora_indices,tuneserve,theirs"
    assert environment[SETTINGS_VARIABLE] == "/settings"


def test_open_doors_in_the_environment_are_refused(project: Project, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("VLLM_ALLOW_RUNTIME_LORA_UPDATING", "1")
    with pytest.raises(ServingError, match="VLLM_ALLOW_RUNTIME_LORA_UPDATING.*unset it"), replica(project, EMBEDDED, BaseModel(Path("/b"), "r"), "http://m"):
        pass


def test_the_token_is_made_once_and_is_its_owners_only(project: Project) -> None:
    path = adapters_token(project)
    first = path.read_text("utf-8")
    assert adapters_token(project).read_text("utf-8") == first and len(first) >= 32
    assert stat.S_IMODE(path.stat().st_mode) == 0o600


def test_what_is_sampled_is_what_the_recipe_says(project: Project) -> None:
    assert EMBEDDED.sampling is None, "off by default"
    asked = Sampling(share=0.25, keep_days=7, max_gib=0.5, redact="shop.redact")
    found = sampling_settings(asked, project.samples / "tiny-cpu")
    assert found.model_dump() == {
        "folder": project.root / ".tuneserve/feedback/samples/tiny-cpu",
        "share": 0.25,
        "keep_days": 7,
        "keep_images": False,
        "max_bytes": 2**29,
        "redact": "shop.redact",
    }
