"""What adapter_worker.py uses of vLLM's worker, and that an adapter which is read ahead is served as one that vLLM reads itself."""

import inspect
import threading
import time
from types import SimpleNamespace

import pytest
import torch
from vllm.lora.layers import FusedMoEWithLoRA
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
    kept = (
        "self._create_merged_loras_inplace(lora)\n        self._registered_adapters[lora.id] = lora",
        "self.modules: dict[str, BaseLayerWithLoRA]",
        "self.lora_index_to_id[index] = lora_model.id",
    )
    for part in (*kept, "lora_model.loras.pop(module, None)"):
        assert part in source
    manager = SimpleNamespace(_registered_adapters={7: SimpleNamespace(loras={"a": 1, "b": 2})}, modules={"a": 0, "c": 0}, lora_index_to_id=[None, 7, 3])
    worker = SimpleNamespace(model_runner=SimpleNamespace(lora_manager=SimpleNamespace(_adapter_manager=manager)))
    assert AdapterWorker.tuneserve_adapter_mapping(worker, 7) == (1, ["b"], [7, 3])


class Slot:
    """As a merged layer such as qkv_proj: what is written into a slot."""

    def __init__(self) -> None:
        self.written: list[list[torch.Tensor]] = []

    def set_lora(self, index, lora_a, lora_b):
        self.written.append([each.clone() for each in (*lora_a, *lora_b)])


class Experts(Slot, FusedMoEWithLoRA):
    """Two routed experts of 6 numbers in and out and 10 inside, all on this GPU."""

    global_num_experts, local_num_experts = 2, 2
    ep_rank, use_ep = 0, False


def worker_that_loads(load, modules=None):
    """vLLM's own manager of adapters, but for where their weights come from; and what is written into the first module that it adapts."""
    manager = LRUCacheLoRAModelManager.__new__(LRUCacheLoRAModelManager)
    manager.lora_config = SimpleNamespace(max_cpu_loras=4, max_loras=4)
    manager._registered_adapters, manager._active_adapters = (AdapterLRUCache(4, act) for act in (manager.deactivate_adapter, manager._deactivate_adapter))
    manager.lora_index_to_id, manager.modules, manager.packed_modules = [None] * 4, modules or {"qkv": Slot()}, {} if modules else {"qkv": ["q", "k"]}
    manager.is_pooling_model = manager._enable_mixed_moe_lora_format = False
    lora_manager = LRUCacheWorkerLoRAManager.__new__(LRUCacheWorkerLoRAManager)
    lora_manager._adapter_manager, lora_manager._load_adapter = manager, load
    worker = AdapterWorker()
    worker.model_runner, worker.device = SimpleNamespace(lora_manager=lora_manager), torch.device("cpu")
    return worker, lora_manager, next(iter(manager.modules.values())).written


def test_an_adapter_is_read_beside_the_steps_and_written_as_vllm_would():
    threads = []

    def load(request):
        threads.append(threading.current_thread())
        if request.lora_path == "/gone":
            raise ValueError("no adapter there")
        halves = {name: LoRALayerWeights(name, 4, 8, torch.ones(4, 6), torch.ones(width, 4)) for name, width in {"q": 8, "k": 2}.items()}
        if request.lora_path == "/half":
            halves["k"].lora_b = None
        return LoRAModel(request.lora_int_id, 4, halves)

    worker, manager, written = worker_that_loads(load)
    assert worker.tuneserve_adapter_is_read(1)  # never begun
    assert manager.add_adapter(LoRARequest("a", 1, "/a"))  # as vLLM does by itself
    for number in (2, 3):
        worker.tuneserve_read_adapter("b", number, "/b", False)
    while not worker.tuneserve_adapter_is_read(3):
        time.sleep(0.001)
    assert manager.add_adapter(LoRARequest("b", 3, "/b")) and manager.add_adapter(LoRARequest("b", 2, "/b"))  # of which what was read is let go
    assert [thread is threading.main_thread() for thread in threads].count(True) == 2 and len(threads) == 4
    expected = [torch.ones(4, 6), torch.ones(4, 6), torch.full((8, 4), 2.0), torch.full((2, 4), 2.0)]
    assert len(written) == 3 and all(torch.equal(ours, theirs) for each in written for ours, theirs in zip(each, expected, strict=True))
    worker.tuneserve_read_adapter("c", 4, "/gone", False)
    with pytest.raises(ValueError, match="no adapter there"):
        manager.add_adapter(LoRARequest("c", 4, "/gone"))
    worker.tuneserve_read_adapter("c", 4, "/half", False)
    with pytest.raises(TypeError):  # of packing
        manager.add_adapter(LoRARequest("c", 4, "/half"))
    assert worker.tuneserve_adapter_is_read(4) and manager.list_adapters() == {1, 2, 3}
    worker.tuneserve_read_adapter("d", 5, "/d", False)
    worker.tuneserve_forget_read(5)
    assert not manager.tuneserve_reader._reading


def test_routed_experts_are_turned_over_beside_the_steps_and_once():
    """Else every stream waits for it; vLLM does not promise that it may be done to its outcome again."""
    shapes = {"experts.base_layer": ((8, 6), (20, 8)), "experts": ((8, 10), (6, 8))}

    def load(request):
        dice = torch.Generator().manual_seed(7)
        made = {name: [torch.randn(shape, generator=dice) for shape in pair] for name, pair in shapes.items()}
        return LoRAModel(request.lora_int_id, 4, {name: LoRALayerWeights(name, 4, 8, *pair) for name, pair in made.items()}, is_3d_lora_weight=True)

    worker, manager, written = worker_that_loads(load, {"experts": Experts()})
    adapters = manager._adapter_manager
    adapters._enable_mixed_moe_lora_format, adapters.model = True, SimpleNamespace(config=SimpleNamespace(architectures=["Glm4vMoeForConditionalGeneration"]))
    threads, convert = [], adapters._convert_3d_to_2d_moe_lora
    adapters._convert_3d_to_2d_moe_lora = lambda *args: (threads.append(threading.current_thread()), convert(*args))
    assert manager.add_adapter(LoRARequest("a", 1, "/a", is_3d_lora_weight=True))  # as vLLM does by itself
    worker.tuneserve_read_adapter("b", 2, "/b", True)
    while not worker.tuneserve_adapter_is_read(2):
        time.sleep(0.001)
    assert manager.add_adapter(LoRARequest("b", 2, "/b", is_3d_lora_weight=True))
    assert manager.add_adapter(LoRARequest("c", 3, "/c", is_3d_lora_weight=True))  # again by itself
    assert [thread is threading.main_thread() for thread in threads] == [True, False, True]
    assert [tuple(each.shape) for each in written[0]] == [(2, 4, 6), (2, 4, 10), (2, 4, 6), (2, 10, 4), (2, 6, 4), (2, 10, 4)]
    assert all(torch.equal(ours, theirs) for other in written[1:] for ours, theirs in zip(other, written[0], strict=True))
