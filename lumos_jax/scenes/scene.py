"""Procedural table-top scenes by index, no files, any index below 2^40.

One to four solids stand on a textured ground under a light. A scene is its ground truth; from it come an image, captions, posed
views and a clip (see `render`). All randomness comes from a counter-based generator keyed by (seed, index), so a scene is the
same on every platform and access is random.
"""

from __future__ import annotations

import collections
import dataclasses
import math

import numpy as np

# Goes into the fingerprint: raise it whenever a picture changes, or runs would resume onto other images.
VERSION = 1
MAX_INDEX = 2**40

KINDS = ("sphere", "box", "cylinder", "cone", "torus")
MATERIALS = ("plain", "stripes", "checker", "dots")
GROUNDS = ("plain", "checker", "stripes", "rings")
COLORS = {
    "red": (0.86, 0.13, 0.13), "orange": (0.96, 0.52, 0.08), "yellow": (0.97, 0.86, 0.14), "green": (0.13, 0.66, 0.22),
    "cyan": (0.10, 0.74, 0.78), "blue": (0.14, 0.28, 0.86), "purple": (0.55, 0.18, 0.76), "pink": (0.96, 0.45, 0.68),
}  # fmt: skip
_GROUND_TONES = ((0.82, 0.78, 0.70), (0.62, 0.66, 0.70), (0.45, 0.52, 0.45), (0.72, 0.60, 0.50), (0.35, 0.37, 0.45))
TABLE_RADIUS = 1.35
FRAME_RADIUS = 1.6  # what the camera keeps in view around the origin
FOV = math.radians(49.1)
CLIP_FRAMES, CLIP_FPS = 49, 24  # what a clip, time 0 to 1, counts as: two seconds
RADIUS = FRAME_RADIUS / math.sin(FOV / 2)
# Where the cameras of posed views stand: above the ground, and around the distance of a scene's own camera.
VIEW_POLAR, VIEW_RADIUS = (math.radians(38), math.radians(70)), (0.9 * RADIUS, 1.15 * RADIUS)


@dataclasses.dataclass(frozen=True)
class Solid:
    """kind, color and material are names; size is the radius in scene units; x, y where it stands; yaw in radians.

    velocity: scene units per clip, for clips with moving solids.
    """

    kind: str
    color: str
    material: str
    size: float
    x: float
    y: float
    yaw: float
    velocity: tuple[float, float]

    @property
    def rgb(self) -> tuple[float, float, float]:
        return COLORS[self.color]


@dataclasses.dataclass(frozen=True)
class Camera:
    """On a sphere around the origin, looking at it: azimuth from +X, polar angle from +Z (radians), radius."""

    azimuth: float
    polar: float
    radius: float


@dataclasses.dataclass(frozen=True)
class Scene:
    """The ground truth of one scene. motion: "camera" or "solids", what a clip moves; turn: radians the camera turns."""

    index: int
    solids: tuple[Solid, ...]
    ground: str
    ground_tone: tuple[float, float, float]
    sky: tuple[float, float, float]
    light: tuple[float, float, float]
    camera: Camera
    motion: str
    turn: float


def make_scene(index: int, *, seed: int = 0) -> Scene:
    """The scene of that number. Raises ValueError: index outside [0, 2^40)."""
    if not 0 <= index < MAX_INDEX:
        raise ValueError(f"scene {index}: scenes have indices from 0 to 2^40 - 1")
    rng = np.random.Generator(np.random.Philox(key=[seed, index]))
    count = int(rng.choice(4, p=(0.3, 0.3, 0.25, 0.15))) + 1
    light_azimuth, light_height = rng.uniform(0, 2 * math.pi), rng.uniform(0.75, 1.25)
    flat = math.cos(light_height)
    tone = _GROUND_TONES[rng.integers(len(_GROUND_TONES))]
    brightness = rng.uniform(0.9, 1.15)
    polar = rng.uniform(math.radians(42), math.radians(66))
    return Scene(
        index=index,
        solids=tuple(_place_solids(rng, count)),
        ground=GROUNDS[rng.integers(len(GROUNDS))],
        ground_tone=tuple(min(c * brightness, 1.0) for c in tone),
        sky=tuple(map(float, rng.uniform((0.45, 0.6, 0.75), (0.75, 0.85, 1.0)))),
        light=(math.cos(light_azimuth) * flat, math.sin(light_azimuth) * flat, math.sin(light_height)),
        camera=Camera(rng.uniform(0, 2 * math.pi), polar, RADIUS),
        motion="camera" if rng.random() < 0.5 else "solids",
        turn=float(rng.choice((-1.0, 1.0)) * rng.uniform(0.6, 1.2)),
    )


