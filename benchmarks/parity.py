"""Differences between annformer and the reference's golden tensors, as one Markdown table.

python benchmarks/parity.py FOLDER      (FOLDER: as tests/golden, or the complete set)
"""

import re
import sys
from itertools import groupby
from pathlib import Path

import torch

sys.path.insert(0, str(Path(__file__).parents[1] / "tests"))
import parity_groups


def key(difference: parity_groups.Difference) -> tuple[str, str, float]:
    return difference.group, difference.kind, difference.limit


def main(folder: Path) -> int:
    torch.set_num_threads(1)
    print(f"torch {torch.__version__}, CPU, one thread, float32; golden weights are random\n")
    print("| group | quantities | largest difference | measure | limit | |\n|---|---|---|---|---|---|")
    failed = 0
    for compare in parity_groups.GROUPS.values():
        differences = sorted(compare(folder), key=key)
        for (group, kind, limit), rows in groupby(differences, key=key):
            found = list(rows)
            worst = max(difference.value for difference in found)
            ok = all(difference.ok for difference in found)
            failed += not ok
            names = "; ".join(dict.fromkeys(re.sub(r",? (of )?step \d+", "", difference.quantity) for difference in found))
            print(
                f"| {group} | {names} | {worst:.1e} | {kind} | {limit:.0e} | {'ok' if ok else 'FAILED'} |".replace(
                    "inf | ok", "none | told"
                )
            )
    for name, words in parity_groups.refusals(folder):
        failed += words == "ACCEPTED"
        print(f"| variant {name} | refused | | | | {words} |")
    return 1 if failed else 0


if __name__ == "__main__":
    if len(sys.argv) != 2:
        sys.exit(__doc__)
    sys.exit(main(Path(sys.argv[1])))
