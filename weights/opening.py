"""One way to open any network: a checkpoint of ours, a published name, a file in its format."""

import json
import os
from dataclasses import dataclass
from pathlib import Path

from torch import nn

from base.distributed import from_rank_zero, say
from base.download import PUBLISHED, cache_folder
from base.errors import UserError
from base.files import ROOT, file_digest, shown
from models import Guided, unguided
from presets.datasets import DATASETS
from weights.pipeline import Pipeline, load_teacher as load_pipeline_network, name_of
from weights import checkpoint
from weights.exported import load_exported
from weights.lora import student_of
from weights.students import open_published, tensors_of
from weights.pretrained import PUBLISHED_NETWORKS, load_network

TEXT_GUIDANCE = 3.0             # of a text-to-image teacher, as DMD has it
WEIGHT_FILES = (".pt", ".pth", ".pkl", ".bin", ".safetensors")     # no pipeline's name ends so
PUBLISHED_SIGMA = {".pkl": 2.5, ".bin": 80.0}       # one-step students: SiD's pickles, DMD2's .bin


@dataclass
class Opened:
    network: nn.Module
    sigmas: tuple               # one noise level a step; empty: a teacher
    dataset: str | None         # None: a file that does not say
    path: Path
    ours: bool
    class_names: tuple = ()
    teacher: str = ""           # what a student was made from, where its file says, and sha256 of
    teacher_digest: str = ""    # those weights
    base: str = ""              # name of the pipeline around a text-to-image network,
    pipeline: Pipeline | None = None    # and itself, once it is needed
    guidance: float = 1.0       # of a teacher; students have it in their weights

    @property
    def name(self):
        return shown(self.path)

    def digest(self):
        """sha256 of its file; of a folder or a name on the hub, of the weights."""
        if self.path.is_file():
            return file_digest(self.path)
        return checkpoint.weights_digest(unguided(self.network).state_dict())

    def ask(self, prompts, flags, device, beside=None):
        """Prompts for a text-to-image network, and for no other. A network that is drawn beside it
        may share its pipeline: that is loaded once."""
        if self.base and not prompts:
            raise UserError(f"{self.name} makes pictures from text: give {flags}")
        if prompts and not self.base:
            raise UserError(f"{flags}: {self.name} is no text-to-image network")
        if self.base:
            if beside and beside.base == self.base:
                self.pipeline = beside.pipeline
            self.serve(prompts, device)

    def guide(self, weight):
        """A teacher's classifier-free guidance; None: what text to image has, else none."""
        if weight is None:
            weight = TEXT_GUIDANCE if self.base else 1
        if weight != 1 and not self.sigmas:
            if self.network.conditions.null is None:
                raise UserError("--guidance: this network has no classes or prompts")
            self.network, self.guidance = Guided(self.network, weight), weight

    def serve(self, prompts, device):
        """A text-to-image network with its pipeline, asked for these prompts."""
        self.pipeline = self.pipeline or Pipeline(self.base).to(device)
        self.pipeline.serve(self.network, prompts)

    def first_sigmas(self, steps):
        """The noise levels of its first steps."""
        if not 1 <= steps <= len(self.sigmas):
            raise UserError(f"--steps {steps}: {self.name} was trained for 1 to {len(self.sigmas)}")
        return self.sigmas[:steps]


