"""What can be in a pocket picture, and what a prompt asks of it.

A `Spec` is what a prompt says: groups of objects, perhaps how they stand, perhaps the background. A `Scene` is one
picture, down to the pixel. What the prompt leaves out is free, so one spec is met by many scenes; objects nobody asked
for are not free: a picture holds exactly what its prompt lists.
"""

from dataclasses import dataclass
from itertools import permutations

RGB = tuple[int, int, int]

SIDE = 128  # pixels; the unit of every coordinate below
SHAPES = ("circle", "square", "triangle", "star", "ring", "cross")
# Object colours are 99 levels apart or more (Euclidean, RGB) and 102 from any background, backgrounds 75, so that what
# an autoencoder does to them leaves them tellable. No colour is both an object's and a background's.
COLOURS: dict[str, RGB] = {
    "red": (225, 40, 45),
    "orange": (250, 138, 28),
    "yellow": (250, 232, 60),
    "green": (60, 190, 70),
    "cyan": (65, 215, 230),
    "blue": (45, 85, 235),
    "purple": (145, 45, 190),
    "pink": (245, 105, 185),
}
BACKGROUNDS: dict[str, RGB] = {
    "black": (18, 18, 20),
    "white": (245, 245, 245),
    "gray": (130, 132, 134),
    "navy": (25, 32, 98),
    "brown": (112, 70, 42),
    "beige": (228, 208, 172),
    "teal": (8, 106, 98),
}
SIZES = {"small": (11.5, 12.5), "large": (18.5, 20.0)}  # radius of a circle, from, to; the others look as large
SIZE_BORDER = 15.5
REACH = {
    "circle": 1.0,
    "square": 1.24,
    "triangle": 1.3,
    "star": 1.3,
    "ring": 1.05,
    "cross": 1.23,
}  # furthest point, radii
# Nine places, (column, row). Centres are painted inside a narrow band, so that a small model can learn where things
# stand, and judged by the borders between the bands.
BANDS = ((24.0, 29.0), (61.5, 66.5), (99.0, 104.0))
BORDERS = (47.0, 81.0)
PLACES = {
    "top left": (0, 0),
    "top": (1, 0),
    "top right": (2, 0),
    "left": (0, 1),
    "middle": (1, 1),
    "right": (2, 1),
    "bottom left": (0, 2),
    "bottom": (1, 2),
    "bottom right": (2, 2),
}
RELATIONS = {"left of": (0, -1), "right of": (0, 1), "above": (1, -1), "below": (1, 1)}  # axis, direction
CONVERSE = {"left of": "right of", "right of": "left of", "above": "below", "below": "above"}
APART = 8.0  # pixels between centres along the axis for a relation to hold; painted ones have 10 or more
MOST = 4  # objects in a picture

_PLACE_AT = {cell: name for name, cell in PLACES.items()}


@dataclass(frozen=True)
class Figure:
    """One object as painted or as found; centre, radius in pixels, angle in degrees."""

    shape: str
    colour: str
    x: float
    y: float
    radius: float
    angle: float = 0.0

    @property
    def size(self) -> str:
        return "small" if self.radius < SIZE_BORDER else "large"

    @property
    def place(self) -> str:
        return _PLACE_AT[sum(self.x > b for b in BORDERS), sum(self.y > b for b in BORDERS)]

    @property
    def reach(self) -> float:
        return self.radius * REACH[self.shape]

    @property
    def look(self) -> tuple[str, str, str, str]:
        """What two pictures of one scene agree on."""
        return self.shape, self.colour, self.size, self.place


@dataclass(frozen=True)
class Scene:
    """One picture: its objects, its background (None when the detector cannot name it), and the faint shading on it."""

    figures: tuple[Figure, ...]
    background: str | None
    shade: tuple[float, float] = (0.0, 0.0)  # levels gained from the middle to the right and to the bottom edge

    @property
    def look(self) -> tuple[object, ...]:
        return self.background, *sorted(figure.look for figure in self.figures)


@dataclass(frozen=True)
class Group:
    """`count` objects of one kind; None is free. Also used to point at objects in edits and questions."""

    shape: str | None = None
    colour: str | None = None
    size: str | None = None
    count: int = 1
    place: str | None = None

    def fits(self, figure: Figure) -> bool:
        wanted = (self.shape, self.colour, self.size, self.place)
        return all(want is None or want == got for want, got in zip(wanted, figure.look, strict=True))


@dataclass(frozen=True)
class Spec:
    """What a prompt asks. With a relation, each object of the first of two groups stands so to each of the second."""

    groups: tuple[Group, ...]
    relation: str | None = None
    background: str | None = None

    def __post_init__(self) -> None:
        if self.relation is not None and len(self.groups) != 2:
            raise ValueError(f"{self.relation!r} joins two groups, not {len(self.groups)}")
        if not 1 <= self.total <= MOST:
            raise ValueError(f"{self.total} objects: a scene has 1 to {MOST}")

    @property
    def total(self) -> int:
        return sum(group.count for group in self.groups)


def exact(scene: Scene) -> Spec:
    """The spec that says everything: each object with its place, and the background."""
    groups = tuple(Group(f.shape, f.colour, f.size, 1, f.place) for f in scene.figures)
    return Spec(groups, None, scene.background)


def stands(a: Figure, relation: str, b: Figure, apart: float = APART) -> bool:
    axis, direction = RELATIONS[relation]
    return direction * ((a.x, a.y)[axis] - (b.x, b.y)[axis]) >= apart


def all_stand(first: tuple[Figure, ...], relation: str, second: tuple[Figure, ...], apart: float = APART) -> bool:
    return all(stands(a, relation, b, apart) for a in first for b in second)


def broken(scene: Scene, spec: Spec) -> tuple[str, ...]:
    """What keeps the scene from being a correct picture of the spec; empty when it is one."""
    reasons = []
    if spec.background not in (None, scene.background):
        reasons.append(f"background is {scene.background}, not {spec.background}")
    if len(scene.figures) != spec.total:
        return (*reasons, f"{len(scene.figures)} objects, not {spec.total}")
    slots = [group for group in spec.groups for _ in range(group.count)]
    matches = [
        order
        for order in permutations(scene.figures)
        if all(group.fits(figure) for group, figure in zip(slots, order, strict=True))
    ]
    if not matches:
        looks = "; ".join(" ".join(figure.look) for figure in scene.figures)
        return (*reasons, f"objects do not match: {looks}")
    if spec.relation is not None:
        cut = spec.groups[0].count
        if not any(all_stand(order[:cut], spec.relation, order[cut:]) for order in matches):
            reasons.append(f"nothing stands {spec.relation} the other as asked")
    return tuple(reasons)
