"""Every reason why a server cannot serve an adapter folder, on adapters of a few numbers written by hand; real PEFT's are in test_servable_contract.py."""

import json
import os
import time
from collections.abc import Callable, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy
import pytest
from safetensors.numpy import save_file

from pipeline.errors import AdapterInvalid
from pipeline.servable import ServerLimits, layout, read_base_shapes, reasons

ATTENTION = ServerLimits(max_rank=16, target_modules=("qkv_proj", "o_proj"), wraps_experts=False)
EXPERTS = ServerLimits(max_rank=16, target_modules=("qkv_proj", "o_proj", "experts"), wraps_experts=True)
LAYER = "base_model.model.model.language_model.layers.0"
Q = f"{LAYER}.self_attn.q_proj"
OUT = f"{LAYER}.self_attn.o_proj"
Shapes = Mapping[str, tuple[int, ...]]


def pair(module: str, rank: int = 4, inner: int = 6, outer: int = 8) -> dict[str, tuple[int, ...]]:
    return {f"{module}.lora_A.weight": (rank, inner), f"{module}.lora_B.weight": (outer, rank)}


def single_experts(count: int = 2, rank: int = 4, layer: str = LAYER) -> dict[str, tuple[int, ...]]:
    return {k: v for number in range(count) for name in ("gate", "up", "down") for k, v in pair(f"{layer}.mlp.experts.{number}.{name}_proj", rank).items()}


def fused_experts(count: int = 2, rank: int = 4, hidden: int = 6, inner: int = 5) -> dict[str, tuple[int, ...]]:
    gate_up = pair(f"{LAYER}.mlp.experts.base_layer", 2 * rank * count, hidden, 2 * inner)
    return gate_up | pair(f"{LAYER}.mlp.experts", rank * count, inner, hidden)


FUSED_RANKS = {"rank_pattern": {r".*\.gate_up_proj": 8}, "alpha_pattern": {r".*\.gate_up_proj": 16}}
ORDINARY = pair(Q) | pair(OUT)


def write(folder: Path, shapes: Shapes = ORDINARY, fill: float = 0.5, dtype: str = "float32", **config: Any) -> Path:
    folder.mkdir(parents=True, exist_ok=True)
    settings = {"peft_type": "LORA", "r": 4, "lora_alpha": 8, "target_modules": ["q_proj", "o_proj"], "bias": "none", **config}
    (folder / "adapter_config.json").write_text(json.dumps(settings), "utf-8")
    save_file({name: numpy.full(shape, fill, dtype) for name, shape in shapes.items()}, folder / "adapter_model.safetensors")
    return folder


def codes(folder: Path, limits: ServerLimits = ATTENTION) -> list[str]:
    found = reasons(folder, limits)
    assert all(reason.message and reason.remedy and str(folder) not in str(reason) for reason in found)
    return [reason.code for reason in found]


@pytest.mark.parametrize(
    ("limits", "shapes", "config"),
    [
        (ATTENTION, ORDINARY, {}),
        (ATTENTION, pair(Q), {}),
        (ATTENTION, ORDINARY, {"use_rslora": True, "r": 4, "lora_alpha": 0.5}),
        (ATTENTION, ORDINARY, {"init_lora_weights": "gaussian"}),
        (ATTENTION, ORDINARY, {"init_lora_weights": False, "modules_to_save": [], "rank_pattern": None, "alpha_pattern": {}}),
        (ATTENTION, ORDINARY, {"target_modules": "all-linear", "lora_bias": False, "use_dora": False}),
        (ATTENTION, ORDINARY, {"modules_to_save": ["score"]}),  # names a module that the model lacks: nothing is saved, and vLLM takes it
        (ATTENTION, pair(Q, 2) | pair(OUT, 16), {"rank_pattern": {"q_proj": 2, r"layers\.0\.self_attn\.o_proj": 16}}),
        (ATTENTION, pair(Q, 2) | pair(OUT), {"rank_pattern": {r"layers.(?:0|1).self_attn.q_proj": 2}}),
        (ATTENTION, ORDINARY, {"alpha_pattern": {"q_proj": 2, "o_proj": 0.5}}),
        (ATTENTION, pair("base_model.model.language_model.model.layers.0.self_attn.q_proj"), {}),  # vLLM's own name
        (replace(ATTENTION, target_modules=("q_proj", "o_proj")), ORDINARY, {}),  # an adapter's names
        (replace(ATTENTION, target_modules=("language_model.model.layers.0.self_attn.qkv_proj",)), pair(Q), {}),
        (replace(ATTENTION, target_modules=("gate_up_proj", "down_proj")), pair(f"{LAYER}.mlp.up_proj") | pair(f"{LAYER}.mlp.shared_experts.down_proj"), {}),
        (replace(ATTENTION, max_rank=4, base_modules=frozenset({"model.language_model.layers.0.self_attn.q_proj"})), pair(Q), {}),
        (EXPERTS, ORDINARY | single_experts(), {}),
        (EXPERTS, ORDINARY | fused_experts(), FUSED_RANKS),
    ],
)
def test_servable(limits: ServerLimits, shapes: Shapes, config: dict[str, Any], tmp_path: Path) -> None:
    assert codes(write(tmp_path / "a", shapes, **config), limits) == []


