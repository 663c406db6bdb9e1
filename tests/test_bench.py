"""bench.py measures the loop that runs, and its limit is the passes that the loop makes."""

import dataclasses
import json
import math
from collections import Counter
from pathlib import Path

import pytest
import torch

import train
from experiments import bench, bench_sampling
from experiments.bench_files import make_job
from helpers import call
from models import unguided
from presets.datasets import CIFAR10, DATASETS, DIGITS
from training import cost, options, plan, rehearsal
from training.draws import draw, steps_trained
from training.passes import SMALLEST

SMALL = DIGITS.network | {"model_channels": 8}
DEVICE = torch.device("cpu")


@pytest.fixture(autouse=True)
def small(monkeypatch):
    monkeypatch.setitem(DATASETS, "digits", DIGITS._replace(network=SMALL))


def stage_of(*argv):
    return options.parse(["--batch", "4", *argv])[0]


def job(folder, *argv):
    return make_job(folder, 0, stage_of(*argv), DEVICE)


def watch(loop):
    """Counts images through each network of a loop, by role, gradient and output."""
    seen, distance = Counter(), loop.roles.distance

    def note(role):
        def hook(network, args, kwargs, out):
            gradient = "none"
            if torch.is_grad_enabled():
                trained = any(p.requires_grad for p in network.parameters())
                gradient = "weights" if trained else "input"
                assert out.requires_grad
            seen[role, gradient, kwargs.get("output", "denoised")] += len(args[0])
        return hook

    def noted(x, y):
        seen["distance", "input" if x.requires_grad else "none", "denoised"] += len(x)
        return distance(x, y)

    for role in ("teacher", "previous", "student", "adapted", "ema"):
        if network := unguided(getattr(loop.roles, role)):
            network.register_forward_hook(note(role), with_kwargs=True)
    loop.roles.distance = noted
    return seen


RUNS = [("--stage", "1"), ("--stage", "2"), ("--stage", "3"),
        ("--stage", "1", "--loss", "dm"), ("--stage", "2", "--loss", "dm"),
        ("--stage", "3", "--loss", "dm"), ("--stage", "3", "--no-external-sampling"),
        ("--stage", "2", "--unforget-weight", "0", "--no-external-sampling"),
        ("--method", "sid"), ("--method", "dmd"), ("--method", "dmd2", "--loss", "none"),
        ("--method", "dmd2", "--stage", "2", "--ttur", "1"),
        ("--stage", "3", "--batch-per-gpu", "2"), ("--stage", "1", "--guidance", "2"),
        ("--stage", "0")]


@pytest.mark.parametrize("argv", RUNS, ids=" ".join)
def test_the_limit_has_exactly_the_passes_that_the_loop_makes(argv, tmp_path):
    here = job(tmp_path, *argv)
    rounds = 8 if here.config.trained_step == "random" else 1       # until both steps were drawn
    iterations = rounds * here.config.ttur
    config = dataclasses.replace(here.config, iterations=iterations)
    loop = bench.Loop(here, iterations)
    limit, seen = bench.Limit(loop), watch(loop)
    for step in range(iterations):
        loop.run(step)
    in_the_loop = Counter(seen)
    seen.clear()
    for step in range(iterations):
        limit.run(step)
    loop.log.bar.close()
    assert seen == in_the_loop and len(seen) >= (1 if config.stage == 0 else 3)

    planned, kinds = Counter(), Counter(
        (steps_trained(config, step), step % config.ttur == 0) for step in range(iterations))
    for kind, times in kinds.items():
        for one in limit.passes[kind]:
            planned[one.role, one.gradient, one.output] += one.batches * config.batch * times
    assert planned == in_the_loop

    iterate, steps = train.iteration_of(config), {step for step, _ in kinds}
    if len(steps) == 1 and config.stage:                    # of a random step only an average
        totals = cost.totals(config, cost.count(iterate, config, SMALLEST))
        denoised = {key: images for key, images in in_the_loop.items()
                    if key[0] != "distance" and key[2] == "denoised"}
        assert totals["images forward through a network"] == sum(denoised.values())
        assert totals["images backward through a network"] == sum(
            images for (_, gradient, _), images in denoised.items() if gradient != "none")
        if config.gan_weight:
            assert totals["images through the discriminator and back"] == sum(
                images for (*_, output), images in in_the_loop.items() if output == "logits")


