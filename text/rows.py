"""Reads rows from JSONL, JSON, Parquet and text files, hub data sets and generated tasks. Every row, and
every error, has its file and line.
"""

import functools
import itertools
import json
import re
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml

from run.config import ConfigError, DataError, expanded
from run.log import log
from text.tokenizer import read_text


@dataclass
class Row:
    file: str
    line: int
    value: dict


def _read_jsonl(path: Path) -> Iterator[Row | DataError]:
    try:
        with path.open("rb") as file:
            for number, line in enumerate(file, 1):
                if not line.strip():
                    continue
                try:
                    value = json.loads(line)
                except (ValueError, RecursionError) as error:
                    yield DataError(str(path), number, f"is not valid JSON ({error})")
                    continue
                if isinstance(value, dict):
                    yield Row(str(path), number, value)
                else:
                    yield DataError(str(path), number, "must be a JSON object")
    except OSError as error:
        raise DataError(str(path), None, f"cannot be read ({error.strerror})") from None


# Columns of a row that hold lists: an object with one of them is a row, not a wrapper around rows
LIST_COLUMNS = {"messages", "conversations", "prompt", "completion", "input_ids", "labels", "tools"}


def _read_json(path: Path) -> Iterator[Row | DataError]:
    try:
        values = json.loads(read_text(path))
    except (ValueError, RecursionError) as error:
        if isinstance(error, json.JSONDecodeError) and error.msg == "Extra data":  # JSON lines
            yield from _read_jsonl(path)
            return
        raise DataError(str(path), getattr(error, "lineno", None), f"is not valid JSON ({error})") from None
    if isinstance(values, dict):
        lists = {key: v for key, v in values.items() if isinstance(v, list)}
        if lists.keys() & LIST_COLUMNS:
            values = [values]
        elif len(lists) == 1:
            (values,) = lists.values()
    if not isinstance(values, list):
        raise DataError(
            str(path), None, "must hold a JSON list of objects", "or use .jsonl with one object per line"
        )
    for number, value in enumerate(values, 1):
        good = isinstance(value, dict)
        yield Row(str(path), number, value) if good else DataError(str(path), number, "must be a JSON object")


def _without_gaps(row: dict) -> dict:
    """A row of a columnar file without the nulls inside its columns: there every object has the fields of all
    others, so that a null stands for a field that the object does not have."""

    def inner(value: Any) -> Any:
        if isinstance(value, dict):
            return {k: inner(v) for k, v in value.items() if v is not None}
        return [inner(item) for item in value] if isinstance(value, list) else value

    return {name: inner(value) for name, value in row.items()}


def _read_parquet(path: Path) -> Iterator[Row | DataError]:
    import pyarrow  # slow to import; most data is JSONL
    import pyarrow.parquet

    try:
        number = 0
        for batch in pyarrow.parquet.ParquetFile(path).iter_batches(1024):
            for value in batch.to_pylist():
                number += 1
                yield Row(str(path), number, _without_gaps(value))
    except (pyarrow.ArrowException, OSError, ValueError, OverflowError) as error:
        raise DataError(str(path), None, f"cannot be read as Parquet ({error})") from None


def _read_arrow(path: Path) -> Iterator[Row | DataError]:
    """A file of the datasets library's save_to_disk: Arrow's stream format, or its file format."""
    import pyarrow  # slow to import; most data is JSONL

    def batches() -> Iterator[Any]:
        with pyarrow.memory_map(str(path)) as source:
            try:
                yield from pyarrow.ipc.open_stream(source)
            except pyarrow.ArrowInvalid:
                file = pyarrow.ipc.open_file(source)
                yield from (file.get_batch(i) for i in range(file.num_record_batches))

    try:
        number = 0
        for batch in batches():
            batch.validate(full=True)  # offsets of a damaged file would be followed out of it
            for row in batch.to_pylist():
                number += 1
                yield Row(str(path), number, _without_gaps(row))
    except (pyarrow.ArrowException, OSError, ValueError, OverflowError) as error:
        raise DataError(str(path), None, f"cannot be read as Arrow ({error})") from None


