"""Measurements of a run from inside, for the rules: whether the weights move as they should, and what must
hold in the first step, before any update, whatever the data are.

Weights are measured on a sample of each tensor before and after an update, in the first steps and every
tenth; the first step's probes are a few forward passes. Nothing here touches a random state or a gradient.
"""

import collections
import dataclasses
import functools
import math
import zlib
from collections.abc import Callable, Iterable, Sequence
from contextlib import AbstractContextManager
from typing import Any, cast

import torch
from torch import Tensor, nn
from torch.nn.utils.rnn import pad_sequence

import dist
from checkpoints.adapters import base_of
from dist import World
from model import Transformer, without_gradients
from run.log import log
from text.tokenizer import IGNORE

SAMPLE = 256  # elements of each tensor
EVERY = 10  # steps between two measurements, after the first few
PROBE = 48  # tokens of each probe document


def sampled(tensors: Iterable[Tensor]) -> Tensor:
    """At most SAMPLE elements of each tensor, evenly spaced: fp32 [tensors, SAMPLE], 0 after the last."""
    parts = [x.float() for x in dist.samples(tensors, SAMPLE)]
    return pad_sequence(parts, batch_first=True) if parts else torch.zeros(0, 0)


def _gradient(parameter: Tensor) -> Tensor:
    """0, without the memory of the whole, where there is none."""
    own = dist.local(parameter)
    return parameter.grad if parameter.grad is not None else own.new_zeros(()).expand(own.shape)


def kind_of(name: str) -> str:
    """Which part of the model a tensor belongs to: embedding, head, norm, adapter, attention, mlp, other."""
    for part, kind in (("lora_", "adapter"), ("embed", "embedding"), ("lm_head", "head"), ("norm", "norm"),
                       ("attn", "attention"), ("mlp", "mlp")):
        if part in name:
            return kind
    return "other"


def supervised(batch: Any) -> bool:
    """Whether a micro-batch holds rows with labels, not rollouts."""
    return hasattr(batch, "position_ids")


