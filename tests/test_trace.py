"""Twenty iterations of each method give the losses that they gave when the loop was first written.

Other kernels change the sixth digit (2e-5 between AVX-512 and none at all), another algorithm the
second. Of a change that is meant: `python tests/test_trace.py` writes golden/trace.json anew.
"""

import json
import sys
import tempfile
from pathlib import Path

import pytest
import torch

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))
import train  # noqa: E402
from training import log, run_folder  # noqa: E402

GOLDEN = ROOT / "tests" / "golden" / "trace.json"
# name: (flags, the run that it goes on from). Where the adapted network equals the teacher, sid's
# gradient is nothing but rounding, which AdamW makes large: these go on from others.
RUNS = {"dm": (["--stage", "1", "--loss", "dm"], ""),
        "pmdd 1": (["--stage", "1"], "dm"), "pmdd 2": (["--stage", "2"], "pmdd 1"),
        "pmdd 3": (["--stage", "3"], "pmdd 2"),
        "sid with dm": (["--method", "sid", "--loss", "dm"], ""),
        "sid": (["--method", "sid"], "sid with dm"),
        "dmd": (["--method", "dmd", "--regression-pairs", "32"], ""),
        "dmd2": (["--method", "dmd2"], ""), "teacher": (["--stage", "0"], "")}
COMMON = ["--iterations", "20", "--batch", "16", "--evaluate-every", "0", "--save-every", "20",
          "--ema-rampup", "0"]
NOT_LOSSES = ("iteration", "images_per_second", "seconds_left")


def traces(folder):
    """{run: {loss: its value at every iteration, None where it has none}}"""
    found = {}
    for name, (flags, after) in RUNS.items():
        start = ["--start-from", str(best(folder / after))] if after else []
        train.main([*flags, *start, *COMMON, "--folder", str(folder / name)])
        lines = run_folder.read_metrics(best(folder / name).with_name("metrics.jsonl"))
        names = sorted({k for line in lines for k in line if k not in NOT_LOSSES})
        found[name] = {k: [line.get(k) for line in lines] for k in names}
    return found


def best(run):
    path, = run.glob("stage*/best.pt")
    return path


@pytest.fixture(scope="module")
def traced(tmp_path_factory):
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(log.Log, "due", lambda self, step: True)
        return traces(tmp_path_factory.mktemp("traces"))


@pytest.mark.parametrize("name", RUNS)
def test_every_loss_of_twenty_iterations_is_what_it_was(traced, name):
    golden = json.loads(GOLDEN.read_text())[name]
    assert traced[name].keys() == golden.keys() and len(golden["denoising"]) == 20
    for loss, values in golden.items():
        scale = max(abs(value) for value in values if value is not None)
        for step, (value, now) in enumerate(zip(values, traced[name][loss], strict=True)):
            assert (value is None) == (now is None), (loss, step)
            if value is not None:
                assert now == pytest.approx(value, rel=1e-3, abs=1e-4 * scale), (loss, step)


def test_the_golden_file_has_these_runs_and_a_loss_that_tells_each_from_the_others():
    golden = json.loads(GOLDEN.read_text())
    assert golden.keys() == RUNS.keys()
    ends = [run["denoising"][-1] for run in golden.values()]
    assert min(abs(a - b) / a for a in ends for b in ends if a != b) > 2e-3


def write():
    def rounded(values):
        return json.dumps([value if value is None else float(f"{value:.6g}") for value in values])

    torch.set_num_threads(1)
    log.Log.due = lambda self, step: True
    with tempfile.TemporaryDirectory() as folder:
        runs = [f' {json.dumps(name)}: {{\n' + ",\n".join(
            f"  {json.dumps(loss)}: {rounded(values)}" for loss, values in losses.items()) + "}"
            for name, losses in traces(Path(folder)).items()]
    GOLDEN.write_text("{\n" + ",\n".join(runs) + "}\n")


if __name__ == "__main__":
    write()
