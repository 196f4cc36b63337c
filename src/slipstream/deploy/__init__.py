"""Engines on a Ray cluster behind one entrance. Only ``cluster`` imports ray (docs/scale.md)."""