READERS = {
    ".jsonl": _read_jsonl, ".ndjson": _read_jsonl, ".json": _read_json, ".parquet": _read_parquet,
    ".arrow": _read_arrow,
}
# What lies beside data and is none
METADATA = {
    "dataset_info.json", "dataset_infos.json", "dataset_dict.json", "state.json", "config.json",
    "metadata.json",
}
# Data that no reader here knows: named where it lies beside data that is read
OTHER_DATA = {
    ".csv", ".tsv", ".gz", ".bz2", ".xz", ".zst", ".zip", ".tar", ".feather", ".xlsx", ".pkl", ".txt",
}

# The words by which people name the files of a split; a word may end in one of SPLIT_ENDINGS
SPLITS = {
    "train": ("train", "training", "trn"),
    "validation": ("validation", "valid", "val", "dev"),
    "test": ("test", "testing", "tst", "eval", "evaluation", "heldout", "holdout"),
}
HELD_OUT = "held_out"  # of test_datasets without a split: test, else validation, else files of no split
SPLIT_ENDINGS = ("", "s", "set", "sets", "data", "dataset", "split", "file", "rows", "samples", "examples")
_SPLIT_OF = {
    name + ending: split for split, names in SPLITS.items() for name in names for ending in SPLIT_ENDINGS
}


def _words(name: str) -> list[str]:
    """trainData_v2 → train, data, v."""
    return [word.lower() for word in re.findall(r"[A-Z]?[a-z]+|[A-Z]+(?![a-z])", name)]


def split_of(path: Path) -> str | None:
    """The split that the name of a file, else of its nearest folder, stands for; None if there is none. `?`
    if a name is ambiguous (train_test.jsonl, mytest.jsonl)."""
    for name in (path.name.split(".")[0], *reversed(path.parts[:-1])):
        words = _words(name)
        joined = ["".join(pair) for pair in itertools.pairwise(words)]  # held_out
        named = {_SPLIT_OF[word] for word in (*words, *joined) if word in _SPLIT_OF}
        if len(named) == 1:
            return named.pop()
        if named or any(re.search("^(train|test|valid)|(train|test|valid|eval)$", word) for word in words):
            return "?"
    return None


def _is_copy(path: Path, all_paths: set[Path]) -> bool:
    """Whether a file's name says that it is a copy of another that is there."""
    marks = r"(?i)^copy of | copy( \d+)?$| ?\(\d+\)$|[-_. ](copy|backup|bak|old|orig|checkpoint)$"
    stem = re.sub(marks, "", path.stem)
    return stem != path.stem and path.with_name(stem + path.suffix) in all_paths


@functools.cache
def _say_once(line: str) -> None:
    log.warning("data: %s", line)


def _files_of_split(local: Path, name: str, kind: str | None) -> list[Path]:
    """The files below `local` that hold a split; train if `name` is empty. Hidden folders, copies and files
    of other splits are left out. DataError if the names do not tell which files are meant."""
    endings = set(READERS) | ({".txt", ".md", ".py"} if kind == "text" else set())
    paths = [path for path in sorted(local.rglob("*")) if path.is_file()]
    hidden = (".", "__MACOSX", "cache-")
    shown = [p for p in paths if not any(part.startswith(hidden) for part in p.relative_to(local).parts)]
    files = [p for p in shown if p.suffix in endings and p.name not in METADATA]
    copies = [p for p in files if _is_copy(p, set(files))]
    files = [p for p in files if p not in copies]
    if not files:
        raise DataError(str(local), None, f"no {', '.join(sorted(endings))} file in this directory")
    splits = {path: split_of(path.relative_to(local)) for path in files}
    wanted = _SPLIT_OF.get(name.lower(), name) if name else "train"
    if name == HELD_OUT:
        wanted = next((split for split in ("test", "validation") if split in splits.values()), None)
        chosen = [path for path in files if splits[path] == wanted]
    elif name and wanted not in SPLITS:
        word = re.compile(rf"(^|[^a-z]){re.escape(name)}([^a-z]|$)", re.IGNORECASE)
        chosen = [path for path in files if word.search(str(path.relative_to(local)))]
    else:
        chosen = [path for path in files if splits[path] == wanted]
    label = "held-out" if name == HELD_OUT else wanted
    unclear = [path for path in files if splits[path] == "?"]
    if not chosen and unclear and len(files) > 1:
        problem = f"its files {[p.name for p in files][:5]} do not tell which of them are its {label} split"
        raise DataError(str(local), None, problem, "give path the file itself")
    if not chosen and name and name != HELD_OUT:
        there = [p.name for p in files][:5]
        raise DataError(str(local), None, f"no file of split {name!r}", f"there are {there}")
    if not chosen:  # no name of a split: all of it, but for what other splits hold
        chosen = [path for path in files if splits[path] is None] or (files if len(files) == 1 else [])
    if not chosen:
        raise DataError(
            str(local), None, f"no file is of the {label} split, there are {[p.name for p in files][:5]}",
            "set split, or give path the file itself",
        )
    if copies:
        _say_once(f"{local}: left out as copies: {', '.join(p.name for p in copies[:5])}")
    others = [p.name for p in shown if p.suffix in OTHER_DATA - endings]
    if others:
        _say_once(f"{local}: not read, for their ending: {', '.join(others[:5])}")
    return chosen


