"""The vLLM side of following the registry: an endpoint plugin, which vLLM's API process loads when VLLM_PLUGINS names `tuneserve`.

What we rely on beyond vLLM's documented plugin contract and `EngineClient`'s methods; tests/serving/test_vllm_contract.py and test_adapter_worker_contract.py pin all of it:
- the hooks in hooks.py, and what adapter_worker.py uses;
- `state.openai_serving_models.lora_requests`, the dict in which every request looks its model up before the bases (`hooks.NameTable`);
- `state.openai_serving_models.base_model_paths` and `.model_config.max_model_len` (`AdapterFollower.init_state`, `.list_models`);
- `state.online_renderer`, which renders chat requests, and what an engine's input holds (parity_route.py);
- the environment switches VLLM_ALLOW_RUNTIME_LORA_UPDATING and VLLM_SKIP_MODEL_NAME_VALIDATION, and `args.api_server_count` (`refusal`).
"""

import hmac
import json
import logging
import os
import time
from argparse import Namespace
from collections.abc import Mapping
from pathlib import Path
from typing import Annotated

import vllm
from fastapi import Depends, FastAPI, Header, HTTPException, Request
from fastapi.responses import JSONResponse
from pydantic import ValidationError
from starlette.datastructures import State
from vllm import envs
from vllm.engine.protocol import EngineClient
from vllm.entrypoints.openai.models.serving import OpenAIServingModels
from vllm.v1.metrics.prometheus import get_prometheus_registry

from pipeline import journal
from pipeline.adapter import name_fault
from pipeline.errors import ServingError
from pipeline.serving import hooks
from pipeline.serving.follower import Follower
from pipeline.serving.hint import MAX_BODY_BYTES, HintCheck
from pipeline.serving.local_adapters import LocalAdapters
from pipeline.serving.metrics import Metrics
from pipeline.serving.parity_route import Replayer, read_asked
from pipeline.serving.registry_reader import RegistryReader
from pipeline.serving.sampling import OUTCOMES, Sampler
from pipeline.serving.settings import SETTINGS_VARIABLE, SYNC_SECONDS, FollowerSettings
from pipeline.serving.traffic import Traffic
from pipeline.serving.vllm_engine import VllmEngine

logger = logging.getLogger("vllm.tuneserve")  # below "vllm" so that the server's own handler prints it

TESTED_VLLM = ("0.32.0",)


