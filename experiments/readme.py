"""The generated parts of README.md, from recorded runs, presets and the files themselves.

    python -m experiments.readme            writes them between the "table" and "end" comments
"""

import ast
import json
import re
from statistics import median

from base.errors import Parser, UserError, run
from base.files import ROOT, write_atomically
from experiments import digits_tables as tables
from experiments.digits_tables import markdown
from metrics.evaluations import records_under, table
from presets import PRESETS

README = ROOT / "README.md"
ROOMS = ("", "base", "weights", "images", "metrics", "training", "experiments")


def headline():
    return table(records_under([ROOT / "results" / "embedded"]))


def unforget():
    return table(records_under([ROOT / "results" / "unforget"]))


def presets():
    rows = []
    for (dataset, method, stage, variant), p in PRESETS.items():
        if dataset != "digits":
            flags = [f"--dataset {dataset}", f"--method {method}" * (method != "pmdd"),
                     f"--stage {stage}", f"--variant {variant}" * bool(variant)]
            fid = "-" if p.paper_fid is None else f"{p.paper_fid:.2f}"
            cells = [f"`{' '.join(filter(None, flags))}`", p.source, p.gpus, p.hours,
                     str(p.config.batch), f"{p.config.iterations:,}", f"{p.images / 1e6:,.0f}M",
                     fid, "not run here"]
            rows.append(f"| {' | '.join(cells)} |")
    head = ["train.py", "source", "authors' hardware", "hours", "batch", "iterations", "images",
            "paper's FID", "ours"]
    return "\n".join([f"| {' | '.join(head)} |", "|" + "---|" * len(head), *rows])


def heldout():
    """Loss of the digits teacher on digits that it has, and has not, been shown."""
    curve = result("heldout.json")["curve"][3::2]
    return markdown(["iterations", *(f"{p['iterations']:,}" for p in curve)],
                    [[f"loss on {name} digits", *(f"{p[name]:.3f}" for p in curve)]
                     for name in ("seen", "unseen")])


def files():
    """Every script with the first line of what it says of itself."""
    rows = []
    for path in [path for room in ROOMS for path in sorted((ROOT / room).glob("*.py"))]:
        line = ast.get_docstring(ast.parse(path.read_text())).splitlines()[0]
        rows.append(f"| `{path.relative_to(ROOT)}` | {line} |")
    return "\n".join(["| file | |", "|---|---|", *rows])


def result(name):
    return json.loads((ROOT / "results" / name).read_text())


def speed():
    """What the measuring scripts in results/ recorded."""
    fid, network = result("fid-speed.json"), result("network-speed.json")
    sampling = result("sampling-speed.json")
    few, many = sampling["evaluate.py at 1, 2 and 3 steps"]
    passes = next(v for k, v in sampling.items() if k.startswith("one pass"))
    ratios = network["ratio_ours_to_grouped"]
    rows = [
        ("Inception features, images a second, against torch-fidelity",
         f"{fid['inception']['median']['ours']:.1f} against "
         f"{fid['inception']['median']['torch_fidelity']:.1f}: "
         f"{fid['inception']['ratio_of_medians']:.2f} times", "measure_fid_speed.py"),
        ("Frechet distance, 2048 x 2048, against scipy's sqrtm",
         f"{median(fid['frechet']['ours_seconds']):.2f} s against "
         f"{fid['frechet']['sqrtm_seconds']:.2f} s: {fid['frechet']['ratio']:.1f} times faster",
         "measure_fid_speed.py"),
        ("CIFAR-10 network, batch 8, against resampling by grouped convolutions",
         f"forward {ratios['forward']:.2f}, forward and backward "
         f"{ratios['forward and backward']:.2f} of its time", "measure_network_speed.py"),
        (f"{many['images']:,} digits sampled and scored at 1, 2 and 3 steps",
         f"{many['seconds'] / 60:.1f} minutes, {many['peak_mb']} MB at the peak "
         f"({few['images']:,} images: {few['peak_mb']} MB)", "measure_sampling_speed.py"),
        ("One sampling pass of the digits network, time against fp32",
         f"bf16 {passes['bf16']['ratio_to_fp32']:.2f}, "
         f"channels_last {passes['channels_last']['ratio_to_fp32']:.2f}",
         "measure_sampling_speed.py")]
    return "\n".join([f"| what | measured on {sampling['cores']} CPU cores | by |", "|---|---|---|",
                      *(f"| {what} | {figure} | `experiments/{script}` |"
                        for what, figure, script in rows)])


