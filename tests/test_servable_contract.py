"""Adapters of real PEFT on a tiny GLM-4.5V get exactly their reasons, and vLLM's own code refuses, drops or takes them as we say it does."""

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any, get_args, get_type_hints

import pytest
import torch
from peft import IA3Config, LoraConfig, PromptTuningConfig
from safetensors.torch import save_file
from transformers import Glm4vMoeForConditionalGeneration
from vllm.config.lora import LoRAConfig, MaxLoRARanks
from vllm.lora.lora_model import LoRAModel
from vllm.lora.lora_weights import LoRALayerWeights, PackedLoRALayerWeights
from vllm.lora.model_manager import AdapterLRUCache, LRUCacheLoRAModelManager
from vllm.lora.peft_helper import PEFTHelper
from vllm.lora.request import LoRARequest
from vllm.lora.utils import is_in_target_modules, parse_fine_tuned_lora_name
from vllm.lora.worker_manager import LRUCacheWorkerLoRAManager
from vllm.model_executor.models.glm4_1v import Glm4vMoeForConditionalGeneration as ServedModel

from pipeline.servable import HARMLESS_INITS, LORA_RANKS, PACKED, Pair, ServerLimits, Settings, checkpoint_name, layout, look_up, read_base_shapes, reasons
from tests.peft_adapters import ATTENTION, EXPERTS, FUSED, KEY, lora, make_model, rename, save, single_experts

pytestmark = pytest.mark.contract
SERVED = ("qkv_proj", "o_proj")
SUPPORTED = {"qkv_proj", "o_proj", "gate_up_proj", "down_proj", "gate", "experts", "qkv", "proj"}
"""Suffixes of the served model's linear modules."""


@pytest.fixture(scope="module")
def model() -> Glm4vMoeForConditionalGeneration:
    return make_model()


@pytest.fixture(scope="module")
def limits(model: Glm4vMoeForConditionalGeneration, tmp_path_factory: pytest.TempPathFactory) -> ServerLimits:
    """Of an attention-only server, with everything known about its base."""
    folder = tmp_path_factory.mktemp("base")
    model.save_pretrained(folder)
    return ServerLimits(max_rank=16, target_modules=SERVED, wraps_experts=False, base_shapes=read_base_shapes(folder))


def codes(folder: Path, limits: ServerLimits) -> set[str]:
    found = [reason.code for reason in reasons(folder, limits)]
    assert len(found) == len(set(found))
    return set(found)


def vllm_load(folder: Path, max_rank: int = 16) -> LoRAModel:
    """As vLLM's worker loads it, up to the point where it looks at the modules that it has wrapped."""
    helper = PEFTHelper.from_local_dir(str(folder), 8192)
    helper.validate_legal(LoRAConfig(max_lora_rank=max_rank, target_modules=list(SERVED), lora_dtype=torch.float32))
    packed = {**ServedModel.packed_modules_mapping, "experts": [f"experts.{n}.{p}_proj" for n in range(EXPERTS) for p in ("gate", "down", "up")]}
    expected = {name for module in SUPPORTED for name in packed.get(module, [module])} | {"experts"}
    mapper = ServedModel.hf_to_vllm_mapper.get_rename_mapper()
    return LoRAModel.from_local_checkpoint(str(folder), expected, helper, lora_model_id=1, device="cpu", dtype=torch.float32, weights_mapper=mapper)


def vllm_refuses(folder: Path) -> bool:
    try:
        vllm_load(folder)
    except (ValueError, TypeError, AssertionError):
        return True
    return False


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
@pytest.mark.parametrize(
    "settings",
    [
        {},
        {"use_rslora": True},
        {"rank_pattern": {"q_proj": 2, r"layers\.1\.self_attn\.o_proj": 16}},
        {"alpha_pattern": {"k_proj": 1, "layers.0.self_attn.v_proj": 32}},
        {"target_modules": ["q_proj"], "init_lora_weights": "gaussian"},
        {"target_modules": r".*language_model\.layers\.1\.self_attn\.o_proj"},
    ],
)
def test_attention_is_served(
    settings: dict[str, Any], dtype: torch.dtype, model: Glm4vMoeForConditionalGeneration, limits: ServerLimits, tmp_path: Path
) -> None:
    folder = save(model, tmp_path, lora(**settings), dtype)
    assert reasons(folder, limits) == [] == reasons(folder, replace(limits, base_shapes=None))
    assert layout(folder) == "plain"
    loaded = vllm_load(folder)
    assert {module.rpartition(".")[2] for module in loaded.loras} <= set(ATTENTION)
    assert all(module.startswith("language_model.model.layers.") for module in loaded.loras)


