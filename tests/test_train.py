"""The loop: resumable to the bit, independent of processes and parts, and what may stop it."""

import ast
import copy
import dataclasses
import gc
import json
import multiprocessing
import os
import signal
import subprocess
import sys
import textwrap
import threading
import time
from functools import partial
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from PIL import Image

import evaluate
import models
from presets import datasets, rows
import train
from base.errors import RunFailed, UserError
from edm_networks import EDMPrecond
from helpers import in_ranks
from images import real
from images.pictures import draw_curves
from losses import denoising_loss, dm_loss, edm_loss, gan_adapted_loss
from models import denoise_together, level, roll_out
from training import log, run_folder
from training.draws import Sources, draw
from training.kept import Rows
from training.options import parse
from training.passes import Passes
from training.roles import Before, Roles, assemble, load_roles, place, trainable
from weights import checkpoint

CPU = torch.device("cpu")
ROOT = Path(__file__).resolve().parents[1]
NETWORK = dict(img_resolution=8, img_channels=1, label_dim=10, model_type="SongUNet",
               model_channels=8, channel_mult=[1, 2], num_blocks=1, attn_resolutions=[4],
               dropout=0.1)
ROLES = ("student", "adapted", "ema", "head", "optimizers")


@pytest.fixture(scope="module")
def teacher(tmp_path_factory):
    return save_teacher(tmp_path_factory.mktemp("teacher"))


def save_teacher(folder, **changes):
    """A small network with weights that matter, as stage 0 would leave it."""
    torch.manual_seed(1)
    network = EDMPrecond(**NETWORK | changes)
    for parameter in network.parameters():
        torch.nn.init.normal_(parameter, std=0.1)
    path = folder / "teacher.pt"
    checkpoint.save(path, {"dataset": "digits", "method": "pmdd", "stage": 0, "sigmas": [],
                           "network": network.config, "iteration": 0, "fid": {},
                           "ema": network.state_dict()})
    return path


def flags(teacher, folder, *more, iterations=7, batch=8):
    return ["--teacher", str(teacher), "--folder", str(folder), "--batch", str(batch),
            "--iterations", str(iterations), "--evaluate-images", "12", "--evaluate-every", "4",
            "--save-every", "2", "--final-rate", "1", "--regression-pairs", "20",
            "--regression-steps", "3", "--ttur", "3", "--learning-rate", "1e-3", *more]


def tensors(value, name=""):
    if isinstance(value, torch.Tensor):
        yield name, value
    elif isinstance(value, dict):
        for key, item in value.items():
            yield from tensors(item, f"{name}.{key}")
    elif isinstance(value, (list, tuple)):
        for index, item in enumerate(value):
            yield from tensors(item, f"{name}.{index}")


def state(folder, stage=1):
    saved = checkpoint.load(Path(folder) / f"stage{stage}" / "latest.pt")
    return dict(tensors({role: saved[role] for role in ROLES if role in saved}))


def relative_difference(a, b):
    """Of each role by itself, the largest."""
    assert a.keys() == b.keys()
    worst = 0.0
    for role in ROLES:
        names = [n for n in a if n.startswith("." + role)]
        if names:
            off = sum((a[n].double() - b[n].double()).square().sum() for n in names).sqrt()
            size = sum(b[n].double().square().sum() for n in names).sqrt()
            worst = max(worst, (off / size).item())
    return worst


def run_python(code, *argv, check=True, env=None):
    script = argv if code is None else ["-c", textwrap.dedent(code), *argv]
    command = [sys.executable, *map(str, script)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=240, cwd=ROOT,
                          env=os.environ | {"OMP_NUM_THREADS": "1"} | (env or {}))
    assert not check or done.returncode == 0, done.stdout + done.stderr
    return done


METHODS = {"pmdd": ["--stage", "1"], "dmd": ["--method", "dmd"], "dmd2": ["--method", "dmd2"],
           "sid": ["--method", "sid"], "dmd2 in three steps": ["--method", "dmd2", "--stage", "3"]}


# ---- Exact resume ----

def exit_code_of_one_killed(at, which, argv):
    """The exit code of train.main(argv) in a fork of this process, which kills itself in an update
    of iteration `at`."""
    now, real_draw, real_update = [], train.draw, train.update

    def draw(config, step, *more):
        now.append(step)
        return real_draw(config, step, *more)

    def update(optimizer, losses, name, *more):
        if now[-1] == at and name == which:
            os.kill(os.getpid(), signal.SIGKILL)
        return real_update(optimizer, losses, name, *more)

    def run():
        train.draw, train.update = draw, update
        train.main(argv)

    process = multiprocessing.get_context("fork").Process(target=run, daemon=True)
    process.start()
    process.join(240)
    return process.exitcode


@pytest.mark.parametrize("more, stage, kills", [
    (["--stage", "1"], 1, [(0, "adapted_gradient"), (3, "student_gradient"),
                           (6, "adapted_gradient")]),
    (["--stage", "2"], 2, [(1, "adapted_gradient"), (5, "adapted_gradient")]),
    (["--method", "dmd2", "--regression-weight", "0.25"], 1,
     [(2, "adapted_gradient"), (3, "adapted_gradient")]),
])
def test_a_run_killed_at_any_iteration_ends_bit_for_bit_like_one_never_killed(
        teacher, tmp_path, more, stage, kills):
    for folder in ("whole", "killed"):
        if stage == 2:
            train.main(flags(teacher, tmp_path / folder, "--stage", "1", iterations=2))
    train.main(flags(teacher, tmp_path / "whole", *more))
    for at, which in kills:
        argv = flags(teacher, tmp_path / "killed", *more)
        assert exit_code_of_one_killed(at, which, argv) == -signal.SIGKILL
    train.main(flags(teacher, tmp_path / "killed", *more))
    whole, killed = state(tmp_path / "whole", stage), state(tmp_path / "killed", stage)
    assert whole.keys() == killed.keys()
    assert all(torch.equal(whole[name], killed[name]) for name in whole)
    lines = [[{k: v for k, v in line.items() if k not in run_folder.CLOCKED}
              for line in run_folder.read_metrics(tmp_path / f / f"stage{stage}" / "metrics.jsonl")]
             for f in ("whole", "killed")]
    assert lines[0] == lines[1]


def test_a_finished_run_started_again_changes_nothing(teacher, tmp_path):
    train.main(flags(teacher, tmp_path, "--stage", "1"))
    before = state(tmp_path)
    train.main(flags(teacher, tmp_path, "--stage", "1"))
    after = state(tmp_path)
    assert all(torch.equal(before[name], after[name]) for name in before)


