"""Sound: bytes -> mono wave -> log-mel frames -> patches."""

from __future__ import annotations

import math
from functools import lru_cache

import numpy as np

from fourfold.config_media import AudioConfig
from fourfold.media.av_reader import open_container, read_sound
from fourfold.media.limits import DEFAULT_LIMITS, Limits, MediaError, check_container

KINDS = ("wav", "mp3", "flac", "ogg", "mp4", "matroska")
WINDOW_SECONDS, HOP_SECONDS = 0.025, 0.010
FLOOR = 1e-12  # power, -120 dB of a full-scale tone
RANGE = 14.0  # nats of power below the peak that are heard (61 dB)


def decode_audio(
    data: bytes, sample_rate: int, max_seconds: float, limits: Limits = DEFAULT_LIMITS, mime: str | None = None
) -> np.ndarray:
    """float32 mono [S] in -1..1 of the first sound track of a wav, mp3, flac, ogg, m4a or webm file.

    Channels are mixed into one; sound that goes past 1 is scaled down to 1. ``mime``: what the sender called it.
    Raises :class:`MediaError` for NaN, infinity, damage, no sound, or more than ``max_seconds`` (decoding stops there).
    """
    kind = check_container(data, "audio", KINDS, limits.audio_bytes, mime)
    with open_container(data, kind, "audio", limits) as container:
        if not container.streams.audio:
            raise MediaError("audio: the file holds no sound")
        wave, _ = read_sound(container, kind, "audio", sample_rate, max_seconds, limits)
    return wave


def frame_sizes(cfg: AudioConfig) -> tuple[int, int]:
    """(window, hop) in samples."""
    return max(round(WINDOW_SECONDS * cfg.sample_rate), 1), max(round(HOP_SECONDS * cfg.sample_rate), 1)


def token_seconds(cfg: AudioConfig) -> float:
    """The time from one audio token to the next."""
    return cfg.frames_per_token * frame_sizes(cfg)[1] / cfg.sample_rate


def check_wave(wave: np.ndarray, cfg: AudioConfig) -> np.ndarray:
    """``wave`` as float32 [S]; raises :class:`MediaError` unless it is one finite channel of at most max_seconds."""
    wave = np.asarray(wave)
    if wave.ndim != 1 or wave.dtype.kind != "f":
        raise MediaError(f"audio: must be float [S], not {wave.dtype} {list(wave.shape)}")
    if len(wave) > cfg.max_seconds * cfg.sample_rate:
        raise MediaError(f"audio: has {len(wave) / cfg.sample_rate:.2f} s; the limit is {cfg.max_seconds:g} s")
    wave = wave.astype(np.float32, copy=False)
    if not np.isfinite(wave).all():
        raise MediaError("audio: holds NaN or infinity")
    return wave


def log_mel(wave: np.ndarray, cfg: AudioConfig) -> np.ndarray:
    """float [S] -> float32 [frames, n_mels]: natural-log mel power, 1 at the clip's peak, -1 at 14 nats below.

    Measured from the clip's own peak, the result does not change with loudness; below -59 dB of full scale the
    reference stays there, so that silence is -1 and not amplified noise. A frame starts every 10 ms and lasts
    25 ms; the end is padded with silence so that every sample is in a frame, and there is at least one.
    """
    wave = np.asarray(wave, dtype=np.float32)
    window, hop = frame_sizes(cfg)
    frames = 1 + max(math.ceil((len(wave) - window) / hop), 0)
    padded = np.zeros(window + (frames - 1) * hop, np.float32)
    padded[: len(wave)] = wave
    hann, filters, n_fft = _analysis(cfg.sample_rate, cfg.n_mels, window)
    spectrum = np.fft.rfft(np.lib.stride_tricks.sliding_window_view(padded, window)[::hop] * hann, n_fft)
    power = (spectrum.real**2 + spectrum.imag**2).astype(np.float32, copy=False)
    nats = np.log(np.maximum(power @ filters, FLOOR))
    peak = max(float(nats.max()), math.log(FLOOR) + RANGE)
    return np.maximum((nats - peak) * (2 / RANGE) + 1, -1).astype(np.float32, copy=False)


@lru_cache(maxsize=8)
def _analysis(sample_rate: int, n_mels: int, window: int) -> tuple[np.ndarray, np.ndarray, int]:
    """(Hann window that makes a full-scale tone 1, mel filters [bins, n_mels] with peaks of 1, FFT length)."""
    n_fft = 1 << (window - 1).bit_length()
    hann = np.hanning(window + 2)[1:-1]
    edges = _mel_to_hertz(np.linspace(0, _hertz_to_mel(sample_rate / 2), n_mels + 2))
    bins = np.arange(n_fft // 2 + 1)[:, None] * (sample_rate / n_fft)
    low, centre, high = edges[:-2], edges[1:-1], edges[2:]
    filters = np.clip(np.minimum((bins - low) / (centre - low), (high - bins) / (high - centre)), 0, None)
    return (hann * (2 / hann.sum())).astype(np.float32), filters.astype(np.float32), n_fft


# Slaney's scale: linear to 1 kHz, where its filters stay wider than an FFT bin, logarithmic above.
_LINEAR, _BREAK, _STEP = 200 / 3, 1000.0, math.log(6.4) / 27


def _hertz_to_mel(hertz: float) -> float:
    return hertz / _LINEAR if hertz < _BREAK else _BREAK / _LINEAR + math.log(hertz / _BREAK) / _STEP


def _mel_to_hertz(mel: np.ndarray) -> np.ndarray:
    log_part = _BREAK * np.exp(_STEP * (mel - _BREAK / _LINEAR))
    return np.where(mel < _BREAK / _LINEAR, mel * _LINEAR, log_part)


def audio_patches(wave: np.ndarray, cfg: AudioConfig) -> tuple[np.ndarray, np.ndarray]:
    """float [S] -> (values float32 [n, frames_per_token * n_mels], coords float32 [n, 3] = (start in seconds, 0, 0)).

    n = max(1, whole and begun tokens); a patch is [frames_per_token, n_mels] flattened, padded with silence.
    Raises :class:`MediaError` as :func:`check_wave` does.
    """
    wave = check_wave(wave, cfg)
    mel = log_mel(wave, cfg)
    n = -(-len(mel) // cfg.frames_per_token)
    values = np.full((n * cfg.frames_per_token, cfg.n_mels), -1, np.float32)
    values[: len(mel)] = mel
    coords = np.zeros((n, 3), np.float32)
    coords[:, 0] = np.arange(n) * token_seconds(cfg)
    return values.reshape(n, cfg.features), coords