@pytest.mark.parametrize(
    ("expected", "refused_by_vllm", "settings"),
    [
        ({"dora"}, True, {"use_dora": True}),
        ({"bias"}, True, {"bias": "lora_only"}),
        ({"bias"}, True, {"bias": "all"}),
        ({"bias"}, True, {"lora_bias": True}),
        ({"modules-to-save"}, True, {"modules_to_save": ["lm_head"]}),
        ({"unsupported-init"}, True, {"init_lora_weights": "pissa"}),
        ({"unsupported-init"}, True, {"init_lora_weights": "olora"}),
        ({"unsupported-feature"}, True, {"alora_invocation_tokens": [1, 2]}),
        ({"unsupported-tensor"}, True, {"trainable_token_indices": [1, 2]}),
        ({"module-not-wrapped"}, True, {"target_modules": ["q_proj", "embed_tokens"]}),
        ({"rank-too-large"}, True, {"r": 32}),
        ({"rank-too-large"}, True, {"rank_pattern": {"v_proj": 32}}),
        ({"module-not-wrapped"}, False, {"target_modules": ["q_proj", "qkv"]}),
        ({"module-not-wrapped"}, False, {"target_modules": r".*visual.*\.(qkv|attn\.proj)"}),
        ({"experts-not-wrapped"}, False, {"target_modules": FUSED}),
        ({"experts-not-wrapped", "module-not-wrapped"}, False, {"target_modules": "all-linear"}),
    ],
)
def test_what_peft_can_do_and_the_server_cannot(
    expected: set[str], refused_by_vllm: bool, settings: dict[str, Any], model: Glm4vMoeForConditionalGeneration, limits: ServerLimits, tmp_path: Path
) -> None:
    folder = save(model, tmp_path, lora(**settings))
    assert codes(folder, limits) == codes(folder, replace(limits, base_shapes=None)) == expected
    assert vllm_refuses(folder) == refused_by_vllm


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.float16, torch.bfloat16, torch.float8_e5m2, torch.float8_e4m3fn])
def test_numbers_of_every_width(dtype: torch.dtype, limits: ServerLimits, tmp_path: Path) -> None:
    key = f"{KEY}.0.self_attn.q_proj"
    lora().save_pretrained(tmp_path)
    for value, expected in (
        (1.0, set()),
        (torch.finfo(dtype).max, set()),
        (-torch.finfo(dtype).smallest_normal, set()),
        (float("nan"), {"not-finite"}),
        (0.0, {"no-effect"}),
        (-0.0, {"no-effect"}),
    ):
        b = torch.zeros(256, 4, dtype=torch.float64)
        b[-1, -1] = value
        save_file({f"{key}.lora_A.weight": torch.ones(4, 128).to(dtype), f"{key}.lora_B.weight": b.to(dtype)}, tmp_path / "adapter_model.safetensors")
        assert codes(tmp_path, limits) == expected


def test_an_adapter_before_its_first_step_has_no_effect(model: Glm4vMoeForConditionalGeneration, limits: ServerLimits, tmp_path: Path) -> None:
    assert codes(save(model, tmp_path, lora(), trained=False), limits) == {"no-effect"}
    assert not vllm_refuses(tmp_path)


@pytest.mark.parametrize(
    "config", [IA3Config(target_modules=["k_proj"], feedforward_modules=[]), PromptTuningConfig(num_virtual_tokens=4, task_type="CAUSAL_LM")]
)
def test_other_kinds_of_adapters(config: Any, model: Glm4vMoeForConditionalGeneration, limits: ServerLimits, tmp_path: Path) -> None:
    save(model, tmp_path, lora())
    config.save_pretrained(tmp_path)
    assert codes(tmp_path, limits) == {"not-lora"}


def test_a_text_only_class_s_adapter_does_nothing_in_vllm(model: Glm4vMoeForConditionalGeneration, limits: ServerLimits, tmp_path: Path) -> None:
    for number, text_model in enumerate((model.model.language_model, torch.nn.ModuleDict({"model": model.model.language_model}))):
        folder = tmp_path / str(number)
        if number == 0:
            save(text_model, folder, lora())
        else:  # as AutoModelForCausalLM has them
            rename(tmp_path / "0", folder, lambda key: key.replace("base_model.model.layers", "base_model.model.model.layers"))
        assert codes(folder, limits) == codes(folder, replace(limits, base_shapes=None)) == {"keys-match-nothing"}
        assert "text-only" in reasons(folder, limits)[0].remedy
        assert not any(module.startswith("language_model.model.") for module in vllm_load(folder).loras)


