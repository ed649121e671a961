"""Rendering of scenes: analytic ray casting in NumPy, one bounding rectangle per solid, float32.

Coordinates: Z up, ground z = 0, camera looking at the origin. World-to-camera matrices are 3x4 [R | t] with x right, y down,
z forward, so that the camera's centre is -R^T t.
"""

from __future__ import annotations

import functools
import math

import numpy as np

from lumos_jax.scenes.scene import FOV, Camera, Scene, Solid, moved

SUPERSAMPLE = 2
TORUS_MINOR, TORUS_MAJOR = 0.32, 0.68  # of a torus's size
_AMBIENT, _DIFFUSE, _SPECULAR = 0.42, 0.68, 0.35
FAR = np.float32(1e9)
_FOG_START, _FOG_END = 9.0, 20.0  # distances over which the ground fades into the sky


def camera_matrix(camera: Camera) -> np.ndarray:
    """World-to-camera matrix (3, 4) float64."""
    sin, cos = math.sin(camera.polar), math.cos(camera.polar)
    centre = camera.radius * np.array([sin * math.cos(camera.azimuth), sin * math.sin(camera.azimuth), cos])
    forward = -centre / np.linalg.norm(centre)
    x, y, z = map(float, forward)
    right = (-math.sin(camera.azimuth), math.cos(camera.azimuth), 0.0)
    down = (y * right[2] - z * right[1], z * right[0] - x * right[2], x * right[1] - y * right[0])  # forward x right
    rotation = np.array([right, down, (x, y, z)])
    return np.concatenate([rotation, (-rotation @ centre)[:, None]], axis=1)


@functools.lru_cache(maxsize=8)
def _pixel_plane(height: int, width: int) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Camera-space x, y of each ray at depth 1, and 1 / length; (height, width) float32 each. FOV is the shorter side's."""

    def steps(side):
        reach = np.float32(math.tan(FOV / 2) * (side / min(height, width)))
        return ((np.arange(side, dtype=np.float32) + 0.5) / side * 2 - 1) * reach

    x, y = np.meshgrid(steps(width), steps(height))
    return x, y, 1 / np.sqrt(x * x + y * y + 1)


def render(scene: Scene, size: int | tuple[int, int], *, camera: Camera | None = None, time: float = 0.0) -> np.ndarray:
    """A picture (size, size, 3) or (height, width, 3) uint8.

    Args:
      scene: see `make_scene`.
      size: side in pixels, or (height, width): the longer side sees more than the scene's table.
      camera: another camera than the scene's own.
      time: in [0, 1] of the scene's clip.
    """
    scene = moved(scene, time)
    matrix = camera_matrix(camera or scene.camera)
    height, width = (size, size) if isinstance(size, int) else size
    rays, centre = cast(matrix, height * SUPERSAMPLE, width * SUPERSAMPLE)
    colour, depth = _ground(scene, rays, centre)
    owner = cover(scene, matrix, rays, centre, depth)
    for number, solid in enumerate(scene.solids):
        at = np.nonzero(owner == number)
        if len(at[0]):
            direction = [ray[at] for ray in rays]
            colour[:, at[0], at[1]] = _shade(scene, solid, direction, depth[at], centre)
    rows = colour.reshape(3, height, SUPERSAMPLE, width, SUPERSAMPLE)
    # The mean over both dims of 2, in the order in which NumPy adds, ten times as fast as its `mean`.
    top, bottom = (rows[:, :, row, :, 0] + rows[:, :, row, :, 1] for row in range(SUPERSAMPLE))
    blocks = (top + bottom) * np.float32(0.25)
    return (np.clip(blocks, 0, 1) * 255 + 0.5).astype(np.uint8).transpose(1, 2, 0)


def cast(matrix: np.ndarray, height: int, width: int) -> tuple[list[np.ndarray], np.ndarray]:
    """The unit ray of each pixel, world x, y, z (height, width) float32 each, and the camera's centre (3,)."""
    u, v, inverse = _pixel_plane(height, width)
    right, down, forward = (row.astype(np.float32) for row in matrix[:, :3])
    rays = [(u * right[i] + v * down[i] + forward[i]) * inverse for i in range(3)]
    return rays, -matrix[:, :3].T @ matrix[:, 3]


