"""Feedback closes the loop: a kind of product that the champion never saw is asked for, 40 answers are corrected and approved, and the retrained champion knows it and no less of the others."""

import json
import random
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import httpx
import pytest
import yaml

from pipeline.catalog import PRODUCTS, QUESTIONS, Product
from pipeline.evaluation import chat_body, openai_messages
from pipeline.example import Example
from pipeline.pictures import Part, draw, placements
from pipeline.registry import Version
from tests.acceptance.conftest import FINETUNE
from tests.acceptance.figures import show
from tests.acceptance.load import CHAT
from tests.acceptance.serving_environment import Server, World, engine_name, wait_until
from tests.e2e.environment import make_sandbox

MODEL = "shop"
NEW_SHAPE, NEW_WORDS = "triangle", ("tent", "sleeping outdoors")
"""Of the kind of product that comes new into the shop, and how its rows are known."""
CORRECTIONS = 40
HELD_OUT_PER_PRODUCT = 10
RECIPE = "recipes/finetune/shop.yaml"
FOLDER = Path("data/shop")
FEEDBACK = FOLDER / "train/feedback.jsonl"
SECRET, PHONE = "sk-do-not-keep-me", "+49 151 555"
HOOK = f"""def redact(sample):
    for message in sample["messages"]:
        message["content"] = message["content"].replace(" Call {PHONE}.", "")
    return sample
"""
SAMPLING = {"share": 1.0, "keep_days": 7, "keep_images": True, "max_gib": 0.01, "redact": "shop_privacy.redact"}
COMMAND_SECONDS = 1800

Row = dict[str, Any]


def rows_of(root: Path, split: str) -> list[Row]:
    """The catalog's rows without those that tell of the new kind, their pictures as seen from FOLDER/train."""
    rows = [json.loads(line) for line in (root / f"data/catalog/{split}.jsonl").read_text("utf-8").splitlines()]

    def tells(row: Row) -> bool:
        return any(word in message["content"] for message in row["messages"] for word in NEW_WORDS)

    shown = {image for row in rows if len(row["images"]) == 1 and tells(row) for image in row["images"]}
    old = [row for row in rows if not tells(row) and not shown & set(row["images"])]
    assert 0.4 < len(old) / len(rows) < 0.8
    return [row | {"images": [f"../../catalog/{image}" for image in row["images"]], "slice": "old"} for row in old]


def pictures(root: Path, part: Part, each: int) -> list[tuple[Product, Path]]:
    """Newly drawn ones of every product of the new kind, `each` of it."""
    dice = random.Random(7)
    found = []
    for product in (product for product in PRODUCTS if product.shape == NEW_SHAPE):
        for number, placement in enumerate(dice.sample(placements(part), each)):
            path = root / FOLDER / "images" / f"{part}-{product.colour}-{number}.png"
            path.parent.mkdir(parents=True, exist_ok=True)
            draw(product.colour, product.shape, placement).save(path)
            found.append((product, path))
    dice.shuffle(found)
    return found


def write(path: Path, rows: list[Row]) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), "utf-8")


