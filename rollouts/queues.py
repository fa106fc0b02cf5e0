"""The batches of a run, in order: each sampled when it is needed, one ahead, or out of a stream of groups
that servers sample while the trainer trains."""

import queue
import threading
from collections.abc import Callable, Sequence
from concurrent.futures import Future
from dataclasses import dataclass, field
from typing import Any

import numpy as np

import dist
from dist import Timer
from rollouts.rollout import Engine, Rollout
from rollouts.vllm_server import EngineError, ServerLost, StaleServer
from run.config import ConfigError, check_ranges
from text.prompt import Prompt


@dataclass
class StreamOptions:
    max_staleness: int = 0
    """vllm: sample while training, and train on nothing that weights of more than N optimiser steps ago
    began. Completions go on through each update; which weights drew each token is recorded. 0: a batch is
    sampled after the updates before it."""

    def check(self) -> None:
        check_ranges(self, ("max_staleness", 0, 1000))
        options: Any = self
        if not self.max_staleness:
            return
        if options.rollout_engine != "vllm":
            raise ConfigError("max_staleness", self.max_staleness, "needs rollout_engine: vllm")
        if options.async_prefetch:
            raise ConfigError("async_prefetch", True, "is one batch ahead; max_staleness bounds it instead")
        if options.vllm_sync_interval > self.max_staleness:
            raise ConfigError(
                "vllm_sync_interval", options.vllm_sync_interval,
                f"must be at most max_staleness ({self.max_staleness}), or all that is sampled is too old",
            )


class RolloutQueue:
    """Yields generation batches in order. Before each the engine gets the trainer's weights; with
    async_prefetch it samples the next batch while this one trains.

    `sample(number, step, prefetched)` makes a batch, from what was prefetched or anew; `prefetch(number)`
    begins one on the engine's thread.
    """

    def __init__(
        self, engine: Engine, sample: Callable[[int, int, bool], list[Rollout]],
        prefetch: Callable[[int], None], *, asynchronous: bool, prefetched: list[Rollout] | None = None,
    ):
        self.engine, self.sample, self.prefetch, self.asynchronous = engine, sample, prefetch, asynchronous
        self.prefetched = prefetched  # the next batch, if it was collected early for a checkpoint
        self.under_way = False  # whether the engine samples the next batch
        self.seconds = 0.0  # spent on sending weights since the last step
        self.metrics: dict[str, float] = {}  # of that sync, and of the batch's prompts
        self.prompts_before: set[int] = set()  # of the last batch

    def next(self, number: int, step: int, last: bool) -> list[Rollout]:
        """Batch `number`, after `step` optimiser steps; `last`: there is no other to prefetch. A
        collective."""
        timer, self.seconds, self.metrics = Timer(), 0.0, {}
        if not self.under_way and self.prefetched is None:
            self.metrics = self.engine.sync(step)
            self.seconds += timer()
        rollouts = self.prefetched
        if rollouts is None:
            rollouts = self.sample(number, step, self.under_way)
        self.prefetched, self.under_way = None, False
        timer()
        if self.asynchronous and not last:
            self.metrics = self.engine.sync(step) or self.metrics
            self.seconds += timer()
            self.prefetch(number + 1)
            self.under_way = True
        else:
            self.engine.rest()
        self.metrics = self.metrics | self.repeated(rollouts)
        return rollouts

    def repeated(self, rollouts: list[Rollout]) -> dict[str, float]:
        """How many of a batch's prompts were in the one before, for the rules."""
        prompts, before = {r.prompt_index for r in rollouts if r.prompt_index >= 0}, self.prompts_before
        self.prompts_before = prompts
        if not prompts or not before:
            return {}
        share = len(prompts & before) / len(prompts)
        return {"now/prompts/repeated": share, "now/prompts/in_batch": float(len(prompts))}

    def refresh(self, number: int, step: int) -> None:
        """Between the optimiser steps that use batch `number`. A collective."""

    def settle(self, number: int, step: int) -> None:
        """Before a checkpoint, or an evaluation: collect the prefetched batch `number` before new weights are
        sent. A collective."""
        if self.under_way:
            self.prefetched, self.under_way = self.sample(number, step, True), False

    def keep(self) -> tuple[list[Rollout], dict[str, Any]]:
        """(rollouts that a checkpoint keeps, what it must know of them); those of rank 0 count."""
        return self.prefetched or [], {}

    def close(self) -> None:
        """End what is under way."""
        if self.under_way:
            self.engine.abort()  # type: ignore[attr-defined]
        self.engine.close()


