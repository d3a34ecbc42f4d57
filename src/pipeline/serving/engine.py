"""An adapter as the inference engine knows it, and what following needs of an engine. Knows nothing of vLLM."""

from dataclasses import dataclass
from pathlib import Path
from typing import Protocol


def engine_name(model: str, version: str, digest: str) -> str:
    """`catalog/7@ab12cd34`: unlike `catalog/7`, never two different weights, even when MLflow hands out a version number twice."""
    return f"{model}/{version}@{digest[:8]}"


def lora_id(digest: str) -> int:
    """1 to 2**31 - 1, by digest alone. vLLM's second model runner keeps these numbers in int32 arrays; a wider one would kill the engine."""
    return 1 + int(digest[:16], 16) % (2**31 - 1)


@dataclass(frozen=True)
class ServedAdapter:
    """One version as the engine knows it: its name there, its number there, the folder that holds it and how its experts lie in it."""

    model: str
    version: str
    digest: str
    folder: Path
    fused_experts: bool = False
    """Whether the routed experts' weights are fused 3-D tensors, which vLLM must be told."""

    @property
    def engine_name(self) -> str:
        return engine_name(self.model, self.version, self.digest)

    @property
    def label(self) -> str:
        return f"{self.model}/{self.version}"

    @property
    def lora_id(self) -> int:
        return lora_id(self.digest)


@dataclass(frozen=True)
class Mapping:
    """What became of a loaded adapter's weights: how many of the model's modules they change, and the names that stand for no module there."""

    modules: int
    unmapped: tuple[str, ...]
    in_slots: frozenset[int] = frozenset()
    """The numbers of the adapters that can be asked without another being moved out: a batch has so many slots, and the weights of more adapters wait in the host's memory."""


Fingerprint = tuple[float, ...]
"""Log-probabilities (natural log) of a fixed prompt's tokens and of the token that follows it."""


class Engine(Protocol):
    """The inference engine, as far as following needs it."""

    async def load(self, adapter: ServedAdapter) -> None:
        """Returns once the engine holds the adapter's weights, at once if it already does; raises ServingError if it refuses them."""

    async def unload(self, lora_id: int) -> None:
        """Returns once the engine holds no weights under that number; no request may use it."""

    async def loaded(self) -> set[int]:
        """The numbers of all adapters whose weights the engine holds."""

    async def mapping(self, lora_id: int) -> Mapping:
        """What became of the weights of a loaded adapter."""

    async def fingerprint(self, adapter: ServedAdapter | None) -> Fingerprint:
        """How the adapter (None: the base) sees a fixed prompt: always the same one, never from a cache."""
