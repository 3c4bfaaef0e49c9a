"""A GPU for half an hour: everything prepared before, measured in steps, read afterwards."""
