"""Energy-based fine-tuning: sample completions, and reward those whose features match the features of the
true completion (Jelassi et al., "Matching Features, Not Tokens", arXiv 2603.12248).

Cross-entropy trains on true prefixes; at use a model reads its own output. Here the policy is trained on what
it writes itself, without a verifier: the reward is how well the hidden states of a frozen copy of the
starting model agree with those on the true completion, less how alike the samples are.
"""

from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from health import log


@dataclass
class FeatureOptions:
    feature_layers: list[float] = None  # type: ignore[assignment]
    """Depths whose hidden states make the features, as shares of the layers."""
    embed_method: Literal["last_token", "mean_pooling", "completion_mean", "concat"] = "last_token"
    """How a sequence's hidden states become one vector: of the last token, the mean, the mean over the
    completion, or those at 25, 50 and 75 % of the length."""
    use_whitening: bool = False
    """Whiten the features of the samples of a prompt (`whitening: feature`)."""
    alignment_coef: float = 1.0
    """Weight of the agreement with the true completion."""
    diversity_coef: float = 1.0
    """Weight of the penalty on samples that are alike."""


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
            unit = torch.nn.functional.normalize
            x, g = (torch.nan_to_num(t, nan=0.0, posinf=0.0, neginf=0.0) for t in (samples, truth))
            return unit(x, dim=-1), unit(g, dim=-1)[:, None].expand_as(samples), fallback
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

    `rloo`: the reward less a baseline that does not depend on the sample itself. For alignment that is the
    mean of the others; the diversity of the others holds their pairs with j, which are taken out: (Σ_k d_k −
    2 d_j)/(n − 2). The plain mean of the other rewards, as elsewhere, is biased. `group_norm`: (reward −
    mean)/(std + 1e-8). `reinforce`: the reward.
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
