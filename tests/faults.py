"""What the fault tests and the soak share: the real commands in processes of their own, faults to
put into them, and what must be equal afterwards.

A process is forked from a server that has imported the scripts and done nothing else, because a
fresh Python spends its first seconds importing torch. Its signals, files and exit code are real.
"""

import ast
import getpass
import multiprocessing
import os
import re
import resource
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import torch

ROOT = Path(__file__).resolve().parents[1]
sys.path[:0] = [str(ROOT), str(ROOT / "tests")]
from weights import checkpoint  # noqa: E402
from metrics import judge  # noqa: E402
from training import log  # noqa: E402
from base import errors  # noqa: E402
import evaluate  # noqa: E402
from training import run_folder  # noqa: E402
import sample  # noqa: E402
import train  # noqa: E402
from edm_networks import EDMPrecond  # noqa: E402

NETWORK = dict(img_resolution=8, img_channels=1, label_dim=10, model_type="SongUNet",
               model_channels=8, channel_mult=[1, 2], num_blocks=1, attn_resolutions=[4])
MAINS = {"train": lambda: train.main(), "sample": lambda: sample.main(),
         "evaluate": lambda: evaluate.main()}
ONE_THREAD = {"OMP_NUM_THREADS": "1", "PYTHONPATH": f"{ROOT}:{ROOT / 'tests'}",
              "PYTHONUNBUFFERED": "1"}
SERVER = multiprocessing.get_context("forkserver")


def make_teacher(path):
    """A small network whose weights matter."""
    torch.manual_seed(1)
    network = EDMPrecond(**NETWORK)
    for parameter in network.parameters():
        torch.nn.init.normal_(parameter, std=0.1)
    checkpoint.save(path, {"dataset": "digits", "method": "pmdd", "stage": 0, "sigmas": [],
                           "network": network.config, "iteration": 0, "fid": {},
                           "ema": network.state_dict()})
    return path


def flags(teacher, folder, *more, iterations=6):
    """A run of a second: it saves after every second iteration and scores after the fourth."""
    return [str(word) for word in (
        "--teacher", teacher, "--folder", folder, "--batch", 4, "--iterations", iterations,
        "--evaluate-images", 12, "--evaluate-every", 4, "--save-every", 2, "--ttur", 2,
        "--regression-pairs", 8, "--regression-steps", 2, "--learning-rate", 1e-3, *more)]


STAGE_1 = ("--stage", 1)
GAN = ("--method", "dmd2", "--regression-weight", 0.25)                 # and DMD's regression


# ---- Processes ----

class Command:
    """`python SCRIPT.py ARGV` in its own process; what it says is in .said() and .log."""

    def __init__(self, script, *argv, log, faults=(), cwd=None, env=None):
        os.environ.update(ONE_THREAD)
        SERVER.set_forkserver_preload(["faults"])
        self.log = Path(log)
        self.process = SERVER.Process(target=child, args=(
            script, list(map(str, argv)), str(log), faults, cwd, env or {}))
        self.process.start()

    def send(self, number):
        os.kill(self.process.pid, number)

    def wait(self, seconds=120):
        """The exit code; below nought, the signal that ended it."""
        self.process.join(seconds)
        if self.process.exitcode is None:
            self.process.kill()
            self.process.join()
            raise AssertionError(f"still running after {seconds} s:\n{self.said()}")
        return self.process.exitcode

    def said(self):
        return self.log.read_text(errors="replace") if self.log.exists() else ""

    def running(self):
        return self.process.is_alive()


def child(script, argv, log, faults, cwd, env):
    output = os.open(log, os.O_WRONLY | os.O_CREAT | os.O_APPEND)
    for number in (1, 2):
        os.dup2(output, number)
    sys.stdout, sys.stderr = (open(number, "w", buffering=1) for number in (1, 2))
    os.environ.update(env)
    os.chdir(cwd or os.path.dirname(log))
    torch.set_num_threads(1)
    for name, *arguments in faults:
        globals()[name](*arguments)
    sys.argv = [f"{script}.py", *argv]
    errors.run(MAINS[script])


def finished(script, *argv, log, code=0, **how):
    """What a command said that had to end with this exit code; never a traceback."""
    command = Command(script, *argv, log=log, **how)
    got, said = command.wait(), command.said()
    assert got == code, f"exit code {got}, not {code}:\n{said}"
    assert "Traceback" not in said, said
    return said


