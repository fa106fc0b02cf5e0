"""Token ids, log-probabilities and masks of completions, as arrays."""

from collections.abc import Iterable, Sequence
from typing import Any

import numpy as np


def as_ids(values: Iterable[int]) -> np.ndarray:
    return np.asarray(values, np.int32)


def as_logprobs(values: Iterable[float | None]) -> np.ndarray:
    """fp32, NaN for None."""
    return np.asarray(values, np.float32)


def as_mask(values: Iterable[int]) -> np.ndarray:
    return np.asarray(values, bool)


def as_routes(values: Iterable[int]) -> np.ndarray:
    """Experts of tokens, flat: [tokens · layers · experts of a token]."""
    return np.asarray(values, np.int16)


def same_ids(a: np.ndarray, b: np.ndarray) -> bool:
    return a is b or np.array_equal(a, b)


def padded(rows: Sequence[np.ndarray], width: int, fill: float = 0.0) -> np.ndarray:
    """Rows of any lengths as fp32 [rows, width], with `fill` behind the end of each."""
    table = np.full((len(rows), width), fill, np.float32)
    for line, row in zip(table, rows, strict=True):
        line[: len(row)] = row
    return table


class IdLists(Sequence):
    """Arrays of token ids as lists of int, each made when it is asked for."""

    def __init__(self, arrays: Sequence[np.ndarray]):
        self.arrays = arrays

    def __len__(self) -> int:
        return len(self.arrays)

    def __getitem__(self, index: Any) -> Any:
        found = self.arrays[index]
        return IdLists(found) if isinstance(index, slice) else found.tolist()
