"""Tuning: searches, what they found, and which of it applies to a kernel."""