def open_network(source, *, sigmas=None, teacher=False, dataset=None, cache=None, base=None):
    """A checkpoint of ours, a published name, an EDM or SiD pickle, or a DMD2 state dict; of text
    to image a pipeline's folder, with its dataset a pipeline's name, or a folder that
    text_to_image.py exported. base: the pipeline of a student, where its file does not say or it
    has moved."""
    base = base and name_of(base)
    if opened := open_text(source, dataset, sigmas, base):
        return opened
    if Path(source).is_dir():
        raise UserError(f"{source} is a folder; name a file, such as a run's best.pt, or a "
                        "pipeline's folder")
    payload, published = read_ours(source), str(source) in PUBLISHED_NETWORKS
    if payload:
        refuse_sigmas(sigmas, source, payload["sigmas"])
        network = (student_of(payload, base, source) if "lora" in payload else
                   checkpoint.network_from(payload, source=source))
        levels = tuple(payload["sigmas"])
        path, known = Path(source), payload["dataset"]
    else:
        network = from_rank_zero(lambda: load_network(source, cache))
        path = cache_folder(cache) / PUBLISHED[str(source)].name if published else Path(source)
        own = dataset and dataset not in DATASETS and not published
        known = dataset if own else hinted(path.name, network.config)
        if teacher or published or path.name.startswith("edm-") and not sigmas:
            refuse_sigmas(sigmas, source)
            levels = ()
        else:
            levels = tuple(sigmas or (PUBLISHED_SIGMA.get(path.suffix),))
            if levels[0] is None:
                raise UserError(f"{source} does not say its noise levels: give --sigmas, or "
                                "--teacher")
            if not sigmas:
                whose = "SiD" if path.suffix == ".pkl" else "DMD2"
                say(f"{shown(path)} does not say what it is: taken for a one-step student, as of "
                    f"{whose}, at sigma {levels[0]}; of a teacher say --teacher")
    if dataset and known and dataset != known:
        raise UserError(f"--dataset {dataset}: {source} is of {known}")
    told, known = payload or {}, known or dataset
    pipeline = told.get("pipeline", "")
    if base and not pipeline:
        raise UserError(f"--base {base}: {source} is no text-to-image network")
    names = told.get("class_names") or (DATASETS[known].class_names if known in DATASETS else ())
    return Opened(network, levels, known, path, bool(payload), tuple(names),
                  told.get("teacher", ""), told.get("made_from", {}).get("teacher", ""),
                  base or pipeline)


def hinted(name, network):
    """The data set that a file's name tells of, where the network is of its images."""
    def fits(images):
        return (all(network[k] == images[k] for k in ("img_resolution", "img_channels"))
                and network["label_dim"] in (0, images["label_dim"]))

    return next((known for known, one in DATASETS.items()
                 if one.hint and one.hint in name and fits(one.network)), None)


def refuse_sigmas(sigmas, source, own=()):
    if sigmas:
        whose = f"has its own, {[*own]}" if own else "is a teacher"
        raise UserError(f"--sigmas: {source} {whose}; leave out the flag")


def open_text(source, dataset, sigmas=None, base=None):
    """A pipeline, or a student, exported or DMD2's; None where the source is none of these."""
    path = Path(source)
    if (path / "sampling.json").is_file():
        network, levels, told = load_exported(path, base)
        refuse_sigmas(sigmas, source, levels)
        return student_of_text(network, levels, base or name_of(told), dataset, path)
    of_text = dataset in DATASETS and "unet" in DATASETS[dataset].network
    if tensors := tensors_of(path):
        base = base or of_text and name_of(DATASETS[dataset].teacher)
        if not base:
            raise UserError(f"{source} does not say what it was made from: give --base, its "
                            "pipeline's folder or name, or --dataset sd15")
        network, levels = open_published(tensors, path, base, sigmas)
        return student_of_text(network, levels, base, dataset, path)
    known = taught_by(name_of(source), dataset)
    named = (not path.exists() and path.suffix not in WEIGHT_FILES and known in DATASETS
             and "unet" in DATASETS[known].network)
    if named or (path / "model_index.json").is_file():
        refuse_sigmas(sigmas, source)
        return open_pipeline(source, known)
    return None


def student_of_text(network, sigmas, base, dataset, path):
    known = taught_by(base, dataset)
    if dataset and dataset != known:
        raise UserError(f"--dataset {dataset}: {shown(path)} is of {known}")
    return Opened(network, tuple(sigmas), known, path, False, base=base)


def taught_by(base, dataset):
    """The data set of a known pipeline, else the one that was named."""
    return next((name for name, one in DATASETS.items() if one.teacher == base), dataset)


def open_pipeline(source, dataset):
    """A teacher of text to image; its folder is known from wherever a student of it is sampled."""
    base = name_of(source)
    return Opened(load_pipeline_network(base), (), dataset, Path(source), False, base=base)


def read_ours(source):
    """The payload if `source` is one of our checkpoints; None if it is a plain file of weights."""
    if Path(source).suffix != ".pt":
        return None
    try:
        return checkpoint.load(source, needs=checkpoint.SAMPLED)
    except checkpoint.DamagedCheckpoint as damaged:
        try:
            load_network(source)
        except UserError:
            raise damaged from None
        return None


def find_teacher(source, dataset):
    """A published name, or where the file is: here, or in this repository."""
    if source in PUBLISHED_NETWORKS:
        return source
    for path in (source, ROOT / source):
        if os.path.exists(path):                        # False too where a name is too long
            return Path(path)
    raise UserError(f"--teacher {source}: no such file and no published name; published: "
                    f"{', '.join(PUBLISHED_NETWORKS)}; or make one: python train.py --dataset "
                    f"{dataset} --stage 0")


