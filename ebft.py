"""Energy-based fine-tuning: sample completions, and reward those whose features match the features of the
true completion (Jelassi et al., "Matching Features, Not Tokens", arXiv 2603.12248).

Cross-entropy trains on true prefixes; at use a model reads its own output. Here the policy is trained on what
it writes itself, without a verifier: the reward is how well the hidden states of a frozen copy of the
starting model agree with those on the true completion, less how alike the samples are.
"""

import functools
import hashlib
import math
import random
import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any, ClassVar, Literal

import numpy as np
import torch
from torch import Tensor
from torch.nn.functional import normalize

import dist
from checkpoints import building
from checkpoints.adapters import base_of
from checkpoints.families import Architecture
from checkpoints.saving import Checkpointer, CheckpointOptions, save_final
from checkpoints.weights import read_architecture, resized
from data import EncodingOptions, Prompt, RowOptions, load_tokenizer, prepare, read_prompts
from dist import DistOptions, OptimizerOptions
from health import memory, monitor
from health.forensics import ForensicOptions, Forensics
from health.monitor import LogOptions, MetricLogger
from kernels import SharedPrompts
from model import ModelOptions, Transformer, forward_only, load_balancing_loss, without_gradients
from numerics.losses import TokenStatistics, linear_cross_entropy, linear_logprobs
from rollouts.blocks import (
    BlockOptions,
    BlockPass,
    Document,
    packed,
    read_blocks,
    read_document,
    sample_blocks,
    write_blocks,
)
from rollouts.engines import ReplayEngine, as_rollouts, make_engine
from rollouts.environments import play
from rollouts.policy import (
    PolicyBatch,
    PolicyOptions,
    Tally,
    accumulate_gradients,
    can_share_prompts,
    cannot_share_prompts,
    check_sampler,
    collate,
    completion_metrics,
    entropy_bonus,
    keep_logprobs,
    measures_kl,
    report_kl,
    token_logprobs,
)
from rollouts.rollout import Rollout, write_rollouts
from rollouts.vllm_client import VllmEngine
from rollouts.vllm_server import Completion, EngineError
from run.config import (
    ConfigError,
    DataError,
    check_at_least_one,
    check_every_part,
    check_ranges,
    option_names,
    parse_config,
    refuse_unread,
    resolve_checkpoint,
)
from run.log import log, start_log
from run.loop import run
from text.packing import LoopOptions, PromptOrder, settle_intervals, split_held_out, weights_of, with_weights
from text.templates import BadRow
from text.tokenizer import IGNORE, Tokenizer


@dataclass
class FeatureOptions:
    feature_layers: list[float] = field(default_factory=lambda: [0.25, 0.5, 0.75])
    """Depths whose hidden states make the features, as shares of the layers."""
    embed_method: Literal["last_token", "mean_pooling", "completion_mean", "concat"] = "last_token"
    """How a sequence's hidden states become one vector: of the last token, the mean of prefix and completion,
    the mean of the completion, or those at 25, 50 and 75 % of the completion."""
    use_whitening: bool = False
    """The same as `whitening: feature`."""
    whitening: Literal["none", "feature", "sample"] = "none"
    """Whiten the features of the samples of a prefix, in feature or in sample space. Whitened samples that
    are linearly independent have diversity 0 by construction: watch ebft/pairwise_cosine."""
    alignment_coef: float = 1.0
    """Weight of the agreement with the true completion."""
    diversity_coef: float = 1.0
    """Weight of the penalty on samples that are alike."""
    advantage_estimator: Literal["rloo", "group_norm", "reinforce"] = "rloo"
    """rloo: reward less a baseline made of the other samples. group_norm: over the group's standard
    deviation. reinforce: as it is."""
    rl_coef: float = 1.0
    """Weight of the policy gradient."""
    ce_coef: float = 0.0
    """Weight of the cross-entropy on the true tokens; 0.03 to 0.1 in the paper."""
    offload_feature_network: bool = False
    """Full fine-tuning: keep the frozen copy in host memory, and on the GPU only while it reads."""

    def check(self) -> None:
        if not self.feature_layers or not all(0 <= f <= 1 for f in self.feature_layers):
            raise ConfigError(
                "feature_layers", self.feature_layers, "must be shares of the depth, from 0 to 1"
            )
        for key in ("alignment_coef", "diversity_coef", "rl_coef", "ce_coef"):
            check_ranges(self, (key, -math.inf, math.inf))
        if not (self.rl_coef and (self.alignment_coef or self.diversity_coef)) and not self.ce_coef:
            key = "rl_coef" if not self.rl_coef else "alignment_coef"
            raise ConfigError(key, 0.0, "leaves nothing that trains: every coefficient beside it is 0 too")


@dataclass
class Config(
    ModelOptions, RowOptions, FeatureOptions, BlockOptions, PolicyOptions, LoopOptions, OptimizerOptions,
    CheckpointOptions, DistOptions, LogOptions, ForensicOptions,
):  # fmt: skip
    mode: Literal["structured", "strided"] = "structured"
    """structured: prompts with a true completion, sampled by a rollout engine. strided: many short rollouts
    that branch off the prefixes of a document, in one forward pass, without a server."""
    adaptive_max_tokens: bool = True
    """structured: sample at most gt_length_multiplier times the longest true completion of the batch, 64 at
    least."""
    gt_length_multiplier: float = 1.5
    """structured: how much longer than the truth a completion may become."""
    chat_turns: Literal["last", "first", "every", "rollout"] = "last"
    """structured, type: chat: which answers of a conversation are asked for. rollout: from the first on the
    policy gives all of them, the row's own questions in between (its `remaining_turns`)."""
    eval_num_generations: int = 4
    """structured: completions of each held-out prompt."""
    n_samples_per_prompt: int = 4
    """strided: samples of each block."""
    temperature: float = 0.6
    """Of sampling and of the log-probabilities that are trained."""
    samples_a_pass: int = 1
    """strided: how many of these go through the model together in training: more is faster, 1 takes least
    memory."""

    not_here: ClassVar = {
        "sample_packing": "documents of a micro-batch are packed anyway",
        "environment": "it has no true completion to match; use grpo.py",
        "reward_funcs": "features are the reward; use grpo.py for functions",
        "streaming_partial_batch": "there is nothing to score early here",
        "random_init": "train with sft.py first", "tokenizer_vocab_size": "train with sft.py first",
    }  # fmt: skip

    @staticmethod
    def of_other_mode(mode: str) -> set[str]:
        """Options that `mode` does not read."""
        of_structured, of_strided = options_by_mode()
        return of_structured if mode == "strided" else of_strided

    def __post_init__(self):
        check_every_part(self)
        of_structured, of_strided = options_by_mode()
        if self.mode == "strided":
            refuse_unread(self, of_structured, "is of mode: structured, and mode is strided")
            if self.rollout_engine == "vllm":
                raise ConfigError("rollout_engine", "vllm", "is of mode: structured; blocks need no server")
        else:
            refuse_unread(self, of_strided, "is of mode: strided, and mode is structured")
        if not 0 < self.gt_length_multiplier < math.inf:
            raise ConfigError("gt_length_multiplier", self.gt_length_multiplier, "must be above 0")
        check_at_least_one(self, "n_samples_per_prompt", "samples_a_pass", "eval_num_generations")
        if self.use_whitening and self.whitening == "none":
            self.whitening = "feature"
        siblings = "num_generations" if self.mode == "structured" else "n_samples_per_prompt"
        if getattr(self, siblings) == 1 and (self.advantage_estimator != "reinforce" or self.diversity_coef):
            log.warning("%s is 1: without siblings only reinforce without diversity is defined", siblings)
            self.advantage_estimator, self.diversity_coef = "reinforce", 0.0
        if self.lora_dropout:
            raise ConfigError(
                "lora_dropout", self.lora_dropout,
                "makes the trained policy another one than the one that samples: set it to 0 here",
            )  # fmt: skip


