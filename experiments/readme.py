"""The generated parts of README.md and docs/, from recorded runs, presets and the files themselves.

    python -m experiments.readme            writes them between the "generated" and "end" comments
"""

import ast
import re
import textwrap
from functools import partial
from pathlib import Path

from base.download import PUBLISHED
from base.errors import Parser, UserError, run
from base.files import ROOT, read_json, write_atomically
from experiments import digits_tables as tables, emoji_tables, recipes as tried, speed_tables
from experiments.recorded_runs import markdown
from experiments.speed_tables import result
from images.captioned import KINDS
from metrics.emoji_judge import load_emoji_network
from metrics.evaluations import cell, records_under, table
from presets.rows import PRESETS, find
from training.run_folder import read_metrics
from weights.opening import steps_text

PAGES = (ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md")))
BEFORE_TEXT = 13                # deviations that are not of text to image alone
ROOMS = ("base", "presets", "weights", "images", "metrics", "training", "experiments")


# ---- Text and code that stand elsewhere too ----

def iteration():
    return quoted((ROOT / "train.py").read_text())


def quoted(source):
    """The function `iteration` from its first heading comment to its return."""
    function = next(node for node in ast.parse(source).body
                    if isinstance(node, ast.FunctionDef) and node.name == "iteration")
    inside = source.splitlines()[function.lineno:function.body[-1].end_lineno]
    indent = " " * function.body[-1].col_offset
    start = next(k for k, line in enumerate(inside) if line.startswith(f"{indent}# "))
    return f"```python\n{textwrap.dedent(chr(10).join(inside[start:]))}\n```"


def deviations():
    """A line for each heading of docs/DEVIATIONS.md that has a number: what stands in italics; one
    line for those of text to image."""
    page = (ROOT / "docs" / "DEVIATIONS.md").read_text()
    found = [(f"{number}. [{{}}](docs/DEVIATIONS.md#{slug(f'{number}. {title}')})", title, what)
             for number, title, what in re.findall(
                 r"^## (\d+)\. (.+)\n\n_(.+)_$", page, flags=re.MULTILINE)]
    lines = [f"{link.format(title)}: {what}" for link, title, what in found[:BEFORE_TEXT]]
    first, *_ = of_text = found[BEFORE_TEXT:]
    titles = ", ".join(title for _, title, _ in of_text)
    return "\n".join([*lines, f"{first[0].format('Text to image')}, to {len(found)}: {titles}."])


def slug(heading):
    """The anchor that GitHub gives a heading."""
    return re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-")


def says_of_itself(path):
    return ast.get_docstring(ast.parse(path.read_text())).splitlines()[0]


def rooms():
    return markdown(["room", "what it knows"],
                    [[f"`{room}/`", says_of_itself(ROOT / room / "__init__.py")]
                     for room in ROOMS])


def files():
    """Every script with the first line of what it says of itself, by room."""
    parts = []
    for room in ("", *ROOMS):
        paths = sorted((ROOT / room).glob("[!_]*.py"))
        about = says_of_itself(ROOT / room / "__init__.py") if room else (
            "The commands, and the mathematics.")
        parts += [f"## {room or 'The root'}", about, markdown(
            ["file", "what it does"],
            [[f"[`{path.name}`](../{path.relative_to(ROOT)})", says_of_itself(path)]
             for path in paths])]
    return "\n\n".join(parts)


def flags(method, stage, variant):
    given = [f"--method {method}" * (method != "pmdd"), f"--stage {stage}",
             f"--variant {variant}" * bool(variant)]
    return f"`{' '.join(filter(None, given))}`"


def recipes(dataset):
    """The presets of text to image, with what their papers report."""
    rows = []
    for (of, method, stage, variant), p in PRESETS.items():
        if of == dataset:
            reported = ("-" if value is None else f"{value:{form}}" for value, form in (
                (p.paper_fid, ".2f"), (p.paper_clip, ".3f")))
            rows.append([flags(method, stage, variant), p.source, p.gpus, p.hours,
                         f"{p.config.guidance:g}", f"{p.config.batch:,}",
                         f"{p.config.iterations:,}", *reported])
    return markdown([f"`train.py --dataset {dataset}`", "source", "authors' GPUs", "hours",
                     "guidance", "batch", "iterations", "FID", "CLIP"], rows)


def presets(dataset):
    rows = []
    for (of, method, stage, variant), p in PRESETS.items():
        if of == dataset:
            hours = "" if p.hours == "-" else f"; hours: {p.hours}"
            rows.append([flags(method, stage, variant), p.source, p.gpus + hours,
                         str(p.config.batch), f"{p.config.iterations:,}",
                         f"{p.images / 1e6:,.0f}M",
                         "-" if p.paper_fid is None else f"{p.paper_fid:.2f}"])
    return markdown([f"`train.py --dataset {dataset}`", "source", "authors' hardware", "batch",
                     "iterations", "images", "paper's FID"], rows)


def published():
    """What may be downloaded, and how it is known to be the right file."""
    rows = []
    for entry in PUBLISHED.values():
        known = [name for name, value in (("sha256", entry.sha256), ("md5", entry.md5),
                                          ("size", entry.size)) if value]
        rows.append([f"[{entry.name}]({entry.urls[0]})", " and ".join(known) or "being whole",
                     entry.licence])
    return markdown(["file", "checked by", "licence"], rows)


# ---- Figures of students and teachers ----

def summary():
    """Five rows of the headline: the student, and its teacher at as many evaluations and at few."""
    found = {entry["evaluations"]: entry for entry in records_under([ROOT / "results/embedded"])}
    rows = []
    for count in (1, 2, 3, 35, 9):
        entry, figures = found[count], found[count]["figures"]
        what = f"student, {entry['what']}" if count <= 3 else f"teacher, {count} evaluations"
        rows.append([what, cell(figures["digits-FID"], "{:.3f}"),
                     cell(figures["right_class"], "{:.2%}")])
    return markdown(["", "digits-FID", "right class"], rows)


def emoji_judge():
    """What its training recorded of it on fresh real pictures."""
    shares = load_emoji_network().accuracy
    return markdown(list(shares), [[f"{share:.2%}" for share in shares.values()]])


def emoji_embedded():
    """The embedded emoji: figures of captions as in training, and right pictures by kind."""
    found = {kind: {entry["evaluations"]: entry["figures"]
                    for entry in records_under([ROOT / "results/emoji/embedded" / f"{kind}.json"])}
             for kind in KINDS}
    rows = [[f"student, {steps_text(count)}" if count <= 3 else f"teacher, {count} evaluations",
             cell(figures["emoji-FID"], "{:.2f}"),
             *(cell(found[kind][count]["right_picture"], "{:.1%}") for kind in KINDS)]
            for count, figures in sorted(found["training"].items())]
    return markdown(["", "emoji-FID", *(kind.replace("-", " ") for kind in KINDS)], rows)


def emoji_steps():
    """How guidance and noise of each stage move the student: of its newest evaluation."""
    study = ROOT / "results" / "emoji" / "study"

    def chain(run, stage):
        """The configurations of a run's stages."""
        config = read_json(study / run / stage / "config.json")["config"]
        before = Path(config["start_from"]).parts[1:3] or (run, f"stage{config['stage'] - 1}")
        return [*(chain(*before) if config["stage"] > 1 else ()), config]

    rows = []
    for folder in sorted(study.glob("*/stage*"), key=lambda path: (path.name, path.parent.name)):
        configs, scored = chain(folder.parent.name, folder.name), [
            line for line in read_metrics(folder / "metrics.jsonl") if "emoji-FID@1" in line]
        far = (one["noise_range"][1] if one.get("noise_range") else 0.98 for one in configs)
        figures = [f"{scored[-1][f'{name}@{k}']:{form}}" if k <= len(configs) else "-"
                   for name, form in (("emoji-FID", ".1f"), ("right_picture", ".1%"))
                   for k in (1, 2, 3)]
        rows.append([", ".join(f"{one['guidance']:g}" for one in configs),
                     ", ".join(f"{share:g}" for share in far),
                     ", ".join(f"{one['iterations']:,}" for one in configs), *figures])
    return markdown(["guidance of the stages", "noise up to", "iterations", "emoji-FID: 1 step",
                     "2", "3", "right picture: 1 step", "2", "3"], rows)


def evaluations(folder):
    """Every row that evaluate.py recorded there, and the protocols that they stand for."""
    return table(records_under([ROOT / "results" / folder])).replace("\nProtocol", "\n- Protocol")


def heldout():
    """Loss of the digits teacher on digits that it has, and has not, been shown."""
    curve = result("heldout.json")["curve"][3::2]
    return markdown(["iterations", *(f"{p['iterations']:,}" for p in curve)],
                    [[f"loss on {name} digits", *(f"{p[name]:.3f}" for p in curve)]
                     for name in ("seen", "unseen")])


def averages():
    """How fast the average should forget: of one training, by measure_average.py."""
    curve = result("average/digits-pmdd-1.json")["curve"]
    shown = {"weights": "the weights", "0": "constant half-life", "0.02": "ramps up, 0.02",
             "0.05": "0.05", "0.1": "0.1", "0.2": "0.2"}
    return markdown(["digits-FID after iterations", *shown.values()],
                    [[f"{one['iterations']:,}", *(f"{one[name][0]:.2f}" for name in shown)]
                     for one in curve])


def averages_of_rows():
    """The weights and the row's own average, from the second evaluation on, of each block."""
    rows = []
    for path in sorted((ROOT / "results" / "average").glob("*.json"), key=lambda path: path.stem):
        measured = read_json(path)
        dataset, method, stage, variant = measured["row"]
        share = f"{find(dataset, method, stage, variant).config.ema_rampup:g}"
        row = f"{dataset}, {' '.join(filter(None, (method, variant)))}, stage {stage}"
        rows += [[row, f"{one['iterations']:,}",
                  *(f"{value:.2f}" for name in ("weights", share) for value in one[name])]
                 for one in measured["curve"][1:]]
    return markdown(["row", "iterations", "the weights", "other images", "the average",
                     "other images"], rows)


def in_two(make):
    """A table of cells "digits-FID; right class" as one table for each."""
    heading, _, *rows = [line.strip("| ").split(" | ") for line in make().splitlines()]
    paired = [k for k in range(len(heading)) if k == 0 or any("; " in row[k] for row in rows)]
    distances = [[one.split("; ")[0] for one in row] for row in rows]
    shares = [[row[k].split("; ")[-1] for k in paired] for row in rows if "; " in row[1]]
    return (f"digits-FID:\n\n{markdown(heading, distances)}\n\nRight class:\n\n"
            + markdown([heading[k] for k in paired], shares))


# ---- Reliability ----

def soak():
    """What the long version of the fault tests has done, and how often."""
    r = result("soak.json")
    kills, damage, ranks = r["kills"], r["damaged checkpoints"], r["dead ranks"]
    odd, hostile = r["odd folders"], r["hostile files"]
    rows = [
        (f"SIGKILL at a random moment, {kills['during_a_write']} of them while a checkpoint was "
         "being written; stages 1, 2, 3, SiD, GAN, regression", kills["kills"],
         f"{kills['lost']} checkpoints lost; the end bit for bit that of a run never killed"),
        ("SIGTERM, Ctrl-C at a random moment of the loop", r["stops"]["stops"],
         "exit code 3; resumed bit for bit"),
        ("a disk that fills up during a checkpoint, a grid of samples, a line of metrics",
         r["full disks"]["full_disks"], "one line, exit code 1; went on bit for bit"),
        (f"`latest.pt` cut off ({damage['truncated']}), a bit flipped ({damage['flipped']}), "
         "emptied, a pickle with code",
         sum(damage[k] for k in ("truncated", "flipped", "emptied", "with_code")),
         "never loaded, nothing run; `previous.pt` used, the end bit for bit the same"),
        ("a second process on the same folder", r["two processes"]["refused"],
         "refused while the first lived, not after"),
        ("a rank of torchrun killed", ranks["dead_ranks"],
         f"the others ended within {ranks['seconds_until_the_others_ended']} s and said why; "
         f"{ranks['restarts_that_resumed_exactly']} with `--max-restarts` resumed bit for bit"),
        ("half a line of metrics; a moved folder; a clock set back",
         odd["half_lines"] + odd["moved_folders"] + odd["clocks_set_back"], "nothing changed"),
        ("hostile pickles, through the commands", hostile["hostile_pickles"],
         "one line, exit code 2, nothing run"),
        ("wrong answers of a server, through the commands", hostile["bad_answers_of_a_server"],
         "one line, exit code 2, no file left"),
        ("random files and command lines", f"{r['fuzzing']['cases']:,}",
         "no traceback, exit codes as in the README, nothing written outside")]
    lines = [f"| {what} | {count} | {then} |" for what, count, then in rows]
    return "\n".join(["| what was done to it | times | what came of it |", "|---|---|---|", *lines,
                      "", f"Seed {r['seed']}, {r['seconds'] / 60:.0f} minutes; torch "
                      f"{r['versions']['torch']}, {r['versions']['device']}."])


# ---- The pages ----

PARTS = {"headline": partial(evaluations, "embedded"),
         "unforget": partial(evaluations, "unforget"),
         "presets_cifar10": partial(presets, "cifar10"),
         "presets_imagenet64": partial(presets, "imagenet64"),
         "recipes": partial(recipes, "sd15"), "recipes_sdxl": partial(recipes, "sdxl"),
         "recipes_whole": partial(tried.whole, "digits"),
         "recipes_changes": partial(tried.changes, "digits"),
         "recipes_whole_emoji": partial(tried.whole, "emoji"),
         "recipes_changes_emoji": partial(tried.changes, "emoji"),
         "published_passes": tried.published_passes,
         "text_memory": speed_tables.text_memory,
         "gpus_sd15": partial(speed_tables.gpu_memory, "sd15"),
         "gpus_sdxl": partial(speed_tables.gpu_memory, "sdxl"),
         "lora_memory": speed_tables.lora_memory,
         "presets_ffhq64": partial(presets, "ffhq64"),
         "presets_afhqv2_64": partial(presets, "afhqv2-64"),
         **{f.__name__: f for f in (
             emoji_judge, emoji_embedded, emoji_steps, iteration, deviations, rooms, files,
             published, summary, heldout, averages, averages_of_rows, soak)},
         **speed_tables.TABLES, **tables.TABLES, **emoji_tables.TABLES,
         "budgets": partial(in_two, tables.budgets),
         "unforget_weights": partial(in_two, tables.unforget_weights)}


def filled(text):
    """A page with every generated part made again."""
    def block(match):
        name = match[1]
        if name not in PARTS:
            raise UserError(f"a page asks for a part {name!r}; known: {', '.join(PARTS)}")
        return f"<!-- generated: {name} -->\n{PARTS[name]()}\n<!-- end -->"

    return re.sub(r"<!-- generated: (\w+) -->\n.*?<!-- end -->", block, text, flags=re.DOTALL)


def main():
    Parser(prog="experiments.readme",
           description="Fill in the generated parts of README.md and docs/.").parse_args()
    for page in PAGES:
        text = filled(page.read_text())
        write_atomically(page, lambda temporary, text=text: temporary.write_text(text))


if __name__ == "__main__":
    run(main)
