"""`annformer convert`."""

from __future__ import annotations

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from annformer.scgpt import ScGPT


def command(folder: str, *, out: str, to_authors: bool = False, drop: str = "", cls_value: float | None = None) -> None:
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
        Heads to leave out, separated by commas, such as cls,dar. With --to_authors also asked, the vector of asked genes, which an
        embedding does not need, and profile, the linear part of the cell embedding, which their code does not have.
    cls_value
        Value that the network reads at <cls>. By default what the checkpoint was made with, as far as it shows: 0 for a fine-tuned
        one, else -2; the output says which.
    """
    from annformer.scgpt import ScGPT

    heads = [name.strip() for name in drop.split(",") if name.strip()]
    if to_authors:
        model = _with_cls_value(ScGPT.from_pretrained(folder), cls_value)
        notes = model.save_for_authors(out, drop=heads)
        kind = "a checkpoint for the authors' code"
    else:
        model = _with_cls_value(ScGPT.from_pretrained(folder, drop=heads), cls_value)
        model.save_pretrained(out)
        kind = f"a model folder with {len(model.vocab.genes):,} genes"
        kept = model.config.provenance.get("notes", [])
        notes = list(map(str, kept)) if isinstance(kept, list) else []
    print(f"{out}: {kind}")
    for note in notes:
        print(f"  {note}")


def _with_cls_value(model: ScGPT, cls_value: float | None) -> ScGPT:
    from annformer.tokenizer import TokenizerSettings

    if cls_value is None:
        return model
    tokenizer = TokenizerSettings.read(model.tokenizer.model_dump() | {"cls_value": cls_value}, where="what was asked for")
    noted = model.config.provenance.get("notes", [])
    notes = [*(noted if isinstance(noted, list) else []), f"the value at <cls> was set to {cls_value:g} on request"]
    model.config = model.config.model_copy(update={"tokenizer": tokenizer, "provenance": model.config.provenance | {"notes": notes}})
    return model