def test_a_terminated_run_saves_says_so_and_goes_on(teacher, tmp_path):
    code = """
    import os, signal, sys
    import train
    real = train.draw
    def draw(config, step, *more):
        if step == 3:
            os.kill(os.getpid(), signal.SIGTERM)
        return real(config, step, *more)
    train.draw = draw
    train.run(lambda: train.main(sys.argv[1:]))
    """                                                 # iteration 4 is one to evaluate: not now
    done = run_python(code, *flags(teacher, tmp_path / "stopped"), "--stage", "1", check=False)
    assert done.returncode == 3 and "saved after 4 iterations" in done.stdout
    assert checkpoint.load(tmp_path / "stopped" / "stage1" / "latest.pt")["iteration"] == 4
    train.main(flags(teacher, tmp_path / "stopped", "--stage", "1"))
    train.main(flags(teacher, tmp_path / "whole", "--stage", "1"))
    stopped, whole = state(tmp_path / "stopped"), state(tmp_path / "whole")
    assert all(torch.equal(whole[name], stopped[name]) for name in whole)
    figures = [{(line["iteration"], line.get("digits-FID@1"))
                for line in run_folder.read_metrics(tmp_path / name / "stage1" / "metrics.jsonl")}
               for name in ("stopped", "whole")]
    assert figures[0] == figures[1]                     # evaluated when the run went on
    assert (checkpoint.load(tmp_path / "stopped" / "stage1" / "best.pt")["iteration"]
            == checkpoint.load(tmp_path / "whole" / "stage1" / "best.pt")["iteration"])


def test_a_signal_that_reaches_one_process_stops_all_of_them(teacher, tmp_path, monkeypatch):
    real = train.draw

    def told(config, step, *more):
        if step == 3 and os.environ.get("RANK") == "1":
            os.kill(os.getpid(), signal.SIGTERM)
        return real(config, step, *more)

    stopped, whole = (flags(teacher, tmp_path / name, "--stage", "1")
                      for name in ("stopped", "whole"))
    with monkeypatch.context() as patched:
        patched.setattr(train, "draw", told)
        in_ranks(2, train, *stopped, cwd=ROOT, code=3)
    assert checkpoint.load(tmp_path / "stopped" / "stage1" / "latest.pt")["iteration"] == 4
    for argv in (stopped, whole):
        in_ranks(2, train, *argv, cwd=ROOT)
    one, other = state(tmp_path / "stopped"), state(tmp_path / "whole")
    assert all(torch.equal(one[name], other[name]) for name in other)


def test_processes_that_see_other_checkpoints_do_not_begin(teacher, tmp_path, monkeypatch, capfd):
    whole = flags(teacher, tmp_path, "--stage", "1")
    in_ranks(2, train, *whole, cwd=ROOT)
    before = (tmp_path / "stage1" / "latest.pt").read_bytes()
    real = checkpoint.load_latest
    monkeypatch.setattr(checkpoint, "load_latest", lambda *args, **more: (
        None if os.environ["RANK"] == "1" else real(*args, **more)))
    _, second = in_ranks(2, train, *flags(teacher, tmp_path, "--stage", "1", "--force",
                                          iterations=9), cwd=ROOT, code=None)
    assert second == 2
    assert "for process 1 than for the first one (None, 7)" in capfd.readouterr().err
    assert (tmp_path / "stage1" / "latest.pt").read_bytes() == before


def test_an_average_that_waits_on_the_host_is_put_there_whole():
    class Network(torch.nn.Linear):
        def to(self, device):
            where[self.in_features] = device

    where, roles = {}, SimpleNamespace(teacher=None, previous=None, adapted=None,
                                       student=Network(1, 1), ema=Network(2, 1))
    place(roles, SimpleNamespace(shard=False, recompute=False, ema_on_host=True, compile=False),
          "device")
    assert where == {1: "device", 2: "cpu"}


def test_a_signal_between_two_stages_is_not_lost(teacher, tmp_path):
    code = """
    import os, signal, sys
    import train
    real = train.load_roles
    def load(config, *more):
        if config.stage == 2:
            os.kill(os.getpid(), signal.SIGTERM)
        return real(config, *more)
    train.load_roles = load
    train.run(lambda: train.main(sys.argv[1:]))
    """
    done = run_python(code, *flags(teacher, tmp_path, iterations=2), check=False)
    assert done.returncode == 3 and (tmp_path / "stage2" / "latest.pt").exists()
    assert not (tmp_path / "stage3").exists()


@pytest.fixture
def signals():
    """The handlers as they were, whatever a test does to them."""
    numbers = (signal.SIGHUP, signal.SIGTERM, signal.SIGINT, signal.SIGUSR1)
    before = {number: signal.getsignal(number) for number in numbers}
    yield before
    for number, handler in before.items():
        signal.signal(number, handler)


def test_a_closed_terminal_stops_a_run_unless_nohup_has_it_ignored(signals):
    signal.signal(signal.SIGHUP, signal.SIG_IGN)
    log.StopSignal()
    assert signal.getsignal(signal.SIGHUP) == signal.SIG_IGN
    signal.signal(signal.SIGHUP, signal.SIG_DFL)
    stop = log.StopSignal()
    os.kill(os.getpid(), signal.SIGHUP)
    assert stop.received == "SIGHUP"


@pytest.mark.parametrize("name", ["SIGTERM", "SIGINT", "SIGUSR1"])
def test_a_signal_is_noted_until_the_handlers_are_given_back(signals, name):
    stop = log.StopSignal()
    os.kill(os.getpid(), signal.Signals[name])
    assert stop.received == name
    stop.restore()
    assert {number: signal.getsignal(number) for number in signals} == signals


def test_a_run_gives_the_signal_handlers_back_and_takes_none_in_a_thread(
        teacher, tmp_path, signals):
    run = flags(teacher, tmp_path, "--stage", "1", iterations=1)
    train.main(run)
    assert {number: signal.getsignal(number) for number in signals} == signals
    with pytest.raises(UserError):
        train.main(flags("nowhere.pt", tmp_path / "none", "--stage", "1"))
    assert {number: signal.getsignal(number) for number in signals} == signals
    codes = []
    worker = threading.Thread(target=lambda: codes.append(train.main(run)))
    worker.start()
    worker.join()
    assert codes == [0]


def test_weights_that_do_not_fit_are_refused_in_one_line(teacher, tmp_path):
    run = flags(teacher, tmp_path, "--stage", "1", iterations=2)
    train.main(run)
    latest = tmp_path / "stage1" / "latest.pt"
    saved = checkpoint.load(latest)
    for name, wrong in (("adapted", {"nothing": torch.zeros(2)}), ("optimizers", [])):
        checkpoint.save(latest, saved | {name: wrong})
        with pytest.raises(UserError, match="weights do not fit"):
            train.main(run)


def test_a_run_resumes_only_from_what_it_was_begun_with(teacher, tmp_path):
    run = flags(teacher, tmp_path, "--stage", "2", iterations=2)
    train.main(flags(teacher, tmp_path, "--stage", "1", iterations=2))
    train.main(run)
    best = tmp_path / "stage1" / "best.pt"
    saved = checkpoint.load(best)
    checkpoint.save(best, saved)                        # other bytes, the same weights
    train.main(run)
    next(iter(saved["ema"].values())).add_(1)
    checkpoint.save(best, saved)
    with pytest.raises(UserError, match="starts from holds other weights .* --force"):
        train.main(run)
    train.main([*run, "--force"])


# ---- Processes and parts ----

