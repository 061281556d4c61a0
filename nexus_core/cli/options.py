"""Flags that several commands have, so that they are written, read and explained alike."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import click

# What a click decorator does to a command's function.
Flag = Callable[[Callable[..., Any]], Callable[..., Any]]

device_option = click.option(
    "--device", default="auto", show_default=True, help="cpu, cuda, cuda:1; auto is a GPU if there is one."
)
dtype_option = click.option(
    "--dtype",
    default="auto",
    show_default=True,
    help="Type of the computation: float32 or bfloat16; auto goes by the device.",
)
revision_option = click.option("--revision", help="Commit, branch or tag of a Hub id.")
out_option = click.option(
    "--out", required=True, metavar="DIR", type=click.Path(path_type=Path), help="Folder to write."
)
json_option = click.option("--json", "as_json", is_flag=True, help="Print one JSON object as the last line of stdout.")
set_option = click.option(
    "--set",
    "overrides",
    metavar="KEY=VALUE",
    multiple=True,
    help="Override a setting of the recipe, e.g. train.max_steps=100; may be given again.",
)
held_out_option = click.option(
    "--held-out",
    type=click.FloatRange(0, 1, max_open=True),
    default=0.0,
    show_default=True,
    help="Share of every file's records kept from training, for --set evaluate.every=N.",
)


def section_option(which: str) -> Flag:
    """`--set KEY=VALUE`, as `assignments`, of one section of a recipe. which: "train section, e.g. max_steps=9"."""
    return click.option(
        "--set", "assignments", metavar="KEY=VALUE", multiple=True, help=f"Any key of a recipe's {which}."
    )
