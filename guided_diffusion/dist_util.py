"""
Ranks, devices and the few collectives that the project needs; each of them is a no-op in a single process.

Who launched this process is read from the environment, in the order of `LAUNCHERS`. A single process makes no process
group, so it needs neither MPI nor a network. Ranks find each other through MASTER_ADDR and MASTER_PORT where these are
exported; else, on one node, through a file in the temporary folder; else, under MPI on several nodes, through mpi4py.

Waiting ends: for ranks that do not arrive after GD_ARRIVAL_MINUTES (5), for one that is stuck after GD_TIMEOUT_MINUTES
(60: one rank may write files or evaluate meanwhile). A rank that dies closes its connections, which gloo sees at once;
NCCL waits for as long as for one that is stuck.
"""

import atexit
import contextlib
import importlib
import math
import os
import re
import socket
import sys
import tempfile
import threading
import time
from concurrent import futures
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

_device = None
_has_met = False  # whether this process is, or was, in a process group


class Place(NamedTuple):
    """Where this process stands among those of its run."""

    rank: int = 0
    size: int = 1
    local_rank: int = 0
    one_node: bool = True
    launcher: str | None = None


def resolve(env):
    """
    The `Place` that the environment `env` (a mapping of str to str) describes.

    :raises ValueError: if the variables are no numbers, or no rank of so many.
    """
    for launcher, (rank, size, local_rank, local_size) in LAUNCHERS.items():
        if rank in env and size in env:
            told = f"{rank} is {env[rank]!r} and {size} is {env[size]!r}"
            try:
                number, count = int(env[rank]), int(env[size])
                on_its_node = int(env.get(local_rank, env.get("SLURM_LOCALID", number)))
            except ValueError:
                raise ValueError(f"{told}: these, and {local_rank}, must be whole numbers") from None
            if not 0 <= number < count:
                raise ValueError(f"{told}: the ranks of so many processes are 0 to {count - 1}, each once")
            on_this_node = re.match(r"\d*", env.get(local_size, ""))[0] or count  # SLURM writes "4(x2)", "4,3"
            return Place(number, count, on_its_node, int(on_this_node) == count, launcher)
    return Place()


def _minutes(name, default):
    """A time-out that the environment may set, as a timedelta. Raises ValueError for what is no time."""
    with contextlib.suppress(ValueError):
        minutes = float(os.environ.get(name) or default)
        if 0 < minutes < math.inf:
            return timedelta(minutes=minutes)
    raise ValueError(f"{name} is a number of minutes above 0, as {default}, not {os.environ[name]!r}")


def setup_dist(device=None):
    """
    Choose this rank's device and, where the run has several ranks, make them meet (gloo on CPU, NCCL on GPU).

    :param device: "cpu", "cuda", "cuda:1", "mps", or None: a GPU if there is one, else the CPU. Rank k of a node takes
        visible GPU k modulo their number; CUDA_VISIBLE_DEVICES is never written.
    :raises ValueError: the device is not there, or the ranks have no way to meet.
    :raises ConnectionError: they have one and did not meet.
    """
    global _device, _has_met
    place, timeout = resolve(os.environ), _minutes("GD_TIMEOUT_MINUTES", 60)
    _device = _choose_device(device, place)
    if _device.type == "cuda":
        torch.cuda.set_device(_device)
    if place.size == 1 or _connected():
        return
    # Default arguments in this module keep the group that they find, and so its threads beyond `finish`, where they can
    # abort the exit of Python: torch imports it for DistributedDataParallel, which is too late.
    importlib.import_module("torch.distributed.nn.functional")
    backend = "cpu:gloo,cuda:nccl" if _device.type == "cuda" and dist.is_nccl_available() else "gloo"
    store = _meet(place)
    try:
        dist.init_process_group(backend, store=store, rank=place.rank, world_size=place.size, timeout=timeout)
    except RuntimeError as error:
        raise ConnectionError(
            f"the {place.size} ranks met but cannot connect ({_first_line(error)}): export GLOO_SOCKET_IFNAME and "
            "NCCL_SOCKET_IFNAME, the network interface that reaches the others, as `ip addr` names it"
        ) from error
    _has_met = True
    if "nccl" in backend:
        _refuse_shared_gpus(gather_objects((socket.gethostname(), _gpu_id(_device))))


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


