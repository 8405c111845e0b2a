"""
Ranks, devices and the few collectives that the project needs; each of them is a no-op in a single process.

Who launched this process is read from the environment, in the order of `LAUNCHERS`. A single process makes no process
group, so it needs neither MPI nor a network. Ranks find each other through MASTER_ADDR and MASTER_PORT where these are
exported; else, on one node, through a file in the temporary folder; else, under MPI on several nodes, through mpi4py.
"""

import contextlib
import importlib
import os
import re
import socket
import tempfile
from datetime import timedelta
from pathlib import Path
from typing import NamedTuple

import torch
import torch.distributed as dist

# Environment variables of: the rank, the number of ranks, the rank within its node, the number of ranks on its node.
LAUNCHERS = {
    "torchrun": ("RANK", "WORLD_SIZE", "LOCAL_RANK", "LOCAL_WORLD_SIZE"),
    "Open MPI": tuple(f"OMPI_COMM_WORLD_{what}" for what in ("RANK", "SIZE", "LOCAL_RANK", "LOCAL_SIZE")),
    "MVAPICH": tuple(f"MV2_COMM_WORLD_{what}" for what in ("RANK", "SIZE", "LOCAL_RANK", "LOCAL_SIZE")),
    "MPI": ("PMI_RANK", "PMI_SIZE", "MPI_LOCALRANKID", "MPI_LOCALNRANKS"),  # MPICH, Hydra, Intel
    # Counts of the job step, not of the job: a batch script outside srun is one process, whatever it has reserved.
    "SLURM": ("SLURM_PROCID", "SLURM_STEP_NUM_TASKS", "SLURM_LOCALID", "SLURM_STEP_TASKS_PER_NODE"),
}
ARRIVAL_TIMEOUT = timedelta(minutes=5)  # all ranks have started
# One rank may write files or evaluate while the others wait for it. A rank that dies closes its connections, which
# gloo sees at once; NCCL waits for this long.
COLLECTIVE_TIMEOUT = timedelta(minutes=float(os.environ.get("GD_TIMEOUT_MINUTES", 60)))

_device = None


class Place(NamedTuple):
    """Where this process stands among those of its run."""

    rank: int = 0
    size: int = 1
    local_rank: int = 0
    one_node: bool = True
    launcher: str | None = None


def resolve(env):
    """The `Place` that the environment `env` (a mapping of str to str) describes."""
    for launcher, (rank, size, local_rank, local_size) in LAUNCHERS.items():
        if rank in env and size in env:
            on_this_node = re.match(r"\d*", env.get(local_size, ""))[0] or env[size]  # SLURM writes "4(x2)", "4,3"
            return Place(
                rank=int(env[rank]),
                size=int(env[size]),
                local_rank=int(env.get(local_rank, env.get("SLURM_LOCALID", env[rank]))),
                one_node=int(on_this_node) == int(env[size]),
                launcher=launcher,
            )
    return Place()


def setup_dist(device=None):
    """
    Choose this rank's device and, where the run has several ranks, make them meet (gloo on CPU, NCCL on GPU).

    :param device: "cpu", "cuda", "cuda:1", "mps", or None: a GPU if there is one, else the CPU. Rank k of a node takes
        visible GPU k modulo their number; CUDA_VISIBLE_DEVICES is never written.
    :raises ValueError: the device is not there, or the ranks have no way to meet.
    """
    global _device
    place = resolve(os.environ)
    _device = _choose_device(device, place)
    if _device.type == "cuda":
        torch.cuda.set_device(_device)
    if place.size == 1 or _connected():
        return
    # Default arguments in this module keep the group that they find, and so its threads beyond `finish`, where they can
    # abort the exit of Python: torch imports it for DistributedDataParallel, which is too late.
    importlib.import_module("torch.distributed.nn.functional")
    backend = "cpu:gloo,cuda:nccl" if _device.type == "cuda" and dist.is_nccl_available() else "gloo"
    dist.init_process_group(
        backend, **_rendezvous(place), rank=place.rank, world_size=place.size, timeout=COLLECTIVE_TIMEOUT
    )


def dev():
    """The device of this rank; before `setup_dist`, the one that it would choose."""
    return _device or _choose_device(None, resolve(os.environ))


def rank():
    return dist.get_rank() if _connected() else resolve(os.environ).rank


def world_size():
    return dist.get_world_size() if _connected() else resolve(os.environ).size


def is_main():
    return rank() == 0


def barrier():
    """Wait until every rank has come here."""
    gather_objects(None)


def sync_params(params):
    """Overwrite the tensors in place with those of rank 0."""
    if _connected():
        with torch.no_grad():
            for param in params:
                dist.broadcast(param, 0)


def gather_objects(obj):
    """[the `obj` of rank 0, of rank 1, ...], on every rank. Collective: all ranks must call it."""
    if not _connected():
        return [obj]
    gathered = [None] * dist.get_world_size()
    dist.all_gather_object(gathered, obj)
    return gathered


def from_main(function, *args):
    """
    What `function(*args)` returns on rank 0, where alone it runs, on every rank; an error of it is raised on all.
    Collective.
    """
    result = error = None
    if is_main():
        try:
            result = function(*args)
        except (ValueError, OSError) as raised:
            error = raised
    result, error = gather_objects((result, error))[0]
    if error is not None:
        raise error
    return result


