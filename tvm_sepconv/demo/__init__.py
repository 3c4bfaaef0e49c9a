"""A trained network that names the speaker of short recordings, run through compiled layers."""
