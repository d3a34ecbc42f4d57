"""How many parameters a decoder with routed experts and a vision tower has, by module, from its config.json alone. Counts are exact for transformers 5."""

import json
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from pipeline.errors import Fault, InvalidInput

PUBLISHED_CONFIG = Path(__file__).with_name("glm4_5v.config.json")
"""GLM-4.5V's true dimensions (zai-org/GLM-4.5V, config.json), for plans that are made before its 214 GB are here."""
QKV_BIAS_TYPES = ("qwen2",)
"""Model types, by their beginning, whose q, k and v have biases though no key says so."""
QK_NORM_TYPES = ("qwen3",)
"""Model types, by their beginning, that normalize q and k; GLM-4.5 says it with `use_qk_norm`, which GLM-4.5V does not know."""
Shape = tuple[int, int]
"""Inputs and outputs of a linear module."""


@dataclass(frozen=True)
class Decoder:
    """The language model's dimensions. Layers hold attention and either a dense MLP or routed experts with a router and shared experts."""

    hidden: int
    layers: int
    heads: int
    kv_heads: int
    head_dim: int
    vocabulary: int
    dense_width: int
    """Of the dense layers' MLPs."""
    moe_layers: int
    experts: int
    experts_per_token: int
    expert_width: int
    shared_width: int
    """Of all shared experts together; 0 without any."""
    qkv_bias: bool
    qk_norm: bool
    shared_gate: bool
    """The shared expert has a gate of its own (Qwen)."""
    router_bias: bool
    """The router keeps e_score_correction_bias, a float32 buffer."""
    tied: bool
    """The embeddings are the lm_head."""

    @property
    def dense_layers(self) -> int:
        return self.layers - self.moe_layers

    @property
    def attention_linears(self) -> dict[str, Shape]:
        """Of one layer, by their names in recipes."""
        queries, keys = self.heads * self.head_dim, self.kv_heads * self.head_dim
        return {"q_proj": (self.hidden, queries), "k_proj": (self.hidden, keys), "v_proj": (self.hidden, keys), "o_proj": (queries, self.hidden)}

    @property
    def attention_weights(self) -> int:
        """Of one layer, without biases and norms."""
        return sum(inputs * outputs for inputs, outputs in self.attention_linears.values())

    @property
    def attention_biases(self) -> int:
        """Of one layer."""
        return (self.heads + 2 * self.kv_heads) * self.head_dim if self.qkv_bias else 0

    @property
    def experts_of_a_layer(self) -> int:
        """Parameters of one layer's routed experts: gate, up and down of each."""
        return self.experts * 3 * self.hidden * self.expert_width


@dataclass(frozen=True)
class VisionTower:
    """The dimensions of GLM-4V's vision tower and of the merger behind it; `merger_width` is config.json's intermediate_size, the blocks' MLPs are `out_hidden` wide."""

    width: int
    depth: int
    out_hidden: int
    merger_width: int
    patch: int
    temporal_patch: int
    channels: int
    image_size: int
    merge: int
    heads: int
    qkv_bias: bool

    @property
    def block_linears(self) -> int:
        """Weights of one block's linear modules."""
        return self.width * 3 * self.width + self.width * self.width + 3 * self.width * self.out_hidden

    @property
    def merger_linears(self) -> int:
        return self.out_hidden * self.out_hidden + 3 * self.out_hidden * self.merger_width

    @property
    def patches_per_token(self) -> int:
        """Patches that become one image token."""
        return self.merge * self.merge


@dataclass(frozen=True)
class Parameters:
    """Parameters by module, over all layers."""

    embeddings: int
    attention: int
    """Weights and biases of q, k, v and o."""
    dense_mlp: int
    routed_experts: int
    shared_experts: int
    router: int
    """With e_score_correction_bias."""
    norms: int
    lm_head: int
    """0 if it is the embeddings."""
    vision_tower: int
    """Without the merger."""
    merger: int

    @property
    def total(self) -> int:
        return sum(asdict(self).values())


@dataclass(frozen=True)
class Architecture:
    """What a config.json says about sizes. `source` is what a plan calls it: a path, or whose published dimensions these are."""

    source: str
    decoder: Decoder
    vision: VisionTower | None

    @property
    def parameters(self) -> Parameters:
        """Exact, as transformers 5 builds the model (tests/test_capacity_contract.py compares)."""
        text, vision = self.decoder, self.vision
        norms = text.hidden * (2 * text.layers + 1) + (2 * text.head_dim * text.layers if text.qk_norm else 0)
        return Parameters(
            embeddings=text.vocabulary * text.hidden,
            attention=text.layers * (text.attention_weights + text.attention_biases),
            dense_mlp=text.dense_layers * 3 * text.hidden * text.dense_width,
            routed_experts=text.moe_layers * text.experts_of_a_layer,
            shared_experts=text.moe_layers * (3 * text.hidden * text.shared_width + (text.hidden if text.shared_gate else 0)),
            router=text.moe_layers * text.experts * (text.hidden + (1 if text.router_bias else 0)),
            norms=norms,
            lm_head=0 if text.tied else text.vocabulary * text.hidden,
            vision_tower=_tower(vision) if vision else 0,
            merger=vision.merger_linears + 2 * vision.out_hidden if vision else 0,
        )


