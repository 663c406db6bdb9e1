"""The losses against exact denoisers: closed forms and quadrature, no Monte Carlo."""

import math
from functools import partial

import pytest
import torch
from torch import nn

from gaussians import (column, edm_denoiser, four_corners, full, gaussian_denoiser, hermite,
                       hermite_image, log_density, mixture_denoiser, score)
from helpers import small_network
from losses import (denoising_loss, dm_loss, edm_loss, gan_adapted_loss, gan_student_loss,
                    mean_error, regression_loss, sid_loss, unforget_loss)
from models import AdaptedWithHead, denoise_together, sample_heun

MIXTURE = dict(weights=[0.3, 0.7], means=[-1.0, 0.8], stds=[0.4, 0.6])
TEACHER, ADAPTED = mixture_denoiser(**MIXTURE), gaussian_denoiser(0.2, 0.5)
EXACT = dict(teacher=TEACHER, adapted=ADAPTED)
WEIGHTINGS = ("eq8", "sigma", "sigma3")


def normal(*shape, seed=0):
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(*shape, generator=generator, dtype=torch.float64)


def images(batch=3, seed=0):
    """x0 that takes a gradient, a noise level for each image, eps."""
    sigma = column([0.3, 1.1, 4.0])[:batch].reshape(-1, 1, 1, 1)
    x0, eps = normal(batch, 2, 3, 4, seed=seed), normal(batch, 2, 3, 4, seed=seed + 1)
    return x0.requires_grad_(), sigma, eps


def gradient(loss, x0):
    """d loss / d x0 for each pixel, freed of the mean over pixels."""
    return torch.autograd.grad(loss, x0)[0] * x0.numel()


def diffused_mixture(sigma):
    return MIXTURE["weights"], MIXTURE["means"], column(MIXTURE["stds"]) ** 2 + sigma ** 2


# ---- DM: the gradient of the KL divergence ----

@pytest.mark.parametrize("weighting", WEIGHTINGS)
def test_dm_gradient_is_the_weighted_score_difference(weighting):
    x0, sigma, eps = images()
    x_t = (x0 + sigma * eps).detach()
    s_real = score(x_t, *diffused_mixture(sigma[..., None]))
    s_fake = score(x_t, [1.0], [0.2], 0.5 ** 2 + sigma[..., None] ** 2)
    error = (x0.detach() - TEACHER(x_t, sigma)).abs().mean((1, 2, 3), keepdim=True)
    w_t = {"eq8": sigma ** 2 / error, "sigma": sigma, "sigma3": sigma ** 3}[weighting]
    loss = dm_loss(x0, sigma, eps, None, **EXACT, weighting=weighting)
    torch.testing.assert_close(gradient(loss, x0), w_t * (s_fake - s_real), rtol=1e-10, atol=1e-12)


@pytest.mark.parametrize("weighting", WEIGHTINGS)
def test_dm_gradient_is_zero_where_adapted_equals_teacher(weighting):
    x0, sigma, eps = images()
    loss = dm_loss(x0, sigma, eps, None, teacher=TEACHER, adapted=TEACHER, weighting=weighting)
    assert gradient(loss, x0).abs().max() == 0


def test_dm_weighting_is_that_of_equation_8_unless_another_is_asked_for():
    x0, sigma, eps = images()
    default = dm_loss(x0, sigma, eps, None, **EXACT)
    assert default == dm_loss(x0, sigma, eps, None, **EXACT, weighting="eq8")


def test_dm_loss_is_half_the_mean_square_of_its_gradient():
    x0, sigma, eps = images()
    loss = dm_loss(x0, sigma, eps, None, **EXACT)
    torch.testing.assert_close(loss, gradient(loss, x0).square().mean() / 2, rtol=1e-10, atol=0)


def unweighted(grad, weighting, x0, sigma, eps, teacher):
    """The score difference itself, from the gradient of a dm loss."""
    with torch.no_grad():
        return grad / {"eq8": sigma ** 2 / mean_error(x0, teacher(x0 + sigma * eps, sigma)),
                       "sigma": sigma, "sigma3": sigma ** 3}[weighting]


