"""Tiny random pipelines in the shapes of Stable Diffusion and SDXL, saved as diffusers saves them.

    python tests/tiny_pipelines.py FOLDER [--xl] [--v]
"""

import sys
from pathlib import Path

import torch

LEVELS = dict(beta_schedule="scaled_linear", beta_start=0.00085, beta_end=0.012,
              num_train_timesteps=1000, steps_offset=1)
FIRST, LAST = 512, 513                                  # <|startoftext|>, <|endoftext|>


def tokenizer(pad="<|endoftext|>"):
    """CLIP's bytes without its merges: a letter is a token."""
    from transformers import CLIPTokenizer
    from transformers.convert_slow_tokenizer import bytes_to_unicode

    letters = list(bytes_to_unicode().values())
    names = [*letters, *(f"{letter}</w>" for letter in letters), "<|startoftext|>", "<|endoftext|>"]
    return CLIPTokenizer(vocab={name: i for i, name in enumerate(names)}, merges=[],
                         model_max_length=77, pad_token=pad)


def text_encoder(projected=False):
    from transformers import CLIPTextConfig, CLIPTextModel, CLIPTextModelWithProjection

    config = CLIPTextConfig(
        vocab_size=514, hidden_size=32, intermediate_size=64, num_hidden_layers=3,
        num_attention_heads=4, projection_dim=16, bos_token_id=FIRST, pad_token_id=LAST,
        eos_token_id=2 if projected else LAST)          # the legacy of SDXL's second encoder
    return (CLIPTextModelWithProjection if projected else CLIPTextModel)(config).eval()


def vae(scaling_factor=0.18215, **changes):
    from diffusers import AutoencoderKL

    return AutoencoderKL(
        block_out_channels=(16, 32), down_block_types=("DownEncoderBlock2D",) * 2,
        up_block_types=("UpDecoderBlock2D",) * 2, latent_channels=4, norm_num_groups=8,
        layers_per_block=1, sample_size=32, scaling_factor=scaling_factor, **changes).eval()


def unet(xl=False, **changes):
    from diffusers import UNet2DConditionModel

    more = dict(cross_attention_dim=64, addition_embed_type="text_time", addition_time_embed_dim=8,
                projection_class_embeddings_input_dim=16 + 6 * 8, use_linear_projection=True,
                transformer_layers_per_block=(1, 2)) if xl else dict(cross_attention_dim=32)
    network = UNet2DConditionModel(**dict(
        sample_size=16, block_out_channels=(32, 64), layers_per_block=1, norm_num_groups=8,
        attention_head_dim=8, down_block_types=("DownBlock2D", "CrossAttnDownBlock2D"),
        up_block_types=("CrossAttnUpBlock2D", "UpBlock2D"), **more) | changes)
    return network.eval()


def save(folder, xl=False, prediction_type="epsilon", seed=0, **of_unet):
    """The folder of a pipeline, 4 MB; one seed, one pipeline."""
    from diffusers import (EulerDiscreteScheduler, PNDMScheduler, StableDiffusionPipeline,
                           StableDiffusionXLPipeline)

    torch.manual_seed(seed)
    parts = dict(unet=unet(xl, **of_unet), vae=vae(0.13025, force_upcast=True) if xl else vae(),
                 text_encoder=text_encoder(), tokenizer=tokenizer())
    if xl:
        pipeline = StableDiffusionXLPipeline(
            **parts, text_encoder_2=text_encoder(projected=True), tokenizer_2=tokenizer(pad="!"),
            scheduler=EulerDiscreteScheduler(**LEVELS, prediction_type=prediction_type))
    else:
        scheduler = PNDMScheduler(**LEVELS, prediction_type=prediction_type, skip_prk_steps=True)
        pipeline = StableDiffusionPipeline(
            **parts, scheduler=scheduler, safety_checker=None, feature_extractor=None,
            requires_safety_checker=False)
    pipeline.save_pretrained(folder)
    return Path(folder)


if __name__ == "__main__":
    save(sys.argv[1], xl="--xl" in sys.argv,
         prediction_type="v_prediction" if "--v" in sys.argv else "epsilon")
