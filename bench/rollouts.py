"""What a step's rollouts cost on the host: the time of one process, in which the other ranks wait, and the
memory of what is held, by stage.

    python bench/rollouts.py [--completions 1024] [--length 8192]

The answers of a server are made up, with the fields that vLLM 0.32 sends; a group of 16 is one answer, and 8
completions are one micro-batch. `overlapped` stages run on threads beside sampling or training.
"""

import argparse
import json
import os
import pickle
import resource
import sys
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
sys.path.insert(0, str(Path(__file__).resolve().parent.parent / "tests"))

import numpy as np
import torch

from conftest import CHATML_TOKENS, write_tokenizer
from rollouts import policy, signs
from rollouts.records import as_parquet, write_rollouts
from rollouts.rollout import Rollout, tokens_of
from rollouts.tokens import as_ids
from rollouts.vllm_server import read_completions
from text.templates import CHATML
from text.tokenizer import Tokenizer

GROUP, MICRO_BATCH, PROMPT, VOCAB = 16, 8, 256, 300


def answers(completions: int, length: int) -> Iterator[tuple[list[int], bytes]]:
    """(prompt, the JSON that a server answers)."""
    rng = np.random.default_rng(1)
    for _ in range(completions // GROUP):
        prompt = rng.integers(3, VOCAB, PROMPT).tolist()
        choices = []
        for k in range(GROUP):
            ids = rng.integers(3, VOCAB, length).tolist()
            logprobs = [-round(float(x), 7) for x in rng.exponential(1.0, length)]
            names = [f"t{i}" for i in ids]
            choices.append({
                "index": k, "text": " ".join(names), "finish_reason": "length", "token_ids": ids,
                "prompt_token_ids": prompt if k == 0 else None,
                "logprobs": {
                    "text_offset": list(range(0, 4 * length, 4)), "token_logprobs": logprobs, "tokens": names,
                    "top_logprobs": [{name: x} for name, x in zip(names, logprobs, strict=True)],
                },
            })
        yield prompt, json.dumps({"id": "x", "object": "text_completion", "choices": choices}).encode()


TOOK: dict[str, float] = {}


@contextmanager
def clock(stage: str) -> Iterator[None]:
    begun = time.perf_counter()
    yield
    TOOK[stage] = TOOK.get(stage, 0.0) + time.perf_counter() - begun


def held() -> float:
    """GiB of this process now."""
    pages = int(Path("/proc/self/statm").read_text().split()[1])
    return pages * os.sysconf("SC_PAGE_SIZE") / 2**30


def main(completions: int, length: int, tokenizer: Tokenizer, folder: Path) -> None:
    rollouts: list[Rollout] = []
    before, size = held(), 0
    for prompt, answer in answers(completions, length):
        size += len(answer)
        with clock("overlapped: parse the server's answers"):
            group = read_completions(answer, GROUP, length, "http://x", prompt, VOCAB)
        with clock("rollouts from completions"):
            ids = as_ids(prompt)
            rollouts += [Rollout(ids, c.ids, c.logprobs, truncated=True, advantage=(-1.0) ** k)
                         for k, c in enumerate(group)]
    memory = held() - before
    with clock("send to the other ranks (pickled once, read once)"):
        pickle.loads(pickle.dumps([(r.completion_ids, r.sampling_logprobs) for r in rollouts]))  # noqa: S301
    with clock("decode for the rewards"):
        tokenizer.decode_all([r.completion_ids for r in rollouts])
    with clock("signs, metrics and totals"):
        signs.of_groups(rollouts, GROUP, [float(k % 2) for k in range(completions)])
        policy.completion_metrics(rollouts)
        tokens_of(rollouts)
    device = torch.device("cpu")
    for k in range(0, completions, MICRO_BATCH):
        some = rollouts[k : k + MICRO_BATCH]
        with clock("collate, a pass over the batch"):
            batch = policy.collate(some, device)
        with clock("keep and read log π_old"):
            batch.keep("old_logprobs", batch.mask)
            batch.stored("old_logprobs")
        with clock("collate with shared prompts"):
            policy.collate(some, device, share_prompts=True)
    with clock("overlapped: record"):
        write_rollouts(folder, 1, rollouts, tokenizer)
    with clock("a checkpoint's rollouts"):
        kept = as_parquet(rollouts)
    (file,) = folder.iterdir()
    print(f"{completions:,} × {length:,} tokens; {size / 2**20:,.0f} MiB of JSON; {file.name} "
          f"{file.stat().st_size / 2**20:.0f} MiB, in a checkpoint {len(kept) / 2**20:.0f} MiB")
    for stage, seconds in TOOK.items():
        print(f"{stage:<52}{seconds:>8.2f} s")
    once = ("collate with shared prompts", "a checkpoint's rollouts")
    critical = sum(s for stage, s in TOOK.items() if not stage.startswith("overlapped") and stage not in once)
    print(f"{'on the critical path of a step':<52}{critical:>8.2f} s")
    print(f"held by the rollouts {memory:.2f} GiB; highest of the process "
          f"{resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20:.2f} GiB")


if __name__ == "__main__":
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--completions", type=int, default=1024)
    parser.add_argument("--length", type=int, default=8192)
    given = parser.parse_args()
    with tempfile.TemporaryDirectory() as place:
        write_tokenizer(Path(place) / "tokenizer", CHATML, CHATML_TOKENS, "<|im_end|>")
        tokenizer = Tokenizer.load(Path(place) / "tokenizer")
        main(given.completions, given.length, tokenizer, Path(place) / "rollouts")
