"""Faults in one adapter's generations, below all of our own code. Python imports this by itself where its folder is on PYTHONPATH: a replica's, in test_gate_watch.py.

The JSON file at $TUNESERVE_TEST_FAULT says which, at each request: `engine_name` (the adapter's), `fails_every` (each so many'th raises; 0: none) and `wait_seconds`.
"""

import asyncio
import contextlib
import importlib.abc
import importlib.util
import itertools
import json
import os
import sys
from pathlib import Path

HOOKS = "pipeline.serving.hooks"


class FaultFinder(importlib.abc.MetaPathFinder):
    """Wraps what vLLM generates with as soon as our plugin's hooks are imported; nothing is imported for it in any other process."""

    def find_spec(self, name, path=None, target=None):
        if name != HOOKS:
            return None
        sys.meta_path.remove(self)
        spec = importlib.util.find_spec(name)
        execute = spec.loader.exec_module

        def exec_module(module):
            execute(module)
            inject(module)

        spec.loader.exec_module = exec_module
        return spec


def inject(hooks):
    """Has `hooks.watch_generations` find an engine that already fails: what it counts is then what it would count of a real one."""
    original = hooks.watch_generations

    def watch_generations(engine_client, *args):
        engine_client.generate = faulty(engine_client.generate, hooks.REQUEST)
        return original(engine_client, *args)

    hooks.watch_generations = watch_generations


def faulty(original, request):
    from vllm.v1.engine.exceptions import EngineGenerateError

    file, turns = Path(os.environ["TUNESERVE_TEST_FAULT"]), itertools.count()

    async def generate(*args, **kwargs):
        lora = kwargs.get("lora_request")
        if lora is not None and request.get() is not None:  # a user's, not one that verifies an adapter
            fault = json.loads(file.read_text("utf-8"))
            if fault["engine_name"] == lora.lora_name:
                if fault["fails_every"] and next(turns) % fault["fails_every"] == 0:
                    raise EngineGenerateError("injected by a test")
                await asyncio.sleep(fault["wait_seconds"])
        async with contextlib.aclosing(original(*args, **kwargs)) as outputs:
            async for output in outputs:
                yield output

    return generate


sys.meta_path.insert(0, FaultFinder())