def _reasoning_gym(spec: dict, name: str) -> Iterator[Row | DataError]:
    try:
        import reasoning_gym  # optional dependency: .[tiny]
    except ImportError:
        raise ConfigError("datasets", spec["path"], "needs the package: pip install -e '.[tiny]'") from None
    try:
        rows = reasoning_gym.create_dataset(
            name,
            size=int(spec.get("size", 1000)),
            seed=int(spec.get("seed", 0)),
            **(spec.get("params") or {}),
        )
    except (ValueError, TypeError, AssertionError) as error:
        raise ConfigError("datasets", spec["path"], f"reasoning-gym says: {error}") from None
    for number, row in enumerate(rows, 1):
        instruct = {"instruction": row["question"], "output": row["answer"]}
        yield Row(spec["path"], number, {**row, **instruct})


DATASET_KEYS = {"path", "name", "type", "weight", "split", "columns", "system", "size", "seed", "params"}


def _files_of_card(folder: Path, subset: str | None, split: str) -> list[Path] | None:
    """The files that the card of a hub data set (README.md) names for a subset and a split; None where it
    names none. The card is YAML between two lines of ---, with configs: [{config_name, data_files}]."""
    card = folder / "README.md"
    head = re.match(r"---\r?\n(.*?)\n---", read_text(card), re.DOTALL) if card.is_file() else None
    try:
        entries = (yaml.safe_load(head.group(1)) or {}).get("configs") if head else None
    except (yaml.YAMLError, AttributeError):
        entries = None
    listed = entries if isinstance(entries, list) else []
    entries = [e for e in listed if isinstance(e, dict) and (e.get("data_files") or e.get("data_dir"))]
    names = [str(entry.get("config_name")) for entry in entries]
    if subset is None and len(entries) > 1:
        usual = [str(e.get("config_name")) for e in entries if e.get("default")] or ["default"]
        if usual[0] not in names:
            raise ConfigError("datasets", str(folder), f"has subsets: set name to one of {', '.join(names)}")
        subset = usual[0]
    if subset == "default" and subset not in names and not (folder / subset).is_dir():
        subset = None  # the hub's name for a data set without subsets
    entry = next((e for e in entries if subset in (None, str(e.get("config_name")))), None)
    if entry is None:
        if subset is not None and not (folder / subset).is_dir():
            known = ", ".join(names) or ", ".join(sorted(p.name for p in folder.iterdir() if p.is_dir()))
            raise ConfigError("datasets", subset, f"is not a subset of {folder}; there are {known or 'none'}")
        return None
    if not entry.get("data_files"):
        return _files_of_split(folder / str(entry["data_dir"]), split, None)
    given = entry["data_files"]
    patterns: dict[str, list[str]] = {}
    for one in given if isinstance(given, list) else [given]:
        part, path = (one.get("split", "train"), one.get("path")) if isinstance(one, dict) else ("train", one)
        patterns.setdefault(str(part), []).extend(path if isinstance(path, list) else [str(path)])
    if split == HELD_OUT:
        split = next((name for name in ("test", "validation") if name in patterns), split)
    if split not in patterns:
        raise ConfigError("datasets", split, f"is not a split of {folder}; there are {', '.join(patterns)}")
    if outside := [p for p in patterns[split] if Path(p).is_absolute() or ".." in Path(p).parts]:
        raise DataError(str(card), None, f"names files outside of its folder ({outside[0]})")
    files = sorted({file for pattern in patterns[split] for file in folder.glob(pattern) if file.is_file()})
    if not files:
        raise DataError(str(card), None, f"names {patterns[split]} for split {split}; there is no such file")
    return files


