"""
Say what a training run will find here: launcher, devices, attention kernels, precision, threads, disk and packages; and
for a network, the memory that it takes, a microbatch that fits, and whether the data or the training is the slower.
"""

from . import config
from .config import RunOptions
from .network_options import ClassifierOptions, DiffusionOptions, ModelOptions
from .training_options import DoctorOptions, TrainOptions

OPTIONS = DoctorOptions, TrainOptions, ModelOptions, ClassifierOptions, DiffusionOptions, RunOptions
config.answer_help(__name__, __doc__, *OPTIONS)  # before what takes seconds to import

import contextlib
import os
import platform
import socket
import sys
import tempfile
import threading
import time
import warnings
from types import SimpleNamespace

import torch as th
import torch.nn.functional as F
from torch.nn.attention import SDPBackend, sdpa_kernel

from . import checkpoint, dist_util, logger, memory, program, runs
from .fp16_util import PRECISIONS
from .pace import convolution_rate, paced
from .rehearsal import Step, labelled
from .unet import SHORT_LENGTH

MIB, GIB = 2**20, 2**30
DTYPES = tuple(PRECISIONS.values())
WORTH_IT = 1.2  # times as fast
OPTIONAL = {
    "mpi4py": "mpiexec on several nodes without MASTER_ADDR",
    "torch-fidelity": "FID and inception score with the network of the papers",
    "scikit-learn": "datasets/digits.py and the demo",
    "tensorboard": "OPENAI_LOG_FORMAT=tensorboard",
}
NETWORKS = {"diffusion": ModelOptions, "classifier": ClassifierOptions}
NOT_OF_A_NETWORK = {"device", "log_dir", "seed", "write"}  # without any other flag no network is looked at


def main():
    args = config.parse(__doc__, *OPTIONS)
    if args.write and not args.log_dir:
        raise ValueError("--write True needs --log_dir, the folder of the run that shall find doctor.json")
    if args.batch_size < 1:
        raise ValueError(f"--batch_size must be 1 or more, not {args.batch_size}")
    dist_util.setup_dist(args.device or None)
    folder = dist_util.from_main(folder_of, args)
    places = dist_util.gather_objects(here(folder))
    seconds = exchange_seconds() if len(places) > 1 else None
    failed = look(args, folder, places, seconds)
    dist_util.barrier()  # the other processes wait, so that they do not share what is measured
    if failed and dist_util.is_main():
        raise ValueError(f"could not be found out, for the reasons above: {', '.join(failed)}")


def folder_of(args):
    """The folder that the run would have, made if it is not there: on a disk that all processes should see."""
    folder = os.path.expanduser(args.log_dir) or os.environ.get("OPENAI_LOGDIR") or tempfile.gettempdir()
    if not checkpoint.is_remote(folder):
        with contextlib.suppress(OSError):  # which the part about the disk will meet as well, and say
            os.makedirs(folder, exist_ok=True)
    return folder


def here(folder):
    """What this process has, for rank 0 to compare."""
    device = dist_util.dev()
    return SimpleNamespace(
        host=socket.gethostname(),
        device=f"{device} ({memory.device_name(device)})" if device.type == "cuda" else str(device),
        software={"python": platform.python_version(), **runs.versions()},
        sees_folder=checkpoint.exists(folder),
    )


def exchange_seconds():
    """How long the processes take to bring 64 MiB from the first to all. Collective."""
    weights = th.zeros(16 * MIB, device=dist_util.dev())
    for _ in range(2):  # the first time makes the connections
        dist_util.barrier()
        start = time.monotonic()
        dist_util.sync_params([weights])
        weights[0].item()  # a GPU is waited for
    dist_util.barrier()
    return time.monotonic() - start


