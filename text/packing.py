"""Encoded rows as flat arrays, and the order of training: packing, epochs, micro-batches. The order is a
function of the seed and the step number alone, so that a resumed run needs no iterator's state.
"""

import bisect
import hashlib
import json
import math
import secrets
import shutil
import sys
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, ClassVar, Literal

import numpy as np
import torch
from torch import Tensor

from run.config import ConfigError, DataError, check_at_least_one, check_interval
from text.tokenizer import IGNORE

PACK_WINDOW = 8192  # rows that are packed together; bounds the time of packing and keeps the order random


@dataclass
class LoopOptions:
    micro_batch_size: int = 1
    """Rows (packs, documents, completions) in one forward pass of one process."""
    gradient_accumulation_steps: int = 1
    """Micro-batches of each process in one optimiser step."""
    num_epochs: float = 1.0
    """Passes over the data."""
    max_steps: int | None = None
    """Stop after this many optimiser steps, regardless of num_epochs."""
    eval_steps: int | float | None = None
    """Evaluate on held-out data every N steps; a value below 1 is a fraction of the run. Held-out data is
    also evaluated at the start and the end."""
    evals_per_epoch: int | None = None
    """Evaluations per epoch, instead of eval_steps."""
    seed: int = 42
    """Seed for data order, sampling, dropout and random initialisation."""

    def check(self) -> None:
        check_at_least_one(self, "micro_batch_size", "gradient_accumulation_steps", "max_steps")
        check_interval(self, "eval_steps", "evals_per_epoch")
        if not 0 < self.num_epochs < math.inf:
            raise ConfigError("num_epochs", self.num_epochs, "must be above 0")


def settle_intervals(config: Any, total_steps: int, steps_per_epoch: int) -> None:
    """Convert the config's evaluation and save intervals into numbers of steps, in place."""

    def steps(every: int | float | None, times_per_epoch: int | None) -> int | None:
        if times_per_epoch is not None:
            return max(1, round(steps_per_epoch / times_per_epoch))
        if every is None:
            return None
        return int(every) if every >= 1 else math.ceil(every * total_steps)

    config.eval_steps = steps(config.eval_steps, config.evals_per_epoch)
    config.save_steps = steps(config.save_steps, config.saves_per_epoch)
    config.evals_per_epoch = config.saves_per_epoch = None


@dataclass
class Encoded:
    """An encoded row, or the reason why it is not trained on."""

    file: str
    line: int
    input_ids: list[int]
    labels: list[int]
    status: Literal["kept", "truncated", "dropped", "bad", "skipped"] = "kept"
    reason: str = ""
    unread: list[str] = field(default_factory=list)  # non-empty columns that nothing reads
    lost: list[str] = field(default_factory=list)  # parts of the row that the chat template does not show


def settle(aside: Path, final: Path) -> None:
    """Rename a finished directory to its final name. If another run that shares the cache was first, keep its
    directory, which was made from the same rows."""
    try:
        aside.rename(final)
    except OSError:
        if not final.is_dir():
            raise
        shutil.rmtree(aside)


