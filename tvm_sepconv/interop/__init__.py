"""Readers of other frameworks' models, each imported only when asked for."""
