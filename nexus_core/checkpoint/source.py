"""A checkpoint as a user names it: a folder, `embedded:NAME`, or a Hub id; found, claimed and described."""

from __future__ import annotations

import json
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import torch

from nexus_core.checkpoint.reader import INDEX_NAME, SINGLE_NAME, CheckpointReader
from nexus_core.errors import CheckpointError, suggestion
from nexus_core.plugins import Family, installed
from nexus_core.types import MoeDescription

EMBEDDED = "embedded:"

# Of a Hub id only what NEXUS reads: no weights in other formats, and no subfolders, where publishers put more copies.
DESCRIPTION_PATTERNS = ["*.json", "*.jinja", "*.model", "merges.txt"]
WEIGHT_PATTERNS = ["*.safetensors"]
UNWANTED_PATTERNS = ["*/*"]


@dataclass(frozen=True)
class Checkpoint:
    """A model folder with its config, the family that owns it, and what the family says is in it.

    name: as the user gave it. is_from_hub: whether the folder is a copy of what the Hub has under that name. Nothing
    but config.json has been read.
    """

    name: str
    folder: Path
    config: dict[str, Any]
    family: Family
    is_from_hub: bool = False

    @cached_property
    def description(self) -> MoeDescription:
        try:
            return self.family.hook.nexus_describe_moe(config=self.config)
        except CheckpointError as error:
            # The family knows the config alone, and says `config.json: ...`.
            message = str(error)
            if not message.startswith("config.json"):
                raise
            raise CheckpointError(f"{self.folder}/{message}") from error

    @cached_property
    def dtype(self) -> torch.dtype:
        """The type its config says its floating-point weights have; bfloat16 if it does not."""
        name = str(self.config.get("dtype") or self.config.get("torch_dtype") or "bfloat16")
        dtype = getattr(torch, name, None)
        if not isinstance(dtype, torch.dtype):
            raise CheckpointError(f"{self.folder / 'config.json'}: dtype '{name}' is no type of numbers")
        return dtype

    @cached_property
    def reader(self) -> CheckpointReader:
        return CheckpointReader(self.folder)

    @cached_property
    def lacks_weights(self) -> bool:
        """Whether its weights are still to come. Part of them is enough only where the Hub has the rest: any other
        folder with some of its shards is damaged, and reading it says so.

        Raises CheckpointError if its index is damaged.
        """
        if not any((self.folder / name).is_file() for name in (INDEX_NAME, SINGLE_NAME)):
            return True
        here = [shard.is_file() for shard in self.reader.shards]
        return not (all(here) if self.is_from_hub else any(here))

    @property
    def indexed_bytes(self) -> int | None:
        """Bytes of all tensors as the index of its shards says; None without one that does."""
        try:
            return int(json.loads((self.folder / INDEX_NAME).read_text())["metadata"]["total_size"])
        except (OSError, ValueError, KeyError, TypeError):
            return None


def open_checkpoint(name: str | Path, revision: str | None = None, *, weights: bool = True) -> Checkpoint:
    """Find a checkpoint and its family. Raises CheckpointError with the way out.

    name: a folder, `embedded:NAME`, or a Hub id (OWNER/NAME), which is downloaded if it is not cached. weights: False
    downloads no weights, only what describes them; weights that are cached are found all the same.
    """
    folder = locate(str(name), revision, weights=weights)
    config_file = folder / "config.json"
    try:
        config = json.loads(config_file.read_text())
    except FileNotFoundError as error:
        raise CheckpointError(
            f"{folder}: has no config.json, so it is not a model folder; name the folder that holds one"
        ) from error
    except OSError as error:
        raise CheckpointError(f"{config_file}: cannot be read: {error.strerror}") from error
    except ValueError as error:
        raise CheckpointError(f"{config_file}: is not valid JSON ({error}); copy or download it again") from error
    if not isinstance(config, dict):
        raise CheckpointError(f"{config_file}: is not a JSON object, so it is not a model's config")
    is_from_hub = not str(name).startswith(EMBEDDED) and not Path(name).expanduser().is_dir()
    return Checkpoint(str(name), folder, config, installed().family(config, str(folder)), is_from_hub)


def locate(name: str, revision: str | None = None, *, weights: bool = True) -> Path:
    """The local folder of a checkpoint, downloading a Hub id that is not cached yet, with its weights or without."""
    if name.startswith(EMBEDDED):
        known = {file.name: file.path for file in installed().embedded().values() if file.kind == "checkpoint"}
        short = name.removeprefix(EMBEDDED)
        if short not in known:
            raise CheckpointError(
                f"'{name}': no plugin brings an embedded checkpoint of that name{suggestion(short, known)}"
            )
        return known[short]
    folder = Path(name).expanduser()
    if folder.is_dir():
        return folder.resolve()
    if folder.exists():
        raise CheckpointError(f"{folder}: is a file; name the folder that holds config.json")
    if name.count("/") == 1 and not name.startswith((".", "/", "~")):
        return _download(name, revision, DESCRIPTION_PATTERNS + (WEIGHT_PATTERNS if weights else []))
    raise CheckpointError(f"{name}: there is no such folder; give a model folder, a Hub id or 'embedded:NAME'")


def _download(hub_id: str, revision: str | None, wanted: list[str]) -> Path:
    from huggingface_hub import snapshot_download
    from tqdm.auto import tqdm

    try:
        # The client's own progress bars are off on the command line, but 65 GB should not arrive in silence.
        found = snapshot_download(
            hub_id, revision=revision, allow_patterns=wanted, ignore_patterns=UNWANTED_PATTERNS, tqdm_class=tqdm
        )
    except Exception as error:  # the Hub client raises a dozen kinds; all mean the same to the user
        raise CheckpointError(
            f"'{hub_id}': there is no folder of that name here, and the Hub could not give it "
            f"({type(error).__name__}); give a local folder, or check the name, the network and your access"
        ) from error
    return Path(found)
