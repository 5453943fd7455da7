"""Run the artifacts and the reference model, and compare the outputs of the artifacts with the reference outputs."""
