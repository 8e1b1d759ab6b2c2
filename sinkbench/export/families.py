"""Model families of transformers that need no code of ours."""

from __future__ import annotations

from sinkbench.export.family_gpt2 import GPT2, OPT
from sinkbench.export.family_llama import LLAMA, MISTRAL, QWEN2
from sinkbench.export.family_neox import GPT_NEOX

FAMILIES = (LLAMA, MISTRAL, QWEN2, OPT, GPT2, GPT_NEOX)
"""The first that fits is taken for an export."""
