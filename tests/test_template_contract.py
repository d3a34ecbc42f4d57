"""Our chat template against ms-swift's own `glm4_5v`: the same conversation becomes the same tokens, images included."""

import logging
import random
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from jinja2 import TemplateError
from PIL import Image

from pipeline import tinyglm
from pipeline.basemodel import TEMPLATE_FILE
from pipeline.example import SWIFT_TAGS, read_example
from pipeline.image_file import ImageTokens
from pipeline.prompt import Task, read_counter

pytestmark = pytest.mark.contract

Turns = list[tuple[str, str]]
"""Role and text of each message; `<image>` in a text stands for the next picture."""

CONVERSATIONS: dict[str, Turns] = {
    "text": [("user", "Hello!")],
    "one image": [("user", "<image>What product is this?")],
    "image last": [("user", "What product is this?\n<image>")],
    "two images": [("user", "<image><image>Are they the same?")],
    "system": [("system", "You are a shop assistant."), ("user", "Hello!")],
    "empty system": [("system", ""), ("user", "Hello!")],
    "turns": [("user", "Hello!"), ("assistant", "Good day."), ("user", "What do you sell?")],
    "system, turns, images": [
        ("system", "Answer in JSON.\n"),
        ("user", "<image>What product is this?"),
        ("assistant", '{"product": "Rubio tote"}'),
        ("user", "And this?<image>"),
        ("assistant", " Noir watch \n"),
        ("user", "Are they the same?"),
    ],
    "thought in an earlier turn": [("user", "Hello!"), ("assistant", "<think>hm</think>\nGood day."), ("user", "Thank you.")],
    "user twice": [("user", "Hello!"), ("user", "<image>What is it?")],
    "assistant twice": [("user", "Hello!"), ("assistant", "Good day."), ("assistant", "Sir."), ("user", "Thank you.")],
    "assistant first": [("assistant", "Good day."), ("user", "Hello!")],
}


@pytest.fixture(scope="session")
def processor() -> Any:
    return tinyglm.make_processor(TEMPLATE_FILE.read_text("utf-8"))


@pytest.fixture(scope="session")
def tiny_folder(tmp_path_factory: pytest.TempPathFactory, processor: Any) -> Path:
    """The tiny model's folder without its weights."""
    folder = tmp_path_factory.mktemp("tiny")
    processor.save_pretrained(folder)
    tinyglm.make_config(processor.tokenizer).save_pretrained(folder)
    return folder


@pytest.fixture(scope="session")
def swift_template(tiny_folder: Path) -> Any:
    """ms-swift's own template in training, of the tiny model."""
    with pytest.MonkeyPatch.context() as environment:
        environment.setenv("HF_HUB_OFFLINE", "1")
        environment.setenv("USE_HF", "1")
        from swift.model import get_processor
        from swift.template import get_template

        template = get_template(get_processor(str(tiny_folder), model_type="glm4v_moe", download_model=False), template_type="glm4_5v")
    logging.getLogger("swift").setLevel(logging.ERROR)
    template.set_mode("train")
    return template


@pytest.fixture(scope="session")
def swift_tokens(swift_template: Any, processor: Any) -> Callable[[Turns, bool], list[int]]:
    """Token ids of a conversation as ms-swift trains on it (answer given) or asks it (no answer)."""

    def tokens(turns: Turns, answered: bool) -> list[int]:
        images = sum(text.count("<image>") for _, text in turns)
        row = {"messages": [{"role": role, "content": text} for role, text in turns], "images": [_picture() for _ in range(images)]}
        encoded = swift_template.encode(row)
        ids = list(encoded["input_ids"])
        if answered:
            end = processor.tokenizer.convert_tokens_to_ids("<|user|>")
            assert ids[-1] == end == encoded["labels"][-1], "training teaches the model to end with <|user|>"
            ids.pop()
        return ids

    return tokens


def _picture() -> Image.Image:
    return Image.new("RGB", (56, 56), (200, 30, 30))


def _parts(text: str) -> list[dict[str, str]]:
    pieces = text.split("<image>")
    parts = [{"type": "text", "text": pieces[0]}]
    for piece in pieces[1:]:
        parts += [{"type": "image"}, {"type": "text", "text": piece}]
    return [part for part in parts if part.get("text") != ""]


