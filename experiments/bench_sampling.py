"""Speed of sampling against single forwards, and of scoring against training."""

import time
from functools import partial
from statistics import median

import numpy as np
import torch

from base import distributed
from base.progress import progress
from edm_networks import EDMPrecond
from fid import frechet_distance
from images.from_seeds import every_step, heun, prepare, sample_block, seed_blocks
from metrics.inception import Inception
from metrics.judge import HEUN_STEPS, feature_network
from models import SeededNoise, level
from presets.datasets import PMDD_SIGMAS
from weights.opening import steps_text

SCORED = 64                     # images that the rates of an evaluation are measured on
LONG_ENOUGH = 2.0               # seconds of calls behind one ratio of two times: a single is noise


def spread(values):
    return {"median": median(values), "least": min(values), "most": max(values)}


def seconds_of(function, device):
    if device.type == "cuda":
        torch.cuda.synchronize()
    begun = time.perf_counter()
    function()
    if device.type == "cuda":
        torch.cuda.synchronize()
    return time.perf_counter() - begun


def random_inputs(network, images, device):
    count = network.conditions.count
    index = torch.arange(images, device=device) % max(count, 1)
    return (torch.randn(images, *network.shape, device=device),
            torch.rand(images, 1, 1, 1, device=device) + 0.5, network.conditions.embed(index))


def seconds_of_both(ours, theirs, device):
    """Of one call of each; called in turn, so that other load on the machine meets both."""
    calls, spent = 0, [0.0, 0.0]
    while calls == 0 or sum(spent) < LONG_ENOUGH:
        for which, function in enumerate((ours, theirs)):
            spent[which] += seconds_of(function, device)
        calls += 1
    return [seconds / calls for seconds in spent]


@torch.no_grad()
def sampling(job, repeats):
    """models.py's samplers on one batch, in turn with single forwards of that batch."""
    options, device, B = job.options, job.device, job.options.batch_per_gpu
    network = prepare(EDMPrecond(**job.network).eval(), device, options.precision, options.compile)
    noise = SeededNoise(range(B), network.shape, device)
    z, _, y = random_inputs(network, B, device)
    x, found = PMDD_SIGMAS[0] * z, {"batch": B}

    def forwards(steps):
        for sigma in PMDD_SIGMAS[:steps]:
            network(x, level(sigma, x), y)

    with torch.autocast(device.type, torch.bfloat16, enabled=options.precision == "bf16"):
        forwards(2)                                     # warm-up
        for steps in progress(range(1, len(PMDD_SIGMAS) + 1), desc="sampling"):
            sample = partial(every_step(PMDD_SIGMAS[:steps]), network, z, y, noise)
            pairs = [seconds_of_both(sample, partial(forwards, steps), device)
                     for _ in range(repeats)]
            found[steps_text(steps)] = {
                "images_a_second": B / median(ours for ours, _ in pairs),
                "time_against_forwards": spread([ours / theirs for ours, theirs in pairs])}
        teacher = seconds_of(partial(heun(HEUN_STEPS), network, z, y), device)
    return found | {f"teacher, Heun, {HEUN_STEPS} steps": {"images_a_second": B / teacher}}


@torch.no_grad()
def scoring(job, repeats, rate):
    """The pieces of an evaluation, and from them what one at the preset's interval costs."""
    config, device = job.preset.config, job.device
    network = prepare(EDMPrecond(**job.network).eval(), device)
    judge = feature_network("digits", device=device) if config.dataset == "digits" else (
        Inception().fold().to(device))
    images = torch.randint(0, 256, (SCORED, *network.shape), dtype=torch.uint8)
    judge(images[:8])                                                       # warm-up
    features = SCORED / median(seconds_of(lambda: judge(images), device) for _ in range(repeats))
    samples = np.random.default_rng(0).standard_normal((2, 2 * judge.dimensions, judge.dimensions))
    ours, theirs = ((x.mean(0), np.cov(x.T)) for x in samples)
    frechet = median(seconds_of(lambda: frechet_distance(*ours, *theirs), device)
                     for _ in range(repeats))
    found = {"features": judge.name, "features_a_second": features, "frechet_seconds": frechet,
             "frechet_dimensions": judge.dimensions}
    if not rate:
        return found
    outputs, blocks = max(len(config.sigmas), 1), seed_blocks(range(SCORED), network, device)
    sampler = every_step(config.sigmas) if config.sigmas else heun(HEUN_STEPS)

    def task(seeds):
        return sample_block(network, seeds, sampler, None, device)

    made = SCORED / seconds_of(lambda: list(distributed.in_parallel(task, blocks, device)), device)
    seconds = config.evaluate_images * (1 / made + outputs / features) + outputs * frechet
    between = config.evaluate_every * config.batch / rate
    return found | {"images_of_an_evaluation": config.evaluate_images,
                    "seconds_of_an_evaluation": seconds,
                    "seconds_of_training_between": between,
                    "share_of_training": seconds / between}
