"""Clips: bytes -> evenly sampled frames and their sound -> tubelets."""

from __future__ import annotations

import math
from collections.abc import Iterator
from typing import Any

import av
import numpy as np
from av.container import InputContainer

from fourfold.config_media import VideoConfig
from fourfold.media.av_reader import check_complete, decode_sound, open_container, prepare_decoder, time_of
from fourfold.media.image import (
    check_pixels,
    check_rgb,
    fit_grid,
    flatten,
    grid_coords,
    normalise,
    open_picture,
    resize,
)
from fourfold.media.limits import DEFAULT_LIMITS, Limits, MediaError, check_container

KINDS = ("mp4", "matroska", "avi", "gif", "webp")
KEPT_PIXELS = 1 << 20  # of a sampled frame; larger ones are scaled down as they are decoded

Clip = tuple[np.ndarray, np.ndarray, np.ndarray | None]


def decode_video(data: bytes, limits: Limits = DEFAULT_LIMITS, mime: str | None = None) -> Clip:
    """(frames uint8 [F, H, W, 3], seconds float64 [F], sound float32 mono [S] or None) of an mp4, webm, mkv, avi,
    GIF or animated WebP file.

    At most ``limits.max_frames`` frames, the first, the last and evenly spaced ones between, upright and at most
    1 Mpx; seconds count from the first frame, and so does the sound, at ``limits.sample_rate``. Only the frames
    from the nearest keyframe on are decoded. ``mime``: what the sender called it. Raises :class:`MediaError`.
    """
    kind = check_container(data, "video", KINDS, limits.video_bytes, mime)
    if kind in ("gif", "webp"):
        return _decode_animation(data, kind, limits)
    with open_container(data, kind, "video", limits) as container:
        return _decode_container(container, kind, limits)


def _decode_animation(data: bytes, kind: str, limits: Limits) -> Clip:
    with open_picture(data, kind, "video", limits.video_pixels) as picture:
        try:
            count = getattr(picture, "n_frames", 1)
            if count * picture.width * picture.height > limits.animation_pixels or count > limits.video_packets:
                raise MediaError(
                    f"video: has {count} frames of {picture.width} x {picture.height}; "
                    f"the limits are {limits.video_packets} frames, {limits.animation_pixels} pixels"
                )
            wanted = set(spread(count, limits.max_frames))
            size = _kept_size(picture.width, picture.height)
            frames, seconds, now = [], [], 0.0
            for index in range(count):
                picture.seek(index)
                if index in wanted:
                    frames.append(resize(np.asarray(flatten(picture)), size[1], size[0]))
                    seconds.append(now)
                now += _frame_seconds(picture)
                if now > limits.video_seconds:
                    raise MediaError(f"video: is longer than the limit of {limits.video_seconds:g} s")
        except MediaError:
            raise
        except Exception as error:  # decoders of hostile bytes raise anything
            raise MediaError(f"video: cannot be decoded ({error})") from error
    return np.stack(frames), np.array(seconds), None


def _frame_seconds(picture: Any) -> float:
    picture.load()  # a WebP knows its duration only then
    return max(float(picture.info.get("duration") or 100), 10.0) / 1000


def spread(count: int, most: int) -> list[int]:
    """At most ``most`` of 0..count-1, evenly spaced, the first and the last among them."""
    return np.unique(np.linspace(0, count - 1, min(count, most)).round().astype(int)).tolist()


def _kept_size(width: int, height: int) -> tuple[int, int]:
    scale = min(1.0, math.sqrt(KEPT_PIXELS / (width * height)))
    return max(round(width * scale), 1), max(round(height * scale), 1)


def _decode_container(container: InputContainer, kind: str, limits: Limits) -> Clip:
    if not container.streams.video:
        raise MediaError("video: the file holds no pictures")
    pictures = container.streams.video[0]
    prepare_decoder(pictures, "video", limits)
    check_pixels((pictures.codec_context.width, pictures.codec_context.height), "video", limits.video_pixels)
    rate = limits.sample_rate
    sound = container.streams.audio[0] if container.streams.audio and rate is not None else None
    if sound is not None:
        prepare_decoder(sound, "video", limits)
    packets = _demux(container, [s for s in (pictures, sound) if s is not None], kind, limits)
    frames, seconds = _sample_frames(pictures, packets[pictures.index], limits)
    wave = None
    if sound is not None and rate is not None and packets[sound.index]:
        wave, start = decode_sound(sound, packets[sound.index], "video", rate, limits.video_seconds)
        wave = _align(wave, start - seconds[0], rate, limits.video_seconds)
    return frames, seconds - seconds[0], wave


def _demux(container: InputContainer, streams: list[Any], kind: str, limits: Limits) -> dict[int, list[Any]]:
    """stream index -> its packets, undecoded; stops with an error at the caps on time and number.

    All streams are timed, so that what was found can be held against what the header promises.
    """
    packets: dict[int, list[Any]] = {stream.index: [] for stream in streams}
    first, last, total = None, 0.0, 0
    for packet in container.demux():
        if not packet.size:  # the mark that ends a stream
            continue
        if packet.stream_index in packets:
            packets[packet.stream_index].append(packet)
        total += 1
        if total > limits.video_packets:
            raise MediaError(f"video: has more than {limits.video_packets} packets, the limit")
        now = time_of(packet, packet.time_base)
        if now is None:
            continue
        first = now if first is None else min(first, now)
        last = max(last, now + float((packet.duration or 0) * packet.time_base))
        if last - first > limits.video_seconds:
            raise MediaError(f"video: is longer than the limit of {limits.video_seconds:g} s")
    check_complete(container, kind, "video", last - (first or 0.0))
    return packets


