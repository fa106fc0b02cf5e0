"""Supervised fine-tuning: teach a model to write the answers in a data set, by the likelihood of their
tokens.

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
import sys
from dataclasses import asdict, dataclass
from pathlib import Path

import numpy as np
from torch import Tensor

import dist
from checkpoints import building
from checkpoints.saving import Checkpointer, CheckpointOptions, save_final
from checkpoints.weights import read_architecture, resized
from data import RowOptions, ScratchOptions, load_tokenizer, prepare, report_rows, trained_tokenizer
from dist import DistOptions, OptimizerOptions, World
from health import memory, monitor
from health.forensics import ForensicOptions, Forensics
from health.monitor import LogOptions, MetricLogger
from model import ModelOptions, Transformer, forward_only, load_balancing_loss
from numerics.losses import linear_cross_entropy
from rollouts.generation import generate
from run.config import (
    ConfigError,
    check_at_least_one,
    check_every_part,
    check_ranges,
    parse_config,
    resolve_checkpoint,
)
from run.log import log, start_log
from run.loop import run
from text.packing import Batch, Batches, Dataset, LoopOptions, settle_intervals, split_held_out, weights_of
from text.tokenizer import IGNORE, Tokenizer


@dataclass
class Config(
    ModelOptions, ScratchOptions, RowOptions, LoopOptions, OptimizerOptions, CheckpointOptions, DistOptions,
    LogOptions, ForensicOptions,
):  # fmt: skip
    sample_packing: bool = False
    """Put several documents in one row of sequence_len. Attention and positions stay within a document."""
    eval_answers: int = 0
    """At the end, sample greedy answers to so many held-out rows and report the share that equals the
    reference."""
    eval_max_new_tokens: int = 128
    """Longest sampled answer, in tokens."""

    def __post_init__(self):
        check_every_part(self)
        check_at_least_one(self, "eval_max_new_tokens")
        check_ranges(self, ("eval_answers", 0, math.inf))


# ------------------------------------------------------------------------------------------------------------
# The loss
# ------------------------------------------------------------------------------------------------------------


def sft_loss(model: Transformer, batch: Batch, aux_coef: float = 0.0) -> tuple[Tensor, Tensor | None]:
    """(sum of NLL over the micro-batch's trained tokens, load-balancing loss or None). The caller divides the
    sum by the trained tokens of the global batch."""
    hidden, router_logits = model.hidden_states(
        batch.input_ids, position_ids=batch.position_ids, document_ids=batch.document_ids
    )
    nll = linear_cross_entropy(
        hidden.flatten(0, 1), model.head_weight, batch.targets.flatten(), softcap=model.arch.final_softcap
    )
    if not router_logits or aux_coef == 0:
        return nll, None
    return nll, load_balancing_loss(router_logits, model.arch, batch.document_ids.flatten() >= 0)


@forward_only
def evaluate(model: Transformer, batches: Batches, config: Config, world: World) -> dict[str, float]:
    """Mean NLL of the held-out tokens, over all ranks."""
    model.eval()
    nll = tokens = 0.0
    for step in range(batches.plan(epochs=1)):
        for batch in batches.micro_batches(
            batches.units(step), config.micro_batch_size, world.rank, world.size
        ):
            batch = batch.to(world.device)
            nll += sft_loss(model, batch)[0].item()
            tokens += int((batch.targets != IGNORE).sum())
    model.train()
    nll, tokens = dist.all_reduce([nll, tokens], world)
    return {"eval/loss": nll / max(1, tokens)}


def sampled_accuracy(
    model: Transformer, dataset: Dataset, rows: list[int], tokenizer: Tokenizer, config: Config, world: World
) -> tuple[float, list[tuple[str, str, str]]]:
    """Share of held-out rows whose greedy answer equals the reference, and a few (prompt, answer, reference).

    The prompt is what comes before a row's first trained token, the reference the trained tokens that follow
    it.
    """
    mine = rows[world.rank :: world.size]
    prompts, references = [], []
    for row in mine or rows[:1]:
        tokens, labels = dataset.row(row)
        first = int((labels != IGNORE).argmax())
        length = int((labels[first:] == IGNORE).argmax()) or len(labels) - first
        prompts.append(tokens[:first].tolist())
        references.append(tokenizer.decode(tokens[first : first + length].tolist()).strip())

    def anyone(active: bool) -> bool:
        return dist.all_reduce([float(active)], world)[0] > 0

    answers = []
    # As many calls on every rank: each is a collective
    for begin in range(0, -(-len(rows) // world.size), 64):
        part = prompts[begin : begin + 64] or prompts[:1]
        made = generate(
            model, part, max_new_tokens=config.eval_max_new_tokens, temperature=0,
            stop_token_ids=tokenizer.stop_ids, anyone=anyone,
        )  # fmt: skip
        answers += [tokenizer.decode(ids).strip() for ids in made.completion_ids]
    right = sum(a == r for a, r in zip(answers[: len(mine)], references, strict=False))
    total_right, total = dist.all_reduce([float(right), float(len(mine))], world)
    texts = [tokenizer.decode(prompt, special=True) for prompt in prompts[:4]]
    return total_right / total, list(zip(texts, answers, references, strict=False))


# ------------------------------------------------------------------------------------------------------------
# The run
# ------------------------------------------------------------------------------------------------------------


def main(config: Config) -> None:
    # 1. Set up.
    output_dir, directory = Path(config.output_dir), Path(config.config_directory)
    world = dist.init(config)
    start_log(output_dir, world.main)
    dist.seed_everything(config.seed, world.rank)
    interrupt = dist.Interrupt()
    since_start = dist.Timer()

    # 2. Data: encoded once, by the first rank; the others read what it wrote.
    cache = Path(config.dataset_prepared_path or output_dir / "prepared")

    def encoded(specs: list[dict]) -> Dataset:
        return dist.main_first(lambda: prepare(specs, tokenizer, config, directory, cache), world)

    def ordered(
        rows: np.ndarray, of: Dataset, weights: list[float], units_a_step: int, shuffle: bool
    ) -> Batches:
        return Batches(
            of, rows, weights=weights, units_a_step=units_a_step, seed=config.seed, pad_id=tokenizer.pad_id,
            capacity=config.sequence_len if config.sample_packing else None, shuffle=shuffle,
        )  # fmt: skip

    checkpoint = dist.main_first(
        lambda: resolve_checkpoint(config.base_model, config.base_model_revision, directory), world
    )
    arch = read_architecture(checkpoint, config.ignore_config_fields)
    if config.tokenizer_vocab_size is None:
        tokenizer = load_tokenizer(checkpoint, config, directory)
    else:
        tokenizer = dist.main_first(lambda: trained_tokenizer(config, directory, cache), world)
    dataset = encoded(config.datasets)
    report_rows(dataset)
    train_rows, held_out_rows = split_held_out(len(dataset), config.val_set_size, config.seed)
    held_out, held_out_weights = dataset, [1.0] * len(config.datasets)
    if config.test_datasets:
        held_out, held_out_weights = encoded(config.test_datasets), [1.0] * len(config.test_datasets)
        held_out_rows = np.arange(len(held_out))
    global_batch = config.micro_batch_size * config.gradient_accumulation_steps * world.size
    weights = weights_of(config.datasets)
    order = ordered(train_rows, dataset, weights, global_batch, shuffle=True)
    eval_batch = config.micro_batch_size * world.size
    eval_order = ordered(held_out_rows, held_out, held_out_weights, eval_batch, shuffle=False)
    total_steps = order.plan(config.num_epochs, config.max_steps)
    dist.check_schedule(config, total_steps)
    settle_intervals(config, total_steps, order.steps_per_epoch())
    checkpointer = Checkpointer(output_dir / "checkpoints", world, config)
    identity = run_identity(config, global_batch, dataset)
    resume_from, saved = checkpointer.to_resume(identity)

    # 3. Model and optimiser.
    rows = tokenizer.vocab_size if config.random_init else max(arch.vocab_size, tokenizer.vocab_size)
    arch = resized(arch, rows, config.pad_vocab_to_multiple_of)
    check_ids(dataset, arch.vocab_size)
    model = building.build_model(arch, checkpoint, config, world, config.random_init, tokenizer.new_ids)
    trained = [p for p in model.parameters() if p.requires_grad]
    optimizers = dist.make_optimizers(model, config)
    aux_coef = (
        arch.router_aux_loss_coef if config.router_aux_loss_coef is None else config.router_aux_loss_coef
    )
    log.info(
        "%s: %s parameters, %s trained; %s rows to train on, %s held out; %d steps of %d %s on %s",
        arch.name, f"{model.count_parameters():,}", f"{sum(p.numel() for p in trained):,}",
        f"{len(train_rows):,}", f"{len(held_out_rows):,}", total_steps, global_batch,
        "packs" if config.sample_packing else "rows", world.devices(config),
    )  # fmt: skip

    stored = memory.weight_bytes(model)
    each = stored / model.count_parameters()
    log.info("memory of a process: weights %s, %.2f bytes a parameter of the model", memory.gib(stored), each)

    # 4. Resume.
    state = {"num_tokens": 0, "eval_before": None, "identity": identity}
    step = 0
    if resume_from is not None:
        step, state = saved["step"], {**saved, "identity": identity}
        checkpointer.load(resume_from, model, optimizers, config.seed)
    logger = MetricLogger(config, output_dir, main=world.main, first_step=step, total_steps=total_steps)
    if len(held_out_rows) and state["eval_before"] is None:
        state["eval_before"] = evaluate(model, eval_order, config, world)["eval/loss"]
        log.info("held-out loss before training: %.4f", state["eval_before"])
    peak = memory.peak_flops(world.device)
    watch = Forensics(model, config, world, tokenizer)

    def micro_loss(batch: Batch, tokens: int, count: int) -> tuple[Tensor, Tensor, Tensor | None]:
        """(this micro-batch's part of the step's loss, Σ NLL, load-balancing loss). FSDP averages gradients
        over ranks, the loss is a sum over them: × world.size."""
        nll, aux = sft_loss(model, batch, aux_coef)
        loss = nll * (world.size / tokens)
        return loss if aux is None else loss + aux_coef * aux / count, nll, aux

    log.debug("ready after %.1f s", since_start())

    # 5. The loop.
    window: dict[str, float] = {}  # sums since metrics were last written
    first_step = True
    seconds = dist.Timer()
    while step < total_steps:
        raced = dist.begin_step(step + 1, world)
        with monitor.profiled(step + 1, config, output_dir, world.rank, world.device):
            # a. The rows of this step, the same on every rank; this rank's micro-batches; and the tokens that
            # all of them train together.
            units = order.units(step)
            batches = order.micro_batches(units, config.micro_batch_size, world.rank, world.size)
            trained_tokens = order.trained_tokens(units)
            waited = seconds.so_far()

            # b. Forward and backward.
            losses: list[Tensor] = []
            differentiated: list[Tensor] = []
            aux_mean = 0.0
            for batch in batches:
                compute = functools.partial(micro_loss, batch.to(world.device), trained_tokens, len(batches))
                loss, nll, aux = watch.forward(compute, [dataset.name(row) for row in batch.rows])
                loss.backward()
                losses.append(nll.detach())
                differentiated.append(loss.detach())
                aux_mean += 0.0 if aux is None else aux.item() / len(batches)

            # c. The norm before clipping, and the update: nothing that is not finite may reach the weights.
            norm, with_gradient = dist.gradient_norm(trained)
            rate = dist.learning_rate(step, config, total_steps)
            healthy = watch.healthy(step + 1, losses, norm)
            if healthy:
                dist.clip_gradients(with_gradient, config.max_grad_norm, norm)
                rate = dist.update(optimizers, rate)
        step += 1
        if first_step:
            first_step = False
            states, measured = memory.optimizer_bytes(optimizers), memory.peak_memory(world.device)
            log.info(
                "memory of a process: optimiser %s (%s), peak %.2f GiB after the first step",
                memory.gib(states), config.optimizer, measured["memory/max_alloc"],
            )  # fmt: skip

        # d. Sums over ranks, and whether any of them was asked to stop.
        sums = {
            "nll": sum(float(nll) for nll in losses) if healthy else 0.0,
            "tokens": float(sum(int((batch.document_ids >= 0).sum()) for batch in batches)),
            "slots": float(sum(batch.input_ids.numel() for batch in batches)),
            "aux": aux_mean / world.size,
            "differentiated": (sum(map(float, differentiated)) - aux_coef * aux_mean) / world.size
            if healthy
            else 0.0,
        }
        sums = dict(zip(sums, dist.all_reduce(list(sums.values()), world), strict=True))
        stopping = logger.stopping(interrupt.signal, step, world)
        sums |= {"trained": trained_tokens, "documents": sum(len(unit) for unit in units), "steps": 1}
        sums["learnt"] = trained_tokens if healthy else 0
        sums["seconds"] = seconds()
        now = {
            "train/learning_rate": rate,
            "trained_token_share": trained_tokens / max(1, sums["tokens"] - sums["documents"]),
            "step_time": sums["seconds"],
            "step_time/data_share": waited / sums["seconds"],
            **memory.peak_memory(world.device),
            **raced,
        }
        if healthy:
            now |= {"train/loss": sums["nll"] / trained_tokens, "train/grad_norm": norm.item()}
            if sums["nll"]:
                now["train/loss_consistency"] = sums["differentiated"] / now["train/loss"]
        now |= watch.metrics()
        window = {name: window.get(name, 0.0) + value for name, value in sums.items()}
        state["num_tokens"] += int(sums["tokens"])
        logger.advance()

        # e. Metrics, evaluation, checkpoint.
        metrics: dict[str, float] = {}
        if step % config.logging_steps == 0 or step == total_steps:
            elapsed = window["seconds"]
            metrics = {
                **now,
                "epoch": order.epoch_of(step),
                "num_tokens": state["num_tokens"],
                "tokens_per_second": window["tokens"] / elapsed,
                "step_time": elapsed / window["steps"],
                "trained_token_share": window["trained"] / max(1, window["tokens"] - window["documents"]),
                "packing_efficiency": window["tokens"] / window["slots"],
            }
            if window["learnt"]:
                metrics["train/loss"] = window["nll"] / window["learnt"]
            if aux_coef and arch.num_experts:
                metrics["train/router_aux_loss"] = window["aux"] / window["steps"]
            if peak is not None:
                flops = model.flops_per_token(window["tokens"] / window["documents"])
                metrics["mfu"] = flops * metrics["tokens_per_second"] / (peak * world.size)
            window = {}
        due = config.eval_steps is not None and step % config.eval_steps == 0
        if len(held_out_rows) and (due or step == total_steps):
            metrics |= evaluate(model, eval_order, config, world)
            state["eval_after"] = metrics["eval/loss"]
        logger.observe(step, {**metrics, **now}, rows=lambda units=units: named_rows(dataset, units))
        if metrics:
            logger.log(step, metrics)
        due = config.save_steps is not None and (step % config.save_steps == 0 or step == total_steps)
        if due or stopping:
            checkpointer.save(step, model, optimizers, state)
        seconds()  # evaluating and saving are not training time
        if stopping and step < total_steps:
            checkpointer.finish()
            logger.stopped(step, world)
            return
    checkpointer.finish()

    # 6. Final save and report.
    final = save_final(model, tokenizer, config, world)
    if config.eval_answers:
        chosen = [int(row) for row in held_out_rows[: config.eval_answers]]
        accuracy, answers = sampled_accuracy(model, held_out, chosen, tokenizer, config, world)
        logger.log(total_steps, {"eval/accuracy": accuracy})
        for prompt, answer, reference in answers:
            verdict = "right" if answer == reference else f"wrong: {shortened(reference)}"
            log.info("  %s → %s   [%s]", shortened(prompt), shortened(answer), verdict)
    logger.close()
    if state["eval_before"] is not None:
        log.info(
            "held-out loss       %.4f → %.4f",
            state["eval_before"],
            state.get("eval_after", state["eval_before"]),
        )
    if config.eval_answers:
        log.info("held-out answers    %.1f %% right (greedy, %d rows)", 100 * accuracy, len(chosen))
    monitor.say_saved(final)
    dist.finish()


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


def run_identity(config: Config, global_batch: int, dataset: Dataset) -> dict:
    """What a checkpoint of this run can go on with."""
    keys = ("base_model", "random_init", "adapter", "load_in_4bit", "load_in_8bit", "fp8", "fp8_frozen",
             "lora_r", "lora_target_modules", "optimizer", "seed",
            "sequence_len", "sample_packing", "val_set_size")  # fmt: skip
    values = asdict(config)
    weights = [spec.get("weight", 1.0) for spec in config.datasets]
    data = hashlib.sha256((dataset.fingerprint + repr(weights)).encode()).hexdigest()
    size = "micro_batch_size · gradient_accumulation_steps · processes"
    return {**{key: values[key] for key in keys}, size: global_batch, "data": data}


def cli() -> None:
    """torchrun sft.py, or ballast-sft where the package is installed."""
    run(
        main,
        lambda: parse_config(
            Config, sys.argv[1:], description=" ".join((__doc__ or "").split("\n\n")[0].split())
        ),
    )


if __name__ == "__main__":
    cli()