@pytest.mark.parametrize("weighting", WEIGHTINGS)
@pytest.mark.parametrize("sigma", [0.2, 1.0, 5.0])
def test_the_unweighted_dm_gradient_averages_to_the_kl_gradient_of_gaussians(weighting, sigma):
    mean, std = column(0.7).requires_grad_(), column(0.5).requires_grad_()
    sigma = full(sigma)
    fake, real = std ** 2 + sigma ** 2, 1 + sigma ** 2                # variances; teacher N(0.1, 1)
    kl = ((real / fake).log() + (fake + (mean - 0.1) ** 2) / real - 1) / 2
    expected = torch.autograd.grad(kl.sum(), [mean, std])

    z, eps, weights = hermite_image(8)
    x0 = mean + std * z
    teacher, adapted = gaussian_denoiser(0.1, 1.0), gaussian_denoiser(0.7, 0.5)
    loss = dm_loss(x0, sigma, eps, None, teacher=teacher, adapted=adapted, weighting=weighting)
    x0.backward(weights * unweighted(gradient(loss, x0), weighting, x0, sigma, eps, teacher))
    torch.testing.assert_close([mean.grad, std.grad], list(expected), rtol=1e-10, atol=1e-12)


@pytest.mark.parametrize("weighting", WEIGHTINGS)
def test_the_unweighted_dm_gradient_averages_to_the_kl_gradient_to_a_mixture(weighting):
    mean, std = column(0.3).requires_grad_(), column(0.7).requires_grad_()
    sigma = full(0.8)
    nodes, node_weights = hermite(80)
    x = mean + (std ** 2 + 0.8 ** 2).sqrt() * nodes                     # the diffused student
    log_ratio = (log_density(x, [1.0], mean[None], std[None] ** 2 + 0.8 ** 2)
                 - log_density(x, *diffused_mixture(0.8)))
    expected = torch.autograd.grad((node_weights * log_ratio).sum(), [mean, std])

    z, eps, weights = hermite_image(80)
    x0 = mean + std * z
    loss = dm_loss(x0, sigma, eps, None, teacher=TEACHER, adapted=gaussian_denoiser(0.3, 0.7),
                   weighting=weighting)
    x0.backward(weights * unweighted(gradient(loss, x0), weighting, x0, sigma, eps, TEACHER))
    torch.testing.assert_close([mean.grad, std.grad], list(expected), rtol=1e-6, atol=1e-9)


# ---- SiD: the gradient of the Fisher divergence ----

def sid_gradient(loss, s, sigma, teacher):
    """d loss / d s of a Gaussian student x0 = s z; four corners make second moments exact."""
    s = column(s).requires_grad_()
    z, eps = four_corners()
    x0 = s * z
    adapted = gaussian_denoiser(0, s.item())                            # optimal, and frozen
    value = loss(x0, full(sigma), eps, None, teacher=teacher, adapted=adapted)
    normaliser = mean_error(x0, teacher(x0 + sigma * eps, full(sigma))).detach()
    return (torch.autograd.grad(value, s)[0] * normaliser).item()


def printed_loss(x0, sigma, eps, y, *, teacher, adapted, alpha):
    """PMDD Eq. 9 as it is printed, with SiD's weight."""
    x0_teacher, x0_adapted = teacher(x0 + sigma * eps, sigma), adapted(x0 + sigma * eps, sigma)
    delta = x0_teacher - x0_adapted
    weight = 1 / mean_error(x0, x0_teacher).detach()
    return (weight * (delta.square() + alpha * delta * (x0_teacher - x0))).mean()


def true_fisher_gradient(s, sigma):
    """d/ds of E (x0_teacher - x0_adapted)^2, of N(0, 1) and N(0, s^2) diffused by sigma.

    That is sigma^4 times the Fisher divergence, the mean square of the score difference.
    """
    s = column(s).requires_grad_()
    delta = 1 / (1 + sigma ** 2) - s ** 2 / (s ** 2 + sigma ** 2)       # times x_t
    return torch.autograd.grad(delta ** 2 * (s ** 2 + sigma ** 2), s)[0].item()


TOO_NARROW = dict(s=0.5, sigma=0.2)


@pytest.mark.parametrize("s", [0.5, 0.9, 1.5])
@pytest.mark.parametrize("sigma", [0.2, 1.0, 3.0])
def test_sid_with_alpha_one_half_is_half_the_true_fisher_gradient(s, sigma):
    half = sid_gradient(partial(sid_loss, alpha=0.5), s, sigma, gaussian_denoiser(0, 1))
    assert half == pytest.approx(true_fisher_gradient(s, sigma) / 2, rel=1e-10)


