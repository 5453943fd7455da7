"""Make a release, using a cache of artifacts, a journal of finished work, and pieces made on other machines."""
