"""Blocks: many short continuations that branch off the prefixes of a document. This module places them,
samples all of them at once, records them and reads them back, and lays out the one pass that trains on them.

N tokens of a micro-batch, G tokens of a block, n samples of each.
"""

import functools
import hashlib
import json
import math
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

import dist
import kernels
from checkpoints.families import Architecture
from data import prepare
from dist import World
from kernels import SharedPrompts
from model import Pass, Transformer, count_positions, forward_only
from rollouts.generation import sample, sampling_logprobs
from rollouts.records import replay_lines
from run.config import ConfigError, DataError, check_at_least_one, check_ranges
from run.files import write_atomically
from run.log import log
from text.packing import Dataset, PromptOrder, split_held_out, weights_of, with_weights
from text.tokenizer import IGNORE, Tokenizer


@dataclass
class BlockOptions:
    stride: int = 8
    """Tokens from one block's beginning to the next."""
    context_length: int = 8
    """Tokens of a document before its first block."""
    min_completion_prefix: int = 0
    """If a row has a prompt: answer tokens before its first block."""
    generate_max_len: int = 8
    """Tokens of a block."""

    def check(self) -> None:
        check_at_least_one(self, "stride", "context_length", "generate_max_len")
        check_ranges(self, ("min_completion_prefix", 0, math.inf))


@dataclass
class Document:
    """A document and the places where blocks branch off it."""

    ids: list[int]
    anchors: list[int]  # block b continues ids[:anchors[b]]; its truth is the next generate_max_len tokens
    counted: list[bool]  # tokens that the cross-entropy includes
    name: str
    recorded: tuple[Tensor, Tensor] | None = None  # of a replay: samples and log-probs [blocks, n, G]
    source: int = 0  # index of its data set

    @functools.cached_property
    def trained_tokens(self) -> int:
        return sum(self.counted[1:])  # the first token has no prediction


def block_anchors(length: int, offset: int, generate_max_len: int, stride: int) -> list[int]:
    """a_b = offset + b · stride, for the ⌊(length − generate_max_len − offset)/stride⌋ + 1 blocks whose true
    tokens all lie in the document; none if it is too short."""
    return list(range(offset, length - generate_max_len + 1, stride)) if offset > 0 else []


def read_document(dataset: Dataset, row: int, config: BlockOptions) -> Document:
    """Read one row. If it begins with a prompt (untrained tokens), blocks begin after the prompt."""
    tokens, labels = dataset.row(row)
    trained = labels != IGNORE
    prompt = int(trained.argmax()) if trained.any() and not trained[0] else 0
    offset = max(prompt + config.min_completion_prefix if prompt else 0, config.context_length)
    anchors = block_anchors(len(tokens), offset, config.generate_max_len, config.stride)
    source = int(dataset.source[row])
    return Document(tokens.tolist(), anchors, trained.tolist(), dataset.name(row), source=source)


@dataclass
class DocumentData:
    documents: list[Document]
    held_out: list[Document]
    order: PromptOrder  # of documents; one batch is one step
    replayed: bool
    total_steps: int
    steps_per_epoch: int
    skipped: int  # documents that are too short for a block
    fingerprint: str

    def step(self, number: int) -> list[Document]:
        size = self.order.size
        in_order = range(number * size, (number + 1) * size)
        return [self.documents[i] for i in (in_order if self.replayed else self.order.batch(number))]


