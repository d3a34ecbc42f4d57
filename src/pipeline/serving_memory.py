"""What a vLLM server takes of each GPU, in bytes by item, and what is left for the KV cache, from a model's dimensions and a serving recipe alone.

Weights, adapter slots and the KV cache are arithmetic on shapes (vLLM 0.32's layers) and agree with what was measured (vLLM 0.26, H200) within 1 %. What else vLLM takes is fitted,
one constant for one GPU and one for several, on one run each, of this model on H200s: they say nothing about other models or GPUs, hence RUNTIME_UNCERTAINTY_BYTES.
"""

from dataclasses import dataclass

from pipeline.gpus import GIB, MIB, Gpu
from pipeline.parameters import Architecture, Decoder, Shape, VisionTower
from pipeline.recipe import ServedLora, ServingRecipe

BLOCK_TOKENS = 16
"""vLLM gives the KV cache away in blocks of this."""
ROUTER_BYTES = 4
"""vLLM holds the router in float32 on every GPU."""
FP8_BYTES = 1
"""Of the linear modules (the vision tower's too) and experts; scales are less than 0.1 % of it and not counted."""
MOST_CAPTURED = 512
"""The largest batch that vLLM captures by itself; 1024 on a B200, which is not counted."""
GRAPH_BYTES = 16 * MIB
"""A captured CUDA graph over all layers, counted once for each size. vLLM has some sizes for answers alone too, and all with and without adapters (74 graphs of 26 sizes
and the vision tower's three took 1.45 GiB on one H200): what that is more is in RUNTIME_BYTES, which was fitted so."""
PICTURE_GRAPHS_BYTES = 350 * MIB
"""The vision tower's three: what graphs took more on one H200 with them than without, one run each (2.75 GiB, with 186 graphs of the decoder, against 2.36 with 180)."""
RUNTIME_BYTES = int(1.26 * GIB)
"""CUDA, libraries, the vision tower's activations, workspaces. Fitted: what one H200 with FP8 weights had left for the KV cache (24.3 GiB = 138,640 tokens) at vLLM's
default share of 0.92; the log names no share, and with 0.91 this would be negative."""
PARALLEL_BYTES = int(0.44 * GIB)
"""What more each of several GPUs takes than RUNTIME_BYTES, of which some is shared out. Fitted: what two H200 with bf16 weights had left at a share of 0.92 (25.26 GiB = 287,856
tokens), without expert parallelism, whose groups take more (NCCL 0.83 GiB a group, measured)."""
RUNTIME_UNCERTAINTY_BYTES = 3 * GIB
"""How far the two fitted constants may be off on other GPUs and models."""


@dataclass(frozen=True)
class ServingMemory:
    """Bytes per GPU. The KV cache gets what the others leave of `budget`."""

    budget: int
    """gpu_memory_utilization of the GPU."""
    weights: int
    adapter_slots: int
    activations: int
    """Of a step of the most tokens."""
    cuda_graphs: int
    runtime: int
    kv_token: int
    """KV cache of a token."""

    @property
    def items(self) -> dict[str, int]:
        """All but the KV cache."""
        return {
            "weights": self.weights,
            "adapter slots": self.adapter_slots,
            "activations of a step": self.activations,
            "CUDA graphs": self.cuda_graphs,
            "CUDA, libraries, communication": self.runtime,
        }

    @property
    def total(self) -> int:
        """All but the KV cache."""
        return sum(self.items.values())

    @property
    def kv_tokens(self) -> int:
        """That the KV cache holds; 0 if nothing is left."""
        return max(0, self.budget - self.total) // (self.kv_token * BLOCK_TOKENS) * BLOCK_TOKENS


