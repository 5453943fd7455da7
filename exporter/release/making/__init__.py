"""Make a release on one machine, or join it from pieces (one artifact each) that were made on several machines."""
