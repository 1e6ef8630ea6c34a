"""Pictures of feature maps against scikit-learn's PCA, and two textures that the first component must tell apart."""

import numpy as np
import pytest
import torch
from PIL import Image

from qwenvit.encoder import Encoder
from qwenvit.features.maps import ItemFeatures
from qwenvit.features.pictures import HEAT, pca_pictures, similarity_maps, similarity_pictures
from qwenvit.features.sheet import GAP, TEXT, contact_sheet, fit, outline_cell, stretch


def random_map(rows, columns, channels=12, seed=0):
    """Return a map whose channels have different spreads and means, one of them far larger than the rest."""
    generator = torch.Generator().manual_seed(seed)
    spread = torch.linspace(0.5, 3, channels) ** 2
    spread[3] *= 100
    return torch.randn(rows, columns, channels, generator=generator) * spread + spread.flip(0) + seed


def pixels(picture):
    return np.asarray(picture).astype(float)


def test_colours_are_sklearns_components_of_all_maps_together():
    maps = [random_map(7, 5), random_map(4, 9, seed=1), random_map(3, 3, seed=2)]
    cells = torch.cat([one.flatten(0, 1) for one in maps]).double().numpy()
    decomposition = pytest.importorskip("sklearn.decomposition", reason="needs scikit-learn")
    pca = decomposition.PCA(3, svd_solver="full").fit(cells)
    directions = pca.components_ * np.sign(pca.components_[range(3), np.abs(pca.components_).argmax(1)])[:, None]
    components = (cells - cells.mean(0)) @ directions.T
    low, high = np.percentile(components, [1, 99], axis=0)
    expected = (((components - low) / (high - low)).clip(0, 1) * 255).round()
    drawn = pca_pictures(maps, cell=1)
    assert [picture.size for picture in drawn] == [(5, 7), (9, 4), (3, 3)]
    flat = np.concatenate([pixels(picture).reshape(-1, 3) for picture in drawn])
    assert np.abs(flat - expected).max() <= 1  # one level where a value is between two


def test_one_pca_gives_equal_features_equal_colours_and_two_do_not():
    first, second = random_map(6, 6), random_map(5, 5, seed=1)
    second[2, 3] = first[4, 1]
    drawn = pca_pictures([first, second], cell=1)
    assert drawn[0].getpixel((1, 4)) == drawn[1].getpixel((3, 2))
    alone = [pca_pictures([one], cell=1)[0] for one in (first, second)]
    assert alone[0].getpixel((1, 4)) != alone[1].getpixel((3, 2))


def test_a_cell_is_a_square_of_pixels():
    one = random_map(3, 4)
    (small,), (large,) = pca_pictures([one], cell=1), pca_pictures([one], cell=7)
    assert large.size == (28, 21)
    assert all(large.getpixel((7 * x + 3, 7 * y + 3)) == small.getpixel((x, y)) for x in range(4) for y in range(3))


def test_equal_features_and_one_cell_are_drawn():
    for one in (torch.ones(2, 2, 4), torch.ones(1, 1, 8)):
        assert np.isfinite(pixels(pca_pictures([one])[0])).all()
    assert similarity_pictures([torch.ones(2, 3)], cell=1)[0].size == (3, 2)


def test_similarities_are_cosines():
    maps = [random_map(6, 5), random_map(2, 9, seed=1).bfloat16()]
    found = similarity_maps(maps, maps[0][4, 2])
    query = maps[0][4, 2].double()
    for one, cosines in zip(maps, found, strict=True):
        for row in range(one.shape[0]):
            for column in range(one.shape[1]):
                cell = one[row, column].double()
                assert cosines[row, column] == pytest.approx(float(cell @ query / (cell.norm() * query.norm())))
    assert found[0][4, 2] == pytest.approx(1)
    assert similarity_maps([torch.zeros(1, 1, 4)], torch.ones(4))[0].item() == 0