def look(args, folder, places, seconds):
    """Print every part, in rank 0; the names of those that failed."""
    if not dist_util.is_main():
        return []
    logger.Logger.CURRENT = logger.Logger(dir=folder, output_formats=[logger.HumanOutputFormat(sys.stdout)])
    flags = config.flags_of(args, NETWORKS[args.kind], DiffusionOptions)
    found = SimpleNamespace(args=args, flags=flags, places=places, folder=folder, device=dist_util.dev(), speed={})
    found.exchange_seconds = seconds
    failed = []
    for name, part in PARTS.items():
        if name in OF_A_NETWORK and not args.explicit - NOT_OF_A_NETWORK:
            logger.log(f"{name}: give the flags of the network, and --data_dir, to learn of it")
            continue
        try:
            for line in part(found):
                logger.log(f"{name}: {line}")
        except Exception as error:  # whatever it is, the other parts go on
            logger.log(f"{name}: not found out: {' '.join(str(error).split()) or type(error).__name__}")
            failed.append(name)
    return failed


# --------------------------------------------------------------------------------------------------- what is there


def launcher(found):
    place = dist_util.resolve(os.environ)
    yield f"{place.launcher or 'none'}, {len(found.places)} process(es){'' if place.one_node else ' on several nodes'}"
    first = found.places[0]
    for rank, each in enumerate(found.places):
        yield f"rank {rank} on {each.host}, device {each.device}"
        if first.sees_folder and not each.sees_folder:
            yield f"rank {rank} does not see {found.folder}, where checkpoints to go on from must lie: choose another"
        for line in runs.differing(first.software, each.software):
            yield f"rank {rank} has other software than rank 0: {line}"
    if found.exchange_seconds:
        yield f"{64 / found.exchange_seconds:.0f} MiB/s from rank 0 to all others"


def devices(found):
    if not th.cuda.device_count():
        yield "no GPU that torch can use: training runs on the CPU"
    for i in range(th.cuda.device_count()):
        info, (free, total) = th.cuda.get_device_properties(i), th.cuda.mem_get_info(i)
        yield (f"cuda:{i} {info.name}, {free / GIB:.1f} of {total / GIB:.1f} GiB free, compute capability"
               f" {info.major}.{info.minor}, CUDA {th.version.cuda}")  # fmt: skip
    free = memory.free_bytes(th.device("cpu"))
    yield f"{os.cpu_count()} CPU cores" + (f", {free / GIB:.1f} GiB of memory free" if free else "")


