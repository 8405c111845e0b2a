"""
CLIPs of Hugging Face behind the calls of ours: a folder as `save_pretrained` or a download leaves it, read through the
package transformers, which is imported only then. Nothing is fetched, and no code of the folder is run.
"""

import contextlib
import json
import os

import torch
import torch.nn.functional as F
from torch import nn

MEAN, STD = (0.48145466, 0.4578275, 0.40821073), (0.26862954, 0.26130258, 0.27577711)  # of CLIP, where nothing tells


def is_folder(path):
    """Whether this is such a folder: with a config.json of a CLIP, or with text_encoder/ and image_encoder/ in it."""
    return os.path.isdir(path) and (_kind(path) == "clip" or _kind(os.path.join(path, "text_encoder")) is not None)


def _kind(folder):
    with contextlib.suppress(OSError, ValueError), open(os.path.join(folder, "config.json"), encoding="utf-8") as file:
        return json.load(file).get("model_type")
    return None


class HuggingFaceCLIP(nn.Module):
    """
    The calls and attributes of `clip.CLIP`, frozen and in evaluation mode, over networks of transformers.

    Images may be of any size, in one channel or three: they are resized to the network's own and normalized as it was
    trained. Texts go through its own tokenizer, whose length is theirs.

    :param text: a CLIPModel or CLIPTextModelWithProjection. :param vision: a CLIPModel or
        CLIPVisionModelWithProjection. :param tokenizer: called with a list of texts. :param mean, std: of the channels
        of its images, which span 0 to 1.
    :raises ValueError: if their embeddings differ in size.
    """

    def __init__(self, text, vision, tokenizer, mean=MEAN, std=STD):
        super().__init__()
        self.text_model, self.text_projection = text.text_model, text.text_projection
        self.vision_model, self.visual_projection = vision.vision_model, vision.visual_projection
        self.size, self.token_size = self.text_projection.out_features, self.text_projection.in_features
        if self.visual_projection.out_features != self.size:
            raise ValueError(
                f"the text encoder makes embeddings of {self.size} numbers and the image encoder of"
                f" {self.visual_projection.out_features}: they are of different CLIPs"
            )
        self.tokenizer, self.length = tokenizer, self.text_model.config.max_position_embeddings
        self.images = {"image_size": self.vision_model.config.image_size, "image_channels": 3}
        self.register_buffer("mean", torch.tensor(mean)[:, None, None])           # [3,1,1]
        self.register_buffer("std", torch.tensor(std)[:, None, None])
        self.float().eval().requires_grad_(False)

    @property
    def device(self):
        """Where the network lives."""
        return self.mean.device

    def check(self, flags):
        """Raise ValueError unless it reads images of these options, which are of any size."""
        if flags["image_channels"] not in (1, 3):
            raise ValueError(f"--image_channels {flags['image_channels']}: this CLIP takes images of 3 channels, or 1")

    def cut(self, text):
        """What is read of a text."""
        whole, room = self.tokenizer([text])["input_ids"][0], self.length
        kept = self.tokenizer([text], truncation=True, max_length=room)["input_ids"][0]
        return text if len(whole) <= room else self.tokenizer.decode(kept, skip_special_tokens=True)

    def image_embed(self, x):
        """Images [N,1 or 3,H,W] in [-1,1] -> unit vectors [N,D]. Raises ValueError for other channels."""
        if x.dim() != 4 or x.shape[1] not in (1, 3):
            raise ValueError(f"this CLIP takes images [N,3,H,W], or [N,1,H,W] in grey, got {list(x.shape)}")
        side = self.images["image_size"]
        x = (x.expand(-1, 3, -1, -1) + 1) / 2                                     # [N,3,H,W] in [0,1]
        if x.shape[2:] != (side, side):
            x = F.interpolate(x, (side, side), mode="bicubic", antialias=True, align_corners=False).clamp(0, 1)
        pooled = self.vision_model(pixel_values=(x - self.mean) / self.std).pooler_output
        return F.normalize(self.visual_projection(pooled), dim=-1)

    def text_embed(self, texts):
        """Texts -> unit vectors [N,D]."""
        return self.text_encode(texts)[0]

    def text_encode(self, texts):
        """Texts -> (unit vectors [N,D], features [N,L,token_size], which of them count [N,L])."""
        texts = [texts] if isinstance(texts, str) else list(texts)
        told = self.tokenizer(
            texts, padding="max_length", truncation=True, max_length=self.length, return_tensors="pt"
        ).to(self.device)
        ids, mask = told["input_ids"], told["attention_mask"]                     # [N,L], [N,L]
        out = self.text_model(input_ids=ids, attention_mask=mask)
        emb = F.normalize(self.text_projection(out.pooler_output), dim=-1)
        return emb, out.last_hidden_state, mask.bool()


def open_folder(path):
    """
    The HuggingFaceCLIP of a folder: a whole model, or its parts in text_encoder/ and image_encoder/, with tokenizer/
    and feature_extractor/, as pipelines keep them.

    :raises ImportError: without the package transformers.
    :raises ValueError: if the folder's files are missing, damaged, or of something else.
    """
    try:
        import transformers
    except ImportError as error:
        raise ImportError(
            f"{path} is a CLIP of Hugging Face, which the package transformers reads: pip install"
            " 'guided-diffusion[transformers]'"
        ) from error
    transformers.utils.logging.set_verbosity_error()  # what matters of its reports is raised below
    transformers.utils.logging.disable_progress_bar()
    whole = _kind(path) == "clip"
    part = (lambda name: path) if whole else (lambda name: os.path.join(path, name))
    with _named(path):
        if whole:
            text = vision = _pretrained(transformers.CLIPModel, path)
        else:
            text = _pretrained(transformers.CLIPTextModelWithProjection, part("text_encoder"))
            vision = _pretrained(transformers.CLIPVisionModelWithProjection, part("image_encoder"))
        tokenizer = transformers.AutoTokenizer.from_pretrained(
            part("tokenizer"), local_files_only=True, trust_remote_code=False
        )
        return HuggingFaceCLIP(text, vision, tokenizer, *_moments(part("feature_extractor")))


@contextlib.contextmanager
def _named(path):
    """Whatever their package raises, as a ValueError that begins with the folder."""
    try:
        yield
    except Exception as error:
        said = " ".join(str(error).split()) or type(error).__name__
        raise ValueError(f"{path} holds no CLIP of Hugging Face that can be read: {said}") from error


def _pretrained(kind, folder):
    network, told = kind.from_pretrained(folder, local_files_only=True, output_loading_info=True)
    names = [*told["missing_keys"], *(key[0] for key in told["mismatched_keys"])]
    missing = sorted(name for name in names if not name.endswith("position_ids"))
    if missing:  # random weights stand in for them
        raise ValueError(f"{folder} lacks {len(missing)} of the weights of a {kind.__name__}, as {missing[0]}")
    return network


def _moments(folder):
    try:
        with open(os.path.join(folder, "preprocessor_config.json"), encoding="utf-8") as file:
            told = json.load(file)
    except FileNotFoundError:
        return MEAN, STD
    return told.get("image_mean", MEAN), told.get("image_std", STD)
