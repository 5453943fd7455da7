"""An artifact's matrices as they lie on disk."""
