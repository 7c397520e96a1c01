"""The network: one forward pass in one file (`encoder.py`), its attention rule (`attention.py`), its sizes (`config.py`)."""

from annformer.model.config import ModelConfig
from annformer.model.encoder import CellEncoder

__all__ = ["CellEncoder", "ModelConfig"]
