import struct

import av
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from fourfold.config_media import AudioConfig
from fourfold.media import av_reader
from fourfold.media.audio import audio_patches, decode_audio, log_mel, token_seconds
from fourfold.media.limits import Limits, MediaError

from .clips import RATE, noise, picture_file, sound_file, tone, video_file

CFG = AudioConfig(sample_rate=RATE, n_mels=64, frames_per_token=4, max_seconds=20.0)


def pitch(wave: np.ndarray, rate: int = RATE) -> float:
    return float(np.abs(np.fft.rfft(wave)).argmax() * rate / len(wave))


@pytest.mark.parametrize(
    ("container", "codec", "rate", "tolerance"),
    [
        ("wav", "pcm_s16le", 16000, 0.001),
        ("wav", "pcm_u8", 8000, 0.02),
        ("wav", "pcm_f32le", 44100, 0.002),
        ("wav", "pcm_s24le", 22050, 0.002),
        ("flac", "flac", 16000, 0.001),
        ("mp3", "mp3", 16000, 0.1),
        ("ogg", "libopus", 48000, 0.1),
        ("mp4", "aac", 16000, 0.1),
        ("webm", "libopus", 48000, 0.1),
    ],
)
def test_formats(container, codec, rate, tolerance):
    wave = decode_audio(sound_file(tone(1.0, rate), container, codec, rate), RATE, 20)
    assert wave.dtype == np.float32 and wave.ndim == 1
    assert abs(len(wave) - RATE) < 0.07 * RATE
    assert abs(pitch(wave) - 440) < 2
    assert abs(np.abs(wave[2000:14000]).max() - 0.5) < tolerance


def test_stereo_is_mixed_and_loud_floats_are_scaled_down():
    wave = np.stack([tone(1.0), tone(1.0, hertz=1000)])
    spectrum = np.abs(np.fft.rfft(decode_audio(sound_file(wave), RATE, 20)))
    assert set(np.argsort(spectrum)[-2:]) == {440, 1000}
    loud = decode_audio(sound_file(tone(1.0, gain=8.0), codec="pcm_f32le"), RATE, 20)
    assert np.abs(loud).max() == 1 and np.allclose(loud, tone(1.0, gain=1.0), atol=1e-3)


def test_length_cap():
    data = sound_file(tone(2.0))
    assert len(decode_audio(data, RATE, 2.0)) == 2 * RATE
    assert len(decode_audio(data, RATE, 1.95)) == 1.95 * RATE  # what an encoder pads is cut
    with pytest.raises(MediaError, match="longer than the limit of 1.5 s"):
        decode_audio(data, RATE, 1.5)


def test_decoding_stops_at_the_cap(monkeypatch):
    """A long file is refused after its first seconds, not after all of it."""
    read = []

    class Counting:
        def __init__(self, **options):
            self.inner = av.AudioResampler(**options)

        def resample(self, frame):
            read.append(frame)
            return self.inner.resample(frame)

    monkeypatch.setattr(av_reader, "AudioResampler", Counting)
    with pytest.raises(MediaError, match="longer"):
        decode_audio(sound_file(np.zeros(60 * RATE, np.float32), "flac", "flac"), RATE, 1.0)
    assert len(read) < 20


def test_byte_cap():
    with pytest.raises(MediaError, match="bytes; the limit is 100"):
        decode_audio(sound_file(tone(0.1)), RATE, 20, Limits(audio_bytes=100))


@pytest.mark.parametrize("poison", [np.nan, np.inf, -np.inf])
@pytest.mark.parametrize("rate", [RATE, 44100])
def test_nan_and_infinity(poison, rate):
    wave = tone(0.5, rate)
    wave[3000] = poison
    with pytest.raises(MediaError, match="NaN or infinity"):
        decode_audio(sound_file(wave, codec="pcm_f32le", rate=rate), RATE, 20)


def test_no_sound_inside():
    with pytest.raises(MediaError, match="no sound"):
        decode_audio(video_file(2), RATE, 20)
    with pytest.raises(MediaError, match="audio"):
        decode_audio(sound_file(np.zeros(0, np.float32)), RATE, 20)


def test_sound_of_a_video_file():
    wave = decode_audio(video_file(10, sound=tone(1.0)), RATE, 20)
    assert abs(pitch(wave) - 440) < 2


def test_lying_about_the_format():
    with pytest.raises(MediaError, match="give one of wav"):
        decode_audio(picture_file(noise(4, 4)), RATE, 20)
    with pytest.raises(MediaError, match="declared audio/mpeg but is wav"):
        decode_audio(sound_file(tone(0.1)), RATE, 20, mime="audio/mpeg")
    assert len(decode_audio(sound_file(tone(0.1)), RATE, 20, mime="audio/x-wav")) == 0.1 * RATE
    for playlist in (
        b"#EXTM3U\n#EXTINF:1,\nfile:///etc/passwd\n",
        b"ffconcat version 1.0\nfile '/etc/passwd'\n",
        b"\xff\xf1\x50\x80",
    ):
        with pytest.raises(MediaError, match="no known format"):
            decode_audio(playlist, RATE, 20)


@pytest.mark.parametrize(
    "data",
    [
        b"RIFF" + struct.pack("<I", 4) + b"WAVE",
        b"RIFF\xff\xff\xff\xffWAVE" + b"\0" * 100,
        b"fLaC" + b"\0" * 100,
        b"OggS" + b"\0" * 100,
        b"ID3" + b"\0" * 100,
        b"\xff\xfb" + b"\0" * 100,
        b"\0\0\0\x18ftypmp42" + b"\0" * 100,
        b"\x1a\x45\xdf\xa3" + b"\0" * 100,
    ],
)
def test_only_a_beginning(data):
    with pytest.raises(MediaError, match="audio"):
        decode_audio(data, RATE, 20)


