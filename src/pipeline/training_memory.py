"""What a LoRA or QLoRA training takes of each GPU, in bytes by item, from a model's dimensions and a recipe alone.

A step has two moments that may need most: the loss, when three float32 copies of the logits stand beside everything kept for the backward pass, and one layer's
backward pass, when its weights (gathered or dequantized) and its activations do. Everything else is there all the time.

Held against 13 measured peaks (torch's allocator) of GLM-4.5V cut to 1 to 6 layers on one H100, against eight QLoRA steps at full depth, and against ZeRO-3 of 16 layers on two:
tests/test_training_memory.py. Not measured: ZeRO-1 and 2, offloading, method: dpo, flash attention; their items are the papers' and the sources' arithmetic.
"""

from dataclasses import dataclass

from pipeline.gpus import GIB
from pipeline.parameters import Architecture, Decoder, VisionTower, lora_parameters
from pipeline.recipe import ATTENTION, FinetuneRecipe

NF4_BYTES = 0.5 + 1 / 64 + 4 / (64 * 256)
"""A parameter in NF4 with nested scales (QLoRA, arXiv 2305.14314, section 3): 4 bits, an 8-bit scale for 64 of them, a float32 scale for 256 of those. Exact."""
LOGITS_COPIES = 3
"""Float32 copies of the logits at once: log-probabilities, their gradient and the logits' (torch's cross_entropy after `logits.float()`). Measured: 3.00 on one layer."""
CHUNK_TOKENS = 512
"""So many tokens' logits there are at once in plain training (swift_chunked_loss.CHUNK_TOKENS, which a contract test compares); all of them with row weights or preferences."""
ROUTED_GRADIENT_BYTES = 4
"""The gradient of the routed experts' outputs is float32 (routing weights are), and stands beside its copy in the training's precision. Fitted: of the QLoRA step at
2,048 tokens (61.1 GiB), which alone is bound by a layer; it decides 0.4 GiB there, and no more than half of it can be wrong within that figure's rounding."""
NORM_BYTES = 4
"""RMSNorm keeps its input in float32."""
MERGER_BYTES = 20
"""Kept per output of the merger: four tensors in bfloat16, three in float32 (its LayerNorm and GELU run in float32). Measured within 3 %."""
CONTEXT_BYTES = int(0.75 * GIB)
"""CUDA's context and the libraries' workspaces: measured on one H100 (torch 2.11, CUDA 13), 0.67 to 0.76 GiB."""
GATHERED_LAYERS = 3
"""With ZeRO-3 a layer is at work, the next one is gathered ahead, and DeepSpeed (AllGatherCoalescedHandle.wait) copies a gathered layer out of one flat buffer. Measured on two H100,
16 layers: 2.0 layers at the forward pass's peak, 2.9 at the backward pass's."""
NCCL_BYTES = int(0.83 * GIB)
"""NCCL's buffers of one group: measured on two H100, 0.83 GiB after all_reduce, all_gather and reduce_scatter; more GPUs may take more."""


@dataclass(frozen=True)
class TrainingMemory:
    """Bytes per GPU. `at_loss` and `at_layer` are what the two moments add; only the larger counts."""

    weights: int
    """The frozen base: this GPU's share."""
    adapter: int
    """A and B, their gradients and the optimizer's state."""
    kept: int
    """Activations kept for the backward pass; with gradient checkpointing each layer's input only."""
    at_loss: int
    at_layer: int
    context: int
    host: int
    """In host memory, over all processes: what is offloaded."""

    @property
    def bound_by(self) -> str:
        return "logits" if self.at_loss >= self.at_layer else "layer"

    @property
    def items(self) -> dict[str, int]:
        """What stands on the GPU at the moment that needs most."""
        moment = ("logits in float32, three times", self.at_loss) if self.bound_by == "logits" else ("layers at work", self.at_layer)
        items = {
            "weights of the frozen base": self.weights,
            "adapter, its gradients and optimizer": self.adapter,
            "activations kept for backward": self.kept,
            moment[0]: moment[1],
            "CUDA and communication": self.context,
        }
        return {name: size for name, size in items.items() if size}

    @property
    def allocated(self) -> int:
        """What torch's allocator would say at the peak: all but CUDA itself."""
        return sum(self.items.values()) - self.context

    @property
    def total(self) -> int:
        return sum(self.items.values())


