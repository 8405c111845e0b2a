"""Draw pictures of texts: the prior draws the CLIP embedding of a picture, the decoder the picture of an embedding."""

from guided_diffusion import checks, config
from guided_diffusion.config import RunOptions
from guided_diffusion.network_options import DecoderProcessOptions
from guided_diffusion.sampling_options import EvaluateOptions, TextToImageOptions

OPTIONS = TextToImageOptions, DecoderProcessOptions, EvaluateOptions, RunOptions
config.answer_help(__name__, __doc__, *OPTIONS)  # before what takes seconds to import

from evaluations.sampled import scored
from guided_diffusion import program
from guided_diffusion.text_to_image import models, pipeline, prompting


def main():
    args = config.parse(__doc__, *OPTIONS)
    checks.check_counts(args, batch=0)
    prompts = prompting.prompts_of(args)
    device, folder = program.start(args, DecoderProcessOptions)
    decoder, diffusion, flags = models.open_decoder(args.model_path, config.explicit_flags(args), device)
    larger = prompting.larger_of(args, flags, device)
    clip = prompting.clip_of(args, device)
    embeddings = prompting.embeddings_of(args, clip, prompts, flags, device)
    shown, ways, how = prompts if args.use_captions else (), (), {}
    if args.interpolate:
        embeddings, ways = prompting.ways(args, embeddings, prompts)
        shown, how["noise_of"] = (), embeddings.noise_of
    given, null = pipeline.conditions(decoder, embeddings, shown)
    how |= {"given": given, "labels": None, "null": prompting.null_of(args, null)}
    rows = () if ways else prompts
    with scored(args, folder, device) as through:
        last = None if larger else through
        model = program.hastened(args, decoder)
        store = program.draw(
            args, folder, diffusion, model, flags, args.num_samples, through=last, prompts=rows, **how
        )
        program.finish(args, store, prompts=rows, ways=ways)
        if larger:
            prompting.enlarge(args, folder, larger, through, rows, ways)


if __name__ == "__main__":
    program.run(main)
