"""What training shows on the way: pictures of samples and their distance to the data, without a trace in the run."""

import numpy as np
import pytest
import torch as th
from PIL import Image
from test_programs import done, names, refused, rows, same

from evaluations import features, metrics
from evaluations.features import extract, make_extractor
from guided_diffusion import checkpoint, ema, tasks, train_util
from guided_diffusion.script_util import create_gaussian_diffusion

NET = (
    "--image_size 8 --image_channels 1 --num_channels 32 --num_res_blocks 1 --channel_mult 1,1 --attention_resolutions"
    " 4 --noise_schedule cosine --class_cond True --num_classes 3 --dropout 0.2"
)
CLASSIFIER = (
    "--image_size 8 --image_channels 1 --classifier_width 32 --classifier_depth 1 --classifier_channel_mult 1,1"
    " --classifier_attention_resolutions 4 --classifier_num_head_channels 16 --num_classes 3"
)
TRAIN = "--batch_size 6 --lr 1e-2 --log_interval 2 --random_flip False --num_workers 0 --iterations 4"


@pytest.fixture(scope="module")
def home(tmp_path_factory):
    folder = tmp_path_factory.mktemp("watch")
    images = np.random.default_rng(0).integers(0, 256, (20, 8, 8, 1), np.uint8)
    np.savez(folder / "data.npz", arr_0=images, arr_1=np.arange(20) % 3)
    np.savez(folder / "val.npz", arr_0=images[:14], arr_1=np.arange(14) % 3)
    done("classifier_train", f"--data_dir {folder}/data.npz {CLASSIFIER} {TRAIN} --log_dir {folder}/judge")
    done("image_train", f"--data_dir {folder}/data.npz {NET} {TRAIN} --ema_rate 0.5 --log_dir {folder}/alone")
    done("image_train", f"--data_dir {folder}/data.npz {NET} {TRAIN} --ema_rate 0.5 --log_dir {folder}/watched"
         f" --sample_interval 4 --eval_every 2 --eval_samples 9 --sample_steps 3 --log_formats csv,jsonl"
         f" --val_data_dir {folder}/val.npz --eval_extractor {folder}/judge/model000004.pt")  # fmt: skip
    return folder


def test_watching_changes_nothing_of_the_run(home):
    for name in ("model000004.pt", "ema_0.5_000004.pt"):
        assert same(checkpoint.load(home / "alone" / name), checkpoint.load(home / "watched" / name))


def test_a_picture_when_it_is_due(home):
    shown = [name for name in names(home / "watched") if name.startswith("samples")]
    assert shown == ["samples_at_000004.png"]
    assert "progress.jsonl" in names(home / "watched") and "log.txt" not in names(home / "watched")


def test_the_distance_is_that_of_samples_drawn_from_the_average_afterwards(home, tmp_path):
    done("image_sample", f"--model_path {home}/watched/ema_0.5_000004.pt --num_samples 9 --batch_size 6 --classes all"
         f" --sampler ddim --steps 3 --log_dir {tmp_path}")  # fmt: skip
    extractor = make_extractor(str(home / "judge" / "model000004.pt"))
    with np.load(tmp_path / "samples_9x8x8x1.npz") as npz:
        drawn = npz["arr_0"]
    found = [float(row["fid"]) for row in rows(home / "watched") if row.get("fid")]
    assert len(found) == 2
    features = [extract(extractor, images).pool for images in (first_nine(home), drawn)]
    assert found[-1] == pytest.approx(metrics.frechet_distance_from_features(*features), rel=1e-4)


def first_nine(home):
    """The held-out images in the order of the loader."""
    from guided_diffusion.image_datasets import load_data
    from guided_diffusion.pictures import nearest_uint8

    data = load_data(data_dir=home / "val.npz", batch_size=14, image_size=8, image_channels=1, random_flip=False,
                     num_workers=0, once=True)  # fmt: skip
    return nearest_uint8(next(data)[0]).numpy()[:9]


@pytest.mark.filterwarnings("ignore:cannot read image")
def test_the_distance_is_to_the_images_that_training_sees(home, tmp_path, monkeypatch):
    """Transparent ones on the background that was asked for, and what cannot be read passed over as there."""
    for number in range(4):
        Image.new("RGBA", (8, 8), (200, 100, 50, 0)).save(tmp_path / f"{number}.png")
    (tmp_path / "4.png").write_bytes(b"no picture")
    seen = []

    def noted(extractor, images):
        seen.append(images)
        return extract(extractor, images)

    monkeypatch.setattr(features, "extract", noted)
    done("image_train", f"--data_dir {tmp_path} {NET.replace('--class_cond True --num_classes 3', '')} {TRAIN}"
         f" --batch_size 3 --iterations 1 --background black --skip_bad_images True --eval_every 1 --eval_samples 5"
         f" --sample_steps 2 --eval_extractor {home}/judge/model000004.pt --log_dir {tmp_path}/run")  # fmt: skip
    assert sum(map(len, seen[:2])) == 5 and not np.concatenate(seen[:2]).any()


def test_the_average_stands_in_for_the_weights_and_goes_again():
    net = th.nn.Sequential(th.nn.Conv2d(1, 1, 1), th.nn.Dropout(0.5))
    task = tasks.DiffusionTask(net, create_gaussian_diffusion(steps=4, noise_schedule="cosine"))
    trainer = train_util.Trainer(task, iter(()), batch_size=1, averages=[ema.Rate(0.9)], folder="unused")
    for average in trainer.ema_params[0]:
        average.data.fill_(3.0)
    before = [p.detach().clone() for p in net.parameters()]
    with pytest.raises(ZeroDivisionError), trainer.averaged() as averaged:
        assert averaged is net and not net[1].training and all((p == 3).all() for p in net.parameters())
        1 / 0  # noqa: B018
    assert net[1].training and all(map(th.equal, net.parameters(), before))


@pytest.mark.parametrize("words, pattern", [
    ("--sample_interval -1", "--sample_interval must be 0 or more, not -1"),
    ("--eval_every 2 --eval_samples 1", "--eval_samples must be 2 or more, not 1"),
    ("--sample_steps 0", "--sample_steps must be 1 or more, not 0"),
    ("--eval_every 2 --eval_extractor nowhere.pt", "extractor nowhere.pt is neither"),
    ("--sample_interval 2 --sharding fsdp", "not with --sharding fsdp"),
    ("--log_formats csv,xml", "unknown log format 'xml'"),
])  # fmt: skip
def test_what_cannot_be_is_said_before_training(words, pattern, home, tmp_path):
    refused("image_train", f"--data_dir {home}/data.npz {NET} {TRAIN} --log_dir {tmp_path}/run {words}", pattern)
