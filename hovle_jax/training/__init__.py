"""The stage table, the one train step, and the loop around it."""
