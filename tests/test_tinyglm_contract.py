"""The tiny GLM-4.5V before it has learnt anything: transformers loads its folder as a GLM-4.5V, and it is a base model to us."""

import json
from pathlib import Path

import pytest
import torch
from PIL import Image
from safetensors import safe_open
from transformers import AutoModelForImageTextToText, AutoProcessor

from pipeline import tinyglm
from pipeline.basemodel import TEMPLATE_FILE, read_base_model

pytestmark = pytest.mark.contract


@pytest.fixture(scope="module")
def untrained(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The tiny GLM-4.5V with random weights."""
    base = tmp_path_factory.mktemp("untrained")
    processor = tinyglm.make_processor(TEMPLATE_FILE.read_text("utf-8"))
    tinyglm.save(tinyglm.make_model(tinyglm.make_config(processor.tokenizer)), processor, base)
    return base


def test_tiny_model_loads_and_reads_an_image(untrained: Path) -> None:
    processor, model = AutoProcessor.from_pretrained(untrained), AutoModelForImageTextToText.from_pretrained(untrained, dtype=torch.float32)
    question = [{"role": "user", "content": [{"type": "image"}, {"type": "text", "text": tinyglm.QUESTION}]}]
    text = processor.apply_chat_template(question, add_generation_prompt=True, tokenize=False)
    inputs = processor(text=[text], images=[Image.new("RGB", (56, 56), "red")], return_tensors="pt")
    with torch.no_grad():
        logits = model(**inputs).logits
    assert logits.shape == (*inputs["input_ids"].shape, len(processor.tokenizer)) and bool(logits.isfinite().all())
    assert type(model).__name__ == "Glm4vMoeForConditionalGeneration" and model.config.model_type == "glm4v_moe"
    experts = [name for name, _ in model.named_modules() if name.endswith(("mlp.experts", "mlp.shared_experts"))]
    assert len(experts) == 2 * (model.config.text_config.num_hidden_layers - 1), "all layers but the first are MoE with a shared expert"


def test_tiny_model_is_saved_as_a_base_model(untrained: Path) -> None:
    assert read_base_model(untrained).folder == untrained
    assert (untrained / "chat_template.jinja").read_text("utf-8").rstrip("\n") == TEMPLATE_FILE.read_text("utf-8").rstrip("\n")
    with safe_open(untrained / "model.safetensors", "pt") as weights:
        types = {weights.get_slice(name).get_dtype() for name in weights.keys()}  # noqa: SIM118
    assert types == {"BF16"}
    tokens = json.loads((untrained / "tokenizer.json").read_text("utf-8"))
    ids = {token["content"]: token["id"] for token in tokens["added_tokens"]}
    assert json.loads((untrained / "generation_config.json").read_text())["eos_token_id"] == [ids[name] for name in tinyglm.END_TOKENS]
