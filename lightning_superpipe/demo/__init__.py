"""The main job: a GPT learns the standard library's source on a device far too small for it.

Run it with ``python -m lightning_superpipe.demo``.
"""