def _sample_frames(stream: Any, packets: list[Any], limits: Limits) -> tuple[np.ndarray, np.ndarray]:
    """(frames [F, H, W, 3], seconds [F]) at evenly spaced times, each decoded from the keyframe before it."""
    due = np.array([math.nan if (second := time_of(p, stream.time_base)) is None else second for p in packets])
    times = np.unique(due[~np.isnan(due)])
    if not len(times):
        raise MediaError("video: holds no frames")
    even = np.linspace(times[0], times[-1], min(len(times), limits.max_frames))
    wanted = np.unique(times[np.abs(times[:, None] - even).argmin(axis=0)])
    keys = np.flatnonzero([packet.is_keyframe for packet in packets])
    frames: list[np.ndarray] = []
    seconds: list[float] = []
    size: tuple[int, int] | None = None
    budget, fed = limits.video_decoded_pixels, -1
    decoding: Iterator[tuple[int, Any]] = iter(())
    for second in wanted:
        key = max(keys[due[keys] <= second], default=0)
        if key > fed:  # nothing between is needed
            decoding = _decode_from(stream, packets, key)
        for fed, frame in decoding:  # noqa: B007, the next round looks at it
            check_pixels((frame.width, frame.height), "video", limits.video_pixels)
            budget -= frame.width * frame.height
            if budget < 0:
                raise MediaError(f"video: needs more than {limits.video_decoded_pixels} pixels decoded, the limit")
            now = time_of(frame, stream.time_base)
            if now is None or now >= second - 1e-6:
                size = size or _kept_size(frame.width, frame.height)
                frames.append(_upright(frame, size))
                seconds.append(float(second) if now is None else now)
                break
    if not frames:
        raise MediaError("video: holds no frames")
    return np.stack(frames), np.array(seconds)


def _decode_from(stream: Any, packets: list[Any], start: int) -> Iterator[tuple[int, Any]]:
    """(number of the packet just fed, frame) for each frame from packet ``start`` on, in the order of display."""
    stream.codec_context.flush_buffers()
    for n, packet in enumerate(packets[start:], start):
        for frame in stream.codec_context.decode(packet):
            yield n, frame
    for frame in stream.codec_context.decode(None):
        yield len(packets), frame


def _upright(frame: av.VideoFrame, size: tuple[int, int]) -> np.ndarray:
    pixels = frame.reformat(width=size[0], height=size[1], format="rgb24").to_ndarray()
    return np.rot90(pixels, round(frame.rotation / 90) % 4)


def _align(wave: np.ndarray, delay: float, rate: int, max_seconds: float) -> np.ndarray:
    """The sound from the first frame on: cut, or led in with silence, when it starts ``delay`` seconds after it."""
    shift, most = round(delay * rate), math.ceil(max_seconds * rate)
    if shift < 0:
        return wave[-shift:]
    return np.concatenate([np.zeros(min(shift, most), np.float32), wave])[:most]


def video_patches(
    frames: np.ndarray, seconds: np.ndarray, cfg: VideoConfig
) -> tuple[np.ndarray, np.ndarray, tuple[int, int, int]]:
    """(values float32 [n, 3 * tubelet * p * p], coords float32 [n, 3], (slices, rows, cols)), n = slices * rows * cols.

    frames: uint8 [F, H, W, 3]; seconds: [F], not decreasing. More than max_frames are thinned evenly; the last one
    repeats to fill its tubelet. Slice by slice, row by row; a patch is [3, tubelet, p, p] flattened, from -1 to 1;
    its coords are (second of its first frame, row, column). Raises :class:`MediaError`.
    """
    frames = check_rgb(frames, "video", 4)
    seconds = np.asarray(seconds, dtype=np.float64)
    if seconds.shape != frames.shape[:1] or not np.isfinite(seconds).all() or (np.diff(seconds) < 0).any():
        raise MediaError(f"video: seconds must be {len(frames)} finite numbers that do not decrease")
    kept = spread(len(frames), cfg.max_frames)
    kept += [kept[-1]] * (-len(kept) % cfg.tubelet_frames)
    p, t = cfg.patch_size, cfg.tubelet_frames
    rows, cols = fit_grid(frames.shape[1], frames.shape[2], p, cfg.max_patches)
    slices = len(kept) // t
    pixels = normalise(np.stack([resize(frames[n], rows * p, cols * p) for n in kept]))
    tubelets = pixels.reshape(slices, t, rows, p, cols, p, 3).transpose(0, 2, 4, 6, 1, 3, 5)
    coords = grid_coords(seconds[kept[::t]], rows, cols)
    return tubelets.reshape(slices * rows * cols, cfg.features), coords, (slices, rows, cols)
