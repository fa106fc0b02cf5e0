"""Prints what training would see of a data set and names its faults: python data.py inspect."""

import hashlib
import itertools
import json
import random
import sys
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from data import (
    RowOptions,
    ScratchOptions,
    encode_dataset,
    load_tokenizer,
    trained_tokenizer,
    what_is_left_out,
)
from run.config import ConfigError, parse_config, resolve_checkpoint
from run.terminal import has_colour
from text.packing import Dataset, Encoded, pack
from text.tokenizer import IGNORE, Tokenizer


@dataclass
class InspectOptions(RowOptions, ScratchOptions):
    base_model: str = ""
    """Checkpoint whose tokenizer and vocabulary are used."""
    base_model_revision: str | None = None
    """Branch, tag or commit of a hub checkpoint."""
    output_dir: str = "outputs"
    """Where a trained tokenizer is kept."""
    sample_packing: bool = False
    """Say how full packs would be."""
    samples: int = 3
    """How many samples to show."""


def inspect(argv: list[str]) -> int:
    as_json = "--json" in argv
    options = parse_config(
        InspectOptions, [a for a in argv if a != "--json"], ignore_unknown=True,
        description="Show what training would see. --json prints one object per row.",
    )
    directory = Path(options.config_directory)
    if not options.base_model:
        raise ConfigError("base_model", None, "must be set: a directory or a hub id")
    checkpoint = resolve_checkpoint(options.base_model, options.base_model_revision, directory)
    cache = Path(options.dataset_prepared_path or Path(options.output_dir) / "prepared")
    if options.tokenizer_vocab_size is None:
        tokenizer = load_tokenizer(checkpoint, options, directory)
    else:
        tokenizer = trained_tokenizer(options, directory, cache)
    if as_json:
        for spec in options.datasets:
            for row in encode_dataset(spec, tokenizer, options, directory):
                print(json.dumps(row.__dict__))
        return 0
    options.on_bad_row = "skip"  # here the faults are the point
    rows, answers = [], []
    for spec in options.datasets:
        encoded = list(encode_dataset(spec, tokenizer, options, directory))
        rows += encoded
        answers += encoded if spec.get("type") not in ("text", "tokens") else []
    config = checkpoint / "config.json"
    vocab_size = json.loads(config.read_text()).get("vocab_size") if config.exists() else None
    if options.tokenizer_vocab_size is not None:
        vocab_size = tokenizer.vocab_size
    return _report(rows, answers, tokenizer, vocab_size, options)


def turns_without_end(row: Encoded, stop_ids: set[int]) -> int:
    """Number of trained spans of a row (one per answer) that do not end with a stop token (white space may
    follow it in a template's generation block)."""
    open_turns, stretch = 0, []
    for token, label in zip([*row.input_ids, -1], [*row.labels, IGNORE], strict=True):
        if label != IGNORE:
            stretch.append(token)
        elif stretch:
            open_turns += not stop_ids.intersection(stretch[-3:])
            stretch = []
    return open_turns


