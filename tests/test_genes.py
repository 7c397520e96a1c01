from __future__ import annotations

import gzip
import importlib.util
import json
import sys
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from annformer.errors import InputError
from annformer.genes import HOW, best_gene_column, look_at, match_genes, read_orthologs, table_vocab
from annformer.vocab import GeneVocab

MODERN_GENES = """A1BG ACTB CD3D HLA-A HLA-DRB1 NKX2-1 MARCHF1 MARCHF3 SEPTIN2 SEPTIN7 DELEC1 MTARC1 SELENOF H2AZ1 AARS1 QARS1 C1orf43 TBCE
    TNFAIP3 MS4A1 MT-ND1 RN7SK TAFAZZIN KCNA3 IGHA1 RP11-34P13.7 AL627309.1 C4B_2 LINC01128 CA2 ACTG1 CAR3 GAPDH <cls>"""
MODERN = GeneVocab(MODERN_GENES.split())
OLD = GeneVocab(["<pad>", "MARCH1", "SEPT2", "H2AFZ", "RP11-34P13.7_ENSG00000243485", "HLA.A", "7SK", "TAZ"])
ENSEMBL = GeneVocab(["ENSG00000075624", "ENSG00000167286.9", "ENSG00000299999", "<cls>"])  # ACTB, CD3D, one that no table knows
CURRENT = table_vocab()


def found(names, vocab, **options):
    match = match_genes(names, vocab, **options)
    return [vocab.tokens[i] if i >= 0 else None for i in match.ids], match.how.tolist()


@pytest.mark.parametrize(
    ("name", "token", "how"),
    [
        ("ACTB", "ACTB", "symbol"),
        ("actb", "ACTB", "case"),
        (" ACTB ", "ACTB", "case"),
        ("C1ORF43", "C1orf43", "case"),
        ("MARCH1", "MARCHF1", "previous"),
        ("SEPT2", "SEPTIN2", "previous"),  # also an alias of SEPTIN6; a name that Ensembl used wins
        ("QARS", "QARS1", "previous"),  # also an alias of EPRS1
        ("TAZ", "TAFAZZIN", "previous"),  # also an alias of WWTR1
        ("H2AFZ", "H2AZ1", "previous"),
        ("CD20", "MS4A1", "alias"),
        ("ENSG00000075624", "ACTB", "ensembl"),
        ("ensg00000075624.17", "ACTB", "ensembl"),
        ("ACTB_ENSG00000075624", "ACTB", "composite"),
        ("ENSG00000075624.3_ACTB", "ACTB", "composite"),
        ("ENSG00000075624|ACTB", "ACTB", "composite"),
        ("RP11-34P13.7_ENSG00000243485", "RP11-34P13.7", "composite"),
        ("1-Mar", "MARCHF1", "spreadsheet"),
        ("Mar-01", "MARCHF1", "spreadsheet"),
        ("03-Mar", "MARCHF3", "spreadsheet"),
        ("2-Sep", "SEPTIN2", "spreadsheet"),
        ("7-Sept", "SEPTIN7", "spreadsheet"),
        ("15-Sep", "SELENOF", "spreadsheet"),
        ("1-Dec", "DELEC1", "spreadsheet"),
        ("X1.Mar", "MARCHF1", "spreadsheet"),
        ("2023-03-01", "MARCHF1", "spreadsheet"),
        ("2001-09-02 00:00:00", "SEPTIN2", "spreadsheet"),
        ("HLA.A", "HLA-A", "mangled"),
        ("HLA.DRB1", "HLA-DRB1", "mangled"),
        ("HLA.DRB1.1", "HLA-DRB1", "mangled"),
        ("NKX2.1", "NKX2-1", "mangled"),
        ("MT.ND1", "MT-ND1", "mangled"),
        ("C4B-2", "C4B_2", "mangled"),
        ("RP11.34P13.7", "RP11-34P13.7", "mangled"),
        ("TBCE-1", "TBCE", "mangled"),
        ("TBCE.1", "TBCE", "mangled"),
        ("QARS.1", "QARS1", "mangled"),
        ("GRCh38_CD3D", "CD3D", "mangled"),
        ("GRCh38-2020-A_CD3D", "CD3D", "mangled"),
        ("GRCh38-HLA-A", "HLA-A", "mangled"),
        ("hg19_SEPT2", "SEPTIN2", "mangled"),
        ("hg19_ENSG00000075624", "ACTB", "composite"),
        ("LOC643837", "LINC01128", "alias"),
    ],
)
def test_every_way_of_writing_a_gene(name, token, how):
    assert found([name], MODERN) == ([token], [how])