def largest(number):
    """The largest of the small whole numbers that the ranks bring. Collective; no GPU is waited for."""
    if not _connected():
        return number
    value = torch.tensor(number)
    dist.all_reduce(value, dist.ReduceOp.MAX)
    return int(value)


def load_state_dict(path, **kwargs):
    """`checkpoint.load`, read by the calling rank alone: any one rank may call it."""
    from . import checkpoint

    return checkpoint.load(path, **kwargs)


@contextlib.contextmanager
def naming_lost_peers():
    """Turn torch's errors about a rank that has died into a ConnectionError that says so."""
    try:
        yield
    except RuntimeError as error:
        told = str(error).lower()
        signs = ("connection closed by peer", "connection reset", "broken pipe", "timed out waiting", "nccl")
        if _connected() and any(sign in told for sign in signs):
            raise ConnectionError(
                f"rank {rank()} lost another process of this run, which has died or is stuck: see what that one said; "
                "the same command goes on from the last checkpoint"
            ) from error
        raise


def finish():
    """Leave the process group, if there is one."""
    global _device
    _device = None
    if _connected():
        dist.destroy_process_group()


def _connected():
    return dist.is_available() and dist.is_initialized()


def _choose_device(name, place):
    gpus = torch.cuda.device_count()
    available = ["cpu"] + ["cuda"] * (gpus > 0) + [f"cuda:{i}" for i in range(gpus)]
    available += ["mps"] * torch.backends.mps.is_available()
    name = name or ("cuda" if gpus else "cpu")
    if name not in available:
        raise ValueError(f"device {name!r} is not available here; choose from {', '.join(available)}")
    if place.size > 1 and name not in ("cpu", "cuda"):
        raise ValueError(f"{place.size} ranks cannot share device {name!r}; choose cuda (a GPU for each rank) or cpu")
    return torch.device(f"cuda:{place.local_rank % gpus}" if name == "cuda" else name)


def _rendezvous(place):
    """Keywords for init_process_group by which the ranks of `place` find each other."""
    if "MASTER_ADDR" in os.environ:
        os.environ.setdefault("MASTER_PORT", "29500")
        return {"init_method": "env://"}
    if place.one_node:
        return {"store": _file_store(place)}
    store = None if place.launcher in ("torchrun", "SLURM") else _mpi_store(place)
    if store is None:
        raise ValueError(
            f"{place.size} ranks on several nodes do not know where to meet: export MASTER_ADDR (the host of rank 0) "
            "and MASTER_PORT (a free port there, such as 29500) to all of them, or install mpi4py and use mpiexec"
        )
    return {"store": store}


def _file_store(place):
    folder = Path(tempfile.gettempdir()) / f"guided-diffusion-{os.getuid() if hasattr(os, 'getuid') else 'user'}"
    folder.mkdir(mode=0o700, exist_ok=True)
    path = folder / re.sub(r"\W", "-", _launch_name(os.environ, place.launcher))
    store = dist.FileStore(str(path), place.size)
    store.set(f"rank {place.rank}", "is here")
    try:
        store.wait([f"rank {other}" for other in range(place.size)], ARRIVAL_TIMEOUT)
    except RuntimeError:
        raise ValueError(
            f"the {place.size} ranks did not meet at {path} within {ARRIVAL_TIMEOUT}; "
            "export MASTER_ADDR=localhost and MASTER_PORT (a free port) to all of them"
        ) from None
    return store


def _launch_name(env, launcher):
    """A text that all ranks of this launch share and no other launch has."""
    if launcher == "SLURM":
        return f"slurm-{env.get('SLURM_JOB_ID')}-{env.get('SLURM_STEP_ID')}"
    if not os.path.exists("/proc/self/environ"):
        return env.get("PMIX_NAMESPACE", f"parent-{os.getppid()}")
    pid, started = os.getppid(), ""
    with contextlib.suppress(OSError):  # the launcher may belong to another user or stand outside this container
        while f"{LAUNCHERS[launcher][0]}=".encode() in Path(f"/proc/{pid}/environ").read_bytes():
            pid = int(_proc_stat(pid)[1])  # a wrapper script of this rank: its parent
    with contextlib.suppress(OSError):
        started = _proc_stat(pid)[19]  # process ids come again, and a run that died leaves its file behind
    return f"{socket.gethostname()}-{pid}-{started}"


def _proc_stat(pid):
    """Fields of /proc/PID/stat from the third on: [1] is the parent, [19] the time of the start."""
    return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()


def _mpi_store(place):
    """A TCP store on a port that rank 0 has bound, announced through MPI; None where mpi4py cannot do that."""
    try:
        import mpi4py

        mpi4py.rc.initialize = False
        from mpi4py import MPI
    except ImportError:
        return None
    if ("Open MPI" in MPI.Get_library_version()) != (place.launcher == "Open MPI"):
        return None  # built for another MPI than the one that launched us: MPI.Init would abort
    started_here = not MPI.Is_initialized()
    if started_here:
        MPI.Init()
    store = dist.TCPStore(socket.gethostname(), 0, None, True, wait_for_workers=False) if place.rank == 0 else None
    host, port = MPI.COMM_WORLD.bcast((socket.gethostname(), store.port) if store else None)
    if started_here:
        MPI.Finalize()  # a rank that dies inside MPI would leave the others waiting in their Finalize
    return store or dist.TCPStore(host, port, None, False)
