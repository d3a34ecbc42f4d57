"""Backup, wipe, restore, with the commands of docs/production.md: the registry and the schedule as before, and replicas that served on meanwhile."""

import os
import shutil
import subprocess
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import yaml
from safetensors.numpy import load_file, save_file

from pipeline.adapter import read_adapter
from pipeline.registry import Registry
from tests.acceptance.figures import show
from tests.acceptance.load import Plan, loading
from tests.acceptance.production_environment import (
    BUCKET,
    DATABASES,
    MLFLOW,
    POSTGRESQL,
    PREFECT,
    S3,
    USER,
    WORKER,
    Production,
    postgresql_tools,
    production,
)
from tests.e2e.environment import ROOT

RECIPE = "recipes/finetune/restored.yaml"
QUESTION = "What product is this?"


def tools(site: Production) -> dict[str, str]:
    """The environment of pg_dump, pg_restore and rclone: where, who, and the passwords, which are no arguments."""
    own = {"PGHOST": "127.0.0.1", "PGPORT": str(site.ports[POSTGRESQL]), "PGUSER": USER, "PGPASSWORD": site.secrets["postgresql"]}
    own |= {"RCLONE_CONFIG_STORE_TYPE": "s3", "RCLONE_CONFIG_STORE_PROVIDER": "Other", "RCLONE_CONFIG_STORE_ENDPOINT": site.url(S3)}
    own |= {"RCLONE_CONFIG_STORE_ACCESS_KEY_ID": USER, "RCLONE_CONFIG_STORE_SECRET_ACCESS_KEY": site.secrets["s3"]}
    given = {key: value for key, value in os.environ.items() if not key.startswith("AWS_")}  # rclone would take them for its own
    return given | own | {"RCLONE_CONFIG": "/dev/null", "PATH": f"{postgresql_tools()}:{os.environ['PATH']}"}


def run(site: Production, *argv: str) -> None:
    done = subprocess.run(argv, env=tools(site), capture_output=True, text=True, timeout=300, check=False)
    assert done.returncode == 0, f"{argv}: {done.stdout}{done.stderr}"


def back_up(site: Production, folder: Path) -> float:
    """Seconds. The databases first: what they name is in the bucket by then."""
    began = time.monotonic()
    folder.mkdir()
    for name in DATABASES:
        run(site, "pg_dump", "--format=custom", f"--file={folder}/{name}.dump", name)
    run(site, "rclone", "sync", f"store:{BUCKET}", f"{folder}/artifacts")
    return time.monotonic() - began


def restore(site: Production, folder: Path) -> None:
    """Into stores that are empty, and that nothing writes to."""
    for name in DATABASES:
        run(site, "pg_restore", "--exit-on-error", "--no-owner", f"--dbname={name}", f"{folder}/{name}.dump")
    run(site, "rclone", "sync", f"{folder}/artifacts", f"store:{BUCKET}")
    run(site, "rclone", "check", "--download", f"{folder}/artifacts", f"store:{BUCKET}")


def make_versions(site: Production) -> None:
    """catalog/1, really trained, if briefly; catalog/2, its update halved, champion after it; the first one is switched off."""
    root = site.sandbox.root
    shipped = yaml.safe_load((root / "recipes/finetune/catalog-tiny.yaml").read_text("utf-8"))
    own = {"training": shipped["training"] | {"epochs": 0.5}, "promotion": {"floor": 0.0}}
    (root / RECIPE).write_text(yaml.safe_dump(shipped | own), "utf-8")
    trained = site.json("train", RECIPE, "--json", seconds=900)
    site.json("promote", "catalog/1", "--force", *site.replica_options, "--json")
    registry, folder = Registry(site.mlflow), site.folder / "variant"
    shutil.copytree(root / ".tuneserve/runs" / trained["mlflow_run_id"] / "adapter", folder)
    weights = folder / "adapter_model.safetensors"
    save_file({key: value * 0.5 if "lora_B" in key else value for key, value in load_file(weights).items()}, folder / "new.safetensors")
    (folder / "new.safetensors").replace(weights)
    first = registry.version("catalog", "1")
    with registry.run("variant", {}, {}) as made:
        registry.register("catalog", made.run_id, read_adapter(folder), {}, first.base_revision, first.template_digest, "variant")
    site.json("promote", "catalog/2", "--force", *site.replica_options, "--json")
    site.json("disable", "catalog/1", "--reason", "a rehearsal", *site.replica_options, "--json")
    site.json("schedule", RECIPE, "--cron", "0 3 * * 1", *site.replica_options, "--json")