def locate(spec: dict, directory: Path) -> tuple[list[Path], str | None]:
    """The files of a dataset, and the slice of rows to take."""
    path, split = spec["path"], str(spec.get("split") or "")
    matched = re.fullmatch(r"([\w.\-]*)(?:\[(.*)\])?", split)
    if not matched:
        raise ConfigError("datasets", split, "is not a split; write train, test[:100] or train[10%:]")
    name, rows, subset = matched.group(1), matched.group(2), spec.get("name")
    if subset is not None and not isinstance(subset, str):
        raise ConfigError("datasets", subset, "name must be text: a subset of the data set")
    if path.startswith("hf://datasets/"):
        from huggingface_hub import snapshot_download  # slow to import; most data is on this disk
        from huggingface_hub.errors import HfHubHTTPError, LocalEntryNotFoundError

        parts = path.removeprefix("hf://datasets/").split("/")
        owner, _, revision = parts[1].partition("@") if len(parts) > 1 else ("", "", "")
        if not owner:
            raise ConfigError("datasets", path, "write hf://datasets/owner/name")
        try:
            local = Path(
                snapshot_download(
                    f"{parts[0]}/{owner}", repo_type="dataset", revision=revision or None,
                    allow_patterns=["README.md", *("*" + ending for ending in (*READERS, ".txt"))],
                )
            ).joinpath(*parts[2:])
        except (HfHubHTTPError, LocalEntryNotFoundError, OSError, ValueError) as error:
            reason = str(error).strip().splitlines()[0]
            raise DataError(path, None, f"could not be downloaded from the hub: {reason}") from None
    else:
        local = expanded(path)
        if not local.is_absolute():
            local = next(
                (p for p in (directory / local, Path.cwd() / local) if p.exists()), directory / local
            )
    if local.is_file():
        return [local], rows
    if not local.is_dir():
        raise DataError(path, None, "no such file or directory", f"looked in {directory} and {Path.cwd()}")
    if files := _files_of_card(local, subset, name or "train"):
        return files, rows
    local = local / subset if subset and (local / subset).is_dir() else local
    return _files_of_split(local, name, spec.get("type")), rows


def read_rows(spec: dict, directory: Path) -> Iterator[Row | DataError]:
    """The rows of one entry of `datasets`, in order; a row that cannot be parsed is yielded as a
    DataError."""
    unknown = set(spec) - DATASET_KEYS
    if unknown:
        raise ConfigError(
            "datasets", sorted(unknown)[0], f"is not a key of a dataset; known: {sorted(DATASET_KEYS)}"
        )
    if not isinstance(spec.get("path"), str):
        raise ConfigError("datasets", spec, "each entry needs a path")
    if spec["path"].startswith("reasoning-gym:"):
        rows, cut = list(_reasoning_gym(spec, spec["path"].split(":", 1)[1])), None
    else:
        files, cut = locate(spec, directory)

        def read() -> Iterator[Row | DataError]:
            for file in files:
                reader = READERS.get(file.suffix)
                if reader is not None:
                    yield from reader(file)
                elif spec.get("type") == "text":
                    yield Row(str(file), 1, {"text": read_text(file)})
                else:
                    raise DataError(
                        str(file), None, "has an unknown file extension", f"known: {sorted(READERS)}"
                    )

        if not cut:
            yield from read()
            return
        rows = list(read())
    if cut:
        ends = []
        if cut.count(":") > 1:
            raise ConfigError("datasets", spec["split"], "is not a slice; write [:100] or [10%:]")
        for text, default in zip([*cut.split(":"), ""][:2], (0, len(rows)), strict=True):
            number = re.fullmatch(r"(-?\d+)(%?)", text.strip()) if text.strip() else None
            if text.strip() and not number:
                raise ConfigError("datasets", spec["split"], "is not a slice; write [:100] or [10%:]")
            value = int(number.group(1)) if number else default
            ends.append(round(len(rows) * value / 100) if number and number.group(2) else value)
        rows = rows[ends[0] : ends[1]]
    yield from rows
