"""The options of the programs of this package, and what may be chosen: imports nothing that takes time."""

from dataclasses import dataclass

from evaluations import door

DISTANCES = ("float32", "float64", "float16")  # how `neighbours` computes them
DTYPES = ("float32", "float64", "bfloat16", "float16")  # of `features`
RESIZES = ("tf1", "half_pixel", "antialias", "bicubic")  # the rules of `inception`, which has them in this order


@dataclass(frozen=True)
class Settings:
    """The switches of the metrics; the defaults are the published protocol.

    k: neighbours of precision and recall; density_k: of density and coverage; distances: a name in DISTANCES;
    split_size, splits, shuffle: of the inception score, see `metrics.inception_score`.
    """

    k: int = 3
    density_k: int = 5
    distances: str = "float32"
    split_size: int = 5000
    splits: int | None = None
    shuffle: int | None = None

    def __post_init__(self):
        for name in ("k", "density_k", "split_size"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name} is {getattr(self, name)}: it must be at least 1")
        if self.splits is not None and self.splits < 1:
            raise ValueError(f"splits is {self.splits}: it must be at least 1")
        if self.shuffle is not None and not 0 <= self.shuffle < 2**32:
            raise ValueError(f"shuffle is {self.shuffle}: it is a seed, a whole number from 0")
        check_distances(self.distances)


def check_distances(name):
    """Raise ValueError for a name that is none of DISTANCES."""
    if name not in DISTANCES:
        raise ValueError(f"distances are {name!r}; choose one of {', '.join(DISTANCES)}")


def add_extractor_options(parser):
    """The options that say how images are looked at, which all programs of this package share."""
    parser.add_argument(
        "--extractor", default="inception",
        help="inception; or a classifier checkpoint of this project, module:function, dinov2-vit-l-14, "
        "clip-vit-b-32..., whose features are to be used instead",
    )  # fmt: skip
    parser.add_argument("--weights", help="file of the Inception weights (None: $GD_INCEPTION_WEIGHTS, else download)")
    parser.add_argument("--allow_other_weights", action="store_true", help="take --weights of another content than the "
                        "published")  # fmt: skip
    parser.add_argument("--resize", default="tf1", choices=RESIZES, help="rule by which Inception resizes")
    parser.add_argument(
        "--dtype", default="float32", choices=DTYPES,
        help="numbers inside Inception, or inside a classifier; in bfloat16 and float16 its convolutions alone: "
        "faster where the device has such arithmetic, and not quite the same scores",
    )  # fmt: skip
    parser.add_argument("--image_size", type=door.parse_size, help="cut squares of this side, or HEIGHTxWIDTH, out of "
                        "pictures in folders, zips and tars")  # fmt: skip
    parser.add_argument("--batch_size", type=int, default=64, help="images given to the network at once; no score "
                        "depends on it")  # fmt: skip
    parser.add_argument("--device", default="", help="cpu, cuda or cuda:N (empty: a GPU if there is one)")
