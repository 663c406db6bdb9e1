"""Small files that stand in for trained ones."""

import torch

import checkpoint
from edm_networks import EDMPrecond
from presets import DIGITS_NETWORK, PMDD_SIGMAS


def small_network(seed=0, **changes):
    """Random weights, but none so small that a layer could be left out unnoticed."""
    torch.manual_seed(seed)
    network = EDMPrecond(**(DIGITS_NETWORK | {"model_channels": 16} | changes))
    with torch.no_grad():
        for parameter in network.parameters():
            parameter += 0.05 * torch.randn_like(parameter)
    return network.eval()


def save_student(path, steps=3, dataset="digits", seed=0, **changes):
    """A checkpoint of a student; of a teacher with steps=0."""
    network = small_network(seed, **changes)
    path.parent.mkdir(parents=True, exist_ok=True)
    checkpoint.save(path, {
        "dataset": dataset, "method": "pmdd", "stage": steps, "iteration": 10, "fid": {},
        "sigmas": list(PMDD_SIGMAS[:steps]), "network": network.config,
        "ema": network.state_dict()})
    return network
