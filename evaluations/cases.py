"""Cases of a sweep: samples drawn by a program and scored, each once, however often the sweep is broken off."""

import json
import shutil
import time
from pathlib import Path

from evaluations.evaluator import evaluate, write


def stamp(path):
    """What tells one content of a file from the next, its size and time of change; None for what is no path of one."""
    return [Path(path).stat().st_size, Path(path).stat().st_mtime_ns] if path and Path(path).exists() else None


def draw(run, words, files, folder, **more):
    """
    (npz of a case's samples, what drawn.json tells of them), drawn unless the folder holds them as asked for.

    :param run: a function of the words of a command, a program and its flags. :param words: without --log_dir, which is
        the folder. :param files: checkpoints that the samples depend on, or "" for none. :param more: is told as well.
    """
    folder.mkdir(parents=True, exist_ok=True)
    words = [*words, "--log_dir", folder]
    asked = {"words": list(map(str, words)), "checkpoints": list(map(stamp, files))}
    found = sorted(folder.glob("samples_*.npz"))
    if len(found) == 1 and (folder / "drawn.json").is_file():
        drawn = json.loads((folder / "drawn.json").read_text())
        if drawn["asked"] == asked:
            return found[0], drawn
    for path in found:
        path.unlink()
    beginning = folder / "asked.json"
    if not beginning.is_file() or json.loads(beginning.read_text()) != asked:
        for path in folder.glob("samples_*.partial"):  # of other samples, which were broken off
            shutil.rmtree(path)
        write(beginning, asked, None)
    start = time.monotonic()
    run(*words)
    drawn = {"asked": asked, "seconds": round(time.monotonic() - start, 1), **more}
    write(folder / "drawn.json", drawn, None)
    return next(folder.glob("samples_*.npz")), drawn


def score(asked, samples, settings, extractor):
    """
    Write scores.json and its parts beside the samples of a case, unless they are there and newer than what they are of.

    :param asked: with reference, extractor, weights, batch_size and out, below which features are kept.
    :param settings: what the result tells of the case. :param extractor: a function that makes, or has, the extractor.
    :return: the path of scores.json.
    """
    path = Path(samples).parent / "scores.json"
    made_of = [stamp(samples), stamp(asked.reference)]
    made_of += [[name, stamp(name)] for name in (asked.extractor, asked.weights)]
    if path.is_file() and json.loads(path.read_text()).get("made_of") == made_of:
        return path
    parts = {}
    result = evaluate(asked.reference, str(samples), extractor(), asked.batch_size, True, parts=parts,
                      cache=Path(asked.out) / "features")  # fmt: skip
    write(path, {**result, "settings": settings, "made_of": made_of}, parts)
    return path
