"""How well half of your own texts stands for all of them, chosen for coverage and by lot.

    python -m benchmarks.sampling_texts --tokenizer MODEL_FOLDER [--piece-characters N] FILE...

The files are read as `collect` reads them; a record is what the choice takes or leaves whole.
"""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from pathlib import Path

import numpy as np

from nexus_core.data.documents import Document, documents
from nexus_core.data.sampling import STRATEGIES, choose, figures, token_counts
from nexus_core.data.sampling.uniform import uniform
from nexus_core.data.tokenizers import load_tokenizer
from nexus_core.recipe.schema import Source

RANDOM_DRAWS = 5


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("files", nargs="+", metavar="FILE", help="as `path` of a recipe's source")
    parser.add_argument(
        "--tokenizer", type=Path, required=True, metavar="FOLDER", help="a model's, with tokenizer.json"
    )
    parser.add_argument("--piece-characters", type=int, default=2000, help="length at which plain text is cut")
    arguments = parser.parse_args()
    tokenizer = load_tokenizer(arguments.tokenizer)
    found: list[Document] = []
    for file in arguments.files:
        source = Source(path=file, held_out=0.0, piece_characters=arguments.piece_characters)
        read = documents([source], "all", tokenizer)
        print(f"{file}: {len(read):,} records, {read.tokens:,} tokens")
        found += read.items
    print("\n".join(rows(found, len(tokenizer))))


def rows(found: Sequence[Document], vocabulary: int) -> list[str]:
    """A line per strategy: half of the tokens chosen by it, beside the mean of five random draws of that size."""
    pool_V, half = token_counts(found, vocabulary), sum(map(len, found)) // 2
    draws = [
        figures([found[i] for i in uniform(found, half, vocabulary, np.random.default_rng([seed, 1]))], pool_V)
        for seed in range(RANDOM_DRAWS)
    ]
    kl, coverage = (
        float(np.mean([draw[name] for draw in draws])) for name in ("kl_to_pool_nats", "vocabulary_coverage")
    )
    lines = [f"{len(found):,} records, half of {2 * half:,} tokens; at random: KL {kl:.4f}, coverage {coverage:.1%}"]
    for strategy in STRATEGIES:
        _, report = choose(found, half, strategy, vocabulary, seed=0)
        chosen = report["chosen"]
        lines.append(
            f"{strategy:<12} KL {chosen['kl_to_pool_nats']:.4f}, {chosen['kl_to_pool_nats'] / kl:.3f} x; coverage "
            f"{chosen['vocabulary_coverage']:.1%}, {100 * (chosen['vocabulary_coverage'] - coverage):+.1f} points"
        )
    return lines


if __name__ == "__main__":
    main()