@pytest.mark.parametrize(
    ("code", "config"),
    [
        ("not-lora", {"peft_type": "IA3"}),
        ("not-lora", {"peft_type": None}),
        ("config-unreadable", {"r": 0}),
        ("config-unreadable", {"r": "4"}),
        ("config-unreadable", {"r": True}),
        ("config-unreadable", {"lora_alpha": None}),
        ("config-unreadable", {"lora_alpha": float("nan")}),
        ("config-unreadable", {"target_modules": {"q_proj": 1}}),
        ("config-unreadable", {"modules_to_save": "lm_head"}),
        ("config-unreadable", {"rank_pattern": {"q_proj": 4.0}}),
        ("config-unreadable", {"rank_pattern": ["q_proj"]}),
        ("config-unreadable", {"alpha_pattern": {"q_proj": "8"}}),
        ("dora", {"use_dora": True}),
        ("bias", {"bias": "all"}),
        ("bias", {"bias": "lora_only"}),
        ("bias", {"lora_bias": True}),
        ("modules-to-save", {"modules_to_save": ["lm_head"]}),
        ("unsupported-init", {"init_lora_weights": "pissa"}),
        ("unsupported-init", {"init_lora_weights": "pissa_niter_16"}),
        ("unsupported-init", {"init_lora_weights": "olora"}),
        ("unsupported-init", {"init_lora_weights": "loftq"}),
        ("unsupported-init", {"init_lora_weights": "corda"}),
        ("unsupported-feature", {"alora_invocation_tokens": [1, 2]}),
        ("unsupported-feature", {"layer_replication": [[0, 2], [1, 3]]}),
        ("unsupported-feature", {"arrow_config": {"top_k": 2}}),
        ("rank-too-large", {"rank_pattern": {"v_proj": 32}}),  # also if no module has that rank
        ("rank-shape-mismatch", {"r": 8}),
        ("rank-shape-mismatch", {"rank_pattern": {"q_proj": 2}}),
        ("no-effect", {"lora_alpha": 0}),
        ("bad-pattern", {"rank_pattern": {"(a+)+": 4}}),
        ("bad-pattern", {"alpha_pattern": {"(.*)(.*)x": 4}}),
        ("bad-pattern", {"rank_pattern": {"q_proj(": 4}}),
        ("bad-pattern", {"rank_pattern": {"[": 4}}),
    ],
)
def test_a_configuration_that_vllm_cannot_serve(code: str, config: dict[str, Any], tmp_path: Path) -> None:
    assert codes(write(tmp_path / "a", **config)) == [code]


@pytest.mark.parametrize("missing", ["r", "lora_alpha", "target_modules"])
def test_a_field_that_vllm_needs(missing: str, tmp_path: Path) -> None:
    config = json.loads((write(tmp_path / "a") / "adapter_config.json").read_text())
    del config[missing]
    (tmp_path / "a/adapter_config.json").write_text(json.dumps(config))
    assert codes(tmp_path / "a") == ["config-unreadable"]