NO_GENES = """nan None ERCC-00171 percent.mt CD3_TotalSeqB mm10___Actb chr1:100-200 AAACATACAACCAC-1 <cls> -1 ... ENSG 1 3/1 9-27 31-Mar
    ENSMUSG00000029580 AL627309.2 NKX2-9 HLA IGHV3-75 X7SK"""  # 7SK is an alias of RN7SK, and aliases are not guessed in damaged names


@pytest.mark.parametrize("name", ["", *NO_GENES.split()])
def test_what_is_no_gene_of_the_vocabulary_matches_nothing(name):
    assert found([name], MODERN) == ([None], [""])


def test_a_full_name_that_is_a_gene_is_never_cut():
    vocab = GeneVocab(["HLA", "NKX2", "HLA-DRB1", "TBCE"])
    assert found(["HLA-DRB1", "NKX2-1", "TBCE-1", "HLA-1"], vocab)[0] == ["HLA-DRB1", None, "TBCE", "HLA"]


@pytest.mark.parametrize(
    ("name", "token"),
    [
        ("MARCHF1", "MARCH1"),
        ("SEPTIN2", "SEPT2"),
        ("2-Sep", "SEPT2"),
        ("H2AZ1", "H2AFZ"),
        ("ENSG00000164032.12", "H2AFZ"),
        ("TAFAZZIN", "TAZ"),
    ]
    + [(name, "RP11-34P13.7_ENSG00000243485") for name in ("RP11-34P13.7", "ENSG00000243485", "ENSG00000243485.5", "MIR1302-2HG")],
)
def test_an_old_vocabulary_is_found_by_new_names(name, token):
    assert found([name], OLD)[0] == [token]


def test_a_vocabulary_of_ensembl_ids():
    names = ["ENSG00000075624.17", "Actb", "CD3D", "ENSG00000167286", "ENSG00000299999.2", "X_ENSG00000299999", "<cls>"]
    tokens, how = found(names, ENSEMBL)
    assert tokens == ["ENSG00000075624"] * 2 + ["ENSG00000167286.9"] * 2 + ["ENSG00000299999"] * 2 + [None]
    assert how == ["ensembl"] * 5 + ["composite", ""]


def test_exact_text_wins_over_what_the_table_says():
    vocab = GeneVocab(["MARCH1", "MARCHF1"])
    assert found(["MARCH1", "MARCHF1", "march1", "1-Mar"], vocab)[0] == ["MARCH1", "MARCHF1", "MARCH1", "MARCH1"]
    # of two tokens for a gene its current symbol stands for it
    assert found(["ENSG00000145416"], vocab)[0] == ["MARCHF1"]


def test_tokens_that_differ_in_capitals_are_not_confused():
    vocab = GeneVocab(["Xyz1", "XYZ1"])
    assert found(["Xyz1", "XYZ1", "xyz1"], vocab)[0] == ["Xyz1", "XYZ1", None]


def test_ambiguous_names_stay_out_and_are_named():
    match = match_genes(["STRA13", "A20", "ACTB"], CURRENT)
    assert match.ids[0] == -1
    assert match.ambiguous["STRA13"] == ("BHLHE40", "CENPX")
    report = match.report()
    assert report.n_ambiguous == len(match.ambiguous)
    assert any("STRA13 (BHLHE40 or CENPX)" in line for line in report.lines())


