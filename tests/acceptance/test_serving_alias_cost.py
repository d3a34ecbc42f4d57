"""What the alias costs: the same question by served name and by version name, one right after the other, in random order."""

import random
import time

import numpy as np

from tests.acceptance.figures import interval, show
from tests.acceptance.load import questions
from tests.acceptance.serving_environment import Server, World, engine_name

PAIRS = 600
ASKED = 8
"""Different questions; each was asked by both names before, so that neither of a pair finds more in the caches than the other."""
MAX_RATIO = 1.02


def seconds(server: Server, model: str, messages: object) -> float:
    began = time.perf_counter()
    server.chat(model, messages=messages, max_tokens=24, ignore_eos=True)
    return time.perf_counter() - began


def test_the_alias_costs_nothing(world: World) -> None:
    dice = random.Random(7)
    by_name, by_version = [], []
    with world.serving("alias-cost", follow=["catalog"]) as server:
        server.promote(world.trained)
        names = (world.trained.name, world.trained.label)
        assert [server.answering(name) for name in names] == [engine_name(world.trained)] * 2
        asked = dice.sample(questions(), ASKED)
        for messages in asked * 5:
            for name in names:
                seconds(server, name, messages)
        for number in range(PAIRS):
            took = {name: seconds(server, name, asked[number % ASKED]) for name in dice.sample(names, 2)}
            by_name.append(took[names[0]])
            by_version.append(took[names[1]])
    name, version = np.array(by_name), np.array(by_version)

    def of_medians(drawn: np.ndarray) -> float:
        return float(np.median(name[drawn]) / np.median(version[drawn]))

    def median_of(drawn: np.ndarray) -> float:
        return float(np.median(name[drawn] / version[drawn]))

    everything = np.arange(PAIRS)
    show(
        pairs=PAIRS,
        seconds_by_name=np.median(name),
        seconds_by_version=np.median(version),
        ratio_of_medians=of_medians(everything),
        ratio_of_medians_interval=interval(PAIRS, of_medians),
        median_of_ratios=median_of(everything),
        median_of_ratios_interval=interval(PAIRS, median_of),
    )
    assert of_medians(everything) <= MAX_RATIO
    assert median_of(everything) <= MAX_RATIO
