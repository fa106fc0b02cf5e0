"""Supervised fine-tuning: teach a model to write the answers in a data set, by maximising the likelihood of
their tokens.

    python sft.py --config configs/tiny/sft.yaml
    torchrun --nproc-per-node 8 sft.py --config configs/llama-3.1-8b-lora.yaml learning_rate=2e-4

The loss of an optimiser step is the mean negative log-likelihood of the trained tokens of its whole global
batch: Σ NLL / (number of trained tokens, over all micro-batches and ranks). Dividing per micro-batch instead
would weigh a token by how full its micro-batch is, and make the result depend on micro_batch_size (reference
page: Loss Spikes).
"""

import functools
import hashlib
import math
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

import dist
from checkpoints.saving import CheckpointOptions
from data import RowOptions, ScratchOptions, prepare, report_rows
from dist import DistOptions, OptimizerOptions, World
from health import memory, monitor
from health.forensics import ForensicOptions, Forensics
from health.monitor import HeldOutLosses, LogOptions, Meter
from model import ModelOptions, Transformer, forward_only, load_balancing_loss
from numerics.losses import linear_cross_entropy, linear_logprobs
from rollouts.generation import generate
from run import loop
from run.config import ConfigError, check_at_least_one, check_every_part, check_ranges
from run.log import log
from run.loop import Run
from text import findings
from text.packing import Batch, Batches, Dataset, LoopOptions, split_held_out, weights_of
from text.tokenizer import IGNORE, Tokenizer


@dataclass
class Config(
    ModelOptions, ScratchOptions, RowOptions, LoopOptions, OptimizerOptions, CheckpointOptions, DistOptions,
    LogOptions, ForensicOptions,
):
    sample_packing: bool = False
    """Put several documents in one row of sequence_len. Attention and positions stay within a document."""
    eval_answers: int = 0
    """At the end, sample greedy answers to N held-out rows and report the share that equals the reference."""
    eval_max_new_tokens: int = 128
    """Longest sampled answer, in tokens."""

    def __post_init__(self):
        check_every_part(self)
        check_at_least_one(self, "eval_max_new_tokens")
        check_ranges(self, ("eval_answers", 0, math.inf))


# ------------------------------------------------------------------------------------------------------------
# The loss
# ------------------------------------------------------------------------------------------------------------


@dataclass
class StepSize:
    """Totals of an optimiser step over all micro-batches and ranks. Losses are divided by them, so that they
    do not depend on how the step is cut into micro-batches."""

    tokens: int  # trained ones
    micro_batches: int  # of each rank
    ranks: int


def batch_nll(model: Transformer, batch: Batch, aux_coef: float = 0.0) -> tuple[Tensor, Tensor | None]:
    """(sum of NLL over the micro-batch's trained tokens, load-balancing loss or None)."""
    hidden, router_logits = model.hidden_states(
        batch.input_ids, position_ids=batch.position_ids, document_ids=batch.document_ids
    )
    nll = linear_cross_entropy(
        hidden.flatten(0, 1), model.head_weight, batch.targets.flatten(), softcap=model.arch.final_softcap
    )
    if not router_logits or aux_coef == 0:
        return nll, None
    return nll, load_balancing_loss(router_logits, model.arch, batch.document_ids.flatten() >= 0)


def sft_loss(
    model: Transformer, batch: Batch, size: StepSize, aux_coef: float
) -> tuple[Tensor, dict[str, Tensor]]:
    """This micro-batch's part of the step's loss, and its sums. The parts of all micro-batches and ranks add
    up to the mean NLL of the step's trained tokens; FSDP averages gradients over ranks: × ranks."""
    nll, aux = batch_nll(model, batch, aux_coef)
    loss = nll * (size.ranks / size.tokens)
    if aux is None:
        return loss, {"nll": nll.detach(), "loss": loss.detach()}
    loss = loss + aux_coef * aux / size.micro_batches
    return loss, {"nll": nll.detach(), "loss": loss.detach(), "aux": aux.detach() / size.micro_batches}


@forward_only
def evaluate(
    model: Transformer, batches: Batches, config: Config, world: World, before: HeldOutLosses
) -> dict[str, float]:
    """Mean NLL of the held-out tokens, over all ranks, and its standard error over rows. `before` keeps the
    best evaluation of the run."""
    model.eval()
    losses: list[tuple[float, int]] = []
    for step in range(batches.plan(epochs=1)):
        for batch in batches.micro_batches(
            batches.units(step), config.micro_batch_size, world.rank, world.size
        ):
            losses += row_losses(model, batch.to(world.device))
    model.train()
    return before.metrics(losses, world)


