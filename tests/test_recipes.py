"""The average that ramps up, what a run has spent, and the recipes that are compared by it."""

import json
import math
import shlex
from dataclasses import replace

import pytest
import torch

import train
from helpers import ROOT, call
from experiments import compare, measure_average, recipes
from models import KARRAS
from presets import rows
from training import cost, plan, rehearsal
from training.draws import Sources, draw
from training.options import parse
from training.passes import SMALLEST, WEIGHT, Passes
from weights import checkpoint

TINY = ["--batch", "8", "--evaluate-images", "12", "--evaluate-every", "4", "--save-every", "2",
        "--ttur", "3", "--final-rate", "1"]


def state(folder, stage=1):
    saved = checkpoint.load(folder / f"stage{stage}" / "latest.pt")
    return {f"{role}.{name}": value for role in ("student", "ema", "adapted")
            for name, value in saved[role].items()}


def same(one, other):
    return one.keys() == other.keys() and all(torch.equal(one[k], other[k]) for k in one)


# ---- The average ----

def test_at_the_second_evaluation_the_average_is_no_worse_than_the_weights(
        tmp_path, monkeypatch):
    monkeypatch.setattr(measure_average, "AVERAGES", {
        name: measure_average.AVERAGES[name] for name in ("0", "0.05")})
    (_, config, options), = parse([
        "--stage", "1", "--loss", "dm", "--iterations", "120", "--batch", "32",
        "--learning-rate", "2e-4", "--evaluate-every", "60", "--evaluate-images", "500",
        "--folder", str(tmp_path)])
    _, second = measure_average.measure(config, options)
    weights, ramped, constant = (sum(second[name]) / 2 for name in ("weights", "0.05", "0"))
    spread = abs(second["weights"][0] - second["weights"][1])
    assert ramped < weights + spread < constant         # which is still the teacher


def test_it_is_measured_on_the_training_itself(tmp_path):
    flags = ["--stage", "1", "--method", "dmd", "--regression-pairs", "16", *TINY,
             "--iterations", "4", "--folder"]
    (_, config, options), = parse([*flags, str(tmp_path / "measured")])
    measure_average.measure(config, options)
    train.main([*flags, str(tmp_path / "trained")])
    measured = checkpoint.load(options.folder / "best.pt")
    trained = checkpoint.load(tmp_path / "trained" / "stage1" / "latest.pt")
    assert all(same(measured[role], trained[role]) for role in ("ema", "adapted"))


@pytest.mark.parametrize("path", sorted((ROOT / "results" / "average").glob("*.json")),
                         ids=lambda path: path.stem)
def test_the_average_was_no_worse_in_any_row_that_was_measured(path):
    measured = json.loads(path.read_text())
    share = f"{rows.find(*measured['row']).config.ema_rampup:g}"
    for one in measured["curve"][1:]:
        weights, average = (sum(one[name]) / 2 for name in ("weights", share))
        assert average < weights + abs(one["weights"][0] - one["weights"][1])


@pytest.mark.parametrize("argv, said", [
    ("--stage 1", "holds a run; give another --folder"), ("", "give --stage 1, 2 or 3"),
    ("--stage 1 --evaluate-every 0 --folder new", "--evaluate-every above 0"),
    ("--stage 1 --dry-run --folder new", "leave out --dry-run"),
    ("--stage 1 --precision bf16 --folder new", "leave out --dry-run"),
    ("--dataset cifar10 --stage 1 --reference none --teacher mine.pt", "mine.pt"),
    ("--dataset sd15 --stage 1 --prompts prompts.txt --folder new", "with a reference")])
