"""`tuneserve inspect` and a zoo of adapters made by real PEFT: each gets exactly its reasons, and good ones get none."""

import copy
import json
import math
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import IA3Config, PromptTuningConfig, get_peft_model
from safetensors.torch import load_file, save_file
from transformers import Glm4vMoeForConditionalGeneration

from pipeline import tinyglm
from tests.inspecting import codes, inspect, make_home
from tests.peft_adapters import ATTENTION, FUSED, lora, make_model, rename, save, single_experts

pytestmark = pytest.mark.contract
WEIGHTS = "adapter_model.safetensors"
EXPERT_PARAMETERS = ["mlp.experts.gate_up_proj", "mlp.experts.down_proj"]


@pytest.fixture(scope="module")
def model() -> Glm4vMoeForConditionalGeneration:
    return make_model()


@pytest.fixture(scope="module")
def home(model: Glm4vMoeForConditionalGeneration, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A project with an attention-only server, one that wraps experts, their base, and a base of the same shapes and other weights."""
    home = make_home(tmp_path_factory.mktemp("project"))
    other = copy.deepcopy(model)
    with torch.no_grad():
        other.lm_head.weight.add_(1)
    for name, base in (("base", model), ("other", other)):
        base.save_pretrained(home / name)
        tinyglm.make_tokenizer().save_pretrained(home / name)
    return home


def asked(home: Path, folder: Path, server: str = "attention") -> tuple[int, dict[str, Any]]:
    return inspect(home, str(folder), "--serving", str(home / f"recipes/serving/{server}.yaml"))


@pytest.mark.parametrize(
    ("settings", "dtype", "server"),
    [
        ({}, torch.float32, "attention"),
        ({}, torch.bfloat16, "attention"),
        ({}, torch.float16, "attention"),
        ({}, torch.float32, "experts"),
        ({"use_rslora": True}, torch.float32, "attention"),
        ({"rank_pattern": {"q_proj": 2, r"layers\.1\.self_attn\.o_proj": 16}}, torch.float32, "attention"),
        ({"alpha_pattern": {"k_proj": 1, "layers.0.self_attn.v_proj": 32}}, torch.float32, "attention"),
        ({"init_lora_weights": "gaussian"}, torch.float32, "attention"),
        ({"init_lora_weights": "orthogonal"}, torch.float32, "attention"),
        ({"target_modules": ["o_proj"], "layers_to_transform": [1], "layers_pattern": "layers"}, torch.float32, "attention"),
        ({"target_modules": r".*language_model\.layers\.1\.self_attn\.o_proj"}, torch.float32, "attention"),
        ({"r": 1, "lora_dropout": 0.3}, torch.float32, "attention"),
        ({"target_modules": FUSED}, torch.float32, "experts"),
        ({"target_modules": FUSED, "r": 8}, torch.bfloat16, "experts"),
        ({"target_modules": [*ATTENTION, *FUSED], "use_rslora": True}, torch.float32, "experts"),
        ({"target_modules": [], "target_parameters": EXPERT_PARAMETERS, "r": 16}, torch.float32, "experts"),
    ],
)
def test_good_adapters_raise_no_alarm(settings: dict[str, Any], dtype: torch.dtype, server: str, home: Path, model: Any, tmp_path: Path) -> None:
    folder = save(model, tmp_path / "a", lora(**settings), dtype)
    code, answer = asked(home, folder, server)
    assert (code, codes(answer)) == (0, [])
    assert answer["against"]["base_known"] and answer["against"]["server"] == server and not answer["against"]["notes"]
    adapter = answer["adapter"]
    weights = load_file(folder / WEIGHTS)
    assert adapter["parameters"] == sum(value.numel() for value in weights.values()) and adapter["tensors"] == len(weights)
    assert list(adapter["dtypes"]) == [{torch.float32: "F32", torch.bfloat16: "BF16", torch.float16: "F16"}[dtype]]
    assert sum(group["modules"] for group in adapter["modules"].values()) == len(weights) // 2
    for group in adapter["modules"].values():
        assert 0 < group["norm_update"] <= max(group["scalings"]) * group["norm_a"] * group["norm_b"]


def test_single_experts_on_a_server_that_wraps_them(home: Path, tmp_path: Path) -> None:
    folder = single_experts(tmp_path / "2d")
    assert codes(asked(home, folder, "experts")[1]) == []
    assert codes(asked(home, folder)[1]) == ["experts-not-wrapped"]


def test_the_norm_of_the_update_is_that_of_what_peft_adds(home: Path, model: Any, tmp_path: Path) -> None:
    settings = lora(target_modules=[*ATTENTION, *FUSED], use_rslora=True, alpha_pattern={"k_proj": 3})
    adapted = get_peft_model(copy.deepcopy(model), settings, autocast_adapter_dtype=False)
    for name, parameter in adapted.named_parameters():
        if "lora_B" in name:
            torch.nn.init.normal_(parameter)
    adapted.save_pretrained(tmp_path / "a")
    squares: dict[str, float] = {}
    for name, module in adapted.named_modules():
        if hasattr(module, "get_delta_weight") and "layers." in name:
            kind = name.partition("layers.")[2].partition(".")[2].replace("experts.base_layer", "experts.gate_up_proj")
            kind = f"{kind}.down_proj" if kind.endswith("experts") else kind
            squares[kind] = squares.get(kind, 0) + float(module.get_delta_weight("default").double().square().sum())
    found = asked(home, tmp_path / "a", "experts")[1]["adapter"]
    assert found["layout"] == "experts-3d" and found["modules"].keys() == squares.keys() and len(squares) == 6
    for kind, group in found["modules"].items():
        assert group["norm_update"] == pytest.approx(math.sqrt(squares[kind]), rel=1e-5)


Make = Callable[[Any, Path], object]


def peft(dtype: torch.dtype = torch.float32, trained: bool = True, **settings: Any) -> Make:
    return lambda model, folder: save(model, folder, lora(**settings), dtype, trained)


def changed(change: Callable[[dict[str, torch.Tensor]], dict[str, torch.Tensor]], **settings: Any) -> Make:
    def make(model: Any, folder: Path) -> None:
        save(model, folder, lora(**settings))
        save_file(change(load_file(folder / WEIGHTS)), folder / WEIGHTS)

    return make


def spoilt(value: float) -> Make:
    def change(tensors: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
        tensors[max(tensors)][0, 0] = value
        return tensors

    return changed(change)


def configured(**values: Any) -> Make:
    def make(model: Any, folder: Path) -> None:
        save(model, folder, lora())
        config = json.loads((folder / "adapter_config.json").read_text("utf-8"))
        (folder / "adapter_config.json").write_text(json.dumps(config | values), "utf-8")

    return make


def beside(act: Callable[[Path], object]) -> Make:
    def make(model: Any, folder: Path) -> None:
        save(model, folder, lora())
        act(folder)

    return make


def text_only(wrapped: bool) -> Make:
    def make(model: Any, folder: Path) -> None:
        bare = save(model.model.language_model, folder.with_name("bare"), lora())
        rename(bare, folder, lambda key: key.replace("base_model.model.layers", "base_model.model.model.layers") if wrapped else key)

    return make


def other_kind(config: Any) -> Make:
    def make(model: Any, folder: Path) -> None:
        save(model, folder, lora())
        config.save_pretrained(folder)

    return make


def other_shapes(model: Any, folder: Path) -> None:
    config = tinyglm.make_config(tinyglm.make_tokenizer())
    config.text_config.num_hidden_layers, config.text_config.hidden_size, config.vision_config.depth = 2, 64, 1
    config.vision_config.out_hidden_size = 64
    save(tinyglm.make_model(config), folder, lora())


def deeper(model: Any, folder: Path) -> None:
    config = tinyglm.make_config(tinyglm.make_tokenizer())
    config.text_config.num_hidden_layers, config.vision_config.depth = 3, 1
    save(tinyglm.make_model(config), folder, lora())


def whole_pickle(model: Any, folder: Path) -> None:
    save(model, folder, lora())
    torch.save(load_file(folder / WEIGHTS), folder / "adapter_model.bin")
    (folder / WEIGHTS).unlink()


def few_experts(model: Any, folder: Path) -> None:
    single_experts(folder, 7)


ZOO: dict[str, tuple[str, list[str], Make]] = {
    "DoRA": ("attention", ["dora"], peft(use_dora=True)),
    "biases of LoRA's modules": ("attention", ["bias"], peft(bias="lora_only")),
    "all biases": ("attention", ["bias"], peft(bias="all")),
    "a bias in lora_B": ("attention", ["bias"], peft(lora_bias=True)),
    "a whole lm_head": ("attention", ["modules-to-save"], peft(modules_to_save=["lm_head"])),
    "PiSSA": ("attention", ["unsupported-init"], peft(init_lora_weights="pissa")),
    "OLoRA": ("attention", ["unsupported-init"], peft(init_lora_weights="olora")),
    "activated LoRA": ("attention", ["unsupported-feature"], peft(alora_invocation_tokens=[1, 2])),
    "single tokens": ("attention", ["unsupported-tensor"], peft(trainable_token_indices=[1, 2])),
    "embeddings": ("attention", ["module-not-wrapped"], peft(target_modules=["q_proj", "embed_tokens"])),
    "a high rank": ("attention", ["rank-too-large"], peft(r=32)),
    "a high rank in a pattern": ("attention", ["rank-too-large"], peft(rank_pattern={"v_proj": 32})),
    "an unused high rank in a pattern": ("attention", ["rank-too-large"], configured(rank_pattern={"nothing": 32})),
    "language model and tower": ("attention", ["module-not-wrapped"], peft(target_modules=["q_proj", "qkv"])),
    "the tower alone": ("attention", ["module-not-wrapped"], peft(target_modules=r".*visual.*\.(qkv|attn\.proj)")),
    "the tower where experts are wrapped": ("experts", ["module-not-wrapped"], peft(target_modules=["q_proj", "qkv"])),
    "3-D experts on an attention server": ("attention", ["experts-not-wrapped"], peft(target_modules=FUSED)),
    "all linear": ("attention", ["module-not-wrapped", "experts-not-wrapped"], peft(target_modules="all-linear")),
    "3-D experts, whose rank counts twice": ("experts", ["rank-too-large"], peft(target_modules=FUSED, r=16)),
    "only one of the experts' parameters": ("experts", ["experts-incomplete"], peft(target_modules=["q_proj"], target_parameters=["mlp.experts.down_proj"])),
    "an expert too few": ("experts", ["experts-incomplete"], few_experts),
    "before the first step": ("attention", ["no-effect"], peft(trained=False)),
    "alpha 0": ("attention", ["no-effect"], peft(lora_alpha=0)),
    "NaN": ("attention", ["not-finite"], spoilt(math.nan)),
    "infinity": ("attention", ["not-finite"], spoilt(-math.inf)),
    "integers": ("attention", ["dtype"], changed(lambda tensors: {key: value.mul(9).to(torch.int8) for key, value in tensors.items()})),
    "the bare language model's keys": ("attention", ["keys-match-nothing"], text_only(False)),
    "the causal language model's keys": ("attention", ["keys-match-nothing"], text_only(True)),
    "another model's keys": ("attention", ["keys-match-nothing"], changed(lambda t: {k.replace("language_model.layers", "decoder.h"): v for k, v in t.items()})),
    "a key that names nothing": (
        "attention",
        ["module-not-wrapped"],
        changed(lambda t: {k.replace("1.self_attn.v_proj", "1.self_attn.v_norm"): v for k, v in t.items()}),
    ),
    "a layer too many": ("attention", ["module-not-wrapped"], deeper),
    "another width": ("attention", ["base-shape-mismatch"], other_shapes),
    "the other base by name": ("attention", ["wrong-base"], configured(base_model_name_or_path="other")),
    "half a pair": ("attention", ["half-pair"], changed(lambda tensors: {key: value for key, value in tensors.items() if "0.self_attn.q_proj.lora_A" not in key})),
    "another training's configuration": ("attention", ["rank-shape-mismatch"], configured(r=8)),
    "a costly pattern": ("attention", ["bad-pattern"], configured(rank_pattern={"(a+)+b": 4})),
    "IA3": ("attention", ["not-lora"], other_kind(IA3Config(target_modules=["k_proj"], feedforward_modules=[]))),
    "a learned prompt": ("attention", ["not-lora"], other_kind(PromptTuningConfig(num_virtual_tokens=4, task_type="CAUSAL_LM"))),
    "no configuration": ("attention", ["config-unreadable"], beside(lambda folder: (folder / "adapter_config.json").unlink())),
    "a cut file": ("attention", ["weights-unreadable"], beside(lambda folder: os.truncate(folder / WEIGHTS, 5000))),
    "a huge header": ("attention", ["weights-unreadable"], beside(lambda folder: (folder / WEIGHTS).write_bytes((9 << 20).to_bytes(8, "little") + b" " * (9 << 20)))),
    "a checkpoint's optimizer": ("attention", ["pickle"], beside(lambda folder: torch.save({}, folder / "optimizer.pt"))),
    "a pickle instead": ("attention", ["pickle", "weights-unreadable"], whole_pickle),
    "a link": ("attention", ["link"], beside(lambda folder: (folder / "README.md").symlink_to("/etc/hostname"))),
    "much at once": ("attention", ["dora", "rank-too-large"], peft(use_dora=True, r=32)),
}  # fmt: skip


@pytest.mark.parametrize("kind", ZOO)
def test_every_animal_gets_exactly_its_reasons(kind: str, home: Path, model: Any, tmp_path: Path) -> None:
    server, expected, make = ZOO[kind]
    make(model, tmp_path / "a")
    code, answer = asked(home, tmp_path / "a", server)
    assert (code, codes(answer)) == (1, expected)
    assert answer["adapter"].keys() >= {"digest", "bytes", "layout", "base_model", "ranks", "scalings", "parameters", "dtypes", "modules"}


def test_what_could_not_be_served_is_made_servable(home: Path, model: Any, tmp_path: Path) -> None:
    text_only(True)(model, tmp_path / "text")
    code, answer = inspect(home, str(tmp_path / "text"), "--serving", str(home / "recipes/serving/attention.yaml"), "--write", str(tmp_path / "out"))
    assert (code, codes(answer)) == (0, [])
    assert [reason["code"] for reason in answer["written"]["from"]["reasons"]] == ["keys-match-nothing"]
    assert asked(home, tmp_path / "out")[0] == 0
    fused = save(model, tmp_path / "3d", lora(target_modules=FUSED))
    for source, layout, out in ((fused, "2d", "2d"), (tmp_path / "2d", "3d", "again")):
        args = ["--serving", str(home / "recipes/serving/experts.yaml"), "--experts", layout, "--write", str(tmp_path / out)]
        code, answer = inspect(home, str(source), *args)
        assert (code, codes(answer), answer["adapter"]["layout"]) == (0, [], f"experts-{layout}")


def test_end_to_end_as_a_process(home: Path, model: Any, tmp_path: Path) -> None:
    environment = {**os.environ, "TUNESERVE_PROJECT": str(home), "MLFLOW_TRACKING_URI": "http://127.0.0.1:9"}
    environment.pop("PYTHONDONTWRITEBYTECODE", None)
    save(model, tmp_path / "dora", lora(use_dora=True))
    command = [sys.executable, "-m", "pipeline.cli", "inspect", "dora", "--serving", str(home / "recipes/serving/attention.yaml")]
    plain = subprocess.run(command, capture_output=True, text=True, cwd=tmp_path, env=environment, check=False)
    assert plain.returncode == 1 and "dora: it is a DoRA adapter" in plain.stdout and "-> vLLM has no DoRA" in plain.stdout and plain.stderr == ""
    told = subprocess.run([*command, "--json"], capture_output=True, text=True, cwd=tmp_path, env=environment, check=False)
    answer = json.loads(told.stdout)
    assert told.returncode == 1 and codes(answer) == ["dora"] and answer.keys() == {"servable", "reasons", "adapter", "against"}
