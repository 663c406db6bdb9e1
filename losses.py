"""The losses, pure functions of tensors and denoisers D(x_t, sigma, y) -> x0.

PMDD = "Progressive Data-Free Diffusion Distillation", DMD = arXiv:2311.18828,
DMD2 = arXiv:2405.14867, SiD = arXiv:2404.04057, EDM = arXiv:2206.00364.

    here      PMDD         DMD, DMD2   SiD      meaning
    teacher   x_theta      mu_real     f_phi    frozen pretrained denoiser
    student   g_phi        G_theta     G_theta  few-step generator, gives x0
    adapted   x_varphi     mu_fake     f_psi    denoiser that tracks the student's outputs
    previous  g_old        -           -        the student of the stage before, frozen

x0, eps [B,C,H,W]; sigma [B,1,1,1]; y, the condition, any [B,...] or None. x_t = x0 + sigma eps
(a_t = 1). Every loss is a mean over batch and pixels, so its weight means the same at every
resolution (Deviation 12).
"""

import torch
import torch.nn.functional as F


def denoising_loss(x0, sigma, eps, y, *, adapted, sigma_data):
    """DMD Eq. 6 / Alg. 3, PMDD Eq. 8: the adapted network learns the student's images x0.
    The network's sigma_data, 0.5 in EDM's: infinite gives the error in epsilon, 1 that in v."""
    x0 = x0.detach()
    weight = sigma ** -2 + sigma_data ** -2                            # SNR + 1 / sigma_data^2
    return (weight * (adapted(x0 + sigma * eps, sigma, y) - x0).square()).mean()


def edm_loss(x0, sigma, eps, y, *, teacher, sigma_data):
    """EDM Eq. 2 with its weight lambda(sigma) of Table 1: the same denoising, of real images x0."""
    return denoising_loss(x0, sigma, eps, y, adapted=teacher, sigma_data=sigma_data)


def mean_error(x0, x0_teacher):
    """mean |x0 - x0_teacher| of each image [B,1,1,1]: DMD Eq. 8, and SiD, whose floor it has."""
    return (x0 - x0_teacher).abs().mean(dim=(1, 2, 3), keepdim=True).clamp_min(1e-5)


def dm_loss(x0, sigma, eps, y, *, teacher, adapted, weighting="eq8"):
    """DMD Eq. 7 / Alg. 2, PMDD Eq. 6: d loss / d x0 = grad / x0.numel(), and nothing else."""
    x_t = x0 + sigma * eps
    with torch.no_grad():                                 # sg: unlike SiD, no path through D(x_t)
        x0_teacher, x0_adapted = teacher(x_t, sigma, y), adapted(x_t, sigma, y)
        # The score difference is (x0_adapted - x0_teacher) / sigma^2; times w_t of DMD Table 2:
        weight = {"eq8": lambda: 1 / mean_error(x0, x0_teacher),           # Eq. 8
                  "sigma": lambda: 1 / sigma,                              # w_t = sigma
                  "sigma3": lambda: sigma}[weighting]()                    # w_t = sigma^3
        grad = weight * (x0_adapted - x0_teacher)
    return 0.5 * (x0 - (x0 - grad).detach()).square().mean()


def sid_loss(x0, sigma, eps, y, *, teacher, adapted, alpha):
    """SiD Alg. 1, the first two terms of PMDD Eq. 9 with SiD's sign (Deviation 1)."""
    x_t = x0 + sigma * eps
    x0_teacher, x0_adapted = teacher(x_t, sigma, y), adapted(x_t, sigma, y)   # gradient into x_t
    weight = 1 / mean_error(x0, x0_teacher).detach()
    delta = x0_teacher - x0_adapted
    return (weight * delta * ((x0_teacher - x0) - alpha * delta)).mean()


def unforget_loss(outputs, targets):
    """PMDD Eq. 9, last term: over the earlier steps k, mean |student(x_tk) - previous(x_tk)|^2.
    PMDD counts its steps from the last, t_1, to the first, t_n; here as they are sampled."""
    return sum((output - target.detach()).square().mean()
               for output, target in zip(outputs, targets))


def gan_student_loss(x0, sigma, eps, y, *, discriminator):
    """DMD2 Eq. 4, the student's side, non-saturating: -log D of the noised images."""
    return F.softplus(-discriminator(x0 + sigma * eps, sigma, y)).mean()


def gan_adapted_loss(x0, x_real, sigma, eps, sigma_real, eps_real, y, y_real, *, discriminator):
    """DMD2 Eq. 4, the discriminator's side: -log D(real) - log(1 - D(student's)), in one pass."""
    x_t = torch.cat([x0.detach() + sigma * eps, x_real + sigma_real * eps_real])
    both = None if y is None else torch.cat([y, y_real])
    generated, real = discriminator(x_t, torch.cat([sigma, sigma_real]), both).chunk(2)
    return F.softplus(generated).mean() + F.softplus(-real).mean()


def regression_loss(x_ref, y_ref, *, distance):
    """DMD Eq. 9: distance(student(z_ref), y_ref), y_ref the teacher's image from the same noise."""
    return distance(x_ref, y_ref).mean()
