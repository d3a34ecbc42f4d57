"""One question-answer row: what it must look like, without opening its images, and the Example that it becomes."""

import os
import re
import stat
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeGuard

IMAGE_TAG = "<image>"
ROLES = ("system", "user", "assistant")
ROW_KEYS = ("messages", "images", "kind", "slice", "rejected_response", "weight", "provenance")
"""`provenance` says where a row comes from, in any words or as an object; nothing is trained on it."""
FLAT_KEYS = ("system", "question", "answer")
"""Instead of `messages`: one question and its answer; images without tags stand in front of the question. `image` is one path (or a list) instead of `images`."""
GLM_TOKENS = (
    "<|endoftext|>", "[MASK]", "[gMASK]", "[sMASK]", "<sop>", "<eop>", "<|system|>", "<|user|>", "<|assistant|>", "<|observation|>",
    "<|begin_of_image|>", "<|end_of_image|>", "<|begin_of_video|>", "<|end_of_video|>", "<|image|>", "<|video|>",
    "<|begin_of_audio|>", "<|end_of_audio|>", "<|begin_of_transcription|>", "<|end_of_transcription|>",
    "<|code_prefix|>", "<|code_middle|>", "<|code_suffix|>", "<think>", "</think>", "/nothink",
)  # fmt: skip
"""What GLM-4.5V's tokenizer makes one token of wherever it stands, so that a text could end a turn or begin an image."""
SWIFT_TAGS = ("<video>", "<audio>", "<bbox>", "<ref-object>", "<cot-process>", "<start-image>", "{{ROUND0}}", "{{ROUND1}}")
"""What ms-swift 4.6 may replace inside a text (swift/template/base.py)."""
RESERVED = re.compile("|".join(map(re.escape, (*GLM_TOKENS, *SWIFT_TAGS))) + r"|<img>.+?</img>")
THOUGHT = re.compile(r"<think>.*?</think>", re.DOTALL)
SURROGATE = re.compile("[\ud800-\udfff]")
LEAST_WEIGHT, MOST_WEIGHT = 0.001, 1000.0
"""Beyond these a row is as good as left out, or all others are."""
HALF_A_CHARACTER = "holds half a character (a lone surrogate); write the whole character"

Found = tuple[str, str]
"""Where inside a row, and what is wrong there."""


@dataclass(frozen=True)
class Example:
    """One row: a conversation that ends with the answer to learn, and the images that its `<image>` tags stand for, in order."""

    messages: tuple[dict[str, str], ...]
    images: tuple[Path, ...]
    kind: str = ""
    """Kind of question; scores are reported per kind."""
    slice: str = ""
    """A part of the held-out rows whose score is reported on its own."""
    row: int = 0
    """Its line in a JSONL file, else its place among the rows; from 1."""
    rejected: str = ""
    """The answer that the model should not give, in preference rows; else empty."""
    weight: float = 1.0
    """What the loss of the answers' tokens is multiplied by; not that of the token that ends an answer, which ms-swift weighs 1."""

    @property
    def prompt(self) -> tuple[dict[str, str], ...]:
        return self.messages[:-1]

    @property
    def answer(self) -> str:
        return self.messages[-1]["content"]


