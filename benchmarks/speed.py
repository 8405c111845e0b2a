"""Times ours against the plain form, against diffusers and against the hardware, both sides in turns in one process.

    python benchmarks/speed.py [SECTION ...] [--demo runs/demo]
    python benchmarks/speed.py --device cuda

The plain form (plain.py, plain_steps.py) computes the same numbers in the most literal way; `error` says how far both
differ, relative to the largest number. Ratios are medians of rounds with their quartiles: of CPU seconds on a CPU, of
wall seconds on a GPU, where 16 bits, compiled, stand against the plain form in fp16. Without --demo the demo's networks
have random weights, and there is no image of equal quality to be drawn. Sections that ran take their place in the json
file, each with its machine and date; the others stay.
"""

import argparse
import os
import resource
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import hardware
import pairs
import plain
import records
import timing
import torch as th

from guided_diffusion import dist_util, logger, saves

ROOT = Path(__file__).parent.parent
RESULTS = ROOT / "benchmarks" / "results"


def cases(args):
    """[(name, flags, images)] of the networks that are evaluated and trained on this device."""
    if not args.published:
        return [(name, flags, args.images or count) for name, (flags, count) in pairs.NETWORKS.items()
                if name in (args.networks or pairs.NETWORKS)]  # fmt: skip
    return [(name, pairs.published(name, args.tiny)[0], args.images or pairs.PUBLISHED[name][0])
            for name in args.networks or pairs.PUBLISHED]  # fmt: skip


def guides(args):
    """[(name, flags, images)] of the classifiers."""
    if not args.published:
        return [("demo's classifier", pairs.GUIDE, args.images or 64)]
    return [(f"classifier of {name}", pairs.published(name, args.tiny)[1], args.images or pairs.PUBLISHED[name][1])
            for name in args.networks or pairs.PUBLISHED]  # fmt: skip


def versions(args, net):
    """The network as ours and, in the precision of this device, its plain form."""
    other = plain.plain_of(net)
    other = other if args.precision == "fp32" else other.to_half()
    return pairs.quick(net, args.precision, args.compile, args.device), other


# ------------------------------------------------------------------------------------------------------- sections


def limit(args):
    """The rates of the hardware."""
    dtypes = {"fp32": th.float32} | ({"bf16": th.bfloat16} if args.device == "cuda" else {})
    return [{"what": f"{name}: matrix product, convolution, copy", **hardware.rates(args.device, dtype, args.seconds)}
            for name, dtype in dtypes.items()]


def evaluation(args):
    """One evaluation of each network."""
    rows, rates = [], hardware.rates(args.device, args.dtype, seconds=args.seconds)
    for name, flags, count in cases(args):
        net, _ = pairs.diffusion_of(flags, args.device)
        rows.append(evaluated(args, name, net.eval(), pairs.batch_of(flags, count, args.device), rates))
        del net
    for name, flags, count in guides(args):
        net = pairs.classifier_of(flags, args.device)
        rows.append(evaluated(args, name, net.eval(), pairs.batch_of(flags, count, args.device)[:2] + (None,), rates))
    return rows


def evaluated(args, name, net, batch, rates):
    needs = counted(lambda: net(*[each[:1] for each in batch if each is not None]), len(batch[0]))
    works = pairs.evaluations(*versions(args, net), batch)
    row = timing.compared(timing.interleaved(works, args.repeats, args.device), args.clock)
    row |= {"what": f"{name}, {len(batch[0])} images", "error": timing.difference(works["plain"](), works["ours"]())}
    seconds = row["sides"]["ours"][f"{args.clock}_s"]["median"]
    return timing.announced(row | hardware.fractions(*needs, seconds, rates))


def counted(work, images):
    """(operations, bytes) of `work` on one image, for so many images."""
    with th.no_grad():
        return hardware.flops_of(work) * images, hardware.bytes_of(work) * images


