"""The papers' appendix tables: one frozen row for each run that they report, and ours.

A row holds the global batch; a command line is a row plus the flags that `Config` becomes.
PMDD = App. A; DMD = arXiv:2311.18828 App. B; DMD2 = arXiv:2405.14867 App. F;
SiD = arXiv:2404.04057 and the run script of its published code.
"""

from dataclasses import replace

from presets.config import Config, Preset
from presets.datasets import (CIFAR10, DATASETS, DIGITS, DIGITS_SIGMAS, IMAGENET64, PMDD_SIGMAS,
                              EMOJI, SD15, SD_SIGMAS, SDXL, SDXL_ONE_SIGMA, SDXL_SIGMAS)
from text_to_image import SD_LEVELS

# ---- PMDD, App. A.1 and A.2 ----
CIFAR10_ROW = Config(dataset="cifar10", teacher=CIFAR10.teacher, iterations=200_000, batch=256,
                     learning_rate=1e-5, ema_rampup=0.05)               # Deviation 10
IMAGENET64_ROW = replace(CIFAR10_ROW, dataset="imagenet64", teacher=IMAGENET64.teacher,
                         iterations=400_000, batch=72, learning_rate=2e-6)


def schedule(dataset):
    own = {"digits": DIGITS_SIGMAS, "sd15": SD_SIGMAS, "emoji": SD_SIGMAS}
    return own.get(dataset, PMDD_SIGMAS)


def later(base, stage, **changes):
    """Stage 2 or 3 of PMDD: the same row with one more step."""
    return replace(base, stage=stage, sigmas=schedule(base.dataset)[:stage], **changes)


# ---- DMD, App. B.1 and B.2; DMD2, App. F.2; SiD ----
DMD = dict(method="dmd", loss="dm", ttur=1, regression_weight=0.25)
DMD_CIFAR10 = replace(CIFAR10_ROW, **DMD, iterations=300_000, batch=392, learning_rate=5e-5,
                      regression_pairs=100_000)
DMD2 = dict(method="dmd2", loss="dm", gan_weight=3e-3)
DMD2_IMAGENET64 = replace(IMAGENET64_ROW, **DMD2, iterations=200_000, batch=280)
SID = dict(method="sid", sigmas=(2.5,), ttur=1, betas=(0.0, 0.999), weight_decay=0.0, clip=0.0)

FFHQ64_ROW = replace(CIFAR10_ROW, dataset="ffhq64", teacher=DATASETS["ffhq64"].teacher, batch=512)
AFHQV2_64_ROW = replace(FFHQ64_ROW, dataset="afhqv2-64", teacher=DATASETS["afhqv2-64"].teacher)

# EDM Table 7, for stage 0.
TEACHER = dict(stage=0, teacher="", sigmas=(), final_rate=1.0, weight_decay=0.0, clip=0.0)

# ---- Digits: ours, chosen so that minutes on two CPU cores are enough ----
DIGITS_ROW = Config(teacher=DIGITS.teacher, iterations=4000, batch=128, ttur=2, learning_rate=4e-4,
                    final_rate=0.05, ema_halflife=16_000, ema_rampup=0.05, evaluate_every=500,
                    evaluate_images=5_000, save_every=250)

OURS, CPU = "ours, for the embedded digits", "2 CPU cores"
A100 = "4 A100"

# ---- Stable Diffusion v1.5: PMDD A.3; DMD B.3 and B.4; DMD2 F.3; and SDXL: DMD2 F.4 ----
SD15_ROW = Config(dataset="sd15", teacher=SD15.teacher, guidance=1.75, sigmas=SD_SIGMAS[:1],
                  loss="dm", iterations=120_000, batch=120, learning_rate=5e-6, ttur=10,
                  ema_halflife=100_000, ema_rampup=0.05, evaluate_every=5_000,
                  evaluate_images=30_000)
SD15_DMD = replace(SD15_ROW, **DMD, guidance=3.0, iterations=20_000, batch=2304, learning_rate=1e-5,
                   ema_halflife=500_000, regression_pairs=500_000, regression_steps=25)
SD15_DMD2 = replace(SD15_ROW, method="dmd2", iterations=40_000, batch=2048, learning_rate=1e-5,
                    ema_halflife=500_000)
