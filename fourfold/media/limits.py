"""What a file may be: recognised by its first bytes, and refused past limits that are checked before decoding."""

from __future__ import annotations

from dataclasses import dataclass

from fourfold.config_media import MediaConfig


class MediaError(ValueError):
    """A picture, clip or sound that is refused; the message names the modality and the limit."""


@dataclass(frozen=True)
class Limits:
    """Caps of decoding. Pixels are width x height; ``sample_rate = None`` leaves the sound of a video undecoded."""

    image_bytes: int = 32 << 20
    image_pixels: int = 64_000_000
    video_bytes: int = 128 << 20
    video_pixels: int = 7680 * 4320  # of one frame
    video_seconds: float = 600.0
    video_decoded_pixels: int = 4 << 30  # of all frames that must be decoded to reach the sampled ones
    animation_pixels: int = 512 << 20  # of all frames of a GIF or WebP: none can be skipped, and decoding is slow
    video_packets: int = 200_000
    max_frames: int = 8
    audio_bytes: int = 64 << 20
    sample_rate: int | None = 16000

    @staticmethod
    def of(config: MediaConfig) -> Limits:
        """The defaults with the frame count and sample rate that a model takes."""
        return Limits(
            max_frames=config.video.max_frames if config.video else Limits.max_frames,
            sample_rate=config.audio.sample_rate if config.audio else None,
        )


DEFAULT_LIMITS = Limits()

_MIME = {
    "png": ("image/png",),
    "jpeg": ("image/jpeg", "image/jpg"),
    "gif": ("image/gif",),
    "webp": ("image/webp",),
    "bmp": ("image/bmp", "image/x-ms-bmp"),
    "mp4": ("video/mp4", "video/quicktime", "audio/mp4", "audio/m4a", "audio/x-m4a"),
    "matroska": ("video/webm", "video/x-matroska", "audio/webm", "audio/x-matroska"),
    "avi": ("video/avi", "video/x-msvideo", "video/vnd.avi"),
    "wav": ("audio/wav", "audio/x-wav", "audio/wave", "audio/vnd.wave"),
    "mp3": ("audio/mpeg", "audio/mp3"),
    "flac": ("audio/flac", "audio/x-flac"),
    "ogg": ("audio/ogg", "audio/opus", "audio/vorbis", "application/ogg"),
}


def sniff(data: bytes) -> str | None:
    """The format that the first bytes show, such as ``png`` or ``mp4`` (a key of ``_MIME``); None if unknown."""
    head = bytes(data[:16])
    starts = {
        b"\x89PNG\r\n\x1a\n": "png",
        b"\xff\xd8\xff": "jpeg",
        b"GIF87a": "gif",
        b"GIF89a": "gif",
        b"BM": "bmp",
        b"\x1a\x45\xdf\xa3": "matroska",
        b"fLaC": "flac",
        b"OggS": "ogg",
        b"ID3": "mp3",
    }
    for start, kind in starts.items():
        if head.startswith(start):
            return kind
    if head[:4] == b"RIFF":
        return {b"WEBP": "webp", b"AVI ": "avi", b"WAVE": "wav"}.get(head[8:12])
    if head[4:8] == b"ftyp":
        return "mp4"
    if len(head) > 2 and head[0] == 0xFF and head[1] & 0xE0 == 0xE0 and head[1] & 0x06:  # a frame of MPEG audio
        return "mp3"
    return None


def check_container(data: bytes, modality: str, kinds: tuple[str, ...], max_bytes: int, mime: str | None) -> str:
    """The format of ``data`` if it is one of ``kinds``, within ``max_bytes`` and what ``mime`` says (None: not said).

    Raises :class:`MediaError`.
    """
    if not isinstance(data, (bytes, bytearray, memoryview)):
        raise MediaError(f"{modality}: must be bytes, not {type(data).__name__}")
    if len(data) > max_bytes:
        raise MediaError(f"{modality}: has {len(data)} bytes; the limit is {max_bytes}")
    kind = sniff(data)
    if kind not in kinds:
        found = f"is {kind}" if kind else "is of no known format"
        raise MediaError(f"{modality}: {found}; give one of {', '.join(kinds)}")
    declared = (mime or "").partition(";")[0].strip().lower()
    if declared not in ("", "application/octet-stream", *_MIME[kind]):
        raise MediaError(f"{modality}: was declared {declared} but is {kind}")
    if bytes(data[:4]) == b"RIFF":
        promised = int.from_bytes(data[4:8], "little")  # all ones where the writer could not know
        if len(data) < promised != 0xFFFFFFFF:
            raise MediaError(f"{modality}: promises {promised + 8} bytes but has {len(data)}: truncated")
    return kind