class Dataset:
    """Encoded rows as flat arrays (memory-mapped when prepared on disk).

    `tokens`, `labels` int32 [all tokens]; row i is tokens[offsets[i]:offsets[i+1]]; `source` [rows] is the
    dataset of a row, `lines` [rows] its line, `files` [rows] an index into `file_names`.
    """

    ARRAYS: ClassVar = ("tokens", "labels", "offsets", "source", "lines", "files")

    def __init__(self, arrays: dict[str, np.ndarray], file_names: list[str], counts: dict, fingerprint: str):
        self.tokens, self.labels, self.offsets = arrays["tokens"], arrays["labels"], arrays["offsets"]
        self.source, self.lines, self.files = arrays["source"], arrays["lines"], arrays["files"]
        self.file_names, self.counts, self.fingerprint = file_names, counts, fingerprint
        self.lengths = np.diff(self.offsets)

    def __len__(self) -> int:
        return len(self.lengths)

    def row(self, i: int) -> tuple[np.ndarray, np.ndarray]:
        tokens = slice(self.offsets[i], self.offsets[i + 1])
        return self.tokens[tokens], self.labels[tokens]

    def name(self, i: int) -> str:
        return f"{self.file_names[self.files[i]]}:{self.lines[i]}"

    def trained_tokens(self, i: int) -> int:
        return int((self.row(i)[1][1:] != IGNORE).sum())

    @staticmethod
    def build(rows: Iterator[tuple[int, Encoded]]) -> "Dataset":
        tokens, labels, offsets, source, lines, files = [], [], [0], [], [], []
        names: dict[str, int] = {}
        counts: dict[str, Any] = {"rows": 0, "kept": 0, "truncated": 0, "dropped": 0, "bad": 0, "skipped": 0}
        counts |= {"named": [], "unread": {}, "lost": {}}
        for number, encoded in rows:
            counts["rows"] += 1
            counts[encoded.status] += 1
            for kind, found in (("unread", encoded.unread), ("lost", set(encoded.lost))):
                for name in found:
                    entry = counts[kind].setdefault(
                        name, {"rows": 0, "first": f"{encoded.file}:{encoded.line}"}
                    )
                    entry["rows"] += 1
            if encoded.status in ("bad", "dropped") and len(counts["named"]) < 100:
                counts["named"].append(f"{encoded.file}:{encoded.line}: {encoded.status}: {encoded.reason}")
            if encoded.status not in ("kept", "truncated"):
                continue
            tokens.append(np.array(encoded.input_ids, dtype=np.int32))
            labels.append(np.array(encoded.labels, dtype=np.int32))
            offsets.append(offsets[-1] + len(encoded.input_ids))
            source.append(number)
            lines.append(encoded.line)
            files.append(names.setdefault(encoded.file, len(names)))
        arrays = {
            "tokens": np.concatenate(tokens) if tokens else np.zeros(0, np.int32),
            "labels": np.concatenate(labels) if labels else np.zeros(0, np.int32),
            "offsets": np.array(offsets, np.int64), "source": np.array(source, np.int32),
            "lines": np.array(lines, np.int64), "files": np.array(files, np.int32),
        }
        digest = hashlib.sha256()
        for name in ("tokens", "labels", "offsets", "source"):
            digest.update(arrays[name].tobytes())
        return Dataset(arrays, list(names), counts, digest.hexdigest())

    def save(self, directory: Path) -> None:
        """Write to a temporary name first, so that a kill leaves nothing half-written under the final one."""
        aside = directory.with_name(f".{directory.name}.{secrets.token_hex(4)}")
        aside.mkdir(parents=True)
        for name in self.ARRAYS:
            np.save(aside / f"{name}.npy", getattr(self, name))
        description = {"file_names": self.file_names, "counts": self.counts, "fingerprint": self.fingerprint}
        (aside / "facts.json").write_text(json.dumps(description), encoding="utf-8")
        settle(aside, directory)

    @staticmethod
    def load(directory: Path) -> "Dataset":
        description = json.loads((directory / "facts.json").read_text(encoding="utf-8"))
        arrays = {name: np.load(directory / f"{name}.npy", mmap_mode="r") for name in Dataset.ARRAYS}
        counts = {len(arrays["tokens"]), len(arrays["labels"]), int(arrays["offsets"][-1])}
        if len(counts) != 1:
            raise ValueError(f"tokens, labels and offsets disagree: {sorted(counts)}")
        return Dataset(arrays, description["file_names"], description["counts"], description["fingerprint"])


def pack(lengths: list[int], capacity: int) -> list[list[int]]:
    """Best-fit decreasing: bins of `capacity` tokens, each a list of indices into `lengths`, in order of
    creation.

    The longest document goes first, into the fullest bin that still has room for it. Raises ValueError for a
    document that fits no bin.
    """
    bins: list[list[int]] = []
    by_room: dict[int, list[int]] = {}  # room left → bins with just that room
    rooms: list[int] = []  # the keys of by_room, ascending
    for i in sorted(range(len(lengths)), key=lambda i: -lengths[i]):
        length = lengths[i]
        if length > capacity:
            raise ValueError(f"a document of {length} tokens does not fit into {capacity}")
        at = bisect.bisect_left(rooms, length)
        if at == len(rooms):
            bins.append([i])
            target, room = len(bins) - 1, capacity
        else:
            room = rooms[at]
            target = by_room[room].pop()
            bins[target].append(i)
            if not by_room[room]:
                del by_room[room]
                rooms.pop(at)
        room -= length
        if room > 0:
            if room not in by_room:
                by_room[room] = []
                bisect.insort(rooms, room)
            by_room[room].append(target)
    return bins


@dataclass
class Batch:
    """One micro-batch. Shapes [B, T]; a target is the label of the next token of the same document, −100 if
    untrained."""

    input_ids: Tensor
    targets: Tensor
    position_ids: Tensor
    document_ids: Tensor  # −1 on padding
    rows: list[int]  # of the Dataset, to name a row that breaks a run

    def to(self, device: torch.device) -> "Batch":
        tensors = (self.input_ids, self.targets, self.position_ids, self.document_ids)
        ids, targets, positions, documents = (x.to(device, non_blocking=True) for x in tensors)
        return Batch(ids, targets, positions, documents, self.rows)


