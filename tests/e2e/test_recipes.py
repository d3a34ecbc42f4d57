"""The embedded recipe's twins, DeepSpeed and QLoRA, on a machine without a compiler: each trains to an adapter that answers when served. Runs last.

They are trained for half of what their recipes say, and asked every fourth held-out question: enough to tell an adapter that has learnt from one that has not.
"""

from pathlib import Path

import pytest

from pipeline.evaluation import evaluate
from pipeline.parity import replay
from pipeline.reference import read_reference
from pipeline.serving.client import Replica
from tests.e2e.conftest import Quickstart
from tests.e2e.environment import path_without_compilers


def shortened(quickstart: Quickstart, twin: str) -> str:
    """The twin's recipe with half of its epochs."""
    text = (quickstart.sandbox.root / f"recipes/finetune/catalog-tiny-{twin}.yaml").read_text("utf-8")
    assert text.count("epochs: 4") == 1
    (quickstart.sandbox.root / f"recipes/finetune/short-{twin}.yaml").write_text(text.replace("epochs: 4", "epochs: 2"), "utf-8")
    return f"recipes/finetune/short-{twin}.yaml"


@pytest.mark.parametrize("twin", ["zero2", "qlora"])
def test_a_twin_trains_to_a_served_adapter_that_beats_the_base(quickstart: Quickstart, tmp_path: Path, twin: str) -> None:
    trained = quickstart.sandbox.json("train", shortened(quickstart, twin), "--json", PATH=path_without_compilers(tmp_path / "bin"))
    label = f"catalog/{trained['version']}"
    assert trained["trained"]
    params = quickstart.registry.client.get_run(trained["mlflow_run_id"]).data.params
    assert (params["training.deepspeed"], params["quantization"]) == (("zero2", "None") if twin == "zero2" else ("None", "nf4"))
    log = (quickstart.sandbox.root / f".tuneserve/logs/training-{trained['mlflow_run_id']}.log").read_text("utf-8")
    assert ("ParametrizedGlm4vMoeTextExperts" in log) == (twin == "qlora"), "the routed experts are in 4 bits too"
    quickstart.sandbox.json("promote", label, "--force", "--json")  # it may be no better than the champion
    version = quickstart.registry.version("catalog", str(trained["version"]))
    found = replay(Replica(quickstart.replica, quickstart.token), version, read_reference(quickstart.registry.reference(version) or "", label))
    assert found.faithful, f"the reference is of one process and of the base as it is served: {found.reason}"
    answers = evaluate(quickstart.replica, "catalog", quickstart.sandbox.held_out[::4], lambda text, fraction: None)
    assert [model.partition("@")[0] for model in answers.models] == [label]
    assert answers.exact_match >= quickstart.answer["base"]["exact_match"] + 0.5, answers.by("kind")


def test_training_the_same_again_gives_the_same_version(quickstart: Quickstart) -> None:
    """The version of the test before this one."""
    runs = {path.name for path in (quickstart.sandbox.root / ".tuneserve/runs").iterdir()}
    again = quickstart.sandbox.json("train", shortened(quickstart, "qlora"), "--json")
    newest = quickstart.registry.version("catalog")
    assert not again["trained"] and (again["version"], again["mlflow_run_id"]) == (int(newest.version), newest.run_id)
    assert {path.name for path in (quickstart.sandbox.root / ".tuneserve/runs").iterdir()} == runs
