"""Distillation, from the first line of the algorithm to the last checkpoint.

    python train.py                                        digits, PMDD stages 1, 2, 3
    python train.py --stage 0                              a teacher for them
    torchrun --nproc_per_node=4 train.py --dataset cifar10 --stage 2
    python train.py --help                                 a flag for each field of a preset

PMDD = "Progressive Data-Free Diffusion Distillation", DMD = arXiv:2311.18828,
DMD2 = arXiv:2405.14867, SiD = arXiv:2404.04057. The same command resumes a run.
"""

import math
from functools import partial
from types import SimpleNamespace

import numpy as np
import torch
import torch.nn.functional as F
from torch.optim import AdamW

from base import distributed
from base.errors import UserError, run
from losses import (denoising_loss, dm_loss, edm_loss, gan_adapted_loss, gan_student_loss,
                    regression_loss, sid_loss, unforget_loss)
from models import (denoise_together, from_uint8, level, roll_out, sigma_dm, sigma_grid,
                    sigma_lognormal, sigma_sid, update_ema)
from weights.opening import set_precision
from training.noise_pairs import noise_image_pairs
from training.options import parse
from training.cost import report
from presets import NETWORKS
from training.run_folder import Log, StopSignal, drop_unused, open_run
from training.roles import load_roles, make_trainable, new_teacher, resume
from metrics.scoring import Scorer


