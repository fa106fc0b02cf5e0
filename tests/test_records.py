"""Files of rollouts: recording, checkpoints, replay; and the arrays that they hold."""

import json
import random

import numpy as np
import pytest
import torch

from conftest import options
from rollouts import records
from rollouts.policy import collate
from rollouts.records import Recorder, ReplayEngine, as_parquet, kept
from rollouts.rollout import Rollout
from rollouts.tokens import IdLists, as_ids
from run.config import DataError
from text.tokenizer import Tokenizer


def some(groups: int = 3, n: int = 2, seed: int = 0) -> list[Rollout]:
    rng, made = random.Random(seed), []
    for g in range(groups):
        prompt = as_ids([rng.randrange(3, 96) for _ in range(rng.randint(1, 9))])
        for k in range(n):
            length = rng.randint(1, 12)
            made.append(Rollout(
                prompt, as_ids([rng.randrange(3, 96) for _ in range(length)]),
                np.array([rng.choice([-rng.random(), None]) for _ in range(length)], np.float32),
                np.array([rng.random() < 0.7 for _ in range(length)]) if k else None,
                truncated=bool(k), rewards={"a": rng.random(), "b": None if k else 0.5},
                advantage=rng.random(), step=7, weight_version=6, row=f"rows.jsonl:{g + 1}", prompt_index=g,
            ))
    return made


def same(a: Rollout, b: Rollout, leave_out: tuple[str, ...] = ()) -> bool:
    for name, one in vars(a).items():
        other = getattr(b, name)
        if name in leave_out:
            continue
        if isinstance(one, np.ndarray):
            if one.dtype != other.dtype or not np.array_equal(one, other, equal_nan=one.dtype == np.float32):
                return False
        elif one != other:
            return False
    return True


def plainly(rollouts, share: bool):
    """ids, sources, targets, places of the completions, token by token."""
    ids, sources, targets, places, last = [], [], [], [], 0
    width = max(len(r.completion_ids) for r in rollouts)
    for row, r in enumerate(rollouts):
        if not (share and row and r.prompt_ids.tolist() == rollouts[row - 1].prompt_ids.tolist()):
            ids += r.prompt_ids.tolist()
            last = len(ids) - 1
        begin = len(ids)
        for t, (token, ours) in enumerate(zip(r.completion_ids.tolist(), r.written(), strict=True)):
            ids.append(token)
            if ours:
                sources.append(last if t == 0 else begin + t - 1)
                targets.append(token)
                places.append(row * width + t)
    return ids, sources, targets, places


@pytest.mark.parametrize("share", [False, True])
def test_a_batch_is_laid_out_as_it_is_token_by_token(share):
    for seed in range(30):
        rollouts = some(groups=3, n=3, seed=seed)
        rollouts[4].prompt_ids = rollouts[3].prompt_ids.copy()  # equal, not the same array
        batch = collate(rollouts, torch.device("cpu"), share)
        ids, sources, targets, places = plainly(rollouts, share)
        assert batch.input_ids.tolist() == [ids] and batch.targets.tolist() == targets
        assert batch.sources.tolist() == sources and batch.places.tolist() == places
        assert batch.mask.flatten().nonzero().flatten().tolist() == places
        assert batch.sampling_logprobs is not None
        for r, row in zip(rollouts, batch.sampling_logprobs.numpy(), strict=True):
            n = len(r.completion_ids)
            assert np.array_equal(row[:n], r.sampling_logprobs, equal_nan=True) and np.isnan(row[n:]).all()


def test_a_checkpoint_gives_rollouts_back_bit_by_bit(tmp_path):
    rollouts = some()
    length = len(rollouts[1].completion_ids)
    rollouts[1].old_logprobs = np.random.default_rng(0).normal(size=length).astype(np.float32)
    (tmp_path / "ahead.parquet").write_bytes(as_parquet(rollouts))
    back = kept(tmp_path, "ahead", {})
    assert len(back) == len(rollouts) and all(same(a, b) for a, b in zip(rollouts, back, strict=True))
    assert back[0].prompt_ids is back[1].prompt_ids
    (tmp_path / "empty.parquet").write_bytes(as_parquet([]))
    assert kept(tmp_path, "empty", {}) == [] and kept(None, "ahead", {}) == []


def test_a_checkpoint_of_version_0_2_has_them_in_its_state():
    row = {"prompt_ids": [1, 2], "completion_ids": [3], "sampling_logprobs": [None], "row": "x:1"}
    state = {"ahead": [row]}
    (one,) = kept(None, "ahead", state)
    assert one.completion_ids.tolist() == [3] and np.isnan(one.sampling_logprobs[0]) and not state


@pytest.fixture
def coder(tokenizer_directory) -> Tokenizer:
    return Tokenizer.load(tokenizer_directory("chatml"))


@pytest.mark.parametrize("compact", [False, True])
def test_what_is_recorded_can_be_replayed(tmp_path, coder, monkeypatch, compact):
    if compact:
        monkeypatch.setattr(records, "COMPACT", 0)
    rollouts = some()
    recorder = Recorder(tmp_path / "rollouts", coder, main=True)
    for step in (2, 10):
        recorder.write(step, rollouts)
    recorder.finish()
    names = sorted(p.name for p in (tmp_path / "rollouts").iterdir())
    assert names == sorted(f"step-{k}.{'parquet' if compact else 'jsonl'}" for k in (2, 10))
    engine = ReplayEngine("rollouts", tmp_path, options(num_generations=2), coder)
    assert len(engine.rollouts) == 12
    for a, b in zip([*rollouts, *rollouts], engine.rollouts, strict=True):
        assert same(a, b, leave_out=("row", "prompt_index", "advantage"))  # of the run that recorded them
    if not compact:
        line = json.loads((tmp_path / "rollouts" / "step-2.jsonl").read_text().splitlines()[0])
        assert line["completion"] == coder.decode(rollouts[0].completion_ids, special=True)


def test_a_file_that_is_no_parquet_is_named(tmp_path, coder):
    (tmp_path / "step-1.parquet").write_bytes(b"PAR1 no")
    with pytest.raises(DataError, match=r"step-1.parquet.*cannot be read as Parquet"):
        ReplayEngine(str(tmp_path), tmp_path, options(num_generations=2), coder)


def test_an_error_of_the_recording_thread_reaches_the_loop(tmp_path, coder):
    (tmp_path / "rollouts").write_text("a file where the folder should be")
    recorder = Recorder(tmp_path / "rollouts", coder, main=True)
    recorder.write(1, some())
    with pytest.raises(OSError, match="rollouts"):
        recorder.finish()
    recorder.finish()
    Recorder(tmp_path / "rollouts", coder, main=False).write(1, some())  # another rank writes nothing


def test_token_ids_reach_a_reward_function_as_lists():
    lists = IdLists([as_ids([1, 2]), as_ids([3])])
    assert list(lists) == [[1, 2], [3]] and lists[1] == [3] and list(lists[1:]) == [[3]] and len(lists) == 2
    assert type(lists[0][0]) is int