def test_similarities_share_one_scale_from_dark_to_light():
    low, high = similarity_pictures([torch.tensor([[0.2, 0.5]]), torch.tensor([[0.8], [0.5]])], cell=1)
    assert (low.getpixel((0, 0)), high.getpixel((0, 0))) == (HEAT[0], HEAT[-1])
    assert low.getpixel((1, 0)) == high.getpixel((0, 1)) == HEAT[2]
    brightness = [sum(colour) for colour in HEAT]
    assert brightness == sorted(brightness)


@pytest.mark.parametrize(
    "maps",
    [
        [],
        [torch.rand(4, 4)],
        [torch.rand(4, 4, 2)],
        [torch.rand(2, 4, 4, 8)],
        [torch.ones(4, 4, 4, dtype=torch.int64)],
        [torch.rand(4, 4, 8), torch.rand(4, 4, 9)],
    ],
)
def test_other_maps_are_refused(maps):
    with pytest.raises(ValueError, match=r"maps: expected floats \[rows, columns, channels\]"):
        pca_pictures(maps)
    with pytest.raises(ValueError, match=r"maps: expected floats \[rows, columns, channels\]"):
        similarity_maps(maps, torch.ones(8))


def test_the_features_of_an_item_are_no_map():
    item = ItemFeatures((random_map(3, 3),), (4,), (1, 3, 3))
    with pytest.raises(TypeError, match=r"maps: expected tensors, such as .*, got ItemFeatures"):
        pca_pictures([item])


def test_nan_and_other_queries_are_refused():
    broken = random_map(3, 3)
    broken[1, 1, 5] = torch.nan
    with pytest.raises(ValueError, match="maps: expected finite features"):
        pca_pictures([random_map(3, 3), broken])
    with pytest.raises(ValueError, match=r"query: expected \[12\].*got \[1, 12\]"):
        similarity_maps([random_map(3, 3)], torch.ones(1, 12))
    with pytest.raises(ValueError, match="query: expected finite features"):
        similarity_maps([random_map(3, 3)], torch.full((12,), torch.inf))
    with pytest.raises(ValueError, match=r"similarities: expected floats \[rows, columns\], got \[2, 2, 3\]"):
        similarity_pictures([torch.rand(2, 2, 3)])
    with pytest.raises(ValueError, match="similarities: expected finite ones"):
        similarity_pictures([torch.tensor([[1.0, torch.nan]])])


def test_maps_may_be_stacked():
    maps = torch.stack([random_map(3, 4), random_map(3, 4, seed=1)])
    cosines = similarity_maps(maps, maps[0, 1, 2])
    for drawn, listed in (
        (pca_pictures(maps), pca_pictures(list(maps))),
        (similarity_pictures(torch.stack(cosines)), similarity_pictures(cosines)),
    ):
        assert all(np.array_equal(pixels(one), pixels(other)) for one, other in zip(drawn, listed, strict=True))
    with pytest.raises(ValueError, match=r"maps: expected floats .*, got \[4, 12\]"):
        pca_pictures(maps[0])  # one map, rather than a list of one


@pytest.mark.filterwarnings("ignore:model='demo'")
@pytest.mark.parametrize("layer", [1, 2, -1])
def test_the_first_component_splits_two_textures(layer):
    """The left half is fine noise and the right half stripes of the same mean and spread: colour does not tell them."""
    rng = np.random.default_rng(0)
    noise = rng.choice([64, 192], (256, 192))
    stripes = np.tile(np.repeat([64, 192], 4), 24)[None, :].repeat(256, 0)
    image = np.concatenate([noise, stripes], 1).astype(np.uint8)[:, :, None].repeat(3, 2)
    encoder = Encoder.from_pretrained("demo", device="cpu")
    (item,) = encoder.features(image, (layer,), min_pixels=256 * 384, max_pixels=256 * 384)
    red = pixels(pca_pictures(item.maps, cell=1)[0])[:, :, 0]
    assert red.shape == (16, 24)
    left, right = red[:, :12], red[:, 12:]
    assert abs(left.mean() - right.mean()) > 3 * max(left.std(), right.std())
    threshold = (left.mean() + right.mean()) / 2
    assert ((left > threshold) == (left.mean() > threshold)).mean() > 0.97
    assert ((right > threshold) == (right.mean() > threshold)).mean() > 0.97


