"""The main job as a stranger meets it: a clone in an empty folder, two make targets, nothing cached; and its timed promises."""

import json
import os
import statistics
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from tests.e2e.environment import ROOT, make_sandbox, path_without_compilers


@pytest.fixture
def clone(tmp_path: Path) -> Iterator[Path]:
    """A clone of HEAD on a machine with an empty home and package cache, so that everything is downloaded, and with no compiler on its PATH."""
    folder = tmp_path
    (folder / "home").mkdir()
    subprocess.run(["git", "clone", "--quiet", str(ROOT), str(folder / "t")], check=True)
    yield folder / "t"
    subprocess.run([".venv/bin/tuneserve", "down"], cwd=folder / "t", check=False, capture_output=True)


def run(clone: Path, *command: str) -> tuple[subprocess.CompletedProcess[str], float]:
    kept = {key: value for key, value in os.environ.items() if not key.startswith(("TUNESERVE", "MLFLOW", "PREFECT", "VIRTUAL_ENV", "UV_CACHE"))}
    began = time.monotonic()
    kept |= {"HOME": str(clone.parent / "home"), "PATH": path_without_compilers(clone.parent / "bin")}
    done = subprocess.run(command, cwd=clone, env=kept, capture_output=True, text=True, check=False)
    return done, time.monotonic() - began


def check_answer(answer: dict[str, Any], version: int) -> None:
    assert answer["adapter"]["exact_match"] >= 0.90 and answer["base"]["exact_match"] <= 0.10
    assert answer["adapter"]["examples"] >= 200
    assert (answer["adapter"]["name"], answer["adapter"]["version"]) == ("catalog", version)
    assert answer["adapter"]["model"].startswith(f"catalog/{version}@")
    assert answer["mlflow_run_id"]


def test_quickstart_from_nothing_and_again(clone: Path) -> None:
    first, seconds = run(clone, "make", "quickstart")
    assert first.returncode == 0, first.stdout + first.stderr
    print(json.dumps({"make quickstart, from nothing with downloads": round(seconds)}))
    again, again_seconds = run(clone, ".venv/bin/tuneserve", "quickstart", "--json")
    assert again.returncode == 0, again.stderr
    answer = json.loads(again.stdout.splitlines()[-1])
    check_answer(answer, version=2)
    print(json.dumps({"second quickstart": round(again_seconds), "seconds": answer["seconds"], "adapter": answer["adapter"], "base": answer["base"]}))
    assert seconds < 15 * 60
    assert again_seconds < 6 * 60
    left = [str(path.relative_to(clone.parent)) for path in (clone.parent / "home").iterdir() if path.name != ".cache"]
    assert left == []  # .cache is uv's and pip's own


def test_make_test_in_the_clone(clone: Path) -> None:
    done, seconds = run(clone, "make", "test")
    print(done.stdout[-1500:])
    assert done.returncode == 0, done.stdout[-5000:] + done.stderr[-3000:]
    print(json.dumps({"make test": round(seconds)}))
    assert seconds < 20 * 60


def test_without_the_alias_the_quickstart_fails(tmp_path: Path) -> None:
    sandbox = make_sandbox(tmp_path)
    done = sandbox.run("quickstart", "--json", "--no-promote")
    assert done.returncode == 1
    assert "tuneserve promote catalog/1" in done.stderr
    assert not json.loads(done.stdout.splitlines()[-1])["ok"]
    sandbox.wait_until_nothing_runs(seconds=10)
    print(json.dumps({"exit": done.returncode, "says": done.stderr.splitlines()[-1]}))


def test_help_starts_at_once() -> None:
    command = Path(sys.executable).with_name("tuneserve")
    times = []
    for _ in range(5):
        began = time.monotonic()
        subprocess.run([command, "--help"], check=True, capture_output=True)
        times.append(time.monotonic() - began)
    print(json.dumps({"tuneserve --help, median of 5, seconds": round(statistics.median(times), 3)}))
    assert statistics.median(times) < 0.4


def test_the_fast_tier_takes_under_a_minute() -> None:
    began = time.monotonic()
    done = subprocess.run(["make", "test-fast"], cwd=ROOT, check=False, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout[-3000:]
    print(json.dumps({"fast tier, seconds": round(time.monotonic() - began)}))
    assert time.monotonic() - began < 60