def test_the_printed_sign_narrows_a_student_that_is_too_narrow_already():
    teacher, true = gaussian_denoiser(0, 1), true_fisher_gradient(**TOO_NARROW)
    ours, printed, printed_half = (
        sid_gradient(partial(loss, alpha=alpha), **TOO_NARROW, teacher=teacher)
        for loss, alpha in ((sid_loss, 1.2), (printed_loss, 1.2), (printed_loss, 0.5)))
    assert [round(g, 4) for g in (true, ours, printed)] == [-0.0175, -0.0157, 0.0053]
    assert printed_half > 0                                    # not half the true one at 0.5 either


@pytest.mark.parametrize("alpha", [0.5, 1.0])
def test_sid_is_half_the_true_fisher_gradient_to_a_mixture_only_at_alpha_one_half(alpha):
    mean, std = column(0.3).requires_grad_(), column(0.7).requires_grad_()
    sigma = full(0.8)
    nodes, node_weights = hermite(80)
    x = mean + (std ** 2 + 0.8 ** 2).sqrt() * nodes[None, None, None]   # the diffused student
    delta = TEACHER(x, sigma) - gaussian_denoiser(mean, std)(x, sigma)
    true = torch.stack(torch.autograd.grad((node_weights * delta ** 2).sum(), [mean, std]))

    z, eps, weights = hermite_image(80)
    x0 = mean + std * z
    loss = sid_loss(x0, sigma, eps, None, teacher=TEACHER, adapted=gaussian_denoiser(0.3, 0.7),
                    alpha=alpha)
    normaliser = mean_error(x0, TEACHER(x0 + sigma * eps, sigma)).detach()
    x0.backward(weights * gradient(loss, x0) * normaliser)
    distance = (torch.stack([mean.grad, std.grad]) - true / 2).norm() / true.norm()
    assert distance < 1e-6 if alpha == 0.5 else distance > 0.01


def small_denoiser(seed):
    """A denoiser of [B,2,3,4] that mixes all pixels."""
    torch.manual_seed(seed)
    layers = nn.Sequential(nn.Flatten(), nn.Linear(24, 10), nn.Tanh(), nn.Linear(10, 24)).double()
    return layers, lambda x_t, sigma, y: layers(x_t / (1 + sigma)).reshape(x_t.shape)


@pytest.mark.parametrize("alpha", [0.5, 1.2])
def test_sid_gradient_passes_through_both_denoisers_and_not_through_the_weight(alpha):
    x0, sigma, eps = images(batch=1)
    (_, teacher), (_, adapted) = small_denoiser(1), small_denoiser(2)
    x_t = (x0 + sigma * eps).detach()

    def outcome(network):
        jacobian = torch.autograd.functional.jacobian(lambda x: network(x, sigma, None), x_t)
        return network(x_t, sigma, None).detach().flatten(), jacobian.reshape(24, 24)

    (real, J_real), (fake, J_fake) = outcome(teacher), outcome(adapted)
    x, delta = x0.detach().flatten(), real - fake
    by_hand = (J_real - J_fake).T @ (real - x - 2 * alpha * delta) + J_real.T @ delta - delta
    by_hand = by_hand / (x - real).abs().mean()
    loss = sid_loss(x0, sigma, eps, None, teacher=teacher, adapted=adapted, alpha=alpha)
    torch.testing.assert_close(gradient(loss, x0).flatten(), by_hand, rtol=1e-9, atol=1e-12)


def test_sid_loss_is_the_weighted_product_of_its_definition():
    x0, sigma, eps = images()
    real, fake = TEACHER(x0 + sigma * eps, sigma), ADAPTED(x0 + sigma * eps, sigma)
    each = (real - fake) * (real - x0) - 1.2 * (real - fake) ** 2
    each = each.mean((1, 2, 3)) / (x0 - real).abs().mean((1, 2, 3))
    loss = sid_loss(x0, sigma, eps, None, **EXACT, alpha=1.2)
    torch.testing.assert_close(loss, each.mean(), rtol=1e-12, atol=0)


# ---- The normaliser ----