def test_several_columns_of_a_gene_are_reported():
    match = match_genes(["TBCE", "TBCE-1", "MARCH1", "ACTB", "MARCHF1"], MODERN)
    assert match.share == 1
    report = match.report()
    assert report.collapsed == {"MARCHF1": ["MARCH1", "MARCHF1"], "TBCE": ["TBCE", "TBCE-1"]}
    assert (report.n_columns, report.n_matched, report.n_genes) == (5, 5, 3)
    assert any(
        "share a gene with another: 4 (for 2); counts are added (logarithms as the counts behind them)" in line
        and "TBCE (TBCE + TBCE-1)" in line
        for line in report.lines()
    )


def test_the_name_of_a_place_does_not_join_a_gene_that_is_there():
    # HGNC lists the neighbouring RP11-284N8.3 among the names of KCNA3
    assert found(["KCNA3", "RP11-284N8.3"], MODERN)[0] == ["KCNA3", None]
    assert found(["RP11-284N8.3"], MODERN)[0] == ["KCNA3"]


@pytest.mark.parametrize(
    ("names", "expected"),
    [
        (["NAA38", "LSMD1", "LSM8"], ["NAA38", None, "LSM8"]),
        (["LSMD1", "ENSG00000183011"], [None, "NAA38"]),
        (["NSUN6", "ARL5B-AS1"], ["NSUN6", None]),
        (["LINC01059", "CASC7", "GRAMD1B", "AGO2"], [None, None, "GRAMD1B", "AGO2"]),
        (["GRCh38_NSUN6", "GRCh38_ARL5B-AS1"], ["NSUN6", None]),
        (["NSUN6_ENSG00000999998", "ARL5B-AS1_ENSG00000999999"], ["NSUN6", None]),
        (["HNRNPU", "HNRNPU-AS1"], ["HNRNPU", None]),
        (["ARL5B-AS1"], ["NSUN6"]),
        (["FAM213A", "PRXL2A"], ["PRXL2A", "PRXL2A"]),  # a former name: the counts belong together
        (["TBCE", "TBCE.1", "ENSG00000285053"], ["TBCE"] * 3),
    ],
)
def test_an_alias_does_not_bring_counts_into_a_gene_that_is_there(names, expected):
    match = match_genes(names, CURRENT)
    assert [CURRENT.tokens[i] if i >= 0 else None for i in match.ids] == expected
    out = [name for name, token in zip(names, expected, strict=True) if token is None]
    assert list(match.apart) == out
    assert set(match.apart.values()) <= set(filter(None, expected))
    report = match.report()
    assert (report.n_apart, report.n_unmatched) == (len(out), len(out))
    assert any("which stay out" in line and out[0] in line for line in report.lines()) == bool(out)


def test_two_genes_of_the_table_are_never_one():
    # a vocabulary whose token holds the symbol of one gene and the Ensembl id of another
    vocab = GeneVocab(["A1CF_ENSG00000121410", "LSMD1"])
    assert found(["A1BG", "A1CF"], vocab)[0] == [None, "A1CF_ENSG00000121410"]
    assert found(["A1BG"], vocab)[0] == ["A1CF_ENSG00000121410"]
    # a token that is an alias of a gene is not this gene where both have a column
    assert found(["NAA38", "LSMD1"], vocab)[0] == [None, "LSMD1"]
    assert found(["NAA38"], vocab)[0] == ["LSMD1"]


def test_entrez_numbers_only_when_all_are_clearly_such():
    assert found(["60", "915", "643837", "7128"], MODERN) == (["ACTB", "CD3D", "LINC01128", "TNFAIP3"], ["entrez"] * 4)
    assert found([60.0, 915.0, 643837.0], MODERN)[0] == ["ACTB", "CD3D", "LINC01128"]
    assert set(found([str(i) for i in range(100)], MODERN)[0]) == {None}
    assert set(found([str(i) for i in range(50, 20000, 7)], MODERN)[0]) == {None}
    assert set(found(["60", "915", "CD3D"], MODERN)[0]) == {None, "CD3D"}