def serving_memory(architecture: Architecture, recipe: ServingRecipe, gpu: Gpu) -> ServingMemory:
    """What a server of this recipe takes of each of its tensor_parallel_size GPUs; pure. Data parallel replicas are servers of their own."""
    decoder, ways, number = architecture.decoder, recipe.tensor_parallel_size, _number(recipe)
    default_tokens, default_sequences = step_defaults(gpu)
    tokens, sequences = recipe.max_num_batched_tokens or default_tokens, recipe.max_num_seqs or default_sequences
    return ServingMemory(
        budget=int(gpu.bytes * recipe.gpu_memory_utilization),
        weights=served_weight_bytes(architecture, recipe),
        adapter_slots=recipe.lora.max_loras * slot_bytes(architecture, recipe.lora, ways, recipe.expert_parallel, number),
        activations=_step_bytes(decoder, tokens, sequences, ways, number),
        cuda_graphs=_graph_bytes(recipe, sequences),
        runtime=RUNTIME_BYTES + (PARALLEL_BYTES if ways > 1 else 0),
        kv_token=kv_token_bytes(decoder, ways, number),
    )


def step_defaults(gpu: Gpu) -> tuple[int, int]:
    """Tokens and sequences of a step that vLLM 0.32's API server takes on such a GPU if it is told nothing (EngineArgs.get_batch_defaults)."""
    if gpu.bytes >= 160 * GIB:
        return 16384, 1024
    return (8192, 1024) if gpu.bytes >= 70 * GIB and "a100" not in gpu.name.lower() else (2048, 256)


def _number(recipe: ServingRecipe) -> int:
    """Bytes of an unquantized number."""
    return 4 if recipe.precision == "float32" else 2


