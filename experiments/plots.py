"""Pictures of recorded runs of the digits, for docs/; they need matplotlib."""

import numpy as np
from PIL import Image

from base.files import ROOT
from experiments.digits_tables import brightness as brightness_of, fid_over_training
from images.pictures import add_row_labels, draw_curves, matplotlib_pyplot, save_png
from metrics.evaluations import records_under
from training.run_folder import read_metrics

RESULTS = ROOT / "results"


def draw_all():
    matplotlib_pyplot()
    if (RESULTS / "tables" / "dm-ttur-10" / "seed0" / "metrics.jsonl").exists():
        brightness()
    fid_by_evaluations()
    for stage in ("stage1", "stage2", "stage3"):        # of the embedded student
        folder = RESULTS / "embedded" / stage
        draw_curves(read_metrics(folder / "metrics.jsonl"), folder / "curves.png")
    runs = ROOT / "runs" / "embedded"                   # of `make assets`
    if any(runs.glob("stage[1-9]/samples/*.png")):
        progress(runs, RESULTS / "progress.png")
    else:
        print(f"no new progress.png: {runs} has no samples; make assets makes them")


def brightness():
    """DMD2 Figure 8: brightness of the student's images over training, by TTUR."""
    plt = matplotlib_pyplot()
    figure, axes = plt.subplots(1, 2, figsize=(9, 2.8), layout="constrained")
    for ttur, name in ((1, "dmd-no-regression"), (5, "dmd2-no-gan"), (10, "dm-ttur-10")):
        axes[0].plot(*brightness_of(name, 0), label=f"TTUR {ttur}", linewidth=1)
        axes[1].plot(*fid_over_training(name, 0), label=f"TTUR {ttur}", marker=".")
    axes[0].set(xlabel="iterations", ylabel="brightness of a batch")
    axes[1].set(xlabel="iterations", ylabel="digits-FID, 2,000 images", yscale="log")
    save(figure, axes, "brightness.png")


def fid_by_evaluations():
    plt = matplotlib_pyplot()
    figure, axis = plt.subplots(figsize=(5.5, 3.2), layout="constrained")
    entries = records_under([RESULTS / "embedded"])
    for text, mine in (("teacher, Heun", lambda e: "Heun" in e["what"]),
                       ("student, 1, 2, 3 steps", lambda e: "Heun" not in e["what"])):
        points = sorted((e["evaluations"], e["figures"]["digits-FID"]["mean"])
                        for e in entries if mine(e))
        axis.plot(*zip(*points), label=text, marker="o")
    axis.set(xlabel="network evaluations of an image", ylabel="digits-FID, 50,000 images",
             xscale="log", yscale="log")
    save(figure, [axis], "digits-fid.png")


def save(figure, axes, name):
    plt = matplotlib_pyplot()
    for axis in axes:
        axis.legend(fontsize=8)
        axis.grid(alpha=0.3)
    figure.savefig(RESULTS / name, dpi=100)
    plt.close(figure)


def progress(run, out, columns=2):
    """The first columns of each sample grid of a run, top to bottom as it trained."""
    strips, labels = [], []
    for stage in sorted(run.glob("stage[1-9]")):
        files = sorted((stage / "samples").glob("*.png"))
        for file in (files[0], files[len(files) // 2], files[-1]):
            picture = np.asarray(Image.open(file))
            cells = np.split(picture[1:], 10)           # a row of the grid for each class
            width = (picture.shape[1] - 1) // 8 * columns
            strip = np.concatenate([cell[:, :width] for cell in cells], axis=1)
            strips.append(np.pad(strip, ((0, 5), (0, 0)), constant_values=255))
            labels.append(f"stage {stage.name[-1]}, iteration {int(file.stem):,}")
    picture = Image.fromarray(np.concatenate(strips))
    save_png(add_row_labels(picture, labels, len(strips), strips[0].shape[0]), out)
