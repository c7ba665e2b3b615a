"""A dataset of bean leaves drawn by code, for training without a network.

It replaces the photographs of the `beans` dataset and has its three classes, with the same names and order:

    angular_leaf_spot   brown and tan patches with straight sides, bounded by the veins, in a yellow halo
    bean_rust           many small round reddish-orange pustules, each in a pale halo
    healthy             neither

Only the lesions distinguish the classes. Leaf, veins, yellowing, chewed holes, background and light are drawn from a
random stream that does not depend on the class, the lesions from a second one, so that a seed draws the same leaf in
all three conditions. Lesions shift the mean colour of an image slightly; the light shifts it far more.

Each pixel is computed in the coordinates of the leaf: `along` is 0 at the stalk and 1 at the tip, `across` is the
signed distance from the midrib in leaf lengths. The random numbers do not depend on the size of the image.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import numpy as np
from numpy.random import Generator, default_rng
from PIL import Image, ImageDraw, ImageFilter

from fastvit.errors import InputError

CLASSES = ("angular_leaf_spot", "bean_rust", "healthy")

MIN_SIZE = 16
_BILINEAR, _BICUBIC = Image.Resampling.BILINEAR, Image.Resampling.BICUBIC
_SCENE_STREAM, _SHUFFLE_STREAM, _LESION_STREAM = 0, 1, 2
_MAX_IMAGES = 2**32  # image i of dataset s has the seed s * 2**32 + i

# Areoles are the cells of the net of fine veins. Each leaf half has a lattice of them: rows follow the side veins, two
# per interval between neighbouring veins, and columns are numbered from the midrib.
_ROWS, _COLUMNS = 32, 14
_INTERVALS_BELOW_BASE = 6  # side veins rise towards the tip, so the lowest intervals start below the leaf's base
_AREOLE_WIDTH = 0.045  # in leaf lengths


def draw_leaf(label: str, *, seed: int, size: int = 64) -> Image.Image:
    """Draws one bean leaf.

    Args:
        label: One of `CLASSES`.
        seed: An integer >= 0. The same label and seed draw the same image, at any size up to resampling; the same seed
            with another label draws the same leaf in another condition.
        size: Height and width in pixels, at least 16.

    Returns:
        An RGB image of `size` x `size` pixels.

    Raises:
        InputError: If the label is unknown, the seed negative or the size below 16.
    """
    if label not in CLASSES:
        raise InputError(f"label: expected one of {', '.join(CLASSES)}, got {label!r}")
    _check_at_least("seed", seed, 0)
    _check_at_least("size", size, MIN_SIZE)
    scene_rng = default_rng([_SCENE_STREAM, seed])
    lesion_rng = default_rng([_LESION_STREAM + CLASSES.index(label), seed])

    leaf = _grow_leaf(scene_rng, size)
    colour = _colour_lamina(scene_rng, leaf)  # [pixels, 3]
    if label == "angular_leaf_spot":
        colour = _add_angular_spots(lesion_rng, leaf, colour)
    elif label == "bean_rust":
        colour = _add_pustules(lesion_rng, leaf, colour)
    image = _draw_background(scene_rng, size)  # [size, size, 3]
    opacity = leaf.coverage * (1 - _draw_chewed_holes(scene_rng, leaf))
    image *= 1 - _cast_shadow(scene_rng, leaf, opacity)[..., None]
    opacity = opacity[:, None]
    image[leaf.pixels] += opacity * (colour - image[leaf.pixels])
    image = _apply_light(scene_rng, image)
    return Image.fromarray((image * 255 + 0.5).astype(np.uint8))


def draw_leaves(num_images: int, *, image_size: int = 64, seed: int = 0) -> tuple[np.ndarray, np.ndarray]:
    """Draws a balanced dataset in random order.

    Datasets of different seeds have no image in common, so one can serve for training and another for testing.

    Args:
        num_images: The number of images, from 0 to 2**32.
        image_size: Height and width in pixels, at least 16.
        seed: An integer >= 0.

    Returns:
        Images, uint8 [num_images, image_size, image_size, 3], and labels, int64 [num_images], indices into `CLASSES`.
        The numbers of images of two classes differ by at most one.

    Raises:
        InputError: If the number of images or the seed is out of bounds, or the size is below 16.
    """
    _check_at_least("num_images", num_images, 0)
    _check_at_least("image_size", image_size, MIN_SIZE)
    _check_at_least("seed", seed, 0)
    if num_images > _MAX_IMAGES:
        raise InputError(f"num_images: expected at most {_MAX_IMAGES}, got {num_images}")
    labels = default_rng([_SHUFFLE_STREAM, seed]).permutation(np.arange(num_images, dtype=np.int64) % len(CLASSES))
    images = np.empty((num_images, image_size, image_size, 3), dtype=np.uint8)
    for index, label in enumerate(labels):
        images[index] = np.asarray(draw_leaf(CLASSES[label], seed=int(seed) * _MAX_IMAGES + index, size=image_size))
    return images, labels


def _check_at_least(name: str, value: int, least: int) -> None:
    if isinstance(value, bool) or not isinstance(value, (int, np.integer)) or value < least:
        raise InputError(f"{name}: expected an integer of at least {least}, got {value!r}")


# ---------------------------------------------------------------------------------------------------------------------
# Helpers. Colours are floats in [0, 1]; distances are in leaf lengths unless noted.


def _rgb(*components: int) -> np.ndarray:
    return np.array(components, dtype=np.float32) / 255


def _mix(a: np.ndarray, b: np.ndarray, amount: np.ndarray) -> np.ndarray:
    """Interpolates colours [..., 3]: `a` where `amount` [...] is 0, `b` where it is 1."""
    return a + amount[..., None] * (b - a)


def _ramp(values: np.ndarray, low: float, high: float) -> np.ndarray:
    """0 up to `low`, 1 from `high`, linear in between."""
    return np.clip((values - low) / (high - low), 0, 1)


def _line(distance: np.ndarray, width: np.ndarray | float, pixel: float) -> np.ndarray:
    """Coverage of pixels by a line, from the distance to its middle; lines narrower than a pixel fade."""
    drawn_width = np.maximum(width, pixel)
    return np.clip((drawn_width / 2 - distance) / pixel + 0.5, 0, 1) * (width / drawn_width)


def _noise(rng: Generator, cells: int, size: int) -> np.ndarray:
    """Smooth random field [size, size] with values from 0 to 1 and features of about `size` / `cells` pixels."""
    grid = Image.fromarray(rng.random((cells, cells), dtype=np.float32))
    return np.asarray(grid.resize((size, size), _BICUBIC))


def _colour_from_hsv(hue_degrees: float, saturation: float, value: float) -> np.ndarray:
    """RGB [3] from hue, saturation and value (Smith 1978)."""
    k = (np.array([5.0, 3.0, 1.0]) + hue_degrees / 60) % 6
    return (value - value * saturation * np.clip(np.minimum(k, 4 - k), 0, 1)).astype(np.float32)


def _choose_supersampling(size: int) -> int:
    return 4 if size <= 128 else 2


def _blur(mask: np.ndarray, radius: float) -> np.ndarray:
    """`mask` [size, size] from 0 to 1, Gaussian-blurred; `radius` as a fraction of the image's side."""
    image = Image.fromarray((mask * 255).astype(np.uint8))
    return np.asarray(image.filter(ImageFilter.GaussianBlur(radius * len(mask))), dtype=np.float32) / 255


