"""More models than slots: while a version is loaded and verified, users asking all the while, vLLM moves few adapters' weights into slots beside those that users ask for."""

import threading
from pathlib import Path

from tests.acceptance.figures import show
from tests.acceptance.serving_environment import START_SECONDS, World

SLOTS = 2
BYSTANDERS = [f"other{number}" for number in range(6)]
LOADS = 6
MOVE = "Activating LoRA"
"""vLLM's own words, at its level DEBUG, for weights that are written into a slot."""


def test_loading_moves_few_adapters_in_and_out(world: World, tmp_path: Path) -> None:
    others = [world.variant(model, 0.3 + 0.05 * number, tmp_path / model) for number, model in enumerate(BYSTANDERS)]
    versions = world.variants("catalog", [0.7 + 0.013 * number for number in range(LOADS)], tmp_path)
    lora = {"max_loras": SLOTS, "max_cpu_loras": 16}
    with world.serving("slots", environment={"VLLM_LOGGING_LEVEL": "DEBUG"}, follow=["catalog", *BYSTANDERS], poll_seconds=0.5, lora=lora) as server:
        for version in (*others, versions[0]):
            server.promote(version, START_SECONDS)
        done = threading.Event()
        failures: list[BaseException] = []

        def keep_asking() -> None:
            try:
                while not done.is_set():
                    server.chat(BYSTANDERS[0], max_tokens=32)
            except BaseException as error:
                failures.append(error)

        asking = threading.Thread(target=keep_asking)
        asking.start()
        moves = []
        for version in versions[1:]:
            before = server.log.read_text("utf-8").count(MOVE)
            server.promote(version, START_SECONDS)
            moves.append(server.log.read_text("utf-8").count(MOVE) - before)
        done.set()
        asking.join()
    show(adapters_moved_into_slots_for_each_load=moves, failures=[str(failure) for failure in failures])
    assert not failures
    assert min(moves) >= 1 and max(moves) <= SLOTS + 1, "its own weights, and those that they moved out and users or the check ask for"
