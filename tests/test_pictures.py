import sys

import numpy as np
import pytest
import torch
from PIL import Image, ImageFont

from guided_diffusion import pictures
from guided_diffusion.pictures import BACKGROUND, draw_curves, grid, save_curves, save_grid, strip, to_uint8


def noise(*shape):
    return np.random.default_rng(0).integers(0, 256, shape, dtype=np.uint8)


# ------------------------------------------------------------------------------------------------------------- pixels


def test_s08_34_conversion_truncates():
    values = [-1.0, 1.0, 0.0, -2.0, 7.0, 1 - 2**-22, 1 / 127.5 - 1 - 1e-6, 0.5, -0.5]
    expected = [0, 255, 127, 0, 255, 254, 0, 191, 63]
    pixels = to_uint8(torch.tensor(values).reshape(1, 1, 1, -1))
    assert pixels.dtype == torch.uint8 and pixels.flatten().tolist() == expected


def test_s08_34_conversion_moves_channels_last():
    x = torch.arange(2 * 3 * 4 * 5).reshape(2, 3, 4, 5) / 127.5 - 1 + 1e-4
    pixels = to_uint8(x)
    assert pixels.shape == (2, 4, 5, 3) and pixels.is_contiguous()
    assert torch.equal(pixels.permute(0, 3, 1, 2).flatten().int(), torch.arange(120, dtype=torch.int32))


# -------------------------------------------------------------------------------------------------------------- grids


