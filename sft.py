"""Supervised fine-tuning: teach a model to write the answers in a data set, by the likelihood of their tokens.

    python sft.py --config configs/tiny/sft.yaml
    torchrun --nproc-per-node 8 sft.py --config configs/llama-3.1-8b-lora.yaml learning_rate=2e-4

The loss of an optimiser step is the mean negative log-likelihood of the trained tokens of its whole global batch:
Σ NLL / (number of trained tokens, over all micro-batches and ranks). Dividing per micro-batch instead would weigh a token
by how full its micro-batch is, and make the result depend on micro_batch_size (reference page: Loss Spikes).
"""

import hashlib
import sys
from dataclasses import asdict, dataclass
from pathlib import Path

import torch
from torch import Tensor

import dist
import health
from config import ConfigError, parse_config, resolve_checkpoint
from data import IGNORE, Batch, Batches, DataOptions, Dataset, Tokenizer, load_tokenizer, prepare, split_held_out
from dist import CheckpointOptions, Checkpointer, DistOptions, OptimizerOptions, World
from health import LogOptions, MetricLogger, log
from kernels import linear_cross_entropy
from model import (
    ModelOptions, Transformer, apply_lora, generate, initialize, initialize_lora, load_adapter, load_balancing_loss,
    load_weights, read_architecture, resized, save_adapter, save_pretrained,
)  # fmt: skip


@dataclass
class Config(ModelOptions, DataOptions, OptimizerOptions, CheckpointOptions, DistOptions, LogOptions):
    micro_batch_size: int = 1
    """Rows (packs) in one forward pass of one process."""
    gradient_accumulation_steps: int = 1
    """Micro-batches of each process in one optimiser step."""
    num_epochs: float = 1.0
    """Passes over the data."""
    max_steps: int | None = None
    """Stop after so many optimiser steps, whatever num_epochs says."""
    eval_steps: int | None = None
    """Evaluate on held-out data every so many steps; it is always evaluated at the start and the end."""
    eval_answers: int = 0
    """At the end, sample greedy answers to so many held-out rows and report the share that equals the reference."""
    eval_max_new_tokens: int = 128
    """Longest sampled answer, in tokens."""
    seed: int = 42
    """Seed of the data order, dropout and random initialisation."""

    def __post_init__(self):
        if not self.base_model:
            raise ConfigError("base_model", None, "must be set: a checkpoint directory or a hub id")
        if not self.datasets:
            raise ConfigError("datasets", None, "must name at least one data set: [{path: …, type: chat}]")
        for key in ("micro_batch_size", "gradient_accumulation_steps", "sequence_len", "logging_steps", "lora_r",
                    "pad_vocab_to_multiple_of", "save_total_limit", "gpu_timeout_minutes", "eval_max_new_tokens"):  # fmt: skip
            if getattr(self, key) < 1:
                raise ConfigError(key, getattr(self, key), "must be at least 1")
        for key in ("max_steps", "eval_steps", "save_steps", "tokenizer_vocab_size"):
            if getattr(self, key) is not None and getattr(self, key) < 1:
                raise ConfigError(key, getattr(self, key), "must be at least 1, or left out")
        if self.num_epochs <= 0:
            raise ConfigError("num_epochs", self.num_epochs, "must be above 0")
        if self.val_set_size < 0:
            raise ConfigError("val_set_size", self.val_set_size, "must be a count, or a fraction between 0 and 1")
        if self.val_set_size and self.test_datasets:
            raise ConfigError("test_datasets", None, "contradicts val_set_size; keep one of the two")
        if (self.eval_steps or self.eval_answers) and not (self.val_set_size or self.test_datasets):
            key = "eval_steps" if self.eval_steps else "eval_answers"
            raise ConfigError(key, getattr(self, key), "needs held-out data: set val_set_size or test_datasets")
        if self.tokenizer_vocab_size is not None and not self.random_init:
            raise ConfigError("tokenizer_vocab_size", self.tokenizer_vocab_size, "needs random_init: true")
        if self.adapter is None:
            for key in ("lora_model_dir", "lora_target_modules", "lora_target_linear", "merge_adapter"):
                if getattr(self, key):
                    raise ConfigError(key, getattr(self, key), "needs adapter: lora")
        elif self.random_init:
            raise ConfigError("adapter", self.adapter, "makes no sense on random weights; drop random_init or adapter")
        if not 0 <= self.lora_dropout < 1:
            raise ConfigError("lora_dropout", self.lora_dropout, "must lie between 0 and 1")
        for spec in (*self.datasets, *self.test_datasets):
            if not isinstance(spec.get("weight", 1.0), (int, float)) or spec.get("weight", 1.0) < 0:
                raise ConfigError("datasets", spec.get("weight"), "weight must be a number of at least 0")
        dist.check_optimizer_options(self)


