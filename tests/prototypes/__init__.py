"""Algorithms written against the interface to try it; see ``fedgan_lightning.algorithms`` for those that ship."""
