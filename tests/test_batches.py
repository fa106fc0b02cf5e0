"""Packing, the order of training, micro-batches."""

import random

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from batches import Batches, Dataset, Encoded, pack, split_held_out
from config import ConfigError
from tokenizer import IGNORE


@settings(max_examples=200, deadline=None)
@given(st.lists(st.integers(1, 50), max_size=80))
def test_packing_is_best_fit_decreasing(lengths):
    packs = pack(lengths, 50)
    assert sorted(i for one in packs for i in one) == list(range(len(lengths)))
    bins = []  # the definition, in quadratic time
    for i in sorted(range(len(lengths)), key=lambda i: -lengths[i]):
        fits = [b for b in range(len(bins)) if bins[b] >= lengths[i]]
        if fits:
            best = min(fits, key=lambda b: bins[b])
            bins[best] -= lengths[i]
        else:
            bins.append(50 - lengths[i])
    assert sorted(50 - sum(lengths[i] for i in one) for one in packs) == sorted(bins)


def test_a_document_that_fits_no_pack_is_refused():
    with pytest.raises(ValueError, match="51"):
        pack([51], 50)


def make_dataset(lengths, sources=None):
    rng = random.Random(0)
    rows = []
    for n, length in enumerate(lengths):
        ids = [rng.randrange(3, 90) for _ in range(length)]
        labels = [IGNORE if rng.random() < 0.4 else i for i in ids]
        labels[-1] = ids[-1]
        rows.append((sources[n] if sources else 0, Encoded("f", n + 1, ids, labels)))
    return Dataset.build(iter(rows))


def make_batches(dataset, units=4, weights=(1.0,), seed=0, packing=False):
    return Batches(
        dataset, np.arange(len(dataset)), weights=list(weights), capacity=32 if packing else None,
        units_a_step=units,
        seed=seed, pad_id=0,
    )  # fmt: skip


@pytest.mark.parametrize("packing", [False, True])
@pytest.mark.parametrize("micro, world", [(1, 1), (4, 1), (1, 4), (2, 2), (1, 2), (3, 1)])
def test_every_row_is_seen_once_an_epoch_and_targets_are_the_next_labels(packing, micro, world):
    dataset = make_dataset([random.Random(i).randrange(2, 30) for i in range(53)])
    batches = make_batches(dataset, packing=packing)
    seen = []
    for step in range(batches.plan(1)):
        units = batches.units(step)
        trained = 0
        counts = set()
        for rank in range(world):
            mine = batches.micro_batches(units, micro, rank, world)
            counts.add(len(mine))
            for batch in mine:
                seen += batch.rows
                trained += int((batch.targets != IGNORE).sum())
                flat = []
                for b in range(batch.input_ids.shape[0]):
                    for document in range(int(batch.document_ids[b].max()) + 1):
                        here = batch.document_ids[b] == document
                        flat.append(
                            (batch.input_ids[b][here], batch.targets[b][here], batch.position_ids[b][here])
                        )
                for row, (ids, targets, positions) in zip(batch.rows, flat, strict=False):
                    tokens, labels = dataset.row(row)
                    assert ids.tolist() == tokens.tolist()
                    assert targets.tolist() == [*labels[1:].tolist(), IGNORE]
                    assert positions.tolist() == list(range(len(tokens)))
                assert (batch.targets[batch.document_ids < 0] == IGNORE).all()
        assert len(counts) == 1  # every rank runs as many micro-batches
        assert trained == batches.trained_tokens(units)
    assert sorted(seen) == list(range(53))


def test_the_order_is_a_function_of_seed_and_step():
    dataset = make_dataset([5] * 50)
    one, two, other = make_batches(dataset), make_batches(dataset), make_batches(dataset, seed=1)
    steps = [one.units(s) for s in range(40)]
    assert steps[37] == two.units(37)  # asked for out of order, epochs later
    assert steps != [other.units(s) for s in range(40)]
    flat = [i for step in steps for unit in step for i in unit]
    assert sorted(flat[:50]) == sorted(flat[50:100]) == list(range(50)) and flat[:50] != flat[50:100]
    assert [one.plan(e) for e in (1, 0.5, 2)] == [13, 7, 25]
    assert [one.epoch_of(s) for s in (0, 1, 13, 25, 26)] == pytest.approx([0, 0.08, 1.04, 2, 2])
    assert one.plan(9, max_steps=4) == 4 and one.epoch_of(4) == pytest.approx(0.32)


def test_no_epoch_is_packed_that_no_step_needs(monkeypatch):
    made, epoch = set(), Batches.epoch
    monkeypatch.setattr(Batches, "epoch", lambda self, number: made.add(number) or epoch(self, number))
    batches = make_batches(make_dataset([5] * 50), packing=True)
    for step in range(batches.plan(2)):
        assert batches.units(step) and batches.epoch_of(step + 1) <= 2
    assert made == {0, 1}


def test_weights_repeat_and_sample_sources():
    dataset = make_dataset([4] * 30, sources=[0] * 10 + [1] * 20)
    batches = make_batches(dataset, weights=(2.0, 0.25))
    first, second = ([i for unit in batches.epoch(e) for i in unit] for e in (0, 1))
    assert sorted(i for i in first if i < 10) == sorted(list(range(10)) * 2)
    assert len([i for i in first if i >= 10]) == 5
    assert {i for i in first if i >= 10} != {i for i in second if i >= 10}


def test_held_out_rows_never_meet_training_rows():
    train, held_out = split_held_out(100, 0.1, seed=3)
    assert len(held_out) == 10 and not set(train) & set(held_out) and len(train) == 90
    assert np.array_equal(held_out, split_held_out(100, 10, seed=3)[1])
    for bad in (100, 1.5, 0.001):
        with pytest.raises(ConfigError, match="val_set_size"):
            split_held_out(100, bad, seed=0)
