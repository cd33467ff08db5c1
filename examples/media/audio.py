"""Measures of a recording, by the same spectrum twice: over whole arrays, and number by number."""

from __future__ import annotations

import cmath
import math
from pathlib import Path
from typing import TypedDict

import numpy as np
import soundfile
from numpy.typing import NDArray

SECONDS = 10
"""Only the beginning of a recording is measured."""

FRAME = 1024
FRAMES_PER_SECOND = 50
TEMPO_LAGS = range(15, 51)
"""Distances of beats in frames: 200 down to 60 beats a minute."""

SILENCE_DB = -120.0


class AudioMeasures(TypedDict):
    """A recording in numbers; ``centroid_hz`` is how bright it sounds, ``tempo`` beats a minute (None when too short)."""

    seconds: float
    loudness_db: float
    centroid_hz: float
    tempo: float | None


def measure(path: Path, *, accelerated: bool) -> AudioMeasures:
    """Measure the recording, by whole arrays when ``accelerated``."""
    with soundfile.SoundFile(path) as sound:
        rate, seconds = int(sound.samplerate), sound.frames / sound.samplerate
        samples: NDArray[np.float64] = sound.read(SECONDS * rate, dtype="float64", always_2d=True).mean(axis=1)
    samples = np.pad(samples, (0, max(0, FRAME - len(samples))))
    hop = max(1, rate // FRAMES_PER_SECOND)
    power, spectrum, flux = _by_array(samples, hop) if accelerated else _by_number(samples.tolist(), hop)
    weight = sum(spectrum)
    return AudioMeasures(
        seconds=seconds,
        loudness_db=10 * math.log10(power) if power > 10 ** (SILENCE_DB / 10) else SILENCE_DB,
        centroid_hz=sum(n * part for n, part in enumerate(spectrum)) * rate / FRAME / weight if weight else 0.0,
        tempo=_tempo(flux),
    )


def _by_array(samples: NDArray[np.float64], hop: int) -> tuple[float, list[float], list[float]]:
    """Mean power, the spectrum summed over all frames, and how much louder each frame is than the one before."""
    frames = np.lib.stride_tricks.sliding_window_view(samples, FRAME)[::hop]
    spectra = np.abs(np.fft.rfft(frames * np.hanning(FRAME)))
    flux = np.maximum(np.diff(spectra, axis=0), 0).sum(axis=1)
    return float((samples * samples).mean()), spectra.sum(axis=0).tolist(), flux.tolist()


def _by_number(samples: list[float], hop: int) -> tuple[float, list[float], list[float]]:
    window = np.hanning(FRAME).tolist()
    total, flux = [0.0] * (FRAME // 2 + 1), []
    before: list[float] = []
    for start in range(0, len(samples) - FRAME + 1, hop):
        frame = [sample * w for sample, w in zip(samples[start : start + FRAME], window, strict=True)]
        spectrum = [abs(part) for part in _fourier(frame)[: FRAME // 2 + 1]]
        total = [a + b for a, b in zip(total, spectrum, strict=True)]
        if before:
            flux.append(sum(max(now - then, 0.0) for now, then in zip(spectrum, before, strict=True)))
        before = spectrum
    return sum(sample * sample for sample in samples) / len(samples), total, flux


_ROOTS = {n: [cmath.exp(-2j * math.pi * k / n) for k in range(n // 2)] for n in (2**k for k in range(1, FRAME.bit_length()))}


def _fourier(values: list[complex] | list[float]) -> list[complex]:
    """The discrete Fourier transform of a power of two values (Cooley and Tukey)."""
    n = len(values)
    if n == 1:
        return list(values)
    even, odd = _fourier(values[::2]), _fourier(values[1::2])
    turned = [root * value for root, value in zip(_ROOTS[n], odd, strict=True)]
    return [a + b for a, b in zip(even, turned, strict=True)] + [a - b for a, b in zip(even, turned, strict=True)]


def _tempo(flux: list[float]) -> float | None:
    """The distance at which the rises in loudness repeat best."""
    if len(flux) < 2 * TEMPO_LAGS.stop:
        return None
    mean = sum(flux) / len(flux)
    beats = [value - mean for value in flux]
    best = max(TEMPO_LAGS, key=lambda lag: sum(a * b for a, b in zip(beats, beats[lag:], strict=False)))
    return 60 * FRAMES_PER_SECOND / best
