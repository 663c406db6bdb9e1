"""Exact denoisers of Gaussians and their mixtures, and exact expectations over Gaussian noise.

All act on each pixel by itself, so a pixel is one draw of a one-dimensional distribution and an
image holds as many draws as are wanted. Everything is float64.
"""

import math

import numpy as np
import torch

from models import KARRAS


def column(values):
    return torch.as_tensor(values, dtype=torch.float64)


def edm_denoiser(function):
    """D(x_t, sigma, y) that the samplers may ask for the noise levels of EDM."""
    function.levels = KARRAS
    return function


def mixture_denoiser(weights, means, stds):
    """E[x0 | x_t] for data from the mixture of N(mean_k, std_k^2); a std of 0 is a point."""
    weights, means, variances = column(weights), column(means), column(stds) ** 2

    @edm_denoiser
    def denoise(x_t, sigma, y=None):
        x, total = x_t[..., None], variances + sigma[..., None] ** 2               # [B,C,H,W,K]
        share = (weights.log() - total.log() / 2 - (x - means) ** 2 / (2 * total)).softmax(-1)
        return (share * (means + variances / total * (x - means))).sum(-1)
    return denoise


def gaussian_denoiser(mean, std):
    """E[x0 | x_t] for data from N(mean, std^2)."""
    return edm_denoiser(
        lambda x_t, sigma, y=None: mean + std ** 2 / (std ** 2 + sigma ** 2) * (x_t - mean))


def log_density(x, weights, means, variances):
    """log p(x) of the mixture."""
    weights, means, variances = column(weights), column(means), variances + column(0.0)
    exponent = -(x[..., None] - means) ** 2 / (2 * variances)
    return (weights.log() + exponent - (2 * math.pi * variances).log() / 2).logsumexp(-1)


def score(x, weights, means, variances):
    """d log p(x) / dx, by autograd: independent of any denoiser."""
    x = x.detach().requires_grad_()
    return torch.autograd.grad(log_density(x, weights, means, variances).sum(), x)[0]


def hermite(n):
    """Nodes and weights: E f(z) = sum w f(z) for z ~ N(0, 1), exact for degree below 2n."""
    nodes, weights = np.polynomial.hermite_e.hermegauss(n)
    return column(nodes), column(weights / weights.sum())


def hermite_image(n=48):
    """z, eps and weights [1,1,n,n]: E f(z, eps) = sum weights f(z, eps), both N(0, 1)."""
    nodes, weights = hermite(n)
    z, eps = torch.meshgrid(nodes, nodes, indexing="ij")
    return z[None, None], eps[None, None], weights.outer(weights)[None, None]


def four_corners():
    """z, eps [1,1,2,2]; their plain mean has the second moments of two independent N(0, 1)."""
    z, eps = torch.meshgrid(column([-1.0, 1.0]), column([-1.0, 1.0]), indexing="ij")
    return z[None, None], eps[None, None]


def full(sigma, batch=1):
    return torch.full((batch, 1, 1, 1), float(sigma), dtype=torch.float64)
