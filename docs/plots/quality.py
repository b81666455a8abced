"""docs/plots/quality.svg from what `bench/quality.py --json` printed.

uv run python bench/quality.py --json > quality.json
uv run --with matplotlib python docs/plots/quality.py quality.json
"""

from __future__ import annotations

import json
import sys
from pathlib import Path

import matplotlib as mpl
import matplotlib.pyplot as plt

PREFIX, SPREAD = "perplexity, ", "spread, "


def main() -> None:
    lines = [json.loads(line) for line in Path(sys.argv[1]).read_text().splitlines()]
    values = {line["measure"]: line["value"] for line in lines}
    names = [name.removeprefix(PREFIX) for name in values if name.startswith(PREFIX)]
    means = [values[PREFIX + name] for name in names]
    spreads = [values[SPREAD + name] for name in names]
    hard = values[f"{PREFIX}cross-entropy"]
    # Names and figures as text, and the same file each time.
    mpl.rcParams.update({"svg.fonttype": "none", "svg.hashsalt": "quality", "font.size": 9})
    figure, axes = plt.subplots(figsize=(7, 0.34 * len(names) + 0.9), layout="constrained")
    places = range(len(names))
    axes.errorbar(means, places, xerr=spreads, fmt="o", color="#2563eb", capsize=3)
    axes.axvline(hard, color="#6b7280", linestyle="--", linewidth=1)
    axes.set_yticks(places, names)
    axes.invert_yaxis()
    axes.set_xlabel("held-out perplexity: mean of three seeds, and their standard deviation")
    for side in ("top", "right"):
        axes.spines[side].set_visible(False)
    figure.savefig(Path(__file__).with_suffix(".svg"), metadata={"Date": None}, facecolor="white")


if __name__ == "__main__":
    main()
