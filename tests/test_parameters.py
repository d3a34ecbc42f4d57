"""Parameters by module, against GLM-4.5V's known total; that they are exact is shown with transformers in test_capacity_contract.py."""

import copy
import json
from pathlib import Path

import pytest

from pipeline.errors import InvalidInput
from pipeline.parameters import PUBLISHED_CONFIG, Parameters, published, read_architecture, read_config
from tests.planning import GLM_4_5V, glm


def test_glm_4_5v_adds_up_to_its_107_71_billion() -> None:
    parameters = glm().parameters
    assert parameters == Parameters(
        embeddings=151552 * 4096,
        attention=46 * (2 * 4096 * 12288 + 2 * 4096 * 1024 + 12288 + 2 * 1024),
        dense_mlp=3 * 4096 * 10944,
        routed_experts=45 * 128 * 3 * 4096 * 1408,
        shared_experts=45 * 3 * 4096 * 1408,
        router=45 * (128 * 4096 + 128),
        norms=(2 * 46 + 1) * 4096,
        lm_head=151552 * 4096,
        vision_tower=707_416_576,
        merger=151_265_280,
    )
    assert parameters.total == 107_710_933_120
    assert round(parameters.routed_experts / 1e9, 1) == 99.7


def test_the_published_dimensions_are_the_true_ones() -> None:
    assert published().decoder == glm().decoder
    assert published().vision == glm().vision
    shipped = json.loads(PUBLISHED_CONFIG.read_text("utf-8"))
    for part in ("text_config", "vision_config"):
        assert shipped[part].items() <= GLM_4_5V[part].items()


def test_a_config_without_a_size_is_refused_and_all_missing_ones_are_named() -> None:
    config = copy.deepcopy(GLM_4_5V)
    del config["text_config"]["moe_intermediate_size"], config["text_config"]["vocab_size"], config["vision_config"]["depth"]
    with pytest.raises(InvalidInput) as caught:
        read_architecture(config, "c")
    assert {fault.path for fault in caught.value.faults} == {"moe_intermediate_size", "vocab_size", "vision_config.depth"}


@pytest.mark.parametrize("text", ["{", "[]", ""])
def test_a_file_that_is_no_config_is_refused(tmp_path: Path, text: str) -> None:
    (tmp_path / "config.json").write_text(text, "utf-8")
    with pytest.raises(InvalidInput, match=r"config\.json"):
        read_config(tmp_path / "config.json")


def test_a_dense_decoder_has_no_experts_and_shares_its_embeddings_if_tied() -> None:
    sizes = {"hidden_size": 8, "num_hidden_layers": 2, "num_attention_heads": 2, "num_key_value_heads": 1, "intermediate_size": 16, "vocab_size": 10}
    parameters = read_architecture({**sizes, "model_type": "llama", "tie_word_embeddings": True}, "c").parameters
    attention = 8 * 8 * 2 + 8 * 4 * 2
    assert parameters.total == 80 + 2 * (attention + 3 * 8 * 16 + 2 * 8) + 8
    assert (parameters.routed_experts, parameters.router, parameters.lm_head, parameters.vision_tower) == (0, 0, 0, 0)
