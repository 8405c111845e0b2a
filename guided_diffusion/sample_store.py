"""
Samples on the disk as they are drawn: a run that dies goes on with the same command, and memory stays flat.

While samples are drawn they lie in a folder NAME.partial: `images` (uint8, one after the other), `labels` (int64),
`done` (a byte for each), and plan.json, which tells what they are drawn by. All processes write there, each at the
places of its samples. When all are drawn they become what was asked for, and NAME.json keeps the plan.
"""

import collections
import itertools
import json
import os
import shutil
import zipfile

import numpy as np
import torch as th

from . import checkpoint, config, dist_util, logger, pictures, saves
from .generate import in_batches

KINDS = ("npz", "png", "zip")
# Options that change nothing of a sample; the files that others name count by content.
PASSING = {"log_dir", "log_formats", "device", "grid", "save_as", "frames", "batch_size", "num_samples", "compile",
           "channels_last"}
PASSING |= {"evaluate", "extractor", "weights", "save_samples"}  # who looks at them
BLOCK_BYTES = 1 << 20


def plan_of(args, flags):
    """
    What samples are drawn by, as json takes it: the options of the program, those of the network, and for each option
    that names a file the SHA-256 of that.

    :param args: Namespace as of `config.parse`; of the network's options `flags` count.
    """
    options = {name: value for name, value in vars(args).items() if name not in {"explicit", *PASSING, *flags}}
    files = {}
    for name, value in list(options.items()):
        paths = [path for path in str(value).split(",") if os.path.isfile(path)]
        if paths:
            files[name] = [saves.measure(path)[1] for path in paths]
            del options[name]
    return json.loads(json.dumps({"options": options, "flags": flags, "files": files}))