def test_the_limit_asks_for_the_gradients_that_the_loop_needs(tmp_path, monkeypatch):
    loop = bench.Loop(job(tmp_path, "--method", "dmd2", "--batch-per-gpu", "2"), 1)
    limit, asked, real = bench.Limit(loop), Counter(), torch.autograd.grad

    def grad(out, into, *args, **kwargs):
        asked["input" if isinstance(into, torch.Tensor) else "weights"] += 1
        return real(out, into, *args, **kwargs)

    monkeypatch.setattr(torch.autograd, "grad", grad)
    seconds = limit.run(0)
    loop.log.bar.close()
    (passes,) = limit.passes.values()
    assert asked == Counter(one.gradient for one in passes * 2 if one.gradient != "none")  # 2 parts
    assert seconds.keys() == {"student update", "adapted update"} and min(seconds.values()) > 0
    assert all(p.requires_grad for p in loop.roles.adapted.parameters())    # as the loop needs it


def test_the_totals_of_a_random_step_are_those_of_every_step_alike():
    config = stage_of("--method", "dmd2", "--stage", "2", "--loss", "none", "--ttur", "1",
                      "--iterations", "100").config
    counted = cost.count(train.iteration, config, SMALL)
    assert len(list(cost.kinds(config))) == 2
    # Rolling out one step for half of them; generating; the adapted network's update.
    assert cost.totals(config, counted)["images forward through a network"] == 400 * (0.5 + 1 + 1)


@pytest.mark.parametrize("argv", [("--stage", "2", "--loss", "dm"), ("--method", "dmd2"),
                                  ("--stage", "0")], ids=" ".join)
