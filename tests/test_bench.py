"""bench.py measures the loop that runs, and its limit is the passes that the loop makes."""

import dataclasses
import json
import math
from collections import Counter
from pathlib import Path

import pytest
import torch

from experiments import bench
from training import options
from training import cost
import train
from helpers import call
from presets import CIFAR10_NETWORK, DIGITS_NETWORK, NETWORKS

SMALL = DIGITS_NETWORK | {"model_channels": 8}
DEVICE = torch.device("cpu")


@pytest.fixture(autouse=True)
def small(monkeypatch):
    monkeypatch.setitem(NETWORKS, "digits", SMALL)


def row(*argv):
    return options.parse(["--batch", "4", *argv])[0]


def job(folder, *argv):
    preset, config, how = row(*argv)
    return bench.make_job(folder, 0, preset, config, how, DEVICE)


def seen_in_the_loop(job, iterations):
    """Images through each network of the real loop, by role and by whether there was a gradient."""
    watch = bench.Watch(job, repeats=1, cycle=iterations, warm_up=iterations, limit=False)
    watch.iterations, seen, load = iterations, Counter(), watch.keep

    def keep(function, name):
        def hooked(*args):
            made = load(function, name)(*args)
            for role, network in vars(made).items() if name == "roles" else ():
                if isinstance(network, torch.nn.Module):
                    network.register_forward_hook(note(role), with_kwargs=True)
            return made
        return hooked

    def note(role):
        def hook(network, args, kwargs, out):
            gradient = "none"
            if torch.is_grad_enabled():
                trained = any(p.requires_grad for p in network.parameters())
                gradient = "weights" if trained else "input"
                assert out.requires_grad
            seen[role, gradient, kwargs.get("output", "denoised")] += len(args[0])
        return hook

    def begin(real=watch.begin):
        if watch.step == 0:
            seen.clear()                                # what came before the loop: DMD's pairs
        real()

    watch.keep, watch.begin = keep, begin
    watch.run()
    return seen


RUNS = [("--stage", "1"), ("--stage", "2"), ("--stage", "3"),
        ("--stage", "1", "--loss", "dm"), ("--stage", "2", "--loss", "dm"),
        ("--stage", "3", "--loss", "dm"), ("--stage", "3", "--no-external-sampling"),
        ("--method", "sid"), ("--method", "dmd"),
        ("--method", "dmd2", "--stage", "2", "--ttur", "1"),
        ("--stage", "3", "--batch-per-gpu", "2")]


@pytest.mark.parametrize("argv", RUNS, ids=" ".join)
def test_the_limit_has_exactly_the_passes_that_the_loop_makes(argv, tmp_path):
    here = job(tmp_path, *argv)
    config = here.config
    rounds = 8 if config.trained_step == "random" else 1        # until both steps were drawn
    iterations = rounds * config.ttur
    seen, wanted = seen_in_the_loop(here, iterations), Counter()
    steps = drawn_steps(config, iterations)
    for step, n in enumerate(steps):
        for one in cost.iteration_passes(config, n, step % config.ttur == 0):
            if one.role != "distance":
                wanted[one.role, one.gradient, one.output] += one.batches * config.batch
    assert seen == wanted
    if len(set(steps)) == 1:
        figures = cost.passes(dataclasses.replace(config, iterations=iterations))
        assert figures["images forward through a network"] == sum(
            images for (_, _, output), images in seen.items() if output == "denoised")
        assert figures["images backward through a network"] == sum(
            images for (_, gradient, output), images in seen.items()
            if output == "denoised" and gradient != "none")


def drawn_steps(config, iterations):
    network = type("shape", (), {"image_shape": (1, 8, 8), "label_dim": 10})
    config = dataclasses.replace(config, iterations=iterations)
    return [train.draw_iteration(config, step, network, DEVICE, None, None)[0]
            for step in range(iterations)]


@pytest.mark.parametrize("argv", [("--stage", "2", "--loss", "dm"), ("--method", "dmd2"),
                                  ("--stage", "0")], ids=" ".join)
def test_a_whole_measurement_has_every_figure(argv, tmp_path, monkeypatch, capsys):
    code = call(monkeypatch, bench, *argv, "--batch", "4", "--repeats", "2", "--warm-up", "1",
                "--what", "train", "sampling", "scoring", "--peak-tflops", "1", "--json",
                tmp_path / "out.json")
    figures = json.loads((tmp_path / "out.json").read_text())["runs"][0]
    training, scoring = figures["training"], figures["scoring"]
    assert code == 0 and 0 < training["loop_efficiency"]["median"] < 2
    shares = [training["share_of_time"][name] for name in bench.SPLIT]
    assert math.isclose(sum(shares), 1, abs_tol=0.2) and shares[1] > 0
    assert training["images_a_second"] > 0 and training["flop_utilisation"] > 0
    assert all(figures["sampling"][f"{n} step{'s' * (n > 1)}"]["images_a_second"] > 0
               for n in (1, 2, 3))
    assert scoring["features_a_second"] > 0 and scoring["share_of_training"] > 0
    assert "loop efficiency" in capsys.readouterr().out


