"""Training that survives: killed six times, started twice, one of its processes killed; and what it costs over bare ms-swift."""

import json
import os
import random
import shutil
import signal
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import psutil
import pytest
import yaml

from pipeline.checkpoint import checkpoints, is_complete
from pipeline.dataset import IMAGE_TAG
from pipeline.project import Project
from pipeline.recipe import FinetuneRecipe, load_recipe
from pipeline.registry import Registry
from pipeline.training import swift_environment
from tests.e2e.environment import Sandbox, make_sandbox

RECIPE = "recipes/finetune/catalog-tiny.yaml"
PAIRS = 3


@pytest.fixture
def sandbox(tmp_path: Path) -> Iterator[Sandbox]:
    made = make_sandbox(tmp_path)
    yield made
    made.run("down", "--json", seconds=90)
    made.wait_until_nothing_runs(seconds=10)


def change(sandbox: Sandbox, recipe: str = RECIPE, **values: object) -> None:
    """Sets keys of the recipe's `training:`."""
    path = sandbox.root / recipe
    content = yaml.safe_load(path.read_text("utf-8"))
    content["training"] |= {key: None if value == "null" else value for key, value in values.items()}
    path.write_text(yaml.safe_dump(content, sort_keys=False), "utf-8")


def output(sandbox: Sandbox) -> Path | None:
    """ms-swift's folder of the only training."""
    return next((sandbox.root / ".tuneserve/runs").glob("*/swift"), None)


def logged(sandbox: Sandbox) -> int:
    folder = output(sandbox)
    log = folder / "logging.jsonl" if folder else None
    return log.read_text("utf-8").count("\n") if log and log.exists() else 0


def trainers(sandbox: Sandbox) -> list[psutil.Process]:
    """The processes that compute, one per rank."""
    found = [process for process in sandbox.processes() if "sft.py" in " ".join(process.cmdline()) and "torch.distributed.run" not in process.cmdline()]
    return [process for process in found if "swift/cli" in " ".join(process.cmdline())]


def writing(sandbox: Sandbox) -> bool:
    """Whether a checkpoint is being written right now."""
    folder = output(sandbox)
    newest = max((path for path in folder.glob("checkpoint-*")), key=lambda path: int(path.name[11:]), default=None) if folder else None
    return newest is not None and not (newest / "trainer_state.json").exists()


def wait(process: subprocess.Popen[str], reached: Callable[[], bool], seconds: float = 120) -> None:
    deadline = time.monotonic() + seconds
    while not reached():
        assert process.poll() is None, process.communicate()
        assert time.monotonic() < deadline
        time.sleep(0.0005)


def end(sandbox: Sandbox, process: subprocess.Popen[str]) -> None:
    """kill -9, and what it had started is gone by itself."""
    process.kill()
    process.communicate()
    deadline = time.monotonic() + 10
    while trainers(sandbox):
        assert time.monotonic() < deadline
        time.sleep(0.05)


def kill_while_training(sandbox: Sandbox, dice: random.Random) -> bool:
    process = sandbox.start("train", RECIPE)
    before, more = logged(sandbox), dice.randint(1, 4)
    wait(process, lambda: logged(sandbox) >= before + more)
    end(sandbox, process)
    return True


def kill_the_trainer(sandbox: Sandbox, dice: random.Random) -> bool:
    process = sandbox.start("train", RECIPE)
    before, more = logged(sandbox), dice.randint(1, 4)
    wait(process, lambda: logged(sandbox) >= before + more)
    trainers(sandbox)[0].kill()
    _, err = process.communicate()
    assert process.returncode == 1 and "run it again" in err and "Traceback" not in err
    return True


