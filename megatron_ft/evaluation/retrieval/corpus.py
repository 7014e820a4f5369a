"""Documents, topics and names of lines: our own, drawn without end, or those of a user's file.

Our own name what does not exist, so that no model knows an answer beforehand.
"""

from __future__ import annotations

import json
import random
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

from megatron_ft.errors import DataError
from megatron_ft.files import read_text

Made = TypeVar("Made")


@dataclass(frozen=True)
class Topic:
    """A topic and a conversation about it."""

    topic: str
    conversation: str


@dataclass(frozen=True)
class Document:
    """A document, and a question that it answers. distractors: documents that were found for the question and do not answer it."""

    title: str
    text: str
    question: str = ""
    answers: tuple[str, ...] = ()
    distractors: tuple[Document, ...] = ()


def line_name(rng: random.Random) -> str:
    return f"{rng.choice(_QUALITIES)}-{rng.choice(_THINGS)}-{rng.choice(_THINGS)}"


def topics(rng: random.Random) -> Iterator[Topic]:
    """Yield conversations of about 200 words. Some topics come again."""
    while True:
        topic = f"{rng.choice(_ASPECTS)} of {rng.choice(_SUBJECTS)}"
        turns = [f"USER: I would like to discuss the topic of {topic}.", f"ASSISTANT: {rng.choice(_OPENINGS)}"]
        for asked, said in rng.sample(_EXCHANGES, 4):
            turns += [f"USER: {asked}", f"ASSISTANT: {said}"]
        yield Topic(topic, "\n".join(turns))


def documents(rng: random.Random) -> Iterator[Document]:
    """Yield documents of about 60 words, each about a place that someone built."""
    while True:
        kind, builder, town = rng.choice(_KINDS), f"{_name(rng)} {_name(rng)}", _name(rng)
        title = f"{_name(rng)} {kind}"
        year, height, visitors = rng.randint(1400, 1990), rng.randint(8, 190), rng.randint(2, 900)
        sentences = [
            f"It was designed by {builder} and finished in {year}.",
            f"The nearest town is {town}; it is {height} metres high.",
            f"About {visitors} thousand people visit it in a year.",
            *rng.sample(_REMARKS, 3),
        ]
        rng.shuffle(sentences)
        text = f"The {title} stands in the hills of {_name(rng)}. {' '.join(sentences)}"
        yield Document(title, text, f"Who designed the {title}?", (builder,))


def _name(rng: random.Random) -> str:
    return "".join(rng.choice(_SYLLABLES) for _ in range(rng.randint(2, 3))).capitalize()


def read_topics(path: Path) -> tuple[Topic, ...]:
    """Read JSON lines of {"topic": ..., "conversation": ...}, as LongEval has them. Raise DataError with file and line."""
    return _read(path, _topic, '{"topic": text, "conversation": text}')


def _topic(line: dict[str, Any]) -> Topic:
    return Topic(_text(line["topic"]), _text(line["conversation"]))


def read_documents(path: Path) -> tuple[Document, ...]:
    """Read JSON lines of documents with their question, or of questions with documents as Lost in the Middle has them.

    Raise DataError with file and line, and if there is no question.
    """
    shape = '{"title", "text", "question", "answers"} or {"question", "answers", "ctxs": [{"title", "text", "isgold"}]}'
    found = _read(path, _document, shape)
    if not any(document.question for document in found):
        raise DataError(f'{path}: no document has a "question" with "answers"; add some')
    return found


def _document(line: dict[str, Any]) -> Document:
    if "ctxs" not in line:
        question = _text(line["question"]) if "question" in line else ""
        return Document(_text(line["title"]), _text(line["text"]), question, _answers(line) if question else ())
    gold = [found for found in line["ctxs"] if found.get("isgold")] or [
        found for found in line["ctxs"] if found.get("hasanswer")
    ]
    others = tuple(
        Document(_text(other["title"]), _text(other["text"])) for other in line["ctxs"] if other is not gold[0]
    )
    return Document(_text(gold[0]["title"]), _text(gold[0]["text"]), _text(line["question"]), _answers(line), others)


def _answers(line: dict[str, Any]) -> tuple[str, ...]:
    answers = line["answers"]
    if not isinstance(answers, list) or not answers:
        raise ValueError
    return tuple(map(_text, answers))


def _text(value: Any) -> str:
    if not isinstance(value, str) or not value.strip():
        raise ValueError
    return value


def _read(path: Path, made: Callable[[dict[str, Any]], Made], shape: str) -> tuple[Made, ...]:
    found = []
    for number, line in enumerate(read_text(path).splitlines(), 1):
        if not line.strip():
            continue
        try:
            found.append(made(json.loads(line)))
        except (ValueError, KeyError, TypeError, AttributeError, IndexError) as error:
            raise DataError(f"{path}, line {number}: each line must be {shape}") from error
    if not found:
        raise DataError(f"{path}: is empty; each line must be {shape}")
    return tuple(found)


