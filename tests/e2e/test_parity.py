"""The quickstart's version replayed through vLLM: faithful in float32 and bfloat16, and every way of serving it otherwise told apart. Between the main job's and the promotions' tests."""

import base64
import functools
import hashlib
import io
import shutil
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import yaml
from jinja2.sandbox import ImmutableSandboxedEnvironment
from PIL import Image
from safetensors.numpy import load_file, save_file
from tokenizers import Tokenizer

from pipeline.adapter import read_adapter
from pipeline.basemodel import TEMPLATE_FILE
from pipeline.parity import Parity, compare, replay
from pipeline.reference import Expected, Reference, read_reference
from pipeline.registry import Version
from pipeline.services import free_port
from pipeline.serving.client import Replica, ReplicaError
from tests.e2e.conftest import Quickstart

MODEL = "parity"
"""Where the damaged variants are registered: the session's own server does not follow it."""
START_SECONDS = 300


@pytest.fixture(scope="module")
def version(quickstart: Quickstart) -> Version:
    return quickstart.registry.version("catalog", "1")


@pytest.fixture(scope="module")
def reference(quickstart: Quickstart, version: Version) -> Reference:
    text = quickstart.registry.reference(version)
    assert text and len(text) < 64 * 1024 and str(quickstart.sandbox.root) not in text
    return read_reference(text, version.label)


@dataclass(frozen=True)
class Twin:
    """A float32 server that follows the catalog and the variants."""

    replica: Replica
    half: Version
    scaled: Version


def variant(quickstart: Quickstart, folder: Path, alias: str, change: Callable[[str, np.ndarray], np.ndarray]) -> Version:
    """The first version with changed weights, callable by number."""
    first = quickstart.registry.version("catalog", "1")
    shutil.copytree(quickstart.sandbox.root / ".tuneserve/runs" / first.run_id / "adapter", folder)
    weights = folder / "adapter_model.safetensors"
    save_file({key: change(key, value) for key, value in load_file(weights).items()}, weights)
    with quickstart.registry.run("variant", {}, {}) as run:
        made = quickstart.registry.register(MODEL, run.run_id, read_adapter(folder), {}, first.base_revision, first.template_digest, alias)
    quickstart.registry.client.set_registered_model_alias(MODEL, alias, made.version)
    return made


@pytest.fixture(scope="module")
def twin(quickstart: Quickstart, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Twin]:
    folder = tmp_path_factory.mktemp("variants")
    half = variant(quickstart, folder / "half", "champion", lambda key, value: value * 0 if "layers.2." in key and "lora_B" in key else value)
    scaled = variant(quickstart, folder / "scaled", "scaled", lambda key, value: value * 2 if "lora_B" in key else value)  # as alpha doubled
    root, port = quickstart.sandbox.root, free_port(0)
    shipped = yaml.safe_load((root / "recipes/serving/tiny-cpu.yaml").read_text("utf-8"))
    changed = {"name": "float32", "precision": "float32", "port": port, "follow": ["catalog", MODEL]}
    (root / "recipes/serving/float32.yaml").write_text(yaml.safe_dump(shipped | changed), "utf-8")
    serving = quickstart.sandbox.start("serve", "recipes/serving/float32.yaml")
    try:
        replica = Replica(f"http://127.0.0.1:{port}", quickstart.token)
        deadline = time.monotonic() + START_SECONDS
        while not is_ready(replica):
            assert serving.poll() is None, serving.communicate()
            assert time.monotonic() < deadline
            time.sleep(0.5)
        yield Twin(replica, half, scaled)
    finally:
        serving.terminate()
        serving.communicate(timeout=90)


def is_ready(replica: Replica) -> bool:
    try:
        return replica.ready()
    except ReplicaError:
        return False


def changed_prompt(reference: Reference, kind: str, change: Callable[[Expected], dict[str, Any]], **more: Any) -> Reference:
    """The reference with one prompt as it would be if training had seen it otherwise."""
    prompts = tuple(prompt.model_copy(update=change(prompt)) if prompt.kind == kind else prompt for prompt in reference.prompts)
    return reference.model_copy(update={"prompts": prompts, **more})