def one_line(said):
    """The one line of an error."""
    lines = re.findall(r"error(?: in process \d+)?: .*", said)        # behind a progress bar or not
    assert len(lines) == 1 and "Traceback" not in said, said
    return lines[0]


def workers(pid):
    """Of a torchrun: rank -> pid of its processes."""
    children = Path(f"/proc/{pid}/task/{pid}/children").read_text().split()
    found = {}
    for process in map(int, children):
        try:
            words = Path(f"/proc/{process}/environ").read_bytes().split(b"\0")
        except OSError:
            continue
        ranks = [int(word[5:]) for word in words if word.startswith(b"RANK=")]
        found |= {rank: process for rank in ranks}
    return found


def torchrun(processes, *argv, log, restarts=0):
    """The user's own command, with every process's output in one file."""
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone",
               f"--nproc_per_node={processes}", f"--max-restarts={restarts}",
               str(ROOT / "train.py"), *map(str, argv)]
    with open(log, "w") as output:
        return subprocess.Popen(command, stdout=output, stderr=subprocess.STDOUT,
                                cwd=Path(log).parent, env=os.environ | ONE_THREAD)


def until(condition, seconds=60):
    """The first true value of condition()."""
    end = time.monotonic() + seconds
    while time.monotonic() < end:
        if value := condition():
            return value
        time.sleep(0.01)
    raise AssertionError(f"not after {seconds} s")


def iterations_done(folder):
    """Lines of metrics that a run has written; 0 before it has begun."""
    return len(run_folder.read_metrics(Path(folder) / "metrics.jsonl"))


# ---- Faults, put into a process before its command begins ----

