"""Converts a checkpoint to a Hugging Face model: ``python tools/convert_to_hf.py CHECKPOINT OUT``."""

from __future__ import annotations

import sys

from sinkbench.export.commands import to_hf

if __name__ == "__main__":
    sys.exit(to_hf())
