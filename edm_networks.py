"""The denoisers of EDM (arXiv:2206.00364): DDPM++, NCSN++ and ADM U-Nets with EDM preconditioning.

Parameter names and shapes are those of the published weights, so that every published teacher
loads with strict=True. The families are built, not the examples: any width, depth and resolution.
"""

import math

import torch
import torch.nn.functional as F
from torch import nn

from models import KARRAS, classes_as_conditions, to_uint8

# Constructor arguments of the two published U-Nets, with their published defaults.
SONG = dict(augment_dim=0, model_channels=128, channel_mult=[1, 2, 2, 2], channel_mult_emb=4,
            num_blocks=4, attn_resolutions=[16], dropout=0.10, label_dropout=0,
            embedding_type="positional", channel_mult_noise=1, encoder_type="standard",
            decoder_type="standard", resample_filter=[1, 1])
ADM = dict(augment_dim=0, model_channels=192, channel_mult=[1, 2, 3, 4], channel_mult_emb=4,
           num_blocks=3, attn_resolutions=[32, 16, 8], dropout=0.10, label_dropout=0)
FAMILIES = {"SongUNet": SONG, "DhariwalUNet": ADM}
ALLOWED = dict(embedding_type=("positional", "fourier"), encoder_type=("standard", "residual"),
               decoder_type=("standard",))


class Linear(nn.Linear):
    def reset_parameters(self):
        """Draws nothing: UNet.initialise does, in an order of its own."""


class Conv2d(nn.Module):
    """Resample by two if asked, then convolve with same padding; kernel 0 only resamples."""

    def __init__(self, inputs, outputs, kernel, up=False, down=False, resample_filter=(1, 1),
                 fused=False):
        super().__init__()
        self.up, self.down, self.fused = up, down, fused
        self.weight = self.bias = None
        if kernel:
            self.weight = nn.Parameter(torch.empty(outputs, inputs, kernel, kernel))
            self.bias = nn.Parameter(torch.empty(outputs))
        if up or down:
            # On the CPU: arithmetic on the meta device would import half of torch.
            taps = torch.tensor(resample_filter, dtype=torch.float32, device="cpu")
            kernel2d = taps.outer(taps) / taps.sum() ** 2
            self.register_buffer("resample_filter",
                                 kernel2d[None, None].to(torch.empty(0).device))
            # The box filter is nearest doubling and 2x2 averaging, far faster than filtering.
            self.box = list(resample_filter) == [1, 1]

    def filtered(self, x, padding):
        """Each channel filtered by itself; as batch entries of one channel, not as groups."""
        B, C, H, W = x.shape
        x, kernel = x.reshape(B * C, 1, H, W), self.resample_filter.to(x.dtype)
        if self.up:
            x = F.conv_transpose2d(x, 4 * kernel, stride=2, padding=padding)
        else:
            x = F.conv2d(x, kernel, stride=2, padding=padding)
        return x.reshape(B, C, *x.shape[-2:])

    def forward(self, x):
        same = self.weight.shape[-1] // 2 if self.weight is not None else 0
        if self.up or self.down:
            padding = (self.resample_filter.shape[-1] - 1) // 2
            if self.fused:  # convolve on an enlarged image, then filter it down without padding
                x = F.conv2d(x, self.weight.to(x.dtype), padding=same + padding)
                return self.filtered(x, padding=0) + self.bias.to(x.dtype).reshape(1, -1, 1, 1)
            if not self.box:
                x = self.filtered(x, padding)
            elif self.up:
                x = F.interpolate(x, scale_factor=2, mode="nearest")
            else:
                x = F.avg_pool2d(x, 2)
        return x if self.weight is None else F.conv2d(x, self.weight, self.bias, padding=same)