@pytest.mark.parametrize("more, stage", [(["--stage", "2"], 2), (["--method", "dmd2"], 1)])
def test_two_processes_or_four_parts_end_where_one_process_does(teacher, tmp_path, more, stage):
    for name in ("one", "two", "four"):
        if stage == 2:
            train.main(flags(teacher, tmp_path / name, "--stage", "1", iterations=1))
    train.main(flags(teacher, tmp_path / "one", *more, iterations=20))
    train.main(flags(teacher, tmp_path / "four", *more, "--batch-per-gpu", "2", iterations=20))
    in_ranks(2, train, *flags(teacher, tmp_path / "two", *more, iterations=20), cwd=ROOT)
    one = state(tmp_path / "one", stage)
    assert relative_difference(state(tmp_path / "two", stage), one) < 1e-5
    assert relative_difference(state(tmp_path / "four", stage), one) < 1e-5
    fids = [checkpoint.load(tmp_path / name / f"stage{stage}" / "latest.pt")["fid"]
            for name in ("one", "two")]
    for steps, figures in fids[0].items():
        assert fids[1][steps] == pytest.approx(figures, rel=1e-3)


def same_tensors(a, b):
    return a.keys() == b.keys() and all(torch.equal(a[k], b[k]) for k in a if torch.is_tensor(a[k]))


@pytest.mark.parametrize("argv", [["--stage", "2"], ["--method", "dmd2"], ["--stage", "0"]])
def test_an_iteration_draws_from_its_seed_and_number_alone(argv):
    config, _, sources, options = networks(argv)

    def drawn(step, config=config):
        return vars(*draw(config, step, sources, options))

    once = drawn(10)                                        # the student's turn, as 20 is
    drawn(11)
    torch.manual_seed(9)
    assert same_tensors(once, drawn(10))
    for other in drawn(20), drawn(10, dataclasses.replace(config, seed=1)):
        assert not any(torch.equal(value, other[name]) for name, value in once.items()
                       if torch.is_tensor(value) and value.is_floating_point() and value.numel())


@pytest.mark.parametrize("argv", [["--stage", "2"], ["--method", "dmd2"], ["--stage", "0"]])
@pytest.mark.parametrize("processes, batch_per_gpu", [(1, 2), (2, 4), (2, 1), (4, 2)])
def test_the_parts_of_all_processes_are_the_batch_in_its_order(
        argv, processes, batch_per_gpu, monkeypatch):
    config, _, sources, options = networks([*argv, "--batch", "8"])
    if config.stage == 0:
        config = dataclasses.replace(config, augment=0.5, caption_dropout=0.5)
    (whole,) = draw(config, 0, sources, options)
    share = dataclasses.replace(options, world_size=processes, batch_per_gpu=batch_per_gpu)
    parts = []
    for rank in range(processes):
        monkeypatch.setattr(train.distributed, "rank", lambda rank=rank: rank)
        parts += draw(config, 0, sources, share)
    assert len(parts) == 8 // batch_per_gpu
    for name, value in vars(whole).items():
        joined = [getattr(part, name) for part in parts]
        if torch.is_tensor(value):
            assert torch.equal(torch.cat(joined), value), name
        else:
            assert set(joined) == {value}, name


@pytest.mark.parametrize("argv, name", [(["--method", "sid"], "sigma_adapted"),
                                        (["--stage", "0"], "sigma")])
def test_what_learns_as_the_teacher_did_has_the_noise_that_it_had(argv, name):
    config, _, sources, options = networks(argv)
    trained = sources.levels._replace(trained=lambda levels, B, rng: torch.full((B, 1, 1, 1), 7.0))
    (part,) = draw(config, 0, sources._replace(levels=trained), options)
    assert (getattr(part, name) == 7).all()


# ---- The algorithm ----