def test_a_whole_measurement_has_every_figure(argv, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(bench_sampling, "LONG_ENOUGH", 0.1)
    code = call(monkeypatch, bench, *argv, "--batch", "4", "--repeats", "2", "--warm-up", "1",
                "--what", "train", "sampling", "scoring", "--peak-tflops", "1", "--json",
                tmp_path / "out.json")
    figures = json.loads((tmp_path / "out.json").read_text())["runs"][0]
    training, scoring = figures["training"], figures["scoring"]
    assert code == 0 and 0 < training["loop_efficiency"]["median"] < 2
    shares = training["share_of_time"]
    assert math.isclose(sum(shares.values()), 1, abs_tol=1e-9)
    assert shares["student update"] > 0
    assert training["images_a_second"] > 0 and training["flop_utilisation"] > 0
    assert all(figures["sampling"][f"{n} step{'s' * (n > 1)}"]["images_a_second"] > 0
               for n in (1, 2, 3))
    assert scoring["features_a_second"] > 0 and scoring["share_of_training"] > 0
    assert "loop efficiency" in capsys.readouterr().out


def test_every_cycle_has_its_time_and_the_parts_of_its_limit(tmp_path):
    figures = bench.training(job(tmp_path, "--stage", "2"), repeats=3, cycle=2, warm_up=1,
                             peak_tflops=0)
    assert figures["repeats"] == 3 and figures["iterations_of_a_repeat"] == 2
    spread = figures["seconds_of_an_iteration"]
    assert 0 < spread["least"] <= spread["median"] <= spread["most"]
    assert figures["images_a_second"] == pytest.approx(4 / spread["median"])
    assert {name for name, share in figures["share_of_time"].items() if share > 0} >= {
        "roll-out", "student update", "adapted update"}
    efficiency = figures["loop_efficiency"]
    assert 0 < efficiency["least"] <= efficiency["median"] <= efficiency["most"]
    assert math.isclose(sum(figures["share_of_time"].values()), 1, abs_tol=1e-9)
    assert figures["passes_limit_seconds"] > 0
    assert figures["flop_utilisation"] is None and figures["teraflops_a_second"] > 0


@pytest.mark.parametrize("argv", [("--stage", "3"), ("--stage", "1", "--loss", "dm"),
                                  ("--method", "dmd2"), ("--batch-per-gpu", "16"),
                                  ("--stage", "0")], ids=" ".join)
def test_the_plan_is_the_memory_that_the_loops_tensors_take(argv, tmp_path):
    stage = options.parse(["--batch", "64", *argv])[0]
    here = make_job(tmp_path, 0, stage, DEVICE)
    with plan.LiveBytes() as live:
        loop = bench.Loop(here, 2)
        for step in (0, here.config.ttur):                  # the student's turn, which needs most
            loop.run(step)
    loop.log.bar.close()
    planned = sum(plan.memory(loop.iterate, here.config, SMALL,
                              here.options.batch_per_gpu).values())
    assert 1 / 1.1 < live.peak / planned < 1.1


def test_memory_is_measured_in_a_process_of_its_own(tmp_path):
    figures = bench.memory(job(tmp_path, "--stage", "2", "--batch", "64"))
    tensors, process = figures["tensors"], figures["process"]
    assert 1 / 1.1 < tensors["against_plan"] < 1.1 and 1 / 1.2 < process["against_plan"] < 1.1
    assert process["mib"] > tensors["mib"] > 5


def test_several_processes_keep_gradients_in_their_buckets():
    config = stage_of("--stage", "1", "--batch", "64").config
    alone, two = (plan.memory(train.iteration, config, SMALL, 8, world_size=world_size)
                  for world_size in (1, 2))
    assert two["gradients"] == two["trained weights"] == 2 * alone["gradients"]
    assert {k: v for k, v in two.items() if k not in ("gradients", plan.ACTIVATIONS)} == {
        k: v for k, v in alone.items() if k not in ("gradients", plan.ACTIVATIONS)}
    assert two[plan.ACTIVATIONS] == pytest.approx(alone[plan.ACTIVATIONS], rel=0.1)


def test_a_dry_run_says_what_the_whole_process_will_take(monkeypatch, capsys):
    def said(*argv):
        assert call(monkeypatch, train, "--stage", "1", "--dry-run", *argv) == 0
        *_, tensors, whole = capsys.readouterr().out.splitlines()
        return [int(line.split()[-2].replace(",", "")) for line in (tensors, whole)]

    small, large = said("--batch", "64"), said("--batch", "256")
    assert large[0] - small[0] > 50             # MiB
    assert math.isclose(large[1] - small[1], (1 + plan.HOLES) * (large[0] - small[0]), abs_tol=20)
    assert small[1] - (1 + plan.HOLES) * small[0] > 100
    monkeypatch.setattr(plan, "STATUS", Path("/nowhere"))       # a system that does not say
    assert call(monkeypatch, train, "--stage", "1", "--dry-run") == 0
    assert "whole process" not in capsys.readouterr().out


@pytest.mark.parametrize("argv", [(), ("--stage", "3"), ("--method", "dmd2"), ("--method", "dmd"),
                                  ("--method", "dmd2", "--loss", "none")], ids=" ".join)
def test_the_plan_draws_what_an_iteration_draws(argv, tmp_path):
    here = job(tmp_path, *argv)
    loop = bench.Loop(here, 1)
    loop.log.bar.close()
    rehearsed = rehearsal.Rehearsal(loop.iterate, here.config, SMALL)
    parts = [draw(here.config, 0, sources, here.options)
             for sources in (loop.sources, rehearsed.sources)]
    shapes = [{name: (tuple(x.shape), x.dtype) for name, x in vars(part).items()
               if torch.is_tensor(x) and not name.endswith("index")} for (part,) in parts]
    assert shapes[0] == shapes[1] and len(shapes[0]) >= 6


def test_bf16_halves_the_activations_and_no_weight():
    config = options.parse(["--dataset", "cifar10", "--stage", "1"])[0].config
    shallow = CIFAR10.network | {"num_blocks": 1}
    full, half = (plan.memory(train.iteration, config, shallow, 256, precision=precision)
                  for precision in ("fp32", "bf16"))
    assert 0.45 < half[plan.ACTIVATIONS] / full[plan.ACTIVATIONS] < 0.7
    assert {k: v for k, v in half.items() if k != plan.ACTIVATIONS} == {
        k: v for k, v in full.items() if k != plan.ACTIVATIONS}


def test_a_backward_pass_into_weights_costs_two_forward_passes_and_into_images_one():
    def flops(*argv):
        config = stage_of(*argv, "--iterations", "100").config
        counted = cost.count(train.iteration, config, SMALL)
        return counted.flops / cost.forward_flops(SMALL) / 100, counted.passes

    forwards, passes = flops("--stage", "1", "--loss", "dm", "--ttur", "1")
    by_hand = sum({"none": 1, "input": 2, "weights": 3}[one.gradient] * times * one.batches
                  for one, times in passes.items()) / 100
    assert by_hand == 3 + 1 + 1 + 3                 # student; teacher, adapted asked; adapted
    assert forwards == pytest.approx(by_hand, rel=0.05)
    through, passes = flops("--stage", "1", "--loss", "sid", "--ttur", "1")
    assert {one.gradient for one in passes if one.role == "teacher"} == {"input"}
    assert through - forwards == pytest.approx(2, rel=0.05)     # into images, of both denoisers


@pytest.mark.parametrize("argv, said", [
    (("--iterations", "3"), "multiples of --ttur"), (("--repeats", "0"), "--repeats is 0"),
    (("--peak-tflops", "-1"), "--peak-tflops"), (("--json", "/none/x.json"), "no file can be"),
    (("--width", "3"), "--width 3"), (("--nothing",), "--nothing"), (("--stage", "9"), "--stage"),
    (("--dry-run",), "train.py --dry-run"), (("--json", "/"), "--json /"),
    (("--dataset", "emoji", "--stage", "1"), "not text to image")])
def test_a_mistake_ends_with_two_and_one_line(argv, said, monkeypatch, capsys):
    assert call(monkeypatch, bench, *argv) == 2
    error = capsys.readouterr().err
    assert error.count("\n") == 1 and said in error