def group_norm(channels, eps):
    return nn.GroupNorm(min(32, channels // 4), channels, eps=eps)


class UNetBlock(nn.Module):
    """Residual block with the noise embedding, and attention if asked: (x, emb) -> x."""

    def __init__(self, inputs, outputs, *, emb_width, adm, up=False, down=False, attention=False,
                 dropout=0.0, resample_filter=(1, 1)):
        super().__init__()
        resample = dict(up=up, down=down, resample_filter=resample_filter)
        eps = 1e-5 if adm else 1e-6
        self.adaptive_scale, self.dropout = adm, dropout
        self.skip_scale = 1.0 if adm else math.sqrt(0.5)
        self.heads = (max(outputs // 64, 1) if adm else 1) if attention else 0

        self.norm0 = group_norm(inputs, eps)
        self.conv0 = Conv2d(inputs, outputs, 3, **resample)
        self.affine = Linear(emb_width, outputs * (2 if adm else 1))
        self.norm1 = group_norm(outputs, eps)
        self.conv1 = Conv2d(outputs, outputs, 3)
        self.skip = None
        if inputs != outputs or up or down:
            kernel = 0 if adm and inputs == outputs else 1
            self.skip = Conv2d(inputs, outputs, kernel, **resample)
        if attention:
            self.norm2 = group_norm(outputs, eps)
            self.qkv = Conv2d(outputs, outputs * 3, 1)
            self.proj = Conv2d(outputs, outputs, 1)

    def forward(self, x, emb):
        h = self.conv0(F.silu(self.norm0(x)))
        condition = self.affine(emb)[:, :, None, None].to(h.dtype)      # [B or 1,C or 2C,1,1]
        if self.adaptive_scale:
            scale, shift = condition.chunk(2, dim=1)
            h = F.silu(torch.addcmul(shift, self.norm1(h), scale + 1))
        else:
            h = F.silu(self.norm1(h + condition))
        h = self.conv1(F.dropout(h, self.dropout, self.training))
        x = (h + (x if self.skip is None else self.skip(x))) * self.skip_scale
        return (x + self.attend(self.norm2(x))) * self.skip_scale if self.heads else x

    def attend(self, x):
        B, C, H, W = x.shape
        # Output channels of qkv: head slowest, channel within the head, then (q, k, v) fastest.
        qkv = self.qkv(x).reshape(B, self.heads, C // self.heads, 3, H * W)
        q, k, v = qkv.transpose(2, 4).unbind(3)                         # each [B,heads,HW,c]
        if x.is_cuda:                       # fused kernels want the last dimension contiguous
            q, k, v = q.contiguous(), k.contiguous(), v.contiguous()
        h = F.scaled_dot_product_attention(q, k, v)
        return self.proj(h.transpose(2, 3).reshape(B, C, H, W))


class NoiseEmbedding(nn.Module):
    """Features of c_noise: cosines and sines, of fixed frequencies or (NCSN++) of random ones."""

    def __init__(self, width, embedding_type, adm):
        super().__init__()
        self.width, self.swap, self.last = width, not adm, 0 if adm else 1
        if embedding_type == "fourier":
            self.register_buffer("freqs", torch.randn(width // 2) * 16)

    def forward(self, c_noise):
        if hasattr(self, "freqs"):
            freqs = self.freqs * (2 * math.pi)
        else:
            half = self.width // 2
            index = torch.arange(half, dtype=c_noise.dtype, device=c_noise.device)
            freqs = (1 / 10000) ** (index / (half - self.last))
        angle = c_noise.outer(freqs.to(c_noise.dtype))
        parts = (angle.sin(), angle.cos()) if self.swap else (angle.cos(), angle.sin())
        return torch.cat(parts, dim=1)


class UNet(nn.Module):
    """F of EDM's preconditioning: DDPM++ and NCSN++ ("SongUNet") or ADM ("DhariwalUNet")."""

    def __init__(self, family, img_resolution, img_channels, label_dim, *, augment_dim,
                 model_channels, channel_mult, channel_mult_emb, num_blocks, attn_resolutions,
                 dropout, embedding_type="positional", channel_mult_noise=1,
                 encoder_type="standard", decoder_type="standard", resample_filter=(1, 1)):
        super().__init__()
        adm = self.adm = family == "DhariwalUNet"
        self.label_dim = label_dim
        emb_width = model_channels * channel_mult_emb
        noise_width = model_channels * channel_mult_noise
        block = dict(emb_width=emb_width, adm=adm, dropout=dropout, resample_filter=resample_filter)
        levels = [(img_resolution >> level, model_channels * mult)      # resolution, width
                  for level, mult in enumerate(channel_mult)]

        # Embedding of noise level, class and augmentation.
        self.map_noise = NoiseEmbedding(noise_width, embedding_type, adm)
        self.map_augment = Linear(augment_dim, noise_width, bias=False) if augment_dim else None
        self.map_layer0 = Linear(noise_width, emb_width)
        self.map_layer1 = Linear(emb_width, emb_width)
        if label_dim:
            self.map_label = Linear(label_dim, emb_width if adm else noise_width, bias=not adm)

        self.enc, self.dec = nn.ModuleDict(), nn.ModuleDict()
        first = model_channels * (channel_mult[0] if adm else 1)
        skips = self.add_encoder(img_channels, first, levels, num_blocks, attn_resolutions,
                                 encoder_type == "residual", block)
        self.encoder_channels, self.encoder_resolution = skips[-1], levels[-1][0]
        self.add_decoder(img_channels, skips, levels, num_blocks, attn_resolutions, block)
        self.initialise()

    def add_encoder(self, img_channels, width, levels, num_blocks, attn_resolutions, residual,
                    block):
        """The widths of its outputs, every one of which is a skip for the decoder."""
        aux_width, skips = img_channels, []
        for level, (res, out) in enumerate(levels):
            if level == 0:
                self.enc[f"{res}x{res}_conv"] = Conv2d(img_channels, width, 3)
            else:
                self.enc[f"{res}x{res}_down"] = UNetBlock(width, width, down=True, **block)
                if residual:
                    self.enc[f"{res}x{res}_aux_residual"] = Conv2d(
                        aux_width, width, 3, down=True, fused=True,
                        resample_filter=block["resample_filter"])
                    aux_width = width
            skips.append(width)
            for i in range(num_blocks):
                self.enc[f"{res}x{res}_block{i}"] = UNetBlock(
                    width, out, attention=res in attn_resolutions, **block)
                width = out
                skips.append(width)
        return skips

    def add_decoder(self, img_channels, skips, levels, num_blocks, attn_resolutions, block):
        """num_blocks + 1 blocks at each level, each taking one skip; then the output layers."""
        skips, width = list(skips), skips[-1]
        for level, (res, out) in reversed(list(enumerate(levels))):
            if level == len(levels) - 1:
                self.dec[f"{res}x{res}_in0"] = UNetBlock(width, width, attention=True, **block)
                self.dec[f"{res}x{res}_in1"] = UNetBlock(width, width, **block)
            else:
                self.dec[f"{res}x{res}_up"] = UNetBlock(width, width, up=True, **block)
            for i in range(num_blocks + 1):
                attention = res in attn_resolutions and (self.adm or i == num_blocks)
                self.dec[f"{res}x{res}_block{i}"] = UNetBlock(
                    width + skips.pop(), out, attention=attention, **block)
                width = out
        norm, conv = group_norm(width, 1e-5 if self.adm else 1e-6), Conv2d(width, img_channels, 3)
        if self.adm:
            self.out_norm, self.out_conv = norm, conv
        else:
            self.dec[f"{res}x{res}_aux_norm"], self.dec[f"{res}x{res}_aux_conv"] = norm, conv

    @torch.no_grad()
    def initialise(self):
        """EDM's initialisation; a new teacher starts from it."""
        for name, module in self.named_modules():
            if not isinstance(module, (Linear, Conv2d)) or module.weight is None:
                continue
            last = name.split(".")[-1]
            to_zero = last in ("conv1", "proj", "out_conv") or last.endswith("aux_conv")
            if self.adm:
                bound = 1 / math.sqrt(module.weight[0].numel())
                nn.init.uniform_(module.weight, -bound, bound)
                if module.bias is not None:
                    nn.init.uniform_(module.bias, -bound, bound)
                if last == "map_label":
                    nn.init.normal_(module.weight)
                elif to_zero or last == "map_augment":
                    nn.init.zeros_(module.weight)
                    if module.bias is not None:
                        nn.init.zeros_(module.bias)
            else:
                nn.init.xavier_uniform_(module.weight)
                module.weight.mul_(1e-5 if to_zero else math.sqrt(0.2) if last == "qkv" else 1)
                if module.bias is not None:
                    nn.init.zeros_(module.bias)

    def embed(self, c_noise, y, augment_labels):
        """[B or 1, emb_width]"""
        emb = self.map_noise(c_noise)
        if self.label_dim:
            y = emb.new_zeros(1, self.label_dim) if y is None else y.to(emb.dtype)
            if not self.adm:
                emb = emb + self.map_label(y * math.sqrt(self.label_dim))
        if augment_labels is not None:
            emb = emb + self.map_augment(augment_labels.to(emb.dtype))
        emb = self.map_layer1(F.silu(self.map_layer0(emb)))
        if self.label_dim and self.adm:
            emb = emb + self.map_label(y)
        return F.silu(emb)

    def forward(self, x, c_noise, y=None, augment_labels=None, output="denoised"):
        """x [B,C,H,W] -> F [B,C,H,W], or the encoder's last output."""
        emb = self.embed(c_noise.flatten(), y, augment_labels)
        skips, aux = [], x
        for name, layer in self.enc.items():
            if name.endswith("_aux_residual"):
                x = skips[-1] = aux = (x + layer(aux)) / math.sqrt(2)
            else:
                x = layer(x, emb) if isinstance(layer, UNetBlock) else layer(x)
                skips.append(x)
        if output == "encoder":
            return x
        for name, layer in self.dec.items():
            if isinstance(layer, UNetBlock):
                x = layer(torch.cat([x, skips.pop()], dim=1) if "_block" in name else x, emb)
            else:  # aux_norm, aux_conv
                x = F.silu(layer(x)) if name.endswith("_norm") else layer(x)
        return self.out_conv(F.silu(self.out_norm(x))) if self.adm else x


class EDMPrecond(nn.Module):
    """D(x, sigma, y) = c_skip x + c_out F(c_in x, c_noise, y): EDM Table 1, Eq. 7.

    Takes the published constructor's arguments; `config` holds those that mean something here and
    rebuilds the network. use_fp16, sigma_min, sigma_max and label_dropout are taken for the
    published files' sake: precision is the caller's autocast, nothing trained here drops labels.
    """

    levels, pixels = KARRAS, staticmethod(to_uint8)

    def __init__(self, img_resolution, img_channels, label_dim=0, use_fp16=False, sigma_min=0,
                 sigma_max=math.inf, sigma_data=0.5, model_type="DhariwalUNet", **model_kwargs):
        super().__init__()
        if model_type not in FAMILIES:
            raise ValueError(f"model_type is {model_type!r}; allowed: {', '.join(FAMILIES)}")
        if unknown := sorted(set(model_kwargs) - set(FAMILIES[model_type])):
            raise ValueError(f"{model_type} has no argument {unknown[0]!r}; "
                             f"allowed: {', '.join(FAMILIES[model_type])}")
        options = {k: list(v) if isinstance(v, (list, tuple)) else v
                   for k, v in (FAMILIES[model_type] | model_kwargs).items()}
        check_architecture(model_type, img_resolution, img_channels, label_dim, sigma_data, options)
        self.config = dict(img_resolution=img_resolution, img_channels=img_channels,
                           label_dim=label_dim, sigma_data=sigma_data, model_type=model_type,
                           **options)
        del options["label_dropout"]
        self.shape, self.sigma_data = (img_channels, img_resolution, img_resolution), sigma_data
        self.conditions = classes_as_conditions(label_dim)
        self.model = UNet(model_type, img_resolution, img_channels, label_dim, **options)
        self.encoder_channels = self.model.encoder_channels
        self.encoder_resolution = self.model.encoder_resolution

    @property
    def blocks(self):
        return [module for module in self.modules() if isinstance(module, UNetBlock)]

    def forward(self, x, sigma, y=None, augment_labels=None, output="denoised"):
        """x [B,C,H,W]; sigma: one value for each image or one for all; y one-hot [B,label_dim].

        output: "denoised" gives D; "encoder" the encoder's last output, skipping the decoder.
        """
        x = x.to(self.model.map_layer0.weight.dtype)    # fp32 even under autocast
        sigma = torch.as_tensor(sigma, dtype=x.dtype, device=x.device).reshape(-1, 1, 1, 1)
        c_skip = self.sigma_data ** 2 / (sigma ** 2 + self.sigma_data ** 2)
        c_out = sigma * self.sigma_data / (sigma ** 2 + self.sigma_data ** 2).sqrt()
        c_in = 1 / (sigma ** 2 + self.sigma_data ** 2).sqrt()
        c_noise = sigma.log() / 4
        F_x = self.model(c_in * x, c_noise, y, augment_labels, output)
        return F_x if output == "encoder" else c_skip * x + c_out * F_x.to(x.dtype)


def check_architecture(model_type, img_resolution, img_channels, label_dim, sigma_data, options):
    """ValueError for a configuration that cannot be built."""
    def require(ok, name, value, allowed):
        if not ok:
            raise ValueError(f"{name} is {value!r}; allowed: {allowed}")

    def whole(value, least):
        return isinstance(value, int) and not isinstance(value, bool) and value >= least

    mult, width = options["channel_mult"], options["model_channels"]
    require(isinstance(mult, list) and mult and all(whole(m, 1) for m in mult), "channel_mult",
            mult, "a list of whole numbers, at least 1")
    step = 2 ** (len(mult) - 1)
    require(whole(img_resolution, step) and img_resolution % step == 0, "img_resolution",
            img_resolution, f"multiples of {step} (channel_mult has {len(mult)} levels)")
    require(whole(img_channels, 1), "img_channels", img_channels, "whole numbers, at least 1")
    require(whole(label_dim, 0), "label_dim", label_dim, "whole numbers, at least 0")
    require(isinstance(sigma_data, (int, float)) and sigma_data > 0, "sigma_data", sigma_data,
            "above 0")
    for name in ("num_blocks", "channel_mult_emb"):
        require(whole(options[name], 1), name, options[name], "whole numbers, at least 1")
    require(whole(width, 4), "model_channels", width, "whole numbers, at least 4")
    for name, allowed in ALLOWED.items():
        require(options.get(name, allowed[0]) in allowed, name, options.get(name),
                ", ".join(allowed))
    if model_type == "DhariwalUNet":
        attended = [m for i, m in enumerate(mult)
                    if img_resolution >> i in options["attn_resolutions"] or i == len(mult) - 1]
        for m in attended:
            heads = max(width * m // 64, 1)
            require(width * m % heads == 0, "model_channels", width,
                    f"widths that can be shared by the width // 64 heads of attention, which is "
                    f"{heads} for a width of {width * m}")
