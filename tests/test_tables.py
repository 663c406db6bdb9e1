"""The papers' tables: what is recorded is what the commands say, and all of it is shown."""

import dataclasses
import json
import shlex
import shutil
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
from PIL import Image

from base.errors import UserError
from experiments import digits_tables, emoji_tables, plots, recipes, recorded_runs, tables
from helpers import call
from images.pictures import grid
from presets.config import Config
from training import options

ROOT = Path(__file__).resolve().parents[1]
RECORDED = [(plan, p.parents[1].name, int(p.parent.name.removeprefix("seed")))
            for plan in (tables.PLAN, emoji_tables.PLAN, *recipes.PLANS.values())
            for p in sorted((ROOT / plan.kept).glob("*/*/evaluation.json"))
            if p.with_name("config.json").exists()]             # what is trained
DEFAULTS = json.loads(json.dumps(vars(Config())))
TEXT = (ROOT / "docs" / "RESULTS.md").read_text()


def test_the_page_of_results_states_the_budget_that_the_commands_have():
    for number in (tables.ITERATIONS, tables.IMAGES):
        assert f"{number:,}" in TEXT
    command = tables.commands(tables.PLAN, "pmdd-1", 0)[0]
    assert f"--iterations {tables.ITERATIONS} " in command and "--ttur 5 " in command


@pytest.mark.parametrize("name", tables.RUNS)
def test_every_run_is_a_command_that_train_takes(name, monkeypatch, tmp_path):
    monkeypatch.chdir(tmp_path)
    train, evaluate = tables.commands(tables.PLAN, name, 1)
    (_, config, where), = options.parse(shlex.split(train)[2:])
    assert config.seed == 1 and str(where.folder).endswith(f"{name}/seed1/stage{config.stage}")
    assert config.stage == tables.RUNS[name].stage == len(config.sigmas)
    assert config.iterations == tables.ITERATIONS * tables.RUNS[name].stages
    assert config.final_rate == 1 and config.batch == 128
    if tables.RUNS[name].after:
        before = tables.RUNS[tables.RUNS[name].after]
        assert before.stage == config.stage - 1 and set(tables.RUNS[name].seeds) <= {*before.seeds}


def test_rows_that_are_compared_differ_by_their_flags_alone(monkeypatch, tmp_path):
    monkeypatch.chdir(tmp_path)

    def config(name):
        (_, config, _), = options.parse(shlex.split(tables.commands(tables.PLAN, name, 0)[0])[2:])
        return {k: v for k, v in vars(config).items() if k not in ("method", "start_from")}

    def differing(a, b):
        return {k for k, v in config(a).items() if v != config(b)[k]}

    assert differing("dmd", "dmd-no-regression") == {"regression_weight"}
    assert differing("dmd-no-regression", "dmd2-no-gan") == {"ttur", "regression_pairs"}
    assert differing("dmd2", "dmd2-no-gan") == {"gan_weight"}
    assert differing("dmd2", "gan-alone") == {"loss"}
    assert differing("pmdd-1", "dmd2-no-gan") == {"loss"}
    assert differing("pmdd-2", "pmdd-dm-2") == {"loss"}
    assert differing("two-none", "two-unforget") == {"unforget_weight"}
    assert differing("two-unforget", "pmdd-dm-2") == {"external_sampling"}
    assert differing("dm-ttur-10", "dmd2-no-gan") == {"ttur"}
    assert differing("dmd-sigma", "dmd") == differing("dmd-sigma3", "dmd") == {"dm_weighting"}


@pytest.mark.parametrize("plan, name, seed", RECORDED, ids=lambda x: str(getattr(x, "kept", x)))
def test_a_record_is_of_its_command(plan, name, seed):
    folder = ROOT / plan.record(name, seed, "")
    commands = (folder / "commands.txt").read_text().splitlines()
    assert commands == plan.commands(plan, name, seed)
    (_, config, _), = options.parse(shlex.split(commands[0])[2:])
    recorded = json.loads((folder / "config.json").read_text())["config"]
    saves = {"save_every": config.save_every}                   # which no figure depends on
    now = json.loads(json.dumps(vars(config)))
    assert now == DEFAULTS | recorded | saves                   # of fields that came later
    assert plan.score(name, seed) > 0
    assert 0 < plan.score(name, seed, 1, plan.share) <= 1