def kill_in_a_checkpoint_write(sandbox: Sandbox, dice: random.Random) -> bool:
    """False if the checkpoint was whole before the signal arrived."""
    process = sandbox.start("train", RECIPE)
    before = logged(sandbox)
    wait(process, lambda: logged(sandbox) > before and bool(trainers(sandbox)))
    trainer = trainers(sandbox)[0]
    wait(process, lambda: writing(sandbox))
    trainer.kill()
    folder = output(sandbox)
    assert folder
    torn = not is_complete(checkpoints(folder)[-1], 1, sharded=False)
    end(sandbox, process)
    return torn


def eval_loss(sandbox: Sandbox, adapter: Path) -> float:
    """Mean loss per answer token of the held-out rows, with the adapter on the base, by transformers and peft."""
    import torch
    from peft import PeftModel
    from PIL import Image
    from transformers import AutoProcessor, Glm4vMoeForConditionalGeneration

    from pipeline.tinyglm import Encoder, Lesson

    base = next((sandbox.root / ".tuneserve/bases").glob("tiny-*"))
    model = Glm4vMoeForConditionalGeneration.from_pretrained(base, dtype=torch.float32)
    tuned = PeftModel.from_pretrained(model, adapter).eval()
    encoder = Encoder(AutoProcessor.from_pretrained(base))
    total = tokens = 0.0
    examples = sandbox.held_out
    for example in examples:
        pictures = tuple(Image.open(path) for path in example.images)
        batch = encoder.batch([Lesson(pictures, example.prompt[-1]["content"].replace(IMAGE_TAG, ""), example.answer)])
        count = float((batch["labels"] != -100).sum())
        with torch.no_grad():
            total += float(tuned(**batch).loss) * count
        tokens += count
    return total / tokens


def curve(registry: Registry, run_id: str) -> dict[int, float]:
    return {point.step: point.value for point in registry.client.get_metric_history(run_id, "loss")}


def test_six_kills_end_in_the_adapter_of_an_uninterrupted_training(sandbox: Sandbox) -> None:
    up = sandbox.json("up", "--json")
    change(sandbox, checkpoint_steps=4, epochs=3)
    dice = random.Random(7)
    kinds: list[Callable[[Sandbox, random.Random], bool]] = [kill_while_training, kill_the_trainer, kill_in_a_checkpoint_write]
    done: list[str] = []
    missed = 0
    for kind in [*kinds, *kinds]:
        while not kind(sandbox, dice):
            missed += 1
            assert missed < 10, "no kill fell into a checkpoint write"
        done.append(kind.__name__)
    survived = sandbox.json("train", RECIPE, "--json")
    whole = sandbox.json("train", RECIPE, "--json", "--force")
    registry = Registry(up["mlflow"])
    experiment = registry.client.get_experiment_by_name("tuneserve").experiment_id
    runs = {run.info.run_id: run.info.status for run in registry.client.search_runs([experiment])}
    assert runs == {survived["mlflow_run_id"]: "FINISHED", whole["mlflow_run_id"]: "FINISHED"}
    assert (survived["version"], whole["version"]) == (1, 2)
    curves = [curve(registry, answer["mlflow_run_id"]) for answer in (survived, whole)]
    assert curves[0].keys() == curves[1].keys()
    apart = max(abs(curves[0][step] - curves[1][step]) for step in curves[0])
    losses = [eval_loss(sandbox, sandbox.root / ".tuneserve/runs" / answer["mlflow_run_id"] / "adapter") for answer in (survived, whole)]
    print(json.dumps({"kills": done, "writes_missed": missed, "eval_loss": losses, "train_loss_apart_at_most": apart, "logged_steps": len(curves[0])}))
    assert abs(losses[0] / losses[1] - 1) < 0.01
    assert apart < 1e-3