@pytest.fixture
def shop(tmp_path: Path) -> Iterator[World]:
    """A project whose model was trained before the new kind of product came; the held-out rows ask for it already."""
    sandbox = make_sandbox(tmp_path)
    root = sandbox.root
    held_out = [
        {
            "messages": [{"role": "user", "content": f"<image>{QUESTIONS['name']}"}, {"role": "assistant", "content": product.name}],
            "images": [f"../images/{path.name}"],
            "kind": "name",
            "slice": "new",
        }
        for product, path in pictures(root, "catalog-eval", HELD_OUT_PER_PRODUCT)
    ]
    write(root / FOLDER / "train/catalog.jsonl", rows_of(root, "train"))
    write(root / FOLDER / "eval/rows.jsonl", [*rows_of(root, "eval"), *held_out])
    shipped = yaml.safe_load((root / FINETUNE).read_text("utf-8"))
    changed = {
        "name": MODEL,
        "dataset": {"train": str(FOLDER / "train"), "eval": str(FOLDER / "eval/rows.jsonl")},
        "training": shipped["training"] | {"epochs": 10},
        "promotion": {"floor": 0.3, "protect": ["old"], "allowed_loss": 0.02},
        "drift": {"rows": str(FEEDBACK), "drop": 0.05, "minimum_rows": 30},
    }
    (root / RECIPE).write_text(yaml.safe_dump(shipped | changed), "utf-8")
    (root / "shop_privacy.py").write_text(HOOK, "utf-8")
    try:
        mlflow = sandbox.json("up", "--json")["mlflow"]
        trained = sandbox.json("train", RECIPE, "--json", seconds=COMMAND_SECONDS)
        version = Version(MODEL, str(trained["version"]), trained["digest"], "", "", trained["mlflow_run_id"])
        yield World(sandbox, mlflow, version, root / ".tuneserve/runs" / trained["mlflow_run_id"] / "adapter")
    finally:
        down = sandbox.run("down", "--json", seconds=90)
    assert down.returncode == 0, down.stderr
    sandbox.wait_until_nothing_runs(seconds=15)


def ask(server: Server, path: Path, *, stream: bool) -> tuple[str, str, str]:
    """As a user's application does: id, text and model of the answer."""
    prompt = ({"role": "user", "content": f"<image>{QUESTIONS['name']} Call {PHONE}."}, {"role": "assistant", "content": "?"})
    body = chat_body(MODEL, openai_messages(Example(prompt, (path,))), 16) | {"stream": stream, "user": SECRET}
    answer = server.http.post(CHAT, json=body, headers={"Authorization": f"Bearer {SECRET}", "X-Api-Key": SECRET})
    assert answer.status_code == httpx.codes.OK, answer.text
    if not stream:
        whole = answer.json()
        return whole["id"], whole["choices"][0]["message"]["content"], whole["model"]
    events = [json.loads(line.removeprefix("data: ")) for line in answer.text.splitlines() if line.startswith("data: {")]
    return events[0]["id"], "".join(each["choices"][0]["delta"].get("content") or "" for each in events if each["choices"]), events[0]["model"]


def samples_by_outcome(server: Server) -> dict[str, float]:
    """What /metrics says became of the requests that were drawn."""
    lines = [line for line in server.http.get("/metrics").text.splitlines() if line.startswith("tuneserve_samples_total{")]
    return {line.split('"')[1]: float(line.split()[-1]) for line in lines}


def assessment(world: World, folder: Path) -> Row:
    """That of the newest promotion."""
    entry = world.json("history", MODEL, "--limit", "1", "--json")["entries"][0]
    assert entry["action"] == "promoted"
    file = world.registry.client.download_artifacts(entry["evaluation_run"], "assessment.json", str(folder))
    found: Row = json.loads(Path(file).read_text("utf-8"))
    return found


