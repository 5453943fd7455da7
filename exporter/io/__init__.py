"""Files: opened safely, written whole, named atomically."""
