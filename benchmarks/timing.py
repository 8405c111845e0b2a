"""Measuring two sides of the same work: in turns, with medians and quartiles, and writing down where it was done."""

import datetime
import gc
import json
import os
import platform
import statistics
import time

import torch as th


def machine(device="cpu"):
    """What the numbers were measured on."""
    device = th.device(device)
    facts = {
        "cpu": _cpu_name(), "cores": os.cpu_count(), "threads": th.get_num_threads(),
        "load_average": round(os.getloadavg()[0], 2), "platform": platform.platform(),
        "python": platform.python_version(), "torch": th.__version__, "date": datetime.date.today().isoformat(),
    }  # fmt: skip
    if device.type == "cuda":
        facts |= {"gpu": th.cuda.get_device_name(device), "cuda": th.version.cuda}
    return facts


def _cpu_name():
    try:
        with open("/proc/cpuinfo", encoding="utf-8") as file:
            names = [line.split(":", 1)[1].strip() for line in file if line.startswith("model name")]
    except OSError:
        names = []
    return names[0] if names else platform.processor() or platform.machine()


def once(work, device="cpu"):
    """(wall seconds, CPU seconds of this process) of one call; a GPU is waited for before and after."""
    wait = th.cuda.synchronize if th.device(device).type == "cuda" else lambda: None
    wait()
    wall, cpu = time.perf_counter(), time.process_time()
    work()
    wait()
    return time.perf_counter() - wall, time.process_time() - cpu


def interleaved(sides, repeats, device="cpu"):
    """
    {side: [(wall seconds, CPU seconds)] of each round} of functions without arguments, which take turns after a call
    each that does not count, the order reversed from round to round.
    """
    for work in sides.values():
        once(work, device)
    found = {name: [] for name in sides}
    gc.collect()
    gc.disable()  # lest one side tidy up after the other
    try:
        for number in range(repeats):
            for name in list(sides)[:: -1 if number % 2 else 1]:
                found[name].append(once(sides[name], device))
    finally:
        gc.enable()
    return found


def spread(values):
    """{"median", "low", "high"}: of a list of numbers, with its quartiles (the ends, of fewer than four)."""
    low, high = min(values), max(values)
    if len(values) > 3:
        low, _, high = statistics.quantiles(values, n=4, method="inclusive")
    return {"median": statistics.median(values), "low": low, "high": high}


def clock_of(device):
    """By which seconds work on a device is compared."""
    return "wall" if th.device(device).type == "cuda" else "cpu"


def compared(rounds, clock):
    """
    A row of results: wall and CPU seconds of each side and, against the first side, how many times as fast the others
    are, round by round.

    :param clock: "cpu", by whose seconds other programs on the machine count for little, or "wall".
    """
    number, (first, *others) = ("wall", "cpu").index(clock), rounds
    sides = {name: {"wall_s": spread([pair[0] for pair in pairs]), "cpu_s": spread([pair[1] for pair in pairs])}
             for name, pairs in rounds.items()}  # fmt: skip
    ratios = {name: spread([a[number] / max(b[number], 1e-9) for a, b in zip(rounds[first], rounds[name])])
              for name in others}  # fmt: skip
    return {"clock": clock, "sides": sides, "times_as_fast": ratios, "rounds": len(rounds[first])}


def difference(a, b):
    """The largest difference of two tensors, and of pairs of them, over the largest of the first's numbers."""
    pairs = list(zip(a, b)) if isinstance(a, (list, tuple)) else [(a, b)]
    size = max(float(x.detach().float().abs().max()) for x, _ in pairs)
    return max(float((x.detach().float() - y.detach().float()).abs().max()) for x, y in pairs) / max(size, 1e-30)


def shown(row):
    """A row of the table as text: what, seconds of each side, times as fast with quartiles, what else there is."""
    parts = [f"{row['what']:<46}"]
    for name, times in row.get("sides", {}).items():
        parts.append(f"{name} {seconds(times[row['clock'] + '_s']['median'])}")
    for name, ratio in row.get("times_as_fast", {}).items():
        parts.append(f"{name} x{ratio['median']:.2f} ({ratio['low']:.2f} .. {ratio['high']:.2f})")
    parts += [f"{key} {_number(value)}" for key, value in row.items()
              if key not in ("what", "sides", "times_as_fast", "clock", "rounds")]  # fmt: skip
    return "  ".join(parts)


def announced(row):
    """The row, which is printed."""
    print(shown(row), flush=True)
    return row


def seconds(value):
    """A time as text."""
    return f"{value:.2f} s" if value >= 1 else f"{1000 * value:.3g} ms"


def _number(value):
    return f"{value:.3g}" if isinstance(value, float) else value


def record(path, sections, device):
    """Put sections {name: list of rows} into the json file `path`, each with its machine; other sections stay."""
    content = json.loads(path.read_text(encoding="utf-8")) if path.exists() else {}
    content |= {name: {"machine": machine(device), "rows": rows} for name, rows in sections.items()}
    path.parent.mkdir(parents=True, exist_ok=True)
    beside = path.with_name(path.name + ".part")
    beside.write_text(json.dumps(content, indent=1) + "\n", encoding="utf-8")
    os.replace(beside, path)
