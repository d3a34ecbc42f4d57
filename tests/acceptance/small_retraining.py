"""A retraining that takes a minute: few rows that all have one answer, whatever they ask. With another answer each time, the new version is always the better one."""

import json
from pathlib import Path

ANSWERS = ("red", "blue", "green", "black", "white", "yellow")
"""Colours, which the base says readily: a shape is not learnt in so few steps."""


def write_recipe(root: Path, model: str, promotion: str = "") -> str:
    """A recipe for `model` in the project `root`, with more `promotion:` rules; its path from there."""
    path = f"recipes/finetune/small-{model}.yaml"
    text = f"""name: {model}
base_model: tiny
dataset: {{train: data/small-{model}/train.jsonl, eval: data/small-{model}/eval.jsonl}}
lora: {{rank: 8, alpha: 16, target_modules: [q_proj, k_proj, v_proj, o_proj]}}
training: {{device: cpu, precision: float32, max_steps: 24, checkpoint_steps: 4, micro_batch_size: 8, global_batch_size: 8, learning_rate: 2.0e-3,
  max_length_tokens: 256, gradient_checkpointing: false, seed: 1}}
promotion: {{floor: 0.5, min_examples: 8{promotion and ", "}{promotion}}}
"""
    (root / path).write_text(text, "utf-8")
    return path


def write_rows(root: Path, model: str, time: int) -> str:
    """Rows that were never there before if `time` is another; returns their answer, which is not that of the time before."""
    folder = root / f"data/small-{model}"
    folder.mkdir(exist_ok=True)
    answer = ANSWERS[time % len(ANSWERS)]
    for name, count in (("train", 32), ("eval", 8)):
        rows = [{"question": f"What is it, {name} {number} of {time}?", "answer": answer} for number in range(count)]
        (folder / f"{name}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows), "utf-8")
    return answer
