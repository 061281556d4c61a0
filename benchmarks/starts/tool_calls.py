"""A second domain, made up: requests in plain words, answered by a call of a function as JSON."""

from __future__ import annotations

import json
import random
from collections.abc import Iterator
from pathlib import Path
from typing import Any

_CITIES = (
    *("Lisbon", "Oslo", "Nairobi", "Lima", "Kyoto", "Quito"),
    *("Perth", "Dublin", "Tunis", "Hanoi", "Bergen", "Turin"),
)
_PEOPLE = ("Amara", "Boris", "Chen", "Dora", "Emil", "Farah", "Goran", "Hana", "Ines", "Jonas", "Kira", "Leo")
_THINGS = ("report", "invoice", "tent", "lamp", "printer", "bicycle", "camera", "kettle", "ladder", "notebook")
_DAYS = ("monday", "tuesday", "wednesday", "thursday", "friday", "saturday", "sunday")
_UNITS = ("kilometers", "miles", "meters", "feet", "kilograms", "pounds")

# Request, function, and its arguments as `name=what is drawn for it`.
_TEMPLATES = (
    ("What will the weather be in {city} on {day}?", "get_weather", "city=city day=day"),
    ("Tell me how warm it gets in {city} on {day}.", "get_weather", "city=city day=day"),
    ("Send {person} the {thing} before {hour} o'clock.", "send_item", "to=person item=thing hour=hour"),
    ("Book a flight from {city} to {other} for {count}.", "book_flight", "from=city to=other seats=count"),
    ("How many {unit} are {number} {other_unit}?", "convert_unit", "value=number from=other_unit to=unit"),
    ("Set an alarm for {hour}:{minute} on {day}.", "set_alarm", "hour=hour minute=minute day=day"),
    ("Order {count} times {thing}, to be paid by {person}.", "place_order", "item=thing count=count payer=person"),
    ("Where is the nearest place in {city} that sells a {thing}?", "find_shop", "city=city item=thing"),
    ("Remind {person} of the {thing} every {day}.", "create_reminder", "who=person about=thing repeat=day"),
    (
        "Cancel what {person} ordered on {day}: {count} of {thing}.",
        "cancel_order",
        "payer=person item=thing count=count day=day",
    ),
)


def tool_calls(count: int) -> Iterator[dict[str, str]]:
    """Records with a prompt and a response, always the same."""
    draw = random.Random(0)
    for _ in range(count):
        city, other = draw.sample(_CITIES, 2)
        unit, other_unit = draw.sample(_UNITS, 2)
        values: dict[str, Any] = {
            "city": city,
            "other": other,
            "unit": unit,
            "other_unit": other_unit,
            "person": draw.choice(_PEOPLE),
            "thing": draw.choice(_THINGS),
            "day": draw.choice(_DAYS),
            "hour": draw.randrange(24),
            "minute": draw.randrange(10, 60),
            "count": draw.randrange(2, 30),
            "number": draw.randrange(2, 900),
        }
        request, function, arguments = draw.choice(_TEMPLATES)
        roles = dict(argument.split("=") for argument in arguments.split())
        call = {"name": function, "arguments": {name: values[role] for name, role in roles.items()}}
        yield {"prompt": request.format(**values), "response": json.dumps(call)}


def write_tool_calls(path: Path, count: int) -> None:
    """One record a line."""
    path.write_text("".join(json.dumps(record) + "\n" for record in tool_calls(count)))
