"""The tables of docs/SPEED.md, from the records of bench.py and of the measuring scripts."""

from statistics import median

from base.files import ROOT, read_json
from experiments.recorded_runs import markdown

NOT_MEASURED = "not measured"


def result(name):
    return read_json(ROOT / "results" / name)


def speed():
    """What the measuring scripts recorded."""
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


def measured(head, rows):
    """A table without the columns in which nothing is measured; a sentence names them."""
    kept = [k for k in range(len(head)) if any(row[k] != NOT_MEASURED for row in rows)]
    text = markdown([head[k] for k in kept], [[row[k] for k in kept] for row in rows])
    missing = ", ".join(name for k, name in enumerate(head) if k not in kept)
    return f"{text}\n\nNot measured: {missing}." if missing else text


def benchmarks():
    """Every run of every bench.py record, by dataset, stage and loss."""
    records = [read_json(path) for path in (ROOT / "results").glob("bench-*.json")]
    runs = [one | {"threads": record["threads"], "device": record["device"]}
            for record in records for one in record.get("runs", ())]
    return sorted(runs, key=lambda one: (one["dataset"] != "digits", one["threads"], one["stage"],
                                         one["loss"]))


def on_gpu(one, what, say):
    """The same preset where it was measured on a GPU."""
    same = [run for run in benchmarks() if run["device"] != "cpu" and what in run and all(
        run[k] == one[k] for k in ("dataset", "method", "stage", "loss"))]
    return "; ".join(f"{run['device']}, {run['precision']}: {say(run[what])}"
                     for run in same) or NOT_MEASURED


def training_runs():
    """(first cells of a row, run) of every run on a CPU that was timed and whose memory counted."""
    return [([f"{one['dataset']}, batch {one['batch']}", str(one["threads"]),
              f"{one['stage']}, {one['loss']}"], one)
            for one in benchmarks()
            if one["device"] == "cpu" and "training" in one and "memory" in one]


TRAINED = ["network", "threads", "stage, loss"]


def loop():
    """Training against its passes limit, from the records of bench.py."""
    rows = []
    for cells, one in training_runs():
        t, e = one["training"], one["training"]["loop_efficiency"]
        rows.append([*cells, f"{e['median']:.3f} ({e['least']:.3f} to {e['most']:.3f})",
                     f"{t['seconds_of_an_iteration']['median']:.2f}", number(t["images_a_second"]),
                     on_gpu(one, "training", lambda t: f"{number(t['images_a_second'])}, "
                            f"efficiency {t['loop_efficiency']['median']:.3f}")])
    return measured([*TRAINED, "loop efficiency", "seconds an iteration", "images a second",
                     "on a GPU"], rows)


def loop_shares():
    """Where an iteration's time goes."""
    names, rows = ("roll-out", "student update", "adapted update"), []
    for cells, one in training_runs():
        shares = [one["training"]["share_of_time"][name] for name in names]
        rows.append([*cells, *(f"{share:.0%}" for share in (*shares, 1 - sum(shares)))])
    return markdown([*TRAINED, *names, "the rest"], rows)


def loop_memory():
    """Peaks against the plan."""
    def planned(one, what):
        m = one["memory"].get(what)
        return ([f"{m['plan_mib']:,.0f}", f"{m['against_plan']:.2f}"] if m else
                [NOT_MEASURED, NOT_MEASURED])

    return measured([*TRAINED, "tensors, MiB planned", "tensors, peak / plan",
                     "process, MiB planned", "process, peak / plan"],
                    [[*cells, *planned(one, "tensors"), *planned(one, "process")]
                     for cells, one in training_runs()])


def sampling_runs():
    """(first cells of a row, run) of every run on a CPU that sampled and scored."""
    return [([f"{one['dataset']}, stage {one['stage']}", str(one["threads"])], one)
            for one in benchmarks() if one["device"] == "cpu" and "sampling" in one
            and "share_of_training" in one.get("scoring", {})]


def sampling_cost():
    """Images a second of students and teachers."""
    rows = []
    for cells, one in sampling_runs():
        s = one["sampling"]
        steps = [s[k] for k in ("1 step", "2 steps", "3 steps")]
        rows.append([*cells, str(s["batch"]), *(number(v["images_a_second"]) for v in steps),
                     number(s["teacher, Heun, 18 steps"]["images_a_second"]),
                     ", ".join(f"{v['time_against_forwards']['median']:.2f}" for v in steps),
                     on_gpu(one, "sampling", lambda s: number(s["1 step"]["images_a_second"])
                            + " images a second at 1 step")])
    return measured(["network", "threads", "batch", "1 step", "2 steps", "3 steps",
                     "teacher, 18 Heun steps", "time / single forwards", "on a GPU"], rows)