class SampleStore:
    """
    The samples of one plan.

    :param folder: where they go; all processes see it.
    :param shape: (N,H,W,C).
    :param plan: as of `plan_of`.
    :param kinds: of KINDS: what they become.
    :param labelled: whether each has a label.
    :raises ValueError: if the folder holds unfinished samples of another plan. Collective, as are all errors.
    :raises OSError: if there is no room for them.
    """

    def __init__(self, folder, shape, plan, kinds=("npz",), labelled=False):
        self.path = os.path.join(folder, f"samples_{'x'.join(map(str, shape))}")
        self.shape, self.plan, self.kinds, self.labelled = tuple(shape), plan, tuple(kinds), labelled
        self.partial = f"{self.path}.partial"
        self.finished = dist_util.from_main(self._begin)
        if self.finished:
            return
        try:
            self._files = {name: open(os.path.join(self.partial, name), "r+b", buffering=0)  # noqa: SIM115
                           for name in self._sizes()}  # fmt: skip
        except FileNotFoundError as error:
            raise OSError(f"not all processes see {error.filename}: choose a --log_dir on a shared disk") from error
        dist_util.barrier()  # none writes before all have seen what is there
        self._earlier = self._done().astype(bool)
        self.had = int(self._earlier.sum())
        dist_util.barrier()

    def _sizes(self):
        """{file: bytes}."""
        count, each = self.shape[0], int(np.prod(self.shape[1:]))
        return {"images": count * each, "done": count} | ({"labels": 8 * count} if self.labelled else {})

    def _begin(self):
        """Whether all is there already; if not, the partial folder is after this."""
        if _read(f"{self.path}.json") == self.plan and all(map(os.path.exists, map(self.path_of, self.kinds))):
            return True
        self._lock = saves.Lock(os.path.dirname(self.path)).acquire()
        earlier = _read(os.path.join(self.partial, "plan.json"))
        if earlier is not None and earlier != self.plan:
            told = "; ".join(_differences(earlier, self.plan)[:5])
            raise ValueError(
                f"{self.partial} holds samples of a run that is not finished, and differs from this one in {told}:"
                " finish it by its own command, delete that folder, or choose another --log_dir"
            )
        if earlier is None:
            self._make_partial()
        return False

    def _make_partial(self):
        shutil.rmtree(self.partial, ignore_errors=True)
        sizes = self._sizes()
        needed = sum(sizes.values()) * (1 + len(self.kinds))
        free = shutil.disk_usage(os.path.dirname(self.path)).free
        if needed > free:
            raise OSError(
                f"{self.shape[0]} samples need {needed / 2**30:.3g} GiB in {os.path.dirname(self.path)}, which has"
                f" {free / 2**30:.3g}: make room, choose another --log_dir, or draw fewer"
            )
        os.makedirs(self.partial)
        for name, size in sizes.items():
            with open(os.path.join(self.partial, name), "wb") as file:
                if hasattr(os, "posix_fallocate"):
                    os.posix_fallocate(file.fileno(), 0, max(size, 1))
                file.truncate(size)
        with checkpoint.writing(os.path.join(self.partial, "plan.json")) as file:  # what makes the folder whole
            file.write(json.dumps(self.plan, indent=2).encode())

    # -------------------------------------------------------------------------------------------------- while drawing

    def _done(self):
        return np.frombuffer(os.pread(self._files["done"].fileno(), self.shape[0], 0), np.uint8)

    def has(self, indices):
        """Whether all samples of these indices are drawn."""
        done = self._done()
        return bool(done[list(indices)].all())

    def put(self, indices, images, labels=None):
        """
        Write samples at their places; they count as drawn once they are on the disk.

        :param indices: consecutive.
        :param images: uint8 [n,H,W,C].
        :param labels: int64 [n], if the store is labelled.
        """
        first = indices[0]
        self._write("images", first, np.ascontiguousarray(images))
        if self.labelled:
            self._write("labels", first, np.ascontiguousarray(labels, np.int64))
        for name in self._files:
            os.fsync(self._files[name].fileno())
        self._write("done", first, np.ones(len(indices), np.uint8))

    def _write(self, name, first, array):
        data, place = memoryview(array).cast("B"), first * array[:1].nbytes
        while data:
            written = os.pwrite(self._files[name].fileno(), data, place)
            data, place = data[written:], place + written

    # ---------------------------------------------------------------------------------------------------- all is drawn

    def path_of(self, kind):
        """Where the samples are in one of KINDS; "png" is a folder."""
        return self.path if kind == "png" else f"{self.path}.{kind}"

    @property
    def images(self):
        """uint8 [N,H,W,C], of which only what is asked for is read."""
        return np.memmap(self._files["images"], np.uint8, "r", shape=self.shape)

    @property
    def labels(self):
        """int64 [N], or None."""
        return np.fromfile(os.path.join(self.partial, "labels"), np.int64) if self.labelled else None

    def drawn(self, batch_size):
        """
        Yields this process's share, (indices, uint8 tensor [n,H,W,C], labels [n] or None), of the batches of which all
        was drawn before this run: those that it will not draw.

        :raises ValueError: if they are finished, and not as an npz, from which they could be read.
        """
        images, labels = self._finished() if self.finished else (self.images, self.labels)
        batches = in_batches(self.shape[0], batch_size)
        had = [part for part in batches if self.finished or self._earlier[part.start : part.stop].all()]
        for part in had[dist_util.rank() :: dist_util.world_size()]:
            rows = slice(part.start, part.stop)
            yield list(part), th.tensor(images[rows]), None if labels is None else th.tensor(labels[rows])

    def _finished(self):
        if "npz" not in self.kinds:
            raise ValueError(f"{self.path} is finished, and not as an npz: score it by evaluations/evaluator.py")
        with np.load(self.path_of("npz"), allow_pickle=False) as npz:
            return npz["arr_0"], npz["arr_1"] if self.labelled else None

    def finish(self, class_names=None, **more):
        """
        Make of the partial folder what was asked for. On the first process, after all have drawn.

        :param class_names: by label, for the names of pictures.
        :param more: further arrays of the npz by name.
        """
        if os.path.exists(f"{self.path}.json"):  # of the samples that are about to be replaced
            os.unlink(f"{self.path}.json")
        if "npz" in self.kinds:
            self._write_npz(more)
        if "png" in self.kinds:
            for folder in (self.path, f"{self.path}.tmp"):  # the second of a run that was killed here
                shutil.rmtree(folder, ignore_errors=True)
            os.makedirs(f"{self.path}.tmp")
            for name, data in self._pictures(class_names):
                with open(os.path.join(f"{self.path}.tmp", name), "wb") as file:
                    file.write(data)
            os.replace(f"{self.path}.tmp", self.path)
        if "zip" in self.kinds:
            with checkpoint.writing(self.path_of("zip")) as file, zipfile.ZipFile(file, "w") as archive:
                for name, data in self._pictures(class_names):
                    archive.writestr(zipfile.ZipInfo(name), data)
        with checkpoint.writing(f"{self.path}.json") as file:
            file.write((json.dumps(self.plan, indent=2) + "\n").encode())
        self.close()
        shutil.rmtree(self.partial)

    def close(self):
        for file in self._files.values():
            file.close()

    def _write_npz(self, more):
        """As np.savez writes it, byte for byte, but in blocks."""
        with checkpoint.writing(self.path_of("npz")) as file, zipfile.ZipFile(file, "w", allowZip64=True) as archive:
            with archive.open("arr_0.npy", "w", force_zip64=True) as entry:
                header = {"descr": "|u1", "fortran_order": False, "shape": self.shape}
                np.lib.format.write_array_header_1_0(entry, header)
                for start in range(0, self._sizes()["images"], BLOCK_BYTES):
                    entry.write(os.pread(self._files["images"].fileno(), BLOCK_BYTES, start))
            for name, array in {**({"arr_1": self.labels} if self.labelled else {}), **more}.items():
                with archive.open(f"{name}.npy", "w", force_zip64=True) as entry:
                    np.lib.format.write_array(entry, np.asarray(array), allow_pickle=False)

    def _pictures(self, class_names):
        """Yields (file name, PNG bytes); the class stands where the loader looks for it."""
        labels = self.labels
        digits = max(6, len(str(self.shape[0] - 1)))
        for i in range(self.shape[0]):
            prefix = "" if labels is None else f"{_as_prefix(labels[i], class_names)}_"
            yield f"{prefix}{i:0{digits}d}.png", pictures.as_png(self.images[i])


