"""Accuracy under shift: corruptions that are made here, or other sets of images."""