@pytest.mark.parametrize("loss", [dm_loss, partial(sid_loss, alpha=1.2)])
def test_the_normaliser_is_of_each_image_by_itself(loss):
    x0, sigma, eps = images()
    together = gradient(loss(x0, sigma, eps, None, **EXACT), x0)
    for i in range(len(x0)):
        one = x0[i:i + 1].detach().requires_grad_()
        alone = gradient(loss(one, sigma[i:i + 1], eps[i:i + 1], None, **EXACT), one)
        torch.testing.assert_close(together[i:i + 1], alone, rtol=1e-12, atol=0)


def test_the_normaliser_is_the_mean_absolute_error_and_at_least_1e_5():
    x0 = torch.zeros(2, 3, 2, 2, dtype=torch.float64)
    x0_teacher = torch.stack([torch.full((3, 2, 2), -0.25), torch.zeros(3, 2, 2)]).double()
    x0_teacher[0, 0] = 0.5                                     # mean of |0.5|, |-0.25|, |-0.25|
    assert mean_error(x0, x0_teacher).flatten().tolist() == pytest.approx([1 / 3, 1e-5])
    assert mean_error(x0, x0_teacher).shape == (2, 1, 1, 1)


# ---- What the networks are asked, and which weights a loss may reach ----

@pytest.mark.parametrize("loss, networks", [
    (dm_loss, ("teacher", "adapted")), (partial(sid_loss, alpha=1.2), ("teacher", "adapted")),
    (partial(denoising_loss, sigma_data=0.5), ("adapted",)),
    (partial(edm_loss, sigma_data=0.5), ("teacher",)),
    (gan_student_loss, ("discriminator",))])
def test_each_network_is_asked_once_about_the_noised_images_and_their_labels(loss, networks):
    x0, sigma, eps = images()
    labels, calls = object(), []

    def network(name, x_t, sigma, y):
        calls.append((name, x_t.detach(), sigma, y))
        return x_t

    loss(x0, sigma, eps, labels, **{name: partial(network, name) for name in networks})
    assert [name for name, *_ in calls] == list(networks)
    for _, x_t, asked, y in calls:
        assert torch.equal(x_t, x0 + sigma * eps) and asked is sigma and y is labels


@pytest.fixture
def networks():
    """Teacher, student, adapted network with GAN head, inputs; frozen as in the loop."""
    teacher, student, adapted = (small_network(seed).double() for seed in range(3))
    torch.manual_seed(3)
    adapted = AdaptedWithHead(adapted).double()
    teacher.requires_grad_(False)
    adapted.requires_grad_(False)
    x_t, eps, y = 80 * normal(3, 1, 8, 8), normal(3, 1, 8, 8, seed=1), torch.eye(10).double()[:3]
    x0 = student(x_t, full(80.0), y)
    return teacher, student, adapted, (x0, images()[1], eps, y)


def gradients(network):
    return {name for name, p in network.named_parameters() if p.grad is not None and p.grad.any()}


def untouched(*networks):
    return all(p.grad is None for network in networks for p in network.parameters())


def weights(network):
    return {name for name, _ in network.named_parameters()}


STUDENT_LOSSES = {
    "dm": lambda inputs, **networks: dm_loss(*inputs, **networks),
    "sid": lambda inputs, **networks: sid_loss(*inputs, **networks, alpha=1.2),
    "gan": lambda inputs, teacher, adapted: gan_student_loss(
        *inputs, discriminator=partial(adapted, output="logits"))}


@pytest.mark.parametrize("name", STUDENT_LOSSES)
def test_a_student_loss_reaches_all_of_the_student_and_none_of_teacher_or_adapted(networks, name):
    teacher, student, adapted, inputs = networks
    STUDENT_LOSSES[name](inputs, teacher=teacher, adapted=adapted).backward()
    assert gradients(student) == weights(student)
    assert untouched(teacher, adapted)


def test_dm_keeps_no_graph_of_the_denoisers():
    x0, sigma, eps = images()
    recording = []

    def denoiser(x_t, sigma, y):
        recording.append(torch.is_grad_enabled())
        return x_t

    assert dm_loss(x0, sigma, eps, None, teacher=denoiser, adapted=denoiser).requires_grad
    assert recording == [False, False]


