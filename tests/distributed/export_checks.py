"""Run in a process of its own: what transformers makes of exported models. Prints JSON by folder."""

from __future__ import annotations

import copy
import importlib.abc
import json
import sys
import tempfile
from pathlib import Path
from typing import Any


class _NoSinkbench(importlib.abc.MetaPathFinder):
    def find_spec(self, name: str, path: Any, target: Any = None) -> None:
        if name.partition(".")[0] in ("sinkbench", "sinkbench_plugins", "megatron"):
            raise ImportError(f"{name} is not here")


sys.meta_path.insert(0, _NoSinkbench())

import torch  # noqa: E402
import transformers  # noqa: E402
from transformers import AutoModelForCausalLM  # noqa: E402

EPS = 0.08
PROMPT = 30
"""Tokens that are read at once before the others are read with a cache."""


def load(folder: Path, **options: Any) -> Any:
    return AutoModelForCausalLM.from_pretrained(folder, trust_remote_code=True, **options).eval()


def difference(a: torch.Tensor, b: torch.Tensor) -> float:
    assert a.isfinite().all()
    assert b.isfinite().all()
    return float((a - b).abs().max())


@torch.no_grad()
def check(folder: Path) -> dict[str, Any]:
    expected = torch.load(folder / "expected.pt")
    tokens, logits = expected["tokens"], expected["logits"]
    model = load(folder, attn_implementation="eager")
    output = model(tokens, output_attentions=True)
    # Attention with negative weights magnifies what float32 rounds. transformers' own families, which have
    # none, cannot mask padding in float64.
    ours = type(model).__name__ == "SinkbenchForCausalLM"
    exact = copy.deepcopy(model).double() if ours else model
    whole = exact(tokens).logits
    found: dict[str, Any] = {
        "class": type(model).__name__,
        "logits": difference(output.logits, logits),
        "scale": float(logits.std()),
        "sink_1": sink(output.attentions, 0),
        "attentions": worst(output.attentions, expected.get("attentions")),
        "slot": slot(output),
        "slots": worst(getattr(output, "slot_attentions", None), expected.get("slots")),
        "padding": padding(exact, tokens, whole),
        "cache": cached(exact, tokens, whole),
        "generate": generated(model, tokens),
        "short": [part_of_prefix(model, tokens), short_prompt(exact, tokens)],
        "loss": loss(exact, tokens),
    }
    try:
        fused = load(folder, attn_implementation="sdpa")
        found["sdpa"] = difference(fused(tokens).logits, logits)
        found["sdpa_padding"] = padding(fused, tokens, output.logits)
    except ValueError:
        found["sdpa"] = None
    with tempfile.TemporaryDirectory(prefix=f"again_{folder.name}_") as again:
        model.save_pretrained(again)
        found["saved_again"] = difference(
            load(Path(again), attn_implementation="eager")(tokens).logits, output.logits
        )
    found["checkpointing"] = checkpointing(model, tokens)
    return found


def worst(found: Any, expected: Any) -> float | None:
    """The largest difference of weights of any layer, of those beyond 1 (signed ones) as a part of the
    largest; None where nothing was expected."""
    if expected is None:
        return None
    layers = zip(found, expected, strict=True)
    return max(difference(a, b) / max(1.0, float(b.abs().max())) for a, b in layers)


def sink(attentions: Any, key: int) -> float:
    """The raw sink rate of a key over layers, heads and sequences (Gu et al. 2410.10781)."""
    rates = [(a[:, :, key:, key].mean(-1) > EPS).float().mean() for a in attentions]
    return 100 * float(torch.stack(rates).mean())


def slot(output: Any) -> float | None:
    slots = getattr(output, "slot_attentions", None)
    return None if slots is None else float(torch.stack(slots).mean())


def padding(model: Any, tokens: torch.Tensor, alone: torch.Tensor) -> float:
    """A short sequence beside a long one, padded on either side."""
    length, short = tokens.shape[1], tokens.shape[1] - 9
    worst = 0.0
    first = model(tokens[1:2, :short]).logits[0]
    for left in (True, False):
        batch, mask = tokens[:2].clone(), torch.ones_like(tokens[:2])
        at = slice(length - short, None) if left else slice(0, short)
        batch[1] = 0
        batch[1, at] = tokens[1, :short]
        mask[1] = 0
        mask[1, at] = 1
        positions = (mask.cumsum(1) - 1).clamp(min=0)
        logits = model(batch, attention_mask=mask, position_ids=positions).logits
        worst = max(worst, difference(logits[0], alone[0]), difference(logits[1, at], first))
    return worst