def test_a_sheet_has_every_picture_at_its_place():
    colours = [["red", "lime"], ["blue"], ["black", "yellow", "magenta"]]
    sizes = [[(30, 20), (10, 15)], [(12, 40)], [(8, 8), (25, 5), (9, 9)]]
    rows = [
        [Image.new("RGB", size, colour) for size, colour in zip(*one, strict=True)]
        for one in zip(sizes, colours, strict=True)
    ]
    sheet = contact_sheet(rows)
    assert sheet.size == (30 + 25 + 9 + 2 * GAP, 20 + 40 + 9 + 2 * GAP)
    lefts, tops = (0, 30 + GAP, 30 + 25 + 2 * GAP), (0, 20 + GAP, 20 + 40 + 2 * GAP)
    white = np.full((sheet.height, sheet.width), True)
    for row, top in zip(rows, tops, strict=True):
        for picture, left in zip(row, lefts, strict=False):
            area = np.s_[top : top + picture.height, left : left + picture.width]
            assert np.array_equal(np.asarray(sheet)[area], np.asarray(picture))
            white[area] = False
    assert (np.asarray(sheet)[white] == 255).all()
    with pytest.raises(ValueError, match="rows: expected at least one picture"):
        contact_sheet([[]])


def test_captions_stay_in_their_columns_and_cover_no_picture():
    rows = [[Image.new("RGB", (60, 20), "red"), Image.new("RGB", (40, 20), "blue")]]
    plain, written = (
        contact_sheet(rows),
        contact_sheet(rows, ["one", "W" * 50], [["a name longer than its picture", "b"]]),
    )
    assert written.width == plain.width
    image = np.asarray(written)
    top = int((image == (255, 0, 0)).all(-1).any(1).argmax())
    assert np.array_equal(image[top : top + 20], np.asarray(plain))
    inked = (np.delete(image, np.s_[top : top + 20], 0) < 128).any((0, 2))
    assert inked[:60].any()
    assert inked[60 + GAP :].any()
    assert not inked[60 : 60 + GAP].any()
    broken, joined = (contact_sheet(rows, captions=[[name], ["no row"]]) for name in ("two\nlines", "two lines"))
    assert np.array_equal(np.asarray(broken), np.asarray(joined))
    assert broken.height == written.height - TEXT - GAP  # nothing is kept free for the row that is not there
    alone = np.asarray(contact_sheet(rows, captions=[["W" * 50]]))
    assert alone.shape[1] == plain.width
    assert (alone[20:, 60 : 60 + GAP] < 128).any()  # no caption is in its way


def test_scaling_keeps_the_shape_and_the_cells():
    photo = Image.new("RGB", (640, 320), "green")
    assert fit(photo, 100).size == (100, 50)
    assert fit(Image.new("L", (3, 900)), 90).size == (1, 90)
    cells = Image.fromarray(np.array([[[255, 0, 0], [0, 0, 255]]], np.uint8))
    large = np.asarray(stretch(cells, (30, 10)))
    assert (large[:, :15] == (255, 0, 0)).all()
    assert (large[:, 15:] == (0, 0, 255)).all()
    assert stretch(cells, (1, 1)).getpixel((0, 0)) == (128, 0, 128)  # shrunk cells are averaged


def test_the_outline_is_around_its_cell():
    blank = Image.new("RGB", (120, 60), "gray")
    marked = np.asarray(outline_cell(blank, (3, 6), (1, 4)))
    changed = (marked != np.asarray(blank)).any(-1)
    assert not changed[20:40, 80:100].any()  # nothing of the cell is hidden
    assert changed[18:42, 78:102].sum() == changed.sum() > 0
    assert np.array_equal(np.asarray(blank), np.full((60, 120, 3), 128))  # the picture itself is as it was