# ------------------------------------------------------------------------------------------------------------
# A stream
# ------------------------------------------------------------------------------------------------------------


@dataclass(eq=False)
class Group:
    """The completions of one prompt, on rank 0."""

    number: int  # in the order of the seed
    index: int  # of the prompt
    size: int
    again: bool = False  # was too old once: now it is waited for
    oldest: int | None = None  # optimiser steps of the weights that draw its first token; None: not yet asked
    made: dict[int, dict[str, Any]] = field(default_factory=dict)  # fields of the rollouts that are done
    scores: dict[str, Future] | None = None  # once all are done
    era: int = 0  # of the gate, when it was begun
    known: bool = False  # whether its servers still had the right weights when it was done
    given_up: bool = False

    @property
    def done(self) -> bool:
        return self.scores is not None

    def age(self, step: int) -> int:
        """Optimiser steps since its first token; one that has none, and waits for an environment, is new."""
        return 0 if self.oldest is None else step - self.oldest

    def rollouts(self, prompt: Prompt, step: int) -> list[Rollout]:
        """As a batch at `step` has them. Versions of tokens are kept where they differ."""
        found = []
        for k in range(self.size):
            fields: dict[str, Any] = {"row": prompt.name, "prompt_index": self.index, **self.made[k]}
            versions = fields.get("token_versions")
            oldest = self.oldest if versions is None or not len(versions) else int(versions.min())
            if versions is not None and (versions == oldest).all():
                fields["token_versions"] = None
            found.append(Rollout(**fields, step=step, weight_version=step if oldest is None else oldest))
        return found


KEPT = ("prompt_ids", "completion_ids", "sampling_logprobs", "completion_mask", "messages", "failed",
        "truncated", "rewards", "step_ends", "step_rewards", "token_versions")


