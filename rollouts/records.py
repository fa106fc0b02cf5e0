"""Files of rollouts: what a run records (rollouts/step-N.jsonl, or .parquet for large batches), what its
checkpoints keep, and the replay of a recorded file.
"""

import copy
import hashlib
import itertools
import json
import math
from collections.abc import Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np

from rollouts.rollout import ARRAYS, OF_TRAINER, Rollout, tokens_of
from rollouts.tokens import same_ids
from run.config import ConfigError, DataError
from run.files import write_atomically
from text.tokenizer import Tokenizer

COMPACT = 2**20  # tokens above which a batch is recorded as Parquet: JSON has about 25 bytes a token

# ------------------------------------------------------------------------------------------------------------
# JSON and Parquet
# ------------------------------------------------------------------------------------------------------------


def _jsonable(value: Any) -> Any:
    if not isinstance(value, np.ndarray):
        return value
    if value.dtype == bool:
        return value.astype(int).tolist()
    if value.dtype == np.float32 and np.isnan(value).any():
        return [None if math.isnan(x) else x for x in value.tolist()]
    return value.tolist()


def to_json(rollout: Rollout) -> dict[str, Any]:
    """JSON without unset fields and without values that the trainer computed from its current weights."""
    return {k: _jsonable(v) for k, v in vars(rollout).items() if v is not None and k not in OF_TRAINER}


def to_table(rollouts: Sequence[Rollout], leave_out: Sequence[str] = ()) -> Any:
    """A pyarrow.Table with a row for each rollout: lists of numbers, null where a field is unset; rewards by
    name."""
    import pyarrow as pa  # slow to import; only needed here

    columns: dict[str, Any] = {}
    for name in vars(rollouts[0]):
        values = [getattr(r, name) for r in rollouts]
        present = next((v for v in values if v is not None), None)
        if name in leave_out or present is None:
            continue
        if name in ARRAYS:
            missing = np.array([v is None for v in values])
            arrays = [present[:0] if v is None else v for v in values]
            ends = np.cumsum([0, *map(len, arrays)], dtype=np.int32)
            flat = pa.array(np.concatenate(arrays))
            columns[name] = pa.ListArray.from_arrays(pa.array(ends), flat, mask=pa.array(missing))
        elif name == "messages":  # each may have other fields
            columns[name] = pa.array([None if v is None else json.dumps(v) for v in values])
        elif name != "rewards" or any(values):  # Parquet has no struct without a field
            columns[name] = pa.array(values)
    return pa.table(columns)


def from_table(table: Any) -> list[Rollout]:
    """The rollouts of `to_table`; completions of the same prompt share one array of it."""
    fields: dict[str, list[Any]] = {}
    for name in table.column_names:
        column = table[name].combine_chunks()
        if name in ARRAYS:
            flat, ends = column.values.to_numpy(zero_copy_only=False), column.offsets.to_numpy()
            known = column.is_valid().to_numpy(zero_copy_only=False)
            fields[name] = [flat[ends[k] : ends[k + 1]] if ok else None for k, ok in enumerate(known)]
        elif name == "messages":
            fields[name] = [None if v is None else json.loads(v) for v in column.to_pylist()]
        else:
            fields[name] = [{} if v is None else v for v in column.to_pylist()]
    rollouts = [Rollout(**dict(zip(fields, row, strict=True))) for row in zip(*fields.values(), strict=True)]
    for one, other in itertools.pairwise(rollouts):
        if same_ids(one.prompt_ids, other.prompt_ids):
            other.prompt_ids = one.prompt_ids
    return rollouts


def as_parquet(rollouts: Sequence[Rollout], leave_out: Sequence[str] = ()) -> bytes:
    """Rollouts as the bytes of a Parquet file, which holds every value exactly; none: no bytes."""
    if not rollouts:
        return b""
    import pyarrow as pa  # slow to import; only needed here
    import pyarrow.parquet as pq

    sink = pa.BufferOutputStream()
    pq.write_table(to_table(rollouts, leave_out), sink, compression="zstd")
    return sink.getvalue().to_pybytes()


def kept(folder: Path | None, name: str, state: dict) -> list[Rollout]:
    """The rollouts that a checkpoint keeps under a name; up to version 0.2 they were in its JSON state."""
    old = [Rollout(**row) for row in state.pop(name, None) or []]
    file = folder / f"{name}.parquet" if folder is not None else None
    if file is None or not file.exists() or not file.stat().st_size:
        return old
    import pyarrow.parquet as pq  # slow to import; only needed here

    return from_table(pq.ParquetFile(file).read())


# ------------------------------------------------------------------------------------------------------------
# What a run records
# ------------------------------------------------------------------------------------------------------------


