"""The authors' checkpoints <-> ours: pure functions over one explicit table of names, strict in both directions.

Theirs is a folder with `args.json`, `vocab.json` and `best_model.pt`. Every tensor of a checkpoint is mapped, or left out for a reason that
stands in the notes; anything else is an error that lists all of it.
"""

from annformer.convert.exporting import Authors, to_authors
from annformer.convert.importing import Converted, from_authors
from annformer.convert.table import HEADS, TABLE, refuse_unknown, tensor_error

__all__ = ["HEADS", "TABLE", "Authors", "Converted", "from_authors", "refuse_unknown", "tensor_error", "to_authors"]