def scoring_cost():
    """Features, a distance, and a whole evaluation."""
    rows = [[*cells, number(one["scoring"]["features_a_second"]),
             f"{one['scoring']['frechet_seconds']:.2g}",
             f"{100 * one['scoring']['share_of_training']:.0f}%"] for cells, one in sampling_runs()]
    return markdown(["network", "threads", "feature images a second", "one Frechet distance, s",
                     "evaluation / training"], rows)


def iteration_cost():
    """What an iteration of a published run computes and exchanges; on paper."""
    rows = {(row["dataset"], row["stage"]):
            [row["dataset"], str(row["stage"]), f"{row['iterations']:,}",
             f"{row['teraflops_of_an_iteration']:,.0f}",
             f"{row['gradient_bytes_of_an_iteration'] / 1e9:.2f}"]
            for row in result("bench-scaling.json")["computed"]}
    return markdown(["preset", "stage", "iterations", "TFLOP an iteration",
                     "GB of gradients an iteration"], rows.values())


def many_gpus():
    """On paper; nothing of it is measured."""
    scaling = result("bench-scaling.json")
    rows = [[row["dataset"], str(row["stage"]), str(row["gpus"]),
             f"{1e3 * row['seconds_of_arithmetic']:.0f}",
             f"{1e3 * row['seconds_of_all_reduce']:.0f}",
             f"{row['hours']:,.1f}" + ("" if row["batch_divides"] else " (*)"),
             f"{row['hours_of_evaluations']:,.1f}"]
            for row in scaling["computed"]]
    head = ["preset", "stage", "GPUs", "ms of arithmetic", "ms of all-reduce",
            "hours of training", "hours of evaluations"]
    a = scaling["assumed"]
    return markdown(head, rows) + (
        "\n\n(\\*) that batch cannot be divided by so many processes; `--batch` has to change."
        "\n\nComputed, not measured: the slower of TFLOP / (GPUs x "
        f"{a['peak_teraflops']} TFLOP/s x "
        f"utilisation {a['utilisation']}) and of 2 (N - 1) / N times the gradients over "
        f"{a['all_reduce_bytes_a_second'] / 1e9:.0f} GB/s. An evaluation's samples at "
        f"{a['peak_teraflops_tf32']}, its features at {a['peak_teraflops_fp32']} TFLOP/s; "
        "`--evaluate-every` makes fewer. All rates are assumptions.")


def scaling():
    """What bounds each measured curve."""
    curves = result("bench-scaling.json")["measured"]
    rows = []
    for name, curve in curves.items():
        points = curve["points"]
        rows.append([name, ", ".join(str(p[name]) for p in points), ", ".join(
            f"{1e3 * p['seconds_of_an_iteration']:.0f}" for p in points), curve["bound"]])
    return markdown(["against", "at", "ms an iteration", "bound by"], rows)


TABLES = {f.__name__: f for f in (speed, loop, loop_shares, loop_memory, sampling_cost,
                                  scoring_cost, scaling, iteration_cost, many_gpus)}


def gpu_memory(dataset):
    """GiB of one of several GPUs, by the plan."""
    row = next(row for row in result("gpu-memory.json")["planned"] if row["dataset"] == dataset)
    numbers = list(next(iter(row["gib"].values())))
    head = f"{dataset}, {row['images']} images on each; GPUs:"
    return markdown([head, *numbers], [
        [what, *(f"{gib[n]:.1f}" if n in gib else "-" for n in numbers)]
        for what, gib in row["gib"].items()])


def text_memory():
    """GiB of one process, by the plan."""
    planned = result("text-memory.json")["planned"]
    sizes = sorted({size for one in planned for size in one["gib"]} - {"weights"}, key=int)
    return markdown(["", "nothing but weights", *sizes], [
        [one["what"], *(f"{one['gib'][size]:.1f}" if size in one["gib"] else "-"
                        for size in ("weights", *sizes))] for one in planned])


def lora_memory():
    """GiB of one process, by the plan."""
    planned, sizes = result("lora-memory.json")["planned"], ("1", "2", "4")
    return markdown(["", "nothing but weights", "of these frozen", *sizes], [
        [one["what"], *(f"{one['gib'][size]:.1f}" if size in one["gib"] else "-"
                        for size in ("weights", "frozen", *sizes))] for one in planned])
