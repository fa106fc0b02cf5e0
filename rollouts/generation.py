"""Sampling from a model: the rollouts of the RL recipes' own engine.

B sequences, T positions, V vocabulary.
"""

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from model import KVCache, Transformer, forward_only


@dataclass
class Generation:
    """The result of `generate`, one list entry per sequence; the G sequences of a prompt are adjacent."""

    completion_ids: list[list[int]]
    logprobs: list[list[float]]  # of each sampled token under the distribution that it was drawn from
    finish_reasons: list[Literal["stop", "length"]]


def sampling_logprobs(
    logits: Tensor, temperature: float, top_k: int = 0, top_p: float = 1.0, min_p: float = 0.0
):
    """Log-probabilities [B, V] that are sampled from: tempered, cut to min_p, then top_k, then top_p,
    renormalised.

    The order is vLLM's. A token outside the cut has −inf; ties at the edge of a cut stay in.
    """
    logprobs = (logits.to(torch.promote_types(logits.dtype, torch.float32)) / temperature).log_softmax(-1)
    if min_p > 0:
        logprobs = logprobs.masked_fill(
            logprobs < logprobs.amax(-1, keepdim=True) + math.log(min_p), -torch.inf
        )
    if 0 < top_k < logprobs.shape[-1]:
        kth = logprobs.topk(top_k, dim=-1).values[:, -1:]
        logprobs = logprobs.masked_fill(logprobs < kth, -torch.inf)
    if top_p < 1:
        probabilities = logprobs.softmax(-1)
        ordered = probabilities.sort(dim=-1, descending=True).values
        before = ordered.cumsum(-1) - ordered  # mass of likelier tokens: below top_p a token is kept
        smallest = ordered.masked_fill(before >= top_p, torch.inf).amin(-1, keepdim=True)
        logprobs = logprobs.masked_fill(probabilities < smallest, -torch.inf)
    return logprobs.log_softmax(-1) if min_p > 0 or top_k > 0 or top_p < 1 else logprobs


def sample(logprobs: Tensor, generator: torch.Generator | None) -> Tensor:
    """Sample one token per row [B] from log-probabilities [B, V]: the token whose exponential clock with rate
    π rings first (Gumbel-max). A cumulative sum would need another pass and is not deterministic on GPUs. A
    token of probability 0 is never drawn."""
    clocks = torch.empty_like(logprobs).exponential_(generator=generator)
    clocks.clamp_(min=torch.finfo(clocks.dtype).tiny)
    return (logprobs.exp() / clocks).argmax(-1)


@forward_only
def generate(
    model: Transformer,
    prompts: list[list[int]],
    *,
    max_new_tokens: int,
    num_return_sequences: int = 1,
    temperature: float = 1.0,
    top_k: int = 0,
    top_p: float = 1.0,
    min_p: float = 0.0,
    stop_token_ids: list[int] | tuple[int, ...] | set[int] = (),
    generator: torch.Generator | None = None,
    on_token: Callable[[int, int], None] | None = None,
    anyone: Callable[[bool], bool] = bool,
) -> Generation:
    """Sample `num_return_sequences` completions of each prompt (lists of token ids, of any lengths).

    Prompts are prefilled once, packed, whatever the number of completions; finished sequences leave the
    batch. A stop token ends its sequence and is part of it. temperature 0 is greedy: the distribution is a
    point, its log-prob 0. `generator` seeds the draws. `on_token(sequence, token)` is called as tokens
    arrive. `anyone` answers, on all ranks alike, whether any rank still generates: sharded models need it,
    for every rank must run the same number of passes. Raises ValueError for an empty prompt or settings
    outside their range.
    """
    if not prompts or not all(prompts):
        raise ValueError("every prompt needs at least one token")
    if max_new_tokens < 1 or temperature < 0 or not 0 < top_p <= 1 or not 0 <= min_p < 1 or top_k < 0:
        raise ValueError("max_new_tokens ≥ 1, temperature ≥ 0, 0 < top_p ≤ 1, 0 ≤ min_p < 1, top_k ≥ 0")
    device, G = model.device, num_return_sequences
    was_training = model.training
    model.eval()
    # Beyond its limit, dynamic rope changes every earlier hidden state with each new token: a cache would be
    # stale, so each step there is a full forward pass.
    limit = min((r.max_positions for r in model.arch.ropes.values() if r.kind == "dynamic"), default=math.inf)

    def prefill(sequences: list[list[int]]) -> tuple[Tensor, KVCache]:
        """Logits [B, V] after the last token of each sequence; the sequences go through the model packed in
        one row."""
        lengths = torch.tensor([len(sequence) for sequence in sequences], device=device)
        packed = torch.tensor([[token for sequence in sequences for token in sequence]], device=device)
        document_ids = torch.repeat_interleave(torch.arange(len(sequences), device=device), lengths)[None]
        cache = KVCache(model.arch, lengths.tolist(), device, model.dtype)
        hidden, _ = model.hidden_states(packed, document_ids=document_ids, cache=cache)
        return model.logits(hidden[0, lengths.cumsum(0) - 1]), cache

    logits, cache = prefill(prompts)
    if G > 1:
        rows = torch.arange(len(prompts), device=device).repeat_interleave(G)
        cache.select(rows)
        logits = logits[rows]

    B, stops = len(prompts) * G, set(stop_token_ids)
    completion_ids: list[list[int]] = [[] for _ in range(B)]
    finished = [False] * B
    active = list(range(B))  # the sequence that each row of the cache belongs to
    drawn: list[
        tuple[list[int], list[int], Tensor]
    ] = []  # per step: running rows, their sequences, log-probs by row
    for step in range(max_new_tokens):
        if temperature == 0:
            chosen = logits.argmax(-1)
            logprobs = torch.zeros(len(active))
        else:
            distribution = sampling_logprobs(logits, temperature, top_k, top_p, min_p)
            chosen = sample(distribution, generator)
            logprobs = distribution.gather(-1, chosen[:, None])[:, 0]
        running = [row for row, sequence in enumerate(active) if not finished[sequence]]
        drawn.append((running, [active[row] for row in running], logprobs))
        tokens = chosen.tolist()
        for row in running:
            completion_ids[active[row]].append(tokens[row])
            finished[active[row]] = tokens[row] in stops
            if on_token is not None:
                on_token(active[row], tokens[row])
        running = [row for row in running if not finished[active[row]]]
        if not anyone(bool(running)) or step + 1 == max_new_tokens:
            break
        # Drop finished rows when that saves a quarter of the work; a copy of the cache for less does not pay.
        if 0 < len(running) <= 0.75 * len(active):
            cache.select(torch.tensor(running, device=device))
            chosen, active = chosen[running], [active[row] for row in running]
        if cache.length + 1 > limit:
            logits, cache = prefill(
                [prompts[sequence // G] + completion_ids[sequence] for sequence in active]
            )
        else:
            hidden, _ = model.hidden_states(chosen[:, None], cache=cache)
            logits = model.logits(hidden[:, 0])
    completion_logprobs: list[list[float]] = [[] for _ in range(B)]
    for rows_then, sequences, logprobs in drawn:
        values = logprobs.tolist()
        for row, sequence in zip(rows_then, sequences, strict=True):
            completion_logprobs[sequence].append(values[row])
    model.train(was_training)
    return Generation(completion_ids, completion_logprobs, ["stop" if end else "length" for end in finished])
