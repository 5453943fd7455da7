"""Run the artifacts and the reference model, and compare their outputs."""
