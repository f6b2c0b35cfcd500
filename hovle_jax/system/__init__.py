"""This process and its machine: command line, files, the cache folder, memory, progress."""