@pytest.mark.parametrize(
    ("side", "tile", "enlarged"), [((8, 8), 48, (48, 48)), ((5, 8), 20, (15, 24)), ((50, 60), 48, (50, 60))]
)
@pytest.mark.parametrize("channels", [1, 3])
def test_every_tile_holds_its_image_enlarged_without_blur(side, tile, enlarged, channels):
    images, gap = noise(7, *side, channels), 3
    picture = np.array(grid(torch.from_numpy(images), 4, tile=tile, gap=gap))
    high, wide = enlarged
    assert picture.shape == (gap + 2 * (high + gap), gap + 4 * (wide + gap), 3)
    left_over = np.ones(picture.shape[:2], dtype=bool)
    for k in range(7):
        y, x = gap + k // 4 * (high + gap), gap + k % 4 * (wide + gap)
        for row in range(high):
            for column in range(0, wide, 7):
                source = images[k, row * side[0] // high, column * side[1] // wide]
                assert (picture[y + row, x + column] == source).all()
        left_over[y : y + high, x : x + wide] = False
    assert (picture[left_over] == BACKGROUND).all()  # gaps and the missing eighth tile


def test_transparent_images_lie_on_white():
    images = np.zeros((3, 4, 4, 4), dtype=np.uint8)
    images[:, ..., :3] = (200, 100, 0)
    images[1, ..., 3], images[2, ..., 3] = 51, 255
    picture = np.array(grid(images, 3, tile=4, gap=0))
    assert picture[0, ::4].tolist() == [[255, 255, 255], [244, 224, 204], [200, 100, 0]]


@pytest.mark.parametrize("font", ["good", "plain"][: 1 + hasattr(ImageFont, "load_default_imagefont")])
@pytest.mark.parametrize(
    "captions",
    [
        {"row_labels": ["zero", "one"]},
        {"column_labels": ["a", "much longer than its tile", "c"]},
        {"title": "A title that is certainly much wider than the three small tiles which stand below it"},
        {"row_labels": [0, 1], "column_labels": [1.5, 2.5, 3.5], "title": "all"},
    ],
)
def test_captions_change_only_the_margins(captions, font, monkeypatch):
    if font == "plain":  # without the fonts of matplotlib and without FreeType
        monkeypatch.setitem(sys.modules, "matplotlib", None)
        monkeypatch.setattr(ImageFont, "load_default", getattr(ImageFont, "load_default_imagefont", None))
    images = noise(5, 8, 8, 1)
    plain, captioned = grid(images, 3), grid(images, 3, **captions)
    top = captioned.height - plain.height
    left = grid(images, 3, row_labels=captions["row_labels"]).width - plain.width if "row_labels" in captions else 0
    assert (top > 0) == ("title" in captions or "column_labels" in captions)
    assert (left > 0) == ("row_labels" in captions)
    pixels = np.array(captioned)
    inside = pixels[top:, left : left + plain.width]
    assert np.array_equal(inside, plain)
    outside = np.concatenate([pixels[:top].reshape(-1, 3), pixels[top:, :left].reshape(-1, 3)])
    assert (outside.sum(axis=1) < 300).sum() > 20  # ink
    border = np.concatenate([pixels[0], pixels[:top, 0], pixels[:top, -1], pixels[:, 0]])
    assert (border == BACKGROUND).all()  # no text runs over the edge


def test_labels_stand_at_their_rows_and_columns():
    images = noise(6, 8, 8, 1)

    def centre_of_ink(axis, **labels):
        picture, plain = np.array(grid(images, 3, **labels)).astype(int), grid(images, 3)
        top, left = picture.shape[0] - plain.height, picture.shape[1] - plain.width
        ink = picture.sum(axis=2) < 500
        ink[top:, left:] = False
        return np.argwhere(ink).mean(axis=0)[axis] - (top, left)[axis]

    for row in range(2):
        labels = ["HHH" if k == row else " " for k in range(2)]
        assert abs(centre_of_ink(0, row_labels=labels) - (4 + row * 52 + 24)) < 3
    for column in range(3):
        labels = ["HHH" if k == column else " " for k in range(3)]
        assert abs(centre_of_ink(1, column_labels=labels) - (4 + column * 52 + 24)) < 2


def test_labels_of_rows_are_one_short_line():
    images = noise(2, 8, 8, 1)
    broken, whole = (np.array(grid(images, 1, row_labels=[text, "b"])) for text in ("a \n\t text\n", "a text"))
    assert np.array_equal(broken, whole)
    sizes = {grid(images, 1, row_labels=["m" * count, "b"]).width for count in (500, 5000)}
    assert len(sizes) == 1 and sizes.pop() < 2000


def test_column_labels_shrink_before_their_words_break():
    images = noise(3, 8, 8, 1)
    margin = grid(images, 3, column_labels=["classifier", "a", "b"]).height - grid(images, 3).height
    assert 10 < margin < 22  # one line
    assert grid(images, 3, column_labels=["classifier free", "a", "b"]).height > grid(images, 3).height + margin


def test_strip_has_steps_as_columns(tmp_path):
    frames = noise(4, 2, 8, 8, 3)  # [S,N,H,W,C]
    by_hand = grid(np.stack([frames[step, sample] for sample in range(2) for step in range(4)]), 4)
    assert np.array_equal(strip(list(frames)), by_hand)
    assert np.array_equal(strip([torch.from_numpy(frame) for frame in frames]), by_hand)
    save_grid(tmp_path / "new" / "grid.png", frames[0], 2, title="two")
    assert np.array_equal(Image.open(tmp_path / "new" / "grid.png"), grid(frames[0], 2, title="two"))


@pytest.mark.parametrize(
    ("images", "labels", "message"),
    [
        (np.zeros((2, 4, 4, 3)), {}, r"images are float64 \[2, 4, 4, 3\]; a grid takes uint8"),
        (noise(2, 3, 4, 4), {}, None),
        (noise(2, 4, 4, 2), {}, "C 1, 3 or 4"),
        (noise(4, 4, 3), {}, r"uint8 \[4, 4, 3\]"),
        (noise(0, 4, 4, 3), {}, "N > 0"),
        (noise(5, 4, 4, 3), {"row_labels": ["a", "b"]}, "2 row labels for 3 rows"),
        (noise(5, 4, 4, 3), {"column_labels": ["a"]}, "1 column labels for 2 columns"),
    ],
)
def test_grid_errors(images, labels, message):
    if message is None:
        grid(images, 2, **labels)
    else:
        with pytest.raises(ValueError, match=message):
            grid(images, 2, **labels)


# ------------------------------------------------------------------------------------------------------------- curves


def test_curves(tmp_path, monkeypatch):
    from matplotlib.figure import Figure

    figures = []
    monkeypatch.setattr(Figure, "savefig", lambda self, path: figures.append(self))
    curves = {"loss": ([0, 10, 20], [4.0, 2.0, 1.0]), "vb": ([0, 20], [0.5, 0.25])}
    save_curves(tmp_path / "a.png", curves, "updates", "loss", "Training", logy=True)
    save_curves(tmp_path / "b.png", {"one": ([1, 2], [3, 4])}, "x", "y", "t")
    axes = figures[0].axes[0]
    assert [[list(line.get_xdata()), list(line.get_ydata())] for line in axes.lines] == list(map(list, curves.values()))
    assert (axes.get_xlabel(), axes.get_ylabel(), axes.get_title("left")) == ("updates", "loss", "Training")
    assert axes.get_yscale() == "log" and figures[1].axes[0].get_yscale() == "linear"
    assert [text.get_text() for text in figures[0].legends[0].get_texts()] == ["loss", "vb"]
    assert figures[1].legends == []


def test_error_bars_of_curves_reach_as_far_as_the_errors():
    axes = draw_curves({"a": ([1, 2], [3.0, 4.0], [0.5, 0.25]), "b": ([5], [6.0], [1.0], [2.0])}, "x", "y", "t").axes[0]
    upright, (across, both) = (container[2] for container in axes.containers)
    assert [bar.tolist() for bar in upright[0].get_segments()] == [[[1, 2.5], [1, 3.5]], [[2, 3.75], [2, 4.25]]]
    assert across.get_segments()[0].tolist() == [[4, 6], [6, 6]] and both.get_segments()[0].tolist() == [[5, 4], [5, 8]]


def test_curves_are_written_without_touching_pyplot(tmp_path):
    loaded = "matplotlib.pyplot" in sys.modules
    save_curves(str(tmp_path / "new" / "curves.png"), {"one": ([1, 2], [3, 4])}, "x", "y", "t")
    picture = np.array(Image.open(tmp_path / "new" / "curves.png").convert("RGB")).reshape(-1, 3)
    assert len(picture) > 100_000
    assert (picture == (0x00, 0x72, 0xB2)).all(axis=1).sum() > 300  # the line
    assert ("matplotlib.pyplot" in sys.modules) == loaded


def test_importing_pictures_is_cheap():
    assert not {"PIL", "matplotlib"} & set(vars(pictures))


def test_names_of_curves_are_shown_as_they_are():
    """Not as mathematics, which a $ would begin, and not hidden, as what begins with _ would be."""
    names = ["_hidden", r"$\foo$", "<b>plain"]
    figure = draw_curves({name: ([1, 2], [3.0, i]) for i, name in enumerate(names)}, "x", "y", "t")
    figure.canvas.draw()
    assert [text.get_text() for text in figure.legends[0].get_texts()] == names


def test_more_lines_than_colours_are_told_apart_by_their_strokes():
    figure = pictures.draw_curves({f"{n}": ([0, 1], [n, n], [0, 0]) for n in range(15)}, "x", "y", "title")
    looks = {(line.get_color(), line.get_linestyle()) for line in figure.axes[0].lines}
    assert len(looks - {look for look in looks if look[1] == "None"}) == 15
