"""CellTypeClassifier: types of cells learned from a labelled reference, with probabilities that mean what they say."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Self

import numpy as np
import pandas as pd
from anndata import AnnData
from jaxtyping import Float
from threadpoolctl import threadpool_limits  # type: ignore[import-untyped]

import annformer
from annformer import checkpoints
from annformer.data.anndata import AnnDataSource, reading_quietly
from annformer.data.write import require_place
from annformer.data.write_columns import write_with_columns
from annformer.errors import input_error
from annformer.scgpt import DEFAULT_MODEL, ScGPT
from annformer.tasks._annotation_cells import Reference, read_reference
from annformer.tasks._annotation_columns import columns_of, never_empty, require_coverage, require_shares
from annformer.tasks._annotation_recipe import TASK, AnnotationRecipe, Learned, Options
from annformer.tasks._cells import require_counts, require_genes
from annformer.tasks._classifier import Answer, Classifier
from annformer.tasks._encoding import device_named
from annformer.tasks._finetune import loaded, made_for
from annformer.tasks._given import Cells, How
from annformer.tasks._network_part import network_part, network_says, require_read, untouched
from annformer.tasks._novelty import NOVEL, warn_if_coarse
from annformer.tasks._output import Output
from annformer.tasks._place import check_key, check_target, put_columns
from annformer.tasks._stopwatch import timed
from annformer.tasks._threads import torch_threads
from annformer.vocab import GeneVocab

KEY = "predicted_cell_type"


class CellTypeClassifier:
    """Learn the types of the cells of a reference, and call those of others (scGPT, Methods "Cell type annotation").

    What calls the type has two parts. The *network* part reads the cell embedding: of the network as it is, or fine-tuned by the CLS
    objective. The *expression* part is logistic regression on log-normalised expression, at several depths of the logarithm. What each is
    worth is told by cells of the reference that were held back from both, which also make the probabilities mean what they say.

    Parameters
    ----------
    model
        What to begin with: a model, its folder or its name.
    label_key
        Column of obs with the type of every cell of the reference; cells with "unlabelled" or "unknown" are left out.
    batch_key
        Column of obs with the donor, batch or study. Given, whole batches are held back instead of cells: what is chosen and calibrated is
        then meant for cells of other batches. (With one batch, cells are.)
    recipe
        "annotate", "annotate-original" (scGPT's settings), a YAML file, or an `AnnotationRecipe`; its `tuning` says what happens to the
        network.
    pretrained
        False: the same network with random weights, to see what pretraining is worth.
    layer, gene_key
        Where counts and gene names are, if not where `AnnDataSource` finds them.
    seed
        Decides everything that is drawn.
    device
        Such as "cuda"; None: the CPU.
    threads
        Of the CPU; None: as torch is set.

    Attributes
    ----------
    model_
        The network.
    classes_
        The types, in the order of all tables.
    n_cells_
        Cells of each type that were learned from.
    held_back_
        Scores on cells of the reference that no part had learned from: `accuracy` and `macro_f1` of the whole, of each part alone
        (`expression_...`, `network_...`, where there is such a part), and of calling all the most frequent type (`majority_...`). A
        little better than new cells will show: few numbers were chosen by them.
    part_weights_
        What the held-back cells say each part is worth: factors of its logits.
    match_
        How the genes of the reference were found in the vocabulary.
    history_
        Losses by step of a tuned network, `train/...` and `validation/...`; else empty.
    seconds_
        What `fit` took, earlier starts in the same folder included.
    """

    def __init__(
        self,
        model: ScGPT | str | Path = DEFAULT_MODEL,
        *,
        label_key: str,
        batch_key: str | None = None,
        recipe: str | Path | AnnotationRecipe = "annotate",
        pretrained: bool = True,
        layer: str | None = None,
        gene_key: str | None = None,
        seed: int = 0,
        device: str | None = None,
        threads: int | None = None,
    ) -> None:
        self.model, self.label_key, self.batch_key, self.recipe = model, label_key, batch_key, recipe
        self.pretrained, self.layer, self.gene_key, self.seed = pretrained, layer, gene_key, seed
        self.device, self.threads = device, threads

    def fit(
        self,
        adata: AnnData | str | Path,
        *,
        folder: str | Path | None = None,
        embedding: str | None = None,
        progress: bool | None = None,
    ) -> Self:
        """Learn from a reference.

        Parameters
        ----------
        adata
            Counts and types of cells.
        folder
            Keeps the checkpoints of a network that is tuned, so that the same call goes on after a kill.
        embedding
            Name in obsm of an embedding that `embed` wrote by the same model, to use instead of embedding again, where the network is
            used as it is.
        progress
            Show a progress bar; None: when stderr is a terminal.

        Raises
        ------
        InputError
            When a column is missing or has gaps, or there is one type only.
        """
        with timed(None if folder is None else Path(folder)) as seconds:
            self._fit(adata, folder, {"embedding": embedding, "progress": progress})
            self.seconds_ = seconds()
        return self

    def _fit(self, adata: AnnData | str | Path, folder: str | Path | None, how: How) -> None:
        recipe, base = self._recipe, loaded(self.model)
        self.model_ = untouched(base, pretrained=self.pretrained, seed=self.seed, device=self.device)
        require_read(how["embedding"], reads=recipe.tuning == "frozen")
        with self._cells(adata, how) as cells:
            reference = self._read(cells.source, base.vocab.all_trained(), recipe)
            self.model_, network, self.history_ = network_part(
                base,
                reference,
                cells,
                recipe,
                pretrained=self.pretrained,
                seed=self.seed,
                folder=folder,
                device=self.device,
                threads=self.threads,
            )
            self._classifier = Classifier.fit(reference, network, **recipe.linear_parts())
        self.held_back_ = self._classifier.held_back
        warn_if_coarse(self._classifier.novelty)
        made = self.model_.config.provenance if recipe.tunes else {}
        made = self._learned.provenance(recipe, base=base.name, pretrained=self.pretrained) | made
        self.model_.config = self.model_.config.model_copy(update={"provenance": made})

    def _read(self, source: AnnDataSource, vocab: GeneVocab, recipe: AnnotationRecipe) -> Reference:
        if recipe.tunes:
            require_counts(source)  # the tuned network reads expression, not only its order
        reference = read_reference(
            source,
            vocab,
            label_key=self.label_key,
            batch_key=self.batch_key,
            n_folds=recipe.n_folds,
            seed=self.seed,
            most_cells=recipe.most_cells if recipe.depths or recipe.scaled_genes else None,
        )
        self.match_, self.classes_ = source.match(vocab), reference.types
        self.n_cells_ = tuple(map(int, np.bincount(reference.codes, minlength=len(reference.types))))
        return reference

    @property
    def _recipe(self) -> AnnotationRecipe:
        return self.recipe if isinstance(self.recipe, AnnotationRecipe) else AnnotationRecipe.named(self.recipe)

    @property
    def part_weights_(self) -> dict[str, float]:
        """Factors of the logits of the parts: `expression at N counts`, `variable genes, scaled`, `network`."""
        self._require_fitted()
        return self._classifier.part_weights(scaled=self._recipe.scaled_genes > 0)

    def predict(
        self,
        adata: AnnData,
        *,
        key_added: str = KEY,
        coverage: float = 0.9,
        unassigned_above: float | None = NOVEL,
        cluster_key: str | None = None,
        embedding: str | None = None,
        progress: bool | None = None,
        copy: bool = False,
    ) -> AnnData | None:
        """Write the type of every cell into `obs[key_added]`.

        Beside it stand `<key_added>_confidence` (the probability of the type that was called), `<key_added>_novelty` (the share of
        held-back cells of known types that look less strange), `<key_added>_set` (all types that cannot be excluded, joined by " | ") and
        what each part alone would call (`<key_added>_by_expression`, `<key_added>_by_network`).

        Parameters
        ----------
        coverage
            Share of the cells, if they are like those of the reference, whose set holds their type.
        unassigned_above
            Novelty above which a cell is called "unassigned"; None: every cell that expresses a known gene gets a type.
        cluster_key
            Column of obs with clusters: `<key_added>_majority` gets the type that most cells of the cluster are called.
        embedding
            As in `fit`.
        copy
            Return a copy with the result instead of writing into `adata`.

        Raises
        ------
        InputError
            When the cells lack most of what the reference expresses.
        """
        self._require_fitted()
        check_key(key_added)
        require_shares(coverage, unassigned_above)
        check_target(adata, copy=copy)
        with self._cells(adata, {"embedding": embedding, "progress": progress}) as cells:
            table = self._columns(cells, coverage, unassigned_above, cluster_key)
        target = put_columns(adata, key_added, table.add_prefix(key_added), self._record(coverage, unassigned_above), copy=copy)
        return target if copy else None

    def predict_file(
        self,
        path_in: str | Path,
        path_out: str | Path,
        *,
        key_added: str = KEY,
        coverage: float = 0.9,
        unassigned_above: float | None = NOVEL,
        cluster_key: str | None = None,
        embedding: str | None = None,
        progress: bool | None = None,
        overwrite: bool = False,
    ) -> pd.DataFrame:
        """Write a copy of a file with the columns of `predict`, and return them.

        Parameters
        ----------
        path_in
            h5ad, zarr, 10x `.h5` or mtx folder.
        path_out
            Ends in `.h5ad` or `.zarr`; it appears whole or not at all.
        overwrite
            Replace `path_out` when it exists, at the end. Other parameters are those of `predict`.
        """
        self._require_fitted()
        check_key(key_added)
        require_shares(coverage, unassigned_above)
        with (
            Output(Path(path_in), Path(path_out), overwrite=overwrite) as output,
            self._cells(output.path_in, {"embedding": embedding, "progress": progress}) as cells,
        ):
            source = cells.source
            require_place(source.container, output.path_in)
            table = self._columns(cells, coverage, unassigned_above, cluster_key).add_prefix(key_added)
            record = self._record(coverage, unassigned_above)
            write_with_columns(source.container, output.path_in, output.result, table, key=key_added, record=record)
            output.publish()
            return table.set_index(pd.Index(source.obs_names))

    def predict_proba(self, adata: AnnData, *, embedding: str | None = None, progress: bool | None = None) -> pd.DataFrame:
        """Probability of every type (columns) for every cell (rows)."""
        logs = self._answered(adata, {"embedding": embedding, "progress": progress}).log_probabilities
        return pd.DataFrame(np.exp(logs), index=adata.obs_names, columns=list(self.classes_))

    def predict_sets(
        self,
        adata: AnnData,
        *,
        coverage: float = 0.9,
        allow_empty: bool = False,
        embedding: str | None = None,
        progress: bool | None = None,
    ) -> pd.DataFrame:
        """Say which types (columns) cannot be excluded for each cell (rows): conformal sets.

        Parameters
        ----------
        coverage
            Share of the cells, if they are like those of the reference, whose set holds their type.
        allow_empty
            Leave sets empty where no type fits as well as it does in that share of the reference: then the share is kept, or a little
            more than that where nearly every call is right. False: such a cell gets the type that it is called, and more cells are covered.
        """
        require_coverage(coverage)
        answer = self._answered(adata, {"embedding": embedding, "progress": progress})
        sets = self._classifier.stack.sets(answer.log_probabilities, coverage)
        return pd.DataFrame(sets if allow_empty else never_empty(sets, answer), index=adata.obs_names, columns=list(self.classes_))

    def novelty(self, adata: AnnData, *, embedding: str | None = None, progress: bool | None = None) -> Float[np.ndarray, "cell"]:
        """Share of held-back cells of known types that look less strange, for every cell."""
        return self._answered(adata, {"embedding": embedding, "progress": progress}).novelty

    def save(self, folder: str | Path) -> None:
        """Write network and classifier as a model folder; whole or not at all."""
        self._require_fitted()
        self.model_.save_pretrained(folder, parts={checkpoints.CLASSIFIER: self._classifier.tensors()})

    @classmethod
    def load(
        cls,
        folder: str | Path,
        *,
        layer: str | None = None,
        gene_key: str | None = None,
        device: str | None = None,
        threads: int | None = None,
    ) -> Self:
        """Read what `save` wrote.

        Parameters
        ----------
        layer, gene_key
            Where counts and gene names of the cells to annotate are, if not where `AnnDataSource` finds them.

        Raises
        ------
        InputError
            When the folder holds a model of another task.
        """
        model = ScGPT.from_pretrained(folder)
        made = made_for(TASK, model, folder, "`annformer annotate fit` or CellTypeClassifier.save")
        learned = Learned.read(made.get("classifier"), where=f"provenance in config.json of {folder}")
        recipe = AnnotationRecipe.read(made.get("recipe"), where=f"provenance in config.json of {folder}")
        options = learned.options.model_dump() | {"layer": layer, "gene_key": gene_key}
        one = cls(model, recipe=recipe, device=device, threads=threads, **options)
        one.model_, one.classes_, one.n_cells_ = model, learned.types, learned.n_cells
        one._classifier = Classifier.load(Path(folder) / checkpoints.CLASSIFIER, learned.held_back)
        one.history_, one.held_back_ = pd.DataFrame(), learned.held_back
        return one

    @contextmanager
    def _cells(self, adata: AnnData | str | Path, how: How) -> Iterator[Cells]:
        with (
            threadpool_limits(self.threads),
            torch_threads(self.threads),
            reading_quietly(),
            AnnDataSource(adata, gene_key=self.gene_key, layer=self.layer) as source,
        ):
            yield Cells(adata, source, self.model_, **how)

    def _answered(self, adata: AnnData, how: How) -> Answer:
        self._require_fitted()
        check_target(adata, copy=False)
        with self._cells(adata, how) as cells:
            return self._answer(cells)

    def _answer(self, cells: Cells) -> Answer:
        fitted, source, vocab = self._classifier, cells.source, self.model_.vocab.all_trained()
        require_genes(fitted.genes, source.match(vocab), source.name, "that the reference expresses")
        linear, far = fitted.read(source, vocab)
        network = None
        require_read(cells.embedding, reads=fitted.head is not None)
        if len(fitted.stack.weights) > len(linear):
            if self.device is not None:
                self.model_.to(device_named(self.device))
            network = network_says(cells, fitted.head)
        return fitted.answer(linear, network, far)

    def _columns(self, cells: Cells, coverage: float, unassigned_above: float | None, cluster_key: str | None) -> pd.DataFrame:
        clusters = None if cluster_key is None else cells.source.codes("cluster", cluster_key)
        answer = self._answer(cells)
        sets = self._classifier.stack.sets(answer.log_probabilities, coverage)
        return columns_of(answer, sets, self.classes_, unassigned_above=unassigned_above, clusters=clusters)

    @property
    def _learned(self) -> Learned:
        options = Options(label_key=self.label_key, batch_key=self.batch_key, layer=self.layer, gene_key=self.gene_key, seed=self.seed)
        return Learned(types=self.classes_, n_cells=self.n_cells_, held_back=self.held_back_, options=options)

    def _record(self, coverage: float, unassigned_above: float | None) -> dict[str, Any]:
        return {
            "model": self.model_.name,
            "fingerprint": self.model_.fingerprint,
            "task": TASK,
            "classes": list(self.classes_),
            "coverage": coverage,
            "version": annformer.__version__,
            **({} if unassigned_above is None else {"unassigned_above": unassigned_above}),
        }

    def _require_fitted(self) -> None:
        if not hasattr(self, "_classifier"):
            found = "a CellTypeClassifier that was not fitted"
            raise input_error(found, "a fitted one", "call fit(adata) first, or CellTypeClassifier.load(folder)")
