"""Prepared folders with known tokens, written without documents."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import numpy as np

from sinkbench.data.manifest import FileRecord, InputRecord, Manifest, TokenizerRecord, file_sha256
from sinkbench.megatron.datasets import TokenWriter

EOS = 0


def write_folder(
    folder: Path,
    train: Sequence[Sequence[int]],
    validation: Sequence[Sequence[int]] = (),
    *,
    vocab_size: int = 1000,
    tokenizer_sha256: str = "0" * 64,
) -> Path:
    """Writes documents, each given without its EOS."""
    folder.mkdir(parents=True)
    splits = {"train": train, "validation": validation}
    files = {}
    for split, documents in splits.items():
        if not documents:
            continue
        writer = TokenWriter(folder / split, np.uint16)
        for document in documents:
            writer.add(np.array([*document, EOS], np.uint16))
        writer.close()
        for name in (f"{split}.bin", f"{split}.idx"):
            path = folder / name
            files[name] = FileRecord(bytes=path.stat().st_size, sha256=file_sha256(path))
    tokens = {split: sum(len(d) + 1 for d in documents) for split, documents in splits.items()}
    manifest = Manifest(
        request="0" * 64,
        documents={split: len(documents) for split, documents in splits.items()},
        tokens=tokens,
        duplicates=0,
        empty=0,
        not_text=0,
        inputs=[InputRecord(input="x", documents=0, tokens=0, duplicates=0, empty=0, not_text=0)],
        tokenizer=TokenizerRecord(
            kind="sentencepiece",
            path="tokenizer/tokenizer.model",
            sha256=tokenizer_sha256,
            vocab_size=vocab_size,
            eos_id=EOS,
        ),
        dtype="uint16",
        files=files,
    )
    (folder / "manifest.json").write_text(manifest.model_dump_json())
    return folder
