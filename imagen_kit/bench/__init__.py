"""Measuring speed and memory of parts and recipes, beside others that do the same work; see ``imagen-kit bench``."""
