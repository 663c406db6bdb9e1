"""Distillation, from the first line of the algorithm to the last checkpoint.

    python train.py                                        digits, PMDD stages 1, 2, 3
    python train.py --stage 0                              a teacher for them
    torchrun --nproc_per_node=4 train.py --dataset cifar10 --stage 2
    python train.py --help                                 a flag for each field of a preset

The same command resumes a run. `iteration` is the algorithm; everything else serves it.
PMDD = "Progressive Data-Free Diffusion Distillation", DMD = arXiv:2311.18828,
DMD2 = arXiv:2405.14867, SiD = arXiv:2404.04057.
"""

import gc
import math
import os
from contextlib import contextmanager, nullcontext
from functools import partial
from itertools import product

import torch
from torch.nn.utils import clip_grad_norm_
from torch.optim import AdamW

from base import distributed
from base.devices import set_precision
from base.distributed import say, sync_gradients
from base.errors import RunFailed, UserError, out_of_memory, run
from images.real import check_every_image, check_fits, open_images
from losses import (denoising_loss, edm_loss, gan_adapted_loss, gan_student_loss, regression_loss,
                    unforget_loss)
from metrics.judge import Scorer, perceptual_distance, tell_of_no_reference
from models import LOSSES, denoise_together, level, roll_out, update_ema
from presets.config import both_betas
from training.cost import report
from training.draws import Sources, draw
from training.latents import latents_of
from training.log import Log, StopSignal
from training.noise_pairs import noise_image_pairs
from training.options import parse
from training.passes import Passes
from training.roles import load_roles, resume, whole_network
from training.run_folder import drop_unused, open_run, what_is_left


def iteration(config, roles, optimizers, parts, student_turn, autocast=nullcontext):
    """One batch of generated images, DMD's Algorithm 1 with PMDD's inputs and unforget loss; parts
    add up their gradients. Draws nothing, waits for no device. Returns losses, and images."""
    previous, student, adapted = roles.previous, roles.student, roles.adapted
    source = previous if previous is not None and config.external_sampling else student
    unforget = config.unforget_weight > 0 and previous is not None
    distill_loss, sigmas = LOSSES[config.loss].of(config), parts[0].sigmas
    generated, student_losses, adapted_losses, noises = [], {}, {}, config.adapted_noises

    # Generate, and every ttur-th time update the student (TTUR: DMD2 Sec. 4.2)
    if student_turn:
        for part in parts:
            with sync_gradients(roles.student_ddp, part is parts[-1]), frozen(adapted), autocast():
                # Generate: roll out the inputs x_t1..x_tn (PMDD Eq. 7), then images from them
                inputs, targets = roll_out(source, part.z, part.y, sigmas, part.noises.unbind(1))
                k = 0 if unforget else len(sigmas) - 1
                *earlier, x0 = denoise_together(roles.student_ddp, inputs[k:], sigmas[k:], part.y)
                generated.append(x0.detach())

                # Update the student (PMDD Eq. 9, DMD Alg. 1)
                terms = {}
                if distill_loss:                        # DMD Eq. 7, or SiD Alg. 1
                    terms["distill"] = distill_loss(x0, part.sigma, part.eps, part.y,
                                                    teacher=roles.teacher, adapted=adapted)
                if unforget:                            # PMDD Eq. 9, last term
                    if source is not previous:
                        with torch.no_grad():
                            targets = denoise_together(previous, inputs[:-1], sigmas[:-1], part.y)
                    terms["unforget"] = config.unforget_weight * unforget_loss(earlier, targets)
                if config.gan_weight:                   # DMD2 Eq. 4
                    terms["gan"] = config.gan_weight * gan_student_loss(
                        x0, part.sigma_gan, part.eps_gan, part.y,
                        discriminator=partial(adapted, output="logits"))
                if config.regression_weight:            # DMD Eq. 9
                    x_ref = roles.student_ddp(student.levels.first_scale(sigmas[0]) * part.z_ref,
                                              level(sigmas[0], x0), part.y_ref)
                    terms["regression"] = config.regression_weight * regression_loss(
                        x_ref, part.image_ref, distance=roles.distance)
                backward(terms, student_losses, len(parts))
        update(optimizers[0], student_losses, "student_gradient", config.clip)
        update_ema(roles.ema, student, config.batch, config.ema_halflife, config.ema_rampup,
                   parts[0].seen)
    else:
        for part in parts:
            with torch.no_grad(), autocast():           # generate (PMDD Eq. 7)
                inputs, _ = roll_out(source, part.z, part.y, sigmas, part.noises.unbind(1))
                generated.append(student(inputs[-1], level(sigmas[-1], part.z), part.y))

    # Update the adapted network on the same images (PMDD Eq. 8, DMD Alg. 3)
    for (part, x0), k in product(zip(parts, generated), range(noises)):
        with sync_gradients(roles.adapted_ddp, part is parts[-1] and k + 1 == noises), autocast():
            terms = {"denoising": denoising_loss(
                x0, part.sigma_adapted[:, k], part.eps_adapted[:, k], part.y,
                adapted=roles.adapted_ddp, sigma_data=student.sigma_data)}
            if config.gan_weight and k + 1 == noises:   # DMD2 Eq. 4, the discriminator: once
                terms["discriminator"] = noises * config.gan_adapted_weight * gan_adapted_loss(
                    x0, part.real, part.sigma_fake, part.eps_fake, part.sigma_real, part.eps_real,
                    part.y, part.y_real, discriminator=partial(roles.adapted_ddp, output="logits"))
            backward(terms, adapted_losses, len(parts) * noises)
    update(optimizers[1], adapted_losses, "adapted_gradient", config.clip)
    return student_losses | adapted_losses, x0


