"""Caches, greedy generation."""
