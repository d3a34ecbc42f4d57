"""The JSON Schemas of recipes, for editors, made from the recipes' own types: `python -m pipeline.schema FOLDER` writes them (`make schema`)."""

import json
import sys
from pathlib import Path
from typing import Any

from pipeline.recipe import FinetuneRecipe, Recipe, ServingRecipe

FILES: dict[str, type[Recipe]] = {"finetune.schema.json": FinetuneRecipe, "serving.schema.json": ServingRecipe}
DIALECT = "https://json-schema.org/draft/2020-12/schema"


def recipe_schema(kind: type[Recipe]) -> dict[str, Any]:
    """The JSON Schema (2020-12) of a recipe: keys, kinds, bounds, defaults and what each key means. Relations between keys are beyond it; `tuneserve check` knows them."""
    made = kind.model_json_schema(mode="validation")
    for section in (made, *made["$defs"].values()):
        section["title"] = _words(section["title"])
        for key in section["properties"].values():
            key.pop("title", None)  # the key again
            if "description" in key:
                key["description"] = " ".join(key["description"].split())
    return {"$schema": DIALECT, **made}


def _words(name: str) -> str:
    """FinetuneRecipe -> Finetune recipe"""
    return "".join(f" {letter.lower()}" if letter.isupper() else letter for letter in name).strip().capitalize()


def schema_text(kind: type[Recipe]) -> str:
    """The schema as it stands in its file."""
    return json.dumps(recipe_schema(kind), indent=2, ensure_ascii=False) + "\n"


def main() -> None:
    folder = Path(sys.argv[1])
    for name, kind in FILES.items():
        (folder / name).write_text(schema_text(kind), "utf-8")


if __name__ == "__main__":
    main()
