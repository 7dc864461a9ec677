"""Molmo inside the programs of others: one small module for each, with an extra of its name."""
