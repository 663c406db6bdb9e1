"""Text to image: diffusers' U-Nets as denoisers D(x_t, sigma, y).

Of Stable Diffusion 1.x, 2.x and SDXL. x are latents, x_t = x0 + sigma eps as everywhere; y is one
vector for each image, [B, tokens * width], in SDXL with the pooled vector and six sizes behind.
weights/pipeline.py makes it, and pictures. diffusers and transformers (requirements-text.txt) are
imported here alone, by library(), and only when a text model is asked for.

    python text_to_image.py export BEST.pt OUT      a student as a folder that diffusers samples
"""

import contextlib
import importlib

import torch
from torch import nn

from base.errors import UserError, out_of_memory, run
from models import Levels, classes_as_conditions, sigma_grid

SIZES = 6                       # SDXL's height and width, crop, height and width again


def library(name):
    try:
        return importlib.import_module(name)
    except ImportError as error:
        raise UserError(f"text to image needs {name} ({error}): pip install -r "
                        "requirements-text.txt") from None


def require(ok, message):
    if not ok:
        raise UserError(message)


@contextlib.contextmanager
def reading(path):
    """Whatever the libraries raise at a file that is missing, damaged or of another kind."""
    try:
        yield
    except UserError as error:
        raise UserError(f"{path}: {error}") from None
    except Exception as error:
        if out_of_memory(error):
            raise
        raise UserError(f"cannot load {path}: {reason(error)}") from None


def reason(error):
    return f"{type(error).__name__}: {' '.join(str(error).split())[:200]}"


# ---- The U-Net as a denoiser. ----

def noise_table(beta_schedule, beta_start, beta_end, num_train_timesteps):
    """sigma = sqrt((1 - abar) / abar) of every timestep, ascending. [N] float64"""
    power = {"linear": 1.0, "scaled_linear": 0.5}.get(beta_schedule)
    require(power, f"beta_schedule is {beta_schedule!r}; allowed: linear, scaled_linear")
    roots = torch.linspace(beta_start ** power, beta_end ** power, num_train_timesteps,
                           dtype=torch.float64, device="cpu")   # also while built on "meta"
    abar = torch.cumprod(1 - roots ** (1 / power), 0)
    return ((1 - abar) / abar).sqrt()


def variance_preserving(table):
    """Levels of a network that sees c x_t, c = 1 / sqrt(1 + sigma^2), and begins with z itself."""
    def at(fraction):
        index = torch.as_tensor(fraction, dtype=torch.float64) * (len(table) - 1)
        levels, whole = table.to(index.device), index.round()
        low = index.floor().long().clamp(0, len(table) - 2)
        between = torch.lerp(levels[low].log(), levels[low + 1].log(), index - low).exp()
        sigma = torch.where((index - whole).abs() < 1e-9, levels[whole.long()], between)
        return sigma if torch.is_tensor(fraction) else sigma.item()

    return Levels(table, at, lambda sigma: (1 + sigma ** 2) ** 0.5, sigma_grid)


# Stable Diffusion v1.5's and SDXL's, as published; what is left out is diffusers' default.
SD_SCHEDULE = dict(beta_schedule="scaled_linear", beta_start=0.00085, beta_end=0.012,
                   num_train_timesteps=1000)
SD_LEVELS = variance_preserving(noise_table(**SD_SCHEDULE))
SD15_NETWORK = dict(unet=dict(sample_size=64, cross_attention_dim=768), prediction_type="epsilon",
                    schedule=SD_SCHEDULE)
SDXL_NETWORK = SD15_NETWORK | dict(unet=dict(
    sample_size=128, cross_attention_dim=2048, block_out_channels=[320, 640, 1280],
    down_block_types=["DownBlock2D", "CrossAttnDownBlock2D", "CrossAttnDownBlock2D"],
    up_block_types=["CrossAttnUpBlock2D", "CrossAttnUpBlock2D", "UpBlock2D"],
    attention_head_dim=[5, 10, 20], transformer_layers_per_block=[1, 2, 10],
    use_linear_projection=True, addition_embed_type="text_time", addition_time_embed_dim=256,
    projection_class_embeddings_input_dim=2816))


