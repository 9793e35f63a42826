import io
import struct
from dataclasses import replace
from fractions import Fraction

import av
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from fourfold.config import ModelConfig
from fourfold.config_media import MediaConfig, VideoConfig
from fourfold.media import video as video_module
from fourfold.media.audio import decode_audio
from fourfold.media.limits import Limits, MediaError
from fourfold.media.video import decode_video, spread, video_patches

from .clips import RATE, animation_file, level, mjpeg_file, noise, picture_file, sound_file, tone, video_file

LIMITS = Limits(max_frames=4)


def greys(frames: np.ndarray) -> np.ndarray:
    return frames.mean(axis=(1, 2, 3))


@pytest.mark.parametrize(
    ("container", "codec", "options"),
    [
        ("mp4", "libx264", {}),
        ("mp4", "libx264", {"options": {"bf": "3"}, "gop": 8}),
        ("mp4", "libx264", {"muxing": {"movflags": "faststart"}}),
        ("mp4", "libx264", {"muxing": {"movflags": "frag_keyframe+empty_moov"}}),
        ("mov", "mpeg4", {}),
        ("webm", "libvpx", {}),
        ("webm", "libvpx-vp9", {}),
        ("matroska", "libx264", {"options": {"bf": "0"}}),
        ("avi", "mpeg4", {}),
        ("avi", "mjpeg", {"pix_fmt": "yuvj420p"}),
    ],
)
def test_frames_are_sampled_evenly(container, codec, options):
    data = video_file(31, container, codec, **options)
    frames, seconds, sound = decode_video(data, LIMITS)
    assert frames.shape == (4, 48, 64, 3) and frames.dtype == np.uint8
    assert np.allclose(seconds, [0, 1, 2, 3], atol=0.11)
    expected = [level(round(second * 10)) for second in seconds]
    assert np.abs(greys(frames) - expected).max() < (12 if codec == "mpeg4" else 6)
    assert sound is None


@pytest.mark.parametrize("kind", ["GIF", "WEBP"])
def test_animations(kind):
    frames, seconds, sound = decode_video(animation_file(kind, [level(n) for n in range(10)], 200), LIMITS)
    assert frames.shape == (4, 24, 32, 3) and sound is None
    assert np.allclose(seconds, [0, 0.6, 1.2, 1.8])
    assert np.abs(greys(frames) - [level(n) for n in (0, 3, 6, 9)]).max() < 2


def test_a_still_picture_is_a_clip_of_one_frame():
    for data in (
        animation_file("GIF", [50]),
        picture_file(noise(8, 8), "WEBP"),
        video_file(1),
        video_file(1, fps=Fraction(1, 5)),
    ):
        frames, seconds, _ = decode_video(data, LIMITS)
        assert len(frames) == 1 and seconds.tolist() == [0]


def test_fewer_frames_than_asked_for():
    frames, seconds, _ = decode_video(video_file(3), Limits(max_frames=8))
    assert len(frames) == 3 and np.allclose(seconds, [0, 0.1, 0.2])


def test_sound_comes_along_at_the_models_rate():
    for container, codec, sound_codec, rate in [("mp4", "libx264", "aac", 44100), ("webm", "libvpx", "libopus", 48000)]:
        data = video_file(20, container, codec, sound=tone(2.0, rate), sound_codec=sound_codec, sound_rate=rate)
        _, seconds, sound = decode_video(data, LIMITS)
        assert sound is not None and abs(len(sound) / RATE - 2) < 0.1
        assert abs(np.abs(np.fft.rfft(sound)).argmax() * RATE / len(sound) - 440) < 2
        assert decode_video(data, replace(LIMITS, sample_rate=None))[2] is None
        assert len(decode_video(data, replace(LIMITS, sample_rate=8000))[2]) < len(sound) * 0.51


def test_tracks_of_different_length_are_no_lie():
    long_sound, short_sound = video_file(5, sound=tone(3.0)), video_file(40, sound=tone(0.5))
    for limits in (LIMITS, replace(LIMITS, sample_rate=None)):
        assert decode_video(long_sound, limits)[1][-1] == pytest.approx(0.4)
        assert decode_video(short_sound, limits)[1][-1] == pytest.approx(3.9)
    assert 0.5 * RATE <= len(decode_audio(short_sound, RATE, 20)) < 0.7 * RATE


