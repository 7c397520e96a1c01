"""`annformer convert`."""

from __future__ import annotations


def command(folder: str, *, out: str, to_authors: bool = False, drop: str = "") -> None:
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
        Heads to leave out, separated by commas, such as cls,dar. With --to_authors also asked: the vector of asked genes, which an
        embedding does not need.
    """
    from annformer.scgpt import ScGPT

    heads = [name.strip() for name in drop.split(",") if name.strip()]
    if to_authors:
        notes = ScGPT.from_pretrained(folder).save_for_authors(out, drop=heads)
        kind = "a checkpoint for the authors' code"
    else:
        model = ScGPT.from_pretrained(folder, drop=heads)
        model.save_pretrained(out)
        kind = f"a model folder with {len(model.vocab.genes):,} genes"
        kept = model.config.provenance.get("notes", [])
        notes = list(map(str, kept)) if isinstance(kept, list) else []
    print(f"{out}: {kind}")
    for note in notes:
        print(f"  {note}")
