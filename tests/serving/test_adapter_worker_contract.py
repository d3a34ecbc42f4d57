"""What adapter_worker.py uses of vLLM's worker, and that an adapter which is read ahead is served as one that vLLM reads itself."""

import inspect
import threading
import time
from types import SimpleNamespace

import pytest
import torch
from vllm.lora.lora_model import LoRAModel
from vllm.lora.lora_weights import LoRALayerWeights
from vllm.lora.model_manager import AdapterLRUCache, LoRAModelManager, LRUCacheLoRAModelManager
from vllm.lora.request import LoRARequest
from vllm.lora.worker_manager import LRUCacheWorkerLoRAManager, WorkerLoRAManager
from vllm.v1.worker.lora_model_runner_mixin import LoRAModelRunnerMixin

from pipeline.serving.adapter_worker import AdapterWorker

pytestmark = pytest.mark.contract


def test_what_the_worker_extension_uses_is_there():
    assert "self.lora_manager = LRUCacheWorkerLoRAManager(" in inspect.getsource(LoRAModelRunnerMixin.load_lora_model)
    assert "self._adapter_manager" in inspect.getsource(WorkerLoRAManager.create_lora_manager)
    assert "lora = self._load_adapter(lora_request)" in inspect.getsource(LRUCacheWorkerLoRAManager.add_adapter)
    source = inspect.getsource(LoRAModelManager)
    kept = ("self._registered_adapters[lora.id] = lora", "self.modules: dict[str, BaseLayerWithLoRA]", "self.lora_index_to_id[index] = lora_model.id")
    for part in (*kept, "lora_model.loras.pop(module, None)"):
        assert part in source
    manager = SimpleNamespace(_registered_adapters={7: SimpleNamespace(loras={"a": 1, "b": 2})}, modules={"a": 0, "c": 0}, lora_index_to_id=[None, 7, 3])
    worker = SimpleNamespace(model_runner=SimpleNamespace(lora_manager=SimpleNamespace(_adapter_manager=manager)))
    assert AdapterWorker.tuneserve_adapter_mapping(worker, 7) == (1, ["b"], [7, 3])


class Slot:
    """As BaseLinearLayerWithLoRA: what is written into a slot."""

    def __init__(self) -> None:
        self.written: list[tuple[torch.Tensor, torch.Tensor]] = []

    def set_lora(self, index, lora_a, lora_b):
        self.written.append((lora_a.clone(), lora_b.clone()))


def worker_that_loads(load):
    """vLLM's own manager of adapters, but for where their weights come from; and the module that it adapts."""
    manager = LRUCacheLoRAModelManager.__new__(LRUCacheLoRAModelManager)
    manager.lora_config = SimpleNamespace(max_cpu_loras=4, max_loras=4)
    manager._registered_adapters, manager._active_adapters = (AdapterLRUCache(4, act) for act in (manager.deactivate_adapter, manager._deactivate_adapter))
    manager.lora_index_to_id, manager.modules, manager.packed_modules = [None] * 4, {"m": Slot()}, {}
    manager.is_pooling_model = manager._enable_mixed_moe_lora_format = False
    lora_manager = LRUCacheWorkerLoRAManager.__new__(LRUCacheWorkerLoRAManager)
    lora_manager._adapter_manager, lora_manager._load_adapter = manager, load
    worker = AdapterWorker()
    worker.model_runner, worker.device = SimpleNamespace(lora_manager=lora_manager), torch.device("cpu")
    return worker, lora_manager, manager.modules["m"].written


def test_an_adapter_is_read_beside_the_steps_and_written_as_vllm_would():
    threads = []

    def load(request):
        threads.append(threading.current_thread())
        if request.lora_path == "/gone":
            raise ValueError("no adapter there")
        return LoRAModel(request.lora_int_id, 4, {"m": LoRALayerWeights("m", 4, 8, torch.ones(4, 6), torch.ones(8, 4))})

    worker, manager, written = worker_that_loads(load)
    assert worker.tuneserve_adapter_is_read(1)  # never begun
    assert manager.add_adapter(LoRARequest("a", 1, "/a"))  # as vLLM does by itself
    for number in (2, 3):
        worker.tuneserve_read_adapter("b", number, "/b", False)
    while not worker.tuneserve_adapter_is_read(3):
        time.sleep(0.001)
    assert manager.add_adapter(LoRARequest("b", 3, "/b")) and manager.add_adapter(LoRARequest("b", 2, "/b"))  # of which what was read is let go
    assert [thread is threading.main_thread() for thread in threads].count(True) == 2 and len(threads) == 4
    assert all(torch.equal(a, torch.ones(4, 6)) and torch.equal(b, torch.full((8, 4), 2.0)) for a, b in written) and len(written) == 3
    worker.tuneserve_read_adapter("c", 4, "/gone", False)
    with pytest.raises(ValueError, match="no adapter there"):
        manager.add_adapter(LoRARequest("c", 4, "/gone"))
    assert worker.tuneserve_adapter_is_read(4) and manager.list_adapters() == {1, 2, 3}
    worker.tuneserve_read_adapter("d", 5, "/d", False)
    worker.tuneserve_forget_read(5)
    assert not manager.tuneserve_reader._reading