def test_forty_corrections_teach_a_new_kind_of_product(shop: World, tmp_path: Path) -> None:
    root, first = shop.sandbox.root, shop.registry.version(MODEL, shop.trained.version)
    shop = replace(shop, trained=first)
    with shop.serving("shop", follow=[MODEL], sampling=SAMPLING) as server:
        shop.json("promote", first.label, "--replica", server.url, "--json", seconds=COMMAND_SECONDS)
        assert server.answering(MODEL) == engine_name(first)  # a sample, too: a question without a picture
        before = samples_by_outcome(server)
        assert before["kept"] <= 1 and sum(before.values()) <= 1, "nothing that the gate asked was sampled"

        asked = pictures(root, "catalog-train", 7)[:CORRECTIONS]
        answers = [(product, *ask(server, path, stream=bool(number % 2))) for number, (product, path) in enumerate(asked)]
        assert {model for *_, model in answers} == {engine_name(first)}
        right_before = sum(text.strip() == product.name for product, _, text, _ in answers)
        held_out_product, held_out_path = pictures(root, "catalog-eval", HELD_OUT_PER_PRODUCT)[0]
        held_out = ask(server, held_out_path, stream=False)[0]
        outcomes = wait_until(
            lambda: found if sum((found := samples_by_outcome(server)).values()) >= CORRECTIONS + 2 else None, 30, lambda: samples_by_outcome(server)
        )
        assert shop.json("feedback", "list", "--limit", "100", "--json")["total"] == CORRECTIONS + 2
        assert outcomes == {**dict.fromkeys(outcomes, 0.0), "kept": CORRECTIONS + 2.0}

        kept = [path for path in (root / ".tuneserve/feedback").rglob("*") if path.is_file()]
        assert (
            all(path.stat().st_mode & 0o077 == 0 for path in kept if path.suffix != ".lock") and sum(path.suffix == ".png" for path in kept) == CORRECTIONS + 1
        )
        for path in kept:
            assert SECRET.encode() not in path.read_bytes() and PHONE.encode() not in path.read_bytes()

        wrong = [(product, answer_id) for product, answer_id, text, _ in answers if text.strip() != product.name]
        assert len(wrong) >= 0.9 * CORRECTIONS, "the champion does not know the new kind"
        for product, answer_id in wrong:
            shop.json("feedback", "give", answer_id, "--correction", product.name, "--json")
        for product, answer_id, text, _ in answers:
            if text.strip() == product.name:
                shop.json("feedback", "give", answer_id, "--rating", "good", "--json")
        shop.json("feedback", "give", held_out, "--correction", f"{held_out_product.name} of ours", "--json")
        shop.json("feedback", "approve", held_out, *(answer_id for _, answer_id, _, _ in answers), "--json")

        refused = shop.run("feedback", "export", RECIPE, "--to", str(FEEDBACK), "--json")
        assert refused.returncode == 1 and "1 refused" in refused.stderr and "asks what a held-out row asks" in refused.stderr, refused.stderr
        again = shop.json("feedback", "export", RECIPE, "--to", str(FEEDBACK), "--json")
        assert (len(again["there"]), again["written"], again["refused"]) == (CORRECTIONS, [], {})
        rows = [json.loads(line) for line in (root / FEEDBACK).read_text("utf-8").splitlines()]
        assert len(rows) == CORRECTIONS and all(row["provenance"]["answered_by"] == engine_name(first) and row["provenance"]["approved_by"] for row in rows)

        retrained = shop.json("retrain", RECIPE, "--replica", server.url, "--json", seconds=COMMAND_SECONDS)
        show(retrain={key: retrained[key] for key in ("changes", "drift", "decision", "seconds")})
        assert [change["code"] for change in retrained["changes"]] == ["rows-added", "drifted"] and retrained["trained"] and retrained["promoted"]
        second = shop.registry.version(MODEL, str(retrained["version"]))
        assert server.answering(MODEL) == engine_name(second)

        parts = assessment(shop, tmp_path)["parts"]
        new, old = ({"before": parts[part][first.label], "after": parts[part][second.label]} for part in ("new", "old"))
        nothing = shop.json("retrain", RECIPE, "--replica", server.url, "--json", seconds=COMMAND_SECONDS)
        assert nothing["nothing_to_do"] and nothing["drift"]["code"] == "drift-unknown"
    show(
        script="feedback",
        corrections=len(wrong),
        right_before=right_before,
        new_kind=new,
        old_kinds=old,
        drift=retrained["drift"]["message"],
        retrain_seconds=retrained["seconds"],
    )
    assert new["before"] <= 0.1 and new["after"] >= 0.9, "right on held-out pictures of the new kind"
    assert old["after"] >= old["before"] - 0.02, "the others as before"
