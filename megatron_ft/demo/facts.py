"""The facts of the demo's chats: six topics with their subjects, ten wordings of the question and one form of the answer.

In a wording {x} is the subject. It is never the first word, because tokenizers encode a first word differently. In an answer {x}, or
{X} with a capital letter, is the subject, and {y} is the fact.
"""

from dataclasses import dataclass


@dataclass(frozen=True)
class Topic:
    """One topic. facts: subject -> the fact about it."""

    name: str
    wordings: tuple[str, ...]
    answer: str
    facts: dict[str, str]


def _pairs(text: str) -> dict[str, str]:
    """Return "a plum: purple, a lemon: yellow" as a dict."""
    return dict(pair.strip().split(": ") for pair in text.split(","))


COLOUR = Topic(
    "colour",
    (
        "What colour is {x}?",
        "Which colour does {x} have?",
        "Tell me the colour of {x}.",
        "Say, {x} has which colour?",
        "Do you know what colour {x} is?",
        "Name the colour of {x}.",
        "I wonder what colour {x} is.",
        "To paint {x}, which colour do I need?",
        "The colour of {x}, please.",
        "Can you say what colour {x} is?",
    ),
    "{X} is {y}.",
    _pairs(
        "a plum: purple, a lemon: yellow, a banana: yellow, a carrot: orange, a tomato: red, a cucumber: green,"
        "a cherry: red, a pea: green, a strawberry: red, a pumpkin: orange, a blueberry: blue, an egg: white,"
        "a flamingo: pink, a raven: black, a swan: white, a frog: green, a fox: red, an elephant: grey,"
        "a polar bear: white, a canary: yellow, a sapphire: blue, a ruby: red, an emerald: green, a chestnut: brown"
    ),
)
SOUND = Topic(
    "sound",
    (
        "What does {x} say?",
        "What sound does {x} make?",
        "Which sound do you hear from {x}?",
        "Tell me the sound of {x}.",
        "Say, {x} makes which sound?",
        "Do you know what {x} says?",
        "How does {x} sound?",
        "I hear {x}, what do I hear?",
        "The sound of {x}, please.",
        "Can you say what sound {x} makes?",
    ),
    "{X} says {y}.",
    _pairs(
        "a cow: moo, a sheep: baa, a pig: oink, a horse: neigh, a dog: woof, a cat: meow, a duck: quack, a hen: cluck,"
        "a rooster: cockadoodledoo, a bee: buzz, a snake: hiss, a frog: ribbit, an owl: hoot, a dove: coo, a raven: caw,"
        "a lion: roar, a wolf: howl, a mouse: squeak, a turkey: gobble, a sparrow: tweet"
    ),
)
CAPITAL = Topic(
    "capital",
    (
        "What is the capital of {x}?",
        "Which city is the capital of {x}?",
        "Tell me the capital of {x}.",
        "Say, {x} has which capital?",
        "Do you know the capital of {x}?",
        "Name the capital of {x}.",
        "I forgot the capital of {x}.",
        "Which city governs {x}?",
        "The capital of {x}, please.",
        "Can you name the capital of {x}?",
    ),
    "The capital of {x} is {y}.",
    _pairs(
        "France: Paris, Spain: Madrid, Italy: Rome, Greece: Athens, Norway: Oslo, Sweden: Stockholm, Finland: Helsinki,"
        "Denmark: Copenhagen, Poland: Warsaw, Austria: Vienna, Hungary: Budapest, Portugal: Lisbon, Ireland: Dublin,"
        "Egypt: Cairo, Kenya: Nairobi, Japan: Tokyo, China: Beijing, Cuba: Havana, Peru: Lima, Chile: Santiago,"
        "Canada: Ottawa, Turkey: Ankara, Iceland: Reykjavik, Belgium: Brussels"
    ),
)
OPPOSITE = Topic(
    "opposite",
    (
        "What is the opposite of {x}?",
        "Which word is the opposite of {x}?",
        "Tell me the opposite of {x}.",
        "Say, {x} is the opposite of what?",
        "Do you know the opposite of {x}?",
        "Name the opposite of {x}.",
        "If something is not {x}, what is it?",
        "I need the opposite of {x}.",
        "The opposite of {x}, please.",
        "Can you find the opposite of {x}?",
    ),
    "The opposite of {x} is {y}.",
    _pairs(
        "hot: cold, big: small, old: young, wet: dry, fast: slow, high: low, hard: soft, rich: poor, early: late,"
        "full: empty, happy: sad, strong: weak, dark: light, long: short, loud: quiet, clean: dirty, near: far,"
        "open: closed, thick: thin, sweet: bitter, deep: shallow, cheap: expensive, wild: tame, sharp: blunt"
    ),
)
YOUNG = Topic(
    "young",
    (
        "What is the young of {x} called?",
        "Which name has the young of {x}?",
        "Tell me the name of the young of {x}.",
        "Say, the young of {x} has which name?",
        "Do you know the name of the young of {x}?",
        "Name the young of {x}.",
        "How do we call the young of {x}?",
        "I saw the young of {x}, what is its name?",
        "The name of the young of {x}, please.",
        "Can you say how the young of {x} is called?",
    ),
    "The young of {x} is called a {y}.",
    _pairs(
        "a cow: calf, a sheep: lamb, a pig: piglet, a horse: foal, a dog: puppy, a cat: kitten, a duck: duckling,"
        "a hen: chick, a swan: cygnet, a goose: gosling, a goat: kid, a bear: cub, a deer: fawn, a frog: tadpole,"
        "a kangaroo: joey, a hare: leveret"
    ),
)
PLURAL = Topic(
    "plural",
    (
        "What is the plural of {x}?",
        "Which word is the plural of {x}?",
        "Tell me the plural of {x}.",
        "Say, {x} has which plural?",
        "Do you know the plural of {x}?",
        "Name the plural of {x}.",
        "How do I write more than one {x}?",
        "I need the plural of {x}.",
        "The plural of {x}, please.",
        "Can you form the plural of {x}?",
    ),
    "The plural of {x} is {y}.",
    _pairs(
        "mouse: mice, goose: geese, foot: feet, tooth: teeth, man: men, woman: women, child: children, ox: oxen,"
        "leaf: leaves, wolf: wolves, knife: knives, life: lives, half: halves, shelf: shelves, person: people,"
        "louse: lice, cactus: cacti, crisis: crises"
    ),
)

TOPICS = (COLOUR, SOUND, CAPITAL, OPPOSITE, YOUNG, PLURAL)
