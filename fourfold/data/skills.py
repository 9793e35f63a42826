"""The skills of the bundled model: each makes one :class:`Item` (or a piece of prose) from a corpus and a Generator.

In the train split pictures and sounds are varied; in the test split they are as they are, and unseen.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np

from fourfold.data import augment, synthetic
from fourfold.data.corpus import Corpus, Shard
from fourfold.data.items import Item, ask, pick
from fourfold.data.labels import CLOTHES, DIGITS, EMOJI
from fourfold.text.chat import Media

Rng = np.random.Generator
Made = Item | str

ABOUT = "I am Fourfold nano, a small multimodal model. I read text, images, video and audio."
CAN_DO = (
    "I can name clothes and emoji in pictures, hear digits, words and tones, see which way things move, "
    "add and subtract, and look things up in a text you give me."
)
GREETINGS = {
    ("Hello", "Hi", "Hello!", "Hi!", "Hey", "Hi there", "Good morning", "hello", "hi"): (
        "Hello! I am Fourfold nano. How can I help you?",
    ),
    (
        "Who are you?",
        "What are you?",
        "What is your name?",
        "Tell me about yourself.",
        "who are you",
        "Which model are you?",
    ): (ABOUT,),
    ("What can you do?", "Help", "What can I ask you?", "How can you help me?", "what can you do"): (CAN_DO,),
    ("Can you see images?", "Can you see pictures?", "Can you look at a picture?"): (
        "Yes. Attach a picture and ask me what is in it.",
    ),
    ("Can you hear?", "Can you hear audio?", "Do you understand speech?"): (
        "Yes, a little: attach a sound and ask me which word or tone it is.",
    ),
    ("Can you watch videos?", "Can you see video?"): ("Yes. Attach a short clip and ask me which way things move.",),
    ("How are you?", "How are you doing?"): ("I am well, thank you. What would you like to know?",),
    ("Thanks", "Thank you", "Thank you!", "thanks"): ("You are welcome!",),
    ("Bye", "Goodbye", "Goodbye!", "See you"): ("Goodbye!",),
    ("Are you a human?", "Are you a person?", "Are you an AI?"): ("I am a small AI model called Fourfold nano.",),
    ("How big are you?", "How many parameters do you have?"): ("I am small: about nine million parameters.",),
    ("Who made you?",): (
        "I was trained from scratch by the Fourfold project, an open implementation of a multimodal model.",
    ),
}

WHAT = ("What is this?", "What is in this picture?", "What do you see?", "Name this.", "What does the picture show?")
WHAT_CLOTHES = ("What clothing is this?", "What kind of clothing is this?", "Which piece of clothing is this?", *WHAT)
WHAT_GROUP = ("What kind of thing is this: {}?", "Which group does it belong to: {}?")
WHAT_WORD = (
    "What word is this?",
    "What word do you hear?",
    "What is said?",
    "Which word is spoken?",
    "Transcribe this.",
)
WHAT_DIGIT = ("What digit is this?", "Which digit do you hear?", *WHAT_WORD)
WHICH_WAY = (
    "Which way does it move?",
    "In which direction does it move?",
    "Where does it go?",
    "What happens in this video?",
)
SUM_FORMS = (
    "{a} {o} {b} =",
    "What is {a} {o} {b}?",
    "{a} {o} {b}",
    "{a}{o}{b}=",
    "Calculate {a} {o} {b}.",
    "How much is {a} {o} {b}?",
)
DEFINE = ("What is {}?", "Define {}.", "What does {} mean?", "Explain {}.")
CAPITAL = ("What is the capital of {}?", "Which city is the capital of {}?", "Capital of {}?")


def _media_first(rng: Rng, split: str) -> bool:
    return split == "test" or rng.random() < 0.6


def _question(rng: Rng, split: str, wordings: tuple[str, ...]) -> str:
    """Any wording in training, the first one in tests."""
    return wordings[0] if split == "test" else pick(rng, wordings)


def greeting(corpus: Corpus, rng: Rng, split: str) -> Made:
    questions, answers = pick(rng, list(GREETINGS.items()))
    return Item("greeting", ask(pick(rng, questions)), pick(rng, answers))


def fashion(corpus: Corpus, rng: Rng, split: str) -> Made:
    shard = corpus["fashion"]
    row = pick(rng, _rows(corpus, "fashion", split))
    picture = np.asarray(shard.arrays["images"][row])
    picture = augment.vary_cloth(rng, picture) if split == "train" else np.repeat(picture[..., None], 3, -1)
    question = _question(rng, split, WHAT_CLOTHES)
    messages = ask(question, Media("image", picture), media_first=_media_first(rng, split))
    return Item("fashion", messages, str(shard.columns["label"][row]), CLOTHES)


def _emoji(shard: Shard, rng: Rng, row: int, split: str) -> Media:
    rgba = np.asarray(shard.arrays["images"][row])
    picture = augment.vary_emoji(rng, rgba) if split == "train" else augment.paste(rgba, rgba.shape[0])
    return Media("image", picture)


def emoji(corpus: Corpus, rng: Rng, split: str) -> Made:
    """In the test split the style is unseen; the concepts are known, as no other has a name that was taught."""
    name = "emoji" if split == "train" else "twemoji"
    shard, row = corpus[name], int(pick(rng, _rows(corpus, name, "train")))
    messages = ask(_question(rng, split, WHAT), _emoji(shard, rng, row, split), media_first=_media_first(rng, split))
    return Item("emoji", messages, str(shard.columns["label"][row]))


def emoji_group(corpus: Corpus, rng: Rng, split: str) -> Made:
    """animal, food, ... : asked of unseen concepts in tests. Three choices, in any order, in the question."""
    of_group = _group_rows(corpus)[split]
    answer = pick(rng, tuple(of_group))  # every group as often, so that a guess without the picture is worth a third
    row = int(pick(rng, of_group[answer]))
    others = [group for group in EMOJI if group != answer]
    choices = [answer, *(others[i] for i in rng.permutation(len(others))[:2])]
    choices = [choices[i] for i in rng.permutation(3)]
    question = _question(rng, split, WHAT_GROUP).format(f"{choices[0]}, {choices[1]} or {choices[2]}")
    return Item(
        "emoji_group",
        ask(question, _emoji(corpus["emoji"], rng, row, split), media_first=_media_first(rng, split)),
        answer,
        tuple(choices),
    )


def shapes(corpus: Corpus, rng: Rng, split: str) -> Made:
    count = int(rng.choice((1, 2, 3, 4), p=(0.4, 0.25, 0.2, 0.15)))
    size = 48 if split == "test" else int(rng.choice((32, 48, 64), p=(0.3, 0.5, 0.2)))
    picture, pairs = synthetic.shapes(rng, split, count, size)
    colour, kind = pick(rng, [pair for pair in pairs if split == "train" or synthetic.unseen_pair(*pair)])
    colours, numbers = tuple(synthetic.COLOURS), ("1", "2", "3", "4")
    if count == 1:
        asked = (
            (("What shape is this?", "Which shape is it?"), kind, synthetic.SHAPES),
            (("What colour is the shape?", "What color is it?", "What colour is this?"), colour, colours),
            (WHAT, f"{colour} {kind}", tuple(f"{c} {k}" for c in colours for k in synthetic.SHAPES)),
        )
    else:
        asked = (
            (("How many shapes are there?", "How many shapes do you see?", "Count the shapes."), str(count), numbers),
            ((f"What colour is the {kind}?", f"What color is the {kind}?"), colour, colours),
            ((f"What shape is {colour}?", f"Which shape is {colour}?"), kind, synthetic.SHAPES),
        )
    wordings, answer, choices = pick(rng, asked)
    messages = ask(_question(rng, split, wordings), Media("image", picture), media_first=_media_first(rng, split))
    return Item("shapes", messages, answer, choices)


def _clip(shard: Shard, rng: Rng, row: int, split: str) -> Media:
    wave = shard.piece("wave", row).astype(np.float32) / 32768
    return Media("audio", augment.vary_sound(rng, wave) if split == "train" else wave)


def speech(corpus: Corpus, rng: Rng, split: str) -> Made:
    """A spoken digit (two of three) or word; in the test split by a voice that was never trained."""
    digit = rng.random() < 0.65
    if split == "train":
        shard, row = corpus["speech"], _spoken_row(corpus, rng, digit)
    else:
        shard = corpus["unseen_voice"]
        row = int(pick(rng, np.flatnonzero(np.isin(shard.columns["label"], DIGITS) == digit)))
    word = str(shard.columns["label"][row])
    question = _question(rng, split, WHAT_DIGIT if digit else WHAT_WORD)
    return Item("speech", ask(question, _clip(shard, rng, row, split), media_first=_media_first(rng, split)), word)


def _spoken_row(corpus: Corpus, rng: Rng, digit: bool) -> int:
    """A training clip: the kind of voice first, so that natural ones are not drowned, then any clip of it."""
    family = pick(rng, ("flite", "flite", "hibari", "espeak", "espeak"))
    return int(pick(rng, _speech_rows(corpus)[family, digit]))


def tones(corpus: Corpus, rng: Rng, split: str) -> Made:
    if rng.random() < 0.35:
        count = int(rng.integers(1, 5))
        wave, answer, choices = synthetic.beeps(rng, count), str(count), ("1", "2", "3", "4")
        wordings: tuple[str, ...] = ("How many beeps do you hear?", "How many beeps?", "Count the beeps.")
    else:
        answer = pick(rng, synthetic.TONES)
        wave = synthetic.tone(rng, answer)
        if answer in ("high", "low"):
            wordings, choices = (
                ("Is the tone high or low?", "Is this a high or a low tone?", "High or low?"),
                ("high", "low"),
            )
        else:
            wordings, choices = (
                ("Is the tone rising or falling?", "Does the tone rise or fall?", "Rising or falling?"),
                ("rising", "falling"),
            )
    wave = augment.vary_sound(rng, wave, stretch=0.05) if split == "train" else wave
    messages = ask(_question(rng, split, wordings), Media("audio", wave), media_first=_media_first(rng, split))
    return Item("tones", messages, answer, choices)


def sounds(corpus: Corpus, rng: Rng, split: str) -> Made:
    shard = corpus["sounds"]
    row = int(pick(rng, _rows(corpus, "sounds", split)))
    question = _question(rng, split, ("What sound is this?", "What makes this sound?", "What do you hear?"))
    messages = ask(question, _clip(shard, rng, row, split), media_first=_media_first(rng, split))
    return Item(
        "sounds", messages, str(shard.columns["label"][row]), tuple(sorted(set(shard.columns["label"].tolist())))
    )


def motion(corpus: Corpus, rng: Rng, split: str) -> Made:
    """Which way a sprite goes; one clip in five has a spoken digit as its sound, and half of those ask for it."""
    sprite = np.asarray(corpus["emoji"].arrays["images"][pick(rng, _rows(corpus, "emoji", split))])
    direction = pick(rng, tuple(synthetic.DIRECTIONS))
    frames = synthetic.motion(rng, sprite, direction)
    seconds = np.arange(len(frames)) * (rng.uniform(0.08, 0.25) if split == "train" else 0.125)
    wave, question, answer = None, _question(rng, split, WHICH_WAY), direction
    choices = tuple(synthetic.DIRECTIONS)
    if split == "train" and "speech" in corpus and rng.random() < 0.2:
        row = _spoken_row(corpus, rng, True)
        wave = _clip(corpus["speech"], rng, row, split).value
        if rng.random() < 0.5:
            question, answer, choices = pick(rng, WHAT_DIGIT), str(corpus["speech"].columns["label"][row]), DIGITS
    media = Media("video", (frames, seconds, wave))
    return Item("motion", ask(question, media, media_first=_media_first(rng, split)), answer, choices)


def _sum(rng: Rng, split: str, problem: synthetic.Problem) -> str:
    return _question(rng, split, SUM_FORMS).format(a=problem.a, o=problem.operator, b=problem.b)


def arithmetic(corpus: Corpus, rng: Rng, split: str) -> Made:
    digits = 2 if split == "test" else int(rng.choice((1, 2, 3), p=(0.25, 0.6, 0.15)))
    problem = synthetic.arithmetic(rng, split, digits)
    return Item("arithmetic", ask(_sum(rng, split, problem)), str(problem.answer))


def arithmetic_thinking(corpus: Corpus, rng: Rng, split: str) -> Made:
    """Sums and differences of up to three digits, worked out before the answer."""
    while (problem := synthetic.arithmetic(rng, split, int(rng.integers(2, 4)))).operator == "x":
        pass
    return Item(
        "arithmetic_thinking",
        ask(_sum(rng, split, problem)),
        str(problem.answer),
        reasoning=synthetic.work_out(problem),
    )


def recall(corpus: Corpus, rng: Rng, split: str) -> Made:
    passage, question, answer = synthetic.recall(
        rng, split, int(rng.integers(2, 7) if rng.random() < 0.6 else rng.integers(7, 17))
    )
    return Item("recall", ask(f"{passage} {question}"), answer)


def text_tasks(corpus: Corpus, rng: Rng, split: str) -> Made:
    _, prompt, answer = synthetic.text_task(rng, split)
    return Item("text_tasks", ask(prompt), answer)


def capitals(corpus: Corpus, rng: Rng, split: str) -> Made:
    columns = corpus["facts"].columns
    row = int(rng.integers(len(columns["country"])))
    return Item(
        "capitals", ask(_question(rng, split, CAPITAL).format(columns["country"][row])), str(columns["capital"][row])
    )


def define(corpus: Corpus, rng: Rng, split: str) -> Made:
    columns = corpus["definitions"].columns
    row = int(rng.integers(len(columns["word"])))
    return Item("define", ask(_question(rng, split, DEFINE).format(columns["word"][row])), str(columns["gloss"][row]))


def prose(corpus: Corpus, rng: Rng, split: str, characters: int = 900) -> Made:
    """About ``characters`` of WordNet (neighbouring synsets), the Python documentation or the KJV."""
    shard = corpus["text"]
    source = ("wordnet", "python", "kjv")[int(rng.choice(3, p=(0.4, 0.35, 0.25)))]
    rows = _text_rows(corpus)[source, split]
    at = int(rng.integers(len(rows)))
    if source == "wordnet":
        return "\n".join(shard.text(int(row)) for row in rows[at : at + int(rng.integers(2, 9))])[:characters]
    start, stop = (int(v) for v in shard.arrays["offsets"][rows[at] : rows[at] + 2])
    start = int(rng.integers(start, max(stop - characters, start) + 1))
    piece = bytes(shard.arrays["text"][start : min(start + characters, stop)]).decode(errors="ignore")
    return piece.split(" ", 1)[-1]  # from the start of a word


def _memo(make: Callable[[Corpus], dict]) -> Callable[[Corpus], dict]:
    """Remembers the last corpus's answer: the row tables are wanted for every document."""
    last: list = [None, {}]

    def remembered(corpus: Corpus) -> dict:
        if last[0] is not corpus:
            last[:] = [corpus, make(corpus)]
        return last[1]

    return remembered


