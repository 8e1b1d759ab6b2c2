"""Configuration of an exported model: sizes under the names that transformers uses, plugins, recipe."""

from __future__ import annotations

from typing import Any

from transformers import PretrainedConfig


class SinkbenchConfig(PretrainedConfig):  # type: ignore[misc]
    """Attributes:
    plugins: kind -> {"name": ..., "params": {...}} of attention, normalization and positional.
    bidirectional_prefix: the first so many positions see one another.
    recipe: the resolved recipe that the model was trained with.
    """

    model_type = "sinkbench"
    keys_to_ignore_at_inference = ["past_key_values"]  # noqa: RUF012

    def __init__(
        self,
        vocab_size: int = 64,
        hidden_size: int = 64,
        num_hidden_layers: int = 1,
        num_attention_heads: int = 1,
        num_key_value_heads: int = 1,
        head_dim: int = 64,
        intermediate_size: int | None = None,
        ffn: str = "swiglu",
        linear_bias: str = "none",
        parallel_residual: bool = False,
        max_position_embeddings: int = 64,
        initializer_range: float = 0.02,
        plugins: dict[str, Any] | None = None,
        bidirectional_prefix: int = 0,
        recipe: dict[str, Any] | None = None,
        use_cache: bool = True,
        **kwargs: Any,
    ) -> None:
        self.vocab_size = vocab_size
        self.hidden_size = hidden_size
        self.num_hidden_layers = num_hidden_layers
        self.num_attention_heads = num_attention_heads
        self.num_key_value_heads = num_key_value_heads
        self.head_dim = head_dim
        self.intermediate_size = intermediate_size
        self.ffn = ffn
        self.linear_bias = linear_bias
        self.parallel_residual = parallel_residual
        self.max_position_embeddings = max_position_embeddings
        self.initializer_range = initializer_range
        self.plugins = plugins or {}
        self.bidirectional_prefix = bidirectional_prefix
        self.recipe = recipe or {}
        self.use_cache = use_cache
        kwargs.setdefault("tie_word_embeddings", False)
        super().__init__(**kwargs)