def options_by_mode() -> tuple[set[str], set[str]]:
    """(options that only structured mode reads, those that only strided mode reads)."""
    both = {"temperature", "replay_path", "rollout_engine", "log_completions"}
    structured = {"adaptive_max_tokens", "gt_length_multiplier", "chat_turns", "eval_num_generations"}
    strided = {"n_samples_per_prompt", "samples_a_pass"}
    return (
        (option_names(PolicyOptions) | structured) - both,
        option_names(BlockOptions, EncodingOptions) | strided,
    )


# ------------------------------------------------------------------------------------------------------------
# Reward and advantage (all batched over prompts, or prompts and blocks: … below)
# ------------------------------------------------------------------------------------------------------------


def whiten(samples: Tensor, truth: Tensor, form: str) -> tuple[Tensor, Tensor, int]:
    """samples X [P, n, D] and truth [P, D] → whitened X, the truth of each sample [P, n, D], and how many
    prompts had to fall back.

    With the thin SVD X = U S Vᵀ, singular values below 1e-5 of the largest dropped: `feature` multiplies by V
    S⁻¹ Vᵀ on the right (never as a D × D matrix), `sample` by U S⁻¹ Uᵀ on the left. Both turn X into U Vᵀ;
    the truth differs. Where the SVD fails it is tried once with noise of 1e-6 · mean|X|, else the features
    are only L2-normalised.
    """
    fallback = 0

    def decompose(x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        return torch.linalg.svd(x, full_matrices=False)

    try:
        U, S, Vt = decompose(samples)
        if not torch.isfinite(S).all():
            raise RuntimeError("not finite")
    except RuntimeError:
        try:
            U, S, Vt = decompose(samples + 1e-6 * samples.abs().mean() * torch.randn_like(samples))
            if not torch.isfinite(S).all():
                raise RuntimeError("not finite")
        except RuntimeError:
            fallback = samples.shape[0]
            log.warning("whitening failed: the features of this batch are only normalised")
            x, g = (torch.nan_to_num(t, nan=0.0, posinf=0.0, neginf=0.0) for t in (samples, truth))
            return normalize(x, dim=-1), normalize(g, dim=-1)[:, None].expand_as(samples), fallback
    kept = 1e-5 * S.amax(-1, keepdim=True) < S
    inverse = torch.where(kept, 1 / torch.where(kept, S, 1.0), 0.0)
    flat = (U * kept[..., None, :]) @ Vt
    if form == "feature":
        coordinates = (Vt @ truth[..., None])[..., 0] * inverse
        white = (coordinates[..., None, :] @ Vt)[..., 0, :]
        return flat, white[:, None].expand_as(samples), fallback
    ones = U.sum(-2)  # Uᵀ·1: the truth repeated n times is 1 gᵀ
    weights = (U @ (inverse * ones)[..., None])[..., 0]
    return flat, weights[..., None] * truth[:, None], fallback


def alignment(samples: Tensor, truth: Tensor) -> Tensor:
    """2·cos(x_j, g_j): samples and truth [P, n, D] → [P, n] (paper, eq. 7)."""
    return 2 * torch.nn.functional.cosine_similarity(samples, truth, dim=-1, eps=1e-12)


def diversity(samples: Tensor) -> Tensor:
    """2/(n−1) · Σ_{j'≠j} x_j·x_{j'}: samples [P, n, D] → [P, n]; 0 for a single sample (paper, eq. 7)."""
    n = samples.shape[-2]
    if n == 1:
        return samples.new_zeros(samples.shape[:-1])
    products = samples @ samples.transpose(-1, -2)
    return 2 / (n - 1) * (products.sum(-1) - products.diagonal(dim1=-2, dim2=-1))


def cfm_loss(samples: Tensor, truth: Tensor) -> Tensor:
    """‖mean_j x_j − mean_j g_j‖² [P]: the distance that the method minimises (paper, eq. 2)."""
    return (samples.mean(-2) - truth.mean(-2)).square().sum(-1)


def advantages(
    align: Tensor, diverse: Tensor, estimator: str, alignment_coef: float = 1.0, diversity_coef: float = 1.0
) -> Tensor:
    """alignment and diversity [P, n] → advantages [P, n].

    `rloo`: the reward less a baseline made of the other samples. For alignment that is their mean; the
    diversity of the others holds their pairs with j, which are taken out: (Σ_k d_k − 2 d_j)/(n − 2). The
    plain mean of the other rewards, as elsewhere, is biased. Without whitening the baseline does not depend
    on sample j at all; whitening is made from all samples, so there it does (docs/ebft.md). `group_norm`:
    (reward − mean)/(std + 1e-8). `reinforce`: the reward.
    """
    n = align.shape[-1]
    reward = alignment_coef * align - diversity_coef * diverse
    if estimator == "reinforce":
        return reward
    assert n > 1, "one sample has no sibling: only reinforce"
    if estimator == "group_norm":
        return (reward - reward.mean(-1, keepdim=True)) / (reward.std(-1, keepdim=True) + 1e-8)
    others = (align.sum(-1, keepdim=True) - align) / (n - 1)
    apart = torch.zeros_like(diverse)
    if n > 2:
        apart = (diverse.sum(-1, keepdim=True) - 2 * diverse) / (n - 2)
    return reward - (alignment_coef * others - diversity_coef * apart)


def block_features(
    network: Transformer, batch: BlockPass, documents: list[Document], config: Config
) -> tuple[Tensor, Tensor]:
    """(features of the blocks [R', D'], of the true tokens of each block [blocks, D']), of the frozen
    network."""
    depths = feature_depths(network, config)
    with without_gradients(network):
        states = network.hidden_states(batch.input_ids, shared_prompts=batch.shared, layers=depths)[0][0]

    def pooled(rows: Tensor, prefix_sums: Tensor, prefixes: Tensor) -> Tensor:
        own = states[rows]  # [r, G, D']
        if config.embed_method == "last_token":
            return own[:, -1]
        if config.embed_method == "completion_mean":
            return own.mean(1)
        if config.embed_method == "concat":
            G = own.shape[1]
            return torch.cat([own[:, min(G - 1, int(share * G))] for share in (0.25, 0.5, 0.75)], dim=-1)
        return (prefix_sums + own.sum(1)) / (prefixes + own.shape[1])[:, None]

    sums, prefixes, start = [], [], 0
    for document in documents:  # running sums of a document's states serve every prefix of it
        places = batch.document_rows[start : start + len(document.ids)]
        running = states[places].cumsum(0)
        sums += [running[a - 1] for a in document.anchors]
        prefixes += document.anchors
        start += len(document.ids)
    m = batch.block_rows.shape[0] // len(prefixes)
    sums, lengths = torch.stack(sums), torch.tensor(prefixes, device=states.device)
    return (
        pooled(batch.block_rows, sums.repeat_interleave(m, 0), lengths.repeat_interleave(m)),
        pooled(batch.truth_rows, sums, lengths),
    )


def energy(samples: Tensor, truth: Tensor, config: Config) -> tuple[Tensor, dict[str, Tensor]]:
    """Features of the samples [P, n, D] and of the truth [P, D] → advantages [P, n], and what to report by
    prefix."""
    if config.whitening == "none":
        x, fallback = normalize(samples, dim=-1), 0
        g = normalize(truth, dim=-1)[:, None].expand_as(samples)
    else:
        x, g, fallback = whiten(samples, truth, config.whitening)
    align, diverse = alignment(x, g), diversity(x)
    n = samples.shape[1]
    facts = {
        "alignment": align.mean(-1), "diversity": diverse.mean(-1), "cfm_loss": cfm_loss(x, g),
        "reward": (config.alignment_coef * align - config.diversity_coef * diverse).mean(-1),
        "alignment_cosine": torch.nn.functional.cosine_similarity(samples, truth[:, None], dim=-1).mean(-1),
        "cfm_unwhitened": cfm_loss(*(normalize(t, dim=-1) for t in (samples, truth[:, None]))),
        "pairwise_cosine": diversity(normalize(samples,
        dim=-1)).mean(-1) / 2 if n > 1 else torch.zeros(len(x)),
        "whitening_fallbacks": torch.full((len(x),), float(fallback > 0)),
    }  # fmt: skip
    estimator = config.advantage_estimator
    return advantages(align, diverse, estimator, config.alignment_coef, config.diversity_coef), facts


def feature_network(
    arch: Architecture, checkpoint: Path, config: Config, world: dist.World
) -> Transformer | None:
    """The frozen copy of the starting weights, sharded like the model; None with LoRA, where the model
    without its adapters serves."""
    if config.adapter:
        return None
    away = config.offload_feature_network or config.fsdp_cpu_offload
    copied = replace(config, fsdp_cpu_offload=away)
    return building.build_model(arch, checkpoint, copied, world, frozen=True)


@contextmanager
def on_device(frozen: Transformer | None, config: Config, world: dist.World) -> Iterator[None]:
    """An offloaded frozen copy comes to the GPU, and goes back. Where it is sharded FSDP does that itself,
    block by block."""
    if frozen is None or not config.offload_feature_network or world.mesh is not None:
        yield
        return
    frozen.to(world.device)
    try:
        yield
    finally:
        frozen.to("cpu")


JUDGED = ("alignment_cosine", "cfm_loss", "cfm_unwhitened", "reward", "pairwise_cosine")  # held out

# ------------------------------------------------------------------------------------------------------------
# The run
# ------------------------------------------------------------------------------------------------------------


def main(config: Config) -> None:
    if config.mode == "structured":
        structured(config)
    else:
        strided(config)


def strided(config: Config) -> None:
    # 1. Set up.
    output_dir, directory = Path(config.output_dir), Path(config.config_directory)
    world = dist.init(config)
    start_log(output_dir, world.main)
    dist.seed_everything(config.seed, world.rank)
    interrupt = dist.Interrupt()

    # 2. Documents.
    checkpoint = dist.main_first(
        lambda: resolve_checkpoint(config.base_model, config.base_model_revision, directory), world
    )
    arch = read_architecture(checkpoint, config.ignore_config_fields)
    cache = Path(config.dataset_prepared_path or output_dir / "prepared")
    tokenizer = load_tokenizer(checkpoint, config, directory)

    def read(specs: list[dict], wanted: Callable[[int], np.ndarray]) -> tuple[list[Document], int, str]:
        """(documents with a block, how many have none, the data's fingerprint)."""
        if not specs:
            return [], 0, ""
        dataset = dist.main_first(lambda: prepare(specs, tokenizer, config, directory, cache), world)
        found = [read_document(dataset, int(row), config) for row in wanted(len(dataset))]
        return [d for d in found if d.anchors], sum(not d.anchors for d in found), dataset.fingerprint

    split = functools.partial(split_held_out, val_set_size=config.val_set_size, seed=config.seed)
    if config.test_datasets:
        judged, _, _ = read(config.test_datasets, np.arange)
    else:
        judged, _, _ = read(config.datasets, lambda rows: split(rows)[1])
    if config.rollout_engine == "replay":
        assert config.replay_path is not None
        size = max(arch.vocab_size, tokenizer.vocab_size)
        n, G = config.n_samples_per_prompt, config.generate_max_len
        documents, skipped = read_blocks(config.replay_path, directory, n, G, size), 0
        fingerprint = hashlib.sha256(repr([d.ids for d in documents]).encode()).hexdigest()
    else:
        documents, skipped, fingerprint = read(config.datasets, lambda rows: split(rows)[0])
    if skipped:
        log.info("data: %d of %d documents are too short for a block", skipped, skipped + len(documents))
    a_step = config.micro_batch_size * config.gradient_accumulation_steps * world.size
    if len(documents) < a_step:
        key = "replay_path" if config.rollout_engine == "replay" else "context_length"
        raise ConfigError(
            key, getattr(config, key),
            f"and generate_max_len {config.generate_max_len} leave {len(documents)} documents with a block, "
            f"a step takes {a_step}",
        )  # fmt: skip
    weights = weights_of(config.datasets) or [1.0]
    order = PromptOrder([d.source for d in documents], a_step, config.seed, weights)
    fingerprint = with_weights(fingerprint, weights)
    epoch_steps = len(documents) // a_step if config.rollout_engine == "replay" else order.batches(1.0)
    total_steps = config.max_steps or order.batches(config.num_epochs)
    if config.rollout_engine == "replay":
        total_steps = min(epoch_steps, config.max_steps or epoch_steps)
    dist.check_schedule(config, total_steps)
    settle_intervals(config, total_steps, epoch_steps)
    checkpointer = Checkpointer(output_dir / "checkpoints", world, config)
    keys = ("base_model", "adapter", "lora_r", "optimizer", "seed", "stride", "context_length",
    "generate_max_len",
            "n_samples_per_prompt", "sequence_len", "val_set_size")  # fmt: skip
    identity = {**{k: asdict(config)[k] for k in keys}, "documents a step": a_step, "data": fingerprint}
    resume_from, saved = checkpointer.to_resume(identity)

    # 3. Model, optimiser, and the frozen network of the features: with LoRA the model without its adapters.
    size = max(arch.vocab_size, tokenizer.vocab_size)
    arch = resized(arch, size, config.pad_vocab_to_multiple_of)
    model = building.build_model(arch, checkpoint, config, world, new_tokens=tokenizer.new_ids)
    if reason := cannot_share_prompts(model):
        raise ConfigError("base_model", config.base_model, f"cannot be trained in blocks: {reason}")
    trained = [p for p in model.parameters() if p.requires_grad]
    optimizers = dist.make_optimizers(model, config)
    frozen = feature_network(arch, checkpoint, config, world)
    log.info(
        "%s: %s parameters, %s trained; %s documents, %s held out; %d steps of %d documents on %s",
        arch.name, f"{model.count_parameters():,}", f"{sum(p.numel() for p in trained):,}",
        f"{len(documents):,}",
        f"{len(judged):,}", total_steps, a_step, world.devices(config),
    )  # fmt: skip

    # 4. Resume.
    state: dict[str, Any] = {"num_tokens": 0, "eval_before": None, "identity": identity}
    step = 0
    if resume_from is not None:
        step, state = saved["step"], {**saved, "identity": identity}
        checkpointer.load(resume_from, model, optimizers, config.seed)
    logger = MetricLogger(config, output_dir, main=world.main, first_step=step, total_steps=total_steps)

    def rollout(part: list[Document], *seed: int) -> tuple[Tensor, Tensor, Tensor, dict[str, Tensor]]:
        """(tokens [blocks, n, G], log-probs, advantages [blocks, n], facts by block) of a micro-batch."""
        n, G = config.n_samples_per_prompt, config.generate_max_len
        drawn = random.Random(repr((config.seed, *seed))).getrandbits(62)
        generator = torch.Generator(world.device).manual_seed(drawn)
        model.eval()
        if part[0].recorded is None:
            tokens, logprobs = sample_blocks(model, part, n, G, config.temperature, generator)
        else:
            recorded = zip(*(d.recorded for d in part if d.recorded is not None), strict=True)
            tokens, logprobs = (torch.cat(x).flatten(0, 1).to(world.device) for x in recorded)
        batch = BlockPass.make(part, tokens)
        with on_device(frozen, config, world), base_of(model, frozen) as network:
            features, truth = block_features(network, batch, part, config)
        model.train()
        advantage, facts = energy(features.view(len(truth), n, -1).double(), truth.double(), config)
        return tokens.view(len(truth), n, G), logprobs.view(len(truth), n, G), advantage.float(), facts

    def evaluated(step: int) -> dict[str, float]:
        """Energy of fresh samples, and cross-entropy, on held-out documents."""
        tally = Tally()
        mine = judged[world.rank :: world.size] or judged[:1]
        most = math.ceil(math.ceil(len(judged) / world.size) / config.micro_batch_size)
        for k in range(most):  # as many on every rank: each is a collective
            part = mine[k * config.micro_batch_size : (k + 1) * config.micro_batch_size] or mine[:1]
            tokens, _, _, facts = rollout(part, -1, k, world.rank)
            G = config.generate_max_len
            truth = torch.tensor([d.ids[a : a + G] for d in part for a in d.anchors], device=tokens.device)
            right = (tokens == truth[:, None]).all(-1)
            tally.mean("eval/exact", right.sum().item(), right.numel())  # samples equal to the true tokens
            with without_gradients(model):
                nll, count = document_nll(model, part)
            for name in JUDGED:
                tally.mean(f"eval/{name}", facts[name].sum().item(), len(facts[name]))
            tally.mean("eval/loss", nll.item(), count)
        return tally.result(world)

    watch = Forensics(model, config, world, tokenizer)

    aux_coef = (
        arch.router_aux_loss_coef if config.router_aux_loss_coef is None else config.router_aux_loss_coef
    )

    def pass_loss(
        part: list[Document], tokens: Tensor, weight: Tensor, rollout_tokens: int, counted: int | None,
        share: float,
    ) -> tuple[Tensor, Tensor, Tensor, Tensor | None, TokenStatistics]:  # fmt: skip
        """(what the backward pass starts from, loss, its REINFORCE part, Σ −log p of the true tokens,
        log-probs) of some samples of every block, this `share` of the step's passes. Sums over the whole
        step: × world.size undoes FSDP's mean."""
        batch = BlockPass.make(part, tokens)
        nll = None
        hidden, router_logits = model.hidden_states(batch.input_ids, shared_prompts=batch.shared)
        made = linear_logprobs(
            hidden[0].index_select(0, batch.sources.flatten()), model.head_weight,
            batch.input_ids[0, batch.block_rows.flatten()], temperature=config.temperature,
            softcap=arch.final_softcap,
        )  # fmt: skip
        rl_loss = -(weight * made.logprobs).sum() / rollout_tokens
        loss = config.rl_coef * rl_loss
        if counted is not None:
            nll, _ = document_nll(model, part, hidden[0].index_select(0, batch.document_rows))
            loss = loss + config.ce_coef * nll / counted
        start = loss
        if aux_coef and router_logits:  # a mixture's experts stay in use
            start = loss + aux_coef * share * load_balancing_loss(router_logits, arch)
        return start * world.size, loss.detach(), rl_loss.detach(), nll, made

    # 5. The loop.
    if judged and state["eval_before"] is None:
        state["eval_before"] = evaluated(step)
        logger.log(step, state["eval_before"])
    seconds = dist.Timer()
    while step < total_steps:
        raced = dist.begin_step(step + 1, world)
        # a. This step's documents, the same on every rank, and this rank's micro-batches.
        replayed = config.rollout_engine == "replay"
        chosen = [
            documents[i]
            for i in (range(step * a_step, (step + 1) * a_step) if replayed else order.batch(step))
        ]
        mb = config.micro_batch_size
        places = [(k * world.size + world.rank) * mb for k in range(config.gradient_accumulation_steps)]
        parts = [chosen[place : place + mb] for place in places]
        blocks = sum(len(d.anchors) for d in chosen)
        rollout_tokens = blocks * config.n_samples_per_prompt * config.generate_max_len
        counted = max(1, sum(d.trained_tokens for d in chosen))

        with monitor.profiled(step + 1, config, output_dir, world.rank, world.device):
            # b. Samples of every block, their energy, and advantages over the siblings of a block.
            tally, drawn, losses = Tally(), [], []
            for k, part in enumerate(parts):
                tokens, sampled, advantage, facts = rollout(part, step, k, world.rank)
                for name, values in facts.items():
                    tally.mean(f"ebft/{name}", values.sum().item(), len(values))
                tally.mean(
                    "ebft/advantages_std",
                    advantage.std(-1).sum().item() if advantage.shape[1] > 1 else 0.0,
                    len(advantage),
                )
                drawn.append((tokens, sampled, advantage))

                # c. REINFORCE on the samples, a few at a time so that memory stays near one sample's;
                # cross-entropy on the true tokens with the first.
                n = config.n_samples_per_prompt
                given = functools.partial(advantages_by_document, part, advantage)
                for first in range(0, n, config.samples_a_pass):
                    now = slice(first, min(n, first + config.samples_a_pass))
                    weight = advantage[:, now].reshape(-1, 1).expand(-1, config.generate_max_len).flatten()
                    compute = functools.partial(
                        pass_loss, part, tokens[:, now].flatten(0, 1), weight, rollout_tokens,
                        counted if config.ce_coef and first == 0 else None,
                        len(part) / len(chosen) * (now.stop - now.start) / n,
                    )  # fmt: skip
                    start, loss, rl_loss, nll, made = watch.forward(compute, [d.name for d in part], given)
                    start.backward()
                    losses.append(loss)
                    if nll is not None:
                        tally.mean("ebft/ce_loss", nll.item(), sum(d.trained_tokens for d in part))
                    gap = (made.logprobs.detach() - sampled[:, now].flatten()).abs()
                    tally.mean("entropy", made.entropy.sum().item(), len(gap))
                    tally.mean("sampling/sampling_logp_difference/mean", gap.sum().item(), len(gap))
                    tally.max("sampling/sampling_logp_difference/max", gap.max().item())
                    tally.mean("ebft/rl_loss", rl_loss.item(), 1.0 / world.size if k + first == 0 else 0.0)

            # d. The norm before clipping; nothing that is not finite may reach the weights.
            norm, with_gradient = dist.gradient_norm(trained)
            rate = dist.learning_rate(step, config, total_steps)
            if watch.healthy(step + 1, losses, norm):
                dist.clip_gradients(with_gradient, config.max_grad_norm, norm)
                rate = dist.update(optimizers, rate)
        step += 1

        # e. Metrics, evaluation, checkpoint.
        tally.mean("loss", sum(loss.item() for loss in losses), 1.0 / world.size)
        metrics = tally.result(world)
        state["num_tokens"] += sum(len(d.ids) for d in chosen) + rollout_tokens
        metrics |= {
            "grad_norm": norm.item(), "learning_rate": rate, "num_tokens": state["num_tokens"],
            "ebft/num_blocks": float(blocks), "ebft/skipped_documents": float(skipped),
            "step_time": seconds(), **watch.metrics(),
            "epoch": step * a_step / order.epoch_size, **memory.peak_memory(world.device), **raced,
        }  # fmt: skip
        write_blocks(output_dir / "rollouts", step - 1, parts, drawn, places, world)
        logger.advance()
        stopping = logger.stopping(interrupt.signal, step, world)
        if judged and (
            step == total_steps or (config.eval_steps is not None and step % config.eval_steps == 0)
        ):
            metrics |= evaluated(step)
            state["eval_after"] = {k: v for k, v in metrics.items() if k.startswith("eval/")}
        logger.observe(step, metrics)
        if step % config.logging_steps == 0 or step == total_steps or "eval/loss" in metrics:
            logger.log(step, metrics)
            if config.log_completions and world.main:
                show_blocks(parts[0], drawn[0], tokenizer)
        if stopping or (
            config.save_steps is not None and (step % config.save_steps == 0 or step == total_steps)
        ):
            checkpointer.save(step, model, optimizers, state)
        seconds()
        if stopping and step < total_steps:
            checkpointer.finish()
            logger.stopped(step, world)
            return
    checkpointer.finish()

    # 6. Final save and report.
    final = save_final(model, tokenizer, config, world)
    logger.close()
    if judged:
        monitor.report_evaluation(state["eval_before"], state.get("eval_after", state["eval_before"]))
    monitor.say_saved(final)
    dist.finish()


def structured(config: Config) -> None:
    """Prompts with a true completion: engines and policy loss of GRPO, with energies in the place of
    rewards."""
    # 1. Set up.
    output_dir, directory = Path(config.output_dir), Path(config.config_directory)
    world = dist.init(config)
    start_log(output_dir, world.main)
    dist.seed_everything(config.seed, world.rank)
    interrupt = dist.Interrupt()
    n, mb, accumulation = config.num_generations, config.micro_batch_size, config.gradient_accumulation_steps
    batch_size = mb * accumulation * world.size
    if batch_size % n:
        raise ConfigError(
            "micro_batch_size",
            mb,
            f"makes a step of {batch_size} completions, no multiple of num_generations ({n})",
        )

    # 2. Prompts and their truths.
    checkpoint = dist.main_first(
        lambda: resolve_checkpoint(config.base_model, config.base_model_revision, directory), world
    )
    arch = read_architecture(checkpoint, config.ignore_config_fields)
    tokenizer = load_tokenizer(checkpoint, config, directory)
    prompts: list[Prompt] = []
    held_out: list[Prompt] = []
    replay, data = None, ""
    if config.rollout_engine == "replay":
        assert config.replay_path is not None
        replay = ReplayEngine(config.replay_path, directory, config, tokenizer)
        bare = next((r.row for r in replay.rollouts if r.ground_truth_ids is None), None)
        if bare is not None:
            raise ConfigError("replay_path", bare, "has no ground_truth_ids, which EBFT compares with")
        data = replay.fingerprint
        total_steps = len(replay.rollouts) // batch_size
        if not total_steps:
            raise ConfigError(
                "replay_path", config.replay_path, f"holds fewer rollouts than a step's {batch_size}"
            )
    else:
        prompts, data = read_prompts(
            config.datasets, tokenizer, config, directory, config.max_prompt_length, config.chat_turns
        )
        if config.val_set_size:
            train_rows, held_rows = split_held_out(len(prompts), config.val_set_size, config.seed)
            prompts, held_out = [prompts[i] for i in train_rows], [prompts[i] for i in held_rows]
    if config.test_datasets:
        held_out, _ = read_prompts(
            config.test_datasets, tokenizer, config, directory, config.max_prompt_length, config.chat_turns
        )
    truths = [true_completion(p, tokenizer, config.max_turns) for p in prompts]
    held_truths = [true_completion(p, tokenizer, config.max_turns) for p in held_out]
    conversing = any("remaining_turns" in p.columns for p in (*prompts, *held_out))
    if conversing and config.async_prefetch:
        raise ConfigError("async_prefetch", True, "does not work with remaining_turns; drop one of the two")
    if replay is None:
        source, weights = [prompt.source for prompt in prompts], weights_of(config.datasets)
        order, data = PromptOrder(source, batch_size // n, config.seed, weights), with_weights(data, weights)
        total_steps, epoch_steps = config.max_steps or order.batches(config.num_epochs), order.batches(1.0)
    else:
        total_steps, epoch_steps = min(total_steps, config.max_steps or total_steps), total_steps
    dist.check_schedule(config, total_steps)
    settle_intervals(config, total_steps, epoch_steps)
    checkpointer = Checkpointer(output_dir / "checkpoints", world, config)
    keys = ("base_model", "mode", "adapter", "lora_r", "optimizer", "seed", "num_generations", "val_set_size",
            "rollout_engine")  # fmt: skip
    identity = {**{k: asdict(config)[k] for k in keys}, "completions a step": batch_size, "data": data}
    resume_from, saved = checkpointer.to_resume(identity)

    # 3. Model, optimiser, the frozen network of the features (and of kl), engine.
    size = max(arch.vocab_size, tokenizer.vocab_size)
    arch = resized(arch, size, config.pad_vocab_to_multiple_of)
    model = building.build_model(arch, checkpoint, config, world, new_tokens=tokenizer.new_ids)
    if reason := cannot_share_prompts(model):
        raise ConfigError("base_model", config.base_model, f"cannot give features: {reason}")
    trained = [p for p in model.parameters() if p.requires_grad]
    optimizers = dist.make_optimizers(model, config)
    frozen = feature_network(arch, checkpoint, config, world)
    share = can_share_prompts(model, config.share_prompts)
    aux_coef = (
        arch.router_aux_loss_coef if config.router_aux_loss_coef is None else config.router_aux_loss_coef
    )
    log.info(
        "%s: %s parameters, %s trained; %s prompts, %s held out; %d steps of %d completions on %s, "
        "%s rollouts",
        arch.name, f"{model.count_parameters():,}", f"{sum(p.numel() for p in trained):,}",
        f"{len(prompts):,}" if replay is None else "recorded", f"{len(held_out):,}", total_steps, batch_size,
        world.devices(config), config.rollout_engine,
    )  # fmt: skip
    report_kl(config)
    state: dict[str, Any] = {"num_tokens": 0, "eval_before": None, "identity": identity}
    step, ahead = 0, None
    if resume_from is not None:
        step, state = saved["step"], {**saved, "identity": identity}
        checkpointer.load(resume_from, model, optimizers, config.seed)
        stored = state.pop("ahead")
        ahead = None if stored is None else [Rollout(**r) for r in stored]
    logger = MetricLogger(config, output_dir, main=world.main, first_step=step, total_steps=total_steps)
    engine = make_engine(model, config, tokenizer, world, prompts)
    watch = Forensics(model, config, world, tokenizer)

    def longest(truths: list[Truth]) -> int:
        wanted = max(math.ceil(len(ids) * config.gt_length_multiplier) for ids, _ in truths)
        limit = max(64, wanted) if config.adaptive_max_tokens else config.max_completion_length
        return min(limit, config.max_completion_length)

    def job(number: int) -> tuple[list[list[int]], list[int]]:
        """(ids of the prompts, most tokens of each) of a step's batch."""
        which = order.batch(number)
        return [prompts[i].ids for i in which], [longest([truths[i] for i in which])] * len(which)

    def with_truth(made: list[Rollout], of: list[Truth]) -> list[Rollout]:
        for rollout in made:
            rollout.ground_truth_ids, rollout.ground_truth_mask = of[rollout.prompt_index]
        return made

    def rolled(groups: list[list[Completion]], step: int, number: int) -> list[Rollout]:
        which = order.batch(number)
        made = as_rollouts(groups, [prompts[i] for i in which], which, step, engine, tokenizer.stop_ids)
        return with_truth(made, truths)

    def sampled(
        source: list[Prompt], of: list[Truth], which: Sequence[int], n: int, step: int, *seed: int
    ) -> list[Rollout]:
        """n completions of each of these prompts, or conversations, on every rank. A collective."""
        asked, limit = [source[i] for i in which], longest([of[i] for i in which])
        key = (config.seed, *seed)
        if conversing:
            made = play(
                engine, Conversation, asked, which, n, step=step, seed=key, tokenizer=tokenizer, world=world,
                options=replace(config, max_completion_length=limit),
            )  # fmt: skip
        else:
            groups = engine.generate([p.ids for p in asked], n, seed=key, limits=[limit] * len(asked))
            made = as_rollouts(groups, asked, which, step, engine, tokenizer.stop_ids)
        return with_truth(made, of)

    def energies(rollouts: list[Rollout], n: int) -> tuple[Tensor, dict[str, Tensor]]:
        """(advantages [groups, n], facts by group), every rank its share of the groups."""
        groups = [rollouts[i : i + n] for i in range(0, len(rollouts), n)]
        mine = groups[world.rank :: world.size]
        found = []
        most, at_once = math.ceil(len(groups) / world.size), max(1, mb // n)
        for begin in range(0, most, at_once):  # as many on every rank: each is a collective
            part = mine[begin : begin + at_once] or groups[:1]
            with on_device(frozen, config, world), base_of(model, frozen) as network:
                samples, truth = group_features(network, part, config)
            if begin < len(mine):
                advantage, facts = energy(samples.double(), truth.double(), config)
                found += [
                    (advantage[k].tolist(), {name: v[k].item() for name, v in facts.items()})
                    for k in range(len(part))
                ]
        shares = dist.gather(found, world)
        whole = [shares[i % world.size][i // world.size] for i in range(len(groups))]
        names = whole[0][1]
        return torch.tensor([a for a, _ in whole]), {k: torch.tensor([f[k] for _, f in whole]) for k in names}

    def evaluated(step: int) -> dict[str, float]:
        engine.sync(step, due=True)
        k = config.eval_num_generations
        made = sampled(held_out, held_truths, range(len(held_out)), k, step, -1, step)
        model.eval()
        _, facts = energies(made, k)
        tally = Tally()
        with without_gradients(model):
            for _, compute in truth_nll(model, made[::k], config, world):
                _, nll, count = compute(1.0)
                tally.mean("eval/loss", nll.item(), count)
        model.train()
        if world.main:
            write_rollouts(output_dir / "rollouts", step, made, tokenizer, kind="eval")
        right = sum(r.completion_ids == r.ground_truth_ids for r in made)
        return {"eval/exact": right / len(made), **tally.result(world),
                **{f"eval/{name}": facts[name].mean().item() for name in JUDGED}}  # fmt: skip

    # 4. The loop.
    pending = False
    try:
        if held_out and state["eval_before"] is None:
            state["eval_before"] = evaluated(step)
            logger.log(step, state["eval_before"])
        while step < total_steps:
            raced = dist.begin_step(step + 1, world)
            seconds, took, sync = dist.Timer(), {}, {}
            # a. Samples of each prompt, from the engine or a recorded file.
            if replay is not None:
                rollouts = replay.batch(step, batch_size)
            elif ahead is not None:
                rollouts = ahead
            else:
                if pending:
                    assert isinstance(engine, VllmEngine)
                    rollouts = rolled(engine.collect(step), step, step)
                else:
                    sync = engine.sync(step)
                    rollouts = sampled(prompts, truths, order.batch(step), n, step, step)
            ahead, pending = None, False
            took["generate"] = seconds()
            if config.async_prefetch and step + 1 < total_steps:
                assert isinstance(engine, VllmEngine)
                sync = engine.sync(step) or sync
                ids, limits = job(step + 1)
                engine.prefetch(ids, n, seed=(config.seed, step + 1), limits=limits)
                pending = True

            # b. Their energies, and advantages over the siblings.
            advantage, facts = energies(rollouts, n)
            for rollout, value in zip(rollouts, advantage.flatten().tolist(), strict=True):
                rollout.advantage, rollout.rewards = config.rl_coef * value, {}
            if world.main:
                write_rollouts(output_dir / "rollouts", step, rollouts, tokenizer)
            took["features"] = seconds()

            with monitor.profiled(step + 1, config, output_dir, world.rank, world.device):
                # c. The policy's step, as in GRPO: this rank's micro-batches of the whole batch.
                micro = [rollouts[(k * world.size + world.rank) * mb :][:mb] for k in range(accumulation)]
                check_sampler(engine, model, rollouts, micro, config, world, share)
                with on_device(frozen if config.beta else None, config, world):
                    keep_logprobs(
                        model, frozen if config.beta else None, micro, config, world, share, old=False,
                        kl=measures_kl(config, step, 1),
                    )  # fmt: skip
                tally, losses, skipped = accumulate_gradients(
                    model, rollouts, micro, config, world, share, watch, step=step + 1, reused=False,
                    bonus=entropy_bonus(config, state.get("entropy", 0.0)), aux_coef=aux_coef,
                )  # fmt: skip
                if config.ce_coef:  # and the cross-entropy of the true completions, each prompt once
                    counted = sum(sum(true_rollout(r).written()) for r in rollouts[::n])
                    for batch, compute in truth_nll(model, rollouts[::n], config, world):
                        start, nll, count = watch.forward(functools.partial(compute, counted), batch.rows)
                        start.backward()
                        losses.append(config.ce_coef * nll / counted)
                        tally.mean("ebft/ce_loss", nll.item(), count)
                norm, with_gradient = dist.gradient_norm(trained)
                rate = dist.learning_rate(step, config, total_steps)
                if losses and watch.healthy(step + 1, losses, norm):
                    dist.clip_gradients(with_gradient, config.max_grad_norm, norm)
                    rate = dist.update(optimizers, rate)
            step += 1
            took["train"] = seconds()

            # d. Metrics, evaluation, checkpoint.
            tally.mean("loss", sum(loss.item() for loss in losses), 1.0 / world.size)
            state["num_tokens"] += sum(len(r.prompt_ids) + len(r.completion_ids) for r in rollouts)
            policy_metrics = tally.result(world)
            state["entropy"] = policy_metrics.get("entropy", state.get("entropy", 0.0))
            metrics: dict[str, float] = {
                **policy_metrics, **completion_metrics(rollouts), **sync,
                **{f"ebft/{name}": values.mean().item() for name, values in facts.items()},
                "ebft/advantages_std": advantage.std(-1).mean().item() if n > 1 else 0.0,
                "grad_norm": norm.item(), "learning_rate": rate, "num_tokens": state["num_tokens"],
                "skipped_micro_batches": float(skipped), "step_time": sum(took.values()),
                "weight_version_lag": float(step - 1 - min(r.weight_version for r in rollouts)),
                **{f"step_time/{k}": v for k, v in took.items()}, **watch.metrics(),
                **memory.peak_memory(world.device), **raced,
            }  # fmt: skip
            logger.advance()
            stopping = logger.stopping(interrupt.signal, step, world)
            last = step == total_steps
            evaluating = bool(held_out) and (
                last or (config.eval_steps is not None and step % config.eval_steps == 0)
            )
            saving = config.save_steps is not None and (last or step % config.save_steps == 0)
            if pending and (evaluating or saving or stopping):
                assert isinstance(engine, VllmEngine)
                ahead, pending = rolled(engine.collect(step), step, step), False
            if evaluating:
                metrics |= evaluated(step)
                state["eval_after"] = {k: v for k, v in metrics.items() if k.startswith("eval/")}
            logger.observe(step, metrics)
            if step % config.logging_steps == 0 or last or evaluating:
                logger.log(step, metrics)
                if world.main:
                    for r in rollouts[: 2 if config.log_completions else 0]:
                        shown = (
                            tokenizer.decode(ids or []) for ids in (r.completion_ids, r.ground_truth_ids)
                        )
                        log.info("  %r, true %r, advantage %+.3f", *shown, r.advantage)
            if saving or stopping:
                engine.sync(step, due=True)
                held = None if ahead is None else [vars(r) for r in ahead]
                checkpointer.save(step, model, optimizers, {**state, "ahead": held})
            if stopping and not last:
                checkpointer.finish()
                logger.stopped(step, world)
                return
    except EngineError as error:
        if step > (checkpointer.steps() or [0])[-1]:  # nothing of the run is lost to a server
            checkpointer.save(step, model, optimizers, {**state, "ahead": None})
            checkpointer.finish()
            raise EngineError(f"{error}; step {step} is saved, the same command goes on from it") from None
        raise
    checkpointer.finish()

    # 5. Final save and report.
    final = save_final(model, tokenizer, config, world)
    logger.close()
    if held_out:
        monitor.report_evaluation(state["eval_before"], state.get("eval_after", state["eval_before"]))
    monitor.say_saved(final)
    dist.finish()


Truth = tuple[list[int], list[int] | None]  # token ids, and 1 where an answer is (None: everywhere)


def true_completion(prompt: Prompt, tokenizer: Tokenizer, max_turns: int = 1) -> Truth:
    """The row's true completion as the policy would have to write it, its end included: `ground_truth`, else
    the answer that stood in the row, else `answer`. With `remaining_turns` all that follows the prompt."""
    candidates = (prompt.columns.get("ground_truth"), prompt.completion, prompt.columns.get("answer"))
    answer = next((c for c in candidates if isinstance(c, str) and c), None)
    remaining = prompt.columns.get("remaining_turns") or []
    if answer is None:
        raise DataError(prompt.name, None, "has no true completion", "EBFT compares with one")
    if isinstance(prompt.prompt, str):
        if remaining:
            raise DataError(prompt.name, None, "has remaining_turns, but its prompt is no list of messages")
        return tokenizer.encode(answer) + ([] if tokenizer.eos_id is None else [tokenizer.eos_id]), None
    questions = questions_of(remaining, prompt.name)
    if len(questions) >= max_turns:
        raise DataError(
            prompt.name, None, f"has {len(questions) + 1} answers", f"raise max_turns ({max_turns})"
        )
    tools, more = prompt.tools, prompt.columns.get("chat_template_kwargs") or {}
    messages = [*prompt.prompt, {"role": "assistant", "content": answer}, *remaining]
    begin, asked = len(prompt.ids), len(prompt.prompt)
    try:
        ids, labels = tokenizer.encode_chat(messages, tools, **more)
        whole = tokenizer.render(messages, tools, **more)
        answers = [i for i in range(asked, len(messages) - 1) if messages[i]["role"] == "assistant"]
        same = ids[:begin] == prompt.ids and all(
            whole.startswith(tokenizer.render(messages[: i + 1], tools, **more)) for i in answers
        )
    except BadRow as error:
        raise DataError(prompt.name, None, str(error)) from None
    if remaining and not same:  # what the policy reads back would not be what it wrote
        raise DataError(
            prompt.name, None, "has remaining_turns, but the chat template changes earlier turns",
            "set strip_thinking: true, or another chat_template, e.g. chatml",
        )  # fmt: skip
    last = max(i for i, label in enumerate(labels) if label != IGNORE)
    stops, begin_of_last = set(tokenizer.stop_ids), last
    while begin_of_last and labels[begin_of_last - 1] != IGNORE:
        begin_of_last -= 1
    # A generation block may hold white space behind the end of the turn, which the policy never writes
    last = max((i for i in range(begin_of_last, last + 1) if ids[i] in stops), default=last)
    if ids[:begin] != prompt.ids:  # the template writes past turns in another way than the one to come
        begin = begin_of_last
    mask = [int(label != IGNORE) for label in labels[begin : last + 1]]
    return ids[begin : last + 1], mask if remaining else None


def questions_of(remaining: list[dict], name: str = "") -> list[list[dict]]:
    """What is said before each of the answers that `remaining_turns` holds. DataError names the row."""
    questions, said = [], []
    for message in remaining:
        if not isinstance(message, dict) or not isinstance(message.get("content"), str):
            raise DataError(name, None, "remaining_turns must be a list of messages with text")
        if message.get("role") == "assistant":
            if not said:
                raise DataError(name, None, "remaining_turns has an answer without a question before it")
            questions.append(said)
            said = []
        else:
            said.append(message)
    if remaining and said:
        raise DataError(name, None, "remaining_turns must end with an answer")
    return questions


class Conversation:
    """The other side of a multi-turn row: its own next question, whatever the policy said."""

    def reset(self, prompt: Any, remaining_turns: Sequence[dict] = (), **columns: Any) -> None:
        self.questions = questions_of(list(remaining_turns))

    def step(self, text: str, ids: list[int]) -> tuple[list[dict] | None, float, bool]:
        return (self.questions.pop(0), 0.0, False) if self.questions else (None, 0.0, True)


def true_rollout(rollout: Rollout) -> Rollout:
    """The true completion in the place of the sampled one."""
    assert rollout.ground_truth_ids is not None
    mask = rollout.ground_truth_mask
    return Rollout(rollout.prompt_ids, rollout.ground_truth_ids, completion_mask=mask, row=rollout.row)


def truth_nll(
    model: Transformer, rollouts: Sequence[Rollout], config: Config, world: dist.World
) -> Iterator[tuple[PolicyBatch, Callable[[float], tuple[Tensor, Tensor, int]]]]:
    """The true completions, this rank's share in micro-batches, as many on every rank (one that fills up
    counts nothing); and for each what gives (what the backward pass starts from, Σ −log p, tokens), of a step
    of so many tokens."""

    def compute(batch: PolicyBatch, real: bool, counted: float) -> tuple[Tensor, Tensor, int]:
        nll = -token_logprobs(model, batch, 1.0)[0].sum()
        if not real:  # where, not a product with 0: a stranger's row may be infinite
            nll = torch.where(torch.zeros_like(nll, dtype=torch.bool), nll, 0.0)
        return nll * (config.ce_coef / counted * world.size), nll.detach(), len(batch.targets) * real

    mine, mb = rollouts[world.rank :: world.size], config.micro_batch_size
    for k in range(math.ceil(math.ceil(len(rollouts) / world.size) / mb)):
        part = mine[k * mb : (k + 1) * mb]
        batch = collate([true_rollout(r) for r in part or rollouts[:1]], world.device)
        yield batch, functools.partial(compute, batch, bool(part))


@forward_only
def group_features(
    network: Transformer, groups: list[list[Rollout]], config: Config
) -> tuple[Tensor, Tensor]:
    """(features of the samples [P, n, D'], of the truths [P, D']) of the frozen network: each prompt goes
    through it once, the truth and the samples behind it."""
    device, depths = network.device, feature_depths(network, config)
    ids: list[int] = []
    layout: list[tuple[int, list[tuple[int, int]]]] = []
    places: list[tuple[range, range]] = []  # of the prompt, of its continuation
    for group in groups:
        prompt = group[0].prompt_ids
        own = range(len(ids), len(ids) + len(prompt))
        ids += prompt
        sequences = [group[0].ground_truth_ids or [], *(r.completion_ids for r in group)]
        layout.append((len(prompt), [(len(prompt), len(s)) for s in sequences]))
        for sequence in sequences:
            places.append((own, range(len(ids), len(ids) + len(sequence))))
            ids += sequence
    states = network.hidden_states(
        torch.tensor([ids], device=device), shared_prompts=SharedPrompts(layout, device), layers=depths
    )[0][0]

    def pooled(prompt: range, own: range) -> Tensor:
        if config.embed_method == "last_token":
            return states[own[-1]]
        mine = states[own.start : own.stop]
        if config.embed_method == "completion_mean":
            return mine.mean(0)
        if config.embed_method == "concat":
            return torch.cat([mine[min(len(mine) - 1, int(part * len(mine)))] for part in (0.25, 0.5, 0.75)])
        return (states[prompt.start : prompt.stop].sum(0) + mine.sum(0)) / (len(prompt) + len(mine))

    made = torch.stack([pooled(*place) for place in places]).view(len(groups), 1 + len(groups[0]), -1)
    return made[:, 1:], made[:, 0]


def feature_depths(network: Transformer, config: Config) -> tuple[int, ...]:
    return tuple(int(share * network.arch.num_layers) for share in config.feature_layers)


def advantages_by_document(part: list[Document], advantage: Tensor) -> dict[str, Tensor]:
    """The sum over a document's blocks [documents]: not a number where one of them is not."""
    return {"advantages": torch.stack([a.sum() for a in advantage.split([len(d.anchors) for d in part])])}


def document_nll(
    model: Transformer, part: list[Document], hidden: Tensor | None = None
) -> tuple[Tensor, int]:
    """(Σ −log p of the counted true tokens, how many), from hidden states [tokens, D] of the documents in a
    row, or from a pass of its own."""
    ids, which, _ = packed(part, model.device)
    if hidden is None:
        hidden = model.hidden_states(ids, document_ids=which)[0][0]
    labels = torch.full_like(ids[0], IGNORE)
    labels[:-1] = ids[0, 1:]
    keep = torch.tensor([c for d in part for c in [*d.counted[1:], False]], device=ids.device)
    labels = labels.where(keep, IGNORE)
    return linear_cross_entropy(hidden, model.head_weight, labels, softcap=model.arch.final_softcap), int(
        keep.sum()
    )


def show_blocks(part: list[Document], drawn: tuple[Tensor, Tensor, Tensor], tokenizer: Tokenizer) -> None:
    """The first samples of the first block beside the truth."""
    tokens, _, advantage = drawn
    anchor, length = part[0].anchors[0], tokens.shape[-1]
    before = tokenizer.decode(part[0].ids[max(0, anchor - 16) : anchor])
    truth = tokenizer.decode(part[0].ids[anchor : anchor + length])
    for ids, value in list(zip(tokens[0].tolist(), advantage[0].tolist(), strict=True))[:2]:
        log.info("  after %r: %r, true %r, advantage %+.3f", before, tokenizer.decode(ids), truth, value)


def cli() -> None:
    """torchrun ebft.py, or ballast-ebft where the package is installed."""
    run(
        main,
        lambda: parse_config(
            Config, sys.argv[1:], description=" ".join((__doc__ or "").split("\n\n")[0].split())
        ),
    )


if __name__ == "__main__":
    cli()