def _ours(processor: Any, turns: Turns, generate: bool) -> tuple[str, list[int]]:
    """The rendered text and the token ids with images laid out, as a server makes them."""
    messages = [{"role": role, "content": _parts(text)} for role, text in turns]
    rendered = processor.tokenizer.apply_chat_template(messages, chat_template=processor.chat_template, tokenize=False, add_generation_prompt=generate)
    images = sum(text.count("<image>") for _, text in turns)
    encoded = processor(text=[rendered], images=[_picture() for _ in range(images)] or None)
    return rendered, list(encoded["input_ids"][0])


@pytest.mark.parametrize("turns", CONVERSATIONS.values(), ids=CONVERSATIONS)
@pytest.mark.parametrize("answer", ["Rubio tote", '{"product": "Rubio tote"}', "1 tote\n"])
def test_tokens_equal_swifts_in_training(processor: Any, swift_tokens: Callable[[Turns, bool], list[int]], turns: Turns, answer: str) -> None:
    trained = swift_tokens([*turns, ("assistant", answer)], True)
    assert _ours(processor, [*turns, ("assistant", answer)], False)[1] == trained
    prompt = _ours(processor, turns, True)[1]
    assert prompt == trained[: len(prompt)], "what is asked must be what was trained, up to the answer"
    assert processor.tokenizer.decode(trained[len(prompt) :]) == answer


SIZES = [(56, 56), (8, 8), (1, 40), (57, 41), (300, 20), (224, 224), (1000, 500), (640, 480), (2000, 31), (33, 4100)]
"""Width and height: smaller than a token, larger than the model looks at, long and thin."""


@pytest.mark.parametrize("turns", CONVERSATIONS.values(), ids=CONVERSATIONS)
@pytest.mark.parametrize("answer", ["Rubio tote", "1 tote\n", "\n\n 12345 \u732b\U0001f600 caf\u00e9\t", "<think>so\nit is</think>\nNoir"])
def test_the_counted_length_is_swifts(tiny_folder: Path, swift_template: Any, turns: Turns, answer: str) -> None:
    counter = read_counter(tiny_folder)
    messages = [{"role": role, "content": text} for role, text in [*turns, ("assistant", answer)]]
    images = sum(text.count("<image>") for _, text in turns)
    for first in range(0, len(SIZES) if images else 1, max(1, images)):
        sizes = tuple((SIZES * 2)[first : first + images])
        row = {"messages": [dict(message) for message in messages], "images": [Image.new("RGB", size) for size in sizes]}
        counted = counter.count(Task(tuple(messages), sizes, ""))
        assert not isinstance(counted, str)
        assert counted.row == len(swift_template.encode(row)["input_ids"]), sizes
        assert counted.images == sum(counter.images.count(*size) for size in sizes)


def test_the_longer_of_answer_and_rejected_answer_counts(tiny_folder: Path) -> None:
    counter = read_counter(tiny_folder)
    question, short, long = {"role": "user", "content": "Hi"}, "no", "no, not at all, never"
    plain = counter.count(Task((question, {"role": "assistant", "content": long}), (), ""))
    preferred = counter.count(Task((question, {"role": "assistant", "content": short}), (), long))
    assert plain[0] == preferred[0] and plain[2] > preferred[2]


def test_image_tokens_are_those_of_transformers() -> None:
    """The full model's limits, with sizes drawn at random."""
    from transformers.models.glm4v.image_processing_glm4v import smart_resize

    dice = random.Random(4)
    counted = ImageTokens(14, 2, 2, 112 * 112, 28 * 28 * 15000)
    for _ in range(3000):
        width, height = (int(10 ** dice.uniform(0, 4)) for _ in range(2))
        if max(width, height) < 150 * min(width, height):
            rows, columns = smart_resize(2, height, width, 2, 28, 112 * 112, 28 * 28 * 15000)
            assert counted.count(width, height) == rows * columns // 28**2, (width, height)