# ---------------------------------------------------------------------------------------------------------------------
# The loss
# ---------------------------------------------------------------------------------------------------------------------


def sft_loss(model: Transformer, batch: Batch, aux_coef: float = 0.0) -> tuple[Tensor, Tensor | None]:
    """(sum of NLL over the micro-batch's trained tokens, load-balancing loss or None). The caller divides the sum by the
    trained tokens of the global batch."""
    hidden, router_logits = model.hidden_states(
        batch.input_ids, position_ids=batch.position_ids, document_ids=batch.document_ids
    )
    nll = linear_cross_entropy(
        hidden.flatten(0, 1), model.head_weight, batch.targets.flatten(), softcap=model.arch.final_softcap
    )
    if not router_logits or aux_coef == 0:
        return nll, None
    return nll, load_balancing_loss(router_logits, model.arch, batch.document_ids.flatten() >= 0)


@torch.no_grad()
def evaluate(model: Transformer, batches: Batches, config: Config, world: World) -> dict[str, float]:
    """Mean NLL of the held-out tokens, over all ranks."""
    model.eval()
    nll = tokens = 0.0
    for step in range(batches.steps(1)):
        for batch in batches.micro_batches(batches.units(step)[: _left(batches, step)], config.micro_batch_size, world.rank, world.size):
            batch = batch.to(world.device)
            with world.autocast(config.bf16):
                nll += sft_loss(model, batch)[0].item()
            tokens += int((batch.targets != IGNORE).sum())
    model.train()
    nll, tokens = dist.all_reduce([nll, tokens], world)
    return {"eval/loss": nll / max(1, tokens)}


def _left(batches: Batches, step: int) -> int:
    """Units of the first epoch that steps from `step` on still have to see."""
    return len(batches.epoch(0)) - step * batches.units_a_step


