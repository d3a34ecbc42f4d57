"""MLflow read over REST, for use inside a serving process: importing mlflow there costs seconds and its client blocks the event loop."""

import asyncio
import os
from collections.abc import Generator
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from urllib.parse import quote, urlsplit

import httpx

from pipeline.adapter import ADAPTER_FILES
from pipeline.errors import RegistryError
from pipeline.version import BASE_REVISION_TAG, CHAMPION, DIGEST_TAG, TEMPLATE_DIGEST_TAG

API = "/api/2.0/mlflow"
ARTIFACTS = "/api/2.0/mlflow-artifacts/artifacts"
ANSWER_SECONDS = 5.0
"""The longest that one question to MLflow may take, connecting included."""
FETCH_SECONDS = 1800.0
"""The longest that one version's download may take."""
STALL_SECONDS = 30.0
"""The longest silence during a download."""
MAX_ADAPTER_BYTES = 8 * 2**30
CHUNK_BYTES = 2**20


@dataclass(frozen=True)
class RegisteredVersion:
    """A version as MLflow holds it. The last three come from tags and are None when the tag is missing; `source` is where its artifacts lie."""

    name: str
    version: str
    source: str
    digest: str | None
    base_revision: str | None
    template_digest: str | None


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
    """Reads champions and their files from the MLflow server at `uri`. Keeps a connection open; close with `aclose`.

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
            limits=httpx.Limits(max_connections=8, max_keepalive_connections=1, keepalive_expiry=60.0),
            transport=transport,
            follow_redirects=False,  # the credentials are for this server
        )

    async def aclose(self) -> None:
        await self._client.aclose()

    async def champion(self, model: str) -> RegisteredVersion | None:
        """The version that alias `champion` of `model` points to; None when there is no such model or alias."""
        answer = await self._get(f"{API}/registered-models/alias", name=model, alias=CHAMPION)
        if answer is None:
            return None
        try:
            found = answer["model_version"]
            tags = {tag["key"]: tag.get("value", "") for tag in found.get("tags", ())}
            return RegisteredVersion(
                name=found["name"],
                version=str(found["version"]),
                source=found.get("source", ""),
                digest=tags.get(DIGEST_TAG),
                base_revision=tags.get(BASE_REVISION_TAG),
                template_digest=tags.get(TEMPLATE_DIGEST_TAG),
            )
        except (KeyError, TypeError, AttributeError) as error:
            raise RegistryError(f"{self.uri}: not an MLflow answer about the champion of {model} ({error!r}); check mlflow_uri") from error

    async def fetch(self, version: RegisteredVersion, folder: Path) -> None:
        """Downloads ADAPTER_FILES of `version`, and nothing else, into the existing `folder`; what they hold is for the caller to check."""
        where = f"{version.name}/{version.version}"
        location = await self._artifact_path(version)
        left = self.max_bytes
        try:
            async with asyncio.timeout(FETCH_SECONDS):
                for name in ADAPTER_FILES:
                    left -= await self._download(f"{ARTIFACTS}/{quote(location)}/{name}", folder / name, left, where)
        except TimeoutError as error:
            raise RegistryError(f"{where}: download took over {FETCH_SECONDS:.0f} s; look at the artifact store behind {self.uri}") from error
        except httpx.HTTPError as error:
            raise self._away(error) from error

    async def _artifact_path(self, version: RegisteredVersion) -> str:
        """The version's folder below the server's artifact root."""
        where = f"{version.name}/{version.version}"
        answer = await self._get(f"{API}/model-versions/get-download-uri", name=version.name, version=version.version)
        if answer is None:
            raise RegistryError(f"{where}: deleted from MLflow while it was being fetched; promote another version")
        uri: str = answer.get("artifact_uri", "")
        if uri.startswith("runs:/"):
            run_id, _, below = uri.removeprefix("runs:/").partition("/")
            run = await self._get(f"{API}/runs/get", run_id=run_id)
            if run is None:
                raise RegistryError(f"{where}: its run {run_id} is not in MLflow, so its files are lost; train it again")
            uri = f"{run['run']['info']['artifact_uri'].rstrip('/')}/{below}"
        parts = urlsplit(uri)
        # The host in an artifact address is ignored: it is how the writer saw this server, and credentials go to mlflow_uri only.
        if parts.scheme in ("http", "https") and ARTIFACTS in parts.path:
            path = parts.path.partition(ARTIFACTS)[2]
        elif parts.scheme == "mlflow-artifacts":
            path = parts.path
        else:
            raise RegistryError(
                f"{where}: its files lie at {uri!r}, which MLflow does not pass on; start the server with --serve-artifacts and register it again"
            )
        path = path.strip("/")
        if ".." in path.split("/"):
            raise RegistryError(f"{where}: its address {uri!r} leaves the artifact root; register it again")
        return path

    async def _download(self, url: str, path: Path, limit: int, where: str) -> int:
        """Bytes written to `path`."""
        async with self._client.stream("GET", url) as answer:
            if answer.status_code != httpx.codes.OK:
                raise RegistryError(
                    f"{where}: MLflow answered {answer.status_code} for {path.name}; check the version's artifacts in folder adapter/ of its run"
                )
            written = 0
            with path.open("xb") as file:
                async for chunk in answer.aiter_bytes(CHUNK_BYTES):
                    written += len(chunk)
                    if written > limit:
                        raise RegistryError(f"{where}: larger than {self.max_bytes} bytes; an adapter of this size is not served")
                    await asyncio.to_thread(file.write, chunk)
        return written

    async def _get(self, path: str, **query: str) -> dict[str, Any] | None:
        """MLflow's JSON answer; None when it says that what was asked for does not exist."""
        try:
            async with asyncio.timeout(ANSWER_SECONDS):
                answer = await self._client.get(path, params=query)
            body = answer.json()
        except TimeoutError as error:
            raise RegistryError(f"{self.uri}: MLflow did not answer within {ANSWER_SECONDS:.0f} s; look at its load") from error
        except httpx.HTTPError as error:
            raise self._away(error) from error
        except ValueError as error:
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