def test_dm_sends_no_gradient_through_the_denoisers_even_when_they_are_not_frozen(networks):
    teacher, student, adapted, inputs = networks
    teacher.requires_grad_(True)
    adapted.requires_grad_(True)
    dm_loss(*inputs, teacher=teacher, adapted=adapted).backward()
    assert gradients(student) == weights(student)
    assert untouched(teacher, adapted)


def test_an_adapted_loss_reaches_the_adapted_network_and_no_weight_of_the_student(networks):
    teacher, student, adapted, inputs = networks
    x0, sigma, eps, y = inputs
    adapted.requires_grad_(True)
    denoising_loss(x0, sigma, eps, y, adapted=adapted, sigma_data=0.5).backward()
    assert gradients(adapted.network) == weights(adapted.network) and untouched(adapted.head)
    gan_adapted_loss(x0, normal(3, 1, 8, 8, seed=5), sigma, eps, sigma, eps, y, y,
                     discriminator=partial(adapted, output="logits")).backward()
    assert gradients(adapted.head) >= {n for n in weights(adapted.head) if n.endswith("weight")}
    assert untouched(teacher, student)


# ---- Denoising ----

def test_the_exact_denoiser_of_gaussian_data_has_no_denoising_gradient_and_a_nearby_one_has():
    z, eps = four_corners()
    x0, sigma = 0.3 + 0.6 * z, full(0.8)
    slope = column(0.6 ** 2 / (0.6 ** 2 + 0.8 ** 2)).requires_grad_()
    shift = (0.3 * (1 - slope.detach())).requires_grad_()

    def steepness(change):
        loss = denoising_loss(x0, sigma, eps, None, sigma_data=0.5,
                              adapted=lambda x, s, y: (slope + change) * x + shift)
        return torch.stack(torch.autograd.grad(loss, [slope, shift])).abs().max()

    assert steepness(0.0) < 1e-12 and steepness(0.01) > 1e-2


@pytest.mark.parametrize("direction", [torch.ones_like, torch.sin, torch.square])
def test_the_exact_denoiser_of_a_mixture_has_no_denoising_gradient_in_any_direction(direction):
    z, eps, weights = hermite_image()
    amount, total = torch.zeros_like(z).requires_grad_(), 0      # a step in this direction, by node

    def nearby(x, sigma, y):
        return TEACHER(x, sigma) + amount * direction(x)

    for share, mean, std in zip(*MIXTURE.values()):
        loss = denoising_loss(mean + std * z, full(0.8), eps, None, adapted=nearby,
                              sigma_data=0.5)
        each = share * weights * gradient(loss, amount)
        assert each.sum().abs() > 0.01                           # zero for no component by itself
        total += each.sum()
    assert abs(total) < 1e-8


@pytest.mark.parametrize("sigma_data", [0.5, 0.3, 1.0])
def test_denoising_and_edm_loss_carry_edms_weight_of_table_1(sigma_data):
    x0, sigma, eps = images()
    expected = ((sigma ** 2 + sigma_data ** 2) / (sigma * sigma_data) ** 2).mean()

    def off_by_one(x_t, sigma, y):
        return x0.detach() + 1

    for loss in (partial(denoising_loss, adapted=off_by_one),
                 partial(edm_loss, teacher=off_by_one)):
        torch.testing.assert_close(loss(x0, sigma, eps, None, sigma_data=sigma_data), expected)
        with pytest.raises(TypeError, match="sigma_data"):      # no network's is guessed
            loss(x0, sigma, eps, None)


def test_denoising_without_the_data_weight_is_the_error_in_epsilon_and_with_one_that_in_v():
    x0, sigma, eps = images()
    x0 = x0.detach()
    alpha, x_t = (1 + sigma ** 2) ** -0.5, x0 + sigma * eps     # alpha x_t keeps the variance
    v, denoised = alpha * (eps - sigma * x0), ADAPTED(x_t, sigma)
    eps_predicted = (x_t - denoised) / sigma
    v_predicted = alpha * (eps_predicted - sigma * denoised)
    loss = partial(denoising_loss, x0, sigma, eps, None, adapted=ADAPTED)
    torch.testing.assert_close(loss(sigma_data=math.inf), (eps_predicted - eps).square().mean())
    torch.testing.assert_close(loss(sigma_data=1.0), (v_predicted - v).square().mean())


# ---- Unforget ----

