"""Chips, slices of TPUs, and the compiler's options for them."""
