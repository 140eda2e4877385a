"""A synthetic translation task for machines without access to a hub: German and English sentences of a small grammar.

It needs word reordering, agreement and plurals, as real translation does. Its scores say nothing about real German.
"""

import random
from typing import Any

from shardlaunch.launcher.reporting.notes import current
from shardlaunch.launcher.toolkit.other_data import with_other_rows

NUM_TRAIN = 8000
NUM_EVAL = 200

# gender, German singular and plural, English singular and plural
_NOUNS = [
    ("m", "Hund", "Hunde", "dog", "dogs"),
    ("m", "Mann", "Männer", "man", "men"),
    ("m", "Apfel", "Äpfel", "apple", "apples"),
    ("m", "Baum", "Bäume", "tree", "trees"),
    ("m", "Brief", "Briefe", "letter", "letters"),
    ("f", "Frau", "Frauen", "woman", "women"),
    ("f", "Katze", "Katzen", "cat", "cats"),
    ("f", "Blume", "Blumen", "flower", "flowers"),
    ("f", "Lampe", "Lampen", "lamp", "lamps"),
    ("n", "Kind", "Kinder", "child", "children"),
    ("n", "Buch", "Bücher", "book", "books"),
    ("n", "Haus", "Häuser", "house", "houses"),
    ("n", "Bild", "Bilder", "picture", "pictures"),
]
_ADJECTIVES = [
    ("klein", "small"),
    ("groß", "big"),
    ("rot", "red"),
    ("alt", "old"),
    ("neu", "new"),
    ("schön", "beautiful"),
    ("grün", "green"),
    ("braun", "brown"),
]
_NUMBERS = [("zwei", "two"), ("drei", "three"), ("vier", "four"), ("fünf", "five"), ("sechs", "six"), ("zehn", "ten")]
# German third person singular, infinitive (as the plural); English third person singular, infinitive
_VERBS = [
    ("sieht", "sehen", "sees", "see"),
    ("kauft", "kaufen", "buys", "buy"),
    ("malt", "malen", "paints", "paint"),
    ("sucht", "suchen", "seeks", "seek"),
    ("findet", "finden", "finds", "find"),
    ("zeichnet", "zeichnen", "draws", "draw"),
]
_MODALS = [
    ("will", "wollen", "wants to", "want to"),
    ("kann", "können", "can", "can"),
    ("muss", "müssen", "must", "must"),
]
_TIMES = [("heute", "today"), ("morgen", "tomorrow"), ("jetzt", "now"), ("oft", "often"), ("wieder", "again")]
_ARTICLES = {"m": ("der", "den"), "f": ("die", "die"), "n": ("das", "das")}  # nominative, accusative


def toy_translations() -> dict[str, Any]:
    """Return data sets `train` and `eval` with the columns de and en; no sentence is in both."""
    import datasets

    rng = random.Random(0)
    pairs: dict[str, str] = {}
    while len(pairs) < NUM_TRAIN + NUM_EVAL:
        pairs.update([_sentence(rng)])
    current().data.append("sentences of a small grammar")
    current().splits |= {"train": f"{NUM_TRAIN:,} rows", "eval": f"{NUM_EVAL:,} other rows"}
    rows = datasets.Dataset.from_dict({"de": list(pairs), "en": list(pairs.values())})
    splits = {"train": rows.select(range(NUM_TRAIN)), "eval": rows.select(range(NUM_TRAIN, NUM_TRAIN + NUM_EVAL))}
    return with_other_rows(splits, columns={"de": "text", "en": "text"})


def _sentence(rng: random.Random) -> tuple[str, str]:
    """Return a main clause (time first, so that subject and verb are inverted), sometimes with a reason."""
    time, english_time = rng.choice(_TIMES)
    finite, subject, rest = _clause(rng)
    german = f"{time.capitalize()} {finite[0]} {subject[0]} {rest[0]}"
    english = f"{subject[1].capitalize()} {finite[1]} {rest[1]} {english_time}"
    if rng.random() < 0.3:
        finite, subject, rest = _clause(rng)
        german += f", weil {subject[0]} {rest[0]} {finite[0]}"  # the verb at the end
        english += f" because {subject[1]} {finite[1]} {rest[1]}"
    return f"{german}.", f"{english}."


def _clause(rng: random.Random) -> tuple[tuple[str, str], tuple[str, str], tuple[str, str]]:
    """Return the finite verb, the subject and the rest of a clause, each in German and English."""
    subject, is_plural = _noun_phrase(rng, case=0)
    thing, _ = _noun_phrase(rng, case=1)
    verb = rng.choice(_VERBS)
    if rng.random() < 0.5:
        return (verb[is_plural], verb[2 + is_plural]), subject, thing
    modal = rng.choice(_MODALS)
    rest = (f"{thing[0]} {verb[1]}", f"{verb[3]} {thing[1]}")  # the infinitive at the end
    return (modal[is_plural], modal[2 + is_plural]), subject, rest


def _noun_phrase(rng: random.Random, *, case: int) -> tuple[tuple[str, str], bool]:
    """Return a phrase such as `den kleinen Hund`, `the small dog`, and whether it is a plural."""
    gender, *nouns = rng.choice(_NOUNS)
    adjective, english = rng.choice(_ADJECTIVES)
    if rng.random() < 0.4:
        number, english_number = rng.choice(_NUMBERS)
        return (f"{number} {adjective}e {nouns[1]}", f"{english_number} {english} {nouns[3]}"), True
    ending = "en" if gender == "m" and case == 1 else "e"
    return (f"{_ARTICLES[gender][case]} {adjective}{ending} {nouns[0]}", f"the {english} {nouns[2]}"), False
