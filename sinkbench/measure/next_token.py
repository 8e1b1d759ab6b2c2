"""The loss of each next token, for metrics that run the model again."""

from __future__ import annotations

from torch import Tensor
from torch.nn import functional as F

LOGIT_ELEMENTS = 2**27
"""Logits held at once, 512 MiB of them."""


def first_query(prefix: int) -> int:
    """As sinkbench.api.Forwards.first_query, of a model whose first ``prefix`` positions see one another."""
    return max(0, prefix - 1)


def most_sequences(length: int, vocab_size: int) -> int:
    """The most sequences whose logits may be held."""
    return max(1, LOGIT_ELEMENTS // (length * vocab_size))


def next_token_losses(logits_bsv: Tensor, tokens_bs: Tensor) -> Tensor:
    """Cross entropy of tokens 2 .. s, float32 [b, s - 1], on the CPU.

    Args:
        logits_bsv: of all positions but the last.
    """
    loss = F.cross_entropy(logits_bsv.float().flatten(0, 1), tokens_bs[:, 1:].flatten(), reduction="none")
    return loss.view(len(tokens_bs), -1).cpu()
