"""The kinds of word problem: their numbers, and the ways to ask and to work them out.

Longer than other files because it is a table. `{name}`, `{thing}` and other words are filled in by word_problems.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from random import Random

from nexus_gpt_oss.embedded import quantities


@dataclass(frozen=True)
class Scenario:
    """One kind of problem: `draw` picks the numbers (one of them named `answer`), the templates put them into words."""

    name: str
    draw: Callable[[Random], quantities.Numbers]
    questions: tuple[str, ...]
    workings: tuple[str, ...]


SCENARIOS: tuple[Scenario, ...] = (
    Scenario(
        "gain",
        quantities.gain,
        (
            "{name} has {a} {thing}. {other} gives {name} {b} more. How many {thing} does {name} have now?",
            "There were {a} {thing} at the {place}. On {day} {b} more {thing} arrived. How many are there in all?",
            "On {day} {name} counted {a} {thing} and found another {b} later. What is the total?",
        ),
        ("We add: {a} + {b} = {answer}.", "{a} and {b} together are {answer}."),
    ),
    Scenario(
        "loss",
        quantities.loss,
        (
            "{name} had {a} {thing} and gave {b} of them to {other}. How many {thing} are left?",
            "The {place} started {day} with {a} {thing}. By the evening {b} were gone. How many remained?",
            "Out of {a} {thing}, {name} lost {b}. How many does {name} still have?",
        ),
        ("We subtract: {a} - {b} = {answer}.", "Taking {b} away from {a} leaves {answer}."),
    ),
    Scenario(
        "rows",
        quantities.rows,
        (
            "{name} puts {b} {thing} into each of {a} {container}. How many {thing} is that?",
            "Each of the {a} {container} at the {place} holds {b} {thing}. How many {thing} do they hold together?",
        ),
        ("We multiply: {a} * {b} = {answer}.", "{a} {container} with {b} {thing} each hold {a} * {b} = {answer}."),
    ),
    Scenario(
        "share",
        quantities.share,
        (
            "{name} shares {a} {thing} equally among {b} friends. How many does each friend get?",
            "{a} {thing} are packed into {b} {container}, the same number in each. How many {thing} go into one?",
        ),
        ("We divide: {a} / {b} = {answer}.", "Each one gets {a} / {b} = {answer} {thing}."),
    ),
    Scenario(
        "leftover",
        quantities.leftover,
        (
            "{name} packs {a} {thing} into {container} of {b}. How many {thing} do not fill a last one?",
            "{a} {thing} are handed out fairly to {b} children. How many {thing} are left over?",
        ),
        (
            "{b} goes into {a} {each} times, which uses {b} * {each} = {full}. The rest is {a} - {full} = {answer}.",
            "{b} * {each} = {full} is the most that fits. {a} - {full} = {answer}.",
        ),
    ),
    Scenario(
        "gain then loss",
        quantities.gain_then_loss,
        (
            "{name} had {a} {thing}, bought {b} more on {day} and then gave {c} to {other}. How many are left?",
            "A {place} owns {a} {thing}. It receives {b} and lends out {c}. How many {thing} are there now?",
        ),
        (
            "First {a} + {b} = {sum}. Then {sum} - {c} = {answer}.",
            "After the new ones came there were {a} + {b} = {sum} {thing}. Without {c} of them, {answer} stay.",
        ),
    ),
    Scenario(
        "change",
        quantities.change,
        (
            "{name} buys {a} {thing} at {price} coins each and pays with {paid} coins. How much change is due?",
            "One of the {thing} costs {price} euros. {name} takes {a} and hands over {paid} euros. What comes back?",
        ),
        (
            "The cost is {a} * {price} = {cost}. The change is {paid} - {cost} = {answer}.",
            "{a} * {price} = {cost} has to be paid, so {paid} - {cost} = {answer} comes back.",
        ),
    ),
    Scenario(
        "two prices",
        quantities.two_prices,
        (
            "{name} buys {a} {thing} for {p} euros each and {b} {extra} for {q} euros each. What is the bill?",
            "At the {place}, {thing} cost {p} coins and {extra} cost {q}. How much are {a} {thing} and {b} {extra}?",
        ),
        (
            "The {thing} cost {a} * {p} = {first}. The {extra} cost {b} * {q} = {second}. {first} + "
            "{second} = {answer}.",
            "{a} * {p} = {first} and {b} * {q} = {second}, together {answer}.",
        ),
    ),
    Scenario(
        "distance",
        quantities.distance,
        (
            "A {vehicle} goes {speed} kilometres an hour for {hours} hours. How far does it get?",
            "{name} takes a {vehicle} that covers {speed} km every hour. How many km are done after {hours} hours?",
        ),
        (
            "Distance is speed times time: {speed} * {hours} = {answer}.",
            "{hours} hours of {speed} km make {hours} * {speed} = {answer}.",
        ),
    ),
    Scenario(
        "two legs",
        quantities.two_legs,
        (
            "A {vehicle} drives {h} hours at {s} km an hour and then {k} hours at {v} km an hour. How long is the way?",
            "{name} travels {h} hours at {s} km per hour, rests on {day}, then {k} hours at {v} km per hour. How far?",
        ),
        (
            "The first part is {h} * {s} = {first} km. The second is {k} * {v} = {second} km. The sum is {answer}.",
            "{s} * {h} = {first}, {v} * {k} = {second}, and {first} + {second} = {answer}.",
        ),
    ),
    Scenario(
        "age",
        quantities.age,
        (
            "{name} is {a} years old. {other} is {more} years older. How old will {other} be in {years} years?",
            "{other} was born {more} years before {name}, who is {a}. What will the age of {other} be "
            "{years} years on?",
        ),
        (
            "{other} is {a} + {more} = {now} now. In {years} years that is {now} + {years} = {answer}.",
            "Today: {a} + {more} = {now}. Later: {now} + {years} = {answer}.",
        ),
    ),
    Scenario(
        "times as many",
        quantities.times_as_many,
        (
            "{name} has {a} {thing}. {other} has {times} times as many. How many do they have together?",
            "{name} found {a} {thing} and {other} found {times} times that number. How many {thing} were found?",
        ),
        (
            "{other} has {times} * {a} = {product}. Together they have {a} + {product} = {answer}.",
            "{a} * {times} = {product}, plus {a} gives {answer}.",
        ),
    ),
    Scenario(
        "percent",
        quantities.percent,
        (
            "Of {whole} {thing} at the {place}, {percent} percent were sold on {day}. How many were not sold?",
            "A bicycle costs {whole} euros. {name} gets {percent}% off. What does {name} pay?",
        ),
        (
            "{percent} percent of {whole} is {part}. {whole} - {part} = {answer}.",
            "One percent of {whole} times {percent} is {part}, which leaves {answer}.",
        ),
    ),
    Scenario(
        "half",
        quantities.half,
        (
            "{name} gave half of {a} {thing} to {other}, then got {c} new ones from {third}. How many are there now?",
            "Half of the {a} {thing} were broken. {name} bought {c} to replace some. How many good ones are there?",
        ),
        (
            "Half of {a} is {half}. {half} + {c} = {answer}.",
            "{a} / 2 = {half}; with {c} more it is {answer}.",
        ),
    ),
    Scenario(
        "average",
        quantities.average,
        (
            "{name}, {other} and {third} collected {a}, {b} and {c} {thing}. What is the average?",
            "In three games {name} scored {a}, {b} and {c} points. How many points is that per game?",
        ),
        (
            "The sum is {a} + {b} + {c} = {sum}. Divided by 3 it is {answer}.",
            "{a} + {b} + {c} = {sum}, and {sum} / 3 = {answer}.",
        ),
    ),
    Scenario(
        "weeks",
        quantities.weeks,
        (
            "The {place} uses {perday} {thing} every day. How many {thing} does it use in {weeks} weeks?",
            "{name} reads {perday} pages each day without a pause. How many pages is that in {weeks} weeks?",
        ),
        (
            "{weeks} weeks have 7 * {weeks} = {days} days. {days} * {perday} = {answer}.",
            "There are {days} days, so {days} * {perday} = {answer}.",
        ),
    ),
    Scenario(
        "saving",
        quantities.saving,
        (
            "{name} has {start} euros and saves {weekly} a week. After how many weeks will there be {goal} euros?",
            "A tent costs {goal} coins. {name} owns {start} and earns {weekly} each {day}. How many "
            "weeks will it take?",
        ),
        (
            "Still missing: {goal} - {start} = {missing}. {missing} / {weekly} = {answer}.",
            "{goal} - {start} = {missing} must be saved, which takes {missing} / {weekly} = {answer} weeks.",
        ),
    ),
    Scenario(
        "rectangle",
        quantities.rectangle,
        (
            "A field is {long} metres long and {wide} metres wide. How many metres of fence go around it?",
            "{name} walks once around a {place} of {long} by {wide} metres. How many metres is the walk?",
        ),
        (
            "One long and one short side are {long} + {wide} = {half}. Twice that is {answer}.",
            "2 * {long} + 2 * {wide} = {answer}.",
        ),
    ),
    Scenario(
        "area left",
        quantities.area_left,
        (
            "A garden measures {long} by {wide} metres. A pond covers {pond} square metres. How much "
            "is left for grass?",
            "{name} lays tiles on a floor of {long} by {wide} metres but spares {pond} square metres. "
            "How many are tiled?",
        ),
        (
            "The whole area is {long} * {wide} = {area}. {area} - {pond} = {answer}.",
            "{long} * {wide} = {area}, less {pond} is {answer}.",
        ),
    ),
    Scenario(
        "recipe",
        quantities.recipe,
        (
            "A meal for {people} people needs {total} eggs. {name} expects {guests} guests. How many eggs are needed?",
            "{people} workers carry {total} bricks. How many bricks do {guests} workers carry at the same pace?",
        ),
        (
            "One needs {total} / {people} = {each}. For {guests} it is {guests} * {each} = {answer}.",
            "Per person {total} / {people} = {each}, so {each} * {guests} = {answer}.",
        ),
    ),
    Scenario(
        "fill",
        quantities.fill,
        (
            "A tank holds {start} litres of {drink}. {rate} litres a minute flow in for {minutes} "
            "minutes. How much now?",
            "{name} pours {rate} cups of {drink} a minute into a pot with {start}. What is in it after "
            "{minutes} minutes?",
        ),
        (
            "{minutes} * {rate} = {poured} flow in. {start} + {poured} = {answer}.",
            "New: {rate} * {minutes} = {poured}. In all {poured} + {start} = {answer}.",
        ),
    ),
    Scenario(
        "difference",
        quantities.difference,
        (
            "{name} wants {a} {thing}. {other} brings {b} and {third} brings {c}. How many are still missing?",
            "Of {a} {thing}, {b} are red, {c} are blue and the rest are green. How many are green?",
        ),
        (
            "{b} + {c} = {sum}. {a} - {sum} = {answer}.",
            "We have {b} + {c} = {sum} of {a}, so {a} - {sum} = {answer}.",
        ),
    ),
    Scenario(
        "teams",
        quantities.teams,
        (
            "{all} children come to the {place}; {absent} only watch. The others form teams of {size}. How many teams?",
            "{name} has {all} {thing}, keeps {absent} and ties the rest in bundles of {size}. How many "
            "bundles are there?",
        ),
        (
            "{all} - {absent} = {present}. {present} / {size} = {answer}.",
            "Without {absent} there are {present}, and {present} / {size} = {answer}.",
        ),
    ),
    Scenario(
        "profit",
        quantities.profit,
        (
            "{name} buys {n} {thing} at {buy} coins and sells each for {sell}. What is the profit?",
            "The {place} pays {buy} euros for a lamp and sells it for {sell}. What does it earn on {n} lamps?",
        ),
        (
            "On each one {sell} - {buy} = {margin} is earned. {n} * {margin} = {answer}.",
            "The gain per piece is {margin}, for {n} pieces {margin} * {n} = {answer}.",
        ),
    ),
    Scenario(
        "clock",
        quantities.clock,
        (
            "{name} leaves {hour} hours and {minute} minutes after midnight; the {vehicle} takes {length} minutes. "
            "How many minutes after midnight does it arrive?",
            "A film starts {hour} hours {minute} minutes into {day} and lasts {length} minutes. In which minute of the "
            "day does it end?",
        ),
        (
            "{hour} hours are {hour} * 60 minutes, with {minute} more {begin}. {begin} + {length} = {answer}.",
            "The start is minute {begin}. Adding {length} gives {answer}.",
        ),
    ),
)