def training(args):
    """One whole training step of each network: loss, gradients, optimizer, average, log."""
    rows, rates = [], hardware.rates(args.device, args.dtype, seconds=args.seconds)
    for name, flags, count in cases(args):
        net, process = pairs.diffusion_of(flags, args.device)
        error = None
        if args.precision == "fp32":
            error = timing.difference(*pairs.gradients(net, process, flags, count, args.device))
        flops = hardware.flops_of(lambda n=net, f=flags: n(*[
            each for each in pairs.batch_of(f, 1, args.device) if each is not None]).sum().backward())  # fmt: skip
        net.zero_grad(set_to_none=True)
        works = pairs.trainings(net, process, flags, count, args.device, **trained(args, net))
        row = {"what": f"{name}, {count} images"}
        row |= timing.compared(timing.interleaved(works, args.repeats, args.device), args.clock)
        seconds = row["sides"]["ours"][f"{args.clock}_s"]["median"]
        row |= {"error": error, **hardware.fractions(flops * count, 0, seconds, rates)}
        rows.append(timing.announced(row | peaks(args, works)))
        del works, net
    return rows


def trained(args, net):
    """What Trainer is told besides, on this device; the network is made ready for it."""
    pairs.laid_out(net, args.compile, args.device)
    return {"precision": args.precision}


def peaks(args, works):
    """Peak memory of each work on a GPU; on a CPU see the section `memory`."""
    found = {}
    for name, work in works.items() if args.device == "cuda" else ():
        th.cuda.reset_peak_memory_stats()
        timing.once(work, args.device)
        found[f"{name}_peak_mib"] = th.cuda.max_memory_allocated() / 2**20
    return found


def memory(args):
    """Peak memory of a training step at 64x64 with attention at 32: fresh processes, in turns."""
    rows = []
    for recompute in ("False", "True"):
        found = {side: [] for side in ("nothing", "plain", "ours")}
        for _ in range(args.processes):
            for side, runs in found.items():
                words = [side, "--recompute", recompute, "--device", args.device]
                words += ["--size", "16", "--batch", "1"] if args.tiny else []
                said = python(ROOT / "benchmarks" / "training_memory.py", *words)
                line = next(each for each in said.splitlines() if each.startswith("MEMORY"))
                runs.append([float(word) for word in line.split()[1:]])
        median = {side: timing.spread([peak for _, peak in runs])["median"] for side, runs in found.items()}
        row = {"what": f"training step at 64x64, attention at 32, recompute {recompute}"}
        row |= {f"{side}_peak_mib": peak for side, peak in median.items()}
        row |= {f"{side}_kept_mib": found[side][0][0] for side in ("plain", "ours")}
        share = (median["ours"] - median["nothing"]) / (median["plain"] - median["nothing"])
        row |= {"of_plain": share, "of_plain_whole_process": median["ours"] / median["plain"]}
        rows.append(timing.announced(row))
    return rows


def python(*words):
    """What a python program says, in a process of its own."""
    command = [sys.executable, *map(str, words)]
    return subprocess.run(command, check=True, capture_output=True, text=True, cwd=ROOT).stdout


def guided(args):
    """A step of guided sampling: of the demo, or of the published sizes; and of guidance without a classifier."""
    if not args.published:
        net, process, classifier = pairs.demo_networks(args.demo)
        chosen = [("demo", net, process, classifier, (1, 8, 8), args.images or 100)]
    else:
        chosen = (_published_walk(args, name) for name in args.networks or pairs.PUBLISHED)
    rows = []
    for name, net, process, classifier, shape, count in chosen:
        for sampler in ("ddpm", "ddim"):
            literal = plain.plain_of(net), plain.plain_of(classifier)
            if args.precision != "fp32":
                literal = literal[0].to_half(), literal[1].to_half()
            for each in (net, classifier):
                pairs.quick(each, args.precision, args.compile and sampler == "ddpm", args.device)
            walks = pairs.Walks(net, process, classifier, args.steps, 3.0, sampler, literal=literal)
            row = timing.compared(timing.interleaved(walks.works(count, shape), args.repeats, args.device), args.clock)
            row |= {"what": f"{name}, {args.steps} steps of {sampler}, {count} images"}
            if args.precision == "fp32":
                same = walks.literal(count, shape, own_noise=False)
                row["error"] = timing.difference(same, walks.ours(count, shape))
            rows.append(timing.announced(row))
    return rows if args.device == "cuda" else [*rows, free(args)]


