"""The work of the longer subcommands; imported after argument parsing."""