class Stream:
    """Groups on their way, on rank 0 alone: begun in the order of the seed, sampled by daemon threads that
    enter no collective, handed out when they are done, those that were begun first before others.

    `task(group, k)` makes completion k of a group: called with `ask(prompt, n, limit, temperature, seed)`, it
    returns fields of a rollout. `score(group)` begins to score one whose completions are all made.
    """

    def __init__(
        self, engine: Any, prompt_of: Callable[[int], int], n: int, task: Callable[[Group, int], Callable],
        score: Callable[[Group], dict[str, Future]], *, batch: int, updates: int, staleness: int,
        batches: int, workers: int,
    ):
        self.engine, self.prompt_of, self.n, self.task, self.score = engine, prompt_of, n, task, score
        self.batch, self.updates, self.staleness, self.batches = batch, updates, staleness, batches
        self.following = 0  # number of the next group to begin
        self.groups: list[Group] = []  # begun, and not handed out
        self.interrupted: list[Group] = []  # to be begun anew, after a resume
        self.dropped = 0  # completions that were too old, since the last batch
        self._work: queue.SimpleQueue[tuple[Group, int]] = queue.SimpleQueue()
        self._changed = threading.Condition()
        self._error: BaseException | None = None
        self._over = False
        self._threads, self._workers = 0, workers

    # -- on threads ------------------------------------------------------------------------------------------

    def _sample(self) -> None:
        while not self._over:
            group, k = self._work.get()
            try:
                if not group.given_up:
                    self._make(group, k)
            except ServerLost:  # begun anew when the gate is open again
                self._work.put((group, k))
            except BaseException as error:  # raised where a batch is taken
                with self._changed:
                    self._error = error
                    self._changed.notify_all()

    def _make(self, group: Group, k: int) -> None:
        gate, era, place = self.engine.gate, self.engine.gate.era, group.number * self.n + k

        def ask(*question: Any) -> list:
            if group.given_up:
                raise ServerLost("nobody waits for this any more")
            if group.oldest is None:
                group.oldest = self.engine.sent
            return self.engine.go_on(era, place, *question)

        made = self.task(group, k)(ask=ask)
        with self._changed:
            if era != gate.era:
                raise ServerLost(gate.trouble)
            group.made[k] = made
            complete = len(group.made) == group.size
        if complete and not group.given_up:
            scores = self.score(group)
            with self._changed:
                group.scores = scores
                self._changed.notify_all()

    # -- on the main thread ----------------------------------------------------------------------------------

    def _begin(self, group: Group) -> None:
        group.era = self.engine.gate.era
        self.groups.append(group)
        for k in range(group.size):
            self._work.put((group, k))
            if self._threads < self._workers:
                self._threads += 1
                threading.Thread(target=self._sample, daemon=True, name="stream").start()

    def _begin_again(self, group: Group, again: bool) -> None:
        group.given_up = True
        self.groups.remove(group)
        self._begin(Group(group.number, group.index, group.size, again))

    def fill(self, number: int, more: int = 0) -> None:
        """Begin as many groups as will not be too old when it is their turn, and `more`; batch `number` is
        the next to be taken."""
        with self._changed:
            while self.interrupted:
                self._begin(self.interrupted.pop(0))
            batches = 1 + (self.engine.sent + self.staleness - number * self.updates) // self.updates
            wanted = more + self.batch * max(0, min(batches, self.batches - number))
            for _ in range(wanted - len(self.groups)):
                self._begin(Group(self.following, self.prompt_of(self.following), self.n))
                self.following += 1

    def take(self, count: int, step: int, last: bool) -> tuple[str, Any]:
        """("ok", `count` groups), or ("stale", why) if a server was lost. Waits until as many are done, and
        those that must not be dropped again; `last`: no batch follows."""
        gate = self.engine.gate
        while True:
            with self._changed:
                while (chosen := self._chosen(count, step, last)) is None:
                    if self._error is not None:
                        raise self._error
                    if gate.trouble:
                        break
                    self._changed.wait(0.5)
            if not self.verify():
                return "stale", gate.trouble
            with self._changed:
                if chosen is not None and all(g.known for g in chosen):
                    self.groups = [g for g in self.groups if g not in chosen]
                    return "ok", chosen

    def verify(self) -> bool:
        """Whether the servers have the weights that were sent. Where they had not for a while, all that was
        made since the last time is begun anew."""
        gate, era, done = self.engine.gate, self.engine.gate.era, [g for g in self.groups if g.done]
        if not gate.trouble:
            try:
                self.engine.check_versions()
            except (StaleServer, ServerLost, EngineError) as problem:  # on this rank alone: it must not raise
                gate.lost(str(problem), era)
        with self._changed:
            for group in done:
                group.known |= not gate.trouble and group.era == gate.era
            for group in [g for g in self.groups if not g.known and g.era != gate.era]:
                self._begin_again(group, group.again)
        return not gate.trouble

    def _chosen(self, count: int, step: int, last: bool) -> list[Group] | None:
        """The groups to hand out at `step`, or None if they are not done. One that is too old is begun anew
        with the weights of now, once; then it is waited for, or prompts with long completions would never be
        trained on."""
        for group in [g for g in self.groups if g.age(step) > self.staleness]:
            if group.done or not group.again:
                self.dropped += group.size
                self._begin_again(group, True)
        urgent = [g for g in self.groups if g.again and g.age(step + self.updates) > self.staleness]
        urgent = [] if last else urgent
        rest = [g for g in self.groups if g.done and g not in urgent]
        chosen = [*urgent, *sorted(rest, key=lambda g: g.number)][:count]
        return chosen if len(chosen) == count and all(g.done for g in chosen) else None

    def keep(self) -> tuple[list[Rollout], dict[str, Any]]:
        """(completions of the groups that are done, what else a checkpoint needs)."""
        self.verify()
        with self._changed:
            done = [g for g in self.groups if g.known]
            rest = [*self.interrupted, *(g for g in self.groups if not g.known)]
        rollouts = [Rollout(**g.made[k]) for g in done for k in range(g.size)]
        return rollouts, {
            "following": self.following, "done": [[g.number, g.oldest] for g in done],
            "begun": [[g.number, g.again] for g in rest],
        }

    def restore(self, rollouts: Sequence[Rollout], state: dict[str, Any]) -> None:
        """Go on from what `keep` returned."""
        self.following, n = state["following"], self.n
        for k, (number, oldest) in enumerate(state["done"]):
            group = Group(number, self.prompt_of(number), n, oldest=oldest, known=True)
            for i, rollout in enumerate(rollouts[k * n : (k + 1) * n]):
                group.made[i] = {name: value for name, value in vars(rollout).items() if name in KEPT}
            group.scores = self.score(group)
            self.groups.append(group)
        self.interrupted = [Group(number, self.prompt_of(number), n, again)
                            for number, again in state["begun"]]

    def close(self) -> None:
        """End all of it: threads, and the requests that they wait for."""
        self._over = True
        self.engine.gate.close()
        for group in self.groups:
            group.given_up = True
        for _ in range(self._threads):
            self._work.put((Group(-1, -1, 0, given_up=True), 0))
        self.engine.abort()