def _tower(vision: VisionTower) -> int:
    """Patch and position embeddings, blocks with two norms, the norms around them, and the convolution that merges patches."""
    width = vision.width
    patches = width * vision.channels * vision.temporal_patch * vision.patch**2 + width
    positions = (vision.image_size // vision.patch) ** 2 * width
    block = vision.block_linears + 2 * width + (3 * width if vision.qkv_bias else 0)
    downsample = width * vision.out_hidden * vision.merge**2 + vision.out_hidden
    return patches + positions + vision.depth * block + 2 * width + downsample


def read_architecture(config: Mapping[str, Any], source: str) -> Architecture:
    """The sizes in a config.json's content: `text_config` and `vision_config`, or a decoder's keys at its top.

    Raises InvalidInput, naming every key that is missing: transformers' own defaults are not GLM-4.5V's, so nothing is guessed.
    """
    keys = _Keys(config.get("text_config", config), source)
    model_type = str(config.get("text_config", config).get("model_type", ""))
    layers, experts = keys.size("num_hidden_layers"), keys.size("n_routed_experts", "num_local_experts", "num_experts", default=0)
    moe_layers = _moe_layers(keys.content, layers) if experts else 0
    hidden, heads = keys.size("hidden_size"), keys.size("num_attention_heads")
    expert_width = keys.size("moe_intermediate_size") if moe_layers else 0
    shared = keys.size("n_shared_experts", default=0) * expert_width or keys.size("shared_expert_intermediate_size", default=0)
    decoder = Decoder(
        hidden=hidden,
        layers=layers,
        heads=heads,
        kv_heads=keys.size("num_key_value_heads", default=heads),
        head_dim=keys.size("head_dim", default=hidden // heads if heads else 0),
        vocabulary=keys.size("vocab_size"),
        dense_width=keys.size("intermediate_size") if moe_layers < layers else 0,
        moe_layers=moe_layers,
        experts=experts if moe_layers else 0,
        experts_per_token=keys.size("num_experts_per_tok") if moe_layers else 0,
        expert_width=expert_width,
        shared_width=shared if moe_layers else 0,
        qkv_bias=bool(keys.content.get("attention_bias")) or model_type.startswith(QKV_BIAS_TYPES),
        qk_norm=model_type.startswith(QK_NORM_TYPES) or (model_type == "glm4_moe" and bool(keys.content.get("use_qk_norm"))),
        shared_gate="shared_expert_intermediate_size" in keys.content,
        router_bias="n_group" in keys.content,
        tied=bool(config.get("tie_word_embeddings", keys.content.get("tie_word_embeddings", False))),
    )
    vision, missing = _vision(config["vision_config"], source) if isinstance(config.get("vision_config"), dict) else (None, [])
    if faults := [*keys.faults, *missing]:
        raise InvalidInput(faults)
    return Architecture(source, decoder, vision)


def _vision(content: Mapping[str, Any], source: str) -> tuple[VisionTower, list[Fault]]:
    keys = _Keys(content, source, "vision_config.")
    tower = VisionTower(
        width=keys.size("hidden_size"),
        depth=keys.size("depth"),
        out_hidden=keys.size("out_hidden_size"),
        merger_width=keys.size("intermediate_size"),
        patch=keys.size("patch_size"),
        temporal_patch=keys.size("temporal_patch_size"),
        channels=keys.size("in_channels", default=3),
        image_size=keys.size("image_size"),
        merge=keys.size("spatial_merge_size"),
        heads=keys.size("num_heads"),
        qkv_bias=bool(content.get("attention_bias")),
    )
    return tower, keys.faults


def _moe_layers(content: Mapping[str, Any], layers: int) -> int:
    """How many layers have routed experts: all but the first ones (GLM, DeepSeek), or every n-th but for some (Qwen)."""
    first, step, dense = content.get("first_k_dense_replace", 0), content.get("decoder_sparse_step", 1), content.get("mlp_only_layers") or ()
    return sum(number >= first and number not in dense and (number + 1) % step == 0 for number in range(layers))


class _Keys:
    """Sizes out of a part of a config.json; notes what is missing instead of stopping at the first."""

    def __init__(self, content: Mapping[str, Any], source: str, prefix: str = "") -> None:
        self.content, self.source, self.prefix = content, source, prefix
        self.faults: list[Fault] = []

    def size(self, *names: str, default: int | None = None) -> int:
        """The first of `names` that is a whole number; 0 and a fault if none is and there is no default."""
        for name in names:
            value = self.content.get(name)
            if isinstance(value, int) and not isinstance(value, bool) and value >= 0:
                return value
        if default is None:
            self.faults.append(
                Fault(self.source, f"{self.prefix}{names[0]}", "is missing or no whole number; a plan needs it: give the model's own config.json")
            )
        return default or 0


def read_config(path: Path) -> Architecture:
    """The sizes in the config.json at `path`. Raises InvalidInput if it is none."""
    try:
        content = json.loads(path.read_text("utf-8"))
    except (OSError, ValueError) as error:
        raise InvalidInput([Fault(str(path), "", f"cannot be read ({error}); download the file again")]) from error
    if not isinstance(content, dict):
        raise InvalidInput([Fault(str(path), "", "not a JSON object; download the file again")])
    return read_architecture(content, str(path))


def published() -> Architecture:
    """GLM-4.5V as it was published."""
    return read_architecture(json.loads(PUBLISHED_CONFIG.read_text("utf-8")), "GLM-4.5V's published dimensions")


def lora_parameters(shapes: Sequence[Shape], rank: int) -> int:
    """Of A and B for each linear module (arXiv 2106.09685): rank x (inputs + outputs)."""
    return sum(rank * (inputs + outputs) for inputs, outputs in shapes)