def kv_token_bytes(decoder: Decoder, ways: int, number: int = 2) -> int:
    """Keys and values of a token in all layers on one of `ways` GPUs; more GPUs than KV heads hold each head several times. GLM-4.5V: 188,416 B on one."""
    return 2 * decoder.layers * max(1, decoder.kv_heads // ways) * decoder.head_dim * number


def served_weight_bytes(architecture: Architecture, recipe: ServingRecipe) -> int:
    """Of one GPU. Embeddings, lm_head, norms and biases stay unquantized; norms, router and the vision tower's convolutions stand whole on every GPU."""
    parameters, decoder, vision = architecture.parameters, architecture.decoder, architecture.vision
    ways, number = recipe.tensor_parallel_size, _number(recipe)
    linear = FP8_BYTES if recipe.quantization else number
    shapes = decoder.attention_linears
    queries = sum(inputs * outputs for inputs, outputs in (shapes["q_proj"], shapes["o_proj"])) // ways
    keys = sum(inputs * outputs for inputs, outputs in (shapes["k_proj"], shapes["v_proj"])) // min(ways, decoder.kv_heads)
    total = (decoder.layers * (queries + keys) + (parameters.dense_mlp + parameters.routed_experts + parameters.shared_experts) // ways) * linear
    total += (parameters.embeddings + parameters.lm_head) // ways * number
    total += (parameters.norms + decoder.layers * decoder.attention_biases // ways) * number
    total += parameters.router * ROUTER_BYTES
    if vision:
        split = vision.depth * vision.block_linears + vision.merger_linears
        total += split // (1 if recipe.vision_data_parallel else ways) * linear
        total += (parameters.vision_tower + parameters.merger - split) * number
    return total


def slot_bytes(architecture: Architecture, lora: ServedLora, ways: int = 1, expert_parallel: bool = False, number: int = 2) -> int:
    """One adapter slot on one of `ways` GPUs, for every module that the server wraps; vLLM allocates it at max_rank whatever an adapter's rank.

    As vllm.lora.layers creates them: A of a column-parallel module stands whole on every GPU and B is split, the other way round for row-parallel ones; experts likewise,
    or, with expert parallelism, whole experts are shared out.
    """
    decoder, rank = architecture.decoder, lora.max_rank
    names = {module.rpartition(".")[2] for module in lora.target_modules}
    hidden, attention = decoder.hidden, decoder.attention_linears
    queries, keys = attention["q_proj"][1], attention["k_proj"][1]
    numbers = 0
    if "qkv_proj" in names:
        numbers += decoder.layers * rank * (3 * hidden + queries // ways + 2 * keys // min(ways, decoder.kv_heads))
    if "o_proj" in names:
        numbers += decoder.layers * rank * (queries // ways + hidden)
    mlps = ((decoder.dense_layers, decoder.dense_width), (decoder.moe_layers, decoder.shared_width))
    for layers, width in mlps:
        if "gate_up_proj" in names and width:
            numbers += layers * rank * 2 * (hidden + width // ways)
        if "down_proj" in names and width:
            numbers += layers * rank * (width // ways + hidden)
    if "experts" in names:
        gate, down = (hidden, decoder.expert_width), (decoder.expert_width, hidden)
        numbers += decoder.moe_layers * rank * _expert_numbers(decoder.experts, gate, down, ways, expert_parallel)
    return numbers * number


def _expert_numbers(experts: int, gate: Shape, down: Shape, ways: int, expert_parallel: bool) -> int:
    """Per unit of rank, of one layer's experts on one GPU: gate and up, and down."""
    (hidden, width), (_, outputs) = gate, down
    if expert_parallel:
        return experts // ways * (2 * (hidden + width) + width + outputs)
    return experts * (2 * (hidden + width // ways) + width // ways + outputs)


def _step_bytes(decoder: Decoder, tokens: int, sequences: int, ways: int, number: int) -> int:
    """Activations of a step of that many tokens: the routed experts' two caches (vllm.model_executor.layers.fused_moe), attention, three hidden states; logits in float32 too."""
    experts = decoder.experts_per_token * (max(2 * decoder.expert_width // ways, decoder.hidden) + decoder.expert_width // ways)
    mlp = experts if decoder.moe_layers else 3 * decoder.dense_width // ways
    attention = (2 * decoder.heads + 2 * decoder.kv_heads) * decoder.head_dim // ways
    logits = min(sequences, tokens) * decoder.vocabulary * (4 + number)
    return tokens * (mlp + attention + 3 * decoder.hidden) * number + logits


def _graph_bytes(recipe: ServingRecipe, sequences: int) -> int:
    sizes = len(graph_sizes(recipe.graph_tokens, recipe.max_num_seqs)) if recipe.graph_tokens else captured_sizes(min(2 * sequences, MOST_CAPTURED))
    return GRAPH_BYTES * sizes + PICTURE_GRAPHS_BYTES * recipe.picture_graphs


def captured_sizes(largest: int) -> int:
    """How many batch sizes vLLM captures CUDA graphs for: 1, 2, 4, then every 8th to 256, every 16th above."""
    return sum(size <= largest for size in (1, 2, 4, *range(8, 256, 8), *range(256, largest + 1, 16)))


def graph_sizes(largest: int, sequences: int | None) -> list[int]:
    """The steps' tokens for which a recipe with `graph_tokens` has graphs captured: 1, 2, 4, every 8th and the last for answers to so many requests (None: 256), every 64th for prompts, and the largest."""
    answers = sequences or 256
    return sorted({size for size in (1, 2, 4, *range(8, answers, 8), answers, *range(64, largest, 64)) if size < largest} | {largest})


def parallel_faults(architecture: Architecture, recipe: ServingRecipe) -> list[str]:
    """What keeps vLLM from sharing the model out over tensor_parallel_size GPUs, each as `field: message`; pure."""
    ways, decoder, vision = recipe.tensor_parallel_size, architecture.decoder, architecture.vision
    faults = []
    if decoder.heads % ways:
        faults.append(f"tensor_parallel_size: {ways} does not divide the {decoder.heads} attention heads")
    if decoder.kv_heads % ways and ways % decoder.kv_heads:
        faults.append(f"tensor_parallel_size: {ways} does not go with {decoder.kv_heads} KV heads; use a divisor or a multiple of that")
    if decoder.moe_layers and not recipe.expert_parallel and decoder.expert_width % ways:
        faults.append(f"tensor_parallel_size: {ways} does not divide the experts' width {decoder.expert_width}; set expert_parallel: true")
    if vision and not recipe.vision_data_parallel and not _divides(ways, vision):
        faults.append(f"tensor_parallel_size: {ways} does not divide the vision tower's {vision.heads} heads; set vision_data_parallel: true")
    return faults


def _divides(ways: int, vision: VisionTower) -> bool:
    return vision.heads % ways == 0
