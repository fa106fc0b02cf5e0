"""Measurements of the data before the first step, for the rules of health/: copies, overlap with the held-out
rows, order, ends, labels, and text that is none. Every figure is a share, computed on the encoded rows."""

import math
import re
from collections import Counter
from collections.abc import Sequence
from hashlib import blake2b
from typing import Any

import numpy as np

from text.packing import Batches, Dataset
from text.tokenizer import IGNORE, Tokenizer

ROWS = 200_000  # most rows that are hashed
TOKENS = 4_000_000  # most tokens that are counted
SAMPLE = 200  # rows that are decoded
PASSAGE = 24  # trained tokens in a row that two answers share by copying, hardly by chance
MANGLED = re.compile(r"Ã[\x80-\xbf¡-¿]|â€[\x80-\xbf™œ“”˜¦]|Â[\xa0-\xbf]|ï»¿")  # UTF-8 read as Latin-1
CONTROL = re.compile(r"[\x00-\x08\x0b\x0c\x0e-\x1f\x7f]")
ANSWERS = {"chat", "instruct", "prompt_completion"}


def digest(values: Any) -> bytes:
    return blake2b(np.ascontiguousarray(values).tobytes(), digest_size=8).digest()


def spearman(x: np.ndarray, y: np.ndarray) -> float:
    """Rank correlation; ties get their mean rank. 0 where one of the two is constant."""

    def ranks(values: np.ndarray) -> np.ndarray:
        _, inverse, counts = np.unique(values, return_inverse=True, return_counts=True)
        return (np.cumsum(counts) - (counts - 1) / 2)[inverse]

    a, b = ranks(np.asarray(x)), ranks(np.asarray(y))
    if a.std() == 0 or b.std() == 0:
        return 0.0
    return float(np.corrcoef(a, b)[0, 1])


def of_rows(
    dataset: Dataset, order: Batches, held_out: Dataset, held_out_rows: np.ndarray, tokenizer: Tokenizer,
    kinds: Sequence[str],
) -> dict[str, float]:
    """Measurements of the rows that are trained on, in their order, and of those held out. `kinds`: the type
    of each data set."""
    rows = np.asarray(order.rows)[:ROWS]
    if not len(rows):
        return {}
    found = {"data/rows": float(len(order.rows)), **_copies(dataset, rows)}
    found |= _overlap(dataset, rows, held_out, np.asarray(held_out_rows))
    found |= _order(dataset, order)
    found |= _labels(dataset, rows, tokenizer, kinds)
    found |= _text(dataset, rows, tokenizer, kinds) | _new_tokens(dataset, tokenizer)
    counts = dataset.counts
    kept = counts["kept"] + counts["truncated"]
    found["data/truncated"] = counts["truncated"] / max(1, kept)
    return found


def _copies(dataset: Dataset, rows: np.ndarray) -> dict[str, float]:
    """Shares of the trained tokens in copies of an earlier row, of those that chance does not explain, and in
    the row that occurs most often."""
    seen: Counter[bytes] = Counter()
    trained: dict[bytes, int] = {}
    copied = total = 0
    for row in rows:
        key, count = digest(dataset.row(row)[0]), dataset.trained_tokens(int(row))
        copied += count if seen[key] else 0
        seen[key] += 1
        trained[key] = trained.get(key, 0) + count
        total += count
    often = [key for key, times in seen.items() if times >= 10]
    most = max((trained[key] for key in often), default=0)
    copies = copied / max(1, total)
    found = {"data/duplicates": copies, "data/most_frequent_row": most / max(1, total)}
    # A set of which nearly every row is there many times is seen as often, however it came about.
    found["data/copied"] = copies if copies > 0.8 else min(copies, _not_by_chance([*seen.values()]))
    return found


def _not_by_chance(times: Sequence[int]) -> float:
    """Share of rows that are copies beyond what independent draws give, from how often each row occurs. Of
    any such draws, f_k, the number of rows that occur k times, has k!·f_k log-convex (a mixed Poisson law;
    Good and Toulmin, Biometrika 43, 1956): a file joined twice has pairs and neither singles nor triples."""
    counts = Counter(times)
    excess = 0.0
    for k, number in counts.items():
        if k > 1:
            likely = math.sqrt(counts[k - 1] * counts[k + 1] * (k + 1) / k)
            excess += (k - 1) * max(0.0, number - likely - 3 * math.sqrt(number))
    return excess / max(1, sum(times))


