"""The benchmark: our layers beside other people's frameworks and beside the machine's own limit."""