class TextDenoiser(nn.Module):
    """D(x_t, sigma, y) of an epsilon or v network; TextDenoiser(**config) builds another one.

    With the text encoder, a CLIPTextModel's configuration, both learn together (stage 0), and y is
    the numbers of a caption's tokens, [B, tokens].
    """

    def __init__(self, unet, prediction_type, schedule, text_encoder=None):
        super().__init__()
        require(prediction_type in ("epsilon", "v_prediction"),
                f"prediction_type is {prediction_type!r}; allowed: epsilon, v_prediction")
        self.config = dict(unet=unet, prediction_type=prediction_type, schedule=schedule)
        self.text_encoder = None
        if text_encoder:
            kinds = library("transformers")
            self.config["text_encoder"] = text_encoder
            with torch.device("cpu"):                       # it has buffers that no file holds
                self.text_encoder = kinds.CLIPTextModel(kinds.CLIPTextConfig(**text_encoder))
        self.levels = variance_preserving(noise_table(**schedule))
        self.predicts_v = prediction_type == "v_prediction"
        # With it the denoising weight, sigma^-2 + sigma_data^-2, gives the error of epsilon or v.
        self.sigma_data = 1.0 if self.predicts_v else float("inf")
        self.unet = library("diffusers").UNet2DConditionModel.from_config(unet)
        self.measure(self.unet.config)
        self.midpoints = None
        self.conditions, self.pixels = classes_as_conditions(0), None   # until a pipeline serves

    def measure(self, config):
        """What the program asks of a network."""
        require(config.in_channels == config.out_channels,
                f"the U-Net has {config.in_channels} channels in and {config.out_channels} out; "
                "allowed: as many of both (no inpainting)")
        self.shape = (config.in_channels, config.sample_size, config.sample_size)
        self.encoder_channels = config.block_out_channels[-1]
        self.encoder_resolution = self.shape[-1] >> len(config.down_block_types) - 1
        # The parts of y behind the text: SDXL's pooled vector and sizes.
        self.text_width, self.y_rest = config.cross_attention_dim, [0, 0]
        if config.addition_embed_type == "text_time":
            sizes = SIZES * config.addition_time_embed_dim
            self.y_rest = [config.projection_class_embeddings_input_dim - sizes, SIZES]

    @property
    def blocks(self):
        kinds = (library("diffusers.models.resnet").ResnetBlock2D,
                 library("diffusers.models.attention").BasicTransformerBlock)
        return [module for module in self.unet.modules() if isinstance(module, kinds)]

    def forward(self, x_t, sigma, y, output="denoised"):
        """x_t [B,C,H,W] -> x0; with output="encoder" the middle block's output instead."""
        dtype = torch.promote_types(x_t.dtype, torch.float32)   # x0 is fp32 even under autocast
        x_t, sigma = x_t.to(dtype), sigma.to(dtype)
        c = (1 + sigma ** 2).rsqrt()
        x, t = (c * x_t).to(self.unet.dtype), self.timestep(sigma)
        if self.text_encoder is not None:
            y = self.text_encoder(y.long())[0].flatten(1)
        y = y.to(self.unet.dtype).expand(len(x), -1)
        text, pooled, sizes = y.split([y.shape[1] - sum(self.y_rest), *self.y_rest], dim=1)
        text = text.unflatten(1, (-1, self.text_width))         # [B, tokens, width]
        added = {"text_embeds": pooled, "time_ids": sizes}      # SD takes no notice of them
        if output == "encoder":
            return self.encode(x, t, text, added).to(dtype)
        predicted = self.unet(x, t, text, added_cond_kwargs=added).sample.to(dtype)
        if self.predicts_v:
            return c ** 2 * x_t - c * sigma * predicted
        return x_t - sigma * predicted

    def timestep(self, sigma):
        """The nearest level's index, a whole number: bf16 would make 1000 of 999. [B or 1]"""
        if self.midpoints is None or self.midpoints.device != sigma.device:
            table = self.levels.table.to(sigma.device)          # no buffer: .bfloat16() spoils it
            self.midpoints = (table[1:] + table[:-1]) / 2
        return torch.bucketize(sigma.flatten().double(), self.midpoints)

    def encode(self, x, t, text, added):
        """The U-Net without its decoder, of its public parts."""
        emb = self.unet.time_embedding(self.unet.get_time_embed(x, t))
        more = self.unet.get_aug_embed(emb, text, added)
        emb = emb if more is None else emb + more
        x = self.unet.conv_in(x)
        for block in [*self.unet.down_blocks, self.unet.mid_block]:
            attends = getattr(block, "has_cross_attention", False)
            x = block(x, emb, encoder_hidden_states=text) if attends else block(x, emb)
            x = x[0] if type(x) is tuple else x                 # a down block gives skips besides
        return x


def build(config):
    """The network without weights: for load_state_dict(..., assign=True), or to count."""
    with torch.device("meta"):
        return TextDenoiser(**config).eval()


if __name__ == "__main__":
    from weights.exported import main   # a higher room, which only the command enters

    run(main)
