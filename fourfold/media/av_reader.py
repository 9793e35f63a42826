"""Containers of sound and moving pictures, read through FFmpeg (PyAV) and no further than the limits.

FFmpeg reads far more than a server should: playlists that open other files, decoders nobody audits. So the
demuxer is named by us, the decoders are an allow-list, and nothing but the given bytes can be opened.
"""

from __future__ import annotations

import io
import itertools
import math
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from fractions import Fraction
from typing import Any

import av
import numpy as np
from av.audio.resampler import AudioResampler
from av.container import InputContainer

from fourfold.media.limits import Limits, MediaError

VIDEO_CODECS = ("h264", "hevc", "vp8", "vp9", "av1", "mpeg4", "mjpeg", "theora", "rawvideo")
AUDIO_CODECS = ("aac", "mp3", "opus", "vorbis", "flac", "alac")
PCM = ("u8", "s16le", "s24le", "s32le", "s16be", "s24be", "s32be", "f32le", "f64le", "mulaw", "alaw")
CODECS = (*VIDEO_CODECS, *AUDIO_CODECS, *(f"pcm_{kind}" for kind in PCM))
# Other names under which FFmpeg has decoders of these.
DECODERS = (*CODECS, "libdav1d", "libvpx", "libvpx-vp9", "mp3float", "libopus", "libvorbis")
SLACK_SECONDS = 0.1  # encoders pad their last frame


@contextmanager
def open_container(data: bytes, kind: str, modality: str, limits: Limits) -> Iterator[InputContainer]:
    """A container of the given format over ``data``; every error of FFmpeg inside becomes :class:`MediaError`."""
    options = {"codec_whitelist": ",".join(DECODERS), **_options(limits)}
    try:
        with av.open(
            io.BytesIO(data), "r", format=kind, options=options, metadata_errors="replace", io_open=_refuse_to_open
        ) as container:
            yield container
    except MediaError:
        raise
    except (av.FFmpegError, ValueError, OverflowError, MemoryError) as error:
        raise MediaError(f"{modality}: cannot be decoded ({error})") from error


def _options(limits: Limits) -> dict[str, str]:
    return {"max_pixels": str(limits.video_pixels), "threads": "1"}


def _refuse_to_open(url: str, flags: int, options: dict[str, str]) -> Any:
    raise MediaError("media: refers to another file")


def prepare_decoder(stream: Any, modality: str, limits: Limits) -> None:
    """Raises :class:`MediaError` unless the codec is allowed; sets the decoder's own limits."""
    context = stream.codec_context
    name = context.codec.canonical_name if context is not None else "unknown"
    if name not in CODECS:
        raise MediaError(f"{modality}: is coded as {name}; give one of {', '.join(CODECS)}")
    context.options = _options(limits)


def time_of(item: av.Packet[Any] | av.frame.Frame, time_base: Fraction) -> float | None:
    """The second at which a packet or frame is due, None if it carries no time."""
    stamp = item.pts if item.pts is not None else item.dts
    return None if stamp is None else float(stamp * time_base)


def check_complete(container: InputContainer, kind: str, modality: str, seconds: float) -> None:
    """Raises :class:`MediaError` if clearly less was found than the header promises: truncated, or a lie.

    MP3 has no header to believe; what FFmpeg says there is a guess.
    """
    if kind == "mp3" or container.duration is None:
        return
    promised = container.duration / av.time_base
    if seconds < 0.9 * promised - 0.2:
        raise MediaError(f"{modality}: promises {promised:.1f} s but holds {seconds:.1f} s")


def read_sound(
    container: InputContainer, kind: str, modality: str, sample_rate: int, max_seconds: float, limits: Limits
) -> tuple[np.ndarray, float]:
    """(float32 mono [S], second at which it starts) of the first sound track, demuxed and decoded up to the cap."""
    stream = container.streams.audio[0]
    prepare_decoder(stream, modality, limits)
    wave, start = decode_sound(stream, container.demux(stream), modality, sample_rate, max_seconds)
    if not container.streams.video:  # whose length the header may give instead
        check_complete(container, kind, modality, len(wave) / sample_rate)
    return wave, start


def decode_sound(
    stream: Any, packets: Iterable[Any], modality: str, sample_rate: int, max_seconds: float
) -> tuple[np.ndarray, float]:
    """(float32 mono [S], second at which it starts). Stops with :class:`MediaError` past ``max_seconds``."""
    resampler = AudioResampler(format="flt", layout="mono", rate=sample_rate)
    most = math.ceil((max_seconds + SLACK_SECONDS) * sample_rate)
    parts: list[np.ndarray] = []
    total = 0
    start: float | None = None
    for packet in itertools.chain((packet for packet in packets if packet.size), [None]):
        for frame in stream.codec_context.decode(packet):
            if start is None:
                start = time_of(frame, stream.time_base) or 0.0
                _check_rate(frame, modality)
            for piece in resampler.resample(frame):
                parts.append(piece.to_ndarray()[0])
                total += len(parts[-1])
        if total > most:
            raise MediaError(f"{modality}: is longer than the limit of {max_seconds:g} s")
    if start is None or not total:
        raise MediaError(f"{modality}: holds no samples")
    parts += [piece.to_ndarray()[0] for piece in resampler.resample(None)]
    wave = np.concatenate(parts)[: math.ceil(max_seconds * sample_rate)]
    if not np.isfinite(wave).all():
        raise MediaError(f"{modality}: holds NaN or infinity")
    return wave / max(1.0, float(np.abs(wave).max())), start


def _check_rate(frame: av.AudioFrame, modality: str) -> None:
    channels = len(frame.layout.channels)
    if not 1000 <= frame.sample_rate <= 768_000 or not 1 <= channels <= 16:
        raise MediaError(f"{modality}: has {channels} channels at {frame.sample_rate} Hz; give 1-16 at 1-768 kHz")