def test_mouse_symbols_go_by_the_same_symbol():
    names = ["Actb", "Cd3d", "Gapdh", "Sept2", "Nkx2-1", "Cd20", "Gm1234", "0610007P14Rik", "Car2"]
    tokens, how = found(names, MODERN)
    assert tokens == ["ACTB", "CD3D", "GAPDH", "SEPTIN2", "NKX2-1", None, None, None, None]
    assert set(how) == {"same-symbol", ""}


def test_an_ortholog_table_comes_before_the_same_symbol(tmp_path):
    table = {"Car2": "CA2", "ENSMUSG00000029580": "ENSG00000075624", "Gapdh": "ACTG1", "Nope": "no such gene"}
    names = ["Car2", "ENSMUSG00000029580.12", "Gapdh", "Nope", "Cd3d"]
    expected = (["CA2", "ACTB", "ACTG1", None, "CD3D"], ["ortholog"] * 3 + ["", "same-symbol"])
    assert found(names, MODERN, orthologs=table) == expected
    for suffix, delimiter in ((".tsv", "\t"), (".csv", ","), (".tsv.gz", "\t")):
        path = tmp_path / f"orthologs{suffix}"
        text = "# made by hand\nmouse,human\n" + "".join(f"{mouse},{human}\n" for mouse, human in table.items())
        data = text.replace(",", delimiter).encode()
        path.write_bytes(gzip.compress(data) if suffix.endswith("gz") else data)
        assert found(names, MODERN, orthologs=path) == expected
        assert found(names, MODERN, orthologs=str(path)) == expected


def test_an_ortholog_table_with_several_human_genes(tmp_path):
    path = tmp_path / "orthologs.tsv"
    path.write_text("Actb\tACTG1\nActb\tACTB\nMt1\tMT1A\nMt1\tMT1E\n")
    assert read_orthologs(path) == {"Actb": "ACTB"}
    path.write_text("Actb\tACTB\tone2one\n")
    with pytest.raises(InputError, match=r"line 1 .* has 3 columns"):
        read_orthologs(path)
    with pytest.raises(InputError, match="no file"):
        read_orthologs(tmp_path / "missing.tsv")


@settings(max_examples=30)
@given(st.lists(st.sampled_from(CURRENT.genes), min_size=1, max_size=60, unique=True))
def test_every_gene_finds_itself(names):
    match = match_genes(names, CURRENT)
    assert [CURRENT.tokens[i] for i in match.ids] == names


def test_every_gene_of_the_table_finds_itself_in_any_case():
    match = match_genes(CURRENT.genes, CURRENT)
    np.testing.assert_array_equal(match.ids, np.arange(len(CURRENT.genes)))
    for change in (str.lower, str.upper):
        changed = match_genes([change(gene) for gene in CURRENT.genes], CURRENT)
        np.testing.assert_array_equal(changed.ids, match.ids)


NAMES = st.lists(
    st.one_of(
        st.sampled_from(CURRENT.genes),
        st.sampled_from(
            [
                "MARCH1",
                "1-Mar",
                "HLA.A",
                "TBCE-1",
                "STRA13",
                "RP11-284N8.3",
                "KCNA3",
                "NSUN6",
                "ARL5B-AS1",
                "LSMD1",
                "NAA38",
                "Actb",
                "ENSG00000075624.2",
                "60",
                "",
                "nan",
            ]
        ),
        st.text(max_size=12),
        st.from_regex(r"(ENSG0000\d{7}|[A-Z]{2,4}\d{1,2}([-.]\d{1,2})?|\d{1,2}-(Mar|Sep|Dec)|LOC\d{1,6})", fullmatch=True),
    ),
    max_size=40,
)