class Vitals:
    """Of one run: asked before and after every update. `frozen`: a network that must stay what it is."""

    def __init__(self, model: Transformer, config: Any, world: World, frozen: nn.Module | None = None):
        self.model, self.config, self.world, self.frozen = model, config, world, frozen
        self.named = [(name, p) for name, p in model.named_parameters() if p.requires_grad]
        self.sizes = [dist.local(p).numel() for _, p in self.named]  # of this process's part
        self.counts = [len(x) for x in dist.samples((p for _, p in self.named), SAMPLE)]
        self.step = 0
        self.seen = 0  # updates of this process
        base = [p for p in model.parameters() if not p.requires_grad]  # under an adapter
        self.still = [] if self._may_move() else base if frozen is None else [*frozen.parameters()]
        self.still_before = sampled(self.still)
        self.probed: Tensor | None = None  # hidden states of a probe text in the frozen network, at first
        self.gradients_left = 0.0  # share of the tensors that have one when a step begins
        self.rows: collections.deque[list[str]] = collections.deque(maxlen=5)
        self._before: Tensor | None = None  # samples of the weights, and of their gradients
        self._gradients: Tensor | None = None
        self._pending: dict[str, float] = {}
        self._still = dict.fromkeys((name for name, _ in self.named), 0)
        self._named = False  # have tensors that stay the same been logged
        self._begun = False  # has this process measured the first step
        self._again: Callable[[], dict[str, float]] | None = None  # the same batch after the update

    # Before the update ------------------------------------------------------------------------------------

    def step_begins(self) -> None:
        """Called before a step's first forward pass: no gradient may be left from the step before."""
        left = sum(p.grad is not None for _, p in self.named)
        self.gradients_left = left / max(1, len(self.named))

    def before_update(
        self, step: int, batches: Sequence[Any], names: list[str], losses: Sequence[Tensor],
        loss_of: Callable[[Any], Any], restored: Callable[[], AbstractContextManager],
    ) -> None:
        """Take samples of weights and gradients where this step is measured, and probe the first step. A
        collective in a run's first step. Inside `restored()` is the random state of the first micro-batch."""
        self.step, self._pending = step, {}
        if supervised(batches[0]):  # rollouts repeat the rows of their prompts
            self.rows.append(names)
            self._pending["rows/fingerprint"] = float(zlib.crc32("\n".join(names).encode()))
        if self.gradients_left:
            self._pending["first_step/gradients_left"] = self.gradients_left
        if len(self.rows) == 5 and any(self.rows):
            together = [name for row in self.rows for name in row]
            self._pending["now/rows/distinct"] = len(set(together)) / max(1, len(together))
            self._pending["now/rows/in_step"] = len(together) / 5
        # With an adapter the frozen network is the model without it; SFT has none.
        if not supervised(batches[0]) and (self.frozen is not None or self.config.adapter):
            self._pending |= self._frozen_answers(step)
        if not self._begun:
            self._begun = True
            self._pending |= self._first_step(step, batches, losses, loss_of, restored)
        self.seen += 1
        if self._measured(step) or self.seen <= 5:
            self._before = sampled(p for _, p in self.named)
            self._gradients = sampled(_gradient(p) for _, p in self.named)
        self._again = None
        if self.seen <= 2 and self._before is not None and not hasattr(batches[0], "advantages"):
            self._again = functools.partial(self._descent, batches, losses, loss_of, restored)
        elif self.seen <= 2 and hasattr(batches[0], "rollouts"):
            some = [b for b in batches[:2] if hasattr(b, "rollouts")]
            before = self._logprobs(some, loss_of, restored)
            self._again = functools.partial(self._gain, some, before, loss_of, restored)
        if step in (4, 10, 30, 100, 300) or (step >= 1000 and step % 1000 == 0):
            self._pending |= self._rotated_answers(batches)

    def _first_step(
        self, step: int, batches: Sequence[Any], losses: Sequence[Tensor], loss_of: Callable[[Any], Any],
        restored: Callable[[], AbstractContextManager],
    ) -> dict[str, float]:
        found: dict[str, float] = {"first_step/gradients_left": self.gradients_left}
        tolerance = self._tolerance()
        training = self.model.training
        with without_gradients(self.model), restored():
            _, sums = loss_of(batches[0])
            if "loss" in sums:
                first = float(losses[0])
                gap = abs(float(sums["loss"]) - first)
                found["first_step/repeat"] = gap / max(abs(first), 1e-2) / tolerance
            trained = self._probe_states(self.model)
            self.model.eval()
            if not self.config.lora_dropout:
                # Of the states too: the loss of a model that knows nothing hardly depends on them.
                quiet = self._probe_states(self.model)
                found["first_step/mode"] = float((trained - quiet).norm() / quiet.norm()) / (10 * tolerance)
                if "loss" in sums:
                    quiet_loss = float(loss_of(batches[0])[1]["loss"])
                    gap = abs(quiet_loss - first) / max(abs(first), 1e-2)
                    found["first_step/mode"] = max(found["first_step/mode"], gap / tolerance)
            found |= {k: v / (10 * tolerance) for k, v in self._structure().items()}
            if supervised(batches[0]):
                found |= _targets(batches[0])
                if not self.config.lora_dropout:
                    found |= self._plain_loss(batches[0], loss_of, tolerance)
            self.model.train(training)
        if step == 1 and self.frozen is not None:
            found["first_step/frozen_difference"] = self._frozen_difference()
        if not self.config.adapter:
            every = sum(p.numel() for p in self.model.parameters())
            trained = sum(p.numel() for _, p in self.named)
            found["weights/frozen_share"] = 1 - trained / max(1, every)
        return found

    def _probe_ids(self, count: int) -> Tensor:
        """Any ids serve: what is compared is the same document in another company or at another time."""
        ids = torch.arange(count, device=self.world.device) * 7919 + 13
        return ids % min(30000, self.model.arch.vocab_size)

    def _probe_states(self, model: Transformer) -> Tensor:
        ids = self._probe_ids(PROBE)[None]
        return model.hidden_states(ids, document_ids=torch.zeros_like(ids))[0].float()

    def _tolerance(self) -> float:
        """Relative difference between two computations of the same that rounding explains."""
        low = self.config.bf16 and self.world.device.type == "cuda"
        low = low or next(self.model.parameters()).dtype != torch.float32
        return 0.05 if low or getattr(self.config, "fp8", False) else 1e-3

    def _structure(self) -> dict[str, float]:
        """Relative differences of hidden states that a decoder must not show: with later tokens changed, with
        a neighbour in the row, with padding after the document."""
        device, ids = self.world.device, self._probe_ids(3 * PROBE)
        one, other, changed = ids[:PROBE], ids[PROBE : 2 * PROBE], ids[:PROBE].clone()
        half = PROBE // 2
        changed[half:] = ids[2 * PROBE :][: PROBE - half]

        def hidden(tokens: Tensor, documents: Tensor | None = None) -> Tensor:
            where = torch.zeros_like(tokens) if documents is None else documents
            return self.model.hidden_states(tokens[None], document_ids=where[None])[0][0].float()

        exact = self._tolerance() < 0.01  # in low precision a router may choose another expert for a token

        def gap(a: Tensor, b: Tensor) -> float:
            relative = (a - b).norm(dim=-1) / a.norm(dim=-1).clamp(min=1e-6)
            return float(relative.max() if exact else relative.mean())

        alone, after = hidden(one), hidden(other)
        again = gap(alone, hidden(one))  # what differs by itself says nothing about tokens and neighbours
        documents = torch.arange(2 * PROBE, device=device) // PROBE
        together = hidden(torch.cat([one, other]), documents)
        padded = hidden(torch.cat([one, torch.zeros_like(other)]), torch.where(documents == 0, 0, -1))
        ahead = hidden(changed)
        if again > self._tolerance():
            return {"first_step/repeat": again}
        return {
            # A dynamic rope depends on the length, here the same in both.
            "first_step/future": gap(alone[:half], ahead[:half]),
            "first_step/documents": max(gap(alone, together[:PROBE]), gap(after, together[PROBE:])),
            "first_step/padding": gap(alone, padded[:PROBE]),
        }

    def _plain_loss(self, batch: Any, loss_of: Callable[[Any], Any], tolerance: float) -> dict[str, float]:
        """The reported NLL of a few targets against −log softmax of the logits, computed plainly. The targets
        are made here from the inputs, so that a batch with wrong ones cannot agree."""
        ids, documents = batch.input_ids, batch.document_ids
        targets = torch.full_like(ids, IGNORE)
        follows = (documents[:, 1:] == documents[:, :-1]) & (documents[:, 1:] >= 0)
        targets[:, :-1] = torch.where(follows & (batch.targets[:, :-1] != IGNORE), ids[:, 1:], IGNORE)
        few = (targets != IGNORE).flatten().nonzero().flatten()[:64]
        kept = torch.full_like(targets.flatten(), IGNORE)
        kept[few] = targets.flatten()[few]
        _, sums = loss_of(dataclasses.replace(batch, targets=kept.view_as(targets)))
        states, _ = self.model.hidden_states(
            ids, position_ids=batch.position_ids, document_ids=documents
        )
        if not len(few):  # after the forward passes, in which every rank takes part
            return {}
        logits = self.model.logits(states.flatten(0, 1)[few]).float()
        plain = torch.nn.functional.cross_entropy(logits, kept[few], reduction="sum")
        difference = abs(float(sums["nll"]) - float(plain)) / max(abs(float(plain)), 1e-2 * len(few))
        return {"first_step/loss_difference": difference / tolerance}

    def _frozen_answers(self, step: int) -> dict[str, float]:
        """How far the frozen network's hidden states of a probe text are from those in the beginning: its
        weights may be still while an adapter is not switched off. A collective in some steps."""
        if self._may_move() or (self._begun and step != EVERY and step % (10 * EVERY)):
            return {}
        training = self.model.training
        self.model.eval()
        with without_gradients(self.model), base_of(self.model, cast(Any, self.frozen)) as network:
            states = self._probe_states(network)
        self.model.train(training)
        if self.probed is None:
            self.probed = states
            return {}
        gap = float((states - self.probed).norm() / self.probed.norm().clamp(min=1e-6))
        return {"weights/frozen_answers_moved": gap / self._tolerance()}

    def _frozen_difference(self) -> float:
        """‖frozen − model‖ / ‖model‖ on a sample of the tensors that both have."""
        assert self.frozen is not None
        own = dict(self.model.named_parameters())
        difference = size = 0.0
        for name, frozen in self.frozen.named_parameters():
            if name in own and own[name].shape == frozen.shape:
                a, b = sampled([own[name]]), sampled([frozen])
                if a.shape == b.shape:
                    difference += float((a.to(b.device) - b).square().sum())
                    size += float(a.square().sum())
        return math.sqrt(difference / size) if size else 0.0

    def _rotated_answers(self, batches: Sequence[Any]) -> dict[str, float]:
        """How much likelier an answer is after its own prompt than after the next row's: relative difference
        of the NLL. Only for batches of rows with one prompt and one answer; the same rows on every rank. A
        collective."""
        if not supervised(batches[0]):
            return {}
        own = [(p.tolist(), a.tolist()) for b in batches[:4] for p, a in _prompts_and_answers(b)][:16]
        every = [row for of_rank in dist.gather(own, self.world) for row in of_rank if row[0] and row[1]][:16]
        if len(every) < 4:
            return {}
        device = self.world.device
        rows = [(torch.tensor(p, device=device), torch.tensor(a, device=device)) for p, a in every]
        with without_gradients(self.model):
            self.model.eval()
            right = self._answer_nll([(p, a) for p, a in rows])
            wrong = self._answer_nll(
                [(rows[(k + 1) % len(rows)][0], answer) for k, (_, answer) in enumerate(rows)]
            )
            self.model.train()
        return {"answers/rotated_gain": (wrong - right) / max(right, 1e-6)}

    def _answer_nll(self, rows: list[tuple[Tensor, Tensor]]) -> float:
        width = max(len(p) + len(a) for p, a in rows)
        ids = torch.zeros(len(rows), width, dtype=torch.long, device=self.world.device)
        documents, targets = torch.full_like(ids, -1), torch.full_like(ids, IGNORE)
        for k, (prompt, answer) in enumerate(rows):
            tokens = torch.cat([prompt, answer])
            ids[k, : len(tokens)], documents[k, : len(tokens)] = tokens, 0
            targets[k, len(prompt) - 1 : len(tokens) - 1] = answer
        states, _ = self.model.hidden_states(ids, document_ids=documents)
        where = (targets != IGNORE).flatten().nonzero().flatten()[:1024]
        logits = self.model.logits(states.flatten(0, 1)[where]).float()
        return float(torch.nn.functional.cross_entropy(logits, targets.flatten()[where]))

    def _descent(
        self, batches: Sequence[Any], losses: Sequence[Tensor], loss_of: Callable[[Any], Any],
        restored: Callable[[], AbstractContextManager],
    ) -> dict[str, float]:
        """Change of the loss of the same batches by the update, over what the gradient predicts, g·Δw: 1 for
        a short step, less for a long one, negative where it goes uphill. A collective."""
        with without_gradients(self.model), restored():
            found = [loss_of(batch)[1] for batch in batches]
        if not all("loss" in sums for sums in found):
            return {}
        change = sum(float(sums["loss"]) for sums in found) - sum(map(float, losses))
        assert self._before is not None and self._gradients is not None
        along = ((sampled(p for _, p in self.named) - self._before) * self._gradients).sum(-1)
        counts, sizes = (torch.tensor(x, device=along.device) for x in (self.counts, self.sizes))
        expected = float((along * sizes / counts.clamp(1)).sum())
        change, expected = dist.all_reduce([change, expected], self.world)
        change /= self.world.size  # the parts of all ranks carry a factor of their number
        return {"first_step/loss_change": change / expected} if abs(expected) > 1e-12 else {}

    def _logprobs(
        self, batches: Sequence[Any], loss_of: Callable[[Any], Any],
        restored: Callable[[], AbstractContextManager],
    ) -> list[dict[str, Any]]:
        with without_gradients(self.model), restored():
            found = [loss_of(batch)[1] for batch in batches]
        # Where π_old was stored, the log-probs of now are those times the ratio.
        return [{"mask": s["mask"], "logprobs": s["old_logprobs"] + s.get("log_ratio", 0.0)} for s in found]

    def _gain(
        self, batches: Sequence[Any], before: list[dict[str, Any]], loss_of: Callable[[Any], Any],
        restored: Callable[[], AbstractContextManager],
    ) -> dict[str, float]:
        """Σ A·Δ log π / Σ |A·Δ log π| over tokens of the same completions: above 0 where the update makes the
        better ones likelier."""
        along = size = 0.0
        after = self._logprobs(batches, loss_of, restored)
        for batch, old, new in zip(batches, before, after, strict=True):
            advantages = batch.advantages.view(len(old["mask"]), -1)
            moved = (new["logprobs"] - old["logprobs"]) * old["mask"] * advantages
            along, size = along + float(moved.sum()), size + float(moved.abs().sum())
        along, size = dist.all_reduce([along, size], self.world)
        return {"first_step/better_likelier": along / size} if size > 1e-9 else {}

    # After the update -------------------------------------------------------------------------------------

    def metrics(self) -> dict[str, float]:
        """What was found in this step. What a run that was never stopped would not have measured here begins
        with now/: it is judged, and not logged, so that a resumed run logs the same."""
        found, self._pending = self._pending, {}
        if self._again is not None:
            found, self._again = found | self._again(), None
        if self._before is not None and self._gradients is not None:
            found |= self._movement(self._before, self._gradients)
            self._before = self._gradients = None
        if self.still and self.step % EVERY == 0:
            now = sampled(self.still).to(self.still_before.device)
            found["weights/frozen_moved"] = float(not torch.equal(self.still_before, now))
        return {name if self._regular(name) else f"now/{name}": value for name, value in found.items()}

    def _regular(self, name: str) -> bool:
        """Whether every run measures this in this step, also one that was never stopped."""
        if name.startswith(("now/", "answers/", "rows/")):
            return True
        if name in ("first_step/loss_change", "first_step/better_likelier"):
            return self.step <= 2
        if name.startswith("first_step/") or name == "weights/frozen_share":
            return self.step == 1
        return self._measured(self.step)

    @staticmethod
    def _measured(step: int) -> bool:
        """Whether the weights are measured in this step, whenever the process began."""
        return step <= 5 or step % EVERY == 0

    def _may_move(self) -> bool:
        return bool(getattr(self.config, "ref_model_sync_steps", None))

    def _movement(self, w: Tensor, g: Tensor) -> dict[str, float]:
        """From samples of the weights before the update and of their gradients."""
        names = [name for name, _ in self.named]
        delta = sampled(p for _, p in self.named) - w
        products = [(delta != 0).float(), delta.square(), w.square(), delta * w, delta * g, g.square()]
        changed, d2, w2, dw, dg, g2 = torch.stack(products).sum(-1).tolist()
        # Of an embedding and a head only the rows of the batch's tokens need to change.
        inner = [k for k, name in enumerate(names) if kind_of(name) not in ("embedding", "head")]
        inner = inner or [*range(len(names))]

        def total(values: Sequence[float], rows: Sequence[int]) -> float:
            return sum(values[k] for k in rows)

        every = range(len(names))
        length = math.sqrt(total(d2, every))
        found = {
            "weights/changed": total(changed, inner) / max(1.0, total(self.counts, inner)),
            "weights/moved": length / max(math.sqrt(total(w2, every)), 1e-12),
        }
        matrices = [k for k in every if self.named[k][1].dim() >= 2 and w2[k] > 0 and d2[k] > 0]
        if matrices:
            size = math.sqrt(total(d2, matrices) * total(w2, matrices))
            found["weights/shrinking"] = -total(dw, matrices) / size
        if length and total(g2, every):
            found["weights/along_gradient"] = -total(dg, every) / (length * math.sqrt(total(g2, every)))
        for kind in sorted({kind_of(name) for name in names}):
            rows = [k for k, name in enumerate(names) if kind_of(name) == kind]
            if total(w2, rows):
                found[f"weights/moved/{kind}"] = math.sqrt(total(d2, rows) / total(w2, rows))
        for k, name in enumerate(names):
            self._still[name] = self._still[name] + 1 if changed[k] == 0 else 0
        # B of an adapter is 0 at first, so that A has no gradient; experts without a token have none either.
        routed = {name for name in names if "experts" in name}
        still = [name for name in names if self._still[name] >= 3 and name not in routed]
        if total(changed, every):
            found["weights/still_tensors"] = len(still) / len(names)
            if still and not self._named:
                self._named, more = True, f" and {len(still) - 3} more" if len(still) > 3 else ""
                log.info("these have not changed in three measurements: %s%s", ", ".join(still[:3]), more)
        return found


