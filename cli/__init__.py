"""The command line: one file a command; `output` is the only module that prints."""
