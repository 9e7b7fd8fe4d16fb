"""The video that `m2f-video demo` renders and segments: textured shapes moving over a textured ground."""

import numpy as np

_RADII = (0.16, 0.2, 0.13)  # of the shorter side


def render_demo_video(frames: int = 16, height: int = 180, width: int = 320, seed: int = 0) -> np.ndarray:
    """A disc, a square and a triangle crossing each other.

    Returns:
        uint8 (T, H, W, 3), RGB; the same for the same arguments.
    """
    random = np.random.default_rng(seed)
    y, x = np.mgrid[:height, :width].astype(np.float64)
    ground = 90 + 25 * np.sin(x / 17) * np.cos(y / 23)
    ground = np.stack((ground, ground + 15, ground + 5), -1) + random.normal(0, 6, (height, width, 3))
    colors = random.uniform(60, 255, (len(_RADII), 3))
    starts, ends = random.uniform(0.2, 0.8, (2, len(_RADII), 2)) * (height, width)

    video = np.empty((frames, height, width, 3), np.uint8)
    for frame in range(frames):
        image = ground.copy()
        for index, radius in enumerate(_RADII):
            centre_y, centre_x = starts[index] + (ends[index] - starts[index]) * frame / max(frames - 1, 1)
            dy, dx = (y - centre_y) / (radius * height), (x - centre_x) / (radius * height)
            inside = (np.hypot(dy, dx) < 1, np.maximum(abs(dy), abs(dx)) < 1, (abs(dy) < 1) & (2 * abs(dx) < 1 + dy))
            stripes = 1 + 0.2 * np.sin(6 * (dx + dy))
            image = np.where(inside[index][..., None], colors[index] * stripes[..., None], image)
        video[frame] = image.clip(0, 255)
    return video
