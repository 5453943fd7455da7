"""Release automation: a file that says what is wanted in, verified and attestable artifacts out."""
