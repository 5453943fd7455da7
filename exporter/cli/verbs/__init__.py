"""The verbs of ``ttexport``, one file each."""
