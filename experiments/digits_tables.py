"""The papers' tables on the embedded digits, as Markdown, from the runs of experiments.tables."""

import numpy as np

from base.files import ROOT
from experiments.recorded_runs import form_of, markdown, spread
from experiments.tables import PLAN, RUNS
from metrics.evaluations import read_records
from weights.opening import steps_text

cell, row, both = PLAN.cell, PLAN.row, PLAN.both


def methods():
    """a. PMDD Table 1, DMD Table 2 left, DMD2 Table 3."""
    return markdown(
        ["one step", "digits-FID", "right class", "paper, CIFAR-10", "paper, ImageNet-64"],
        [row("DMD", "dmd", 1, "2.66", "2.62"),
         row("DMD without regression", "dmd-no-regression", 1, "5.58", "5.61; DMD2: 3.48"),
         row("DMD without distribution matching", "dmd-no-dm", 1, "3.82", "9.21"),
         row("DMD without regression, TTUR 5", "dmd2-no-gan", 1, "-", "2.61"),
         row("that with GAN: DMD2", "dmd2", 1, "-", "1.51"),
         row("GAN alone, TTUR 5", "gan-alone", 1, "-", "2.56; TTUR 5: 2.52"),
         row("SiD, alpha 1.2", "sid", 1, "1.71", "1.52"),
         row("PMDD, stage 1", "pmdd-1", 1, "2.52", "2.60")])


def steps():
    """b. PMDD Tables 1 and 5."""
    rows = [row(f"PMDD with sid, {steps_text(k)}", f"pmdd-{k}", k, *paper)
            for k, paper in ((1, ("2.52", "2.60")), (2, ("2.19", "1.95")), (3, ("2.48", "2.14")))]
    rows += [row(f"PMDD with dm, {steps_text(k)}", name, k, *paper)
             for k, name, paper in ((1, "dmd2-no-gan", ("3.49", "3.70")),
                                    (2, "pmdd-dm-2", ("2.91", "3.58")),
                                    (3, "pmdd-dm-3", ("2.86", "3.47")))]
    rows += [row(f"DMD2 without GAN, {k} steps together", f"dmd2-{k}", k, "-", "-") for k in (2, 3)]
    return markdown(["", "digits-FID", "right class", "paper, CIFAR-10", "paper, ImageNet-64"],
                    rows + teacher_rows())


def teacher_rows():
    path, rows = ROOT / PLAN.kept / "teacher.json", []
    entries = read_records(path) if path.exists() else []
    for entry in sorted(entries, key=lambda e: e["evaluations"]):
        figures = [spread(entry["figures"][what]["values"], form_of(what))
                   for what in (PLAN.metric, PLAN.share)]
        text = f"teacher, {entry['evaluations']} evaluation" + "s" * (entry["evaluations"] > 1)
        rows.append([text, *figures, "-", "-"])
    return rows


def budgets():
    """c. PMDD Table 3."""
    return markdown(
        ["three-step student sampled at", "3 steps", "2 steps", "1 step"],
        [[text, *(both(name, k) for k in (3, 2, 1))]
         for text, name in (("DMD2 without GAN", "dmd2-3"), ("PMDD with dm", "pmdd-dm-3"),
                            ("PMDD with sid", "pmdd-3"))]
        + [["paper, COCO: DMD2 without GAN", "9.18", "10.36", "23.32"],
           ["paper, COCO: PMDD", "8.50", "10.07", "12.65"]])


def two_step_ablation():
    """d. PMDD Table 4."""
    rows = [("neither", "two-none", "5.89", "8.01"),
            ("+ unforget, beta 1", "two-unforget", "3.02", "3.71"),
            ("+ external sampling", "pmdd-dm-2", "2.94", "3.58"),
            ("+ sid in place of dm", "pmdd-2", "2.21", "1.99")]
    return markdown(
        ["two steps, dm", "digits-FID", "the same student at one step", "right class",
         "paper, CIFAR-10", "paper, ImageNet-64"],
        [[text, cell(name, 2), cell(name, 1), cell(name, 2, "right_class"), *paper]
         for text, name, *paper in rows])


def unforget_weights():
    """e. PMDD Table 6 and Figure 2."""
    paper = {"0.3": ("8.57", "11.81", "8.63", "11.67"), "1": ("8.66", "11.52", "8.79", "11.42"),
             "3": ("8.61", "10.50", "8.89", "10.98"), "10": ("9.00", "9.99", "9.44", "10.07")}
    rows = []
    for weight in ("0", "0.3", "1", "3", "10"):
        names = [f"beta-{weight}-{s}" for s in ("external-sampling", "no-external-sampling")]
        names[0] = names[0] if names[0] in RUNS else "pmdd-2"
        rows.append([weight, *(both(name, k) for name in names for k in (2, 1)),
                     " / ".join(paper.get(weight, ["-"]))])
    return markdown(["beta", "external: 2 steps", "external: 1 step", "own: 2 steps", "own: 1 step",
                     "paper, COCO: these four"], rows)


def ttur():
    """f. DMD2 appendix C."""
    return markdown(
        ["dm without regression or GAN", "digits-FID", "right class", "brightness moves by",
         "paper, ImageNet-64"],
        [[f"TTUR {k}", cell(name, 1), cell(name, 1, "right_class"), unrest(name), paper]
         for k, name, paper in ((1, "dmd-no-regression", "3.48"), (5, "dmd2-no-gan", "2.61"),
                                (10, "dm-ttur-10", "-"))])


def brightness(name, seed):
    """(iterations, brightness of the batch) from the metrics."""
    return PLAN.over_training(name, seed, "image_mean")


def fid_over_training(name, seed):
    """(iterations, digits-FID) of the evaluations while it trained."""
    return PLAN.over_training(name, seed, f"digits-FID@{RUNS[name].stage}")


def unrest(name):
    """Standard deviation of the brightness over the second half of training, mean over seeds."""
    found = []
    for seed in RUNS[name].seeds:
        if (ROOT / PLAN.record(name, seed, "metrics.jsonl")).exists():
            values = brightness(name, seed)[1]
            found.append(np.std(values[len(values) // 2:]))
    return f"{np.mean(found):.4f}" if found else "not run"


def weightings():
    """g. DMD Table 2 right."""
    return markdown(["DMD, one step", "digits-FID", "right class", "paper, CIFAR-10"],
                    [row("w = sigma", "dmd-sigma", 1, "3.60"),
                     row("w = sigma^3", "dmd-sigma3", 1, "3.71"),
                     row("Eq. 8", "dmd", 1, "2.66")])


def with_constant_average():
    """The runs as they were with `--ema-halflife 4000 --ema-rampup 0`."""
    return markdown(["run", "digits-FID at its own steps, constant half-life", "ramps up"],
                    [[f"`{name}`", cell(name, file="constant-average.json"), cell(name)]
                     for name in RUNS])


TABLES = {f.__name__: f for f in (methods, steps, budgets, two_step_ablation, unforget_weights,
                                  ttur, weightings, with_constant_average)}
TABLES["again"] = PLAN.compared