def _published_walk(args, name):
    flags, guide = pairs.published(name, args.tiny)
    net, process = pairs.diffusion_of(flags, args.device)
    size, count = flags["image_size"], args.images or pairs.PUBLISHED[name][1]
    return name, net.eval(), process, pairs.classifier_of(guide, args.device).eval(), (3, size, size), count


def free(args):
    """A step without a classifier, of the demo's network with classes."""
    net, process = pairs.diffusion_of(pairs.NETWORKS["demo"][0] | {"class_cond": True, "num_classes": 11})
    count = args.images or 100
    works = pairs.free_of_classifier(net.eval(), process, count, args.steps)
    row = timing.compared(timing.interleaved(works, args.repeats), args.clock)
    row["error"] = timing.difference(works["plain"](None), works["ours"]())
    return timing.announced(row | {"what": f"classifier-free, {args.steps} steps of ddpm, {count} images"})


def updates(args):
    """Optimizer and average, with the norms that are logged."""
    side = 16 if args.tiny else 1
    sets = {"600 tensors of 64x64": (600 // side, 64), "300 tensors of 256x256": (300 // side, 256 // side)}
    modules = {name: th.nn.ParameterList(th.nn.Parameter(th.randn(n, n)) for _ in range(count))
               for name, (count, n) in sets.items()}  # fmt: skip
    modules |= {f"network {name}": pairs.diffusion_of(flags)[0] for name, flags, _ in cases(args)[:2]}
    rows = []
    for name, module in modules.items():
        parts = pairs.updates(module.to(args.device), args.device)
        error = timing.difference(parts[""]["plain"](), parts[""]["ours"]())
        for part, works in parts.items():
            row = timing.compared(timing.interleaved(works, 3 * args.repeats, args.device), args.clock)
            row |= {"what": f"{name}, {part}"} if part else {"what": name, "error": error}
            rows.append(timing.announced(row))
    return rows


def saving(args):
    """How long a checkpoint of weights, average and optimizer keeps the training waiting: wall seconds."""
    net = pairs.diffusion_of(cases(args)[: 2][-1][1], args.device)[0]
    opt = th.optim.AdamW(net.parameters())
    for p in net.parameters():
        p.grad = th.zeros_like(p)
    opt.step()
    files = {"model.pt": net.state_dict(), "ema.pt": dict(net.state_dict()), "opt.pt": opt.state_dict()}
    with tempfile.TemporaryDirectory() as folder:

        def plainly():
            for name, obj in files.items():
                th.save(obj, os.path.join(folder, f"plain_{name}"))

        rounds = {"plain": [], "ours, waiting": [], "ours, beside": []}
        savers = {name: saves.Saver(folder, background=name.endswith("beside")) for name in list(rounds)[1:]}
        for number in range(args.repeats):
            rounds["plain"].append(timing.once(plainly, args.device))
            for name, saver in savers.items():
                rounds[name].append(timing.once(lambda s=saver, n=number: s.submit(n, files), args.device))
                saver.wait()
                (Path(folder) / saves.commit_name(number)).unlink()
    mebibytes = sum(p.numel() * p.element_size() for p in net.parameters()) * 4 / 2**20
    row = timing.compared(rounds, "wall")
    return [timing.announced(row | {"what": "checkpoint: what training waits for", "mebibytes": mebibytes})]


def startup(args):
    """Import of the network, and help of the programs, against the import of torch: fresh processes, in turns."""
    programs = sorted((ROOT / "scripts").glob("*.py"))[: 1 if args.tiny else None]
    words = {"import torch": ["-c", "import torch"], "nothing": ["-c", "pass"],
             "import guided_diffusion.unet": ["-c", "import guided_diffusion.unet"]}  # fmt: skip
    words |= {f"{path.name} --help": [path, "--help"] for path in programs}
    rounds = {name: [] for name in words}
    for _ in range(args.processes):
        for name, each in words.items():
            wall, cpu = time.perf_counter(), children_seconds()
            python(*each)
            rounds[name].append((time.perf_counter() - wall, children_seconds() - cpu))
    return [timing.announced({"what": f"{name} against import torch",
                       **timing.compared({"torch": rounds["import torch"], "this": rounds[name]}, "cpu")})
            for name in list(words)[1:]]  # fmt: skip


def children_seconds():
    """CPU seconds of all processes started here that have ended."""
    used = resource.getrusage(resource.RUSAGE_CHILDREN)
    return used.ru_utime + used.ru_stime


def others(args):
    """Ours against diffusers: its UNet2DModel with the same weights, its schedulers with the same betas."""
    import diffusers_side

    rows = []
    for name, flags, count in diffusers_side.cases(cases(args)):
        net, process = pairs.diffusion_of(flags, args.device)
        net.eval()
        other, batch = diffusers_side.network_of(net, flags), pairs.batch_of(flags, count, args.device)
        other = diffusers_side.quick(other, args.precision, args.compile, args.device)
        pairs.quick(net, args.precision, args.compile, args.device)
        works = diffusers_side.evaluations(net, other, batch)
        row = timing.compared(timing.interleaved(works, args.repeats, args.device), args.clock)
        row["error"] = timing.difference(works["diffusers"](), works["ours"]())
        row["parameters"] = [sum(p.numel() for p in each.parameters()) for each in (net, other)]
        rows.append(timing.announced(row | {"what": f"evaluation of {name}, {count} images"}))
        net, process = pairs.diffusion_of(flags, args.device)
        other = diffusers_side.network_of(net, flags)
        works = diffusers_side.trainings(net, other, process, flags, count, args.device, **trained(args, net))
        row = timing.compared(timing.interleaved(works, args.repeats, args.device), args.clock)
        rows.append(timing.announced(row | {"what": f"training step of {name}, {count} images"}))
    return rows + scheduled(args)


def scheduled(args):
    """Walks of the demo's network by the schedulers of diffusers and by ours."""
    import diffusers_side

    net, process, _ = pairs.demo_networks(args.demo)
    other, rows = diffusers_side.network_of(net, pairs.NETWORKS["demo"][0]), []
    for sampler in diffusers_side.SAMPLERS:
        works = diffusers_side.walks(net, other, process, sampler, 2 * args.steps, args.images or 100, (1, 8, 8))
        row = timing.compared(timing.interleaved(works, args.repeats), args.clock)
        rows.append(timing.announced(row | {"what": f"demo, {2 * args.steps} steps of {sampler}, unguided"}))
    return rows


def profiles(args):
    """The operations that take most of our training step and evaluation: their shares of all time."""
    rows = []
    for name, flags, count in cases(args):
        net, process = pairs.diffusion_of(flags, args.device)
        batch = pairs.batch_of(flags, count, args.device)
        pairs.quick(net, args.precision, args.compile, args.device)
        rows.append(profiled(args, f"evaluation of {name}", pairs.evaluations(net.eval(), None, batch)["ours"]))
        net, process = pairs.diffusion_of(flags, args.device)
        step = pairs.our_training(net, process, batch[0], batch[2], **trained(args, net))
        rows.append(profiled(args, f"training step of {name}", step))
    return rows


def profiled(args, what, work, most=12):
    """{"what", "operations": [name, share, calls]} by the time in the kernels themselves."""
    from torch.profiler import ProfilerActivity, profile

    timing.once(work, args.device)
    kinds = [ProfilerActivity.CPU] + ([ProfilerActivity.CUDA] if args.device == "cuda" else [])
    with profile(activities=kinds) as profiler:
        timing.once(work, args.device)
    key = f"self_{'device' if args.device == 'cuda' else 'cpu'}_time_total"
    events = sorted(profiler.key_averages(), key=lambda event: -getattr(event, key))
    total = sum(getattr(event, key) for event in events) or 1
    table = [(event.key[:60], round(getattr(event, key) / total, 3), event.count) for event in events[:most]]
    print(f"{what}: " + ", ".join(f"{name} {share:.0%}" for name, share, _ in table[:6]), flush=True)
    return {"what": what, "operations": table}


def recorded(args):
    """What other programs of this folder have recorded: metrics, the loader, memory against the number of images."""
    return [timing.announced(row) for row in records.rows(RESULTS)]


SECTIONS = {each.__name__: each for each in (limit, evaluation, training, guided, updates, saving, startup, memory,
                                             others, profiles, recorded)}  # fmt: skip


def parsed(argv):
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("sections", nargs="*", metavar="SECTION", help=f"of {', '.join(SECTIONS)} (default: all)")
    parser.add_argument("--device", default="cpu", choices=["cpu", "cuda"], help="where to measure (default: cpu)")
    parser.add_argument("--published", action="store_true", help="the published sizes on a CPU too")
    parser.add_argument("--networks", nargs="+", help="some of them only, by name")
    parser.add_argument("--tiny", action="store_true", help="everything small, to see that it runs")
    parser.add_argument("--threads", type=int, default=1, help="of the CPU (default: 1)")
    parser.add_argument("--repeats", type=int, default=7, help="rounds of each comparison (default: 7)")
    parser.add_argument("--processes", type=int, default=3, help="processes of each peak and start (default: 3)")
    parser.add_argument("--steps", type=int, default=10, help="steps of a walk (default: 10)")
    parser.add_argument("--images", type=int, help="images at a time (default: the network's own)")
    parser.add_argument("--seconds", type=float, default=1.0, help="how long each rate is sought (default: 1)")
    parser.add_argument("--precision", choices=["fp32", "bf16", "fp16"], help="of ours (default: bf16 on a GPU)")
    parser.add_argument("--compile", choices=["True", "False"], help="torch.compile (default: True on a GPU)")
    parser.add_argument("--demo", type=Path, help="folder of a finished make demo, whose networks are then used")
    parser.add_argument("--out", type=Path, help="json file (default: results/speed.json, speed_cuda.json)")
    args = parser.parse_args(argv)
    if unknown := [name for name in args.sections if name not in SECTIONS]:
        parser.error(f"unknown section {unknown[0]}: choose from {', '.join(SECTIONS)}")
    cuda = args.device == "cuda"
    args.published = args.published or cuda
    known = pairs.PUBLISHED if args.published else pairs.NETWORKS
    if unknown := [name for name in args.networks or () if name not in known]:
        parser.error(f"unknown network {unknown[0]}: choose from {', '.join(known)}")
    args.precision = args.precision or ("bf16" if cuda else "fp32")
    args.compile = cuda if args.compile is None else args.compile == "True"
    args.dtype = th.bfloat16 if args.precision == "bf16" else th.float32
    args.clock = timing.clock_of(args.device)
    args.out = args.out or RESULTS / ("speed_cuda.json" if cuda else "speed.json")
    return args


def main(argv=None):
    args = parsed(argv)
    dist_util.setup_dist(args.device)
    th.manual_seed(0)
    th.set_num_threads(args.threads)
    os.environ["OMP_NUM_THREADS"] = str(args.threads)  # of the processes started here
    with tempfile.TemporaryDirectory() as folder, logger.scoped_configure(folder, format_strs=[]):
        for name in args.sections or SECTIONS:
            print(f"\n{name}: {SECTIONS[name].__doc__}", flush=True)
            timing.record(args.out, {name: SECTIONS[name](args)}, args.device)
    print(f"\nwritten: {args.out}")


if __name__ == "__main__":
    main()