def _prompts_and_answers(batch: Any) -> list[tuple[Tensor, Tensor]]:
    """(prompt ids, answer ids) of each document of a batch with one trained stretch."""
    found = []
    for ids, targets, documents in zip(batch.input_ids, batch.targets, batch.document_ids, strict=True):
        for number in range(int(documents.max()) + 1):
            where = (documents == number).nonzero().flatten()
            if len(where) < 2:
                continue
            tokens, trained = ids[where], targets[where][:-1] != IGNORE
            first, count = int(trained.int().argmax()), int(trained.sum())
            if count and bool(trained[first : first + count].all()):
                found.append((tokens[: first + 1][-512:], tokens[first + 1 : first + 1 + count][:128]))
    return found


def _targets(batch: Any) -> dict[str, float]:
    """Of a batch: the share of targets that are the next token of the same document, the share on padding,
    the share of its rows that are no documents of their own, and of tokens whose position is not their place
    in their document."""
    ids, targets, documents = batch.input_ids, batch.targets, batch.document_ids
    trained = targets != IGNORE
    count = int(trained.sum())
    if not count:
        return {}
    following = torch.full_like(ids, IGNORE)
    same = (documents[:, 1:] == documents[:, :-1]) & (documents[:, 1:] >= 0)
    following[:, :-1] = torch.where(same, ids[:, 1:], IGNORE)
    on_padding = trained & (documents < 0)
    real = trained & ~on_padding
    right = int((real & (targets == following)).sum())
    starts = torch.ones_like(documents, dtype=torch.bool)
    starts[:, 1:] = documents[:, 1:] != documents[:, :-1]
    places = torch.arange(ids.shape[1], device=ids.device).expand_as(ids)
    begun = torch.where(starts, places, 0).cummax(-1).values
    inside = documents >= 0
    wrong = int((inside & (batch.position_ids != places - begun)).sum())
    own = int((starts & inside).sum())
    return {
        "first_step/documents_merged": max(0.0, 1 - own / max(1, len(batch.rows))),
        "first_step/positions_wrong": wrong / max(1, int(inside.sum())),
        "first_step/targets_next": right / max(1, int(real.sum())),
        "first_step/padding_targets": int(on_padding.sum()) / count,
    }