def cover(scene: Scene, matrix: np.ndarray, rays, centre, depth: np.ndarray) -> np.ndarray:
    """Which solid each pixel shows, -1 for none; `depth` (height, width), that of the ground, becomes that of what is seen."""
    owner = np.full(depth.shape, -1, np.int8)
    for number, solid in enumerate(scene.solids):
        box = _rectangle(solid, matrix, *depth.shape)
        if box is None:
            continue
        t = _intersect(solid, [ray[box] for ray in rays], centre)
        nearer = t < depth[box]
        depth[box] = np.where(nearer, t, depth[box])
        owner[box] = np.where(nearer, np.int8(number), owner[box])
    return owner


def _rectangle(solid: Solid, matrix: np.ndarray, height: int, width: int) -> tuple[slice, slice] | None:
    """Pixels that a sphere around the solid can cover."""
    radius = solid.size * 1.45
    x, y, z = matrix[:, :3] @ np.array([solid.x, solid.y, solid.size * 0.8]) + matrix[:, 3]
    if z <= radius:
        return (slice(0, height), slice(0, width))
    scale = min(height, width) / (2 * math.tan(FOV / 2))
    reach = radius / (z - radius) * scale
    column, row = x / z * scale + width / 2, y / z * scale + height / 2
    rows = slice(max(int(row - reach), 0), min(int(row + reach) + 2, height))
    columns = slice(max(int(column - reach), 0), min(int(column + reach) + 2, width))
    return (rows, columns) if rows.start < rows.stop and columns.start < columns.stop else None


def _local(solid: Solid, rays, centre):
    """Rays and camera in the solid's frame: turned by its yaw, the origin on the ground below its middle."""
    cos, sin = np.float32(math.cos(solid.yaw)), np.float32(math.sin(solid.yaw))
    x, y, z = rays
    ox, oy = centre[0] - solid.x, centre[1] - solid.y
    origin = (float(cos * ox + sin * oy), float(cos * oy - sin * ox), float(centre[2]))
    return (cos * x + sin * y, cos * y - sin * x, z), origin


def _nearest_root(a, half_b, c):
    """Smaller root of a t^2 + 2 half_b t + c, FAR where there is none."""
    disc = half_b * half_b - a * c
    return np.where(disc > 0, (-half_b - np.sqrt(np.maximum(disc, 0))) / a, FAR)


def _intersect(solid: Solid, rays, centre) -> np.ndarray:
    """Distance along each ray, FAR where it misses. The camera is outside and above, so undersides are left out."""
    (x, y, z), (ox, oy, oz) = _local(solid, rays, centre)
    r = solid.size
    if solid.kind == "sphere":
        oz -= r
        return _nearest_root(np.float32(1), ox * x + oy * y + oz * z, ox * ox + oy * oy + oz * oz - r * r)
    if solid.kind == "box":
        h = r * 0.78
        near, far = np.full_like(x, -FAR), np.full_like(x, FAR)
        for o, d, middle in ((ox, x, 0.0), (oy, y, 0.0), (oz, z, h)):
            inv = 1 / np.where(np.abs(d) < 1e-6, np.float32(1e-6), d)
            t1, t2 = (middle - h - o) * inv, (middle + h - o) * inv
            near, far = np.maximum(near, np.minimum(t1, t2)), np.minimum(far, np.maximum(t1, t2))
        return np.where(near < far, near, FAR)
    if solid.kind == "cylinder":
        radius, height = r * 0.72, r * 1.7
        flat = x * x + y * y
        t = _nearest_root(np.maximum(flat, 1e-9), ox * x + oy * y, ox * ox + oy * oy - radius * radius)
        level = oz + t * z
        t = np.where((level >= 0) & (level <= height), t, FAR)
        top = (height - oz) / z
        tx, ty = ox + top * x, oy + top * y
        return np.where((tx * tx + ty * ty <= radius * radius) & (top > 0), np.minimum(t, top), t)
    if solid.kind == "cone":
        height, slope = r * 1.9, np.float32(0.95 / 1.9)
        oz -= height
        k = slope * slope
        a = x * x + y * y - k * z * z
        a = np.where(np.abs(a) < 1e-7, np.float32(1e-7), a)
        half_b, c = ox * x + oy * y - k * oz * z, ox * ox + oy * oy - k * oz * oz
        root = np.sqrt(np.maximum(half_b * half_b - a * c, 0))
        best = np.full_like(x, FAR)
        for t in ((-half_b - root) / a, (-half_b + root) / a):
            level = oz + t * z
            best = np.where((level <= 0) & (level >= -height) & (t > 0) & (t < best), t, best)
        return np.where(half_b * half_b - a * c > 0, best, FAR)
    return _torus(r, (x, y, z), (ox, oy, oz))