TEXT_ONLY = "base_model.model.model.layers.0.self_attn.q_proj"
VISION = "base_model.model.model.visual.blocks.0.attn.qkv"


@pytest.mark.parametrize(
    ("expected", "limits", "shapes"),
    [
        (["keys-match-nothing"], ATTENTION, pair(TEXT_ONLY)),
        (["keys-match-nothing"], ATTENTION, pair("base_model.model.h.0.attn.c_attn")),
        (["keys-match-nothing"], ATTENTION, pair(f"{LAYER}.self_attn.qkv_proj")),  # vLLM's packed name, which it refuses in an adapter
        (["keys-match-nothing"], replace(ATTENTION, base_modules=frozenset({"model.language_model.layers.1.self_attn.q_proj"})), pair(Q)),
        (["module-not-wrapped"], ATTENTION, ORDINARY | pair(TEXT_ONLY)),
        (["module-not-wrapped"], ATTENTION, ORDINARY | pair(f"{LAYER}.mlp.gate_proj")),
        (["module-not-wrapped"], ATTENTION, ORDINARY | pair(f"{LAYER}.mlp.shared_experts.down_proj")),
        (["module-not-wrapped"], ATTENTION, ORDINARY | pair(f"{LAYER}.mlp.gate")),
        (["module-not-wrapped"], ATTENTION, ORDINARY | pair(VISION)),
        (["module-not-wrapped"], ATTENTION, pair(VISION)),
        (["module-not-wrapped"], replace(ATTENTION, target_modules=("qkv_proj", "gate_up_proj", "qkv")), pair(VISION)),
        (["module-not-wrapped"], ATTENTION, ORDINARY | pair("base_model.model.lm_head")),
        (["module-not-wrapped"], replace(ATTENTION, target_modules=("qkv_proj",)), ORDINARY),
        (["module-not-wrapped"], replace(ATTENTION, base_modules=frozenset({"model.language_model.layers.0.self_attn.q_proj"})), ORDINARY),
        (["experts-not-wrapped"], ATTENTION, ORDINARY | single_experts()),
        (["experts-not-wrapped"], ATTENTION, single_experts()),
        (["module-not-wrapped", "experts-not-wrapped"], ATTENTION, single_experts() | pair(VISION)),
        (["dora"], ATTENTION, ORDINARY | {f"{Q}.lora_magnitude_vector": (8,)}),
        (["bias"], ATTENTION, ORDINARY | {f"{Q}.base_layer.bias": (8,)}),
        (["bias"], ATTENTION, ORDINARY | {f"{Q}.lora_B.bias": (8,)}),
        (["modules-to-save"], ATTENTION, ORDINARY | {"base_model.model.lm_head.weight": (8, 8)}),
        (["modules-to-save"], ATTENTION, ORDINARY | {"base_model.model.score.weight": (8, 8)}),
        (["unsupported-tensor"], ATTENTION, ORDINARY | {f"{OUT}.lora_A.default.weight": (4, 6)}),
        (["unsupported-tensor"], ATTENTION, ORDINARY | {"base_model.model.x.token_adapter.trainable_tokens_delta": (4, 6)}),
        (["duplicate-module"], ATTENTION, ORDINARY | pair(Q.removeprefix("base_model.model."))),
        (["half-pair"], ATTENTION, pair(Q) | {f"{OUT}.lora_A.weight": (4, 6)}),
        (["half-pair"], ATTENTION, pair(Q) | {f"{OUT}.lora_B.weight": (8, 4)}),
        (["rank-shape-mismatch"], ATTENTION, pair(Q) | {f"{OUT}.lora_A.weight": (4, 6), f"{OUT}.lora_B.weight": (8, 2)}),
        (["rank-shape-mismatch"], ATTENTION, pair(Q) | {f"{OUT}.lora_A.weight": (4, 6, 1), f"{OUT}.lora_B.weight": (8, 4)}),
        (["rank-shape-mismatch"], ATTENTION, pair(Q) | {f"{OUT}.lora_A.weight": (4,), f"{OUT}.lora_B.weight": (8, 4)}),
        (["no-tensors"], ATTENTION, {}),
        (["no-tensors"], ATTENTION, {"base_model.model.model.language_model.embed_tokens.base_layer.weight": (4, 4)}),
        (["experts-incomplete"], EXPERTS, {k: v for k, v in single_experts().items() if "1.down" not in k}),
        (["experts-incomplete"], EXPERTS, {k: v for k, v in single_experts().items() if "experts.0" not in k}),
        (["experts-incomplete"], replace(EXPERTS, base_modules=frozenset({f"{LAYER[17:]}.mlp.experts.{n}.{p}_proj" for n in range(3) for p in ("gate", "up", "down")})), single_experts()),
    ],
)  # fmt: skip
def test_tensors_that_the_server_has_no_use_for(expected: list[str], limits: ServerLimits, shapes: Shapes, tmp_path: Path) -> None:
    assert codes(write(tmp_path / "a", shapes), limits) == expected


