"""python grpo.py test-rewards: reward functions tried on a few completions, outside of training."""

import json
import random
from pathlib import Path
from typing import Any

import torch

from checkpoints.weights import load_pretrained
from data import load_tokenizer, read_prompts
from rollouts.generation import generate
from rollouts.rewards import Scorer
from run.config import ConfigError, resolve_checkpoint
from run.log import Console, log


def score_samples(config: Any) -> None:
    """Print the functions' arguments and their scores for `rows` completions: the rows' own answers, sampled
    ones, or the texts in `completions`."""
    log.addHandler(Console(20))
    log.setLevel(20)
    directory = Path(config.config_directory)
    checkpoint = resolve_checkpoint(config.base_model, config.base_model_revision, directory)
    tokenizer = load_tokenizer(checkpoint, config, directory)
    prompts, _ = read_prompts(config.datasets, tokenizer, config, directory, config.max_prompt_length)
    prompts = prompts[: config.rows]
    scorer = Scorer(config, tokenizer)
    if config.completions:
        prompts = [prompts[i % len(prompts)] for i in range(len(config.completions))]
        ids = [tokenizer.encode_rest(text) for text in config.completions]
    elif config.source == "generate":
        model = load_pretrained(str(checkpoint), dtype=torch.float32)
        seed = random.Random(repr(((config.seed,), 0))).getrandbits(62)
        generation = generate(
            model, [p.ids for p in prompts], max_new_tokens=config.max_completion_length,
            temperature=config.temperature, stop_token_ids=tokenizer.stop_ids,
            generator=torch.Generator().manual_seed(seed),
        )
        ids = generation.completion_ids
    else:
        missing = next((p.name for p in prompts if "answer" not in p.columns), None)
        if missing:
            raise ConfigError(
                "source", "answer", f"needs a reference answer, {missing} has none; use source=generate"
            )
        ids = [tokenizer.encode_rest(str(p.columns["answer"])) for p in prompts]
    arguments = scorer.arguments(prompts, ids)
    print("columns that a reward function gets, from the first row:")
    for name, values in arguments.items():
        shown = json.dumps(values[0], ensure_ascii=False, default=str)
        print(f"  {name:<16} {shown if len(shown) < 90 else shown[:90] + ' …'}")
    scores = scorer.finish(scorer.begin(prompts, ids))
    print(f"\nscores of {len(ids)} completions:")
    for i, tokens in enumerate(ids):
        values = "  ".join(
            f"{name} {'—' if s[i] is None else format(s[i], 'g')}" for name, s in scores.items()
        )
        print(f"  {prompts[i].name}  {tokenizer.decode(tokens)[:60]!r}  {values}")
    for name, values in scores.items():
        if len({v for v in values}) == 1 and not config.completions:
            print(f"note: {name} gave every completion the same score, {values[0]}")
