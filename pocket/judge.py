"""Judges the judge: how often the detector reads painted scenes right, and what it lets pass that it must not.

python -m unipic_run.pocket.judge --pictures 5000
"""

import argparse
import json
import time
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass

import numpy as np
from numpy.random import Generator
from PIL import Image, ImageFilter

from .detector import check, detect
from .edits import KINDS, check_edit, sample_edit
from .painter import paint
from .samples import CATEGORIES, Sample, Split, sample
from .scenes import SIDE, broken, exact


@dataclass(frozen=True)
class Report:
    """Shares of pictures, unless said otherwise: 1 is best of what is found or a true edit, 0 of what is else accepted.

    `found` is the whole scene read right: shape, colour, size, place of each object, and the background.
    """

    pictures: int
    found: float
    found_blurred: float  # after a Gaussian blur of 1 pixel and noise of 6 levels
    wrong_accepted: float  # another prompt's picture of the same category that does not meet this prompt
    worst_category: float  # the same for the category where it is highest
    near_miss_accepted: float  # a picture one edit away from what is asked, in either direction
    ruined_accepted: float  # right pictures under strong blur or noise, and pure noise
    edits_accepted: float  # true results, which must pass
    ms_per_picture: float  # a detection


def judge(pictures: int, seed: int = 0) -> Report:
    """The figures on `pictures` scenes, evenly from all categories and both splits."""
    rng = np.random.default_rng(seed)
    splits: tuple[Split, Split] = ("train", "test")
    samples = [sample(rng, CATEGORIES[i % len(CATEGORIES)], splits[i % 2]) for i in range(pictures)]
    painted = [paint(sample.scene) for sample in samples]
    start = time.perf_counter()
    found = [_found(image, sample) for image, sample in zip(painted, samples, strict=True)]
    took = time.perf_counter() - start
    blurred = [_found(noisy(rng, blur(image, 1.0), 6.0), s) for image, s in zip(painted, samples, strict=True)]
    wrong = {category: list(_wrong(rng, category, samples, painted)) for category in CATEGORIES}
    ruined = [
        bool(check(ruin(rng, i, image), s.spec)) for i, (image, s) in enumerate(zip(painted, samples, strict=True))
    ]
    edits = [sample_edit(rng, KINDS[i % len(KINDS)], splits[i // 6 % 2]) for i in range(pictures // 5)]
    results = [paint(edit.target) for edit in edits]
    near = [bool(check(image, exact(edit.source))) for image, edit in zip(results, edits, strict=True)]
    near += [bool(check_edit(paint(edit.source), edit)) for edit in edits]
    return Report(
        pictures,
        found=_share(found),
        found_blurred=_share(blurred),
        wrong_accepted=_share([accepted for all_of in wrong.values() for accepted in all_of]),
        worst_category=max(map(_share, wrong.values())),
        near_miss_accepted=_share(near),
        ruined_accepted=_share(ruined),
        edits_accepted=_share([bool(check_edit(image, edit)) for image, edit in zip(results, edits, strict=True)]),
        ms_per_picture=1000 * took / pictures,
    )


def _share(outcomes: list[bool]) -> float:
    return sum(outcomes) / max(len(outcomes), 1)


def _found(image: Image.Image, sample: Sample) -> bool:
    seen = detect(image)
    return not seen.faults and seen.scene.look == sample.scene.look


def _wrong(rng: Generator, category: str, samples: list[Sample], painted: list[Image.Image]) -> Iterator[bool]:
    """Whether the detector accepts it, for pictures of a category with another prompt that the true scene breaks."""
    own = [i for i, sample in enumerate(samples) if sample.category == category]
    for i in own:
        j = own[int(rng.integers(len(own)))]
        if broken(samples[j].scene, samples[i].spec):
            yield bool(check(painted[j], samples[i].spec))


def blur(image: Image.Image, sigma: float) -> Image.Image:
    return image.filter(ImageFilter.GaussianBlur(sigma))


def noisy(rng: Generator, image: Image.Image, sigma: float) -> Image.Image:
    levels = np.asarray(image, np.float32) + rng.normal(0, sigma, (SIDE, SIDE, 3)).astype(np.float32)
    return Image.fromarray(levels.clip(0, 255).round().astype(np.uint8))


def ruin(rng: Generator, way: int, image: Image.Image) -> Image.Image:
    """Nothing of this may pass: strong blur, strong noise, noise alone."""
    ways: tuple[Callable[[], Image.Image], ...] = (
        lambda: blur(image, 4.0),
        lambda: blur(image, 8.0),
        lambda: noisy(rng, image, 30.0),
        lambda: noisy(rng, image, 90.0),
        lambda: Image.fromarray(rng.integers(0, 256, (SIDE, SIDE, 3), np.uint8)),
    )
    return ways[way % len(ways)]()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--pictures", type=int, default=5000)
    parser.add_argument("--seed", type=int, default=0)
    options = parser.parse_args()
    print(json.dumps(asdict(judge(options.pictures, options.seed))))


if __name__ == "__main__":
    main()
