"""Arithmetic word problems with worked answers, written by templates: the embedded data set `arithmetic`."""

from __future__ import annotations

from collections.abc import Collection, Iterator, Sequence
from dataclasses import dataclass
from random import Random

from nexus_gpt_oss.embedded.scenarios import Scenario

NAMES = """
    Ada Amir Anya Bela Bruno Carla Chidi Clara Dario Dana Elif Emil Farah Felix Gita Goran Hana Hugo Ines Ivo Jana
    Jonas Kemal Kira Lena Luis Maya Milo Nadia Nils Olga Omar Petra Pavel Rosa Rafi Sara Sven Tara Tomas Uma Viktor
    Wanda Yusuf Zoe Zeno
""".split()  # noqa: SIM905
THINGS = """
    apples pears marbles stamps books pencils cards shells buttons candles eggs tickets coins stickers lemons bricks
    postcards beads cups seeds tiles photos badges ribbons walnuts screws magazines bottles envelopes tulips
""".split()  # noqa: SIM905
CONTAINERS = ("boxes", "bags", "baskets", "shelves", "crates", "drawers", "jars", "trays", "folders", "cases")
PLACES = ("market", "school", "library", "workshop", "bakery", "museum", "farm", "harbour", "station", "garden")
DAYS = ("Monday", "Tuesday", "Wednesday", "Thursday", "Friday", "Saturday", "Sunday")
VEHICLES = ("train", "bus", "truck", "ferry", "cyclist", "van", "tram", "boat")
DRINKS = ("juice", "soup", "milk", "tea", "paint", "lemonade", "oil", "syrup")

CLOSINGS = ("The answer is {answer}.", "So the answer is {answer}.", "Answer: {answer}", "That makes {answer}.")


@dataclass(frozen=True)
class Problem:
    """A question in words and its worked answer; `scenario` says which kind it is."""

    scenario: str
    prompt: str
    response: str


def write_problem(scenario: Scenario, rng: Random) -> Problem:
    """One problem of `scenario` with names, objects, numbers and wording drawn from `rng`."""
    name, other, third = rng.sample(NAMES, 3)
    thing, extra = rng.sample(THINGS, 2)
    words = {
        "name": name,
        "other": other,
        "third": third,
        "thing": thing,
        "extra": extra,
        "container": rng.choice(CONTAINERS),
        "place": rng.choice(PLACES),
        "day": rng.choice(DAYS),
        "vehicle": rng.choice(VEHICLES),
        "drink": rng.choice(DRINKS),
    }
    blanks = words | {key: str(value) for key, value in scenario.draw(rng).items()}
    prompt = rng.choice(scenario.questions).format_map(blanks)
    response = f"{rng.choice(scenario.workings)} {rng.choice(CLOSINGS)}".format_map(blanks)
    return Problem(scenario.name, prompt, response)


def write_problems(
    scenarios: Sequence[Scenario], count: int, rng: Random, avoid: Collection[str] = ()
) -> Iterator[Problem]:
    """`count` problems, every scenario in turn, no question twice and none that is in `avoid`."""
    seen = set(avoid)
    for number in range(count):
        problem = write_problem(scenarios[number % len(scenarios)], rng)
        while problem.prompt in seen:
            problem = write_problem(scenarios[number % len(scenarios)], rng)
        seen.add(problem.prompt)
        yield problem
