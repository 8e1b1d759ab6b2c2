"""Converts a Hugging Face model to a checkpoint: ``python tools/convert_from_hf.py MODEL OUT``."""

from __future__ import annotations

import sys

from sinkbench.export.from_hf import main

if __name__ == "__main__":
    sys.exit(main())
