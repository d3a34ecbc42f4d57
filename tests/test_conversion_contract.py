"""A converted adapter answers as the original: real PEFT on a tiny GLM-4.5V, float32, and vLLM's own reading of layouts and scalings."""

import copy
import json
import math
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from peft import PeftModel, get_peft_model
from safetensors.torch import load_file, save_file
from transformers import Glm4vMoeForConditionalGeneration
from vllm.lora.lora_weights import LoRALayerWeights, PackedLoRALayerWeights
from vllm.lora.model_manager import LoRAModelManager
from vllm.lora.peft_helper import PEFTHelper

from pipeline.conversion import ExpertsLayout, convert, read_content, write_content
from pipeline.servable import ServerLimits, layout, read_base_shapes, reasons
from tests.peft_adapters import ATTENTION, EXPERTS, FUSED, KEY, lora, make_model, rename, save, single_experts

pytestmark = pytest.mark.contract
EXACT, STD = 1e-5, 0.1
WIDTH, HIDDEN = 64, 128
SERVED = ("qkv_proj", "o_proj", "experts")


@pytest.fixture(scope="module")
def model() -> Glm4vMoeForConditionalGeneration:
    torch.manual_seed(3)
    return make_model().float().eval()


@pytest.fixture(scope="module")
def limits(model: Glm4vMoeForConditionalGeneration, tmp_path_factory: pytest.TempPathFactory) -> ServerLimits:
    folder = tmp_path_factory.mktemp("base")
    model.save_pretrained(folder)
    return ServerLimits(max_rank=16, target_modules=SERVED, wraps_experts=True, base_shapes=read_base_shapes(folder))


def logits(model: Any) -> torch.Tensor:
    with torch.no_grad():
        return model(input_ids=torch.arange(20, 60)[None]).logits


def loaded(model: Any, folder: Path) -> torch.Tensor:
    return logits(PeftModel.from_pretrained(copy.deepcopy(model), folder, autocast_adapter_dtype=False).eval())


def converted(source: Path, target: Path, experts: ExpertsLayout | None = None) -> Path:
    content, done = convert(read_content(source), experts)
    assert done
    write_content(content, target)
    assert sorted(path.name for path in target.iterdir()) == ["adapter_config.json", "adapter_model.safetensors"]
    return target


def apart(one: torch.Tensor, other: torch.Tensor) -> float:
    return float((one - other).abs().max())


def same_answers(model: Any, one: torch.Tensor, other: torch.Tensor) -> None:
    assert apart(one, logits(model)) > 0.01
    assert apart(one, other) <= EXACT


PATTERNS = {"rank_pattern": {"down_proj": 2, "q_proj": 8}, "alpha_pattern": {"down_proj": 6, "layers.0.self_attn.q_proj": 3}}


@pytest.mark.parametrize(
    "settings",
    [
        {},
        {"use_rslora": True},
        PATTERNS,
        PATTERNS | {"use_rslora": True},
        {"target_modules": [], "target_parameters": ["mlp.experts.gate_up_proj", "mlp.experts.down_proj"], "r": 3, "lora_alpha": 5},
        {"target_modules": "all-linear"},
    ],
)
def test_fused_experts_become_single_ones(settings: dict[str, Any], model: Any, limits: ServerLimits, tmp_path: Path) -> None:
    source = save(model, tmp_path / "3d", lora(**{"target_modules": FUSED} | settings), std=STD)
    single = converted(source, tmp_path / "2d", "2d")
    assert (layout(source), layout(single)) == ("experts-3d", "experts-2d")
    before = loaded(model, source)
    same_answers(model, before, loaded(model, single))  # PEFT 0.20 fuses 2-D experts while loading
    if settings.get("target_modules") != "all-linear":  # which adapts the vision tower and the router, too
        same_answers(model, before, by_hand(model, single))
        assert reasons(source, limits) == [] == reasons(single, limits)
    again = converted(single, tmp_path / "again", "3d")
    same_answers(model, before, loaded(model, again))
    assert vllm_experts(single) == pytest.approx(vllm_experts(source), abs=EXACT) and vllm_experts(again) == pytest.approx(vllm_experts(source), abs=EXACT)
    assert {key: value.shape for key, value in load_file(again / "adapter_model.safetensors").items()} == {
        key: value.shape for key, value in load_file(source / "adapter_model.safetensors").items()
    }  # gate_proj and up_proj share their lora_A, so the rank stays