class AdapterFollower:
    """vLLM's endpoint plugin: routes, authentication and start-up around a `Follower`.

    A fault of the configuration ends the server's start, from `attach_router`: vLLM only logs what a plugin's constructor raises and would serve
    without us. A fault of the moment (MLflow away, a bad adapter) never does; it is in the log and in GET /adapters.
    """

    name = "tuneserve"
    required_tasks = ("generate",)

    def attach_router(self, app: FastAPI) -> None:
        """Reads the settings and adds the routes. Raises ServingError, which ends the server, if it may not start so."""
        args: Namespace = app.state.args
        if fault := refusal(
            vllm.__version__, args.enable_lora, args.api_server_count, envs.VLLM_ALLOW_RUNTIME_LORA_UPDATING, envs.VLLM_SKIP_MODEL_NAME_VALIDATION
        ):
            raise ServingError(fault)
        journal.write_to_stderr(logger)  # our own lines in vLLM's log are the journal's kind
        self.settings = read_settings(os.environ)
        token = read_token(self.settings.token_file)
        self._authorization = f"Bearer {token}".encode()
        self._hints = HintCheck(token)
        self._traffic = Traffic(self.settings.max_loras)
        self._follower: Follower | None = None
        self._models: OpenAIServingModels
        self._names: hooks.NameTable
        self._replayer: Replayer
        self._started = int(time.time())
        self._metrics = Metrics(get_prometheus_registry(), lambda name: name_fault(name) is None)
        hooks.install(app, self._traffic, self._metrics, self.settings.sticky_header, self._sampler())
        app.add_api_route("/v1/models", self.list_models, methods=["GET"])
        guarded = [Depends(self.authenticate)]
        app.add_api_route("/adapters", self.show_status, methods=["GET"], dependencies=guarded)
        app.add_api_route("/adapters/ready", self.show_ready, methods=["GET"], dependencies=guarded)
        app.add_api_route("/adapters/parity", self.replay, methods=["POST"], dependencies=guarded)
        app.add_api_route("/adapters/sync", self.sync_now, methods=["POST"])  # asks for a signature instead

    def _sampler(self) -> Sampler | None:
        """Started; None if nothing is to be sampled. Raises ServingError if it cannot be, for instance without its redaction hook."""
        if self.settings.sampling is None:
            return None
        for outcome in OUTCOMES:
            self._metrics.samples.labels(outcome)  # a drop is seen as a rise only from a 0
        sampler = Sampler(self.settings.sampling, self._metrics.sampled)
        sampler.start()
        return sampler

    async def init_state(self, engine_client: EngineClient | None, state: State, args: Namespace) -> None:
        """Restores and follows. vLLM accepts connections only after this returns, and ends if it raises."""
        if engine_client is None:
            raise ServingError("vLLM's render server has no engine to follow the registry with; leave `tuneserve` out of its VLLM_PLUGINS")
        self._models = models = state.openai_serving_models
        taken = frozenset(base.name for base in models.base_model_paths) | frozenset(models.lora_requests)
        traffic = self._traffic
        self._names = names = hooks.NameTable(models)
        hooks.choose_adapters(names, models)
        engine = VllmEngine(engine_client, hooks.watch_generations(engine_client, traffic, self._metrics))
        self._replayer = Replayer(state.online_renderer, engine.score, traffic)
        registry = RegistryReader(self.settings.mlflow_uri, self.settings.max_adapter_bytes)
        adapters = LocalAdapters(self.settings.state_dir / "adapters")
        follower = Follower(self.settings, engine, names, registry, adapters, traffic, self._metrics, taken)
        self._metrics.watch(follower.last_sync_age_seconds, lambda: follower.residents.count)
        try:
            await follower.start()
        except Exception:  # a server that answers without us is better than none; /adapters/ready stays 503
            logger.exception("following did not start; the base models are served without adapters")
            return
        self._follower = follower

    def authenticate(self, authorization: Annotated[str, Header()] = "") -> None:
        """Lets a request pass that shows our token. vLLM's own API key does not guard these routes."""
        if not hmac.compare_digest(authorization.encode("latin-1"), self._authorization):
            raise HTTPException(401, "Authorization: Bearer with this replica's token is needed", {"WWW-Authenticate": "Bearer"})

    async def show_status(self) -> JSONResponse:
        if self._follower is None:
            return JSONResponse({"ready": False}, 503)
        return JSONResponse({"base_models": [base.name for base in self._models.base_model_paths], **self._follower.status()})

    async def show_ready(self) -> JSONResponse:
        if self._follower is None:
            return JSONResponse({"ready": False, "waits_for": {"tuneserve": "following did not start; look at the server's log"}}, 503)
        ready = self._follower.ready
        return JSONResponse({"ready": ready, "waits_for": self._follower.waits_for()}, 200 if ready else 503)

    async def replay(self, request: Request) -> JSONResponse:
        """What this server makes of a prompt that training saw. The version or name must be callable; one that is switched off is too, for this."""
        if self._follower is None:
            return JSONResponse({"ready": False}, 503)
        asked = await read_asked(request)
        route = self._names.get(asked.model)
        if route is None and not self._models.is_base_model(asked.model):
            raise HTTPException(422, f"{asked.model[:100]} is not served here; give a served name, a version that an alias points to, or the base")
        answer = await self._replayer.answer(asked, route.adapter if route else None)
        return JSONResponse(answer.model_dump(mode="json"))

    async def sync_now(self, request: Request) -> JSONResponse:
        """To a genuine hint: status after a sync that began at this request or later, or after SYNC_SECONDS; compare `live` with what you want."""
        body = b""
        async for chunk in request.stream():
            body += chunk
            if len(body) > MAX_BODY_BYTES:
                raise HTTPException(413, f"a hint has at most {MAX_BODY_BYTES} bytes")
        if fault := self._hints.fault(request.headers, body):
            raise HTTPException(401, fault, {"WWW-Authenticate": "X-MLflow-Signature"})
        if self._follower is not None:
            await self._follower.sync(SYNC_SECONDS, _hinted_model(body))
        return await self.show_status()

    async def list_models(self) -> JSONResponse:
        """Replaces vLLM's GET /v1/models, which lists internal names, lists aliased ones twice or never, and shows local paths."""
        bases = [base.name for base in self._models.base_model_paths]
        card = {"object": "model", "created": self._started, "owned_by": "tuneserve"}
        cards = [{"id": base, **card, "root": base, "parent": None, "max_model_len": self._models.model_config.max_model_len} for base in bases]
        adapters = sorted(self._models.lora_requests.items())
        cards += [{"id": name, **card, "root": request.lora_name, "parent": bases[0], "max_model_len": None} for name, request in adapters]
        return JSONResponse({"object": "list", "data": cards})


def _hinted_model(body: bytes) -> str | None:
    """The registered model that a hint is about; None if it does not say, and then it is about all."""
    try:
        name = json.loads(body)["data"]["name"]
    except (ValueError, TypeError, KeyError):
        return None
    return name if isinstance(name, str) else None


def refusal(version: str, lora_enabled: bool, api_server_count: int | None, runtime_updates: bool, skips_names: bool) -> str | None:
    """Why a vLLM of this version, started like this, may not follow the registry; None if it may."""
    if version.partition("+")[0] not in TESTED_VLLM:
        return f"vLLM {version}: tuneserve is tested with {', '.join(TESTED_VLLM)} only; install that, or run tests/serving/test_vllm_contract.py and add it"
    if not lora_enabled:
        return "--enable-lora: missing, and adapters cannot be served without it; start the server with `tuneserve serve`"
    if api_server_count not in (None, 1):
        return f"--api-server-count: one API process per engine, or each would follow the registry for itself (got {api_server_count}); pass 1"
    if runtime_updates:
        return "VLLM_ALLOW_RUNTIME_LORA_UPDATING: set, so anyone could replace an adapter over HTTP; unset it, the registry alias is the deployment"
    if skips_names:
        return "VLLM_SKIP_MODEL_NAME_VALIDATION: set, so unknown adapter names would be answered by the base model; unset it"
    return None


def read_settings(environment: Mapping[str, str]) -> FollowerSettings:
    path = environment.get(SETTINGS_VARIABLE)
    if path is None:
        raise ServingError(f"{SETTINGS_VARIABLE}: not set; start the server with `tuneserve serve`, or name the follower's settings file in it")
    try:
        return FollowerSettings.model_validate(json.loads(Path(path).read_text("utf-8")))
    except (OSError, ValidationError, ValueError) as error:
        raise ServingError(f"{path}: not the follower's settings ({error}); start the server with `tuneserve serve`") from error


def read_token(path: Path) -> str:
    try:
        token = path.read_text("utf-8").strip()
    except (OSError, ValueError) as error:
        raise ServingError(f"{path}: the token for /adapters cannot be read ({error}); write one there, mode 0600") from error
    if not token:
        raise ServingError(f"{path}: empty, so /adapters would be open to all; write a token there, mode 0600")
    return token