@settings(max_examples=60)
@given(NAMES, st.randoms(use_true_random=False))
def test_any_names_match_the_same_in_any_order(names, random):
    match = match_genes(names, CURRENT)
    assert set(match.how) <= {*HOW, ""}
    np.testing.assert_array_equal(match.how == "", match.ids < 0)
    assert 0 <= match.share <= 1
    order = list(range(len(names)))
    random.shuffle(order)
    shuffled = match_genes([names[i] for i in order], CURRENT)
    np.testing.assert_array_equal(shuffled.ids, match.ids[order])
    np.testing.assert_array_equal(shuffled.how, match.how[order])
    json.dumps(match.report().to_dict())
    assert match.report().lines()


def test_genes_that_the_model_has_not_learned_get_no_token():
    vocab = GeneVocab(CURRENT.tokens, ["MARCHF1", "TBCE"])
    names = ["march1", "TBCE", "TBCE-1", "CD3D", "ERCC-00171", ""]
    match, whole = match_genes(names, vocab), match_genes(names, vocab.all_trained())
    assert match.how.tolist() == ["untrained", "untrained", "untrained", "symbol", "", ""]
    assert match.ids.tolist() == [-1, -1, -1, vocab["CD3D"], -1, -1]
    assert whole.ids.tolist()[:3] == [vocab["MARCHF1"], vocab["TBCE"], vocab["TBCE"]]
    assert match.share == pytest.approx(1 / 5)
    report = match.report()
    assert (report.n_matched, report.n_unmatched, report.n_untrained) == (1, 4, 3)
    assert (report.unmatched, report.untrained, report.collapsed) == (["ERCC-00171"], ["march1", "TBCE", "TBCE-1"], {})
    assert "3 columns are genes that the model has not learned: left out (march1, TBCE, TBCE-1)" in report.lines()
    assert "names that stay out in all: 4, for example ERCC-00171" in report.lines()
    assert not any("learned" in line for line in whole.report().lines())
    with pytest.raises(InputError, match=r"1 of 5 gene names.*; 3 more are genes of its vocabulary that it has not learned"):
        match.require(0.5)


def test_report_counts_add_up_and_can_be_stored(tmp_path):
    import anndata

    match = match_genes(["TBCE", "TBCE-1", "march1", "STRA13", "nope/this", "", "1/2-SBSRNA4"], CURRENT)
    report = match.report()
    assert sum(report.by_how.values()) == report.n_matched == 4
    assert report.n_named == 6
    assert report.n_matched + report.n_unmatched == report.n_named
    assert report.share == match.share == 4 / 6
    values = report.to_dict()
    assert json.loads(json.dumps(values)) == values
    adata = anndata.AnnData(np.zeros((1, 1), dtype=np.float32), uns={"annformer": {"genes": values}})
    adata.write_h5ad(tmp_path / "stored.h5ad")
    stored = anndata.read_h5ad(tmp_path / "stored.h5ad").uns["annformer"]["genes"]
    assert list(stored["collapsed"]) == ["TBCE: TBCE, TBCE-1"]
    assert list(stored["unmatched"]) == ["STRA13", "nope/this"]


@pytest.mark.parametrize(
    ("names", "what"),
    [
        (["ENSMUSG00000029580", "ENSMUSG00000000001.4"], "mouse Ensembl gene ids"),
        (["ENSG00000299998", "ENSG00000299997"], "human Ensembl gene ids"),
        (["ENSDARG00000104632", "ENSDARG00000100660"], "Ensembl gene ids of another species"),
        (["ENST00000456328.2", "ENST00000450305"], "Ensembl transcript ids"),
        (["0", "1", "2", "3"], "row numbers"),
        (["7105", "64102", "8813"], "Entrez gene numbers"),
        (["Sox17", "Gm1992", "Rp1", "0610007P14Rik"], "mouse gene symbols"),
        (["chr1:100-200", "chr1-300-400", "chrX_5_10"], "chromatin peaks"),
        (["AAACATACAACCAC-1", "AAACATTGAGCTAC-1"], "cell barcodes"),
        (["CD3_TotalSeqB", "CD4_TotalSeqB"], "proteins (antibodies)"),
        (["SOX17", "FOXP3", "PAX6"], "human gene symbols"),
        (["feature one", "feature two"], "no kind of gene name that annformer knows"),
        (["", "nan"], "blanks"),
        ([], "blanks"),
    ],
)
def test_too_few_matches_are_refused_with_what_the_names_look_like(names, what):
    vocab = GeneVocab(["GAPDH", "ACTB"])
    with pytest.raises(InputError) as error:
        match_genes(names, vocab).require()
    assert f"look like {what}" in str(error.value)
    assert f"0 of {sum(name not in ('', 'nan') for name in names)} gene names" in str(error.value)
    assert "expected: at least 10%" in str(error.value)
    assert look_at(names).remedy in str(error.value)


