"""Reading and writing files: safe opening, streamed output, atomic names."""
