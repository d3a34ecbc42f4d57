"""Base and two other adapters answer bit by bit the same, before, while and after 20 versions of a third model come and go (float32, one request at a time)."""

import itertools
import threading
from pathlib import Path
from typing import Any

from tests.acceptance.figures import show
from tests.acceptance.load import Body, questions
from tests.acceptance.serving_environment import BASE, Server, World, wait_until

CYCLES = 20
PROMPTS = 20
BYSTANDERS = (BASE, "shop", "extra")
RECIPE: dict[str, Any] = {
    "follow": ["catalog", "shop", "extra"],
    "precision": "float32",
    "max_num_seqs": 1,  # a batch of one, whatever the replica itself asks the engine while it verifies
    "prefix_caching": False,  # so that every prompt is computed in full, each time
    "poll_seconds": 0.5,
    "forget_after_seconds": 1.0,
}
Key = tuple[str, int]


def greedy(server: Server, model: str, messages: Body) -> object:
    """Text, tokens and log-probabilities of an answer, as the server wrote them."""
    choice = server.chat(model, messages=messages, max_tokens=16, logprobs=True, top_logprobs=5)["choices"][0]
    return choice["message"]["content"], choice["logprobs"]


def look(server: Server, prompts: tuple[Body, ...]) -> dict[Key, object]:
    return {(model, number): greedy(server, model, messages) for model in BYSTANDERS for number, messages in enumerate(prompts)}


def differing(one: dict[Key, object], other: dict[Key, object]) -> list[Key]:
    return [key for key in one if one[key] != other[key]]


def test_loads_and_unloads_of_others_leave_answers_bit_identical(world: World, tmp_path: Path) -> None:
    shop, extra = world.variant("shop", 0.8, tmp_path / "shop"), world.variant("extra", 0.6, tmp_path / "extra")
    versions = world.variants("catalog", [0.2 + 0.013 * number for number in range(CYCLES + 2)], tmp_path)
    prompts = questions()[:PROMPTS]
    during: list[dict[Key, object]] = []
    failures: list[BaseException] = []
    done = threading.Event()
    with world.serving("isolation", **RECIPE) as server:
        for version in (shop, extra, *versions[:2]):  # champion and the one before it: from now on the count is the same
            server.promote(version)
        resident = wait_until(lambda: settled(server), 30, "nothing left to forget")
        before = look(server, prompts)

        def keep_looking() -> None:
            try:
                while not done.is_set():
                    during.append(look(server, prompts))
            except BaseException as error:
                failures.append(error)

        looking = threading.Thread(target=keep_looking)
        looking.start()
        try:
            for previous, version in itertools.pairwise(versions[1:]):
                server.promote(version, seconds=120)
                verified = next(each["verified"] for each in server.model("catalog")["versions"] if each["version"] == version.version)
                assert verified, version.label
                wait_until(lambda: settled(server) == resident, 120, lambda previous=previous: f"what {previous.label} replaced forgotten: {server.adapters()}")
        finally:
            done.set()
            looking.join(timeout=300)
        after = look(server, prompts)
        named = [each["version"] for each in server.model("catalog")["versions"]]
    assert failures == []
    changed = {"during": sum(len(differing(before, each)) for each in during), "after": len(differing(before, after))}
    show(loads=CYCLES, unloads=CYCLES, prompts=PROMPTS, looked_during=len(during), resident=resident, named_at_the_end=named, changed=changed)
    assert len(during) >= 2
    assert len({repr(before[model, number]) for model in BYSTANDERS for number in range(PROMPTS)}) > PROMPTS, "the three answer alike"
    assert changed == {"during": 0, "after": 0}


def settled(server: Server) -> int:
    """How many adapters the engine holds, 0 while one is being forgotten."""
    slots = server.adapters()["slots"]
    return 0 if slots["forgetting"] else int(slots["resident"])