def sampled_accuracy(
    model: Transformer, dataset: Dataset, rows: list[int], tokenizer: Tokenizer, config: Config, world: World
) -> tuple[float, list[tuple[str, str, str]]]:
    """Share of held-out rows whose greedy answer equals the reference text, and a few (prompt, answer, reference)."""
    prompts, references = [], []
    for row in rows[world.rank :: world.size] or rows[:1]:
        tokens, labels = dataset.row(row)
        first = int((labels != IGNORE).argmax())
        length = int((labels[first:] != IGNORE).argmin()) or len(labels) - first
        prompts.append(tokens[:first].tolist())
        references.append(tokenizer.decode(tokens[first : first + length].tolist()).strip())
    counted = len(rows[world.rank :: world.size])
    answers = []
    for begin in range(0, -(-len(rows) // world.size), 64):  # as many calls on every rank: each is a collective
        with world.autocast(config.bf16):
            made = generate(
                model, prompts[begin : begin + 64] or prompts[:1], max_new_tokens=config.eval_max_new_tokens, temperature=0,
                stop_token_ids=tokenizer.stop_ids,
                anyone=lambda active: dist.all_reduce([float(active)], world, torch.distributed.ReduceOp.MAX)[0] > 0,
            )  # fmt: skip
        answers += [tokenizer.decode(ids).strip() for ids in made.completion_ids]
    right = [answer == reference for answer, reference in zip(answers, references, strict=False)][:counted]
    total_right, total = dist.all_reduce([float(sum(right)), float(counted)], world)
    shown = [(tokenizer.decode(p, special=True), a, r) for p, a, r in zip(prompts, answers, references, strict=False)]
    return total_right / max(1.0, total), shown[:4]


# ---------------------------------------------------------------------------------------------------------------------
# The run
# ---------------------------------------------------------------------------------------------------------------------


def main(config: Config) -> None:
    # 1. Set up.
    output_dir, directory = Path(config.output_dir), Path(config.config_directory)
    world = dist.init(config)
    health.start_log(output_dir, world.main)
    dist.seed_everything(config.seed, world.rank)
    interrupt = dist.Interrupt()
    since = dist.Timer()
    checkpointer = Checkpointer(output_dir / "checkpoints", world, config)
    if config.resume == "never" and checkpointer.steps():
        raise ConfigError("output_dir", config.output_dir, "holds checkpoints of an earlier run; choose another, or resume: auto")

    # 2. Data: encoded once, by the first rank; the others read what it wrote.
    cache = Path(config.dataset_prepared_path or output_dir / "prepared")
    checkpoint = dist.main_first(
        lambda: resolve_checkpoint(config.base_model, config.base_model_revision, directory), world
    )
    arch = read_architecture(checkpoint, config.ignore_config_fields)
    tokenizer = dist.main_first(lambda: load_tokenizer(checkpoint, config, directory, cache), world)
    dataset = dist.main_first(lambda: prepare(config.datasets, tokenizer, config, directory, cache), world)
    _report_data(dataset)
    train_rows, held_out_rows = split_held_out(len(dataset), config.val_set_size, config.seed)
    held_out = dataset
    if config.test_datasets:
        held_out = dist.main_first(lambda: prepare(config.test_datasets, tokenizer, config, directory, cache), world)
        held_out_rows = torch.arange(len(held_out)).numpy()
    units_a_step = config.micro_batch_size * config.gradient_accumulation_steps * world.size
    weights = [float(spec.get("weight", 1.0)) for spec in config.datasets]
    order = Batches(
        dataset, train_rows, config, weights=weights, units_a_step=units_a_step, seed=config.seed, pad_id=tokenizer.pad_id
    )
    eval_order = Batches(
        held_out, held_out_rows, config, weights=[1.0] * len(weights if held_out is dataset else config.test_datasets),
        units_a_step=config.micro_batch_size * world.size, seed=config.seed, pad_id=tokenizer.pad_id, shuffle=False,
    )  # fmt: skip
    total_units = round(sum(len(order.epoch(e)) for e in range(int(config.num_epochs))) + (
        (config.num_epochs % 1) * len(order.epoch(int(config.num_epochs))) if config.num_epochs % 1 else 0))  # fmt: skip
    total_steps = max(1, -(-total_units // units_a_step))
    if config.max_steps is not None:
        total_steps, total_units = config.max_steps, config.max_steps * units_a_step
    if dist.warmup(config, total_steps) > total_steps:
        raise ConfigError("warmup_steps", config.warmup_steps, f"is longer than the run of {total_steps} steps")

    # 3. Model, on no device until it is sharded; then each rank reads its own rows of the checkpoint.
    rows = tokenizer.vocab_size if config.random_init else max(arch.vocab_size, tokenizer.vocab_size)
    arch = resized(arch, -(-rows // config.pad_vocab_to_multiple_of) * config.pad_vocab_to_multiple_of)
    _check_ids(dataset, arch.vocab_size)
    with torch.device("meta"):
        model = Transformer(arch)
        if config.adapter:
            apply_lora(model.to(torch.bfloat16 if config.bf16 else torch.float32), config)
    dist.shard(model, config, world)
    dist.materialize(model, config, world)
    if config.random_init:
        initialize(model, config.seed)
    else:
        load_weights(model, checkpoint)
    if config.adapter:
        initialize_lora(model, config.seed)
        if config.lora_model_dir:
            load_adapter(model, config.lora_model_dir)
    model.train()
    optimizers = dist.make_optimizers(model, config)
    trained = [p for p in model.parameters() if p.requires_grad]
    aux_coef = config.router_aux_loss_coef if config.router_aux_loss_coef is not None else arch.router_aux_loss_coef
    log.info(
        "%s: %s parameters, %s trained; %s rows to train on, %s held out; %d steps of %d %s on %d × %s",
        arch.name, f"{sum(p.numel() for p in model.parameters()):,}", f"{sum(p.numel() for p in trained):,}",
        f"{len(train_rows):,}", f"{len(held_out_rows):,}", total_steps, units_a_step,
        "packs" if config.sample_packing else "rows", world.size, world.device.type,
    )  # fmt: skip

    # 4. Resume.
    identity = _identity(config, units_a_step, dataset)
    state = {"num_tokens": 0, "eval_before": None, "identity": identity}
    step = 0
    resume_from = _checkpoint_to_resume(config, checkpointer)
    if resume_from is not None:
        saved = checkpointer.state(resume_from)
        _check_identity(saved["identity"], identity, config, resume_from)
        if not checkpointer.load(resume_from, model, optimizers, config.seed):
            log.info("the checkpoint is of %d processes: numbers go on to rounding, not to the bit", saved["world"])
        step, state = saved["step"], {**saved, "identity": identity}
        log.info("resumed from %s", resume_from)
    logger = MetricLogger(config, output_dir, main=world.main, first_step=step, total_steps=total_steps)
    if len(held_out_rows) and state["eval_before"] is None:
        state["eval_before"] = evaluate(model, eval_order, config, world)["eval/loss"]
        log.info("held-out loss before training: %.4f", state["eval_before"])
    peak = health.peak_flops(world.device)
    log.debug("ready after %.1f s", since())

    # 5. The loop.
    window: dict[str, float] = {}  # sums since metrics were last written
    seconds = dist.Timer()
    while step < total_steps:
        with health.profiled(step + 1, config, output_dir, world.rank, world.device):
            # a. The units of this step, the same on every rank; this rank's micro-batches; the tokens that they all train.
            units = order.units(step)[: total_units - step * units_a_step]
            batches = order.micro_batches(units, config.micro_batch_size, world.rank, world.size)
            trained_tokens = order.trained_tokens(units)

            # b. Forward and backward. FSDP averages gradients over ranks; the loss is a sum over ranks: hence world.size.
            losses: list[float] = []
            aux_sum = 0.0
            for batch in batches:
                on_device = batch.to(world.device)
                with world.autocast(config.bf16):
                    nll, aux = sft_loss(model, on_device, aux_coef)
                loss = nll * (world.size / trained_tokens)
                if aux is not None:
                    loss = loss + aux_coef * aux / len(batches)
                    aux_sum += aux.item() / len(batches)
                loss.backward()
                losses.append(nll.detach())

            # c. The norm before clipping; nothing non-finite may reach the weights.
            norm, with_gradient = dist.gradient_norm(trained)
            losses = [float(x) for x in losses]
            health.check_finite(step + 1, losses, batches, dataset.name, norm.item(), model)
            dist.clip_gradients(with_gradient, config.max_grad_norm, norm)

            # d. The update.
            rate = dist.learning_rate(step, config, total_steps)
            for optimizer in optimizers:
                for group in optimizer.param_groups:
                    group["lr"] = rate
                optimizer.step()
                optimizer.zero_grad(set_to_none=True)
        step += 1

        # e. Sums over ranks, and whether any of them was asked to stop: one small collective a step.
        tokens = sum(int((b.document_ids >= 0).sum()) for b in batches)
        slots = sum(b.input_ids.numel() for b in batches)
        stopping = float(interrupt.signal is not None)
        nll_sum, tokens, slots, aux_sum, stopping = dist.all_reduce(
            [sum(losses), tokens, slots, aux_sum / world.size, stopping], world
        )
        state["num_tokens"] += int(tokens)
        documents = sum(len(unit) for unit in units)
        for name, value in (("nll", nll_sum), ("trained", trained_tokens), ("tokens", tokens), ("slots", slots),
                            ("aux", aux_sum), ("documents", documents), ("steps", 1)):  # fmt: skip
            window[name] = window.get(name, 0.0) + value
        logger.advance()

        # f. Metrics, evaluation, checkpoint.
        metrics: dict[str, float] = {}
        if step % config.logging_steps == 0 or step == total_steps:
            elapsed = seconds()
            metrics = {
                "train/loss": window["nll"] / window["trained"],
                "train/grad_norm": norm.item(),
                "train/learning_rate": rate,
                "epoch": order.epoch_of(step),
                "num_tokens": state["num_tokens"],
                "tokens_per_second": window["tokens"] / elapsed,
                "step_seconds": elapsed / window["steps"],
                "trained_token_share": window["trained"] / window["tokens"],
                "packing_efficiency": window["tokens"] / window["slots"],
                **health.memory(world.device),
            }
            if aux_coef and arch.num_experts:
                metrics["train/router_aux_loss"] = window["aux"] / window["steps"]
            if peak is not None:
                flops = model.flops_per_token(window["tokens"] / window["documents"])
                metrics["mfu"] = flops * metrics["tokens_per_second"] / (peak * world.size)
            window = {}
        if len(held_out_rows) and (step == total_steps or (config.eval_steps and step % config.eval_steps == 0)):
            metrics |= evaluate(model, eval_order, config, world)
            state["eval_after"] = metrics["eval/loss"]
            seconds()  # evaluation is not training time
        if metrics:
            logger.log(step, metrics)
        if stopping or (config.save_steps and step % config.save_steps == 0 and step < total_steps):
            checkpointer.save(step, model, optimizers, state)
        if stopping:
            checkpointer.finish()
            logger.close()
            log.info("stopped by a signal after step %d; the same command goes on from here", step)
            dist.finish()
            return
    checkpointer.finish()

    # 6. Final save and report.
    _save_final(model, tokenizer, output_dir / "final", config, world)
    answers: list[tuple[str, str, str]] = []
    if config.eval_answers:
        chosen = [int(row) for row in held_out_rows[: config.eval_answers]]
        accuracy, answers = sampled_accuracy(model, held_out, chosen, tokenizer, config, world)
        logger.log(total_steps, {"eval/accuracy": accuracy})
    logger.close()
    for prompt, answer, reference in answers:
        log.info("· %s → %s   [%s]", _short(prompt), _short(answer), "right" if answer == reference else f"wrong: {_short(reference)}")
    if state["eval_before"] is not None:
        log.info("held-out loss       %.4f → %.4f", state["eval_before"], state.get("eval_after", state["eval_before"]))
    if config.eval_answers:
        log.info("held-out answers    %.1f %% right (greedy, %d rows)", 100 * accuracy, len(chosen))
    log.info("saved               %s", output_dir / "final")
    log.info("talk to it          python model.py chat %s", output_dir / "final")
    dist.finish()


def _short(text: str) -> str:
    text = " ".join(text.split())
    return text if len(text) <= 100 else text[:48] + " … " + text[-48:]


def _report_data(dataset: Dataset) -> None:
    counts = dataset.counts
    left_out = {name: counts[name] for name in ("truncated", "dropped", "bad", "skipped") if counts[name]}
    if left_out:
        log.info("data: %s of %d rows", ", ".join(f"{n} {name}" for name, n in left_out.items()), counts["rows"])
    for line in counts["named"]:
        log.info("data: %s", line)


def _check_ids(dataset: Dataset, vocab_size: int) -> None:
    if len(dataset.tokens) and int(dataset.tokens.max()) >= vocab_size:
        row = int((dataset.offsets[1:] > int((dataset.tokens >= vocab_size).argmax())).argmax())
        raise ConfigError(dataset.name(row), None, f"has a token id beyond the vocabulary of {vocab_size}: another tokenizer's data?")


def _identity(config: Config, units_a_step: int, dataset: Dataset) -> dict:
    """What a checkpoint can only go on with: changing any of it would silently continue another run."""
    keys = ("base_model", "random_init", "adapter", "lora_r", "lora_target_modules", "optimizer", "seed", "sequence_len",
            "sample_packing", "val_set_size")  # fmt: skip
    weights = [spec.get("weight", 1.0) for spec in config.datasets]
    data = hashlib.sha256((dataset.fingerprint + repr(weights)).encode()).hexdigest()
    values = asdict(config)
    return {**{key: values[key] for key in keys}, "global_batch": units_a_step, "data": data}


def _check_identity(saved: dict, now: dict, config: Config, path: Path) -> None:
    for key, value in now.items():
        if saved.get(key) == value or (key == "data" and config.resume_with_new_data):
            continue
        if key == "data":
            raise ConfigError("datasets", None, f"{path} was made with other data: its position would mean other rows; "
                              "set resume_with_new_data: true to go on, or choose another output_dir")  # fmt: skip
        name = "micro_batch_size" if key == "global_batch" else key
        remedy = f"({key}); {path} was made with {saved.get(key)!r}: set it back, or choose another output_dir"
        raise ConfigError(name, value, remedy)


def _checkpoint_to_resume(config: Config, checkpointer: Checkpointer) -> Path | None:
    if config.resume in ("auto", "never"):
        return checkpointer.newest() if config.resume == "auto" else None
    path = Path(config.resume)
    if not (path / "trainer.json").exists():
        raise ConfigError("resume", config.resume, "is not a checkpoint; give auto, never or …/checkpoints/step-N")
    return path


def _save_final(model: Transformer, tokenizer: Tokenizer, final: Path, config: Config, world: World) -> None:
    """The model as a Hugging Face folder, or the adapter as a PEFT folder; it appears when it is whole."""
    with dist.appearing(final, world) as aside:
        if config.adapter and not config.merge_adapter:
            save_adapter(model, aside, main=world.main)
        else:
            dtype = torch.bfloat16 if config.bf16 else torch.float32
            save_pretrained(model, aside, dtype=dtype, merge=config.adapter is not None, main=world.main)
        if world.main:
            tokenizer.save(aside)


if __name__ == "__main__":
    health.run(main, lambda: parse_config(Config, sys.argv[1:], description=(__doc__ or "").splitlines()[0]))