def test_unforget_is_zero_where_the_student_equals_the_previous_one():
    student, previous = small_network(4).double(), small_network(4).double()
    inputs, y = [80 * normal(2, 1, 8, 8), normal(2, 1, 8, 8, seed=1)], torch.eye(10).double()[:2]
    outputs = denoise_together(student, inputs, (80.0, 2.5), y)
    loss = unforget_loss(outputs, denoise_together(previous, inputs, (80.0, 2.5), y))
    assert loss == 0
    loss.backward()
    assert not gradients(student)


def test_unforget_is_the_sum_over_steps_of_mean_squares_and_its_gradient_skips_the_targets():
    outputs = [normal(2, 1, 2, 2, seed=i).requires_grad_() for i in range(2)]
    targets = [normal(2, 1, 2, 2, seed=i).requires_grad_() for i in range(2, 4)]
    loss = unforget_loss(outputs, targets)
    by_hand = sum(((o - t) ** 2).sum() / 8 for o, t in zip(outputs, targets))
    torch.testing.assert_close(loss, by_hand)
    loss.backward()
    assert all(t.grad is None for t in targets)
    for output, target in zip(outputs, targets):
        torch.testing.assert_close(output.grad, (2 * (output - target) / 8).detach())


def test_a_student_with_one_step_has_nothing_to_forget():
    assert unforget_loss([], []) == 0


# ---- GAN ----

def linear_discriminator(calls):
    """Logit = mean of the image times a number of its class; records what it was called with."""
    def logits(x_t, sigma, y):
        calls.append((x_t, sigma, y))
        scale = 1 if y is None else (y @ column([1.0, -2.0]))[:, None]
        return scale * x_t.mean((1, 2, 3))[:, None]
    return logits


@pytest.mark.parametrize("labels", [None, column([[1, 0], [0, 1], [0, 1]])])
def test_gan_losses_equal_their_closed_forms(labels):
    x0, sigma, eps = images()
    x_real, sigma_real, eps_real = (t.detach() for t in images(seed=7))
    sigma_real = sigma_real * 3
    y_real = None if labels is None else labels.flip(0)
    D = linear_discriminator([])
    fake = torch.sigmoid(D(x0 + sigma * eps, sigma, labels))
    real = torch.sigmoid(D(x_real + sigma_real * eps_real, sigma_real, y_real))
    student = gan_student_loss(x0, sigma, eps, labels, discriminator=D)
    torch.testing.assert_close(student, -fake.log().mean())
    adapted = gan_adapted_loss(x0, x_real, sigma, eps, sigma_real, eps_real, labels, y_real,
                               discriminator=D)
    torch.testing.assert_close(adapted, -real.log().mean() - (1 - fake).log().mean())


def test_the_discriminator_sees_generated_and_real_images_in_one_pass_each_with_its_noise():
    x0, sigma, eps = images()
    x_real, _, eps_real = images(seed=7)
    calls, sigma_real = [], sigma * 3
    gan_adapted_loss(x0, x_real, sigma, eps, sigma_real, eps_real, None, None,
                     discriminator=linear_discriminator(calls))
    (x_t, levels, y), = calls
    assert torch.equal(x_t, torch.cat([x0 + sigma * eps, x_real + sigma_real * eps_real]))
    assert torch.equal(levels, torch.cat([sigma, sigma_real])) and y is None


def test_the_students_gan_gradient_does_not_vanish_where_the_discriminator_is_certain():
    x0, sigma, eps = images()

    def certain(x_t, sigma, y):
        return x_t.mean((1, 2, 3))[:, None] - 40

    grad = gradient(gan_student_loss(x0, sigma, eps, None, discriminator=certain), x0)
    torch.testing.assert_close(grad, -torch.ones_like(grad))     # of -log D; of log(1 - D) it is 0


# ---- Regression ----

def test_regression_is_the_mean_distance_and_pulls_the_student_to_the_teachers_image():
    x_ref, y_ref = normal(4, 1, 2, 2).requires_grad_(), normal(4, 1, 2, 2, seed=1)
    loss = regression_loss(x_ref, y_ref, distance=lambda a, b: (a - 2 * b).square().sum((1, 2, 3)))
    torch.testing.assert_close(loss, (x_ref - 2 * y_ref).square().sum() / 4)
    loss.backward()
    torch.testing.assert_close(x_ref.grad, ((x_ref - 2 * y_ref) / 2).detach())