def weighted(
    rows: np.ndarray, source: np.ndarray, weights: Sequence[float], generator: np.random.Generator
) -> np.ndarray:
    """The rows of one epoch by data set, each repeated `weights[source]` times; a fractional part is a new
    random subset in every epoch."""
    chosen = [np.zeros(0, np.int64)]
    for number, weight in enumerate(weights):
        of_source = rows[source == number]
        times, fraction = int(weight), weight - int(weight)
        chosen += [of_source] * times
        if fraction:
            chosen.append(generator.permutation(of_source)[: round(fraction * len(of_source))])
    return np.concatenate(chosen)


class Batches:
    """The order of training: a pure function of (seed, epoch), so the step number is the full position.

    A unit is a row, or a pack of rows. Step s takes units [s·U, (s+1)·U) of the epochs laid end to end, where
    U = micro_batch_size · gradient_accumulation_steps · world: how U is split only decides which rank
    computes what. `capacity`: tokens per pack; None: no packing.
    """

    def __init__(
        self,
        dataset: Dataset,
        rows: np.ndarray,
        *,
        weights: list[float],
        units_per_step: int,
        seed: int,
        pad_id: int,
        capacity: int | None = None,
        shuffle: bool = True,
    ):
        self.dataset, self.rows, self.weights, self.capacity = dataset, rows, weights, capacity
        self.units_per_step, self.seed, self.pad_id, self.shuffle = units_per_step, seed, pad_id, shuffle
        self.total_units = sys.maxsize
        self._epochs: dict[int, list[list[int]]] = {}
        self._starts = [0]  # unit at which each epoch begins

    def epoch(self, number: int) -> list[list[int]]:
        """The units of an epoch, each a list of rows."""
        if number not in self._epochs:
            generator = np.random.default_rng([self.seed, number])
            order = weighted(self.rows, self.dataset.source[self.rows], self.weights, generator)
            if self.shuffle:
                order = generator.permutation(order)
            if self.capacity:
                units = []
                for begin in range(0, len(order), PACK_WINDOW):
                    window = order[begin : begin + PACK_WINDOW]
                    packs = pack(self.dataset.lengths[window].tolist(), self.capacity)
                    units += [[int(window[i]) for i in one] for one in packs]
                if self.shuffle:  # best fit makes full packs first: undo that
                    units = [units[i] for i in generator.permutation(len(units))]
            else:
                units = [[int(i)] for i in order]
            if not units:
                raise DataError(
                    "datasets", None, "no row is left to train on", "see `python data.py inspect`"
                )
            self._epochs = {k: v for k, v in self._epochs.items() if k >= number - 1} | {number: units}
        return self._epochs[number]

    def steps_per_epoch(self) -> int:
        return -(-len(self.epoch(0)) // self.units_per_step)

    def plan(self, epochs: float, max_steps: int | None = None) -> int:
        """Fix the end of the run, and return the number of its steps; the last one may be smaller."""
        if max_steps is not None:
            self.total_units = max_steps * self.units_per_step
            return max_steps
        full_epochs = int(epochs)
        self.total_units = sum(len(self.epoch(number)) for number in range(full_epochs))
        if epochs > full_epochs:
            self.total_units += round((epochs - full_epochs) * len(self.epoch(full_epochs)))
        self.total_units = max(1, self.total_units)
        return -(-self.total_units // self.units_per_step)

    def units(self, step: int) -> list[list[int]]:
        """The units of one step. Epochs follow each other without a gap, to the end that `plan` set."""
        first, last = step * self.units_per_step, min((step + 1) * self.units_per_step, self.total_units)
        units: list[list[int]] = []
        while self._starts[-1] < last:  # pack an epoch only when a step needs it
            self._starts.append(self._starts[-1] + len(self.epoch(len(self._starts) - 1)))
        for number in range(bisect.bisect_right(self._starts, first) - 1, len(self._starts) - 1):
            start = self._starts[number]
            if start >= last:
                break
            units += self.epoch(number)[max(0, first - start) : last - start]
        return units

    def epoch_of(self, step: int) -> float:
        """Epochs completed after N steps."""
        unit = min(step * self.units_per_step, self.total_units)
        while self._starts[-1] < unit:
            self._starts.append(self._starts[-1] + len(self.epoch(len(self._starts) - 1)))
        number = bisect.bisect_right(self._starts, unit) - 1
        if self._starts[number] == unit:
            return float(number)
        return number + (unit - self._starts[number]) / (self._starts[number + 1] - self._starts[number])

    def micro_batches(
        self, units: list[list[int]], micro_batch_size: int, rank: int, world: int
    ) -> list[Batch]:
        """This rank's share of the units of one step, cut into micro-batches; equally many per rank."""
        share = micro_batch_size * world
        batches = []
        for begin in range(0, len(units), share):
            own_units = units[
                begin + rank * micro_batch_size : min(begin + (rank + 1) * micro_batch_size, begin + share)
            ]
            batches.append(self.collate(own_units))
        return batches

    def trained_tokens(self, units: list[list[int]]) -> int:
        """Trained tokens over all ranks: the divisor of the step's loss."""
        return sum(self.dataset.trained_tokens(i) for unit in units for i in unit)

    def collate(self, units: list[list[int]]) -> Batch:
        rows = [i for unit in units for i in unit]
        width = max((sum(int(self.dataset.lengths[i]) for i in unit) for unit in units), default=1)
        if self.capacity:  # few different widths, so that compiled kernels are reused
            width = min(-(-width // 64) * 64, self.capacity)
        B = max(1, len(units))  # a rank without a row takes part in every collective with an untrained token
        ids = np.full((B, width), self.pad_id, np.int64)
        targets = np.full((B, width), IGNORE, np.int64)
        positions = np.zeros((B, width), np.int64)
        documents = np.full((B, width), -1, np.int64)
        if not units:
            documents[0, 0] = 0
        for b, unit in enumerate(units):
            at = 0
            for number, i in enumerate(unit):
                tokens, labels = self.dataset.row(i)
                end = at + len(tokens)
                ids[b, at:end] = tokens
                targets[b, at : end - 1] = labels[1:]
                positions[b, at:end] = np.arange(len(tokens))
                documents[b, at:end] = number
                at = end
        tensors = (torch.from_numpy(x) for x in (ids, targets, positions, documents))
        return Batch(*tensors, rows=rows)


class PromptOrder:
    """The prompts (or documents) of each generation batch: a function of the seed and the batch number alone,
    so resuming needs no iterator state. Epochs follow each other without a gap. Each is a permutation in
    which a prompt occurs as often as the weight of its data set says (`source`: data set of each prompt)."""

    def __init__(
        self, source: Sequence[int], prompts_a_batch: int, seed: int, weights: Sequence[float] = (1.0,)
    ):
        self.source, self.weights = np.array(source, np.int64), weights
        self.size, self.seed = prompts_a_batch, seed
        self._order = (-1, np.zeros(0, np.int64))  # number and order of the last epoch requested
        self.epoch_size = len(self._epoch(0))
        if not self.epoch_size:
            raise DataError("datasets", None, "no row is left to train on", "see `python data.py inspect`")

    def batch(self, number: int) -> list[int]:
        rows = []
        for position in range(number * self.size, (number + 1) * self.size):
            epoch, offset = divmod(position, self.epoch_size)
            rows.append(int(self._epoch(epoch)[offset]))
        return rows

    def batches(self, epochs: float) -> int:
        """Number of batches in `epochs` epochs, the last filled up from the next epoch."""
        return max(1, math.ceil(self.epoch_size * epochs / self.size))

    def _epoch(self, epoch: int) -> np.ndarray:
        if self._order[0] != epoch:
            generator = np.random.default_rng([self.seed, epoch])
            rows = weighted(np.arange(len(self.source)), self.source, self.weights, generator)
            self._order = epoch, generator.permutation(rows)
        return self._order[1]


def weights_of(specs: list[dict]) -> list[float]:
    """Weight of each data set: how often an epoch repeats its rows."""
    return [float(spec.get("weight", 1.0)) for spec in specs]


def with_weights(fingerprint: str, weights: Sequence[float]) -> str:
    """The fingerprint of data that are mixed with these weights."""
    mixed = any(weight != 1.0 for weight in weights)
    return hashlib.sha256((fingerprint + repr(list(weights))).encode()).hexdigest() if mixed else fingerprint


def split_held_out(rows: int, val_set_size: int | float, seed: int) -> tuple[np.ndarray, np.ndarray]:
    """(training rows, held-out rows), both ascending; the choice depends on the seed only."""
    if isinstance(val_set_size, float) and val_set_size != int(val_set_size) and not 0 < val_set_size < 1:
        raise ConfigError("val_set_size", val_set_size, "must be a count, or a fraction between 0 and 1")
    count = round(rows * val_set_size) if 0 < val_set_size < 1 else int(val_set_size)
    if val_set_size and not 0 < count < rows:
        raise ConfigError(
            "val_set_size", val_set_size, f"holds out {count} of {rows} rows; leave some on both sides"
        )
    order = np.random.default_rng([seed, 17]).permutation(rows)
    return np.sort(order[count:]), np.sort(order[:count])
