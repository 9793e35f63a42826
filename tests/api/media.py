"""Small files of every kind, made here."""

import base64
import io
import wave
from fractions import Fraction

import av
import numpy as np
from PIL import Image


def png(colour=(220, 40, 40), size=(12, 9)) -> bytes:
    out = io.BytesIO()
    Image.new("RGB", size, colour).save(out, "PNG")
    return out.getvalue()


def wav(seconds: float = 0.3, hertz: float = 440.0, rate: int = 16000) -> bytes:
    samples = (np.sin(2 * np.pi * hertz * np.arange(int(rate * seconds)) / rate) * 20000).astype("<i2")
    out = io.BytesIO()
    with wave.open(out, "wb") as file:
        file.setnchannels(1)
        file.setsampwidth(2)
        file.setframerate(rate)
        file.writeframes(samples.tobytes())
    return out.getvalue()


def mp4(frames: int = 6) -> bytes:
    out = io.BytesIO()
    with av.open(out, "w", format="mp4") as container:
        stream = container.add_stream("mpeg4", rate=8)
        stream.width = stream.height = 32
        stream.pix_fmt = "yuv420p"
        stream.time_base = Fraction(1, 8)
        for n in range(frames):
            picture = np.full((32, 32, 3), 40 * n, np.uint8)
            container.mux(stream.encode(av.VideoFrame.from_ndarray(picture, format="rgb24")))
        container.mux(stream.encode())
    return out.getvalue()


def url(mime: str, data: bytes) -> str:
    return f"data:{mime};base64,{base64.b64encode(data).decode()}"


def image_part(data: bytes | None = None) -> dict:
    return {"type": "image_url", "image_url": {"url": url("image/png", data or png())}}


def audio_part(data: bytes | None = None) -> dict:
    return {"type": "input_audio", "input_audio": {"data": base64.b64encode(data or wav()).decode(), "format": "wav"}}


def video_part(data: bytes | None = None) -> dict:
    return {"type": "video_url", "video_url": {"url": url("video/mp4", data or mp4())}}
