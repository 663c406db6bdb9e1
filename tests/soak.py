"""The long version of the fault tests: counts that a suite has no time for, recorded.

    make soak            or: python tests/soak.py [--seed 0] [--part kills ...]

Writes results/soak.json, from which the README's section on reliability is filled in. Every part
raises at the first promise that is broken, so a record means that all were kept.
"""

import json
import os
import random
import re
import resource
import shutil
import sys
import tempfile
import threading
import time
from importlib.metadata import version
from pathlib import Path

import faults
import hostile_pickles
from base import errors, files
from faults import (GAN, ROOT, STAGE_1, Command, SmallDisk, differences, ended, finished, flags,
                    lost, one_line, outcome, until)
from test_download import Server
from weights import checkpoint

KILLS, DAMAGES, STOPS, CASES = 30, 50, 5, 10_000
ROOM = 4 << 30                          # bytes that all of the fuzzing may take more than it has
# Cases of a reader or command in the soak; the others share what is missing to CASES.
FEWER = {"train.py": 60, "train.py --dry-run": 120, "evaluate.py": 250, "sample.py": 400,
         "checkpoints: right checksum": 300, "weights: damaged": 300, "scripts without flags": 150}


class Soak:
    """Scratch folder, seed and teacher that the parts share."""

    def __init__(self, folder, seed):
        self.folder, self.seed, self.made = Path(folder), seed, 0
        self.teacher = faults.make_teacher(self.folder / "teacher.pt")
        self.wholes = {}

    def path(self, name):
        self.made += 1
        return self.folder / f"{self.made:04d}-{name}"

    def flags(self, run, more=STAGE_1, iterations=6):
        return flags(self.teacher, run, *more, iterations=iterations)

    def finish(self, run, more=STAGE_1, iterations=6, **how):
        return finished("train", *self.flags(run, more, iterations), log=self.path("log"), **how)

    def whole(self, more=STAGE_1, iterations=6):
        """What a run comes to that nothing happens to; made once."""
        if (more, iterations) not in self.wholes:
            run = self.path("whole")
            self.finish(run, more, iterations)
            self.wholes[more, iterations] = outcome(run)
        return self.wholes[more, iterations]

    def same(self, run, more=STAGE_1, iterations=6):
        found = differences(self.whole(more, iterations), outcome(run))
        assert not found, f"{run} differs: {found}"

    def half(self):
        """A copy of a run killed after the checkpoint of iteration 4; previous.pt is of 2."""
        first = self.folder / "half"
        if not first.exists():
            command = Command("train", *self.flags(first), log=self.path("log"),
                              faults=[("die_after_saving", 4)])
            assert command.wait() == -9
        run = self.path("run")
        shutil.copytree(first, run)
        return run