def read_documents(
    config: Any, tokenizer: Tokenizer, directory: Path, cache: Path, vocab_size: int, world: World
) -> DocumentData:
    """Read the training documents, or a replay of them, and the held-out ones. `cache` stores the encoded
    rows unless the config names another place; `vocab_size` bounds the ids of a replay. Raises ConfigError if
    there are too few documents for a step."""
    cache = Path(config.dataset_prepared_path or cache)

    def read(specs: list[dict], held_out: bool | None) -> tuple[list[Document], int, str]:
        """(documents with a block, how many have none, the data's fingerprint); `held_out`: which part of a
        split, None for all."""
        if not specs:
            return [], 0, ""
        dataset = dist.main_first(lambda: prepare(specs, tokenizer, config, directory, cache), world)
        split = split_held_out(len(dataset), val_set_size=config.val_set_size, seed=config.seed)
        rows = np.arange(len(dataset)) if held_out is None else split[held_out]
        documents = [read_document(dataset, int(row), config) for row in rows]
        return [d for d in documents if d.anchors], sum(not d.anchors for d in documents), dataset.fingerprint

    held_out = read(config.test_datasets, None)[0] if config.test_datasets else read(config.datasets, True)[0]
    replayed = config.rollout_engine == "replay"
    if replayed:
        assert config.replay_path is not None
        n, G = config.n_samples_per_prompt, config.generate_max_len
        documents, skipped = read_blocks(config.replay_path, directory, n, G, vocab_size), 0
        fingerprint = hashlib.sha256(repr([d.ids for d in documents]).encode()).hexdigest()
    else:
        documents, skipped, fingerprint = read(config.datasets, False)
    if skipped:
        log.info("data: %d of %d documents are too short for a block", skipped, skipped + len(documents))
    a_step = config.micro_batch_size * config.gradient_accumulation_steps * world.size
    if len(documents) < a_step:
        key = "replay_path" if replayed else "context_length"
        raise ConfigError(
            key, getattr(config, key),
            f"and generate_max_len {config.generate_max_len} leave {len(documents)} documents with a block, "
            f"but a step needs {a_step}",
        )
    weights = weights_of(config.datasets) or [1.0]
    order = PromptOrder([d.source for d in documents], a_step, config.seed, weights)
    per_epoch = len(documents) // a_step if replayed else order.batches(1.0)
    total = config.max_steps or order.batches(config.num_epochs)
    total = min(per_epoch, config.max_steps or per_epoch) if replayed else total
    fingerprint = with_weights(fingerprint, weights)
    return DocumentData(documents, held_out, order, replayed, total, per_epoch, skipped, fingerprint)


def packed(documents: list[Document], device: torch.device) -> tuple[Tensor, Tensor, list[int]]:
    """(input_ids [1, N], document_ids [1, N], where each document begins)."""
    starts, at = [], 0
    for document in documents:
        starts.append(at)
        at += len(document.ids)
    ids = [token for d in documents for token in d.ids]
    which = [i for i, d in enumerate(documents) for _ in d.ids]
    return torch.tensor([ids], device=device), torch.tensor([which], device=device), starts