def _overlap(
    dataset: Dataset, rows: np.ndarray, held_out: Dataset, held_out_rows: np.ndarray
) -> dict[str, float]:
    """Share of held-out rows that are trained on too, beyond what short rows have in common by chance: twice
    the share of training rows that have a copy in the other half of them, and three standard errors."""
    if not len(held_out_rows):
        return {}
    found = {"data/held_out_rows": float(len(held_out_rows))}
    keys = [digest(dataset.row(row)[0]) for row in rows]
    known = set(keys)
    half = np.random.default_rng(0).permutation(len(keys))
    first = {keys[k] for k in half[: len(half) // 2]}
    by_chance = np.mean([keys[k] in first for k in half[len(half) // 2 :]] or [0.0])
    chosen = held_out_rows[:5000]
    both = np.mean([digest(held_out.row(row)[0]) in known for row in chosen])
    expected = min(1.0, 2 * by_chance)
    chance = 3 * np.sqrt(max(expected, 0.01) * (1 - min(expected, 0.99)) / len(chosen))
    found["data/held_out_in_training"] = max(0.0, float(both - expected - chance))
    passages = _passages(dataset, rows)
    shared = [
        np.isin(own, passages).mean() > 0.5
        for row in chosen[:500] if len(own := _hashes(_answer(held_out, row))) and digest(
            held_out.row(row)[0]) not in known
    ]
    if shared and len(passages):
        found["data/held_out_shared_text"] = float(np.mean(shared))
    return found


def _answer(dataset: Dataset, row: int) -> np.ndarray:
    tokens, labels = dataset.row(row)
    return tokens[labels != IGNORE]


def _hashes(tokens: np.ndarray) -> np.ndarray:
    """A hash of every PASSAGE tokens in a row."""
    if len(tokens) < PASSAGE:
        return np.zeros(0, np.uint64)
    powers = np.uint64(6364136223846793005) ** np.arange(PASSAGE, dtype=np.uint64)
    windows = np.lib.stride_tricks.sliding_window_view(tokens.astype(np.uint64), PASSAGE)
    return (windows * powers).sum(-1, dtype=np.uint64)


def _passages(dataset: Dataset, rows: np.ndarray) -> np.ndarray:
    """Hashes of the passages of the training answers that occur in one or two rows: those in many are of a
    form that all answers share."""
    budget, parts = TOKENS // 4, []
    for row in rows:
        hashes = np.unique(_hashes(_answer(dataset, int(row))))
        parts.append(hashes)
        budget -= len(hashes)
        if budget < 0:
            break
    every = np.concatenate(parts) if parts else np.zeros(0, np.uint64)
    hashes, counts = np.unique(every, return_counts=True)
    return hashes[counts <= 2]


def _order(dataset: Dataset, order: Batches) -> dict[str, float]:
    """Rank correlations of the first epoch's order with the rows' own order, their length, and their first
    trained token."""
    units = order.epoch(0)
    rows = np.array([row for unit in units for row in unit])[:ROWS]
    if len(rows) < 50:
        return {}
    places = np.arange(len(rows))
    some = np.linspace(0, len(rows) - 1, min(len(rows), 5000)).astype(int)
    first = [int(answer[0]) if len(answer := _answer(dataset, int(row))) else -1 for row in rows[some]]
    found = {"data/order": abs(spearman(rows, places))}
    # In best-fit packs the lengths of neighbours depend on each other: only whole units count.
    lengths = dataset.lengths[rows] if not order.capacity else None
    if lengths is not None:
        found["data/order_by_length"] = abs(spearman(lengths, places))
    found["data/order_by_start"] = abs(spearman(np.array(first), some))
    return found


def _labels(
    dataset: Dataset, rows: np.ndarray, tokenizer: Tokenizer, kinds: Sequence[str]
) -> dict[str, float]:
    """Labels that are other tokens than their inputs, answers without an end, and the entropy of the trained
    tokens' frequencies in nats."""
    tokens, labels = dataset.tokens[:TOKENS], dataset.labels[:TOKENS]
    trained = labels != IGNORE
    found = {}
    if trained.any():
        found["data/labels_differ"] = float((labels[trained] != tokens[trained]).mean())
        counts = np.bincount(labels[trained])
        shares = counts[counts > 0] / trained.sum()
        found["data/uniform_nats"] = float(np.log(tokenizer.vocab_size))
        found["data/unigram_nats"] = float(-(shares * np.log(shares)).sum())
    stops, open_ends, answers, copied, long = set(tokenizer.stop_ids), 0, 0, 0, 0
    for row in rows[:5000]:
        if kinds[int(dataset.source[row])] not in ANSWERS:
            continue
        answer = _answer(dataset, int(row))
        answers += 1
        open_ends += not stops.intersection(answer[-3:].tolist())  # white space may follow the end
        if len(answer) >= 12:
            long += 1
            whole, part = dataset.row(int(row))[0].tobytes(), answer[:-2].tobytes()
            copied += part in whole.replace(answer.tobytes(), b"")
    if answers:
        found["data/without_end"] = open_ends / answers
    if long >= 20:
        found["data/answer_in_prompt"] = copied / long
    return found


def _text(
    dataset: Dataset, rows: np.ndarray, tokenizer: Tokenizer, kinds: Sequence[str]
) -> dict[str, float]:
    """Share of a sample of rows whose text is broken; and of the ids of rows that came as ids, the share that
    encoding their text gives again."""
    some = np.random.default_rng(0).permutation(rows)[:SAMPLE]
    broken, again = [], []
    for row in some:
        tokens = dataset.row(int(row))[0]
        text = tokenizer.decode(tokens.tolist())
        wrong = len(CONTROL.findall(text)) + 2 * len(MANGLED.findall(text)) + text[1:-1].count("�")
        broken.append(wrong > max(1, 0.002 * len(text)) or "\x00" in text)
        if kinds[int(dataset.source[row])] == "tokens":
            plain = tokenizer.decode(tokens.tolist(), special=True)
            other = Counter(tokenizer.encode(plain))
            again.append(sum((Counter(tokens.tolist()) & other).values()) / max(1, len(tokens)))
    found = {"data/broken_text": float(np.mean(broken))}
    if again:
        found["data/tokens_kept"] = float(np.mean(again))
    return found


def _new_tokens(dataset: Dataset, tokenizer: Tokenizer) -> dict[str, float]:
    """Of the tokens that the config adds, the share that no row holds; and the share of all tokens whose row
    of the embedding was never trained."""
    counts = np.bincount(dataset.tokens[:TOKENS], minlength=tokenizer.vocab_size)
    untrained = counts[list(tokenizer.untrained_ids)].sum()
    found = {"data/untrained_tokens": float(untrained / max(1, counts.sum()))}
    expected = [i for i in tokenizer.new_ids if i != tokenizer.pad_id]
    if expected:
        found["data/new_tokens_unused"] = float((counts[expected] == 0).mean())
    return found


def of_prompts(
    prompts: Sequence[Any], held_out: Sequence[Any], order: Sequence[int], left_out: int, tokenizer: Tokenizer
) -> dict[str, float]:
    """Measurements of prompts: copies, overlap with those held out, the first epoch's order, and how many
    were left out or lost their beginning."""
    if not prompts:
        return {}
    found = {
        "data/rows": float(len(prompts)), "data/prompts_left_out": left_out / (left_out + len(prompts)),
    }
    keys = [digest(np.array(p.ids)) for p in prompts[:ROWS]]
    known = set(keys)
    if held_out:
        both = float(np.mean([digest(np.array(p.ids)) in known for p in held_out]))
        twins = 1 - len(known) / len(keys)
        found |= {"data/held_out_in_training": max(0.0, both - min(1.0, 2 * twins))}
        found["data/held_out_rows"] = float(len(held_out))
    if len(order) >= 50:
        found["data/order"] = abs(spearman(np.asarray(order), np.arange(len(order))))
    cut = []
    for prompt in prompts[:SAMPLE]:
        given = prompt.prompt if isinstance(prompt.prompt, str) else next(
            (m.get("content") for m in prompt.prompt if isinstance(m.get("content"), str)), "")
        start = "".join((given or "").split())[:24]
        text = "".join(tokenizer.decode(list(prompt.ids)).split())
        cut.append(bool(start) and start not in text)
    found["data/prompts_cut"] = float(np.mean(cut))
    untrained = set(tokenizer.untrained_ids)
    share = [len(untrained.intersection(p.ids)) / len(p.ids) for p in prompts[:SAMPLE] if p.ids]
    found["data/untrained_tokens"] = float(np.mean(share or [0.0]))
    return found