def teacher_iteration(config, roles, optimizers, parts, student_turn, autocast=nullcontext):
    """Stage 0, where no teacher is published: EDM's loss on real images."""
    losses = {}
    roles.student.train()
    for part in parts:
        with sync_gradients(roles.student_ddp, part is parts[-1]), autocast():
            network = roles.student_ddp
            if config.augment:
                network = partial(network, augment_labels=part.augment_labels)
            backward({"denoising": edm_loss(part.real, part.sigma, part.eps, part.y_real,
                                            teacher=network, sigma_data=roles.student.sigma_data)},
                     losses, len(parts))
    update(optimizers[0], losses, "student_gradient", config.clip)
    update_ema(roles.ema, roles.student, config.batch, config.ema_halflife, config.ema_rampup,
               parts[0].seen)
    return losses, parts[-1].real


def iteration_of(config):
    return iteration if config.stage else teacher_iteration


@contextmanager
def frozen(network):
    """The gradient passes through the network, not into its weights."""
    trained = [parameter for parameter in network.parameters() if parameter.requires_grad]
    network.requires_grad_(False)
    yield
    for parameter in trained:
        parameter.requires_grad_(True)


def backward(terms, losses, parts):
    """The gradient of the terms, of one part among several; adds their values to the losses."""
    (sum(terms.values()) / parts).backward()
    for name, value in terms.items():
        losses[name] = losses.get(name, 0) + value.detach() / parts


# Deviation 7: once a value is not finite, found_inf, which all optimizers share, turns 1: fused
# AdamW's own switch, at which neither this step nor any later one moves a weight. The log stops the
# run when it next reads the values; nothing here waits for the device.
def update(optimizer, losses, gradient_name, clip):
    """One step of AdamW; adds the gradient's norm to what is logged."""
    norm = clip_grad_norm_(optimizer.param_groups[0]["params"], clip or math.inf)
    losses[gradient_name] = getattr(norm, "full_tensor", norm.detach)()     # of a sharded network
    optimizer.found_inf.logical_or_(~torch.stack([*losses.values()]).isfinite().all())
    optimizer.step()
    optimizer.zero_grad(set_to_none=True)


def make_optimizers(config, roles, device):
    """AdamW for the student and, where there is one, the adapted network."""
    found_inf = torch.zeros((), device=device)
    optimizers = [AdamW(network.parameters(), lr=config.learning_rate, betas=betas,
                        weight_decay=config.weight_decay, fused=True)
                  for network, betas in zip((roles.student, roles.adapted), both_betas(config))
                  if network is not None]
    for optimizer in optimizers:
        optimizer.found_inf = found_inf
    return optimizers


def set_rate(config, step, optimizers):
    """Rises from 0 over the warm-up, falls to final_rate at the end."""
    done = step / config.iterations
    fall = 1 - (1 - config.final_rate) * done
    rise = min(step / config.warm_up, 1) if config.warm_up else 1
    for optimizer, share in zip(optimizers, (1, config.adapted_rate)):
        for group in optimizer.param_groups:
            group["lr"] = config.learning_rate * (rise * fall) * share