def test_the_dense_mlp_is_dropped_by_vllm(model: Glm4vMoeForConditionalGeneration, limits: ServerLimits, tmp_path: Path) -> None:
    """By hand: PEFT 0.20 turns every target of that name into the routed experts."""
    attention = save(model, tmp_path / "attention", lora())
    dense = rename(attention, tmp_path / "dense", lambda key: key.replace("0.self_attn.k_proj", "0.mlp.gate_proj"))
    assert codes(dense, limits) == codes(dense, replace(limits, base_shapes=None)) == {"module-not-wrapped"}
    assert "gate_up_proj" in reasons(dense, limits)[0].remedy
    assert not vllm_refuses(dense)


@pytest.mark.parametrize("wrong", [lambda key: key.replace("k_proj", "qkv_proj"), lambda key: key.replace("lora_A.weight", "lora_A.default.weight")])
def test_other_names_are_refused_by_vllm(wrong: Callable[[str], str], model: Glm4vMoeForConditionalGeneration, limits: ServerLimits, tmp_path: Path) -> None:
    folder = rename(save(model, tmp_path / "a", lora()), tmp_path / "b", wrong)
    assert codes(folder, limits) and vllm_refuses(folder)


def test_routed_experts(model: Glm4vMoeForConditionalGeneration, limits: ServerLimits, tmp_path: Path) -> None:
    wraps = replace(limits, target_modules=(*SERVED, "experts"), wraps_experts=True)
    fused, single = save(model, tmp_path / "3d", lora(target_modules=FUSED)), single_experts(tmp_path / "2d")
    assert (layout(fused), layout(single)) == ("experts-3d", "experts-2d")
    for known in (wraps, replace(wraps, base_shapes=None)):
        assert codes(fused, known) == codes(single, known) == set()
    assert codes(fused, limits) == codes(single, limits) == {"experts-not-wrapped"}
    assert not vllm_refuses(fused) and not vllm_refuses(single)  # it drops them
    assert codes(fused, replace(wraps, max_rank=4)) == {"rank-too-large"}  # rank 4 is 8 for gate_up_proj
    with pytest.raises(ValueError, match="LoRA rank 8 is greater"):
        PEFTHelper.from_local_dir(str(fused), 8192).validate_legal(SimpleNamespace(max_lora_rank=4))
    assert codes(single_experts(tmp_path / "few", EXPERTS - 1), wraps) == {"experts-incomplete"}


def test_vllm_packs_only_complete_experts_of_one_rank() -> None:
    def expert(rank: int = 4) -> LoRALayerWeights:
        return LoRALayerWeights("experts", rank, 8, torch.zeros(rank, 6), torch.zeros(8, rank))

    with pytest.raises(AssertionError):
        PackedLoRALayerWeights.pack_moe([expert(), None, expert()], "experts")
    with pytest.raises(ValueError, match="different LoRA ranks"):
        PackedLoRALayerWeights.pack_moe([expert(), expert(), expert(), expert(2), expert(), expert()], "experts")


def test_the_names_that_vllm_knows() -> None:
    assert {name: list(parts) for name, parts in PACKED.items()} == ServedModel.packed_modules_mapping
    assert get_args(MaxLoRARanks) == LORA_RANKS
    mapping = ServedModel.get_mm_mapping(None)
    assert (mapping.language_model, mapping.connector, mapping.tower_model) == (["language_model.model"], ["visual.merger."], ["visual."])
    mapper = ServedModel.hf_to_vllm_mapper.get_rename_mapper()
    for name in ("model.language_model.layers.3.self_attn.q_proj", "model.visual.blocks.0.attn.qkv", "lm_head", "model.layers.3.self_attn.q_proj"):
        served, is_a = parse_fine_tuned_lora_name(f"base_model.model.{name}.lora_A.weight", mapper)
        assert is_a and checkpoint_name(served) == checkpoint_name(name) == name
        assert parse_fine_tuned_lora_name(f"base_model.model.{served}.lora_B.weight", mapper) == (served, False)


