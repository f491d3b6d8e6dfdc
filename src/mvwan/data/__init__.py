"""Demonstrations: formats on disk, decoding, transforms, windows."""
