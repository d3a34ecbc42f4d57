"""MLflow read over REST, for use inside a serving process: importing mlflow there costs seconds and its client blocks the event loop."""

import asyncio
import os
from collections.abc import Generator
from pathlib import Path
from typing import Any
from urllib.parse import quote, urlsplit

import httpx

from pipeline.adapter import ADAPTER_FILES
from pipeline.errors import RegistryError, VersionRefused
from pipeline.serving.settings import KEEP_ALIVE_SECONDS
from pipeline.serving.wanted import RegisteredVersion, Wanted, aliases, registered_version, wanted
from pipeline.version import CHAMPION

API = "/api/2.0/mlflow"
ARTIFACTS = "/api/2.0/mlflow-artifacts/artifacts"
ANSWER_SECONDS = 5.0
"""The longest that one question to MLflow may take, connecting included."""
FETCH_SECONDS = 1800.0
"""The longest that one version's download may take."""
STALL_SECONDS = 30.0
"""The longest silence during a download."""
MAX_ADAPTER_BYTES = 8 * 2**30
PICKLES = (".bin", ".pt", ".pth", ".pkl", ".pickle", ".ckpt", ".joblib")
CHUNK_BYTES = 2**20


def credentials() -> httpx.Auth | None:
    """What MLflow's own client would send: MLFLOW_TRACKING_USERNAME and _PASSWORD, else the bearer MLFLOW_TRACKING_TOKEN, else nothing."""
    user, password = os.environ.get("MLFLOW_TRACKING_USERNAME"), os.environ.get("MLFLOW_TRACKING_PASSWORD")
    if user and password:
        return httpx.BasicAuth(user, password)
    token = os.environ.get("MLFLOW_TRACKING_TOKEN")
    return BearerAuth(token) if token else None


class BearerAuth(httpx.Auth):
    """Sends one bearer token with every request."""

    def __init__(self, token: str) -> None:
        self.header = f"Bearer {token}"

    def auth_flow(self, request: httpx.Request) -> Generator[httpx.Request, httpx.Response, None]:
        request.headers["Authorization"] = self.header
        yield request