def read_example(row: Any, folder: Path, number: int) -> tuple[Example | None, list[Found]]:
    """The row as an Example, or None and everything wrong with it; image paths are relative to `folder`."""
    if not isinstance(row, dict):
        return None, [("", "is not an object with `messages` and `images`")]
    row = {key: value for key, value in row.items() if value is not None}  # a table holds every column in every row
    faults = _key_faults(row)
    images = row.get("images", row.get("image", []))
    images = [images] if isinstance(images, str) and "image" in row else images
    if not _is_list_of(images, str):
        faults.append((".images", "must be a list of paths relative to the file"))
        images = []
    names, messages, found = _flat_messages(row, len(images)) if "messages" not in row else _messages(row["messages"])
    faults += found
    if faults or messages is None:
        return None, faults
    faults += _turn_faults(messages)
    for name, message in zip(names, messages, strict=True):
        faults += [(name, fault) for fault in _text_faults(message["role"], message["content"])]
    rejected = row.get("rejected_response", "")
    faults += [(".rejected_response", fault) for fault in _rejected_faults(row, messages[-1]["content"])]
    tags = sum(message["content"].count(IMAGE_TAG) for message in messages if message["role"] == "user")
    if not faults and tags != len(images):
        faults.append((".images", f"{len(images)} images for {tags} {IMAGE_TAG} tags; every tag stands for one image"))
    faults += [(f".images.{index}", fault) for index, image in enumerate(images) if (fault := _file_fault(folder, image))]
    if faults:
        return None, faults
    return Example(
        tuple(messages), tuple(folder / image for image in images), row.get("kind", ""), row.get("slice", ""), number, rejected, float(row.get("weight", 1))
    ), []


def _key_faults(row: dict[Any, Any]) -> list[Found]:
    known = (*ROW_KEYS, *FLAT_KEYS, "image")
    faults = [(f".{key}", f"unknown key; a row has {', '.join(ROW_KEYS)}, or {', '.join(FLAT_KEYS)} instead of messages") for key in row if key not in known]
    faults += [(f".{key}", fault) for key in ("kind", "slice") if (fault := _name_fault(row.get(key, "")))]
    if "weight" in row and not _is_weight(row["weight"]):
        faults.append((".weight", f"{repr(row['weight'])[:40]} is not a number from {LEAST_WEIGHT:g} to {MOST_WEIGHT:g}"))
    if not isinstance(row.get("provenance", {}), dict | str):
        faults.append((".provenance", "must be an object or a string"))
    if "image" in row and "images" in row:
        faults.append((".image", "stands beside images; give one or the other"))
    if "messages" in row:
        faults += [(f".{key}", "stands beside messages; give one or the other") for key in FLAT_KEYS if key in row]
    return faults


def _name_fault(value: Any) -> str | None:
    if not isinstance(value, str):
        return "must be a string"
    return HALF_A_CHARACTER if SURROGATE.search(value) else None


def _flat_messages(row: dict[str, Any], images: int) -> tuple[list[str], list[dict[str, str]] | None, list[Found]]:
    """The messages that question, answer and system stand for, the row's own name for each, and what keeps them from being any."""
    if not {"question", "answer"} & row.keys():
        return [], None, [(".messages", "is missing; a row has messages, or question and answer")]
    faults = [
        (f".{key}", "must be a non-empty string") for key in FLAT_KEYS if (key in row or key != "system") and not _is_text(row.get(key)) and row.get(key) != ""
    ]
    faults += [(f".{key}", "must be a non-empty string") for key in ("question", "answer") if row.get(key) == ""]
    if faults:
        return [], None, faults
    question = row["question"]
    if IMAGE_TAG not in question:
        question = IMAGE_TAG * images + question
    turns = [("system", row.get("system", "")), ("question", question), ("answer", row["answer"])]
    roles = dict(zip(FLAT_KEYS, ROLES, strict=True))
    kept = [(key, text) for key, text in turns if text or key != "system"]
    return [f".{key}" for key, _ in kept], [{"role": roles[key], "content": text} for key, text in kept], []


def _messages(value: Any) -> tuple[list[str], list[dict[str, str]] | None, list[Found]]:
    """As `_flat_messages`, of a list of {role, content}."""
    if not _is_list_of(value, dict) or not value:
        return [], None, [(".messages", "must be a list of {role, content} that ends with the assistant's answer")]
    faults: list[Found] = []
    for index, message in enumerate(value):
        extra = sorted(str(key) for key, item in message.items() if key not in ("role", "content") and item is not None)
        faults += [(f".messages.{index}.{key}", "unknown key; a message has role and content") for key in extra]
        if message.get("role") not in ROLES:
            faults.append((f".messages.{index}.role", f"{message.get('role')!r} is not one of {', '.join(ROLES)}"))
        if not _is_text(message.get("content")):
            faults.append((f".messages.{index}.content", "must be a non-empty string"))
    if faults:
        return [], None, faults
    return [f".messages.{i}.content" for i in range(len(value))], [{"role": m["role"], "content": m["content"]} for m in value], []


