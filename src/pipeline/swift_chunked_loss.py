"""Loaded by ms-swift where the plain loss is trained on (`external_plugins`): the language model's head and the cross-entropy go through the tokens in chunks.

Whole, the logits of 16,384 answer tokens over GLM-4.5V's 151,552 words are 9.25 GiB in float32, a few times over in the backward pass. In chunks that the backward pass
computes once more there are never more than CHUNK_TOKENS' (0.3 GiB each time), and none for tokens that are not learnt. Loss and gradients are those of transformers but
for the order of summation; no logits are returned, and so ms-swift logs no token_acc. Who wants logits (DPO, weighted rows, generation) gives no labels, and gets them.
"""

from functools import wraps
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import cross_entropy, pad
from torch.utils.checkpoint import checkpoint
from transformers.models.glm4v_moe.modeling_glm4v_moe import Glm4vMoeCausalLMOutputWithPast, Glm4vMoeForConditionalGeneration

CHUNK_TOKENS = 512
IGNORED = -100
"""The label of a token that is not learnt."""


def chunked_loss(head: torch.nn.Module, hidden: Tensor, labels: Tensor) -> Tensor:
    """Mean cross-entropy of each next token that has a label; NaN if none has, as in transformers. `hidden`: [rows, tokens, width], `labels`: [rows, tokens]."""

    def summed(states: Tensor, words: Tensor) -> Tensor:
        return cross_entropy(head(states).float(), words, reduction="sum")

    following = pad(labels[:, 1:], (0, 1), value=IGNORED)
    learnt = following != IGNORED
    states, words = hidden[learnt], following[learnt]
    chunks = zip(states.split(CHUNK_TOKENS), words.split(CHUNK_TOKENS), strict=True)
    # With reentry the head is called anew in the backward pass, so that ZeRO-3, which has let its weights go by then (swift_zero3.py), gathers them again.
    losses = [checkpoint(summed, *chunk, use_reentrant=states.requires_grad, preserve_rng_state=False) for chunk in chunks]
    return torch.stack(losses).sum() / words.numel()


plain_forward = Glm4vMoeForConditionalGeneration.forward


@wraps(plain_forward)
def forward(self: Any, *, labels: Tensor | None = None, logits_to_keep: int | Tensor = 0, **inputs: Any) -> Any:
    """transformers' own, but for the loss where there are labels. ms-swift has dropped the labels of the tokens that `logits_to_keep` leaves out."""
    if labels is None:
        return plain_forward(self, logits_to_keep=logits_to_keep, **inputs)
    outputs = self.model(**inputs)
    kept = slice(-logits_to_keep, None) if isinstance(logits_to_keep, int) else logits_to_keep
    return Glm4vMoeCausalLMOutputWithPast(loss=chunked_loss(self.lm_head, outputs.last_hidden_state[:, kept], labels))


Glm4vMoeForConditionalGeneration.forward = forward