def _place_solids(rng: np.random.Generator, count: int) -> list[Solid]:
    """Solids that do not touch: each is tried at random places until it stands free."""
    low, high = {1: (0.6, 0.88), 2: (0.52, 0.78), 3: (0.42, 0.62), 4: (0.36, 0.52)}[count]
    solids: list[Solid] = []
    for _ in range(count):
        size = rng.uniform(low, high)
        # Ends for certain: the size goes towards zero, and a point fits between any solids.
        while True:
            reach = max(TABLE_RADIUS - size, 0.05) if count > 1 else 0.35
            radius, angle = reach * math.sqrt(rng.random()), rng.uniform(0, 2 * math.pi)
            x, y = radius * math.cos(angle), radius * math.sin(angle)
            if all(math.hypot(x - s.x, y - s.y) > 1.04 * (size + s.size) for s in solids):
                break
            size *= 0.985
        heading, speed = rng.uniform(0, 2 * math.pi), rng.uniform(0.5, 1.0)
        velocity = speed * math.cos(heading), speed * math.sin(heading)
        kind, color = KINDS[rng.integers(len(KINDS))], tuple(COLORS)[rng.integers(len(COLORS))]
        material, yaw = MATERIALS[rng.choice(4, p=(0.4, 0.2, 0.2, 0.2))], rng.uniform(0, 2 * math.pi)
        solids.append(Solid(kind, color, material, size, x, y, yaw, velocity))
    return solids


def moved(scene: Scene, time: float) -> Scene:
    """The scene at `time` in [0, 1] of its clip."""
    if time == 0:
        return scene
    if scene.motion == "camera":
        camera = dataclasses.replace(scene.camera, azimuth=scene.camera.azimuth + time * scene.turn)
        return dataclasses.replace(scene, camera=camera)
    solids = []
    for s in scene.solids:
        x, y = (place + time * speed for place, speed in zip((s.x, s.y), s.velocity, strict=True))
        solids.append(dataclasses.replace(s, x=x, y=y, yaw=s.yaw + time * scene.turn))
    return dataclasses.replace(scene, solids=tuple(solids))


_NUMBERS = ("no", "one", "two", "three", "four")
_PLURALS = {"sphere": "spheres", "box": "boxes", "cylinder": "cylinders", "cone": "cones", "torus": "tori"}
_SURFACES = {"plain": "", "stripes": " with stripes", "checker": " with checks", "dots": " with dots"}
_ON_GROUND = {"plain": "a plain", "checker": "a checkered", "stripes": "a striped", "rings": "a ringed"}


def largest(scene: Scene) -> Solid:
    return max(scene.solids, key=lambda solid: solid.size)


def captions(scene: Scene) -> tuple[str, str]:
    """A short caption (counts, colours, kinds) and a long one (sizes, materials, places, ground)."""
    parts, details = [], []
    for (color, kind), count in collections.Counter((solid.color, solid.kind) for solid in scene.solids).items():
        article = "an" if color[0] in "aeiou" else "a"
        parts.append(f"{article} {color} {kind}" if count == 1 else f"{_NUMBERS[count]} {color} {_PLURALS[kind]}")
    for solid in scene.solids:
        size = "large" if solid.size > 0.7 else "small" if solid.size < 0.48 else "medium-sized"
        details.append(f"a {size} {solid.color} {solid.kind}{_SURFACES[solid.material]} {_where(scene, solid)}")
    number = _NUMBERS[len(scene.solids)].capitalize()
    noun = "solid stands" if len(scene.solids) == 1 else "solids stand"
    return _join(parts), f"{number} {noun} on {_ON_GROUND[scene.ground]} ground: {_join(details)}."


def _join(parts: list[str]) -> str:
    return parts[0] if len(parts) == 1 else ", ".join(parts[:-1]) + " and " + parts[-1]


def _where(scene: Scene, solid: Solid) -> str:
    """Where a solid stands as the camera sees it."""
    a = scene.camera.azimuth
    across, depth = -math.sin(a) * solid.x + math.cos(a) * solid.y, -math.cos(a) * solid.x - math.sin(a) * solid.y
    side = "on the left" if across < -0.35 else "on the right" if across > 0.35 else "in the middle"
    return side + (" at the back" if depth > 0.45 else " at the front" if depth < -0.45 else "")
