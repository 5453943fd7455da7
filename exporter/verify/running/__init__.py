"""Running artifact and reference, and comparing what they say."""
