"""`tuneserve inspect` in this process, and the small project that it is asked in."""

import json
import os
from pathlib import Path
from typing import Any
from unittest.mock import patch

import numpy
from click.testing import CliRunner
from safetensors.numpy import save_file

from pipeline.cli import cli
from pipeline.errors import TuneserveError

ATTENTION_RECIPE = "name: attention\nbase_model: base\nfollow: [shop]\ndevice: cpu\n"
EXPERTS_RECIPE = "name: experts\nbase_model: base\nfollow: [shop]\nlora: {max_rank: 16, target_modules: [qkv_proj, o_proj, experts]}\n"


def inspect(home: Path, *args: str, mlflow: str | None = "http://127.0.0.1:9") -> tuple[int, dict[str, Any]]:
    """Exit code and the JSON answer; for an error its code and message."""
    with patch.dict(os.environ, {"TUNESERVE_PROJECT": str(home)} | ({"MLFLOW_TRACKING_URI": mlflow} if mlflow else {})):
        done = CliRunner().invoke(cli, ["inspect", "--json", *args])
    if isinstance(done.exception, TuneserveError):
        return done.exception.exit_code, {"error": str(done.exception)}
    assert done.exception is None or isinstance(done.exception, SystemExit), done.exception
    return done.exit_code, json.loads(done.stdout.splitlines()[-1]) if done.stdout else {"error": done.stderr}


def codes(answer: dict[str, Any]) -> list[str]:
    """Those of the reasons, each of which has a message and a remedy."""
    assert all(reason.keys() == {"code", "message", "remedy"} and all(reason.values()) for reason in answer["reasons"])
    found = [reason["code"] for reason in answer["reasons"]]
    assert len(found) == len(set(found)) and answer["servable"] == (not found)
    return found


def make_home(home: Path) -> Path:
    """A project with two serving recipes of one base, which is not there."""
    (home / "recipes/serving").mkdir(parents=True)
    (home / "recipes/serving/attention.yaml").write_text(ATTENTION_RECIPE, "utf-8")
    (home / "recipes/serving/experts.yaml").write_text(EXPERTS_RECIPE, "utf-8")
    return home


def make_base(folder: Path, fill: float = 1.0) -> Path:
    """A base of one module, layer 0's q_proj of 4 inputs and 4 outputs."""
    folder.mkdir(parents=True)
    (folder / "config.json").write_text("{}", "utf-8")
    (folder / "tokenizer.json").write_text("{}", "utf-8")
    save_file({"model.language_model.layers.0.self_attn.q_proj.weight": numpy.full((4, 4), fill, "float32")}, folder / "model.safetensors")
    return folder
