"""A recipe (RECIPE=grpo; else sft) with a probe in it, for tests: `python worker.py PROBE FILE key=value …`,
also under torchrun.

gradients FILE: save the gradients before clipping of the first step (whole tensors, by name) and stop.
kill-in-save STEP: SIGKILL this process in the middle of publishing step STEP's checkpoint. silent-sync -:
send weights with vLLM's own reload_weights. last-rank KILL-3: SIGKILL (STOP: SIGSTOP) the last rank in step
3. slow SECONDS: wait so long in every step, so that a test can hit it.
"""

import os
import resource
import signal
import sys
import time
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import torch
from torch.distributed.tensor import DTensor

import dist
import grpo
import sft
from checkpoints import building, saving
from health import forensics
from rollouts import vllm_client
from run import loop
from run.config import parse_config


def gradients(file: str) -> None:
    models = []
    build, clip = building.build_model, dist.clip_gradients

    def remember(*given, **how):
        models.append(build(*given, **how))
        return models[-1]

    def save(parameters, max_norm, norm):
        found = {}
        for name, parameter in models[0].named_parameters():
            if parameter.grad is not None:
                gradient = parameter.grad
                found[name] = gradient.full_tensor() if isinstance(gradient, DTensor) else gradient.clone()
        if int(os.environ.get("RANK", 0)) == 0:
            torch.save({"gradients": found, "norm": norm}, file)
        clip(parameters, max_norm, norm)

    building.build_model, dist.clip_gradients = remember, save


def kill_in_save(step: str) -> None:
    publish = saving.publish

    def die(aside, final):
        if final.name == f"step-{step}":
            os.kill(os.getpid(), signal.SIGKILL)
        publish(aside, final)

    saving.publish = die


def last_rank(what_and_step: str) -> None:
    """SIGKILL or SIGSTOP for the last rank when it begins this step: `STOP-3`."""
    what, _, step = what_and_step.partition("-")
    beat = dist.beat

    def fall(now, world):
        if now == int(step) and world.rank == world.size - 1:
            os.kill(os.getpid(), getattr(signal, f"SIG{what}"))
        beat(now, world)

    dist.beat = fall


def slow_rank(seconds: str) -> None:
    """The last rank's products take so much longer."""
    product = torch.Tensor.__matmul__

    def wait(a, b):
        if int(os.environ["RANK"]) == int(os.environ["WORLD_SIZE"]) - 1 and a is b:
            time.sleep(float(seconds) / 8)
        return product(a, b)

    torch.Tensor.__matmul__ = wait


def slow(seconds: str) -> None:
    rate = dist.learning_rate

    def wait(*arguments):
        time.sleep(float(seconds))
        return rate(*arguments)

    dist.learning_rate = wait


def poison(steps: str) -> None:
    """The last rank's feed-forward gives NaN in these optimiser steps."""
    wanted, forward = [int(s) for s in steps.split(",")], forensics.Forensics.remember
    healthy, now = forensics.Forensics.healthy, [1]
    last = int(os.environ.get("WORLD_SIZE", 1)) - 1

    def broken(module, inputs, output):
        if now[0] in wanted and int(os.environ.get("RANK", 0)) == last:
            return (output[0] * float("nan"), *output[1:])

    def watched(self, *arguments):
        if not self.model.layers[1].mlp._forward_hooks:
            self.model.layers[1].mlp.register_forward_hook(broken)
        return forward(self, *arguments)

    def counted(self, *arguments):
        try:
            return healthy(self, *arguments)
        finally:
            now[0] += 1

    forensics.Forensics.remember, forensics.Forensics.healthy = watched, counted


def out_of_memory(step: str) -> None:
    """From this step on the process may have half a GiB more, and asks for four."""
    beat = dist.beat

    def limit(now, world):
        beat(now, world)
        if now == int(step):
            used = int(Path("/proc/self/statm").read_text().split()[0]) * resource.getpagesize()
            resource.setrlimit(resource.RLIMIT_AS, (used + (1 << 29), resource.RLIM_INFINITY))
            held.append(torch.empty(1 << 30))

    held: list = []
    dist.beat = limit


def silent_sync(way: str) -> None:
    def reload(engine, server, folder):
        if way == "reload_weights":
            how = {"method": "reload_weights", "kwargs": {"weights_path": str(folder)}}
            server.ask("POST", "/collective_rpc", how)
        return []  # no worker says what it received

    vllm_client.VllmEngine._load_file = reload


if __name__ == "__main__":
    recipe = grpo if os.environ.get("RECIPE") == "grpo" else sft
    {
        "gradients": gradients,
        "silent-sync": silent_sync,
        "kill-in-save": kill_in_save,
        "slow": slow,
        "slow-rank": slow_rank,
        "last-rank": last_rank,
        "out-of-memory": out_of_memory,
        "poison": poison,
        "plain": lambda _: None,
    }[sys.argv[1]](sys.argv[2])
    loop.start(recipe.main, lambda: parse_config(recipe.Config, sys.argv[3:]))
