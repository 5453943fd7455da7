"""Run artifacts and the reference, and compare their outputs."""