def _report(
    rows: list[Encoded],
    answers: list[Encoded],
    tokenizer: Tokenizer,
    vocab_size: int | None,
    options: InspectOptions,
) -> int:
    used = [row for row in rows if row.status in ("kept", "truncated")]
    colour = has_colour(sys.stdout)
    on, off = ("\x1b[32m", "\x1b[0m") if colour else ("⟦", "⟧")
    for row in random.Random(0).sample(used, min(options.samples, len(used))):
        print(
            f"── {row.file}:{row.line}  {len(row.input_ids)} tokens, trained: {'green' if colour else '⟦ ⟧'}"
        )
        pieces, begin = [], 0
        flags = [label != IGNORE for label in row.labels]
        for i in range(1, len(flags) + 1):
            if i == len(flags) or flags[i] != flags[begin]:
                text = tokenizer.decode(row.input_ids[begin:i], special=True)
                pieces.append(f"{on}{text}{off}" if flags[begin] else text)
                begin = i
        print("".join(pieces).rstrip("\n"), end="\n\n")
    total = len(rows)
    if not total:
        print("warning: no rows")
        return 1

    lengths = np.array([len(row.input_ids) for row in used] or [0])
    trained = sum(sum(label != IGNORE for label in row.labels) for row in used)
    distinct = {hashlib.sha256(repr(row.input_ids).encode()).digest() for row in used}
    count = {
        s: sum(row.status == s for row in rows) for s in ("kept", "truncated", "dropped", "bad", "skipped")
    }
    no_token = [row for row in rows if row.status == "bad" and "no token is trained" in row.reason]
    empty = [
        row for row in rows if row.status == "bad" and ("empty" in row.reason or "non-empty" in row.reason)
    ]
    beyond = [row for row in used if vocab_size and row.input_ids and max(row.input_ids) >= vocab_size]
    share = trained / max(1, int(lengths.sum()))
    stops = set(tokenizer.stop_ids)
    without_end = {id(row): turns_without_end(row, stops) for row in answers if row.status == "kept"}
    endless = [row for row in answers if without_end.get(id(row))]

    edges = np.unique(np.linspace(0, max(int(lengths.max()), 1), 11).astype(int))
    print("length in tokens")
    for low, high in itertools.pairwise(edges):
        n = int(((lengths >= low) & ((lengths < high) | (high == edges[-1]))).sum())
        print(f"  {low:>7,}–{high:<7,} {n:>8,} {'█' * round(40 * n / max(1, len(used)))}")
    print(f"  mean {lengths.mean():.1f}, median {np.median(lengths):.0f}, longest {lengths.max():,}\n")
    lines = [
        ("rows", total, ""), ("used", len(used), ""), ("tokens", int(lengths.sum()), ""),
        ("trained tokens", trained, f"{share:.1%} of tokens"),
        ("truncated", count["truncated"], f"{count['truncated'] / total:.1%} of rows"),
        ("dropped as too long", count["dropped"], f"{count['dropped'] / total:.1%} of rows"),
        ("duplicates", len(used) - len(distinct), f"{(len(used) - len(distinct)) / total:.1%} of rows"),
        ("empty", len(empty), f"{len(empty) / total:.1%} of rows"),
        ("nothing trained", len(no_token), f"{len(no_token) / total:.1%} of rows"),
        ("bad", count["bad"], f"{count['bad'] / total:.1%} of rows"),
        ("ids out of range", len(beyond), f"vocabulary {vocab_size:,}" if vocab_size else ""),
    ]
    for label, number, note in lines:
        print(f"{label:<20} {number:>10,}  {note}".rstrip())
    if options.sample_packing and used:
        packs = pack(lengths.tolist(), options.sequence_len)
        print(
            f"{'packs':<20} {len(packs):>10,}  {lengths.sum() / (len(packs) * options.sequence_len):.1%} full"
        )
    print()

    def name(faulty: list[Encoded]) -> str:
        return f"{faulty[0].file}:{faulty[0].line}"

    warnings = []
    if beyond:
        warnings.append(
            f"{len(beyond)} rows have ids beyond the vocabulary ({name(beyond)}): another model's tokenizer?"
        )
    if used and share < 0.01:
        warnings.append(
            f"only {share:.2%} of the tokens are trained: is the loss mask right? (docs: Loss Plateau)"
        )
    prompted = any(spec.get("type") not in ("text", "tokens") for spec in options.datasets)
    if used and share > 0.999 and prompted and not options.train_on_inputs:
        warnings.append("every token is trained although the data has prompts: is the loss mask right?")
    if len(used) - len(distinct) > 0.01 * total:
        warnings.append(
            f"{len(used) - len(distinct)} rows repeat another: they count twice and hide overfitting"
        )
    too_long = count["truncated"] + count["dropped"]
    if too_long > 0.05 * total:
        warnings.append(
            f"{too_long} rows are longer than sequence_len ({options.sequence_len}): raise it or split them"
        )
    if endless:
        warnings.append(
            f"{sum(without_end.values())} answers in {len(endless)} rows do not end with a trained "
            f"stop token ({name(endless)}): the model may not learn to stop there"
        )
    warnings += what_is_left_out(Dataset.build((0, row) for row in rows).counts)
    if used and lengths.max() > 8 * np.median(lengths) and lengths.max() > 512:
        times = f"{lengths.max() / max(1, np.median(lengths)):.0f} times the median"
        warnings.append(
            f"the longest row is {times} ({name([used[int(lengths.argmax())]])}): it can cause a loss spike"
        )
    bad = [row for row in rows if row.status == "bad"]
    for row in bad[:10]:
        warnings.append(f"{row.file}:{row.line}: {row.reason}")
    if len(bad) > 10:
        warnings.append(f"… and {len(bad) - 10} more bad rows")
    for warning in warnings:
        print(f"warning: {warning}")
    if not warnings:
        print("no fault found")
    return 0