def open_real(options, roles, network, device, stop):
    """Images, or for text to image their latents."""
    if roles.base:
        return latents_of(options.data, roles.opened, network, options.folder, device, stop)
    images = open_images(options.data, options.cache)
    check_fits(images, network)
    if distributed.rank() == 0 and not any(options.folder.glob("*.pt")):
        check_every_image(images)
    return images


def open_sources(config, options, roles, device, stop):
    """What the iterations draw from: real images and noise-image pairs only where a term asks."""
    network, real, pairs = roles.teacher or roles.student, None, None
    if config.gan_weight or config.stage == 0:
        real = open_real(options, roles, network, device, stop)
    if config.regression_weight:
        pairs = noise_image_pairs(whole_network(network, device), roles.made_from["teacher"],
                                  config.regression_pairs, config.regression_steps, options.folder,
                                  options.batch_per_gpu, device, stop)
    return Sources(network.shape, network.levels.to(device), network.conditions, real, pairs)


def autocast_of(options, device):
    return partial(torch.autocast, device.type, torch.bfloat16,
                   enabled=options.precision == "bf16",
                   cache_enabled=not options.shard)         # it would keep every weight whole


def distill(config, options, device, stop):
    """Set-up, then for each iteration: draw, iterate, log. Returns an exit code."""
    roles = load_roles(config, options, device)
    optimizers = make_optimizers(config, roles, device)
    before = resume(config, options, roles, optimizers)
    roles.wrap()
    if config.regression_weight:
        roles.distance = perceptual_distance(config.dataset, options.cache, device,
                                             roles.opened.pipeline)
    scorer = Scorer(config, options, device)            # before the long work: it may lack a file
    sources = open_sources(config, options, roles, device, stop)
    autocast = autocast_of(options, device)
    iterate = iteration_of(config)
    log = Log(config, options, device, before, stop, scorer, Passes(iterate, config))
    if before.lost or before.unscored and log.score_due(before.iterations - 1):
        log.save(roles, optimizers, before.iterations, score=bool(log.scorer))

    for step in range(before.iterations, config.iterations):
        set_rate(config, step, optimizers)
        parts = draw(config, step, sources, options)
        losses, images = iterate(config, roles, optimizers, parts, step % config.ttur == 0,
                                 autocast)
        log.take(step, losses, images)
        stopping = distributed.any_rank(bool(stop.received))
        if log.save_due(step) or stopping:
            log.save(roles, optimizers, step + 1, log.score_due(step) and not stopping)
        if stopping:
            return log.stopped(step + 1)
    return log.finish()


def describe(stage):
    preset, config = stage.preset, stage.config
    say(f"{config.dataset}, {config.method}, stage {config.stage} -> {stage.options.folder}\n"
        f"preset: {preset.source}; authors' hardware: {preset.gpus}; paper's FID: "
        f"{preset.paper_fid or 'none'}")
    if stage.options.data != config.dataset and config.stage and not config.gan_weight:
        say(f"--data {stage.options.data}: nothing reads it; only --stage 0 and a GAN "
            "(--gan-weight) use real images")


def main(argv=None):
    stages = parse(argv)
    set_precision(stages[0].options.precision)
    torch.backends.cudnn.benchmark = True
    if stages[0].options.dry_run:                       # also where the GPUs are not
        for stage in stages if os.environ.get("RANK", "0") == "0" else ():
            describe(stage)
            print(report(iteration_of(stage.config), stage))
        return 0
    device, stop, code = distributed.start(stages[0].options.device), StopSignal(), 0
    tell_of_no_reference(stages[0].config, stages[0].options)
    try:
        for stage in stages:
            describe(stage)
            code = run_stage(stage, device, stop)
            if code:
                break
    finally:
        stop.restore()
    distributed.finish()
    return code


def run_stage(stage, device, stop):
    """In its folder, which it alone holds. Returns an exit code."""
    lock, made = open_run(stage.options.folder, stage.config, stage.options)
    try:
        return distill(stage.config, stage.options, device, stop)
    except BaseException as error:
        left = what_is_left(stage.options.folder)
        drop_unused(stage.options.folder, made)
        compiler = (stage.options.compile and isinstance(error, Exception) and not isinstance(
            error, (UserError, RunFailed)) and not out_of_memory(error))
        if not (compiler and stop.received):
            raise
        say(f"{stop.received} stopped torch.compile too; {left}; the same command goes on")
        return 3
    finally:
        if lock:
            lock.close()
        if device.type == "cuda":                       # the networks of this stage are in circles
            gc.collect()
            torch.cuda.empty_cache()


if __name__ == "__main__":
    run(main)