@pytest.mark.parametrize("settings", [{}, {"use_rslora": True}, {"rank_pattern": {"down_proj": 2}}, {"alpha_pattern": {"down_proj": 3}}])
def test_single_experts_become_fused_ones(settings: dict[str, Any], model: Any, limits: ServerLimits, tmp_path: Path) -> None:
    source = two_dimensional(tmp_path / "2d", **settings)
    fused = converted(source, tmp_path / "3d", "3d")
    assert (layout(source), layout(fused)) == ("experts-2d", "experts-3d")
    assert reasons(source, limits) == [] == reasons(fused, limits)
    same_answers(model, by_hand(model, source), loaded(model, fused))
    assert vllm_experts(fused) == pytest.approx(vllm_experts(source), abs=EXACT)
    again = converted(fused, tmp_path / "again", "2d")
    before, after = (load_file(folder / "adapter_model.safetensors") for folder in (source, again))
    assert before.keys() == after.keys() and all(torch.equal(before[key], after[key]) for key in before)  # the halves are found again


def two_dimensional(folder: Path, **settings: Any) -> Path:
    """Of rank 4 (or the pattern's) in attention and experts, as PEFT saves them with transformers 4."""
    torch.manual_seed(5)
    single_experts(folder)
    tensors = load_file(folder / "adapter_model.safetensors")
    rank = settings.get("rank_pattern", {}).get("down_proj", 4)
    tensors = {key: value[:rank] if "lora_A" in key and "down_proj" in key else value for key, value in tensors.items()}
    tensors = {key: value[:, :rank].contiguous() if "lora_B" in key and "down_proj" in key else value for key, value in tensors.items()}
    tensors = {key: value * STD for key, value in tensors.items()}
    for layer in (0, 1):
        tensors |= {
            f"{KEY}.{layer}.self_attn.q_proj.lora_A.weight": STD * torch.randn(4, HIDDEN),
            f"{KEY}.{layer}.self_attn.q_proj.lora_B.weight": STD * torch.randn(256, 4),
        }
    save_file(tensors, folder / "adapter_model.safetensors")
    config = json.loads((folder / "adapter_config.json").read_text("utf-8")) | settings
    (folder / "adapter_config.json").write_text(json.dumps(config | {"target_modules": FUSED}), "utf-8")
    return folder


def by_hand(model: Any, folder: Path) -> torch.Tensor:
    """Logits with every update of plain matrices, and of 2-D experts, added to the weights: no PEFT, scalings as vLLM finds them."""
    helper, merged = PEFTHelper.from_local_dir(str(folder), 8192), copy.deepcopy(model)
    weights = load_file(folder / "adapter_model.safetensors")
    for key in (key for key in weights if key.endswith("lora_A.weight")):
        name = key.removeprefix("base_model.model.").removesuffix(".lora_A.weight")
        update = helper.get_rank_and_scaling(name)[1] * weights[key.replace("lora_A", "lora_B")] @ weights[key]
        with torch.no_grad():
            if ".mlp.experts." not in name:
                merged.get_parameter(f"{name}.weight").add_(update)
                continue
            experts, _, (number, kind) = name.partition(".experts.")[0], None, name.rpartition(".experts.")[2].split(".")
            parameter = merged.get_parameter(f"{experts}.experts.{'down_proj' if kind == 'down_proj' else 'gate_up_proj'}")[int(number)]
            rows = {"gate_proj": slice(0, WIDTH), "up_proj": slice(WIDTH, None), "down_proj": slice(None)}[kind]
            parameter[rows].add_(update)
    return logits(merged)


def vllm_experts(folder: Path) -> list[float]:
    """What vLLM's own code makes of the experts in layer 1: all updates of w1, w2 and w3, as one list."""
    helper, name = PEFTHelper.from_local_dir(str(folder), 8192), "model.language_model.layers.1.mlp.experts"
    weights = load_file(folder / "adapter_model.safetensors")

    def layer(module: str) -> LoRALayerWeights:
        rank, scaling = helper.get_rank_and_scaling(module)
        a, b = (weights[f"base_model.model.{module}.lora_{part}.weight"] for part in "AB")
        return LoRALayerWeights(module, rank, helper.lora_alpha, a, b, scaling=scaling)

    if layout(folder) == "experts-2d":
        packed = PackedLoRALayerWeights.pack_moe([layer(f"{name}.{n}.{kind}_proj") for n in range(EXPERTS) for kind in ("gate", "down", "up")], name)
        scalings = packed.scaling
    else:
        found = {name: layer(name), f"{name}.base_layer": layer(f"{name}.base_layer")}
        lora_model = SimpleNamespace(loras=found, get_lora=found.get)
        manager = SimpleNamespace(
            _get_lora_layer_weights=lambda lora_model, module: found.get(module), model=SimpleNamespace(config=SimpleNamespace(architectures=["Glm4vMoe"]))
        )
        scalings = [found[f"{name}.base_layer"].scaling, found[name].scaling, found[f"{name}.base_layer"].scaling]
        module = SimpleNamespace(local_num_experts=EXPERTS, global_num_experts=EXPERTS, ep_rank=0)
        LoRAModelManager._convert_3d_to_2d_moe_lora(manager, lora_model, module, name)
        packed = found[name]
    updates = [scaling * b.double() @ a.double() for scaling, a, b in zip(scalings, packed.lora_a, packed.lora_b, strict=True)]
    return torch.cat([update.flatten() for update in updates])[::37].tolist()