SDXL_DMD2 = replace(SD15_DMD2, dataset="sdxl", teacher=SDXL.teacher, guidance=8.0, stage=4,
                    sigmas=SDXL_SIGMAS, trained_step="random", iterations=20_000, batch=128,
                    learning_rate=5e-7, ttur=5, gan_weight=5e-3, ema_halflife=50_000,
                    evaluate_every=1_000, evaluate_images=10_000)
SDXL_ONE = replace(SDXL_DMD2, stage=1, sigmas=SDXL_ONE_SIGMA, trained_step="last")

# ---- Emoji: ours, Stable Diffusion's rows for minutes on one CPU core ----
EMOJI_ROW = replace(SD15_ROW, dataset="emoji", teacher=EMOJI.teacher, iterations=1_200, batch=32,
                    learning_rate=5e-4, final_rate=0.2, ttur=5, ema_halflife=2_000, ema_rampup=0.1,
                    evaluate_every=300, evaluate_images=1_000, save_every=100)
# A later step has little noise to remove: guidance and far noise would spoil what is there.
EMOJI_LATER = dict(iterations=400, learning_rate=3e-4, final_rate=0.0, evaluate_every=200,
                   unforget_weight=0.3)
OURS_TEXT = "ours, for the embedded emoji"

# (dataset, method, stage, variant) -> row. The variant is --variant, "" without it.
PRESETS = {
    ("cifar10", "pmdd", 1, ""): Preset(CIFAR10_ROW, "PMDD A.1, Table 5", A100, 2.52),
    ("cifar10", "pmdd", 2, ""): Preset(
        later(CIFAR10_ROW, 2, learning_rate=5e-6, iterations=35_000, unforget_weight=1.0,
              ema_halflife=200_000),
        "PMDD A.1, Table 5 (Table 4: 2.21)", A100, 2.19),
    ("cifar10", "pmdd", 3, ""): Preset(
        later(CIFAR10_ROW, 3, learning_rate=8e-7, iterations=65_000, unforget_weight=1.0),
        "PMDD A.1, Table 5", A100, 2.48),
    ("imagenet64", "pmdd", 1, ""): Preset(IMAGENET64_ROW, "PMDD A.2, Table 5", A100, 2.60),
    ("imagenet64", "pmdd", 2, ""): Preset(
        later(IMAGENET64_ROW, 2, learning_rate=8e-7, iterations=40_000, unforget_weight=0.3,
              ema_halflife=50_000),
        "PMDD A.2, Table 5 (Table 4: 1.99)", A100, 1.95, hours="about 24"),
    ("imagenet64", "pmdd", 3, ""): Preset(
        later(IMAGENET64_ROW, 3, learning_rate=8e-7, iterations=40_000, unforget_weight=0.3,
              ema_halflife=50_000),
        "PMDD A.2, Table 5", A100, 2.14, hours="about 24"),

    ("cifar10", "dmd", 1, ""): Preset(DMD_CIFAR10, "DMD B.1, Table 6", "7 GPUs", 2.66),
    ("cifar10", "dmd", 1, "unconditional"): Preset(
        replace(DMD_CIFAR10, teacher=CIFAR10.unconditional, regression_weight=0.5,
                regression_pairs=500_000), "DMD B.1, Table 6", "7 GPUs", 3.77),
    ("imagenet64", "dmd", 1, ""): Preset(
        replace(IMAGENET64_ROW, **DMD, iterations=350_000, batch=336, regression_pairs=25_000,
                regression_steps=256), "DMD B.2, Table 1", "7 GPUs", 2.62),

    ("imagenet64", "dmd2", 1, ""): Preset(DMD2_IMAGENET64, "DMD2 F.2, Table 3", "7 A100", 1.51,
                                       hours="about 48"),
    ("imagenet64", "dmd2", 1, "no-gan"): Preset(
        replace(DMD2_IMAGENET64, gan_weight=0.0, iterations=400_000),
        "DMD2 F.2, first part of the longer training; Table 3", "7 A100", 2.61),
    ("imagenet64", "dmd2", 1, "longer"): Preset(
        replace(DMD2_IMAGENET64, learning_rate=5e-7, iterations=150_000,
                start_from="runs/imagenet64-dmd2-no-gan/stage1/best.pt"),
        "DMD2 F.2, second part of the longer training; Table 1", "7 A100", 1.28,
        hours="about 120 with no-gan"),
    ("cifar10", "dmd2", 1, ""): Preset(
        replace(CIFAR10_ROW, **DMD2),
        "ours: DMD2 has no CIFAR-10 row; its terms, PMDD's A.1 otherwise",
        "none", None),

    # SiD's script leaves the length open ("modify --duration"): that of CIFAR-10 without classes.
    ("ffhq64", "sid", 1, ""): Preset(
        replace(FFHQ64_ROW, **SID | {"betas": (0.9, 0.999)}, adapted_betas=(0.0, 0.999),
                iterations=976_562), "SiD, published code's README", "4 GPUs", 1.550),
    ("afhqv2-64", "sid", 1, ""): Preset(
        replace(AFHQV2_64_ROW, **SID, alpha=1.0, iterations=976_562, learning_rate=5e-6),
        "SiD, published code's README", "4 GPUs", 1.628),

    ("cifar10", "sid", 1, ""): Preset(
        replace(CIFAR10_ROW, **SID, iterations=3_125_000),
        "SiD, published code's README", "4 GPUs", 1.710),
    ("cifar10", "sid", 1, "unconditional"): Preset(
        replace(CIFAR10_ROW, **SID, iterations=1_953_125, teacher=CIFAR10.unconditional),
        "SiD, published code's README", "4 GPUs", 1.923),
    ("imagenet64", "sid", 1, ""): Preset(
        replace(IMAGENET64_ROW, **SID, iterations=122_070, batch=8192, learning_rate=4e-6,
                ema_halflife=2_000_000), "SiD, published code's README", "4 GPUs", 1.524),

    ("sd15", "pmdd", 1, ""): Preset(SD15_ROW, "PMDD A.3, Table 2", "3 H100", 10.41, 0.302),
    ("sd15", "pmdd", 2, ""): Preset(
        later(SD15_ROW, 2, learning_rate=8e-7, iterations=16_000, batch=20, ttur=5,
              unforget_weight=0.3, ema_halflife=10_000, evaluate_every=1_000),
        "PMDD A.3, Tables 2 and 6", "1 H100", 8.63, 0.30, "about 12"),
    ("sd15", "pmdd", 3, ""): Preset(
        later(SD15_ROW, 3, learning_rate=8e-7, iterations=16_000, batch=20, ttur=5,
              unforget_weight=0.01, ema_halflife=10_000, evaluate_every=1_000),
        "PMDD A.3, Table 2 (guidance 1: 8.26)", "1 H100", 8.50, 0.302, "about 12"),
    ("sd15", "dmd", 1, ""): Preset(SD15_DMD, "DMD B.3, Table 3", "72 A100", 11.49, None, "36"),
    ("sd15", "dmd", 1, "guidance-8"): Preset(
        replace(SD15_DMD, guidance=8.0, iterations=165_000, batch=2560,
                regression_pairs=12_000_000),
        "DMD B.4, Table 4, without the changes on the way of its Table 5", "about 80 A100", 14.93,
        0.320, "about 336"),
    ("sd15", "dmd2", 1, ""): Preset(
        SD15_DMD2, "DMD2 F.3, first stage", "64 A100", 9.28, None, "25"),
    ("sd15", "dmd2", 1, "gan"): Preset(
        replace(SD15_DMD2, learning_rate=5e-7, iterations=5_000, gan_weight=1e-3,
                ema_halflife=100_000, start_from="runs/sd15-dmd2/stage1/best.pt"),
        "DMD2 F.3, second stage; Table 5", "64 A100", 8.35, 0.30, "2"),
    ("sd15", "sid", 1, ""): Preset(
        replace(SD15_ROW, method="sid", loss="sid", guidance=1.5, ttur=1, batch=512,
                learning_rate=1e-6, betas=(0.0, 0.999), weight_decay=0.0, clip=0.0, alpha=1.0,
                sigmas=(SD_LEVELS.table[625].item(),), iterations=20_000),
        "ours, after SiD-LSG (arXiv:2406.01561); PMDD A.3: sid gave no gain", "none", None),

    ("sdxl", "dmd2", 1, "pretraining"): Preset(
        replace(SDXL_ONE, loss="none", gan_weight=0.0, regression_weight=1.0,
                regression_pairs=10_000, regression_steps=25, ttur=1, iterations=2_000, batch=256,
                learning_rate=1e-5, evaluate_every=0),
        "DMD2 F.4, the regression before its one-step student; published code", "64 A100", None),
    ("sdxl", "dmd2", 1, ""): Preset(
        replace(SDXL_ONE, iterations=25_000,
                start_from="runs/sdxl-dmd2-pretraining/stage1/best.pt"),
        "DMD2 F.4, Table 2", "64 A100", 19.01, 0.336, "about 60"),
    ("sdxl", "dmd2", 4, ""): Preset(
        SDXL_DMD2, "DMD2 F.4, Table 2", "64 A100", 19.32, 0.332, "about 60"),

    ("digits", "pmdd", 1, ""): Preset(DIGITS_ROW, OURS, CPU, None),
    ("digits", "pmdd", 2, ""): Preset(
        later(DIGITS_ROW, 2, learning_rate=4e-4, iterations=5000, unforget_weight=0.3),
        OURS, CPU, None),
    ("digits", "pmdd", 3, ""): Preset(
        later(DIGITS_ROW, 3, learning_rate=2e-4, iterations=3000, unforget_weight=1.0),
        OURS, CPU, None),
    ("digits", "dmd", 1, ""): Preset(
        replace(DIGITS_ROW, **DMD, regression_pairs=2_000), OURS, CPU, None),
    ("digits", "dmd2", 1, ""): Preset(replace(DIGITS_ROW, **DMD2, ttur=5), OURS, CPU, None),
    ("digits", "sid", 1, ""): Preset(replace(DIGITS_ROW, **SID), OURS, CPU, None),

    ("emoji", "pmdd", 1, ""): Preset(EMOJI_ROW, OURS_TEXT, CPU, None),
    ("emoji", "pmdd", 2, ""): Preset(
        later(EMOJI_ROW, 2, **EMOJI_LATER, guidance=1.25, noise_range=(0.02, 0.8)),
        OURS_TEXT, CPU, None),
    ("emoji", "pmdd", 3, ""): Preset(
        later(EMOJI_ROW, 3, **EMOJI_LATER, guidance=1.4, noise_range=(0.02, 0.6)),
        OURS_TEXT, CPU, None),
    ("emoji", "dmd", 1, ""): Preset(
        replace(EMOJI_ROW, **DMD, regression_pairs=2_000), OURS_TEXT, CPU, None),
    ("emoji", "dmd2", 1, ""): Preset(replace(EMOJI_ROW, method="dmd2"), OURS_TEXT, CPU, None),
    ("emoji", "dmd2", 1, "gan"): Preset(
        replace(EMOJI_ROW, method="dmd2", gan_weight=1e-3), OURS_TEXT, CPU, None),
    ("emoji", "sid", 1, ""): Preset(
        replace(EMOJI_ROW, method="sid", loss="sid", ttur=1, alpha=1.0, learning_rate=5e-5,
                ema_rampup=0.05),
        OURS_TEXT, CPU, None),

    ("digits", "pmdd", 0, ""): Preset(
        replace(DIGITS_ROW, **TEACHER, iterations=2_000, batch=256, learning_rate=1e-3,
                ema_halflife=15_000, evaluate_every=1_000),
        OURS, CPU, None),
    ("emoji", "pmdd", 0, ""): Preset(
        replace(EMOJI_ROW, stage=0, guidance=1.0, sigmas=(), iterations=4_500, batch=64,
                learning_rate=1e-3, final_rate=0.01, betas=(0.9, 0.99), weight_decay=0.0, clip=1.0,
                warm_up=100, caption_dropout=0.1, ema_halflife=40_000, evaluate_every=0,
                save_every=500),
        OURS_TEXT, CPU, None),
    ("cifar10", "pmdd", 0, ""): Preset(
        replace(CIFAR10_ROW, **TEACHER, iterations=390_625, batch=512, learning_rate=1e-3,
                warm_up=19_531, augment=0.12, evaluate_every=10_000),
        "EDM Table 7", "8 V100", None),
    **{(row.dataset, "pmdd", 0, ""): Preset(
        replace(row, **TEACHER, iterations=781_250, batch=256, learning_rate=2e-4, warm_up=39_062,
                augment=0.15, evaluate_every=10_000),
        "EDM Table 7", "8 V100", None) for row in (FFHQ64_ROW, AFHQV2_64_ROW)},
    ("imagenet64", "pmdd", 0, ""): Preset(
        replace(IMAGENET64_ROW, **TEACHER, iterations=610_351, batch=4096, learning_rate=1e-4,
                warm_up=2_441, ema_halflife=50_000_000, evaluate_every=10_000),
        "EDM Table 7", "32 A100", None),
}


