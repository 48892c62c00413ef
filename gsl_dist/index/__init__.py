"""Versions on disk and the search over them: faiss and numpy, no torch, no Ray."""
