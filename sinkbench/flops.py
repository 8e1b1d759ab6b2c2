"""Parameters and floating-point operations of a model, counted from its recipe alone.

Only what every model has is counted: what a plugin adds (a norm's bias, learned positions, a sink's
logit) is a thousandth of it, and a window's saving is not subtracted.
"""

from __future__ import annotations

from sinkbench.config import BigramBackcopyConfig, Config, ModelConfig, padded_vocab_size

GATED = ("swiglu", "geglu", "reglu")
"""Feed-forward kinds with a third matrix."""


def vocab_size(config: Config) -> int | None:
    """Size of the vocabulary before padding; None if only the prepared data can tell."""
    if config.model.vocab_size is not None:
        return config.model.vocab_size
    if isinstance(config.data, BigramBackcopyConfig):
        return config.data.vocab_size
    return config.data.prepare.tokenizer.train_vocab_size if config.data.prepare else None


def layer_weights(model: ModelConfig) -> int:
    """Weights in the matrices of one layer: query, key, value, output, feed-forward."""
    n, d = model.hidden_size, model.head_dim
    attention = n * d * (2 * model.num_attention_heads + 2 * model.kv_heads)
    if model.ffn == "none":
        return attention
    assert model.ffn_hidden_size is not None
    return attention + n * model.ffn_hidden_size * (3 if model.ffn in GATED else 2)


def parameters_without_tables(model: ModelConfig) -> int:
    """Parameters of the layers and of the final norm, one gain for each norm."""
    norms = 1 if model.ffn == "none" else 2
    return model.num_layers * (layer_weights(model) + norms * model.hidden_size) + model.hidden_size


def parameters(model: ModelConfig, vocab_size: int) -> int:
    """All parameters, with the padded embedding and the output projection (one table if tied)."""
    table = padded_vocab_size(vocab_size) * model.hidden_size
    return parameters_without_tables(model) + (1 if model.tie_embeddings else 2) * table


def flops_per_token(model: ModelConfig, vocab_size: int, seq_length: int | None = None) -> int:
    """Operations of a training step per token, forward and backward.

    6 per weight of a matrix, the output projection included (Kaplan et al. 2001.08361), and for
    attention 12 L T h d (PaLM, Chowdhery et al. 2204.02311, appendix B), of which a causal mask
    leaves half. Recomputation is not counted: this is the numerator of MFU.

    Args:
        vocab_size: before padding.
        seq_length: default: that of the model.
    """
    length = model.seq_length if seq_length is None else seq_length
    head = padded_vocab_size(vocab_size) * model.hidden_size
    weights = model.num_layers * layer_weights(model) + head
    attention = model.num_layers * length * model.num_attention_heads * model.head_dim
    return 6 * weights + 6 * attention


PEAK_BF16 = {
    "H100 PCIe": 756e12,
    "H800 PCIe": 756e12,
    "H100 NVL": 835e12,
    "H200 NVL": 835e12,
    "H100": 989e12,
    "H200": 989e12,
    "H800": 989e12,
    "A100": 312e12,
    "A800": 312e12,
}
"""Dense bf16 operations per second of a card, by the first of these that is in its name (vendor's data
sheets: half of what they say for sparse matrices)."""


def peak(device_name: str, precision: str) -> float | None:
    """Peak operations per second of a device, or None where MFU would say nothing."""
    if precision != "bf16":
        return None
    return next((value for card, value in PEAK_BF16.items() if card in device_name), None)
