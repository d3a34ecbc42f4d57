"""`generate` of transformers on a base of GLM-4.5V's true dimensions: output tokens a second for a batch of the questions that `tuneserve bench serve` asks, to hold vLLM against.

`python tests/acceptance/gpu/transformers_generate.py --batch 16` writes the base without weights (full_size_base.py), lets transformers read it over all GPUs that are here, with weights
that are made when they are read, and asks. A JSON line for each round, as soon as it is known. See README.md here for what the machine needs.
"""

import argparse
import base64
import io
import json
import os
import sys
import time
from pathlib import Path
from typing import Any

import torch
from PIL import Image

from pipeline.bench.questions import Question, questions
from tests.acceptance.gpu.full_size_base import write

WEIGHTS = Path(__file__).parent / "made_weights"
WARM_UP_TOKENS = 4


def as_transformers(question: Question) -> list[dict[str, Any]]:
    """Pictures as transformers' processors take them."""
    messages = []
    for message in question.messages:
        parts = [{"type": "text", "text": message["content"]}] if isinstance(message["content"], str) else message["content"]
        messages.append({"role": message["role"], "content": [_part(part) for part in parts]})
    return messages


def _part(part: dict[str, Any]) -> dict[str, Any]:
    if part["type"] != "image_url":
        return part
    return {"type": "image", "image": Image.open(io.BytesIO(base64.b64decode(part["image_url"]["url"].partition(",")[2]))).convert("RGB")}


def generate(model: Any, processor: Any, asked: list[Question], tokens: int) -> tuple[float, int]:
    """Seconds from the questions to the last token, pictures included, and the prompts' padded length in tokens."""
    began = time.perf_counter()
    inputs = processor.apply_chat_template(
        [as_transformers(each) for each in asked],
        add_generation_prompt=True,
        tokenize=True,
        return_dict=True,
        return_tensors="pt",
        processor_kwargs={"padding": True},
    ).to(model.device)
    with torch.inference_mode():
        answers = model.generate(**inputs, max_new_tokens=tokens, min_new_tokens=tokens, do_sample=True, temperature=1.0, top_k=0, top_p=1.0)
    answers.cpu()  # waits for the GPU
    prompt = inputs["input_ids"].shape[1]
    assert answers.shape[1] - prompt == tokens
    return time.perf_counter() - began, prompt


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--folder", type=Path, default=Path("/tmp/tuneserve-full-size"))  # noqa: S108 (a machine of one's own)
    parser.add_argument("--layers", type=int, default=46)
    parser.add_argument("--batch", type=int, nargs="+", default=[1, 16])
    parser.add_argument("--tokens", type=int, default=64)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--experts", default="grouped_mm", help="transformers' way to run the experts: grouped_mm, batched_mm or eager")
    parser.add_argument("--narrow", action="store_true", help="small dimensions on the CPU: whether the script works")
    parser.add_argument("--out", type=Path, default=Path("generate.jsonl"))
    arguments = parser.parse_args()
    if WEIGHTS not in map(Path, sys.path):  # sitecustomize.py counts when Python starts
        os.environ["PYTHONPATH"] = os.pathsep.join([str(WEIGHTS), os.environ.get("PYTHONPATH", "")])
        os.execv(sys.executable, [sys.executable, *sys.argv])  # noqa: S606 (itself, with another path)
    from transformers import AutoModelForImageTextToText, AutoProcessor

    base = arguments.folder / "models" / f"layers-{arguments.layers}"
    if not base.is_dir():
        write(base, arguments.layers, narrow=arguments.narrow)
    began = time.perf_counter()
    where = "cpu" if arguments.narrow else "auto"
    model = AutoModelForImageTextToText.from_pretrained(base, dtype=torch.bfloat16, device_map=where, experts_implementation=arguments.experts).eval()
    processor = AutoProcessor.from_pretrained(base)
    processor.tokenizer.padding_side = "left"
    about = {
        "layers": arguments.layers,
        "experts": arguments.experts,
        "gpus": torch.cuda.device_count(),
        "loading_seconds": round(time.perf_counter() - began, 1),
    }
    number = 0
    for batch in arguments.batch:
        for round_number in range(-1, arguments.rounds):
            tokens = arguments.tokens if round_number >= 0 else WARM_UP_TOKENS
            seconds, prompt = generate(model, processor, questions("image", number, batch, 7), tokens)
            number += batch
            found = about | {"batch": batch, "round": round_number, "prompt_tokens": prompt, "answer_tokens": tokens, "seconds": round(seconds, 3)}
            line = json.dumps(found | {"tokens_per_second": round(batch * tokens / seconds, 1)})
            if round_number >= 0:
                print(line, flush=True)
                with arguments.out.open("a", encoding="utf-8") as file:
                    file.write(line + "\n")


if __name__ == "__main__":
    main()