# ---- Every loss is a mean over batch and pixels ----

LOSSES = {
    "dm": lambda x0, s, e, r: dm_loss(x0, s, e, None, **EXACT),
    "dm-sigma": lambda x0, s, e, r: dm_loss(x0, s, e, None, **EXACT, weighting="sigma"),
    "sid": lambda x0, s, e, r: sid_loss(x0, s, e, None, **EXACT, alpha=1.2),
    "denoising": lambda x0, s, e, r: denoising_loss(
        x0, s, e, None, adapted=ADAPTED, sigma_data=0.5),
    "edm": lambda x0, s, e, r: edm_loss(x0, s, e, None, teacher=TEACHER, sigma_data=0.5),
    "unforget": lambda x0, s, e, r: unforget_loss([x0, 2 * x0], [r, e]),
    "gan-student": lambda x0, s, e, r: gan_student_loss(
        x0, s, e, None, discriminator=linear_discriminator([])),
    "gan-adapted": lambda x0, s, e, r: gan_adapted_loss(
        x0, r, s, e, 2 * s, e, None, None, discriminator=linear_discriminator([])),
    "regression": lambda x0, s, e, r: regression_loss(
        x0, r, distance=lambda a, b: (a - b).abs().mean((1, 2, 3)))}


@pytest.mark.parametrize("name", LOSSES)
def test_tiling_the_pixels_or_repeating_the_batch_leaves_every_loss_unchanged(name):
    x0, sigma, eps = images()
    real = normal(*x0.shape, seed=9)
    once = LOSSES[name](x0, sigma, eps, real)
    tiled = LOSSES[name](x0.repeat(1, 1, 2, 3), sigma, eps.repeat(1, 1, 2, 3),
                         real.repeat(1, 1, 2, 3))
    twice = LOSSES[name](*(t.repeat(2, 1, 1, 1) for t in (x0, sigma, eps, real)))
    assert once != 0
    assert [tiled.item(), twice.item()] == pytest.approx([once.item()] * 2, rel=1e-12)


# ---- Students that reach the known optimum ----

def train_student(parameters, loss, steps, lr):
    optimizer = torch.optim.Adam(parameters, lr=lr, betas=(0.0, 0.99))
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, steps, eta_min=lr / 100)
    for _ in range(steps):
        optimizer.zero_grad()
        loss().backward()
        optimizer.step()
        schedule.step()


def squared_distance(a, b):
    return (a - b).square().mean((1, 2, 3))


def matrix_denoiser(mean, covariance):
    """E[x0 | x_t] for data [B,2,1,1] from a Gaussian in the plane."""
    @edm_denoiser
    def denoise(x_t, sigma, y=None):
        total = covariance + sigma[:, :, 0] ** 2 * torch.eye(2).double()        # [B,2,2]
        centred = x_t[..., 0] - mean[:, None]                                   # [B,2,1]
        return (mean[:, None] + covariance @ torch.linalg.solve(total, centred))[..., None]
    return denoise


@pytest.mark.parametrize("method", ["dm", "sid", "dm with regression"])
def test_a_student_reaches_the_teachers_gaussian_in_the_plane(method):
    mean, root = column([0.5, -1.0]), column([[0.8, 0.3], [0.3, 0.5]])
    teacher = matrix_denoiser(mean, root @ root.T)
    A, b = column([[0.2, 0.1], [-0.2, 0.3]]).requires_grad_(), column([0.0, 0.0]).requires_grad_()
    generator = torch.Generator().manual_seed(0)
    draw = partial(torch.randn, 256, 2, 1, 1, generator=generator, dtype=torch.float64)
    z_ref = draw()
    y_ref = sample_heun(teacher, z_ref, None, steps=60) if "regression" in method else None

    def student(z):
        return torch.einsum("ij,bjhw->bihw", A, z) + b[:, None, None]

    def loss():
        networks = dict(teacher=teacher, adapted=matrix_denoiser(b.detach(), (A @ A.T).detach()))
        sigma = 0.1 * 30 ** torch.rand(256, 1, 1, 1, generator=generator, dtype=torch.float64)
        inputs = student(draw()), sigma, draw(), None
        if method == "sid":
            return sid_loss(*inputs, **networks, alpha=1.2)
        value = dm_loss(*inputs, **networks)
        if y_ref is not None:
            value = value + 0.25 * regression_loss(student(z_ref), y_ref, distance=squared_distance)
        return value

    train_student([A, b], loss, steps=400, lr=0.05)
    torch.testing.assert_close(b.detach(), mean, atol=0.01, rtol=0)
    torch.testing.assert_close((A @ A.T).detach(), root @ root.T, atol=0.01, rtol=0)
    # A Gaussian does not say which noise makes which image; the teacher's pairs do.
    assert ((A - root).abs().max() < 0.01) == (y_ref is not None)