def look(site: Production) -> dict[str, Any]:
    """All that users and operators see, less what the clock changes."""
    status = site.run("status", "catalog", *site.replica_options, "--json")
    registry = Registry(site.mlflow)
    versions = [registry.version("catalog", number) for number in ("1", "2")]
    schedules = site.json("schedule", "--list", "--json")["schedules"]
    store: Any = site.s3()
    return {
        "status": (status.returncode, lasting(status.stdout)),
        "history": site.json("history", "catalog", "--json")["entries"],
        "versions": [(version.label, version.digest, registry.tags(version), registry.lineage(version)) for version in versions],
        "schedules": [{key: each[key] for key in ("name", "recipe", "when", "overlap", "pool", "paused")} for each in schedules],
        "artifacts": {entry["Key"]: entry["Size"] for entry in store.list_objects_v2(Bucket=BUCKET)["Contents"]},
        "answers": [site.answer(name, "catalog", QUESTION) for name in site.replicas],
    }


def probe(site: Production, name: str) -> int:
    """The exit code of the readiness probe that deploy/ has for replicas, asked of this one."""
    service = yaml.safe_load((ROOT / "deploy/compose.yaml").read_text("utf-8"))["services"]["replica-1"]
    command = service["healthcheck"]["test"][1].replace("$$", "$").replace("http://127.0.0.1:8000", site.url(name))
    environment = dict(os.environ) | {"TUNESERVE_TOKEN_FILE": str(site.sandbox.root / ".tuneserve/token")}
    return subprocess.run(["sh", "-c", command], env=environment, timeout=30, check=False).returncode


def lasting(stdout: str) -> Any:
    """What `tuneserve status` says, less times and counters."""
    passing = ("slots", "cache", "loaded_at")

    def plain(value: Any) -> Any:
        if isinstance(value, dict):
            return {key: plain(each) for key, each in value.items() if not isinstance(each, float) and "seconds" not in key and key not in passing}
        return [plain(each) for each in value] if isinstance(value, list) else value

    return plain(yaml.safe_load(stdout.splitlines()[-1]))


def differing(one: Any, other: Any, where: str = "") -> Iterator[str]:
    """What is not the same in two such answers, each with both its values."""
    if isinstance(one, dict) and isinstance(other, dict):
        for key in sorted({*one, *other}):
            yield from differing(one.get(key), other.get(key), f"{where}.{key}")
    elif isinstance(one, list | tuple) and isinstance(other, list | tuple) and len(one) == len(other):
        for number, (each, another) in enumerate(zip(one, other, strict=True)):
            yield from differing(each, another, f"{where}[{number}]")
    elif one != other:
        yield f"{where}: {one} -> {other}"


def test_production_restore(tmp_path: Path) -> None:
    assert shutil.which("rclone"), "rclone is not installed: apt-get install rclone"
    backup = tmp_path / "backup"
    with production(tmp_path, replicas=2) as site:
        make_versions(site)
        before = look(site)
        with loading(Plan(site.url("replica-1"), clients=2, pause_seconds=0.2), tmp_path) as load:
            backup_seconds = back_up(site, backup)
            began = time.monotonic()
            for name in (WORKER, PREFECT, MLFLOW):
                site.stop(name)
            for name in (POSTGRESQL, S3):
                site.wipe(name)
            away = [site.answer(name, "catalog", QUESTION) for name in site.replicas]
            for name in (POSTGRESQL, S3):
                site.start(name)
            restore(site, backup)
            restored_seconds = time.monotonic() - began
            for name in (MLFLOW, PREFECT, WORKER):
                site.start(name)
            up_seconds = time.monotonic() - began
            after = look(site)
            probes = [probe(site, "replica-2")]
            site.stop("replica-2")
            probes.append(probe(site, "replica-2"))
            shutil.rmtree(site.sandbox.root / ".tuneserve/serving/replica-2")
            replica_seconds = site.start("replica-2")
            probes.append(probe(site, "replica-2"))
            fetched = look(site)
            # The replica never served version 1, so it names no switch of it.
            changed = [each for each in differing(before, fetched) if ".disabled.versions.1:" not in each]
            answers = load.stop()
        again = site.json("train", RECIPE, "--json")
        failed = [answer for answer in answers if not answer.ok]
        sizes = {path.name: path.stat().st_size for path in backup.glob("*.dump")}
        leaks = site.leaks()
        left = site.left_over()
        show(
            backup_seconds=backup_seconds,
            backup_bytes=sizes | {"artifacts": sum(before["artifacts"].values())},
            wiped_and_restored_seconds=restored_seconds,
            everything_up_seconds=up_seconds,
            status_exit={"before": before["status"][0], "after": after["status"][0], "with a replica that had lost its state": fetched["status"][0]},
            not_as_before=list(differing(before, after)),
            fetched_not_as_before=changed,
            answers_while_all_was_away=away == before["answers"],
            replica_from_nothing_seconds=replica_seconds,
            probes_of_it=probes,
            trained_again=again["trained"],
            requests=len(answers),
            failed=len(failed),
            secrets_found=leaks,
            left_over=left,
        )
        assert before["status"][0] == 0
        assert list(differing(before, after)) == []
        assert changed == []
        assert away == before["answers"] and all(version.startswith("catalog/2@") for version, _ in away)
        assert again["trained"] is False
        assert probes[0] == probes[2] == 0 and probes[1] != 0
        assert failed == [] and leaks == [] and left == []
