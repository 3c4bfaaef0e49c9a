"""The subcommands of ``tvm-sepconv``: each HELP, DESCRIPTION, `add_arguments` and `run`."""
