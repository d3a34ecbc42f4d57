"""The committed JSON Schemas are what the code makes, every recipe points to its own, and they accept and refuse as the code does."""

import json
from pathlib import Path

import pytest
import yaml
from jsonschema import Draft202012Validator

from pipeline.schema import FILES, recipe_schema, schema_text
from tests.conftest import ROOT

RECIPES = sorted((ROOT / "recipes").rglob("*.yaml"))
POINTER = "# yaml-language-server: $schema="


@pytest.mark.parametrize("name", FILES)
def test_the_committed_schema_is_what_the_code_makes(name: str) -> None:
    assert (ROOT / "recipes" / name).read_text("utf-8") == schema_text(FILES[name]), "run: make schema"
    Draft202012Validator.check_schema(recipe_schema(FILES[name]))


@pytest.mark.parametrize("path", RECIPES, ids=lambda path: path.stem)
def test_every_recipe_points_to_its_schema_and_fits_it(path: Path) -> None:
    first, _, text = path.read_text("utf-8").partition("\n")
    assert first == f"{POINTER}../{path.parent.name}.schema.json"
    schema = json.loads((path.parent / first.removeprefix(POINTER)).read_text("utf-8"))
    assert [error.message for error in Draft202012Validator(schema).iter_errors(yaml.safe_load(text))] == []


def test_an_editor_sees_what_is_wrong_and_what_a_key_means() -> None:
    schema = recipe_schema(FILES["serving.schema.json"])
    wrong = {"name": "a/b", "base_model": "tiny", "follow": ["shop"], "devise": "cpu", "gpu_memory_utilization": 0.99, "lora": {"max_rank": 17}}
    found = {".".join(map(str, error.absolute_path)) for error in Draft202012Validator(schema).iter_errors(wrong)}
    assert found == {"name", "", "gpu_memory_utilization", "lora.max_rank"}
    assert "Host memory" in schema["properties"]["image_cache_gib"]["description"]
    assert schema["title"] == "Serving recipe"