def test_init_lora_weights() -> None:
    def taken(init: str) -> bool:
        return PEFTHelper(r=4, lora_alpha=8, target_modules=[], init_lora_weights=init)._init_is_supported()

    known = {name for part in get_args(get_type_hints(LoraConfig)["init_lora_weights"]) for name in get_args(part)}
    assert known >= {"pissa", "olora", "loftq", "corda", "gaussian"}
    assert {init for init in known | {"pissa_niter_4", "other"} if taken(init)} == HARMLESS_INITS & known
    assert all(taken(init) for init in HARMLESS_INITS)


@pytest.mark.parametrize(
    "targets", [SERVED, ("q_proj",), ("up_proj", "o_proj"), ("gate_up_proj", "down_proj"), ("language_model.model.layers.0.self_attn.o_proj",), ("qkv",)]
)
def test_which_modules_a_server_wraps(targets: tuple[str, ...]) -> None:
    limits = ServerLimits(16, targets, False)
    for inner in ("self_attn.q_proj", "self_attn.v_proj", "self_attn.o_proj", "mlp.gate_proj", "mlp.down_proj", "mlp.shared_experts.up_proj", "mlp.gate"):
        packed = next((name for name, parts in PACKED.items() if inner.rpartition(".")[2] in parts), inner.rpartition(".")[2])
        runtime = f"language_model.model.layers.0.{inner.rpartition('.')[0]}.{packed}"
        assert limits.wraps(f"model.language_model.layers.0.{inner}") == is_in_target_modules(runtime, list(targets), ServedModel.packed_modules_mapping)


def test_ranks_and_alphas_are_looked_up_as_vllm_does() -> None:
    patterns = {"rank_pattern": {r".*\.gate_up_proj": 8, "layers.1.self_attn.q_proj": 2, "q_proj": 16}, "alpha_pattern": {"down_proj": 3, "^model.x": 5}}
    helper = PEFTHelper(r=4, lora_alpha=8, target_modules=[], **patterns)
    names = [
        f"model.language_model.layers.{n}.{part}" for n in (1, 11) for part in ("self_attn.q_proj", "mlp.experts", "mlp.experts.base_layer", "mlp.up_proj")
    ]
    found = look_up({"r": 4, "lora_alpha": 8, **patterns}, {name: Pair(name) for name in names})
    assert isinstance(found, dict)
    for name in names:
        setting: Settings = found[name]
        assert helper.get_rank_and_scaling(name) == (setting.rank, setting.alpha / setting.rank)


class Wrapped:
    """As BaseLinearLayerWithLoRA, for a module of 6 inputs."""

    def __init__(self) -> None:
        self.slots = torch.zeros(2, 1, 16, 6)

    def reset_lora(self, index: int) -> None:
        self.slots[index] = 0

    def set_lora(self, index: int, lora_a: torch.Tensor, lora_b: torch.Tensor) -> None:
        self.slots[index, 0, : lora_a.shape[0], : lora_a.shape[1]].copy_(lora_a)


def test_what_fails_half_way_in_vllm_counts_as_loaded_afterwards() -> None:
    """Why shapes and experts are looked at before: the second add_lora of an adapter that failed in set_lora says True and serves half of it."""
    manager = LRUCacheLoRAModelManager.__new__(LRUCacheLoRAModelManager)
    manager.lora_config = SimpleNamespace(max_cpu_loras=4, max_loras=2)
    manager._registered_adapters, manager._active_adapters = (
        AdapterLRUCache(size, act) for size, act in ((4, manager.deactivate_adapter), (2, manager._deactivate_adapter))
    )
    manager.lora_index_to_id, manager.modules, manager.packed_modules = [None, None], {"m.a": Wrapped(), "m.b": Wrapped()}, {}
    manager.is_pooling_model = manager._enable_mixed_moe_lora_format = False
    weights = {name: LoRALayerWeights(name, 4, 4, torch.ones(4, wide), torch.ones(8, 4)) for name, wide in (("m.a", 6), ("m.b", 7))}
    worker = LRUCacheWorkerLoRAManager.__new__(LRUCacheWorkerLoRAManager)
    worker._adapter_manager = manager
    worker._load_adapter = lambda request: LoRAModel(request.lora_int_id, 4, dict(weights))
    request = LoRARequest("a", 1, "/a")
    with pytest.raises(RuntimeError):
        worker.add_adapter(request)
    assert worker.add_adapter(request) and worker.list_adapters() == {1}
    assert manager.modules["m.a"].slots[0].any() and not manager.modules["m.b"].slots[0].any()
    assert worker.remove_adapter(1) and worker.list_adapters() == set()
