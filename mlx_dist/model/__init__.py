"""The model: its files, its stages, its caches and its sampling."""