def threads(found):
    mine, cores, hosts = th.get_num_threads(), len(_cores()), [each.host for each in found.places]
    said = os.environ.get("OMP_NUM_THREADS", "not set")
    yield f"{mine} for each process (OMP_NUM_THREADS is {said}), {cores} cores that this process may use"
    together = mine * hosts.count(socket.gethostname())
    if together > max(cores, mine):
        fair = max(1, cores // hosts.count(socket.gethostname()))
        yield f"the processes here want {together} threads for {cores} cores: export OMP_NUM_THREADS={fair}"


def _cores():
    return os.sched_getaffinity(0) if hasattr(os, "sched_getaffinity") else range(os.cpu_count())


def attention(found):
    names = ("FLASH_ATTENTION", "EFFICIENT_ATTENTION", "CUDNN_ATTENTION", "MATH")
    kernels = {name: getattr(SDPBackend, name) for name in names if hasattr(SDPBackend, name)}
    for dtype in DTYPES:
        runs_here = [name for name, kernel in kernels.items() if _attends(kernel, dtype, found.device)]
        yield f"{_short(dtype)} on {found.device}: {', '.join(runs_here).lower() or 'none'}"
    if found.device.type == "cpu":
        yield f"sequences of up to {SHORT_LENGTH}, and of 4 times a head's width, go by the plain formula"


def _attends(kernel, dtype, device):
    """Whether a kernel of torch's attention runs forwards and backwards."""
    q = th.randn(1, 2, 64, 64, device=device, dtype=dtype, requires_grad=True)      # [N,heads,L,c]
    try:
        with warnings.catch_warnings(), sdpa_kernel(kernel):
            warnings.simplefilter("ignore")
            F.scaled_dot_product_attention(q, q, q).float().sum().backward()
        return True
    except RuntimeError:
        return False


def precision(found):
    pace = {}
    for dtype in DTYPES:
        try:
            pace[dtype] = convolution_rate(dtype, found.device)
            yield f"{_short(dtype)}: {pace[dtype] / 1e9:.3g} GFLOP/s in convolutions, forwards and backwards"
        except RuntimeError as error:
            yield f"{_short(dtype)}: not supported ({str(error).splitlines()[0]})"
    for dtype in DTYPES[1:]:
        if dtype in pace:
            ratio = pace[dtype] / pace[th.float32]
            verdict = "faster" if ratio > WORTH_IT else "no gain but memory" if ratio > 0.8 else "slower"
            yield f"{_short(dtype)} is {ratio:.2g} times as fast as float32: {verdict}"
    best = max(("bf16", "fp16"), key=lambda name: pace.get(PRECISIONS[name], 0))  # of equals bf16, which has no scale
    worth = pace.get(PRECISIONS[best], 0) > WORTH_IT * pace[th.float32]
    yield f"recommended: --precision {best if worth else 'fp32'}"


def _short(dtype):
    return str(dtype).removeprefix("torch.")


def disk(found):
    if checkpoint.is_remote(found.folder):
        yield f"{found.folder} is not on a disk: not measured"
        return
    checkpoint.check_writable(found.folder)
    stat = os.statvfs(found.folder) if hasattr(os, "statvfs") else None
    if stat:
        yield f"{stat.f_bavail * stat.f_frsize / GIB:.1f} GiB free in {found.folder}"
    path = os.path.join(found.folder, f".doctor{os.getpid()}")
    try:
        block, start = os.urandom(MIB), time.monotonic()
        with checkpoint.writing(path) as file:
            for _ in range(64):
                file.write(block)
        yield f"{64 / (time.monotonic() - start):.0f} MiB/s in writing a file of 64 MiB to its end on the disk"
        whole = atomic_renames(path)
        yield "renaming over a file is atomic" if whole else "renaming over a file is NOT atomic: saves may be torn"
    finally:
        checkpoint.remove(path)


def atomic_renames(path, times=200):
    """Whether whoever reads a file while others are renamed over it always finds a whole one."""
    contents, torn, done = [letter * 4096 for letter in (b"a", b"b")], [], threading.Event()

    def read():
        while not done.is_set():
            try:
                with open(path, "rb") as file:
                    torn.append(file.read() not in contents)
            except OSError:
                torn.append(True)

    with checkpoint.writing(path) as file:
        file.write(contents[0])
    reader = threading.Thread(target=read)
    reader.start()
    for i in range(times):
        with open(f"{path}.new", "wb") as file:
            file.write(contents[i % 2])
        os.replace(f"{path}.new", path)
    done.set()
    reader.join()
    return not any(torn)


def packages(found):
    held = runs.versions([*runs.PACKAGES, *OPTIONAL])
    yield ", ".join(f"{name} {version}" for name, version in held.items())
    for name, use in OPTIONAL.items():
        if name not in held:
            yield f"{name} is not installed; it is needed for {use}"


# ------------------------------------------------------------------------------------------------- what a network is


def network(found):
    args, batch = found.args, found.args.batch_size
    free = memory.free_bytes(found.device)
    step = found.step = Step(args.kind, args, found.flags, found.device)
    params, masters = step.precision.model_params, step.precision.master_params
    yield f"{sum(p.numel() for p in params):,} parameters, {len(step.averages)} average(s)"
    fixed = memory.fixed_bytes(params, masters, len(step.averages))
    each = memory.activation_bytes(lambda: step.loss(*step.batch(1)), but=params)
    for name, count in {**fixed, "activations of an image": each}.items():
        yield f"{name}: {count / MIB:.1f} MiB"
    tried = min(args.microbatch, batch) if args.microbatch > 0 else batch
    total = sum(fixed.values()) + each * tried
    about = f", of {free / MIB:.0f} free" if free else ""
    yield f"in all, {tried} images at a time: about {total / MIB:.0f} MiB{about}"
    fits = _fitting(found, free, sum(fixed.values()), each)
    if fits == 0:
        raise ValueError("not even one image at a time fits: take a smaller network, --use_checkpoint True or 16 bits")
    how = "was tried" if found.device.type == "cuda" else "is estimated, not tried" if free else "is not known here"
    yield f"a microbatch of {fits} of the {batch} images of a batch fits; that {how}"
    found.microbatch = args.microbatch if args.microbatch > 0 else fits
    if args.write:
        content = {"batch_size": batch, "bytes": {**fixed, "activations of an image": each}}
        memory.remember(found.folder, found.device, found.flags, fits, **content)
        yield f"remembered in {found.folder}/{memory.NOTE_NAME}: training there with --microbatch -1 takes it"


def _fitting(found, free, fixed, each):
    """The largest microbatch that fits: tried on a GPU, elsewhere estimated."""
    most = found.args.batch_size
    if found.device.type != "cuda":
        return memory.estimated_fit(free, fixed, each, most) if free else most

    def attempt(n):
        logger.log(f"network: trying {n} image(s) at a time")
        with contextlib.ExitStack() as after:
            after.callback(th.cuda.empty_cache)
            after.callback(found.step.precision.zero_grad)
            found.step(n, n)
            th.cuda.synchronize(found.device)

    return memory.largest_that_fits(attempt, most)


def training(found):
    if not hasattr(found, "microbatch"):
        raise ValueError("the network could not be looked at")
    n, m = found.args.batch_size, min(found.microbatch, found.args.batch_size)
    pace = paced(lambda: found.step(n, m), found.device, what="training steps")
    found.speed["training"] = n * pace
    yield f"{n * pace:.3g} images a second, {1 / pace:.3g} s for a step of {n} ({m} at a time), in one process"


def loader(found):
    args = found.args
    if not args.data_dir:
        yield "give --data_dir to have it measured"
        return
    shape = {"random_crop": args.random_crop, "random_flip": args.random_flip}
    shape |= {"class_cond": labelled(args.kind, found.flags), "vector_channels": found.flags.get("vector_channels", 0)}
    data = program.open_data(args, found.flags, args.data_dir, **shape)
    for _ in range(2 * args.num_workers):  # what workers read ahead while nobody asks
        next(data)
    pace = paced(lambda: next(data), th.device("cpu"), what="batches read", most=200)
    found.speed["loader"] = args.batch_size * pace
    yield f"{args.batch_size * pace:.3g} images a second with --num_workers {args.num_workers}"


def bottleneck(found):
    if len(found.speed) < 2:
        yield "not known without both the data's and the training's speed"
        return
    read, trained = found.speed["loader"], found.speed["training"]
    if read < trained:
        wanted = max(1, found.args.num_workers) * trained / read
        yield f"the data ({read / trained:.2g} of what training takes): try --num_workers {wanted:.0f} or more,"
        yield "or smaller files; an npz is read from memory"
    else:
        yield f"training; the data come {read / trained:.2g} times as fast as it takes them"
    if found.device.type == "cpu":
        yield "on a CPU both want the same cores, and were measured in turn"


OF_A_NETWORK = ("network", "training", "loader", "bottleneck")
PARTS = {"launcher": launcher, "devices": devices, "threads": threads, "attention": attention, "precision": precision,
         "disk": disk, "packages": packages, "network": network, "training": training, "loader": loader,
         "bottleneck": bottleneck}  # fmt: skip


if __name__ == "__main__":
    program.run(main)