class CausalLM(torch.nn.Module):
    """The language model below `model`, as AutoModelForCausalLM's classes hold it."""

    def __init__(self, language_model: Any) -> None:
        super().__init__()
        self.model = language_model
        self.config = language_model.config


@pytest.mark.parametrize("wrap", [lambda text: text, CausalLM])
@pytest.mark.parametrize(
    "settings",
    [
        {},
        {"use_rslora": True, "rank_pattern": {"q_proj": 2}},
        {"rank_pattern": {"^(model.)?layers.0.self_attn.q_proj": 8}, "alpha_pattern": {"layers.1.self_attn.o_proj": 1}},
        {"target_modules": r".*layers\.1\.self_attn\.(q|k)_proj"},
        {"target_modules": ["q_proj"], "target_parameters": ["mlp.experts.gate_up_proj", "mlp.experts.down_proj"], "use_rslora": True},
        {"target_modules": ["q_proj"], "target_parameters": ["layers.1.mlp.experts.gate_up_proj", "layers.1.mlp.experts.down_proj"]},
    ],
)
def test_text_only_keys_get_the_served_class_s_names(
    settings: dict[str, Any], wrap: Callable[[Any], Any], model: Any, limits: ServerLimits, tmp_path: Path
) -> None:
    torch.manual_seed(7)
    text = copy.deepcopy(model.model.language_model)
    if isinstance(settings.get("rank_pattern"), dict):
        settings = settings | {
            "rank_pattern": {key.replace("(model.)?", "model." if wrap is CausalLM else ""): v for key, v in settings["rank_pattern"].items()}
        }
    adapted = get_peft_model(wrap(text), lora(**settings), autocast_adapter_dtype=False)
    for name, parameter in adapted.named_parameters():
        if "lora_B" in name:
            torch.nn.init.normal_(parameter, std=STD)
    adapted.save_pretrained(tmp_path / "text")
    assert [reason.code for reason in reasons(tmp_path / "text", limits)] == ["keys-match-nothing"]
    whole = converted(tmp_path / "text", tmp_path / "whole")
    assert reasons(whole, limits) == []
    grown = copy.deepcopy(model)
    grown.model.language_model = text  # which PEFT has adapted in place
    same_answers(model, logits(grown), loaded(model, whole))
    if not settings:
        assert (
            json.loads((whole / "adapter_config.json").read_text("utf-8"))["target_modules"]
            == json.loads((tmp_path / "text/adapter_config.json").read_text("utf-8"))["target_modules"]
        )


def test_both_conversions_at_once(model: Any, limits: ServerLimits, tmp_path: Path) -> None:
    source = save(model, tmp_path / "3d", lora(target_modules=FUSED), std=STD)
    bare = rename(source, tmp_path / "bare", lambda key: key.replace("model.language_model.layers", "model.layers"))
    both = converted(bare, tmp_path / "both", "2d")
    assert reasons(both, limits) == [] and layout(both) == "experts-2d"
    same_answers(model, loaded(model, source), loaded(model, both))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_types_stay_and_nothing_is_rounded(dtype: torch.dtype, model: Any, tmp_path: Path) -> None:
    source = save(model, tmp_path / "3d", lora(target_modules=[*ATTENTION, *FUSED]), dtype)
    single = converted(source, tmp_path / "2d", "2d")
    again = converted(single, tmp_path / "again", "3d")
    before, after = (load_file(folder / "adapter_model.safetensors") for folder in (source, again))
    assert before.keys() == after.keys() and all(torch.equal(before[key], after[key]) and before[key].dtype == dtype for key in before)


def test_rslora_of_peft_is_read_as_written(model: Any, tmp_path: Path) -> None:
    """Why converted experts say alpha / r: of a 2-D rsLoRA adapter PEFT 0.20 makes gate_up_proj sqrt(2) times as strong as it was trained."""
    source = two_dimensional(tmp_path / "2d", use_rslora=True)
    peft = PeftModel.from_pretrained(copy.deepcopy(model), source, autocast_adapter_dtype=False)
    scaling = peft.get_submodule("base_model.model.model.language_model.layers.1.mlp.experts.base_layer").scaling["default"]
    assert scaling == pytest.approx(math.sqrt(2) * 8 / math.sqrt(4))
    config = json.loads((converted(source, tmp_path / "3d", "3d") / "adapter_config.json").read_text("utf-8"))
    assert not config["use_rslora"] and config["alpha_pattern"] == {r"mlp\.experts\..*\bgate_up_proj": 32} and config["lora_alpha"] == 16
