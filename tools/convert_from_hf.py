"""Converts a Hugging Face model to a checkpoint: ``python tools/convert_from_hf.py MODEL OUT``."""

from __future__ import annotations

import sys

from sinkbench.export.commands import from_hf

if __name__ == "__main__":
    sys.exit(from_hf())
