"""
What each piece of a study's work depends on: the trainings of its arms, the classifiers that guide and judge, samples
and scores. `kept` names the folder of a piece by a hash of it, so that what has changed is done, and nothing twice.
"""

import itertools
from pathlib import Path

from . import ablation, image_datasets, kept, saves


class Recipes:
    """
    The pieces of a study and their recipes, dicts of plain values.

    :param study: as `ablation.read` gives it. :param root: folder of the pieces. :param arms: the Arms, the base first,
        with their iterations set when a recipe is asked for. :param judge: as `ablation.judge_of` gives it.
    :param data: {arm's name: what tells the images that it is trained on from others}.
    :param reference: path of what is scored against.
    """

    def __init__(self, study, root, arms, judge, data, reference):
        self.study, self.root, self.arms = study, root, arms
        self.judge, self.data, self.reference = judge, data, reference

    def of_judge(self):
        return {"options": ablation.chosen(self.judge[1]), "seed": ablation.JUDGE_SEED,
                "data": self.data[ablation.BASE]}  # fmt: skip

    def of_train(self, arm, seed):
        points = self.study["evaluation"]["points"]
        watched = {"points": points, "extractor": self.of_extractor()} if points else {}
        return {"options": ablation.chosen(arm.args["train"]), "seed": seed, "data": self.data[arm.name],
                "iterations": arm.iterations, **watched}  # fmt: skip

    def of_classifier(self, arm, seed):
        return {"options": ablation.chosen(arm.args["classifier"]), "seed": seed, "data": self.data[arm.name]}

    def of_sample(self, arm, seed):
        guide = kept.key(self.of_classifier(arm, seed)) if "classifier" in arm.args else None
        return {"model": kept.key(self.of_train(arm, seed)), "classifier": guide, "file": arm.checkpoint,
                "options": ablation.chosen(arm.args["sample"]), "count": self.study["evaluation"]["samples"],
                "seed": seed}  # fmt: skip

    def of_extractor(self):
        asked = self.study["evaluation"]
        if self.judge:
            return kept.key(self.of_judge())
        return [content_of(asked[name]) for name in ("extractor", "weights")]

    def of_score(self, arm, seed):
        return {"samples": kept.key(self.of_sample(arm, seed)), "reference": content_of(self.reference),
                "extractor": self.of_extractor()}  # fmt: skip

    def runs(self):
        """
        [(seed, arm)] in the order of work: seed by seed, but those whose training an earlier one shares after all
        others, so that of several at work none has to wait for what another trains.
        """
        first, others = {}, []
        for run in itertools.product(self.study["seeds"], self.arms):
            seed, arm = run
            if first.setdefault(kept.key(self.of_train(arm, seed)), run) is not run:
                others.append(run)
        return [*first.values(), *others]

    def pieces(self, arm, seed):
        """[(kind, recipe)] of a run of an arm, in order."""
        middle = [("classifier", self.of_classifier(arm, seed))] if "classifier" in arm.args else []
        return [("train", self.of_train(arm, seed)), *middle, ("sample", self.of_sample(arm, seed)),
                ("score", self.of_score(arm, seed))]  # fmt: skip

    def all_pieces(self):
        """{(kind, key): recipe} of the whole study, without what would follow what has diverged."""
        found = [("judge", self.of_judge())] if self.judge else []
        for seed, arm in self.runs():
            for kind, recipe in self.pieces(arm, seed):
                found.append((kind, recipe))
                if kept.told(self.root, kind, recipe):
                    break
        return {(kind, kept.key(recipe)): recipe for kind, recipe in found}


_contents = {}


def content_of(path):
    """What tells the content of a file, or of a folder's list of images, from another; other words as they are."""
    if path not in _contents:
        there = Path(path) if path else None
        if there and there.is_file():
            _contents[path] = saves.measure(path)[1]
        else:
            _contents[path] = image_datasets.open_source(path).fingerprint() if there and there.is_dir() else path
    return _contents[path]
