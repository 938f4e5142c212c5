"""Memory of a rank with and without an outer optimizer, beside what the table in docs/algorithm.md says. See
README.md beside this file."""

from __future__ import annotations

import argparse
import json
import tempfile
from pathlib import Path

from ema_memory import FEATURES, MIB, facts, measured, noise, predicted

SLICES = {"none": 0, "nesterov": 2}
"""By outer optimizer the slices of the model that a rank keeps: two slots of the momentum."""


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--side", type=int, default=8872, help="of the square matrix: 300 MiB")
    parser.add_argument("--ranks", nargs="*", type=int, default=[1, 2, 4])
    parser.add_argument("--json", help="write the result to this file")
    options = parser.parse_args()
    model, rows = 4 * options.side**2, []
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        noise(folder)
        for ranks in options.ranks:
            bare = measured(folder, ranks, FEATURES)
            for outer, slices in SLICES.items():
                row = {"ranks": ranks, "outer": outer}
                row["predicted_mib"] = round((bare + predicted(ranks, model, slices)) / MIB)
                row["measured_mib"] = round(
                    measured(folder, ranks, options.side, "--sync.outer", outer) / MIB
                )
                rows.append(row)
                print(
                    f"{ranks} ranks, sync.outer {outer}: predicted {row['predicted_mib']} MiB, measured "
                    f"{row['measured_mib']} MiB per rank",
                    flush=True,
                )
    if options.json:
        Path(options.json).write_text(json.dumps({**facts(model), "rows": rows}, indent=2) + "\n")


if __name__ == "__main__":
    main()
