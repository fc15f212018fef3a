"""How large the work of each stage is: ``tiny`` for any CPU, ``small`` for a first look, ``full`` for figures."""

from __future__ import annotations

from dataclasses import dataclass

__all__ = ["SIZES", "Size"]

MIB, GIB = 1 << 20, 1 << 30


@dataclass(frozen=True)
class Size:
    """One model, one batch, and how much is measured.

    Attributes:
        width, mlp_width, num_heads, num_kv_heads, num_blocks, vocabulary: of a Llama; all weights are bfloat16.
        batch_size, num_tokens: rows of a batch, tokens of each.
        num_warm_up, num_steps: steps that do not count, and those that do.
        windows: pairs (k, k') of the sweep.
        peer_window: (k, k') beside the peers.
        caps_bytes: of device memory, for headroom.
        copy_bytes: sizes of the machine profile's copies.
        num_updated: parameters of one host update there.
        threads: numbers of threads there.
        most_blocks: of any model, whatever fits.
        run_seconds: most that one process may take.
    """

    width: int
    mlp_width: int
    num_heads: int
    num_kv_heads: int
    num_blocks: int
    vocabulary: int
    batch_size: int
    num_tokens: int
    num_warm_up: int
    num_steps: int
    windows: tuple[tuple[int, int], ...]
    peer_window: tuple[int, int]
    caps_bytes: tuple[int, ...]
    copy_bytes: tuple[int, ...]
    num_updated: int
    threads: tuple[int, ...]
    most_blocks: int
    run_seconds: float

    @property
    def block_parameters(self) -> int:
        """Weights of one block.

        >>> SIZES["tiny"].block_parameters
        36992
        """
        attention = 2 * self.width**2 * (self.num_heads + self.num_kv_heads) // self.num_heads
        return attention + 3 * self.width * self.mlp_width + 2 * self.width


SIZES: dict[str, Size] = {
    # The stages' code, end to end, on any machine.
    "tiny": Size(
        width=64, mlp_width=128, num_heads=4, num_kv_heads=2, num_blocks=4, vocabulary=256,
        batch_size=2, num_tokens=16, num_warm_up=1, num_steps=3,
        windows=((1, 1), (2, 1), (3, 2)), peer_window=(2, 1), caps_bytes=(1 * MIB,),
        copy_bytes=(64 << 10, 1 * MIB), num_updated=1 << 16, threads=(1,), most_blocks=16, run_seconds=60.0,
    ),
    # 1.1 B parameters: TinyLlama's shape.
    "small": Size(
        width=2048, mlp_width=5632, num_heads=32, num_kv_heads=4, num_blocks=22, vocabulary=32000,
        batch_size=4, num_tokens=1024, num_warm_up=2, num_steps=5,
        windows=((1, 1), (2, 1), (3, 1), (4, 2), (8, 2)), peer_window=(3, 1), caps_bytes=(8 * GIB,),
        copy_bytes=(1 * MIB, 16 * MIB, 128 * MIB), num_updated=1 << 26, threads=(1, 2, 4, 8),
        most_blocks=64, run_seconds=90.0,
    ),
    # 2.6 B parameters, 16,384 tokens a step.
    "full": Size(
        width=2560, mlp_width=6912, num_heads=20, num_kv_heads=20, num_blocks=32, vocabulary=16384,
        batch_size=8, num_tokens=2048, num_warm_up=2, num_steps=8,
        windows=((1, 1), (2, 1), (3, 1), (4, 1), (4, 2), (8, 1), (8, 2), (8, 4), (16, 4), (40, 1)),
        peer_window=(3, 1), caps_bytes=(8 * GIB, 16 * GIB, 24 * GIB),
        copy_bytes=(64 << 10, 256 << 10, 1 * MIB, 4 * MIB, 16 * MIB, 64 * MIB, 256 * MIB),
        num_updated=1 << 28, threads=(1, 2, 4, 8, 16),
        most_blocks=1024, run_seconds=180.0,
    ),
}  # fmt: skip
