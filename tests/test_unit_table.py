"""The table that tells a user what streams, what stays, and whether it pays."""

from __future__ import annotations

import gc
import weakref

import torch
from torch import nn

from lightning_superpipe.partition import UnitRow, UnitTable, partition, unit_table

TEXT = """\
  name           parameters       bytes   role
 ─────────────────────────────────────────────────────────────────
  net.0                  20    80 Bytes   unit
  net.1                  20    80 Bytes   unit
  head                    4    16 Bytes   unit
  scale                   4    16 Bytes   anchor: outside units
  embed.weight           32   128 Bytes   anchor: shared by units
  lazy.weight             0     0 Bytes   anchor: lazy
  lazy.bias               0     0 Bytes   anchor: lazy
  [mask]                  3     3 Bytes   buffer

3 units: 176 Bytes of 320 Bytes stream (55.0%). On the device for good: 4 anchors (144 Bytes), 1 buffer (3 Bytes).
Largest unit 'net.0': k x largest / total = k x 25.0%"""


def model() -> nn.Module:
    root = nn.Module()
    root.scale = nn.Parameter(torch.ones(4))
    root.embed = nn.Embedding(8, 4)
    root.net = nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 4))
    root.head = nn.Linear(4, 8)
    root.head.weight, root.head.bias = root.embed.weight, nn.Parameter(torch.ones(4))
    root.lazy = nn.LazyLinear(3)
    root.register_buffer("[mask]", torch.ones(3, dtype=torch.bool), persistent=False)
    return root


def table(*units: int, anchors: int = 0, k: int | None = None) -> UnitTable:
    """Units and one anchor of so many bytes."""
    rows = [UnitRow(f"u{index}", size // 4, size, "unit") for index, size in enumerate(units)]
    return UnitTable((*rows, UnitRow("a", anchors // 4, anchors, "anchor: lazy")), k)


def test_rows_are_units_then_anchors_then_buffers():
    root = model()
    rows = unit_table(root, partition(root))
    assert [(row.name, row.num_parameters, row.num_bytes, row.role) for row in rows] == [
        ("net.0", 20, 80, "unit"),
        ("net.1", 20, 80, "unit"),
        ("head", 4, 16, "unit"),
        ("scale", 4, 16, "anchor: outside units"),
        ("embed.weight", 32, 128, "anchor: shared by units"),
        ("lazy.weight", 0, 0, "anchor: lazy"),
        ("lazy.bias", 0, 0, "anchor: lazy"),
        ("[mask]", 3, 3, "buffer"),
    ]
    assert len(rows) == 8
    assert (rows.streamed_bytes, rows.anchor_bytes, rows.buffer_bytes, rows.share_streamed) == (176, 144, 3, 0.55)


def test_the_table_prints_names_whole_and_totals_below():
    root = model()
    assert str(unit_table(root, partition(root))) == TEXT


def test_long_names_are_neither_folded_nor_cut():
    name = ".".join(["very_long_name"] * 20)
    assert name in str(UnitTable((UnitRow(name, 1, 4, "unit"),)))


def test_with_k_the_share_of_the_window_is_given():
    assert "k x largest / total = 2 x 25.0% = 50.0%" in str(table(4, 4, 4, 4, k=2))
    assert "k x largest / total = 4 x 25.0% = 100.0%" in str(table(4, 4, 4, 4, k=99))


def test_a_parameter_found_to_be_an_anchor_later_moves_between_rows():
    root = model()
    divided = partition(root)
    divided.anchors[id(root.head.bias)] = "read outside its unit"
    rows = {row.name: row for row in unit_table(root, divided)}
    assert rows["head.bias"].role == "anchor: read outside its unit"
    assert rows["head"].num_bytes == 0


def test_the_table_keeps_no_model_alive():
    root = model()
    rows = unit_table(root, partition(root))
    gone = weakref.ref(root)
    del root
    gc.collect()
    assert gone() is None
    assert str(rows) == TEXT


def test_a_table_without_units_prints():
    assert "0 units" in str(UnitTable(()))


def test_it_says_when_streaming_cannot_pay():
    assert "cannot pay" not in str(table(4, 4, 4))
    assert "2 slots of this size and the anchors take 16 Bytes, all parameters together 12 Bytes" in str(table(8, 4))
    assert "cannot pay" in str(table(4, 4, 4, anchors=100, k=4))
    assert str(table(4, 4, 4, 4, k=4)).endswith("Name smaller units (units=...), or a smaller k.")
    assert str(table(8)).endswith("all parameters together 8 Bytes. Name smaller units (units=...).")
