"""The commands of the command line, by what they are about. None imports torch before it needs it."""