def test_dm_with_an_adapted_network_that_learns_beside_it_reaches_the_teachers_gaussian():
    teacher, sigma = gaussian_denoiser(1.0, 0.5), full(0.7)
    slope = column(0.25 / (0.25 + 0.49)).requires_grad_()               # starts as the teacher
    shift = (1 - slope.detach()).requires_grad_()
    mean, std = column(0.2).requires_grad_(), column(0.1).requires_grad_()
    z, eps = four_corners()

    def adapted(x_t, sigma, y):
        return slope * x_t + shift

    student_opt = torch.optim.SGD([mean, std], lr=0.02)
    adapted_opt = torch.optim.SGD([slope, shift], lr=0.05)
    for step in range(3000):
        x0 = mean + std * z
        if step % 5 == 0:
            dm_loss(x0, sigma, eps, None, teacher=teacher, adapted=adapted).backward()
            student_opt.step()
            student_opt.zero_grad()
        denoising_loss(x0, sigma, eps, None, adapted=adapted, sigma_data=0.5).backward()
        adapted_opt.step()
        adapted_opt.zero_grad()
    assert [mean.item(), std.item()] == pytest.approx([1.0, 0.5], abs=1e-3)


def test_dm_alone_misses_the_far_mode_and_the_regression_term_brings_it_back():
    """DMD Figure 3 (b) and (c): two modes, a student that starts on the right one."""
    teacher = mixture_denoiser([0.5, 0.5], [-2.0, 2.0], [0.4, 0.4])
    fractions = (torch.arange(128).double() + 0.5) / 128
    z = (2 ** 0.5 * torch.erfinv(2 * fractions - 1)).reshape(-1, 1, 1, 1)       # evenly drawn noise
    y_ref = sample_heun(teacher, z, None, steps=60)

    def distilled(regression_weight):
        torch.manual_seed(0)
        student = nn.Sequential(
            nn.Flatten(), nn.Linear(1, 32), nn.Tanh(), nn.Linear(32, 32), nn.Tanh(),
            nn.Linear(32, 1), nn.Unflatten(1, (1, 1, 1))).double()
        nn.init.constant_(student[-2].bias, 2.0)
        start = student(z).detach()
        generator = torch.Generator().manual_seed(0)

        def loss():
            x0 = student(z)
            # The exact denoiser of what the student generates: points of equal weight.
            adapted = mixture_denoiser([1 / 128] * 128, x0.detach().flatten(), [0.0] * 128)
            # Too little noise to bridge the modes; all of the student's points in one image.
            sigma = 0.2 + 0.6 * torch.rand(8, 1, 1, 1, generator=generator, dtype=torch.float64)
            eps = torch.randn(8, 1, 1, 128, generator=generator, dtype=torch.float64)
            line = x0.reshape(1, 1, 1, 128).expand(8, -1, -1, -1)
            value = dm_loss(line, sigma, eps, None, teacher=teacher, adapted=adapted)
            pull = regression_loss(x0, y_ref, distance=squared_distance)
            return value + regression_weight * pull

        train_student(student.parameters(), loss, steps=300, lr=0.01)
        return start, student(z).detach()

    start, alone = distilled(regression_weight=0.0)
    assert start.min() > 0 and alone.min() > 0              # on the right mode, and never off it
    assert [alone.mean(), alone.std()] == pytest.approx([2.0, 0.4], abs=0.1)  # but it matches that
    _, both = distilled(regression_weight=0.25)
    assert (both < 0).double().mean() == pytest.approx(0.5, abs=0.03)
    for half, mean in ((both[both < 0], -2.0), (both[both > 0], 2.0)):
        assert [half.median(), half.std()] == pytest.approx([mean, 0.4], abs=0.15)
    assert (both.abs() < 0.8).double().mean() < 0.1         # few between the modes