@pytest.mark.parametrize("delay", [-0.5, 0.0, 0.5])
def test_sound_is_laid_along_the_pictures(delay):
    wave = np.ones(1600, np.float32)
    aligned = video_module._align(wave, delay, 1600, 1.2)
    if delay < 0:
        assert len(aligned) == 800
    else:
        assert len(aligned) == min(1600 + round(delay * 1600), 1920)
        assert (aligned[: round(delay * 1600)] == 0).all() and (aligned[round(delay * 1600) :] == 1).all()


def test_only_the_groups_of_wanted_frames_are_decoded():
    data = video_file(200, gop=10, options={"bf": "0"})
    pixels = 64 * 48
    few = replace(LIMITS, max_frames=2)
    assert len(decode_video(data, replace(few, video_decoded_pixels=25 * pixels))[0]) == 2
    with pytest.raises(MediaError, match=f"more than {5 * pixels} pixels decoded"):
        decode_video(data, replace(few, video_decoded_pixels=5 * pixels))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"video_bytes": 100}, "bytes; the limit is 100"),
        ({"video_pixels": 3071}, "64 x 48; the limit is 3071 pixels"),
        ({"video_seconds": 1.0}, "longer than the limit of 1 s"),
        ({"video_packets": 10}, "more than 10 packets"),
    ],
)
def test_caps(change, message):
    with pytest.raises(MediaError, match=message):
        decode_video(video_file(12), replace(LIMITS, **change))


@pytest.mark.parametrize("kind", ["GIF", "WEBP"])
@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"video_pixels": 767}, "32 x 24; the limit is 767 pixels"),
        ({"video_seconds": 0.9}, "longer than the limit of 0.9 s"),
        ({"video_packets": 9}, "10 frames of 32 x 24"),
        ({"animation_pixels": 7679}, "10 frames of 32 x 24"),
    ],
)
def test_caps_of_animations(kind, change, message):
    with pytest.raises(MediaError, match=message):
        decode_video(animation_file(kind, [level(n) for n in range(10)]), replace(LIMITS, **change))


def test_long_sound_of_a_short_clip():
    data = video_file(3, sound=tone(3.0))
    with pytest.raises(MediaError, match="longer than the limit of 1 s"):
        decode_video(data, replace(LIMITS, video_seconds=1.0))


def test_large_frames_are_scaled_down_as_they_come():
    frames, _, _ = decode_video(video_file(2, size=(1920, 1080)), LIMITS)
    assert frames[0].size <= 3 << 20
    assert abs(frames.shape[2] / frames.shape[1] - 16 / 9) < 0.01


def test_frames_larger_than_the_container_says():
    frames, _, _ = decode_video(mjpeg_file([(16, 16), (32, 24)]), LIMITS)
    assert frames.shape == (2, 16, 16, 3)  # all as the first
    with pytest.raises(MediaError, match="video"):
        decode_video(mjpeg_file([(16, 16), (400, 300)]), replace(LIMITS, video_pixels=10_000))
    with pytest.raises(MediaError, match="video"):
        decode_video(mjpeg_file([(400, 300)]), replace(LIMITS, video_pixels=10_000))


def test_phone_videos_stand_upright():
    out = io.BytesIO()
    with av.open(out, "w", format="mp4") as file:
        stream = file.add_stream("libx264", rate=10)
        stream.width, stream.height, stream.pix_fmt = 64, 48, "yuv420p"
        array = np.zeros((48, 64, 3), np.uint8)
        array[:24, :32] = 255
        file.mux(stream.encode(av.VideoFrame.from_ndarray(array, format="rgb24")))
        file.mux(stream.encode(None))
    data = bytearray(out.getvalue())
    matrix = data.index(b"tkhd") + 4 + 40
    # A quarter turn to the right, as a phone held upright writes it.
    struct.pack_into(">9i", data, matrix, 0, 1 << 16, 0, -(1 << 16), 0, 0, 48 << 16, 0, 1 << 30)
    frames, _, _ = decode_video(bytes(data), LIMITS)
    assert frames.shape == (1, 64, 48, 3)
    assert frames[0, :24, 30:].mean() > 240 and frames[0, :24, :18].mean() < 15 and frames[0, 40:].mean() < 15