def slow_writes(seconds):
    """Every checkpoint comes to the disk bit by bit."""
    real = torch.save

    def save(content, path):
        real(content, path)
        whole = Path(path).read_bytes()
        with open(path, "wb") as file:
            for k in range(20):
                file.write(whole[len(whole) * k // 20:len(whole) * (k + 1) // 20])
                file.flush()
                time.sleep(seconds / 20)

    torch.save = save


def note_saves(path):
    """A line for every checkpoint that the run believes to be on the disk."""
    real = log.save_latest

    def save_latest(folder, payload, again):
        real(folder, payload, again)
        with open(path, "a") as file:
            file.write(f"{folder.name} {payload['iteration']}\n")

    log.save_latest = save_latest


def die_after_saving(iteration):
    """And its figures"""
    real = log.save_latest

    def save_latest(folder, payload, again):
        real(folder, payload, again)
        if payload["iteration"] == iteration and payload["fid"]:
            os.kill(os.getpid(), signal.SIGKILL)

    log.save_latest = save_latest


def die_at_scores(when):
    """Killed while the first figures are made, or with them in metrics.jsonl and in no latest.pt"""
    real = run_folder.Metrics.write

    def write(metrics, **values):
        real(metrics, **values)
        if "passes" in values:
            die()

    def die(*args):
        os.kill(os.getpid(), signal.SIGKILL)

    owner, name, deadly = {"made": (judge.Scorer, "score", die),
                           "written": (run_folder.Metrics, "write", write)}[when]
    setattr(owner, name, deadly)


def full_disk(what, room):
    """No room at all from when the second `what` is about to be written, until `room` is gone."""
    owner, name = {"checkpoint": (torch, "save"), "sample": (log, "save_samples"),
                   "metrics": (run_folder.Metrics, "write")}[what]
    real, calls = getattr(owner, name), []

    def write(*args, **kwargs):
        calls.append(None)
        if len(calls) == 2:
            fill(room)
            if not os.path.ismount(os.path.dirname(room)):              # nobody may mount here
                resource.setrlimit(resource.RLIMIT_FSIZE, (0, resource.RLIM_INFINITY))
        return real(*args, **kwargs)

    setattr(owner, name, write)


def fill(path):
    with open(path, "wb", buffering=0) as file:
        try:
            while os.path.ismount(os.path.dirname(path)) and file.write(bytes(4096)):
                pass
        except OSError:
            pass


def clock_set_back():
    """The computer believes that it is ten years ago."""
    real = time.time
    time.time = lambda: real() - 10 * 365 * 86400


# ---- A folder on a small disk ----

class SmallDisk:
    """A tmpfs of so many bytes, where one may be mounted; else the folder as it is."""

    def __init__(self, folder, size):
        self.folder = Path(folder)
        self.folder.mkdir(parents=True, exist_ok=True)
        mount = ["mount", "-t", "tmpfs", "-o", f"size={size}", "tmpfs", str(folder)]
        self.mounted = shutil.which("mount") is not None and subprocess.run(
            mount, capture_output=True).returncode == 0

    def __enter__(self):
        return self

    def __exit__(self, *error):
        if self.mounted:
            subprocess.run(["umount", "-l", str(self.folder)], check=True)


# ---- What must be equal, and what must never be ----

def plain(value):
    """A checkpoint's content, comparable with ==: tensors to the bit, and no clock's figure."""
    if isinstance(value, torch.Tensor):
        bits = value.detach().contiguous().flatten().view(torch.uint8).numpy().tobytes()
        return str(value.dtype), tuple(value.shape), bits
    if isinstance(value, dict):
        return {k: plain(v) for k, v in value.items() if k not in run_folder.CLOCKED}
    return [plain(v) for v in value] if isinstance(value, (list, tuple)) else value


def outcome(run):
    """Everything that the stages of a run have come to: checkpoints, metrics, pictures."""
    ends = {}
    for stage in sorted(Path(run).glob("stage*")):
        saved = {name: plain(checkpoint.load(stage / name)) for name in ("latest.pt", "best.pt")}
        lines = [{k: v for k, v in line.items() if k not in run_folder.CLOCKED}
                 for line in run_folder.read_metrics(stage / "metrics.jsonl")]
        pictures = {p.name: p.read_bytes() for p in sorted((stage / "samples").iterdir())}
        ends[stage.name] = saved | {"metrics": lines, "samples": pictures}
    return ends


def differences(a, b, where=""):
    """Names of what differs, for a message that a person can read."""
    if isinstance(a, dict) and isinstance(b, dict):
        return [text for k in a.keys() | b.keys()
                for text in differences(a.get(k), b.get(k), f"{where}/{k}")]
    return [] if a == b else [where]


def lost(run, notes):
    """Checkpoints that a run believed to be on the disk and that cannot be loaded any more."""
    noted = {}
    if Path(notes).exists():
        for line in Path(notes).read_text().splitlines():
            stage, iteration = line.split()
            noted[stage] = int(iteration)
    missing = []
    for stage, iteration in noted.items():
        folder, told = Path(run) / stage, []
        found = checkpoint.load_latest(folder, say=told.append)
        if told or not found or found["iteration"] < iteration:
            missing.append(f"{stage}: {iteration}, found {found and found['iteration']} {told}")
        for name in ("previous.pt", "best.pt"):
            if (folder / name).exists() and not checkpoint.undamaged(folder / name):
                missing.append(f"{stage}: {name} is damaged")
    return missing


def hostile_pickle(path):
    """A file that torch.load would take, and that makes a file when its pickle is run."""
    class Explodes:
        def __reduce__(self):
            return open, (str(path) + ".exploded", "w")

    torch.save({"format": checkpoint.FORMAT, "ema": Explodes(), "iteration": 99}, path)


def damages(whole, random_, truncated, flipped):
    """(what, bytes) of a checkpoint cut off, with a flipped bit, and emptied."""
    for _ in range(truncated):
        length = random_.randrange(1, len(whole))
        yield f"truncated at {length}", whole[:length]
    for _ in range(flipped):
        position, bit = random_.randrange(len(whole)), random_.randrange(8)
        content = bytearray(whole)
        content[position] ^= 1 << bit
        yield f"bit {bit} of byte {position}", bytes(content)
    yield "emptied", b""


class Watched:
    """Notes every path outside `allowed` that this process makes, changes or removes."""

    watching = []

    def __init__(self, *allowed):
        # Two libraries' own: torch's when it plans on no device, matplotlib's at its first import.
        caches = (Path(tempfile.gettempdir()) / f"torchinductor_{getpass.getuser()}",
                  *(Path.home() / folder / "matplotlib" for folder in (".config", ".cache")))
        self.allowed = [os.path.realpath(path) for path in (*allowed, *caches, "/dev", "/proc")]
        self.outside, self.read = [], []

    def __enter__(self):
        if not Watched.watching:
            sys.addaudithook(audit)                 # for good: python takes none away again
            Watched.watching.append(None)
        self.bytecode, sys.dont_write_bytecode = sys.dont_write_bytecode, True
        Watched.watching.append(self)
        return self

    def __exit__(self, *error):
        Watched.watching.remove(self)
        sys.dont_write_bytecode = self.bytecode


CHANGES = {"os.mkdir": 1, "os.rename": 2, "os.remove": 1, "os.rmdir": 1, "os.link": 2,
           "os.symlink": 2, "os.truncate": 1, "shutil.rmtree": 1, "shutil.move": 2,
           "os.chmod": 1}


def audit(event, arguments):
    for watch in Watched.watching[1:]:
        paths = arguments[:CHANGES.get(event, 0)]
        if event in ("os.remove", "os.rmdir", "os.mkdir") and arguments[-1] != -1:
            paths = ()                              # in a folder already open: rmtree, noted there
        if event == "open":
            path, mode, flag = arguments
            writes = (flag or 0) & (os.O_WRONLY | os.O_RDWR | os.O_CREAT | os.O_TRUNC)
            (watch.read if not writes else []).append(path)
            paths = (path,) if writes else ()
        for path in paths:
            if isinstance(path, (str, bytes, os.PathLike)):
                real = os.path.realpath(os.fsdecode(path))
                if not any(real == a or real.startswith(a + os.sep) for a in watch.allowed):
                    watch.outside.append((event, real))


# ---- The sources ----

def words_of(node):
    """The dotted name of an attribute or name: torch.load."""
    parts = []
    while isinstance(node, ast.Attribute):
        parts.append(node.attr)
        node = node.value
    return ".".join([node.id, *parts[::-1]] if isinstance(node, ast.Name) else ["?", *parts[::-1]])


RUNS_CODE = {"pickle", "_pickle", "cPickle", "marshal", "shelve", "dill", "cloudpickle", "joblib",
             "yaml", "jsonpickle"}


def violations(source, names="source"):
    """What a program must not do with a file that somebody else has made."""
    tree, found = ast.parse(source), []
    renamed = {"np": "numpy"}
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            renamed |= {a.asname: a.name for a in node.names if a.asname}
            found += [(node, f"import {a.name}") for a in node.names
                      if a.name.split(".")[0] in RUNS_CODE]
        elif isinstance(node, ast.ImportFrom):
            module = node.module or ""
            renamed |= {a.asname or a.name: f"{module}.{a.name}" for a in node.names}
            if module.split(".")[0] in RUNS_CODE:
                found.append((node, f"from {module}"))
    for node in ast.walk(tree):
        if not isinstance(node, ast.Call):
            continue
        name = words_of(node.func)
        first, _, rest = name.partition(".")
        name = renamed.get(first, first) + (f".{rest}" if rest else "")
        given = {k.arg: k.value for k in node.keywords}

        def constant(flag, given=given):
            return given[flag].value if isinstance(given.get(flag), ast.Constant) else None

        if name in ("eval", "exec", "compile", "__import__", "builtins.eval", "builtins.exec"):
            found.append((node, name))
        elif name == "torch.load" and constant("weights_only") is not True:
            found.append((node, "torch.load without weights_only=True"))
        elif name == "numpy.load" and constant("allow_pickle") is not False:
            found.append((node, "np.load without allow_pickle=False"))
        elif name.endswith((".extractall", ".extract", ".unpack_archive")):
            found.append((node, name))
        elif name in ("os.system", "os.popen") or constant("shell") is True:
            found.append((node, f"{name} through a shell"))
        elif name.endswith("format.read_array") and constant("allow_pickle") is not False:
            found.append((node, "read_array without allow_pickle=False"))
    return [f"{names}:{node.lineno}: {what}" for node, what in found]


def ended(said):
    """The iteration that a resumed run began from, or None."""
    match = re.search(r"resuming .* after (\d+) iterations", said)
    return int(match[1]) if match else None


SIGNALS = {"SIGTERM": signal.SIGTERM, "SIGINT": signal.SIGINT}
