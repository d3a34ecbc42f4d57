"""The two sides of parity without a server: ms-swift's prompt as the reference holds it, and vLLM's renderer, from an untrained tiny model's folder."""

import asyncio
import base64
import dataclasses
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

pytestmark = pytest.mark.contract

pytest.importorskip("vllm")

from fastapi import HTTPException  # noqa: E402
from vllm.engine.arg_utils import EngineArgs  # noqa: E402
from vllm.renderers.online_renderer import OnlineRenderer  # noqa: E402
from vllm.renderers.registry import renderer_from_config  # noqa: E402

from pipeline import tinyglm  # noqa: E402
from pipeline.basemodel import TEMPLATE_FILE  # noqa: E402
from pipeline.dataset import read_examples  # noqa: E402
from pipeline.parity_prompts import Questions, questions_of  # noqa: E402
from pipeline.project import Project  # noqa: E402
from pipeline.reference import Replayed  # noqa: E402
from pipeline.serving.engine import ServedAdapter  # noqa: E402
from pipeline.serving.parity_route import MAX_BODY_BYTES, Asked, Replayer, read_asked  # noqa: E402
from pipeline.serving.traffic import Traffic  # noqa: E402
from tests.conftest import ROOT  # noqa: E402

ADAPTER = ServedAdapter("catalog", "1", "a" * 64, Path("/nowhere"))
MAX_LENGTH = 256


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    found = tmp_path_factory.mktemp("base")
    processor = tinyglm.make_processor(TEMPLATE_FILE.read_text("utf-8"))
    tinyglm.save(tinyglm.make_model(tinyglm.make_config(processor.tokenizer)), processor, found)
    return found


@pytest.fixture(scope="module")
def questions() -> Questions:
    return questions_of(read_examples(ROOT / "data/catalog/eval.jsonl", Project(ROOT)))


@pytest.fixture(scope="module", params=["float32", "bfloat16"])
def renderer(request: pytest.FixtureRequest, folder: Path) -> Iterator[OnlineRenderer]:
    """As a server of that precision builds it (vLLM's app_state.py), with the arguments that we serve with."""
    with pytest.MonkeyPatch.context() as environment:
        environment.setenv("HF_HUB_OFFLINE", "1")
        limits = {"image": 2, "video": 0}
        arguments = EngineArgs(model=str(folder), dtype=request.param, max_model_len=MAX_LENGTH, limit_mm_per_prompt=limits, enforce_eager=True)
        config = arguments.create_engine_config()
    inner = renderer_from_config(config)
    template = TEMPLATE_FILE.read_text("utf-8")
    yield OnlineRenderer(config.model_config, inner, request_logger=None, chat_template=template, chat_template_content_format="openai")
    inner.shutdown()


class Engine:
    """Remembers what it is asked to score."""

    def __init__(self, fault: Exception | None = None) -> None:
        self.asked: list[tuple[ServedAdapter | None, Any, list[int]]] = []
        self.fault = fault

    async def score(self, adapter: ServedAdapter | None, prompt: Any, answer: list[int]) -> list[float]:
        if self.fault:
            raise self.fault
        self.asked.append((adapter, prompt, answer))
        return [float("nan") if adapter else -1.0 for _ in answer]


def ask(renderer: OnlineRenderer, messages: list[dict[str, Any]], engine: Engine, adapter: ServedAdapter | None = ADAPTER) -> Replayed:
    asked = Asked.model_validate({"model": "catalog", "messages": messages, "answer_tokens": [5, 6]})
    return asyncio.run(Replayer(renderer, engine.score, Traffic(2)).answer(asked, adapter))


def test_the_server_sees_what_ms_swift_trained_on(renderer: OnlineRenderer, folder: Path, questions: Questions, tmp_path: Path) -> None:
    """Tokens and grids are equal; so are the pixels, which vLLM hands to its model as bytes."""
    from swift.model import get_processor
    from swift.template import get_template

    from pipeline.swift_parity import expected, write

    class Model:
        """Gives no logits: what is looked at is what goes in."""

        config = SimpleNamespace(image_token_id=14)
        device = "cpu"

        def disable_adapter(self) -> Any:
            import contextlib

            return contextlib.nullcontext()

        def __call__(self, logits_to_keep: int, **inputs: Any) -> Any:
            import torch

            return SimpleNamespace(logits=torch.zeros(1, logits_to_keep, 2000))

    template = get_template(get_processor(str(folder), model_type="glm4v_moe", download_model=False), template_type="glm4_5v")
    paths = {digest: write(tmp_path / digest, picture) for digest, picture in questions.images.items()}
    for question in questions.questions:
        texts: dict[int, str] = {}
        wanted = expected(question, paths, template, Model(), texts)
        found = ask(renderer, question.openai_messages(questions.images), Engine())
        assert found.refused is None
        assert (found.prompt_tokens, found.grids) == (wanted.prompt_tokens, wanted.grids), question.kind
        assert found.pixels == tuple(each["uint8"] for each in wanted.pixels), question.kind
        assert found.pixels_in == ("uint8" if question.images else "")
        assert {token: texts[token] for token in wanted.prompt_tokens} == {token: found.texts[token] for token in wanted.prompt_tokens}
        assert "".join(texts[token] for token in wanted.answer_tokens) == question.answer + "<|user|>"


