"""Health rules as data (RULES): the symptoms, causes and remedies of the reference page's tables, and further
ones. checks.py has the checks, doctor.py applies them.
"""

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Literal


@dataclass(frozen=True)
class Rule:
    """One health rule. `low`, `high`, `window`, `after` and `severity` can be set under `health_rules`."""

    name: str
    metrics: tuple[str, ...]  # the first one that a run logs is read; * matches any name
    check: str  # one of checks.CHECKS
    says: str  # what it means, in the verdict
    cause: str
    # (option, advice, (low, high) or names: omit the advice if the option already lies inside); the verdict
    # adds the option's value
    fixes: tuple[tuple[str, str] | tuple[str, str, tuple[float, float] | tuple[str, ...]], ...]
    low: float | None = None
    high: float | None = None
    plus: tuple[str, ...] = ()  # options whose values are added to `high`
    window: int = 1  # steps in a row (observations, for what is measured more rarely than every step)
    after: int = 0  # steps before the rule applies
    severity: Literal["warning", "critical"] = "warning"
    guard: str | None = None  # one of GUARDS: does the rule apply to this config?
    explains: tuple[str, ...] = ()  # rules that are silent while this one is broken: its consequences
    tell: str = ""  # where several causes are possible: the observation that tells them apart


_CORRECTION: tuple[str, str, tuple[str, ...]] = (
    "vllm_importance_sampling_mode",
    "token_truncate or geometric_mask does not grow with the length of a completion",
    ("token_truncate", "token_mask", "geometric_mask", "geometric_truncate"),
)