@pytest.mark.parametrize("tag", SWIFT_TAGS)
def test_what_swift_may_replace_is_refused_in_rows(swift_template: Any, tag: str) -> None:
    """And it does replace the rounds, whatever the text meant by them."""
    from swift.template.base import Template

    row = {"messages": [{"role": "user", "content": f"a {tag} b"}, {"role": "assistant", "content": "c"}]}
    assert read_example(row, Path(), 1)[0] is None
    trained = swift_template.tokenizer.decode(swift_template.encode({**row, "images": []})["input_ids"])
    assert (tag in trained) == (not tag.startswith("{{"))
    assert set(Template.special_tokens) - {"<image>"} <= set(SWIFT_TAGS), "a new tag of ms-swift's"


def test_prompt_is_what_field_notes_say(processor: Any) -> None:
    rendered, _ = _ours(processor, [("system", "Be brief."), ("user", "<image>What is it?")], True)
    image = "<|begin_of_image|><|image|><|end_of_image|>"
    assert rendered == f"[gMASK]<sop><|system|>\nBe brief.<|user|>\n{image}What is it?<|assistant|>\n<think></think>\n"


def _render(processor: Any, messages: list[dict[str, Any]], **options: Any) -> str:
    text = processor.tokenizer.apply_chat_template(messages, chat_template=processor.chat_template, tokenize=False, **options)
    assert isinstance(text, str)
    return text


@pytest.mark.parametrize("role", ["system", "user", "assistant"])
def test_a_string_and_a_list_mean_the_same_for_every_role(processor: Any, role: str) -> None:
    first = [] if role == "system" else [{"role": "user", "content": "Hi"}]
    string = _render(processor, [*first, {"role": role, "content": " one two\n"}])
    assert string == _render(processor, [*first, {"role": role, "content": [{"type": "text", "text": " one"}, {"type": "text", "text": " two\n"}]}])
    assert string == _render(processor, [*first, {"role": role, "content": [" one", " two\n"]}])
    assert "[" not in string.removeprefix("[gMASK]"), "a list printed as Python shows it"


@pytest.mark.parametrize("part", [{"type": "image"}, {"type": "image_url", "image_url": {"url": "data:,"}}, {"type": "image", "image": "x"}])
def test_every_form_of_an_image_is_an_image(processor: Any, part: dict[str, Any]) -> None:
    assert "\n<|begin_of_image|><|image|><|end_of_image|>What" in _render(processor, [{"role": "user", "content": [part, {"type": "text", "text": "What"}]}])


def test_parts_of_unknown_type_and_no_content_do_not_crash(processor: Any) -> None:
    parts = [{"type": "input_text", "text": "a"}, {"type": "sound", "sound": {}}, {}, {"type": "text", "text": "b"}]
    assert _render(processor, [{"role": "user", "content": parts}]) == "[gMASK]<sop><|user|>\nab"
    assert _render(processor, [{"role": "user", "content": None}]) == "[gMASK]<sop><|user|>\n"


@pytest.mark.parametrize("thinking", [True, False])
def test_thinking_stays_off(processor: Any, thinking: bool) -> None:
    message = [{"role": "user", "content": "Hi"}]
    plain = _render(processor, message, add_generation_prompt=True)
    assert _render(processor, message, add_generation_prompt=True, enable_thinking=thinking) == plain
    assert plain.endswith("<|assistant|>\n<think></think>\n") and "/nothink" not in plain


@pytest.mark.parametrize(
    ("messages", "options", "fault"),
    [
        ([{"role": "tool", "content": "x"}], {}, "role 'tool' is not supported"),
        ([{"role": "developer", "content": "x"}], {}, "role 'developer' is not supported"),
        ([{"role": "user", "content": "x"}, {"role": "system", "content": "y"}], {}, "system message must be the first"),
        ([{"role": "assistant", "content": None, "tool_calls": [{"id": "1"}]}], {}, "tool calls are not supported"),
        ([{"role": "user", "content": "x"}], {"tools": [{"type": "function", "function": {"name": "f"}}]}, "tools are not supported"),
    ],
)
def test_what_was_never_trained_is_refused(processor: Any, messages: list[dict[str, Any]], options: dict[str, Any], fault: str) -> None:
    with pytest.raises(TemplateError, match=fault):
        _render(processor, messages, **options)


def test_the_template_lies_beside_the_module() -> None:
    assert TEMPLATE_FILE.name == "glm4_5v.jinja" and TEMPLATE_FILE.parent == Path(tinyglm.__file__).parent
