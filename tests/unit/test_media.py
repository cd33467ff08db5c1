"""The sample service's own work: the same numbers on every tier, truly faster on the accelerated one."""

from __future__ import annotations

import io
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import soundfile
import yaml
from examples.media import audio, image, samples
from examples.media.kinds import kind_of
from PIL import Image

from workerpool_operator.model import WorkerPoolSpec, parse_spec

pytestmark = pytest.mark.unit

SAMPLE_POOL = Path(__file__).parents[2] / "examples/media/workerpool.yaml"


@pytest.fixture(scope="module")
def recording(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return samples.recording(tmp_path_factory.mktemp("media"), seed=2)


@pytest.fixture(scope="module")
def picture(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return samples.picture(tmp_path_factory.mktemp("media"), seed=1)


def saved(path: Path, picture: Image.Image) -> Path:
    picture.save(path)
    return path


def wav(path: Path, samples: np.ndarray[Any, np.dtype[np.float64]], rate: int) -> Path:
    soundfile.write(path, samples, rate)
    return path


def seconds(work: Callable[[], object]) -> float:
    """Of a processor: by the clock, whatever else the machine does would count too."""
    start = time.process_time()
    work()
    return time.process_time() - start


def assert_same(plain: Mapping[str, object], accelerated: Mapping[str, object]) -> None:
    assert {
        key: pytest.approx(value, rel=1e-9) if isinstance(value, float) else value for key, value in plain.items()
    } == accelerated


@pytest.mark.parametrize("size", [(1, 1), (3, 900), (17, 16), (320, 211), (1999, 40)])
@pytest.mark.parametrize("mode", ["L", "RGBA", "P", "CMYK"])
def test_both_ways_of_measuring_a_picture_agree(tmp_path: Path, size: tuple[int, int], mode: str) -> None:
    noise = Image.effect_noise(size, 80).convert(mode)
    path = saved(tmp_path / ("a.tiff"), noise)
    measures = image.measure(path, accelerated=True)
    assert_same(image.measure(path, accelerated=False), measures)
    assert (measures["width"], measures["height"]) == size


@pytest.mark.parametrize(("rate", "channels"), [(8_000, 1), (16_000, 2), (44_100, 2)])
@pytest.mark.parametrize("length", [0, 100, 1_024, 30_000])
def test_both_ways_of_measuring_a_recording_agree(tmp_path: Path, rate: int, channels: int, length: int) -> None:
    noise = np.random.default_rng(length).normal(0, 0.2, (length, channels))
    path = wav(tmp_path / "a.wav", noise, rate)
    assert_same(audio.measure(path, accelerated=False), audio.measure(path, accelerated=True))


def test_the_accelerated_way_is_at_least_three_times_faster(picture: Path, recording: Path) -> None:
    for measure, path in ((image.measure, picture), (audio.measure, recording)):
        fast = min(seconds(lambda measure=measure, path=path: measure(path, accelerated=True)) for _ in range(3))  # type: ignore[misc]
        assert seconds(lambda measure=measure, path=path: measure(path, accelerated=False)) > 3 * fast  # type: ignore[misc]


def test_a_picture_looks_alike_after_it_was_shrunk_and_unlike_another(picture: Path, tmp_path: Path) -> None:
    with Image.open(picture) as original:
        smaller = saved(tmp_path / "smaller.png", original.resize((700, 460)))
    other = samples.picture(tmp_path, seed=5)
    hashes = [int(image.measure(path, accelerated=True)["hash"], 16) for path in (picture, smaller, other)]
    assert (hashes[0] ^ hashes[1]).bit_count() <= 3
    assert (hashes[0] ^ hashes[2]).bit_count() >= 12


def test_a_sharp_picture_has_more_edges_than_a_flat_one(picture: Path, tmp_path: Path) -> None:
    flat = saved(tmp_path / "flat.png", Image.new("RGB", (300, 200), (90, 90, 90)))
    measures = image.measure(flat, accelerated=True)
    assert measures["edges"] == 0
    assert measures["brightness"] == 90
    assert image.measure(picture, accelerated=True)["edges"] > 5


@pytest.mark.parametrize("seed", range(4))
def test_the_tempo_of_a_drum_is_found(tmp_path: Path, seed: int) -> None:
    measures = audio.measure(samples.recording(tmp_path, seed), accelerated=True)
    assert measures["tempo"] == pytest.approx(samples.tempo(seed), rel=0.02)


def test_a_tone_has_its_frequency_and_loudness(tmp_path: Path) -> None:
    tone = 0.5 * np.sin(2 * np.pi * 1_000 * np.arange(16_000) / 16_000)
    measures = audio.measure(wav(tmp_path / "tone.wav", tone, 16_000), accelerated=True)
    assert measures["centroid_hz"] == pytest.approx(1_000, rel=0.02)
    assert measures["loudness_db"] == pytest.approx(-9.03, abs=0.05)


def test_silence_is_a_number_and_has_no_centroid(tmp_path: Path) -> None:
    measures = audio.measure(wav(tmp_path / "silence.wav", np.zeros(8_000), 8_000), accelerated=False)
    assert measures == {"seconds": 1.0, "loudness_db": -120.0, "centroid_hz": 0.0, "tempo": None}


def test_the_samples_are_the_same_every_time(picture: Path, tmp_path: Path) -> None:
    assert samples.picture(tmp_path, seed=1).read_bytes() == picture.read_bytes()


@pytest.mark.parametrize(
    ("content", "kind"), [(b"", None), (b"only words", None), (b"%PDF-1.7\n", None), (b"\xff\xd8\xff", None), (b"RIFF", None)]
)
def test_what_no_library_can_decode_has_no_kind(content: bytes, kind: str | None) -> None:
    assert kind_of(io.BytesIO(content)) is kind


def test_a_kind_is_told_by_the_bytes_and_the_file_stays_at_its_start(picture: Path, recording: Path) -> None:
    for path, kind in ((picture, "image"), (recording, "audio")):
        with path.open("rb") as file:
            assert kind_of(file) == kind
            assert file.tell() == 0


def test_the_sample_pool_is_valid_and_prefers_a_gpu_tier_that_starts_at_zero() -> None:
    resource = yaml.safe_load(SAMPLE_POOL.read_text())
    spec = parse_spec(resource["spec"])
    assert isinstance(spec, WorkerPoolSpec), spec
    assert [(tier.name, tier.accelerated, tier.replicas.min) for tier in spec.tiers] == [("gpu", True, 0), ("cpu", False, 1)]