def write_rollouts(
    directory: Path, step: int, rollouts: Sequence[Rollout], tokenizer: Tokenizer, kind: str = "step"
) -> None:
    """directory/step-N.jsonl, one completion per line, those of a prompt in a row; above COMPACT tokens
    step-N.parquet, with the same fields but the texts. The replay engine reads both."""
    directory.mkdir(parents=True, exist_ok=True)
    if tokens_of(rollouts) > COMPACT:
        return write_atomically(directory / f"{kind}-{step}.parquet", as_parquet(rollouts, OF_TRAINER))
    prompts = tokenizer.decode_all([r.prompt_ids for r in rollouts], special=True)
    completions = tokenizer.decode_all([r.completion_ids for r in rollouts], special=True)
    lines = [
        json.dumps({**to_json(r), "prompt": prompt, "completion": completion}, ensure_ascii=False) + "\n"
        for r, prompt, completion in zip(rollouts, prompts, completions, strict=True)
    ]
    write_atomically(directory / f"{kind}-{step}.jsonl", "".join(lines))


class Recorder:
    """Records rollouts on a thread of its own, one batch at a time; on rank 0 alone."""

    def __init__(self, directory: Path, tokenizer: Tokenizer, main: bool):
        self.directory, self.tokenizer = directory, tokenizer
        self._thread = ThreadPoolExecutor(1, thread_name_prefix="record") if main else None
        self._pending: Future | None = None

    def write(self, step: int, rollouts: Sequence[Rollout], kind: str = "step") -> None:
        """Begin to write a batch. Raises what went wrong with the one before."""
        self.finish()
        if self._thread is not None:
            as_now = [copy.copy(r) for r in rollouts]
            self._pending = self._thread.submit(
                write_rollouts, self.directory, step, as_now, self.tokenizer, kind
            )

    def finish(self) -> None:
        """Wait until everything is on disk; its error is raised here."""
        pending, self._pending = self._pending, None
        if pending is not None:
            pending.result()


# ------------------------------------------------------------------------------------------------------------
# Replay
# ------------------------------------------------------------------------------------------------------------


def replay_files(path: str, directory: Path) -> list[Path]:
    """A recorded file, or every step-N of a directory in order."""
    source = next((p for p in (directory / path, Path(path)) if p.exists()), None)
    if source is None:
        raise ConfigError("replay_path", path, f"does not exist (looked in {directory} and here)")
    if not source.is_dir():
        return [source]
    steps = [p for p in source.glob("step-*") if p.suffix in (".jsonl", ".parquet")]
    steps = [p for p in steps if p.stem.removeprefix("step-").isdigit()]
    return sorted(steps, key=lambda p: int(p.stem.removeprefix("step-")))


def replay_lines(path: str, directory: Path) -> Iterator[tuple[str, int, str]]:
    """(file, number, line) of the JSONL files of a replay."""
    for file in replay_files(path, directory):
        yield from lines_of(file)


def lines_of(file: Path) -> Iterator[tuple[str, int, str]]:
    """(file, number, line) of a JSONL file. Raises DataError where it is not text."""
    number = 0
    try:
        with file.open(encoding="utf-8") as lines:
            for number, line in enumerate(lines, 1):
                if line.strip():
                    yield str(file), number, line
    except UnicodeDecodeError:
        raise DataError(str(file), number + 1, "is not UTF-8 text (here or a few lines later)") from None


def place_of(rollout: Rollout) -> tuple[str, int]:
    file, _, line = rollout.row.rpartition(":")
    return file, int(line)


def read_rollout(line: str, file: str, number: int, stops: set[int]) -> Rollout:
    """A line of a recorded file. Raises DataError that names it."""
    try:
        row = json.loads(line)
    except (ValueError, RecursionError) as error:
        raise DataError(file, number, f"is not JSON ({error})") from None
    if not isinstance(row, dict):
        raise DataError(file, number, "must be an object")
    return from_fields(row, file, number, stops)


