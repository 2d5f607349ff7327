"""Drawn pictures with the names of what is drawn at every pixel.

A picture is a ground with shapes over it. Each is filled with a texture in colours of its own; then come light, blur
and noise. What must be named is the texture and the outline; colours, light, position, size and direction are chance.
"""

from dataclasses import dataclass

import cv2
import numpy as np

from models.offline_weights.outlines import OUTLINES
from models.offline_weights.textures import SIDE, TEXTURES, canvas

LIFETIME = 24  # batches until a canvas is drawn anew
PLAIN = 0.2  # part of the regions that take the smoothest texture
GROUND = 0  # outline's name where there is no shape; OUTLINES[i] is i + 1
SHIFT = 4  # cv2 takes coordinates in 1/16 pixels


@dataclass(frozen=True)
class Batch:
    """Pictures and the names of what they show."""

    pictures: np.ndarray  # (N, S, S, 3) uint8 RGB
    textures: np.ndarray  # (N, S, S) uint8, index into TEXTURES
    outlines: np.ndarray  # (N, S, S) uint8, GROUND or 1 + index into OUTLINES


class Artist:
    """Draws batches; a batch depends on the seed, the size and its number only, whatever was drawn before.

    Drawing a canvas of texture takes longer than cutting a region from it, so canvases are kept for LIFETIME batches.
    """

    def __init__(self, seed: int, size: int) -> None:
        self._seed, self._size = seed, size
        self._canvases: dict[int, tuple[int, np.ndarray]] = {}  # texture: its generation and canvas

    def batch(self, number: int, count: int) -> Batch:
        """Draw `count` pictures of the batch with this number, from 0."""
        rng = np.random.default_rng([self._seed, 0, number])
        shape = (count, self._size, self._size)
        batch = Batch(np.empty((*shape, 3), np.uint8), np.empty(shape, np.uint8), np.empty(shape, np.uint8))
        for i in range(count):
            batch.pictures[i], batch.textures[i], batch.outlines[i] = self._picture(rng, number)
        return batch

    def _picture(self, rng: np.random.Generator, number: int) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        texture = _any_texture(rng)
        picture = self._filling(rng, number, texture)
        textures = np.full((self._size, self._size), texture, np.uint8)
        outlines = np.full((self._size, self._size), GROUND, np.uint8)
        for _ in range(rng.integers(1, 8)):
            texture, outline = _any_texture(rng), int(rng.integers(len(OUTLINES)))
            mask = self._mask(rng, outline)
            cover = np.float32(mask)[..., None] * np.float32(rng.uniform(0.6, 1.0) / 255)  # stains let the ground shine
            picture += cover * (self._filling(rng, number, texture) - picture)
            textures[mask > 127] = texture
            outlines[mask > 127] = outline + 1
        return _photograph(rng, picture), textures, outlines

    def _filling(self, rng: np.random.Generator, number: int, texture: int) -> np.ndarray:
        """A cut from a canvas in random colours, (S, S, 3) float32 in [0, 1]."""
        angle, zoom, mirror = rng.uniform(0, 2 * np.pi), rng.uniform(0.8, 1.25), rng.choice([-1, 1])
        turn = zoom * np.array([[mirror * np.cos(angle), -np.sin(angle)], [mirror * np.sin(angle), np.cos(angle)]])
        middle = rng.uniform(SIDE * 0.3, SIDE * 0.7, 2)
        affine = np.column_stack([turn, middle - turn @ [self._size / 2, self._size / 2]])
        cut = cv2.warpAffine(
            self._canvas(number, texture),
            affine,
            (self._size, self._size),
            flags=cv2.INTER_LINEAR | cv2.WARP_INVERSE_MAP,
            borderMode=cv2.BORDER_REFLECT_101,
        )
        return _palette(rng)[cut]

    def _canvas(self, number: int, texture: int) -> np.ndarray:
        generation = (number + texture) // LIFETIME  # not all of them are drawn anew in the same batch
        kept, drawn = self._canvases.get(texture, (None, None))
        if kept != generation:
            drawn = canvas(TEXTURES[texture], np.random.default_rng([self._seed, 1, texture, generation]))
            self._canvases[texture] = generation, drawn
        return drawn

    def _mask(self, rng: np.random.Generator, outline: int) -> np.ndarray:
        """The outline somewhere, (S, S) uint8, 255 inside; its radius is from 1/16 to 1/2 of the picture's side."""
        radius = self._size * 2 ** rng.uniform(-4, -1)
        angle = rng.uniform(0, 2 * np.pi)
        turn = radius * np.array([[np.cos(angle), np.sin(angle)], [-np.sin(angle), np.cos(angle)]])
        middle = rng.uniform(0, self._size, 2)
        polygons = [np.round((points @ turn + middle) * 2**SHIFT).astype(np.int32) for points in OUTLINES[outline](rng)]
        mask = np.zeros((self._size, self._size), np.uint8)
        return cv2.fillPoly(mask, polygons, 255, cv2.LINE_AA, SHIFT)


def _any_texture(rng: np.random.Generator) -> int:
    return 0 if rng.uniform() < PLAIN else int(rng.integers(1, len(TEXTURES)))


def _palette(rng: np.random.Generator) -> np.ndarray:
    """Colours (256, 3) float32 in [0, 1] for the levels of a canvas: from one colour to another, mostly dull ones."""
    colour = rng.uniform(0, 1) + rng.uniform(0, 0.4) * rng.uniform(-1, 1, 3)
    contrast = rng.uniform(0.05, 0.9) * rng.choice([-1, 1])
    other = colour + contrast * (1 + rng.uniform(0, 0.6) * rng.uniform(-1, 1, 3))
    level = np.linspace(0, 1, 256)[:, None] ** rng.uniform(0.6, 1.7)
    return np.clip(colour + level * (other - colour), 0, 1).astype(np.float32)


def _photograph(rng: np.random.Generator, picture: np.ndarray) -> np.ndarray:
    """Uneven light, a lens that may be out of focus, a sensor with noise: (S, S, 3) float in [0, 1] -> uint8."""
    size = picture.shape[:2]
    strength = rng.uniform(0, 0.5)
    light = rng.uniform(1 - strength, 1 + strength, (3, 3)).astype(np.float32)
    picture = picture * cv2.resize(light, size, interpolation=cv2.INTER_CUBIC)[..., None]
    if rng.uniform() < 0.6:
        picture = cv2.GaussianBlur(picture, (0, 0), rng.uniform(0.3, 1.4))
    deviation = np.float32(0.06 * rng.uniform() ** 2)
    picture += deviation * rng.standard_normal(picture.shape, np.float32)
    return np.uint8(np.clip(picture, 0, 1) * 255 + 0.5)