@_memo
def _split_rows(corpus: Corpus) -> dict:
    return {
        (name, split): shard.rows(split=split) for name, shard in corpus.shards.items() for split in ("train", "test")
    }


def _rows(corpus: Corpus, name: str, split: str) -> np.ndarray:
    return _split_rows(corpus)[name, split]


@_memo
def _group_rows(corpus: Corpus) -> dict:
    shard = corpus["emoji"]
    rows = {split: {group: shard.rows(category=group, split=split) for group in EMOJI} for split in ("train", "test")}
    return {split: {group: found for group, found in groups.items() if len(found)} for split, groups in rows.items()}


@_memo
def _speech_rows(corpus: Corpus) -> dict:
    columns = corpus["speech"].columns
    digit = np.isin(columns["label"], DIGITS)
    return {
        (family, wanted): np.flatnonzero(np.char.startswith(columns["voice"], family) & (digit == wanted))
        for family in ("flite", "hibari", "espeak")
        for wanted in (False, True)
    }


@_memo
def _text_rows(corpus: Corpus) -> dict:
    shard = corpus["text"]
    return {
        (s, split): shard.rows(source=s, split=split)
        for s in ("wordnet", "python", "kjv")
        for split in ("train", "test")
    }


@dataclass(frozen=True)
class Skill:
    """``make(corpus, rng, split)``; the shards it reads and the modality it needs."""

    make: Callable[[Corpus, Rng, str], Made]
    shards: tuple[str, ...] = ()
    modality: str = "text"


SKILLS = {
    "greeting": Skill(greeting),
    "prose": Skill(prose, ("text",)),
    "define": Skill(define, ("definitions",)),
    "capitals": Skill(capitals, ("facts",)),
    "arithmetic": Skill(arithmetic),
    "arithmetic_thinking": Skill(arithmetic_thinking),
    "recall": Skill(recall),
    "text_tasks": Skill(text_tasks),
    "fashion": Skill(fashion, ("fashion",), "image"),
    "emoji": Skill(emoji, ("emoji",), "image"),
    "emoji_group": Skill(emoji_group, ("emoji",), "image"),
    "shapes": Skill(shapes, (), "image"),
    "speech": Skill(speech, ("speech",), "audio"),
    "tones": Skill(tones, (), "audio"),
    "sounds": Skill(sounds, ("sounds",), "audio"),
    "motion": Skill(motion, ("emoji",), "video"),
}
