"""Run by training.py in a process of its own, after training: `python -m pipeline.swift_parity TASK.json OUTPUT`; writes the version's parity.json to OUTPUT.

ms-swift's own template makes tokens and pixels of each prompt, as it did in training; transformers and PEFT load the base and the adapter's files as they will
be registered, and give the answer's log-probabilities. The base is loaded as it is served: a recipe with `quantization: nf4` trained on 4-bit weights, but its
adapter is served on the unquantized base, so that the reference is of that one, in the recipe's precision. One process, whatever trained: on GPUs the layers lie
on all that are visible, and in host memory where these do not hold them.
"""

import base64
import importlib.metadata
import json
import sys
import tempfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from peft import PeftModel
from swift.model import get_processor
from swift.template import get_template
from transformers import AutoModelForImageTextToText

from pipeline.reference import Expected, Logprobs, Question, Reference, digest_of
from pipeline.training import MODEL_TYPE, TEMPLATE

PACKAGES = ("ms-swift", "transformers", "peft", "torch", "torchvision", "tokenizers", "pillow")
MAX_ANSWER_TOKENS = 64
"""A longer answer is cut."""


def main() -> None:
    task = json.loads(Path(sys.argv[1]).read_text("utf-8"))
    torch.backends.cudnn.allow_tf32 = False  # else the first convolution over pixels is not what float32 says
    template = get_template(get_processor(task["base"], model_type=MODEL_TYPE, download_model=False), template_type=TEMPLATE)
    model = load(task)
    texts: dict[int, str] = {}
    with tempfile.TemporaryDirectory() as folder:
        pictures = {digest: write(Path(folder) / digest, picture) for digest, picture in task["images"].items()}
        prompts = tuple(expected(Question.model_validate(question), pictures, template, model, texts) for question in task["questions"])
    reference = Reference(
        adapter_digest=task["adapter_digest"],
        base_revision=task["base_revision"],
        template_digest=task["template_digest"],
        precision=task["precision"],
        device=torch.cuda.get_device_name() if task["device"] == "cuda" else "cpu",
        versions={package: importlib.metadata.version(package) for package in PACKAGES},
        prompts=prompts,
        images=task["images"],
        texts=texts,
    )
    Path(sys.argv[2]).write_text(reference.model_dump_json(), "utf-8")


def load(task: Mapping[str, Any]) -> Any:
    """The base with the adapter on it, neither merged."""
    options = {"device_map": "auto"} if task["device"] == "cuda" else {}
    base = AutoModelForImageTextToText.from_pretrained(task["base"], dtype=getattr(torch, task["precision"]), attn_implementation=task["attention"], **options)
    return PeftModel.from_pretrained(base, task["adapter"]).eval()


def write(path: Path, picture: str) -> str:
    path.write_bytes(base64.b64decode(picture))
    return str(path)


def expected(question: Question, pictures: Mapping[str, str], template: Any, model: Any, texts: dict[int, str]) -> Expected:
    """`texts` gains what the tokens stand for."""
    turns = [message.model_dump() for message in question.messages]
    images = [pictures[digest] for digest in question.images]
    template.set_mode("train")
    whole = template.encode({"messages": [*turns, {"role": "assistant", "content": question.answer}], "images": images})["input_ids"]
    template.set_mode("transformers")
    asked = template.encode({"messages": turns, "images": images})
    prompt, answer = list(asked["input_ids"]), list(whole[len(asked["input_ids"]) :])[:MAX_ANSWER_TOKENS]
    if list(whole[: len(prompt)]) != prompt or not answer:
        raise SystemExit(f"prompt {question.kind!r}: what ms-swift asks is not the beginning of what it trains on; report this")
    texts |= {token: template.tokenizer.decode([token]) for token in {*prompt, *answer} - texts.keys()}
    grids = asked["image_grid_thw"].tolist() if images else []
    each = torch.split(asked["pixel_values"].float(), [time * height * width for time, height, width in grids]) if images else ()
    pixels = tuple(digests(one, template.processor.image_processor) for one in each)
    inputs = model_inputs(prompt + answer, asked, model)
    with model.disable_adapter():
        base = logprobs(model, inputs, answer)
    return Expected(
        **question.model_dump(),
        prompt_tokens=tuple(prompt),
        answer_tokens=tuple(answer),
        pixels=pixels,
        grids=tuple(map(tuple, grids)),
        base=base,
        adapter=logprobs(model, inputs, answer),
    )


def digests(pixels: Any, image_processor: Any) -> dict[str, str]:
    """Of one image's pixels [patches, channels x patch] in each form that they may have on their way into a served model."""
    found = {"float32": digest_of(pixels.numpy()), "bfloat16": digest_of(pixels.bfloat16().float().numpy())}
    mean, deviation = (torch.tensor(values).repeat_interleave(pixels.shape[1] // 3) for values in (image_processor.image_mean, image_processor.image_std))
    raw = (pixels.double() * deviation + mean) * 255
    if torch.allclose(raw, raw.round(), rtol=0, atol=0.01):  # whole numbers: bytes that were rescaled and normalized, and nothing else
        found["uint8"] = digest_of(raw.round().to(torch.uint8).numpy())
    return found


def model_inputs(tokens: list[int], asked: Mapping[str, Any], model: Any) -> dict[str, Any]:
    ids = torch.tensor([tokens])
    inputs = {"input_ids": ids, "attention_mask": torch.ones_like(ids), "mm_token_type_ids": (ids == model.config.image_token_id).long()}
    inputs |= {key: asked[key] for key in ("pixel_values", "image_grid_thw") if key in asked}
    return {key: value.to(model.device) for key, value in inputs.items()}


def logprobs(model: Any, inputs: Mapping[str, Any], answer: list[int]) -> Logprobs:
    """Of each of the answer's tokens, in float32; None for what is no finite number."""
    with torch.no_grad():
        logits = model(**inputs, logits_to_keep=len(answer) + 1, use_cache=False).logits[0, :-1].float()
    found = logits.log_softmax(-1).cpu()[range(len(answer)), answer]
    return tuple(value if torch.isfinite(torch.tensor(value)) else None for value in found.tolist())


if __name__ == "__main__":
    main()
