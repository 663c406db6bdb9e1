"""The papers' tables on the embedded digits, as Markdown, from the runs of experiments.tables."""

import numpy as np

from base.files import ROOT, read_json
from experiments.tables import KEPT, RUNS, score
from metrics.evaluations import read_records
from training.run_folder import read_metrics
from weights.opening import steps_text


def spread(values, form):
    if len(values) == 1:
        return f"{form.format(values[0])} (one seed)"
    mean, least, most = (form.format(f(values)) for f in (np.mean, min, max))
    return f"{mean} ({least} to {most})"


def cell(name, steps=None, what="digits-FID"):
    """Mean over the seeds that have been run (least to most)."""
    form = "{:.1%}" if what == "right_class" else "{:.3f}"
    done = [k for k in RUNS[name].seeds
            if (ROOT / KEPT / name / f"seed{k}" / "evaluation.json").exists()]
    return spread([score(name, k, steps, what) for k in done], form) if done else "not run"


def both(name, steps):
    return f"{cell(name, steps)}; {cell(name, steps, 'right_class')}"


def markdown(heading, rows):
    lines = [heading, ["---"] * len(heading), *rows]
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)


def row(text, name, steps, *paper):
    return [text, cell(name, steps), cell(name, steps, "right_class"), *paper]


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
    path, rows = ROOT / KEPT / "teacher.json", []
    entries = read_records(path) if path.exists() else []
    for entry in sorted(entries, key=lambda e: e["evaluations"]):
        forms = (("digits-FID", "{:.3f}"), ("right_class", "{:.1%}"))
        figures = [spread(entry["figures"][what]["values"], form) for what, form in forms]
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
    lines = [line for line in read_metrics(ROOT / KEPT / name / f"seed{seed}" / "metrics.jsonl")
             if "image_mean" in line]
    return [line["iteration"] for line in lines], [line["image_mean"] for line in lines]


def fid_over_training(name, seed):
    """(iterations, digits-FID) of the evaluations while it trained."""
    key = f"digits-FID@{RUNS[name].stage}"
    lines = [line for line in read_metrics(ROOT / KEPT / name / f"seed{seed}" / "metrics.jsonl")
             if key in line]
    return [line["iteration"] for line in lines], [line[key] for line in lines]


def unrest(name):
    """Standard deviation of the brightness over the second half of training, mean over seeds."""
    found = []
    for seed in RUNS[name].seeds:
        if (ROOT / KEPT / name / f"seed{seed}" / "metrics.jsonl").exists():
            values = brightness(name, seed)[1]
            found.append(np.std(values[len(values) // 2:]))
    return f"{np.mean(found):.4f}" if found else "not run"


def weightings():
    """g. DMD Table 2 right."""
    return markdown(["DMD, one step", "digits-FID", "right class", "paper, CIFAR-10"],
                    [row("w = sigma", "dmd-sigma", 1, "3.60"),
                     row("w = sigma^3", "dmd-sigma3", 1, "3.71"),
                     row("Eq. 8", "dmd", 1, "2.66")])


def again():
    """What was made a second time."""
    path = ROOT / KEPT / "again.json"
    words = {True: "equal to the last digit", False: "differs"}
    return markdown(["run", "seed", "figures at every number of steps", "every line of its log"],
                    [[f"`{one['run']}`", str(one["seed"]), words[one["figures"]],
                      words[one["metrics"]]] for one in (read_json(path) if path.exists() else [])])


TABLES = {f.__name__: f for f in (methods, steps, budgets, two_step_ablation, unforget_weights,
                                  ttur, weightings, again)}
