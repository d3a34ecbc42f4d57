"""The `Engine` that a vLLM API process offers, over EngineClient's own methods."""

import asyncio
import uuid
from typing import Any

from vllm.engine.protocol import EngineClient
from vllm.inputs.engine import tokens_input
from vllm.sampling_params import RequestOutputKind, SamplingParams

from pipeline.errors import ServingError
from pipeline.serving.engine import Fingerprint, Mapping, ServedAdapter
from pipeline.serving.hooks import Generate, lora_request

PROMPT = "What is this, and what is it for? Name its colour, its brand and its use, and answer in a few words, as for a customer."
"""What fingerprints are taken of: text alone, since adapters of the language model change how every token is read."""

UNLOAD_TRIES = 100
READ_PAUSE_SECONDS = 0.02
"""Between two looks whether an adapter is read. A look is answered between two steps, so there is about one a step; over several GPUs it has the next step wait for the running one's end."""


class VllmEngine:
    """`generate` is the engine's own, unwatched: what we ask for ourselves is nobody's traffic."""

    def __init__(self, engine_client: EngineClient, generate: Generate) -> None:
        self._client = engine_client
        self._generate = generate
        self._prompt: list[int] | None = None

    async def load(self, adapter: ServedAdapter) -> None:
        # Not models.load_lora_adapter: it numbers adapters by arrival, so that a restart would give old numbers to other weights.
        try:
            if adapter.lora_id not in await self._client.list_loras():
                await self._read(adapter)
            loaded = await self._client.add_lora(lora_request(adapter))
        except Exception as error:  # vLLM passes every refusal of its engine process on as a bare Exception
            raise ServingError(f"vLLM refused the adapter: {error}") from error
        if not loaded:
            raise ServingError("vLLM did not load the adapter and gave no reason; look at the server's log")

    async def _read(self, adapter: ServedAdapter) -> None:
        """Has every worker read the adapter's weights beside its steps, so that `add_lora` only copies them (adapter_worker.py). What fails in it, `add_lora` raises."""
        about = (adapter.engine_name, adapter.lora_id, str(adapter.folder), adapter.fused_experts)
        await self._client.collective_rpc("tuneserve_read_adapter", args=about)
        while not all(await self._client.collective_rpc("tuneserve_adapter_is_read", args=(adapter.lora_id,))):
            await asyncio.sleep(READ_PAUSE_SECONDS)

    async def unload(self, lora_id: int) -> None:
        await self._client.collective_rpc("tuneserve_forget_read", args=(lora_id,))  # if it was read and then not loaded
        for _ in range(UNLOAD_TRIES):
            if lora_id not in await self._client.list_loras():
                return
            await self._client.remove_lora(lora_id)  # undone at the next step if a request of it still runs
            await asyncio.sleep(0.01)
        raise ServingError(f"vLLM still holds adapter number {lora_id} after {UNLOAD_TRIES} removals; look at the server's log")

    async def loaded(self) -> set[int]:
        return set(await self._client.list_loras())

    async def mapping(self, lora_id: int) -> Mapping:
        per_worker = await self._client.collective_rpc("tuneserve_adapter_mapping", args=(lora_id,))
        modules, unmapped, in_slots = zip(*per_worker, strict=True)
        return Mapping(max(modules), tuple(sorted(set.intersection(*map(set, unmapped)))), frozenset(set.intersection(*map(set, in_slots))))

    async def fingerprint(self, adapter: ServedAdapter | None) -> Fingerprint:
        if self._prompt is None:
            self._prompt = list(self._client.renderer.get_tokenizer().encode(PROMPT))
        last = await self._look(adapter, tokens_input(self._prompt))
        of_prompt = [found[token].logprob for token, found in zip(self._prompt, last.prompt_logprobs, strict=True) if found is not None]
        answer = last.outputs[0]
        of_answer = [answer.logprobs[0][answer.token_ids[0]].logprob] if answer.logprobs and answer.token_ids else []
        return (*of_prompt, *of_answer)

    async def score(self, adapter: ServedAdapter | None, prompt: Any, answer: list[int]) -> list[float]:
        """Log-probabilities of the answer's tokens after a rendered prompt (vLLM's EngineInput, its images still in it), each after all before it."""
        tokens = [*prompt["prompt_token_ids"], *answer]
        last = await self._look(adapter, {**prompt, "prompt_token_ids": tokens})
        found = list(zip(tokens, last.prompt_logprobs, strict=True))[-len(answer) :]
        return [logprobs[token].logprob for token, logprobs in found]

    async def _look(self, adapter: ServedAdapter | None, prompt: Any) -> Any:
        """vLLM's last output for a prompt, with the log-probabilities of its tokens and of one more."""
        # Asking for the prompt's log-probabilities also keeps vLLM from taking it out of the prefix cache.
        params = SamplingParams(max_tokens=1, temperature=0.0, prompt_logprobs=1, logprobs=1, output_kind=RequestOutputKind.FINAL_ONLY)
        last = None
        async for output in self._generate(prompt, params, f"tuneserve-{uuid.uuid4()}", lora_request=lora_request(adapter) if adapter else None):
            last = output
        if last is None or last.prompt_logprobs is None:
            raise ServingError("vLLM gave no log-probabilities of a prompt; start it with --max-logprobs 1 or more")
        return last