def _torus(r: float, direction, origin) -> np.ndarray:
    """Sphere tracing inside the torus's bounding sphere, on the rays that meet it."""
    x, y, z = direction
    ox, oy, oz = origin
    major, minor = r * TORUS_MAJOR, r * TORUS_MINOR
    oz -= minor
    start = _nearest_root(np.float32(1), ox * x + oy * y + oz * z, ox * ox + oy * oy + oz * oz - r * r)
    at = np.nonzero(start < FAR)
    rays, t = np.stack([x[at], y[at], z[at]]), start[at]
    origins = np.array([[ox], [oy], [oz]], np.float32)

    def from_ring(t: np.ndarray) -> np.ndarray:
        points = origins + t * rays
        x2, y2, z2 = points * points
        ring = np.sqrt(x2 + y2) - major
        return np.sqrt(ring * ring + z2)

    for _ in range(14):
        t = t + from_ring(t) - minor
    start[at] = np.where(from_ring(t) - minor < 0.02 * r, t, FAR)
    return start


def _shade(scene: Scene, solid: Solid, rays, t: np.ndarray, centre) -> np.ndarray:
    """Colours (3, P) of a solid's visible points."""
    (x, y, z), (ox, oy, oz) = _local(solid, rays, centre)
    px, py, pz = ox + t * x, oy + t * y, oz + t * z
    r = solid.size
    nx, ny, nz = _normal(solid, px, py, pz)
    tone = _material(solid, px / r, py / r, pz / r)
    cos, sin = np.float32(math.cos(solid.yaw)), np.float32(math.sin(solid.yaw))
    lx, ly, lz = scene.light
    light = (float(cos * lx + sin * ly), float(cos * ly - sin * lx), lz)
    lambert = np.maximum(nx * light[0] + ny * light[1] + nz * light[2], 0)
    hx, hy, hz = light[0] - x, light[1] - y, light[2] - z
    half = np.maximum((nx * hx + ny * hy + nz * hz) / np.sqrt(hx * hx + hy * hy + hz * hz), 0)
    for _ in range(5):  # to the 32nd power, by squaring: exact on every platform
        half = half * half
    contact = np.minimum(0.75 + 0.5 * pz / r, 1)  # darker near the ground
    bright = (_AMBIENT + 0.12 * nz + _DIFFUSE * lambert) * contact
    return np.stack([channel * tone * bright + _SPECULAR * half for channel in solid.rgb])


def _normal(solid: Solid, px, py, pz):
    r = solid.size
    if solid.kind == "sphere":
        return px / r, py / r, (pz - r) / r
    if solid.kind == "box":
        h = r * 0.78
        ax, ay, az = np.abs(px), np.abs(py), np.abs(pz - h)
        on_x, on_y = (ax >= ay) & (ax >= az), (ay > ax) & (ay >= az)
        return np.where(on_x, np.sign(px), 0), np.where(on_y, np.sign(py), 0), np.where(on_x | on_y, 0, 1.0)
    if solid.kind == "cylinder":
        top = pz > r * 1.7 - 1e-3 * r
        radius = r * 0.72
        return np.where(top, 0, px / radius), np.where(top, 0, py / radius), np.where(top, 1.0, 0.0)
    if solid.kind == "cone":
        slope = 0.95 / 1.9
        flat = np.sqrt(px * px + py * py) + 1e-6
        scale = 1 / math.sqrt(1 + slope * slope)
        return px / flat * scale, py / flat * scale, np.full_like(px, slope * scale)
    flat = np.sqrt(px * px + py * py) + 1e-6
    pull = 1 - r * TORUS_MAJOR / flat
    minor = r * TORUS_MINOR
    return px * pull / minor, py * pull / minor, (pz - minor) / minor