def test_the_tables_leave_out_no_run():
    shown = "\n".join(table() for name, table in digits_tables.TABLES.items()
                      if name != "with_constant_average")       # which only repeats them
    for name in tables.RUNS:
        for cell in {digits_tables.cell(name)} - {"not run"}:
            assert cell in shown, name


def test_a_run_is_made_once_and_made_again_the_same(monkeypatch, tmp_path, capsys):
    monkeypatch.setattr(tables, "ITERATIONS", 10)
    monkeypatch.setattr(tables, "IMAGES", 64)
    monkeypatch.setattr(tables, "COMMON", "--batch 8 --evaluate-every 10 --evaluate-images 64")
    plan = dataclasses.replace(tables.PLAN, kept=tmp_path / "kept", work=tmp_path / "work")
    for _ in range(2):
        recorded_runs.make_all(plan, ["pmdd-1"], (0,), 1)
    assert capsys.readouterr().out.count("pmdd-1, seed 0") == 1         # the second found it made

    recorded_runs.make_again(plan, ["pmdd-1"], (0,), 1)
    equal = "equal to the last digit"
    assert f"| `pmdd-1` | 0 | {equal} | {equal} |" in plan.compared()
    shutil.copytree(plan.again.kept, tmp_path / "second")       # which would be the same again
    monkeypatch.setattr(recorded_runs, "make_all", lambda again, *args: shutil.copytree(
        tmp_path / "second", again.kept))
    log = tmp_path / "kept" / "pmdd-1" / "seed0" / "metrics.jsonl"
    lines = log.read_text().splitlines()
    log.write_text("\n".join([lines[0].replace('"iteration": ', '"iteration": 1'), *lines[1:]]))
    recorded_runs.make_again(plan, ["pmdd-1"], (0,), 1)
    assert "| `pmdd-1` | 0 | equal to the last digit | differs |" in plan.compared()
    other = {"run": "dmd", "seed": 2, "figures": True, "metrics": True}
    (plan.kept / "again.json").write_text(json.dumps([other]))
    recorded_runs.make_again(plan, ["pmdd-1"], (0,), 1)     # what others found stays
    assert json.loads((plan.kept / "again.json").read_text())[0] == other