def number(value):
    """Three digits, or all of them before the point."""
    return f"{value:,.0f}" if value >= 100 else f"{value:.3g}"


def benchmarks():
    """Every run of every bench.py record, by dataset, stage and loss."""
    records = [json.loads(path.read_text()) for path in (ROOT / "results").glob("bench-*.json")]
    runs = [one | {"threads": record["threads"], "device": record["device"]}
            for record in records for one in record.get("runs", ())]
    return sorted(runs, key=lambda one: (one["dataset"] != "digits", one["threads"], one["stage"],
                                         one["loss"]))


def on_gpu(one, what, say):
    """The same preset where it was measured on a GPU."""
    same = [run for run in benchmarks() if run["device"] != "cpu" and what in run and all(
        run[k] == one[k] for k in ("dataset", "method", "stage", "loss"))]
    return "; ".join(f"{run['device']}, {run['precision']}: {say(run[what])}"
                     for run in same) or "not measured"


def loop():
    """Training against its passes limit, from the records of bench.py."""
    rows = []
    for one in benchmarks():
        if one["device"] == "cpu" and "training" in one and "memory" in one:
            t, m = one["training"], one["memory"]
            e, share = t["loop_efficiency"], t["share_of_time"]
            parts = ", ".join(f"{100 * share[k]:.0f}" for k in (
                "roll-out", "student update", "adapted update", "EMA", "the rest"))
            rows.append([f"{one['dataset']}, batch {one['batch']}", str(one["threads"]),
                         f"{one['stage']}, {one['loss']}",
                         f"{e['median']:.3f} ({e['least']:.3f} to {e['most']:.3f})",
                         f"{t['seconds_of_an_iteration']['median']:.2f}",
                         number(t["images_a_second"]), parts,
                         f"{100 * share['clipping and AdamW']:.0f}",
                         *(f"{m[what]['against_plan']:.2f} of {m[what]['plan_mib']:,.0f}"
                           if what in m else "not measured" for what in ("tensors", "process")),
                         on_gpu(one, "training", lambda t: f"{number(t['images_a_second'])}, "
                                f"efficiency {t['loop_efficiency']['median']:.3f}")])
    head = ["network", "threads", "stage, loss", "loop efficiency", "seconds an iteration",
            "images a second", "% in roll-out, student, adapted, EMA, rest",
            "% in clipping and AdamW", "tensors, of MiB planned", "process, of MiB planned",
            "on a GPU"]
    return markdown(head, rows)


def sampling_cost():
    """Sampling and scoring, from the records of bench.py."""
    rows = []
    for one in benchmarks():
        if (one["device"] == "cpu" and "sampling" in one
                and "share_of_training" in one.get("scoring", {})):
            s, f = one["sampling"], one["scoring"]
            steps = [s[k] for k in ("1 step", "2 steps", "3 steps")]
            rows.append([f"{one['dataset']}, stage {one['stage']}", str(one["threads"]),
                         str(s["batch"]),
                         ", ".join(number(v["images_a_second"]) for v in steps),
                         ", ".join(f"{v['time_against_forwards']['median']:.2f}" for v in steps),
                         number(s["teacher, Heun, 18 steps"]["images_a_second"]),
                         number(f["features_a_second"]), f"{f['frechet_seconds']:.2g}",
                         f"{100 * f['share_of_training']:.0f}%",
                         on_gpu(one, "sampling", lambda s: number(s["1 step"]["images_a_second"])
                                + " images a second at 1 step")])
    head = ["network", "threads", "batch", "images a second at 1, 2, 3 steps",
            "time / single forwards",
            "teacher, 18 Heun steps", "feature images a second", "one Frechet distance, s",
            "evaluation / training", "on a GPU"]
    return markdown(head, rows)