# Ours, for at most half of the network passes of PMDD's rows up to each stage: docs/SPEED.md.
FAST = {("digits", 1): dict(iterations=2_900, loss="dm", ttur=5, noise_range=(0.02, 0.7)),
        ("digits", 2): dict(iterations=3_700, loss="dm", ttur=5, noise_range=(0.02, 0.7)),
        ("digits", 3): dict(iterations=2_200, loss="dm", ttur=5, noise_range=(0.02, 0.6)),
        ("emoji", 1): dict(iterations=300, noise_range=(0.02, 0.8)),
        ("emoji", 2): dict(iterations=426), ("emoji", 3): dict(iterations=200)}


def fast(row):
    """Of other data sets half of the row's iterations; its rate falls to 0 in either."""
    known = FAST.get((row.config.dataset, row.config.stage))
    changes = known or dict(iterations=row.config.iterations // 2)
    source = row.source if known else f"ours, not run yet: half of the iterations of {row.source}"
    return replace(row, config=replace(row.config, **changes, final_rate=0.0), source=source,
                   gpus=row.gpus if known else "none", paper_fid=None, paper_clip=None, hours="-")


def find(dataset, method, stage, variant="", network=None, teacher=""):
    """The row; where a data set has none for a method, the nearest published one by resolution.

    A ValueError lists what there is. DMD2 with n steps trained together by backward simulation is
    its one-step row with n sigmas; of SDXL the first n of its four.
    """
    if stage == 0:
        method = "pmdd"                                 # a teacher is of no method
    if variant == "fast" and method == "pmdd" and stage:
        return fast(find(dataset, method, stage, "", network, teacher))
    if (dataset, method, stage, variant) in PRESETS:
        return PRESETS[dataset, method, stage, variant]
    like = nearest(network, method, stage) if "unet" in (network or ()) else dataset
    together = 4 if like == "sdxl" else 1               # the row that DMD2's several steps have
    if method == "dmd2" and 1 < stage <= len(PMDD_SIGMAS) and (
            not variant or (dataset, method, together, variant) in PRESETS):
        row = find(dataset, method, together, variant, network, teacher)
        sigmas = SDXL_SIGMAS if like == "sdxl" else schedule(like)
        return replace(row, paper_fid=None, source=row.source + ", several steps", config=replace(
            row.config, stage=stage, sigmas=sigmas[:stage], trained_step="random"))
    known = {d for d, m, s, _ in PRESETS if m == method and (s == 0) == (stage == 0)}
    if dataset not in known and network and not variant:
        near = nearest(network, method, stage)
        row = find(near, method, stage)
        return replace(row, paper_fid=None, paper_clip=None, hours="-", gpus="none",
                       source=f"the nearest published row by resolution, of {near}: {row.source}",
                       config=replace(row.config, dataset=dataset, teacher=teacher, start_from=""))
    near = sorted((s, v) for d, m, s, v in PRESETS if d == dataset and m == method)
    near += [(s, "fast") for s, v in near if method == "pmdd" and s and not v]
    if method == "dmd2":
        near += [(s, v) for s in range(2, len(PMDD_SIGMAS) + 1) for of, v in near
                 if of == together]
    listed = ", ".join(f"--stage {s}" + (f" --variant {v}" if v else "") for s, v in near)
    raise ValueError(f"no preset for --dataset {dataset} --method {method} --stage {stage}"
                     + (f" --variant {variant}" if variant else "")
                     + f"; there is: {listed or 'none for this method'}")


def nearest(network, method, stage):
    """The published data set whose rows a network of another takes."""
    if "unet" in network:
        xl = network["unet"].get("addition_embed_type") and method == "dmd2"
        return "sdxl" if xl else "sd15"
    return ("cifar10" if network["img_resolution"] <= 32 else "imagenet64" if stage else "ffhq64")