def test_only_what_was_recorded_is_made_again_and_nothing_stale_stays_beside_a_run(monkeypatch,
                                                                                   tmp_path):
    plan = dataclasses.replace(tables.PLAN, kept=tmp_path / "kept", work=tmp_path / "work")
    with pytest.raises(UserError, match="no record of dmd of seed 0, sid of seed 0"):
        recorded_runs.make_again(plan, ["dmd", "sid"], (0,), 1)
    stale = plan.record("dmd", 0, "unseen-pair.json")
    stale.parent.mkdir(parents=True)
    before = stale.with_name("constant-average.json")
    stale.write_text("[]"), before.write_text("[]")
    monkeypatch.setattr(recorded_runs, "execute", lambda command: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        recorded_runs.make(plan, "dmd", 0, ["dmd"])
    assert not stale.exists() and before.exists()


def test_made_again_alone_it_starts_from_the_same_checkpoint(monkeypatch, tmp_path):
    plan = dataclasses.replace(tables.PLAN, kept=tmp_path / "kept", work=tmp_path / "work")
    for path in (plan.record("pmdd-2", 0), plan.best("pmdd-1", 0)):
        path.parent.mkdir(parents=True)
        path.write_text("the first")
    started = []
    monkeypatch.setattr(recorded_runs, "make_all", lambda again, *args: started.append(
        again.best("pmdd-1", 0).read_text()))
    monkeypatch.setattr(recorded_runs.Plan, "scores", lambda *args: [])
    monkeypatch.setattr(recorded_runs.Plan, "log", lambda *args: [])
    recorded_runs.make_again(plan, ["pmdd-2"], (0,), 1)
    assert started == ["the first"]


def test_what_a_run_starts_from_is_trained_again_where_only_its_record_is_left(monkeypatch,
                                                                               tmp_path):
    """The chain of three: the record of two, the checkpoint of none."""
    plan = dataclasses.replace(tables.PLAN, kept=tmp_path / "kept", work=tmp_path / "work")
    for name in ("pmdd-1", "pmdd-2"):
        plan.record(name, 0).parent.mkdir(parents=True)
        plan.record(name, 0).write_text("{}\n")
        plan.record(name, 0, "commands.txt").write_text(plan.text(name, 0))
    ran = []
    monkeypatch.setattr(recorded_runs, "execute", ran.append)
    names = ["pmdd-1", "pmdd-2", "pmdd-3"]
    for name in names[:2]:
        recorded_runs.make(plan, name, 0, names[:2])
    assert not ran                                              # nothing starts from them
    for name in names[:2]:
        recorded_runs.make(plan, name, 0, names)
    assert ran == [plan.commands(plan, name, 0)[0] for name in names[:2]]


@pytest.mark.parametrize("argv, said", [
    (["--jobs", 0], "--jobs 0"), (["--again", "--seeds", 7], "--seeds 7: none"),
    (["--only", "dmd-sigma", "--seeds", 1], "--seeds 1: none"), (["--only", "x"], "--only x")])
def test_a_mistake_ends_with_two_and_one_line(argv, said, monkeypatch, capsys):
    monkeypatch.setattr(recorded_runs, "make_all", None)
    assert call(monkeypatch, tables, *argv) == 2
    error = capsys.readouterr().err
    assert error.count("\n") == 1 and said in error


def test_the_picture_of_a_runs_progress_is_of_each_stages_first_middle_and_last_samples(tmp_path):
    for stage, shades in (("stage1", (10, 20, 30)), ("stage2", (40, 50))):
        (tmp_path / stage / "samples").mkdir(parents=True)
        for k, shade in enumerate(shades):
            cells = np.full((80, 1, 8, 8), shade, np.uint8)
            grid(cells, 8).save(tmp_path / stage / "samples" / f"{100 * k:06d}.png")
    plots.progress(tmp_path, tmp_path / "progress.png")
    picture = np.asarray(Image.open(tmp_path / "progress.png"))
    height = len(picture) // 6
    found = [picture[k * height + height // 3, -5] for k in range(6)]
    assert found == [10, 20, 30, 40, 50, 50]


def test_a_plan_that_none_of_the_names_is_of_is_left_alone(monkeypatch):
    made = []
    for way in ("make_all", "make_again"):
        monkeypatch.setattr(recorded_runs, way, lambda plan, names, *rest: made.append(names))
    for again in (False, True):
        args = SimpleNamespace(only=["digits-row"], seeds=[0], jobs=1, again=again)
        for plan in recipes.PLANS.values():
            recorded_runs.run_all(args, plan)
    assert made == [["digits-row"]] * 2


def test_no_run_goes_on_from_one_that_is_not_made(monkeypatch, tmp_path):
    made, plan = [], dataclasses.replace(tables.PLAN, kept=tmp_path / "kept")
    monkeypatch.setattr(recorded_runs, "make_all", lambda plan, names, *rest: made.extend(names))
    args = SimpleNamespace(only=["pmdd-2"], seeds=[0], jobs=1, again=False)
    with pytest.raises(UserError, match="pmdd-2 starts from pmdd-1 of seed 0, which is not made"):
        recorded_runs.run_all(args, plan)
    args.only = ["pmdd-2", "pmdd-1"]
    recorded_runs.run_all(args, plan)
    assert made == ["pmdd-1", "pmdd-2"]