def test_what_is_no_video():
    with pytest.raises(MediaError, match="holds no pictures"):
        decode_video(sound_file(tone(0.5), "mp4", "aac"), LIMITS)
    for data in (b"", b"text", b"#EXTM3U\n", sound_file(tone(0.1)), picture_file(noise(4, 4))):
        with pytest.raises(MediaError, match="give one of mp4"):
            decode_video(data, LIMITS)
    for data in (b"\0\0\0\x18ftypmp42" + b"\0" * 50, b"\x1a\x45\xdf\xa3" + b"\1" * 50, b"GIF89a" + b"\0" * 20,
                 b"RIFF\x20\0\0\0AVI " + b"\0" * 30):  # fmt: skip
        with pytest.raises(MediaError, match="video"):
            decode_video(data, LIMITS)
    with pytest.raises(MediaError, match="declared video/webm but is mp4"):
        decode_video(video_file(1), LIMITS, mime="video/webm")
    assert len(decode_video(video_file(1), LIMITS, mime="video/quicktime")[0]) == 1


@pytest.mark.parametrize(("codec", "pix_fmt"), [("jpeg2000", "rgb24"), ("png", "rgb24"), ("ffv1", "yuv420p")])
def test_codecs_that_are_not_allowed(codec, pix_fmt):
    data = video_file(2, "avi", codec, pix_fmt=pix_fmt)
    with pytest.raises(MediaError, match=f"coded as {codec}; give one of"):
        decode_video(data, LIMITS)


def test_a_codec_that_nobody_knows():
    data = video_file(2, "avi", "mpeg4").replace(b"FMP4", b"ZZZZ")
    with pytest.raises(MediaError, match="coded as unknown"):
        decode_video(data, LIMITS)


def test_a_sound_codec_that_is_not_allowed():
    data = video_file(2, "matroska", sound=tone(0.5), sound_codec="ac3", sound_rate=48000)
    with pytest.raises(MediaError, match="coded as ac3"):
        decode_video(data, LIMITS)
    assert len(decode_video(data, replace(LIMITS, sample_rate=None))[0]) == 2


def test_nothing_but_the_given_bytes_is_opened():
    from fourfold.media.av_reader import _refuse_to_open

    with pytest.raises(MediaError, match="another file"):
        _refuse_to_open("file:///etc/passwd", 0, {})


@pytest.mark.parametrize(
    "options",
    [{}, {"muxing": {"movflags": "faststart"}}, {"container": "matroska"}, {"container": "avi", "codec": "mpeg4"}],
)
def test_truncated(options):
    data = video_file(60, size=(160, 120), **options)
    for part in (0.02, 0.3, 0.6):
        with pytest.raises(MediaError, match="video"):
            decode_video(data[: int(len(data) * part)], LIMITS)


