"""Settings that are outside of all that works: ranges far wider than what is advised, so that whoever leaves
one has made a mistake. `python -m health options` has the meaning of each option."""

import math
from collections.abc import Callable, Iterator
from typing import Any

from health.rules import samples

WIDE = math.inf


def _rl(config: dict) -> bool:
    return samples(config)


def _adapter(config: dict) -> bool:
    return bool(config.get("adapter"))


# (option, least, most, what is wrong below, what is wrong above, for which configs)
BOUNDS: tuple[tuple[str, float, float, str, str, Callable[[dict], Any]], ...] = (
    ("learning_rate", 1e-8, WIDE, "moves no weight by what matters", "", lambda c: True),
    ("learning_rate", 0, 0.05, "", "throws a policy far beyond where its gradient holds", _rl),
    ("weight_decay", 0, 1.0, "pushes weights away from 0", "shrinks the weights faster than gradients move "
     "them: 0.01 to 0.1", lambda c: True),
    ("max_grad_norm", 1e-3, WIDE, "clips every step to nothing: 1.0", "",
     lambda c: c.get("max_grad_norm") != 0),
    ("adam_epsilon", 0, 1e-4, "", "outweighs the gradients it is added to: 1e-8", lambda c: True),
    ("adam_beta1", 0, 0.99, "", "averages over hundreds of steps: 0.9", lambda c: True),
    ("adam_beta2", 0.5, WIDE, "has no memory of the gradients' size: 0.95 to 0.999", "", lambda c: True),
    ("warmup_ratio", 0, 0.7, "", "is most of the run: 0.03 to 0.1", lambda c: c.get("warmup_steps") is None),
    ("num_epochs", 0, 50, "", "repeats the rows until they are known by heart: 1 to 4",
     lambda c: c.get("max_steps") is None and not _rl(c)),
    ("lora_dropout", 0, 0.6, "", "drops most of what the adapter is given: 0 to 0.1", _adapter),
    ("lora_alpha", 0.01, 4096, "scales the adapter to nothing", "multiplies the adapter's output far beyond "
     "the layer's own: 16 to 64", _adapter),
    ("router_aux_loss_coef", 0, 1.0, "rewards unequal experts", "outweighs the loss: 0.001 to 0.01",
     lambda c: c.get("router_aux_loss_coef") is not None),
    # The policy
    ("temperature", 0.05, 3.0, "leaves no choice: all completions of a prompt are the same; 0.6 to 1.0",
     "makes every token nearly as likely as any other: 0.6 to 1.0", _rl),
    ("epsilon", 1e-3, 5.0, "clips every token: a batch's second use teaches nothing; 0.2",
     "clips nothing: 0.2", lambda c: "epsilon" in c and c.get("loss_type") != "cispo"),
    ("top_entropy_quantile", 0.05, 1.0, "trains on hardly any token: 0.2 to 1", "", _rl),
    ("beta", 0, 2.0, "rewards distance from the reference", "holds the policy to the reference, whatever it "
     "earns: 0 to 0.1", _rl),
    ("entropy_coef", -0.1, 0.3, "punishes every choice", "outweighs the reward: the policy becomes random; "
     "0 to 0.01", _rl),
    ("num_generations", 3, WIDE, "gives each completion one sibling as its baseline: 8 and more", "",
     lambda c: "reward_funcs" in c and c.get("rl_coef") != 0 and c.get("rollout_engine") != "replay"),
    ("max_completion_length", 2, WIDE, "leaves no room for an answer", "", _rl),
    ("off_policy_mask_threshold", 1e-3, WIDE, "masks nearly all that is not exactly on policy: 0.5", "", _rl),
    ("vllm_sync_interval", 0, 64, "", "samples from weights of long ago: 1 to 8",
     lambda c: c.get("rollout_engine") == "vllm"),
    ("max_staleness", -1, 64, "", "trains on samples of long ago: 1 to 8",
     lambda c: c.get("rollout_engine") == "vllm"),
    ("vllm_importance_sampling_clip_max", 0.2, WIDE, "drops what is on policy: 2 to 10", "", _rl),
    # Features
    ("diversity_coef", 0, 50, "rewards samples that are alike", "outweighs the agreement: 1",
     lambda c: "alignment_coef" in c),
    ("alignment_coef", 0, 1000, "rewards samples for being far from the truth",
     "outweighs everything else: 1", lambda c: "alignment_coef" in c),
    ("rl_coef", 0, 1000, "trains against the reward", "outweighs everything else: 1",
     lambda c: "rl_coef" in c),
    ("ce_coef", 0, 100, "trains against the true tokens", "outweighs everything else: 0.03 to 0.1",
     lambda c: "ce_coef" in c),
)


def extremes(config: dict) -> Iterator[tuple[str, str]]:
    """(option, 'is 100, above 2: why') for each setting of a config that is outside of all that works."""
    if not config.get("base_model"):  # another trainer's run
        return
    for option, least, most, below, above, applies in BOUNDS:
        value = config.get(option)
        if not isinstance(value, int | float) or isinstance(value, bool) or not applies(config):
            continue
        if value < least and below:
            yield option, f"is {value:g}, below {least:g}: it {below}"
        elif value > most and above:
            yield option, f"is {value:g}, above {most:g}: it {above}"
    yield from _without_weight(config)


def _without_weight(config: dict) -> Iterator[tuple[str, str]]:
    weights = config.get("reward_weights")
    if isinstance(weights, list) and weights and all(w < 0 for w in weights):
        yield "reward_weights", f"are {weights}, all negative: the worst completion is taught"
    if "alignment_coef" in config:
        if not config.get("rl_coef") and not config.get("ce_coef"):
            yield "rl_coef", "is 0, and ce_coef too: nothing is trained"
        elif config.get("rl_coef") and not config.get("alignment_coef") and not config.get("diversity_coef"):
            yield "alignment_coef", "is 0, and diversity_coef too: no sample earns anything"
        elif config.get("rl_coef") and not config.get("alignment_coef"):
            yield "alignment_coef", "is 0: samples are only taught to differ, not to be right"