def default_teacher(dataset, classes=None):
    """The embedded or published teacher; of a student without classes (0), the one without."""
    if dataset not in DATASETS:
        raise UserError(f"no teacher is known for dataset {dataset}: name one with --teacher FILE")
    known = DATASETS[dataset]
    if known.unconditional and classes == 0:
        return known.unconditional
    embedded = ROOT / known.teacher
    return embedded if embedded.is_file() else known.teacher


def default_student(steps, dataset, runs):
    """(path, why) of the newest run's student that has that many steps, or the embedded one."""
    found = []
    for config in Path(runs).glob("*/stage*/config.json"):
        candidates = config.with_name("best.pt"), config.with_name("latest.pt")
        weights = [path for path in candidates if path.is_file()]
        try:
            row = json.loads(config.read_text())["config"]
            fits = dataset in (None, row["dataset"]) and len(row["sigmas"]) >= max(steps or 1, 1)
        except (OSError, ValueError, KeyError, TypeError):
            continue                    # a folder that something else made
        if weights and fits:
            found.append((weights[0].stat().st_mtime_ns, weights[0]))
    wanted = f"{steps}-step student" if steps else "student"
    if found:
        return max(found)[1], f"the newest {wanted} under {runs}"
    embedded = DATASETS[dataset or "digits"].student if (dataset or "digits") in DATASETS else ""
    if not embedded:
        raise UserError(f"no {wanted} of {dataset} under {runs}: train one (python train.py "
                        f"--dataset {dataset}), or name one with --checkpoint")
    return ROOT / embedded, "the embedded student"


def open_student(args, steps=0):
    """--checkpoint (which may turn out a teacher), or the newest student with so many steps."""
    source, why = args.checkpoint, "--checkpoint"
    if not source:
        source, why = default_student(steps, args.dataset, args.runs)
    opened = open_network(source, sigmas=args.sigmas, dataset=args.dataset, cache=args.cache,
                          base=args.base)
    say(f"{opened.name} ({why})")
    return opened


def open_teacher(args, student=None):
    """--teacher FILE; else the student's own, or without a student --checkpoint; of a data set of
    the user's its stage 0, else what its newest student was made from."""
    source, made = args.teacher if isinstance(args.teacher, str) else None, student
    if source and args.checkpoint and not student:
        raise UserError("--checkpoint and --teacher FILE: one of them is drawn; with a teacher to "
                        "compare, sample.py takes --compare, evaluate.py --steps and --heun")
    if not (source or student):
        stage0 = Path(args.runs) / f"{args.dataset}-pmdd" / "stage0" / "best.pt"
        own = args.dataset and args.dataset not in DATASETS
        source = args.checkpoint or (stage0 if own and stage0.is_file() else None)
        made = open_student(args) if own and not source else None
    if made and made.base and not source:
        opened = open_pipeline(made.base, made.dataset)
    else:
        digest = not source and made and made.teacher_digest
        source = source or (teacher_of(made) if made else default_teacher(args.dataset or "digits"))
        opened = open_network(source, teacher=True, cache=args.cache,
                              dataset=args.dataset or made and made.dataset)
        if digest and checkpoint.weights_digest(opened.network.state_dict()) != digest:
            raise UserError(f"{made.name} was made from {made.teacher}, and {opened.name} holds "
                            "other weights now: name the right file with --teacher FILE")
    if opened.sigmas:
        raise UserError(f"{opened.name} is a student of {len(opened.sigmas)} steps, not a teacher; "
                        "it takes --steps")
    if not student:
        refuse_sigmas(args.sigmas, opened.name)
        if args.base and not made:
            raise UserError(f"--base is for a student, {opened.name} is a teacher; leave out the "
                            "flag")
    say(f"{opened.name} (teacher)")
    return opened


def teacher_of(student):
    """The file that a student says it was made from, else the teacher of its data set."""
    if student.teacher:
        here = [path for path in (Path(student.teacher), ROOT / student.teacher) if path.is_file()]
        if not (here or student.teacher in PUBLISHED_NETWORKS):
            raise UserError(f"{student.name} was made from {student.teacher}, which is not there: "
                            "name it with --teacher FILE")
        return here[0] if here else student.teacher
    if not student.dataset:
        raise UserError(f"{student.name} does not say its dataset: give --dataset or --teacher "
                        "FILE")
    return default_teacher(student.dataset, student.network.conditions.count)


def steps_text(n):
    return f"{n} step{'s' * (n > 1)}"
