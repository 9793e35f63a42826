"""Small files to decode, written with PyAV and Pillow."""

import io
import math
import tempfile
from fractions import Fraction
from pathlib import Path

import av
import numpy as np
from PIL import Image

RATE = 16000


def tone(seconds: float, rate: int = RATE, hertz: float = 440.0, gain: float = 0.5) -> np.ndarray:
    return (gain * np.sin(np.arange(round(seconds * rate)) * (2 * math.pi * hertz / rate))).astype(np.float32)


def picture_file(array: np.ndarray, kind: str = "PNG", **options) -> bytes:
    out = io.BytesIO()
    Image.fromarray(array).save(out, kind, **options)
    return out.getvalue()


def noise(height: int, width: int, channels: int = 3) -> np.ndarray:
    return np.random.default_rng(height * 1000 + width).integers(0, 256, (height, width, channels), dtype=np.uint8)


def animation_file(kind: str, levels: list[int], milliseconds: int = 100, size: tuple[int, int] = (32, 24)) -> bytes:
    frames = [Image.new("RGB", size, (level,) * 3) for level in levels]
    out = io.BytesIO()
    options = {"lossless": True} if kind == "WEBP" else {}
    frames[0].save(out, kind, save_all=True, append_images=frames[1:], duration=milliseconds, loop=0, **options)
    return out.getvalue()


def _mux_sound(container, stream, wave: np.ndarray, rate: int, layout: str) -> None:
    for start in range(0, wave.shape[1], 1024):
        frame = av.AudioFrame.from_ndarray(np.ascontiguousarray(wave[:, start : start + 1024]), "fltp", layout)
        frame.sample_rate, frame.pts, frame.time_base = rate, start, Fraction(1, rate)
        container.mux(stream.encode(frame))
    container.mux(stream.encode(None))


def sound_file(
    wave: np.ndarray, container: str = "wav", codec: str = "pcm_s16le", rate: int = RATE, options: dict | None = None
) -> bytes:
    """wave: float32 [S] or [channels, S]."""
    wave = np.atleast_2d(wave)
    layout = "mono" if len(wave) == 1 else "stereo"
    out = io.BytesIO()
    with av.open(out, "w", format=container) as file:
        stream = file.add_stream(codec, rate=rate, options=options or {})
        stream.layout = layout
        _mux_sound(file, stream, wave, rate, layout)
    return out.getvalue()


def level(n: int) -> int:
    """The grey of frame ``n``, far from its neighbours'."""
    return 16 + 37 * n % 224


def video_file(
    frames: int = 12,
    container: str = "mp4",
    codec: str = "libx264",
    *,
    size: tuple[int, int] = (64, 48),
    fps: int | Fraction = 10,
    gop: int = 5,
    pix_fmt: str = "yuv420p",
    sound: np.ndarray | None = None,
    sound_codec: str = "aac",
    sound_rate: int = RATE,
    options: dict | None = None,
    muxing: dict | None = None,
) -> bytes:
    """Frame n is all ``level(n)``."""
    with tempfile.TemporaryDirectory() as folder:  # faststart reopens what it wrote
        path = Path(folder) / "clip"
        with av.open(str(path), "w", format=container, options=muxing or {}) as file:
            _mux_clip(file, frames, codec, size, fps, gop, pix_fmt, sound, sound_codec, sound_rate, options or {})
        return path.read_bytes()


def _mux_clip(file, frames, codec, size, fps, gop, pix_fmt, sound, sound_codec, sound_rate, options) -> None:
    stream = file.add_stream(codec, rate=fps, options=options)
    stream.width, stream.height, stream.pix_fmt, stream.gop_size = *size, pix_fmt, gop
    track = None
    if sound is not None:
        track = file.add_stream(sound_codec, rate=sound_rate)
        track.layout = "mono"
    for n in range(frames):
        array = np.full((size[1], size[0], 3), level(n), np.uint8)
        file.mux(stream.encode(av.VideoFrame.from_ndarray(array, format="rgb24")))
    file.mux(stream.encode(None))
    if track is not None:
        _mux_sound(file, track, sound[None], sound_rate, "mono")


def mjpeg_file(sizes: list[tuple[int, int]], declared: tuple[int, int] = (16, 16), container: str = "avi") -> bytes:
    """A container that declares one size and holds pictures of others."""
    out = io.BytesIO()
    with av.open(out, "w", format=container) as file:
        stream = file.add_stream("mjpeg", rate=10)
        stream.width, stream.height, stream.pix_fmt = *declared, "yuvj420p"
        for n, (width, height) in enumerate(sizes):
            data = io.BytesIO()
            Image.new("RGB", (width, height), (level(n),) * 3).save(data, "JPEG")
            packet = av.Packet(data.getvalue())
            packet.stream, packet.pts, packet.dts, packet.time_base = stream, n, n, Fraction(1, 10)
            packet.is_keyframe = True
            file.mux(packet)
    return out.getvalue()