def test_the_refusal_names_better_columns():
    columns = {"feature_types": ["Gene Expression"] * 3, "symbol": ["ACTB", "GAPDH", "??"], "gene_ids": ["ENSG00000075624", "x", "y"]}
    with pytest.raises(InputError, match=r"set gene_key='symbol'.*'symbol' \(67% known\), 'gene_ids' \(33% known\)") as error:
        match_genes(["0", "1", "2"], MODERN).require(other_columns=columns)
    assert "feature_types" not in str(error.value)
    assert [name for name, _ in best_gene_column(columns, MODERN)] == ["symbol", "gene_ids", "feature_types"]


def test_enough_matches_are_accepted():
    match = match_genes(["ACTB", "x", "y", "z"], MODERN)
    match.require(min_share=0.25)
    with pytest.raises(InputError):
        match.require(min_share=0.26)


@pytest.fixture
def compile_genes(monkeypatch):
    path = Path(__file__).parents[1] / "scripts" / "compile_genes.py"
    spec = importlib.util.spec_from_file_location("compile_genes", path)
    module = importlib.util.module_from_spec(spec)
    monkeypatch.setitem(sys.modules, spec.name, module)  # dataclasses look there
    spec.loader.exec_module(module)
    return module


def test_the_table_is_compiled_from_the_lists(tmp_path, monkeypatch, compile_genes):
    def write(name, text):
        (tmp_path / name).write_bytes(gzip.compress(text.replace(" ", "\t").encode()))

    write(
        compile_genes.HGNC,
        "Symbol Approved.Symbol chromosome\nMARCHF1 MARCHF1 4\n1-MAR MARCHF1 4\nRNF171 MARCHF1 4\nMARCH1 MARCHF1 4\nTAZ WWTR1 3\n",
    )
    write(
        compile_genes.BIOMART,
        "ensembl_gene_id hgnc_symbol gene_biotype entrezgene_id\nENSG00000145416 MARCHF1 protein_coding 55016.0\n"
        "ENSMUSG00000029580 Actb protein_coding 11461.0\nENSG00000999999 RNF171 lncRNA \n",
    )
    families = "".join(f"ENSG0000020000{i} NA Y_RNA\n" for i in range(5))
    write(compile_genes.ANNOTABLES, f"ensgene entrez symbol\nENSG00000145416 55016 MARCHF1\nENSG00000250000 NA LONELY\n{families}")
    write(compile_genes.GENCODE, "#geneId symbol\nENSG00000145416 MARCH1\nENSG00000250001 AC092092\nENSGR0000002586 CD99\n")
    monkeypatch.setattr("sys.argv", ["compile_genes.py", str(tmp_path), str(tmp_path / "names.tsv.gz")])
    compile_genes.main()
    lines = gzip.decompress((tmp_path / "names.tsv.gz").read_bytes()).decode().splitlines()
    assert [line.split("\t") for line in lines if not line.startswith("#")] == [
        ["LONELY", "", "", "250000", ""],
        ["MARCHF1", "MARCH1", "RNF171", "145416", "55016"],
        ["RNF171", "", "", "999999", ""],  # an alias of MARCHF1 that Ensembl counts apart
        ["WWTR1", "", "TAZ", "", ""],
    ]
    assert "sha256" in lines[1]