class RegistryReader:
    """Reads what is wanted, and its files, from the MLflow server at `uri`. Keeps a connection open; close with `aclose`.

    Every method raises RegistryError when MLflow is away, refuses, or answers what we do not understand.
    """

    def __init__(self, uri: str, max_bytes: int = MAX_ADAPTER_BYTES, transport: httpx.AsyncBaseTransport | None = None) -> None:
        if urlsplit(uri).scheme not in ("http", "https"):
            raise RegistryError(
                f"mlflow_uri: an MLflow server's http or https address is needed (got {uri!r}); start one with `mlflow server --serve-artifacts`"
            )
        self.uri = uri.rstrip("/")
        self.max_bytes = max_bytes
        self._client = httpx.AsyncClient(
            base_url=self.uri,
            auth=credentials(),
            timeout=httpx.Timeout(ANSWER_SECONDS, read=STALL_SECONDS),
            limits=httpx.Limits(max_connections=8, max_keepalive_connections=4, keepalive_expiry=KEEP_ALIVE_SECONDS),
            transport=transport,
            follow_redirects=False,  # the credentials are for this server
        )

    async def aclose(self) -> None:
        await self._client.aclose()

    async def read(self, model: str) -> Wanted:
        """What is wanted of `model`: its aliases, the versions that they point to, the canary's share and what is switched off."""
        # The champion is asked for by its alias beside, not after, the model: what moves most is known after one answer's time.
        answer, champion = await asyncio.gather(
            self._get(f"{API}/registered-models/get", name=model), self._version("registered-models/alias", name=model, alias=CHAMPION)
        )
        if answer is None:
            return Wanted(exists=False)
        try:
            found = answer["registered_model"]
            numbers = {number for alias, number in aliases(found).items() if alias != CHAMPION}
            others = [self._version("model-versions/get", name=model, version=number) for number in sorted(numbers)]
            versions = {version.version: version for version in await asyncio.gather(*others) if version}
            return wanted(found, champion, versions)
        except (KeyError, TypeError, AttributeError) as error:
            raise RegistryError(f"{self.uri}: not an MLflow answer about {model[:80]} ({error!r}); check mlflow_uri") from error

    async def version(self, name: str, number: str | None) -> RegisteredVersion | None:
        """That version of `name`, or its newest; None if there is none."""
        if number is not None:
            return await self._version("model-versions/get", name=name, version=number)
        answer = await self._get(f"{API}/model-versions/search", filter=f"name = '{name}'", max_results="1", order_by="version_number DESC")
        try:
            found = [registered_version(entry) for entry in (answer or {}).get("model_versions", ())]
        except (KeyError, TypeError, AttributeError) as error:
            raise RegistryError(f"{self.uri}: not an MLflow answer about versions of {name[:80]} ({error!r}); check mlflow_uri") from error
        return found[0] if found else None

    async def _version(self, route: str, **query: str) -> RegisteredVersion | None:
        """The version that `route` answers with; None if there is none. Raises RegistryError too if the answer is not one of MLflow's."""
        answer = await self._get(f"{API}/{route}", **query)
        try:
            return registered_version(answer["model_version"]) if answer else None
        except (KeyError, TypeError, AttributeError) as error:
            raise RegistryError(f"{self.uri}: not an MLflow answer about a version of {query['name'][:80]} ({error!r}); check mlflow_uri") from error

    async def tagged(self, key: str, value: str) -> list[str]:
        """The names of all registered models with that tag."""
        names: list[str] = []
        page: dict[str, str] = {}
        while True:
            answer = await self._get(f"{API}/registered-models/search", filter=f"tags.`{key}` = '{value}'", max_results="200", **page)
            names += [str(model["name"]) for model in (answer or {}).get("registered_models", ())]
            if not (token := (answer or {}).get("next_page_token")):
                return names
            page = {"page_token": token}

    async def fetch(self, version: RegisteredVersion, folder: Path) -> None:
        """Downloads ADAPTER_FILES of `version`, and nothing else, into the existing `folder`; what they hold is for the caller to check.

        Raises VersionRefused (files-missing, pickle, too-large, outside-the-store) where trying again will not help until someone mends the version.
        """
        where = version.label
        location = await self._artifact_path(version)
        await self._look_over(location, where)
        left = self.max_bytes
        try:
            async with asyncio.timeout(FETCH_SECONDS):
                for name in ADAPTER_FILES:
                    left -= await self._download(f"{ARTIFACTS}/{quote(location)}/{name}", folder / name, left, where)
        except TimeoutError as error:
            raise RegistryError(f"{where}: download took over {FETCH_SECONDS:.0f} s; look at the artifact store behind {self.uri}") from error
        except httpx.HTTPError as error:
            raise self._away(error) from error

    async def _look_over(self, location: str, where: str) -> None:
        """Refuses a folder that lacks a file of ours or holds a pickle, which runs code where it is read."""
        answer = await self._get(ARTIFACTS, path=location)
        files = {str(file.get("path", "")): int(file.get("file_size") or 0) for file in (answer or {}).get("files", ())}
        if pickles := sorted(name for name in files if name.lower().endswith(PICKLES)):
            raise VersionRefused(
                "pickle", f"{where}: holds {', '.join(pickles)[:200]}, which may run code where it is loaded; register it with safetensors alone"
            )
        if missing := [name for name in ADAPTER_FILES if name not in files]:
            raise VersionRefused("files-missing", f"{where}: {' and '.join(missing)} not among its artifacts; restore them, or train and register it again")
        if sum(files[name] for name in ADAPTER_FILES) > self.max_bytes:
            raise VersionRefused("too-large", self._too_large(where))

    def _too_large(self, where: str) -> str:
        return f"{where}: larger than {self.max_bytes} bytes; raise lora.max_adapter_gib in the serving recipe if it should be served"

    async def _artifact_path(self, version: RegisteredVersion) -> str:
        """The version's folder below the server's artifact root."""
        where = version.label
        answer = await self._get(f"{API}/model-versions/get-download-uri", name=version.name, version=version.version)
        if answer is None:
            raise RegistryError(f"{where}: deleted from MLflow while it was being fetched; promote another version")
        uri: str = answer.get("artifact_uri", "")
        if uri.startswith("runs:/"):
            run_id, _, below = uri.removeprefix("runs:/").partition("/")
            run = await self._get(f"{API}/runs/get", run_id=run_id)
            if run is None:
                raise VersionRefused("files-missing", f"{where}: its run {run_id[:40]} is not in MLflow, so its files are lost; train it again")
            uri = f"{run['run']['info']['artifact_uri'].rstrip('/')}/{below}"
        parts = urlsplit(uri)
        # The host in an artifact address is ignored: it is how the writer saw this server, and credentials go to mlflow_uri only.
        if parts.scheme in ("http", "https") and ARTIFACTS in parts.path:
            path = parts.path.partition(ARTIFACTS)[2]
        elif parts.scheme == "mlflow-artifacts":
            path = parts.path
        else:
            raise VersionRefused(
                "outside-the-store",
                f"{where}: its files lie at {uri[:200]!r}, which MLflow does not pass on; start the server with --serve-artifacts and register it again",
            )
        path = path.strip("/")
        if ".." in path.split("/"):
            raise VersionRefused("outside-the-store", f"{where}: its address {uri[:200]!r} leaves the artifact root; register it again")
        return path

    async def _download(self, url: str, path: Path, limit: int, where: str) -> int:
        """Bytes written to `path`."""
        async with self._client.stream("GET", url) as answer:
            if answer.status_code == httpx.codes.BAD_REQUEST:  # what MLflow says of a file that is a link out of its artifact root
                raise VersionRefused("outside-the-store", f"{where}: MLflow will not give out {path.name}; if it is a link, put the file itself there")
            if answer.status_code != httpx.codes.OK:
                raise RegistryError(
                    f"{where}: MLflow answered {answer.status_code} for {path.name}; check the version's artifacts in folder adapter/ of its run"
                )
            written = 0
            with path.open("xb") as file:
                async for chunk in answer.aiter_bytes(CHUNK_BYTES):
                    written += len(chunk)
                    if written > limit:
                        raise VersionRefused("too-large", self._too_large(where))
                    await asyncio.to_thread(file.write, chunk)
        return written

    async def _get(self, route: str, /, **query: str) -> dict[str, Any] | None:
        """MLflow's JSON answer; None when it says that what was asked for does not exist."""
        try:
            async with asyncio.timeout(ANSWER_SECONDS):
                answer = await self._client.get(route, params=query)
            body = answer.json()
        except TimeoutError as error:
            raise RegistryError(f"{self.uri}: MLflow did not answer within {ANSWER_SECONDS:.0f} s; look at its load") from error
        except httpx.HTTPError as error:
            raise self._away(error) from error
        except ValueError as error:
            if answer.status_code == httpx.codes.FORBIDDEN and "Host header" in answer.text:  # MLflow's guard against DNS rebinding
                raise RegistryError(f"{self.uri}: MLflow does not take that host's name; add it to its MLFLOW_SERVER_ALLOWED_HOSTS") from error
            raise RegistryError(f"{self.uri}: answered {answer.status_code} without JSON, so it is not MLflow's API; check mlflow_uri") from error
        if answer.status_code == httpx.codes.OK and isinstance(body, dict):
            return body
        code, message = (str(body.get(key, "")) for key in ("error_code", "message")) if isinstance(body, dict) else ("", "")
        # MLflow 3.17 calls a missing alias an invalid parameter, and a missing model, version or run a resource that does not exist.
        if code == "RESOURCE_DOES_NOT_EXIST" or (code == "INVALID_PARAMETER_VALUE" and message.startswith("Registered model alias")):
            return None
        if answer.status_code in (httpx.codes.UNAUTHORIZED, httpx.codes.FORBIDDEN):
            raise RegistryError(
                f"{self.uri}: MLflow refused our credentials ({answer.status_code}); set MLFLOW_TRACKING_TOKEN or MLFLOW_TRACKING_USERNAME and _PASSWORD"
            )
        raise RegistryError(f"{self.uri}: MLflow answered {answer.status_code} {code} {message[:200]}".rstrip() + "; look at its log")

    def _away(self, error: httpx.HTTPError) -> RegistryError:
        return RegistryError(f"{self.uri}: MLflow cannot be reached ({type(error).__name__}: {error}); start it, or check mlflow_uri")