def test_the_version_is_faithful_in_float32(twin: Twin, version: Version, reference: Reference) -> None:
    began = time.monotonic()
    found = replay(twin.replica, version, reference)
    print(f"float32: {found.base}, {found.adapter}, effect {found.effect:.1f}, {time.monotonic() - began:.2f} s")
    assert found.faithful and found.verdict == "faithful", found.reason
    assert set(found.compared) == {"one image", "two images", "text", "turns", "system", "resized image"} and not found.skipped
    assert found.base and found.adapter and found.base.max < 1e-3 and found.adapter.max < 1e-3
    assert found.effect and found.effect > 1, "else nothing was proved of the adapter"


def test_the_version_is_faithful_on_the_sessions_bfloat16_server(quickstart: Quickstart, version: Version, reference: Reference) -> None:
    found = replay(Replica(quickstart.replica, quickstart.token), version, reference)
    print(f"bfloat16: {found.base}, {found.adapter}")
    assert found.faithful and len(found.compared) == 6, found.reason


def test_a_template_that_lost_a_newline_is_found_by_its_token(quickstart: Quickstart, twin: Twin, version: Version, reference: Reference) -> None:
    source = TEMPLATE_FILE.read_text("utf-8")
    whole, lost = "'<|assistant|>\\n<think></think>\\n'", "'<|assistant|>\\n<think></think>'"
    assert source.count(whole) == 1
    template = ImmutableSandboxedEnvironment(trim_blocks=True, lstrip_blocks=True).from_string(source.replace(whole, lost))
    (base,) = (quickstart.sandbox.root / ".tuneserve/bases").glob("tiny-*/tokenizer.json")
    tokenizer = Tokenizer.from_file(str(base))

    def rendered(prompt: Expected) -> dict[str, Any]:
        text = template.render(messages=[message.model_dump() for message in prompt.messages], add_generation_prompt=True)
        return {"prompt_tokens": tuple(tokenizer.encode(text, add_special_tokens=False).ids)}

    found = replay(twin.replica, version, changed_prompt(reference, "text", rendered))
    assert found.verdict == "prompt-differs" and [(each.kind, each.prompt) for each in found.mismatches] == [("tokens", "text")]
    (text,) = (prompt for prompt in reference.prompts if prompt.kind == "text")
    assert f"token {len(text.prompt_tokens) - 1} of the prompt differs: training has its end after" in found.reason
    assert "the server '\\n' (id" in found.reason and "<think></think>'" in found.reason


def test_an_image_that_was_resized_is_found_by_its_prompt(twin: Twin, version: Version, reference: Reference) -> None:
    """To as many patches, so that the tokens are the same and only the pixels can tell; the log-probabilities hardly do."""
    (prompt,) = (prompt for prompt in reference.prompts if prompt.kind == "one image")
    resized = io.BytesIO()
    Image.open(io.BytesIO(base64.b64decode(reference.images[prompt.images[0]]))).convert("RGB").resize((61, 52)).save(resized, "PNG")
    digest = hashlib.sha256(resized.getvalue()).hexdigest()
    pictures = {**reference.images, digest: base64.b64encode(resized.getvalue()).decode()}
    found = replay(twin.replica, version, changed_prompt(reference, "one image", lambda _: {"images": (digest,)}, images=pictures))
    assert found.verdict == "prompt-differs" and [(each.kind, each.prompt) for each in found.mismatches] == [("pixels", "one image")]
    assert f"image 1 of 1 ({digest[:12]})" in found.reason


def test_an_adapter_that_is_not_applied_is_found(twin: Twin, reference: Reference) -> None:
    ask = functools.partial(twin.replica.parity, "glm-4.5v")
    found = compare(reference, [ask(prompt.openai_messages(reference.images), prompt.answer_tokens) for prompt in reference.prompts])
    assert found.verdict == "adapter-differs" and "it is not applied" in found.reason
    assert found.base and found.base.max < 1e-3 and found.adapter and found.adapter.max > 1


@pytest.mark.parametrize("damage", ["half", "scaled"])
def test_an_adapter_that_is_applied_in_part_or_at_another_scale_is_found(twin: Twin, reference: Reference, damage: str) -> None:
    other: Version = getattr(twin, damage)
    found: Parity = replay(twin.replica, other, reference)
    assert found.verdict == "not-compared" and "another adapter" in found.reason, "the reference is not of this version"
    found = replay(twin.replica, other, reference.model_copy(update={"adapter_digest": other.digest}))
    print(f"{damage}: {found.adapter}")
    assert found.verdict == "adapter-differs" and "in part or at another scale" in found.reason
    assert found.base and found.base.max < 1e-3 and found.adapter and found.adapter.max > 0.5, "seen in bfloat16 too"
