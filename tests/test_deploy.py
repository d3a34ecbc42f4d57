"""deploy/: valid by the schemas of Compose and Kubernetes; replicas get the time that they need to drain; no secret stands in what is committed.

No Docker engine and no cluster is needed. `docker compose config` and `kubectl kustomize` are asked too where they are installed.
"""

import re
import shutil
import subprocess
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import kubernetes_validate
import pytest
import yaml
from compose_spec import PyCompose

from pipeline.recipe import ServingRecipe, load_recipe
from pipeline.serving.launch import END_GRACE_SECONDS
from tests.conftest import ROOT

DEPLOY = ROOT / "deploy"
KUBERNETES = DEPLOY / "kubernetes"
KUBERNETES_VERSION = "1.34"
RECIPE = "recipes/serving/production.yaml"
READY = "http://127.0.0.1:8000/adapters/ready"
VARIABLE = re.compile(r"(?<!\$)\$\{([A-Z][A-Z0-9_]*)(?::-([^}]*)|:\?)?\}")
SECRET_NAME = re.compile("PASSWORD|SECRET|TOKEN")
URL_WITH_PASSWORD = re.compile(r"://[^/@:]*:(.*)@")
MARGIN_SECONDS = 15
"""From the end of a replica's drain until its container may be killed: vLLM ends its processes, its supervisor what is left."""


def drain_seconds() -> float:
    recipe = load_recipe(ROOT / RECIPE, ServingRecipe)
    assert (recipe.host, recipe.port) == ("0.0.0.0", 8000)  # noqa: S104
    return recipe.drain_seconds + END_GRACE_SECONDS


def compose() -> dict[str, Any]:
    """As written, its YAML merges done."""
    found: dict[str, Any] = yaml.safe_load((DEPLOY / "compose.yaml").read_text("utf-8"))
    return found


def example() -> dict[str, str]:
    lines = (DEPLOY / ".env.example").read_text("utf-8").splitlines()
    return dict(line.split("=", 1) for line in lines if line and not line.startswith("#"))


def filled(text: str) -> str:
    """With variables replaced as Compose does it, from a filled-in .env.example."""
    values = {key: value or "filled-in" for key, value in example().items()}
    return VARIABLE.sub(lambda found: values.get(found[1]) or found[2] or "", text)


def is_replica(name: str, service: dict[str, Any]) -> bool:
    return name.startswith("replica") and service["command"] == ["tuneserve", "serve", RECIPE]


def test_compose_is_valid() -> None:
    plain = yaml.safe_load(filled(yaml.safe_dump(compose())))
    assert len(PyCompose.from_yaml(yaml.safe_dump(plain)).service_names()) == 8
    plain["services"]["worker"]["restrat"] = "always"
    with pytest.raises(ValueError, match="restrat"):
        PyCompose.from_yaml(yaml.safe_dump(plain))


