"""
Write a checkpoint in another form: NAME.pt with config.json, NAME.safetensors with the config inside, or a folder that
Hugging Face diffusers reads.
"""

from dataclasses import dataclass

from guided_diffusion import config
from guided_diffusion.config import RunOptions, changed
from guided_diffusion.network_options import ClassifierOptions, DiffusionOptions, ModelOptions, SuperResOptions


@dataclass
class ConvertOptions:
    """conversion"""

    preset: str = changed(
        RunOptions, "preset", "", "the source is the published model of that name, whatever its file is called"
    )


POSITIONAL = {
    "source": "checkpoint, name of a published model, or folder of diffusers",
    "target": "NAME.pt, NAME.safetensors, or another name for a new folder of diffusers",
}
OPTIONS = ConvertOptions, ModelOptions, SuperResOptions, ClassifierOptions, DiffusionOptions
config.answer_help(__name__, __doc__, *OPTIONS, positional=POSITIONAL)  # before what takes seconds to import

from guided_diffusion import convert, program
from guided_diffusion.text_to_image import models


def main():
    args = config.parse(__doc__, *OPTIONS, positional=POSITIONAL)
    program.alone()
    model = convert.convert(args.source, args.target, config.explicit_flags(args), models.build)
    print(f"{args.target}: a {model.kind} network of {sum(t.numel() for t in model.state.values()):,} numbers")


if __name__ == "__main__":
    program.run(main)
