"""Import this once, and transformers' Auto classes know converted checkpoints: `import nexus_core.auto`."""

from nexus_core.models import register_auto

register_auto()
