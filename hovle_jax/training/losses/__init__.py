"""Losses: of tokens and vectors, contrastive, of preferences, of policies, of a student to its teacher."""
