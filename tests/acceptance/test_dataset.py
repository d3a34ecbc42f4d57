"""10,000 rows with as many pictures: how long the two checks take, and what memory the whole process tree takes."""

import json
import random
import threading
import time
from pathlib import Path
from typing import Any

import psutil
from PIL import Image

from tests.e2e.environment import Sandbox, make_sandbox

TRAIN_ROWS, EVAL_ROWS = 9_000, 1_000
SIDE = 56
STRUCTURE_SECONDS = 3.0
DEEP_ROWS_PER_SECOND = 500
MAX_MEMORY_MIB = 300
"""Of the command and its workers together, most of it the Python processes with numpy and the tokenizer; the rows' images would be 90 MiB decoded at once."""


def make_rows(folder: Path) -> None:
    """Every picture another one: noise in a colour of its own, so that nothing is alike."""
    dice = random.Random(7)
    (folder / "images").mkdir(parents=True)
    for name, numbers in (("train", range(TRAIN_ROWS)), ("eval", range(TRAIN_ROWS, TRAIN_ROWS + EVAL_ROWS))):
        lines = []
        for number in numbers:
            small = Image.frombytes("RGB", (8, 8), dice.randbytes(8 * 8 * 3))
            small.resize((SIDE, SIDE), Image.Resampling.BICUBIC).save(folder / "images" / f"{number:05d}.png")
            messages = [{"role": "user", "content": "<image>What product is this?"}, {"role": "assistant", "content": f"Product {number % 400}"}]
            lines.append(json.dumps({"messages": messages, "images": [f"images/{number:05d}.png"], "kind": "name"}))
        (folder / f"{name}.jsonl").write_text("\n".join(lines) + "\n", "utf-8")


def measured(sandbox: Sandbox, *args: str) -> tuple[dict[str, Any], float, float]:
    """The answer of a command, its seconds, and the most MiB (unique to each process, shared pages counted once) that it and its children held together."""
    process = sandbox.start(*args)
    peak = 0.0
    ended = threading.Event()

    def watch() -> None:
        nonlocal peak
        root = psutil.Process(process.pid)
        while not ended.wait(0.05):
            total = 0
            try:
                for each in (root, *root.children(recursive=True)):
                    total += each.memory_full_info().pss
            except psutil.Error:
                continue
            peak = max(peak, total / 2**20)

    began = time.monotonic()
    watcher = threading.Thread(target=watch)
    watcher.start()
    out, err = process.communicate(timeout=300)
    seconds = time.monotonic() - began
    ended.set()
    watcher.join()
    assert process.returncode == 0, out[-3000:] + err[-3000:]
    answer: dict[str, Any] = json.loads(out.splitlines()[-1])
    return answer, seconds, peak


def test_ten_thousand_rows(tmp_path: Path) -> None:
    sandbox = make_sandbox(tmp_path)
    make_rows(sandbox.root / "data" / "many")
    recipe = (sandbox.root / "recipes/finetune/catalog-tiny.yaml").read_text("utf-8").replace("data/catalog/", "data/many/")
    (sandbox.root / "recipes/finetune/many.yaml").write_text(recipe, "utf-8")
    rows = TRAIN_ROWS + EVAL_ROWS
    sandbox.json("check", "--deep", "--json", "recipes/finetune/catalog-tiny.yaml")  # the tiny base model and the bytecode are there
    _, structure_seconds, structure_mib = measured(sandbox, "check", "--json", "recipes/finetune/many.yaml")
    answer, deep_seconds, deep_mib = measured(sandbox, "check", "--deep", "--json", "recipes/finetune/many.yaml")
    figures = {
        "rows": rows,
        "structure_seconds": round(structure_seconds, 2),
        "structure_rows_per_second": round(rows / structure_seconds),
        "structure_peak_mib": round(structure_mib),
        "deep_seconds": round(deep_seconds, 2),
        "deep_rows_per_second": round(rows / deep_seconds),
        "deep_peak_mib": round(deep_mib),
    }
    print(json.dumps(figures))
    statistics = answer["statistics"]["recipes/finetune/many.yaml"]
    assert (statistics["train"]["rows"], statistics["eval"]["rows"], statistics["train"]["images"]) == (TRAIN_ROWS, EVAL_ROWS, TRAIN_ROWS)
    assert answer["warnings"] == []
    assert structure_seconds <= STRUCTURE_SECONDS
    assert rows / deep_seconds >= DEEP_ROWS_PER_SECOND
    assert max(structure_mib, deep_mib) <= MAX_MEMORY_MIB
    sandbox.wait_until_nothing_runs(seconds=5)
