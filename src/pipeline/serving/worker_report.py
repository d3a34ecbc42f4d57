"""What became of an adapter's weights inside a vLLM worker. vLLM mixes the class named by --worker-extension-cls into its worker.

Private parts of vLLM read here, nowhere else: the worker's `model_runner.lora_manager._adapter_manager`, its `_registered_adapters`, `modules` and `lora_index_to_id`;
tests/serving/test_vllm_contract.py pins them.
"""

from typing import Any


class AdapterReport:
    """Methods for `EngineClient.collective_rpc`; `self` is the worker."""

    def tuneserve_adapter_mapping(self, lora_id: int) -> tuple[int, list[str], list[int]]:
        """How many wrapped modules of this worker's model the loaded adapter changes; the adapter's modules that are none of the model's; the numbers of the adapters that are in slots.

        vLLM drops modules that are none without a word, so that an adapter with only such ones answers as the base does.
        """
        worker: Any = self
        manager = worker.model_runner.lora_manager._adapter_manager
        names = manager._registered_adapters[lora_id].loras.keys()
        unmapped = sorted(name for name in names if name not in manager.modules)
        return len(names) - len(unmapped), unmapped, [number for number in manager.lora_index_to_id if number is not None]
