"""Layers that several denoisers share."""
