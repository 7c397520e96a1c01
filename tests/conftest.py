"""What all tests share: a small vocabulary of real genes, cells over them, a small network."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING

import anndata as ad
import numpy as np
import pandas as pd
import pytest
import scipy.sparse as sp
from hypothesis import settings

from annformer.vocab import GeneVocab

if TYPE_CHECKING:
    from annformer.scgpt import ScGPT

_NAMES = """
ACTB ACTG1 ACTR3 AIF1 ALDOA ANAPC16 ANP32B ANXA1 ANXA2 AP1S2 AP2S1 APRT ARF1 ARHGDIB ARL6IP4 ARL6IP5 ARPC1B ARPC2 ARPC3 ARPC5 ATP6V0E1
ATP6V1G1 B2M BRK1 BST2 BTF3 BTG1 CALM1 CALM2 CAP1 CAPZB CCL5 CCND3 CCNI CD37 CD3D CD3E CD44 CD48 CD52 CD53 CD63 CD69 CD7 CD74 CD79A CD79B
CD99 CEBPB CFD CFL1 CHCHD2 CIRBP CLIC1 CNBP COMMD6 COPE CORO1A COTL1 COX4I1 COX5B COX6A1 COX6B1 COX6C COX7A2 COX7A2L COX7C CRIP1 CST3 CST7
CSTB CTSS CTSW CUTA CXCR4 CYBA DDX5 DRAP1 DUSP1 EDF1 EEF1A1 EEF1B2 EEF1D EEF2 EID1 EIF1 EIF3D EIF3F EIF3G EIF3H EIF3K EIF3L EIF4A1 EIF4A2
EMP3 ENO1 ERP29 EVL FAU FCER1G FCGR3A FCN1 FKBP1A FOS FOSB FTH1 FTL FXYD5 GABARAP GAPDH GIMAP4 GIMAP7 GLRX GMFG GNLY GPSM3 GPX1 GPX4 GSTK1
GSTP1 GTF3A GUK1 GZMA GZMB HCST HIGD2A HINT1 HMGB1 HMGN1 HNRNPA0 HNRNPA1 HNRNPA2B1 HNRNPDL HNRNPK HSP90AA1 HSP90AB1 HSPA8 ICAM3 ID2 IER2
IFI6 IFITM1 IFITM2 IFITM3 IL2RG IL32 IL7R ISCU ISG15 ISG20 ITGB2 ITM2B JTB JUN JUNB KLF2 KLF6 LAMTOR4 LAPTM5 LCP1 LDHA LDHB LGALS1 LGALS2
LGALS3 LIMD2 LSP1 LST1 LTB LY6E LYZ MALAT1 MCL1 MT2A MYL12A MYL12B MYL6 NACA NAP1L1 NBEAL1 NDUFA11 NDUFA13 NDUFA4 NDUFB9 NEAT1 NEDD8
NFKBIA NKG7 NOSIP NPC2 NPM1 OAZ1 OST4 PABPC1 PARK7 PCBP1 PCBP2 PFDN5 PFN1 PGK1 PKM PLAC8 PNRC1 PPDPF PPIA PPIB PPP1CA PRELID1 PRR13 PSAP
PSMA7 PSMB1 PSMB8 PSMB9 PSME1 PSME2 PTGES3 PTMA PTPRC PTPRCAP PYCARD RAC1 RAC2 RAN RBM3 RGS10 RHOA RHOG RNASET2 S100A10 S100A11 S100A4
S100A6 S100A8 S100A9 SAP18 SAT1 SELL SERF2 SERP1 SERPINA1 SF3B5 SH3BGRL SH3BGRL3 SKP1 SLC25A3 SLC25A5 SLC25A6 SNRPD2 SNX3 SOD1 SRGN SRP14
SRSF3 SRSF5 SRSF7 SSR2 SSR4 SUMO2 TAGLN2 TALDO1 TIMP1 TKT TMA7 TMBIM6 TMEM123 TMSB10 TMSB4X TOMM7 TPI1 TPM3 TPT1 TRAF3IP3 TRAPPC1 TSC22D3
TSPO TUBA1A TUBA1B TXNIP TYMP TYROBP U2AF1 UBA52 UBB UBC UBE2D2 UBE2D3 UBL5 UBXN1 UCP2 UQCRH UXT VAMP2 VAMP8 VIM YBX1 YWHAB ZFAS1 ZFP36
ZFP36L2
"""
GENES = tuple(_NAMES.split())
UNKNOWN = ("NOT-A-GENE", "ERCC-00002", "construct_GFP", "tdTomato-WPRE", "HTO_7")

# the first call of a compiled function takes seconds, the others microseconds; and the same examples in every run
settings.register_profile("annformer", deadline=None, derandomize=True)
settings.load_profile("annformer")

MakeCells = Callable[..., ad.AnnData]


@pytest.fixture(scope="session")
def tiny_vocab() -> GeneVocab:
    return GeneVocab(GENES).with_specials()


@pytest.fixture(scope="session")
def tiny_adata() -> MakeCells:
    """Return a maker of cells: counts over the genes of `tiny_vocab` in another order, between names that no vocabulary knows."""

    def make(n_obs: int = 60, seed: int = 0) -> ad.AnnData:
        rng = np.random.default_rng(seed)
        names = rng.permutation([*GENES, *UNKNOWN]).astype(object)
        cell_type = rng.integers(3, size=n_obs)
        level = np.exp(rng.normal(-1.5, 1.2, size=(3, len(names))))
        depth = rng.uniform(0.5, 1.5, size=(n_obs, 1))
        counts = rng.poisson(level[cell_type] * depth).astype(np.float32)
        obs = pd.DataFrame(
            {
                "batch": pd.Categorical(np.array(["b0", "b1"])[rng.integers(2, size=n_obs)]),
                "cell_type": pd.Categorical(np.array(["B cell", "T cell", "monocyte"])[cell_type]),
            },
            index=[f"cell{i}" for i in range(n_obs)],
        )
        return ad.AnnData(sp.csr_matrix(counts), obs=obs, var=pd.DataFrame(index=names))

    return make


@pytest.fixture(scope="session")
def tiny_store(tiny_adata: MakeCells, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A store of 100 cells of two studies; for reading only."""
    from annformer.data.store_writer import write_store

    folder = tmp_path_factory.mktemp("tiny_store")
    for name, n_obs in (("blood", 60), ("lung", 40)):
        tiny_adata(n_obs, seed=n_obs).write_h5ad(folder / f"{name}.h5ad")
    write_store([folder / "blood.h5ad", folder / "lung.h5ad"], folder / "store")
    return folder / "store"


@pytest.fixture
def tiny_model(tiny_vocab: GeneVocab) -> ScGPT:
    """A network of two layers with random weights, the same in every test."""
    import torch

    from annformer.model.config import ModelConfig
    from annformer.scgpt import ModelFolderConfig, ScGPT
    from annformer.tokenizer import TokenizerSettings

    with torch.random.fork_rng():
        torch.manual_seed(0)
        network = ModelConfig(vocab_size=len(tiny_vocab), width=32, n_heads=4, n_layers=2, ff_width=32)
        return ScGPT(ModelFolderConfig(model=network, tokenizer=TokenizerSettings(), objectives={}), tiny_vocab).eval()
