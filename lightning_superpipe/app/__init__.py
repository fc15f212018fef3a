"""The command line: ``python -m lightning_superpipe`` or ``superpipe``, a Hydra application over ``configs/``.

- ``main.py``: words of the command line, Hydra, and how it ends.
- ``assembly.py``: a configuration becomes module, data and trainer.
- ``modes.py``: what a run does: train, eval, predict, plan, bench, trace.
- ``explain.py``: what went wrong, in a paragraph.
"""
