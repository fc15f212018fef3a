"""What streams: an ``nn.Module`` becomes ordered units and anchors.

- ``rule.py``: finds the units by itself, or around those that the user chose.
- ``choice.py``: what the user's ``units=`` means in this model.
- ``anchors.py``: which parameters cannot stream, and why; which models are refused.
- ``table.py``: all of it as a table for people.
"""

from lightning_superpipe.partition.anchors import is_streamable
from lightning_superpipe.partition.choice import is_opaque
from lightning_superpipe.partition.rule import Partition, UnitSpec, partition, unit_bytes
from lightning_superpipe.partition.table import UnitRow, UnitTable, unit_table

__all__ = [
    "Partition",
    "UnitRow",
    "UnitSpec",
    "UnitTable",
    "is_opaque",
    "is_streamable",
    "partition",
    "unit_bytes",
    "unit_table",
]