class StreamQueue(RolloutQueue):
    """Batches out of a stream. After each optimiser step the engine gets the trainer's weights (every
    vllm_sync_interval), between two tokens of what is being sampled.

    `rolled_out(groups, step, seconds of waiting)` turns groups into scored rollouts, and `replaced(rollouts,
    fresh)` replaces flat groups by fresh ones; both on every rank. `stream` is rank 0's.
    """

    def __init__(
        self, engine: Any, stream: Stream | None, rolled_out: Callable[..., list[Rollout]],
        replaced: Callable[..., list[Rollout]] | None, world: dist.World, size: int, batches: int,
    ):
        super().__init__(engine, _not_by_batch, _not_by_batch, asynchronous=True)
        self.stream, self.rolled_out, self.replaced, self.world = stream, rolled_out, replaced, world
        self.size, self.batches = size, batches  # groups of a batch, batches of the run

    def next(self, number: int, step: int, last: bool) -> list[Rollout]:
        self.refresh(number, step)
        rollouts = self._take(self.size, step, last)
        if self.replaced is not None:

            def fresh(_: int, count: int, here: set[int]) -> list[Rollout]:
                self._fill(number + 1, more=count)
                return self._take(count, step, last=False)

            rollouts = self.replaced(rollouts, fresh)
        self._fill(number + 1)
        versions = [np.full(len(r.completion_ids), r.weight_version) if r.token_versions is None
                    else r.token_versions for r in rollouts]
        dropped = dist.from_main(self._dropped, self.world)
        self.metrics |= self.repeated(rollouts) | {
            "staleness/mean": float(step - np.concatenate(versions).mean()),
            "staleness/dropped": float(dropped),
            "staleness/dropped_share": dropped / (dropped + len(rollouts)),
            "staleness/through_updates": sum(r.token_versions is not None for r in rollouts) / len(rollouts),
        }
        return rollouts

    def _take(self, count: int, step: int, last: bool) -> list[Rollout]:
        """`count` groups that are done, as scored rollouts. A collective."""
        timer, reason = Timer(), ""

        def groups() -> tuple[str, Any]:
            assert self.stream is not None
            state, found = self.stream.take(count, step, last)
            if state == "ok":  # scores stay where they are made
                scores.extend(g.scores for g in found)
                return state, [(g.number, g.index, g.oldest, g.made) for g in found]
            return state, found

        for _ in range(6):
            scores: list[dict[str, Future] | None] = []
            state, found = dist.from_main(groups, self.world, long=True)
            if state == "ok":
                taken = [Group(number, index, len(made), oldest=oldest, made=made)
                         for number, index, oldest, made in found]
                for group, score in zip(taken, scores, strict=False):
                    group.scores = score
                return self.rolled_out(taken, step, timer())
            reason = found
            self.engine.restore(reason)  # type: ignore[attr-defined]
        raise EngineError(f"{reason}; five attempts in a row failed; see the server's log")

    def refresh(self, number: int, step: int) -> None:
        """Send the weights of `step`, and begin what may begin with them. A collective."""
        timer = Timer()
        if self.stream is not None:
            self.stream.verify()
        self.metrics = self.engine.sync(step)
        self.seconds += timer()
        self._fill(number)

    def _fill(self, number: int, more: int = 0) -> None:
        if self.stream is not None:
            self.stream.fill(number, more)

    def _dropped(self) -> int:
        assert self.stream is not None
        dropped, self.stream.dropped = self.stream.dropped, 0
        return dropped

    def keep(self) -> tuple[list[Rollout], dict[str, Any]]:
        return self.stream.keep() if self.stream is not None else ([], {})

    def close(self) -> None:
        if self.stream is not None:
            self.stream.close()
        self.engine.close()


def _not_by_batch(*_: Any) -> Any:
    raise AssertionError("a stream is not sampled batch by batch")
