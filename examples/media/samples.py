"""Sample pictures and recordings, the same on every machine: noisy scenes, and beats over a chord."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import soundfile
from PIL import Image, ImageDraw

PICTURE_SIZE = (3000, 2000)
RATE = 16_000
SECONDS = 20


def write(directory: Path, count: int) -> Path:
    """Write that many files, two pictures to each recording; return the directory."""
    directory.mkdir(parents=True, exist_ok=True)
    for n in range(count):
        (recording if n % 3 == 2 else picture)(directory, n)
    return directory


def picture(directory: Path, seed: int) -> Path:
    """A JPEG of six megapixels: a gradient, discs of many sizes, and the grain of a sensor."""
    random = np.random.default_rng(seed)
    width, height = PICTURE_SIZE
    sky = np.linspace(random.integers(40, 120, 3), random.integers(120, 250, 3), height)[:, None, :]
    image = Image.fromarray(np.broadcast_to(sky, (height, width, 3)).astype(np.uint8))
    draw = ImageDraw.Draw(image)
    for x, y, radius in random.integers((0, 0, 20), (width, height, 400), (40, 3)).tolist():
        draw.ellipse((x - radius, y - radius, x + radius, y + radius), fill=tuple(random.integers(0, 256, 3).tolist()))
    grain = random.integers(-12, 13, (height, width, 1), dtype=np.int16)
    path = directory / f"picture-{seed}.jpg"
    Image.fromarray(np.clip(np.asarray(image) + grain, 0, 255).astype(np.uint8)).save(path, quality=85)
    return path


def recording(directory: Path, seed: int) -> Path:
    """A WAV of a drum at 75 to 150 beats a minute over a chord."""
    random = np.random.default_rng(seed)
    time = np.arange(SECONDS * RATE) / RATE
    beat = 60 / tempo(seed)
    drum = np.exp(-12 * (time % beat)) * random.normal(0, 0.3, time.size)
    chord = sum(0.08 * np.sin(2 * np.pi * note * time) for note in random.uniform(110, 880, 3))
    path = directory / f"recording-{seed}.wav"
    soundfile.write(path, drum + chord, RATE, subtype="PCM_16")
    return path


def tempo(seed: int) -> float:
    """Beats a minute of the recording of that seed."""
    return (75.0, 100.0, 120.0, 150.0)[seed % 4]
