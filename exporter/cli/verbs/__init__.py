"""The verbs of ``ttexport``, each in a file of its own."""
