"""What a model sees and hears: the part of its configuration that reading media needs."""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass

from fourfold.fields import require


@dataclass(frozen=True)
class ImageConfig:
    """Square pixel patches of an image whose sides are multiples of ``patch_size``."""

    patch_size: int = 8
    max_patches: int = 64

    def __post_init__(self) -> None:
        require(self.patch_size > 0, "media.image.patch_size", "must be > 0")
        require(self.max_patches > 0, "media.image.max_patches", "must be > 0")

    @property
    def features(self) -> int:
        return 3 * self.patch_size**2


@dataclass(frozen=True)
class VideoConfig:
    """Tubelets: ``tubelet_frames`` x ``patch_size`` x ``patch_size`` pixels of evenly sampled frames."""

    patch_size: int = 8
    tubelet_frames: int = 2
    max_frames: int = 8
    max_patches: int = 16  # per tubelet slice

    def __post_init__(self) -> None:
        require(self.patch_size > 0, "media.video.patch_size", "must be > 0")
        require(self.tubelet_frames > 0, "media.video.tubelet_frames", "must be > 0")
        require(
            self.max_frames % self.tubelet_frames == 0, "media.video.max_frames", "must be a multiple of tubelet_frames"
        )
        require(self.max_patches > 0, "media.video.max_patches", "must be > 0")

    @property
    def features(self) -> int:
        return 3 * self.tubelet_frames * self.patch_size**2


@dataclass(frozen=True)
class AudioConfig:
    """Log-mel frames of mono sound (window 25 ms, hop 10 ms), ``frames_per_token`` to a token."""

    sample_rate: int = 16000
    n_mels: int = 64
    frames_per_token: int = 4
    max_seconds: float = 20.0

    def __post_init__(self) -> None:
        for name in ("sample_rate", "n_mels", "frames_per_token", "max_seconds"):
            require(getattr(self, name) > 0, f"media.audio.{name}", "must be > 0")

    @property
    def features(self) -> int:
        return self.n_mels * self.frames_per_token


@dataclass(frozen=True)
class VisionConfig:
    """An image tower of its own and the aligner into the decoder (DeepSeek-V4.1), in place of ``media.image``."""

    num_hidden_layers: int = 32
    hidden_size: int = 1024
    num_attention_heads: int = 16
    intermediate_size: int = 2816
    patch_size: int = 14
    rope_theta: float = 10000.0
    rms_norm_eps: float = 1e-6
    downsample: int = 3  # patches on a side of what becomes one token
    max_image_tokens: int = 1024
    min_pixels: int = 295936
    image_token_id: int = 0

    def __post_init__(self) -> None:
        for f in dataclasses.fields(self):
            if f.name != "image_token_id":
                require(getattr(self, f.name) > 0, f"media.vision.{f.name}", "must be > 0")
        require(self.max_image_tokens >= 4, "media.vision.max_image_tokens", "must be >= 4: the least a picture takes")
        require(
            self.hidden_size % (4 * self.num_attention_heads) == 0,
            "media.vision.hidden_size",
            f"must be a multiple of 4 x num_attention_heads ({4 * self.num_attention_heads})",
        )

    @property
    def features(self) -> int:
        """Numbers of one token: the pixels of its ``downsample`` x ``downsample`` patches."""
        return 3 * (self.patch_size * self.downsample) ** 2


@dataclass(frozen=True)
class MediaConfig:
    """Early-fusion inputs; ``None`` leaves a modality out. ``hidden_size``: width inside the embedders."""

    hidden_size: int = 256
    image: ImageConfig | None = None
    video: VideoConfig | None = None
    audio: AudioConfig | None = None
    vision: VisionConfig | None = None

    def __post_init__(self) -> None:
        require(self.hidden_size > 0, "media.hidden_size", "must be > 0")
        require(self.image is None or self.vision is None, "media.vision", "cannot stand beside media.image")

    @property
    def embedded(self) -> tuple[str, ...]:
        """The modalities that enter through embedders, without a tower."""
        return tuple(name for name in ("image", "video", "audio") if getattr(self, name) is not None)

    @property
    def modalities(self) -> tuple[str, ...]:
        return ("image", *self.embedded) if self.vision is not None else self.embedded
