"""CLIP score (arXiv:2104.08718): the cosine between a picture and "A photo depicts " + its caption.

As DMD2 has it, with OpenCLIP's ViT-g-14 through transformers. DMD2 splices the three tokens of
"A photo depicts" in behind the first one of the caption's and cuts at 77; CLIP's tokens end at
spaces, so that gives the tokens of the joined text. Nothing is multiplied or cut off below 0.
"""

from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image

from base.errors import UserError
from metrics.inception import in_chunks
from text_to_image import library, reading, reason
from weights.pipeline import load_frozen
from weights.checkpoint import weights_digest

OPENCLIP = "laion/CLIP-ViT-g-14-laion2B-s12B-b42K"
PREFIX = "A photo depicts "
FILES = ("config.json", "vocab.json", "merges.txt", "tokenizer*", "special_tokens_map.json",
         "model*.safetensors", "model.safetensors.index.json")
MEAN = torch.tensor([0.48145466, 0.4578275, 0.40821073]).reshape(3, 1, 1)   # CLIP's own
STD = torch.tensor([0.26862954, 0.26130258, 0.27577711]).reshape(3, 1, 1)


def locate(source):
    """A CLIPModel's folder: `source` itself, or from the model hub."""
    if Path(source).is_dir():
        return Path(source)
    hub = library("huggingface_hub")
    try:
        return Path(hub.snapshot_download(source, allow_patterns=list(FILES)))
    except Exception as error:
        raise UserError(f"--clip-model {source} is no folder, and {', '.join(FILES)} of it cannot "
                        f"be had from the model hub into {hub.constants.HF_HUB_CACHE} "
                        f"({reason(error)}); a folder downloaded elsewhere can be given in its "
                        "place") from None


class ClipScore:
    """scores([uint8 squares [B,3,S,S], ..], captions) -> [cosines [B], ..]"""

    def __init__(self, source=OPENCLIP, device="cpu"):
        transformers, folder = library("transformers"), locate(source)
        transformers.utils.logging.disable_progress_bar()
        self.name, self.device = str(source), torch.device(device)
        self.model = load_frozen(transformers.CLIPModel, folder, "model").to(device)
        with reading(folder):
            self.tokenizer = transformers.CLIPTokenizer.from_pretrained(folder,
                                                                        local_files_only=True)
            self.size = self.model.config.vision_config.image_size
            self.length = self.model.config.text_config.max_position_embeddings
        self.sha256 = weights_digest(self.model.state_dict())

    def __call__(self, lists, captions):
        tokens = self.tokenizer([PREFIX + caption for caption in captions], padding="max_length",
                                truncation=True, max_length=self.length, return_tensors="pt")
        texts = self.directions(self.model.get_text_features, tokens.input_ids)
        return [(self.directions(self.model.get_image_features, self.pixels(images)) * texts).sum(1)
                for images in lists]

    def pixels(self, squares):
        """open_clip's: Pillow's bicubic resize of bytes, then CLIP's mean and spread."""
        size = (self.size, self.size)
        resized = [np.asarray(Image.fromarray(x).resize(size, Image.Resampling.BICUBIC))
                   for x in squares.permute(0, 2, 3, 1).cpu().numpy()]
        images = torch.from_numpy(np.stack(resized)).permute(0, 3, 1, 2)
        return (images / 255 - MEAN) / STD

    def directions(self, features, inputs):
        """Of length 1; the same bits for a picture or text in any company. [B,D]"""
        chunk = 4 if self.device.type == "cpu" else 64
        outputs, = in_chunks(lambda x: (features(x).pooler_output,), inputs.to(self.device), chunk)
        return F.normalize(outputs, dim=1)