@pytest.mark.parametrize("ttur, iterations", [(1, 4), (3, 7), (5, 5), (5, 11)])
def test_the_student_moves_every_ttur_th_iteration_and_the_adapted_network_every_one(
        teacher, tmp_path, ttur, iterations):
    train.main(flags(teacher, tmp_path, "--stage", "1", "--ttur", str(ttur), iterations=iterations))
    saved = checkpoint.load(tmp_path / "stage1" / "latest.pt")
    student, adapted = ({int(s["step"]) for s in o["state"].values()} for o in saved["optimizers"])
    assert student == {-(-iterations // ttur)} and adapted == {iterations}


def test_stages_continue_from_the_best_student_and_start_with_nothing_to_unforget(
        teacher, tmp_path):
    train.main(flags(teacher, tmp_path))                                     # stages 1, 2, 3
    for stage in (2, 3):
        best = checkpoint.load(tmp_path / f"stage{stage - 1}" / "best.pt")
        lines = run_folder.read_metrics(tmp_path / f"stage{stage}" / "metrics.jsonl")
        assert lines[0]["unforget"] == pytest.approx(0, abs=1e-12)
        assert max(line.get("unforget", 0) for line in lines) > 1e-12       # later there is
        (_, config, options), = parse(flags(teacher, tmp_path, "--stage", str(stage)))
        roles = load_roles(config, options, CPU)
        for role in ("student", "previous", "ema"):
            got = getattr(roles, role).state_dict()
            assert all(torch.equal(got[k], v) for k, v in best["ema"].items())
        adapted = roles.adapted.state_dict()
        assert all(torch.equal(adapted[k], v) for k, v in best["adapted"].items())
        saved = checkpoint.load(tmp_path / f"stage{stage}" / "latest.pt")
        assert len(saved["sigmas"]) == stage
        assert set(saved["fid"]) == {str(n + 1) for n in range(stage)}


def test_a_gan_goes_on_with_the_head_of_the_run_that_it_starts_from(teacher, tmp_path):
    run = flags(teacher, tmp_path / "first", "--method", "dmd2", iterations=2)
    train.main(run)
    best = checkpoint.load(tmp_path / "first" / "stage1" / "best.pt")
    (_, config, options), = parse([*run, "--start-from", str(tmp_path / "first/stage1/best.pt"),
                                   "--folder", str(tmp_path / "second")])
    found = load_roles(config, options, CPU).adapted
    for network, name in ((found.network, "adapted"), (found.head, "head")):
        state = network.state_dict()
        assert all(torch.equal(state[k], v) for k, v in best[name].items())


@pytest.mark.parametrize("stage", [1, 2])
def test_best_holds_the_lowest_fid_of_the_stages_own_step_count(teacher, tmp_path, stage):
    if stage == 2:
        train.main(flags(teacher, tmp_path, "--stage", "1", iterations=1))
    train.main(flags(teacher, tmp_path, "--stage", str(stage), "--evaluate-every", "1",
                     "--ema-rampup", "0", iterations=5))
    folder, own = tmp_path / f"stage{stage}", f"digits-FID@{stage}"
    fids = {line["iteration"] + 1: line[own] for line in run_folder.read_metrics(
        folder / "metrics.jsonl") if own in line}
    best, latest = (checkpoint.load(folder / f"{name}.pt") for name in ("best", "latest"))
    assert best["best_fid"] == min(fids.values()) == fids[best["iteration"]]
    evaluate.main(["--checkpoint", str(folder / "latest.pt"), "--n", "12"])     # of the average
    found = json.loads((folder / "evaluation.json").read_text())["evaluations"]
    assert len(found) == stage
    for one in found:
        figures = {name: figure["mean"] for name, figure in one["figures"].items()}
        assert figures == pytest.approx(latest["fid"][str(one["evaluations"])], rel=1e-6)


def test_best_is_of_one_way_of_judging_and_comes_back_where_it_is_gone(teacher, tmp_path, capsys):
    def trained(iterations, *more):
        capsys.readouterr()
        train.main(flags(teacher, tmp_path, "--stage", "1", "--force", *more,
                         iterations=iterations))
        return checkpoint.load(best), capsys.readouterr().out

    best, more = tmp_path / "stage1" / "best.pt", ("--evaluate-images", "16")
    first, _ = trained(2)
    checkpoint.save(best, first | {"best_fid": 1e-3})
    assert trained(3)[0]["iteration"] == 2
    other, said = trained(4, *more)                     # no figure of the first is comparable
    assert other["iteration"] == 4
    assert f"done; best digits-FID@1 {other['best_fid']:.4g}, after 4 iterations" in said
    best.unlink()
    again, _ = trained(4, *more)
    assert (again["iteration"], again["best_fid"]) == (4, other["best_fid"])
    scored = [line["iteration"] for line in run_folder.read_metrics(
        tmp_path / "stage1" / "metrics.jsonl") if "digits-FID@1" in line]
    assert scored == [1, 2, 3]
    newest, said = trained(6, "--evaluate-every", "0")
    assert newest["iteration"] == 6 and "done; the newest weights" in said
    best.unlink()
    assert trained(6, "--evaluate-every", "0")[0]["iteration"] == 6


def test_own_sampling_compares_with_the_previous_student_on_the_students_own_inputs():
    config, roles, sources, options = networks(["--stage", "2", "--no-external-sampling"])
    with torch.no_grad():
        for parameter in roles.previous.parameters():
            parameter += 0.05 * torch.randn_like(parameter)
    (part,) = draw(config, 0, sources, options)
    x_t = config.sigmas[0] * part.z
    with torch.no_grad():
        student, previous = (one(x_t, level(config.sigmas[0], x_t), part.y)
                             for one in (roles.student, roles.previous))
    losses, _ = train.iteration(config, roles, train.make_optimizers(config, roles, CPU), [part],
                                student_turn=True)
    by_hand = config.unforget_weight * (student - previous).square().mean()
    assert losses["unforget"].item() == pytest.approx(by_hand.item(), rel=1e-4)


@pytest.mark.parametrize("gan", [[], ["--method", "dmd2", "--gan-adapted-weight", "0.5"]],
                         ids=["", "gan"])
def test_the_adapted_networks_loss_and_gradient_are_means_over_its_noises(gan, monkeypatch):
    config, roles, sources, options = networks(["--stage", "1", "--adapted-noises", "3", *gan])
    (part,) = draw(config, 1, sources, options)
    adapted, asked = copy.deepcopy(roles.adapted), []
    monkeypatch.setattr(train, "gan_adapted_loss",
                        lambda *a, **k: asked.append(k) or gan_adapted_loss(*a, **k))
    losses, x0 = train.iteration(config, roles, train.make_optimizers(config, roles, CPU), [part],
                                 student_turn=False)
    by_hand = sum(denoising_loss(x0, part.sigma_adapted[:, k], part.eps_adapted[:, k], part.y,
                                 adapted=adapted, sigma_data=0.5) for k in range(3)) / 3
    assert losses["denoising"].item() == pytest.approx(by_hand.item(), rel=1e-5)
    if gan:                                             # whose noise is one
        discriminator = 0.5 * gan_adapted_loss(
            x0, part.real, part.sigma_fake, part.eps_fake, part.sigma_real, part.eps_real, part.y,
            part.y_real, discriminator=partial(adapted, output="logits"))
        assert losses["discriminator"].item() == pytest.approx(discriminator.item(), rel=1e-5)
        by_hand = by_hand + discriminator
    by_hand.backward()
    norm = torch.stack([p.grad.norm() for p in adapted.parameters() if p.grad is not None]).norm()
    assert losses["adapted_gradient"].item() == pytest.approx(norm.item(), rel=1e-4)
    assert len(asked) == bool(gan)


def test_images_seen_are_those_of_student_updates():
    config, _, sources, options = networks(["--stage", "1", "--ttur", "3"])
    assert [draw(config, step, sources, options)[0].seen for step in range(7)] == [
        0, 0, 0, 4, 4, 4, 8]


def test_augmented_images_are_those_whose_labels_say_so():
    config, _, sources, options = networks(["--stage", "0", "--batch", "8"])
    plain, told = (draw(dataclasses.replace(config, augment=p), 0, sources, options)[0]
                   for p in (0.0, 0.5))
    labelled = told.augment_labels.any(1)
    assert labelled.any() and torch.equal((told.real != plain.real).flatten(1).any(1), labelled)


@pytest.mark.parametrize("external", [True, False])
def test_external_sampling_rolls_out_the_previous_student_and_own_sampling_the_current(
        teacher, tmp_path, external, monkeypatch):
    train.main(flags(teacher, tmp_path, "--stage", "1", iterations=4))
    rolled, real = [], train.roll_out

    def watched(source, *args):
        if source.shape == (1, 8, 8):                   # others are counted, not made
            rolled.append(source)
        return real(source, *args)

    monkeypatch.setattr(train, "roll_out", watched)
    made, load = [], train.load_roles
    monkeypatch.setattr(train, "load_roles", lambda *a: made.append(load(*a)) or made[0])
    flag = "--external-sampling" if external else "--no-external-sampling"
    train.main(flags(teacher, tmp_path, "--stage", "2", flag))
    assert rolled and all(s is (made[0].previous if external else made[0].student) for s in rolled)


def test_dmd2_with_several_steps_trains_every_step_by_its_own_roll_out(
        teacher, tmp_path, monkeypatch):
    lengths, real = [], train.roll_out

    def watched(student, z, y, sigmas, noises):
        lengths.append(len(sigmas))
        return real(student, z, y, sigmas, noises)

    monkeypatch.setattr(train, "roll_out", watched)
    train.main(flags(teacher, tmp_path, "--method", "dmd2", "--stage", "3", iterations=20))
    assert set(lengths) == {1, 2, 3}


@pytest.mark.parametrize("method", METHODS)
def test_teacher_and_previous_never_change_and_the_average_follows_the_student(
        teacher, tmp_path, method, monkeypatch):
    made, load = [], train.load_roles
    monkeypatch.setattr(train, "load_roles", lambda *a: made.append(load(*a)) or made[-1])
    train.main(flags(teacher, tmp_path, *METHODS[method]))
    roles, original = made[0], checkpoint.load(teacher)["ema"]
    assert all(torch.equal(roles.teacher.state_dict()[k], v) for k, v in original.items())
    moved = [not torch.equal(roles.student.state_dict()[k], v) for k, v in original.items()
             if not k.endswith("resample_filter")]
    assert sum(moved) > 0.9 * len(moved)
    assert all(p.grad is None for p in roles.teacher.parameters())
    moved = sum((s - t).square().sum() for s, t in zip(roles.student.parameters(),
                                                       roles.teacher.parameters()))
    behind = sum((e - t).square().sum() for e, t in zip(roles.ema.parameters(),
                                                        roles.teacher.parameters()))
    assert 0 < behind < moved


@pytest.mark.parametrize("more", [[], ["--method", "sid"], ["--method", "dmd"],
                                  ["--method", "dmd2", "--gan-weight", "0"]])
def test_data_free_methods_run_where_there_is_no_real_image(teacher, tmp_path, monkeypatch, more):
    monkeypatch.setattr(real, "DIGITS", tmp_path / "gone.npz")
    train.main(flags(teacher, tmp_path, *more, iterations=3))


@pytest.mark.parametrize("more", [["--method", "dmd2"], ["--stage", "0"]])
def test_a_gan_and_a_teacher_in_training_do_need_real_images(tmp_path, monkeypatch, more):
    monkeypatch.setattr(real, "DIGITS", tmp_path / "gone.npz")
    with pytest.raises(UserError, match="gone.npz"):
        train.main([*more, "--folder", str(tmp_path / "run")])


def networks(method_flags, **changes):
    """Config, roles, sources and options of a stage on a small network of random weights."""
    (_, config, options), = parse(["--batch", "4", *method_flags])
    torch.manual_seed(1)
    network = EDMPrecond(**NETWORK | {"dropout": 0.0} | changes)
    for parameter in network.parameters():
        torch.nn.init.normal_(parameter, std=0.1)
    if config.stage:
        roles = assemble(config, network)
        if config.has_previous:
            roles.previous = copy.deepcopy(network)
    else:
        roles = Roles(trainable(network), copy.deepcopy(network))
    for role in (roles.teacher, roles.previous, roles.ema):
        if role is not None:
            role.eval().requires_grad_(False)
    roles.student.eval()
    roles.wrap()
    images = real.digits() if config.gan_weight or config.stage == 0 else None
    sources = Sources(network.shape, network.levels, network.conditions, images)
    return config, roles, sources, options


@pytest.mark.parametrize("sigma_data", [1.0, 0.5])
def test_the_denoising_loss_has_the_networks_own_sigma_data(sigma_data):
    config, roles, sources, options = networks(["--stage", "2"], sigma_data=sigma_data)
    (part,) = draw(config, 1, sources, options)       # not the student's turn
    adapted = copy.deepcopy(roles.adapted)
    losses, images = train.iteration(config, roles, train.make_optimizers(config, roles, CPU),
                                     [part], student_turn=False)
    with torch.no_grad():
        inputs, _ = roll_out(roles.previous, part.z, part.y, part.sigmas, part.noises.unbind(1))
        x0, = denoise_together(roles.student, inputs[-1:], part.sigmas[-1:], part.y)
        by_hand = {other: denoising_loss(x0, part.sigma_adapted[:, 0], part.eps_adapted[:, 0],
                                         part.y, adapted=adapted, sigma_data=other)
                   for other in (sigma_data, 0.1)}
    assert torch.allclose(images, x0, atol=1e-6)
    assert losses["denoising"].item() == pytest.approx(by_hand[sigma_data].item(), rel=1e-5)
    assert losses["denoising"].item() != pytest.approx(by_hand[0.1].item(), rel=0.1)


@pytest.mark.parametrize("sigma_data", [1.0, 0.5])
def test_a_teacher_in_training_has_its_own_sigma_data_too(sigma_data):
    config, roles, sources, options = networks(["--stage", "0"], sigma_data=sigma_data)
    (part,) = draw(config, 0, sources, options)
    before = copy.deepcopy(roles.student)
    losses, _ = train.teacher_iteration(config, roles, train.make_optimizers(config, roles, CPU),
                                        [part], student_turn=True)
    by_hand = edm_loss(part.real, part.sigma, part.eps, part.y_real, teacher=before,
                       sigma_data=sigma_data)
    assert losses["denoising"].item() == pytest.approx(by_hand.item(), rel=1e-5)


def test_a_guided_teacher_is_followed_to_where_it_points():
    """The adapted network begins as the teacher without guidance: only with it is there a way."""
    found = {}
    for weight in ("1", "3"):
        config, roles, sources, options = networks(
            ["--stage", "1", "--loss", "dm", "--guidance", weight])
        (part,) = draw(config, 0, sources, options)
        bare, x0 = copy.deepcopy(roles.adapted), roles.student(80 * part.z, 80.0, part.y).detach()

        def guided(x_t, sigma, y, bare=bare, weight=float(weight)):
            without = bare(x_t, sigma, torch.zeros_like(y))
            return without + weight * (bare(x_t, sigma, y) - without)

        by_hand = dm_loss(x0, part.sigma, part.eps, part.y, teacher=guided, adapted=bare).item()
        losses, _ = train.iteration(config, roles, train.make_optimizers(config, roles, CPU),
                                    [part], student_turn=True)
        assert losses["distill"].item() == pytest.approx(by_hand, rel=1e-3, abs=1e-12)
        found[weight] = losses["distill"].item(), losses["student_gradient"].item()
    assert max(found["1"]) < 1e-9 and found["3"][0] > 1e-7 and found["3"][1] > 1e-5


def test_guidance_of_a_teacher_from_a_file_trains(teacher, tmp_path):
    train.main(flags(teacher, tmp_path, "--stage", "1", "--guidance", "3", iterations=2))
    lines = run_folder.read_metrics(tmp_path / "stage1" / "metrics.jsonl")
    assert lines[0]["student_gradient"] > 0


# ---- Memory and reading cost ----

def test_a_run_keeps_one_copy_of_each_network_gradient_and_optimizer_state(
        teacher, tmp_path, monkeypatch):
    train.main(flags(teacher, tmp_path, "--stage", "1", iterations=2))
    seen, real = [], train.Log.due

    def due(self, step):
        if step == 4:
            gc.collect()
            found = {t.untyped_storage().data_ptr(): t.untyped_storage().nbytes()
                     for t in gc.get_objects() if isinstance(t, torch.Tensor)}
            found |= {p.grad.untyped_storage().data_ptr(): p.grad.untyped_storage().nbytes()
                      for t in gc.get_objects() if isinstance(t, torch.nn.Module)
                      for p in t.parameters() if p.grad is not None}
            seen.append(sum(found.values()))
        return real(self, step)

    monkeypatch.setattr(train.Log, "due", due)
    held = sum(t.untyped_storage().nbytes() for t in gc.get_objects()
               if isinstance(t, torch.Tensor))
    train.main(flags(teacher, tmp_path, "--stage", "2"))
    weights = 4 * sum(p.numel() for p in EDMPrecond(**NETWORK).parameters())
    # student, adapted, teacher, previous, average, two Adam states of two moments each
    assert seen[0] - held < (5 + 4 + 0.25) * weights + 500_000


def functions_of(path):
    """(name, first line, last line) of every function of a file, decorators and all."""
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, (ast.FunctionDef, ast.Lambda)):
            decorators = getattr(node, "decorator_list", [])
            begin = min(one.lineno for one in [node, *decorators])
            yield getattr(node, "name", "lambda"), begin, node.end_lineno


def functions_run(action):
    """Every function of ours that action() enters, but the networks' layers: (file, first line)."""
    entered = set()

    def enter(frame, event, argument):
        entered.add((frame.f_code.co_filename, frame.f_code.co_firstlineno))

    before = sys.gettrace()
    threading.settrace(enter)
    sys.settrace(enter)
    try:
        action()
    finally:
        sys.settrace(before)
        threading.settrace(None)
    return {(Path(name), line) for name, line in entered
            if Path(name).is_relative_to(ROOT) and (ROOT / "tests") not in Path(name).parents
            and (ROOT / ".venv") not in Path(name).parents and "edm_networks" not in name}


def reading_cost(action):
    """Lines of the functions that action() enters, each line once, and a list of them."""
    entered, lines, listed = functions_run(action), set(), []
    for path in sorted({path for path, _ in entered}):
        for name, begin, end in functions_of(path):
            if (path, begin) in entered:
                lines |= {(path, line) for line in range(begin, end + 1)}
                listed.append(f"{path.relative_to(ROOT)}:{begin} {name}: {end - begin + 1}")
    return len(lines), "\n".join(listed)


TERMS = ["--gan-weight", "0.003", "--regression-weight", "0.25", "--regression-pairs", "8",
         "--unforget-weight", "1"]


@pytest.mark.parametrize("more, most", [
    (["--loss", "sid"], 200), (["--loss", "sid", *TERMS], 240), (["--loss", "dm", *TERMS], 240)],
    ids=["PMDD", "every term, sid", "every term, dm"])
def test_one_iteration_can_be_followed_in_few_lines(more, most):
    config, roles, sources, options = networks(["--stage", "2", *more])
    roles.distance = lambda x, y: (x - y).square().mean((1, 2, 3))      # in place of a network
    rows = np.zeros(8, [("z", np.float32, (1, 8, 8)), ("image", np.float16, (1, 8, 8)),
                        ("index", np.int64)])
    sources = sources._replace(pairs=Rows([rows], 8) if config.regression_weight else None)
    optimizers, logged = train.make_optimizers(config, roles, CPU), {}

    def one_iteration():
        parts = draw(config, 0, sources, options)
        logged.update(train.iteration(config, roles, optimizers, parts, student_turn=True)[0])

    count, listed = reading_cost(one_iteration)
    expected = {"distill", "unforget", "denoising"} | (
        {"gan", "regression", "discriminator"} if config.gan_weight else set())
    assert expected <= logged.keys() and "train.py" in listed and "losses.py" in listed
    assert count <= most, f"{count} lines:\n{listed}"


def test_the_count_of_lines_is_that_of_whole_functions_and_of_each_once(tmp_path, monkeypatch):
    path = tmp_path / "some.py"
    path.write_text("""
import functools

@functools.cache
def outer(x):
    '''What it does.'''
    def inner():
        return x + 1

    return inner() + sum(k for k in range(2))

def other():
    return 1
""")
    monkeypatch.setitem(globals(), "ROOT", tmp_path)
    space = {}
    exec(compile(path.read_text(), str(path), "exec"), space)
    assert reading_cost(lambda: space["outer"](1)) == (
        7, "some.py:4 outer: 7\nsome.py:7 inner: 2")


def test_compiled_networks_have_no_graph_breaks_and_end_where_the_others_do(tmp_path, monkeypatch):
    """The graphs and their gradients are what --compile makes; the kernels are eager here."""
    teacher = save_teacher(tmp_path, channel_mult=[1], attn_resolutions=[8])
    monkeypatch.setattr(torch, "compile", partial(torch.compile, backend="aot_eager"))
    for folder, more in (("a", []), ("b", ["--compile"])):
        train.main(flags(teacher, tmp_path / folder, "--stage", "1", iterations=1))
        torch._dynamo.utils.counters.clear()
        train.main(flags(teacher, tmp_path / folder, "--stage", "2", iterations=4) + more)
    counted = torch._dynamo.utils.counters
    assert torch._dynamo.config.recompile_limit >= 64
    assert counted["stats"]["unique_graphs"] >= 5 and not counted["graph_break"]
    a, b = (state(tmp_path / folder, stage=2) for folder in ("a", "b"))
    assert relative_difference(a, b) < 1e-5


# ---- What stops a run ----

@pytest.mark.parametrize("owner, target, term, at", [
    (models, "sid_loss", "distill", 3), (train, "unforget_loss", "unforget", 3),
    (train, "denoising_loss", "denoising", 2)])
def test_a_loss_that_is_not_finite_stops_the_run_before_any_weight_moves(
        teacher, tmp_path, monkeypatch, owner, target, term, at):
    train.main(flags(teacher, tmp_path, "--stage", "1", iterations=2))
    made, load, real, calls = [], train.load_roles, getattr(owner, target), []
    monkeypatch.setattr(train, "load_roles", lambda *a: made.append(load(*a)) or made[-1])
    role, ttur = ("adapted", 1) if term == "denoising" else ("student", 3)

    def poisoned(*args, **kwargs):
        calls.append({k: v.clone() for k, v in getattr(made[0], role).state_dict().items()})
        bad = len(calls) - 1 == at // ttur
        return real(*args, **kwargs) * (float("nan") if bad else 1)

    with monkeypatch.context() as patch:
        patch.setattr(owner, target, poisoned)
        with pytest.raises(RunFailed, match=f"iteration {at}: {term} is nan"):
            train.main(flags(teacher, tmp_path, "--stage", "2"))
    now = getattr(made[0], role).state_dict()
    assert all(torch.equal(now[k], v) for k, v in calls[at // ttur].items())
    assert checkpoint.load(tmp_path / "stage2" / "latest.pt")["iteration"] == at - at % 2
    with pytest.raises(UserError, match=r"learning_rate \(was 0.001, now 0.0005\)"):
        train.main(flags(teacher, tmp_path, "--stage", "2", "--learning-rate", "5e-4"))
    train.main(flags(teacher, tmp_path, "--stage", "2", "--learning-rate", "5e-4",
                     "--weight-decay", "0.02", "--adapted-betas", "0", "0.9", "--force"))
    saved = checkpoint.load(tmp_path / "stage2" / "latest.pt")
    assert saved["iteration"] == 7
    for optimizer, betas in zip(saved["optimizers"], ((0.9, 0.999), (0, 0.9)), strict=True):
        assert all((g["lr"], g["weight_decay"], g["betas"]) == (5e-4, 0.02, betas)
                   for g in optimizer["param_groups"])


@pytest.mark.parametrize("loss, gradient", [(1.0, float("inf")), (float("nan"), 1.0)])
def test_once_a_figure_is_not_finite_no_later_update_moves_a_weight(loss, gradient):
    student, adapted = torch.nn.Linear(2, 1), torch.nn.Linear(2, 1)
    config = dataclasses.replace(rows.find("digits", "pmdd", 1).config, adapted_betas=(0.5, 0.6))
    optimizers = train.make_optimizers(config, SimpleNamespace(student=student, adapted=adapted),
                                       CPU)
    assert [o.defaults["betas"] for o in optimizers] == [(0.9, 0.999), (0.5, 0.6)]
    found_inf = optimizers[0].found_inf
    assert optimizers[1].found_inf is found_inf
    for given, slope in ((1.0, 1.0), (loss, gradient), (1.0, 1.0)):
        for which, network in enumerate((student, adapted)):    # what one has found stops the other
            before = network.weight.detach().clone()
            network.weight.grad = torch.tensor([[slope if which == 0 else 1.0, 0.0]])
            losses = {"distill": torch.tensor(given if which == 0 else 1.0)}
            train.update(optimizers[which], losses, "gradient", 10.0)
            assert torch.equal(network.weight.data, before) == bool(found_inf)
            assert losses.keys() == {"distill", "gradient"} and network.weight.grad is None
    assert found_inf == 1


def test_a_gradient_that_is_not_finite_is_named(tmp_path):
    config = dataclasses.replace(rows.find("digits", "pmdd", 1).config, iterations=20)
    told = log.Log(config, SimpleNamespace(folder=tmp_path, device="cpu"), "cpu", Before(), None)
    images = torch.zeros(2, 1, 8, 8)
    told.take(1, {"gradient": torch.tensor(1.0)}, images)
    told.take(2, {"gradient": torch.tensor(float("inf"))}, images)
    with pytest.raises(RunFailed, match="iteration 2: gradient is inf"):
        told.take(10, {"gradient": torch.tensor(1.0)}, images)
    with pytest.raises(RunFailed, match="iteration 2: gradient is inf"):
        told.save(None, [], 11)


def test_the_curves_of_a_run_are_a_picture_with_a_line_for_each(tmp_path):
    path, lines = tmp_path / "curves.png", [
        {"iteration": k, "distill": 1.0 / (k + 1), "digits-FID@1": 9.0 - k} for k in range(5)]
    draw_curves([], path)                               # a run whose metrics are lost
    assert not path.exists()
    draw_curves(lines, path)
    picture = np.asarray(Image.open(path).convert("RGB")).astype(int)
    left, right = picture[:, :300], picture[:, 300:600]     # one graph for each figure
    assert picture.shape[1] == 1200 and all((half.max(2) - half.min(2)).max() > 50
                                            for half in (left, right))     # lines have colours


def test_the_pace_of_a_run_leaves_its_evaluations_out(tmp_path, monkeypatch):
    config = dataclasses.replace(rows.find("digits", "pmdd", 1).config, iterations=100)
    slow = SimpleNamespace(score=lambda *args: time.sleep(0.5) or {"1": {"digits-FID": 2.0}},
                           judge=object())
    told = log.Log(config, SimpleNamespace(folder=tmp_path, device="cpu"), "cpu",
                   Before(best_fid=1.0), None, slow, Passes(train.iteration, config))
    for name in ("payload", "save", "save_latest", "save_samples"):
        monkeypatch.setattr(log, name, lambda *args, **more: None)
    figures, images = {"denoising": torch.tensor(1.0)}, torch.zeros(2, 1, 8, 8)
    told.take(0, figures, images)
    told.save(SimpleNamespace(ema=torch.nn.Linear(1, 1), base=None), [], 1, score=True)
    told.take(10, figures, images)
    pace = run_folder.read_metrics(tmp_path / "metrics.jsonl")[-1]["images_per_second"]
    assert pace > 10 * config.batch / 0.4


def test_gradients_are_clipped_to_the_norm_that_was_asked_for():
    for clip, factor in ((0.5, 0.1), (0.0, 1.0)):
        weight = torch.nn.Parameter(torch.zeros(2))
        weight.grad = torch.tensor([3.0, 4.0])
        optimizer, losses = torch.optim.SGD([weight], lr=1.0, fused=True), {}
        optimizer.found_inf = torch.zeros(())
        train.update(optimizer, losses, "student_gradient", clip)
        assert losses == {"student_gradient": 5.0}
        assert torch.allclose(weight.data, torch.tensor([-3.0, -4.0]) * factor)


@pytest.mark.parametrize("argv, message", [
    (["--stage", "2"], "python train.py --dataset digits --stage 1 --folder .* makes it"),
    (["--stage", "1", "--teacher", "nowhere.pt"], "no such file and no published name"),
    (["--stage", "1", "--start-from", "nowhere.pt"], "nowhere.pt, which is no file"),
    (["--stage", "1", "--start-from", "."], "which is no file; --start-from has to name the best"),
    (["--stage", "1", "--batch-per-gpu", "3"], "--batch-per-gpu 3 does not divide the 8 images"),
    (["--method", "dmd2", "--data", "nowhere"], "no images at nowhere"),
    (["--stage", "1", "--reference", "nowhere.npz"], "nowhere.npz"),
])
def test_a_users_mistake_is_one_line_that_says_how_to_mend_it(teacher, tmp_path, argv, message):
    with pytest.raises(UserError, match=message):
        train.main(flags(teacher, tmp_path, *argv))


def test_a_checkpoint_of_another_dataset_or_architecture_is_refused(teacher, tmp_path):
    other = checkpoint.load(teacher)
    other |= {"adapted": other["ema"], "sigmas": [80.0]}
    checkpoint.save(tmp_path / "other.pt", other | {"dataset": "cifar10"})
    with pytest.raises(UserError, match="is of dataset cifar10, this run of digits"):
        train.main(flags(teacher, tmp_path / "a", "--stage", "2", "--start-from",
                         str(tmp_path / "other.pt")))
    wide = EDMPrecond(**NETWORK | {"model_channels": 16})
    checkpoint.save(tmp_path / "wide.pt", other | {"network": wide.config, "ema": wide.state_dict(),
                                                   "adapted": wide.state_dict()})
    with pytest.raises(UserError, match="another architecture"):
        train.main(flags(teacher, tmp_path / "b", "--stage", "2", "--start-from",
                         str(tmp_path / "wide.pt")))


def test_a_refused_command_changes_and_leaves_nothing(teacher, tmp_path):
    train.main(flags(teacher, tmp_path, "--stage", "1"))
    (tmp_path / "mine" / "stage1").mkdir(parents=True)
    (tmp_path / "mine" / "stage1" / "lock").touch()             # of an earlier, refused command
    before = {path: path.is_file() and path.read_bytes() for path in tmp_path.rglob("*")}
    for more in (["--method", "dmd2", "--force"], ["--teacher", "nowhere.pt", "--force"]):
        with pytest.raises(UserError):
            train.main(flags(teacher, tmp_path, "--stage", "1", *more))
    with pytest.raises(UserError):
        train.main(flags("nowhere.pt", tmp_path / "another" / "run", "--stage", "1"))
    with pytest.raises(UserError):
        train.main(flags("nowhere.pt", tmp_path / "mine", "--stage", "1"))
    after = {path: path.is_file() and path.read_bytes() for path in tmp_path.rglob("*")}
    assert after == before


def test_a_stage_cannot_skip_the_one_before(teacher, tmp_path):
    train.main(flags(teacher, tmp_path, "--stage", "1"))
    start = str(tmp_path / "stage1" / "best.pt")
    with pytest.raises(UserError, match="was trained for 1 step, stage 3 starts from 2"):
        train.main(flags(teacher, tmp_path, "--stage", "3", "--start-from", start))


def test_the_command_line_exits_with_two_and_one_line(teacher, tmp_path):
    done = run_python(None, ROOT / "train.py", *flags(teacher, tmp_path), "--stage", "2",
                      check=False)
    assert done.returncode == 2
    assert done.stderr.count("\n") == 1 and done.stderr.startswith("error: ")
    if not torch.cuda.is_available():
        done = run_python(None, ROOT / "train.py", "--device", "cuda", check=False)
        assert done.returncode == 2 and "no CUDA device" in done.stderr


def test_a_dry_run_prints_what_it_will_cost_and_makes_nothing(teacher, tmp_path, capsys,
                                                              monkeypatch):
    train.main(flags(teacher, tmp_path, "--stage", "1", "--dry-run", "--ttur", "5", iterations=100))
    out = capsys.readouterr().out
    assert "student updates: 20" in out and "adapted updates: 100" in out
    assert "images generated: 800" in out and "memory, all tensors of one process" in out
    assert "learning_rate: 0.001" in out and not any(tmp_path.iterdir())
    network = checkpoint.network_from(checkpoint.load(teacher), source=teacher)
    weights = sum(x.numel() for x in network.parameters())
    train.main(flags(teacher, tmp_path, "--dataset", "digits", "--stage", "1", "--dry-run"))
    for said in (out, capsys.readouterr().out):                         # not those of digits' own
        assert f"parameters of the network: {weights:,}\n" in said
    for more, why in ((("--dataset", "cifar10"), "is of digits"), (("--sigmas", "500"), "to 80"),
                      (("--dataset", "sd15", "--prompts", __file__), "is of digits")):
        with pytest.raises(UserError, match=why):                       # as the run would
            train.main(flags(teacher, tmp_path, "--stage", "1", "--dry-run", *more))

    def whole(out):
        return [line for line in out.splitlines() if "parameters" in line or "disk space" in line]

    monkeypatch.setenv("WORLD_SIZE", "4")                       # a share of the memory; one disk
    monkeypatch.setenv("RANK", "0")
    for more in ("--shard", "--ema-on-host"):
        train.main(flags(teacher, tmp_path, "--stage", "1", "--dry-run", more))
        assert whole(capsys.readouterr().out) == whole(out)
    monkeypatch.delenv("RANK")
    # Also for a GPU, and where there is none.
    train.main(flags(teacher, tmp_path, "--stage", "1", "--dry-run", "--device", "cuda"))
    on_gpu = capsys.readouterr().out
    assert "memory, all tensors of one process" in on_gpu and "whole process" not in on_gpu


def test_a_teacher_trains_and_resumes_to_the_bit_and_can_be_distilled(tmp_path, monkeypatch):
    small = datasets.DIGITS._replace(network=NETWORK)                         # and with dropout
    monkeypatch.setitem(datasets.DATASETS, "digits", small)
    for folder, stops in (("whole", [6]), ("twice", [3, 6])):
        for iterations in stops:
            train.main(["--stage", "0", "--folder", str(tmp_path / folder), "--batch", "8",
                        "--force", "--iterations", str(iterations), "--evaluate-images", "12",
                        "--evaluate-every", "3"])
    whole, twice = state(tmp_path / "whole", 0), state(tmp_path / "twice", 0)
    assert all(torch.equal(whole[name], twice[name]) for name in whole)
    train.main(flags(tmp_path / "whole" / "stage0" / "best.pt", tmp_path / "student", iterations=1))


def test_metrics_hold_the_figures_that_a_person_watches(teacher, tmp_path):
    train.main(flags(teacher, tmp_path, "--method", "dmd2", "--regression-weight", "0.25"))
    lines = run_folder.read_metrics(tmp_path / "stage1" / "metrics.jsonl")
    assert {"distill", "gan", "regression", "student_gradient", "denoising", "discriminator",
            "adapted_gradient", "image_mean", "image_spread", "images_per_second",
            "seconds_left"} <= set(lines[0])
    assert "digits-FID@1" in lines[-1] and 0 <= lines[-1]["right_class@1"] <= 1
    config = json.loads((tmp_path / "stage1" / "config.json").read_text())
    assert config["config"]["batch"] == 8 and config["versions"]["torch"] == torch.__version__
    assert sorted(p.name for p in (tmp_path / "stage1" / "samples").iterdir()) == [
        "000004.png", "000007.png"]
    train.main(flags(teacher, tmp_path, "--method", "dmd2", "--regression-weight", "0.25",
                     "--precision", "bf16"))            # nothing is left to be computed so
    assert json.loads((tmp_path / "stage1" / "config.json").read_text()) == config


@pytest.mark.parametrize("more", [["--stage", "2", "--no-external-sampling"], ["--method", "dmd2"]])
def test_bf16_trains_with_weights_and_losses_in_fp32(teacher, tmp_path, more):
    if "2" in more:
        train.main(flags(teacher, tmp_path, "--stage", "1", iterations=1))
    train.main(flags(teacher, tmp_path, *more, "--precision", "bf16", iterations=4))
    stage = 2 if "2" in more else 1
    assert {v.dtype for k, v in state(tmp_path, stage).items()} == {torch.float32}
    lines = run_folder.read_metrics(tmp_path / f"stage{stage}" / "metrics.jsonl")
    assert all(value == value for line in lines for value in line.values())


def test_a_teacher_of_another_size_or_a_student_is_refused_as_teacher(teacher, tmp_path):
    small = EDMPrecond(**NETWORK | {"img_resolution": 16})
    payload = checkpoint.load(teacher)
    checkpoint.save(tmp_path / "large.pt", payload | {"network": small.config,
                                                      "ema": small.state_dict()})
    checkpoint.save(tmp_path / "student.pt", payload | {"sigmas": [80.0]})
    checkpoint.save(tmp_path / "other.pt", payload | {"dataset": "cifar10"})
    checkpoint.save(tmp_path / "odd.pt", payload | {"dataset": "emoji"})
    more = EDMPrecond(**NETWORK | {"label_dim": 11})
    checkpoint.save(tmp_path / "classes.pt", payload | {"network": more.config,
                                                        "ema": more.state_dict()})
    for name, message in (("large", "makes images of 16"), ("classes", "is of 11 classes"),
                          ("student", "is a student of 1 steps"),
                          ("other", "is of cifar10")):
        with pytest.raises(UserError, match=message):
            train.main(flags(tmp_path / f"{name}.pt", tmp_path / "run", "--stage", "1",
                             "--dataset", "digits"))
    for dataset, source, message in (
            ("digits", ROOT / "assets/emoji/pipeline", "is a text-to-image network"),
            ("emoji", tmp_path / "odd.pt", "is not a text-to-image network")):
        with pytest.raises(UserError, match=message):
            train.main(flags(source, tmp_path / "run", "--stage", "1", "--dataset", dataset))


@pytest.mark.parametrize("argv", [["--stage", "0"], ["--dataset", "cifar10", "--method", "dmd2"],
                                  ["--dataset", "imagenet64", "--stage", "3"],
                                  ["--dataset", "cifar10", "--method", "dmd"],
                                  ["--dataset", "cifar10", "--stage", "0"]])     # it augments
def test_every_kind_of_run_has_a_plan(argv, capsys, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    for name, known in datasets.DATASETS.items():                # small: a large one takes seconds
        monkeypatch.setitem(datasets.DATASETS, name, known._replace(network=known.network | (
            {} if "unet" in known.network else {"num_blocks": 1, "channel_mult": [1, 2]})))
    train.main([*argv, "--dry-run", "--batch-per-gpu", "1"])
    assert "memory, all tensors of one process" in capsys.readouterr().out
    assert not any(tmp_path.iterdir())
