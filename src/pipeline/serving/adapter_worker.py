"""What we have a vLLM worker do for an adapter: read its weights beside the engine's steps, and say what became of them. vLLM mixes the class named by --worker-extension-cls into its worker.

vLLM 0.32 loads an adapter between two steps: it reads the file, converts and pins each tensor, scales, packs (routed experts are turned over, too), and writes into a slot, while every stream
waits. For all but the last no step must wait; but the thread that does them shares Python's lock with the steps where the engine and its worker are one process, as on one GPU.

Private parts of vLLM used here, nowhere else: the worker's `device` and `model_runner.lora_manager`, whose `_load_adapter` an instance attribute takes the place of, its `_adapter_manager`, whose
`_create_merged_loras_inplace` one takes the place of, too, and of that `_registered_adapters`, `modules` and `lora_index_to_id`; tests/serving/test_adapter_worker_contract.py pins them.
"""

from concurrent.futures import Future, ThreadPoolExecutor
from typing import Any
from weakref import WeakSet

import torch
from vllm.lora.request import LoRARequest


class AdapterWorker:
    """Methods for `EngineClient.collective_rpc`; `self` is the worker."""

    def tuneserve_read_adapter(self, name: str, lora_id: int, folder: str, is_3d: bool) -> None:
        """Begins to read an adapter's weights for the `add_lora` that follows, and returns at once. What was read before and never loaded is let go."""
        worker: Any = self
        manager = worker.model_runner.lora_manager
        if not hasattr(manager, "tuneserve_reader"):
            manager.tuneserve_reader = _Reader(manager._load_adapter, manager._adapter_manager._create_merged_loras_inplace, worker.device)
            manager._load_adapter, manager._adapter_manager._create_merged_loras_inplace = manager.tuneserve_reader.take, manager.tuneserve_reader.pack
        manager.tuneserve_reader.begin(LoRARequest(lora_name=name, lora_int_id=lora_id, lora_path=folder, is_3d_lora_weight=is_3d))

    def tuneserve_adapter_is_read(self, lora_id: int) -> bool:
        """Whether reading it is over, well or not; also if it was never begun."""
        worker: Any = self
        reader = getattr(worker.model_runner.lora_manager, "tuneserve_reader", None)
        return reader is None or reader.over(lora_id)

    def tuneserve_forget_read(self, lora_id: int) -> None:
        """Lets go what was read of it and not loaded."""
        worker: Any = self
        if reader := getattr(worker.model_runner.lora_manager, "tuneserve_reader", None):
            reader.forget(lora_id)

    def tuneserve_adapter_mapping(self, lora_id: int) -> tuple[int, list[str], list[int]]:
        """How many wrapped modules of this worker's model the loaded adapter changes; the adapter's modules that are none of the model's; the numbers of the adapters that are in slots.

        vLLM drops modules that are none without a word, so that an adapter with only such ones answers as the base does.
        """
        worker: Any = self
        manager = worker.model_runner.lora_manager._adapter_manager
        names = manager._registered_adapters[lora_id].loras.keys()
        unmapped = sorted(name for name in names if name not in manager.modules)
        return len(names) - len(unmapped), unmapped, [number for number in manager.lora_index_to_id if number is not None]


class _Reader:
    """Reads one adapter at a time in a thread by vLLM's own `load` and `pack`, and gives it to vLLM when that asks. Errors are raised there, as vLLM's own would be."""

    def __init__(self, load: Any, pack: Any, device: torch.device) -> None:
        self._load = load
        self._pack = pack
        self._packed: WeakSet[Any] = WeakSet()
        self._device = device
        self._thread = ThreadPoolExecutor(1, "tuneserve-adapter")
        self._reading: dict[int, Future[Any]] = {}

    def begin(self, request: LoRARequest) -> None:
        self._reading = {request.lora_int_id: self._thread.submit(self._read, request)}

    def over(self, lora_id: int) -> bool:
        reading = self._reading.get(lora_id)
        return reading is None or reading.done()

    def forget(self, lora_id: int) -> None:
        if reading := self._reading.pop(lora_id, None):
            reading.cancel()

    def take(self, request: LoRARequest) -> Any:
        """In place of vLLM's `load`: waits for what is being read; reads now what was not begun."""
        reading = self._reading.pop(request.lora_int_id, None)
        return self._load(request) if reading is None else reading.result()

    def pack(self, adapter: Any) -> None:
        """In place of vLLM's `pack`: nothing, if it was done while the adapter was read. vLLM does not promise that it may be done twice."""
        if adapter not in self._packed:
            self._pack(adapter)

    def _read(self, request: LoRARequest) -> Any:
        if self._device.type == "cuda":
            torch.cuda.set_device(self._device)  # each thread's own: memory must be pinned for this worker's GPU
        adapter = self._load(request)
        self._pack(adapter)
        self._packed.add(adapter)
        return adapter
