"""
What each piece of a study's work depends on: the trainings of its arms, the classifiers that guide and judge, samples
and scores. `kept` names the folder of a piece by a hash of it, so that what has changed is done, and nothing twice.
"""

import functools
import hashlib
import itertools
import json
from pathlib import Path

from . import ablation, image_datasets, kept, saves

WHOLE = 2**30  # bytes of data that are read to tell whether they have changed; of more, sizes and times are


class Known:
    """
    Names of data by which a change of them is seen. Their fingerprint tells the names of files, not what is in them: so
    the data that went by a fingerprint first go by it alone, and others by it and their content.

    :param path: json file in which that is remembered, once `write` is called.
    """

    def __init__(self, path):
        self.path, self.contents = path, {}
        self.first = json.loads(path.read_text(encoding="utf-8")) if path.is_file() else {}

    def name(self, fingerprint, data_dir):
        """What stands for the data at a path, of that fingerprint, in a recipe."""
        if data_dir not in self.contents:
            self.contents[data_dir] = digest_of(data_dir)
        content = self.contents[data_dir]
        return fingerprint if self.first.setdefault(fingerprint, content) == content else f"{fingerprint} {content}"

    def write(self):
        kept.write_json(self.path, self.first)


def digest_of(data_dir):
    """16 hexadecimal digits that files of other content do not have, at a path on a disk; "" of what is elsewhere."""
    top = Path(data_dir)
    files = [top] if top.is_file() else sorted(path for path in top.rglob("*") if path.is_file())
    about = [path.stat() for path in files]
    whole = sum(each.st_size for each in about) <= WHOLE
    digest = hashlib.sha256()
    for path, each in zip(files, about):
        content = saves.measure(path)[1] if whole else each.st_mtime_ns
        digest.update(f"{path.relative_to(top)} {each.st_size} {content}\n".encode(errors="surrogateescape"))
    return digest.hexdigest()[:16] if files else ""


class Recipes:
    """
    The pieces of a study and their recipes, dicts of plain values.

    :param study: as `ablation.read` gives it. :param root: folder of the pieces. :param arms: the Arms, the base first,
        with their iterations set when a recipe is asked for. :param judge: as `ablation.judge_of` gives it.
    :param data: {arm's name: what tells the images that it is trained on from others}.
    :param reference: path of what is scored against. :param known: Known data.
    """

    def __init__(self, study, root, arms, judge, data, reference, known):
        self.study, self.root, self.arms = study, root, arms
        self.judge, self.data, self.known = judge, data, known
        self.reference = reference

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
        worse = arm.args["sample"].guide_path
        return {"model": kept.key(self.of_train(arm, seed)), "classifier": guide, "file": arm.checkpoint,
                "options": ablation.chosen(arm.args["sample"]), "count": self.study["evaluation"]["samples"],
                "seed": seed, **({"worse": content_of(worse)} if worse else {})}  # fmt: skip

    def of_extractor(self):
        asked = self.study["evaluation"]
        if self.judge:
            return kept.key(self.of_judge())
        return [content_of(asked[name]) for name in ("extractor", "weights")]

    def of_score(self, arm, seed):
        return {"samples": kept.key(self.of_sample(arm, seed)), "reference": self._reference,
                "extractor": self.of_extractor()}  # fmt: skip

    @functools.cached_property
    def _reference(self):
        if not Path(self.reference).is_dir():
            return content_of(self.reference)
        return self.known.name(image_datasets.open_source(self.reference).fingerprint(), self.reference)

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


@functools.cache
def content_of(path):
    """What tells the content of a file from another, 64 hexadecimal digits; other words as they are."""
    return saves.measure(path)[1] if path and Path(path).is_file() else path
