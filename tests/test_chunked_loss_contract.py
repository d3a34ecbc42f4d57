"""The chunked loss against transformers' own on the same model: value, gradients, and what it does not make."""

from typing import Any

import pytest
import torch

from pipeline import swift_chunked_loss, tinyglm
from pipeline.basemodel import TEMPLATE_FILE
from pipeline.swift_chunked_loss import IGNORED, plain_forward

pytestmark = pytest.mark.contract
CHUNK = 7


@pytest.fixture(scope="module")
def model() -> Any:
    torch.manual_seed(1)
    return tinyglm.make_model(tinyglm.make_config(tinyglm.make_processor(TEMPLATE_FILE.read_text("utf-8")).tokenizer))


@pytest.fixture(autouse=True)
def small_chunks(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(swift_chunked_loss, "CHUNK_TOKENS", CHUNK)


def rows(number: int, tokens: int = 40) -> dict[str, torch.Tensor]:
    """Questions of 12 tokens with answers, and one token inside that is not learnt."""
    torch.manual_seed(2)
    ids = torch.randint(20, 400, (number, tokens))
    labels = ids.clone()
    labels[:, :12] = IGNORED
    labels[:, 20] = IGNORED
    return {"input_ids": ids, "attention_mask": torch.ones_like(ids), "labels": labels}


def kept(batch: dict[str, torch.Tensor], *, suffix: bool) -> dict[str, Any]:
    """As ms-swift's prepare_logits_to_keep: a suffix for all rows, or for one row the tokens whose next one is learnt."""
    labels = batch["labels"]
    if suffix:
        return batch | {"labels": labels[:, 11:], "logits_to_keep": labels.shape[1] - 11}
    learnt = labels[0] != IGNORED
    mask = torch.nn.functional.pad(learnt[1:], (0, 1), value=True)
    return batch | {"labels": torch.nn.functional.pad(labels[:, learnt], (1, 0), value=IGNORED), "logits_to_keep": mask}


BATCHES = {"whole": rows(3), "suffix": kept(rows(3), suffix=True), "tokens": kept(rows(1), suffix=False)}


def gradients(model: Any, forward: Any, batch: dict[str, Any]) -> tuple[torch.Tensor, dict[str, torch.Tensor]]:
    model.zero_grad()
    loss = forward(model, **batch, use_cache=False).loss
    loss.backward()
    return loss.detach(), {name: parameter.grad.clone() for name, parameter in model.named_parameters() if parameter.grad is not None}


@pytest.mark.parametrize("batch", BATCHES.values(), ids=BATCHES)
def test_loss_and_gradients_are_those_of_transformers(model: Any, batch: dict[str, Any]) -> None:
    loss, found = gradients(model, type(model).forward, batch)
    wanted_loss, wanted = gradients(model, plain_forward, batch)
    torch.testing.assert_close(loss, wanted_loss, rtol=1e-5, atol=1e-5)
    assert found.keys() == wanted.keys() and len(found) > 50
    for name, gradient in wanted.items():
        torch.testing.assert_close(found[name], gradient, rtol=1e-5, atol=1e-5 * float(gradient.abs().max()), msg=name)


def test_the_head_sees_a_chunk_of_learnt_tokens_at_a_time(model: Any) -> None:
    seen: list[int] = []
    handle = model.lm_head.register_forward_hook(lambda head, inputs, output: seen.append(output.numel() // output.shape[-1]))
    try:
        outputs = model(**BATCHES["whole"])
        forward = list(seen)
        outputs.loss.backward()
    finally:
        handle.remove()
    assert outputs.logits is None
    assert max(seen) == CHUNK and sum(forward) == 3 * 27, "28 labels a row less the one inside that is not learnt"
    assert sorted(seen) == sorted(forward * 2), "once more in the backward pass"


def test_without_labels_there_are_logits(model: Any) -> None:
    batch = {key: value for key, value in rows(2).items() if key != "labels"}
    with torch.no_grad():
        torch.testing.assert_close(model(**batch, logits_to_keep=5).logits, plain_forward(model, **batch).logits[:, -5:])


def test_a_batch_in_which_nothing_is_learnt_has_the_loss_it_had(model: Any) -> None:
    batch = rows(1) | {"labels": torch.full((1, 40), IGNORED)}
    assert model(**batch).loss.isnan() and plain_forward(model, **batch).loss.isnan()