@pytest.mark.parametrize(
    ("expected", "limits", "shapes", "config"),
    [
        (["experts-not-wrapped"], ATTENTION, ORDINARY | fused_experts(), FUSED_RANKS),
        (["rank-too-large"], replace(EXPERTS, max_rank=4), fused_experts(), FUSED_RANKS),  # rank 4 in the recipe, 8 in the fused gate_up_proj
        (["experts-incomplete"], EXPERTS, fused_experts(), {}),  # without the pattern gate_up_proj has twice as many experts
        (["experts-incomplete"], EXPERTS, {k: v for k, v in fused_experts().items() if "base_layer" not in k}, FUSED_RANKS),
        (["experts-incomplete"], EXPERTS, fused_experts() | single_experts(), FUSED_RANKS),
        (
            ["experts-incomplete"],
            EXPERTS,
            pair(f"{LAYER}.mlp.experts", 16, 6, 10) | pair(f"{LAYER}.mlp.experts.base_layer", 8, 5, 6),
            {},
        ),  # nested the other way
        (["rank-shape-mismatch"], EXPERTS, fused_experts(), {"r": 3}),
        (["experts-incomplete"], EXPERTS, single_experts(rank=4) | pair(f"{LAYER}.mlp.experts.1.up_proj", 2), {"rank_pattern": {"experts.1.up_proj": 2}}),
    ],
)
def test_routed_experts(expected: list[str], limits: ServerLimits, shapes: Shapes, config: dict[str, Any], tmp_path: Path) -> None:
    assert codes(write(tmp_path / "a", shapes, **config), limits) == expected


def test_what_is_no_number_is_named(tmp_path: Path) -> None:
    for value in (float("nan"), float("inf"), float("-inf")):
        found = reasons(write(tmp_path / "a", fill=value), ATTENTION)
        assert [reason.code for reason in found] == ["not-finite"] and f"{OUT}.lora_A.weight" in found[0].message
    assert codes(write(tmp_path / "b", dtype="int8", fill=1)) == ["dtype"]
    assert codes(write(tmp_path / "c", fill=0)) == ["no-effect"]


def test_the_base_s_own_shapes(tmp_path: Path) -> None:
    base = tmp_path / "base"
    base.mkdir()
    with pytest.raises(FileNotFoundError):
        read_base_shapes(base)
    names = [f"{LAYER[17:]}.mlp.experts.{number}.{kind}_proj.weight" for number in range(2) for kind in ("gate", "up", "down")]
    weights = {name: numpy.zeros((6, 5) if "down" in name else (5, 6), "float32") for name in names}
    weights |= {f"{LAYER[17:]}.self_attn.q_proj.weight": numpy.zeros((8, 6), "float32"), f"{LAYER[17:]}.self_attn.q_proj.bias": numpy.zeros(8, "float32")}
    save_file(weights, base / "model.safetensors")
    limits = replace(EXPERTS, base_shapes=read_base_shapes(base))
    assert codes(write(tmp_path / "a", pair(Q, inner=6, outer=8) | fused_experts(2), **FUSED_RANKS), limits) == []
    assert codes(write(tmp_path / "b", pair(Q, inner=7, outer=8)), limits) == ["base-shape-mismatch"]
    assert codes(write(tmp_path / "c", pair(Q, inner=6, outer=4)), limits) == ["base-shape-mismatch"]
    assert codes(write(tmp_path / "d", fused_experts(4), **FUSED_RANKS), limits) == ["experts-incomplete"]
    assert codes(write(tmp_path / "e", fused_experts(2, hidden=7), **FUSED_RANKS), limits) == ["base-shape-mismatch"]
    assert codes(write(tmp_path / "f", pair(f"{LAYER}.self_attn.v_proj")), limits) == ["keys-match-nothing"]


