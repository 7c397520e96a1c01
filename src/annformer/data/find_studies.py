"""find_studies: the data sets that paths, folders and tables stand for."""

from __future__ import annotations

import csv
import logging
from collections import Counter
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Final

from annformer.data.census import SomaStudy, is_soma
from annformer.data.studies import Study
from annformer.errors import input_error

log = logging.getLogger(__name__)

SETTINGS: Final = ("path", "gene_key", "layer", "orthologs", "measurement", "obs_filter")
"""Columns of a table of studies that are not labels of the cells; the last two are for SOMA experiments only."""
_ZARR: Final = ("zarr.json", ".zgroup", ".zattrs", ".zmetadata")


def find_studies(sources: Sequence[str | Path | Study], *, obs_filter: str | None = None) -> list[Study]:
    """List the data sets that `sources` stand for.

    Parameters
    ----------
    sources
        Studies, or paths: of data sets, of folders that hold data sets at any depth, of SOMA experiments (also `s3://...` and
        `census:RELEASE`), and of tables of studies: `.tsv` or `.csv` with a column `path` (relative to the table) and any of `SETTINGS`;
        every other column is a label of all cells of the study. Folders are searched in alphabetical order.
    obs_filter
        Condition on columns of obs, for those SOMA experiments that have none of their own.
    """
    found: list[Study] = []
    for source in sources:
        found += [source] if isinstance(source, Study) else _at(str(source))
    if obs_filter:
        found = _filtered(found, obs_filter)
    times = Counter(str(Path(study.path).resolve()) for study in found)
    doubles = [path for path, n in times.items() if n > 1]
    if doubles:
        msg = f"{len(doubles)} data sets are named more than once: {', '.join(doubles[:3])}"
        raise input_error(msg, "every data set once", "leave out one of them")
    return found


def _filtered(studies: list[Study], obs_filter: str) -> list[Study]:
    if not any(isinstance(study, SomaStudy) for study in studies):
        msg = f"the filter {obs_filter!r} has nothing to choose from: no input is a SOMA experiment"
        raise input_error(msg, "a filter with an experiment or the Census only; files are taken whole", "leave out obs_filter")
    return [study.with_(obs_filter=obs_filter) if isinstance(study, SomaStudy) and study.obs_filter is None else study for study in studies]


def _study(path: str, **settings: object) -> Study:
    return (SomaStudy if is_soma(path) else Study).model_validate({"path": path} | settings)


def _at(source: str) -> Iterator[Study]:
    if is_soma(source):
        yield _study(source)
        return
    path = Path(source).expanduser()
    if path.suffix in (".tsv", ".csv") and path.is_file():
        yield from _of_table(path)
    elif path.is_dir() and not _is_data(path):
        inside = [_study(str(data)) for data in _inside(path)]
        if not inside:
            msg = f"the folder {path} holds no cells"
            raise input_error(msg, ".h5ad, .h5, .zarr, 10x mtx folders or SOMA experiments in it", "give the folder that holds them")
        yield from inside
    else:
        yield _study(str(path))


def _inside(folder: Path) -> Iterator[Path]:
    """Data sets at any depth; of what Cell Ranger writes only the cells, not all droplets, where both are there."""
    paths = sorted(folder.iterdir())
    names = {path.name for path in paths}
    for path in paths:
        if "raw_feature_bc_matrix" in path.name and (cells := path.name.replace("raw_feature", "filtered_feature")) in names:
            log.warning("left out %s, which holds empty droplets too: the cells are in %s", path, cells)
        elif path.is_dir():
            yield from (path,) if _is_data(path) else _inside(path)
        elif path.suffix in (".h5ad", ".h5"):
            yield path


def _is_data(folder: Path) -> bool:
    return is_soma(str(folder)) or any((folder / name).exists() for name in _ZARR) or any(folder.glob("*matrix.mtx*"))


def _of_table(table: Path) -> Iterator[Study]:
    with table.open(encoding="utf-8-sig", newline="") as stream:
        lines = list(csv.DictReader(stream, delimiter="\t" if table.suffix == ".tsv" else ","))
    if not lines or "path" not in lines[0]:
        msg = f"{table} is no table of studies: " + ("it has no column 'path'" if lines else "it has no line below the header")
        raise input_error(msg, "a header with 'path' and a line for every study", "correct the table")
    for number, line in enumerate(lines, start=2):
        values = {key: value.strip() for key, value in line.items() if isinstance(value, str) and value.strip()}
        if "path" not in values or None in line:
            msg = f"line {number} of {table} does not fit its header"
            raise input_error(msg, "a path, and as many columns as the header", "correct the line")
        labels = {key: value for key, value in values.items() if key not in SETTINGS}
        settings = {key: value for key, value in values.items() if key in SETTINGS}
        for key in ("path", "orthologs"):
            if key in settings and not is_soma(settings[key]):
                settings[key] = str(table.parent / Path(settings[key]).expanduser())
        yield (SomaStudy if is_soma(settings["path"]) else Study).read(settings | {"labels": labels}, where=f"line {number} of {table}")


def study_names(studies: Sequence[Study]) -> list[str]:
    """Name of each study's file, with as many folders before it as tell it from the others."""
    parts = [(*Path(study.path).resolve().parts[1:-1], Path(study.path).stem) for study in studies]
    names = []
    for own in parts:
        depth = next(n for n in range(1, len(own) + 1) if n == len(own) or [other[-n:] for other in parts].count(own[-n:]) == 1)
        names.append("/".join(own[-depth:]))
    return names