def test_every_rendering_processes_its_images_anew(renderer: OnlineRenderer, questions: Questions) -> None:
    """Else vLLM's cache keeps the pixels back from us, and would keep the second generation from being one."""
    engine = Engine()
    one = questions.questions[0]
    for _ in range(2):
        found = ask(renderer, one.openai_messages(questions.images), engine)
    assert [adapter for adapter, _, _ in engine.asked] == [None, ADAPTER] * 2
    prompts = [prompt for _, prompt, _ in engine.asked]
    assert len({hashed for prompt in prompts for hashed in prompt["mm_hashes"]["image"]}) == 4
    assert all(prompt["mm_kwargs"]["image"][0]["pixel_values"].data is not None for prompt in prompts)
    assert found.base == (-1.0, -1.0) and found.adapter == (None, None), "what is not a number is told as such"
    assert found.digest == ADAPTER.digest and ask(renderer, one.openai_messages(questions.images), engine, None).digest is None


def test_a_prompt_that_the_server_does_not_take_is_refused_with_its_reason(renderer: OnlineRenderer, questions: Questions) -> None:
    part = questions.questions[0].openai_messages(questions.images)[0]["content"][0]
    three = ask(renderer, [{"role": "user", "content": [part] * 3}], Engine())
    assert three.refused and "image" in three.refused and not three.prompt_tokens
    system_last = [{"role": role, "content": [{"type": "text", "text": "x"}]} for role in ("user", "system")]
    assert "system message must be the first" in str(ask(renderer, system_last, Engine()).refused)
    broken = {"type": "image_url", "image_url": {"url": "data:image/png;base64," + base64.b64encode(b"no picture").decode()}}
    assert ask(renderer, [{"role": "user", "content": [broken]}], Engine()).refused
    too_long = ask(renderer, [{"role": "user", "content": [{"type": "text", "text": "word " * MAX_LENGTH}]}], Engine())
    assert too_long.refused and str(MAX_LENGTH) in too_long.refused


def test_a_fault_of_the_engine_is_no_refusal(renderer: OnlineRenderer, questions: Questions) -> None:
    with pytest.raises(RuntimeError, match="dead"):
        ask(renderer, questions.questions[2].openai_messages(questions.images), Engine(RuntimeError("dead")))


@dataclasses.dataclass
class Body:
    content: bytes

    async def stream(self) -> Any:
        for start in range(0, len(self.content), 2**20):
            yield self.content[start : start + 2**20]


@pytest.mark.parametrize(
    ("message", "status"),
    [
        ('{"type": "text", "text": "hello"}', 200),
        ('{"type": "image_url", "image_url": {"url": "data:image/png;base64,AAAA"}}', 200),
        ('{"type": "image_url", "image_url": {"url": "http://127.0.0.1/x.png"}}', 422),
        ('{"type": "image_url", "image_url": {"url": "file:///etc/passwd"}}', 422),
        ('{"type": "image_url", "image_url": {"url": "data:image/png;base64,AAAA\\nhttp://a"}}', 422),
        ('{"type": "image_url", "image_url": {"url": "data:image/png;base64,AAAA"}, "uuid": "another\'s"}', 422),
        ('{"type": "image_embeds", "image_embeds": "AAAA"}', 422),
        ('"hello"', 422),
        (f'{{"type": "text", "text": "{"x" * MAX_BODY_BYTES}"}}', 413),
    ],
)
def test_a_client_can_send_text_and_bytes_only_and_not_too_many(message: str, status: int) -> None:
    body = Body(f'{{"model": "m", "messages": [{{"role": "user", "content": [{message}]}}], "answer_tokens": [1]}}'.encode())
    try:
        assert asyncio.run(read_asked(body)).model == "m"
        found = 200
    except HTTPException as error:
        found = error.status_code
    assert found == status


@pytest.mark.parametrize("answer", ["[]", "[-1]", '["a"]', str([1] * 257), "null"])
def test_an_answer_is_a_few_tokens(answer: str) -> None:
    body = Body(f'{{"model": "m", "messages": [{{"role": "user", "content": []}}], "answer_tokens": {answer}}}'.encode())
    with pytest.raises(HTTPException, match="422: answer_tokens"):
        asyncio.run(read_asked(body))