def distill(config, options, device, stop):
    """One stage: DMD's Algorithm 1 with PMDD's inputs and unforget loss. Returns an exit code."""
    roles = load_roles(config, options, device)
    teacher, previous, student, adapted, ema = (
        roles.teacher, roles.previous, roles.student, roles.adapted, roles.ema)
    student_opt, adapted_opt = adamw(student, config), adamw(adapted, config)
    optimizers, broken = [student_opt, adapted_opt], torch.zeros((), device=device)
    start, best_fid, unscored = resume(config, options, roles, optimizers)
    student_ddp, adapted_ddp = distributed.parallel(student), distributed.parallel(adapted)

    # What this method adds up; each is a choice of the preset, made once.
    distill_loss = {"dm": partial(dm_loss, weighting=config.dm_weighting),
                    "sid": partial(sid_loss, alpha=config.alpha), "none": None}[config.loss]
    unforget = config.unforget_weight > 0 and previous is not None
    source = previous if previous is not None and config.external_sampling else student
    discriminator = partial(adapted, output="logits")
    discriminator_ddp = partial(adapted_ddp, output="logits")
    autocast = partial(torch.autocast, device.type, torch.bfloat16,
                       enabled=options.precision == "bf16")
    scorer = Scorer(config, options, device)            # before the long work: it may lack a file
    real, pairs, distance = extra_inputs(config, options, teacher, device, stop)
    log = Log(config, options, device, start, best_fid, stop)
    if unscored and log.score_due(start - 1):           # stopped before it could be evaluated
        log.save(roles, optimizers, start, scorer)

    for step in range(start, config.iterations):
        student_turn = step % config.ttur == 0
        n, drawn = draw_iteration(config, step, teacher, device, real, pairs)
        parts = parts_of(drawn, config, options, teacher.label_dim, device, real, pairs)
        sigmas = config.sigmas[:n]
        generated, losses, figures = [], {}, {}
        set_rate(config, step, student_opt, adapted_opt)

        # Generate images from the inputs of this stage; on its turn, update the student.
        if student_turn:
            adapted.requires_grad_(False)               # the gradient passes through, not into it
        for part in parts:
            with distributed.sync_gradients(student_ddp, part is parts[-1]), autocast():
                # Roll out the inputs x_t1..x_tn and the images of the earlier steps (PMDD Eq. 7)
                inputs, targets = roll_out(source, part.z, part.y, sigmas, part.noises.unbind(1))
                first = 0 if unforget and student_turn else n - 1
                with torch.set_grad_enabled(student_turn):
                    *earlier, x0 = denoise_together(student_ddp, inputs[first:], sigmas[first:],
                                                    part.y)
                generated.append(x0.detach())
                if not student_turn:
                    continue

                terms = {}
                if distill_loss:                        # DMD Eq. 7, or SiD
                    terms["distill"] = distill_loss(x0, part.sigma, part.eps, part.y,
                                                    teacher=teacher, adapted=adapted)
                if unforget:                            # PMDD Eq. 9, last term
                    if source is not previous:
                        with torch.no_grad():
                            targets = denoise_together(previous, inputs[:-1], sigmas[:-1], part.y)
                    terms["unforget"] = config.unforget_weight * unforget_loss(earlier, targets)
                if config.gan_weight:                   # DMD2 Eq. 4
                    terms["gan"] = config.gan_weight * gan_student_loss(
                        x0, part.sigma_gan, part.eps_gan, part.y, discriminator=discriminator)
                if config.regression_weight:            # DMD Eq. 9
                    x_ref = student_ddp(sigmas[0] * part.z_ref, level(sigmas[0], x0), part.y_ref)
                    terms["regression"] = config.regression_weight * regression_loss(
                        x_ref, part.image_ref, distance=distance)
                (sum(terms.values()) / len(parts)).backward()
                add(losses, terms, len(parts))
        if student_turn:
            figures = update(student_opt, losses, "student_gradient", config.clip, broken)
            update_ema(ema, student, config.batch, config.ema_halflife)
            make_trainable(adapted)

        # Update the adapted network on the same images (PMDD Eq. 8, DMD Alg. 3).
        losses = {}
        for part, x0 in zip(parts, generated):
            with distributed.sync_gradients(adapted_ddp, part is parts[-1]), autocast():
                terms = {"denoising": denoising_loss(x0, part.sigma_adapted, part.eps_adapted,
                                                     part.y, adapted=adapted_ddp)}
                if config.gan_weight:                   # DMD2 Eq. 4, the discriminator
                    terms["discriminator"] = config.gan_adapted_weight * gan_adapted_loss(
                        x0, part.real, part.sigma_fake, part.eps_fake, part.sigma_real,
                        part.eps_real, part.y, part.y_real, discriminator=discriminator_ddp)
                (sum(terms.values()) / len(parts)).backward()
                add(losses, terms, len(parts))
        figures |= update(adapted_opt, losses, "adapted_gradient", config.clip, broken)

        # Log; at times evaluate, keep the best, save.
        log.take(step, figures, x0)
        stopping = log.stopping(step)
        if log.save_due(step) or stopping:
            score = log.score_due(step) and not stopping
            log.save(roles, optimizers, step + 1, scorer if score else None)
        if stopping:
            return log.stopped(step + 1)
    return log.finish()


def add(losses, terms, parts):
    for name, value in terms.items():
        losses[name] = losses.get(name, 0) + value.detach() / parts


def update(optimizer, losses, gradient_name, clip, broken):
    """One step of AdamW, and what to log of it. Waits for no device.

    Once a figure is not finite, `broken` turns 1, and neither this update nor any later one moves
    a weight; the log stops the run when it next reads the figures (Deviation 7).
    """
    parameters = [p for group in optimizer.param_groups for p in group["params"]]
    norm = torch.nn.utils.clip_grad_norm_(parameters, clip or math.inf)
    figures = losses | {gradient_name: norm}
    finite = torch.stack([*figures.values()]).isfinite().all()
    broken.copy_(torch.maximum(broken, (~finite).float()))
    optimizer.found_inf = broken            # fused AdamW's own switch: at 1 its step does nothing
    optimizer.step()
    optimizer.zero_grad(set_to_none=True)
    return figures


def iteration_generator(seed, step, device):
    """Seeded by (seed, iteration): a resumed run, or one on more processes, draws the same."""
    mixed = np.random.default_rng([seed, step]).integers(2 ** 32)
    return torch.Generator(device).manual_seed(int(mixed))