def _as_prefix(label, class_names):
    """A class as the start of a file name, up to the first "_"."""
    name = str(label) if class_names is None else str(class_names[label])
    return "".join(c if c.isalnum() or c in " -+.," else "-" for c in name)


def _read(path):
    """The content of a json file, or None if there is none that is whole."""
    try:
        with open(path) as file:
            return json.load(file)
    except (OSError, ValueError):
        return None


def _differences(earlier, plan):
    told = []
    for part in ("options", "flags"):
        before, now = earlier.get(part, {}), plan[part]
        told += [f"{name} ({before.get(name)!r} there, {now.get(name)!r} here)"
                 for name in sorted(before.keys() | now.keys()) if before.get(name) != now.get(name)]  # fmt: skip
    return told + [f"the content of {name}" for name in sorted(earlier.get("files", {}).keys() | plan["files"].keys())
                   if earlier.get("files", {}).get(name) != plan["files"].get(name)]  # fmt: skip


def parse_kinds(text):
    """'npz,png' -> ("npz", "png"). Raises ValueError for what is none of KINDS."""
    kinds = tuple(word.strip() for word in text.split(","))
    for kind in kinds:
        if kind not in KINDS:
            raise ValueError(f"--save_as {text}: {kind!r} is none of {', '.join(KINDS)}{config.nearest(kind, KINDS)}")
    return kinds


def drain(stream, store, through=None, batch_size=1):
    """
    Put what a stream of samples yields on this process into the store. Collective.

    :param store: None keeps nothing.
    :param through: a function from stream to stream, for whoever else looks at the samples; those that were drawn
        earlier come first, as uint8 [n,H,W,C], `batch_size` of them at once.
    """
    if store and not store.finished and store.had and dist_util.is_main():
        logger.log(f"going on: {store.had} of {store.shape[0]} samples are drawn already")
    fresh = stream if store is None else _kept(stream, store)
    if through:
        earlier = store.drawn(batch_size) if store else ()
        fresh = through(itertools.chain(earlier, fresh))
    collections.deque(fresh, 0)
    dist_util.barrier()


def _kept(stream, store):
    for indices, x, y in stream:
        store.put(indices, pictures.to_uint8(x).cpu().numpy(), None if y is None else y.cpu().numpy())
        yield indices, x, y