_SYLLABLES = (
    "ba bel bor cal cor dan del dra fen fir gal gor hal hes ian ker kol lan lor mar mel mon nar nel nor or pel per quil ran rel ros sal "
    "sen sor tal tem tor ul van vel vor wen wil yar zan zel"
).split()
_QUALITIES = (
    "able amber ample ashen basic blunt brave brisk broad calm civil clean clear close coarse cool crisp dense eager early elder even "
    "exact faint fair fancy fast fine firm flat fond frank fresh gentle glad grand green handy happy hardy honest humble ideal keen kind "
    "large late light lively local long loud lucky major mellow mild minor misty modest narrow neat new noble odd olive open pale plain "
    "polite prime proud pure quick quiet rapid rare ready rich ripe round royal rural rusty sandy sharp shy silent silver simple slim "
    "slow smart smooth sober soft solid sour spare steady steep stiff still strict strong sunny sweet swift tall tame tart tender thick "
    "thin tidy tiny tough urban vague vast vivid warm wary wide wild wise witty young"
).split()
_THINGS = (
    "acorn anchor apple arrow badge barn basket beacon bell bench bird boat bottle branch bread bridge brook brush bucket button cabin "
    "candle canoe carpet castle chain chair chalk cherry circle clay clock cloud coat coin comb copper corner cotton cradle crane crown "
    "cup curtain desk dial door dragon drum eagle engine fabric farm feather fence field flag flame flute forest fork fountain garden gate "
    "glass glove goose grain guitar hammer harbor hat hill honey hook horse island ivory jacket jar kettle key kite ladder lake lamp "
    "leaf lemon letter lock log magnet map marble meadow melon mill mirror needle nest oar oven owl paddle page paper pearl pencil "
    "pepper piano pillow pine pocket pond quilt raft rail ribbon ring river road robe rope saddle sail scarf shell shelf ship shoe "
    "spoon stable statue stone stove string sugar table tent thread tiger tower train tunnel turtle vase violin wagon wall wheel window "
    "wolf wood wool yarn"
).split()
_KINDS = ("Lighthouse", "Bridge", "Observatory", "Library", "Windmill", "Theatre", "Monastery", "Aqueduct", "Garden")
_REMARKS = (
    "Its stones come from a quarry on the other side of the valley.",
    "A storm damaged the roof, which was repaired within two summers.",
    "In winter the road to it is often closed.",
    "The view from the top was described by several travellers.",
    "Its walls are covered with old inscriptions that nobody has read yet.",
    "A small museum next to it shows tools of the time.",
    "For many years it belonged to a family of merchants.",
    "Local people meet there at the beginning of spring.",
    "The first plans were lost, and only a sketch of them is known.",
    "It was closed for a decade and opened again after a petition.",
)
_ASPECTS = (
    "the history", "the costs", "the future", "the safety", "the teaching", "the design", "the repair", "the popularity", "the rules",
    "the economics", "the critics", "the beginnings",
)  # fmt: skip
_SUBJECTS = (
    "solar panels", "wooden boats", "city parks", "night trains", "chess clubs", "rooftop gardens", "folk music", "desert farming",
    "glass blowing", "public libraries", "mountain rescue", "radio drama", "bicycle lanes", "tea houses", "deep sea diving",
    "paper making", "wind power", "street food", "school theatre", "beekeeping", "map making", "ice skating", "bird watching",
    "clock towers", "canal locks", "hand weaving", "river ferries", "amateur astronomy", "sheep dogs", "jazz festivals", "steam engines",
    "herb medicine", "kite flying", "tram networks", "salt mines", "puppet shows", "cave painting", "coffee roasting", "forest fires",
)  # fmt: skip
_OPENINGS = (
    "Gladly. Where would you like to begin?",
    "That is a good subject. What made you think of it?",
    "With pleasure. I can describe what is known and what is disputed.",
    "Of course. There is more to say about it than most people expect.",
)
_EXCHANGES = (
    ("What surprises people most about it?", "How long it took until anybody took it seriously, and how quickly it spread then."),
    ("Is there a good book about it?", "There are several. The older ones are better written, the newer ones have the numbers."),
    ("How would a beginner learn more?", "By visiting a place where it is done and asking questions. Reading is not enough."),
    ("Who disagrees about it?", "Those who do it for a living and those who write about it rarely agree, and both have good reasons."),
    ("Did it change in recent years?", "Yes, mainly because materials became cheaper. The basic ideas stayed what they were."),
    ("What is the most common mistake?", "To start with the difficult part. Most of the work is preparation, which nobody sees."),
    ("Does it differ from country to country?", "A little. The names differ more than the methods do."),
    ("Is it worth the effort?", "For most people it is, if they have patience in the first year and somebody to ask."),
    ("What would you improve?", "I would write down what the experienced people know, because much of it is lost when they retire."),
    ("How is its quality measured?", "There are standards, but in practice people trust those whose work has lasted."),
)  # fmt: skip