def many_gpus():
    """On paper; nothing of it is measured."""
    scaling = result("bench-scaling.json")
    rows = [[row["dataset"], str(row["stage"]), str(row["gpus"]), f"{row['iterations']:,}",
             f"{row['teraflops_of_an_iteration']:,.0f}",
             f"{row['gradient_bytes_of_an_iteration'] / 1e9:.2f}",
             f"{1e3 * row['seconds_of_arithmetic']:.0f}",
             f"{1e3 * row['seconds_of_all_reduce']:.0f}",
             f"{row['hours']:,.1f}" + ("" if row["batch_divides"] else " (*)"),
             f"{row['hours_of_evaluations']:,.1f}"]
            for row in scaling["computed"]]
    head = ["preset", "stage", "GPUs", "iterations", "TFLOP an iteration",
            "GB of gradients an iteration", "ms of arithmetic", "ms of all-reduce",
            "hours of training", "of evaluations"]
    a = scaling["assumed"]
    return markdown(head, rows) + (
        "\n\nComputed, not measured: the slower of TFLOP / (GPUs x "
        f"{a['peak_teraflops']} TFLOP/s x "
        f"utilisation {a['utilisation']}) and of 2 (N - 1) / N times the gradients over "
        f"{a['all_reduce_bytes_a_second'] / 1e9:.0f} GB/s. An evaluation's samples at "
        f"{a['peak_teraflops_tf32']}, its features at {a['peak_teraflops_fp32']} TFLOP/s; "
        "`--evaluate-every` makes fewer. All rates are assumptions.\n"
        "(*) that batch cannot be divided by so many processes; `--batch` has to change.")


def scaling():
    """What bounds each measured curve."""
    curves = result("bench-scaling.json")["measured"]
    rows = []
    for name, curve in curves.items():
        points = curve["points"]
        rows.append([name, ", ".join(str(p[name]) for p in points), ", ".join(
            f"{1e3 * p['seconds_of_an_iteration']:.0f}" for p in points), curve["bound"]])
    return markdown(["against", "at", "ms an iteration", "bound by"], rows)


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
         "no traceback, exit codes as below, nothing written outside")]
    lines = [f"| {what} | {count} | {then} |" for what, count, then in rows]
    return "\n".join(["| what was done to it | times | what came of it |", "|---|---|---|", *lines,
                      "", f"Seed {r['seed']}, {r['seconds'] / 60:.0f} minutes; torch "
                      f"{r['versions']['torch']}, {r['versions']['device']}."])


TABLES = {"headline": headline, "presets": presets, "files": files, "speed": speed, "soak": soak,
          "unforget": unforget, "heldout": heldout, "loop": loop, "sampling_cost": sampling_cost,
          "scaling": scaling, "many_gpus": many_gpus, **tables.TABLES}


def filled(text):
    """The README with every table made again."""
    def block(match):
        name = match[1]
        if name not in TABLES:
            raise UserError(f"README.md asks for a table {name!r}; known: {', '.join(TABLES)}")
        return f"<!-- table: {name} -->\n{TABLES[name]()}\n<!-- end -->"

    return re.sub(r"<!-- table: (\w+) -->\n.*?<!-- end -->", block, text, flags=re.DOTALL)


def main():
    Parser(prog="readme.py", description="Fill in README.md's generated parts.").parse_args()
    text = filled(README.read_text())
    write_atomically(README, lambda temporary: temporary.write_text(text))


if __name__ == "__main__":
    run(main)