RULES: tuple[Rule, ...] = (
    # Before the first step: the settings, and the data
    Rule(
        "setting_out_of_bounds", ("settings",), "outside", "a setting is outside of all that works",
        "the option's value: nothing can be learnt with it, or too much is lost",
        (), high=0.0,
    ),
    Rule(
        "labels_differ", ("data/labels_differ",), "outside",
        "labels are other tokens than the inputs at the same place",
        "rows that were tokenised elsewhere with labels of another text, or shifted twice",
        (("datasets", "labels must be the input ids, or -100: python data.py inspect"),),
        high=0.001, severity="critical", explains=("loss_*", "worse_than_frequencies", "overfitting"),
    ),
    Rule(
        "other_tokenizer", ("data/tokens_kept",), "outside",
        "the rows' ids, decoded and encoded again, are other ids",
        "the rows were tokenised with another tokenizer than base_model's",
        (("datasets", "encode the texts again with base_model's tokenizer (type: text or chat)"),),
        low=0.8, severity="critical", explains=("loss_*", "worse_than_frequencies", "broken_text"),
    ),
    Rule(
        "held_out_in_training", ("data/held_out_in_training",), "outside",
        "held-out rows are among the training rows: the held-out loss says nothing about new ones",
        "the same file on both sides, or duplicates that a random split put on both",
        (("test_datasets", "take rows out that are trained on"),
         ("val_set_size", "remove duplicates before the split")),
        high=0.1, explains=("overfitting",),
    ),
    Rule(
        "held_out_shares_text", ("data/held_out_shared_text",), "outside",
        "held-out answers share long passages with training answers",
        "near-duplicates: the same text in another row, or a longer one that contains it",
        (("test_datasets", "take texts out that are trained on"),), high=0.5,
    ),
    Rule(
        "duplicates", ("data/copied",), "outside",
        "much of what is trained are copies of other rows, more than chance explains (share)",
        "files that were joined twice, or rows that were made from few sources",
        (("datasets", "remove duplicates, or weigh the data set lower (weight)"),), high=0.2,
    ),
    Rule(
        "one_row_dominates", ("data/most_frequent_row",), "outside",
        "one row is repeated so often that it is much of what is trained (share of trained tokens)",
        "a filler or an error message that was saved as a row", (("datasets", "remove its copies"),),
        high=0.05,
    ),
    Rule(
        "not_shuffled", ("data/order",), "outside", "the rows come in the order of the file",
        "the order of training is not shuffled: neighbours in a file are alike, and the model forgets",
        (("datasets", "text.packing.Batches shuffles with the seed: is it bypassed?"),),
        high=0.5, explains=("sorted_by_length", "sorted_by_start"),
    ),
    Rule(
        "sorted_by_length", ("data/order_by_length",), "outside", "the rows come sorted by length",
        "a sampler that groups rows by length over the whole epoch",
        (("datasets", "shuffle them; sample_packing fills rows without sorting"),), high=0.5,
    ),
    Rule(
        "sorted_by_start", ("data/order_by_start",), "outside",
        "the rows come sorted by their first trained token: by class or by letter",
        "a sorted file that is not shuffled", (("datasets", "shuffle them"),), high=0.5,
    ),
    Rule(
        "rows_cut_off", ("data/truncated",), "outside", "many rows are cut off at sequence_len",
        "rows longer than sequence_len: the ends of their answers are never seen",
        (("sequence_len", "raise it"), ("excess_length_strategy", "drop leaves them out whole")), high=0.2,
    ),
    Rule(
        "answers_without_end", ("data/without_end",), "outside",
        "answers are trained without a token that ends them: the model will not stop",
        "a chat template without an end of turn, rows cut off at sequence_len, or labels that leave it out",
        (("chat_template", "does it close the assistant's turn?"), ("sequence_len", "raise it")), high=0.5,
        explains=("rows_cut_off",),
    ),
    Rule(
        "broken_text", ("data/broken_text",), "outside",
        "texts hold control characters, replacement characters or text decoded with the wrong encoding",
        "files read as the wrong encoding, binary data, or rows cut in the middle of a character",
        (("datasets", "read the files as UTF-8 and look at the rows: python data.py inspect"),), high=0.02,
    ),
    Rule(
        "untrained_tokens", ("data/untrained_tokens",), "outside",
        "rows hold tokens whose row of the embedding was never trained, and the adapter does not train it "
        "(share of all tokens)",
        "a base model's reserved tokens, as a chat template takes them: the model cannot tell them apart",
        (("adapter", "train in full, or start from the chat model"),
         ("chat_template", "a template that writes tokens the model knows"),
         ("special_tokens", "name new tokens: their rows are trained")), high=0.0,
    ),
    Rule(
        "new_tokens_unused", ("data/new_tokens_unused",), "outside",
        "some tokens that the config adds occur in no row: nothing trains them (share of them)",
        "they are spelled otherwise in the data, or the chat template writes others",
        (("special_tokens", "write them as the rows do, or remove them"),
         ("chat_template", "does it write them?")), high=0.0,
    ),
    Rule(
        "answer_in_prompt", ("data/answer_in_prompt",), "outside",
        "nearly every answer stands word for word in its own prompt",
        "a column that holds the answer was put into the prompt: the model learns to copy",
        (("datasets", "see the prompts: python data.py inspect"),), high=0.9,
    ),
    Rule(
        "held_out_too_small", ("data/held_out_rows",), "outside",
        "so few held-out rows that their loss says nothing", "the held-out set is a handful of rows",
        (("val_set_size", "0.05 gives a steadier figure"), ("test_datasets", "more rows")), low=4.0,
        explains=("overfitting",),
    ),
    Rule(
        "weights_not_restored", ("data/weights_not_restored",), "outside",
        "the weights after the resume are not those that the checkpoint was saved with",
        "a checkpoint that was changed, or a model that is built over what was loaded",
        (("resume", "never begins afresh; see checkpoints/saving.py"),), high=0.0, severity="critical",
        explains=("resume_jump", "loss_*", "grad_norm_*", "reward_*", "kl_*", "sampler_mismatch"),
    ),
    Rule(
        "optimizer_not_restored", ("data/optimizer_not_restored",), "outside",
        "the optimiser's state after the resume is not the one that was saved",
        "moments that were lost: the first steps are as long as those without a warmup",
        (("resume", "never begins afresh; see checkpoints/saving.py"),), high=0.0, severity="critical",
        explains=("resume_jump", "loss_*", "grad_norm_*", "reward_*", "kl_*"),
    ),
    # In the first step, before any update: what must hold whatever the data are
    Rule(
        "sees_the_future", ("first_step/future",), "outside",
        "a token's output changes with the tokens after it (in units of what rounding explains)",
        "the attention is not causal: a mask that is missing or off by one",
        (("base_model", "a decoder; see kernels.attention"),), high=1.0, severity="critical",
        explains=("loss_*", "overfitting", "worse_than_frequencies", "documents_mix",
                  "padding_changes_result", "answers_unrelated", "sampler_mismatch", "kl_*", "grad_norm_*"),
    ),
    Rule(
        "documents_mix", ("first_step/documents",), "outside",
        "a document's output changes with its neighbours in the row (in units of what rounding explains)",
        "document ids or positions do not reach the attention: packed documents see each other",
        (("sample_packing", "false has one document in a row", (0, 0)),), high=1.0, severity="critical",
        explains=("loss_*", "overfitting", "worse_than_frequencies", "sampler_mismatch", "kl_*",
                  "first_loss_*"),
    ),
    Rule(
        "padding_changes_result", ("first_step/padding",), "outside",
        "a document's output changes with the padding after it (in units of what rounding explains)",
        "padding is attended to: its document id is not -1, or the mask ignores it",
        (("sample_packing", "true leaves little padding", (1, 1)),), high=1.0, severity="critical",
        explains=("loss_*", "overfitting", "sampler_mismatch", "kl_*", "first_loss_*"),
    ),
    Rule(
        "not_repeatable", ("first_step/repeat",), "outside",
        "the same batch gives another loss when it is computed again, before any update",
        "dropout with another random state, a kernel with a race, or state that the forward pass changes",
        (("deterministic", "true names operations that are not", (1, 1)),
         ("lora_dropout", "0 for a test", (0, 0))),
        high=1.0, severity="critical",
        explains=("sampler_mismatch", "kl_at_start", "sees_the_future", "documents_mix",
                  "padding_changes_result", "dropout_unasked", "first_loss_differs"),
    ),
    Rule(
        "targets_shifted", ("first_step/targets_next",), "outside",
        "targets are not the tokens that follow their inputs (share that is)",
        "labels were shifted twice or not at all, or rows were misaligned when the batch was made",
        (("datasets", "see text.packing.Batches.collate"),), low=0.99, severity="critical",
        explains=("loss_*", "overfitting", "worse_than_frequencies", "answers_unrelated", "grad_norm_*",
                  "trained_on_padding", "first_loss_*"),
    ),
    Rule(
        "trained_on_padding", ("first_step/padding_targets",), "outside",
        "the loss is on padding too (share of the trained tokens)",
        "padding has labels: they must be -100", (("datasets", "see text.packing.Batches.collate"),),
        high=0.0, severity="critical", explains=("loss_*", "overfitting", "trained_on_prompts"),
    ),
    Rule(
        "first_loss_differs", ("first_step/loss_difference",), "outside",
        "the loss is not the mean negative log-likelihood of the next tokens, computed plainly "
        "(relative difference, in units of what rounding explains)",
        "the loss function: targets shifted again, a temperature, smoothing, a scale, or a kernel",
        (("learning_rate", "nothing else helps before sft.sft_loss is right"),), high=1.0,
        severity="critical", explains=("loss_*", "overfitting", "worse_than_frequencies", "grad_norm_*"),
    ),
    Rule(
        "documents_merged", ("first_step/documents_merged",), "outside",
        "several rows of the batch are one document (share that has no document of its own)",
        "document ids are lost when the batch is made: packed rows see each other",
        (("sample_packing", "see text.packing.Batches.collate"),), high=0.0, severity="critical",
        explains=("loss_*", "overfitting", "targets_shifted", "positions_wrong"),
    ),
    Rule(
        "positions_wrong", ("first_step/positions_wrong",), "outside",
        "positions do not count from 0 in each document (share of tokens)",
        "positions run on across packed rows, or are constant",
        (("sample_packing", "see text.packing.Batches.collate"),), high=0.0, severity="critical",
        explains=("loss_*", "overfitting", "worse_than_frequencies"),
    ),
    Rule(
        "dropout_unasked", ("first_step/mode",), "outside",
        "the loss in training mode is not that in evaluation mode, though no dropout is set (relative "
        "difference, in units of what rounding explains)",
        "a layer that behaves otherwise in training: dropout, noise on the embedding, quantisation of one "
        "mode", (("lora_dropout", ""), ("base_model", "does its code have a dropout of its own?")),
        high=1.0, severity="critical",
        explains=("sampler_mismatch", "kl_at_start", "ratio_not_one", "first_loss_differs"),
    ),
    Rule(
        "first_update_raises_loss", ("first_step/loss_change",), "uphill",
        "the update raises the loss of the very batch that it was made from (change over what the gradient "
        "says)",
        "a sign: the gradient is not that of the reported loss, or the update is negated",
        (("learning_rate", "if a tenth of it raises the loss too, it is the sign"),), low=0.0, window=2,
        severity="critical",
        explains=("loss_*", "reward_collapse", "kl_*", "grad_norm_*", "overfitting",
                  "worse_than_frequencies", "alignment_*", "feature_*"),
    ),
    Rule(
        "better_not_likelier", ("first_step/better_likelier",), "outside",
        "the update makes the better completions less likely than the worse ones (Σ A·Δ log π over its size)",
        "a sign: the loss or the update is negated, or advantages belong to other completions",
        (("learning_rate", "if a tenth of it does the same, it is the sign"),), low=-0.1, window=2,
        severity="critical",
        explains=("reward_*", "kl_*", "policy_gradient_large", "entropy_*", "alignment_*", "feature_*",
                  "update_goes_uphill"),
    ),
    Rule(
        "worse_than_uniform", ("loss/over_uniform",), "at_first",
        "before any update the loss is above that of guessing among all tokens",
        "the weights are not those of this tokenizer and these layers: a checkpoint that was mixed up, or "
        "loaded in part", (("base_model", "are these weights, config.json and tokenizer of one model?"),),
        high=1.2, severity="critical", guard="from_checkpoint",
        explains=("worse_than_frequencies", "answers_unrelated", "loss_*", "grad_norm_*"),
    ),
    Rule(
        "optimizer_reset", ("weights/moved",), "longer_after_resume",
        "the first step after the resume is much longer than those before it",
        "the optimiser's moments were lost: Adam's first step moves every weight by the whole rate",
        (("resume", "see checkpoints/saving.py"),), high=2.5,
        explains=("resume_jump", "loss_spike", "loss_diverging", "updates_too_large"),
    ),
    Rule(
        "gradients_left_over", ("first_step/gradients_left",), "left_over",
        "gradients of the step before are still there when a step begins",
        "they are not set to zero after the update: each step adds to all before it (an edited loop)",
        (("max_grad_norm", "hides it: clipping makes the sum as long as one gradient"),),
        high=0.0, severity="critical",
        explains=("loss_*", "grad_norm_*", "policy_gradient_large", "kl_*", "reward_collapse", "updates_*"),
    ),
    Rule(
        "frozen_network_differs", ("first_step/frozen_difference",), "outside",
        "the frozen network (reference, features) is not the starting model",
        "another checkpoint, random weights, or weights that were loaded only in part",
        (("base_model", "both are built from it: see checkpoints.building"),), high=0.05,
        severity="critical",
        explains=("kl_*", "alignment_*", "feature_*", "features_*", "truths_*", "frozen_network_*"),
    ),
    # Do the weights move, and as they should?
    Rule(
        "learning_rate_zero", ("train/learning_rate",), "stops_at_zero", "the learning rate is 0",
        "the option itself, or a schedule that has ended: no weight moves",
        (("learning_rate", "full fine-tuning 1e-5 to 5e-5, LoRA 1e-4 to 3e-4", (1e-12, math.inf)),
         ("lr_scheduler", ""), ("warmup_ratio", ""), ("max_steps", "the schedule ends there")),
        low=0.0, window=3, severity="critical",
        explains=("loss_*", "weights_*", "update*", "no_gradient", "tensor_not_trained"),
    ),
    Rule(
        "weights_still", ("weights/changed",), "still",
        "no weight changes, though there are gradients and a learning rate",
        "the optimiser's step is not made, it holds other tensors than the model's, or each update is "
        "smaller than the weights' precision can hold",
        (("learning_rate", "raise it"), ("optimizer", "is its step called, with the model's parameters?"),
         ("max_grad_norm", "1.0", (0.01, math.inf))),
        tell="weights in bfloat16 without a copy in fp32: the precision; else the optimiser",
        low=1e-6, window=3, severity="critical",
        explains=("loss_*", "updates_*", "tensor_not_trained", "reference_is_policy", "update_is_decay"),
    ),
    Rule(
        "updates_rounded_away", ("weights/changed",), "still",
        "most weights do not change: the updates are smaller than their precision can hold",
        "weights in bfloat16 without a copy in fp32: an update below 1/256 of a weight is lost",
        (("learning_rate", "raise it"), ("bf16", "true keeps the weights in fp32 and computes in bfloat16")),
        low=0.3, window=3, explains=("loss_*", "tensor_not_trained"),
    ),
    Rule(
        "updates_too_small", ("weights/moved",), "never_above",
        "a step changes the weights by so little that the run cannot change the model (‖Δw‖/‖w‖ a step)",
        "a learning rate, a loss scale or a clip that is far too small",
        (("learning_rate", "full fine-tuning 1e-5 to 5e-5, LoRA 1e-4 to 3e-4"),
         ("max_grad_norm", "1.0", (0.01, math.inf)), ("adam_epsilon", "1e-8", (0, 1e-6)),
         ("warmup_ratio", "is the run longer than its warmup?")),
        low=1e-6, window=5, explains=("loss_stuck", "loss_plateau"),
    ),
    Rule(
        "updates_too_large", ("weights/moved",), "thrown",
        "a step changes the weights by a good part of themselves (‖Δw‖/‖w‖ a step), and the loss rose",
        "a learning rate that is far too high: what was learnt is lost in one step",
        (("learning_rate", "divide it by 10"), ("warmup_ratio", "try 0.05 to 0.1", (0.05, 1))),
        high=0.1, window=7, explains=("answers_unrelated", "loss_plateau", "loss_stuck"),
    ),
    Rule(
        "tensor_not_trained", ("weights/still_tensors",), "outside",
        "some tensors that should be trained never change (share of them)",
        "they are not in the optimiser, no gradient reaches them, or their layer is not used",
        (("optimizer", "does it get all of model.parameters()?"), ("adapter", "is its module called?")),
        high=0.0, window=4,
    ),
    Rule(
        "frozen_unasked", ("weights/frozen_share",), "outside",
        "most parameters are frozen, though no option freezes them (share)",
        "requires_grad was switched off: only a part of the model is trained",
        (("adapter", "lora trains little on purpose"),), high=0.5,
        explains=("loss_stuck", "loss_plateau"),
    ),
    Rule(
        "only_decay_moves", ("weights/shrinking",), "only_decay",
        "nothing but the weight decay moves the weights, though there are gradients (cosine of −Δw and w)",
        "gradients are lost between the backward pass and the update: scaled or clipped to nothing, below "
        "adam_epsilon, or of tensors that the optimiser does not hold",
        (("max_grad_norm", "1.0", (0.01, math.inf)), ("adam_epsilon", "1e-8", (0, 1e-6))),
        high=0.9, window=3, severity="critical",
        explains=("update_is_decay", "loss_*", "tensor_not_trained", "updates_*", "reward_*"),
    ),
    Rule(
        "update_is_decay", ("weights/shrinking",), "outside",
        "updates mostly shrink the weights: the decay outweighs the gradient (cosine of −Δw and w)",
        "weight_decay times learning_rate is larger than what the gradient moves",
        (("weight_decay", "0.01 to 0.1", (0, 0.1)),), high=0.5, window=3,
        explains=("loss_*", "kl_drifting", "entropy_high", "reward_collapse"),
    ),
    Rule(
        "update_goes_uphill", ("weights/along_gradient",), "early",
        "the update goes along the gradient, not against it (cosine of Δw and −g)",
        "a sign: the loss, the gradient or the update is negated",
        (("learning_rate", "is positive? see dist.update"),), low=-0.1, window=2, severity="critical",
        explains=("loss_*", "reward_collapse", "kl_*", "grad_norm_*", "overfitting",
                  "worse_than_frequencies"),
    ),
    Rule(
        "frozen_network_moves", ("weights/frozen_moved",), "outside",
        "frozen weights change (of the reference, the feature network, or the base under an adapter)",
        "they share their tensors with the model, or an optimiser holds them",
        (("base_model", "see checkpoints.building: a frozen copy has its own tensors"),),
        high=0.0, severity="critical",
        explains=("alignment_*", "feature_*", "features_*", "truths_*", "reference_is_policy", "kl_*",
                  "frozen_network_drifts"),
    ),
    Rule(
        "frozen_network_drifts", ("weights/frozen_answers_moved",), "outside",
        "the frozen network gives a probe text other hidden states than at the start (in units of what "
        "rounding explains), with the same weights",
        "what is trained takes part in it: the adapter is not switched off",
        (("adapter", "see checkpoints.adapters.base_of"),), high=1.0, severity="critical",
        explains=("alignment_*", "feature_*", "features_*", "truths_*", "reference_is_policy", "kl_*"),
    ),
    Rule(
        "same_rows_again", ("rows/distinct",), "repeats",
        "the same rows come in every step (distinct rows of the last five steps)",
        "the step's number does not reach the order of the rows, or a data loader starts again",
        (("datasets", "see text.packing.Batches.units"),), low=0.25, window=3, severity="critical",
        explains=("overfitting", "loss_*"),
    ),
    Rule(
        "rows_again_after_resume", ("rows/fingerprint",), "seen_before",
        "the first step after the resume has the rows of an earlier step",
        "the position in the data was not restored: rows are trained twice, others never",
        (("resume", "the step number alone gives the rows: see text.packing.Batches"),), severity="critical",
        explains=("resume_jump", "overfitting"),
    ),
    Rule(
        "resume_jump", ("train/loss", "train/grad_norm"), "after_resume",
        "the first step after the resume is unlike those before it",
        "weights, optimiser state or order of the rows were not restored: no fault of the rows",
        (("resume", "compare with the run before: see checkpoints/saving.py"),), high=1.3,
        explains=("loss_spike", "loss_diverging", "grad_norm_*", "policy_gradient_large"),
    ),
    Rule(
        "worse_than_frequencies", ("loss/over_frequencies",), "above_and_not_falling",
        "the loss is above what the frequencies of the trained tokens alone would give",
        "a checkpoint, tokenizer or position code that does not fit, or labels that are not the answers",
        (("base_model", "are these weights and this tokenizer of one model?"),
         ("datasets", "see the labels: python data.py inspect")),
        high=1.1, window=5, after=10, guard="from_checkpoint",
        explains=("loss_stuck", "loss_plateau", "grad_norm_high"),
    ),
    Rule(
        "answers_unrelated", ("answers/rotated_gain",), "unrelated",
        "an answer is as likely after another row's question as after its own",
        "answers that do not belong to their questions, or questions that are not seen",
        (("datasets", "are the columns of a row of one row? python data.py inspect"),),
        low=0.02, window=2, guard="has_prompts", explains=("overfitting",),
    ),
    # Supervised fine-tuning ("Key Metrics for SFT", "SFT Stability")
    Rule(
        "loss_stuck", ("train/loss",), "unmoved", "the loss has not moved since the first steps",
        "the learning rate is too low, or the labels mask what should be learnt",
        (("learning_rate", "try 2 to 5 times as much (full fine-tuning 1e-5 to 5e-5, LoRA 1e-4 to 3e-4)"),
         ("weight_decay", "above 0.1 it can suppress LoRA", (0, 0.1)),
         ("datasets", "see the mask: python data.py inspect")),
        tell="weights/moved says how far a step takes the weights: below 1e-5 it is the rate",
        low=2.0, high=0.97, window=50, after=60, guard="supervised",
    ),
    Rule(
        "loss_plateau", ("train/loss",), "flat", "the loss has stopped falling, well above 0.5 to 2.0",
        "too low a learning rate, a warmup too short for it, or data without signal",
        (("learning_rate", "try 2 to 5 times as much"), ("warmup_ratio", "try 0.05 to 0.1", (0.05, 1)),
         ("datasets", "see the mask: python data.py inspect")),
        low=2.0, high=0.99, window=100, after=150, guard="supervised",
    ),
    Rule(
        "loss_spike", ("train/loss",), "spike", "the loss jumped",
        "a malformed or very long row, or a learning rate that is too high",
        (("sample_packing", "set it to false for a while and see which batches do it", (0, 0)),
         ("learning_rate", "divide it by 2 to 5, or warm up longer"),
         ("bf16", "try false to see if precision is the cause", (0, 0))),
        low=2.0, high=8.0, window=30, after=20, guard="supervised",
    ),
    Rule(
        "loss_diverging", ("train/loss",), "above_best", "the loss climbs and stays up",
        "the learning rate is too high for this batch size or warmup",
        (("learning_rate", "divide it by 2 to 5"), ("warmup_ratio", "try 0.05 to 0.1", (0.05, 1)),
         ("max_grad_norm", "1.0 clips what a bad batch can do", (1e-9, 1.0))),
        low=0.5, high=1.5, window=10, after=10, severity="critical", guard="supervised",
        explains=("overfitting", "loss_stuck", "loss_plateau", "loss_spike", "grad_norm_high",
                  "worse_than_frequencies", "answers_unrelated"),
    ),
    Rule(
        "overfitting", ("eval/loss",), "rising", "held-out loss rises while training goes on",
        "the model learns the training rows by heart",
        (("num_epochs", "fewer, or set max_steps"), ("weight_decay", "try 0.01 to 0.1", (0.01, math.inf)),
         ("lora_r", "8 to 32"), ("lora_dropout", "try 0.05", (0.05, 1)),
         ("val_set_size", "0.05 gives a steadier figure")),
        high=0.05, window=3, after=3,
    ),
    Rule(
        "grad_norm_high", ("train/grad_norm",), "outside", "gradients are large",
        "too high a learning rate, noisy or malformed batches",
        (("max_grad_norm", "1.0 clips them", (1e-9, 1.0)), ("learning_rate", "divide it by 2 to 5"),
         ("gradient_accumulation_steps", "more smooth a noisy batch")),
        high=10.0, window=5, after=10, guard="supervised",
    ),
    Rule(
        "grad_norm_exploding", ("train/grad_norm",), "outside", "the gradient explodes",
        "the step before it was too long, or one batch is broken",
        (("learning_rate", "divide it by 2 to 5"), ("max_grad_norm", "1.0 clips it", (1e-9, 1.0)),
         ("warmup_ratio", "try 0.05 to 0.1", (0.05, 1))),
        high=100.0, window=1, after=5, severity="critical", guard="supervised",
        explains=("grad_norm_high",),
    ),
    Rule(
        "grad_norm_vanishing", ("train/grad_norm",), "outside", "gradients are close to zero",
        "hardly any token is trained, or the loss is already zero",
        (("datasets", "see the mask: python data.py inspect"),
        ("num_epochs", "the rows may be known by heart")),
        low=1e-4, window=20, after=10, guard="supervised",
    ),
    Rule(
        "learning_rate_off_schedule", ("schedule/ratio",), "outside",
        "the learning rate is not the schedule's",
        "something other than the schedule sets it: an edited loop, a second scheduler, a wrong resume",
        (("lr_scheduler", "let dist.learning_rate alone set it"),),
        low=0.999, high=1.001, window=2, severity="critical",
        explains=("loss_*", "weights_*", "update*", "grad_norm_*", "kl_*", "reward_*"),
    ),
    Rule(
        "loss_mis_scaled", ("train/loss_consistency",), "outside",
        "the differentiated loss is not the reported mean over the step's tokens",
        "micro-batches are averaged separately, or divided by the wrong count (an edited loop)",
        (("gradient_accumulation_steps", "divide each micro-batch's sum by the tokens of the whole step"),),
        low=0.999, high=1.001, window=3, severity="critical", guard="supervised",
        explains=("loss_*", "grad_norm_*"),
    ),
    Rule(
        "few_trained_tokens", ("trained_token_share",), "outside", "hardly any token is trained",
        "prompts are much longer than answers, or the mask is wrong",
        (("datasets", "see the mask: python data.py inspect"),), low=0.01, window=5,
    ),
    Rule(
        "trained_on_prompts", ("trained_token_share",), "outside",
        "every token is trained, though the rows have prompts",
        "the loss is on the questions too", (("train_on_inputs", "set it to false", (0, 0)),),
        high=0.999, window=5, guard="has_prompts",
    ),
    # Reinforcement learning ("Key Metrics for RL", "RL/GRPO Stability")
    Rule(
        "reward_stuck_at_zero", ("rewards/*/mean", "reward"), "earns_nothing",
        "no completion has earned anything",
        "the reward function is broken, misses a column, or the task is too hard for this model",
        (("reward_funcs", "try it alone: python grpo.py test-rewards"),
         ("datasets", "has every row the column that it reads, e.g. answer?"),
         ("log_completions", "true shows what the model writes", (1, 1)),
         ("max_completion_length", "too short an answer earns nothing")),
        low=0.0, window=20, after=20,
    ),
    Rule(
        "no_signal", ("reward_std",), "stays_at",
        "all completions earn the same: there is nothing to learn from",
        "a constant reward, or a task that is always or never solved",
        (("reward_funcs", "try it alone: python grpo.py test-rewards"),
        ("temperature", "0.8 to 1.0 explores more", (0.8, math.inf)),
         ("num_generations", "16 and more find differences", (16, math.inf))),
        low=0.0, window=10, after=5,
        guard="learns_from_rewards",
    ),
    Rule(
        "all_groups_flat", ("frac_reward_zero_std",), "outside",
        "in every group all completions earn the same",
        "a reward that does not tell completions apart, or a policy that has collapsed",
        (("reward_funcs", "try it alone: python grpo.py test-rewards"),
        ("temperature", "0.8 to 1.0 explores more", (0.8, math.inf)),
         ("num_generations", "16 and more find differences", (16, math.inf))),
        high=0.9999, window=10, after=3, severity="critical",
        tell="completions/identical_groups near 1: the sampler or the policy; near 0: the reward",
        explains=("flat_groups", "no_signal", "no_gradient", "reward_stuck_at_zero", "weights_still"),
        guard="learns_from_rewards",
    ),
    Rule(
        "flat_groups", ("frac_reward_zero_std",), "outside", "in most groups all completions earn the same",
        "the task is too easy or too hard for most prompts: their advantages are 0 and they are skipped",
        (("num_generations", "16 and more find differences", (16, math.inf)),
        ("temperature", "0.8 to 1.0 explores more", (0.8, math.inf)),
         ("datasets", "leave out what is always or never solved")),
        high=0.8, window=20, after=5,
        guard="learns_from_rewards",
    ),
    Rule(
        "entropy_collapse", ("entropy",), "outside", "completions are becoming identical",
        "the policy has put all its probability on one answer: no group disagrees any more",
        (("temperature", "try 0.8 to 1.0", (0.8, math.inf)), ("learning_rate", "halve it"),
        ("beta", "0.01 to 0.1 holds it to its start", (0.01, math.inf)),
         ("num_generations", "16 and more", (16, math.inf))),
        low=0.01, window=10, severity="critical",
        explains=("all_groups_flat", "flat_groups", "no_signal", "no_gradient", "samples_alike"),
    ),
    Rule(
        "entropy_high", ("entropy",), "climbs_above", "the policy does not converge",
        "too high a temperature or learning rate, or a base model that does not know the task",
        (("temperature", "lower it"), ("learning_rate", "halve it")), high=1.0, window=20, after=20,
    ),
    Rule(
        "kl_high", ("kl",), "outside", "the policy has gone far from where it began",
        "too many or too long steps away from the reference",
        (("beta", "raise it"), ("learning_rate", "halve it"),
        ("num_iterations", "fewer passes over a batch", (0, 1))),
        high=2.0, window=3, severity="critical",
        explains=("kl_drifting", "entropy_high", "clipping", "policy_gradient_large", "reward_collapse",
                  "all_groups_flat", "flat_groups", "no_signal"),
    ),
    Rule(
        "kl_drifting", ("kl",), "outside", "the policy drifts away from where it began",
        "long training without a KL penalty, or a rather high learning rate",
        (("beta", "raise it"), ("learning_rate", "halve it")), high=0.5, window=10,
    ),
    Rule(  # Broken in the first step it is neither staleness nor the rate; later it can be.
        "sampler_mismatch", ("sampling/sampling_logp_difference/mean",), "from_the_start",
        "the sampler's log-probs are not the trainer's",
        "in the first step: another temperature, other weights or another model there, log-probs that are "
        "shifted by a token, dropout, a precision that differs. Later, after it was well: a sync that failed",
        (("vllm_server_base_url", "start the server there with `python grpo.py serve`, which sets them"),
         ("vllm_sync_interval", "lower it: sync more often", (0, 1)),
        ("vllm_dtype", "the same as the trainer's"),
         ("temperature", "the same for sampler and trainer")),
        tell="the same completions scored again by the trainer at other temperatures and with the weights of "
             "the start: what agrees is what the server has",
        high=0.1, window=5,
        explains=("off_policy", "ratio_vanishing", "correction_*", "clipping", "kl_*"),
    ),
    Rule(
        "off_policy", ("sampling/sampling_logp_difference/mean",), "outside",
        "the sampler's weights are far from the trainer's",
        "the server has not received weights for many updates, or has the wrong ones; if it was so in the "
        "first step, what sampler_mismatch says",
        (("vllm_sync_interval", "lower it: sync more often", (0, 1)),
         ("off_policy_mask_threshold", "0.5 leaves stale samples out", (1e-9, 0.5)),
         _CORRECTION),
        high=1.0, window=2, severity="critical",
        explains=("ratio_vanishing", "correction_*"),
    ),
    Rule(  # The page's table says to raise vllm_sync_interval here, its text to lower it: lower is right.
        "ratio_vanishing", ("sampling/importance_sampling_ratio/min",), "outside",
        "the data are stale: some samples are almost impossible under the current policy",
        "the policy has moved away from the weights that sampled",
        (("vllm_sync_interval", "lower it: sync more often", (0, 1)),
         ("off_policy_mask_threshold", "0.5 leaves stale samples out", (1e-9, 0.5)),
         _CORRECTION,
         ("async_prefetch", "costs one update", (0, 0))),
        low=0.1, window=5,
    ),
    Rule(  # The smallest ratio and the mean difference can both be fine where a product over 8,192 is not.
        "correction_wastes_samples", ("sampling/importance_sampling_ratio/effective_share",), "outside",
        "the sampler correction concentrates the weight on few samples: effective share (Σw)²/(n·Σw²)",
        "small differences between sampler and trainer multiply up over long completions, or old weights",
        (_CORRECTION, ("vllm_dtype", "the same as the trainer's makes the difference smaller"),
         ("vllm_sync_interval", "lower it: sync more often", (0, 1))),
        low=0.5, window=5, after=2,
    ),
    Rule(
        "correction_drops_samples", ("sampling/importance_sampling_ratio/outside_share",), "outside",
        "much of what was sampled lies outside of the sampler correction's limits and is dropped or clamped",
        "long completions, older weights or another precision: the sampler's log-probs are not the trainer's",
        (_CORRECTION, ("vllm_importance_sampling_clip_max", "wider limits drop less"),
         ("vllm_sync_interval", "lower it: sync more often", (0, 1))),
        high=0.2, window=5, after=2,
    ),
    Rule(
        "clipping", ("clip_ratio/region_mean",), "pooled", "the ratio is clipped on most tokens",
        "the policy moves further in one batch than epsilon allows",
        (("learning_rate", "halve it"), ("num_iterations", "fewer passes over a batch", (0, 1)),
         ("epsilon", "wider clips less")),
        high=0.3, window=5,
    ),
    Rule(
        "length_creep", ("completions/mean_length",), "creep", "completions grow and grow",
        "the reward pays for length, which is reward hacking, or longer answers solve more of the task",
        (("reward_funcs", "see log_completions: what do the long ones earn? add or weigh `length`"),
         ("loss_type", "dr_grpo or dapo do not divide by a completion's own length"),
         ("mask_truncated_completions", "true keeps cut ones from teaching", (1, 1))),
        high=1.5, window=40, after=40, explains=("completions_clipped",),
        tell="scores/correlation_with_length near 1 within groups, or right answers that do not get longer: "
             "the reward pays for length",
    ),
    Rule(
        "length_pays", ("scores/correlation_with_length",), "outside",
        "within a group the longer completion earns more, nearly always",
        "the reward can be had by writing more: reward hacking, or answers that the limit cuts off",
        (("reward_funcs", "add or weigh `length`, and read what the long ones earn it for"),
         ("log_completions", "true shows what the model writes", (1, 1))),
        high=0.9, window=20, after=50, explains=("completions_clipped",),
        tell="completions/clipped_ratio that falls as max_completion_length is raised: they were cut off",
    ),
    Rule(
        "limit_hit_for_reward", ("completions/clipped_ratio",), "hits_limit_for_reward",
        "more and more completions hit the length limit, and the reward rises with it",
        "the reward can be had by writing on: reward hacking; a higher limit would only feed it",
        (("reward_funcs", "see log_completions: what do the cut ones earn? add or weigh `length`"),
         ("mask_truncated_completions", "true keeps cut ones from teaching", (1, 1))),
        high=0.5, window=5, after=45, explains=("completions_clipped", "length_pays", "kl_*"),
    ),
    Rule(
        "completions_clipped", ("completions/clipped_ratio",), "hits_limit",
        "many completions hit the length limit",
        "the limit is too short, or the model does not end its answers",
        (("max_completion_length", "raise it"),
        ("mask_truncated_completions", "true keeps cut ones from teaching", (1, 1)),
         ("chat_template", "does the model know the token that ends a turn?")),
        high=0.8, window=5,
    ),
    Rule(
        "stale_weights", ("weight_version_lag",), "outside", "samples come from old weights",
        "the sync is late: an engine that is lost or an interval that is long",
        (("vllm_sync_interval", "lower it: sync more often", (0, 1)),
        ("async_prefetch", "costs one update", (0, 0)), ("max_staleness", "lower it")),
        high=1.0, plus=("vllm_sync_interval", "max_staleness"), window=2,
        explains=("sampler_mismatch", "off_policy", "ratio_vanishing", "correction_*"),
    ),
    Rule(
        "samples_too_old", ("staleness/dropped_share",), "outside",
        "much of what is sampled is too old when it is done, and is thrown away",
        "completions or their environments take longer than the optimiser steps that max_staleness allows",
        (("max_staleness", "raise it"), ("max_completion_length", "shorter ones are done sooner"),
         ("environment_timeout", "ends what does not answer")),
        high=0.2, window=5, after=3,
    ),
    Rule(
        "policy_gradient_large", ("train/grad_norm",), "outside", "gradients of the policy are large",
        "too high a learning rate, or advantages of a few odd completions",
        (("max_grad_norm", "1.0 clips them", (1e-9, 1.0)), ("learning_rate", "halve it"),
         ("gradient_accumulation_steps", "more smooth a noisy batch")),
        high=10.0, window=5, after=5, severity="critical", guard="samples",
    ),
    Rule(
        "no_gradient", ("train/grad_norm",), "stays_at", "no gradient reaches the weights",
        "every group is flat, or nothing is trained",
        (("reward_funcs", "try it alone: python grpo.py test-rewards"),
        ("num_generations", "16 and more", (16, math.inf))),
        low=0.0, window=10, guard="samples",
    ),
    Rule(
        "reward_collapse", ("reward",), "below_best", "the reward has fallen far from its best",
        "the policy has been broken by its own updates",
        (("learning_rate", "halve it"), ("beta", "0.01 to 0.1 holds it to its start", (0.01, math.inf)),
        ("max_grad_norm", "1.0", (1e-9, 1.0))),
        low=0.5, window=10, after=20, severity="critical",
    ),
    Rule(
        "step_skipped", ("skipped_steps",), "outside", "steps were left out: they were not finite",
        "see the incidents in output_dir/incidents", (("on_nonfinite", ""), ("learning_rate", "halve it")),
        high=0.0,
    ),
    Rule(
        "nonfinite_activations", ("nonfinite_hidden_states",), "outside",
        "hidden states that are not finite were replaced",
        "an overflow in the forward pass; see run.log for the module and the rows",
        (("bf16", "try false to see if precision is the cause", (0, 0)), ("fp8", "try false", (0, 0)),
        ("learning_rate", "halve it")),
        high=0.0, severity="critical",
    ),
    # What must hold for every batch of rollouts, and what tells a learned reward from a gamed one
    Rule(
        "kl_at_start", ("kl",), "at_first",
        "the policy differs from the reference before any update",
        "the reference is another model, or sees other tokens, another temperature or another precision",
        (("base_model", "both are built from it"), ("temperature", "the same for both")),
        high=0.01, severity="critical", guard="has_reference", explains=("kl_high", "kl_drifting"),
    ),
    Rule(
        "reference_is_policy", ("kl",), "moved_but_zero",
        "kl is exactly 0 though the weights have been updated",
        "the reference is the policy itself: beta holds nothing",
        (("beta", "see grpo.reference_model"), ("ref_model_sync_steps", "")),
        low=0.0, window=5, after=8, severity="critical", guard="has_reference",
    ),
    Rule(
        "ratio_not_one", ("ratio/first_use",), "outside",
        "a batch's first use is not on policy: the ratio to π_old is not 1 (mean |log ratio|)",
        "π_old was computed with other weights, another temperature or other tokens than the loss",
        (("temperature", "the same in both passes"), ("num_iterations", "")),
        high=0.05, severity="critical", explains=("clipping", "kl_*", "sampler_mismatch"),
    ),
    Rule(
        "prompts_mixed_in_group", ("groups/mixed",), "outside",
        "groups hold completions of different prompts: their mean is no baseline",
        "completions were reordered between sampling and scoring",
        (("num_generations", "the completions of a prompt must be adjacent"),), high=0.0,
        severity="critical", explains=("reward_*", "flat_groups", "scores_not_its_own"),
    ),
    Rule(
        "same_prompts_again", ("prompts/repeated",), "same_prompts",
        "every batch has the same prompts as the one before",
        "the batch's number does not reach the order of the prompts",
        (("datasets", "see text.packing.PromptOrder"),), high=0.9, window=4, severity="critical",
        explains=("entropy_collapse", "all_groups_flat", "flat_groups", "no_signal"),
    ),
    Rule(
        "identical_completions", ("completions/identical_groups",), "identical",
        "all completions of a group are the same, though the policy's entropy says that they should differ",
        "the sampler: one seed for all, greedy decoding, or one completion copied",
        (("temperature", "does it reach the sampler?"), ("num_generations", "")),
        high=0.8, window=3, severity="critical",
        explains=("all_groups_flat", "flat_groups", "no_signal", "no_gradient", "sampler_mismatch"),
    ),
    Rule(
        "scores_not_its_own", ("scores/alone_difference",), "outside",
        "a completion that is scored alone earns something else than in its batch (in standard deviations)",
        "scores went to other completions, columns came from another row, or the function depends on the "
        "batch",
        (("reward_funcs", "it must judge completion i by row i alone: python grpo.py test-rewards"),),
        tell="scored twice alone it earned the same: it is not the function's own randomness",
        high=0.1, severity="critical",
        explains=("reward_*", "flat_groups", "no_signal", "all_groups_flat", "length_*"),
    ),
    Rule(
        "reward_is_random", ("scores/noise_share",), "mean_above",
        "the same completion earns something else each time (share of the scores' variance)",
        "the reward function is random: there is little to learn but noise",
        (("reward_funcs", "make it a function of the completion and its row"),), high=0.6, window=6,
        explains=("reward_stuck_at_zero", "reward_collapse", "reward_not_learnt", "entropy_high", "kl_*"),
    ),
    Rule(
        "reward_prefers_wrong", ("scores/own_answer_gain",), "outside",
        "a row's own answer earns less than another row's (difference in standard deviations)",
        "the reward has the wrong sign, or compares with another row",
        (("reward_funcs", "score the rows' answers: python grpo.py test-rewards"), ("reward_weights", "")),
        low=-1.5, severity="critical", explains=("reward_*", "length_*", "entropy_*"),
    ),
    Rule(
        "advantage_against_reward", ("advantages/agreement",), "outside",
        "within a group the better completion gets the lower advantage (correlation)",
        "a sign: the advantages or the rewards are negated, or they belong to other completions",
        (("reward_weights", "are they positive?"),), low=0.0, window=2, severity="critical",
        explains=("reward_*", "length_*", "entropy_*"),
    ),
    Rule(
        "advantages_off_centre", ("advantages/off_centre",), "outside",
        "the advantages of a group do not add up to 0: they are not relative to its own completions",
        "the mean was taken over other groups, or completions were reordered after it",
        (("num_generations", "see grpo.group_advantages"),), high=0.05, window=2, severity="critical",
        explains=("reward_*", "advantage_against_reward", "length_*", "entropy_*"),
    ),
    Rule(
        "reward_not_learnt", ("reward",), "not_risen",
        "after a hundred steps the reward has not risen by more than chance",
        "a reward that does not depend on what the policy can change (noise), too small steps, or a task "
        "that is as good as solved or far too hard",
        (("reward_funcs", "does a better answer earn more? python grpo.py test-rewards"),
         ("learning_rate", "try 2 to 5 times as much"), ("datasets", "prompts that are sometimes solved")),
        tell="near-copies among siblings in rollouts/*.jsonl that earn very different rewards: noise",
        window=40, after=100, guard="samples",
    ),
    Rule(
        "advantages_off_scale", ("advantages/size",), "outside",
        "advantages are thousands of times larger or smaller than 1",
        "rewards of that scale with scale_rewards: none: clipping and beta mean something else then",
        (("scale_rewards", "group divides by the group's standard deviation", ("group", "batch")),
         ("reward_weights", "bring the rewards to a scale of 1")),
        low=1e-3, high=50.0, window=3, explains=("policy_gradient_large", "no_gradient", "updates_*"),
    ),
    Rule(
        "reward_dies", ("rewards/*/mean", "reward"), "drops_at_once",
        "the reward falls from one step to the next while the completions stay what they were",
        "the reward function changed, not the policy: a file, a server or a column that it reads is gone",
        (("reward_funcs", "run it on completions from before and after: rollouts/*.jsonl has both"),),
        window=4, after=24, severity="critical",
        explains=("reward_collapse", "reward_stuck_at_zero", "all_groups_flat", "flat_groups", "no_signal",
                  "no_gradient"),
    ),
    Rule(
        "one_token_repeated", ("completions/repetition",), "outside",
        "completions repeat one token (share of tokens equal to the one before)",
        "the reward pays for it, or the policy has broken down",
        (("reward_funcs", "see log_completions: what do they earn?"), ("learning_rate", "halve it"),
         ("beta", "0.01 to 0.1 holds it to its start", (0.01, math.inf))),
        high=0.5, window=5, after=5, severity="critical",
        explains=("completions_clipped", "length_creep", "length_pays", "entropy_collapse", "kl_*"),
    ),
    Rule(
        "prompts_cut", ("data/prompts_cut",), "outside",
        "many prompts lose their beginning (share)",
        "max_prompt_length cuts them from the left: instructions and system prompts are gone",
        (("max_prompt_length", "raise it, or leave long prompts out"),), high=0.2,
    ),
    Rule(
        "prompts_left_out", ("data/prompts_left_out",), "outside",
        "many prompts are left out: they are longer than max_prompt_length (share)",
        "a limit that is shorter than the data", (("max_prompt_length", "raise it"),), high=0.5,
    ),
    # Energy-based fine-tuning (the page's EBFT note; ranges are of the cosine before doubling, raw features)
    Rule(
        "alignment_low", ("ebft/alignment_cosine",), "outside",
        "samples have little to do with the true completions",
        "the policy is far from the data, or the features do not distinguish them",
        (("temperature", "lower it"), ("feature_layers", "deeper layers see more of the meaning"),
         ("ce_coef", "0.03 to 0.1 helps at the start", (0.03, math.inf))),
        low=0.3, window=20, after=20,
    ),
    Rule(
        "alignment_falling", ("ebft/alignment_cosine",), "below_best",
        "samples move away from the true completions",
        "the diversity term or the learning rate drives them off",
        (("diversity_coef", "lower it"), ("learning_rate", "halve it"),
        ("ce_coef", "0.03 to 0.1 holds the language", (0.03, math.inf))),
        low=0.95, window=10, after=20, severity="critical",
        explains=("feature_distance_rising", "alignment_low"),
    ),
    Rule(  # The page's bound is that of whitened features; raw ones of any two samples agree to 0.5 and more.
        "samples_alike", ("ebft/diversity",), "outside",
        "the samples of a prompt are all alike: mode collapse",
        "alignment outweighs the penalty on likeness, or the temperature leaves no choice",
        (("temperature", "try 0.8 to 1.0", (0.8, math.inf)), ("diversity_coef", "raise it"),
        ("learning_rate", "halve it")),
        high=1.0, window=10, after=5, guard="whitened_features",
    ),
    Rule(
        "samples_identical", ("ebft/pairwise_cosine",), "outside",
        "the samples of a prompt are the same: mode collapse",
        "alignment outweighs the penalty on likeness, or the temperature leaves no choice",
        (("temperature", "try 0.8 to 1.0", (0.8, math.inf)), ("diversity_coef", "raise it"),
         ("learning_rate", "halve it")),
        high=0.9999, window=5, after=3, severity="critical",
        explains=("samples_alike", "samples_converge", "entropy_collapse"),
    ),
    Rule(
        "samples_converge", ("ebft/spread",), "share_of_start",
        "the samples of a prompt differ by a tenth of what they differed by at the start: mode collapse",
        "alignment outweighs the penalty on likeness, or the temperature leaves no choice",
        (("temperature", "try 0.8 to 1.0", (0.8, math.inf)), ("diversity_coef", "raise it"),
         ("learning_rate", "halve it")),
        low=0.1, window=10, after=20,
    ),
    Rule(
        "feature_distance_high", ("ebft/cfm_unwhitened",), "outside",
        "the feature distance is out of range",
        "features are not normalised, or the feature network is not the initial one", (("embed_method", ""),),
        high=10.0, window=3, severity="critical",
    ),
    Rule(
        "feature_distance_rising", ("ebft/cfm_unwhitened",), "above_best",
        "the features move away from the truth's",
        "the learning rate is too high, or the diversity term drives the samples off",
        (("learning_rate", "halve it"), ("diversity_coef", "lower it"),
        ("ce_coef", "0.03 to 0.1 holds the language", (0.03, math.inf))),
        low=0.02, high=3.0, window=10, after=20, severity="critical",
    ),
    Rule(
        "diversity_drowns_alignment", ("ebft/reward",), "outside",
        "the penalty on likeness outweighs the agreement",
        "the samples are rewarded for being different, not for being right",
        (("diversity_coef", "lower it"), ("use_whitening", "true counts what tells samples apart", (1, 1))),
        low=0.0, window=10, after=5,
    ),
    Rule(
        "whitening_failed", ("ebft/whitening_fallbacks",), "outside", "features could not be whitened",
        "features that are not finite", (("bf16", "try false", (0, 0)), ("learning_rate", "halve it")),
        high=0.0,
    ),
    Rule(
        "truths_misplaced", ("ebft/own_truth_gain",), "mean_below",
        "samples agree no better with their own true completion than with another prompt's",
        "the truths belong to other prompts, or the prompts do not reach the policy",
        (("datasets", "is the answer of a row its own? python data.py inspect"),),
        tell="ebft/truths_cosine near 1: the features tell nothing apart; else the truths are misplaced",
        low=0.08, window=10, severity="critical",
        explains=("alignment_*", "feature_distance_*", "entropy_high"),
    ),
    Rule(
        "features_alike", ("ebft/truths_cosine",), "outside",
        "the features of different true completions are the same: they tell nothing apart",
        "a feature network that is broken or random, or layers without meaning",
        (("feature_layers", "deeper layers see more of the meaning"), ("embed_method", ""),
         ("use_whitening", "true counts what tells samples apart", (1, 1))),
        high=0.9995, window=5, severity="critical",
        explains=("truths_misplaced", "samples_*", "alignment_*"),
    ),
    # The system
    Rule(
        "memory_creep", ("memory/max_alloc",), "creep", "memory grows from step to step",
        "something keeps tensors of past steps alive, or rows grow longer",
        (("sequence_len", "bounds the longest row"), ("profiler_steps", "writes a memory snapshot on CUDA")),
        high=1.2, window=60, after=60,
    ),
    Rule(
        "step_time_jump", ("step_time",), "jump", "steps take much longer than before",
        "another program on this machine, a throttled GPU, a slow rank or server, or longer rows",
        (("profiler_steps", "shows where the time goes"),), high=3.0, window=5, after=30,
    ),
    Rule(
        "data_starvation", ("step_time/data_share",), "outside", "steps wait for data",
        "rows are made slower than the model trains on them",
        (("dataset_prepared_path", "prepare rows once, on a fast disk"),), high=0.5, window=10, after=5,
    ),
    Rule(  # Values are ten steps apart (dist.race).
        "slow_rank", ("ranks/slowness",), "outside", "one rank's device is slower than the others'",
        "every step waits for it (ranks/slowest in the metrics is its number): a hot or throttled GPU, "
        "another process on it, or a weaker machine",
        (("gpu_timeout_minutes", "leave that machine out; this is how long ranks wait for a missing one"),),
        high=1.5, window=3,
    ),
)

PROMPTED = {"chat", "instruct", "prompt_completion"}


def _types(config: dict) -> set[str]:
    return {str(spec.get("type")) for spec in config.get("datasets") or []}


def samples(config: dict) -> bool:
    """Whether this config's recipe trains on what the policy samples: GRPO and EBFT."""
    return "reward_funcs" in config or "feature_layers" in config


GUARDS: dict[str, Callable[[dict], Any]] = {
    "samples": samples,
    "learns_from_rewards": lambda config: config.get("rl_coef") != 0,
    "supervised": lambda config: not samples(config),
    "has_prompts": lambda config: _types(config) & PROMPTED and _types(config) <= PROMPTED | {"text"},
    "whitened_features": lambda config: (
        config.get("whitening", "none") != "none" or config.get("use_whitening")
    ),
    "has_reference": lambda config: float(config.get("beta") or 0.0) > 0 and not config.get("lora_model_dir"),
    "from_checkpoint": lambda config: not samples(config) and not config.get("random_init"),
}