def test_the_same_again_and_two_at_once_are_one_version(sandbox: Sandbox) -> None:
    change(sandbox, epochs="null", max_steps=20)
    racing = [sandbox.start("train", RECIPE, "--json") for _ in range(2)]
    answers: list[dict[str, Any]] = []
    for process in racing:
        out, err = process.communicate(timeout=300)
        assert process.returncode == 0, err
        answers.append(json.loads(out.splitlines()[-1]))
    assert sorted(answer.pop("trained") for answer in answers) == [False, True]
    assert answers[0] == answers[1] and answers[0]["version"] == 1
    began = time.monotonic()
    again = sandbox.json("train", RECIPE, "--json")
    cold = time.monotonic() - began
    assert again == answers[0] | {"trained": False}
    sandbox.json("up", "--json")
    began = time.monotonic()
    assert sandbox.json("train", RECIPE, "--json") == again
    warm = time.monotonic() - began
    print(json.dumps({"same inputs again, seconds": round(cold, 1), "with servers up": round(warm, 1)}))
    assert max(cold, warm) < 10


def test_one_of_two_processes_killed_ends_all_and_is_named(sandbox: Sandbox) -> None:
    recipe = "recipes/finetune/catalog-tiny-zero2.yaml"
    change(sandbox, recipe, epochs="null", max_steps=40, checkpoint_steps=5)
    process = sandbox.start("train", recipe)
    wait(process, lambda: logged(sandbox) > 2)
    victim = next(trainer for trainer in trainers(sandbox) if trainer.environ().get("RANK") == "1")
    victim.kill()
    began = time.monotonic()
    _, err = process.communicate(timeout=60)
    assert process.returncode == 1
    assert "process 1 of 2 was ended by signal 9" in err and "Traceback" not in err.split("the log is")[0]
    assert not trainers(sandbox)
    ended = time.monotonic() - began
    again = sandbox.json("train", recipe, "--json")
    assert (again["version"], again["trained"]) == (1, True)
    assert "resume_from_checkpoint" in (sandbox.root / f".tuneserve/runs/{again['mlflow_run_id']}/swift_args.json").read_text("utf-8")
    print(json.dumps({"says": next(line for line in err.splitlines() if "process 1" in line)[:200], "seconds until the command ended": round(ended, 1)}))


def test_what_tuneserve_adds_to_bare_swift(sandbox: Sandbox) -> None:
    sandbox.json("up", "--json")
    change(sandbox, epochs=3)  # the shorter, the less a shared machine's drift between the two of a pair
    sandbox.json("train", RECIPE, "--json")  # everything is made and cached
    swift = output(sandbox)
    assert swift
    args_file = swift.with_name("swift_args.json")
    recipe = load_recipe(sandbox.root / RECIPE, FinetuneRecipe)
    environment = Project(sandbox.root).child_environment(swift_environment(recipe, swift.with_name("ranks"))) | {"HOME": str(sandbox.home)}
    ours, bare = [], []
    for _ in range(PAIRS):
        began = time.monotonic()
        sandbox.json("train", RECIPE, "--json", "--force")
        ours.append(time.monotonic() - began)
        shutil.rmtree(swift)
        began = time.monotonic()
        command = [str(Path(sys.executable).with_name("swift")), "sft", str(args_file)]
        subprocess.run(command, check=True, env=environment, cwd=sandbox.root, capture_output=True)
        bare.append(time.monotonic() - began)
    over = [a - b for a, b in zip(ours, bare, strict=True)]
    print(json.dumps({"tuneserve train": ours, "swift sft": bare, "overhead_seconds_median": statistics.median(over)}))
    assert statistics.median(over) <= 0.03 * statistics.median(bare) + 5


def test_ctrl_c_in_the_middle_is_gone_on_from(sandbox: Sandbox) -> None:
    change(sandbox, checkpoint_steps=5, epochs="null", max_steps=40)
    process = sandbox.start("train", RECIPE)
    wait(process, lambda: logged(sandbox) > 4)
    os.kill(process.pid, signal.SIGINT)
    process.communicate(timeout=30)
    assert process.returncode == 130
    again = sandbox.json("train", RECIPE, "--json")
    assert (again["version"], again["trained"]) == (1, True)
    assert "resume_from_checkpoint" in (sandbox.root / f".tuneserve/runs/{again['mlflow_run_id']}/swift_args.json").read_text("utf-8")
