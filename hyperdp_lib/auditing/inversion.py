"""The noisy sum inverted: what did the private images look like? Research only.

Images are sought whose embeddings sum to the noisy sum. Are they nearer to the members than to as many others, in
features that the search does not use? Without any knowledge that happens in half of the sets. Exchanging n members for
n others is 2 n removals and additions, so that nobody is right with probability above ``Phi(n mu)``.
"""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import torch
from scipy import stats
from torch import Tensor, nn

from hyperdp_lib import accounting, data, diffusion, embedding, pretrained
from hyperdp_lib.auditing import bounds
from hyperdp_lib.auditing.attacks import CONFIDENCE, feature_network, noisy_sums
from hyperdp_lib.scores import evaluation


def invert(
    epsilon: float,
    *,
    num_private: int = 1,
    sets: int = 32,
    num_steps: int = 150,
    delta: float = 1e-5,
    seed: int = 0,
) -> dict[str, Any]:
    """Reconstruct the images of several private sets from their noisy sums, knowing how many there are.

    Returns
    -------
    dict
        For JSON: ``hits``, sets whose reconstructions were nearer to the members than to as many others (mean distance
        to the nearest, in public features); their ``rate`` and its Clopper-Pearson interval; ``rate_bound``; and
        ``mismatch``, the distance left between the sum of the reconstructions and the noisy sum.
    """
    public = torch.Generator().manual_seed(seed)
    digits = data.digits("train").images
    drawn = digits[torch.randperm(len(digits), generator=public)[: 2 * sets * num_private]]
    private_images, others = drawn.view(2, sets, num_private, *drawn.shape[1:])
    base_model, network = pretrained.load_pretrained()
    codes = embedding.embed(network.encoder, private_images.flatten(0, 1)).numpy()
    noisy_sum, _ = noisy_sums(codes, np.repeat(np.arange(sets), num_private), sets, epsilon, delta)
    start = diffusion.sample(base_model, None, sets * num_private, generator=public, num_steps=8)
    found, mismatch = _sum_to(torch.from_numpy(noisy_sum).float(), start, network.encoder, num_steps)
    features = feature_network()
    seen, inside, outside = (
        torch.from_numpy(evaluation.features(features, part.reshape(-1, *drawn.shape[1:]))).view(sets, num_private, -1)
        for part in (found, private_images, others)
    )
    to_members, to_others = (torch.cdist(part, seen).amin(2).mean(1) for part in (inside, outside))
    hits = int((to_members < to_others).sum())
    mu = math.inf if math.isinf(epsilon) else 1 / accounting.noise_multiplier(epsilon, delta)
    low, high = bounds.clopper_pearson(hits, sets, (1 - CONFIDENCE) / 2)
    bound = float(stats.norm.cdf(num_private * mu))
    return {
        "epsilon": None if math.isinf(epsilon) else epsilon,
        "delta": delta,
        "num_private": num_private,
        "sets": sets,
        "num_steps": num_steps,
        "hits": hits,
        "rate": hits / sets,
        "rate_low": low,
        "rate_high": high,
        "rate_bound": bound,
        "mismatch": mismatch,
        "passed": low <= bound,
        "label": evaluation.NOT_DP,
    }


def _sum_to(noisy_sum: Tensor, start: Tensor, encoder: nn.Module, num_steps: int) -> tuple[Tensor, float]:
    """Images whose embeddings sum to each row ``(S, k)``, sought by Adam from ``(S n, C, H, W)``; what is missing."""
    free = torch.atanh(start.clamp(-0.99, 0.99)).requires_grad_(True)
    optimizer = torch.optim.Adam([free], lr=0.05)
    for _ in range(num_steps):
        sums = encoder(torch.tanh(free)).view(len(noisy_sum), -1, noisy_sum.shape[1]).sum(1)
        missing = (sums - noisy_sum).square().sum(1)
        (free.grad,) = torch.autograd.grad(missing.sum(), free)
        optimizer.step()
    return torch.tanh(free).detach(), float(missing.detach().sqrt().mean())
