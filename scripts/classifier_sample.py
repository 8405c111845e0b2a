"""Draw images from a diffusion model, steered by a classifier of noised images towards classes."""

from guided_diffusion import checks, config
from guided_diffusion.config import RunOptions
from guided_diffusion.network_options import ClassifierOptions, DiffusionOptions, ModelOptions
from guided_diffusion.sampling_options import ClassifierSampleOptions, EvaluateOptions

OPTIONS = ClassifierSampleOptions, ModelOptions, DiffusionOptions, ClassifierOptions, EvaluateOptions, RunOptions
config.answer_help(__name__, __doc__, *OPTIONS)  # before what takes seconds to import

from evaluations.sampled import scored
from guided_diffusion import program
from guided_diffusion.guidance import classifier_gradient, summed
from guided_diffusion.script_util import open_classifier, open_diffusion


def main():
    args = config.parse(__doc__, *OPTIONS)
    strength = checks.check_classifier_guidance(args)
    device, folder = program.start(args, ModelOptions, DiffusionOptions, ClassifierOptions)
    explicit = config.explicit_flags(args)
    model, diffusion, flags = open_diffusion(args.model_path, explicit, device)
    model = program.hastened(args, model)
    program.log_network(args.model_path, flags)
    gradients, seen = [], None
    for path in args.classifier_path.split(","):
        classifier, its_flags = open_classifier(path, explicit, device)
        classifier.requires_grad_(False)  # only the gradient with respect to the image is wanted
        seen = check_fit(args, flags, path, its_flags, seen)
        program.log_network(path, its_flags)
        program.compiled(args, classifier)
        gradients.append(classifier_gradient(classifier, marginal=args.classifier_marginal))

    def model_fn(x, t, y=None, **cond):
        return model(x, t, y if flags["class_cond"] else None, **cond)

    # Without guidance the classifiers need not run; their labels are drawn and saved all the same.
    cond_fn = summed(*gradients) if any(strength) else None
    with scored(args, folder, device) as through:
        program.write_samples(args, folder, diffusion, model_fn, flags, *seen, cond_fn, through)


def check_fit(args, flags, path, its_flags, earlier):
    """
    Raise ValueError if a classifier was made for other images, noise or classes than the model or those before it.

    :param earlier: what this returned for another classifier, or None.
    :return: (number of classes, their names or None).
    """
    program.check_guiding(flags, its_flags, path)
    names, classes = program.class_names(args.model_path), program.class_names(path)
    if flags["class_cond"] and names and classes and names != classes:
        raise ValueError(f"the model was trained on the classes {names} and the classifier on {classes} ({path})")
    seen = its_flags["num_classes"], classes
    if earlier not in (None, seen):
        raise ValueError(
            f"the classifier {path} tells {seen[0]} classes ({classes}), the one before it {earlier[0]} ({earlier[1]}):"
            " only classifiers of the same classes can guide together"
        )
    return seen


if __name__ == "__main__":
    program.run(main)
