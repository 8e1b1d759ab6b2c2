"""Keeps secrets out of what is written and shown: command lines, reports, error lines, recipes.

A secret is the value of an environment variable whose name says so (WANDB_API_KEY, HF_TOKEN), a password in a
URL, a parameter of a URL that is named as one, or a word in the form of a Hugging Face token.
"""

from __future__ import annotations

import os
import re
from collections.abc import Mapping

SHORTEST = 12
"""Characters; a shorter value of the environment might be a word of its own."""

_HIDDEN = "***"
_NAME = re.compile(r"(KEY|TOKEN|SECRET|PASSWORD|PASSWD|CREDENTIALS?)$", re.IGNORECASE)
_PATTERNS = (
    (re.compile(r"(?<=://)[^\s/@]+(?=@)"), _HIDDEN),
    (re.compile(r"([?&][\w-]*(?:key|token|secret|signature|password))=[^\s&#]+", re.IGNORECASE), r"\1=***"),
    (re.compile(r"\bhf_[A-Za-z0-9]{20,}"), _HIDDEN),
)


def redact(text: str, environment: Mapping[str, str] = os.environ) -> str:
    """The text with every secret in it replaced by ***."""
    values = {v for name, v in environment.items() if _NAME.search(name) and len(v) >= SHORTEST}
    for value in sorted(values, key=len, reverse=True):
        text = text.replace(value, _HIDDEN)
    for pattern, replacement in _PATTERNS:
        text = pattern.sub(replacement, text)
    return text
