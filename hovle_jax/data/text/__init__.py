"""Conversations -> ids."""