@pytest.mark.parametrize("kind", ["GIF", "WEBP"])
def test_truncated_animation(kind):
    data = animation_file(kind, [level(n) for n in range(10)])
    for length in (10, 14, 20, len(data) // 2):
        with pytest.raises(MediaError, match="video"):
            decode_video(data[:length], LIMITS)


FILES = {
    "mp4": video_file(6, sound=tone(0.6)),
    "webm": video_file(6, "webm", "libvpx", sound=tone(0.6, 48000), sound_codec="libopus", sound_rate=48000),
    "avi": video_file(6, "avi", "mpeg4"),
    "gif": animation_file("GIF", [0, 100, 200]),
    "webp": animation_file("WEBP", [0, 100, 200]),
}


@settings(deadline=None, max_examples=100)
@given(st.sampled_from(sorted(FILES)), st.data())
def test_damage_raises_nothing_else(name, data):
    file = bytearray(FILES[name])
    for _ in range(data.draw(st.integers(1, 6))):
        file[data.draw(st.integers(0, len(file) - 1))] = data.draw(st.integers(0, 255))
    try:
        frames, seconds, sound = decode_video(bytes(file), replace(LIMITS, video_pixels=100_000))
        assert len(frames) == len(seconds) <= 4 and frames.dtype == np.uint8
        assert sound is None or np.isfinite(sound).all()
    except MediaError:
        pass


def test_limits_of_a_model():
    media = ModelConfig.preset("nano").media
    assert Limits.of(media) == Limits(max_frames=8, sample_rate=16000)
    assert Limits.of(MediaConfig(video=VideoConfig(max_frames=32))) == Limits(max_frames=32, sample_rate=None)
    assert Limits.of(MediaConfig()).sample_rate is None


@settings(deadline=None)
@given(st.integers(1, 500), st.integers(1, 40))
def test_spread(count, most):
    picked = spread(count, most)
    assert len(picked) == min(count, most) and picked == sorted(set(picked))
    assert picked[0] == 0 and (picked[-1] == count - 1 or most == 1)
    if len(picked) > 2:
        assert np.ptp(np.diff(picked)) <= 1


CFG = VideoConfig(patch_size=8, tubelet_frames=2, max_frames=8, max_patches=16)


def test_the_clip_is_rebuilt_from_its_tubelets():
    frames = np.stack([noise(24, 32) // (n + 1) for n in range(6)])
    seconds = np.arange(6) * 0.5
    values, coords, grid = video_patches(frames, seconds, CFG)
    assert grid == (3, 3, 4) and values.shape == (36, 384) and values.dtype == coords.dtype == np.float32
    rebuilt = np.zeros((6, 24, 32, 3))
    for patch, (second, row, col) in zip(values, coords, strict=True):
        row, col, first = int(row), int(col), int(second / 0.5)
        rebuilt[first : first + 2, row * 8 : row * 8 + 8, col * 8 : col * 8 + 8] = patch.reshape(3, 2, 8, 8).transpose(
            1, 2, 3, 0
        )
    assert np.allclose(rebuilt, (frames / 255 - 0.5) / 0.5, atol=1e-6)
    assert coords.tolist() == [[s, r, c] for s in (0.0, 1.0, 2.0) for r in range(3) for c in range(4)]


def test_a_short_clip_repeats_its_last_frame():
    frames = np.stack([np.full((8, 8, 3), n * 50, np.uint8) for n in range(3)])
    values, coords, grid = video_patches(frames, np.arange(3.0), CFG)
    assert grid == (2, 1, 1)
    assert np.allclose(values.reshape(2, 3, 2, 64)[1], 100 / 255 * 2 - 1)
    assert coords[:, 0].tolist() == [0, 2]


def test_a_long_clip_is_thinned():
    frames = np.stack([np.full((8, 8, 3), n, np.uint8) for n in range(100)])
    values, coords, grid = video_patches(frames, np.arange(100) / 10, CFG)
    assert grid == (4, 1, 1)
    levels = ((values.reshape(4, 3, 2, 64)[:, 0, :, 0].ravel() + 1) * 127.5).round()
    assert levels.tolist() == np.linspace(0, 99, 8).round().tolist()
    assert np.allclose(coords[:, 0], levels[::2] / 10)


@pytest.mark.parametrize(
    ("frames", "seconds"),
    [
        (np.zeros((2, 8, 8, 3), np.float32), [0, 1]),
        (np.zeros((8, 8, 3), np.uint8), [0]),
        (np.zeros((0, 8, 8, 3), np.uint8), []),
        (np.zeros((2, 8, 8, 3), np.uint8), [0]),
        (np.zeros((2, 8, 8, 3), np.uint8), [1, 0]),
        (np.zeros((2, 8, 8, 3), np.uint8), [0, np.nan]),
    ],
)
def test_malformed_clips(frames, seconds):
    with pytest.raises(MediaError, match="video"):
        video_patches(frames, np.array(seconds, float), CFG)
