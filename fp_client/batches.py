"""Token batches in a fixed, seeded order: training, probe and held-out.

A batch is a dict of three torch.long tensors of shape (B, T), right-padded to its longest row:
``input_ids``, ``attention_mask`` (1 on real tokens) and ``labels`` (-100 on prompt and padding).
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import torch
from torch import Tensor

from common.errors import DataError
from common.types import ProbeSpec, TrainSpec
from fp_client.data import DataSource, Rows, Split, open_rows, split_rows
from fp_client.template import IGNORE, Encoded, encode

Batch = dict[str, Tensor]
"""input_ids, attention_mask, labels: (B, T) int64, right-padded."""


@dataclass(frozen=True)
class Dataset:
    """Checked rows, their split, and the window they were checked for."""

    rows: Rows
    split: Split
    window: int
    dropped: int = 0


def load_dataset(source: DataSource, tokenizer: Any, window: int) -> Dataset:
    """Open, split and check that every example fits `window` tokens.

    The split is made first, so it is the same for every window; rows that don't fit are an error that
    names the line, or are left out (`on_long = "drop"`).
    """
    rows = open_rows(source)
    split = split_rows(rows, source)
    fits: set[int] = set()
    for index in (*split.train, *split.heldout):
        found = encode(rows.read(index), tokenizer, window)
        if isinstance(found, Encoded):
            fits.add(index)
        elif source.on_long == "error":
            raise DataError(
                f"{rows.name}:{rows.lines[index]}: the response does not fit the window: it needs {found} tokens with the "
                f'shortest prompt, the window is {window}. Shorten it, raise sequence_length, or set on_long = "drop"'
            )
    kept = Split(
        tuple(i for i in split.train if i in fits),
        tuple(i for i in split.heldout if i in fits),
    )
    if not kept.train or not kept.heldout:
        side = "training" if not kept.train else "held-out"
        raise DataError(f"{rows.name}: no {side} example has a response that fits the window of {window} tokens")
    return Dataset(rows, kept, window, len(split.train) + len(split.heldout) - len(kept.train) - len(kept.heldout))


def narrow(dataset: Dataset, count: int) -> Dataset:
    """The same data with at most `count` held-out rows."""
    return replace(dataset, split=replace(dataset.split, heldout=dataset.split.heldout[:count]))


def order(rows: Sequence[int], count: int, seed: int) -> list[int]:
    """`count` rows: one permutation an epoch, without replacement, a new permutation each epoch."""
    generator = np.random.default_rng(seed)
    out: list[int] = []
    while len(out) < count:
        out.extend(rows[int(i)] for i in generator.permutation(len(rows)))
    return out[:count]


def collate(dataset: Dataset, indices: Sequence[int], tokenizer: Any) -> Batch:
    """The given rows as one right-padded batch."""
    encoded = []
    for index in indices:
        found = encode(dataset.rows.read(index), tokenizer, dataset.window)
        if not isinstance(found, Encoded):
            raise DataError(f"{dataset.rows.name}:{dataset.rows.lines[index]}: the file has changed while in use")
        encoded.append(found)
    shape = (len(encoded), max(len(one.ids) for one in encoded))
    pad = tokenizer.pad_token_id if tokenizer.pad_token_id is not None else (tokenizer.eos_token_id or 0)
    ids = torch.full(shape, int(pad), dtype=torch.long)
    mask = torch.zeros(shape, dtype=torch.long)
    labels = torch.full(shape, IGNORE, dtype=torch.long)
    for row, one in enumerate(encoded):
        size = len(one.ids)
        ids[row, :size] = torch.tensor(one.ids)
        mask[row, :size] = 1
        labels[row, one.prompt : size] = ids[row, one.prompt : size]
    return {"input_ids": ids, "attention_mask": mask, "labels": labels}


def train_batches(dataset: Dataset, spec: TrainSpec, tokenizer: Any) -> Iterator[Batch]:
    """One batch a step, `spec.steps` of them, in the order `spec.seed` gives; each made when it is asked for."""
    size = spec.batch_size
    drawn = order(dataset.split.train, spec.steps * size, spec.seed)
    for start in range(0, len(drawn), size):
        yield collate(dataset, drawn[start : start + size], tokenizer)


def probe_batch(dataset: Dataset, spec: ProbeSpec, tokenizer: Any) -> Batch:
    """One batch of training rows for the similarity matrix (paper §3.1, step 1)."""
    size = min(spec.batch_size, len(dataset.split.train))
    return collate(dataset, order(dataset.split.train, size, spec.seed), tokenizer)


def micro_batches(batch: Batch, size: int) -> Iterator[Batch]:
    """A batch in pieces of at most `size` rows, each cut to its longest row."""
    rows = batch["input_ids"].shape[0]
    for start in range(0, rows, size):
        part = {name: tensor[start : start + size] for name, tensor in batch.items()}
        longest = max(1, int(part["attention_mask"].sum(dim=1).max()))
        yield {name: tensor[:, :longest] for name, tensor in part.items()}


def heldout_batches(dataset: Dataset, batch_size: int, tokenizer: Any) -> Iterator[Batch]:
    """The held-out rows, always in the same order, `batch_size` at a time."""
    held = dataset.split.heldout
    for start in range(0, len(held), batch_size):
        yield collate(dataset, held[start : start + batch_size], tokenizer)
