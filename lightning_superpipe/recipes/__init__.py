"""Modules and data to start from: language, vision, and both. Nothing in them knows of streaming.

Each is a LightningModule or a LightningDataModule with an ordinary constructor, so they work without Hydra as well.
"""
