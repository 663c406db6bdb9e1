"""What a name given to --dataset stands for, and the papers' noise levels."""

from typing import NamedTuple

from models import KARRAS
from text_to_image import SD15_NETWORK, SD_LEVELS, SDXL_NETWORK


class Dataset(NamedTuple):
    """One of them."""
    network: dict               # architecture of its teacher; with "unet" in it, of text to image
    teacher: str                # published name, or file of this repository
    reference: str = ""         # of its FID, likewise; "": the user's own
    unconditional: str = ""     # its published teacher without classes
    data: str = ""              # its real images, where they need no --data
    student: str = ""           # a file of this repository
    class_names: tuple = ()
    hint: str = ""              # part of its published files' names


FACES_64 = dict(img_resolution=64, img_channels=3, label_dim=0, model_type="SongUNet",
                augment_dim=9, model_channels=128, channel_mult=[1, 2, 2, 2])
DATASETS = {
    "digits": Dataset(
        dict(img_resolution=8, img_channels=1, label_dim=10, model_type="SongUNet",
             model_channels=16, channel_mult=[1, 2], channel_mult_emb=2, num_blocks=1,
             attn_resolutions=[], dropout=0.0),
        "assets/digits-teacher.pt", "assets/digits-reference.npz", data="digits",
        student="assets/digits-student.pt", class_names=tuple("0123456789"), hint="digits"),
    "cifar10": Dataset(
        dict(img_resolution=32, img_channels=3, label_dim=10, model_type="SongUNet",
             augment_dim=9, model_channels=128, channel_mult=[2, 2, 2], dropout=0.13),
        "edm-cifar10-32x32-cond-vp", "fid-cifar10-32x32", "edm-cifar10-32x32-uncond-vp",
        data="cifar10", class_names=("airplane", "automobile", "bird", "cat", "deer", "dog", "frog",
                                     "horse", "ship", "truck"), hint="cifar10"),
    "imagenet64": Dataset(
        dict(img_resolution=64, img_channels=3, label_dim=1000, model_type="DhariwalUNet",
             dropout=0.10),
        "edm-imagenet-64x64-cond-adm", "fid-imagenet-64x64", hint="imagenet"),
    "ffhq64": Dataset(FACES_64 | {"dropout": 0.05}, "edm-ffhq-64x64-uncond-vp", "fid-ffhq-64x64",
                      hint="ffhq"),
    "afhqv2-64": Dataset(FACES_64 | {"dropout": 0.25}, "edm-afhqv2-64x64-uncond-vp",
                         "fid-afhqv2-64x64", hint="afhqv2"),
    "sd15": Dataset(SD15_NETWORK, "stable-diffusion-v1-5/stable-diffusion-v1-5"),
    "sdxl": Dataset(SDXL_NETWORK, "stabilityai/stable-diffusion-xl-base-1.0"),
    "emoji": Dataset(
        SD15_NETWORK | dict(prediction_type="v_prediction", unet=dict(
            sample_size=8, cross_attention_dim=96, block_out_channels=(64, 128), layers_per_block=1,
            attention_head_dim=4, norm_num_groups=8,
            down_block_types=("CrossAttnDownBlock2D",) * 2,
            up_block_types=("CrossAttnUpBlock2D",) * 2)),
        "assets/emoji/pipeline", "assets/emoji/reference.npz", data="emoji",
        student="assets/emoji/student")}
DIGITS, CIFAR10, IMAGENET64, SD15, SDXL, EMOJI = (DATASETS[name] for name in (
    "digits", "cifar10", "imagenet64", "sd15", "sdxl", "emoji"))


def sigmas_at(*fractions):
    """The noise levels of a schedule given as fractions of the 1000-level grid (Deviation 3)."""
    return tuple(KARRAS.at(fraction) for fraction in fractions)


PMDD_SIGMAS = sigmas_at(1, 0.5, 0.25)           # 80, 2.515, 0.170
EQUAL_WIDTH_SIGMAS = sigmas_at(1, 0.67, 0.33)   # 80, 9.96, 0.452: PMDD's other schedule
# 80, 0.632, 0.170: a pixel of 8x8 stands for 16 of 32x32, whose mean has a quarter of the noise, so
# 2.515 / 4 hides as much of a digit as 2.515 of a CIFAR-10 image.
DIGITS_SIGMAS = sigmas_at(1, 0.36, 0.25)
# 14.61, 1.613, 0.693: PMDD's fractions as whole timesteps of Stable Diffusion (Deviation 14).
SD_SIGMAS = tuple(SD_LEVELS.table[[999, 499, 249]].tolist())
SDXL_SIGMAS = tuple(SD_LEVELS.table[[999, 749, 499, 249]].tolist())     # DMD2's four steps,
SDXL_ONE_SIGMA = (SD_LEVELS.table[399].item(),)                         # and its single one
