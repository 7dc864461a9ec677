"""The command line, one file for each theme. It parses and prints; the rest is the library's."""
