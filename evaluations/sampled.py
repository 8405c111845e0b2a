"""Scores of samples straight from a sampler: nothing passes over the disk, and each process looks at its own."""

import os
from contextlib import contextmanager
from functools import partial

from evaluations import door, evaluator
from evaluations.features import make_extractor


@contextmanager
def scored(args, folder, device):
    """
    For the time of sampling, what the stream of samples is to go through: a function from stream to stream, or None.
    The reference is looked at before, so that bad input ends the program early; afterwards scores are printed and
    written to scores.json in the folder.

    :param args: evaluate (the reference; empty: no scores), extractor, weights, save_samples.
    """
    if not args.evaluate:
        if not args.save_samples:
            raise ValueError("--save_samples False without --evaluate leaves nothing of the samples: give one of them")
        yield None
        return
    ranks, make = door.here(), partial(make_extractor, args.extractor, device, args.weights or None)
    (reference,), extractor = evaluator.open_sets([args.evaluate], make, ranks)
    scorer = evaluator.Scorer(reference, extractor, progress=True, ranks=ranks, device=device)
    yield scorer.through
    parts = {}
    scores = scorer.finish(os.path.join(folder, "samples"), parts)
    if scores:
        evaluator.report(scores)
        evaluator.write(os.path.join(folder, "scores.json"), scores, parts)
