"""What tuning found, as a page and as pictures."""
