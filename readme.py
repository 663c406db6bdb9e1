"""The generated parts of README.md, from recorded runs, presets and the files themselves.

    python readme.py            writes them between the "table" and "end" comments
"""

import ast
import json
import re
from pathlib import Path
from statistics import median

from checkpoint import write_atomically
from errors import Parser, UserError, run
from evaluation_records import records_under, table
from presets import PRESETS

HERE = Path(__file__).resolve().parent
README = HERE / "README.md"


def headline():
    return table(records_under([HERE / "results" / "embedded"]))


def unforget():
    return table(records_under([HERE / "results" / "unforget"]))


def presets():
    rows = []
    for (dataset, method, stage, variant), p in PRESETS.items():
        if dataset != "digits":
            fid = "-" if p.paper_fid is None else f"{p.paper_fid:.2f}"
            cells = [dataset, method, str(stage), variant or "-", p.source, p.gpus,
                     str(p.config.batch), f"{p.config.iterations:,}", f"{p.images / 1e6:,.0f}M",
                     fid, "no"]
            rows.append(f"| {' | '.join(cells)} |")
    head = ["dataset", "method", "stage", "variant", "source", "authors' hardware", "batch",
            "iterations", "images", "paper's FID", "run here"]
    return "\n".join([f"| {' | '.join(head)} |", "|" + "---|" * len(head), *rows])


def files():
    """Every script with the first line of what it says of itself."""
    rows = []
    for path in sorted(HERE.glob("*.py")):
        line = ast.get_docstring(ast.parse(path.read_text())).splitlines()[0]
        rows.append(f"| `{path.name}` | {line} |")
    return "\n".join(["| file | |", "|---|---|", *rows])


def result(name):
    return json.loads((HERE / "results" / name).read_text())


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
    return "\n".join(["| what | measured on 2 CPU cores | by |", "|---|---|---|",
                      *(f"| {what} | {figure} | `results/{script}` |"
                        for what, figure, script in rows)])


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
          "unforget": unforget}


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