def gather_to_main(obj):
    """[the `obj` of rank 0, of rank 1, ...] on rank 0, where alone they take memory; None elsewhere. Collective."""
    if not _connected():
        return [obj]
    gathered = [None] * dist.get_world_size() if is_main() else None
    dist.gather_object(obj, gathered)
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
        except (ValueError, OSError, ImportError) as raised:
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
                f"the same command goes on from the last checkpoint (told: {_first_line(error)})"
            ) from error
        raise


def finish():
    """Leave the process group, if there is one."""
    global _device
    _device = None
    if _connected():
        dist.destroy_process_group()


@contextlib.contextmanager
def leaving():
    """
    For the end of a program: where SystemExit, or the end of the block, would leave a process that has been in a group,
    leave it without Python's own way out, in which threads of torch that the group's users still hold (as sharded
    networks do) abort the process now and then.
    """
    code = 0
    try:
        yield
    except SystemExit as end:
        if not _has_met:
            raise
        code = end.code if isinstance(end.code, int) else int(end.code is not None)
    if _has_met:
        atexit._run_exitfuncs()  # as Python would: workers end, logs are closed
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(code)


def _connected():
    return dist.is_available() and dist.is_initialized()


def check_device(name):
    """Raise ValueError, naming the choices, for a device that is not here."""
    gpus = torch.cuda.device_count()
    available = ["cpu"] + ["cuda"] * (gpus > 0) + [f"cuda:{i}" for i in range(gpus)]
    available += ["mps"] * torch.backends.mps.is_available()
    if name not in available:
        raise ValueError(f"device {name!r} is not available here; choose from {', '.join(available)}")


def _choose_device(name, place):
    gpus = torch.cuda.device_count()
    name = name or ("cuda" if gpus else "cpu")
    check_device(name)
    if place.size > 1 and name not in ("cpu", "cuda"):
        raise ValueError(f"{place.size} ranks cannot share device {name!r}; choose cuda (a GPU for each rank) or cpu")
    return torch.device(f"cuda:{place.local_rank % gpus}" if name == "cuda" else name)


def _gpu_id(device):
    """What tells a GPU from the others of its node, whatever number each rank knows it by."""
    return str(getattr(torch.cuda.get_device_properties(device), "uuid", device))


def _refuse_shared_gpus(places):
    """:raises ValueError: if two of the ranks' (host, GPU) are the same one, which NCCL refuses in less clear words."""
    for rank, place in enumerate(places):
        if place in places[:rank]:
            raise ValueError(
                f"ranks {places.index(place)} and {rank} share a GPU of {place[0]}: start no more processes on a node"
                " than it has GPUs, or give --device cpu"
            )


def _meet(place):
    """
    The store through which the ranks of `place` exchange their addresses, once all of them have come to it.

    :raises ConnectionError: if they have not within GD_ARRIVAL_MINUTES.
    """
    patience = _minutes("GD_ARRIVAL_MINUTES", 5)
    store, where, advice = _open_store(place, patience)
    names = [f"rank {other}" for other in range(place.size)]
    until, pause = time.monotonic() + patience.total_seconds(), 0.01
    try:
        store.set(names[place.rank], "is here")
        while not store.check(names) and time.monotonic() < until:
            time.sleep(pause)
            pause = min(2 * pause, 1.0)
        absent = [name for name in names if not store.check([name])]
    except RuntimeError:  # whoever serves the store has gone
        absent = ["rank 0"]
    if absent:
        raise ConnectionError(
            f"rank {place.rank} waited up to {patience} for {place.size} ranks to meet at {where}, without"
            f" {', '.join(absent)}: see whether all were started and what they say; {advice}"
        )
    return store