class BlockCache:
    """Keys and values of packed documents, stored once, and of R continuations that branch off them: row r
    continues the first `prefixes[r]` tokens of document `documents[r]` by at most `steps` tokens.

    `document_ids` [1, N] are those of the packed row, counted from 0; its keys are shared by every row.
    """

    def __init__(
        self, arch: Architecture, document_ids: Tensor, documents: Tensor, prefixes: Tensor, steps: int,
        dtype: torch.dtype,
    ):
        device, R = document_ids.device, len(prefixes)
        self.prefixes = prefixes
        self.positions = count_positions(document_ids)[0]  # of the documents' tokens
        same = document_ids[0][None] == documents[:, None]
        self.visible = same & (self.positions[None] < prefixes[:, None])  # [R, N]
        shape = (R, arch.num_kv_heads, steps, arch.head_dim)
        self.k = [torch.zeros(shape, device=device, dtype=dtype) for _ in range(arch.num_layers)]
        self.v = [torch.zeros(shape, device=device, dtype=dtype) for _ in range(arch.num_layers)]
        self.shared: list[tuple[Tensor, Tensor]] = []  # [K, N, E] per layer
        self.length = 0  # 0 before the documents' own pass, then 1 + tokens of the continuations

    def next_positions(self) -> Tensor:
        return self.prefixes + self.length - 1

    def advance(self, T: int) -> None:
        self.length += 1

    def attend(
        self, layer: int, q: Tensor, k: Tensor, v: Tensor, context: Pass, window: int | None, *, scale: float,
        softcap: float | None = None,
    ) -> Tensor:
        """Like KVCache.attend: one softmax over the shared keys of the documents (one product for all rows)
        and the row's own keys."""
        if self.length == 0:
            self.shared.append((k[0].transpose(0, 1).contiguous(), v[0].transpose(0, 1).contiguous()))
            return kernels.attention(
                q, k, v, documents=context.documents, window=window, scale=scale, softcap=softcap
            )
        step = self.length - 1
        self.k[layer][:, :, step], self.v[layer][:, :, step] = k[:, 0], v[:, 0]
        own_k, own_v = self.k[layer][:, :, : step + 1], self.v[layer][:, :, : step + 1]
        shared_k, shared_v = self.shared[layer]
        R, _, H, E = q.shape
        K, N = shared_k.shape[:2]
        grouped = q[:, 0].view(R, K, H // K, E)
        by_head = grouped.transpose(0, 1).reshape(K, R * (H // K), E)
        of_shared = torch.matmul(by_head, shared_k.transpose(1, 2)).view(K, R, H // K, N).transpose(0, 1)
        of_own = torch.matmul(grouped, own_k.transpose(2, 3))
        scores = torch.cat([of_shared, of_own], dim=-1)  # [R, K, H/K, N + step + 1]
        scores = scores.to(torch.promote_types(q.dtype, torch.float32)) * scale
        if softcap is not None:
            scores = softcap * torch.tanh(scores / softcap)
        visible = self.visible
        own = torch.ones(R, step + 1, dtype=torch.bool, device=q.device)
        if window is not None:
            oldest = self.next_positions()[:, None] - window
            visible = visible & (self.positions[None] > oldest)
            own &= self.prefixes[:, None] + torch.arange(step + 1, device=q.device)[None] > oldest
        seen = torch.cat([visible, own], dim=-1)[:, None, None]
        weights = scores.masked_fill(~seen, -torch.inf).softmax(-1).to(q.dtype)
        from_shared = weights[..., :N].transpose(0, 1).reshape(K, R * (H // K), N) @ shared_v
        out = from_shared.view(K, R, H // K, E).transpose(0, 1) + weights[..., N:] @ own_v
        return out.reshape(R, 1, H, E)


@forward_only
def sample_blocks(
    model: Transformer, documents: list[Document], n: int, length: int, temperature: float,
    generator: torch.Generator | None,
) -> tuple[Tensor, Tensor]:
    """Draw `n` samples of `length` tokens per block in parallel, one token per step: (tokens, log-probs) [R,
    length], rows in the order document, block, sample. The documents' keys and values are computed once."""
    device = model.device
    ids, which, starts = packed(documents, device)
    rows = [(i, a) for i, d in enumerate(documents) for a in d.anchors for _ in range(n)]
    of, prefixes = (torch.tensor(column, device=device) for column in zip(*rows, strict=True))
    cache = BlockCache(model.arch, which, of, prefixes, length, model.dtype)
    hidden, _ = model.hidden_states(ids, document_ids=which, cache=cache)  # type: ignore[arg-type]
    logits = model.logits(hidden[0, torch.tensor(starts, device=device)[of] + prefixes - 1])
    tokens, logprobs = [], []
    for step in range(length):
        distribution = sampling_logprobs(logits, temperature)
        chosen = sample(distribution, generator)
        tokens.append(chosen)
        logprobs.append(distribution.gather(-1, chosen[:, None])[:, 0])
        if step + 1 < length:
            hidden, _ = model.hidden_states(chosen[:, None], cache=cache)  # type: ignore[arg-type]
            logits = model.logits(hidden[:, 0])
    return torch.stack(tokens, 1), torch.stack(logprobs, 1)


def write_blocks(
    directory: Path, step: int, parts: list[list[Document]],
    drawn: list[tuple[Tensor, Tensor, Tensor]], places: list[int], world: dist.World,
) -> None:
    """directory/step-N.jsonl, one document per line in the order of the step, with the samples of its blocks
    [blocks, n, G], their log-probs, and advantages [blocks, n]. A collective."""
    lines: dict[int, dict] = {}
    for documents, first_line, (tokens, logprobs, advantage) in zip(parts, places, drawn, strict=True):
        first = 0
        for k, d in enumerate(documents):
            blocks = slice(first, first := first + len(d.anchors))
            lines[first_line + k] = {
                "row": d.name, "document_ids": d.ids, "counted": [int(c) for c in d.counted],
                "anchors": d.anchors, "block_ids": tokens[blocks].tolist(),
                "sampling_logprobs": logprobs[blocks].tolist(), "advantages": advantage[blocks].tolist(),
            }
    everyone = {number: line for of_rank in dist.gather(lines, world) for number, line in of_rank.items()}
    if world.main:
        directory.mkdir(parents=True, exist_ok=True)
        text = "".join(json.dumps(everyone[first_line]) + "\n" for first_line in sorted(everyone))
        write_atomically(directory / f"step-{step}.jsonl", text)


def read_blocks(path: str, directory: Path, n: int, G: int, vocab_size: int) -> list[Document]:
    """Documents with the samples of their blocks, as `write_blocks` writes them. DataError names the line."""
    documents = []
    for file, number, line in replay_lines(path, directory):

        def need(right: bool, what: str, file=file, number=number) -> None:
            if not right:
                raise DataError(file, number, what, "it must be a line of rollouts/ of a strided run")

        try:
            row = json.loads(line)
        except ValueError as error:
            raise DataError(file, number, f"is not JSON ({error})") from None
        need(isinstance(row, dict), "must be an object")
        ids, anchors, counted, blocks, logprobs = (
            row.get(k) for k in ("document_ids", "anchors", "counted", "block_ids", "sampling_logprobs")
        )
        need(isinstance(ids, list) and bool(ids), "document_ids must be a non-empty list of token ids")
        need(isinstance(counted, list) and len(counted) == len(ids), "counted must have one entry per token")
        need(
            isinstance(anchors, list) and bool(anchors)
            and all(type(a) is int and 0 < a <= len(ids) - G for a in anchors),
            f"anchors must be places in the document with {G} tokens (generate_max_len) behind them",
        )
        try:
            tokens, drawn = np.array(blocks, dtype=np.int64), np.array(logprobs, dtype=np.float32)
            every = np.concatenate([np.array(ids, dtype=np.int64), tokens.reshape(-1)])
        except (ValueError, TypeError, OverflowError):
            tokens, drawn, every = np.zeros(0), np.zeros(0), np.zeros(0)
        wanted = (len(anchors), n, G)
        need(
            tokens.shape == drawn.shape == wanted,
            f"block_ids and sampling_logprobs must be lists [{', '.join(map(str, wanted))}]: blocks, "
            "n_samples_per_prompt, generate_max_len",
        )
        need(bool(((every >= 0) & (every < vocab_size)).all()), f"token ids must be below {vocab_size}")
        sampled = torch.from_numpy(tokens), torch.from_numpy(drawn)
        documents.append(Document(ids, anchors, [bool(c) for c in counted], f"{file}:{number}", sampled))
    return documents


@dataclass
class BlockPass:
    """One forward pass over documents and some samples of all their blocks."""

    input_ids: Tensor  # [1, N]
    shared: SharedPrompts
    document_rows: Tensor  # places in N of the documents' tokens, in order
    block_rows: Tensor  # [R', G] places in N of the blocks' tokens
    sources: Tensor  # [R', G] places in N that predict them
    truth_rows: Tensor  # [blocks, G] places in N of the true tokens of each block

    @staticmethod
    def make(documents: list[Document], tokens: Tensor) -> "BlockPass":
        """`tokens` [blocks · m, G]: m samples of every block, in the order document, block, sample."""
        device, G = tokens.device, tokens.shape[1]
        blocks = sum(len(d.anchors) for d in documents)
        m = tokens.shape[0] // blocks
        given = tokens.tolist()
        ids, groups, document_rows, block_rows, sources, truths = [], [], [], [], [], []
        row = 0
        for document in documents:
            start = len(ids)
            ids += document.ids
            document_rows += range(start, start + len(document.ids))
            groups.append((len(document.ids), [(a, G) for a in document.anchors for _ in range(m)]))
            for a in document.anchors:
                truths.append(list(range(start + a, start + a + G)))
                for _ in range(m):
                    own = list(range(len(ids), len(ids) + G))
                    block_rows.append(own)
                    # The prefix's last token predicts the first token, and each token predicts the next.
                    sources.append([start + a - 1, *own[:-1]])
                    ids += given[row]
                    row += 1
        tensors = (torch.tensor(x, device=device) for x in (document_rows, block_rows, sources, truths))
        return BlockPass(torch.tensor([ids], device=device), SharedPrompts(groups, device), *tensors)