def test_every_reason_is_said_the_most_fundamental_first(tmp_path: Path) -> None:
    folder = write(tmp_path / "a", ORDINARY | pair(VISION), fill=float("nan"), use_dora=True, rank_pattern={"x": 32})
    (folder / "optimizer.pt").write_bytes(b"")
    assert codes(folder) == ["pickle", "dora", "rank-too-large", "module-not-wrapped", "not-finite"]


def damage(name: str, content: bytes | None) -> Callable[[Path], None]:
    def act(folder: Path) -> None:
        (folder / name).unlink()
        if content is not None:
            (folder / name).write_bytes(content)

    return act


def header(text: str, length: int | None = None) -> bytes:
    return (len(text) if length is None else length).to_bytes(8, "little") + text.encode()


def cut(folder: Path, size: int) -> None:
    whole = (folder / "adapter_model.safetensors").read_bytes()
    (folder / "adapter_model.safetensors").write_bytes(whole[:size])


def link(folder: Path, name: str) -> None:
    (folder / name).unlink(missing_ok=True)
    (folder / name).symlink_to("/dev/zero")


def pipe(folder: Path, name: str) -> None:
    (folder / name).unlink()
    os.mkfifo(folder / name)


WEIGHTS, CONFIG = "adapter_model.safetensors", "adapter_config.json"
MANY = [f'"{number}":{{"dtype":"F32","shape":[0],"data_offsets":[0,0]}}' for number in range(130_000)]
OVERLAP = '{"a":{"dtype":"F32","shape":[1],"data_offsets":[0,4]},"b":{"dtype":"F32","shape":[1],"data_offsets":[0,4]}}'


@pytest.mark.parametrize(
    ("expected", "act"),
    [
        (["weights-unreadable"], damage(WEIGHTS, None)),
        (["weights-unreadable"], damage(WEIGHTS, b"")),
        (["weights-unreadable"], damage(WEIGHTS, b"1234")),
        (["weights-unreadable"], damage(WEIGHTS, b"\x80\x04K\x01." * 9)),  # a pickle by another name
        (["weights-unreadable"], lambda folder: cut(folder, 40)),
        (["weights-unreadable"], lambda folder: cut(folder, -1)),
        (["weights-unreadable"], damage(WEIGHTS, header("{}", 2**63))),
        (["weights-unreadable"], damage(WEIGHTS, header(" " * (9 << 20)))),
        (["weights-unreadable"], damage(WEIGHTS, header("[" * 100_000))),
        (["weights-unreadable"], damage(WEIGHTS, header("not JSON"))),
        (["weights-unreadable"], damage(WEIGHTS, header('{"a":{"dtype":"F32","shape":[99999999999,99999999999],"data_offsets":[0,4]}}') + b"1234")),
        (["weights-unreadable"], damage(WEIGHTS, header(OVERLAP) + b"1234")),
        (["weights-unreadable"], damage(WEIGHTS, header(f'{{"{"a" * 300}":{{"dtype":"F32","shape":[1],"data_offsets":[0,4]}}}}') + b"1234")),
        (["weights-unreadable"], damage(WEIGHTS, header(f"{{{','.join(MANY)}}}"))),
        (["no-tensors"], damage(WEIGHTS, header("{}"))),
        (["weights-unreadable"], lambda folder: pipe(folder, WEIGHTS)),
        (["config-unreadable"], lambda folder: pipe(folder, CONFIG)),
        (["config-unreadable"], damage(CONFIG, None)),
        (["config-unreadable"], damage(CONFIG, b"")),
        (["config-unreadable"], damage(CONFIG, b"\xff\xfe{")),
        (["config-unreadable"], damage(CONFIG, b"[" * 100_000)),
        (["config-unreadable"], damage(CONFIG, b"[1]")),
        (["config-unreadable"], damage(CONFIG, b'{"peft_type": "LORA", "r": ' + b"9" * 5000 + b"}")),
        (["config-unreadable"], damage(CONFIG, b" " * (5 << 20))),
        (["link"], lambda folder: link(folder, WEIGHTS)),
        (["link"], lambda folder: link(folder, CONFIG)),
        (["link"], lambda folder: link(folder, "README.md")),
        (["pickle"], lambda folder: (folder / "adapter_model.bin").write_bytes(b"")),
        (["pickle"], lambda folder: (folder / "rng_state.PTH").write_bytes(b"")),
        (["pickle", "weights-unreadable"], lambda folder: (folder / WEIGHTS).rename(folder / "adapter_model.bin")),
        (["config-unreadable", "weights-unreadable"], lambda folder: [path.unlink() for path in folder.iterdir()]),
    ],
)  # fmt: skip
def test_damaged_and_hostile_folders(expected: list[str], act: Callable[[Path], object], tmp_path: Path) -> None:
    folder = write(tmp_path / "a")
    act(folder)
    started = time.monotonic()
    assert codes(folder) == expected
    assert time.monotonic() - started < 5  # the first one imports torch