# ---------------------------------------------------------------------------------------------------------------------
# The leaf


@dataclass(frozen=True)
class _Shape:
    """Position and outline of the leaf; the side of the image is 1."""

    centre: np.ndarray  # [2], x and y
    axis: np.ndarray  # [2], unit vector from the stalk to the tip
    length: float
    half_width: float  # in leaf lengths, as are the other lengths below
    bend: float
    lopsided: float  # one half is broader, as in the outer leaflets of beans
    wave_count: float
    wave_phase: float
    vein_rise: float  # slope of the side veins towards the tip at the midrib
    vein_curl: float  # further bend of the side veins towards the tip
    vein_spacing: float  # distance between side veins
    vein_offsets: np.ndarray  # [2], of the two halves: their veins do not meet at the midrib

    def width(self, along: np.ndarray, side: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """Distance from midrib to margin, and its slope: a round base, widest at a third, an elongated tip.

        `side` is -1 for one leaf half and 1 for the other.
        """
        along = np.clip(along, 1e-3, 1 - 1e-3)
        width = self.half_width * 2.72 * np.sqrt(along) * (1 - along) ** 1.15
        slope = width * (0.5 / along - 1.15 / (1 - along))
        wave = 1 + 0.02 * np.sin(2 * np.pi * self.wave_count * along + self.wave_phase)
        return width * wave * (1 + self.lopsided * side), slope

    def interval(self, along: np.ndarray, across: np.ndarray) -> np.ndarray:
        """A coordinate that is an integer on each side vein and grows by 1 from one vein to the next."""
        from_midrib = np.abs(across)
        foot = along - self.vein_rise * from_midrib - self.vein_curl * from_midrib**2
        return foot / np.float32(self.vein_spacing) + self.vein_offsets[(across > 0).astype(np.intp)]

    def leaf_coordinates(self, size: int) -> tuple[np.ndarray, np.ndarray]:
        """`along` and `across` [size, size] of the centre of each pixel."""
        steps = (np.arange(size) + 0.5) / size
        x = ((steps - self.centre[0]) / self.length).astype(np.float32)[None, :]
        y = ((steps - self.centre[1]) / self.length).astype(np.float32)[:, None]
        cosine, sine = self.axis.astype(np.float32)
        along = x * cosine + y * sine + np.float32(0.5)
        return along, y * cosine - x * sine - np.float32(4 * self.bend) * along * (1 - along)

    def to_image_points(self, along: np.ndarray, across: np.ndarray) -> np.ndarray:
        """Maps leaf coordinates to points [n, 2], x and y: the inverse of `leaf_coordinates`."""
        across = across + 4 * self.bend * along * (1 - along)
        normal = np.array([-self.axis[1], self.axis[0]])
        return self.centre + self.length * ((along[:, None] - 0.5) * self.axis + across[:, None] * normal)


@dataclass(frozen=True)
class _Leaf:
    """The pixels covered by the leaf and its stalk, with one array [pixels] per property."""

    shape: _Shape
    size: int  # of the image, in pixels
    pixel: float  # side of a pixel, in leaf lengths
    pixels: tuple[np.ndarray, ...]  # row and column indices
    coverage: np.ndarray  # share of the pixel that is leaf
    along: np.ndarray
    across: np.ndarray
    depth: np.ndarray  # distance from the margin, positive inside
    main_veins: np.ndarray  # 0 to 1: midrib, side veins and stalk
    between_veins: np.ndarray  # 0 to 1: position between one side vein and the next
    areoles: np.ndarray  # [6, pixels]: indices of the areoles nearby, below 2 * _ROWS * _COLUMNS
    areole_distances: np.ndarray  # [6, pixels]: to their centres


def _grow_leaf(rng: Generator, size: int) -> _Leaf:
    angle = rng.uniform(0, 2 * np.pi)
    shape = _Shape(
        centre=rng.uniform(0.44, 0.56, 2),
        axis=np.array([np.cos(angle), np.sin(angle)]),
        length=rng.uniform(0.8, 1.04),
        half_width=rng.uniform(0.34, 0.44),
        bend=rng.uniform(-0.06, 0.06),
        lopsided=rng.uniform(-0.07, 0.07),
        wave_count=rng.uniform(3, 7),
        wave_phase=rng.uniform(0, 2 * np.pi),
        vein_rise=rng.uniform(0.55, 0.8),
        vein_curl=rng.uniform(0.2, 0.5),
        vein_spacing=rng.uniform(0.11, 0.14),
        vein_offsets=rng.random(2, dtype=np.float32),
    )
    pixel = 1 / (size * shape.length)
    along, across = shape.leaf_coordinates(size)
    width, slope = shape.width(along, np.sign(across))
    depth = np.minimum((width - np.abs(across)) / np.sqrt(1 + slope**2), np.minimum(along, 1 - along))
    stalk = _line(np.abs(across), 0.022, pixel) * (along < 0.02)
    coverage = np.maximum(np.clip(depth / pixel + 0.5, 0, 1), stalk)

    pixels = np.nonzero(coverage)
    along, across, width = along[pixels], across[pixels], width[pixels]
    areoles, areole_distances = _find_areoles(rng, shape, along, across)
    return _Leaf(
        shape=shape,
        size=size,
        pixel=pixel,
        pixels=pixels,
        coverage=coverage[pixels],
        along=along,
        across=across,
        depth=depth[pixels],
        main_veins=np.maximum(_draw_veins(shape, along, across, width, pixel), stalk[pixels]),
        between_veins=shape.interval(along, across) % 1,
        areoles=areoles,
        areole_distances=areole_distances,
    )


def _draw_veins(shape: _Shape, along: np.ndarray, across: np.ndarray, width: np.ndarray, pixel: float) -> np.ndarray:
    """Midrib and side veins, 0 to 1."""
    interval = shape.interval(along, across)
    distance = np.abs(interval - np.round(interval)) * (shape.vein_spacing / math.hypot(1, shape.vein_rise))
    taper = np.clip(1 - np.abs(across) / width, 0.1, 1)
    side_veins = 0.8 * _line(distance, 0.011 * taper, pixel) * (along > 0)
    return np.maximum(side_veins, _line(np.abs(across), 0.006 + 0.014 * np.clip(1 - along, 0, 1), pixel))


def _locate_in_lattice(shape: _Shape, along: np.ndarray, across: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Fractional row and column in the lattice of areoles."""
    row = (shape.interval(along, across) + _INTERVALS_BELOW_BASE) * 2
    return np.clip(row, 1, _ROWS - 2), np.clip(np.abs(across) / _AREOLE_WIDTH + 1, 1, _COLUMNS - 2)


def _find_areoles(
    rng: Generator, shape: _Shape, along: np.ndarray, across: np.ndarray
) -> tuple[np.ndarray, np.ndarray]:
    """Finds the 6 areoles around each pixel: their indices and the distances to their centres, both [6, pixels].

    Cellular noise (Worley 1996) on a lattice that follows the veins. Only areoles between the same two side veins
    count, 2 rows and 3 columns of the lattice, so that no group of areoles crosses a side vein.
    """
    row_jitter, column_jitter = rng.uniform(0.1, 0.9, (2, 2, _ROWS, _COLUMNS)).astype(np.float32)
    middle_rows = (row_jitter + np.arange(_ROWS, dtype=np.float32)[:, None]).reshape(-1)
    middle_columns = (column_jitter + np.arange(_COLUMNS, dtype=np.float32)).reshape(-1)
    row, column = _locate_in_lattice(shape, along, across)
    number = ((across > 0) * _ROWS + row.astype(np.intp)) * _COLUMNS + column.astype(np.intp)
    other_row = np.where(row.astype(np.intp) % 2, -_COLUMNS, _COLUMNS)
    numbers = np.stack([number + step for step in (-1, 0, 1)] + [number + other_row + step for step in (-1, 0, 1)])
    distances = np.hypot(middle_rows[numbers] - row, middle_columns[numbers] - column)
    return numbers, np.float32(_AREOLE_WIDTH) * distances


def _colour_lamina(rng: Generator, leaf: _Leaf) -> np.ndarray:
    """Colours a leaf without lesions, [pixels, 3]: green, veins, yellowing, light and shade."""
    green = _colour_from_hsv(rng.uniform(74, 122), rng.uniform(0.45, 0.75), rng.uniform(0.36, 0.66))
    vein_colour = _mix(green, _rgb(214, 222, 150), np.array(rng.uniform(0.25, 0.55), dtype=np.float32))
    yellow = _colour_from_hsv(rng.uniform(48, 66), rng.uniform(0.5, 0.75), rng.uniform(0.65, 0.85))
    is_yellowing, edge_yellowing = rng.random() < 0.5, rng.uniform(0, 0.6)
    yellow_strength = rng.uniform(0.3, 0.95) if is_yellowing else rng.uniform(0, 0.15)
    light_direction, bulge, fold = rng.uniform(-1, 1), rng.uniform(0.05, 0.16), rng.uniform(-0.12, 0.12)
    patches, mottle, grain = (_noise(rng, cells, leaf.size)[leaf.pixels] for cells in (5, 14, 72))

    colour = np.broadcast_to(green, (len(mottle), 3))
    margin = 1 - _ramp(leaf.depth, 0, 0.12)
    colour = _mix(colour, yellow, yellow_strength * _ramp(patches + edge_yellowing * margin, 0.35, 0.9))
    nearest = np.partition(leaf.areole_distances, 1, axis=0)
    fine_veins = _line((nearest[1] - nearest[0]) / 2, 0.004, leaf.pixel)
    colour = _mix(colour, vein_colour, 0.35 * fine_veins)
    across = leaf.across / leaf.shape.half_width
    shade = (
        1 + bulge * np.sin(2 * np.pi * leaf.between_veins) + fold * np.sign(across) + 0.15 * light_direction * across
    )
    shade += 0.16 * (mottle - 0.5) + 0.16 * (grain - 0.5) - 0.12 * (1 - _ramp(leaf.depth, 0, 0.03))
    shade -= 0.18 * (_line(np.abs(leaf.across - 0.012), 0.02, leaf.pixel))  # the midrib lies in a groove
    return _mix(colour * shade[:, None], vein_colour, leaf.main_veins)


def _draw_chewed_holes(rng: Generator, leaf: _Leaf) -> np.ndarray:
    """Holes eaten by insects, in healthy and sick leaves alike: 0 to 1 per pixel of the leaf."""
    count = int(rng.integers(1, 6)) if rng.random() < 0.35 else 0
    return _draw_spots(rng, leaf, *_place_spots(rng, leaf.shape, count), rng.uniform(0.008, 0.028, count))


def _place_spots(rng: Generator, shape: _Shape, count: int) -> tuple[np.ndarray, np.ndarray]:
    """Draws `count` random positions on the leaf, `along` and `across`, away from midrib and margin."""
    along = rng.beta(1.6, 2.2, count) * 0.86 + 0.04
    side = rng.choice([-1.0, 1.0], count)
    width = shape.width(along, side)[0]
    return along, side * (0.02 + rng.uniform(0, 0.86, count) * np.maximum(width - 0.02, 0))


def _draw_spots(rng: Generator, leaf: _Leaf, along: np.ndarray, across: np.ndarray, radius: np.ndarray) -> np.ndarray:
    """Draws antialiased ellipses of the given radii (in leaf lengths): 0 to 1 per pixel of the leaf."""
    scale = _choose_supersampling(leaf.size)
    side = leaf.size * scale
    stretch = rng.uniform(0.8, 1.25, (len(radius), 2))
    centres = leaf.shape.to_image_points(along, across)
    radii = (radius * leaf.shape.length)[:, None] * stretch
    mask = Image.new("L", (side, side))
    draw = ImageDraw.Draw(mask)
    for left, top, right, bottom in (np.hstack([centres - radii, centres + radii]) * side - 0.5).tolist():
        draw.ellipse((left, top, right, bottom), fill=255)
    return np.asarray(mask.reduce(scale), dtype=np.float32)[leaf.pixels] / 255


# ---------------------------------------------------------------------------------------------------------------------
# The lesions


def _add_angular_spots(rng: Generator, leaf: _Leaf, colour: np.ndarray) -> np.ndarray:
    """Infects groups of neighbouring areoles, so that the patches end at the veins."""
    count = int(rng.integers(4, 20))
    spread = rng.uniform(0.2, 0.75)  # probability that a patch spreads to a neighbouring areole
    brown = _colour_from_hsv(rng.uniform(18, 34), rng.uniform(0.5, 0.75), rng.uniform(0.28, 0.48))
    tan = _colour_from_hsv(rng.uniform(26, 42), rng.uniform(0.15, 0.4), rng.uniform(0.5, 0.72))
    yellow, halo_strength = _rgb(222, 206, 84), rng.uniform(0.5, 0.95)
    grain = _noise(rng, 40, leaf.size)[leaf.pixels]

    infected = np.zeros((2, _ROWS, _COLUMNS), dtype=bool)
    along, across = _place_spots(rng, leaf.shape, count)
    row, column = (place.astype(np.intp) for place in _locate_in_lattice(leaf.shape, along, across))
    half = (across > 0).astype(np.intp)
    infected[half, row, column] = True
    for row_step, column_step in ((0, 1), (0, -1), (1, 0), (1, 1)):
        taken = rng.random(count) < spread
        other_row = np.where(row_step, row ^ 1, row)  # the other row of the interval
        infected[half[taken], other_row[taken], column[taken] + column_step] = True

    is_infected = infected.reshape(-1)[leaf.areoles]
    to_infected = np.where(is_infected, leaf.areole_distances, 1).min(axis=0)
    to_sound = np.where(is_infected, 1, leaf.areole_distances).min(axis=0)
    inside = np.clip((to_sound - to_infected) / 2, -1, _AREOLE_WIDTH) + 0.008 * (grain - 0.5)
    patch = np.clip(inside / leaf.pixel + 0.5, 0, 1)
    colour = _mix(colour, yellow, halo_strength * _draw_halo(leaf, patch, 0.02))
    centre = _ramp(inside, 0.006, 0.024) * _ramp(grain, -0.2, 0.8)
    return _mix(colour, _mix(brown, tan, centre), 0.95 * patch)


def _add_pustules(rng: Generator, leaf: _Leaf, colour: np.ndarray) -> np.ndarray:
    """Scatters small round pustules over the leaf; close ones merge."""
    count = int(rng.integers(30, 130))
    radius = rng.uniform(0.007, 0.013) * rng.lognormal(0, 0.25, count)
    orange = _colour_from_hsv(rng.uniform(14, 26), rng.uniform(0.7, 0.88), rng.uniform(0.5, 0.72))
    pale, halo_strength = _rgb(226, 220, 140), rng.uniform(0.5, 0.9)

    along, across = _place_spots(rng, leaf.shape, count)
    spots = _draw_spots(rng, leaf, along, across, radius)
    shade = 0.75 + 0.5 * _noise(rng, 64, leaf.size)[leaf.pixels]
    colour = _mix(colour, pale, halo_strength * _draw_halo(leaf, spots, 0.01))
    return _mix(colour, orange * shade[:, None], 0.95 * spots)


def _draw_halo(leaf: _Leaf, lesions: np.ndarray, radius: float) -> np.ndarray:
    """A soft border of about `radius` (in leaf lengths) around `lesions` [pixels]."""
    mask = np.zeros((leaf.size, leaf.size), dtype=np.float32)
    mask[leaf.pixels] = lesions
    return np.clip(3 * _blur(mask, radius * leaf.shape.length)[leaf.pixels], 0, 1)


# ---------------------------------------------------------------------------------------------------------------------
# Background and light


def _draw_background(rng: Generator, size: int) -> np.ndarray:
    """Draws soil, sky or foliage out of focus, [size, size, 3]."""
    return (_draw_soil, _draw_sky, _draw_foliage, _draw_foliage)[rng.integers(4)](rng, size)


def _draw_soil(rng: Generator, size: int) -> np.ndarray:
    dark = _colour_from_hsv(rng.uniform(14, 40), rng.uniform(0.25, 0.6), rng.uniform(0.15, 0.35))
    bright = _colour_from_hsv(rng.uniform(14, 45), rng.uniform(0.15, 0.5), rng.uniform(0.45, 0.75))
    clods = 0.45 * _noise(rng, 6, size) + 0.3 * _noise(rng, 20, size) + 0.25 * _noise(rng, 56, size)
    return _mix(dark, bright, _ramp(clods, 0.25, 0.75))


def _draw_sky(rng: Generator, size: int) -> np.ndarray:
    blue = _colour_from_hsv(rng.uniform(200, 218), rng.uniform(0.2, 0.55), rng.uniform(0.65, 0.9))
    white = _colour_from_hsv(rng.uniform(190, 230), rng.uniform(0, 0.1), rng.uniform(0.8, 0.95))
    horizon = np.linspace(rng.uniform(-0.3, 0.1), rng.uniform(0.2, 0.6), size, dtype=np.float32)[:, None]
    clouds = 0.55 * _noise(rng, 5, size) + 0.3 * _noise(rng, 11, size) + 0.15 * _noise(rng, 24, size)
    return _mix(blue, white, _ramp(clouds + horizon, 0.4, 0.9))


def _draw_foliage(rng: Generator, size: int) -> np.ndarray:
    """Draws blurred leaves, some of them yellow or withered, at a small size and enlarges them."""
    side = 48
    image = Image.new(
        "RGB", (side, side), _to_bytes(_colour_from_hsv(rng.uniform(60, 130), 0.5, rng.uniform(0.12, 0.4)))
    )
    draw = ImageDraw.Draw(image)
    steps = np.linspace(0, 2 * np.pi, 12)
    for _ in range(rng.integers(8, 16)):
        is_withered = rng.random() < 0.2
        hue = rng.uniform(20, 60) if is_withered else rng.uniform(70, 130)
        colour = _colour_from_hsv(hue, rng.uniform(0.3, 0.7), rng.uniform(0.25, 0.75))
        angle, radius, centre = rng.uniform(0, np.pi), rng.uniform(6, 14), rng.uniform(0, side, 2)
        ellipse = np.stack([radius * np.cos(steps), radius * 0.6 * np.sin(steps)], axis=1)
        turn = np.array([[np.cos(angle), np.sin(angle)], [-np.sin(angle), np.cos(angle)]])
        draw.polygon((ellipse @ turn + centre).ravel().tolist(), fill=_to_bytes(colour))
    image = image.filter(ImageFilter.GaussianBlur(rng.uniform(1.2, 3.5)))
    image = image.resize((size, size), _BICUBIC)
    return np.asarray(image, dtype=np.float32) / 255


def _to_bytes(colour: np.ndarray) -> tuple[int, ...]:
    return tuple((colour * 255).astype(int).tolist())


def _cast_shadow(rng: Generator, leaf: _Leaf, opacity: np.ndarray) -> np.ndarray:
    """Share of the light that the leaf blocks from the background, [size, size]."""
    offset, strength = rng.uniform(-0.03, 0.03, 2), rng.uniform(0, 0.55)
    mask = np.zeros((leaf.size, leaf.size), dtype=np.float32)
    mask[leaf.pixels] = opacity
    shift_x, shift_y = (offset * leaf.size).tolist()
    shadow = Image.fromarray(strength * _blur(mask, 0.03))
    shadow = shadow.transform(shadow.size, Image.Transform.AFFINE, (1, 0, shift_x, 0, 1, shift_y), _BILINEAR)
    return np.asarray(shadow)


def _apply_light(rng: Generator, image: np.ndarray) -> np.ndarray:
    """Applies exposure, white balance, uneven light and sensor noise to the image; clips to [0, 1]."""
    size = len(image)
    exposure, contrast = rng.uniform(0.7, 1.3), rng.uniform(0.85, 1.15)
    warmth, tint = rng.uniform(-0.12, 0.12), rng.uniform(-0.05, 0.05)
    gains = exposure * np.array([1 + warmth, 1 + tint, 1 - warmth])
    uneven = 0.85 + 0.3 * _noise(rng, 3, size)
    noise = rng.uniform(0, 0.06) * (_noise(rng, 96, size) - 0.5)
    image = image * gains.astype(np.float32) * uneven[..., None] + noise[..., None]
    return np.clip((image - 0.45) * contrast + 0.45, 0, 1)
