"""vLLM 0.32 on a CPU picks the Triton MoE backend as soon as LoRA is on and dies at the first request; `register` makes it pick the CPU's.

Private parts of vLLM replaced here, nowhere else: `select_unquantized_moe_backend`, in the module that defines it and in the one that
imported it by name. Entry point `tuneserve_cpu_moe` of the group vllm.general_plugins, which vLLM runs in each of its processes.
"""

import functools
from typing import Any

from pipeline.errors import ServingError


def register() -> None:
    """Patches vLLM in this process if it runs on a CPU; does nothing elsewhere."""
    # vLLM calls this in every process it starts, also where no CPU model is built: import its layers only where they are needed.
    from vllm.platforms import current_platform

    if not current_platform.is_cpu():
        return
    from vllm.config import get_current_vllm_config
    from vllm.model_executor.layers.fused_moe import unquantized_fused_moe_method
    from vllm.model_executor.layers.fused_moe.oracle import unquantized

    select = unquantized.select_unquantized_moe_backend

    @functools.wraps(select)
    def select_without_lora(moe_config: Any) -> Any:
        if not moe_config.is_lora_enabled:
            return select(moe_config)
        # The CPU kernel knows no LoRA: with wrapped experts it would serve their adapters without effect and without a word.
        lora = get_current_vllm_config().lora_config
        refuse_expert_lora(lora.target_modules if lora else None)
        moe_config.is_lora_enabled = False
        try:
            return select(moe_config)
        finally:
            moe_config.is_lora_enabled = True

    unquantized.select_unquantized_moe_backend = select_without_lora
    unquantized_fused_moe_method.select_unquantized_moe_backend = select_without_lora


def refuse_expert_lora(target_modules: list[str] | None) -> None:
    """Raises ServingError if a server with these --lora-target-modules (None: all) would wrap routed experts."""
    if target_modules is None or any(module.rpartition(".")[2] == "experts" for module in target_modules):
        raise ServingError(
            f"--lora-target-modules: no LoRA for routed experts on a CPU (got {target_modules or 'all modules'}); pass --lora-target-modules qkv_proj o_proj"
        )