def test_a_link_or_pickle_below_the_folder_and_no_folder(tmp_path: Path) -> None:
    folder = write(tmp_path / "a")
    (folder / "deep").mkdir()
    (folder / "deep/scheduler.pt").write_bytes(b"")
    (folder / "loop").symlink_to(folder)
    assert codes(folder) == ["link", "pickle"]
    assert [reason.code for reason in reasons(tmp_path / "none", ATTENTION)] == ["config-unreadable", "weights-unreadable"]


def test_costly_patterns_end(tmp_path: Path) -> None:
    modules = {k: v for number in range(300) for k, v in pair(f"{'a.' * 50}layers.{number}.q_proj").items()}
    patterns = {f".*{'.' * (number % 40)}x{number}": 4 for number in range(20_000)}
    started = time.monotonic()
    assert "bad-pattern" in codes(write(tmp_path / "a", modules, rank_pattern=patterns))
    assert time.monotonic() - started < 20


def test_messages_hold_no_control_characters_and_end(tmp_path: Path) -> None:
    folder = write(tmp_path / "a", pair("a\n\x1b[31m" + "b" * 200), peft_type="LORA", init_lora_weights="\x1b" * 10_000, bias={"a": ["b"] * 1000})
    found = reasons(folder, ATTENTION)
    assert {reason.code for reason in found} == {"bias", "unsupported-init", "keys-match-nothing"}
    assert all(str(reason).isprintable() and len(str(reason)) < 600 for reason in found)


@pytest.mark.parametrize(
    ("shapes", "expected"), [(ORDINARY, "plain"), (single_experts(), "experts-2d"), (fused_experts(), "experts-3d"), (ORDINARY | fused_experts(), "experts-3d")]
)
def test_layout(shapes: Shapes, expected: str, tmp_path: Path) -> None:
    assert layout(write(tmp_path / "a", shapes)) == expected


def test_no_layout_of_what_cannot_be_read(tmp_path: Path) -> None:
    with pytest.raises(AdapterInvalid, match="no tensors"):
        layout(write(tmp_path / "a", {}))


def test_an_adapter_of_true_size_takes_well_under_a_second(tmp_path: Path) -> None:
    shapes = {k: v for layer in range(46) for name in "qkvo" for k, v in pair(f"{LAYER[:-1]}{layer}.self_attn.{name}_proj", 16, 4096, 6000).items()}
    folder = write(tmp_path / "a", shapes, dtype="float16", r=16)
    assert (folder / WEIGHTS).stat().st_size > 55e6
    reasons(folder, ATTENTION)  # imports torch
    started = time.monotonic()
    assert codes(folder) == []
    assert time.monotonic() - started < 1