@pytest.mark.skipif(
    not shutil.which("docker") or subprocess.run(["docker", "compose", "version"], capture_output=True, check=False).returncode != 0,
    reason="Docker's compose plugin is not installed",
)
def test_compose_is_valid_for_docker(tmp_path: Path) -> None:
    shutil.copytree(DEPLOY, tmp_path / "deploy")
    (tmp_path / "deploy" / ".env").write_text(filled("".join(f"{key}=${{{key}}}\n" for key in example())), "utf-8")
    done = subprocess.run(["docker", "compose", "config", "--quiet"], cwd=tmp_path / "deploy", capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr


def test_env_example_has_what_compose_reads_and_no_secret() -> None:
    text = (DEPLOY / "compose.yaml").read_text("utf-8")
    read = {found[1] for found in VARIABLE.finditer(text)} | {entry["environment"] for entry in compose()["secrets"].values()}
    assert set(example()) == read
    assert {key for key, value in example().items() if not value} == {key for key in example() if SECRET_NAME.search(key)}
    kubernetes = (KUBERNETES / "secrets.env.example").read_text("utf-8").splitlines()
    assert kubernetes == [f"{key}=" for key, value in example().items() if not value]
    ignored = subprocess.run(["git", "-C", str(ROOT), "check-ignore", "deploy/.env", "deploy/kubernetes/secrets.env"], capture_output=True, check=False)
    assert ignored.returncode == 0 and len(ignored.stdout.splitlines()) == 2


def test_compose_holds_no_secret_and_passes_none_as_an_argument() -> None:
    for name, service in compose()["services"].items():
        for key, value in service.get("environment", {}).items():
            if found := URL_WITH_PASSWORD.search(value):
                assert VARIABLE.fullmatch(found[1]), f"{name}: {key}"
            elif SECRET_NAME.search(key) and not key.endswith("_FILE"):
                assert VARIABLE.fullmatch(value), f"{name}: {key}"
        assert not VARIABLE.search(str([service.get("command"), service.get("healthcheck")])), name
        assert "healthcheck" in service or service["profiles"] == ["backup"], name


def test_composes_replicas_are_probed_and_drained() -> None:
    replicas = {name: service for name, service in compose()["services"].items() if is_replica(name, service)}
    assert len(replicas) >= 2
    for service in replicas.values():
        kind, command = service["healthcheck"]["test"]
        assert kind == "CMD-SHELL" and command.endswith(READY) and "$$TUNESERVE_TOKEN_FILE" in command
        assert float(filled(service["stop_grace_period"]).removesuffix("s")) >= drain_seconds() + MARGIN_SECONDS
        assert service["networks"]["default"]["aliases"] == ["replica"]
    states = [volume.partition(":")[0] for service in replicas.values() for volume in service["volumes"] if volume.endswith("/.tuneserve")]
    assert len(set(states)) == len(replicas)  # a state of its own


def manifests() -> Iterator[tuple[str, dict[str, Any]]]:
    """Every resource that kustomization.yaml names, and its file."""
    for name in yaml.safe_load((KUBERNETES / "kustomization.yaml").read_text("utf-8"))["resources"]:
        for found in yaml.safe_load_all((KUBERNETES / name).read_text("utf-8")):
            yield name, found


def pods() -> Iterator[tuple[str, dict[str, Any]]]:
    for _, found in manifests():
        if found["kind"] in ("Deployment", "StatefulSet"):
            yield found["metadata"]["name"], found["spec"]["template"]["spec"]


def test_kubernetes_is_valid() -> None:
    found = [found for _, found in manifests()]
    for each in found:
        kubernetes_validate.validate(each, KUBERNETES_VERSION, strict=True)
    assert {name for name, _ in pods()} == {"postgresql", "s3", "mlflow", "prefect", "worker", "replica"}
    with pytest.raises(kubernetes_validate.ValidationError):
        kubernetes_validate.validate({**found[-1], "spce": {}}, KUBERNETES_VERSION, strict=True)


@pytest.mark.skipif(not shutil.which("kubectl"), reason="kubectl is not installed")
def test_kustomize_makes_valid_resources_of_it(tmp_path: Path) -> None:
    folder = shutil.copytree(KUBERNETES, tmp_path / "kubernetes")
    (folder / "secrets.env").write_text("POSTGRES_PASSWORD=hidden\nS3_SECRET_KEY=hidden\nTUNESERVE_TOKEN=hidden\n", "utf-8")
    done = subprocess.run(["kubectl", "kustomize", str(folder)], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    made = list(yaml.safe_load_all(done.stdout))
    for each in made:
        kubernetes_validate.validate(each, KUBERNETES_VERSION, strict=True)
        assert each["kind"] == "Namespace" or each["metadata"]["namespace"] == "tuneserve"
    (secret,) = (each["metadata"]["name"] for each in made if each["kind"] == "Secret")
    named = re.findall(r"(?:secretKeyRef:\n\s+key: \w+\n\s+name|secretName): (\S+)", done.stdout)
    assert len(named) >= 6 and set(named) == {secret}


def test_kubernetes_holds_no_secret_and_passes_none_as_an_argument() -> None:
    assert not [name for name, found in manifests() if found["kind"] == "Secret"]
    for name, pod in pods():
        for container in pod["containers"]:
            given = {entry["name"]: entry for entry in container.get("env", ())}
            for key, entry in given.items():
                if found := URL_WITH_PASSWORD.search(entry.get("value", "")):
                    assert re.fullmatch(r"\$\(\w+\)", found[1]) and list(given).index(found[1][2:-1]) < list(given).index(key), f"{name}: {key}"
                elif SECRET_NAME.search(key):
                    assert "secretKeyRef" in entry["valueFrom"], f"{name}: {key}"
            assert not re.search(r"\$\(\w", str([container.get("command"), container.get("args")])), name


def test_kubernetes_replicas_are_probed_and_drained() -> None:
    (pod,) = (pod for name, pod in pods() if name == "replica")
    (container,) = pod["containers"]
    assert container["command"] == ["tuneserve", "serve", RECIPE]
    for probe in ("startupProbe", "readinessProbe"):
        assert container[probe]["exec"]["command"][-1].endswith(READY)
    assert container["startupProbe"]["failureThreshold"] * container["startupProbe"]["periodSeconds"] >= 1800  # loading 214 GB onto GPUs
    command, seconds = container["lifecycle"]["preStop"]["exec"]["command"]
    assert command == "sleep"
    assert pod["terminationGracePeriodSeconds"] >= float(seconds) + drain_seconds() + MARGIN_SECONDS
