"""
Our networks and samplers as Hugging Face diffusers computes them: its UNet2DModel with the very same weights, its
schedulers with the same betas.
"""

import diffusers
import pairs
import torch as th

from guided_diffusion import config, diffusers_format, generate
from guided_diffusion.network_options import DiffusionOptions, ModelOptions

DTYPES = {"fp32": th.float32, "bf16": th.bfloat16, "fp16": th.float16}
SAMPLERS = {  # ours: (its scheduler there, what it is told)
    "ddpm": (diffusers.DDPMScheduler, {}),
    "ddim": (diffusers.DDIMScheduler, {"set_alpha_to_one": True, "steps_offset": 0}),
    "dpmpp_2m": (diffusers.DPMSolverMultistepScheduler, {}),
}


def cases(chosen):
    """Those of [(name, flags, images)] that diffusers has; heads of a few channels made one number at all widths."""
    for name, flags, count in chosen:
        if "num_head_channels" not in flags:
            flags = flags | {"num_head_channels": 64 if flags["num_channels"] > 64 else 8}
        if flags.get("image_size") != 128:
            yield name, flags, count


def quick(other, precision, compile, device):
    """As diffusers recommends on a GPU: 16 bits, channels last, compiled."""
    other = other if precision == "fp32" else other.to(DTYPES[precision])
    other = other.to(memory_format=th.channels_last) if th.device(device).type == "cuda" else other
    return th.compile(other) if compile else other


def network_of(net, flags):
    """The UNet2DModel with the weights of our network; `flags` are those that are not as usual."""
    flags = config.defaults(ModelOptions, DiffusionOptions) | {"channel_mult": ""} | flags
    state = net.state_dict()
    attention = {net.image_size // int(side) for side in str(flags["attention_resolutions"]).split(",")}
    fields = diffusers_format.unet_config(flags, attention)
    fields = {name: value for name, value in fields.items() if not name.startswith("_")}
    other = diffusers.UNet2DModel(**fields)
    other.load_state_dict(diffusers_format.exported(state, flags, attention))
    return other.to(next(net.parameters()).device).train(net.training)


def evaluations(net, other, batch):
    """Works that evaluate the UNet2DModel and ours."""
    x, t, y = batch
    dtype = next(other.parameters()).dtype

    def theirs():
        with th.inference_mode():
            return other(x.to(dtype), t, class_labels=y, return_dict=False)[0]

    return {"diffusers": theirs, "ours": pairs.evaluations(net, None, batch)["ours"]}


def trainings(net, other, process, flags, count, device="cpu", **ours):
    """
    Works that take one whole training step each, diffusers' as its example of unconditional training does, with its
    EMAModel (foreach) and AdamW of torch as it is by default; 16 bits by autocast.
    """
    x0, _, y = pairs.batch_of(flags, count, device)
    schedule = scheduler(process, diffusers.DDPMScheduler)
    average = diffusers.training_utils.EMAModel(other.parameters(), decay=0.9999, foreach=True)
    opt = th.optim.AdamW(other.parameters(), lr=1e-4)
    half = DTYPES[ours.get("precision", "fp32")]

    def step():
        noise, t = th.randn_like(x0), th.randint(process.num_timesteps, (count,), device=device)
        with th.autocast(th.device(device).type, half, enabled=half is not th.float32):
            output = other(schedule.add_noise(x0, noise, t), t, class_labels=y, return_dict=False)[0]
            loss = th.nn.functional.mse_loss(output[:, : x0.shape[1]].float(), noise)
        loss.backward()
        th.nn.utils.clip_grad_norm_(other.parameters(), 1.0)
        opt.step()
        opt.zero_grad()
        average.step(other.parameters())

    return {"diffusers": step, "ours": pairs.our_training(net, process, x0, y, **ours)}


def scheduler(process, kind, **options):
    """A scheduler of diffusers with the betas of our process."""
    return kind(trained_betas=process.betas.tolist(), num_train_timesteps=process.num_timesteps,
                prediction_type="epsilon", **options)  # fmt: skip


def walks(net, other, process, sampler, steps, count, shape, seed=0):
    """Works that draw `count` samples [N,*shape] in so many steps of a sampler, without guidance."""
    device = next(net.parameters()).device
    kind, options = SAMPLERS[sampler]

    def theirs():
        schedule = scheduler(process, kind, **options)
        schedule.set_timesteps(steps, device=device)
        x = th.randn(count, *shape, device=device, generator=th.Generator(device).manual_seed(seed))
        with th.inference_mode():
            for t in schedule.timesteps:
                x = schedule.step(other(x, t, return_dict=False)[0], t, x, return_dict=False)[0]
        return x

    def ours():
        stream = generate.sample_stream(
            process, lambda x, t, y=None: net(x, t), shape=shape, num_samples=count, batch_size=count, seed=seed,
            sampler=sampler, steps=steps, device=device,
        )  # fmt: skip
        return th.cat([x for _, x, _ in stream])

    return {"diffusers": theirs, "ours": ours}
