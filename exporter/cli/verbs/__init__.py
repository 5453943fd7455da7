"""Define the subcommands of ``ttexport``, each in a separate module."""
