"""`annformer convert`."""

from __future__ import annotations


def command(folder: str, *, out: str, to_authors: bool = False, drop: list[str] | None = None) -> None:
    """Convert a checkpoint of scGPT's authors into a model folder, or a model folder back.

    No code in the checkpoint is run. Everything in it is accounted for, or the message lists what is missing and what is unexpected.

    Parameters
    ----------
    folder
        The authors' folder (args.json, vocab.json, best_model.pt), the name of a checkpoint, or with --to_authors a model folder.
    out
        The folder to write.
    to_authors
        Write the authors' form; what their code cannot express is refused by name.
    drop
        Heads to leave out, as a list: '[cls, dar]'.
    """
    from annformer.scgpt import ScGPT

    if to_authors:
        notes = ScGPT.from_pretrained(folder).save_for_authors(out, drop=drop or ())
        kind = "a checkpoint for the authors' code"
    else:
        model = ScGPT.from_pretrained(folder, drop=drop or ())
        model.save_pretrained(out)
        kind = f"a model folder with {len(model.vocab.genes):,} genes"
        kept = model.config.provenance.get("notes", [])
        notes = list(map(str, kept)) if isinstance(kept, list) else []
    print(f"{out}: {kind}")
    for note in notes:
        print(f"  {note}")
