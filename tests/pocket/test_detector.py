"""The detector is judged before it may judge: right pictures pass, wrong and ruined ones do not."""

import numpy as np
import pytest
from PIL import Image
from unipic_run.pocket.detector import check, detect
from unipic_run.pocket.judge import judge
from unipic_run.pocket.painter import paint, stencil
from unipic_run.pocket.pieces import pieces
from unipic_run.pocket.samples import sample
from unipic_run.pocket.scenes import BACKGROUNDS, COLOURS, SHAPES, SIDE, SIZES, Figure, Group, Scene, Spec


def test_it_reads_painted_scenes_and_refuses_wrong_and_ruined_ones():
    report = judge(400)  # 5000: python -m unipic_run.pocket.judge
    assert report.found >= 0.995 and report.found_blurred >= 0.99 and report.edits_accepted >= 0.99, report
    assert report.wrong_accepted < 0.01 and report.worst_category < 0.01 and report.near_miss_accepted < 0.01, report
    assert report.ruined_accepted == 0, report


@pytest.mark.parametrize("shape", SHAPES)
def test_every_colour_and_size_is_read_on_every_background(shape):
    for ground in BACKGROUNDS:
        for colour in COLOURS:
            figures = (Figure(shape, colour, 36, 40, 12, 7), Figure(shape, colour, 88, 84, 20, -9))
            seen = detect(paint(Scene(figures, ground)))
            assert not seen.faults and seen.scene.look == Scene(figures, ground).look
            for figure, found in zip(figures, seen.scene.figures, strict=True):
                assert np.allclose((found.x, found.y, found.radius), (figure.x, figure.y, figure.radius), atol=0.6)


def test_a_larger_picture_is_read_too():
    one = sample(np.random.default_rng(2), "scene", "train")
    assert check(paint(one.scene).resize((2 * SIDE, 2 * SIDE), Image.Resampling.BICUBIC), one.spec)


def blotched(draw):
    """A red circle on black with something painted over it."""
    pixels = np.array(paint(Scene((Figure("circle", "red", 64, 64, 20),), "black")))
    draw(pixels)
    return detect(pixels).faults


def test_what_is_not_of_this_world_is_a_fault():
    def cut(pixels):
        pixels[64:] = BACKGROUNDS["black"]

    def two_colours(pixels):
        right = pixels[:, 64:]
        right[right[..., 0] > 120] = COLOURS["blue"]

    def unnamed(pixels):
        pixels[pixels[..., 0] > 120] = (150, 150, 90)

    def fragment(pixels):
        pixels[10:18, 10:18] = COLOURS["red"]

    def other_ground(pixels):
        pixels[pixels.sum(2) < 120] = (130, 0, 130)

    def split_ground(pixels):
        pixels[:, :40] = BACKGROUNDS["white"]

    assert not blotched(lambda pixels: None)
    for draw, fault in {
        cut: "no known shape",
        two_colours: "more than one colour",
        unnamed: "colour without a name",
        fragment: "fragment",
        other_ground: "background without a name",
        split_ground: "uneven background",
    }.items():
        assert any(fault in found for found in blotched(draw)), (fault, blotched(draw))


def test_sizes_between_and_beyond_are_not_taken():
    assert not detect(paint(Scene((Figure("square", "red", 64, 64, 20),), "white"))).faults
    assert any(
        "neither" in fault for fault in detect(paint(Scene((Figure("square", "red", 64, 64, 30),), "white"))).faults
    )


def test_a_verdict_says_why():
    image = paint(Scene((Figure("circle", "red", 30, 30, 12), Figure("star", "blue", 90, 30, 12)), "teal"))
    red, star = Group("circle", "red"), Group("star")
    assert check(image, Spec((red, star), "left of")) and not check(image, Spec((red, star), "left of")).reasons
    assert check(image, Spec((red, star), "right of")).reasons == ("nothing stands right of the other as asked",)
    assert "background is teal, not gray" in check(image, Spec((red, star), None, "gray")).reasons
    assert "2 objects, not 1" in check(image, Spec((red,))).reasons
    assert not check(image, Spec((red, Group("star", "green"))))


def flooded(mask):
    """Sizes of the 4-connected pieces, the slow way."""
    left, sizes = {tuple(at) for at in np.argwhere(mask).tolist()}, []
    while left:
        todo, size = [left.pop()], 0
        while todo:
            row, column = todo.pop()
            size += 1
            for near in ((row + 1, column), (row - 1, column), (row, column + 1), (row, column - 1)):
                if near in left:
                    left.remove(near)
                    todo.append(near)
        sizes.append(size)
    return sorted(sizes)


def test_pieces_are_the_connected_ones():
    rng = np.random.default_rng(0)
    for density in (0.0, 0.3, 0.5, 0.6, 0.8, 1.0):
        mask = rng.random((37, 53)) < density
        found = pieces(mask)
        assert sorted(piece.area for piece in found) == flooded(mask)
        for piece in found:
            assert piece.mask.sum() == piece.area and (mask[piece.window] == (piece.mask | piece.others)).all()


@pytest.mark.parametrize("shape", SHAPES)
def test_a_stencil_is_smooth_and_stands_where_it_should(shape):
    for radius in (*SIZES["small"], *SIZES["large"]):
        figure = Figure(shape, "red", 60.3, 55.8, radius, 10.0)
        coverage, (left, top) = stencil(figure)
        levels = np.asarray(coverage, float) / 255
        rows, columns = np.mgrid[: levels.shape[0], : levels.shape[1]] + 0.5
        centre = (columns * levels).sum() / levels.sum() + left, (rows * levels).sum() / levels.sum() + top
        assert np.allclose(centre, (figure.x, figure.y), atol=0.1)
        reach = np.hypot(columns + left - figure.x, rows + top - figure.y)[levels > 0.5].max()
        assert figure.reach - 2.5 <= reach <= figure.reach + 0.5
        assert levels[[0, -1]].max() == levels[:, [0, -1]].max() == 0 < ((levels > 0) & (levels < 1)).sum()