def kills(soak):
    """SIGKILL at random moments; runs of several kinds, each to its end, until there are enough."""
    random_, counts = random.Random(soak.seed), dict(kills=0, during_a_write=0, runs=0, lost=0)
    kinds = [((), 6), (GAN, 10), (STAGE_1, 12), (("--method", "sid"), 12), (GAN, 10)]
    while counts["kills"] < KILLS:
        more, iterations = kinds[counts["runs"] % len(kinds)]
        run, notes, here = soak.path("killed"), soak.path("notes"), 0
        soak.whole(more, iterations)
        while here < -(-KILLS // len(kinds)):
            slow = [("slow_writes", 0.3)] if random_.random() < 0.7 else []
            command = Command("train", *soak.flags(run, more, iterations), log=soak.path("log"),
                              faults=[*slow, ("note_saves", notes)])
            time.sleep(random_.uniform(0.1, 3.0))
            command.process.kill()
            code = command.wait()
            if code == 0:                               # it was done before its time came
                break
            assert code == -9, command.said()
            here += 1
            counts["during_a_write"] += bool(list(run.rglob(".*.pt.*.tmp")))
            missing = lost(run, notes)
            assert not missing, missing
        print(f"    {counts['kills'] + here} kills", flush=True)
        soak.finish(run, more, iterations)
        soak.same(run, more, iterations)
        counts["kills"] += here
        counts["runs"] += 1
    return counts


def stops(soak):
    """SIGTERM and Ctrl-C at random moments of the loop."""
    random_, counts = random.Random(soak.seed + 1), dict(stops=0, saved_with_code_3=0)
    for name in list(faults.SIGNALS) * STOPS:
        run = soak.path("stopped")
        command = Command("train", *soak.flags(run, iterations=20), log=soak.path("log"))
        until(lambda run=run: faults.iterations_done(run / "stage1"))
        time.sleep(random_.uniform(0, 0.5))
        command.send(faults.SIGNALS[name])
        code = command.wait()
        assert code == 3, (code, command.said())
        saved = int(re.search(rf"{name}: saved after (\d+) iterations", command.said())[1])
        assert checkpoint.load(run / "stage1" / "latest.pt")["iteration"] == saved
        assert ended(soak.finish(run, iterations=20)) == saved
        soak.same(run, iterations=20)
        counts["stops"] += 1
        counts["saved_with_code_3"] += 1
    return counts


def full_disks(soak):
    """A disk that fills up during a checkpoint, a grid of samples, a line of metrics."""
    mounted = []
    for what in ("checkpoint", "sample", "metrics"):
        with SmallDisk(soak.path("disk"), "16m") as disk:
            mounted.append(disk.mounted)
            run, room, notes = disk.folder / "run", disk.folder / "room", soak.path("notes")
            said = soak.finish(run, code=1, faults=[("full_disk", what, str(room)),
                                                    ("note_saves", notes)])
            assert "cannot write" in one_line(said) and not lost(run, notes)
            room.unlink()
            assert ended(soak.finish(run))
            soak.same(run)
    return dict(full_disks=len(mounted), on_a_real_small_disk=sum(mounted))


def damaged_checkpoints(soak):
    """latest.pt damaged in every way, through the command: the one before is used, and kept."""
    random_, counts = random.Random(soak.seed + 2), dict(
        truncated=0, flipped=0, emptied=0, with_code=0, loaded_as_good=0, run=0)
    good = (soak.half() / "stage1" / "latest.pt").read_bytes()
    soak.whole()
    for what, content in [*faults.damages(good, random_, DAMAGES, DAMAGES), ("with code", None)]:
        run = soak.half()
        latest = run / "stage1" / "latest.pt"
        if content is None:
            faults.hostile_pickle(latest)
        else:
            latest.write_bytes(content)
        said = soak.finish(run)
        assert said.count("warning: ") == 1 and ended(said) == 2, (what, said)
        assert re.search(r"warning: .*latest\.pt (is damaged|is not|holds no)", said), said
        assert not list(run.rglob("*.exploded"))
        soak.same(run)
        assert checkpoint.load(run / "stage1" / "previous.pt")["iteration"] == 4
        kind = {"t": "truncated", "b": "flipped", "e": "emptied", "w": "with_code"}[what[0]]
        counts[kind] += 1
        shutil.rmtree(run)
    return counts


def two_processes(soak):
    """The second on a folder is refused while the first lives, and goes on once it is dead."""
    run = soak.path("run")
    first = Command("train", *soak.flags(run), log=soak.path("log"), faults=[("slow_writes", 30)])
    until(lambda: list(run.rglob(".*.pt.*.tmp")))
    for _ in range(3):
        assert "another process is training" in one_line(soak.finish(run, code=2))
    first.send(9)
    first.wait()
    soak.finish(run)
    soak.same(run)
    return dict(refused=3)


def dead_ranks(soak):
    """Under torchrun each rank dies in turn: the others say why; --max-restarts resumes exactly."""
    seconds, ends = [], []
    for victim, restarts in ((None, 0), (0, 0), (1, 0), (0, 1), (1, 1)):
        run, log = soak.path("ranks"), soak.path("log")
        process = faults.torchrun(2, *soak.flags(run, iterations=20), log=log, restarts=restarts)
        try:
            if victim is not None:
                until(lambda run=run: (run / "stage1" / "latest.pt").exists())
                os.kill(faults.workers(process.pid)[victim], 9)
                start = time.monotonic()
            code = process.wait(120)
        finally:
            process.kill()
        if victim is not None:
            text = f"error in process {1 - victim}: another process of this run is gone"
            assert text in log.read_text(), log.read_text()
        if victim is not None and not restarts:
            seconds.append(time.monotonic() - start)
            assert code and seconds[-1] < 60
        else:
            assert code == 0, log.read_text()
            ends.append(outcome(run))
    assert not differences(ends[0], ends[1]) and not differences(ends[0], ends[2])
    return dict(dead_ranks=4, seconds_until_the_others_ended=round(max(seconds), 1),
                restarts_that_resumed_exactly=2)


def odd_folders(soak):
    """Half a line of metrics, a folder moved between and within stages, a clock set back."""
    for cut in (1, 7, 20, 33):
        run = soak.half()
        with open(run / "stage1" / "metrics.jsonl", "a") as file:
            file.write('{"iteration": 4, "denoising": 0.5}'[:cut])
        soak.finish(run)
        soak.same(run)
    run = soak.half()
    future = time.time() + 365 * 86400
    for path in run.rglob("*"):
        os.utime(path, (future, future))
    soak.finish(run, faults=[("clock_set_back",)])
    soak.same(run)
    here, there = soak.path("here"), soak.path("there") / "deep"
    soak.finish(here, STAGE_1)
    there.parent.mkdir()
    here.rename(there)
    soak.finish(there, ("--stage", 2))
    stage2 = soak.whole(())["stage2"]
    assert not differences(stage2, outcome(there)["stage2"])
    return dict(half_lines=4, clocks_set_back=1, moved_folders=2)


def hostile_files(soak):
    """The whole catalogue of pickles, each through a command; servers that answer wrongly."""
    ran, path = soak.path("ran"), soak.path("files") / "hostile.pkl"
    path.parent.mkdir()
    good = (ROOT / "tests" / "golden" / "ddpmpp-cond-8.pkl").read_bytes()
    commands = [("sample", "--checkpoint", path), ("train", "--stage", 1, "--teacher", path),
                ("evaluate", "--checkpoint", path, "--n", 2)]
    count = 0
    for name, content in hostile_pickles.hostile(f"touch {ran}", good):
        path.write_bytes(content)
        script, *argv = commands[count % 3]
        said = finished(script, *argv, log=soak.path("log"), code=2, cwd=str(path.parent),
                        env={"PMDD_CACHE": str(soak.folder / "cache")})
        assert "hostile.pkl: " in one_line(said) and not ran.exists(), (name, said)
        count += 1
    assert {p.name for p in path.parent.iterdir()} == {"hostile.pkl"}
    return dict(hostile_pickles=count, run=0) | bad_servers(soak, good, ran)


def bad_servers(soak, good, ran):
    server, name = Server(), "edm-cifar10-32x32-cond-vp"
    threading.Thread(target=server.serve_forever, args=(0.01,), daemon=True).start()
    hostile = next(hostile_pickles.code(f"touch {ran}"))[1]
    answers = [dict(status=404), dict(status=500), dict(body=b"<html>log in"), dict(body=b""),
               dict(body=b"x" * 999), dict(body=good[:-9]), dict(cut=100_000), dict(body=hostile),
               dict(length=False, cut=1000), dict(content_type="text/html")]
    env = {"PMDD_MIRROR": f"http://127.0.0.1:{server.server_port}", "NO_PROXY": "127.0.0.1"}
    try:
        for answer in [*answers, {}]:
            cache = soak.path("cache")
            for field in ("status", "body", "cut", "length", "content_type"):
                setattr(server, field, answer.get(field, getattr(Server, field)))
            server.body = answer.get("body", good)
            said = finished("sample", "--checkpoint", name, "--n", 1, "--heun", 2, "--cache", cache,
                            "--out", soak.path("picture").with_suffix(".png"),
                            log=soak.path("log"), code=2 if answer else 0, env=env)
            assert not answer or name in one_line(said) and not ran.exists()
            assert not answer or not (cache / "converted").exists()
    finally:
        server.stop.set()
        server.shutdown()
        server.server_close()
    return dict(bad_answers_of_a_server=len(answers))


def fuzzing(soak):
    """Random files and command lines: no traceback, exit codes as promised, nothing outside."""
    import test_fuzz                                # here: processes that are killed need it not
    limit = int(Path("/proc/self/statm").read_text().split()[0]) * resource.getpagesize() + ROOM
    resource.setrlimit(resource.RLIMIT_AS, (limit, resource.RLIM_INFINITY))
    counts, many = {}, [name for name in test_fuzz.FUZZED if name not in FEWER]
    cases = (CASES - sum(FEWER.values())) // len(many) * 11 // 10        # it may stop early
    for name in test_fuzz.FUZZED:
        start = time.monotonic()
        counts[name] = test_fuzz.fuzz(name, FEWER.get(name, cases), number=soak.seed)
        print(f"    {name}: {counts[name]} cases, {time.monotonic() - start:.0f} s", flush=True)
    assert sum(counts.values()) >= CASES, counts
    return dict(cases=sum(counts.values()), tracebacks=0, of=counts)


PARTS = {part.__name__.replace("_", " "): part for part in (
    kills, stops, full_disks, damaged_checkpoints, two_processes, dead_ranks, odd_folders,
    hostile_files, fuzzing)}


def main():
    parser = errors.Parser(prog="soak.py", description="The long version of the fault tests.")
    parser.add_argument("--seed", type=int, default=0, help="of the random moments and damages")
    parser.add_argument("--part", nargs="+", choices=PARTS, help="only these; nothing is recorded")
    args = parser.parse_args()
    record, began = {}, time.monotonic()
    with tempfile.TemporaryDirectory(prefix="soak") as folder:
        soak = Soak(folder, args.seed)
        for name in args.part or PARTS:
            start = time.monotonic()
            print(f"{name}: {PARTS[name].__doc__}", flush=True)
            record[name] = PARTS[name](soak)
            record[name]["seconds"] = round(time.monotonic() - start)
            print(f"  {record[name]}", flush=True)
    if not args.part:
        record |= {"seed": args.seed, "seconds": round(time.monotonic() - began),
                   "versions": files.versions() | {"python": sys.version.split()[0],
                                                     "hypothesis": version("hypothesis")}}
        text = json.dumps(record, indent=1) + "\n"
        files.write_atomically(ROOT / "results" / "soak.json",
                                    lambda temporary: temporary.write_text(text))
    return 0


if __name__ == "__main__":
    errors.run(main)