def test_measuring_averages_touches_no_run(argv, said, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    best = tmp_path / "runs" / "digits-pmdd" / "stage1" / "best.pt"
    best.parent.mkdir(parents=True)
    best.write_bytes(b"kept")
    assert call(monkeypatch, measure_average, *argv.split()) == 2
    assert said in capsys.readouterr().err and best.read_bytes() == b"kept"
    assert [path for path in tmp_path.rglob("*") if path.is_file()] == [best]


def test_a_variant_has_its_own_record_of_averages(tmp_path, monkeypatch):
    monkeypatch.setattr(measure_average, "ROOT", tmp_path)
    monkeypatch.setattr(measure_average, "measure", lambda config, options: [])
    (tmp_path / "results").mkdir()
    for variant, row in (([], ["digits", "pmdd", 2, ""]),
                         (["--variant", "fast"], ["digits", "pmdd", 2, "fast"])):
        call(monkeypatch, measure_average, "--stage", "2", *variant, "--folder",
             str(tmp_path / "new"))
        name = "digits-pmdd-2" + "-fast" * bool(variant)
        assert json.loads((tmp_path / f"results/average/{name}.json").read_text())["row"] == row


@pytest.fixture(scope="module")
def plain(tmp_path_factory):
    """A run of before there was a ramp-up, whole."""
    folder = tmp_path_factory.mktemp("plain")
    train.main(["--stage", "1", *TINY, "--iterations", "7", "--folder", str(folder),
                "--ema-rampup", "0"])
    return folder


def test_a_run_whose_configuration_lacks_a_field_goes_on_as_it_began(plain, tmp_path):
    begun = ["--stage", "1", *TINY, "--folder", str(tmp_path)]
    train.main([*begun, "--iterations", "4", "--ema-rampup", "0"])
    path = tmp_path / "stage1" / "config.json"
    written = json.loads(path.read_text())
    for name in ("ema_rampup", "adapted_noises", "adapted_rate", "adapted_betas", "noise_range"):
        del written["config"][name]
    written["config"]["iterations"] = 7
    path.write_text(json.dumps(written))
    train.main([*begun, "--iterations", "7"])                   # the row has a ramp-up now
    assert json.loads(path.read_text())["config"]["ema_rampup"] == 0
    assert same(state(plain), state(tmp_path))


def test_the_ramp_up_moves_the_average_alone_and_resumes_to_the_bit(plain, tmp_path):
    whole, twice = tmp_path / "whole", tmp_path / "twice"
    for folder, counts in ((whole, ["7"]), (twice, ["3", "7"])):
        for count in counts:
            train.main(["--stage", "1", *TINY, "--iterations", count,
                        "--folder", str(folder), *["--force"] * (count != counts[0])])
    assert same(state(whole), state(twice))
    train.main(["--stage", "1", *TINY, "--iterations", "7", "--folder", str(tmp_path / "row")])
    ramped, constant = state(tmp_path / "row"), state(plain)
    moved = {name.split(".")[0] for name, value in ramped.items()
             if not torch.equal(value, constant[name])}
    assert moved == {"ema"}


# ---- What has been spent ----

@pytest.mark.parametrize("argv, each", [
    # The student's turn, then the others: a forward 1, back through frozen weights 2, trained 3.
    (["--stage", "1", "--loss", "dm", "--ttur", "2"], [3 + 1 + 1 + 3, 1 + 3]),
    (["--stage", "1", "--ttur", "2"], [3 + 2 + 2 + 3, 1 + 3]),
    (["--stage", "3", "--ttur", "2"], [2 + 9 + 2 + 2 + 3, 2 + 1 + 3]),
    (["--stage", "1", "--ttur", "1", "--adapted-noises", "3"], [3 + 2 + 2 + 9] * 2)])
def test_passes_are_those_of_the_iterations(argv, each):
    (_, config, _), = parse([*argv, "--batch", "4"])
    passes = Passes(train.iteration_of(config), config)
    assert [passes.until(n) for n in (1, 2, 5)] == [
        4 * each[0], 4 * sum(each), 4 * (3 * each[0] + 2 * each[1])]


@pytest.mark.parametrize("argv, steps", [
    (["--method", "dmd2", "--stage", "3", "--gan-weight", "0"], 4), (["--dataset", "emoji"], 1)])
def test_the_smallest_network_has_the_passes_of_any(argv, steps):
    (_, config, options), = parse([*argv, *["--stage", "1"] * ("--stage" not in argv)])
    rehearsed = rehearsal.Rehearsal(train.iteration, replace(config, batch=1), options.network)
    expected = sum(config.batch * one.batches * WEIGHT[one.gradient] for step in range(steps)
                   for one in rehearsed.run(step, rehearsed.optimizers()))
    assert Passes(train.iteration, config).until(steps) == expected


def test_the_teachers_passes_for_pairs_come_first():
    (_, config, _), = parse(["--method", "dmd"])
    pairs = config.regression_pairs * (2 * config.regression_steps - 1)
    assert Passes(train.iteration, config).until(0) == pairs


def test_quality_stands_beside_what_it_cost_and_compare_draws_it(tmp_path):
    train.main(["--stage", "1", *TINY, "--iterations", "4",
                "--folder", str(tmp_path)])
    train.main(["--stage", "1", *TINY, "--iterations", "8", "--force",
                "--folder", str(tmp_path)])
    folder = tmp_path / "stage1"
    config, lines = compare.read_run(folder)
    scored = [line for line in lines if "digits-FID@1" in line]
    assert [line["images"] for line in scored] == [32, 64]
    for axis in ("iterations", "images", "passes"):
        places = dict(zip([line["iteration"] for line in lines],
                          compare.positions(config, lines, axis)))
        for line in scored:
            assert places[line["iteration"]] == line.get(axis, line["iteration"] + 1)
    assert 0 < scored[0]["seconds"] <= scored[1]["seconds"]     # goes on where the first ended
    assert checkpoint.load(folder / "latest.pt")["seconds"] >= scored[1]["seconds"] - 0.1
    seconds, hours = (compare.positions(config, lines, axis)
                      for axis in ("seconds", "hours"))
    assert seconds == pytest.approx([3600 * hour for hour in hours])


# ---- Recipes ----

def test_several_noise_levels_are_one_update_and_the_adapted_network_has_its_own_rate(tmp_path):
    train.main(["--stage", "1", *TINY, "--iterations", "6", "--adapted-noises", "2",
                "--adapted-rate", "0.5", "--folder", str(tmp_path)])
    student, adapted = checkpoint.load(tmp_path / "stage1" / "latest.pt")["optimizers"]
    assert {int(one["step"]) for one in student["state"].values()} == {2}
    assert {int(one["step"]) for one in adapted["state"].values()} == {6}
    rates = [one["param_groups"][0]["lr"] for one in (student, adapted)]
    assert rates[1] == rates[0] / 2 > 0


def test_each_image_has_several_noises_and_a_noise_range_is_kept():
    (_, config, options), = parse(["--stage", "1", "--batch", "64"])
    (_, more, _), = parse(["--stage", "1", "--batch", "64", "--adapted-noises", "2"])
    (_, low, _), = parse(["--stage", "1", "--batch", "64", "--noise-range", "0.3", "0.4"])
    network = rehearsal.Rehearsal(train.iteration, config, options.network).sources
    sources = Sources(network.shape, KARRAS, network.conditions)
    one, = draw(config, 0, sources, options)
    assert one.sigma_adapted.shape == (64, 1, 1, 1, 1)
    two, = draw(more, 0, sources, options)
    assert two.eps_adapted.shape[:2] == (64, 2)
    assert not torch.equal(two.eps_adapted[:, 0], two.eps_adapted[:, 1])
    within, = draw(low, 0, sources, options)
    at = KARRAS.at
    assert at(0.3) <= within.sigma.min() and within.sigma.max() <= at(0.4) < one.sigma.max()


@pytest.mark.parametrize("dataset", ["digits", "cifar10", "imagenet64", "sd15", "emoji"])
def test_fast_has_half_of_the_rows_passes_up_to_each_stage_and_says_whether_it_was_run(dataset):
    spent = []
    for stage in (1, 2, 3):
        row, quick = (rows.find(dataset, "pmdd", stage, variant) for variant in ("", "fast"))
        spent.append([Passes(train.iteration, one.config).until(one.config.iterations)
                      for one in (row, quick)])
        whole, half = map(sum, zip(*spent))
        assert half < 0.5001 * whole
        if dataset != "emoji":                          # whose first stage hands over sooner
            assert 0.4 * spent[-1][0] < spent[-1][1] < 0.5001 * spent[-1][0]
        assert quick.config.final_rate == 0 and quick.paper_fid is None
        assert ("not run yet" in quick.source) == (dataset not in ("digits", "emoji"))
    assert half > 0.4 * whole
    with pytest.raises(ValueError, match="no preset for .* --variant fast; there is"):
        rows.find(dataset, "dmd", 1, "fast")


@pytest.mark.parametrize("dataset, names", [
    ("digits", ("noises-2", "ttur-falls", "near", "early")), ("emoji", ("late",))])
def test_every_change_has_the_passes_of_the_row(dataset, names):
    row = recipes.passes_of(recipes.flags_of(dataset, ""), recipes.STUDIES[dataset].iterations)
    known = recipes.CHANGES[dataset]
    for name in names:
        flags, after, share = known[name]
        spent = recipes.passes_of(recipes.flags_of(dataset, flags),
                                  recipes.iterations(f"{dataset}-{name}"))
        assert spent == pytest.approx(share * row, rel=0.03), name
        both = 2 if name in ("early", "late") else 1
        assert share == 1 or share + known[after][2] == both, name


@pytest.mark.parametrize("dataset", recipes.STUDIES)
def test_late_divides_the_passes_by_what_each_stage_gained_in_its_second_half(dataset):
    plan = recipes.PLANS[dataset]
    def gained(name, steps):
        falls = []
        for seed in plan.done(f"{dataset}-{name}"):
            _, (half, end) = plan.over_training(f"{dataset}-{name}", seed, f"{plan.metric}@{steps}")
            falls.append(math.log(half / end))
        return sum(falls) / len(falls)
    first, second = gained("row", 1), gained("near", 2)
    share = recipes.CHANGES[dataset]["late-first"][2]
    assert 2 * first / (first + second) == pytest.approx(share, abs=0.15)


@pytest.mark.parametrize("dataset, name", [
    (dataset, name) for dataset, plan in recipes.PLANS.items() for name in plan.runs])
def test_every_run_is_a_command_that_train_takes(dataset, name, monkeypatch):
    monkeypatch.setattr(recipes, "iterations", lambda name: 40)
    command, _ = recipes.commands(recipes.PLANS[dataset], name, 1)
    (_, config, options), = parse(shlex.split(command)[2:])
    assert config.seed == 1 and str(options.folder).endswith(f"{name}/seed1/stage{config.stage}")


@pytest.mark.parametrize("dataset", recipes.STUDIES)
def test_the_tables_of_recipes_leave_out_no_run(dataset, monkeypatch):
    asked = set()
    monkeypatch.setattr(recipes.Plan, "done", lambda plan, name: asked.add(name) or [])
    recipes.changes(dataset), recipes.whole(dataset)
    assert asked == {name for name in recipes.PLANS[dataset].runs if not name.endswith("-first")}


def test_the_papers_runs_have_the_passes_of_every_iteration_and_of_what_they_go_on_from():
    config = replace(rows.find("sd15", "dmd", 1).config, iterations=60, ttur=4)
    assert recipes.passes_in_all(config, sample=20) == Passes(train.iteration, config).until(60)
    assert Passes(train.iteration, config).total > 0                # the teacher's pairs, once
    table = {tuple(cells[:3]): cells for cells in (
        [cell.strip() for cell in line.split("|")[1:-1]]
        for line in recipes.published_passes().splitlines()[2:])}
    assert table["imagenet64", "dmd2 longer", "1"][3:5] == ["470", "1,008"]
    # A roll-out, an update of the adapted network, at every fifth of the student as well.
    each = 1 + 3 + (3 + 1 + 2) / 5
    assert table["cifar10", "pmdd", "1"][3] == f"{200_000 * 256 * each / 1e6:.0f}"
    for dataset in ("cifar10", "imagenet64", "sd15"):
        one, two, three = (table[dataset, "pmdd", k] for k in "123")
        assert abs(int(three[4]) - sum(int(row[3]) for row in (one, two, three))) <= 1


def test_what_a_rehearsal_remembers_changes_no_byte_and_no_flop(monkeypatch):
    class Never(dict):
        def __contains__(self, asked):
            return False

    config, found = replace(rows.find("digits", "dmd2", 1).config, batch=8), []
    for made in (Never(), kept := {}, kept):
        monkeypatch.setattr(rehearsal.Remembered, "made", made)
        found.append((plan.memory(train.iteration, config, SMALLEST, 4, precision="bf16"),
                      cost.count(train.iteration, config, SMALLEST)))
    assert found[0] == found[1] == found[2] and len(kept) > 100
