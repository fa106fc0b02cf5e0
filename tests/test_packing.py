"""Packing, the order of training, micro-batches."""

import json
import random
from collections import Counter
from types import SimpleNamespace

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from conftest import ROOT, run_program
from run.config import ConfigError, DataError
from text.packing import Batches, Dataset, Encoded, PromptOrder, pack, settle_intervals, split_held_out
from text.tokenizer import IGNORE


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
        units_per_step=units,
        seed=seed, pad_id=0,
    )


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


def test_prompts_of_a_data_set_come_as_often_as_its_weight_says():
    order = PromptOrder([0] * 8 + [1] * 4, 5, seed=3, weights=[0.5, 2.0])
    assert order.epoch_size == 4 + 8 and order.batches(2.0) == 5
    drawn = [i for number in range(24) for i in order.batch(number)]  # 120: ten epochs
    seen: set[int] = set()
    for epoch in range(10):
        part = Counter(drawn[12 * epoch : 12 * (epoch + 1)])
        assert [part[i] for i in range(8, 12)] == [2] * 4  # twice in each epoch
        halves = {i for i in part if i < 8}
        assert len(halves) == 4 and all(part[i] == 1 for i in halves)
        seen |= halves
    assert len(seen) == 8  # another half in every epoch
    plain = np.random.default_rng([3, 0]).permutation(12).tolist()
    assert PromptOrder([0] * 8 + [1] * 4, 12, seed=3, weights=[1.0, 1.0]).batch(0) == plain
    with pytest.raises(DataError, match="no row is left"):
        PromptOrder([0] * 8, 5, seed=3, weights=[0.0])


@pytest.mark.parametrize("recipe", ["grpo", "ebft", "strided"])
def test_every_recipe_mixes_data_sets_by_their_weights(recipe, small_checkpoint, task, texts, tmp_path):
    """One epoch over 30 rows of weight 0 and 12 of weight 2: only the latter, twice."""
    rows = (texts if recipe == "strided" else task / "rows.jsonl").read_text().splitlines(keepends=True)
    (tmp_path / "a.jsonl").write_text("".join(rows[:18]))
    (tmp_path / "b.jsonl").write_text("".join(rows[18:30]))
    (tmp_path / "letters.py").write_text((task / "letters.py").read_text())
    form = "text" if recipe == "strided" else "chat"
    (tmp_path / "c.yaml").write_text(
        f"base_model: {small_checkpoint[0]}\ndatasets: [{{path: a.jsonl, type: {form}, weight: 0}}, "
        f"{{path: b.jsonl, type: {form}, weight: 2}}]\nmicro_batch_size: 8\n"
    )
    pairs = ["num_generations=2", "max_completion_length=4"]
    own = {"grpo": ["reward_funcs=[letters.spread]", *pairs], "ebft": pairs,
           "strided": ["mode=strided", "generate_max_len=2", "stride=20"]}
    done = run_program(
        ROOT / f"{'ebft' if recipe == 'strided' else recipe}.py", "--config", str(tmp_path / "c.yaml"),
        f"output_dir={tmp_path / 'out'}", *own[recipe],
    )
    assert done.returncode == 0, done.stdout + done.stderr
    lines = [json.loads(line) for path in (tmp_path / "out" / "rollouts").glob("step-*.jsonl")
             for line in path.read_text().splitlines()]
    names = Counter(line["row"].rpartition("/")[2] for line in lines)
    assert len(names) == 12 and all("b.jsonl" in name for name in names), names


@pytest.mark.parametrize("options, made", [
    (dict(eval_steps=7), (7, None)), (dict(save_steps=0.05, eval_steps=0.3), (36, 6)),
    (dict(saves_per_epoch=4, evals_per_epoch=1), (40, 10)), (dict(saves_per_epoch=1000), (None, 1)),
    (dict(save_steps=1.0, eval_steps=120.0), (120, 1)), ({}, (None, None)),
])
def test_intervals_as_shares_of_the_run_and_of_an_epoch_become_steps(options, made):
    """A run of 120 steps, 40 of which are an epoch."""
    names = ("eval_steps", "evals_per_epoch", "save_steps", "saves_per_epoch")
    config = SimpleNamespace(**(dict.fromkeys(names) | options))
    settle_intervals(config, 120, 40)
    assert (config.eval_steps, config.save_steps) == made
    assert config.evals_per_epoch is None and config.saves_per_epoch is None
