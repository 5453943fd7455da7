"""One module a runtime, each run in a fresh process: it reads a job, computes logits, writes arrays."""