def _material(solid: Solid, x, y, z) -> np.ndarray:
    """Tone of the pattern at points in units of the solid's size: 1, or darker."""
    if solid.material == "stripes":
        dark = np.floor(z * 3.2) % 2 == 1
    elif solid.material == "checker":
        dark = (np.floor(x * 2.2 + 20.5) + np.floor(y * 2.2 + 20.5) + np.floor(z * 2.2)) % 2 == 1
    elif solid.material == "dots":
        fx, fy, fz = (c * 2.4 - np.floor(c * 2.4) - 0.5 for c in (x + 10, y + 10, z))
        dark = fx * fx + fy * fy + fz * fz < 0.13
    else:
        return np.ones_like(x)
    return np.where(dark, np.float32(0.48), np.float32(1))


def _ground(scene: Scene, rays, centre) -> tuple[np.ndarray, np.ndarray]:
    """Colours (3, height, width) of ground and sky, and the distance to the ground (FAR for sky)."""
    x, y, z = rays
    t = ground_depth(z, centre)
    gx, gy = (np.float32(centre[0]) + t * x), (np.float32(centre[1]) + t * y)
    shade = _pattern(scene.ground, gx, gy) * _shadows(scene, gx, gy)
    lit = np.float32(_AMBIENT + 0.12 + _DIFFUSE * scene.light[2])
    fog = np.clip((t - _FOG_START) / (_FOG_END - _FOG_START), 0, 1)
    tones = zip(scene.ground_tone, scene.sky, strict=True)
    colours = np.stack([ground * lit * shade * (1 - fog) + sky * fog for ground, sky in tones])
    return colours.astype(np.float32), t.astype(np.float32)


def ground_depth(z: np.ndarray, centre: np.ndarray) -> np.ndarray:
    """Distance to the ground along rays of this slope; FAR for sky."""
    return np.where(z < -1e-4, -centre[2].astype(np.float32) / np.minimum(z, -1e-4), FAR)


def _pattern(ground: str, x, y) -> np.ndarray:
    if ground == "plain":
        return np.ones_like(x)
    if ground == "checker":
        dark = (np.floor(x * 1.3) + np.floor(y * 1.3)) % 2 == 1
    elif ground == "stripes":
        dark = np.floor((x + y) * 1.2) % 2 == 1
    else:
        dark = np.floor(np.sqrt(x * x + y * y) * 1.5) % 2 == 1
    return np.where(dark, np.float32(0.78), np.float32(1))


def _shadows(scene: Scene, x, y) -> np.ndarray:
    """Soft shadows on the ground: how close the ray to the light passes by each solid's middle, relative to its size."""
    result = np.ones_like(x)
    lx, ly, lz = (np.float32(c) for c in scene.light)
    for solid in scene.solids:
        height = solid.size * (TORUS_MINOR if solid.kind == "torus" else 0.8)
        radius = solid.size * (0.95 if solid.kind in ("sphere", "torus", "box") else 0.8)
        cx, cy = np.float32(solid.x) - x, np.float32(solid.y) - y
        along = np.maximum(cx * lx + cy * ly + np.float32(height) * lz, 0)
        gap = (cx * cx + cy * cy + np.float32(height * height) - along * along) / np.float32(radius * radius)
        result = result * np.clip(np.float32(0.25) + np.float32(0.8) * (gap - np.float32(0.35)), 0.42, 1)
    return result