def test_the_limit_grows_with_the_loop_and_parts_sum_to_it(tmp_path):
    cycles = bench.Watch(job(tmp_path, "--stage", "2"), repeats=2, cycle=2).run()
    assert len(cycles) == 2
    for cycle in cycles:
        assert math.isclose(sum(cycle.get(name, 0) for name in bench.SPLIT), cycle["loop"],
                            rel_tol=1e-3)
        assert cycle["limit"] > 0


@pytest.mark.parametrize("argv", [("--stage", "3"), ("--stage", "1", "--loss", "dm"),
                                  ("--method", "dmd2"), ("--batch-per-gpu", "16"),
                                  ("--stage", "0")], ids=" ".join)
def test_the_plan_is_the_memory_that_the_loops_tensors_take(argv, tmp_path):
    preset, config, how = options.parse(["--batch", "64", *argv])[0]
    here = bench.make_job(tmp_path, 0, preset, dataclasses.replace(config, ttur=1), how, DEVICE)
    with cost.LiveBytes() as live:
        bench.Watch(here, repeats=1, cycle=1, warm_up=1, limit=False).run()
    planned = sum(cost.memory(here.config, SMALL, how.batch_per_gpu).values())
    assert 1 / 1.1 < live.peak / planned < 1.1


def test_memory_is_measured_in_a_process_of_its_own(tmp_path):
    figures = bench.memory(job(tmp_path, "--stage", "2", "--batch", "64"))
    tensors, process = figures["tensors"], figures["process"]
    assert 1 / 1.1 < tensors["against_plan"] < 1.1 and 1 / 1.2 < process["against_plan"] < 1.1
    assert process["mib"] > tensors["mib"] > 5


def test_a_dry_run_says_what_the_whole_process_will_take(monkeypatch, capsys):
    def said(*argv):
        assert call(monkeypatch, train, "--stage", "1", "--dry-run", *argv) == 0
        *_, tensors, whole = capsys.readouterr().out.splitlines()
        return [int(line.split()[-2].replace(",", "")) for line in (tensors, whole)]

    small, large = said("--batch", "64"), said("--batch", "256")
    assert large[0] - small[0] > 50             # MiB
    assert math.isclose(large[1] - small[1], (1 + cost.HOLES) * (large[0] - small[0]), abs_tol=20)
    assert small[1] - (1 + cost.HOLES) * small[0] > 100
    monkeypatch.setattr(cost, "STATUS", Path("/nowhere"))       # a system that does not say
    assert call(monkeypatch, train, "--stage", "1", "--dry-run") == 0
    assert "whole process" not in capsys.readouterr().out


@pytest.mark.parametrize("argv", [(), ("--stage", "3"), ("--method", "dmd2"),
                                  ("--method", "dmd2", "--loss", "none")], ids=" ".join)
def test_the_plan_draws_as_much_noise_as_an_iteration(argv):
    config = row(*argv)[1]
    network = type("shape", (), {"image_shape": (1, 8, 8), "label_dim": 10})
    _, drawn = train.draw_iteration(config, 0, network, DEVICE, [0] if config.gan_weight else None,
                                    None)
    whole = cost.draws(config, SMALL, config.batch)[0]
    made = [drawn[name] for name in drawn if name.startswith(("z", "eps", "noises"))]
    assert sum(x.numel() for x in made) == sum(x.numel() for x in whole)


def test_bf16_halves_the_activations_and_no_weight():
    preset, config, _ = options.parse(["--dataset", "cifar10", "--stage", "1"])[0]
    full, half = (cost.memory(config, CIFAR10_NETWORK, 256, precision=p) for p in ("fp32", "bf16"))
    name = "activations and noise beside them"
    assert 0.45 < half[name] / full[name] < 0.7
    assert {k: v for k, v in half.items() if k != name} == {
        k: v for k, v in full.items() if k != name}


def test_flops_of_a_pass_and_its_gradients():
    forward, through, weights = (cost.flops(SMALL, cost.Pass("student", 1, gradient))
                                 for gradient in ("none", "input", "weights"))
    assert 1.9 < through / forward < 2.1 and 2.9 < weights / forward < 3.05
    assert cost.flops(SMALL, cost.Pass("student", 3)) == 3 * forward


@pytest.mark.parametrize("argv, said", [
    (("--iterations", "3"), "multiples of --ttur"), (("--repeats", "0"), "--repeats is 0"),
    (("--peak-tflops", "-1"), "--peak-tflops"), (("--json", "/none/x.json"), "no file can be"),
    (("--width", "3"), "--width 3"), (("--nothing",), "--nothing"), (("--stage", "9"), "--stage"),
    (("--dry-run",), "train.py --dry-run"), (("--json", "/"), "--json /")])
def test_a_mistake_ends_with_two_and_one_line(argv, said, monkeypatch, capsys):
    assert call(monkeypatch, bench, *argv) == 2
    error = capsys.readouterr().err
    assert error.count("\n") == 1 and said in error
