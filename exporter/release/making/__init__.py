"""Make a release, with a cache of artifacts, a journal of the finished work, and pieces made on other machines."""