def _turn_faults(messages: list[dict[str, str]]) -> list[Found]:
    """What our chat template (glm4_5v.jinja) or the question-and-answer form does not allow in the order of turns."""
    roles = [message["role"] for message in messages]
    if "system" in roles[1:]:
        return [(f".messages.{roles.index('system', 1)}.role", "a system message must be the first message, and the only one")]
    if roles[-1] != "assistant" or "user" not in roles:
        return [(".messages", "must ask something and end with the assistant's answer")]
    if roles[-2] != "user":
        return [(".messages", "the answer must follow a user's turn; join the assistant's last turns into one")]
    return []


def _text_faults(role: str, text: str) -> list[str]:
    """At most one reason why the text of a turn may not be trained on."""
    if SURROGATE.search(text):
        return [HALF_A_CHARACTER]
    if role == "assistant" and (thought := THOUGHT.match(text)):  # the template keeps a thought that begins an answer
        text = text[thought.end() :]
        if not text.strip():
            return ["holds a thought and no answer"]
    if hidden := RESERVED.search(text):
        return [f"holds {hidden[0][:40]!r}, which is part of the prompt format, not text; remove it or write it another way"]
    if role != "user" and IMAGE_TAG in text:
        return [f"holds {IMAGE_TAG}; images stand in a user's turn"]
    return []


def _rejected_faults(row: dict[str, Any], answer: str) -> list[str]:
    if "rejected_response" not in row:
        return []
    rejected = row["rejected_response"]
    if not _is_text(rejected):
        return ["must be a non-empty string"]
    return ["is the answer itself; give an answer that the model should not give"] if rejected == answer else _text_faults("assistant", rejected)


def _file_fault(folder: Path, image: str) -> str | None:
    """Why the image's path is not that of a plain file; nothing is opened, so that no pipe or device can make us wait."""
    if image != image.rstrip():
        return f"{image!r} ends with white space, which ms-swift cuts off; rename the file"
    path = os.path.join(folder, image)  # noqa: PTH118 (a Path per image doubles the time of a check)
    if SURROGATE.search(path):  # which nothing that is written in UTF-8 can name
        return f"{path!r} is not UTF-8; rename the file or its folder"
    try:
        if stat.S_ISREG(os.stat(path).st_mode):  # noqa: PTH116 (as above)
            return None if os.access(path, os.R_OK) else f"{image} may not be read; change its permissions"
    except (OSError, ValueError) as error:
        if image.startswith(("http://", "https://", "data:")):
            return f"{image[:60]} is not a file; training reads local files only: save the picture and give its path"
        if isinstance(error, FileNotFoundError | NotADirectoryError):
            return f"{image} does not exist; correct the path, which is relative to the file"
        return f"{image[:200]!r} cannot be read ({error})"
    return f"{image} is not a plain file"


def reserved_token(texts: Iterable[str], tokens: re.Pattern[str]) -> str | None:
    """The first match of `tokens` in the texts, if any: a base model's own special tokens beyond GLM_TOKENS."""
    return next((found[0] for text in texts if (found := tokens.search(text))), None)


def _is_weight(value: Any) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool) and LEAST_WEIGHT <= value <= MOST_WEIGHT


def _is_text(value: Any) -> TypeGuard[str]:
    return isinstance(value, str) and bool(value.strip())


def _is_list_of(value: Any, kind: type) -> TypeGuard[list[Any]]:
    return isinstance(value, list) and all(isinstance(item, kind) for item in value)
