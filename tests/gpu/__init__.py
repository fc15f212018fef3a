"""What the design has not seen on a GPU yet: streams, page-locked copies, kernels of the device.

Tests take a `Place`. On ``cuda`` they carry the mark `gpu` and prove something; on the emulated device (mark `emu`) the
same bodies run where there is no GPU, so that they are known to be sound, and prove what can be proved without streams.
"""