def from_fields(row: dict[str, Any], file: str, number: int, stops: set[int]) -> Rollout:
    """A rollout from the recorded fields of row `number`. Raises DataError that names it."""

    def whole(values: Any) -> bool:
        return isinstance(values, list) and bool(values) and (
            all(type(v) is int and 0 <= v < 2**31 for v in values)
        )

    def figure(value: Any) -> bool:
        return value is None or (type(value) in (int, float) and math.isfinite(value))

    for name in ("prompt_ids", "completion_ids"):
        if not whole(row.get(name)):
            raise DataError(file, number, f"{name} must be a non-empty list of token ids")
    length = len(row["completion_ids"])
    logprobs, mask, truth, truth_mask = (
        row.get(k) for k in ("sampling_logprobs", "completion_mask", "ground_truth_ids", "ground_truth_mask")
    )
    if logprobs is not None:
        if not isinstance(logprobs, list) or len(logprobs) != length:
            raise DataError(
                file, number, f"sampling_logprobs must have {length} entries, one per completion token"
            )
        if not all(figure(x) for x in logprobs):
            raise DataError(file, number, "sampling_logprobs holds something that is not a number")
    if truth is not None and not whole(truth):
        raise DataError(file, number, "ground_truth_ids must be a non-empty list of token ids")
    for name, given, count in (
        ("completion_mask", mask, length), ("ground_truth_mask", truth_mask, len(truth or [])),
    ):
        if given is None:
            continue
        if not isinstance(given, list) or len(given) != count or not all(x in (0, 1) for x in given):
            raise DataError(file, number, f"{name} must have {count} entries of 0 or 1")
    ends, earned = row.get("step_ends"), row.get("step_rewards")
    if ends is not None or earned is not None:
        if not isinstance(ends, list) or not all(type(x) is int and 1 <= x <= length for x in ends):
            raise DataError(file, number, f"step_ends must be a list of numbers from 1 to {length}")
        if not isinstance(earned, list) or len(earned) != len(ends) or not all(
            x is not None and figure(x) for x in earned
        ):
            raise DataError(file, number, f"step_rewards must have {len(ends)} numbers, one for each step")
    versions = row.get("token_versions")
    if versions is not None and not (isinstance(versions, list) and len(versions) == length and all(
        type(x) is int and 0 <= x < 2**31 for x in versions
    )):
        raise DataError(file, number, f"token_versions must be {length} whole numbers, one for each token")
    rewards = row.get("rewards", {})
    if not isinstance(rewards, dict) or not all(figure(value) for value in rewards.values()):
        raise DataError(file, number, "rewards must be {name: number or null}")
    steps = [row.get("step", 0), row.get("weight_version", row.get("step", 0))]
    if not all(type(x) is int and abs(x) < 2**63 for x in steps):
        raise DataError(file, number, "step and weight_version must be whole numbers")
    last = row["completion_ids"][-1]
    arrays: dict[str, Any] = {k: row.get(k) for k in ARRAYS if k not in OF_TRAINER}
    return Rollout(
        **arrays,
        truncated=bool(row.get("truncated", last not in stops)),
        rewards={str(k): None if v is None else float(v) for k, v in rewards.items()},
        step=steps[0], weight_version=steps[1],
        row=f"{file}:{number}",
    )


def read_recorded(file: Path, stops: set[int]) -> Iterator[Rollout]:
    """The rollouts of a recorded file. Raises DataError that names the file and the line or row."""
    if file.suffix != ".parquet":
        for name, number, line in lines_of(file):
            yield read_rollout(line, name, number, stops)
        return
    import pyarrow as pa  # slow to import; only needed here
    import pyarrow.parquet as pq

    number = 0
    try:
        for batch in pq.ParquetFile(file).iter_batches(64):
            for row in batch.to_pylist():
                number += 1
                row = {k: v for k, v in row.items() if v is not None}
                if isinstance(known := row.get("sampling_logprobs"), list):
                    row["sampling_logprobs"] = [None if x is None or math.isnan(x) else x for x in known]
                yield from_fields(row, str(file), number, stops)
    except (pa.ArrowException, OSError) as error:
        raise DataError(str(file), number + 1, f"cannot be read as Parquet ({error})") from None


class ReplayEngine:
    """Rollouts from files, recorded by a run or sampled by another implementation."""

    def __init__(self, path: str, directory: Path, options: Any, tokenizer: Tokenizer):
        stops, n = set(tokenizer.stop_ids), options.num_generations
        self.rollouts = [r for file in replay_files(path, directory) for r in read_recorded(file, stops)]
        for begin in range(0, len(self.rollouts), n):
            group = self.rollouts[begin : begin + n]
            if len(group) < n or any(not same_ids(r.prompt_ids, group[0].prompt_ids) for r in group):
                raise DataError(
                    *place_of(group[-1]), f"the {n} completions of a prompt must be adjacent",
                    "set num_generations to what the file was made with",
                )
            for rollout in group:
                rollout.prompt_ids = group[0].prompt_ids
        if not self.rollouts:
            raise ConfigError("replay_path", path, "holds no rollout")

    @property
    def fingerprint(self) -> str:
        ids = [r.completion_ids.tolist() for r in self.rollouts]  # as in version 0.2
        return hashlib.sha256(repr(ids).encode()).hexdigest()

    def batch(self, number: int, size: int) -> list[Rollout]:
        return self.rollouts[number * size : (number + 1) * size]
