"""Control vectors after representation engineering: read a direction off a model's hidden states, and steer with it.

The names mean what users of the RepEng library know: `ControlVector.train(model, tokenizer, dataset)` reads one
direction per layer off pairs of texts, `ControlModel(model, layer_ids).set_control(vector, coeff)` adds it.
"""

from repeng.control import ControlModel
from repeng.vectors import ControlVector, DatasetEntry

__all__ = ["ControlModel", "ControlVector", "DatasetEntry"]
