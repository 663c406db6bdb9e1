"""What a run is told: each field is a flag of train.py, and a preset is all of them."""

from dataclasses import dataclass, field

from models import LOSSES
from presets.datasets import DATASETS, PMDD_SIGMAS


def option(default, text, choices=None):
    return field(default=default, metadata={"help": text, "choices": choices})


@dataclass(frozen=True)
class Config:
    """Everything that decides what a run computes; each field is a flag of train.py."""
    dataset: str = option("digits", f"what is distilled: {', '.join(DATASETS)}, or a name for your "
                                    "own (with --teacher, or --stage 0 --data)")
    method: str = option("pmdd", "its losses, TTUR and schedule as published",
                         ("pmdd", "dmd", "dmd2", "sid"))
    stage: int = option(1, "steps of the student; 0 trains a teacher with EDM's loss (default: "
                           "with PMDD 1, 2, 3 in turn, else 1)")
    teacher: str = option("", "published name, or file, of the pretrained denoiser; of text to "
                              "image a pipeline's folder or its name on the model hub")
    guidance: float = option(1.0, "classifier-free guidance of the teacher; 1: none")
    start_from: str = option("", "checkpoint whose student and adapted network start this run; "
                                 "empty: the stage before, or the teacher")
    sigmas: tuple = option(PMDD_SIGMAS[:1], "noise level of each step, largest first")
    trained_step: str = option("last", "step that an iteration trains: the last (PMDD), or one "
                                       "drawn at random (DMD2 with several)", ("last", "random"))
    loss: str = option("sid", "student loss; none leaves only the extra terms",
                       LOSSES)                          # the table itself: it may grow
    alpha: float = option(1.2, "alpha of the sid loss")
    dm_weighting: str = option("eq8", "weight of dm's gradient: eq8 is 1 / mean |x0 - teacher|, "
                                      "the others are of DMD Table 2", ("eq8", "sigma", "sigma3"))
    unforget_weight: float = option(0.0, "how much the earlier steps are kept (beta of PMDD Eq. 9)")
    external_sampling: bool = option(True, "inputs from the frozen previous student (PMDD Table 6)")
    gan_weight: float = option(0.0, "DMD2's GAN term in the student's loss; 0: no GAN")
    gan_adapted_weight: float = option(1e-2, "discriminator's weight in the adapted network's "
                                             "loss, where there is a GAN")
    regression_weight: float = option(0.0, "lambda of DMD's regression term; 0: none")
    regression_pairs: int = option(0, "noise-image pairs that the teacher makes for it")
    regression_steps: int = option(18, "Heun steps for each of these pairs")
    ttur: int = option(5, "updates of the adapted network for one of the student")
    iterations: int = option(0, "batches of generated images = updates of the adapted network")
    batch: int = option(256, "images of an iteration, over all processes")
    learning_rate: float = option(1e-5, "AdamW's, for student and adapted network")
    final_rate: float = option(1.0, "share of the learning rate that is left at the end, falling "
                                    "linearly; 1: constant, as in the papers")
    betas: tuple = option((0.9, 0.999), "AdamW's two betas")
    weight_decay: float = option(0.01, "AdamW's weight decay")
    lora: int = option(0, "text to image: train adapters (LoRA) of this rank over one frozen copy "
                          "of the teacher; 0: train all weights")
    clip: float = option(10.0, "largest L2 norm of a gradient; 0: no limit")
    ema_halflife: int = option(500_000, "images of student updates after which the average student "
                                        "has half forgotten; sooner, as --ema-rampup says")
    evaluate_every: int = option(1000, "iterations between evaluations; 0: none, and best.pt is "
                                       "the newest")
    evaluate_images: int = option(50_000, "images of an evaluation")
    save_every: int = option(1000, "iterations between checkpoints")
    seed: int = option(0, "seed of all random draws")
    # Of fields that came later a default means what runs did before.
    warm_up: int = option(0, "iterations over which the learning rate rises linearly from 0")
    ema_rampup: float = option(0.0, "the average's half-life is at most this share of the images "
                                    "that updates have seen; 0: no such limit")
    adapted_noises: int = option(1, "noise levels of each generated image in an update of the "
                                    "adapted network")
    adapted_rate: float = option(1.0, "learning rate of the adapted network, as a multiple of "
                                      "the student's")
    adapted_betas: tuple = option((), "AdamW's two betas for the adapted network (empty: the "
                                      "student's)")
    noise_range: tuple = option((), "at which noise dm or sid compares the denoisers: two shares "
                                    "of the levels (empty: 0.02 0.98 with dm, 0 0.8 with sid)")
    augment: float = option(0.0, "stage 0: probability of each of EDM's augmentations")
    caption_dropout: float = option(0.0, "stage 0: share of captions or classes that are left out, "
                                         "for guidance")
    model_channels: int = option(0, "stage 0: width of the network (0: the data set's own)")
    channel_mult: tuple = option((), "stage 0: width of each level, in model_channels")
    num_blocks: int = option(0, "stage 0: blocks of each level (0: the data set's own)")
    attn_resolutions: tuple = option((), "stage 0: resolutions with attention")
    dropout: float = option(-1.0, "stage 0: dropout of the network (-1: the data set's own)")

    @property
    def has_previous(self):
        """Whether a frozen student of the stage before takes part."""
        begins = self.start_from or (self.method == "pmdd" and self.stage > 1)
        return bool(begins and len(self.sigmas) > 1 and self.trained_step == "last"
                    and (self.external_sampling or self.unforget_weight))


def both_betas(config):
    """AdamW's for the student and for the adapted network."""
    return config.betas, config.adapted_betas or config.betas


@dataclass(frozen=True)
class Preset:
    config: Config
    source: str                 # where the row stands
    gpus: str                   # what the authors ran it on
    paper_fid: float | None     # what they report; None where they report none
    paper_clip: float | None = None     # CLIP score, likewise
    hours: str = "-"            # how long it took them, where they say

    @property
    def images(self):
        """Images that the run generates, or for stage 0 sees."""
        return self.config.iterations * self.config.batch