def cached(model: Any, tokens: torch.Tensor, whole: torch.Tensor) -> float:
    """A prompt and then one token at a time."""
    output = model(tokens[:, :PROMPT], use_cache=True)
    parts = [output.logits]
    for number in range(PROMPT, tokens.shape[1]):
        output = model(tokens[:, number : number + 1], past_key_values=output.past_key_values, use_cache=True)
        parts.append(output.logits)
    return difference(torch.cat(parts, 1), whole)


def generated(model: Any, tokens: torch.Tensor) -> bool:
    """Greedy tokens with a cache, without, and of each sequence alone are the same."""
    prompts, mask = tokens[:, :16].clone(), torch.ones_like(tokens[:, :16])
    prompts[1, :5] = 0
    mask[1, :5] = 0
    options = {"max_new_tokens": 5, "do_sample": False, "pad_token_id": 0, "eos_token_id": None}
    together = model.generate(prompts, attention_mask=mask, **options)[:, 16:]
    without = model.generate(prompts, attention_mask=mask, use_cache=False, **options)[:, 16:]
    alone = [
        model.generate(row[keep.bool()][None], attention_mask=keep[keep.bool()][None], **options)[0, -5:]
        for row, keep in zip(prompts, mask, strict=True)
    ]
    return bool((together == without).all() and (together == torch.stack(alone)).all())


def part_of_prefix(model: Any, tokens: torch.Tensor) -> str | None:
    """What is said to a token after a cache of two, beside a sequence with more; None if nothing."""
    batch, mask = tokens[:2, :7], torch.ones_like(tokens[:2, :7])
    mask[1, :4] = 0
    cache = model(batch[:, :-1], attention_mask=mask[:, :-1], use_cache=True).past_key_values
    try:
        model(batch[:, -1:], attention_mask=mask, past_key_values=cache)
    except ValueError as error:
        return str(error)
    return None


def short_prompt(model: Any, tokens: torch.Tensor) -> str | None:
    """What is said to a prompt of two tokens; None if they are continued as without a cache."""
    options = {"max_new_tokens": 5, "do_sample": False, "pad_token_id": 0, "eos_token_id": None}
    without = model.generate(tokens[:1, :2], use_cache=False, **options)
    try:
        found = model.generate(tokens[:1, :2], **options)
    except ValueError as error:
        return str(error)
    assert torch.equal(found, without)
    return None


def loss(model: Any, tokens: torch.Tensor) -> float:
    """The mean loss of tokens that no query before them sees, beside that of padded sequences."""
    first = max(1, getattr(model.config, "bidirectional_prefix", 0))
    log_p = model(tokens).logits.log_softmax(-1)[:, :-1].gather(-1, tokens[:, 1:, None])[..., 0]
    by_hand = -log_p[:, first - 1 :].mean()
    padded = torch.cat([tokens[:, :3], tokens], 1)
    mask, labels = torch.ones_like(padded), padded.clone()
    mask[:, :3] = 0
    labels[:, :4] = -100  # padding does not predict the first token
    positions = (mask.cumsum(1) - 1).clamp(min=0)
    of_padded = model(padded, attention_mask=mask, position_ids=positions, labels=labels).loss
    return max(difference(model(tokens, labels=tokens).loss, by_hand), difference(of_padded, by_hand))


@torch.enable_grad()
def checkpointing(model: Any, tokens: torch.Tensor) -> float:
    """Gradients with activations computed again are the same."""
    gradients = []
    model.train()
    for again in (False, True):
        if again:
            model.gradient_checkpointing_enable()
        model.zero_grad()
        model(tokens, labels=tokens, use_cache=False).loss.backward()
        gradients.append(torch.cat([p.grad.flatten() for p in model.parameters()]))
    return difference(*gradients)


if __name__ == "__main__":
    transformers.logging.set_verbosity_error()
    results = {folder: check(Path(folder)) for folder in sys.argv[1:]}
    assert not {"sinkbench", "megatron"} & sys.modules.keys()
    print(json.dumps(results))
