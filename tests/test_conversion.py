"""What a conversion refuses because it would not be exact, and how it writes; that it is exact is shown with real PEFT in test_conversion_contract.py."""

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest
import torch

from pipeline import conversion
from pipeline.conversion import Content, ExpertsLayout, convert, read_content, write_content
from pipeline.errors import AdapterInvalid
from tests.conftest import write_adapter

LAYER = "base_model.model.model.language_model.layers.0"
CONFIG = {"peft_type": "LORA", "r": 2, "lora_alpha": 4, "target_modules": ["q_proj"]}


def pair(module: str, rank: int = 2, inner: int = 6, outer: int = 5, fill: float | None = None) -> dict[str, torch.Tensor]:
    sizes = {"A": (rank, inner), "B": (outer, rank)}
    return {f"{module}.lora_{part}.weight": torch.randn(size) if fill is None else torch.full(size, fill) for part, size in sizes.items()}


def single(kinds: tuple[str, ...] = ("gate", "up", "down"), count: int = 2, **more: Any) -> dict[str, torch.Tensor]:
    return {k: v for number in range(count) for kind in kinds for k, v in pair(f"{LAYER}.mlp.experts.{number}.{kind}_proj", **more).items()}


def fused(rank: int = 4) -> dict[str, torch.Tensor]:
    return pair(f"{LAYER}.mlp.experts.base_layer", rank, outer=10) | pair(f"{LAYER}.mlp.experts", rank)


@pytest.mark.parametrize(
    ("tensors", "config", "experts", "said"),
    [
        (single(("gate", "down")), {}, "3d", "only one of gate_proj and up_proj"),
        (single() | pair(f"{LAYER}.mlp.experts.2.down_proj"), {}, "3d", "gate_proj of 2 experts of 3"),
        (single() | pair(f"{LAYER}.mlp.experts.3.up_proj"), {}, "3d", "of 4 is adapted"),
        (single() | pair(f"{LAYER}.mlp.experts.1.up_proj", 3), {"rank_pattern": {"experts.1.up_proj": 3}}, "3d", "differ in rank"),
        (single(), {"alpha_pattern": {"experts.1.up_proj": 3}}, "3d", "differ in rank, alpha"),
        (single(), {"alpha_pattern": {"up_proj": 3}}, "3d", "scaled by 2, up_proj by 1.5"),
        (single() | fused(), {}, "3d", "in both layouts"),
        (single() | fused(), {}, "2d", "in both layouts"),
        (fused(3), {}, "2d", "not rank 2 for each expert"),
        ({**fused(), f"{LAYER}.mlp.experts.lora_B.weight": torch.ones(5, 6)}, {}, "2d", "not rank 2 for each expert"),
        (fused(), {"rank_pattern": {"(a+)+": 2}}, "2d", "take for ever"),
        (pair(f"{LAYER}.self_attn.q_proj") | pair("base_model.model.layers.0.self_attn.q_proj"), {}, None, "twice"),
        (pair("base_model.model.layers.0.self_attn.q_proj") | pair("base_model.model.model.layers.0.self_attn.q_proj"), {}, None, "twice"),
        ({f"{LAYER}.mlp.experts.lora_A.weight": torch.ones(4, 6)}, {}, "2d", "is missing"),
    ],
)
def test_what_is_not_exact_is_refused(tensors: Mapping[str, torch.Tensor], config: dict[str, Any], experts: ExpertsLayout | None, said: str) -> None:
    with pytest.raises(AdapterInvalid, match=said):
        convert(Content(CONFIG | config, tensors), experts)


def test_nothing_is_done_where_all_is_so_already() -> None:
    for tensors, experts in ((single(), "2d"), (fused(), "3d"), (pair(f"{LAYER}.self_attn.q_proj"), "2d"), (single(), None)):
        content = Content(CONFIG, tensors)
        assert convert(content, experts) == (content, [])


def test_gate_and_up_of_one_a_keep_its_rank_and_others_are_put_below_each_other() -> None:
    same = single()
    for number in range(2):
        same[f"{LAYER}.mlp.experts.{number}.up_proj.lora_A.weight"] = same[f"{LAYER}.mlp.experts.{number}.gate_proj.lora_A.weight"].clone()
    for tensors, rank in ((same, 2), (single(), 4)):
        new, done = convert(Content(CONFIG, tensors), "3d")
        a, b = (new.tensors[f"{LAYER}.mlp.experts.base_layer.lora_{part}.weight"] for part in "AB")
        assert (tuple(a.shape), tuple(b.shape), len(done)) == ((2 * rank, 6), (10, 2 * rank), 1)
        for number in range(2):  # rows of A: expert after expert; columns of B: experts varying fastest
            update = b.reshape(10, rank, 2)[:, :, number] @ a.reshape(2, rank, 6)[number]
            for half, kind in ((update[:5], "gate"), (update[5:], "up")):
                one, other = (tensors[f"{LAYER}.mlp.experts.{number}.{kind}_proj.lora_{part}.weight"] for part in "BA")
                assert torch.allclose(half, one @ other, atol=1e-6)


def test_each_module_keeps_its_scaling_in_the_fewest_patterns() -> None:
    tensors = single() | pair(f"{LAYER}.self_attn.q_proj", 3) | pair(f"{LAYER}.self_attn.v_proj") | pair(f"{LAYER[:-1]}1.self_attn.v_proj")
    config = CONFIG | {"rank_pattern": {"q_proj": 3}, "alpha_pattern": {"layers.1.self_attn.v_proj": 9}, "target_parameters": ["x.gate_up_proj", "gate.weight"]}
    new = convert(Content(config, tensors), "3d")[0].config
    assert (new["r"], new["lora_alpha"]) == (2, 4)
    assert new["rank_pattern"] == {r"self_attn\.q_proj": 3, r"mlp\.experts\..*\bgate_up_proj": 4}
    assert new["alpha_pattern"] == {r"layers\.1\.self_attn\.v_proj": 9, r"mlp\.experts\..*\bgate_up_proj": 8}
    assert new["target_modules"] == ["self_attn.q_proj", "self_attn.v_proj"]
    assert new["target_parameters"] == ["gate.weight", "mlp.experts.down_proj", "mlp.experts.gate_up_proj"]


def names(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir())


def test_the_folder_appears_whole_or_not_at_all(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    content, out = read_content(write_adapter(tmp_path / "a")), tmp_path / "out"

    def killed(text: object, **_: object) -> str:
        raise SystemExit(143)

    with monkeypatch.context() as patch:
        patch.setattr(conversion.json, "dumps", killed)
        with pytest.raises(SystemExit):
            write_content(content, out)
    assert names(tmp_path) == ["a"]
    write_content(content, out)
    again = read_content(out)
    assert again.config == json.loads((tmp_path / "a/adapter_config.json").read_text("utf-8")) and again.tensors.keys() == content.tensors.keys()
    for there in (out, tmp_path / "empty"):
        there.mkdir(exist_ok=True)
        with pytest.raises(FileExistsError):
            write_content(content, there)
    assert names(tmp_path) == ["a", "empty", "out"]


@pytest.mark.parametrize("name", ["adapter_config.json", "adapter_model.safetensors"])
def test_what_cannot_be_read_is_not_converted(name: str, tmp_path: Path) -> None:
    (write_adapter(tmp_path / "a") / name).unlink()
    with pytest.raises(AdapterInvalid, match=name):
        read_content(tmp_path / "a")
