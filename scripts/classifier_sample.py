"""Draw images from a diffusion model, steered by a classifier of noised images towards classes."""

from guided_diffusion import config, program
from guided_diffusion.config import (
    ClassifierOptions,
    ClassifierSampleOptions,
    DiffusionOptions,
    ModelOptions,
    RunOptions,
)
from guided_diffusion.guidance import classifier_gradient
from guided_diffusion.script_util import open_classifier, open_diffusion

# What both networks must have been trained with, or the classifier reads a noise level that is not there.
SHARED = ("image_size", "image_channels", "noise_schedule", "diffusion_steps", "rescale_timesteps")


def main():
    args = config.parse(__doc__, ClassifierSampleOptions, ModelOptions, DiffusionOptions, ClassifierOptions, RunOptions)
    device, folder = program.start(args, ModelOptions, DiffusionOptions, ClassifierOptions)
    explicit = config.explicit_flags(args)
    model, diffusion, flags = open_diffusion(args.model_path, explicit, device)
    classifier, classifier_flags = open_classifier(args.classifier_path, explicit, device)
    names = program.class_names(args.classifier_path)
    check_fit(flags, classifier_flags, program.class_names(args.model_path), names)
    classifier.requires_grad_(False)  # only the gradient with respect to the image is wanted
    program.log_network(args.model_path, flags)
    program.log_network(args.classifier_path, classifier_flags)

    def model_fn(x, t, y=None, **cond):
        return model(x, t, y if flags["class_cond"] else None, **cond)

    # Without guidance the classifier need not run; its labels are drawn and saved all the same.
    cond_fn = classifier_gradient(classifier, args.classifier_scale) if args.classifier_scale else None
    num_classes = classifier_flags["num_classes"]
    program.write_samples(args, folder, diffusion, model_fn, flags, num_classes, names, cond_fn)


def check_fit(flags, classifier_flags, names, classifier_names):
    """Raise ValueError if the model and the classifier were made for different images, noise or classes."""
    for name in SHARED + (("num_classes",) if flags["class_cond"] else ()):
        ours, theirs = flags[name], classifier_flags.get(name, flags[name])
        if ours != theirs:
            raise ValueError(
                f"the model has {name} {ours} and the classifier {name} {theirs}: a classifier guides only a model "
                "of the same images, noise and classes"
            )
    if flags["class_cond"] and names and classifier_names and names != classifier_names:
        raise ValueError(f"the model was trained on the classes {names} and the classifier on {classifier_names}")


if __name__ == "__main__":
    program.run(main)