def row_losses(model: Transformer, batch: Batch) -> list[tuple[float, int]]:
    """(NLL, trained tokens) of each document of a micro-batch that has any."""
    hidden, _ = model.hidden_states(
        batch.input_ids, position_ids=batch.position_ids, document_ids=batch.document_ids
    )
    found = linear_logprobs(
        hidden.flatten(0, 1), model.head_weight, batch.targets.flatten(), softcap=model.arch.final_softcap
    )
    rows = torch.arange(len(batch.input_ids), device=hidden.device)[:, None]
    owner = (rows * (batch.document_ids.max() + 1) + batch.document_ids.clamp(min=0)).flatten()
    nll = torch.zeros(int(owner.max()) + 1, dtype=torch.float64, device=hidden.device)
    tokens = torch.zeros_like(nll).index_add_(0, owner, (batch.targets != IGNORE).flatten().double())
    nll.index_add_(0, owner, -found.logprobs.double())
    return [(n, int(t)) for n, t in zip(nll.tolist(), tokens.tolist(), strict=True) if t]


def sampled_accuracy(
    model: Transformer, dataset: Dataset, rows: list[int], tokenizer: Tokenizer, config: Config, world: World
) -> tuple[float, list[tuple[str, str, str]]]:
    """Share of held-out rows whose greedy answer equals the reference, and a few (prompt, answer, reference).

    The prompt is what comes before a row's first trained token, the reference the trained tokens that follow
    it.
    """
    own_rows = rows[world.rank :: world.size]
    prompts, references = [], []
    for row in own_rows or rows[:1]:
        tokens, labels = dataset.row(row)
        first = int((labels != IGNORE).argmax())
        length = int((labels[first:] == IGNORE).argmax()) or len(labels) - first
        prompts.append(tokens[:first].tolist())
        references.append(tokenizer.decode(tokens[first : first + length].tolist()).strip())

    def anyone(active: bool) -> bool:
        return dist.all_reduce([float(active)], world)[0] > 0

    answers = []
    # Every rank makes the same number of calls: each is a collective.
    for first in range(0, -(-len(rows) // world.size), 64):
        batch_prompts = prompts[first : first + 64] or prompts[:1]
        generation = generate(
            model, batch_prompts, max_new_tokens=config.eval_max_new_tokens, temperature=0,
            stop_token_ids=tokenizer.stop_ids, anyone=anyone,
        )
        answers += [tokenizer.decode(ids).strip() for ids in generation.completion_ids]
    right = sum(a == r for a, r in zip(answers[: len(own_rows)], references, strict=False))
    total_right, total = dist.all_reduce([float(right), float(len(own_rows))], world)
    texts = [tokenizer.decode(prompt, special=True) for prompt in prompts[:4]]
    return total_right / total, list(zip(texts, answers, references, strict=False))


# ------------------------------------------------------------------------------------------------------------
# The run
# ------------------------------------------------------------------------------------------------------------


def main(config: Config) -> None:
    # 1. Set up.
    run = loop.begin(config)
    world, tokenizer = run.world, run.tokenizer

    # 2. Data: encoded once, by the first rank; the others read what it wrote.
    dataset, order, held_out, eval_order = read_data(run, config)
    loop.plan(run, order.plan(config.num_epochs, config.max_steps), order.steps_per_epoch(), **{
        "micro_batch_size · gradient_accumulation_steps · processes": order.units_per_step,
        "data": fingerprint(dataset, config),
    })

    # 3. Model and optimiser.
    model, optimizers = loop.build(run, tokenizer.vocab_size if config.random_init else None)
    check_ids(dataset, run.arch.vocab_size)
    loop.warn_beyond_positions(run, int(max(dataset.lengths, default=0)), "sequence_len")
    trained = [p for p in model.parameters() if p.requires_grad]
    aux_coef = loop.router_aux_coef(run)
    loop.describe(run, model, f"{len(order.rows):,} rows to train on, {len(eval_order.rows):,} held out; "
             f"{run.total_steps} steps of {order.units_per_step} {'packs' if order.capacity else 'rows'} on "
             f"{world.devices(config)}")
    memory.report_weights(model)

    # 4. Resume.
    loop.resume(run, model, optimizers)
    state, held_out_losses = run.state, HeldOutLosses()
    if len(eval_order.rows) and state["eval_before"] is None:
        state["eval_before"] = evaluate(model, eval_order, config, world, held_out_losses)["eval/loss"]
        log.info("held-out loss before training: %.4f", state["eval_before"])
    forensics = Forensics(model, config, world, tokenizer)

    # 5. The loop.
    first_step, meter, seconds = run.step, Meter(world), dist.Timer()
    while run.step < run.total_steps:
        rank_timing = dist.begin_step(run.step + 1, world)
        with monitor.profiled(run.step + 1, config, run.output_dir, world.rank, world.device):
            # a. The rows of this step, the same on every rank; this rank's micro-batches; and the tokens that
            # all of them train together.
            units = order.units(run.step)
            batches = order.micro_batches(units, config.micro_batch_size, world.rank, world.size)
            trained_tokens = order.trained_tokens(units)
            size = StepSize(max(1, trained_tokens), len(batches), world.size)
            seconds_for_data = seconds.so_far()

            # b. Forward and backward.
            for batch in batches:
                batch = batch.to(world.device)
                forensics.remember(batch, [dataset.name(row) for row in batch.rows])
                loss, sums = sft_loss(model, batch, size, aux_coef)
                loss.backward()
                meter.add(**sums, tokens=(batch.document_ids >= 0).sum(), slots=batch.input_ids.numel())

            # c. The norm before clipping, and the update: nothing that is not finite may reach the weights.
            norm, with_gradient = dist.gradient_norm(trained)
            rate = dist.learning_rate(run.step, config, run.total_steps)
            loss_of = functools.partial(sft_loss, model, size=size, aux_coef=aux_coef)
            finite = forensics.healthy(run.step + 1, meter.values("loss"), norm, loss_of)
            if finite and trained_tokens:  # without a token momentum alone would still move the weights
                dist.clip_gradients(with_gradient, config.max_grad_norm, norm)
                rate = dist.update(optimizers, rate)
        run.step += 1
        state["empty_steps"] = state.get("empty_steps", 0) + (not trained_tokens)

        # d. Metrics of this step, over all ranks.
        sums = meter.end_step(
            () if finite else ("nll", "loss"), trained=size.tokens, learnt=size.tokens * finite,
            documents=sum(len(unit) for unit in units), seconds=seconds,
        )
        state["num_tokens"] += int(sums["tokens"])
        metrics = loss_metrics(sums, aux_coef, world) | {
            "train/learning_rate": rate, **({"train/grad_norm": norm.item()} if finite else {}),
            "step_time": sums["seconds"], "step_time/data_share": seconds_for_data / sums["seconds"],
            "trained_token_share": trained_share(sums),
            **memory.peak_memory(world.device), **rank_timing, **forensics.metrics(),
            **({"empty_steps": float(state["empty_steps"])} if state["empty_steps"] else {}),
        }
        if run.step == first_step + 1:
            memory.report_optimizers(optimizers, config.optimizer, world.device)

        # e. Log, evaluate, save.
        due = loop.end_step(run, evaluates=len(eval_order.rows) > 0)
        logged: dict[str, float] = {}
        if due.log:  # means over the steps since the last line
            sums = meter.drain()
            logged = metrics | loss_metrics(sums, aux_coef, world) | speed_metrics(sums, model, world)
            logged |= {"epoch": order.epoch_of(run.step), "num_tokens": state["num_tokens"]}
        if due.evaluate:
            logged |= evaluate(model, eval_order, config, world, held_out_losses)
            state["eval_after"] = logged["eval/loss"]
        run.logger.observe(run.step, logged | metrics, rows=lambda units=units: named_rows(dataset, units))
        if logged:
            run.logger.log(run.step, logged)
        if due.save:
            run.checkpointer.save(run.step, model, optimizers, state)
        seconds()  # evaluating and saving are not training time
        if due.stop:
            return loop.stop(run)

    # 6. Final save and report.
    final, summary = loop.save_model(run, model), []
    if state["eval_before"] is not None:
        after = state.get("eval_after", state["eval_before"])
        summary = [f"held-out loss       {state['eval_before']:.4f} → {after:.4f}"]
    if config.eval_answers:
        summary.append(judge_answers(run, model, held_out, eval_order.rows[: config.eval_answers]))
    loop.finish(run, final, summary)


def read_data(run: Run, config: Config) -> tuple[Dataset, Batches, Dataset, Batches]:
    """(rows to train on, their order, rows that are held out, their order)."""
    cache = Path(config.dataset_prepared_path or run.output_dir / "prepared")

    def encoded(specs: list[dict]) -> Dataset:
        return dist.main_first(lambda: prepare(specs, run.tokenizer, config, run.directory, cache), run.world)

    def ordered(rows: np.ndarray, of: Dataset, weights: list[float], units: int, shuffle: bool) -> Batches:
        return Batches(
            of, rows, weights=weights, units_per_step=units * run.world.size, seed=config.seed,
            pad_id=run.tokenizer.pad_id, capacity=config.sequence_len if config.sample_packing else None,
            shuffle=shuffle,
        )

    dataset = encoded(config.datasets)
    report_rows(dataset)
    rows, held_out_rows = split_held_out(len(dataset), config.val_set_size, config.seed)
    held_out, weights = dataset, [1.0] * len(config.datasets)
    if config.test_datasets:
        held_out, weights = encoded(config.test_datasets), [1.0] * len(config.test_datasets)
        held_out_rows = np.arange(len(held_out))
    units = config.micro_batch_size * config.gradient_accumulation_steps
    order = ordered(rows, dataset, weights_of(config.datasets), units, shuffle=True)
    eval_order = ordered(held_out_rows, held_out, weights, config.micro_batch_size, shuffle=False)
    kinds = [str(spec.get("type")) for spec in config.datasets]
    if config.health and run.world.main:
        run.measured |= findings.of_rows(dataset, order, held_out, held_out_rows, run.tokenizer, kinds)
    return dataset, order, held_out, eval_order


def loss_metrics(sums: dict[str, float], aux_coef: float, world: World) -> dict[str, float]:
    """The mean loss, from sums over steps and ranks. Skipped steps are not counted."""
    metrics = {}
    if sums["learnt"]:
        metrics["train/loss"] = sums["nll"] / sums["learnt"]
        if sums["nll"] and sums["steps"] == 1:  # is the displayed loss the one that was differentiated?
            differentiated = sums["loss"] / world.size - aux_coef * sums.get("aux", 0.0) / world.size
            metrics["train/loss_consistency"] = differentiated / metrics["train/loss"]
    if aux_coef and "aux" in sums:
        metrics["train/router_aux_loss"] = sums["aux"] / world.size / sums["steps"]
    return metrics


def trained_share(sums: dict[str, float]) -> float:
    """Share of tokens that are trained; the first of each document, which nothing predicts, is left out."""
    return sums["trained"] / max(1, sums["tokens"] - sums["documents"])


def speed_metrics(sums: dict[str, float], model: Transformer, world: World) -> dict[str, float]:
    """Time, throughput and token shares, from sums over steps and ranks."""
    metrics = {
        "tokens_per_second": sums["tokens"] / sums["seconds"], "step_time": sums["seconds"] / sums["steps"],
        "trained_token_share": trained_share(sums),
        "packing_efficiency": sums["tokens"] / sums["slots"],
    }
    if peak := memory.peak_flops(world.device):
        flops = model.flops_per_token(sums["tokens"] / sums["documents"])
        metrics["mfu"] = flops * metrics["tokens_per_second"] / (peak * world.size)
    return metrics


def judge_answers(run: Run, model: Transformer, held_out: Dataset, rows: np.ndarray) -> str:
    """Sample answers to these held-out rows, log a few, and return a summary line."""
    chosen = [int(row) for row in rows]
    accuracy, answers = sampled_accuracy(model, held_out, chosen, run.tokenizer, run.config, run.world)
    run.logger.log(run.total_steps, {"eval/accuracy": accuracy})
    for prompt, answer, reference in answers:
        verdict = "right" if answer == reference else f"wrong: {shortened(reference)}"
        log.info("  %s → %s   [%s]", shortened(prompt), shortened(answer), verdict)
    return f"held-out answers    {100 * accuracy:.1f} % right (greedy, {len(chosen)} rows)"


def fingerprint(dataset: Dataset, config: Config) -> str:
    """Hash of the rows and of the weights that mix them."""
    weights = [spec.get("weight", 1.0) for spec in config.datasets]
    return hashlib.sha256((dataset.fingerprint + repr(weights)).encode()).hexdigest()


def named_rows(dataset: Dataset, units: list[list[int]]) -> str:
    rows = [row for unit in units for row in unit]
    return ", ".join(dataset.name(row) for row in rows[:4]) + (" …" if len(rows) > 4 else "")


def shortened(text: str) -> str:
    text = " ".join(text.split())
    return text if len(text) <= 100 else text[:48] + " … " + text[-48:]


def check_ids(dataset: Dataset, vocab_size: int) -> None:
    if len(dataset.tokens) and int(dataset.tokens.max()) >= vocab_size:
        token = int((dataset.tokens >= vocab_size).argmax())
        row = int((dataset.offsets[1:] > token).argmax())
        problem = f"token id {dataset.tokens[token]} is beyond the vocabulary of {vocab_size}"
        raise ConfigError(dataset.name(row), None, f"{problem}: was it made with another tokenizer?")


if __name__ == "__main__":
    loop.cli(main, Config, __doc__)