def training_memory(
    architecture: Architecture,
    recipe: FinetuneRecipe,
    *,
    answer_tokens: int | None = None,
    image_tokens: int | None = None,
) -> TrainingMemory:
    """The peak of a recipe's training, per GPU; pure.

    `answer_tokens` and `image_tokens` are the most that one row has; None: as many as the row may be long. ms-swift computes logits for answers only.
    """
    training, lora, decoder = recipe.training, recipe.lora, architecture.decoder
    number = 4 if training.precision == "float32" else 2
    rows = training.micro_batch_size * (2 if recipe.method == "dpo" else 1)  # preferred and rejected answers stand side by side
    tokens = rows * training.max_length_tokens
    answers = rows * min(answer_tokens or training.max_length_tokens, training.max_length_tokens)
    images = rows * min(training.max_length_tokens if image_tokens is None else image_tokens, training.max_length_tokens)
    zero3 = training.deepspeed in ("zero3", "zero3_offload")
    quantized = recipe.quantization is not None
    adapts_experts = not set(lora.target_modules) <= set(ATTENTION)
    layers = _adapted_layers(recipe, decoder)

    held = weight_bytes(architecture, number, quantized)
    weights = 0 if training.deepspeed == "zero3_offload" else held // training.processes if zero3 else held
    adapter, host = _adapter_bytes(adapter_parameters(architecture, recipe), recipe, number)
    host += held if training.deepspeed == "zero3_offload" else 0

    chunked = recipe.method == "sft" and not training.row_weights
    at_loss = LOGITS_COPIES * 4 * decoder.vocabulary * (min(answers, CHUNK_TOKENS) if chunked else answers)
    at_loss += decoder.vocabulary * decoder.hidden * number if zero3 else 0  # lm_head, gathered
    whole = GATHERED_LAYERS * _layer_weights(decoder) * number if zero3 else 0
    dequantized = _layer_weights(decoder) * number if quantized else 0
    experts = decoder.experts_of_a_layer * number
    made = (experts if adapts_experts else 0) + (experts if quantized else 0)  # peft adds B A to the weights; both stay for backward
    at_layer = max(whole, dequantized) + (experts * 4 // 3 if adapts_experts else 0)  # and the gradient of down_proj's sum, a third
    if training.gradient_checkpointing:
        kept = tokens * decoder.layers * decoder.hidden * number
        if training.offload_checkpoints:
            host += kept * training.processes
            kept = tokens * decoder.hidden * number  # the one that is back for its layer
        at_layer += tokens * max(_kept_by_layer(decoder, recipe, number, moe, adapted=True) for moe in _kinds(decoder))
    else:
        kept = tokens * sum(_kept_by_layer(decoder, recipe, number, moe, adapted) for moe, adapted in _all_layers(decoder, layers))
        kept += decoder.moe_layers * made
        at_layer = max(whole, dequantized) + (experts // 3 if adapts_experts else 0)
    at_layer += tokens * _gradients_of_layer(decoder, number)
    kept += images * _kept_by_images(architecture.vision, recipe, number) if architecture.vision else 0
    context = CONTEXT_BYTES + (NCCL_BYTES if training.processes > 1 else 0) if training.device == "cuda" else 0
    return TrainingMemory(weights, adapter, kept, at_loss, at_layer, context, host)


def weight_bytes(architecture: Architecture, number: int, quantized: bool) -> int:
    """Of the whole base with `number` bytes a parameter; nf4 is for the language model's linear modules and experts, not for lm_head and the vision tower."""
    parameters, decoder = architecture.parameters, architecture.decoder
    linear = decoder.layers * decoder.attention_weights + parameters.dense_mlp + parameters.shared_experts
    small = linear + parameters.routed_experts if quantized else 0
    return int((parameters.total - small) * number + small * NF4_BYTES)


def adapter_parameters(architecture: Architecture, recipe: FinetuneRecipe) -> int:
    """Of A and B together; exact for peft 0.20, which gives the fused gate_up_proj of the routed experts twice the rank."""
    lora, decoder, vision = recipe.lora, architecture.decoder, architecture.vision
    attention = [shape for name, shape in decoder.attention_linears.items() if name in lora.target_modules]
    count = len(_adapted_layers(recipe, decoder)) * lora_parameters(attention, lora.rank)
    experts = []
    if "gate_proj" in lora.target_modules:
        experts += [(2 * decoder.hidden, 2 * 2 * decoder.expert_width)]  # rank 2r on (hidden, 2 x width)
    if "down_proj" in lora.target_modules:
        experts += [(decoder.expert_width, decoder.hidden)]
    count += decoder.moe_layers * decoder.experts * lora_parameters(experts, lora.rank)
    if vision and not lora.freeze_vit:
        count += vision.depth * lora_parameters([(vision.width, 3 * vision.width), (vision.width, vision.width)], lora.rank)
    if vision and not lora.freeze_aligner:
        count += lora_parameters([(vision.out_hidden, vision.out_hidden)], lora.rank)
    return count


def _adapter_bytes(count: int, recipe: FinetuneRecipe, number: int) -> tuple[int, int]:
    """Per GPU, and in host memory over all processes.

    Without DeepSpeed A and B are float32, with a gradient and AdamW's two moments: 16 bytes (and DistributedDataParallel's buckets, 4). With it, in bfloat16, 2 + 2 bytes
    and 12 for the optimizer, which ZeRO splits: 1 the optimizer, 2 the gradients, 3 the weights too (arXiv 1910.02054, section 3).
    """
    training = recipe.training
    if training.deepspeed is None:
        return count * (16 + (4 if training.processes > 1 else 0)), 0
    optimizer, shares = 12 if number == 2 else 8, training.processes
    per_gpu = count * number // (shares if training.deepspeed.startswith("zero3") else 1)
    per_gpu += count * number // (shares if training.deepspeed != "zero1" else 1)
    return (per_gpu, count * optimizer) if training.deepspeed.endswith("_offload") else (per_gpu + count * optimizer // shares, 0)


def _adapted_layers(recipe: FinetuneRecipe, decoder: Decoder) -> range:
    """Layers whose attention gets an adapter."""
    first, last = recipe.lora.layers or (0, decoder.layers - 1)
    return range(first, min(last, decoder.layers - 1) + 1)


def _kinds(decoder: Decoder) -> list[bool]:
    """Whether layers have routed experts, each kind that there is."""
    return [kind for kind, count in ((True, decoder.moe_layers), (False, decoder.dense_layers)) if count]


def _all_layers(decoder: Decoder, adapted: range) -> list[tuple[bool, bool]]:
    """For each layer whether it has routed experts and whether its attention is adapted."""
    return [(number >= decoder.dense_layers, number in adapted) for number in range(decoder.layers)]


def _layer_weights(decoder: Decoder) -> int:
    """Parameters of the largest layer."""
    mlps = [decoder.experts_of_a_layer + 3 * decoder.hidden * decoder.shared_width] if decoder.moe_layers else []
    mlps += [3 * decoder.hidden * decoder.dense_width] if decoder.dense_layers else []
    return decoder.attention_weights + max(mlps, default=0)


def _kept_by_layer(decoder: Decoder, recipe: FinetuneRecipe, number: int, moe: bool, adapted: bool) -> int:
    """Bytes a token that one layer keeps for its backward pass, counted in transformers 5's code (modeling_glm4v_moe, grouped_mm_experts_forward).

    Both norms' inputs; q, k, v and attention's output; of each MLP gate, up and their product; of the routed experts also the output; of each adapted module its input.
    Measured against 6 layers without gradient checkpointing: 1 % too low.
    """
    attention = decoder.attention_linears
    numbers = 2 * sum(attention[name][1] for name in ("q_proj", "k_proj"))
    if moe:
        numbers += decoder.experts_per_token * (3 * decoder.expert_width + decoder.hidden) + 3 * decoder.shared_width
        if not set(recipe.lora.target_modules) <= set(ATTENTION):
            numbers += decoder.experts_per_token * (decoder.hidden + decoder.expert_width)
    else:
        numbers += 3 * decoder.dense_width
    numbers += sum(shape[0] for name, shape in attention.items() if name in recipe.lora.target_modules) if adapted else 0
    return 2 * decoder.hidden * NORM_BYTES + numbers * number


def _gradients_of_layer(decoder: Decoder, number: int) -> int:
    """Bytes a token of gradients at work in one layer's backward pass."""
    if decoder.moe_layers:
        return decoder.experts_per_token * decoder.hidden * (ROUTED_GRADIENT_BYTES + number)
    return 2 * decoder.dense_width * number


def _kept_by_images(vision: VisionTower, recipe: FinetuneRecipe, number: int) -> int:
    """Bytes an image token that the vision tower and the merger keep; none if both are frozen, since nothing before the language model then has a gradient.

    Measured with gradient checkpointing: 2 % too low; without: 6 % too low.
    """
    if recipe.lora.freeze_vit and recipe.lora.freeze_aligner:
        return 0
    merger = 3 * vision.merger_width * number + MERGER_BYTES * vision.out_hidden
    if recipe.lora.freeze_vit:
        return merger
    block = 2 * vision.width * NORM_BYTES + (6 * vision.width + 3 * vision.out_hidden) * number
    return merger + vision.patches_per_token * vision.depth * (vision.width * number if recipe.training.gradient_checkpointing else block)
