"""Our chat template against ms-swift's own `glm4_5v`: the same conversation becomes the same tokens, images included."""

import logging
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from jinja2 import TemplateError
from PIL import Image

from pipeline import tinyglm
from pipeline.basemodel import TEMPLATE_FILE

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
def swift_tokens(tmp_path_factory: pytest.TempPathFactory) -> Callable[[Turns, bool], list[int]]:
    """Token ids of a conversation as ms-swift trains on it (answer given) or asks it (no answer)."""
    folder = tmp_path_factory.mktemp("tiny")
    tiny = tinyglm.make_processor(TEMPLATE_FILE.read_text("utf-8"))
    tiny.save_pretrained(folder)
    tinyglm.make_config(tiny.tokenizer).save_pretrained(folder)
    with pytest.MonkeyPatch.context() as environment:
        environment.setenv("HF_HUB_OFFLINE", "1")
        environment.setenv("USE_HF", "1")
        from swift.model import get_processor
        from swift.template import get_template

        template = get_template(get_processor(str(folder), model_type="glm4v_moe", download_model=False), template_type="glm4_5v")
    logging.getLogger("swift").setLevel(logging.ERROR)
    template.set_mode("train")

    def tokens(turns: Turns, answered: bool) -> list[int]:
        images = sum(text.count("<image>") for _, text in turns)
        row = {"messages": [{"role": role, "content": text} for role, text in turns], "images": [_picture() for _ in range(images)]}
        encoded = template.encode(row)
        ids = list(encoded["input_ids"])
        if answered:
            end = tiny.tokenizer.convert_tokens_to_ids("<|user|>")
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