def _wav_header(data: bytes, **fields: int) -> bytes:
    """The WAV file with fields of its format chunk replaced."""
    place = {"codec": (20, "<H"), "channels": (22, "<H"), "rate": (24, "<I")}
    out = bytearray(data)
    for name, value in fields.items():
        struct.pack_into(place[name][1], out, place[name][0], value)
    return bytes(out)


def test_wav_headers_that_lie():
    data = sound_file(tone(0.5))
    for fields in (
        {"rate": 10},
        {"rate": 2_000_000},
        {"channels": 60000},
        {"channels": 0},
        {"codec": 0x11},
        {"codec": 0x31},
    ):
        with pytest.raises(MediaError, match="audio"):
            decode_audio(_wav_header(data, **fields), RATE, 20)


def test_a_codec_that_is_not_allowed():
    with pytest.raises(MediaError, match="coded as adpcm_ms; give one of"):
        decode_audio(sound_file(tone(0.5), codec="adpcm_ms"), RATE, 20)


def test_truncated():
    for container, codec in [("wav", "pcm_s16le"), ("flac", "flac"), ("mp4", "aac"), ("matroska", "flac")]:
        data = sound_file(tone(4.0), container, codec)
        assert len(decode_audio(data, RATE, 20)) >= 4 * RATE
        with pytest.raises(MediaError, match="audio"):
            decode_audio(data[: len(data) // 2], RATE, 20)


FILES = {
    "wav": sound_file(tone(0.3), "wav", "pcm_f32le"),
    "mp3": sound_file(tone(0.3), "mp3", "mp3"),
    "ogg": sound_file(tone(0.3, 48000), "ogg", "libopus", 48000),
    "mp4": sound_file(tone(0.3), "mp4", "aac"),
}


@settings(deadline=None, max_examples=60)
@given(st.sampled_from(sorted(FILES)), st.data())
def test_damage_raises_nothing_else(name, data):
    file = bytearray(FILES[name])
    for _ in range(data.draw(st.integers(1, 6))):
        file[data.draw(st.integers(0, len(file) - 1))] = data.draw(st.integers(0, 255))
    try:
        wave = decode_audio(bytes(file), RATE, 20)
        assert np.isfinite(wave).all() and np.abs(wave).max() <= 1
    except MediaError:
        pass


def test_log_mel_shape_and_scale():
    assert log_mel(tone(1.0), CFG).shape == (99, 64)  # windows of 25 ms every 10 ms, the last one padded
    assert log_mel(tone(0.025), CFG).shape == (1, 64)
    assert log_mel(tone(0.026), CFG).shape == (2, 64)
    mel = log_mel(tone(1.0), CFG)
    assert mel.dtype == np.float32 and mel.max() == 1 and mel.min() == -1


def test_log_mel_finds_the_pitch():
    bands = [log_mel(tone(0.2, hertz=hertz), CFG)[5].argmax() for hertz in (200, 440, 1000, 3000, 7000)]
    assert bands == sorted(set(bands))
    assert 50 < bands[-1] < 64


def test_every_mel_band_hears_something():
    rng = np.random.default_rng(0)
    assert (log_mel(rng.normal(size=RATE).astype(np.float32) * 0.1, CFG) > -1).all()


@pytest.mark.parametrize("gain", [0.01, 0.1, 2.0, 100.0])
def test_log_mel_does_not_depend_on_loudness(gain):
    wave = (np.random.default_rng(0).normal(size=RATE) * tone(1.0)).astype(np.float32)
    assert np.allclose(log_mel(wave * gain, CFG), log_mel(wave, CFG), atol=1e-3)


def test_silence_is_low_and_its_noise_is_not_amplified():
    assert (log_mel(np.zeros(RATE, np.float32), CFG) == -1).all()
    hiss = (np.random.default_rng(0).normal(size=RATE) * 1e-5).astype(np.float32)
    assert log_mel(hiss, CFG).mean() < -0.5
    # A quiet sound in silence is as clear as the same sound alone.
    padded = np.concatenate([np.zeros(RATE, np.float32), tone(0.5, gain=0.05), np.zeros(RATE, np.float32)])
    assert log_mel(padded, CFG).max() == 1 and (log_mel(padded, CFG)[:90] == -1).all()


def test_patches():
    wave = tone(1.0)
    values, coords = audio_patches(wave, CFG)
    assert token_seconds(CFG) == pytest.approx(0.04)
    assert values.shape == (25, 256) and values.dtype == coords.dtype == np.float32
    mel = log_mel(wave, CFG)
    assert (values.reshape(100, 64)[:99] == mel).all() and (values.reshape(100, 64)[99] == -1).all()
    assert np.allclose(coords[:, 0], np.arange(25) * 0.04) and (coords[:, 1:] == 0).all()


@settings(deadline=None, max_examples=40)
@given(st.integers(0, 3000))
def test_any_length_is_covered(samples):
    values, coords = audio_patches(np.full(samples, 0.5, np.float32), CFG)
    assert len(values) == len(coords) >= 1
    assert (len(values) - 1) * 640 < max(samples, 1)
    assert len(values) * 640 + 240 >= samples


@pytest.mark.parametrize(
    ("wave", "message"),
    [
        (np.zeros((2, 100), np.float32), "float"),
        (np.zeros(100, np.int16), "float"),
        (np.array([0.0, np.nan]), "NaN"),
        (np.array([np.inf], np.float32), "NaN"),
        (np.zeros(20 * RATE + 1, np.float32), "limit is 20 s"),
    ],
)
def test_malformed_waves(wave, message):
    with pytest.raises(MediaError, match=message):
        audio_patches(wave, CFG)