def draw_iteration(config, step, network, device, real, pairs):
    """Everything random of one iteration, for the whole batch: the same on every rank."""
    rng = iteration_generator(config.seed, step, device)
    normal = partial(torch.randn, generator=rng, device=device)
    whole = partial(torch.randint, generator=rng, device=device)
    # Indices are drawn where the images are; a GPU's would have to be waited for.
    host_rng = rng if device.type == "cpu" else iteration_generator(config.seed, step, "cpu")
    index = partial(torch.randint, generator=host_rng)
    B, shape, classes = config.batch, network.image_shape, network.label_dim

    n = len(config.sigmas)                              # the step that this iteration trains
    if config.trained_step == "random":
        n = 1 + int(np.random.default_rng([config.seed, step, n]).integers(n))
    student_noise, adapted_noise = ((sigma_sid, sigma_lognormal) if config.loss == "sid" else
                                    (sigma_dm, sigma_grid))             # Deviation 5
    drawn = {"z": normal(B, *shape), "noises": normal(B, n - 1, *shape),
             "y": F.one_hot(whole(classes, (B,)), classes).float() if classes else None,
             "sigma_adapted": adapted_noise(B, rng), "eps_adapted": normal(B, *shape)}
    student_turn = step % config.ttur == 0
    if student_turn:
        drawn |= {"sigma": student_noise(B, rng), "eps": normal(B, *shape)}
    if real is not None:                                # DMD2's GAN, noise over the whole grid
        drawn["real_index"] = index(len(real), (B,))
        for name in ("real", "fake", "gan") if student_turn else ("real", "fake"):
            drawn |= {f"sigma_{name}": sigma_grid(B, rng), f"eps_{name}": normal(B, *shape)}
    if pairs is not None and student_turn:              # DMD's regression
        drawn["pair_index"] = index(len(pairs[0]), (B,))
    return n, drawn


def parts_of(drawn, config, options, label_dim, device, real=None, pairs=None):
    """This rank's slice of the batch, cut into forward passes of --batch-per-gpu images."""
    share, size = config.batch // options.world_size, options.batch_per_gpu
    first = distributed.rank() * share

    def moved(tensor):                                  # without waiting for the copy
        pinned = tensor.pin_memory() if device.type == "cuda" else tensor
        return pinned.to(device, non_blocking=True)

    def one_hot(labels):
        return F.one_hot(moved(labels), label_dim).float() if label_dim else None

    parts = []
    for start in range(first, first + share, size):
        part = SimpleNamespace(**{k: None if v is None else v[start:start + size]
                                  for k, v in drawn.items()})
        if real is not None:
            pixels, labels = real.take(part.real_index.tolist())
            part.real, part.y_real = from_uint8(moved(pixels)), one_hot(labels)
        if "pair_index" in drawn:
            z_ref, image_ref, labels = (t[part.pair_index] for t in pairs)
            part.z_ref, part.image_ref = moved(z_ref), moved(image_ref).float()
            part.y_ref = one_hot(labels)
        parts.append(part)
    return parts


def adamw(network, config):
    return AdamW(network.parameters(), lr=config.learning_rate, betas=config.betas,
                 weight_decay=config.weight_decay, fused=True)


def set_rate(config, step, *optimizers):
    done = step / config.iterations
    for optimizer in optimizers:
        for group in optimizer.param_groups:
            group["lr"] = config.learning_rate * (1 - (1 - config.final_rate) * done)


def extra_inputs(config, options, teacher, device, stop):
    """Real images, noise-image pairs and their distance, where a term needs them."""
    real = pairs = distance = None
    if config.gan_weight:
        from images import real
        real = real.open_images(options.data, options.cache)
        real.check_fits(real, teacher)
    if config.regression_weight:
        distance = perceptual_distance(config, options, device)
        pairs = noise_image_pairs(teacher, config.regression_pairs, config.regression_steps,
                                  options.folder, options.batch_per_gpu, device, stop)
    return real, pairs, distance


