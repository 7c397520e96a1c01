"""`annformer pretrain`."""

from __future__ import annotations

import logging
import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from annformer.errors import input_error

if TYPE_CHECKING:
    from annformer.train.config import PretrainConfig

log = logging.getLogger(__name__)


def command(
    store: str,
    *,
    out: str | None = None,
    recipe: str = "pretrain-tiny",
    set: list[str] | None = None,  # noqa: A002  # the word on the command line
    name: str | None = None,
    plan: bool = False,
    price_per_hour: float | None = None,
    accelerator: Literal["auto", "cpu", "cuda"] = "auto",
    devices: int | Literal["auto"] = "auto",
    nodes: int = 1,
    strategy: Literal["auto", "ddp", "fsdp"] = "auto",
    logger: list[Literal["csv", "tensorboard", "wandb"]] | None = None,
    overwrite: bool = False,
) -> None:
    """Train a model from scratch on the cells of a store, without labels.

    The same command again goes on with a run that was stopped or killed, from its last checkpoint, and ends with the same weights.
    Ctrl-C and SIGTERM write a checkpoint first.

    Parameters
    ----------
    store
        What `annformer prepare` made.
    out
        Folder of the run: its model, log.csv, curves.png, checkpoints, recipe.yaml. Needed unless --plan.
    recipe
        A recipe that comes with annformer (pretrain-tiny, pretrain-base, pretrain-human), or a YAML file.
    set
        Changes to the recipe, such as train.epochs=3 model.n_layers=4.
    name
        What the model is called; by default the name of the folder.
    plan
        Only say what the run would take: parameters, steps, memory, time, and with --price_per_hour the cost.
    price_per_hour
        Of one device, for --plan.
    accelerator
        Where to compute; by default on a GPU if there is one.
    devices
        GPUs, or processes on CPUs, per node; by default all GPUs, or one process.
    nodes
        Machines; on a cluster every one runs this command (torchrun, SLURM).
    strategy
        ddp: a copy of the model on every device; fsdp: a piece of it.
    logger
        Also write tensorboard or wandb; log.csv is always written.
    overwrite
        Begin anew where OUT holds a run.
    """
    config = read_recipe(recipe, set or ())  # before the heavy imports: a misspelt setting is answered at once

    from annformer.data.store import StoreSource
    from annformer.train.config import Machine
    from annformer.train.pretrain import pretrain
    from annformer.train.ranks import is_first_rank

    if not is_first_rank():
        logging.getLogger("annformer").setLevel(logging.WARNING)
    source = StoreSource(store)
    given = {"accelerator": accelerator, "devices": devices, "nodes": nodes, "strategy": strategy, "loggers": tuple(logger or ("csv",))}
    machine = Machine.read(given, where="the options")
    if price_per_hour is not None and price_per_hour < 0:
        found = f"--price_per_hour {price_per_hour:g}"
        raise input_error(found, "0 or more", "give what an hour of one device (of a node, on CPUs) costs")
    if plan:
        from annformer.train.estimate import estimate

        print("\n".join(estimate(source, config, machine, price_per_hour=price_per_hour).lines()))
        return
    if out is None:
        found = "no --out is given"
        raise input_error(found, "a folder for the run", "add --out FOLDER, or --plan to see what the run would take")
    name = name or Path(out).resolve().name
    with _bar() as progress:
        result = pretrain(source, source.vocab, config, out, name=name, machine=machine, overwrite=overwrite, progress=progress)
    if is_first_rank():
        print(_summary(Path(out), result.errors))


def read_recipe(recipe: str, changes: Sequence[str]) -> PretrainConfig:
    """Read a recipe by its name or path, and change settings by their dotted names.

    Raises
    ------
    InputError
        When there is no such recipe, or it says something that does not exist.
    """
    from importlib.resources import files

    from annformer.train.config import PretrainConfig

    path = Path(recipe)
    folder = files("annformer") / "recipes"
    shipped = sorted(entry.name.removesuffix(".yaml") for entry in folder.iterdir() if entry.name.startswith("pretrain"))
    if path.is_file():
        text = path.read_text(encoding="utf-8")
    elif recipe in shipped:
        text = (folder / f"{recipe}.yaml").read_text(encoding="utf-8")
    else:
        found = f"there is no recipe {recipe!r}"
        raise input_error(found, f"a YAML file, or one of {', '.join(shipped)}", "check the spelling")
    values = PretrainConfig.from_yaml(text, where=f"the recipe {recipe}").model_dump(mode="json")
    for change in changes:
        _apply(values, change)
    return PretrainConfig.read(values, where=f"the recipe {recipe} with --set {' '.join(changes)}" if changes else f"the recipe {recipe}")


def _apply(values: dict[str, Any], change: str) -> None:
    import yaml

    name, equals, value = change.partition("=")
    *path, last = name.split(".")
    for part in path:
        if not isinstance(values, dict) or part not in values:
            break
        values = values[part]
    else:
        if equals and isinstance(values, dict):
            with suppress(yaml.YAMLError):
                values[last] = yaml.safe_load(value)
                return
    found = f"--set {change}"
    raise input_error(found, "NAME=VALUE, such as train.epochs=3 or min_cells=5", "see the recipe.yaml of a run for the names")


def _summary(out: Path, errors: dict[str, float]) -> str:
    floor = errors["gene mean"]
    ours = ", ".join(f"{name} {value:.1f} ({100 * (value / floor - 1):+.1f} %)" for name, value in errors.items() if name != "gene mean")
    said = f"held-out squared error in bins²: {ours}, the gene's mean {floor:.1f}\n" if ours else ""
    return f"{said}{out / 'model'} is the model; look at {out / 'curves.png'}"


@contextmanager
def _bar() -> Iterator[Callable[[int, int], None] | None]:
    """Progress bar of checking the store, on a terminal that is not to be quiet."""
    if not (sys.stderr.isatty() and log.isEnabledFor(logging.INFO)):
        yield None
        return
    from rich.console import Console
    from rich.progress import Progress

    with Progress(console=Console(stderr=True), transient=True) as bar:
        task = bar.add_task("checking the store", total=None)

        def show(done: int, total: int) -> None:
            bar.update(task, completed=done, total=total, visible=done < total)

        yield show
