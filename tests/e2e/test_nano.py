"""The bundled model through the real server and the official client: its skills are real, and it looks and listens."""

import base64
import io

import numpy as np
import openai
import pytest
from PIL import Image, ImageDraw

from tests.api.media import audio_part, image_part, video_part
from tests.e2e.conftest import Server
from tests.media.clips import sound_file

DIRECTIONS = {"left": (-1, 0), "right": (1, 0), "up": (0, -1), "down": (0, 1)}


@pytest.fixture(scope="module")
def client():
    server = Server("nano")
    with openai.OpenAI(base_url=f"{server.url}/v1", api_key="none", max_retries=0, timeout=60) as client:
        yield client
    server.stop()


def ask(client, *content, **options):
    parts = [part if isinstance(part, dict) else {"type": "text", "text": part} for part in content]
    reply = client.chat.completions.create(
        model="nano", messages=[{"role": "user", "content": parts}], **{"temperature": 0, "max_tokens": 60, **options}
    )
    return reply.choices[0].message.content.strip()


def circle(colour: str) -> bytes:
    image = Image.new("RGB", (96, 96), "#f0f0ee")
    ImageDraw.Draw(image).ellipse((14, 14, 82, 82), fill=colour)
    file = io.BytesIO()
    image.save(file, "PNG")
    return file.getvalue()


def sweep(start: float, stop: float) -> bytes:
    hertz = np.linspace(start, stop, 12800)
    return sound_file((0.5 * np.sin(2 * np.pi * np.cumsum(hertz) / 16000)).astype(np.float32))


def moving(direction: str) -> bytes:
    """A GIF of a red disc that moves."""
    x, y = DIRECTIONS[direction]
    frames = []
    for step in np.linspace(-20, 20, 8):
        frame = Image.new("RGB", (96, 96), "#d8e4ea")
        cx, cy = 48 + x * step, 48 + y * step
        ImageDraw.Draw(frame).ellipse((cx - 18, cy - 18, cx + 18, cy + 18), fill="#dc2828")
        frames.append(frame)
    file = io.BytesIO()
    frames[0].save(file, "GIF", save_all=True, append_images=frames[1:], duration=120)
    return file.getvalue()


def gif_part(data: bytes) -> dict:
    return {"type": "video_url", "video_url": {"url": "data:image/gif;base64," + base64.b64encode(data).decode()}}


def test_it_says_who_it_is(client):
    assert "Fourfold nano" in ask(client, "Who are you?")


def test_streamed_answer_is_the_whole_answer(client):
    request = {"model": "nano", "messages": [{"role": "user", "content": "What can you do?"}], "temperature": 0}
    whole = client.chat.completions.create(**request).choices[0].message.content
    chunks = client.chat.completions.create(**request, stream=True)
    assert "".join(c.choices[0].delta.content or "" for c in chunks if c.choices) == whole


@pytest.mark.parametrize("colour", ["red", "blue", "yellow"])
def test_colour_of_a_drawn_circle(client, colour):
    shades = {"red": "#dc2828", "blue": "#325adc", "yellow": "#f5dc32"}
    assert colour in ask(client, image_part(circle(shades[colour])), "What colour is the circle?")


@pytest.mark.parametrize("answer, sound", [("rising", sweep(260, 780)), ("falling", sweep(780, 260))])
def test_direction_of_a_tone(client, answer, sound):
    assert ask(client, audio_part(sound), "Is the tone rising or falling?") == answer


@pytest.mark.parametrize("direction", DIRECTIONS)
def test_direction_of_a_moving_disc(client, direction):
    assert ask(client, gif_part(moving(direction)), "Which way does it move?") == direction


def test_every_kind_of_file_is_answered(client):
    for part in (image_part(), audio_part(), video_part()):
        assert ask(client, part, "What is this?")


def test_seeded_sampling_repeats(client):
    first, second = (ask(client, "Tell me about yourself.", temperature=1.2, seed=5) for _ in range(2))
    assert first == second