def _open_store(place, patience):
    """(store, words for where it is, what to do if nobody comes there)."""
    if "MASTER_ADDR" in os.environ:
        return _tcp_store(place, patience)
    if place.one_node:
        return _file_store(place)
    store = None if place.launcher in ("torchrun", "SLURM") else _mpi_store(place)
    if store is None:
        raise ValueError(
            f"{place.size} ranks on several nodes do not know where to meet: export MASTER_ADDR (the host of rank 0) "
            "and MASTER_PORT (a free port there, such as 29500) to all of them, or install mpi4py and use mpiexec"
        )
    return store, "rank 0's host", "the nodes must reach each other's ports"


def _tcp_store(place, patience):
    """The store at MASTER_ADDR and MASTER_PORT, served by rank 0, or by torchrun for its ranks."""
    host, port = os.environ["MASTER_ADDR"], os.environ.get("MASTER_PORT", "29500")
    where = f"MASTER_ADDR {host}, MASTER_PORT {port}"
    if not port.isdecimal() or not 0 < int(port) < 2**16:
        raise ValueError(f"{where}: a port is a number from 1 to 65535; export one that is free on {host}")
    try:
        socket.getaddrinfo(host, int(port))
    except (OSError, UnicodeError) as error:
        raise ValueError(
            f"{where}: no host of that name is known here ({error}); export the name or the number of rank 0's host"
        ) from None
    serves = place.rank == 0 and os.environ.get("TORCHELASTIC_USE_AGENT_STORE") != "True"
    how = {"wait_for_workers": False, "multi_tenant": True, "timeout": patience}
    try:
        if not serves:
            _await_server(host, int(port), patience)
        store = _within(2 * patience, lambda: dist.TCPStore(host, int(port), is_master=serves, **how))
    except (RuntimeError, OSError, futures.TimeoutError) as error:
        if "EADDRINUSE" in str(error):
            told = "another program uses that port: export another MASTER_PORT to all ranks"
        elif serves:
            told = "rank 0 cannot be reached there; is it the address of the machine that rank 0 runs on?"
        else:
            told = f"rank {place.rank} did not find rank 0 there within {patience}; see what that one says"
        raise ConnectionError(f"{where}: {told} ({_first_line(error) or 'no answer'})") from None
    restart = os.environ.get("TORCHELASTIC_RESTART_COUNT", "0")  # torchrun's store outlives ranks that it starts anew
    return dist.PrefixStore(f"start {restart}", store), where, "no other program may use that port"


def _await_server(host, port, patience):
    """Return when somebody listens there. (A store that finds nobody writes pages of warnings.)"""
    until = time.monotonic() + patience.total_seconds()
    while True:
        try:
            socket.create_connection((host, port), timeout=patience.total_seconds()).close()
            return
        except OSError:
            if time.monotonic() > until:
                raise
            time.sleep(0.1)


def _within(patience, function):
    """
    What `function()` returns. Raises futures.TimeoutError if that takes longer, as a store does for ever if another
    program that says nothing has its port; what was begun then ends with the process.
    """
    future = futures.Future()

    def work():
        try:
            future.set_result(function())
        except RuntimeError as error:
            future.set_exception(error)

    threading.Thread(target=work, daemon=True).start()
    return future.result(patience.total_seconds())


def _file_store(place):
    folder = Path(tempfile.gettempdir()) / f"guided-diffusion-{os.getuid() if hasattr(os, 'getuid') else 'user'}"
    folder.mkdir(mode=0o700, exist_ok=True)
    path = folder / re.sub(r"\W", "-", _launch_name(os.environ, place.launcher))
    advice = "on several nodes, export MASTER_ADDR (the host of rank 0) and MASTER_PORT (a free port) to all of them"
    return dist.FileStore(str(path), place.size), path, advice


def _first_line(error):
    return str(error).strip().split("\n")[0][:200]


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
    except (ImportError, RuntimeError):  # not installed, or without a library of MPI
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