def perceptual_distance(config, options, device):
    if config.dataset == "digits":                      # Deviation 11
        from metrics.digits_classifier import load_digits_network
        return load_digits_network(device=device).perceptual_distance
    from metrics.lpips import load_lpips
    return load_lpips(options.cache, device)


def train_teacher(config, options, device, stop, network_config):
    """Stage 0, where no teacher is published: EDM's loss on real images."""
    from images import real
    images = real.open_images(options.data, options.cache)
    roles = new_teacher(config, options, network_config, device)
    real.check_fits(images, roles.student)
    optimizer = adamw(roles.student, config)
    start, best_fid, unscored = resume(config, options, roles, [optimizer])
    network, broken = distributed.parallel(roles.student), torch.zeros((), device=device)
    scorer = Scorer(config, options, device)
    log = Log(config, options, device, start, best_fid, stop)
    if unscored and log.score_due(start - 1):
        log.save(roles, [optimizer], start, scorer)
    for step in range(start, config.iterations):
        set_rate(config, step, optimizer)
        rng = iteration_generator(config.seed, step, device)
        torch.manual_seed(rng.initial_seed() + distributed.rank())              # for dropout
        host_rng = rng if device.type == "cpu" else iteration_generator(config.seed, step, "cpu")
        drawn = {"real_index": torch.randint(len(images), (config.batch,), generator=host_rng),
                 "sigma": sigma_lognormal(config.batch, rng),
                 "eps": torch.randn(config.batch, *images.shape, generator=rng, device=device)}
        parts = parts_of(drawn, config, options, roles.student.label_dim, device, images)
        losses = {}
        roles.student.train()
        for part in parts:
            with distributed.sync_gradients(network, part is parts[-1]), torch.autocast(
                    device.type, torch.bfloat16, enabled=options.precision == "bf16"):
                loss = edm_loss(part.real, part.sigma, part.eps, part.y_real, teacher=network)
                (loss / len(parts)).backward()
                add(losses, {"denoising": loss}, len(parts))
        figures = update(optimizer, losses, "student_gradient", config.clip, broken)
        update_ema(roles.ema, roles.student, config.batch, config.ema_halflife)
        log.take(step, figures, parts[-1].real)
        stopping = log.stopping(step)
        if log.save_due(step) or stopping:
            score = log.score_due(step) and not stopping
            log.save(roles, [optimizer], step + 1, scorer if score else None)
        if stopping:
            return log.stopped(step + 1)
    return log.finish()


def describe(preset, config, options):
    print(f"{config.dataset}, {config.method}, stage {config.stage} -> {options.folder}")
    print(f"preset: {preset.source}; authors' hardware: {preset.gpus}; paper's FID: "
          f"{preset.paper_fid or 'none'}", flush=True)


def print_plan(config, options, device):
    for name, value in vars(config).items():
        print(f"  {name}: {value}")
    print("\n".join(report(config, NETWORKS[config.dataset], options.batch_per_gpu,
                           options.world_size, options.precision, device.type)))


def main(argv=None):
    rows = parse(argv)
    device = distributed.start(rows[0][2].device)
    set_precision(rows[0][2].precision)
    torch.backends.cudnn.benchmark = True
    code, stop = 0, None
    for preset, config, options in rows:
        if distributed.rank() == 0:
            describe(preset, config, options)
        if options.dry_run:
            if distributed.rank() == 0:
                print_plan(config, options, device)
            continue
        stop = stop or StopSignal()
        lock, made = open_run(options.folder, config, options)
        try:
            code = (distill(config, options, device, stop) if config.stage else
                    train_teacher(config, options, device, stop, preset.network))
        except (UserError, OSError):
            drop_unused(options.folder, made)
            raise
        if code:
            break
        if lock:
            lock.close()
    distributed.finish()
    return code


if __name__ == "__main__":
    run(main)
